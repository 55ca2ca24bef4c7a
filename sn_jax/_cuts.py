r"""The ellipsoid of networks that are too large for one matrix: over what is still read only.

Behind a cut of the graph only the values that cross it matter. With ``s`` those and Sigma their
ellipsoid, a source ``v = A s + w`` with ``|w| <= |P s|`` gives, for any e larger than the norm of
``P Sigma P^T``, the ellipsoid of s and v together: that of ``_ellipsoid`` in other coordinates, of
which what nobody reads any more is left out. On a plain chain it is the closed form of ECLipsE-Fast
(Xu & Sivaranjani 2024, https://arxiv.org/abs/2404.04375). In the coordinates v the final quadratic
form is banded, and so is its Cholesky factorization.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from sn_jax._ellipsoid import best_of, leading, least_proved, lost_in_gram
from sn_jax._symbols import UNIT, gamma

# Entries of the banded quadratic form, and of the largest ellipsoid.
_MOST_BAND, _MOST_LIVE = 2**26, 2**24
# The covariance of a rest that does not move, over the variance of its source.
_STILL = 1e-4

Columns = Mapping[Any, tuple[np.ndarray, float]]


class Step(NamedTuple):
    """A source ``v = A s + w`` with ``|w| <= |P s|``, or the outputs ``P s``.

    Attributes:
      key: the source; None for the outputs.
      size: of v.
      linear: source -> (its part of A^T, (source, v), by how much that errs).
      rest: source -> (its part of P^T, (source, row), likewise).
    """

    key: Any
    size: int
    linear: Columns
    rest: Columns


class TooWideError(Exception):
    """More crosses a cut, or the band is wider, than one matrix shall hold."""


def by_cuts(
    x: Any, steps: Sequence[Step], say: Callable[[str], None], most: float = math.inf
) -> tuple[float, list[float]]:
    """(a certified bound of the last step, how far each step's values move at most).

    Args:
      x: the first source; every length is relative to its own.
      steps: in order, the outputs last.
      say: told what is done.
      most: floating-point operations of one recursion.

    Raises:
      TooWideError: a matrix would be too large, or a recursion too long.
    """
    plan = _plan(x, steps)
    cost = sum(8 * len(p) * p.shape[1] ** 2 + 10 * len(p) ** 3 for _, p, _ in plan)
    if cost > most:
        raise TooWideError
    squared, es, scales, lengths = best_of(partial(_recursion, plan), len(steps) - 1, cost, say)
    say("the certificate")
    return _certified(squared, es, scales, x, steps), lengths


def _dense(columns: Columns, places: Mapping[Any, slice], n: int, rows: int) -> np.ndarray:
    whole = np.zeros((rows, n))
    for source, (m, _) in columns.items():
        whole[:, places[source]] = m.T
    return whole


def _plan(x: Any, steps: Sequence[Step]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each step (A, P, which of the coordinates are read later)."""
    last = {source: i for i, step in enumerate(steps) for source in (*step.linear, *step.rest)}
    live, plan = {x: x.size}, []
    for i, step in enumerate(steps):
        ends = np.cumsum([0, *live.values()])
        n = int(ends[-1])
        if n**2 > _MOST_LIVE:
            raise TooWideError
        places = {key: slice(a, b) for key, a, b in zip(live, ends, ends[1:], strict=False)}
        rows = next((m.shape[1] for m, _ in step.rest.values()), 0)
        p = _dense(step.rest, places, n, rows)
        # A smaller matrix with the same P^T P.
        p = np.linalg.qr(p)[1] if len(p) > 2 * n else p
        stay = [key for key in live if last.get(key, -1) > i]
        kept = np.concatenate([np.arange(n)[places[key]] for key in stay] + [np.zeros(0, int)])
        plan.append((_dense(step.linear, places, n, step.size), p, kept.astype(int)))
        live = {key: live[key] for key in stay} | {step.key: step.size}
    return plan


def _recursion(plan, thetas):
    """(the squared bound, all e, the largest variance of each source, how far each moves)."""
    sigma = np.eye(plan[0][0].shape[1])
    es, scales, lengths = [], [], []
    for (a, p, kept), theta in zip(plan, [*thetas, None], strict=True):
        half = p @ sigma
        s = half @ p.T
        top = max(_largest(s), 0.0)
        if theta is None:
            return top, es, scales, [*lengths, math.sqrt(top)]
        e = (1 + theta) * top
        if e > 0:
            factor = np.linalg.cholesky(e * np.eye(len(s)) - (s + s.T) / 2)
            turned = scipy.linalg.solve_triangular(factor, half, lower=True)
            sigma = sigma + turned.T @ turned
        cross = a @ sigma
        own = cross @ a.T
        e = e or _STILL * (float(np.max(np.diag(own), initial=0.0)) or 1.0)
        own = own + e * np.eye(len(a))
        beside = cross[:, kept]
        sigma = np.block([[sigma[np.ix_(kept, kept)], beside.T], [beside, own]])
        es.append(e)
        scales.append(float(np.max(np.diag(own), initial=0.0)))
        lengths.append(math.sqrt(max(_largest(own), 0.0)))
    raise AssertionError("the outputs come last")


def _largest(s: np.ndarray) -> float:
    return leading((s + s.T) / 2)[0] if len(s) else 0.0


class _Banded:
    """A symmetric matrix in LAPACK's lower banded form."""

    def __init__(self, n: int, band: int):
        self.rows = np.zeros((band + 1, n))

    def add(self, blocks: Sequence[tuple[int, np.ndarray]], sign: float) -> None:
        """``sign * D^T D`` of a matrix D of (first column, block) in ascending order."""
        for i, (start, block) in enumerate(blocks):
            for begin, left in blocks[: i + 1]:
                product = sign * (block.T @ left)
                for j in range(left.shape[1]):
                    # Of the diagonal blocks only what lies below.
                    first = j if begin == start else 0
                    at = start + first - (begin + j)
                    part = product[first:, j]
                    self.rows[at : at + len(part), begin + j] += part


def _certified(
    squared: float, es: Sequence[float], scales: Sequence[float], x: Any, steps: Sequence[Step]
) -> float:
    r"""At least the bound, proved for these e.

    ``|y|^2 <= L^2 |x|^2`` follows from ``L^2 (|x|^2 + sum_k (|v_k - A_k s|^2 - |P_k s|^2) / e_k) -
    |C s|^2`` being no negative number for any x and v: its matrix, lowered by what rounding can
    hide, has a Cholesky factorization.
    """
    places, scale, n = {x: 0}, {x: 1.0}, x.size
    for step, variance in zip(steps, scales, strict=False):
        places[step.key], scale[step.key] = n, math.sqrt(variance)
        n += step.size
    starts = [min((places[s] for s in (*step.linear, *step.rest)), default=n) for step in steps]
    ends = [places[step.key] + step.size for step in steps[:-1]]
    ends.append(max((places[s] + len(m) for s, (m, _) in steps[-1].rest.items()), default=0))
    band = min(max(b - a for a, b in zip(starts, ends, strict=True)), n) - 1
    if (band + 1) * n > _MOST_BAND:
        raise TooWideError
    core, outer, hidden, c_hidden, c_size = _Banded(n, band), _Banded(n, band), 0.0, 0.0, 0.0
    core.rows[0, : x.size] = 1.0
    total = float(x.size)
    for step, e in zip(steps, [*es, 1.0], strict=True):
        last, root = step.key is None, math.sqrt(e)
        for columns, sign in ((step.linear, 1.0), (step.rest, -1.0)):
            if last and sign > 0:
                continue
            blocks, error, size = [], 0.0, 0.0
            for source, (m, wrong) in columns.items():
                part = (-m if sign > 0 else m).T * (scale[source] / root)
                blocks.append((places[source], part))
                error += wrong * scale[source] / root
                size += float(np.linalg.norm(part)) ** 2
            if sign > 0:
                blocks.append((places[step.key], np.eye(step.size) * (scale[step.key] / root)))
                size += step.size * (scale[step.key] / root) ** 2
            size *= 1 + gamma(2 * n + 32)
            rows = max((len(part) for _, part in blocks), default=0)
            lost = lost_in_gram(math.sqrt(size), error, rows)
            (outer if last else core).add(sorted(blocks, key=lambda block: block[0]),
                                          1.0 if last else sign)  # fmt: skip
            if last:
                c_hidden, c_size = lost, size
            else:
                hidden += lost + UNIT * 8 * len(steps) * size
                total += size

    def lowered(squared: float) -> tuple[float, bool]:
        matrix = squared * core.rows - outer.rows
        trace = float(np.abs(matrix[0]).sum())
        slack = squared * hidden + c_hidden + 8 * UNIT * (squared * total + c_size)
        slack += gamma(2 * (band + 1) + 32) * trace * (1 + 1e-6)
        matrix[0] -= slack * (1 + 1e-6)
        try:
            scipy.linalg.cholesky_banded(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return slack, False
        return slack, True

    return least_proved(squared, c_size, c_hidden, lowered)
