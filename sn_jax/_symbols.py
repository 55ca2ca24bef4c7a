"""Convolutions taken apart: their symbols on a grid of frequencies, or the matrix itself.

Along one dimension a convolution is a set of triples (tap, output pixel, input pixel); the whole
map is the sum over taps of the products of these 0/1 matrices with the kernel's own.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from sn_jax._views import Conv, Shape

UNIT = 2.0**-53
# How many bytes of Gram matrices are made at a time.
_CHUNK = 2**27
# A matrix with at most this many entries is not kept sparse, since BLAS is faster.
_DENSE = 2**25

Block = np.ndarray | scipy.sparse.csr_array


class Blocks(NamedTuple):
    """Some of the blocks whose largest norm is that of a map, and what their rounding can hide.

    Attributes:
      gram: (s, r, r), of ``D^H D`` in floating point.
      rounding: by how much each Gram matrix errs, in norm.
      block: i -> D, with at least as many rows as columns.
      error: by how much each D errs, in norm.
    """

    gram: np.ndarray
    rounding: float
    block: Callable[[int], Block]
    error: float


def gamma(n: float) -> float:
    """n u / (1 - n u): the relative error of a sum of n products, rounded up."""
    return n * UNIT / (1 - n * UNIT) * (1 + 4 * UNIT)


def on_host() -> contextlib.ExitStack:
    """float64 on the CPU, whatever the program's defaults are."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
    return stack


def frobenius(block: Block) -> float:
    return float(np.linalg.norm(block if isinstance(block, np.ndarray) else block.data))


def blocks_of(blocks: list[Block] | np.ndarray, error: float = 0.0) -> Blocks:
    """Blocks (p, q) of one shape, and their products."""
    # Inferred of SciPy's source, the shape of a sparse array could be None.
    p, q = blocks[0].shape  # pyright: ignore[reportGeneralTypeIssues]
    if p < q:
        blocks = [block.T for block in blocks]
    grams = [block.conj().T @ block for block in blocks]
    gram = np.stack([g if isinstance(g, np.ndarray) else g.toarray() for g in grams])
    # A product of complex numbers takes four real ones; counted for real numbers, too.
    terms = (4 if np.iscomplexobj(gram) else 2) * max(p, q) + 16
    rounding = gamma(terms) * max(frobenius(block) for block in blocks) ** 2 * (1 + gamma(terms))
    return Blocks(gram, rounding, blocks.__getitem__, error)


class Taps(NamedTuple):
    """The triples of one dimension, and its sizes."""

    tap: np.ndarray
    out: np.ndarray
    in_: np.ndarray
    n_out: int
    n_in: int


class Lattice(NamedTuple):
    """Taps of a block-Toeplitz dimension: outputs in blocks of ``n_p``, inputs in blocks of
    ``n_q``, and a tap leads from input phase q, ``shift`` blocks further on, to output phase p.

    ``size`` frequencies make the symbols; ``exact`` says that the dimension is circular with just
    that period, and otherwise its norm is at most ``factor`` times that of the symbols.
    """

    tap: np.ndarray
    p: np.ndarray
    q: np.ndarray
    shift: np.ndarray
    n_p: int
    n_q: int
    size: int
    exact: bool
    factor: float


def along(view: Conv, axis: int) -> Conv:
    """The view in one dimension."""
    padding = view.padding if isinstance(view.padding, str) else (view.padding[axis],)
    return replace(
        view,
        input_shape=view.input_shape[axis],
        strides=view.strides[axis],
        padding=padding,
        input_dilation=view.input_dilation[axis],
        kernel_dilation=view.kernel_dilation[axis],
        feature_group_count=1,
    )


@lru_cache(maxsize=1024)
def taps_of(view: Conv, kernel_size: int) -> Taps:
    """Read off the view's own map, with a kernel whose output channels are its taps."""
    (n,) = view.input_shape
    kernel = np.eye(kernel_size)
    kernel = kernel[..., None] if view.transpose_kernel and view.transpose else kernel[:, None]
    with on_host():
        respond = jax.jit(jax.vmap(partial(view.matvec, jnp.asarray(kernel))))
        # Two probes: ones count the pixels under each tap, and 0, 1, 2, ... say which they are.
        counts, position = np.asarray(respond(np.stack([np.ones(n), np.arange(n)])[..., None]))
        if counts.max(initial=0) <= 1:
            out, tap = np.nonzero(counts)
            return Taps(tap, out, position[out, tap].astype(int), len(counts), n)
        # A kernel that is wrapped around a smaller image has several pixels under one tap.
        responses = np.asarray(respond(np.eye(n)[..., None]))
    in_, out, tap = np.nonzero(responses)
    copies = responses[in_, out, tap].astype(int)
    tap, out, in_ = (np.repeat(x, copies) for x in (tap, out, in_))
    return Taps(tap, out, in_, len(counts), n)


def lattices_of(view: Conv, shape: Shape) -> list[Lattice]:
    """One per dimension, exact where it is circular."""
    return [_lattice(along(view, axis), shape[axis]) for axis in range(len(view.input_shape))]


def _lattice(view: Conv, kernel_size: int) -> Lattice:
    taps = taps_of(view, kernel_size)
    stride, dilation = view.strides[0], view.input_dilation[0]
    if view.transpose:
        stride, dilation = 1, stride
    common = math.gcd(stride, dilation)
    # Moving the input by n_q moves the output by n_p.
    n_p, n_q = dilation // common, stride // common
    if taps.n_out * n_q == taps.n_in * n_p and taps.n_in % n_q == 0:
        moved = (taps.tap, (taps.out + n_p) % taps.n_out, (taps.in_ + n_q) % taps.n_in)
        before, after = (
            np.sort(np.ravel_multi_index(triple, (kernel_size, taps.n_out, taps.n_in)))
            for triple in (taps[:3], moved)
        )
        if np.array_equal(before, after):
            first = taps.out < n_p
            tap, out, in_ = (x[first] for x in taps[:3])
            size = taps.n_in // n_q
            # Shifts are counted the shorter way round the circle.
            shift = (in_ // n_q + size // 2) % size - size // 2
            if len(np.unique(shift)) <= 1:  # one shift alone: every symbol is the same
                size = 1
            return Lattice(tap, out, in_ % n_q, shift, n_p, n_q, size, True, 1.0)
    factor = 1.0
    if view.padding in ("CIRCULAR", "REFLECT"):
        # Copying pixels into the border stretches by at most the root of the most copies of one.
        (n,), (reach,) = view.input_shape, view.reach((kernel_size,))
        pad = (reach // 2, (reach + 1) // 2)
        mode = "wrap" if view.padding == "CIRCULAR" else "reflect"
        copies = np.bincount(np.pad(np.arange(n), pad, mode=mode))
        factor = math.sqrt(copies.max()) * (1 + 2 * UNIT)
        taps = taps_of(replace(view, input_shape=n + reach, padding="VALID"), kernel_size)
    offsets = np.stack(
        [taps.tap, taps.out % n_p, taps.in_ % n_q, taps.in_ // n_q - taps.out // n_p]
    )
    tap, p, q, shift = np.unique(offsets, axis=1)
    # With a period so long that no output sees an input twice, the map is a part of a circular one.
    last, first = shift.max(initial=0), shift.min(initial=0)
    size = max(-(-taps.n_out // n_p) + last, -(-taps.n_in // n_q) - first, 1)
    coarse = max(256, 16 * (last - first))
    if size > coarse:
        # A grid that samples the symbol: its maximum lies no higher than this (Pfister &
        # Bresler 2019), by Bernstein's inequality for polynomials of degree last - first.
        size = coarse
        factor *= (1 + 4 * UNIT) / math.cos(math.pi * (last - first) / (2 * coarse))
    return Lattice(tap, p, q, shift, n_p, n_q, size, False, factor)


def grouped(w: np.ndarray, view: Conv) -> np.ndarray:
    """(*taps, groups, in, out)."""
    if view.transpose and view.transpose_kernel:
        w = w.swapaxes(-1, -2)
    groups = view.feature_group_count
    w = w.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)
    return np.moveaxis(w, -2, -3)


def symbols(kernel: np.ndarray, lattices: list[Lattice]) -> Iterator[Blocks]:
    """The symbols of a grouped kernel at all frequencies, with their Gram matrices.

    Frequencies come in conjugate pairs for real kernels: one of each is enough.
    """
    phases, starts = _polyphase(kernel, lattices)
    if phases.shape[-2] < phases.shape[-1]:
        phases = phases.swapaxes(-1, -2)
    *shifts, _, rows, columns = phases.shape
    counts = [lattice.size for lattice in lattices]
    counts[-1] = counts[-1] // 2 + 1
    n_shifts, n = math.prod(shifts), len(shifts)

    def waves(axis, first, number):
        return _waves(lattices[axis].size, counts[axis], first, number)

    plain = [waves(i, starts[i], shifts[i]) for i in range(n)]
    # A symbol and its Gram matrix are sums of products of entries with waves. By the sum of the
    # absolute values, each number errs by at most the rounding of such a sum.
    magnitudes = _polyphase(np.abs(kernel), lattices)[0].sum(tuple(range(n)))
    most = max(map(frobenius, magnitudes)) * (1 + gamma(2 * rows * columns + n_shifts + 16))
    error = gamma(math.prod(kernel.shape[:n]) + sum(3 * k + 48 for k in shifts)) * most

    def symbol(index):
        *frequency, group = index
        part = phases[(..., group, slice(None), slice(None))]
        for axis, j in enumerate(frequency):
            part = np.tensordot(plain[axis][j], part, (0, 0))
        return part

    def at(start, gram):
        shape = gram.shape[:-2]
        return lambda i: symbol(np.add(np.unravel_index(i, shape), [start] + [0] * n))

    # Where an image smaller than the kernel lets taps meet, they may cancel: then squares of the
    # rounded sums keep more digits than sums of rounded squares.
    met = any(len(np.unique([x.shift, x.p, x.q], axis=1).T) < len(x.tap) for x in lattices)
    if not met and n_shifts**2 < 4 * math.prod(counts):
        # All products of two taps, once, instead of one product per frequency.
        pairs = _autocorrelation(phases)
        paired = [waves(i, 1 - shifts[i], 2 * shifts[i] - 1) for i in range(n)]
        operations = 2 * (rows + n_shifts) + sum(6 * k + 112 for k in shifts)
        rounding = gamma(operations) * most**2
        for start, gram in _transformed(pairs, paired):
            block = at(start, gram)
            yield Blocks(gram.reshape(-1, columns, columns), rounding, block, error)
    else:
        for _, blocks in _transformed(phases, plain):
            yield blocks_of(blocks.reshape(-1, rows, columns), error)


def symbol_stacks(kernel: np.ndarray, lattices: list[Lattice]) -> Iterator[np.ndarray]:
    """(s, rows, columns): the symbols at all frequencies, conjugates too, some at a time."""
    phases, starts = _polyphase(kernel, lattices)
    each = zip(lattices, starts, phases.shape, strict=False)
    plain = [_waves(x.size, x.size, start, number) for x, start, number in each]
    for _, stack in _transformed(phases, plain):
        yield stack.reshape(-1, *stack.shape[-2:])


def responses(lattice: Lattice, count: int, n_taps: int) -> np.ndarray:
    """(count, n_q, n_p, n_taps): what each tap adds to the symbol at the first frequencies; at the
    zeroth, how often it does."""
    low, high = (int(end(lattice.shift, initial=0)) for end in (np.min, np.max))
    waves = _waves(lattice.size, count, low, high - low + 1)
    out = np.zeros((count, lattice.n_q, lattice.n_p, n_taps), complex)
    where: Any = slice(None), lattice.q, lattice.p, lattice.tap
    np.add.at(out, where, waves[:, lattice.shift - low])
    return out


def _waves(size: int, count: int, first: int, number: int) -> np.ndarray:
    """(count, number): exp(2 pi i j s / size) for the shifts s from ``first`` on."""
    # The product is an exact integer, reduced before it becomes an angle in [-pi, pi], so that
    # each wave errs by 32 units in the last place at most.
    turns, half = np.arange(count)[:, None] * (first + np.arange(number)), size // 2
    return np.exp(2j * np.pi * (((turns + half) % size) - half) / size)


def _polyphase(kernel: np.ndarray, lattices: list[Lattice]) -> tuple[np.ndarray, list[int]]:
    """(*shifts, group, q and in, p and out) and the first shift of each dimension: the kernel as
    one of stride 1 between blocks of pixels."""
    n = len(lattices)
    starts = [int(lattice.shift.min(initial=0)) for lattice in lattices]
    sizes = [int(x.shift.max(initial=0)) - low + 1 for x, low in zip(lattices, starts, strict=True)]
    phases = [lattice.n_q for lattice in lattices], [lattice.n_p for lattice in lattices]
    out = np.zeros((*sizes, *phases[0], *phases[1], *kernel.shape[n:]))
    entry = np.indices([len(lattice.tap) for lattice in lattices]).reshape(n, -1)
    tap, q, p, shift = (
        [getattr(lattice, name)[i] for lattice, i in zip(lattices, entry, strict=True)]
        for name in ("tap", "q", "p", "shift")
    )
    shift = [each - low for each, low in zip(shift, starts, strict=True)]
    np.add.at(out, (*shift, *q, *p), kernel[tuple(tap)])
    # (*shifts, *q, *p, group, in, out) -> (*shifts, group, *q, in, *p, out)
    order = [*range(n), 3 * n, *range(n, 2 * n), 3 * n + 1, *range(2 * n, 3 * n), 3 * n + 2]
    rows, columns = (math.prod(ph) * c for ph, c in zip(phases, kernel.shape[-2:], strict=True))
    return out.transpose(order).reshape(*sizes, kernel.shape[n], rows, columns), starts


def _autocorrelation(phases: np.ndarray) -> np.ndarray:
    """(*differences, group, r, r): sums of ``M_s^T M_t`` over the pairs with t - s = difference."""
    *shifts, groups, _, columns = phases.shape
    out = np.zeros((*(2 * k - 1 for k in shifts), groups, columns, columns))
    where = [s for s in np.ndindex(*shifts) if phases[s].any()]
    for number, s in enumerate(where):
        for t in where[number:]:
            products = phases[s].swapaxes(-1, -2) @ phases[t]
            out[tuple(b - a + k - 1 for a, b, k in zip(s, t, shifts, strict=True))] += products
            if s != t:
                opposite = tuple(a - b + k - 1 for a, b, k in zip(s, t, shifts, strict=True))
                out[opposite] += products.swapaxes(-1, -2)
    return out


def _transformed(
    coefficients: np.ndarray, waves: list[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Sums of (*shifts, ...) times waves, as (*frequencies, ...), in chunks of the first axis.

    Each chunk takes the place of the last one.
    """
    rest = coefficients.shape[len(waves) :]
    for axis in reversed(range(1, len(waves))):
        lead, number = coefficients.shape[:axis], coefficients.shape[axis]
        flat = coefficients.reshape(math.prod(lead), number, -1)
        coefficients = (waves[axis] @ flat).reshape(*lead, -1)
    frequencies = [len(wave) for wave in waves]
    flat = coefficients.reshape(len(coefficients), -1)
    step = min(frequencies[0], max(1, _CHUNK // max(1, 16 * flat.shape[1])))
    out = np.empty((step, flat.shape[1]), complex)
    for start in range(0, frequencies[0], step):
        wave = waves[0][start : start + step]
        chunk = np.matmul(wave, flat, out=out[: len(wave)])
        yield start, chunk.reshape(len(wave), *frequencies[1:], *rest)


def explicit(kernel: np.ndarray, dimensions: list[Taps]) -> Iterator[Block]:
    """One matrix (out, in) per group."""
    strides = kernel.shape[: len(dimensions)]
    triples = np.indices([len(taps.tap) for taps in dimensions]).reshape(len(dimensions), -1)

    def flat(name: str, sizes: Sequence[int]) -> np.ndarray:
        each = [getattr(taps, name)[i] for taps, i in zip(dimensions, triples, strict=True)]
        return np.asarray(np.ravel_multi_index(each, sizes))

    tap = flat("tap", strides)
    out = flat("out", [taps.n_out for taps in dimensions])
    in_ = flat("in_", [taps.n_in for taps in dimensions])
    n_out, n_in = (math.prod(getattr(taps, n) for taps in dimensions) for n in ("n_out", "n_in"))
    groups, c_in, c_out = kernel.shape[len(dimensions) :]
    kernel = kernel.reshape(-1, groups, c_in, c_out)
    rows = out[:, None, None] * c_out + np.arange(c_out)
    columns = in_[:, None, None] * c_in + np.arange(c_in)[:, None]
    shape = n_out * c_out, n_in * c_in
    where = [np.broadcast_to(x, (len(tap), c_in, c_out)).ravel() for x in (rows, columns)]
    for group in range(groups):
        matrix = scipy.sparse.csr_array((kernel[tap, group].ravel(), where), shape)
        # A sparse product is slower than BLAS, unless nearly all of it is zeros.
        yield matrix.toarray() if math.prod(shape) <= _DENSE else matrix
