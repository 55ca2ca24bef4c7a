r"""Operations that have a Lipschitz constant only together, recognized by their structure.

Softmax, logsumexp, lengths and normalization of groups (layer, group and RMS norms, l2), the
larger of two: all
by what is computed from what, whatever library wrote it. That groups agree (what is summed, and
over what the result is spread) is checked entry by entry, on numbers of entries. What is not
matched stays as it is, so that a pattern missed costs tightness and nothing else.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from sn_jax._pieces import ELEMENTWISE, Constant, Operation, is_indexing, permuted, roots

# An expression: (operation, *arguments), with numbers and sums (operations) at its leaves.
_Tree = Any


def recognized(builder, op: str, args, params, shape) -> Operation | Constant | None:
    """What equals this operation and has a constant of its own, or is made of what has; or None."""
    varying = [a for a in args if isinstance(a, Operation)]
    if op == "abs" and varying and _is_positive(varying[0]):
        return varying[0]
    if op == "sign" and varying and _is_positive(varying[0], strictly=True):
        return builder.constant(np.ones(shape, varying[0].dtype))
    if op == "log" and varying:
        return _logarithm(builder, varying[0])
    if op == "sqrt" and varying:
        return _length(builder, varying[0])
    if op == "div" and isinstance(args[1], Operation):
        return _quotient(builder, *args)
    if op == "mul" and len(varying) == 2:
        return _scaled(builder, *varying)
    if op in ("max", "min") and len(varying) == 2:
        node = Operation(op, tuple(args), params, shape, varying[0].dtype, varying[0].where)
        if next(roots(node), None) is None:
            return _larger(builder, op, *varying)
    return None


def _is_positive(a: Operation, strictly: bool = False) -> bool:
    """Whether no value is negative, nor zero if asked."""
    if is_indexing(a.op):
        return _is_positive(a.inputs[0], strictly)
    if a.op in ("reduce_sum", "reduce_max"):
        (inner,) = a.inputs
        found = _exponential(inner) if a.op == "reduce_sum" else None
        if found is not None:
            return not strictly or bool(np.sum(found[1], a.params["axes"]).all())
        return _is_positive(inner, strictly)
    return a.op in ("exp", "logistic") or (a.op in ("square", "abs") and not strictly)


def _larger(builder, op: str, a: Operation, b: Operation) -> Operation:
    """max and min of the same two differ from their mean by the same ``|a - b| / 2``."""
    key = sorted((a, b), key=id)
    gap = builder.operation("half_gap", key, {}, a.shape, a.dtype, builder.here)
    return builder.operation(
        "larger" if op == "max" else "smaller", (a, b), {"gap": gap}, a.shape, a.dtype, builder.here
    )


# Indices: of which entry of what each entry of an operation is.


def _source(node: Operation, bijective: bool = False) -> tuple[Operation, np.ndarray]:
    """(the operation that only indexing leads from, the number of its entry in each place)."""
    if is_indexing(node.op):
        inner = node.inputs[0]
        if not bijective or (node.op in _BIJECTIVE and inner.size == node.size):
            base, entries = _source(inner, bijective)
            return base, permuted(node, entries)
    return node, _numbers(node.shape)


_BIJECTIVE = {"reshape", "transpose", "squeeze", "expand_dims", "rev", "broadcast_in_dim"}


def _numbers(shape) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=float).reshape(shape)


def _summed(total: Operation) -> np.ndarray:
    """Of a sum: the number of the group that each entry of its argument is in."""
    shape = total.inputs[0].shape
    kept = [1 if i in total.params["axes"] else n for i, n in enumerate(shape)]
    return np.broadcast_to(_numbers(total.shape).reshape(kept), shape)


def _members(total: Operation, function: Operation) -> tuple[Operation, np.ndarray]:
    """(what a sum of a function of entries is of, the group of each of its entries)."""
    _, outside = _source(total.inputs[0], bijective=True)
    base, inside = _source(function.inputs[0], bijective=True)
    group = np.empty(base.size)
    group[inside.ravel()[outside.ravel().astype(int)].astype(int)] = _summed(total).ravel()
    return base, group


def _exponential(node: Operation) -> tuple[Operation, np.ndarray] | None:
    """(e, weights >= 0) of ``e = exp(..)`` with constant weights, as masks are; None of others."""
    if node.op == "exp":
        return node, np.ones(node.shape)
    inner = [a for a in node.inputs if a.op == "exp" and a.shape == node.shape]
    if len(inner) != 1 or len(node.operands) != 1:
        return None
    (e,) = inner
    weights = None
    if node.op == "select_n":
        which, *cases = node.args
        place = cases.index(e)
        if all(case is e or case.uniform() == 0 for case in cases):  # type: ignore
            weights = np.broadcast_to(which.array == place, node.shape).astype(float)  # type: ignore
    elif node.op == "mul":
        (c,) = (a for a in node.args if isinstance(a, Constant))
        weights = np.broadcast_to(c.array, node.shape)
    if weights is None or not np.all((weights >= 0) & np.isfinite(weights)):
        return None
    return e, weights


def _is_lowest(t: Operation | Constant) -> np.ndarray:
    """Where it is minus infinity, as constants that masks put there."""
    if isinstance(t, Constant):
        return t.array == -math.inf
    if t.op in ("add", "sub"):
        parts = [_is_lowest(a) for a in (t.args if t.op == "add" else t.args[:1])]
        return np.broadcast_to(np.any(np.broadcast_arrays(*parts), axis=0), t.shape)
    if t.op == "select_n" and isinstance(t.args[0], Constant):
        which = t.args[0].array
        parts = [(which == i) & _is_lowest(a) for i, a in enumerate(t.args[1:])]
        return np.broadcast_to(np.any(np.broadcast_arrays(*parts), axis=0), t.shape)
    return np.zeros(t.shape, bool)


def _same_difference(a: Operation, b: Operation) -> bool:
    """Whether both are the same array less the same expression, spread alike."""
    found = []
    for node in (a, b):
        if node.op != "sub" or len(node.inputs) != 2:
            return False
        x, shift = node.operands
        spread = _expression(shift)
        if spread is None:
            return False
        source, entries = _source(x)
        found.append((source, *spread, entries))
    (source, tree, groups, entries), (source_b, tree_b, groups_b, entries_b) = found
    return (
        source is source_b
        and tree == tree_b
        and np.array_equal(groups, groups_b)
        and np.array_equal(entries, entries_b)
    )


def _is_constant_on(m: Operation | Constant, groups: np.ndarray) -> bool:
    if isinstance(m, Constant):
        return m.uniform() is not None
    _, entries = _source(m)
    order = np.unique(groups, return_index=True)[1]
    first = dict(zip(groups.flat[order], entries.flat[order], strict=True))
    return all(first[g] == e for g, e in zip(groups.flat, entries.flat, strict=True))


# Expressions of sums.


def _expression(node: Operation) -> tuple[_Tree, np.ndarray] | None:
    """(an expression of sums, the number of the sum's entry in each place), if it is one."""
    if is_indexing(node.op):
        inner = _expression(node.inputs[0])
        return inner and (inner[0], permuted(node, inner[1]))
    if node.op == "reduce_sum":
        return node, _numbers(node.shape)
    if node.op == "length":
        return node.params["tree"], _numbers(node.shape)
    if node.op not in ELEMENTWISE or not node.inputs:
        return None
    parts, groups = [], None
    for a in node.args:
        if isinstance(a, Constant):
            number = a.uniform()
            if number is None or not math.isfinite(number):
                return None
            parts.append(number)
            continue
        inner = _expression(a)
        if inner is None or (groups is not None and not np.array_equal(groups, inner[1])):
            return None
        parts.append(inner[0])
        groups = inner[1]
    assert groups is not None
    return (_with_power(node), *parts), groups


def _with_power(node: Operation) -> str:
    return f"power{node.params['y']}" if node.op == "integer_pow" else node.op


def _multiple(tree: _Tree) -> tuple[Fraction, Operation] | None:
    """(c, sum) of c times a sum, exactly."""
    if isinstance(tree, Operation):
        return Fraction(1), tree
    if not isinstance(tree, tuple):
        return None
    op, *args = tree
    numbers = [a for a in args if isinstance(a, float)]
    rest = [_multiple(a) for a in args if not isinstance(a, float)]
    if len(rest) != 1 or rest[0] is None:
        return None
    c, total = rest[0]
    if op == "neg":
        return -c, total
    if op == "mul":
        return c * Fraction(numbers[0]), total
    if op == "div" and isinstance(args[1], float) and numbers[0] != 0:
        return c / Fraction(numbers[0]), total
    return None


def _take(tree: _Tree, op: str) -> tuple[_Tree, float] | None:
    """(expression, number) of ``op`` between the two, in whatever order."""
    if isinstance(tree, tuple) and tree[0] == op and len(tree) == 3:
        a, b = tree[1:]
        if isinstance(a, float) and not isinstance(b, float):
            return b, a
        if isinstance(b, float) and not isinstance(a, float):
            return a, b
    return None


def _root_of(tree: _Tree) -> tuple[_Tree, float] | None:
    """(q, s) of an expression that is at least s and behaves like ``sqrt(q)`` beyond: the map
    ``u / expression`` is 1/s-Lipschitz where q is a multiple of ``|u|^2``."""
    if not isinstance(tree, tuple):
        return None
    for op in ("max", "add"):
        found = _take(tree, op)
        if found and isinstance(found[0], tuple) and found[0][0] == "sqrt" and found[1] >= 0:
            return found[0][1], found[1]
    if tree[0] == "sqrt":
        return _under_root(tree[1])
    return None


def _under_root(tree: _Tree) -> tuple[_Tree, float]:
    for op in ("max", "add"):
        found = _take(tree, op)
        # max(0, q) is q, which is no negative number.
        if found and found[1] > 0:
            return found[0], math.sqrt(found[1]) * (1 - 2**-50)
    return tree, 0.0


def _reciprocal_root(tree: _Tree) -> tuple[_Tree, float] | None:
    if not isinstance(tree, tuple):
        return None
    if tree[0] == "rsqrt":
        return _under_root(tree[1])
    if tree[0] == "pow" and tree[2] == -0.5:
        return _under_root(tree[1])
    if tree[0] == "div" and tree[1] == 1:
        return _root_of(tree[2])
    if tree[0] == "power-1":
        return _root_of(tree[1])
    return None


# The patterns.


def _quotient(builder, a, b: Operation):
    """Softmax, or a normalized group: ``a / b``."""
    if not isinstance(a, Operation):
        return None
    found = _expression(b)
    if found is None:
        return None
    tree, groups = found
    for core, factors in _with_and_without_factors(builder, a):
        result = None
        if isinstance(tree, Operation):
            result = _softmax(builder, core, tree, groups)
        elif (parts := _root_of(tree)) is not None:
            result = _normalized(builder, core, *parts, groups)
        if result is not None:
            return _times(builder, result, factors)
    return None


def _scaled(builder, a: Operation, b: Operation):
    """The same, as a product with a reciprocal, and constant factors anywhere."""
    for whole, scale in ((a, b), (b, a)):
        scale, more = _without_factors(builder, scale)
        found = _expression(scale)
        if found is None or whole.shape != scale.shape:
            continue
        tree, groups = found
        parts = _reciprocal_root(tree)
        for u, factors in _with_and_without_factors(builder, whole):
            result = None
            if parts is not None:
                result = _normalized(builder, u, *parts, groups)
            elif isinstance(tree, tuple):
                total = tree[1] if tree[0] == "power-1" else tree[-1]
                if tree[0] == "power-1" or tree[:2] == ("div", 1.0):
                    result = _softmax(builder, u, total, groups)
            if result is not None:
                return _times(builder, result, [*factors, *more])
    return None


def _with_and_without_factors(builder, a: Operation):
    """Of what a group is made, any of its factors may be a part: each of (b, factors of b in a)."""
    found = [(a, [])]
    if is_indexing(a.op):  # what moves entries moves their factors
        core, factors = _without_factors(builder, a)
        return found if core is a else [*found, (core, factors)]
    while (step := _factor(builder, a)) is not None:
        a, factor = step
        found.append((a, [factor, *found[-1][1]]))
    core, factors = _without_factors(builder, a)
    return found if core is a else [*found, (core, [*factors, *found[-1][1]])]


def _factor(builder, a: Operation) -> tuple[Operation, tuple[str, Constant]] | None:
    """(b, the one constant that it is multiplied by or divided by to give a), if there is one."""
    if a.op == "neg":
        return a.inputs[0], ("mul", builder.constant(np.float64(-1)))
    if a.op in ("mul", "div") and len(a.inputs) == 1:
        (inner,) = a.inputs
        (factor,) = [c for c in a.args if c is not inner] or [None]
        if isinstance(factor, Constant) and not (a.op == "div" and a.args[0] is factor):
            return inner, (a.op, factor)
    return None


def _without_factors(builder, a: Operation) -> tuple[Operation, list[tuple[str, Constant]]]:
    """(b, constants that it is multiplied by or divided by to give a), through indexing."""
    if (step := _factor(builder, a)) is not None:
        core, factors = _without_factors(builder, step[0])
        return core, [*factors, step[1]]
    if is_indexing(a.op):
        inner, factors = _without_factors(builder, a.inputs[0])
        if factors:
            core = builder.emit(
                a.op, [inner], a.params, a.shape, a.dtype, builder.here, a.primitive, a.out
            )
            moved = [
                (op, builder.constant(permuted(a, np.broadcast_to(c.array, inner.shape))))
                for op, c in factors
            ]
            return core, moved
    return a, []


def _times(builder, a, factors):
    for op, c in factors:
        a = builder.like(op, a, c)
    return a


def _softmax(builder, a: Operation, total: Any, groups: np.ndarray):
    """``exp(z) / sum(exp(z))``, also over some of the entries, with zeros in place of others."""
    if not isinstance(total, Operation):
        return None
    above = _exponential(a)
    below = _exponential(_source(total.inputs[0], bijective=True)[0])
    if above is None or below is None or above[0] is not below[0]:
        return None
    (e, above), (_, below) = above, below
    z, entries = _source(e.inputs[0], bijective=True)
    _, member = _members(total, e)
    if not np.array_equal(member[entries.astype(int)], groups):
        return None
    nothing = _is_lowest(e.inputs[0])
    if not np.all(nothing | (above == 0) | (above == below)):
        return None
    params = {"groups": builder.constant(groups)}
    z = _without_shift(e.inputs[0], groups)[0]
    out = builder.operation("softmax", [z], params, e.shape, e.dtype, builder.here)
    dropped = ~nothing & (above == 0) & (below > 0)
    if dropped.any():
        out = builder.like("mul", out, builder.constant(np.where(dropped, 0.0, 1.0)))
    return out


def _without_shift(t: Operation, groups: np.ndarray):
    """(z, m) of t = z - m, with m constant on each group; (t, None) where there is none."""
    if t.op == "sub" and isinstance(t.args[0], Operation) and _is_constant_on(t.args[1], groups):
        return t.args
    return t, None


def _logarithm(builder, a: Operation):
    """log(sum(exp(z - m))) is logsumexp(z) - m."""
    if is_indexing(a.op):
        inner = _logarithm(builder, a.inputs[0])
        return inner and builder.emit(
            a.op, [inner], a.params, a.shape, a.dtype, builder.here, a.primitive, a.out
        )
    if a.op == "exp":
        return a.inputs[0]
    found = _exponential(a.inputs[0]) if a.op == "reduce_sum" else None
    if found is None or not _is_positive(a, strictly=True):
        return None
    z, m = _without_shift(found[0].inputs[0], _summed(a))
    axes = tuple(int(axis) for axis in a.params["axes"])
    out = builder.operation("logsumexp", [z], {"axes": axes}, a.shape, a.dtype, builder.here)
    if isinstance(m, Constant):
        return builder.like("sub", out, m, shape=a.shape) if m.shape == () else None
    if m is None:
        return out
    limits = [1 if i in axes else n for i, n in enumerate(m.shape)]
    start = (0,) * len(limits)
    row = builder.like("slice", m, shape=tuple(limits), start_indices=start,
                       limit_indices=tuple(limits), strides=None)  # fmt: skip
    row = builder.like(
        "reshape", row, shape=a.shape, new_sizes=a.shape, dimensions=None, sharding=None
    )
    return builder.like("sub", out, row)


def _length(builder, a: Operation):
    """sqrt(k |u|^2 + eps) of groups, of as many as there are results."""
    found = _expression(a)
    if found is None:
        return None
    tree, groups = found
    squares = _multiple(_under_root(tree)[0])
    if squares is None or squares[0] <= 0:
        return None
    k, total = squares
    function, _ = _source(total.inputs[0], bijective=True)
    if function.op != "square" or not np.array_equal(groups.ravel(), np.arange(total.size)):
        return None
    u, member = _members(total, function)
    params = {
        "tree": ("sqrt", tree),
        "lipschitz": math.sqrt(k) * (1 + 2**-50),
        "groups": builder.constant(member),
    }
    return builder.operation("length", [u], params, a.shape, a.dtype, builder.here)


def _normalized(builder, u: Operation, tree: _Tree, least: float, groups: np.ndarray):
    """u / sqrt(k |u|^2 + eps) on groups, at most 1/sqrt(k) and with derivatives up to 1/least."""
    found = _take(tree, "max")
    if found and found[1] <= 0:  # a sum of squares is not negative
        tree = found[0]
    centered = isinstance(tree, tuple) and tree[0] == "sub"
    squares = _multiple(tree[1] if centered else tree)
    if squares is None or squares[0] <= 0:
        return None
    k, total = squares
    function, _ = _source(total.inputs[0], bijective=True)
    if function.op != "square":
        return None
    base, member = _members(total, function)
    own, entries = _source(u, bijective=True)
    if not centered and own is not base and _same_difference(own, base):
        own = base
    if centered:
        # E[x^2] - E[x]^2, for u = x - E[x].
        squared = isinstance(tree[2], tuple) and tree[2][0] == "square"
        mean = _multiple(tree[2][1]) if squared else None
        sizes = np.unique(member, return_counts=True)[1]
        if (
            mean is None
            or mean[0] != k
            or any(int(size) * k != 1 for size in sizes)
            or own.op != "sub"
        ):
            return None
        x, shift = own.args
        if not isinstance(shift, Operation) or not isinstance(x, Operation):
            return None
        spread = _expression(shift)
        if spread is None or _multiple(spread[0]) != mean:
            return None
        same, places = _source(x, bijective=True)
        summed, order = _source(mean[1].inputs[0], bijective=True)
        group = np.empty(summed.size)
        group[order.ravel().astype(int)] = _summed(mean[1]).ravel()
        at = places.astype(int)
        if not (same is base is summed and np.array_equal(group, member)
                and np.array_equal(member[at], spread[1])):  # fmt: skip
            return None
        entries = places.ravel()[entries.astype(int)]
    elif own is not base:
        return None
    if u.size != base.size or not np.array_equal(member[entries.astype(int)], groups):
        return None
    bound = math.sqrt(1 / k) * (1 + 2**-50)
    lipschitz = (1 / least) * (1 + 2**-50) if least > 0 else math.inf
    params = {"lipschitz": lipschitz, "bound": bound, "groups": builder.constant(groups)}
    return builder.operation("normalize", [u], params, u.shape, u.dtype, builder.here)
