"""The explicit matrix of every view, and its norm: what the certificates are checked against.

NumPy and index arithmetic only, from the definition of each layer, one pair (output pixel, input
pixel) per tap: nothing here is shared with sn_jax but the views' names. Close calls are decided in
50 digits.
"""

import itertools
import math
from functools import lru_cache

import numpy as np

import sn_jax

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""For each tap of one dimension: output positions, and the input position that each one reads."""


def matrices(w: np.ndarray, view: sn_jax.View) -> np.ndarray:
    """The explicit matrices of a parameter.

    Args:
      w: the parameter, of any float dtype, or of exact numbers (dtype object).
      view: a ``sn_jax.Matrix`` or ``sn_jax.Conv``.

    Returns:
      (*batch, out, in), float64, or objects if ``w`` holds objects. Where several taps read one
      pixel (wrapped or reflected) their sum is rounded in float64, and exact for exact numbers.

    Raises:
      TypeError: another view.
    """
    w = np.asarray(w)
    if w.dtype != object:
        w = w.astype(np.float64)
    if isinstance(view, sn_jax.Matrix):
        ins = [axis % w.ndim for axis in view.in_axes]
        outs = [axis % w.ndim for axis in view.out_axes]
        batch = [axis for axis in range(w.ndim) if axis not in ins + outs]
        shape = [w.shape[axis] for axis in batch]
        rows = math.prod(w.shape[axis] for axis in outs)
        return w.transpose(*batch, *outs, *ins).reshape(*shape, rows, -1)
    if not isinstance(view, sn_jax.Conv):
        raise TypeError(f"The oracle knows Matrix and Conv, not {type(view).__name__}.")
    n = len(view.input_shape) + 2
    axes = range(w.ndim - n) if view.batch_axes is None else view.batch_axes
    batch = sorted(axis % w.ndim for axis in axes)
    stacked = np.moveaxis(w, batch, range(len(batch)))
    shape, kernel = stacked.shape[: len(batch)], stacked.shape[len(batch) :]
    each = [_convolution(k, view) for k in stacked.reshape(-1, *kernel)]
    return np.stack(each).reshape(*shape, *each[0].shape)


def norms(w: np.ndarray, view: sn_jax.View) -> np.ndarray:
    """Largest singular value of each explicit matrix, by SVD in float64; shape (*batch,)."""
    return np.linalg.svd(matrices(w, view), compute_uv=False).max(-1, initial=0.0)


def codomain_size(shape: tuple[int, ...], view: sn_jax.View) -> int:
    """Number of outputs of one map, for a parameter of the given shape; 0 if there are none."""
    if isinstance(view, sn_jax.Matrix):
        return math.prod(shape[axis] for axis in view.out_axes)
    n = len(view.input_shape)
    axes = range(len(shape) - n - 2) if view.batch_axes is None else view.batch_axes
    batch = [axis % len(shape) for axis in axes]
    *spatial, c_in, c_out = (size for axis, size in enumerate(shape) if axis not in batch)
    channels = c_in if view.transpose and view.transpose_kernel else c_out
    return channels * math.prod(_dimension(view, d, k)[0] for d, k in enumerate(spatial))


def recheck(matrix: np.ndarray, lower: float, upper: float, digits: int = 50) -> tuple[bool, bool]:
    """Decide ``lower <= sigma`` and ``sigma <= upper`` in high precision.

    Cholesky of c^2 I - A^T A completes if and only if sigma < c. Quick below a hundred rows or
    columns, minutes at a few hundred; where the answer is that sigma exceeds c by more than
    rounding, a float64 singular vector proves it at once at any size.

    Args:
      matrix: (out, in), of floats or of exact numbers.
      lower, upper: the claimed bracket.
      digits: decimal digits to compute with; a difference below 10^(20 - digits), relative, is
        taken as equality.

    Returns:
      Whether each of the two holds.
    """
    import mpmath

    with mpmath.workdps(digits):
        tiny = mpmath.mpf(10) ** (20 - digits)
        holds_lower = lower <= 0 or _at_least(matrix, mpmath.mpf(float(lower)) * (1 - tiny))
        holds_upper = upper == math.inf or not _at_least(
            matrix, mpmath.mpf(float(upper)) * (1 + tiny)
        )
    return holds_lower, holds_upper


def exact(w: np.ndarray) -> np.ndarray:
    """The parameter's entries as exact high-precision numbers, for ``matrices``."""
    import mpmath

    return np.vectorize(lambda x: mpmath.mpf(float(x)), otypes=[object])(np.asarray(w))


def _at_least(matrix, c) -> bool:
    """Whether sigma >= c > 0 (or, for c = 0, sigma > 0), in mpmath's present precision."""
    import mpmath

    a = exact(matrix) if matrix.dtype != object else matrix
    scale = max((abs(x) for x in a.flat), default=mpmath.mpf(0))
    if scale == 0:
        return False
    if a.shape[0] < a.shape[1]:
        a = a.T
    a, c = a / scale, c / scale  # so that float64 can hold it below
    _, _, rows = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    v = exact(rows[0])
    if mpmath.norm(list(a @ v)) >= c * mpmath.norm(list(v)):
        return True
    # A right-looking Cholesky: what is left of c^2 I - A^T A after each pivot.
    rest = -(a.T @ a)
    rest[np.diag_indices(len(rest))] += c * c
    for i in range(len(rest)):
        pivot = rest[i, i]
        if pivot <= 0:
            return True
        column = rest[i + 1 :, i]
        rest[i + 1 :, i + 1 :] -= np.multiply.outer(column, column / pivot)
    return False


def _convolution(kernel: np.ndarray, view: sn_jax.Conv) -> np.ndarray:
    """(out, in) matrix of one kernel (*spatial, in, out)."""
    *spatial, c_in, c_out = kernel.shape
    n_out, n_in, plan = _plan(view, tuple(spatial))
    taps = kernel.reshape(-1, c_in, c_out)
    if view.transpose and view.transpose_kernel:
        taps = taps.swapaxes(1, 2)
    else:
        taps = _dense_groups(taps, view.feature_group_count)
    _, c_in, c_out = taps.shape
    matrix = np.zeros((n_out, n_in, c_out, c_in), kernel.dtype)  # objects: integer zeros
    for tap, (outputs, inputs) in zip(taps, plan, strict=True):
        matrix[outputs, inputs] += tap.T  # no pair occurs twice within a tap
    return matrix.swapaxes(1, 2).reshape(n_out * c_out, n_in * c_in)


def _dense_groups(taps: np.ndarray, groups: int) -> np.ndarray:
    """(taps, in / groups, out) -> (taps, in, out), zero between different groups."""
    n, c_in, c_out = taps.shape
    dense = np.zeros((n, groups, c_in, groups, c_out // groups), taps.dtype)
    for g in range(groups):
        dense[:, g, :, g] = taps.reshape(n, c_in, groups, -1)[:, :, g]
    return dense.reshape(n, groups * c_in, c_out)


@lru_cache(maxsize=1024)
def _plan(view: sn_jax.Conv, spatial: tuple[int, ...]) -> tuple[int, int, Pairs]:
    """Numbers of output and input pixels, and for each tap its pairs of flat pixel indices."""
    sizes, dimensions = zip(*(_dimension(view, d, k) for d, k in enumerate(spatial)), strict=True)
    plan = []
    for taps in itertools.product(*dimensions):  # in the order of the kernel's memory
        outputs, inputs = (np.zeros(1, int) for _ in range(2))
        for (o, i), n_out, n_in in zip(taps, sizes, view.input_shape, strict=True):
            outputs = (outputs[:, None] * n_out + o).ravel()
            inputs = (inputs[:, None] * n_in + i).ravel()
        plan.append((outputs, inputs))
    return math.prod(sizes), math.prod(view.input_shape), plan


def _dimension(view: sn_jax.Conv, d: int, k: int) -> tuple[int, Pairs]:
    """Output size of dimension ``d`` with ``k`` taps, and the pairs of each tap."""
    n, stride, spacing = view.input_shape[d], view.strides[d], view.kernel_dilation[d]
    rule = _transposed if view.transpose else _forward
    padding = view.padding if isinstance(view.padding, str) else view.padding[d]
    flip = view.transpose and view.transpose_kernel
    size, pairs = rule(n, k, stride, spacing, padding, view.input_dilation[d], flip)
    return size, pairs[::-1] if flip else pairs


def _forward(n, k, stride, spacing, padding, dilation, _) -> tuple[int, Pairs]:
    """Output o reads, at tap a, position ``o * stride + a * spacing`` of the padded input."""
    reach = (k - 1) * spacing
    if padding in ("CIRCULAR", "REFLECT"):
        low, high = reach // 2, reach - reach // 2
    elif padding == "CAUSAL":
        low, high = reach, 0
    elif padding == "VALID":
        low = high = 0
    elif padding in ("SAME", "SAME_LOWER"):
        total = max(0, (math.ceil(n / stride) - 1) * stride + reach + 1 - n)
        low = total // 2 if padding == "SAME" else total - total // 2
        high = total - low
    else:
        low, high = padding
    length = (n - 1) * dilation + 1 + low + high
    n_out = max(0, (length - reach - 1) // stride + 1)
    outputs, pairs = np.arange(n_out), []
    for a in range(k):
        position = outputs * stride + a * spacing - low
        if padding == "CIRCULAR":
            source, reads = position % n, np.full(n_out, True)
        elif padding == "REFLECT":  # 3 2 1 | 0 1 2 3 | 2 1 0: a triangle wave
            phase = position % max(1, 2 * n - 2)
            source, reads = np.minimum(phase, 2 * n - 2 - phase), np.full(n_out, True)
        else:  # zero outside, and between the pixels of a dilated input
            source = position // dilation
            reads = (position % dilation == 0) & (source >= 0) & (source < n)
        pairs.append((outputs[reads], source[reads]))
    return n_out, pairs


def _transposed(n, k, stride, spacing, padding, _, flip) -> tuple[int, Pairs]:
    """Input i writes, at tap a, output ``i * stride + low - a * spacing``."""
    reach = (k - 1) * spacing
    if padding == "SAME":
        total = reach + stride - 1
        low = reach if stride > reach else math.ceil(total / 2)
        high = total - low
    elif padding in ("VALID", "CIRCULAR"):
        low, high = reach, max(reach, stride - 1)
    else:
        low, high = padding
    length = max(0, (n - 1) * stride + 1 + low + high - reach)
    period = n * stride
    # Where flax lays the period: half of what is missing from two periods lies left of output 0.
    missing = (period - length) % (2 * period)
    shift = missing // 2 if flip else missing - missing // 2
    inputs, pairs = np.arange(n), []
    for a in range(k):
        position = inputs * stride + low - a * spacing
        writes = (position >= 0) & (position < length)
        if padding == "CIRCULAR":
            position = (position + shift) % period
        pairs.append((position[writes], inputs[writes]))
    return period if padding == "CIRCULAR" else length, pairs
