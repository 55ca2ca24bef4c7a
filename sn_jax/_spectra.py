"""Spectra: singular values of any view, and what a logger wants to know of each parameter.

Here belongs what looks at more of a map than its largest singular value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax import Array, lax

from sn_jax import _core, _mesh, _symbols
from sn_jax._core import State
from sn_jax._norms import _EXPLICIT, _as_matrix, _checked, _operator, _singles, _without_factor
from sn_jax._operator import Operator
from sn_jax._rules import Params
from sn_jax._views import Conv, Matrix, Scaled, View, compute_dtype


class SpectralStats(NamedTuple):
    """What is known of one parameter's map A, for each element of its batch.

    Attributes:
      sigma: (*batch,), the norm's estimate by the stored vectors, from below.
      frobenius: (*batch,), ``|A|_F``, the root of the sum of its squared singular values.
      stable_rank: (*batch,), ``|A|_F^2 / sigma^2``, at least 1 and at most the rank, for the true
        sigma; so estimated from above. 0 for a zero map.
      rms: (*batch,), ``sigma sqrt(n_in / n_out)``, the norm from RMS to RMS.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 2.0, 1.0]))[:, :2]}
      >>> stats = spectral_stats(params, _core.init(params, jax.random.key(0)))["kernel"]
      >>> print(f"{stats.frobenius:.3f} {stats.stable_rank:.3f} {stats.rms:.3f}")
      2.828 2.000 2.449
    """

    sigma: Array
    frobenius: Array
    stable_rank: Array
    rms: Array


def spectral_stats(params: Params, state: State) -> dict[str, SpectralStats]:
    r"""Norm, Frobenius norm, stable rank and RMS to RMS norm of every parameter's map, by path.

    All are those of the map that the view says, not of the array: a tap of a convolution's kernel
    counts as often as it meets a pixel,
    ``|A|_F^2 = sum count(tap) |W_tap|^2``, borders and strides included, exactly (and where taps
    meet on one pixel, as in circular convolutions of small images, the square of their sum). Of
    other maps than ``Matrix`` and ``Conv`` it is the sum of ``|A e_j|^2`` over a basis, as many
    products as the domain has dimensions. No iteration; differentiable; runs inside ``jit``.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init`` or ``spectral_normalize``.

    Returns:
      dict: path -> SpectralStats; ``flat_scalars`` makes numbers for a logger of it.

    Raises:
      ValueError: ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.ones((3, 3, 1, 1))}
      >>> state = _core.init(params, jax.random.key(0), {"kernel": Conv((8, 8), strides=2)})
      >>> stats = spectral_stats(params, state)["kernel"]
      >>> print(f"{stats.frobenius**2:.0f}")                 # 16 outputs of 9 taps, less borders
      121
    """
    norms = _core.spectral_norms(params, state)
    stats = {}
    for path, w in _core.weights_of(params, state).items():
        singular = state[path]
        stats[path] = _stats(w, norms[path], view=singular.view)
    return stats


def flat_scalars(
    values: Mapping[str, Any], *, reduce: Callable[[Array], Array] | None = None
) -> dict[str, Array]:
    """A flat dict of scalars for any logger, from results by path.

    Args:
      values: path -> array or named tuple of arrays of the norms' shape: the result of
        ``spectral_stats``, ``spectral_norms`` or ``residuals``. Names of fields are appended,
        ``path/sigma``, ``path/stable_rank``.
      reduce: what to make of the elements of a batch, such as ``jnp.max``; None gives each its own
        entry, ``path[i]`` or ``path[i,j]``.

    Returns:
      dict: name -> scalar array.

    Raises:
      TypeError: ``reduce`` does not return a scalar.

    Example:
      >>> values = {"heads": jnp.array([1.0, 2.0]), "out": jnp.array(3.0)}
      >>> {name: float(x) for name, x in flat_scalars(values).items()}
      {'heads[0]': 1.0, 'heads[1]': 2.0, 'out': 3.0}
      >>> {name: float(x) for name, x in flat_scalars(values, reduce=jnp.max).items()}
      {'heads': 2.0, 'out': 3.0}
    """
    flat = {}
    for path, value in values.items():
        fields = value._asdict() if hasattr(value, "_asdict") else {"": value}
        for field, x in fields.items():
            x, end = jnp.asarray(x), f"/{field}" if field else ""
            if reduce is not None:
                x = jnp.asarray(reduce(x))
                if x.shape:
                    raise TypeError(
                        f"reduce must return a scalar, as jnp.max does; for {path}{end} it "
                        f"returned an array of shape {x.shape}."
                    )
            for index in np.ndindex(x.shape):
                where = f"[{','.join(map(str, index))}]" if index else ""
                flat[f"{path}{where}{end}"] = x[index]
    return flat


@partial(jax.jit, static_argnames="view")
def _stats(w, sigma, *, view):
    operator = Operator(view, w)
    _, domain, codomain = operator.spaces
    run = partial(_frobenius, view)
    if _mesh.is_explicit(w):
        run = _mesh.on_automatic_axes(run, (operator.shardings()[0],))
    (frobenius,) = run(w.astype(compute_dtype(w.dtype)))
    safe = jnp.where(sigma > 0, sigma, jnp.ones_like(sigma))
    stable_rank = jnp.where(sigma > 0, jnp.square(frobenius / safe), 0 * frobenius)
    ratio = math.sqrt(math.prod(domain) / max(1, math.prod(codomain)))
    return SpectralStats(sigma, frobenius, stable_rank, sigma * ratio)


def _frobenius(view: View, w: Array) -> tuple[Array]:
    """|A|_F of (*batch,) maps, without overflow of the squares."""
    while isinstance(view, Scaled):
        w, view = view.effective(w), view.view
    peak = lax.stop_gradient(jnp.max(jnp.abs(w), initial=0))
    operator = Operator(view, w)
    peak = _mesh.largest(peak)
    peak = jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak))
    squares = operator.summed(_squares(view, w / peak))
    positive = squares > 0
    root = jnp.sqrt(jnp.where(positive, squares, jnp.ones_like(squares)))
    return (peak * jnp.where(positive, root, squares),)


def _squares(view: View, w: Array) -> Array:
    """(*batch,): the sum of the squared entries of each matrix."""
    if isinstance(view, Matrix):
        batch, ins, outs = view.axis_groups(w.ndim)
        return jnp.sum(jnp.square(w), (*ins, *outs))
    if isinstance(view, Conv):
        batch = view.kernel_batch_axes(w.ndim)
        w = jnp.moveaxis(w, batch, range(len(batch)))
        weighted = w
        for axis in range(len(view.input_shape)):
            counts = jnp.asarray(_meetings(view, axis, w.shape[len(batch) + axis]), w.dtype)
            along = len(batch) + axis
            weighted = jnp.moveaxis(
                jnp.tensordot(weighted, counts, (along, 0), precision=lax.Precision.HIGHEST),
                -1, along,
            )  # fmt: skip
        return jnp.sum(w * weighted, tuple(range(len(batch), w.ndim)))
    operator = Operator(view, w)
    batch, domain, _ = operator.spaces
    n = math.prod(domain)

    def column(j):
        unit = jax.nn.one_hot(j, n, dtype=w.dtype).reshape(domain)
        y = operator.mv(jnp.broadcast_to(unit, (*batch, *domain)))
        return jnp.sum(jnp.square(y), tuple(range(len(batch), y.ndim)))

    if not n:
        return jnp.zeros(batch, w.dtype)
    return jnp.sum(lax.map(column, jnp.arange(n), batch_size=min(n, 64)), 0)


def _meetings(view: Conv, axis: int, kernel_size: int) -> np.ndarray:
    """(taps, taps): in how many pairs of output and input pixel both taps meet, in one dimension.

    Off the diagonal zero, unless a kernel is wrapped around or reflected into a smaller image.
    """
    with jax.ensure_compile_time_eval():  # also where a program is being traced
        single = _symbols.along(replace(view, batch_axes=(), split=None), axis)
        taps = _symbols.taps_of(single, kernel_size)
    entries = np.ravel_multi_index((taps.out, taps.in_), (taps.n_out, taps.n_in))
    shape = kernel_size, taps.n_out * taps.n_in
    which = scipy.sparse.csr_array((np.ones(len(entries)), (taps.tap, entries)), shape)
    return (which @ which.T).toarray()


def singular_values(
    w: Array | np.ndarray, view: View | None = None, k: int | None = None
) -> np.ndarray:
    r"""Singular values of the map that a parameter is, all of them or the k largest.

    Matrices by SVD; convolutions whose every dimension is circular by the SVDs of their symbols on
    the grid of frequencies (Sedghi et al. 2019, theorem 6), strides and dilations by polyphase
    components; other convolutions by SVD of their explicit matrices, group by group; other maps
    by products with a basis. With ``k`` much smaller than the matrix, by Lanczos iteration on
    products alone. Float64 on the host, not differentiable; no certificate: small ones may be off
    by the unit roundoff times the largest.

    Args:
      w: the parameter, a concrete array.
      view: how it acts; by default ``Matrix()`` for one with two axes.
      k: how many, the largest first; None for all.

    Returns:
      numpy.ndarray: (*batch, k), descending, float64; of all, as many as the smaller side has.

    Raises:
      ValueError: k is out of range; a map whose sides are all larger than 4,096, without a
        ``k``; otherwise as ``spectral_norm``.
      TypeError: as ``spectral_norm``.

    Example:
      >>> print(singular_values(jnp.array([[3.0, 0.0], [0.0, 4.0]])))
      [4. 3.]
      >>> kernel = jnp.array([2.0, 7.0, -1.0]).reshape(3, 1, 1)
      >>> print(singular_values(kernel, Conv(20, padding="CIRCULAR"), k=1).round(9))
      [8.00563364]
    """
    array, view, batch = _checked(w, view, rtol=1.0)
    array, view, _ = _without_factor(array, view)
    _, domain, codomain = Operator(view, jnp.asarray(array, jnp.float32)).spaces
    shape = math.prod(codomain), math.prod(domain)
    most = min(shape)
    if k is not None and not (isinstance(k, int) and 1 <= k <= most):
        raise ValueError(
            f"k must be an integer from 1 to {most}, the number of singular values of {view} on a "
            f"parameter of shape {array.shape}; got {k!r}."
        )
    values = np.zeros((*batch, most if k is None else k))
    for index, kernel, single in _singles(array, view):
        values[index] = _values(kernel, single, shape, k)
    return values


def _values(w: np.ndarray, view: Any, shape: tuple[int, int], k: int | None) -> np.ndarray:
    """Of one map with a matrix of that shape (out, in), descending."""
    most = min(shape)
    wanted = most if k is None else k
    if not most:
        return np.zeros(0)
    if isinstance(view, Matrix):
        matrix = _as_matrix(w, view).T
        if _few(k, most):
            return _largest(matrix.__matmul__, matrix.T.__matmul__, shape, wanted)
        return np.linalg.svd(matrix, compute_uv=False)[:wanted]
    if isinstance(view, Conv):
        lattices = _symbols.lattices_of(view, w.shape)
        kernel = _symbols.grouped(w, view)
        if all(lattice.exact for lattice in lattices):
            stacks = _symbols.symbol_stacks(kernel, lattices)
            found = [np.linalg.svd(stack, compute_uv=False).ravel() for stack in stacks]
            # A dimension of one shift has the same symbol at all frequencies, of which one is made.
            sizes = zip(view.input_shape, lattices, strict=True)
            repeats = math.prod(n // (x.n_q * x.size) for n, x in sizes)
            return np.sort(np.repeat(np.concatenate(found), repeats))[::-1][:wanted]
        if not _few(k, most) and most <= _EXPLICIT * view.feature_group_count:
            dimensions = [
                _symbols.taps_of(_symbols.along(view, axis), size)
                for axis, size in enumerate(w.shape[: len(lattices)])
            ]
            found = [
                np.linalg.svd(
                    block if isinstance(block, np.ndarray) else block.toarray(), compute_uv=False
                )
                for block in _symbols.explicit(kernel, dimensions)
            ]
            return np.sort(np.concatenate(found))[::-1][:wanted]
    apply, adjoint, _ = _operator(w, view)
    if _few(k, most):
        return _largest(apply, adjoint, shape, wanted)
    if most > _EXPLICIT:
        raise ValueError(
            f"{view} on a parameter of shape {w.shape} has {most} singular values, more than "
            f"can be found all at once (at most {_EXPLICIT}): give k, at most {most // 10}."
        )
    product = apply if shape[1] == most else adjoint
    columns = np.stack([product(x) for x in np.eye(most)], 1)
    return np.linalg.svd(columns, compute_uv=False)[:wanted]


def _few(k: int | None, most: int) -> bool:
    """Whether k values are better found by iteration."""
    return k is not None and most > 512 and 10 * k <= most


def _largest(apply: Callable, adjoint: Callable, shape: tuple[int, int], k: int) -> np.ndarray:
    # Inferred of SciPy's source, which has no stubs: other arguments, and a tuple of vectors, too.
    linear: Any = scipy.sparse.linalg.LinearOperator
    svds: Any = scipy.sparse.linalg.svds
    operator = linear(shape, matvec=apply, rmatvec=adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(shape))
    return np.sort(svds(operator, k, v0=start, return_singular_vectors=False))[::-1]
