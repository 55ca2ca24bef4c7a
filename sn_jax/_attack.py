"""Lipschitz constants from below: the Jacobian's norm at a point, and ascent on it.

What is found here is attained, up to the floating point of the function itself; nothing bounds
the constant from above.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from sn_jax._core import check_key
from sn_jax._power import power_iteration

# The ascent alternates a few steps of power iteration with one on x.
_INNER_STEPS = 3
_FINAL_STEPS = 500


class Attack(NamedTuple):
    """A point where a function stretches much.

    Attributes:
      lower: (), the norm of the Jacobian there: a lower bound of the Lipschitz constant.
      x: the point.
    """

    lower: Array
    x: Array


def local_lipschitz(
    fn: Callable[[Array], Array], x: Array, *, n_steps: int = 50, key: Array | None = None
) -> Array:
    """The largest singular value of the Jacobian of ``fn`` at ``x``, from below.

    Power iteration on ``J^T J``, with ``J v`` by ``jax.jvp`` and ``J^T u`` by its transpose; the
    result is ``|J v|`` for a unit vector v, so never more than the norm in exact arithmetic. It
    can be jitted, mapped and differentiated.

    Args:
      fn: of one floating array, with a floating array as its value.
      x: the point, of any shape.
      n_steps: applications of ``J^T J``.
      key: of the first v; without one, a fixed vector that no simple map sends to zero.
    Returns:
      sigma, a scalar of the dtype of ``fn``'s value.
    Raises:
      TypeError: x, or the value of fn, is not a floating array.
      ValueError: fn has no backward pass, as loops of unknown length.
    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[3.0, 0.0], [4.0, 5.0]])
      >>> print(f"{local_lipschitz(lambda x: a @ jnp.tanh(x), jnp.zeros(2)):.4f}")
      6.7082
    """
    x = _floating(x)
    return _sigma(fn, x, _first_vector(x, key), n_steps)[0]


def lipschitz_attack(
    fn: Callable[[Array], Array],
    key: Array,
    x0: Array,
    steps: int = 200,
    *,
    restarts: int = 8,
    step_size: float = 0.05,
    scale: float = 1.0,
    regions: int = 2**10,
) -> Attack:
    """A lower bound of the Lipschitz constant, by gradient ascent on the norm of the Jacobian.

    Adam climbs ``log |J(x) v|`` from x0 and from ``restarts`` points around it, while v follows by
    power iteration. Every start keeps the best point of its way, and one long power iteration at
    the best of all gives the result. Pieces on which the Jacobian is constant have no gradient:
    there, as in networks of ReLUs, half of the steps move at random instead.

    A piecewise linear function with few regions (and at most 64 kinks) is not climbed: all its
    regions are looked at, and the result is its constant, up to rounding.

    Args:
      fn: of one floating array, with a floating array as its value.
      key: of the random starts, vectors and moves.
      x0: where to begin, of any shape.
      steps: of the ascent, from each start.
      restarts: starts at ``x0 + scale z`` with normal z, besides x0 itself.
      step_size: of Adam, relative to ``scale``.
      scale: how far apart the starts are.
      regions: of a piecewise linear function, how many are looked at; 0 to climb instead. Not
        under ``jit``.
    Returns:
      ``Attack``: (lower, x).
    Raises:
      TypeError: x0, or the value of fn, is not a floating array; ``key`` is no PRNG key.
      ValueError: fn has no backward pass, as loops of unknown length.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> found = lipschitz_attack(jnp.sin, jax.random.key(0), jnp.array([1.0, 2.0]))
      >>> print(f"{found.lower:.3f}")
      1.000
    """
    import optax

    check_key(key, "lipschitz_attack(fn, key, x0, steps)")
    x0 = _floating(x0)
    if regions and not isinstance(x0, Tracer):
        from sn_jax._regions import steepest

        place = steepest(fn, np.asarray(x0), regions)
        if place is not None:
            x = jnp.asarray(place, x0.dtype)
            return Attack(local_lipschitz(fn, x, n_steps=_FINAL_STEPS, key=key), x)
    optimizer = optax.adam(step_size * scale)
    start_key, vector_key, walk_key, last_key = jax.random.split(key, 4)
    noise = jax.random.normal(start_key, (restarts, *x0.shape), x0.dtype)
    starts = jnp.concatenate([x0[None], x0[None] + scale * noise])

    def loss(x: Array, v: Array):
        sigma, v = _sigma(fn, x, v, _INNER_STEPS)
        return -jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)), (sigma, v)

    def climb(x: Array, v: Array, key: Array) -> tuple[Array, Array]:
        def step(i, carry):
            x, v, state, best, best_x = carry
            (_, (sigma, v)), gradient = jax.value_and_grad(loss, has_aux=True)(x, v)
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
            better = sigma > best
            best, best_x = jnp.where(better, sigma, best), jnp.where(better, x, best_x)
            # Adam's count of steps is an integer, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                update, state = optimizer.update(gradient, state, x)
            # Without a gradient: another point, from very near the best one to far away.
            move_key = jax.random.fold_in(key, i)
            radius = scale * jnp.exp2(2 - 8 * jax.random.uniform(move_key, dtype=x.dtype))
            jump = best_x + radius * jax.random.normal(move_key, x.shape, x.dtype)
            # Every other step stays, and lets v follow.
            flat = jnp.all(gradient == 0) & (i % 2 == 0)
            return jnp.where(flat, jump, x + update), v, state, best, best_x

        sigma = jax.eval_shape(loss, x, v)[1][0]
        first = (x, v, optimizer.init(x), jnp.full((), -math.inf, sigma.dtype), x)
        return lax.fori_loop(0, steps, step, first)[3:]

    vectors = jax.vmap(lambda k: _first_vector(x0, k))(jax.random.split(vector_key, restarts + 1))
    best, points = jax.vmap(climb)(starts, vectors, jax.random.split(walk_key, restarts + 1))
    x = points[jnp.argmax(jnp.where(jnp.isnan(best), -math.inf, best))]
    return Attack(local_lipschitz(fn, x, n_steps=_FINAL_STEPS, key=last_key), x)


def _floating(x: Array) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating array; got {x.dtype}: convert it, as by x * 1.0.")
    return x


def _first_vector(x: Array, key: Array | None) -> Array:
    if key is None:
        v = jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype) ** 2).reshape(x.shape)
    else:
        v = jax.random.normal(key, x.shape, x.dtype)
    return _unit(v)


def _unit(v: Array) -> Array:
    """v / |v|; zero stays zero. Scaled first, so that small vectors do not vanish in squares."""
    largest = jnp.max(jnp.abs(v), initial=0)
    v = v / jnp.where(largest > 0, largest, 1)
    return v / jnp.maximum(jnp.linalg.norm(v), 1)


def _sigma(fn: Callable[[Array], Array], x: Array, v: Array, n_steps: int) -> tuple[Array, Array]:
    """|J v| after ``n_steps`` of power iteration from v, and that v, a constant of gradients."""
    value, push = jax.linearize(fn, lax.stop_gradient(x))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"fn must have a floating array as its value; got {value.dtype}.")
    try:
        # A vector that the Jacobian sends to zero stays as it is.
        v = lax.stop_gradient(power_iteration(push, v, n_steps).v)
    except ValueError as error:  # it is linear: only its transpose can be missing
        raise ValueError(
            "fn has no backward pass in JAX, which the norm of its Jacobian takes: "
            f"{error.__cause__} Write that part with operations that have one."
        ) from error
    stretched = jax.jvp(fn, (x,), (v,))[1]
    largest = lax.stop_gradient(jnp.max(jnp.abs(stretched), initial=0))
    # The norm has no gradient at zero: there is none to follow either.
    safe = jnp.where(largest > 0, stretched / jnp.where(largest > 0, largest, 1), 1)
    return jnp.where(largest > 0, largest * jnp.linalg.norm(safe), 0), v
