"""Norms bounded from above inside a program, and factors that keep a kernel below a bound.

Here belongs what is proved in the program's own arithmetic, under ``jit``: matrix products alone,
and beside each what its rounding can have hidden. The host's brackets in float64 are in ``_norms``.

The bound is that of repeated squaring (Delattre et al. 2023): ``|A|^2 = |A^H A|``, so that with
``G_0 = A`` and ``G_t = G_(t-1)^H G_(t-1)`` the norm is at most ``|G_t|_F^(1 / 2^t)``. Each product
errs in norm by ``gamma_n`` times the square of ``| |G| |_2``, in whatever order it is summed
(Higham 2002, equation 3.5). That is added before the root is taken that leads from ``G_t`` back
to ``G_(t-1)``, and each root halves it, so that only the first products matter.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sn_jax import _mesh
from sn_jax._operator import Operator
from sn_jax._rules import label
from sn_jax._symbols import grouped, lattices_of, responses
from sn_jax._views import Conv, Matrix, Scaled, View, compute_dtype

# n equal singular values are bounded to a factor of n^(1 / 2^(1 + _SQUARINGS)).
_SQUARINGS = 7
# Products run over so many rows at a time: their sums then err by the number of rows in a chunk
# plus that of chunks, and not by their product.
_ROWS = 256
# How many entries of symbols are made at a time.
_ENTRIES = 2**22


def check(path: str, w: Array, view: View) -> None:
    """Raise unless the kernel's norm can be bounded here."""
    inner = view
    while isinstance(inner, Scaled):
        inner = inner.view
    if not isinstance(inner, Matrix | Conv):
        raise ValueError(
            f'{label(path)} of shape {w.shape} is seen as {view}, and mode="certified" bounds the '
            "norms of Matrix and Conv alone. See it as one of them, leave it out by a rule with "
            'None, or take mode="divide" and sn_jax.norm_bounds outside of jit.'
        )
    if Operator(view, w).is_split:
        raise ValueError(
            f"{label(path)} of shape {w.shape} is one block of a kernel, as {view} says, and "
            'mode="certified" takes products of the whole: call it outside of shard_map, where XLA '
            "sees the whole."
        )


def factor(w: Array, bound: float | Array, view: View) -> Array:
    """(*batch,): the f with which ``view.scale(w, f)``, as rounded, has a norm of at most bound.

    As large as is proved; f = bound for a kernel of zeros, and NaN for one that is not finite.
    """
    dtype = compute_dtype(w.dtype)

    def run(w, bound):
        return (_factor(w.astype(dtype), bound, view, jnp.finfo(w.dtype)),)

    if _mesh.is_explicit(w):
        run = _mesh.on_automatic_axes(run, (Operator(view, w).shardings()[0],))
    return run(lax.stop_gradient(w), jnp.asarray(bound, dtype))[0]


def _factor(w: Array, c: Array, view: View, stored) -> Array:
    largest = 1.0
    while isinstance(view, Scaled):
        largest *= float(np.max(np.abs(view.factor), initial=0))
        w, view = view.effective(w), view.view
    assert isinstance(view, Matrix | Conv)  # check
    stack, bounded = _matrices(view, w) if isinstance(view, Matrix) else _kernels(view, w)
    lead = view.batch_shape(w.shape)
    axes = tuple(range(len(lead), stack.ndim))
    peak = jnp.max(jnp.abs(stack), axes, initial=0)
    _, exponent = jnp.frexp(peak)
    unit, tiny = _unit(w.dtype), float(jnp.finfo(w.dtype).tiny)
    found = bounded(jnp.ldexp(stack, jnp.expand_dims(-exponent, axes)))
    # What rounding the scaled kernel can add: relative to each entry, and where it is subnormal.
    # Processors may flush subnormal numbers to zero, also those that come in.
    relative = 0.51 * float(stored.eps) + 8 * unit
    least = max(float(stored.smallest_subnormal), tiny) * max(largest, 1.0)
    flushed = jnp.asarray(2 * least * found.ones, w.dtype)
    norm = found.norm + relative * found.absolute + jnp.ldexp(flushed, -exponent)
    below = jnp.maximum(c * (1 - 16 * unit) - flushed, 0)
    # Too small is no harm, and infinity would be.
    result = jnp.minimum(jnp.ldexp(below / norm, -exponent), float(jnp.finfo(w.dtype).max))
    result = jnp.where(peak < tiny, jnp.broadcast_to(c, result.shape), result)
    return jnp.where(jnp.isfinite(norm), result, jnp.nan)


class _Bounded(NamedTuple):
    """What is known of a map.

    Attributes:
      norm: at least its norm, (*batch,).
      absolute: at least that of the map with the absolute values of the kernel's entries.
      ones: at least that of the map with a kernel of ones.
    """

    norm: Array
    absolute: Array
    ones: float


def _matrices(view: Matrix, w: Array):
    """(*batch, m, n), and the function that bounds it."""
    batch, ins, outs = view.axis_groups(w.ndim)
    lead, m, n = (tuple(w.shape[axis] for axis in axes) for axes in (batch, ins, outs))
    m, n = math.prod(m), math.prod(n)

    def bounded(x):
        if x.size == 0:
            zero = jnp.zeros(lead, x.dtype)
            return _Bounded(zero, zero, 1.0)
        return _Bounded(_above(x), _size(x), math.sqrt(m * n) * (1 + 1e-6))

    return w.transpose(*batch, *ins, *outs).reshape(*lead, m, n), bounded


def _kernels(view: Conv, w: Array):
    """(*batch, *taps, in, out), and the function that bounds it.

    A convolution is a part of a circular one, times ``stretch`` where pixels are copied or the
    grid is coarse; the norm of a circular one is that of its largest symbol.
    """
    batch = view.kernel_batch_axes(w.ndim)
    stack = jnp.moveaxis(w, batch, range(len(batch)))
    lead, kernel = stack.shape[: len(batch)], stack.shape[len(batch) :]
    with jax.ensure_compile_time_eval():  # they are read off concrete maps
        lattices = lattices_of(replace(view, batch_axes=None), kernel)
    n, stretch = len(lattices), math.prod(x.factor for x in lattices) * (1 + 1e-6)
    sizes = [x.size for x in lattices]
    sizes[-1] = sizes[-1] // 2 + 1  # frequencies come in conjugate pairs
    waves, counts = (
        [responses(*each) for each in zip(lattices, frequencies, kernel[:n], strict=True)]
        for frequencies in (sizes, [1] * n)
    )
    counts = [np.real(count) for count in counts]
    ones = math.prod(float(np.linalg.norm(count.sum(-1))) for count in counts)
    per_row = math.prod(wave[0].size for wave in waves) * math.prod(sizes[1:]) * kernel[-1]
    rows = max(1, _ENTRIES // max(1, per_row * kernel[-2] // math.prod(kernel[:n])))

    def bounded(x):
        if x.size == 0 or ones == 0:
            zero = jnp.zeros(lead, x.dtype)
            return _Bounded(zero, zero, 1.0)
        norm, absolute = (
            stretch * each.reshape(lead) for each in lax.map(one, x.reshape(-1, *kernel))
        )
        return _Bounded(norm, absolute, stretch * ones * math.sqrt(math.prod(kernel[-2:])))

    def one(kernel):
        taps = grouped(kernel, view)
        hidden = _gamma(sum(3 * size + 48 for size in taps.shape[:n]), taps.dtype)
        absolute = (1 + hidden) * jnp.max(_size(_symbols(jnp.abs(taps), counts)))
        waved = lax.complex(taps, jnp.zeros_like(taps))

        def largest(wave):
            return jnp.max(_above(_symbols(waved, [wave[None], *waves[1:]])))

        first = jnp.asarray(waves[0], waved.dtype)
        return jnp.max(lax.map(largest, first, batch_size=rows)) + hidden * absolute, absolute

    return stack, bounded


def _symbols(taps: Array, waves: list) -> Array:
    """(*frequencies, group, q and in, p and out) of taps (*taps, group, in, out); one of the waves,
    (frequency, q, p, tap), for each dimension."""
    n, names = len(waves), "abc"[: len(waves)] + "xyz"
    for axis, wave in enumerate(waves):
        tap, new = "abc"[axis], "ABC"[axis] + "DEF"[axis] + "GHI"[axis]
        then = names.replace(tap, new)
        wave, equation = jnp.asarray(wave, taps.dtype), f"{new}{tap},{names}->{then}"
        taps, names = jnp.einsum(equation, wave, taps, precision=lax.Precision.HIGHEST), then
    last = "ABC"[:n] + "x", "DEF"[:n] + "y", "GHI"[:n] + "z"
    taps = jnp.einsum(f"{names}->{''.join(last)}", taps)
    shape, n = taps.shape, n + 1
    return taps.reshape(*shape[:n], math.prod(shape[n : 2 * n]), math.prod(shape[2 * n :]))


def _above(a: Array) -> Array:
    """At least the norms of (*b, m, n)."""
    real, unit = jnp.finfo(a.dtype).dtype, _unit(a.dtype)

    def squared(a, _=None):
        # Divided by powers of two alone, since these round nothing that could be seen.
        _, exponent = jnp.frexp(_size(a))
        scale = jnp.ldexp(jnp.ones(exponent.shape, real), -exponent)[..., None, None]
        return _gram(a * scale.astype(a.dtype)), exponent

    def root(norm, exponent, hidden):
        return jnp.ldexp(jnp.sqrt(norm + hidden) * (1 + 8 * unit), exponent)

    gram, first = squared(a)
    last, others = lax.scan(squared, gram, None, length=_SQUARINGS - 1)
    hidden = _gram_error(gram)
    norm, _ = lax.scan(lambda x, e: (root(x, e, hidden), None), _size(last), others, reverse=True)
    return root(norm, first, _gram_error(a))


def _gram(a: Array) -> Array:
    """``A^H A`` or ``A A^H``, the smaller, of (*b, m, n)."""
    a = a if a.shape[-1] <= a.shape[-2] else jnp.matrix_transpose(a)
    chunks, rows = _chunks(a)

    def product(i):
        part = lax.dynamic_slice_in_dim(a, i * rows, rows, -2)
        if not jnp.iscomplexobj(a):
            return _product(part, part)
        # Of real products, since nobody says how a complex one is made.
        real, imag = jnp.real(part), jnp.imag(part)
        both, mixed = jnp.concatenate([real, imag], -2), _product(real, imag)
        return lax.complex(_product(both, both), mixed - jnp.matrix_transpose(mixed))

    if chunks == 1:
        return product(0)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, chunks * rows - a.shape[-2]), (0, 0)])
    return lax.fori_loop(1, chunks, lambda i, total: total + product(i), product(0))


def _chunks(a: Array) -> tuple[int, int]:
    """(how many chunks, how many rows in each) of the longer side."""
    chunks = -(-max(a.shape[-2:]) // _ROWS)
    return chunks, -(-max(a.shape[-2:]) // chunks)


def _gram_error(a: Array) -> float:
    """The norm of what rounding hides in ``_gram`` of an A with ``| |A| |_2 <= 1``."""
    chunks, rows = _chunks(a)
    if jnp.iscomplexobj(a):
        return math.sqrt(2) * _gamma(2 * rows + chunks + 16, a.dtype)
    return _gamma(rows + chunks + 16, a.dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(jnp.matrix_transpose(a), b, precision=lax.Precision.HIGHEST)


def _size(a: Array) -> Array:
    """At least ``| |A| |_2`` of (*b, m, n): the Frobenius norm, or the root of the product of the
    largest sums along rows and columns."""
    m, n = a.shape[-2:]
    magnitudes = jnp.abs(a)
    # The barrier keeps XLA from making one sum of two, which could err by m n units.
    squares = lax.optimization_barrier(jnp.sum(magnitudes * magnitudes, -1))
    # Squares can underflow.
    frobenius = jnp.sqrt(jnp.sum(squares, -1) + m * n * float(jnp.finfo(a.dtype).tiny))
    sums = [jnp.sqrt(jnp.max(jnp.sum(magnitudes, axis), -1)) for axis in (-1, -2)]
    return jnp.minimum(frobenius, sums[0] * sums[1]) * (1 + _gamma(m + n + 16, a.dtype))


def _unit(dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def _gamma(terms: float, dtype) -> float:
    """What rounding adds to a sum of so many products, relative to that of absolute values."""
    relative = terms * _unit(dtype)
    return relative / (1 - relative) if relative < 0.5 else math.inf
