"""Operations of a program, and the linear ones applied in float64 to many vectors at once.

An operation has a primitive, its parameters and arguments: other operations, or constants. Here
stands which ones are linear in what is not constant, what they do to a stack (k, *shape) of
vectors, and what the same operation with absolute values does, which bounds what rounding adds.
NumPy computes the common ones, so that nothing is compiled; JAX the others.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sn_jax._matrix_free import Products
from sn_jax._numbers import is_number, least, lost
from sn_jax._symbols import UNIT, gamma, on_host

Stack = np.ndarray  # (k, *shape), float64
_ANY = 1000
_MOST_WINDOWS = 2**22  # entries of convolutions' windows that are copied at a time

ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite",
    "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter",
    "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt",
    "square", "sub", "tan", "tanh", "xor",
}  # fmt: skip


class Constant:
    """An array that the program does not compute from x; one object for each array."""

    def __init__(self, value: Any):
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def array(self) -> np.ndarray:
        """In float64, which holds every shorter float."""
        return np.asarray(self.value).astype(np.float64)

    constant = True

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number; NaN if one is."""
        if not (self.is_float and self.value.size):
            return -math.inf, -math.inf
        value = np.asarray(self.value)
        return float(value.min()), float(value.max())

    @property
    def number(self) -> bool:
        return self.ends[1] < math.inf

    @property
    def least(self) -> float:
        return self.ends[0]

    @cached_property
    def lost(self) -> np.ndarray | None:
        infinite = self.is_float and self.value.size and self.least == -math.inf
        return self.array == -math.inf if infinite else None

    @property
    def nonzero(self) -> bool:
        return self.is_float and bool(self.array.all())

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.value.dtype, jnp.floating)

    def uniform(self) -> float | None:
        """Its one number, or None where entries differ."""
        value = self.array
        if value.size and np.all(value == value.flat[0]):
            return float(value.flat[0])
        return None


class Operation:
    """One result of one equation; the same object wherever a program computes the same.

    Attributes:
      op: name of the primitive, or of what was recognized ("softmax").
      args: its arguments.
      params: of the primitive, or of what was recognized.
      shape, dtype: of the result.
      where: file:line of the source.
      primitive: None for what was recognized.
      out: which result of the primitive.
      depth: larger than that of its arguments.
      number: whether every entry is a real number for every real x, but for those that ``lost``
        has: they are -inf for every x.
      least: no number among the entries is below; -inf if that is not known.
    """

    constant = nonzero = False

    def __init__(self, op, args, params, shape, dtype, where, primitive=None, out=0):
        self.op: str = op
        self.args: tuple[Union[Operation, Constant], ...] = args  # noqa: UP007
        self.params: Mapping[str, Any] = params
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype, self.where, self.primitive, self.out = dtype, where, primitive, out
        self.depth: int = 1 + max((a.depth for a in self.inputs), default=0)
        self.number: bool = is_number(op, self.args, params)
        self.lost = lost(op, self.args, params, self.shape) if self.number else None
        if self.lost is not None and is_indexing(op):
            self.lost = permuted(self, self.lost.astype(float)) > 0
        self.least: float = least(op, self.args, params)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def operands(self) -> "list[Operation]":
        """Its arguments that depend on x, in order."""
        return [a for a in self.args if isinstance(a, Operation)]

    @property
    def inputs(self) -> "list[Operation]":
        """Its arguments that depend on x, each once."""
        return list(dict.fromkeys(a for a in self.args if isinstance(a, Operation)))


def is_linear(node: Operation) -> bool:
    """Whether it is linear, up to a constant, in those of its arguments that depend on x."""
    constant = [isinstance(a, Constant) for a in node.args]
    if node.op in ("mul", "dot_general", "conv_general_dilated"):
        return sum(constant) == 1
    if node.op == "select_n":
        return constant[0]
    if node.op in _SCATTER:
        return constant[1]
    return node.op in _LINEAR and all(constant[_LINEAR[node.op] :])


def is_indexing(op: str) -> bool:
    """Whether each entry of the result is one of the argument, and nothing else is done."""
    return op in _INDEXING


def roots(node: Operation) -> Iterator[Operation]:
    """The operations, nearest first, of whose entries those of ``node`` are functions, each of the
    one in its own place: what every path of elementwise operations up from ``node`` meets."""
    front = set(node.inputs)
    while node.op in ELEMENTWISE and front:
        if len(front) == 1:
            (root,) = front
            yield root
        deepest = max(front, key=lambda a: a.depth)
        if deepest.op not in ELEMENTWISE:
            return
        front.remove(deepest)
        front.update(deepest.inputs)


def rounding_terms(node: Operation) -> int:
    """How many roundings can lie between an entry of the result and those it is computed from."""
    if node.op in _INDEXING or node.op in (
        "select_n", "concatenate", "stack", "pad", "neg", "gather", "scatter",
        "dynamic_update_slice",
    ):  # fmt: skip
        return 0
    if node.op in _ENTRYWISE:
        return 2
    if node.op == "conv_general_dilated":
        (kernel,) = (a for a in node.args[1:] if isinstance(a, Constant))
        return 4 + kernel.value.size // kernel.shape[node.params["dimension_numbers"].rhs_spec[0]]
    # A sum has at most as many terms as there are entries of either factor.
    return 4 + min(math.prod(a.shape) for a in node.args if a.shape)


def apply(node: Operation, stacks: Mapping[Operation, Stack], *, absolute: bool = False) -> Stack:
    """The linear part of an operation, on stacks.

    Args:
      node: linear.
      stacks: of its inputs; what is not there is zero.
      absolute: take absolute values of constants, and add where the operation subtracts.
    """
    k = len(next(iter(stacks.values())))
    zero = np.float64(0)
    args = [
        a
        if isinstance(a, Constant)
        else stacks[a]
        if a in stacks
        else np.broadcast_to(zero, (k, *a.shape))
        for a in node.args
    ]
    rule = _NUMPY.get(node.op)
    if node.op == "conv_general_dilated" and not (
        isinstance(args[1], Constant) and node.params["batch_group_count"] == 1
    ):
        rule = None
    if rule is None:
        return _by_jax(node, args, absolute)
    return rule(node.params, args, (k, *node.shape), absolute)


def products(order: Sequence[Operation], combine: Callable, source: Operation) -> Products:
    """What the linear operations ``order`` make of a source, as products with vectors.

    Args:
      order: the operations between the source and what ``combine`` takes, in the order of the
        graph; what does not come from the source is zero.
      combine: {operation: array} and whether absolute values are meant -> list of arrays.
      source: the variable.
    """
    absolute = [False, True]
    values = [[_value(node, i, sign) for node in order for i in range(len(node.args))]
              for sign in absolute]  # fmt: skip

    def run(constants, x, sign):
        known, given = {source: x}, iter(constants)
        for node in order:
            own = [next(given) for _ in node.args]
            if any(a in known for a in node.args):
                args = [
                    known[a] if a in known else jnp.zeros(a.shape) if c is None else c
                    for a, c in zip(node.args, own, strict=True)
                ]
                known[node] = _bound(node, args, sign)
        return jnp.concatenate([jnp.ravel(y) for y in combine(known, sign)])

    with on_host():
        x = jax.ShapeDtypeStruct(source.shape, np.float64)
        forward = [jax.jit(jax.vmap(partial(run, sign=sign), (None, 0))) for sign in absolute]

        def transposed(constants, y, sign):
            return jax.linear_transpose(partial(run, constants, sign=sign), x)(y)[0]

        backward = [jax.jit(jax.vmap(partial(transposed, sign=sign), (None, 0)))
                    for sign in absolute]  # fmt: skip

    def call(function, constants, x, shape):
        with on_host():
            return np.asarray(function(constants, x.reshape(-1, *shape))).reshape(len(x), -1)

    rows = call(forward[1], values[1], np.ones((1, source.size)), source.shape)
    columns = call(backward[1], values[1], np.ones_like(rows), rows.shape[1:])
    # Sums of a row or column have no more terms than there are roundings on any way.
    uses = sum(len(node.args) for node in order)
    terms = 16 + uses + sum(rounding_terms(a) + _transposed_terms(a) for a in order)
    top = math.sqrt(float(np.max(rows, initial=0.0)) * float(np.max(columns, initial=0.0)))
    return Products(
        lambda x: call(forward[0], values[0], x, source.shape),
        lambda y: call(backward[0], values[0], y, rows.shape[1:]),
        source.size,
        top * (1 + gamma(terms)) * (1 + 8 * UNIT),
        terms,
    )


def _transposed_terms(node: Operation) -> int:
    """As ``rounding_terms``, of the transpose."""
    constants = [a for a in node.args if isinstance(a, Constant)]
    if node.op in (*_ENTRYWISE, "neg", "select_n", "reduce_sum", "concatenate", "stack", "pad"):
        return 0
    if node.op == "broadcast_in_dim":
        return node.size // max(1, node.inputs[0].size)
    if node.op in _INDEXING:
        return 0
    if node.op in ("dot_general", "conv_general_dilated"):
        return 4 + min(constants[0].value.size, node.size)
    return 4 + node.size


def permuted(node: Operation, x: np.ndarray) -> np.ndarray:
    """What an indexing operation makes of an array."""
    return apply(node, {node.inputs[0]: x[None]})[0]


def _axes(axes) -> tuple[int, ...]:
    return tuple(int(a) + 1 for a in axes)


def _broadcast(params, args, shape, absolute):
    del absolute
    (x,) = args[:1]
    places = _axes(params["broadcast_dimensions"])
    sizes = dict(zip(places, x.shape[1:], strict=True))
    x = x.reshape(len(x), *[sizes.get(i, 1) for i in range(1, len(shape))])
    return np.broadcast_to(x, shape)


def _slice(params, args, shape, absolute):
    del shape, absolute
    strides = params["strides"] or [1] * len(params["start_indices"])
    index = map(slice, params["start_indices"], params["limit_indices"], strides)
    return args[0][(slice(None), *index)]


def _dynamic_slice(params, args, shape, absolute):
    del params, absolute
    starts = [
        int(np.clip(int(s.array), 0, size - n))
        for s, size, n in zip(args[1:], args[0].shape[1:], shape[1:], strict=True)
    ]
    index = (slice(s, s + n) for s, n in zip(starts, shape[1:], strict=True))
    return args[0][(slice(None), *index)]


def _signed_sum(sign):
    def add(params, args, shape, absolute):
        del params
        out = np.zeros(shape)
        for x, s in zip(args, (1, 1 if absolute else sign), strict=True):
            if not isinstance(x, Constant):
                out += s * x
        return out

    return add


def _factor(c: Constant, absolute: bool) -> np.ndarray:
    return np.abs(c.array) if absolute else c.array


def _mul(params, args, shape, absolute):
    del params
    x, c = args[::-1] if isinstance(args[0], Constant) else args
    return np.broadcast_to(x * _factor(c, absolute), shape)


def _div(params, args, shape, absolute):
    del params
    return np.broadcast_to(args[0] / _factor(args[1], absolute), shape)


def _select(params, args, shape, absolute):
    del params, absolute
    which = np.broadcast_to(args[0].array, shape)
    out = np.zeros(shape)
    for i, x in enumerate(args[1:]):
        if not isinstance(x, Constant):
            np.copyto(out, x, where=which == i)
    return out


def _concatenate(params, args, shape, absolute):
    del absolute
    axis, at, out = params["dimension"] + 1, 0, np.zeros(shape)
    for x in args:
        constant = isinstance(x, Constant)
        n = x.shape[axis - 1] if constant else x.shape[axis]
        if not constant:
            out[(slice(None),) * axis + (slice(at, at + n),)] = x
        at += n
    return out


def _stack(params, args, shape, absolute):
    del absolute
    axis, out = params["axis"] + 1, np.zeros(shape)
    for i, x in enumerate(args):
        if not isinstance(x, Constant):
            out[(slice(None),) * axis + (i,)] = x
    return out


def _reverse(params, args, shape, absolute):
    del shape, absolute
    return np.flip(args[0], _axes(params["dimensions"]))


def _cumsum(params, args, shape, absolute):
    del shape, absolute
    x, axis = args[0], params["axis"] + 1
    if params["reverse"]:
        return np.flip(np.cumsum(np.flip(x, axis), axis), axis)
    return np.cumsum(x, axis)


def _dot(params, args, shape, absolute):
    (contract, batch) = params["dimension_numbers"]
    left = isinstance(args[1], Constant)
    x, c = args if left else args[::-1]
    c = _factor(c, absolute)
    (cx, cc), (bx, bc) = (contract, batch) if left else (contract[::-1], batch[::-1])
    free_x = [a for a in range(x.ndim - 1) if a not in (*cx, *bx)]
    free_c = [a for a in range(c.ndim) if a not in (*cc, *bc)]
    # To matrices: (batch, k * free, contracted) times (batch, contracted, free).
    sizes_b = [c.shape[a] for a in bc]
    n_contract = math.prod(c.shape[a] for a in cc)
    sizes_x, sizes_c = [x.shape[a + 1] for a in free_x], [c.shape[a] for a in free_c]
    k, n_b = len(x), math.prod(sizes_b)
    x = x.transpose(*_axes(bx), 0, *_axes(free_x), *_axes(cx)).reshape(n_b, -1, n_contract)
    c = c.transpose(*bc, *cc, *free_c).reshape(n_b, n_contract, -1)
    y = (x @ c).reshape(*sizes_b, k, *sizes_x, *sizes_c)
    y = np.moveaxis(y, len(sizes_b), 0)
    if not left:  # free axes of the constant come first
        n, m = len(sizes_b), len(sizes_x)
        order = [*range(n + 1), *range(n + 1 + m, y.ndim), *range(n + 1, n + 1 + m)]
        y = y.transpose(order)
    return y.reshape(shape)


def _padded(x: np.ndarray, edges: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """With zeros (low, high, between) each two entries, axis by axis; negative ones cut off."""
    for axis, (low, high, between) in enumerate(edges):
        if (low, high, between) == (0, 0, 0):
            continue
        shape = list(x.shape)
        n = max(0, (shape[axis] - 1) * (between + 1) + 1)
        shape[axis] = max(0, low) + n + max(0, high)
        wide, lead = np.zeros(shape), (slice(None),) * axis
        wide[(*lead, slice(max(0, low), max(0, low) + n, between + 1))] = x
        x = wide[(*lead, slice(max(0, -low), shape[axis] - max(0, -high)))]
    return x


def _pad(params, args, shape, absolute):
    del shape, absolute
    return _padded(args[0], [(0, 0, 0), *params["padding_config"]])


def _convolution(params, args, shape, absolute):
    """Windows as rows of a matrix, some of the stack at a time, times the kernel as another."""
    lhs, rhs, out = params["dimension_numbers"]
    groups, n = params["feature_group_count"], len(params["window_strides"])
    edges = zip(*zip(*params["padding"], strict=True), params["lhs_dilation"], strict=True)
    x = args[0].transpose(0, lhs[0] + 1, *_axes(lhs[2:]), lhs[1] + 1)  # (k, batch, *space, in)
    x = _padded(x, [(0, 0, 0)] * 2 + [(low, high, d - 1) for low, high, d in edges])
    kernel = _factor(args[1], absolute).transpose(rhs)
    widths = [
        (w - 1) * d + 1 for w, d in zip(kernel.shape[2:], params["rhs_dilation"], strict=True)
    ]
    kernel = kernel.reshape(groups, kernel.shape[0] // groups, -1).swapaxes(1, 2)
    sizes = [shape[a + 1] for a in out[2:]]
    y = np.zeros((len(x), x.shape[1] * math.prod(sizes), groups, kernel.shape[2]))
    if y.size:
        x = x.reshape(*x.shape[:-1], groups, -1)
        windows = sliding_window_view(x, widths, tuple(range(2, n + 2)))
        every = [slice(None, None, stride) for stride in params["window_strides"]]
        within = [slice(None, None, dilation) for dilation in params["rhs_dilation"]]
        windows = windows[(slice(None), slice(None), *every, ..., *within)]
        windows = np.moveaxis(windows, n + 2, 1)  # (k, groups, batch, *space, in, *window)
        step = max(1, _MOST_WINDOWS * len(x) // max(1, windows.size))
        for i in range(0, len(x), step):
            rows = windows[i : i + step].reshape(-1, groups, y.shape[1], kernel.shape[1])
            y[i : i + step] = (rows @ kernel).swapaxes(1, 2)
    y = y.reshape(*x.shape[:2], *sizes, groups * kernel.shape[2])
    return y.transpose(0, *_axes(np.argsort([out[0], *out[2:], out[1]])))


def _window_sum(params, args, shape, absolute):
    del shape, absolute
    edges = zip(*zip(*params["padding"], strict=True), params["base_dilation"], strict=True)
    x = _padded(args[0], [(0, 0, 0), *((low, high, d - 1) for low, high, d in edges)])
    dilations, axes = params["window_dilation"], tuple(range(1, x.ndim))
    widths = [(w - 1) * d + 1 for w, d in zip(params["window_dimensions"], dilations, strict=True)]
    steps = [slice(None, None, step) for step in (*params["window_strides"], *dilations)]
    windows = sliding_window_view(x, widths, axes)[(slice(None), *steps)]
    return np.sum(windows, tuple(range(x.ndim, windows.ndim)))


_NUMPY: dict[str, Callable[..., Stack]] = {
    "reshape": lambda p, a, shape, _: a[0].reshape(shape),
    "squeeze": lambda p, a, shape, _: a[0].reshape(shape),
    "expand_dims": lambda p, a, shape, _: a[0].reshape(shape),
    "transpose": lambda p, a, shape, _: a[0].transpose(0, *_axes(p["permutation"])),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _reverse,
    "neg": lambda p, a, shape, absolute: a[0] if absolute else -a[0],
    "add": _signed_sum(1),
    "add_any": _signed_sum(1),
    "sub": _signed_sum(-1),
    "mul": _mul,
    "div": _div,
    "select_n": _select,
    "concatenate": _concatenate,
    "stack": _stack,
    "reduce_sum": lambda p, a, shape, _: np.sum(a[0], _axes(p["axes"])),
    "cumsum": _cumsum,
    "dot_general": _dot,
    "pad": _pad,
    "reduce_window_sum": _window_sum,
    "conv_general_dilated": _convolution,
}
# (operand, indices, updates): linear in both others, at constant indices.
_SCATTER = {"scatter", "scatter-add"}
# How many of the first arguments of a linear primitive may depend on x.
_LINEAR = {
    **dict.fromkeys(("add", "add_any", "sub", "concatenate", "stack"), _ANY),
    **dict.fromkeys(
        (
            "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice",
            "dynamic_slice", "rev", "neg", "div", "reduce_sum", "cumsum", "reduce_window_sum",
            "gather", "split",
        ),
        1,
    ),
    "pad": 2,
    "dynamic_update_slice": 2,
}  # fmt: skip
_INDEXING = {
    "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice",
    "dynamic_slice", "rev", "split",
}  # fmt: skip
_ENTRYWISE = {"add", "add_any", "sub", "mul", "div"}


_FACTORS = {"mul", "div", "dot_general", "conv_general_dilated"}


def _value(node: Operation, i: int, absolute: bool) -> np.ndarray | None:
    """A constant argument of the linear part, in float64; None of what is no constant."""
    c = node.args[i]
    if isinstance(c, Operation):
        return None
    if not jnp.issubdtype(c.value.dtype, jnp.floating):
        return np.asarray(c.value)
    x = _factor(c, absolute) if node.op in _FACTORS else np.zeros(c.shape)
    elementwise = node.op in ELEMENTWISE
    return np.broadcast_to(x, node.shape) if elementwise else x


def _bound(node: Operation, args: Sequence[Any], absolute: bool) -> Any:
    """The primitive itself on these, with all floats in float64."""
    if absolute and node.op in ("sub", "neg"):
        return args[0] + args[1] if node.op == "sub" else args[0]
    params = dict(node.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = np.dtype(np.float64)
    if params.get("fill_value") is not None:
        params["fill_value"] = 0.0
    primitive = node.primitive
    assert primitive is not None
    y = primitive.bind(*map(jnp.asarray, args), **params)
    return y[node.out] if primitive.multiple_results else y


def _by_jax(node: Operation, args, absolute) -> Stack:
    stacked = [not isinstance(x, Constant) for x in args]
    with on_host():
        values = [_value(node, i, absolute) for i in range(len(args))]

        def run(*stacks):
            given = iter(stacks)
            full = [next(given) if s else x for x, s in zip(values, stacked, strict=True)]
            return _bound(node, full, absolute)

        return np.asarray(jax.vmap(run)(*(x for x, s in zip(args, stacked, strict=True) if s)))
