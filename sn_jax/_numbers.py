"""Where what a program computes is a real number because its variable is: by structure alone.

``isnan`` and ``isfinite`` of such values are known. Of others they are not, since x decides.
What masks make -inf is no number, but for no x either.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Defined for every real argument.
ANYWHERE = {
    "abs", "add", "add_any", "asinh", "atan", "atan2", "broadcast_in_dim", "cbrt", "ceil",
    "clamp", "concatenate", "conv_general_dilated", "convert_element_type", "cos", "cosh",
    "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "dot_general", "dynamic_slice",
    "dynamic_update_slice", "erf", "erfc", "exp", "exp2", "expand_dims", "expm1", "floor",
    "length", "log_cosh", "logistic", "logsumexp", "max", "min", "mul", "neg", "pad",
    "reduce_max", "reduce_min", "reduce_prod", "reduce_sum", "reduce_window_max",
    "reduce_window_min", "reduce_window_sum", "reshape", "rev", "round", "scatter",
    "scatter-add", "select_and_gather_add", "select_and_scatter_add", "select_n", "sign",
    "sin", "sinh", "slice", "softmax", "softplus", "sort", "split", "square", "squeeze",
    "stack", "sub", "tanh", "top_k", "transpose", "trunc", "var", "x",
}  # fmt: skip
# Some truth value, whatever their arguments are.
PREDICATES = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "xor", "is_finite"}
# What is no number among their arguments is none in the result either, and infinite stays infinite.
_CARRIES = {"abs", "add", "add_any", "mul", "neg", "square", "sub"}
# Above what they are defined; the first two at it too.
_FROM = {"sqrt": 0.0, "pow": 0.0, "log": 0.0, "log1p": -1.0, "rsqrt": 0.0, "integer_pow": 0.0}
_LEAST = {"square": 0.0, "abs": 0.0, "exp": 0.0, "exp2": 0.0, "logistic": 0.0, "erfc": 0.0,
          "softmax": 0.0, "softplus": 0.0, "length": 0.0, "cosh": 1.0, "tanh": -1.0, "erf": -1.0,
          "sin": -1.0, "cos": -1.0, "expm1": -1.0}  # fmt: skip
_INDEXES = {"broadcast_in_dim", "convert_element_type", "dynamic_slice", "expand_dims", "reshape",
            "rev", "slice", "squeeze", "transpose"}  # fmt: skip
_SORTS = {"cummax", "cummin", "reduce_max", "reduce_min", "sort", "split"}
_ALIASES = {"larger": "max", "smaller": "min"}  # as they are recognized
_SUMS = {"cumsum", "dot_general", "mul", "reduce_sum", "reduce_window_sum"}


def is_number(op: str, args: Sequence[Any], params: Mapping[str, Any]) -> bool:
    """Whether the result is, but for entries that are -inf whatever x is (``lost`` says which), by
    the attributes ``number``, ``lost`` and ``least`` of the arguments."""
    op = _ALIASES.get(op, op)
    if op in PREDICATES:
        return True
    if not all(a.number for a in args):
        return False
    if any(a.lost is not None for a in args):
        return _may_be_lost(op, args, params)
    if op == "div":
        return args[1].least > 0 or args[1].nonzero
    if op == "normalize":
        return math.isfinite(params["lipschitz"])
    if op == "rem":
        return args[1].nonzero
    if op == "gather":
        return _is_in_bounds(args[0], args[1], params)
    if op == "loop":
        return params["real"]
    if (op == "integer_pow" and params["y"] >= 0) or op in ANYWHERE:
        return True
    if op not in _FROM:
        return False
    at_it = op == "sqrt" or (op == "pow" and args[1].least >= 0)
    return args[0].least > _FROM[op] or (at_it and args[0].least == 0)


def _is_in_bounds(x: Any, indices: Any, params: Mapping[str, Any]) -> bool:
    """Whether no entry is filled with NaN because its index is out of bounds."""
    if "FILL" not in str(params["mode"]):
        return True
    axes = list(params["dimension_numbers"].start_index_map)
    most = np.subtract(x.shape, params["slice_sizes"])[axes]
    return indices.constant and bool(np.all((indices.array >= 0) & (indices.array <= most)))


def _may_be_lost(op: str, args: Sequence[Any], params: Mapping[str, Any]) -> bool:
    """Whether -inf among the arguments, numbers else, leaves -inf and numbers only."""
    if op == "select_n":
        return args[0].constant
    if op == "sub":
        return args[1].lost is None
    if op == "logsumexp":
        return not bool(np.all(args[0].lost, tuple(params["axes"])).any())
    if op == "softmax":  # no group is lost altogether
        groups = params["groups"].array
        return bool(np.isin(groups, groups[~args[0].lost]).all())
    return op in _INDEXES or op in ("add", "exp", "max", "reduce_max")


def lost(
    op: str, args: Sequence[Any], params: Mapping[str, Any], shape: tuple[int, ...]
) -> np.ndarray | None:
    """The entries that are -inf whatever x is, as they are after masks; None: there is none.

    Of indexing it is the argument's, which is indexed elsewhere.
    """
    op = _ALIASES.get(op, op)
    each = [None if a.lost is None else np.broadcast_to(a.lost, a.shape) for a in args]
    if all(e is None for e in each) or op in ("exp", "softmax", "logsumexp"):
        return None
    here = [np.zeros(a.shape, bool) if e is None else e for a, e in zip(args, each, strict=True)]
    if op == "reduce_max":
        return _any(np.all(here[0], tuple(int(axis) for axis in params["axes"])))
    if op == "select_n":
        which = np.broadcast_to(args[0].array, shape).astype(int)
        return _any(np.choose(which, [np.broadcast_to(e, shape) for e in here[1:]]))
    if op in ("max", "add", "sub"):
        both = [np.broadcast_to(e, shape) for e in here]
        return _any(np.logical_and(*both) if op == "max" else np.logical_or(*both))
    return each[0]


def _any(x: np.ndarray) -> np.ndarray | None:
    return x if x.any() else None


def least(op: str, args: Sequence[Any], params: Mapping[str, Any]) -> float:
    """A number that no entry of the result is below; -inf where none is known."""
    op = _ALIASES.get(op, op)
    if op in _LEAST:
        return _LEAST[op]
    if op == "integer_pow" and params["y"] % 2 == 0:
        return 0.0
    lows = [a.least for a in args]
    if op in _INDEXES:
        return lows[0]
    if op == "max" and all(a.lost is None for a in args):
        return max(lows)
    if op in _SORTS or op in ("concatenate", "stack", "pad", "min", "max"):
        return min(lows)
    if op == "select_n":
        return min(lows[1:])
    if op == "clamp":
        return lows[0]
    if op in ("add", "add_any"):
        return sum(lows)
    if op == "sqrt":
        return math.sqrt(max(lows[0], 0.0))
    if op == "log1p" and lows[0] >= 0:
        return 0.0
    if (op in _SUMS or op == "div") and min(lows) >= 0:
        return 0.0
    return -math.inf


def is_real(a: Any) -> bool:
    """Whether every entry is a number for every x."""
    return a.number and a.lost is None


def is_lost_with(value: Any, guarded: Any) -> bool:
    """Whether ``value`` is no real number wherever ``guarded`` is none, both of the same places."""
    origins, carried = set(), set()
    todo = [guarded]
    while todo:
        a = todo.pop()
        if is_real(a) or a in origins:
            continue
        if not a.constant and a.op in _CARRIES:
            todo += a.args
        else:
            origins.add(a)
    todo = [value]
    while todo:
        a = todo.pop()
        if is_real(a) or a in carried:
            continue
        carried.add(a)
        if not a.constant and a.op in _CARRIES:
            todo += a.args
    return origins <= carried
