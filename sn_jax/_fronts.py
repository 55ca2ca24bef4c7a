r"""Hermitian matrices that are the same at every pixel of a torus: definite or not, and the best.

A quadratic form of signals on tori of several sizes, each a multiple of the next coarser one, that
commutes with the coarsest shifts is a Hermitian matrix for each frequency. A frequency of a fine
torus stands for one of every coarser torus, its alias, and what is coupled at it is seen by nothing
else. So variables are eliminated one after the other, the finest first, at all frequencies at once,
and the small updates of aliases are added: no matrix of all phases is formed.

Every variable is scaled so that the diagonal is one. What is left is how far multipliers are to be
moved: a barrier method in their logarithms, whose gradient is the inverse at the entries that are
coupled, by one elimination backwards.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import get_lapack_funcs

from sn_jax._symbols import UNIT, gamma

(ztrtrs,) = get_lapack_funcs(("trtrs",), dtype=complex)
# Bytes of the matrices of one step of the elimination.
_CHUNK = 2**27


class Variable(NamedTuple):
    """A signal with the diagonal ``exp(sign * theta[group])``, 1 where there are no groups.

    Attributes:
      torus: its size in each dimension.
      channels: numbers at each pixel.
      group: (channels,), of each channel; None where the diagonal is 1.
      sign: 1 or -1.
    """

    torus: tuple[int, ...]
    channels: int
    group: np.ndarray | None = None
    sign: int = 1


class Coupling(NamedTuple):
    """What stands in a row and a column: a sum over taps, times the row's multiplier or not.

    Attributes:
      row, column: variables.
      kernel: (taps, row channels, column channels).
      shifts: per dimension (taps,) tuples of how far each tap moves, on the finer torus.
      error: (row channels, column channels), by how much each entry of the symbol errs.
      scaled: whether the row's multiplier stands before it.
    """

    row: int
    column: int
    kernel: np.ndarray
    shifts: tuple[tuple[tuple[int, ...], ...], ...]
    error: np.ndarray
    scaled: bool


class Grid(NamedTuple):
    """The frequencies of a torus that are kept: in groups, each of one frequency of the next.

    Attributes:
      sizes: of the torus.
      frequencies: (n, dimensions).
      weights: (n,), of how many frequencies each is one.
    """

    sizes: tuple[int, ...]
    frequencies: np.ndarray
    weights: np.ndarray

    @property
    def is_point(self) -> bool:
        return max(self.sizes, default=1) == 1


def grids_of(tori: Sequence[tuple[int, ...]]) -> list[Grid]:
    """Of tori from fine to coarse; of conjugate frequencies of the coarsest one of each pair."""
    out: list[Grid] = []
    for sizes in reversed(tori):
        if not out or out[0].is_point:
            every = np.array([*np.ndindex(*sizes)], int).reshape(-1, len(sizes))
            other = -every % np.array(sizes, int)
            first, second = (np.ravel_multi_index(tuple(x.T), sizes) if sizes else np.zeros(1)
                             for x in (every, other))  # fmt: skip
            kept = first <= second
            weights = np.where(first < second, 2.0, 1.0)[kept]
            out.insert(0, Grid(sizes, every[kept], weights))
            continue
        coarse = out[0]
        ratios = [n // m for n, m in zip(sizes, coarse.sizes, strict=True)]
        steps = np.array([*itertools.product(*(range(r) for r in ratios))]) * coarse.sizes
        frequencies = (coarse.frequencies[:, None] + steps).reshape(-1, len(sizes))
        out.insert(0, Grid(sizes, frequencies, np.repeat(coarse.weights, len(steps))))
    return out


def factor_of(blocks: np.ndarray, diagonal: float) -> np.ndarray | None:
    """The lower Cholesky factors of ``blocks + diagonal``; None where one has none."""
    try:
        return np.linalg.cholesky(blocks + diagonal * np.eye(blocks.shape[-1]))
    except np.linalg.LinAlgError:
        return None


class Fronts:
    """The matrix ``diagonal + couplings``, scaled to a diagonal of one.

    Args:
      variables: in the order of elimination, but for their tori.
      couplings: between them.
    """

    def __init__(self, variables: Sequence[Variable], couplings: Sequence[Coupling]):
        tori = sorted({v.torus for v in variables}, key=math.prod, reverse=True)
        self.variables, self.grids = variables, grids_of(tori)
        self.level = [tori.index(v.torus) for v in variables]
        self.order = sorted(range(len(variables)), key=lambda i: (self.level[i], i))
        place = {v: i for i, v in enumerate(self.order)}
        self.couplings = couplings
        # What each variable is coupled to when its turn comes, among those that come later.
        self.near: list[list[int]] = []
        self.own: list[list[int]] = [[] for _ in variables]  # couplings, by the place of the first
        for number, c in enumerate(couplings):
            self.own[min(place[c.row], place[c.column])].append(number)
        active: set[int] = set()
        for i, v in enumerate(self.order):
            for number in self.own[i]:
                active |= {couplings[number].row, couplings[number].column}
            active -= {v}
            self.near.append(sorted(active, key=place.__getitem__))
        self.count = 1 + max((int(v.group.max()) for v in variables if v.group is not None),
                             default=-1)  # fmt: skip
        # Bands of frequencies of the coarsest torus of more than a point, that see nothing of each
        # other before it.
        self.n_levels = len(tori) - (len(tori) > 1 and self.grids[-1].is_point)
        base = len(self.grids[self.n_levels - 1].frequencies)
        widest = max(
            16 * len(self.grids[self.level[v]].frequencies) / base
            * (variables[v].channels + sum(variables[w].channels for w in near)) ** 2
            for v, near in zip(self.order, self.near, strict=True)
        )  # fmt: skip
        step = max(1, int(_CHUNK / widest))
        self.bands = [(i, min(i + step, base)) for i in range(0, base, step)]

    @cached_property
    def symbols(self) -> list[np.ndarray]:
        """(frequencies, row channels, column channels) of each coupling."""
        return [self._symbol(c) for c in self.couplings]

    def _symbol(self, c: Coupling) -> np.ndarray:
        levels = sorted((self.level[c.row], self.level[c.column]))
        fine, coarse = (self.grids[i] for i in levels)
        waves = np.ones((len(fine.frequencies), 1), complex)
        for d, taps in enumerate(c.shifts):
            n = fine.sizes[d]
            # The product is an exact integer, reduced before it becomes an angle in [-pi, pi].
            angles = np.exp(2j * np.pi * ((np.arange(n) + n // 2) % n - n // 2) / n)
            own = np.stack(
                [sum((angles[fine.frequencies[:, d] * s % n] for s in tap),
                     np.zeros(len(waves), complex)) for tap in taps], 1
            )  # fmt: skip
            waves = (waves[:, :, None] * own[:, None]).reshape(len(waves), -1)
        flat = c.kernel.reshape(len(c.kernel), -1)
        root = math.sqrt(math.prod(coarse.sizes) / math.prod(fine.sizes))
        return (waves @ (flat * root)).reshape(-1, *c.kernel.shape[1:])

    @property
    def flops(self) -> float:
        """Of one elimination there and back."""
        total = 0.0
        for v, near in zip(self.order, self.near, strict=True):
            c, n = self.variables[v].channels, sum(self.variables[w].channels for w in near)
            grid = self.grids[self.level[v]]
            total += (
                len(grid.frequencies) * (4 if grid.is_point else 16) * (c + n) * (2 * c * c + c * n)
            )
        return total

    def scales(self, theta: np.ndarray) -> list[np.ndarray]:
        """The roots of the diagonal."""
        return [
            np.ones(v.channels) if v.group is None else np.exp(v.sign * theta[v.group] / 2)
            for v in self.variables
        ]

    def factors(self, theta: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What rows and columns of each coupling are multiplied by; 0 where a multiplier is."""
        roots = self.scales(theta)
        inverse = [np.divide(1.0, r, out=np.zeros(len(r)), where=r > 0) for r in roots]
        return [
            (roots[c.row] if c.scaled else inverse[c.row], inverse[c.column])
            for c in self.couplings
        ]

    def _rows(self, i: int, factors, part: slice):
        """The row of the variable at place i: couplings to itself and to what is near."""
        v, near = self.order[i], self.near[i]
        sizes = [self.variables[w].channels for w in near]
        at = dict(zip(near, np.cumsum([0, *sizes]), strict=False))
        real = self.grids[self.level[v]].is_point
        n = part.stop - part.start
        row = np.zeros((n, self.variables[v].channels, sum(sizes)), float if real else complex)
        for number in self.own[i]:
            c, (left, right) = self.couplings[number], factors[number]
            block = self.symbols[number][part]
            block = (np.real(block) if real else block) * left[:, None] * right
            other = c.column if c.row == v else c.row
            place = slice(at[other], at[other] + self.variables[other].channels)
            row[:, :, place] += block if c.row == v else block.conj().swapaxes(1, 2)
        return row

    def _part(self, level: int, band: tuple[int, int]) -> slice:
        if level >= self.n_levels:
            return slice(0, 1)
        grid, base = self.grids[level], self.grids[self.n_levels - 1]
        size = len(grid.frequencies) // len(base.frequencies)
        return slice(band[0] * size, band[1] * size)

    def _carried(self, i: int, update: np.ndarray, w: np.ndarray, weights) -> np.ndarray:
        """The update of what is near, less ``w^H w``, at the frequencies of the next variable."""
        n = w.shape[-1]
        level, after = self.level[self.order[i]], self.level[self.order[i + 1]]
        if level == after:
            return update - w.conj().swapaxes(1, 2) @ w
        if self.grids[after].is_point:
            flat = (w * np.sqrt(weights)[:, None, None]).reshape(len(w) * w.shape[1], n)
            return (np.tensordot(weights, np.real(update), 1) - np.real(flat.conj().T @ flat))[None]
        before, grid = self.grids[level], self.grids[after]
        many = len(before.frequencies) // len(grid.frequencies)
        flat = w.reshape(len(w) // many, many * w.shape[1], n)
        update = update.reshape(len(w) // many, many, n, n).sum(1)
        return update - flat.conj().swapaxes(1, 2) @ flat

    def _moved(self, i: int, update: np.ndarray) -> np.ndarray:
        """The update of what is near at place i - 1, at all that is near or has its turn at i."""
        v = self.order[i]
        wanted, given = [v, *self.near[i]], self.near[i - 1] if i else []
        if wanted == given:
            return update
        sizes = [self.variables[w].channels for w in wanted]
        at = dict(zip(wanted, np.cumsum([0, *sizes]), strict=False))
        index = np.concatenate([*(at[w] + np.arange(self.variables[w].channels) for w in given),
                                np.zeros(0, int)]).astype(int)  # fmt: skip
        out = np.zeros((len(update), sum(sizes), sum(sizes)), update.dtype)
        out[:, index[:, None], index] = update
        return out

    def eliminate(
        self, theta: np.ndarray, visit: Callable, step: Callable, until: int | None = None
    ) -> bool:
        """Variable after variable; False as soon as ``step`` says so.

        Args:
          theta: logarithms of multipliers.
          step: (diagonal block, row) -> w with ``w^H w`` to be taken off, or None.
          visit: called with (place, band, what ``step`` made).
          until: the last place of interest, if any.
        """
        factors = self.factors(theta)
        end = len(self.order) - 1 if until is None else until
        point: Any = 0.0
        for band in self.bands:
            update = np.zeros((0, 0, 0))
            for i, v in enumerate(self.order):
                level = self.level[v]
                last = level >= self.n_levels
                if last and (i == 0 or self.level[self.order[i - 1]] < self.n_levels):
                    # All bands are added at the point.
                    point = point + update if i else np.zeros((1, 0, 0))
                    if band is not self.bands[-1]:
                        break
                    update = point
                part = self._part(level, band)
                if i == 0:
                    update = np.zeros((part.stop - part.start, 0, 0))
                moved = self._moved(i, update)
                c = self.variables[v].channels
                row = self._rows(i, factors, part) + moved[:, :c, c:]
                w = step(moved[:, :c, :c], row)
                if w is None:
                    return False
                visit(i, band, w)
                if i >= end:
                    break
                weights = self.grids[level].weights[part]
                update = self._carried(i, moved[:, c:, c:], w[-1], weights)
        return True

    def barrier(
        self, theta: np.ndarray, shift: float, weights: Sequence[float] | None = None
    ) -> tuple[float, np.ndarray]:
        """``-log det`` of the scaled matrix less ``shift``, and its gradient; infinite outside.

        With ``weights`` each variable's Schur complement after those before it counts so much.
        """
        counts = [1.0] * len(self.variables) if weights is None else weights
        kept: dict[tuple[int, tuple[int, int]], tuple[np.ndarray, ...]] = {}
        total = 0.0

        def step(block, row):
            factor = factor_of(block, 1 - shift)
            if factor is None:
                return None
            half = np.linalg.inv(factor)
            return factor, half, half @ row

        def visit(i, band, found):
            nonlocal total
            factor, half, w = found
            v = self.order[i]
            weights = self.grids[self.level[v]].weights[self._part(self.level[v], band)]
            logs = np.sum(np.log(np.real(np.diagonal(factor, axis1=1, axis2=2))), 1)
            total -= 2 * counts[v] * float(weights @ logs)
            kept[i, band] = half, w

        if not self.eliminate(theta, visit, step):
            return math.inf, np.zeros(self.count)
        return total, self._gradient(theta, kept, counts)

    def _gradient(self, theta: np.ndarray, kept, counts) -> np.ndarray:
        factors = self.factors(theta)
        slopes = [np.zeros(v.channels) for v in self.variables]
        tip: Any = None
        for band in reversed(self.bands):
            z = np.zeros((1, 0, 0))
            for i in reversed(range(len(self.order))):
                v, near = self.order[i], self.near[i]
                level = self.level[v]
                if level >= self.n_levels and band is not self.bands[-1]:
                    z = tip
                    continue
                half, w = kept.pop((i, band))
                c, n = half.shape[-1], w.shape[-1]
                after = [] if i + 1 == len(self.order) else [self.order[i + 1], *self.near[i + 1]]
                at = dict(zip(after, np.cumsum([0, *(self.variables[x].channels for x in after)]),
                              strict=False))  # fmt: skip
                places_of = (at[x] + np.arange(self.variables[x].channels) for x in near)
                index = np.concatenate([*places_of, np.zeros(0, int)]).astype(int)
                inner = z if len(index) == z.shape[-1] else z[:, index[:, None], index]
                x = half.conj().swapaxes(1, 2) @ w
                many = len(x) // len(inner) if n else 1
                across = (x.reshape(len(inner), many * c, n) @ inner).reshape(-1, c, n) if n else x
                # The inverse in the row of v: what is near, then itself.
                row = -across
                part = self._part(level, band)
                weights = self.grids[level].weights[part]
                places = dict(zip(near, np.cumsum([0, *(self.variables[y].channels for y in near)]),
                                  strict=False))  # fmt: skip
                for number in self.own[i]:
                    k, (left, right) = self.couplings[number], factors[number]
                    other = k.column if k.row == v else k.row
                    cut = slice(places[other], places[other] + self.variables[other].channels)
                    inverse = row[:, :, cut]
                    if k.row != v:
                        inverse = inverse.conj().swapaxes(1, 2)
                    symbol = self.symbols[number][part]
                    products = np.tensordot(weights, np.real(inverse.conj() * symbol), 1)
                    products *= left[:, None] * right
                    slopes[k.row] -= (1 if k.scaled else -1) * products.sum(1)
                    slopes[k.column] += products.sum(0)
                if i:
                    own = counts[v] * (half.conj().swapaxes(1, 2) @ half)
                    own = own + across @ x.conj().swapaxes(1, 2)
                    z = np.empty((len(half), c + n, c + n), own.dtype)
                    z[:, :c, :c], z[:, :c, c:] = own, row
                    z[:, c:, :c] = row.conj().swapaxes(1, 2)
                    if n:
                        z.reshape(len(inner), many, c + n, c + n)[:, :, c:, c:] = inner[:, None]
                if level >= self.n_levels and i and self.level[self.order[i - 1]] < self.n_levels:
                    tip = z
        out = np.zeros(self.count)
        for v, slope in zip(self.variables, slopes, strict=True):
            if v.group is not None:
                np.add.at(out, v.group, v.sign * slope)
        return out

    def hidden(self, theta: np.ndarray) -> float:
        r"""By how much all that rounding can hide is at most, in norm, of the scaled matrix.

        A factor R has columns of length 1 at most, so that with ``m`` channels on a torus and at
        most k nonzeros in a column there, ``|R^H R - A| <= (sum sqrt(gamma_k m))^2`` over tori
        (Higham 2002, lemma 8.4, in any order of summation; rows are shared by aliases alone). An
        error E of a symbol in every entry is one of at most ``|E|_F`` of what it is the symbol of.
        """
        tori: dict[int, int] = {}
        for v, level in zip(self.variables, self.level, strict=True):
            tori[level] = tori.get(level, 0) + v.channels
        root = 0.0
        for level, m in tori.items():
            rows = sum(
                n * math.prod(self.grids[other].sizes) // math.prod(self.grids[level].sizes)
                for other, n in tori.items() if other <= level
            )  # fmt: skip
            root += math.sqrt(gamma(8 * rows + 64) * m)
        total = root**2
        for c, (left, right) in zip(self.couplings, self.factors(theta), strict=True):
            total += 2 * float(np.linalg.norm(left[:, None] * c.error * right))
        return total * (1 + 1e-6) + 8 * UNIT

    def definite(self, theta: np.ndarray, shift: float) -> bool:
        """Whether Cholesky of the scaled matrix less ``shift`` runs to its end."""

        def step(block, row):
            factor = factor_of(block, 1 - shift)
            if factor is None:
                return None
            w = np.empty(row.shape, complex)
            for j, (r, b) in enumerate(zip(factor, row, strict=True)):
                w[j] = ztrtrs(r, b, lower=1)[0] if b.size else b
            return (w if np.iscomplexobj(row) else np.real(w),)

        return self.eliminate(theta, lambda *_: None, step)
