"""What is known of the operations of a graph that are not linear: constants, slopes, ranges.

Each is a source of new directions for the linear pieces behind it. Its entries move by at most
what certain combinations of its arguments move by; and where the slopes lie between two numbers,
it is a multiple of its argument plus something that moves by less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sn_jax._balls import Ball, Balls
from sn_jax._numbers import is_real
from sn_jax._pieces import ELEMENTWISE, Constant, Operation, apply, is_indexing, is_linear, roots
from sn_jax._scalar import Node, Ref, Unknown
from sn_jax._slopes import Jump, slopes, slopes_on
from sn_jax._symbols import on_host

Interval = tuple[float, float]
_EVERYTHING = (-math.inf, math.inf)
# Different sets of constants in one elementwise function, each of which takes its own slopes.
_MOST_FUNCTIONS = 256
# Operations that are taken for one function together.
_MOST_TOGETHER = 40
_MARGIN = 1 + 2.0**-40
# Entries of a softmax whose Jacobian is formed.
_MOST_SOFTMAX = 1024
# Arguments of it that are less certain say nothing.
_WIDEST = 300.0


class Row(NamedTuple):
    """The sum of ``factor * argument``; factors are numbers, or arrays like the argument."""

    terms: tuple[tuple[Operation, Any], ...]

    @property
    def is_infinite(self) -> bool:
        return any(not np.all(np.isfinite(factor)) for _, factor in self.terms)


class Rows(NamedTuple):
    """What bounds how far values move: the length of rows stacked, or the sum of their lengths."""

    rows: tuple[Row, ...]
    added: bool = False


class Source(NamedTuple):
    """An operation that is not linear.

    Attributes:
      node: the operation.
      what: in words.
      factor: the constant that a table shows.
      rows: what moves by at least as much.
      linear: what it is a multiple of, up to ``rest``; None where there is no use in that.
      rest: of what is left, likewise.
      key: the operation that the rest belongs to; others share it up to its ``sign``.
      reason: why a constant is infinite.
      slopes: the least and the largest in the one operation of ``linear``; None of several.
      groups: of each entry, the group that it is in: the rest of a group moves by at most what the
        same entries of the rows do; None where only all together do.
    """

    node: Operation
    what: str
    factor: float
    rows: Rows
    linear: Row | None = None
    rest: Rows | None = None
    key: Operation | None = None
    sign: float = 1.0
    reason: str = ""
    slopes: tuple[Any, Any] | None = None
    groups: np.ndarray | None = None

    @property
    def entrywise(self) -> bool:
        """Whether every entry is a group of its own."""
        return self.groups is not None and np.array_equal(self.groups, _each(self.node))


# Rules of other primitives: (shapes and constants of its arguments, parameters) -> constant.
Rule = Callable[..., float]
RULES: dict[str, Rule] = {}


def region_root(node: Operation, users: Mapping[Operation, Sequence[Operation]]):
    """(root, the operations between it and ``node``) where that is a function of one number, the
    same in every place up to constants, and not linear; None where there is no such root."""
    if node.op not in ELEMENTWISE:
        return None
    if is_linear(node) and len(node.inputs) < 2:
        return None
    found = list(roots(node))
    if not found:
        return None
    inner = [_between(node, root) for root in found]
    # As one function as far up as constants are the same everywhere.
    last = max(
        [
            i
            for i, ops in enumerate(inner)
            if i == 0 or (len(ops) <= _MOST_TOGETHER and _is_uniform(ops))
        ]
    )
    if is_linear(node):
        # A sum of functions of one variable is one, unless these are needed by themselves.
        bends = [a for a in inner[last] if not is_linear(a)]
        if not bends or any(user not in inner[last] for a in bends for user in users[a]):
            return None
    while last and all(is_linear(a) for a in set(inner[last]) - set(inner[last - 1])):
        last -= 1
    return found[last], inner[last]


def _between(node: Operation, root: Operation) -> list[Operation]:
    """In order, ``node`` last."""
    seen, todo = set(), [node]
    while todo:
        a = todo.pop()
        if a is not root and a not in seen:
            seen.add(a)
            todo += a.inputs
    return sorted(seen, key=lambda a: a.depth)


def _is_uniform(ops: Sequence[Operation]) -> bool:
    return all(isinstance(c, Operation) or c.uniform() is not None for a in ops for c in a.args)


class Sources:
    """Finds sources and ranges, in the order of the graph; of its outputs only what they need.

    Args:
      outputs: of the graph.
      loop: what gives the constants of a loop, one for each of its arguments.
      balls: what values are possible, where x stays in a ball.
    """

    def __init__(
        self,
        outputs: Sequence[Operation],
        loop: Callable[[Operation], Sequence[float]],
        balls: Balls | None = None,
    ):
        self._loop, self.balls = loop, balls
        live, todo = set(), list(outputs)
        while todo:
            a = todo.pop()
            if a not in live:
                live.add(a)
                todo += a.inputs
        users: dict[Operation, list[Operation]] = {a: [] for a in live}
        for a in live:
            for b in a.inputs:
                users[b].append(a)
        self._regions = {}
        self.ranges: dict[Operation, Interval] = {}
        self.sources: dict[Operation, Source] = {}
        needed, todo = set(), list(outputs)
        while todo:
            a = todo.pop()
            if a in needed:
                continue
            needed.add(a)
            region = region_root(a, users)
            if region is not None:
                self._regions[a] = region
            todo += [region[0]] if region else a.inputs
        self.order = sorted(needed, key=lambda a: a.depth)
        for a in self.order:
            if a.op == "x":
                self.ranges[a] = _EVERYTHING
            elif a in self._regions:
                self._elementwise(a, *self._regions[a])
            elif is_linear(a):
                self.ranges[a] = self._linear_range(a)
                if balls:
                    balls.linear(a)
            else:
                self.sources[a], self.ranges[a] = self._joint(a)
            ball = balls and balls.get(a)
            if ball and balls and a.size:
                balls.clip(a, *self.ranges[a])
                self.ranges[a] = (max(self.ranges[a][0], float(ball.low.min())),
                                  min(self.ranges[a][1], float(ball.high.max())))  # fmt: skip

    def _elementwise(self, node: Operation, root: Operation, ops: list[Operation]) -> None:
        ball = self.balls and self.balls.get(root)
        if ball and self.balls:
            lows, highs, values, centre = _slopes_of(
                node, root, ops, self.ranges[root], (ball.low, ball.high)
            )
            if centre is not None and np.all(np.isfinite(lows)) and np.all(np.isfinite(highs)):
                middle, steepest = lows / 2 + highs / 2, np.maximum(np.abs(lows), np.abs(highs))
                off = np.maximum(highs - middle, middle - lows) * ball.half * _MARGIN
                # The middle itself is rounded.
                off = off + (centre[1] - centre[0]) + 2.0**-48 * np.abs(ball.centre) * steepest
                mid = centre[0] / 2 + centre[1] / 2 + middle * (ball.mid - ball.centre)
                off = off + 2.0**-48 * np.abs(middle) * (np.abs(ball.mid) + np.abs(ball.centre))
                self.balls.combined(node, mid, [(root, middle)], off)
        else:
            lows, highs, values, _ = _slopes_of(node, root, ops, self.ranges[root])
        self.ranges[node] = values
        steepest = np.maximum(np.abs(lows), np.abs(highs))
        finite = bool(np.all(np.isfinite(steepest)))
        names = list(dict.fromkeys(a.op for a in ops))
        steep = float(np.max(steepest, initial=0.0))
        low, high = np.min(lows, initial=math.inf), np.max(highs, initial=-math.inf)
        what = " ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        reason = (
            "" if finite else f"the slope of {what} is unbounded on {_range(self.ranges[root])}"
        )
        linear = rest = None
        if finite:
            middle = lows / 2 + highs / 2
            radius = np.maximum(highs - middle, middle - lows)
            radius = np.where(radius > 0, np.nextafter(radius, math.inf), 0.0)
            linear, rest = Row(((root, middle),)), Rows((Row(((root, radius),)),))
        what += f" [{low:.6g}, {high:.6g}]"
        rows = Rows((Row(((root, steepest),)),))
        self.sources[node] = Source(
            node, what, steep, rows, linear, rest, node, 1.0, reason,
            (lows, highs) if finite else None, _each(node),
        )  # fmt: skip

    def _joint(self, node: Operation) -> tuple[Source, Interval]:
        if node.op in RULES:
            return self._registered(node), _EVERYTHING
        if node.op == "loop":
            factors = self._loop(node)
            rows = [Row(((a, f),)) for a, f in zip(node.operands, factors, strict=True)]
            what = f"a loop of {len(node.params['steps'])} steps, bounded one by one"
            reason = "" if np.all(np.isfinite(factors)) else "a step of the loop is not bounded"
            source = Source(node, what, max(factors), Rows(tuple(rows), added=True), reason=reason)
            return source, _EVERYTHING
        if node.op in ("larger", "smaller"):
            a, b = node.operands
            gap = node.params["gap"]
            rows = Rows((Row(((a, 1.0),)), Row(((b, 1.0),))))
            linear, rest = Row(((a, 0.5), (b, 0.5))), Rows((Row(((a, 0.5), (b, -0.5))),))
            balls = self._balls_of(a, b)
            if balls:
                linear, rest = self._decided(node, *balls)
            what, sign = ("max", 1.0) if node.op == "larger" else ("min", -1.0)
            ends = [getattr(np, f"{what}imum")(*e) for e in zip(self.ranges[a], self.ranges[b],
                                                                 strict=True)]  # fmt: skip
            source = Source(node, what, 1.0, rows, linear, rest, gap, sign, groups=_each(node))
            return source, (float(ends[0]), float(ends[1]))
        if node.op in ("mul", "div", "dot_general") and len(node.operands) == 2:
            return self._local_product(node) or self._product(node)
        constant = _constant_of(node)
        if constant is None:
            raise ValueError(_cannot(node))
        lipschitz, curl, values, reason = constant
        (a,) = node.inputs
        what = node.op
        linear = rest = None
        if curl and math.isfinite(lipschitz):  # the gradient of a convex function
            linear = Row(((a, lipschitz / 2),))
            rest = Rows((Row(((a, np.nextafter(lipschitz / 2, math.inf)),)),))
        if values is None:
            values = self.ranges[a]
        slopes = None if linear is None else (0.0, lipschitz)
        rows = Rows((Row(((a, lipschitz),)),))
        if node.op in _RISING:
            self._monotone(node, a)
        if node.op == "softmax" and (found := self._local_softmax(node, a)) is not None:
            linear, rest = found
        groups = node.params["groups"].array if node.op in ("softmax", "normalize") else None
        groups = None if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
        return Source(node, what, lipschitz, rows, linear, rest, node, 1.0, reason,
                      slopes, groups), values  # fmt: skip

    # Where x stays in a ball: linear in the middle of it, and a rest that vanishes with it.

    def _monotone(self, node: Operation, a: Operation) -> None:
        """The ball of what only rises with each of its arguments, from their ends."""
        if self.balls and (ball := self.balls.get(a)) and node.size:
            low, high = (
                np.asarray(_rising(node, end), np.float64) for end in (ball.low, ball.high)
            )
            slack = 2.0**-40 * (np.abs(low) + np.abs(high))
            self.balls.put(node, low / 2 + high / 2, None, (high - low) / 2 + slack)

    def _balls_of(self, *operands: Operation) -> list[Ball] | None:
        found = [ball for a in operands if self.balls and (ball := self.balls.get(a))]
        return found if len(found) == len(operands) else None

    def _decided(self, node: Operation, p: Ball, q: Ball) -> tuple[Row, Rows]:
        """The larger or smaller of two, which is one of them where their ranges are apart."""
        assert self.balls is not None
        a, b = node.operands
        side = 1.0 if node.op == "larger" else -1.0
        above, below = p.low >= q.high, p.high <= q.low
        open_ = ~(above | below)
        first = np.where(open_, 0.5, np.where(above == (side > 0), 1.0, 0.0))
        linear = Row(((a, first), (b, 1.0 - first)))
        half = np.where(open_, 0.5, 0.0)
        off = side * half * np.abs(p.mid - q.mid)
        self.balls.combined(
            node, first * p.mid + (1 - first) * q.mid + off, linear.terms,
            half * (p.wide + q.wide) * _MARGIN,
        )  # fmt: skip
        return linear, Rows((Row(((a, half), (b, -half))),))

    def _local_product(self, node: Operation) -> tuple[Source, Interval] | None:
        a, b = node.operands
        balls = self._balls_of(a, b)
        if balls is None:
            return None
        p, q = balls
        pm, qm = p.centre, q.centre
        if node.op == "mul":
            slopes = [(qm, q.half), (pm, p.half)]
            mid, off = pm * qm, p.half * q.half
        elif node.op == "div":
            least = np.maximum(q.low, -q.high)
            if not np.all(least > 0):
                return None
            mid = pm / qm
            # Of 1 / b and -a / b^2, over all values.
            first = np.sort([1 / q.low, 1 / q.high], 0)
            most = np.abs(pm) + p.half
            second = -pm / qm**2, p.half / least**2 + 2 * most * q.half / least**3
            slopes = [(first.mean(0), first[1] - first[0]), second]
            off = slopes[0][1] * p.half + slopes[1][1] * q.half
        else:
            return self._local_contraction(node, p, q)
        slopes = [(m, w * _MARGIN + 2.0**-40 * np.abs(m)) for m, w in slopes]
        linear = Row(tuple((c, m) for c, (m, _) in zip((a, b), slopes, strict=True)))
        rest = Rows(tuple(Row(((c, w),)) for c, (_, w) in zip((a, b), slopes, strict=True)), True)
        steep = [np.abs(m) + w for m, w in slopes]
        rows = Rows(tuple(Row(((c, s),)) for c, s in zip((a, b), steep, strict=True)), True)
        assert self.balls is not None
        shifts = [m * (ball.mid - ball.centre) for (m, _), ball in zip(slopes, balls, strict=True)]
        sizes = [np.abs(m) * (np.abs(ball.mid) + np.abs(ball.centre))
                 for (m, _), ball in zip(slopes, balls, strict=True)]  # fmt: skip
        off = off * _MARGIN + 2.0**-40 * np.abs(mid) + 2.0**-48 * sum(sizes)
        self.balls.combined(node, mid + sum(shifts), linear.terms, off)
        factor = max(float(np.max(s, initial=0.0)) for s in steep)
        return Source(node, f"{node.op} of two", factor, rows, linear, rest, node,
                      groups=_each(node)), _EVERYTHING  # fmt: skip

    def _local_contraction(self, node: Operation, p: Ball, q: Ball) -> tuple[Source, Interval]:
        assert self.balls is not None
        a, b = node.operands
        batch = node.params["dimension_numbers"][1]

        def size(x: np.ndarray, axes) -> float:
            """At least |A|_F of one matrix of each batch."""
            others = tuple(i for i in range(x.ndim) if i not in axes)
            return float(np.sqrt(np.max(np.sum(x**2, others), initial=0.0))) * _MARGIN

        def half(args) -> Operation:
            return Operation("dot_general", args, node.params, node.shape, node.dtype, node.where)

        left, right = half((a, Constant(q.centre))), half((Constant(p.centre), b))
        linear = Row(((left, 1.0), (right, 1.0)))
        wide = size(q.half, batch[1]), size(p.half, batch[0])
        steep = [size(np.abs(m.centre) + m.half, axes)
                 for m, axes in ((q, batch[1]), (p, batch[0]))]  # fmt: skip
        rest = Rows((Row(((a, wide[0]),)), Row(((b, wide[1]),))), True)
        rows = Rows((Row(((a, steep[0]),)), Row(((b, steep[1]),))), True)
        for part in (left, right):
            self.balls.linear(part)
        halves = self._balls_of(left, right)
        if halves:
            # a b = a b' + a' b - a' b' + (a - a') (b - b').
            moved = apply(half((a, Constant(q.half))), {a: p.half[None]}, absolute=True)[0]
            both = apply(left, {a: p.centre[None]})[0]
            size_of = apply(left, {a: np.abs(p.centre)[None]}, absolute=True)[0]
            mid = halves[0].mid + halves[1].mid - both
            self.balls.combined(node, mid, linear.terms, moved * _MARGIN + 2.0**-36 * size_of)
        return Source(node, "dot_general of two", max(steep), rows, linear, rest,
                      node), _EVERYTHING  # fmt: skip

    def _local_softmax(self, node: Operation, a: Operation) -> tuple[Row, Rows] | None:
        balls = self._balls_of(a)
        groups = node.params["groups"].array.ravel().astype(int)
        n = a.size
        if balls is None or node.size != n or n > _MOST_SOFTMAX or groups.min(initial=0) < 0:
            return None
        assert self.balls is not None
        (ball,) = balls
        z, wide = ball.centre.ravel(), ball.half.ravel()
        if wide.max(initial=0.0) > _WIDEST:
            return None
        k = int(groups.max()) + 1
        top = np.full(k, -math.inf)
        np.maximum.at(top, groups, z)
        weights = np.exp(z - top[groups])
        p = weights / np.bincount(groups, weights, k)[groups]
        with np.errstate(over="ignore"):
            # By how much the logarithm of the sum moves, and with it every probability; all others
            # together move one by as much as themselves.
            moves = np.log(np.bincount(groups, p * np.exp(wide), k))[groups]
            off = np.minimum(p * np.expm1(wide + moves), 1.0) * _MARGIN + 2.0**-45 * p
        off = np.minimum(off, (np.bincount(groups, off, k)[groups] - off) * _MARGIN + 2.0**-42)
        same = groups[:, None] == groups
        jacobian = np.diag(p) - np.where(same, np.outer(p, p), 0.0)
        change = np.where(same, np.outer(p, off) + np.outer(off, p) + np.outer(off, off), 0.0)
        np.fill_diagonal(change, off * np.abs(1 - 2 * p) + off**2)
        # Symmetric matrices: none is longer than its largest row of absolute values.
        most = np.zeros(k)
        np.maximum.at(most, groups, change.sum(1))
        radius = (most[groups] * _MARGIN + 2.0**-45 * np.abs(jacobian).max()).reshape(node.shape)

        def operation(op, args, params, shape) -> Operation:
            return Operation(op, args, params, shape, node.dtype, node.where)

        flat = operation("reshape", (a,), {"new_sizes": (n,), "dimensions": None}, (n,))
        numbers = {"dimension_numbers": (((0,), (0,)), ((), ()))}
        turned = operation("dot_general", (flat, Constant(jacobian)), numbers, (n,))
        back = operation("reshape", (turned,), {"new_sizes": node.shape, "dimensions": None},
                         node.shape)  # fmt: skip
        for part in (flat, turned, back):
            self.balls.linear(part)
        linear = self.balls.get(back)
        if linear is not None:
            moved = np.sqrt(np.bincount(groups, wide**2, k))[groups].reshape(node.shape)
            mid = p + (ball.mid.ravel() - z) @ jacobian
            rounding = 2.0**-40 * (p + np.abs(ball.mid.ravel() - z) @ np.abs(jacobian))
            self.balls.combined(node, mid.reshape(node.shape), [(back, 1.0)],
                                radius * moved + rounding.reshape(node.shape))  # fmt: skip
        if np.max(radius) >= 0.25:
            return None
        return Row(((back, 1.0),)), Rows((Row(((a, radius),)),))

    def _product(self, node: Operation) -> tuple[Source, Interval]:
        a, b = node.operands
        ra, rb = self.ranges[a], self.ranges[b]
        most_a, most_b = (max(abs(r[0]), abs(r[1])) for r in (ra, rb))
        size, linear, rest = 1.0, None, None
        if node.op == "div":
            least = max(rb[0], -rb[1], 0.0)
            factors = (1 / least, most_a / least**2) if least > 0 else (math.inf, math.inf)
            values = _EVERYTHING if least == 0 else _symmetric(most_a / least * _MARGIN)
        elif node.op == "mul":
            factors = most_b, most_a
            ends = [_times(p, q) for p in ra for q in rb]
            values = min(ends), max(ends)
            if all(map(math.isfinite, (most_a, most_b))):
                ma, mb = sum(ra) / 2, sum(rb) / 2
                linear = Row(((a, mb), (b, ma)))
                radii = (
                    (max(rb[1] - mb, mb - rb[0])) * _MARGIN,
                    max(ra[1] - ma, ma - ra[0]) * _MARGIN,
                )
                rest = Rows((Row(((a, radii[0]),)), Row(((b, radii[1]),))), added=True)
        else:
            # |A|_2 <= |A|_F, of one matrix of each batch.
            batch = math.prod(a.shape[i] for i in node.params["dimension_numbers"][1][0])
            sizes = [math.sqrt(c.size / max(batch, 1)) * _MARGIN for c in (a, b)]
            factors = most_b * sizes[1], most_a * sizes[0]
            contracted = math.prod(a.shape[i] for i in node.params["dimension_numbers"][0][0])
            size = contracted * _MARGIN
            values = _symmetric(_times(most_a, most_b) * size)
        factors = tuple(f * _MARGIN for f in factors)
        rows = Rows((Row(((a, factors[0]),)), Row(((b, factors[1]),))), added=True)
        steep = max(factors)
        reason = ""
        if not math.isfinite(steep):
            reason = (
                f"{node.op} of two things that depend on x, with ranges {_range(ra)} and "
                f"{_range(rb)}"
            )
        return Source(
            node, f"{node.op} of two", steep, rows, linear, rest, node, 1.0, reason,
            groups=None if rest is None else _each(node),
        ), values  # fmt: skip

    def _registered(self, node: Operation) -> Source:
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, Operation) else a.value
                for a in node.args]  # fmt: skip
        lipschitz = float(RULES[node.op](*args, **node.params))
        if not lipschitz >= 0:
            raise ValueError(
                f"{node.where}: the rule of {node.op} gave {lipschitz}; a Lipschitz constant is a "
                "number >= 0."
            )
        rows = Rows(tuple(Row(((a, lipschitz),)) for a in node.args if isinstance(a, Operation)))
        reason = "" if math.isfinite(lipschitz) else "its rule says so"
        return Source(node, node.op, lipschitz, rows, reason=reason)

    def _linear_range(self, node: Operation) -> Interval:
        """By interval arithmetic with one interval for all entries."""
        op, args = node.op, node.args
        ends = []
        for a in args:
            if isinstance(a, Operation):
                ends.append(self.ranges[a])
            else:
                try:
                    value = a.array
                except (TypeError, ValueError):
                    value = np.zeros(0)
                ends.append(
                    (float(value.min(initial=math.inf)), float(value.max(initial=-math.inf)))
                )
        if is_indexing(op) and op != "dynamic_slice":
            return ends[0]
        if op in ("dynamic_slice", "gather"):
            low, high = ends[0]
            return (min(low, 0.0), max(high, 0.0)) if op == "gather" else (low, high)
        if op in ("concatenate", "pad", "select_n", "dynamic_update_slice"):
            kept = ends[1:] if op == "select_n" else ends[:2] if op != "concatenate" else ends
            return min(e[0] for e in kept), max(e[1] for e in kept)
        if op in ("add", "add_any"):
            return _outwards(ends[0][0] + ends[1][0], ends[0][1] + ends[1][1])
        if op == "sub":
            return _outwards(ends[0][0] - ends[1][1], ends[0][1] - ends[1][0])
        if op == "neg":
            return -ends[0][1], -ends[0][0]
        if op in ("mul", "div"):
            (low, high), (c, d) = (ends if op == "div" or isinstance(args[0], Operation)
                                   else ends[::-1])  # fmt: skip
            if op == "div":
                if c <= 0 <= d:
                    return _EVERYTHING
                c, d = 1 / d, 1 / c
            products = [_times(p, q) for p in (low, high) for q in (c, d)]
            return _outwards(min(products), max(products))
        most = max(max(map(abs, self.ranges[a])) for a in node.inputs)
        if not math.isfinite(most):
            return _EVERYTHING
        ones = {a: np.ones((1, *a.shape)) for a in node.inputs}
        sums = np.max(apply(node, ones, absolute=True), initial=0.0)
        return _symmetric(float(sums) * most * _MARGIN)


def _rising(node: Operation, x: np.ndarray) -> Any:
    with on_host():
        if node.op == "logsumexp":
            return jax.nn.logsumexp(jnp.asarray(x), node.params["axes"]).reshape(node.shape)
        assert node.primitive is not None
        y = node.primitive.bind(jnp.asarray(x), **node.params)
        return y[node.out] if node.primitive.multiple_results else y


_RISING = {
    "reduce_max", "reduce_min", "sort", "top_k", "cummax", "cummin", "reduce_window_max",
    "reduce_window_min", "logsumexp",
}  # fmt: skip


def _each(node: Operation) -> np.ndarray:
    """Every entry as a group of its own."""
    return np.arange(node.size)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _symmetric(most: float) -> Interval:
    return -most, most


def _outwards(low: float, high: float) -> Interval:
    return float(np.nextafter(low, -math.inf)), float(np.nextafter(high, math.inf))


def _range(r: Interval) -> str:
    return f"[{r[0]:.6g}, {r[1]:.6g}]"


def _cannot(node: Operation) -> str:
    known = "it jumps" if node.op in _JUMPS else "no rule is known of it"
    return (
        f"{node.where}: the primitive {node.op} depends on x, and {known}. Leave it out of the "
        f"function, or give its Lipschitz constant by sn_jax.register_lipschitz({node.op!r}, rule)."
    )


_JUMPS = {
    "argmax", "argmin", "argsort", "sort", "top_k", "floor", "ceil", "round", "sign", "select_n",
    "convert_element_type", "rem",
}  # fmt: skip


def _slopes_of(node, root, ops, domain, ends=None):
    """(least slopes, largest slopes, values, values in the middle or None) of an elementwise
    function, in each place; on intervals of their own where ``ends`` are given."""
    constants = list(dict.fromkeys(c for a in ops for c in a.args if not isinstance(c, Operation)))
    varied = [c for c in constants if c.uniform() is None]
    places: Any = np.zeros(root.shape, int)
    choices = [()]
    if varied and root.size:
        table = np.stack([np.broadcast_to(c.array, root.shape).ravel() for c in varied], 1)
        choices, places = np.unique(table, axis=0, return_inverse=True)
        places = places.reshape(root.shape)
    if len(choices) > _MOST_FUNCTIONS:
        everything = np.full(root.shape, math.inf)
        return -everything, everything, _EVERYTHING, None
    number = {a: i + 1 for i, a in enumerate(ops)} | {root: 0}
    found, local = [], np.zeros((4, *root.shape)) if ends is not None else None
    for number_of_choice, choice in enumerate(choices):
        values = {c: c.uniform() for c in constants} | dict(
            zip(varied, map(float, choice), strict=True)
        )
        nodes = [Node("var", params={"number": is_real(root)})]
        for a in ops:
            args = tuple(
                Ref(number[c])
                if isinstance(c, Operation)
                else bool(values[c])
                if c.value.dtype == bool
                else values[c]
                for c in a.args
            )
            params = {k: str(np.dtype(v)) if k == "new_dtype" else v
                      for k, v in a.params.items() if k in ("y", "new_dtype")}  # fmt: skip
            nodes.append(Node(a.op, args, params))
        try:
            found.append(slopes(nodes, domain, str(root.dtype)))
            if local is not None and ends is not None:
                here = np.broadcast_to(places == number_of_choice, root.shape)
                intervals = np.stack([end[here] for end in ends])
                if intervals.size:
                    local[:, here] = slopes_on(nodes, intervals, str(root.dtype))
        except Jump as error:
            raise ValueError(
                f"{node.where}: {' '.join(a.op for a in ops)} jumps by {error.size:.3g} where "
                f"{error.at + 0.0:.9g} enters, so there is no Lipschitz constant."
            ) from error
        except Unknown as error:
            at = next((a for a in ops if a.op == error.op), node)
            raise ValueError(_cannot(at)) from error
    values = min(s.value_low for s in found), max(s.value_high for s in found)
    if local is not None:
        return local[0], local[1], values, local[2:]
    lows, highs = (np.array([getattr(s, name) for s in found])[places] for name in ("low", "high"))
    return lows, highs, values, None


def _constant_of(node: Operation) -> tuple[float, bool, Interval | None, str] | None:
    """(Lipschitz constant, whether it is the gradient of a convex function, values or None for
    those of the argument, why it is infinite), or None if unknown."""
    op, params = node.op, node.params
    if len(node.inputs) != 1 or not jax.numpy.issubdtype(node.dtype, jax.numpy.floating):
        return None
    (a,) = node.inputs
    if op == "softmax":
        return 0.5, True, (0.0, 1.0), ""
    if op == "logsumexp":
        return 1.0, False, _EVERYTHING, ""
    if op == "length":
        return params["lipschitz"], False, (0.0, math.inf), ""
    if op == "normalize":
        lipschitz, bound = params["lipschitz"], params["bound"]
        reason = "" if math.isfinite(lipschitz) else "a length without eps is divided by"
        return lipschitz, True, _symmetric(bound), reason
    if op in ("reduce_max", "reduce_min") or (op == "top_k" and node.out == 0):
        return 1.0, False, None, ""
    if op == "sort" and len(node.args) == 1:
        return 1.0, False, None, ""
    if op in ("cummax", "cummin"):
        # An entry is the largest of at most as many windows as there are places after it.
        return float(np.nextafter(math.sqrt(a.shape[params["axis"]]), math.inf)), False, None, ""
    if op in ("reduce_window_max", "reduce_window_min"):
        if set(params["base_dilation"]) - {1}:
            return None
        windows = 1
        for k, s, d in zip(params["window_dimensions"], params["window_strides"],
                           params["window_dilation"], strict=True):  # fmt: skip
            windows *= -(-k * math.gcd(s, d) // s)
        root = math.isqrt(windows)
        exact = float(root) if root**2 == windows else np.nextafter(math.sqrt(windows), math.inf)
        values = None if not any(map(any, params["padding"])) else _EVERYTHING
        return float(exact), False, values, ""
    return None
