"""The norm of one linear operation, by its kind, where no matrix of the whole need be formed."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from sn_jax._norms import norm_bounds
from sn_jax._pieces import Constant, Operation, apply, is_indexing, rounding_terms
from sn_jax._symbols import gamma
from sn_jax._views import Conv, Matrix

# Entries of a matrix that is formed, and its smaller side.
MOST_ENTRIES, MOST_ROWS = 2**25, 4096
# Below this side accuracy costs nothing.
_SMALL = 256
# Operations for the norm of one convolution with borders: about a second.
_WORK = 3e10


def norm(matrix: np.ndarray, rtol: float, error: float = 0.0, view=None) -> float:
    """At least the largest norm among matrices (..., m, n), or what a view says."""
    if not matrix.size:
        return 0.0
    if view is None:
        if not matrix.any():
            return error
        if matrix.ndim == 2 and min(matrix.shape) > _SMALL:
            stacks = _blocks(matrix)
            if stacks is not None:
                return max(norm(stack, rtol, error) for stack in stacks)
        view, rtol = Matrix(), min(rtol, 1e-10) if min(matrix.shape[-2:]) <= _SMALL else rtol
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of brackets wider than rtol: the upper end holds
        bounds = norm_bounds(matrix, view, rtol=rtol, work=_WORK, progress=False)
        upper = np.max(bounds.upper)  # type: ignore
    return float(np.nextafter(upper + error, math.inf))


def _blocks(matrix: np.ndarray) -> list[np.ndarray] | None:
    """Stacks (k, m, n) of the blocks that some order of rows and columns shows, each once."""
    if np.count_nonzero(matrix) > matrix.size // 2:
        return None
    edges = scipy.sparse.coo_array(matrix)
    n_rows = matrix.shape[0]
    graph = scipy.sparse.coo_array(
        (np.ones(edges.nnz, np.int8), (edges.row, edges.col + n_rows)), (sum(matrix.shape),) * 2
    )
    count, label = connected_components(graph, directed=False)
    if count < 2:
        return None
    # Places of one component stand together, in their old order.
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(label, minlength=count))[:-1])
    found: dict[tuple[int, ...], dict[bytes, np.ndarray]] = {}
    for group in groups:
        at = np.searchsorted(group, n_rows)
        block = np.ascontiguousarray(matrix[np.ix_(group[:at], group[at:] - n_rows)])
        if block.size:
            found.setdefault(block.shape, {})[block.tobytes()] = block
    return [np.stack([*blocks.values()]) for blocks in found.values()]


def operation_norm(node: Operation, rtol: float) -> float | None:
    """At least the norm of a linear operation with one input; None where it is too large."""
    (a,) = node.inputs
    op, params = node.op, node.params
    up = math.inf
    if op in ("broadcast_in_dim",):
        return _root_up(node.size, a.size)
    if is_indexing(op) or op in ("neg", "add", "sub", "add_any", "pad", "select_n",
                                 "concatenate", "dynamic_update_slice"):  # fmt: skip
        if sum(b is a for b in node.args) == 1:
            return 1.0
    elif op == "mul" or op == "div":
        c = np.abs(next(b for b in node.args if isinstance(b, Constant)).array)
        if op == "mul":
            return float(np.max(c, initial=0.0))
        return float(np.nextafter(1 / np.min(c, initial=up), up)) if c.min(initial=up) > 0 else up
    elif op == "reduce_sum":
        return _root_up(a.size, node.size)
    elif op == "cumsum":
        n = a.shape[params["axis"]]
        return 1 / (2 * math.sin(math.pi / (4 * n + 2))) * (1 + 2.0**-48)
    elif op == "dot_general":
        return _matrix_norm(node, rtol)
    elif op == "conv_general_dilated":
        return _convolution_norm(node, rtol)
    elif op == "reduce_window_sum":
        return _window_norm(node, rtol)
    return explicit_norm(node, a, rtol)


def explicit_norm(node: Operation, a: Operation, rtol: float) -> float | None:
    """By the matrix of the operation, where it is not too large."""
    if a.size * node.size > MOST_ENTRIES or min(a.size, node.size) > MOST_ROWS:
        return None
    matrix = apply(node, {a: identity(a)}).reshape(a.size, -1)
    row = apply(node, {a: np.ones((1, *a.shape))}, absolute=True)
    return norm(matrix, rtol, gamma(rounding_terms(node) + 2) * float(np.linalg.norm(row)))


def identity(a: Operation) -> np.ndarray:
    return np.eye(a.size).reshape(a.size, *a.shape)


def _root_up(numerator: int, denominator: int) -> float:
    ratio = numerator / max(denominator, 1)
    root = math.sqrt(ratio)
    return (
        root if root * root == ratio and root.is_integer() else float(np.nextafter(root, math.inf))
    )


def _matrix_norm(node: Operation, rtol: float) -> float:
    """Of a product with a constant matrix: free axes of the argument do not matter."""
    place = next(i for i, b in enumerate(node.args) if isinstance(b, Constant))
    contract, batch = (dims[place] for dims in node.params["dimension_numbers"])
    c = node.args[place].array  # type: ignore
    free = [i for i in range(c.ndim) if i not in (*contract, *batch)]
    sizes = [[c.shape[i] for i in axes] for axes in (batch, contract, free)]
    c = c.transpose(*batch, *contract, *free)
    return norm(c.reshape([math.prod(s) for s in sizes]), rtol)


def _convolution_norm(node: Operation, rtol: float) -> float | None:
    """By the view of the kernel, on one image."""
    found = convolution([node])
    if found is None:
        return explicit_norm(node, node.inputs[0], rtol)
    return norm(found[0], rtol, *found[1:])


def is_isometric(node: Operation) -> bool:
    """Whether it moves entries, or adds constants, and no more."""
    if len(node.operands) != 1:
        return False
    if node.op in ("neg", "add", "add_any", "sub"):
        return True
    return is_indexing(node.op) and node.size == node.inputs[0].size


def convolution(order: Sequence[Operation]) -> tuple[np.ndarray, float, Conv] | None:
    """(kernel, how much it errs, view) of a chain of operations that is one convolution: with
    constants added, and channels multiplied by constants before it or after. None of others."""
    (place, node), *others = [
        (i, a) for i, a in enumerate(order) if a.op == "conv_general_dilated"
    ] or [(0, order[0])]
    kernel, params = node.args[-1], node.params
    if others or node.op != "conv_general_dilated" or not isinstance(kernel, Constant):
        return None
    numbers, n = params["dimension_numbers"], len(kernel.shape) - 2
    groups = params["feature_group_count"]
    out, in_, *spatial = numbers.rhs_spec
    if not 1 <= n <= 3 or any(low < 0 or high < 0 for low, high in params["padding"]):
        return None
    if params["batch_group_count"] != 1:
        return None
    w = kernel.array.transpose(*spatial, in_, out)
    scaled = 0
    for i, a in enumerate(order):
        if a is node or a.op in ("neg", "add", "add_any", "sub"):
            continue
        if a.op not in ("mul", "div"):
            return None
        channels = _channels(a, (numbers.out_spec if i > place else numbers.lhs_spec)[1])
        if channels is None:
            return None
        if i < place and groups > 1:
            return None
        w = w * (channels if i > place else channels[:, None])
        scaled += 2
    view = Conv(
        input_shape=tuple(node.inputs[0].shape[i] for i in numbers.lhs_spec[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        feature_group_count=groups,
    )
    # A tap's matrix has at most the norm that it has by its entries, and shifts have 1.
    size = float(np.sum(np.sqrt(np.sum(w**2, (-1, -2)))))
    return w, gamma(scaled) * size * (1 + 1e-9), view


def _channels(a: Operation, axis: int) -> np.ndarray | None:
    """The factors of a product with a constant that depends on one axis only."""
    constant = next(c for c in a.args if isinstance(c, Constant))
    if a.op == "div" and constant is a.args[0]:
        return None
    c = np.broadcast_to(constant.array, a.shape)
    if a.op == "div":
        c = 1 / c
    first = np.moveaxis(c, axis, -1).reshape(-1, a.shape[axis])
    return first[0] if np.all(first == first[0]) and np.isfinite(first).all() else None


def _window_norm(node: Operation, rtol: float) -> float:
    """The product of its norms along each dimension."""
    (a,), p = node.inputs, node.params
    total = 1.0
    for i, n in enumerate(a.shape):
        k, s = p["window_dimensions"][i], p["window_strides"][i]
        d, base = p["window_dilation"][i], p["base_dilation"][i]
        low = p["padding"][i][0]
        matrix = np.zeros((node.shape[i], n))
        for o in range(node.shape[i]):
            for tap in range(k):
                at = o * s + tap * d - low
                if at % base == 0 and 0 <= at // base < n:
                    matrix[o, at // base] += 1
        total *= norm(matrix, rtol) if (k, s) != (1, 1) else 1.0
    return total * (1 + 2.0**-48)
