r"""Gram matrices of convolutions whose borders matter, and whether one lies below a threshold.

A convolution joins pixels that are near, so that its Gram matrix is banded once its pixels stand in
a good order. It is never formed: a Cholesky factorization in float64 runs along the band, and keeps
the window of it that later rows still see. Which pixels are near, and by which taps, is read off
the triples of each dimension: paddings, strides and dilations are not told apart here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from scipy.linalg import get_blas_funcs, get_lapack_funcs
from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee

from sn_jax._symbols import UNIT, Taps, gamma

dgemm, dsyrk, dtrsm = get_blas_funcs(("gemm", "syrk", "trsm"), dtype=float)
(dpotrf,) = get_lapack_funcs(("potrf",), dtype=float)
# Rows of a tile: BLAS is quick from the least on, and the most still lies in a cache.
_LEAST_ROWS, _MOST_ROWS = 64, 512
# Bytes of products of taps that are kept.
_MOST_BLOCKS = 2**28


class Line(NamedTuple):
    """One dimension of a Gram matrix, or a part of one that no other part touches.

    Attributes:
      near: (n, m), the pixels that share a value with each; -1 where there are fewer.
      kind: (n, m), by which pairs of taps: an index into ``pairs``.
      pairs: per kind (2, k), taps of the pixel and of the near one.
      band: how far apart near pixels are at most.
    """

    near: np.ndarray
    kind: np.ndarray
    pairs: Sequence[np.ndarray]
    band: int


def _lines(tap: np.ndarray, pixel: np.ndarray, shared: np.ndarray, n_taps: int) -> list[Line]:
    """The parts of a dimension, those that are alike once: ``pixel`` sees ``shared`` by ``tap``."""
    if not len(tap):
        return []
    order = np.argsort(shared, kind="stable")
    tap, pixel, shared = tap[order], pixel[order], shared[order]
    place = np.arange(len(tap)) - np.searchsorted(shared, shared)
    slots = np.full((shared[-1] + 1, place.max() + 1), -1)
    slots[shared, place] = np.arange(len(tap))
    a, b = (np.broadcast_to(x, (*slots.shape, slots.shape[1])).ravel()
            for x in (slots[:, :, None], slots[:, None, :]))  # fmt: skip
    a, b = (x[(a >= 0) & (b >= 0)] for x in (a, b))
    code = tap[a] * n_taps + tap[b]
    # Two pixels are of a kind by the multiset of their pairs of taps.
    n = int(pixel.max()) + 1
    key = pixel[a] * n + pixel[b]
    order = np.lexsort((code, key))
    key, code = key[order], code[order]
    key, start, count = np.unique(key, return_index=True, return_counts=True)
    kind = np.zeros(len(key), int)
    for i in range(count.max()):
        digit = np.where(i < count, code[np.minimum(start + i, len(code) - 1)] + 1, 0)
        kind = np.unique(kind * (n_taps**2 + 1) + digit, return_inverse=True)[1]
    first = np.unique(kind, return_index=True)[1]
    pairs = [np.stack(np.divmod(code[start[i] : start[i] + count[i]], n_taps)) for i in first]

    i, j = np.divmod(key, n)
    graph = scipy.sparse.csr_array((np.ones(len(key)), (i, j)), (n, n))
    part = connected_components(graph, directed=False)[1]
    order = np.argsort(part[i], kind="stable")
    i, j, kind = i[order], j[order], kind[order]
    found: dict[tuple[bytes, ...], Line] = {}
    ends = np.flatnonzero(np.diff(part[i], append=-1)) + 1
    for low, high in zip([0, *ends], ends, strict=False):
        here, at = np.unique(i[low:high], return_inverse=True)
        other, kinds = np.searchsorted(here, j[low:high]), kind[low:high]
        alike = tuple(x.tobytes() for x in (at, other, kinds))
        if alike not in found:
            found[alike] = _line(at, other, kinds, pairs)
    return list(found.values())


def _line(i: np.ndarray, j: np.ndarray, kind: np.ndarray, pairs) -> Line:
    """Of entries (i, j, kind), in the order of the least band."""
    n, band = int(i.max()) + 1, int(np.max(np.abs(i - j)))
    graph = scipy.sparse.csr_array((np.ones(len(i)), (i, j)), (n, n))
    place = np.empty(n, int)
    place[reverse_cuthill_mckee(graph, symmetric_mode=True)] = np.arange(n)
    if np.max(np.abs(place[i] - place[j])) < band:
        i, j = place[i], place[j]
        band = int(np.max(np.abs(i - j)))
    order = np.argsort(i, kind="stable")
    i, j, kind = i[order], j[order], kind[order]
    slot = np.arange(len(i)) - np.searchsorted(i, i)
    near, kinds = np.full((2, n, slot.max() + 1), -1)
    near[i, slot], kinds[i, slot] = j, kind
    return Line(near, kinds, pairs, band)


class BandedGram:
    """``A^T A`` or ``A A^T`` of one group of channels on pixels that no others touch.

    Attributes:
      size: rows.
      flops: operations of a factorization.
      most_bytes: what it holds at a time.
      slack: by how much rounding of a factorization that succeeds can hide, relative to the shift.
    """

    def __init__(self, lines: Sequence[Line], n_taps: Sequence[int], channels: int):
        self.lines, self.n_taps, self.channels = lines, n_taps, channels
        self.shape = tuple(len(line.near) for line in lines)
        n = math.prod(self.shape)
        self.size = n * channels
        band = _band(lines, channels)
        rows = min(_MOST_ROWS, max(_LEAST_ROWS, band // 8))
        self.pixels = min(n, max(1, round(rows / channels)))  # of a tile
        self.n_tiles = -(-n // self.pixels)
        self.flops, self.most_bytes, window = self._structure()
        # Rump 2006 with the sums as long as the band: |R|^T |R| has at most this many entries in a
        # row, each at most the largest diagonal entry.
        row = min(self.size, 2 * window + 1)
        self.slack = gamma(2 * min(self.size, window) + 16) * row * (1 + 1e-6) + 4 * UNIT

    def _column(self, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pixels of the tile, pixels near them and not before, the kinds of both)."""
        n = math.prod(self.shape)
        here = np.arange(tile * self.pixels, min(n, (tile + 1) * self.pixels))
        near, kind = np.zeros((len(here), 1), int), np.zeros((len(here), 1), int)
        there = np.ones((len(here), 1), bool)
        for line, at, size in zip(self.lines, np.unravel_index(here, self.shape), self.shape,
                                  strict=True):  # fmt: skip
            others, kinds = line.near[at], line.kind[at]
            near, kind, there = (
                x.reshape(len(here), -1)
                for x in (
                    near[:, :, None] * size + others[:, None],
                    kind[:, :, None] * len(line.pairs) + kinds[:, None],
                    there[:, :, None] & (others >= 0)[:, None],
                )
            )
        column, slot = np.nonzero(there & (near >= here[:, None]))
        return here[column], near[column, slot], kind[column, slot]

    def _structure(self) -> tuple[float, int, int]:
        """(operations, bytes, rows that a pivot sees) of the factorization, tiles filled in."""
        below: dict[int, set[int]] = {}
        flops, tiles, most, window = 0.0, 0, 0, 0
        rows = self.pixels * self.channels
        for j in range(self.n_tiles):
            near = {int(i) for i in np.unique(self._column(j)[1] // self.pixels)}
            filled = below.pop(j, set()) | near - {j}
            n = len(filled)
            flops += rows**3 * (1 / 3 + n + n**2)
            window = max(window, (max(filled, default=j) - j + 1) * rows)
            # Every pair of tile rows that have met is kept until the first of them is the pivot.
            tiles = max(tiles - 1, 0) + n + 1
            most = max(most, n * (n + 1) // 2 + n + 1)
            if n:
                below.setdefault(min(filled), set()).update(filled - {min(filled)})
        return flops, most * rows**2 * 8, window

    @cached_property
    def terms(self) -> int:
        """How many products of two kernels meet in one block."""
        return math.prod(max(p.shape[1] for p in line.pairs) for line in self.lines)

    def _block(self, kernel: np.ndarray, kind: int) -> np.ndarray:
        """(channels of the near pixel, channels of the pixel)."""
        taps = np.zeros((2, 1), int)
        kinds = np.unravel_index(kind, [len(line.pairs) for line in self.lines])
        for line, size, k in zip(self.lines, self.n_taps, kinds, strict=True):
            taps = (taps[:, :, None] * size + line.pairs[int(k)][:, None]).reshape(2, -1)
        here, near = (kernel[t].swapaxes(0, 1).reshape(self.channels, -1) for t in taps)
        return near @ here.T

    def is_definite(
        self, kernel: np.ndarray, shift: float, tell: Callable[[float], Any] = lambda _: None
    ) -> bool:
        """Whether Cholesky of ``shift I - gram`` runs to its end.

        Args:
          kernel: (taps, channels, the other channels).
          shift: the threshold.
          tell: told how many operations were done.
        """
        c, wide = self.channels, self.pixels
        tiles: dict[tuple[int, int], np.ndarray] = {}
        blocks: dict[int, np.ndarray] = {}
        for j in range(self.n_tiles):
            pixel, near, kind = self._column(j)
            kinds, row = np.unique(kind, return_inverse=True)
            if len(blocks) * c**2 * 8 > _MOST_BLOCKS:
                blocks.clear()
            for k in kinds.tolist():
                if k not in blocks:
                    blocks[k] = self._block(kernel, k)
            stack = np.stack([blocks[k] for k in kinds.tolist()])
            width = (pixel.max() - j * wide + 1) * c
            for i in np.unique(near // wide):
                inside = near // wide == i
                height = (min(wide, math.prod(self.shape) - i * wide)) * c
                fresh = np.zeros((width // c, c, height // c, c))
                fresh[pixel[inside] - j * wide, :, near[inside] - i * wide] -= stack[
                    row[inside]].swapaxes(1, 2)  # fmt: skip
                fresh = fresh.reshape(width, height)
                if i == j:
                    fresh.flat[:: width + 1] += shift
                if (i, j) in tiles:
                    fresh += tiles[i, j].T
                tiles[i, j] = fresh.T
            pivot, failed = dpotrf(tiles.pop((j, j)), lower=1, clean=0, overwrite_a=1)
            if failed:
                return False
            below = sorted(i for i, column in tiles if column == j)
            panel = {
                i: dtrsm(1.0, pivot, tiles.pop((i, j)), side=1, lower=1, trans_a=1, overwrite_b=1)
                for i in below
            }
            for i, k in product(below, below):
                if i == k and (i, k) in tiles:
                    dsyrk(-1.0, panel[i], 1.0, tiles[i, k], lower=1, overwrite_c=1)
                elif i == k:
                    tiles[i, k] = dsyrk(-1.0, panel[i], lower=1)
                elif i > k and (i, k) in tiles:
                    dgemm(-1.0, panel[i], panel[k], 1.0, tiles[i, k], trans_b=1, overwrite_c=1)
                elif i > k:
                    tiles[i, k] = dgemm(-1.0, panel[i], panel[k], trans_b=1)
            n = len(below)
            tell((wide * c) ** 3 * (1 / 3 + n + n**2))
        return True


def _band(lines: Sequence[Line], channels: int) -> int:
    """Rows from a pixel's first to the last of those near it and after it."""
    band = 0
    for line in lines:
        band = band * len(line.near) + line.band
    return (band + 1) * channels


class Banded(NamedTuple):
    """The Gram matrices that a convolution's norm is the largest of, on its cheaper side.

    Attributes:
      grams: one for each kind of part.
      kernels: (groups, taps, channels, other channels), to be given to each.
      rounding: by how much a computed Gram matrix errs, in norm.
      absolute: at least the norm of the map of absolute values.
    """

    grams: list[BandedGram]
    kernels: np.ndarray
    rounding: float
    absolute: float

    @property
    def flops(self) -> float:
        return len(self.kernels) * sum(gram.flops for gram in self.grams)

    @property
    def most_bytes(self) -> int:
        return max((gram.most_bytes for gram in self.grams), default=0)

    @property
    def slack(self) -> float:
        return max((gram.slack for gram in self.grams), default=0.0)


def banded(kernel: np.ndarray, dimensions: Sequence[Taps]) -> Banded:
    """Of a grouped kernel (*taps, groups, in, out)."""
    n = len(dimensions)
    *n_taps, groups, _, _ = kernel.shape
    best, cost = None, math.inf
    for side in ("in_", "out"):
        other = "out" if side == "in_" else "in_"
        channels = kernel.shape[-2 if side == "in_" else -1]
        lines = [
            _lines(taps.tap, getattr(taps, side), getattr(taps, other), size)
            for taps, size in zip(dimensions, n_taps, strict=True)
        ]
        # The last dimension is the innermost: the band is least if that is not the largest.
        for order in permutations(range(n)):
            parts = list(product(*(lines[axis] for axis in order)))
            work = sum(
                math.prod(len(line.near) for line in part) * channels * _band(part, channels) ** 2
                for part in parts
            )
            if work < cost:
                best, cost = (order, parts, side, channels), work
    if best is None:
        return Banded([], np.zeros((0, 1, 1, 1)), 0.0, 0.0)
    order, parts, side, channels = best
    grams = [BandedGram(part, [n_taps[axis] for axis in order], channels) for part in parts]
    kernel = kernel.transpose(n, *order, *((n + 1, n + 2) if side == "in_" else (n + 2, n + 1)))
    kernels = np.ascontiguousarray(kernel).reshape(groups, -1, *kernel.shape[-2:])
    # The map is a sum over taps of 0/1 matrices times the kernel's own, and the norm of each of
    # the former is at most the root of its largest row and column sums.
    copies = [_root_of_copies(dimensions[axis], n_taps[axis]) for axis in order]
    weight = copies[0]
    for each in copies[1:]:
        weight = np.multiply.outer(weight, each).ravel()
    absolute = max(
        float(np.sum(weight * np.sqrt(np.sum(k**2, (-1, -2))))) for k in kernels
    ) * (1 + gamma(2 * kernels[0].size + 64))  # fmt: skip
    terms = max((gram.terms for gram in grams), default=0) * kernels.shape[-1]
    return Banded(grams, kernels, gamma(2 * terms + 16) * absolute**2, absolute)


def _root_of_copies(taps: Taps, n_taps: int) -> np.ndarray:
    out = np.zeros(n_taps)
    for tap in range(n_taps):
        here = taps.tap == tap
        rows, columns = (np.bincount(x[here], minlength=1).max() for x in (taps.out, taps.in_))
        out[tap] = math.sqrt(rows * columns)
    return out


def all_definite(
    parts: Banded, shift: float, tell: Callable[[float], Any] = lambda _: None
) -> bool:
    """Whether all of the Gram matrices lie below a threshold, up to the slack and rounding."""
    return all(gram.is_definite(kernel, shift, tell) for gram, kernel in _each(parts))


def _each(parts: Banded) -> Iterator[tuple[BandedGram, np.ndarray]]:
    for gram in parts.grams:
        for kernel in parts.kernels:
            yield gram, kernel
