r"""One ellipsoid that holds everything that can move together: the tightest domain.

For a step of x of length at most 1, the moves ``s`` of all sources so far satisfy
``s^T Sigma^-1 s <= 1``. A source with ``|w| <= |P s|`` extends it: for any e larger than the norm
of ``S = P Sigma P^T``, the matrix ``Sigma^-1 - P^T P / e`` is positive definite, and with the
covariance ``e`` for w the inequality holds for both together. All e are free: e = (1 + theta) |S|
with theta searched, and one factorization proves the bound that comes out.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sn_jax._symbols import UNIT, gamma

# Floating-point operations spent in the search, and the factors tried.
_EFFORT = 4e9
_THETAS = (1.0, 0.5, 0.25, 0.1, 0.03, 2.0, 4.0)
# Parts that are searched by themselves; of more than that, several together.
_MOST_PARTS = 64
# The covariance of what does not move, over the least of what does.
_STILL = 1e-6


class Block(NamedTuple):
    """``|w_g| <= |P_g s|`` of each group g of entries of a new source, or the outputs ``P s``.

    Attributes:
      key: the source; None for the outputs.
      columns: source -> (its part of P^T, (source, row), by how much that errs).
      size: of w.
      rows: the group that each row bounds, -1 for rows of zeros; None where all are one.
      entries: the group that each entry of w is in; None where all are in one.
    """

    key: Any
    columns: dict[Any, tuple[np.ndarray, float]]
    size: int
    rows: np.ndarray | None = None
    entries: np.ndarray | None = None

    def groups(self, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(of each row, of each entry of w); every output is one by itself."""
        if self.key is None:
            return np.arange(n_rows), np.zeros(0, int)
        if self.rows is None or self.entries is None:
            return np.zeros(n_rows, int), np.zeros(self.size, int)
        return self.rows[:n_rows], self.entries  # what sees nothing has no rows


class Ellipsoid(NamedTuple):
    """What one run finds.

    Attributes:
      upper: certified.
      lengths: how far each block can move at most.
      squared: the square of the bound before it was certified.
      es: the covariance of each block but the last, or of each of its entries; 0 where it does
        not move.
      parts: what the search ran on, with what it found there.
    """

    upper: float
    lengths: list[float]
    squared: float
    es: list[Any]
    parts: "tuple[tuple[Part, Ellipsoid], ...]" = ()

    @property
    def directions(self) -> int:
        """Of the largest part."""
        return max((part.directions for part, _ in self.parts), default=0)


class Seen(NamedTuple):
    """Some of the entries of x, in place of it."""

    size: int


class Part(NamedTuple):
    """Coordinates that nothing outside of them is tied to.

    Attributes:
      x: the entries of x, or x.
      blocks: as of the whole, with the rows and entries of this part; maybe none.
      places: of each block, which of its entries of w these are.
    """

    x: Any
    blocks: Sequence[Block]
    places: list[np.ndarray]

    @property
    def directions(self) -> int:
        return self.x.size + sum(block.size for block in self.blocks)


def stacked(x: Any, blocks: Sequence[Block]) -> tuple[dict[Any, slice], list[np.ndarray], int]:
    """(source -> its coordinates, P of every block, the number of coordinates)."""
    places, n, matrices = {x: slice(0, x.size)}, x.size, []
    for block in blocks:
        widths = [m.shape[1] for m, _ in block.columns.values()]
        p = np.zeros((widths[0] if widths else 0, n))
        for source, (matrix, _) in block.columns.items():
            p[:, places[source]] = matrix.T
        matrices.append(p)
        if block.key is not None:
            places[block.key] = slice(n, n + block.size)
            n += block.size
    return places, matrices, n


def separated(x: Any, blocks: Sequence[Block]) -> list[Part]:
    """Parts that share no coordinate, as the examples of a batch: the bound is their largest."""
    places, matrices, n = stacked(x, blocks)
    everything = [np.arange(block.size) for block in blocks]
    groups, starts, tied, to, at = [], [], [], [], n
    for block, p in zip(blocks, matrices, strict=True):
        rows, entries = block.groups(len(p))
        row, column = np.nonzero(p * (rows >= 0)[:, None])
        tied += [at + rows[row], at + entries]
        to += [column, np.arange(n)[places[block.key]] if block.key is not None else entries]
        groups.append((rows, entries))
        starts.append(at)
        at += 1 + int(max(rows.max(initial=-1), entries.max(initial=-1)))
    tied, to = np.concatenate(tied), np.concatenate(to)
    graph = coo_array((np.ones(len(tied)), (tied, to)), shape=(at, at))
    labels = connected_components(graph, directed=False)[1]
    # What sees nothing of x is with the first that does.
    numbers = np.unique(labels[to[to < x.size]])
    number = np.zeros(labels.max(initial=0) + 1, int)
    number[numbers] = np.arange(len(numbers)) % _MOST_PARTS
    labels = number[labels]
    if len(numbers) < 2:
        return [Part(x, blocks, everything)]
    parts = []
    for label in range(min(len(numbers), _MOST_PARTS)):
        seen = Seen(int(np.count_nonzero(labels[: x.size] == label)))
        here, kept = [], []
        for block, (rows, entries), start in zip(blocks, groups, starts, strict=True):
            inside = (rows >= 0) & (labels[start + rows] == label)
            place = np.flatnonzero(labels[start + entries] == label)
            columns = {
                seen if source is x else source: (m[labels[places[source]] == label][:, inside], e)
                for source, (m, e) in block.columns.items()
            }
            known = np.unique(np.concatenate([rows[inside], entries[place]]))
            of_rows = np.searchsorted(known, rows[inside])
            here.append(Block(block.key, columns, len(place), of_rows,
                              np.searchsorted(known, entries[place])))  # fmt: skip
            kept.append(place)
        parts.append(Part(seen, here, kept))
    return parts


def joined(blocks: Sequence[Block], parts: Sequence[tuple[Part, Sequence[Any]]]) -> list[Any]:
    """The covariances of all parts as one of each entry of each block."""
    if len(parts) == 1:
        return list(parts[0][1])
    out: list[Any] = []
    for i, block in enumerate(blocks[:-1]):
        e = np.zeros(block.size)
        for part, es in parts:
            e[part.places[i]] = es[i]
        moves = e > 0
        if moves.any():
            e[~moves] = _STILL * e[moves].min()
        out.append(e if moves.any() else 0.0)
    return out


def ellipsoid(x: Any, blocks: Sequence[Block], say: Callable[[str], None]) -> Ellipsoid:
    """One covariance for each block of each part.

    Args:
      x: the first source; every length is relative to its own.
      blocks: in order, the outputs last.
      say: told what is done.
    """
    known: dict[Any, Ellipsoid] = {}
    found, parts = [], separated(x, blocks)
    for part in parts:
        key = _alike(part) if len(parts) > 1 else None
        if key not in known:
            known[key] = _searched(part.x, part.blocks, say)
        found.append((part, known[key]))
    squared = max(one.squared for _, one in found)
    es = joined(blocks, [(part, one.es) for part, one in found])
    lengths = [max(each) for each in zip(*(one.lengths for _, one in found), strict=True)]
    upper = certified(squared, es, x, blocks)
    return Ellipsoid(upper, lengths, squared, es, tuple(found))


def _alike(part: Part) -> Any:
    """Equal for parts that are the same up to rounding: what is found for one serves the other,
    since the certificate is of all."""
    _, matrices, _ = stacked(part.x, part.blocks)
    key: list[Any] = []
    for block, p in zip(part.blocks, matrices, strict=True):
        unit = 2.0 ** (math.frexp(float(np.max(np.abs(p), initial=0.0)))[1] - 32)
        rows, entries = block.groups(len(p))
        key += [p.shape, np.round(p / unit).astype(np.int64).tobytes(), unit]
        key += [rows.tobytes(), entries.tobytes()]
    return tuple(key)


def _searched(x: Any, blocks: Sequence[Block], say: Callable[[str], None]) -> Ellipsoid:
    _, matrices, _ = stacked(x, blocks)
    sizes = [block.size for block in blocks]
    # A smaller matrix with the same P^T P.
    matrices = [np.linalg.qr(p)[1] if len(p) > 2 * p.shape[1] else p for p in matrices]
    cost = sum(8 * len(p) * p.shape[1] ** 2 + 10 * len(p) ** 3 for p in matrices)

    def run(thetas):
        return _recursion(x.size, matrices, sizes, thetas)

    squared, es, lengths = best_of(run, len(blocks) - 1, cost, say)
    return Ellipsoid(math.inf, lengths, squared, es)


def best_of(
    run: Callable[[np.ndarray], tuple[Any, ...]], n: int, cost: float, say: Callable[[str], None]
) -> tuple[Any, ...]:
    """The run with the least first number, of as many as there is effort for.

    Args:
      run: a recursion with n numbers theta.
      cost: of a run, in floating-point operations.
      say: told what is done.
    """
    tries, thetas = int(min(400, _EFFORT / (cost + 1))), np.ones(n)
    best = run(thetas)
    if not n:
        return best
    for theta in _THETAS[1 : 1 + tries]:
        found = run(np.full(n, theta))
        if found[0] < best[0]:
            best, thetas = found, np.full(n, theta)
    tries, step = tries - len(_THETAS), 2.0
    while tries > 0 and step > 1.02:
        before = best[0]
        for i in range(n):
            for factor in (step, 1 / step):
                trial = thetas.copy()
                trial[i] *= factor
                found = run(trial)
                tries -= 1
                if found[0] < best[0]:
                    best, thetas = found, trial
                    break
            say(f"ellipsoid: {math.sqrt(best[0]):.6g}")
            if tries <= 0:
                break
        if best[0] >= before * (1 - 1e-3):
            step = math.sqrt(step)
    return best


def _recursion(n_x: int, matrices, sizes, thetas):
    """(the squared bound, all e, how far each block moves)."""
    n = n_x + sum(sizes)
    sigma, at = np.zeros((n, n)), n_x
    sigma[:n_x, :n_x] = np.eye(n_x)
    es, lengths = [], []
    for p, size, theta in zip(matrices, sizes, [*thetas, None], strict=True):
        half = p @ sigma[:at, :at]
        s = half @ p.T
        if not s.size:
            es.append(0.0)
            lengths.append(0.0)
            at += size
            continue
        if theta is None:
            top = float(np.linalg.eigvalsh((s + s.T) / 2)[-1])
            lengths.append(math.sqrt(max(top, 0.0)))
            return max(top, 0.0), es, lengths
        values, vectors = np.linalg.eigh((s + s.T) / 2)
        top = float(values[-1])
        lengths.append(math.sqrt(max(top, 0.0)))
        if top <= 0 or size == 0:
            es.append(0.0)
            at += size
            continue
        e = (1 + theta) * top
        turned = vectors.T @ half
        sigma[:at, :at] += turned.T @ (turned / (e - values)[:, None])
        sigma[at : at + size, at : at + size] = e * np.eye(size)
        es.append(e)
        at += size
    return 0.0, es[:-1], lengths


def certified(squared: float, es: Sequence[Any], x: Any, blocks: Sequence[Block]) -> float:
    r"""At least the bound, proved for these e: one for a block, or one for each of its entries.

    With w in units of sqrt(e), ``|y|^2 <= L^2 |x|^2`` for all moves that keep every
    ``|w_i|^2 <= |P_i s|^2`` follows from ``L^2 (I - sum_i P_i^T P_i) - C^T C`` being positive
    semidefinite: multiply out and add the inequalities. Its Cholesky factorization is in floating
    point: the diagonal is lowered by what that and the matrix itself can hide first.
    """
    places, matrices, n = stacked(x, blocks)
    scale = np.ones(n)
    for block, e in zip(blocks, es, strict=False):
        if np.min(e, initial=math.inf) > 0:
            scale[places[block.key]] = np.sqrt(e)
    total, hidden, c_size = np.zeros((n, n)), 0.0, 0.0
    outer = np.zeros((n, n))
    c_hidden = 0.0
    for i, (block, p) in enumerate(zip(blocks, matrices, strict=True)):
        last = block.key is None
        if not last and (block.size == 0 or np.min(es[i]) <= 0):
            # Nothing moves it, so that its columns stand alone: not to be seen by others either.
            if block.size and any(m.any() or e for m, e in block.columns.values()):
                return math.inf
            continue
        if not last and np.ndim(es[i]):
            rows, entries = block.groups(len(p))
            of_group = np.ones(1 + max(rows.max(initial=-1), entries.max(initial=-1)))
            of_group[entries] = es[i]
            p, rows = p[rows >= 0], rows[rows >= 0]
            divisor = np.sqrt(of_group)[rows]
        else:
            divisor = np.full(len(p), 1.0 if last else math.sqrt(es[i]))
        p = p * scale[: p.shape[1]] / divisor[:, None]
        least = float(np.min(divisor, initial=math.inf))
        error = sum(
            e * float(np.max(scale[places[source]], initial=0.0)) / least
            for source, (_, e) in block.columns.items()
        )
        size = float(np.linalg.norm(p)) * (1 + gamma(2 * p.size + 16))
        lost = lost_in_gram(size, error, len(p))
        if last:
            outer, c_hidden, c_size = p.T @ p, lost, size**2
        else:
            k = p.shape[1]
            total[:k, :k] += p.T @ p
            hidden += lost + UNIT * 8 * len(blocks) * size**2
    core = np.eye(n) - total

    def lowered(squared: float) -> tuple[float, bool]:
        matrix = squared * core - outer
        trace = float(np.abs(np.diag(matrix)).sum())
        slack = squared * (hidden + 4 * UNIT * math.sqrt(n)) + c_hidden
        slack += 8 * UNIT * (squared * float(np.linalg.norm(core)) + c_size)
        slack += gamma(2 * n + 32) * trace * (1 + 1e-6)
        matrix.flat[:: n + 1] -= slack * (1 + 1e-6)
        try:
            np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return slack, False
        return slack, True

    return least_proved(squared, c_size, c_hidden, lowered)


def lost_in_gram(size: float, error: float, rows: int) -> float:
    """What floating point hides of ``P^T P``, and what the error of P does to it.

    Args:
      size: at least the length of P, which was scaled.
      error: of P before it was scaled.
      rows: of P.
    """
    error += 4 * UNIT * size
    return gamma(2 * rows + 32) * size**2 + 2 * error * size + error**2


def least_proved(
    squared: float, c_size: float, c_hidden: float, lowered: Callable[[float], tuple[float, bool]]
) -> float:
    """The root of the first square, from ``squared`` on, that is proved.

    Args:
      squared: of the bound before it was certified.
      c_size: the squared length of the map to the outputs.
      c_hidden: what rounding hides of its Gram matrix.
      lowered: a square -> (how far the diagonal was lowered, whether its form was definite then).
    """
    if squared == 0 and c_size == 0:
        return math.sqrt(c_hidden)
    squared, growth = max(squared, c_hidden), 0.0
    for _ in range(40):
        slack, definite = lowered(squared)
        if definite:
            return math.sqrt(squared) * (1 + 8 * UNIT)
        growth = max(2 * growth, slack / squared)
        squared *= 1 + growth
    return math.inf


def leading(s: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue of a symmetric matrix, and its vector."""
    n, values, vectors = len(s), np.zeros(0), np.zeros((0, 0))
    # LAPACK's search for one of many equal ones can fail, by an error or by finding none.
    with contextlib.suppress(np.linalg.LinAlgError):
        values, vectors = scipy.linalg.eigh(s, subset_by_index=[n - 1, n - 1])
    if not values.size:
        values, vectors = np.linalg.eigh(s)
    return float(values[-1]), vectors[:, -1]
