"""Parameters brought under a cap: explicit matrices, their norms, and the nearest point.

Here belongs what takes a view's whole matrix inside a program, where a state's vectors would not
do.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sn_jax import _bounds, _core, _mesh
from sn_jax._core import State
from sn_jax._operator import Operator
from sn_jax._rules import Params, label, with_leaves
from sn_jax._views import Matrix, Scaled, View, compute_dtype

Method = Literal["svd", "polar"]

_MOST = 2**14


def clip_singular_values(
    params: Params, state: State, bound: _bounds.Norms = 1.0, *, method: Method = "svd"
) -> Params:
    r"""The nearest parameters whose singular values are at most ``bound``: ``U min(S, c) V^T``.

    For each matrix of a view's batch, the nearest point of the ball of spectral norm c, in the
    Frobenius norm and in every other that depends on singular values alone. Unlike
    ``W min(1, c / sigma)``, which scales the whole matrix, it changes the singular values above c
    alone. What lies within the ball comes back bit for bit.

    ``method="svd"`` takes the singular value decomposition. ``method="polar"`` takes products and
    two polar decompositions instead (Nakatsukasa, Bai & Gygi 2010): with ``W = Q H``, H symmetric
    and positive semidefinite, and the matrix sign of ``c I - H``,
    ``Q min(H, c) = (W + c Q - (c Q - W) sign(c I - H)) / 2``,
    which loses digits where sigma is far above c.
    Neither is exact in floating point, so the result is scaled by ``min(1, c / sigma)`` with its
    own norm, by the eigenvalues of its Gram matrix, and rounded last: its true norm is at most
    ``c (1 + 1e-5)`` in float32. So it is in half precision, where what rounding adds is taken off
    first, usually less than 1 %.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init``: which parameters, seen how. Its vectors are not used.
      bound: c > 0, as for ``spectral_normalize``; also ``rms_bound(c)``.
      method: "svd"; or "polar", which is of products: two to three times slower on CPUs
        (``python -m experiments.bench --suite caps``), for where an SVD is not to be had.

    Returns:
      params: same structure, shapes and dtypes as given.

    Raises:
      ValueError: a view that is no ``Matrix`` (the nearest convolution has a kernel as large as
        the image); ``bound`` or ``method`` out of range; ``state`` does not fit ``params``.
      TypeError: as ``spectral_normalize``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 0.5]))}
      >>> state = _core.init(params, jax.random.key(0))
      >>> print(clip_singular_values(params, state, 1.0)["kernel"].round(3))
      [[1.  0.  0. ]
       [0.  1.  0. ]
       [0.  0.  0.5]]
    """
    check_method(method)
    weights = _core.weights_of(params, state)
    bounds = _bounds.by_path(bound, state)
    changed = {}
    for path, w in weights.items():
        view = state[path].view
        check_clippable(path, w, view)
        changed[path] = clip(w, bounds[path], view=view, method=method, cast=True)
    return with_leaves(params, changed)


def check_method(method: str) -> None:
    if method not in ("svd", "polar"):
        raise ValueError(f'method must be "svd" or "polar"; got {method!r}.')


def check_clippable(path: str, w: Array, view: View) -> None:
    """Raise unless clipped singular values are those of a kernel that the view can have."""
    inner, _ = without_number(view)
    if not isinstance(inner, Matrix):
        raise ValueError(
            f"{label(path)} of shape {w.shape} is seen as {view}, and what has its singular values "
            "clipped is no kernel of that kind again (of a convolution, one as large as the image; "
            "of a masked kernel, one without the mask). Scale it down by "
            'spectral_normalize(mode="clip") or transforms.project_spectral_norm, see a '
            "convolution flattened, as Matrix((0, 1, 2), 3), or leave it out by a rule with None."
        )
    if Operator(view, w).is_split:
        raise ValueError(
            f"{label(path)} of shape {w.shape} is one block of a kernel, as {view} says: clip it "
            "outside of shard_map, where XLA sees the whole."
        )


def without_number(view: View) -> tuple[View, float]:
    """(the view of ``factor * w``, factor) as long as it is one number."""
    factor = 1.0
    while isinstance(view, Scaled) and view.factor.size == 1:
        factor *= abs(float(view.factor.item()))
        view = view.view
    return view, factor


@partial(jax.jit, static_argnames=("view", "method", "cast"))
def clip(w: Array, bound: float | Array, *, view: View, method: Method, cast: bool) -> Array:
    """One kernel with clipped singular values; ``cast`` says that it is kept as it is returned."""
    inner, number = without_number(view)
    assert isinstance(inner, Matrix)  # check_clippable
    if w.size == 0:
        return w

    def run(w, bound):
        matrices, back = _matrices(inner, w)
        c = jnp.asarray(bound, compute_dtype(w.dtype)) / (number or 1.0)
        c = jnp.broadcast_to(c, matrices.shape[:-2]).ravel()
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        clipped = jax.vmap(partial(_clipped, method=method, cast=cast))(flat, c)
        clipped = clipped if number else flat  # a map that is zero, whatever the kernel is
        return (back(clipped.reshape(matrices.shape)),)

    if _mesh.is_explicit(w):
        run = _mesh.on_automatic_axes(run, (jax.typeof(w).sharding,))
    return run(w, bound)[0]


def _matrices(view: Matrix, w: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(*batch, m, n) with m >= n, and the way back."""
    batch, ins, outs = view.axis_groups(w.ndim)
    if math.prod(w.shape[a] for a in ins) < math.prod(w.shape[a] for a in outs):
        ins, outs = outs, ins
    order = (*batch, *ins, *outs)
    lead, m, n = (tuple(w.shape[axis] for axis in axes) for axes in (batch, ins, outs))

    def back(matrices: Array) -> Array:
        return matrices.reshape(*lead, *m, *n).transpose(np.argsort(order))

    return w.transpose(order).reshape(*lead, math.prod(m), math.prod(n)), back


def _clipped(matrix: Array, c: Array, *, method: Method, cast: bool) -> Array:
    """``U min(S, c) V^T`` of one (m, n), or itself where it has a norm of at most c."""
    wide = matrix.astype(c.dtype)
    if method == "svd":
        u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
        nearest = _multiply(u * jnp.minimum(s, c)[None], vt)
    else:
        q = _polar(wide)
        h = _multiply(q.T, wide)
        gap = c * jnp.eye(len(h), dtype=h.dtype) - (h + h.T) / 2
        nearest = (wide + c * q - _multiply(c * q - wide, _polar(gap))) / 2
    nearest = _under(nearest, c, matrix.dtype) if cast else nearest.astype(matrix.dtype)
    return jnp.where(norm(wide) <= c, matrix, nearest)


_multiply = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _polar(matrix: Array) -> Array:
    """The orthogonal factor of (m, n), m >= n, which is the sign of a symmetric matrix."""
    return lax.linalg.qdwh(matrix)[0]


def _under(matrix: Array, c: Array, dtype) -> Array:
    """(m, n) scaled so far down that, rounded to ``dtype``, its norm is at most c."""
    sigma = norm(matrix)
    factor = jnp.minimum(c / jnp.where(sigma > 0, sigma, c), 1.0)
    eps = float(jnp.finfo(dtype).eps)
    # Rounding changes the norm by at most the Frobenius norm of the changes; here relative to c.
    rounding = 0.505 * eps * jnp.linalg.norm(matrix * (factor / c))
    result = (matrix * (factor * jnp.maximum(1 - rounding, 0))).astype(dtype)
    if eps <= float(jnp.finfo(jnp.float32).eps):
        return result
    # In half precision that is up to a tenth, while errors of random signs add far less: what they
    # add is seen, and taken off.
    added = jnp.maximum(norm((matrix * factor).astype(dtype).astype(matrix.dtype)) / c, 1.0)
    close = (matrix * (factor / added * (1 - eps / 4))).astype(dtype)
    return jnp.where(norm(close.astype(matrix.dtype)) <= c, close, result)


def norm(matrix: Array) -> Array:
    """(*batch,): the norm of (*batch, m, n), by its Gram matrix on the smaller side.

    Squaring costs the small singular values their digits, but not the largest.
    """
    if matrix.size == 0:
        return jnp.zeros(matrix.shape[:-2], matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = jnp.matrix_transpose(matrix)
    peak = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True)
    matrix = matrix / jnp.where(peak > 0, peak, jnp.ones_like(peak))
    gram = jnp.matmul(matrix, jnp.matrix_transpose(matrix), precision=lax.Precision.HIGHEST)
    largest = jnp.linalg.eigvalsh(gram)[..., -1]
    return jnp.squeeze(peak, (-2, -1)) * jnp.sqrt(jnp.maximum(largest, 0))


def explicit(view: View, w: Array) -> Array:
    """(*batch, k, n): the matrix of the map, or its transpose, whichever has k <= n."""
    operator = Operator(view, w)
    batch, side, other = operator.spaces
    apply = operator.mv
    if math.prod(other) < math.prod(side):
        side, other, apply = other, side, operator.rmv
    k, columns = math.prod(side), math.prod(other)
    if k > _MOST:
        raise ValueError(
            f"exact=True takes the norm of an explicit matrix, but {view} on a parameter of shape "
            f"{w.shape} has one with {k} x {columns} entries; use exact=False there, with "
            "n_steps=2 or more to follow the ball more closely."
        )
    if isinstance(view, Matrix):
        return jnp.matrix_transpose(_matrices(view, w)[0])
    basis = jnp.eye(k, dtype=w.dtype).reshape(k, *(1 for _ in batch), *side)
    rows = jax.vmap(apply)(jnp.broadcast_to(basis, (k, *batch, *side)))
    return jnp.moveaxis(rows.reshape(k, *batch, columns), 0, -2)
