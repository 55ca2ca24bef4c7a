"""Spectral norms of one view: converged values, and brackets that hold, rounding included.

All of it runs on the host in float64. A map is split into blocks whose largest norm is that of
the map: the matrix itself, the symbols of a convolution on a grid of frequencies, groups. One
Cholesky factorization per block then proves an upper bound of all of them.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jax import Array
from jax.core import Tracer
from jax.tree_util import register_dataclass
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from tqdm import tqdm

from sn_jax._banded import Banded, all_definite, banded
from sn_jax._operator import Operator, check_linear
from sn_jax._symbols import (
    UNIT,
    Block,
    Blocks,
    along,
    blocks_of,
    explicit,
    frobenius,
    gamma,
    grouped,
    lattices_of,
    on_host,
    symbols,
    taps_of,
)
from sn_jax._views import Conv, Matrix, Scaled, Shape, View, check_view, kind_of

# An explicit matrix is formed where its smaller side is at most this: 128 MiB for the Gram matrix.
_EXPLICIT = 4096
# Below this size LAPACK is quicker than a Lanczos iteration.
_SMALL = 128
# How many Lanczos vectors are kept between restarts.
_VECTORS = 100
# Below this size the matrix is formed; above it, if a banded factorization is not so much faster.
_SIMPLE, _FASTER = 1024, 8
# Operations that take less time than looking for another way.
_CHEAP = 1e10
_MOST_BYTES = 2**31
_FAILURE = 1e-9


@partial(register_dataclass, data_fields=("lower", "upper"), meta_fields=("failure_probability",))
@dataclass(frozen=True)
class Bounds:
    """A bracket ``lower <= sigma <= upper`` of spectral norms; unpacks as ``lower, upper``.

    Attributes:
      lower: (*batch,).
      upper: (*batch,).
      failure_probability: the probability that ``upper`` is too small, over the random key; 0
        where no key was drawn.

    Example:
      >>> bounds = norm_bounds(jnp.diag(jnp.array([2.0, 1.0])))
      >>> lower, upper = bounds
      >>> bool(lower <= 2.0 <= upper), bounds.failure_probability
      (True, 0.0)
    """

    lower: np.ndarray | Array
    upper: np.ndarray | Array
    failure_probability: float = 0.0

    def __iter__(self) -> Iterator[np.ndarray | Array]:
        return iter((self.lower, self.upper))


class GramResult(NamedTuple):
    """Both ends of ``gram_iteration``: estimates, no bounds.

    Attributes:
      lower: (...,), at most the norm, up to rounding.
      upper: (...,), at least the norm, up to rounding.

    Example:
      >>> result = gram_iteration(jnp.diag(jnp.array([2.0, 1.0])), n_steps=2)
      >>> print(f"{result.lower:.3f} {result.upper:.3f}")
      1.972 2.000
    """

    lower: np.ndarray | Array
    upper: np.ndarray | Array


def gram_iteration(matrix: np.ndarray | Array, n_steps: int = 6) -> GramResult:
    r"""Estimates of the spectral norm from both sides, by repeated squaring (Delattre 2023).

    With ``G_0 = W`` and ``G_t = G_{t-1}^H G_{t-1}``, sigma^(2^t) is the norm of ``G_t``, which
    lies between ``|G_t|_F^2 / tr G_t`` and ``s + sqrt((n - 1)/n (|G_t|_F^2 - n s^2))``, where ``s``
    is the mean eigenvalue. So both ends converge quadratically. Differentiable in ``matrix``,
    runs where the array lives, under ``jit`` and ``vmap``. The norm lies between them in real
    arithmetic only: in float32 one of the converged ends is on the wrong side of it, by some
    units in the last place, for about a third of random matrices. For a bracket that holds see
    ``norm_bounds``.

    Args:
      matrix: (..., m, n), real or complex.
      n_steps: squarings, ``>= 1``; each costs a product of matrices of the smaller side.

    Returns:
      GramResult: lower and upper, (...), in the dtype of the matrix (its real part's).

    Raises:
      ValueError: ``n_steps < 1``, or fewer than two axes.

    Example:
      >>> lower, upper = gram_iteration(jnp.diag(jnp.array([2.0, 1.0])), n_steps=3)
      >>> print(f"{lower:.4f} {upper:.4f}")
      1.9990 2.0000
    """
    if n_steps < 1 or matrix.ndim < 2:
        raise ValueError(
            f"gram_iteration takes matrices (..., m, n) and n_steps >= 1; got shape "
            f"{matrix.shape} and n_steps={n_steps}."
        )
    xp = matrix.__array_namespace__()
    if matrix.shape[-1] > matrix.shape[-2]:
        matrix = xp.matrix_transpose(matrix)
    if 0 in matrix.shape:
        zero = xp.zeros(matrix.shape[:-2], dtype=xp.real(matrix[:0]).dtype)
        return GramResult(zero, zero)
    n = matrix.shape[-1]
    gram, log_scale = matrix, 0.0
    with jax.default_matmul_precision("highest"):
        for _ in range(n_steps):
            frobenius = xp.sqrt(xp.sum(xp.abs(gram) ** 2, axis=(-2, -1)))
            frobenius = xp.where(frobenius > 0, frobenius, xp.ones_like(frobenius))
            gram = gram / frobenius[..., None, None]
            log_scale = 2 * (log_scale + xp.log(frobenius))
            gram = xp.matmul(xp.conj(xp.matrix_transpose(gram)), gram)
    mean = xp.real(xp.trace(gram, axis1=-2, axis2=-1)) / n
    squares = xp.sum(xp.abs(gram) ** 2, axis=(-2, -1))
    spread = xp.maximum(squares - n * mean**2, xp.zeros_like(mean))
    upper = mean + xp.sqrt((n - 1) / n * spread) if n > 1 else mean
    lower = squares / (n * xp.where(mean > 0, mean, xp.ones_like(mean)))
    ends = []
    for end in (lower, upper):
        positive = xp.where(end > 0, end, xp.ones_like(end))
        norm = xp.exp((xp.log(positive) + log_scale) / 2**n_steps)
        ends.append(xp.where(end > 0, norm, xp.zeros_like(end)))
    return GramResult(*ends)


def spectral_norm(
    w: Array | np.ndarray, view: View | None = None, *, rtol: float = 1e-6
) -> np.ndarray:
    """The spectral norm of any view, converged: the largest singular value of its map.

    Small matrices by SVD, circular convolutions by the norms of their symbols on the grid of
    frequencies (Sedghi et al. 2019), everything else by Lanczos iteration until the residual
    ``|A^T u - sigma v|`` is at most ``rtol * sigma``: that puts a singular value within
    ``rtol * sigma``, and the error is usually about the square. Float64 on the host, not
    differentiable: for gradients take ``spectral_norms``.

    Args:
      w: the parameter, a concrete array.
      view: how it acts; by default ``Matrix()`` for one with two axes. Stacks need a view, such
        as ``Matrix()``.
      rtol: relative residual, > 0.

    Returns:
      numpy.ndarray: sigma of the view's batch shape, float64.

    Raises:
      ValueError: ``rtol`` not > 0; weights that are not finite; a map that is not linear; no
        convergence to ``rtol``; no view for other than two axes.
      TypeError: ``w`` is traced, no array, or not floating point; ``view`` is no view.

    Example:
      >>> print(f"{spectral_norm(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])):.8f}")
      9.52551809
    """
    array, view, batch = _checked(w, view, rtol)
    array, view, _ = _without_factor(array, view)
    norms = np.empty(batch)
    for index, kernel, single in _singles(array, view):
        norms[index] = _norm(kernel, single, rtol)
    return norms[()]


def norm_bounds(
    w: Array | np.ndarray,
    view: View | None = None,
    *,
    rtol: float = 1e-3,
    key: Array | None = None,
    work: float = 1e13,
    progress: bool = True,
) -> Bounds:
    r"""A bracket of the spectral norm that is proved, not estimated.

    For ``Matrix`` and ``Conv`` it is deterministic, and holds for the real-arithmetic map of the
    given numbers: what a layer computes in floating point can exceed it by its own rounding.
    The lower end is ``|A x| / |x|`` for a vector found by iteration. The upper end ``c`` is
    certified by a Cholesky factorization of ``c^2 I - A^T A`` in float64 that ran to its end,
    with everything that rounding can have hidden added (Rump 2006).

    ``upper / lower - 1 <= rtol`` for every matrix, and for every convolution whose factorization
    is within ``work``: those that are circular (their stride dividing the size) need little, and
    those with borders about ``n b^2`` operations, with n the numbers on their smaller side and b
    those in ``k - 1`` rows of an image, k the kernel's size: 1e11 for 5x5 taps on 12x12x64, 1.4e12
    for 3x3 taps on 32x32x64. Beyond that the upper end is the norm of the convolution without
    borders (on a grid large enough not to wrap around, or on a coarser one times ``1 / cos``),
    usually some 1 % to 3 % too large; a warning says so.

    For ``Linear`` (and views of your own) the lower end is a Ritz value, and the upper end what
    a Lanczos iteration from a random start allows: it is too small with
    ``failure_probability`` at most, over ``key``, up to the rounding of ``fn``.

    Args:
      w: the parameter, a concrete array; float64 arrays (NumPy's too) keep their digits.
      view: how it acts; by default ``Matrix()`` for one with two axes. Stacks need a view, such
        as ``Matrix()``.
      rtol: wanted ``upper / lower - 1``, > 0. Rounding limits it to about 1e-12 for small
        matrices and 1e-8 at 4,096 rows.
      key: PRNG key; for ``Linear`` only, and needed there.
      work: floating-point operations that one factorization of a convolution with borders may
        take, >= 0; one core does some 1e10 to 5e10 a second.
      progress: whether to show a bar on stderr where that takes more than two seconds.

    Returns:
      Bounds: float64 arrays of the view's batch shape.

    Raises:
      ValueError: ``rtol`` not > 0; ``work`` not >= 0; weights that are not finite; a map that is
        not linear; no key for ``Linear``; a kernel that leaves no output; no view for other than
        two axes.
      TypeError: ``w`` is traced, no array, or not floating point; ``view`` is no view.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
      >>> lower, upper = norm_bounds(kernel, Conv(input_shape=(8, 8), strides=2))
      >>> bool(lower < upper <= lower * 1.001)
      True
    """
    array, view, batch = _checked(w, view, rtol)
    if not work >= 0:
        raise ValueError(f"work must be >= 0 operations; got {work}.")
    array, view, slack = _without_factor(array, view)
    lower, upper = np.empty(batch), np.empty(batch)
    reason = "the rest is what rounding in float64 can hide"
    failure = 0.0 if isinstance(view, Matrix | Conv) else _FAILURE
    if failure and key is None:
        raise ValueError(
            f"The upper bound of {view} is probabilistic: give the randomness by "
            "key=jax.random.key(...)."
        )
    for number, (index, kernel, single) in enumerate(_singles(array, view)):
        if isinstance(single, _Slice):
            assert key is not None  # asked for above
            ends = _random_bounds(kernel, single, rtol, jax.random.fold_in(key, number))
        else:
            scale, kernel = _scaled(kernel)
            if isinstance(single, Matrix):
                ends = _certify([blocks_of([_as_matrix(kernel, single)])], rtol)
            else:
                *ends, borders = _conv_bounds(kernel, single, rtol, work, progress)
                reason = borders or reason
            # A subnormal product is not exact, so the bracket is widened by one unit.
            lowest, highest = (scale * end for end in ends)
            ends = np.nextafter(lowest, 0), np.nextafter(highest, math.inf) if ends[1] else 0.0
        lower[index], upper[index] = ends
    if slack:
        lower = np.nextafter(np.maximum(lower - slack, 0), 0)
        upper = np.nextafter(upper + slack, math.inf)
    wide = upper > lower * (1 + rtol)
    if wide.any():
        excess = np.max(upper[wide] / np.maximum(lower[wide], np.finfo(float).tiny)) - 1
        warnings.warn(
            f"The bracket of {view} on a parameter of shape {w.shape} is {excess:.2g} wide, more "
            f"than rtol={rtol:g}: {reason}.",
            stacklevel=2,
        )
    n_batch = max(1, math.prod(batch))
    return Bounds(lower[()], upper[()], min(1.0, failure * n_batch))


def _checked(w, view: View | None, rtol: float) -> tuple[np.ndarray, View, Shape]:
    """(the weights in float64, view, batch shape), or a sentence that says what is wrong."""
    if isinstance(w, Tracer):
        raise TypeError(
            "Exact norms are found on the host, from concrete arrays: call this outside of jit "
            "and grad; inside, power_iteration and spectral_normalize estimate."
        )
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0; got {rtol}.")
    if isinstance(w, View):
        raise TypeError(f"The first argument is {w}, a view: the order is (w, view).")
    try:
        array = np.asarray(w)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype == object:
        raise TypeError(
            f"Norms are those of one array of weights; got {kind_of(w)}. Of a tree of parameters "
            "take one at a time: {path: sn_jax.norm_bounds(leaves[path], view) for path, view in "
            "views.items()}."
        )
    w = array
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"Norms are those of real floating-point weights; got {w.dtype}.")
    if view is None:
        if w.ndim != 2:
            if w.ndim < 2:
                raise ValueError(
                    f"A parameter of shape {w.shape} is no matrix: reshape it to one, or give the "
                    "view under which it is."
                )
            inputs, (*ins, out) = (32,) * (w.ndim - 2), range(w.ndim)
            raise ValueError(
                f"A parameter of shape {w.shape} has {w.ndim} axes, so its view must be given: "
                f"sn_jax.Conv({inputs}) for a convolution on inputs of that size, say, "
                f"sn_jax.Matrix({tuple(ins)}, {out}) for it flattened, or sn_jax.Matrix() for a "
                "stack of matrices."
            )
        view = Matrix()
    check_view(view, "The second argument")
    w = w.astype(np.float64)
    if not np.isfinite(w).all():
        bad = w.size - np.isfinite(w).sum()
        raise ValueError(
            f"{bad} of {w.size} weights of shape {w.shape} are not finite: no norm to bound."
        )
    batch = view.batch_shape(w.shape)
    if not isinstance(view, Matrix | Conv):
        with on_host():
            check_linear(Operator(view, jnp.asarray(w)), in_w=False)
    return w, view, batch


def _without_factor(w: np.ndarray, view: View) -> tuple[np.ndarray, View, float]:
    """(factor * w, the view of that, what rounding of the product can do to the norm)."""
    slack = 0.0
    while isinstance(view, Scaled):
        factor = view.factor.astype(np.float64)
        exact = all(np.array_equal(x, x.astype(np.float32)) for x in (w, factor))
        w, view = w * factor, view.view
        if not exact:  # two float32 numbers have their product in float64
            slack += 1.01 * 2.0**-53 * float(np.linalg.norm(w)) + w.size * 5e-324
    return w, view, slack


class _Slice(NamedTuple):
    """A view of one's own, of which one batch element is looked at."""

    view: View
    index: tuple[int, ...]

    def __str__(self) -> str:
        """As an error names it, to whoever has given the view."""
        return f"{self.view}" + (f" (batch element {self.index})" if self.index else "")


def _singles(w: np.ndarray, view: View) -> Iterator[tuple[tuple[int, ...], np.ndarray, Any]]:
    """(batch index, weights, view without batch axes) of every map in a stack."""
    batch = view.batch_shape(w.shape)
    if isinstance(view, Matrix):
        axes, ins, outs = view.axis_groups(w.ndim)
        single = Matrix(tuple(range(len(ins))), tuple(range(len(ins), len(ins) + len(outs))))
        w = w.transpose(*axes, *ins, *outs)
    elif isinstance(view, Conv):
        axes = view.kernel_batch_axes(w.ndim)
        single = replace(view, batch_axes=())
        w = np.moveaxis(w, axes, range(len(axes)))
    else:
        for index in np.ndindex(*batch):
            yield index, w, _Slice(view, index)
        return
    for index in np.ndindex(*batch):
        yield index, w[index], single


def _as_matrix(w: np.ndarray, view: Matrix) -> np.ndarray:
    """(in, out): the transpose has the same norm."""
    n_in = len(view.in_axes)
    return w.reshape(math.prod(w.shape[:n_in]), math.prod(w.shape[n_in:]))


def _norm(w: np.ndarray, view: View | _Slice, rtol: float) -> float:
    scale, w = (1.0, w) if isinstance(view, _Slice) else _scaled(w)
    if isinstance(view, Matrix):
        matrix = _as_matrix(w, view)
        if min(matrix.shape) <= 4 * _SMALL:
            return float(scale * np.linalg.norm(matrix, 2)) if matrix.size else 0.0
        apply, adjoint, size = matrix.__matmul__, matrix.T.__matmul__, matrix.shape[1]
    else:
        if isinstance(view, Conv):
            lattices = lattices_of(view, w.shape)
            if all(lattice.exact for lattice in lattices):
                return scale * _certify(symbols(grouped(w, view), lattices), rtol)[0]
        apply, adjoint, size = _operator(w, view)
    v, sigma = _leading(apply, adjoint, size, rtol / 2)
    if sigma > 0:
        gap = np.linalg.norm(adjoint(apply(v)) / sigma - sigma * v) / sigma
        if gap > rtol:
            raise ValueError(
                f"The residual of {view} on a parameter of shape {w.shape} stays at {gap:.1e} "
                f"times its norm, above rtol={rtol:g}: the map is not computed that accurately. "
                "Give a larger rtol."
            )
    return scale * sigma


def _scaled(w: np.ndarray) -> tuple[float, np.ndarray]:
    """(2^k, w / 2^k) with the largest entry in [1, 2): exact, and squares neither over- nor
    underflow to any effect."""
    peak = np.max(np.abs(w), initial=0.0)
    exponent = int(np.frexp(peak)[1]) - 1 if peak > 0 else 0
    # In two factors, since 2^-exponent itself overflows for subnormal weights.
    half = exponent // 2
    return 2.0**exponent, np.ldexp(np.ldexp(w, -half), half - exponent)


# The certificate.


def _certify(parts: Iterable[Blocks], rtol: float) -> tuple[float, float]:
    """Bracket of the largest norm among all blocks.

    Every block passes a Cholesky factorization of ``c^2 I - G``, with ``G`` its Gram matrix, for
    one threshold ``c`` that only grows; a block that fails shows a larger lower end first.

    If the factorization of ``A = c^2 I - G`` succeeds in floating point, the smallest eigenvalue
    of A is at least ``-gamma_{r+1} / (1 - gamma_{r+1}) tr A`` (Rump 2006, theorem 2.3). Here the
    index of gamma is doubled, and doubled again for complex blocks.
    """
    lower = threshold = rounding = factor = error = 0.0
    for part in parts:
        gram, r = part.gram, part.gram.shape[-1]
        if gram.size == 0:
            continue
        rounding, error = max(rounding, part.rounding), max(error, part.error)
        terms = (4 if np.iscomplexobj(gram) else 2) * r + 16
        factor = max(factor, gamma(terms) * r * (1 + 1e-6) + 2 * UNIT)
        # Frobenius norms come first: they cost little and settle the small symbols of a smooth
        # kernel.
        flat = gram.reshape(len(gram), -1).view(float)
        frobenius_norms = np.sqrt(np.einsum("ij,ij->i", flat, flat)) * (1 + gamma(2 * r * r + 16))
        for i in np.argsort(-frobenius_norms):
            if frobenius_norms[i] <= threshold:
                break
            growth = 0.0
            while not _is_definite(threshold, gram[i]):
                x = _leading_eigenvector(gram[i], rtol)
                lower = max(lower, _length_at_least(part.block(i), x) - part.error)
                before, threshold = threshold, max(threshold, (lower * (1 + 0.5 * rtol)) ** 2)
                closest = 4 * (factor + rounding / threshold) if threshold else 0.0
                if threshold <= before * (1 + closest):
                    # The shift is as close to the norm as rounding allows and was refused: raise
                    # it by more than the rounding.
                    growth = max(2 * growth, closest)
                    threshold = max(before, rounding) * (1 + growth)
    upper = math.sqrt(threshold * (1 + factor) + rounding) * (1 + 8 * UNIT) + error
    return max(lower, 0.0), upper


def _is_definite(shift: float, gram: np.ndarray) -> bool:
    """Whether Cholesky of ``shift I - gram`` runs to its end."""
    shifted = np.negative(gram)
    shifted.flat[:: len(gram) + 1] += shift
    if len(gram) > _SMALL:
        # In place, several times as fast as NumPy's; the transpose lies in Fortran's order.
        (factorize,) = scipy.linalg.get_lapack_funcs(("potrf",), (shifted,))
        return factorize(shifted.T, lower=1, clean=0, overwrite_a=1)[1] == 0
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def _leading_eigenvector(gram: np.ndarray, rtol: float) -> np.ndarray:
    r = len(gram)
    if r > _SMALL:
        # The transpose lies in Fortran's order, and its eigenvector is the conjugate. SciPy's BLAS
        # alone is used here.
        name = "hemv" if gram.dtype == complex else "symv"
        (multiply,) = scipy.linalg.get_blas_funcs((name,), (gram,))
        start = np.random.default_rng(0).standard_normal(r).astype(gram.dtype)
        with contextlib.suppress(ArpackNoConvergence):
            tol = min(0.1 * rtol, 1e-4)
            return _lanczos(partial(multiply, 1.0, gram.T), start, tol).conj()
    # All eigenvalues, since LAPACK's search for the last one alone can fail where all are equal.
    return np.linalg.eigh(gram)[1][:, -1]


def _lanczos(
    multiply: Callable, start: np.ndarray, tol: float, n_vectors: int | None = None
) -> np.ndarray:
    """The eigenvector of the largest eigenvalue of a symmetric map."""
    shape = len(start), len(start)
    # Inferred of SciPy's source: it has no stubs, and these ask for __init__ and an integer tol.
    symmetric = LinearOperator(shape, multiply, dtype=start.dtype)  # pyright: ignore[reportCallIssue]
    _, vectors = eigsh(
        symmetric,
        k=1,
        which="LA",
        tol=tol,  # pyright: ignore[reportArgumentType]
        v0=start,
        ncv=n_vectors,
    )
    return vectors[:, 0]


def _length_at_least(block: Block, x: np.ndarray) -> float:
    """A lower end of ``|D x| / |x|`` in real arithmetic."""
    return _quotient(block @ x, x, frobenius(block), x.size)


def _quotient(y: np.ndarray, x: np.ndarray, norm: float, terms: int) -> float:
    """``|y| / |x|`` less what rounding can have added to y, whose entries are sums of ``terms``
    products, ``norm`` bounding that of the map of absolute values."""
    slack = 2 * norm * gamma(4 * terms + 16)
    lengths = (1 - gamma(4 * y.size + 16)) / (1 + gamma(4 * x.size + 16))
    return float(np.linalg.norm(y) / np.linalg.norm(x) * lengths - slack)


def _conv_bounds(
    w: np.ndarray, view: Conv, rtol: float, work: float, progress: bool
) -> tuple[float, float, str]:
    """(lower, upper, why no closer)."""
    kernel, lattices = grouped(w, view), lattices_of(view, w.shape)
    if all(lattice.exact for lattice in lattices):
        return *_certify(symbols(kernel, lattices), rtol), ""
    n = len(lattices)
    dimensions = [taps_of(along(view, axis), size) for axis, size in enumerate(w.shape[:n])]
    groups, c_in, c_out = kernel.shape[n:]
    n_in, n_out = math.prod(t.n_in for t in dimensions), math.prod(t.n_out for t in dimensions)
    copying = view.padding in ("CIRCULAR", "REFLECT")
    cubed = groups * min(n_in * c_in, n_out * c_out) ** 3
    parts = banded(kernel, dimensions) if cubed > _SIMPLE**3 else None
    if parts is None or (cubed <= _EXPLICIT**3 and _FASTER * parts.flops > cubed):
        error = 0.0
        if copying:
            # Taps that meet on one pixel are added, and the sum is rounded.
            sizes = map(frobenius, explicit(np.abs(kernel), dimensions))
            error = gamma(2 * math.prod(w.shape[:n])) * max(sizes)
        matrices = (blocks_of([matrix], error) for matrix in explicit(kernel, dimensions))
        return *_certify(matrices, rtol), ""

    if not parts.absolute:
        return 0.0, 0.0, ""
    apply, adjoint, size = _operator(w, view)
    v, _ = _leading(apply, adjoint, size, max(rtol / 10, 1e-5))
    lower = max(0.0, _quotient(apply(v), v, parts.absolute, w.size))
    affordable = parts.flops <= work and parts.most_bytes <= _MOST_BYTES
    upper = math.inf
    if not affordable or parts.flops > _CHEAP:
        stretch = math.prod(lattice.factor for lattice in lattices) * (1 + 8 * UNIT)
        upper = stretch * _certify(symbols(kernel, lattices), rtol)[1]
    if not affordable:
        price = f"{parts.flops:.2g} operations, more than work={work:g}"
        if parts.flops <= work:
            price = f"{parts.most_bytes / 2**30:.2g} GiB, more than {_MOST_BYTES / 2**30:g}"
        reason = (
            f"with {n_in * c_in * groups} inputs and {n_out * c_out * groups} outputs a proof "
            f"takes {price}, and the upper end is that of the convolution without borders"
        )
        if copying:
            reason += ", times what copying pixels into them can add"
        return lower, upper, reason + "; spectral_norm is an estimate"
    if upper > lower * (1 + rtol):
        lower, proved = _banded_bounds(parts, lower, rtol, (apply, adjoint, size), progress)
        upper = min(upper, proved)
    return lower, upper, ""


def _banded_bounds(
    parts: Banded, lower: float, rtol: float, operator, progress: bool
) -> tuple[float, float]:
    """The bracket by thresholds just above the lower end, the first of which nearly always holds.

    A threshold that is refused asks for a better vector first, since Lanczos can stop at another
    singular value, and then grows.
    """
    apply, adjoint, size = operator
    seed, wide = 0, 0.5 * rtol
    while True:
        # Closer than rounding allows is refused for nothing.
        least = lower**2 + 4 * parts.rounding
        shift = max((lower * (1 + wide)) ** 2, least) * (1 + 4 * parts.slack)
        with tqdm(
            total=parts.flops,
            unit="FLOP",
            unit_scale=True,
            desc="norm_bounds",
            delay=2,
            leave=False,
            disable=not progress,
        ) as bar:
            if all_definite(parts, shift, bar.update):
                squared = shift * (1 + parts.slack) + parts.rounding
                return lower, math.sqrt(squared) * (1 + 8 * UNIT)
        seed += 1
        if seed <= 2:
            start = np.random.default_rng(seed).standard_normal(size)
            with contextlib.suppress(ValueError):
                v, _ = _leading(apply, adjoint, size, max(rtol / 1000, 1e-13), start)
                lower = max(lower, _quotient(apply(v), v, parts.absolute, parts.kernels.size))
            wide = 0.9 * rtol
        else:
            wide = 4 * max(wide, parts.slack)


# Any linear map.


@partial(jax.jit, static_argnames="view")
def _forward(w, x, *, view):
    return view.matvec(w, x)


@partial(jax.jit, static_argnames=("view", "shape"))
def _backward(w, y, *, view, shape):
    x = jax.ShapeDtypeStruct(shape, y.dtype)
    return jax.linear_transpose(partial(view.matvec, w), x)(y)[0]


def _operator(w: np.ndarray, view: View | _Slice):
    """(apply, its adjoint, size of the domain) on flat float64 vectors."""
    view, index = view if isinstance(view, _Slice) else (view, ())
    batch, domain = view.batch_shape(w.shape), view.domain(w.shape)
    with on_host():
        kernel = jnp.asarray(w)
        x = jax.ShapeDtypeStruct((*batch, *domain), kernel.dtype)
        codomain = jax.eval_shape(partial(view.matvec, kernel), x).shape[len(batch) :]

    def mapped(function, space):
        def call(x):
            whole = np.zeros((*batch, *space))
            whole[index] = np.reshape(x, space)
            with on_host():
                return np.asarray(function(kernel, whole, view=view))[index].ravel()

        return call

    backward = partial(_backward, shape=(*batch, *domain))
    return mapped(_forward, domain), mapped(backward, codomain), math.prod(domain)


def _leading(
    apply: Callable, adjoint: Callable, size: int, tol: float, start=None, n_vectors=None
) -> tuple[np.ndarray, float]:
    """(v, |A v|) of the leading right singular vector, to a residual of ``tol * sigma^2`` of
    ``A^T A``; Lanczos with ``n_vectors`` from ``start``."""
    n_vectors = n_vectors or _VECTORS
    if size <= n_vectors:
        columns = np.stack([apply(x) for x in np.eye(size)], 1) if size else np.zeros((0, 0))
        if not columns.size:
            return np.zeros(size), 0.0
        v = scipy.linalg.svd(columns, full_matrices=False)[2][0]
    else:
        if start is None:
            start = np.random.default_rng(0).standard_normal(size)
        v = start / np.linalg.norm(start)
        if np.linalg.norm(apply(v)) == 0:
            return v, 0.0
        try:
            v = _lanczos(lambda x: adjoint(apply(x)), start, tol, n_vectors)
        except ArpackNoConvergence:
            raise ValueError(
                f"Lanczos iteration did not converge to a residual of {tol:.1e}: the map is not "
                "computed that accurately, or many of its singular values are nearly equal. "
                "Give a larger rtol."
            ) from None
    return v, float(np.linalg.norm(apply(v)))


def _random_bounds(w: np.ndarray, view: _Slice, rtol: float, key: Array) -> tuple[float, float]:
    r"""Bracket by k Lanczos steps on ``A^T A`` from a Gaussian start.

    With ``theta`` the largest Ritz value and n the dimension of the domain,
    ``P[theta < (1 - eps) sigma^2] <= sqrt(2 n / pi) / sinh((2 k - 1) atanh sqrt(eps))``. The
    Ritz value is at least the Rayleigh quotient of ``p(A^T A) x`` for every p of degree k - 1.
    Take p such that ``sqrt((1 - eps) sigma^2 - t) p(t)`` is the Chebyshev polynomial of degree
    2 k - 1: then ``theta`` is too small only where ``|x_1| / |x|`` is below the reciprocal of the
    sinh, x_1 along the leading vector, and that has at most the probability above (compare
    Kuczynski & Wozniakowski 1992, theorem 4.2). Restarts only raise ``theta``.
    """
    apply, adjoint, n = _operator(w, view)
    if n == 0:
        return 0.0, 0.0
    eps = 1 - (1 + 0.99 * rtol) ** -2
    steps = math.asinh(math.sqrt(2 * n / math.pi) / _FAILURE) / math.atanh(math.sqrt(eps))
    n_vectors = min(n, max(20, math.ceil((steps + 1) / 2)))
    if 8 * n * n_vectors > _MOST_BYTES:
        raise ValueError(
            f"rtol={rtol:g} takes {n_vectors} Lanczos vectors of {n} numbers, more than "
            f"{_MOST_BYTES >> 30} GiB: give a larger rtol."
        )
    with on_host():
        start = np.asarray(jax.random.normal(key, (n,), jnp.float64))
    _, sigma = _leading(apply, adjoint, n, rtol, start, n_vectors)
    rounding = 16 * n * UNIT
    return sigma * (1 - rounding), sigma / math.sqrt(1 - eps) * (1 + rounding)
