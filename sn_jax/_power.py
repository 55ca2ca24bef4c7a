"""Power and subspace iteration on a linear map and its transpose.

Vectors carry an axis of ``k`` of them after the batch axes: ``u`` (*batch, k, *codomain) and
``v`` (*batch, k, *domain). They are never flattened, so that they can take the sharding of a
kernel's axes. With ``k = 1`` this is the power method of Miyato et al. (2018), algorithm 1; with
more, subspace iteration with a Rayleigh-Ritz step, which tracks a drifting matrix more closely
at nearly the same memory traffic.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from sn_jax import _sharding


class PowerResult(NamedTuple):
    """A singular triple as far as the iteration got: ``A v = sigma u`` holds exactly.

    Attributes:
      sigma: (*batch,), an estimate of the norm from below; differentiable through the map.
      u: (*batch, *codomain), unit norm; a constant of the gradient.
      v: (*batch, *domain), unit norm; a constant of the gradient.
    """

    sigma: Array
    u: Array
    v: Array


def as_steps(n_steps: int | Array) -> int | Array:
    """``n_steps`` as a static Python int, or the traced / device array that it is."""
    if isinstance(n_steps, jax.Array):
        if n_steps.ndim or not jnp.issubdtype(n_steps.dtype, jnp.integer):
            raise TypeError(
                f"n_steps must be an integer scalar; got {n_steps.dtype} of shape {n_steps.shape}."
            )
        if isinstance(n_steps, jax.core.Tracer) or int(n_steps) >= 0:
            return n_steps
    else:
        try:
            n_steps = operator.index(n_steps)
        except TypeError:
            raise TypeError(f"n_steps must be an integer; got {n_steps!r}.") from None
        if n_steps >= 0:
            return n_steps
    raise ValueError(f"n_steps must be at least 0 (0 keeps the stored vectors); got {n_steps}.")


def power_iteration(
    matvec: Callable[[Array], Array], v0: Array, n_steps: int | Array, *, batch_ndim: int = 0
) -> PowerResult:
    r"""Power iteration on any linear map, its transpose found by ``jax.linear_transpose``.

    Each step is ``u <- A v / |A v|``, ``v <- A^T u / |A^T u|``; at the end ``sigma = <u, A v>``
    with ``u = A v / |A v|``. So ``sigma <= |A|_2`` always, and it errs by
    ``O((sigma_2 / sigma_1)^(4 n_steps))``: an estimate from below, never a bound. The gradient of
    ``sigma`` with respect to what ``matvec`` closes over is that of ``<u, A v>`` with ``u`` and
    ``v`` held constant (Miyato et al. 2018, equation 10).

    Args:
      matvec: linear map from (*batch, *domain) to (*batch, *codomain), each batch element on its
        own. To compile once for many calls, pass ``jax.tree_util.Partial(f, w)`` with ``f``
        defined at module level: a fresh lambda is a new function to ``jit``.
      v0: start, (*batch, *domain), floating, not orthogonal to the leading singular vector (draw
        it at random). Iterates in its dtype.
      n_steps: number of steps, ``>= 0``; a Python int, or an integer array (then not baked in).
      batch_ndim: number of leading batch axes of ``v0``.

    Returns:
      PowerResult: ``sigma`` (*batch,), ``u`` (*batch, *codomain), ``v`` (*batch, *domain).

    Raises:
      ValueError, TypeError: ``n_steps`` negative or not an integer; ``v0`` not floating.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> result = power_iteration(lambda x: w @ x, jnp.array([1.0, 1.0]), 10)
      >>> print(f"{result.sigma:.4f}")
      3.0000
    """
    steps = as_steps(n_steps)
    v0 = jnp.asarray(v0)
    if not jnp.issubdtype(v0.dtype, jnp.floating):
        raise TypeError(f"v0 must be floating point; got {v0.dtype}.")
    if not 0 <= batch_ndim <= v0.ndim:
        raise ValueError(f"batch_ndim={batch_ndim} does not fit v0 of shape {v0.shape}.")
    if not isinstance(matvec, Partial):
        matvec = Partial(matvec)
    static = isinstance(steps, int)
    return _power_iteration(
        matvec, v0, None if static else steps, static_steps=steps if static else None,
        batch_ndim=batch_ndim,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("static_steps", "batch_ndim"))
def _power_iteration(matvec, v0, traced_steps, *, static_steps, batch_ndim):
    # What matvec closes over becomes an argument, so that the loop can hold it constant.
    matvec, closed_over = jax.closure_convert(matvec, v0)

    def apply(w, x):
        return matvec(x, *w)

    lead = batch_ndim + 1
    v = unit(jnp.expand_dims(lax.stop_gradient(v0), batch_ndim), 0.0, lead)
    u = unit(_mapped(apply, batch_ndim)(lax.stop_gradient(closed_over), v), 0.0, lead)
    steps = static_steps if traced_steps is None else traced_steps
    result = iterate(apply, closed_over, u, v, n_steps=steps, batch_ndim=batch_ndim)
    first = partial(lax.index_in_dim, index=0, axis=batch_ndim, keepdims=False)
    return PowerResult(result.sigma, first(result.u), first(result.v))


def iterate(
    apply: Callable[[Any, Array], Array],
    w: Any,
    u: Array,
    v: Array,
    *,
    n_steps: int | Array,
    batch_ndim: int,
) -> PowerResult:
    """``n_steps`` steps ``v <- A^T u``, ``u <- A v`` (each orthonormalized), then sigma.

    Only ``A_w v`` of the last half step depends on ``w`` for differentiation. It reads ``w``
    2 n_steps times (once for ``n_steps = 0``, which returns ``u`` and ``v`` as they came).
    An update that gives no usable direction (zero or not finite) keeps the vector it had.

    Args:
      apply: ``apply(w, x)``, linear in ``x`` of shape (*batch, *domain).
      w: pytree that ``apply`` takes.
      u, v: (*batch, k, *codomain), (*batch, k, *domain); the first of the k is the leading one.
    """
    if isinstance(n_steps, int) and n_steps == 0:
        # Normalized on read: an average of states, or a cast, must not change sigma's scale.
        u0, v0 = (
            unit(lax.slice_in_dim(x, 0, 1, axis=batch_ndim), 0.0, batch_ndim + 1) for x in (u, v)
        )
        return PowerResult(_sigma(u0, _mapped(apply, batch_ndim)(w, v0), batch_ndim), u, v)

    frozen = lax.stop_gradient(w)
    adjoint = _adjoint(apply, frozen, v, batch_ndim)

    def step(_, uvz):
        u, v, z = uvz
        v = _orthonormal(z, v, batch_ndim)
        u = _orthonormal(_mapped(apply, batch_ndim)(frozen, v), u, batch_ndim)
        return u, v, adjoint(u)

    carry = u, v, adjoint(u)
    if not isinstance(n_steps, int) or n_steps > 1:
        # Unrolled where it is short: XLA's convolutions are many times slower inside a CPU loop.
        short = isinstance(n_steps, int) and n_steps <= 5
        carry = lax.fori_loop(1, n_steps, step, carry, unroll=True if short else None)
    sigma, new_u, new_v = _finish(apply, w, *carry, batch_ndim)
    if isinstance(n_steps, int):
        return PowerResult(sigma, new_u, new_v)
    kept = iterate(apply, w, u, v, n_steps=0, batch_ndim=batch_ndim)
    pick = partial(jnp.where, n_steps > 0)
    return PowerResult(*map(pick, (sigma, new_u, new_v), kept))


def converge(
    apply: Callable[[Any, Array], Array],
    w: Any,
    u: Array,
    v: Array,
    *,
    rtol: Array,
    max_steps: int,
    batch_ndim: int,
) -> PowerResult:
    """Iterate until ``|A^T u - sigma v| <= rtol * sigma`` for every batch element.

    ``A v = sigma u`` holds exactly after a step, so the residual is the whole backward error of
    the triple: some singular value of ``A`` lies within ``rtol * sigma`` of ``sigma``. A map that
    is zero or not finite counts as converged.
    """
    w = lax.stop_gradient(w)
    adjoint = _adjoint(apply, w, v, batch_ndim)
    first = partial(lax.index_in_dim, index=0, axis=batch_ndim, keepdims=False)

    def unfinished(carry):
        i, _, _, _, _, residual = carry
        return (i < max_steps) & _sharding.anywhere(jnp.any(residual > rtol))

    def step(carry):
        i, u, v, z, _, _ = carry
        sigma, u, v = _finish(apply, w, u, v, z, batch_ndim)
        z = adjoint(u)
        safe = jnp.where(sigma >= jnp.finfo(sigma.dtype).tiny, sigma, jnp.ones_like(sigma))
        gap = first(z) / _expand(safe, first(z)) - first(v) * _expand(sigma / safe, first(v))
        return i + 1, u, v, z, sigma, _norm(gap, batch_ndim)

    sigma = iterate(apply, w, u, v, n_steps=0, batch_ndim=batch_ndim).sigma
    start = 0, u, v, adjoint(u), sigma, jnp.full_like(sigma, jnp.inf)
    _, u, v, _, sigma, _ = lax.while_loop(unfinished, step, start)
    return PowerResult(sigma, u, v)


def _finish(apply, w, u, v, z, batch_ndim) -> PowerResult:
    """The last half step, given z = A^T u: v from z, then u and sigma from one read of w."""
    v_old, v = v, _orthonormal(z, v, batch_ndim)
    y = _mapped(apply, batch_ndim)(w, v)
    if v.shape[batch_ndim] > 1:
        rotation = _ritz(lax.stop_gradient(y), batch_ndim)
        v, y = _combine(rotation, v, batch_ndim), _combine(rotation, y, batch_ndim)
        # Orthonormal only to sqrt(eps): dividing by the true length keeps sigma <= |A|.
        length = _norm(v, batch_ndim + 1)
        length = jnp.where(length > 0, length, jnp.ones_like(length))
        v, y = v / _expand(length, v), y / _expand(length, y)
        v = unit(v, v_old, batch_ndim + 1)
        # Eigenvectors have no sign of their own: keep the one that the stored vectors had.
        along = jnp.sum(v * v_old, tuple(range(batch_ndim + 1, v.ndim)))
        sign = jnp.where(along < 0, -jnp.ones_like(along), jnp.ones_like(along))
        v, y = v * _expand(sign, v), y * _expand(sign, y)
    u = unit(lax.stop_gradient(y), u, batch_ndim + 1)
    return PowerResult(_sigma(u, y, batch_ndim), u, v)


def _sigma(u: Array, y: Array, batch_ndim: int) -> Array:
    """<u, y> of the leading pair; |y| where that is <= 0 (a sign flip, a foreign checkpoint)."""
    first = partial(lax.index_in_dim, index=0, axis=batch_ndim, keepdims=False)
    u, y = lax.stop_gradient(first(u)), first(y)
    axes = tuple(range(batch_ndim, y.ndim))
    aligned = jnp.sum(u * lax.stop_gradient(y), axes, keepdims=True) > 0
    u = jnp.where(aligned, u, unit(lax.stop_gradient(y), u, batch_ndim))
    return jnp.sum(u * y, axes)


def _mapped(apply, batch_ndim):
    """``apply`` over the axis of the k vectors."""
    return jax.vmap(apply, in_axes=(None, batch_ndim), out_axes=batch_ndim)


def _adjoint(apply, w, v, batch_ndim):
    transpose = jax.linear_transpose(partial(_mapped(apply, batch_ndim), w), v)
    return lambda u: transpose(u)[0]


def _expand(scalars: Array, like: Array) -> Array:
    return lax.expand_dims(scalars, tuple(range(scalars.ndim, like.ndim)))


def _norm(x: Array, lead: int) -> Array:
    """Euclidean norm over all axes from ``lead`` on."""
    return jnp.sqrt(jnp.sum(x * x, tuple(range(lead, x.ndim))))


def unit(x: Array, fallback: Array | float, lead: int) -> Array:
    """x / |x| over the axes from ``lead`` on; ``fallback`` where x is zero or not finite.

    Divided by its largest entry first: squares of 1e-30 would underflow in float32.
    """
    axes = tuple(range(lead, x.ndim))
    peak = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    usable = (peak >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(peak)
    x = x / jnp.where(usable, peak, jnp.ones_like(peak))
    # The largest entry is 1 now, so the floor of 1 only keeps 0 / 0 away from unusable x.
    return jnp.where(usable, x / _expand(jnp.maximum(_norm(x, lead), 1.0), x), fallback)


def noise(seed: Array | int, shape: tuple[int, ...], dtype) -> Array:
    """White noise in [-1, 1) to start from: a hash of the index and a 32-bit seed.

    A constant or periodic vector could be orthogonal to the leading singular vector of a
    structured matrix. Not ``jax.random``: its counter-based generator would be most of the time
    that ``init`` takes to compile.
    """
    index = lax.iota(jnp.uint32, math.prod(shape))
    bits = _mix(index ^ _mix(jnp.asarray(seed, jnp.uint32)))
    return ((bits >> 8).astype(dtype) / 2**23 - 1).reshape(shape)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers that leaves no visible trace of their order."""
    x = x + jnp.uint32(0x9E3779B9)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
    return x ^ (x >> 16)


def _orthonormal(z: Array, fallback: Array, batch_ndim: int) -> Array:
    """Orthonormal rows spanning z's; rows that depend on the others numerically become zero.

    From the eigenvectors of the k x k Gram matrix of unit rows: the one product is a k^2
    reduction, where QR of a sharded array would gather all of it.
    """
    z = unit(z, fallback, batch_ndim + 1)
    if z.shape[batch_ndim] == 1:
        return z
    eigenvalues, q = jnp.linalg.eigh(_gram(z, batch_ndim), symmetrize_input=False)
    kept = eigenvalues > jnp.sqrt(jnp.finfo(z.dtype).eps)
    weights = jnp.where(kept, lax.rsqrt(jnp.where(kept, eigenvalues, 1.0)), 0.0)
    return _combine(q * jnp.expand_dims(weights, -2), z, batch_ndim)


def _ritz(y: Array, batch_ndim: int) -> Array:
    """(*batch, k, k): columns combine rows of y into left singular directions, largest first."""
    peak = jnp.max(jnp.abs(y), tuple(range(batch_ndim, y.ndim)), keepdims=True, initial=0)
    y = y / jnp.where(peak > 0, peak, jnp.ones_like(peak))
    _, q = jnp.linalg.eigh(_gram(y, batch_ndim), symmetrize_input=False)
    return jnp.flip(q, -1)


def _gram(x: Array, batch_ndim: int) -> Array:
    axes, batch = tuple(range(batch_ndim + 1, x.ndim)), tuple(range(batch_ndim))
    return lax.dot_general(x, x, ((axes, axes), (batch, batch)), precision=lax.Precision.HIGHEST)


def _combine(coefficients: Array, x: Array, batch_ndim: int) -> Array:
    """Row i of the result is the sum over j of coefficients[j, i] * x[j]."""
    k, batch = (batch_ndim,), tuple(range(batch_ndim))
    dims = ((k, k), (batch, batch))
    return lax.dot_general(coefficients, x, dims, precision=lax.Precision.HIGHEST)
