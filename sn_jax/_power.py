"""Power and subspace iteration on a linear map and its transpose.

Vectors carry an axis of ``k`` of them after the batch axes: ``u`` (*batch, k, *codomain) and
``v`` (*batch, k, *domain). They are never flattened, so that they can take the sharding of a
kernel's axes. With ``k = 1`` this is the power method of Miyato et al. (2018), algorithm 1; with
more, subspace iteration with a shift and a Rayleigh-Ritz step, which tracks a drifting matrix more
closely at nearly the same memory traffic.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer, eval_jaxpr
from jax.tree_util import register_dataclass

from sn_jax import _mesh
from sn_jax._operator import Operator


class PowerResult(NamedTuple):
    """A singular triple as far as the iteration got: ``A v = sigma u`` holds exactly.

    Attributes:
      sigma: (*batch,), an estimate of the norm from below; differentiable through the map.
      u: (*batch, *codomain), unit norm; a constant of the gradient.
      v: (*batch, *domain), unit norm; a constant of the gradient.

    Example:
      >>> result = power_iteration(lambda x: jnp.array([2.0, 1.0]) * x, jnp.ones(2), 20)
      >>> print(f"{result.sigma:.3f}", result.u.round(3), result.v.round(3))
      2.000 [1. 0.] [1. 0.]
    """

    sigma: Array
    u: Array
    v: Array


def as_steps(n_steps: int | Array) -> int | Array:
    """``n_steps`` as a static Python int, or the traced / device array that it is."""
    if isinstance(n_steps, jax.Array):
        if n_steps.ndim or not jnp.issubdtype(n_steps.dtype, jnp.signedinteger):
            raise TypeError(
                f"n_steps must be a Python int or a signed integer scalar; got {n_steps.dtype} of "
                f"shape {n_steps.shape}: convert it, as by n_steps.astype(jnp.int32)."
            )
        if isinstance(n_steps, Tracer) or int(n_steps) >= 0:
            return n_steps
    else:
        try:
            n_steps = operator.index(n_steps)
        except TypeError:
            raise TypeError(f"n_steps must be an integer, such as 1; got {n_steps!r}.") from None
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
        own: any function, bound method or ``jax.tree_util.Partial``. It is traced anew at each
        call, so the result is that of what it closes over now. Calls whose programs are equal
        compile once: arrays (of the same shapes) may differ, as in ``Partial(f, w)``, in
        ``lambda x: w @ x`` or in a method that reads ``self.w``; Python numbers are part of the
        program.
      v0: start, (*batch, *domain), floating, not orthogonal to the leading singular vector (draw
        it at random). Iterates in its dtype.
      n_steps: number of steps, ``>= 0``; a Python int, or an integer array (then not baked in).
      batch_ndim: number of leading batch axes of ``v0``.

    Returns:
      PowerResult: ``sigma`` (*batch,), ``u`` (*batch, *codomain), ``v`` (*batch, *domain).

    Raises:
      ValueError, TypeError: ``n_steps`` negative or not an integer; ``v0`` not floating;
        ``matvec`` is no function, does not return one array, or is not linear.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> result = power_iteration(lambda x: w @ x, jnp.array([1.0, 1.0]), 10)
      >>> print(f"{result.sigma:.4f}")
      3.0000
    """
    if not callable(matvec):
        raise TypeError(
            f"matvec must be a function of one array, such as lambda x: w @ x; got "
            f"{type(matvec).__name__}. The order is (matvec, v0, n_steps)."
        )
    steps = as_steps(n_steps)
    v0 = jnp.asarray(v0)
    if not jnp.issubdtype(v0.dtype, jnp.floating):
        raise TypeError(f"v0 must be floating point; got {v0.dtype}.")
    if not 0 <= batch_ndim <= v0.ndim:
        raise ValueError(f"batch_ndim={batch_ndim} does not fit v0 of shape {v0.shape}.")
    operator = _Function(*_traced(matvec, v0), _mesh.struct_like(v0.shape, v0), batch_ndim)
    static = isinstance(steps, int)
    return _power_iteration(
        operator, v0, None if static else steps, static_steps=steps if static else None
    )


@partial(jax.jit, static_argnames="static_steps")
def _power_iteration(operator, v0, traced_steps, *, static_steps):
    axis = operator.batch_ndim
    v = unit(lax.stop_gradient(v0), 0.0, axis)
    u = unit(operator.frozen.mv(v), 0.0, axis)
    steps = static_steps if traced_steps is None else traced_steps
    sigma, u, v = iterate(operator, *(jnp.expand_dims(x, axis) for x in (u, v)), n_steps=steps)
    return PowerResult(sigma, _first(u, axis), _first(v, axis))


@partial(
    register_dataclass, data_fields=("closed_over",), meta_fields=("program", "x", "batch_ndim")
)
@dataclass(frozen=True, eq=False)
class _Function:
    """A traced function of single vectors, with what an iteration asks of an ``Operator``.

    Attributes:
      program: of (closed_over, x) (static).
      closed_over: arrays.
      x: type of what it takes (static).
      batch_ndim: its number of leading batch axes (static).
    """

    program: "_Program"
    closed_over: list[Array]
    x: jax.ShapeDtypeStruct
    batch_ndim: int

    @property
    def frozen(self) -> "_Function":
        return replace(self, closed_over=lax.stop_gradient(self.closed_over))

    def mv(self, x: Array) -> Array:
        return self.program(self.closed_over, x)

    def rmv(self, y: Array) -> Array:
        return jax.linear_transpose(self.mv, self.x)(y)[0]


def _traced(matvec: Callable[[Array], Array], v0: Array) -> tuple["_Program", list[Array]]:
    """(program, the arrays that ``matvec`` closes over, which are the program's arguments)."""
    # Wrapped in a new function, since JAX would return the trace of one that it has seen before.
    closed, out = jax.make_jaxpr(lambda x: matvec(x), return_shape=True)(v0)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(f"matvec must return one array; got a {type(out).__name__}.")
    program = _Program(_without_constants(closed))
    try:
        jax.eval_shape(jax.linear_transpose(partial(program, closed.consts), v0), out)
    except Exception as error:
        raise ValueError(
            f"matvec is not linear: it cannot be transposed ({error}). Leave biases, activations "
            "and normalizations out of it."
        ) from error
    return program, closed.consts


def _without_constants(closed: Any) -> Any:
    """The program alone: closed-over arrays are its arguments, and not kept alive by it."""
    from jax.extend.core import ClosedJaxpr

    # Since jax 0.12 the two are one class, and a program is the jaxpr of itself.
    return ClosedJaxpr(closed, ()) if closed.jaxpr is closed else closed.jaxpr


class _Program:
    """A traced map of (closed-over arrays, x), equal to every other that computes the same way.

    So ``jit``, to which it is a static argument, compiles equal ones once, though each call of
    ``power_iteration`` traces its function anew.
    """

    def __init__(self, jaxpr: Any):
        self._jaxpr, self._structure = jaxpr, _structure(jaxpr)

    def __call__(self, closed_over: list[Array], x: Array) -> Array:
        (y,) = eval_jaxpr(self._jaxpr, closed_over, x)
        return y

    def __hash__(self):
        return hash(self._structure)

    def __eq__(self, other):
        return isinstance(other, _Program) and self._structure == other._structure


def _structure(x: Any) -> Any:
    """A jaxpr, or a parameter of one of its equations, in hashable form.

    Equal forms compute equally; whatever is not understood is compared by identity, and lives as
    long as the program that holds it.
    """
    # Imported here, since it loads Pallas and would double the time that sn_jax takes to import.
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

    if isinstance(x, ClosedJaxpr) and x.jaxpr is not x:
        return _structure(x.jaxpr), tuple(map(id, x.consts))
    if isinstance(x, Jaxpr):
        numbers = {}

        def atom(v):
            if isinstance(v, Literal):
                return v.aval, np.asarray(v.val).tobytes()
            return numbers.setdefault(v, len(numbers)), v.aval

        inputs = [atom(v) for v in (*x.constvars, *x.invars)]
        equations = [
            (eqn.primitive, tuple(map(atom, eqn.invars)), _structure(eqn.params),
             tuple(map(atom, eqn.outvars)))
            for eqn in x.eqns
        ]  # fmt: skip
        constants = tuple(map(id, getattr(x, "consts", ())))
        return tuple(inputs), tuple(equations), tuple(map(atom, x.outvars)), constants
    if isinstance(x, dict):
        return tuple((name, _structure(value)) for name, value in sorted(x.items()))
    if isinstance(x, tuple | list):
        return type(x), tuple(map(_structure, x))
    if isinstance(x, float):
        return x.hex()  # 0.0 == -0.0
    try:
        hash(x)
    except TypeError:
        return "is", id(x)
    return type(x), x


def iterate(
    operator: Operator | _Function, u: Array, v: Array, *, n_steps: int | Array
) -> PowerResult:
    """``n_steps`` steps ``v <- A^T u``, ``u <- A v`` (each orthonormalized), then sigma.

    Only ``A v`` of the last half step depends on the map for differentiation. It reads the kernel
    2 n_steps times (once for ``n_steps = 0``, which returns ``u`` and ``v`` as they came).
    An update that gives no usable direction (zero or not finite) keeps the vector it had.

    Args:
      operator: the map.
      u, v: (*batch, k, *codomain), (*batch, k, *domain); the first of the k is the leading one.
    """
    if isinstance(n_steps, int) and n_steps == 0:
        return PowerResult(_stored_sigma(operator, u, v), u, v)

    vectors, frozen = _Vectors(operator, v), operator.frozen

    def step(_, uvz):
        u, v, z = uvz
        v, _ = vectors.orthonormal(z, v)
        u, _ = vectors.orthonormal(frozen.mv(v), u)
        return u, v, frozen.rmv(u)

    start = vectors.squeezed(u)
    carry = start, vectors.squeezed(v), frozen.rmv(start)
    if not isinstance(n_steps, int) or n_steps > 1:
        # Short loops are unrolled: inside a loop, XLA's convolutions on CPUs are many times slower.
        short = isinstance(n_steps, int) and n_steps <= 5
        carry = lax.fori_loop(1, n_steps, step, carry, unroll=True if short else None)
    sigma, *new = vectors.finish(*carry)
    new = PowerResult(sigma, *map(vectors.unsqueezed, new))
    if isinstance(n_steps, int):
        return new
    kept = iterate(operator, u, v, n_steps=0)
    return PowerResult(*map(partial(jnp.where, n_steps > 0), new, kept))


def converge(
    operator: Operator, u: Array, v: Array, *, rtol: Array, max_steps: int | Array
) -> tuple[Array, Array, Array, Array]:
    """Iterate until ``|A^T u - sigma v| <= rtol * sigma`` for every batch element.

    ``A v = sigma u`` holds exactly after a step, so the residual is the whole backward error of
    the triple: some singular value of ``A`` lies within ``rtol * sigma`` of ``sigma``. A map that
    is zero or not finite counts as converged.

    Returns:
      (sigma, u, v, residual): the residual of the last step relative to sigma, (*batch,); infinite
        if no step was taken.
    """
    operator = operator.frozen
    vectors = _Vectors(operator, v)

    def unfinished(carry):
        i, _, _, _, _, residual = carry
        return (i < max_steps) & _mesh.anywhere(jnp.any(residual > rtol))

    def step(carry):
        i, u, v, z, _, _ = carry
        sigma, u, v = vectors.finish(u, v, z)
        z = operator.rmv(u)
        gap = _relative_gap(vectors.leading(z), sigma, vectors.leading(v), operator.batch_ndim)
        return i + 1, u, v, z, sigma, gap

    sigma = iterate(operator, u, v, n_steps=0).sigma
    u, v = vectors.squeezed(u), vectors.squeezed(v)
    start = 0, u, v, operator.rmv(u), sigma, jnp.full_like(sigma, jnp.inf)
    _, u, v, _, sigma, gap = lax.while_loop(unfinished, step, start)
    return sigma, vectors.unsqueezed(u), vectors.unsqueezed(v), gap


def residual(operator: Operator, u: Array, v: Array) -> tuple[Array, Array, Array]:
    """(|A^T u - sigma v| / sigma, u, v) of the leading pair of stored vectors, made unit.

    0 for a map that is zero, NaN for one that is not finite.
    """
    operator, b = operator.frozen, operator.batch_ndim
    sigma = iterate(operator, u, v, n_steps=0).sigma
    u1, v1 = (unit(_first(x, b), 0.0, b) for x in (u, v))
    return _relative_gap(operator.rmv(u1), sigma, v1, b), u, v


def _relative_gap(z: Array, sigma: Array, v: Array, batch_ndim: int) -> Array:
    """|z - sigma v| / sigma, without overflow or division by zero."""
    safe = jnp.where(sigma >= jnp.finfo(sigma.dtype).tiny, sigma, jnp.ones_like(sigma))
    return _norm(z / _expand(safe, z) - v * _expand(sigma / safe, v), batch_ndim)


class _Vectors:
    """The steps on vectors of one map: k of them along the axis after the batch, or one without."""

    def __init__(self, operator: Operator | _Function, v: Array):
        """``v`` (*batch, k, *domain) tells k."""
        self.operator, self.batch_ndim = operator, operator.batch_ndim
        # One vector has no axis of its own: XLA then needs fewer and simpler operations.
        self.single = v.shape[self.batch_ndim] == 1
        self.lead = self.batch_ndim + (not self.single)

    def squeezed(self, x: Array) -> Array:
        return _first(x, self.batch_ndim) if self.single else x

    def unsqueezed(self, x: Array) -> Array:
        return jnp.expand_dims(x, self.batch_ndim) if self.single else x

    def leading(self, x: Array) -> Array:
        return x if self.single else _first(x, self.batch_ndim)

    def orthonormal(self, z: Array, fallback: Array, shifted: bool = False) -> tuple[Array, Array]:
        """Orthonormal rows spanning z's, whose lengths come second.

        From the eigenvectors of the k x k Gram matrix of unit rows: the one product is a k^2
        reduction, where QR of a sharded array would gather all of it. Where z's rows depend on
        each other, others come from the fallback's, so that no direction is lost for good; zero
        where these have no other direction either, as when there are more rows than dimensions.
        """
        z, lengths = _unit_and_length(z, fallback, self.lead)
        if self.single:
            return z, lengths
        if shifted:
            z = self._shifted(z, lengths, fallback)
        # Rows that are next to nothing beside the longest are mostly its rounding errors.
        least = jnp.sqrt(jnp.finfo(z.dtype).eps)
        relative = lengths / (least * jnp.max(lengths, -1, keepdims=True))
        z = z * _expand(jnp.where(relative < 1, relative, 1.0), z)
        eigenvalues, q = jnp.linalg.eigh(_gram(z, self.batch_ndim), symmetrize_input=False)
        kept = eigenvalues > least
        weights = jnp.where(kept, lax.rsqrt(jnp.where(kept, eigenvalues, 1.0)), 0.0)
        rows = _combine(q * jnp.expand_dims(weights, -2), z, self.batch_ndim)
        others = self._beside(rows, fallback)
        return jnp.where(_expand(kept, rows), rows, others), lengths

    def _shifted(self, z: Array, lengths: Array, v: Array) -> Array:
        """Unit rows of z = A^T u less up to half of what lies along the stored v.

        Where ``A v = sigma u``, that is a step of ``A^T A - s`` with s half of the smallest of
        the k values squared (Saad 2011, section 4.1.2): the values below the k-th then shrink
        twice as fast beside the first, for no product more. Nothing is left out along a v that is
        no unit vector: wrappers that store none have a shorter one in its place (``ramp``).
        """
        ratio = jnp.min(lengths, -1, keepdims=True) / lengths
        stored = (ratio <= 1) & (jnp.abs(_inner(v, v, self.lead) - 1) < 0.1)
        part = jnp.where(stored, 0.5 * ratio * ratio * _inner(z, v, self.lead), 0.0)
        v = jnp.where(_expand(stored, v), v, 0.0)
        return z - _expand(part, v) * v

    def _beside(self, rows: Array, fallback: Array) -> Array:
        """Unit rows at right angles to ``rows``, orthonormal or zero, from combinations of the
        fallback's; zero where next to nothing of these is left."""
        b, k = self.batch_ndim, rows.shape[self.batch_ndim]
        mix = np.sin(1 + np.arange(k * k)).reshape(k, k)  # of no pattern that a matrix might have
        mix = jnp.broadcast_to(jnp.asarray(mix, rows.dtype), (*rows.shape[:b], k, k))
        others = unit(_combine(mix, fallback, b), 0.0, self.lead)
        for _ in range(2):  # the second time for what rounding has left of rows
            others = others - _combine(_gram(rows, b, others), rows, b)
        others, lengths = _unit_and_length(others, 0.0, self.lead)
        return jnp.where(_expand(lengths > 0.1, others), others, 0.0)

    def finish(self, u: Array, v: Array, z: Array) -> PowerResult:
        """The last half step, given z = A^T u: v from z, then u and sigma from one product."""
        v_old, (v, z_length) = v, self.orthonormal(z, v, shifted=True)
        y = self.operator.mv(v)
        if not self.single:
            v, y = self._rotated(v, y, v_old)
        u, length = _unit_and_length(lax.stop_gradient(y), u, self.lead)
        # If z overflowed, v is still the old vector and y may be finite: sigma is NaN there, too.
        length = self.leading(length) + 0 * self.leading(z_length)
        along = _inner(self.leading(u), self.leading(y), self.batch_ndim)
        return PowerResult(with_value(along, length), u, v)

    def _rotated(self, v, y, v_old):
        """v and y = A v, combined into singular directions (Rayleigh-Ritz), largest first."""
        b, lead = self.batch_ndim, self.lead
        rotation = _ritz(lax.stop_gradient(y), b)
        v, y = _combine(rotation, v, b), _combine(rotation, y, b)
        # v is orthonormal only to sqrt(eps). Dividing by its true length keeps sigma <= |A|.
        length = _norm(v, lead)
        length = jnp.where(length > 0, length, jnp.ones_like(length))
        v, y = v / _expand(length, v), y / _expand(length, y)
        v = unit(v, v_old, lead)
        # The sign of an eigenvector is arbitrary: choose that of the stored vector.
        along = _inner(v, v_old, lead)
        sign = jnp.where(along < 0, -jnp.ones_like(along), jnp.ones_like(along))
        return v * _expand(sign, v), y * _expand(sign, y)


def _stored_sigma(operator, u, v) -> Array:
    """<u, A v> / (|u| |v|) of the leading pair; |A v| / |v| where that is <= 0.

    Divided: an average of states, or a cast, must not change sigma's scale. Not positive: a sign
    flip, a ``u`` from elsewhere.
    """
    batch_ndim = operator.batch_ndim
    u, v = _first(u, batch_ndim), _first(v, batch_ndim)
    y = operator.mv(v)
    fixed = lax.stop_gradient(y)
    own, length = _unit_and_length(fixed, 0.0, batch_ndim)
    along, square = _inner(jnp.expand_dims(u, 0), jnp.stack([fixed, u]), batch_ndim + 1)  # one pass
    per_u, per_v = _inverse(square), _inverse(_inner(v, v, batch_ndim))
    stored = (along > 0) & (along < jnp.inf)
    direction = jnp.where(_expand(stored, u), u * _expand(per_u, u), own)
    value = jnp.where(stored, along * per_u, length)
    return with_value(_inner(direction, y, batch_ndim), value) * per_v


def _inverse(square: Array) -> Array:
    """1 / length from its square; 0 for 0."""
    return jnp.where(square == 0, square, lax.rsqrt(square))


@jax.custom_jvp
def with_value(x: Array, value: Array) -> Array:
    """``value``, a constant, with the derivatives of ``x``, whose own value nobody needs."""
    return value


@with_value.defjvp
def _(primals, tangents):
    return with_value(*primals), tangents[0]


def _first(x: Array, axis: int) -> Array:
    return lax.index_in_dim(x, 0, axis, keepdims=False)


def _inner(x: Array, y: Array, lead: int) -> Array:
    return jnp.sum(x * y, tuple(range(lead, y.ndim)))


def _expand(scalars: Array, like: Array) -> Array:
    return lax.expand_dims(scalars, tuple(range(scalars.ndim, like.ndim)))


def _norm(x: Array, lead: int) -> Array:
    """Euclidean norm over all axes from ``lead`` on."""
    return jnp.sqrt(jnp.sum(x * x, tuple(range(lead, x.ndim))))


def unit(x: Array, fallback: Array | float, lead: int) -> Array:
    """x / |x| over the axes from ``lead`` on; ``fallback`` where x is zero or not finite."""
    return _unit_and_length(x, fallback, lead)[0]


def _unit_and_length(x: Array, fallback: Array | float, lead: int) -> tuple[Array, Array]:
    """``unit`` and |x|, which is 0 or NaN where x has no direction."""
    inverse = _four_over_length(x, lead)
    x = jnp.where(_expand(inverse < jnp.inf, x), (x * _expand(inverse, x)) * 0.25, fallback)
    return x, 4 / inverse


def _four_over_length(x: Array, lead: int) -> Array:
    """4 / |x| over the axes from ``lead`` on; inf where x is zero, NaN where it is not finite.

    Squares of 1e-30 underflow in float32, and those of 1e30 overflow. So three sums of squares
    are taken at once, in one pass: of x as it is, and scaled up and down by powers of two. Each
    gives the same inverse where its squares are in range; underflow makes it larger, overflow
    zero, so that the smallest positive one is right. 4, not 1: the inverse of the largest
    numbers is subnormal, which processors flush to zero.
    """
    if math.prod(x.shape[lead:]) == 1:  # XLA would multiply the scales with each other first
        inverse = 4 / jnp.abs(x.reshape(x.shape[:lead]))
        return jnp.where(inverse > 0, inverse, jnp.nan)
    reach = jnp.finfo(x.dtype).maxexp * 5 // 8
    row = (*[1] * lead, 3)
    scales = np.array([2.0**reach, 1, 2.0**-reach], x.dtype).reshape(row)
    # Scaled down, nothing finite overflows: there, no inverse says that x is not finite.
    otherwise = np.array([np.inf, np.inf, np.nan], x.dtype).reshape(row)
    scaled = jnp.expand_dims(x, lead) * scales.reshape(*row, *[1] * (x.ndim - lead))
    squares = jnp.sum(scaled * scaled, tuple(range(lead + 1, scaled.ndim)))
    inverses = lax.rsqrt(squares) * (4 * scales)
    return jnp.min(jnp.where(inverses > 0, inverses, otherwise), -1)


def noise(seed: Array | int, shape: tuple[int, ...], dtype) -> Array:
    """White noise in [-1, 1) to start from: a hash of the index and a 32-bit seed.

    A constant or periodic vector could be orthogonal to the leading singular vector of a
    structured matrix. Not ``jax.random``: its counter-based generator would be most of the time
    that ``init`` takes to compile (512 numbers on two CPU cores: 0.04 s to compile this, 0.21 to
    0.28 s for ``jax.random.uniform``).
    """
    index = lax.iota(jnp.uint32, math.prod(shape))
    bits = _mix(index ^ _mix(jnp.asarray(seed, jnp.uint32)))
    return ((bits >> 8).astype(dtype) / 2**23 - 1).reshape(shape)


def ramp(shape: tuple[int, ...], dtype) -> Array:
    """A vector of length 1/2 or less, made in one operation: something to fall back on."""
    n = math.prod(shape)
    if n <= 1:
        return jnp.ones(shape, dtype)
    return (lax.iota(dtype, n) * (math.sqrt(3) / 2 / n**1.5)).reshape(shape)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers that leaves no visible trace of their order."""
    x = x + jnp.uint32(0x9E3779B9)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
    return x ^ (x >> 16)


def _ritz(y: Array, batch_ndim: int) -> Array:
    """(*batch, k, k): columns combine rows of y into left singular directions, largest first."""
    peak = jnp.max(jnp.abs(y), tuple(range(batch_ndim, y.ndim)), keepdims=True, initial=0)
    y = y / jnp.where(peak > 0, peak, jnp.ones_like(peak))
    _, q = jnp.linalg.eigh(_gram(y, batch_ndim), symmetrize_input=False)
    return jnp.flip(q, -1)


def _gram(x: Array, batch_ndim: int, y: Array | None = None) -> Array:
    """(*batch, k, k): inner products of the rows of x with those of y, by default with x's."""
    y = x if y is None else y
    axes, batch = tuple(range(batch_ndim + 1, x.ndim)), tuple(range(batch_ndim))
    return lax.dot_general(x, y, ((axes, axes), (batch, batch)), precision=lax.Precision.HIGHEST)


def _combine(coefficients: Array, x: Array, batch_ndim: int) -> Array:
    """Row i of the result is the sum over j of coefficients[j, i] * x[j]."""
    k, batch = (batch_ndim,), tuple(range(batch_ndim))
    dims = ((k, k), (batch, batch))
    return lax.dot_general(coefficients, x, dims, precision=lax.Precision.HIGHEST)
