r"""The tightest ellipsoid: one covariance for each entry of an elementwise source.

Multipliers ``t > 0`` of the inequalities ``w_k^2 <= (P_k s)^2`` prove ``|y|^2 <= rho |x|^2`` where

    M(rho, t) = rho I_x + sum_k t_k (e_k e_k^T - P_k^T P_k) - C^T C

is positive semidefinite (LipSDP-Neuron of Fazlyab et al. 2019, eq. 7, for any graph). The least rho
is found by a primal-dual interior-point method (the direction of Helmberg, Rendl, Vanderbei &
Wolkowicz 1996, with Mehrotra's corrector). Every M that it passes is positive definite, so that it
may stop anywhere, and a certificate follows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import get_lapack_funcs

from sn_jax._ellipsoid import Block, Ellipsoid, Part, certified, joined, stacked

dpotrf, dtrtri = get_lapack_funcs(("potrf", "trtri"), dtype=float)
# How close rho comes to its least value.
_GAP = 1e-6
# What cannot move is held by a multiplier so much larger than what sees it.
_STIFF = 1e8


def tight(
    x: Any, blocks: Sequence[Block], start: Ellipsoid, steps: int, say: Callable[[str], None]
) -> tuple[float, list[float]]:
    """(a certified bound of the last block, how far each block moves at most).

    Args:
      x: the first source; every length is relative to its own.
      blocks: in order, the outputs last.
      start: what one covariance for each block gives.
      steps: of the interior-point method, at most.
      say: told what is done.
    """
    if not 0 < start.squared < math.inf or len(blocks) == 1:
        return start.upper, start.lengths
    known: dict[int, tuple[float, list[Any]]] = {}
    for part, begin in start.parts:
        if id(begin) not in known:
            known[id(begin)] = _searched(part, begin, steps, say)
    found = [(part, known[id(begin)]) for part, begin in start.parts]
    squared = max(square for _, (square, _) in found)
    es = joined(blocks, [(part, es) for part, (_, es) in found])
    upper = certified(squared, es, x, blocks)
    # Of the lengths those of the start hold, and the last is what was found.
    return min(upper, start.upper), [*start.lengths[:-1], min(upper, start.lengths[-1])]


def _searched(
    part: Part, begin: Ellipsoid, steps: int, say: Callable[[str], None]
) -> tuple[float, list[Any]]:
    """(the squared bound, the covariances) of a part."""
    if begin.squared == 0:
        return begin.squared, begin.es
    problem = _Problem(part.x, part.blocks, begin)
    rho, t = problem.solve(steps, say)
    if rho == math.inf:
        return begin.squared, begin.es
    return rho * begin.squared, problem.covariances(rho, t)


class _Problem:
    """In units in which rho and all t are 1 at the start."""

    def __init__(self, x: Any, blocks: Sequence[Block], start: Ellipsoid):
        places, self.matrices, n = stacked(x, blocks)
        self.blocks, self.start = blocks, start
        live, of_column = np.zeros(n, bool), np.zeros(n, int)
        scale, rows, of_row = np.ones(n), [], []
        live[: x.size] = True
        self.members: list[np.ndarray] = []  # of each block, which t each entry has; -1 for none
        count = 1
        for block, e, p in zip(blocks[:-1], start.es, self.matrices, strict=False):
            place, p = places[block.key], np.where(live[: p.shape[1]], p, 0.0)
            of_rows, of_entries = block.groups(len(p))
            kept = p.any(1) & (of_rows >= 0)
            moves = np.zeros(1 + max(of_rows.max(initial=-1), of_entries.max(initial=-1)), bool)
            moves[of_rows[kept]] = True
            if e <= 0 or not moves.any():
                self.members.append(np.full(block.size, -1))
                live[place] = False
                continue
            root = math.sqrt(e)
            scale[place] = root
            number = np.where(moves, count + np.cumsum(moves) - 1, -1)
            p, of_rows = p[kept], number[of_rows[kept]]
            if len(moves) == 1 and len(p) > p.shape[1]:
                # A smaller matrix with the same P^T P.
                p = np.linalg.qr(p)[1]
                of_rows = of_rows[: len(p)]
            of_row.append(of_rows)
            count += int(np.count_nonzero(moves))
            numbers = number[of_entries]
            rows.append(np.pad(p / root, ((0, 0), (0, n - p.shape[1]))))
            live[place], of_column[place] = moves[of_entries], numbers
            self.members.append(numbers)
        self.k = np.concatenate([*rows, np.zeros((0, n))]) * scale
        self.c = self.matrices[-1] * scale / math.sqrt(start.squared)
        self.k, self.c, of_column = self.k[:, live], self.c[:, live], of_column[live]
        # Of x only what something sees.
        seen = np.concatenate([self.k, self.c])[:, : x.size]
        if len(seen) < x.size:
            fewer = np.linalg.qr(seen.T)[1].T
            self.k, self.c = (
                np.concatenate([part, m[:, x.size :]], 1)
                for part, m in zip(np.split(fewer, [len(self.k)]), (self.k, self.c), strict=True)
            )
            of_column = of_column[x.size - fewer.shape[1] :]
        self.of_row = np.concatenate([*of_row, np.zeros(0, int)])
        self.of_column, self.count = of_column, count
        self.outer = self.c.T @ self.c

    def matrix(self, t: np.ndarray) -> np.ndarray:
        """M without its constant part; rho is the first of t."""
        out = -self.k.T @ (t[self.of_row][:, None] * self.k)
        out[np.diag_indices(len(out))] += t[self.of_column]
        return out

    def traces(self, a: np.ndarray) -> np.ndarray:
        """Of a matrix with what every multiplier stands before in M."""
        return np.bincount(self.of_column, np.diag(a), self.count) - np.bincount(
            self.of_row, np.sum(self.k @ a * self.k, 1), self.count
        )

    def pairs(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``tr(A_k a A_l b)`` of what two multipliers stand before: of entrywise products, since
        all of that has rank 2."""
        parts = []
        for m in (a, b):
            seen = m @ self.k.T
            parts.append((m, seen, self.k @ seen))
        (aa, ar, rr), (bb, br, ss) = parts
        between = _summed(_summed(ar * br, self.of_column, self.count).T, self.of_row, self.count)
        inner = _summed(_summed(aa * bb, self.of_column, self.count).T, self.of_column, self.count)
        outer = _summed(_summed(rr * ss, self.of_row, self.count).T, self.of_row, self.count)
        return inner + outer - between - between.T

    def solve(self, steps: int, say: Callable[[str], None]) -> tuple[float, np.ndarray]:
        """(rho, all t)."""
        n, wide = len(self.of_column), 1.2
        t = np.full(self.count, wide)
        while (m := _factor(self.matrix(t) - self.outer)) is None:
            wide = 1 + 4 * (wide - 1)
            if wide > 1e6:
                return math.inf, t
            t = np.full(self.count, wide)
        target = np.zeros(self.count)
        target[0] = 1.0
        x = _inverse(m) * (t[0] / n)
        for step in range(steps):
            inverse = _inverse(m)
            hessian = self.pairs(x, inverse)
            width = 1 / np.sqrt(np.diag(hessian))
            scaled = hessian * width * width[:, None]
            scaled.flat[:: len(scaled) + 1] += 1e-13
            solved = _factor(scaled)
            if solved is None:
                break

            def moves(right, mixed, solved=solved, width=width, x=x, inverse=inverse):
                """The Newton step for a right side; ``mixed`` is what X and M change together."""
                dt = width * scipy.linalg.cho_solve((solved, True), width * right)
                dx = (x @ self.matrix(dt) + mixed) @ inverse
                return dt, -(dx + dx.T) / 2

            gap = float(np.sum(x * (self.matrix(t) - self.outer))) / n
            gradient = self.traces(inverse)
            # Affine first, to see how far the barrier may fade, and what is of second order.
            dt, dx = moves(-target, 0.0)
            dx -= x
            at_t, at_x = _longest(self.matrix(t) - self.outer, self.matrix(dt)), _longest(x, dx)
            after = np.sum((x + at_x * dx) * (self.matrix(t + at_t * dt) - self.outer)) / n
            centre = gap * min(1.0, max(after / gap, 0.0) ** 3 + 1e-4)
            mixed = dx @ self.matrix(dt)
            second = mixed @ inverse
            dt, dx = moves(centre * gradient - target - self.traces((second + second.T) / 2), mixed)
            dx += centre * inverse - x
            at_t, at_x = _longest(self.matrix(t) - self.outer, self.matrix(dt)), _longest(x, dx)
            m = _factor(self.matrix(t + at_t * dt) - self.outer)
            if m is None:
                break
            t, x = t + at_t * dt, x + at_x * dx
            say(f"tight: step {step + 1}, {math.sqrt(t[0] * self.start.squared):.6g}")
            if max(at_t, at_x) < 1e-3 or gap <= _GAP * t[0] / n:
                break
        return float(t[0]), t

    def covariances(self, rho: float, t: np.ndarray) -> list[Any]:
        """rho / t for every entry of every block, in the units outside."""
        *inner, c = self.matrices
        seen, out = np.sum(c**2, 0) / self.start.squared, []
        for block, e, p, numbers in reversed(
            [*zip(self.blocks, self.start.es, inner, self.members, strict=False)]
        ):
            if e <= 0 or not block.size:
                out.append(e)
                continue
            held = np.maximum(_STIFF * seen[len(p.T) : len(p.T) + block.size], 1 / e)
            multipliers = np.where(numbers >= 0, t[numbers] / e, held)
            of_rows, of_entries = block.groups(len(p))
            of_group = np.zeros(1 + max(of_rows.max(initial=-1), of_entries.max(initial=-1)))
            np.maximum.at(of_group, of_entries, multipliers)
            multipliers = of_group[of_entries]
            weights = np.where(of_rows >= 0, of_group[of_rows], 0.0)
            seen[: len(p.T)] += weights @ p**2
            out.append(rho / multipliers)
        return out[::-1]


def _summed(matrix: np.ndarray, of_row: np.ndarray, count: int) -> np.ndarray:
    """Rows of a kind added."""
    order = np.argsort(of_row, kind="stable")
    kinds, starts = np.unique(of_row[order], return_index=True)
    out = np.zeros((count, matrix.shape[1]))
    if len(kinds):
        out[kinds] = np.add.reduceat(matrix[order], starts, axis=0)
    return out


def _factor(matrix: np.ndarray) -> np.ndarray | None:
    """The lower Cholesky factor; None where there is none."""
    factor, failed = dpotrf(matrix, lower=1, clean=1)
    return None if failed else factor


def _inverse(factor: np.ndarray) -> np.ndarray:
    half = dtrtri(factor, lower=1)[0]
    return half.T @ half


def _longest(matrix: np.ndarray, move: np.ndarray) -> float:
    """How much of a move, at most all, leaves a matrix well inside of the definite ones."""
    length = 1.0
    while length > 1e-6:
        if _factor(matrix + length / 0.95 * move) is not None:
            return length
        length *= 0.8
    return 0.0
