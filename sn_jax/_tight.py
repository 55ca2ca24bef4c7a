r"""The tightest ellipsoid: one covariance for each entry of an elementwise source.

Multipliers ``t > 0`` of the inequalities ``w_k^2 <= (P_k s)^2`` prove ``|y|^2 <= rho |x|^2`` where

    M(rho, t) = rho I_x + sum_k t_k (e_k e_k^T - P_k^T P_k) - C^T C

is positive semidefinite (LipSDP-Neuron of Fazlyab et al. 2019, eq. 7, for any graph). The least rho
is found by a barrier: Newton's method on ``tau rho - log det M`` for growing tau. Every M that it
passes is positive definite, so that it may stop anywhere, and a certificate follows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import get_lapack_funcs

from sn_jax._ellipsoid import Block, Ellipsoid, certified, stacked

dpotrf, dtrtri = get_lapack_funcs(("potrf", "trtri"), dtype=float)
# How fast the barrier fades, and how close rho comes to its least value.
_GROWTH, _GAP = 10.0, 1e-6
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
      steps: of Newton's method, at most.
      say: told what is done.
    """
    if not 0 < start.squared < math.inf or len(blocks) == 1:
        return start.upper, start.lengths
    problem = _Problem(x, blocks, start)
    rho, t = problem.solve(steps, say)
    es = problem.covariances(rho, t)
    upper = certified(rho * start.squared, es, x, blocks)
    # Of the lengths those of the start hold, and the last is what was found.
    return min(upper, start.upper), [*start.lengths[:-1], min(upper, start.lengths[-1])]


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
            if block.entries is None:
                moves = np.full(block.size, bool(p.any()))
                kept = np.full(len(p), bool(p.any()))
                entries = np.zeros(len(p), int)
            else:
                kept = p.any(1)
                entries = block.entries
                moves = np.zeros(block.size, bool)
                moves[entries[kept]] = True
            if e <= 0 or not moves.any():
                self.members.append(np.full(block.size, -1))
                live[place] = False
                continue
            root = math.sqrt(e)
            scale[place] = root
            if block.entries is None:
                numbers = np.full(block.size, count)
                # A smaller matrix with the same P^T P.
                p = np.linalg.qr(p)[1] if len(p) > p.shape[1] else p
                of_row.append(np.full(len(p), count))
                count += 1
            else:
                numbers = np.where(moves, count + np.cumsum(moves) - 1, -1)
                p = p[kept]
                of_row.append(numbers[entries[kept]])
                count += int(np.count_nonzero(moves))
            rows.append(np.pad(p / root, ((0, 0), (0, n - p.shape[1]))))
            live[place], of_column[place] = moves, numbers
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
        """M, with rho the first of t."""
        out = -self.outer - self.k.T @ (t[self.of_row][:, None] * self.k)
        out[np.diag_indices(len(out))] += t[self.of_column]
        return out

    def value(self, t: np.ndarray, tau: float) -> tuple[float, np.ndarray | None]:
        """(what is minimized, the Cholesky factor of M); infinite where M is not definite."""
        if np.min(t) <= 0:
            return math.inf, None
        factor, failed = dpotrf(self.matrix(t), lower=1, clean=1)
        if failed:
            return math.inf, None
        return tau * t[0] - 2 * float(np.sum(np.log(np.diag(factor)))), factor

    def solve(self, steps: int, say: Callable[[str], None]) -> tuple[float, np.ndarray]:
        """(rho, all t)."""
        n, wide = len(self.of_column), 1.2
        t = np.full(self.count, wide)
        while self.value(t, 0.0)[1] is None:
            wide = 1 + 4 * (wide - 1)
            if wide > 1e6:
                return math.inf, t
            t = np.full(self.count, wide)
        best, tau = t, n / t[0]
        value, factor = self.value(t, tau)
        for step in range(steps):
            assert factor is not None
            gradient, hessian = self.derivatives(factor)
            gradient[0] += tau
            width = 1 / np.sqrt(np.diag(hessian))
            scaled = hessian * width * width[:, None]
            scaled.flat[:: len(scaled) + 1] += 1e-13
            try:
                solved = scipy.linalg.cho_factor(scaled, lower=True, overwrite_a=True)
            except scipy.linalg.LinAlgError:
                break
            move = -width * scipy.linalg.cho_solve(solved, width * gradient)
            decrement = -float(gradient @ move)
            length, found = 1.0, (math.inf, None)
            while length > 1e-6:
                found = self.value(t + length * move, tau)
                if found[0] <= value - 0.1 * length * decrement + 1e-12 * abs(value):
                    break
                length /= 2
            if found[1] is None:
                break
            t = t + length * move
            value, factor = found
            best = t if t[0] < best[0] else best
            say(f"tight: step {step + 1}, {math.sqrt(best[0] * self.start.squared):.6g}")
            if decrement < 0.5:
                if n / tau <= _GAP * t[0]:
                    break
                tau *= _GROWTH
                value, factor = self.value(t, tau)
        return float(best[0]), best

    def derivatives(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian of ``-log det M``: of the traces of ``M^-1`` with what every
        multiplier stands before, and with two of them."""
        half = dtrtri(factor, lower=1)[0]
        inverse = half.T @ half
        seen = half @ self.k.T
        both = seen.T @ seen
        between = half.T @ seen
        columns, rows = self.of_column, self.of_row
        gradient = np.bincount(rows, np.diag(both), self.count)
        gradient -= np.bincount(columns, np.diag(inverse), self.count)
        hessian = np.zeros((self.count, self.count))
        for sign, part, a, b in (
            (1.0, inverse, columns, columns),
            (-1.0, between, columns, rows),
            (-1.0, between.T, rows, columns),
            (1.0, both, rows, rows),
        ):
            hessian += sign * _summed(_summed(part**2, a, self.count).T, b, self.count).T
        return gradient, hessian

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
            if block.entries is None:
                multipliers = float(np.max(multipliers))
                weights = np.full(len(p), multipliers)
            else:
                weights = np.where(block.entries >= 0, multipliers[block.entries], 0.0)
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
