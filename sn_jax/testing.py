"""The contract of a view as a test, for views of one's own.

Here belongs what users run in their tests; it needs nothing but JAX and NumPy.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sn_jax import _core
from sn_jax._operator import Operator
from sn_jax._views import View, vector_axes
from sn_jax._views import check_view as _check_is_view

__all__ = ["check_view"]

_MOST = 2**22  # entries of an explicit matrix


def check_view(view: View, shape: Sequence[int], *, rtol: float | None = None) -> None:
    r"""Raise unless a view keeps what it promises, on random kernels of the given shape.

    Call it in a test of your own view, once for each kind of shape that it takes. It holds the
    view against the explicit matrices ``A_b`` of its map, one for each element ``b`` of its batch:

    - it can be a ``jit``-static argument: hashable, and equal to a copy of itself;
    - ``batch_shape``, ``domain`` and ``matvec`` agree on shapes, also those of kernels in bfloat16;
    - ``matvec`` is linear in ``x`` and in ``w``, ``y_b`` depends on ``x_b`` alone, and
      ``<y, A x> = <A^T y, x>``;
    - ``scale(w, f)`` keeps shape and dtype of ``w``, and its map is ``f_b A_b``;
    - ``vector_axes``, where it has one, names kernel axes of the sizes of those of batch, x and y;
    - so sigma is the largest singular value of each ``A_b``, after ``spectral_normalize`` it is 1,
      and gradients are ``(G - <G, W_bar> u v^T) / sigma`` (Miyato et al. 2018, equation 12).

    Args:
      view: the view.
      shape: of a kernel; small, as each matrix is written out (at most 4 million entries).
      rtol: what counts as equal, relative to the largest value, > 0; by default ``16 n`` times
        float32's eps for matrices whose larger side is n. On accelerators products of float32 are
        rounded to less unless ``matvec`` asks for ``precision=HIGHEST``.

    Raises:
      AssertionError: the first promise that is broken, with the numbers.
      TypeError: ``view`` has not the methods of a view.
      ValueError: the view does not take this shape, or the matrix is too large.

    Example:
      >>> from sn_jax import Matrix
      >>> check_view(Matrix(in_axes=0, out_axes=2), (6, 3, 4))        # says nothing: it holds
    """
    shape = tuple(shape)
    _check_is_view(view, "check_view")
    _check_static(view)
    batch, domain, codomain = _check_shapes(view, shape)
    n, m = math.prod(domain), math.prod(codomain)
    if math.prod(batch) * n * m > _MOST:
        raise ValueError(
            f"check_view writes out the matrices of {view}, and for a kernel of shape {shape} they "
            f"are {batch} of {m} x {n}: give a smaller shape."
        )
    rtol = 16 * max(n, m, 2) * float(jnp.finfo(jnp.float32).eps) if rtol is None else rtol
    rng = np.random.default_rng(0)

    def draw(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    def same(found, expected, what):
        _assert_close(found, expected, rtol, f"{view} on kernels of shape {shape}: {what}")

    w, w2 = draw(*shape), draw(*shape)
    x, x2, y = draw(*batch, *domain), draw(*batch, *domain), draw(*batch, *codomain)
    apply = jax.jit(view.matvec)
    value = apply(w, x)
    same(apply(w, 2 * x - 3 * x2), 2 * value - 3 * apply(w, x2), "matvec is not linear in x")
    same(apply(2 * w - 3 * w2, x), 2 * value - 3 * apply(w2, x), "matvec is not linear in w")
    same(view.matvec(w, x), value, "matvec gives something else under jit")
    operator = Operator(view, w)
    same(jnp.vdot(operator.rmv(y), x), jnp.vdot(y, value), "<A^T y, x> is not <y, A x>")
    matrices = _matrices(operator, same)
    _check_scale(view, w, draw(*batch), apply, x, same)
    _check_vector_axes(view, shape, (batch, domain, codomain))
    _check_normalized(view, w, matrices, same)


def _check_static(view):
    again = copy.deepcopy(view)
    try:
        equal = hash(view) == hash(again) and view == again
    except TypeError as error:
        raise AssertionError(
            f"{view} is not hashable ({error}): make it a frozen dataclass of numbers, strings, "
            "tuples of them and functions."
        ) from None
    assert equal, (
        f"{view} differs from a copy of itself, so that jit compiles anew for each: make it a "
        "frozen dataclass, which is compared by its fields."
    )


def _check_shapes(view, shape):
    for name, value in (("batch_shape", view.batch_shape(shape)), ("domain", view.domain(shape))):
        plain = isinstance(value, tuple) and all(isinstance(n, int | np.integer) for n in value)
        assert plain, f"{view}.{name}({shape}) must be a tuple of integers; got {value!r}."
    batch, domain = view.batch_shape(shape), view.domain(shape)
    for dtype in (jnp.float32, jnp.bfloat16):
        w, x = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (*batch, *domain)))
        y = jax.eval_shape(view.matvec, w, x)
        given = f"{view}.matvec of a {dtype.__name__} kernel of shape {shape} and x of {x.shape}"
        assert isinstance(y, jax.ShapeDtypeStruct), f"{given} must return one array; got {y!r}."
        assert y.shape[: len(batch)] == batch, (
            f"{given} returns the shape {y.shape}, which does not begin with batch_shape, {batch}."
        )
        assert jnp.issubdtype(y.dtype, jnp.floating), f"{given} returns {y.dtype}."
    return batch, domain, y.shape[len(batch) :]


def _matrices(operator: Operator, same: Callable[..., None]) -> np.ndarray:
    """(*batch, m, n), column by column; and that no element of the batch reads another's x."""
    batch, domain, codomain = operator.spaces
    count, n = math.prod(batch), math.prod(domain)
    columns = jnp.eye(count * n, dtype=jnp.float32).reshape(count * n, *batch, *domain)
    full = jax.jit(jax.vmap(operator.mv))(columns)
    full = np.asarray(full).reshape(count, n, count, math.prod(codomain))
    own = full[np.arange(count), :, np.arange(count)]  # (count, n, m)
    others = full.copy()
    others[np.arange(count), :, np.arange(count)] = 0
    largest = np.max(np.abs(full), initial=0)
    same(np.max(np.abs(others), initial=0) + largest, largest,
         "an element of the batch depends on another one's x")  # fmt: skip
    return np.swapaxes(own, 1, 2).reshape(*batch, math.prod(codomain), n)


def _check_scale(view, w, factor, apply, x, same):
    for dtype in (jnp.float32, jnp.bfloat16):
        scaled = view.scale(w.astype(dtype), factor)
        assert scaled.shape == w.shape, (
            f"{view}.scale of a kernel of shape {w.shape} returns the shape {scaled.shape}."
        )
        assert scaled.dtype == dtype, (
            f"{view}.scale of a {dtype.__name__} kernel by a float32 factor returns {scaled.dtype}."
        )
    y = apply(w, x)
    expected = factor.reshape(*factor.shape, *(1 for _ in y.shape[factor.ndim :])) * y
    same(
        apply(view.scale(w, factor), x),
        expected,
        "the map of scale(w, f) is not f times that of w, for each element of the batch",
    )


def _check_vector_axes(view, shape, spaces):
    axes = vector_axes(view, len(shape))
    if axes is None:
        return
    for name, given, space in zip(("batch", "x", "y"), axes, spaces, strict=True):
        sizes = tuple(None if axis is None else shape[axis] for axis in given)
        fits = len(sizes) == len(space) and all(
            size in (None, n) for size, n in zip(sizes, space, strict=True)
        )
        assert fits, (
            f"{view}.vector_axes({len(shape)}) says that the axes of {name}, of shape {space}, are "
            f"the kernel's axes {given}, which have the sizes {sizes} in {shape}."
        )


def _check_normalized(view: Any, w: Array, matrices: np.ndarray, same: Callable[..., None]) -> None:
    norms = np.linalg.norm(matrices.astype(np.float64), 2, (-2, -1))
    params, close = {"w": w}, 2e-3
    state = _core.init(params, jax.random.key(0), {"w": view}, warmup=30)
    state = jax.jit(partial(_core.calibrate, max_steps=10_000))(params, state)
    sigma = np.asarray(state["w"].sigma, np.float64)
    same(np.maximum(sigma, norms), norms, "sigma is larger than the norm")
    if np.any(sigma < norms * (1 - close)):
        raise AssertionError(
            f"{view} on kernels of shape {w.shape}: sigma is {sigma}, but the matrices have the "
            f"norms {norms}."
        )
    g = jnp.flip(w) + 1.0

    def loss(params):
        return jnp.vdot(g, _core.spectral_normalize(params, state, n_steps=0)[0]["w"])

    def bilinear(w):
        return jnp.vdot(state["w"].u, Operator(view, w).mv(state["w"].v))

    normalized = _core.spectral_normalize(params, state, n_steps=0)[0]["w"]
    found = _core.spectral_norms({"w": normalized}, state)["w"]
    same(found, np.where(norms > 0, 1.0, 0.0), "the norm is not 1 after spectral_normalize")
    gradient = jax.grad(loss)(params)["w"]
    # G - <G, W_bar>_b u v^T, batch element by batch element, with u v^T = d sigma / d W.
    outer = jax.grad(bilinear)(w)
    inner = _inner_by_batch(view, g, normalized)
    expected = view.scale(g - view.scale(outer, inner), 1 / state["w"].sigma)
    same(gradient, expected, "the gradient is not (G - <G, W_bar> u v^T) / sigma")


def _inner_by_batch(view, g, w):
    """<g, w> for each element of the batch, by scaling all others to zero."""
    batch = view.batch_shape(w.shape)
    count = math.prod(batch)
    only = jnp.eye(count, dtype=w.dtype).reshape(count, *batch)
    return jax.vmap(lambda factor: jnp.vdot(g, view.scale(w, factor)))(only).reshape(batch)


def _assert_close(found, expected, rtol, sentence):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.max(np.abs(found - expected), initial=0)
    scale = np.max(np.abs(expected), initial=0)
    if not error <= rtol * max(scale, float(np.finfo(np.float32).tiny)):
        raise AssertionError(f"{sentence}: off by {error:.2g}, where the largest is {scale:.2g}.")
