"""Slopes of scalar functions: intervals that hold every difference quotient of a small program.

Branch and bound on interval jets: boxes are split until the range of f' (and of f) is tight,
at kinks where there are any; the two tails are bounded at once. Whether pieces meet is checked at
the ends of boxes. Nothing here knows JAX: the caller translates, and decides what is one function
of one number.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sn_jax._intervals import Interval, meet, plus, times
from sn_jax._jets import RULES, Evaluation, Jet
from sn_jax._scalar import PREDICATES, Node, Program, Ref, scalar

# Where the two tails may begin; beyond the last, float32 holds no number.
_TAILS = tuple(2.0**k for k in (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128))
# Branch and bound stops at this gap, relative to the largest slope seen.
_GAP = 1e-8
_BATCH = 256
_MOST_BOXES = 20_000
_MOST_ROUNDS = 200
# Into how many pieces an interval is cut where there are many of them.
_PIECES = 8


class Slopes(NamedTuple):
    """What holds of a function f on a domain, rounded outwards.

    Attributes:
      low: at most every difference quotient ``(f(a) - f(b)) / (a - b)``.
      high: at least every difference quotient.
      value_low: at most every value.
      value_high: at least every value.
    """

    low: float
    high: float
    value_low: float
    value_high: float


class Jump(ValueError):
    """The function is discontinuous, by ``size`` near ``at``: no Lipschitz constant exists."""

    def __init__(self, size: float, at: float):
        super().__init__(f"the function jumps by {size:.3g} at {at:.9g}")
        self.size, self.at = float(size), float(at)


def slopes(
    nodes: Sequence[Node],
    domain: tuple[float, float] = (-math.inf, math.inf),
    dtype: Any = "float32",
) -> Slopes:
    """The range of the difference quotients of a scalar program, and that of its values.

    A continuous function that is differentiable but for isolated points has the quotients that
    lie between the infimum and the supremum of f'. All is computed in real arithmetic on the
    constants as given; where constants were rounded to ``dtype``, two pieces that meet within
    four of its units are taken to meet.

    Args:
      nodes: the program in order; node 0 is the variable, the last node is the output.
      domain: the interval in which the variable lies.
      dtype: what the program computes in.
    Returns:
      ``Slopes``: infinite where f' is unbounded, or could not be bounded.
    Raises:
      Jump: f is discontinuous in the domain.
      Unknown: for a primitive that is not known.
    Example:
      >>> relu = [Node("var"), Node("max", (Ref(0), 0.0))]
      >>> slopes(relu)
      Slopes(low=0.0, high=1.0, value_low=0.0, value_high=inf)
    """
    low, high = float(domain[0]), float(domain[1])
    if not low <= high:
        raise ValueError(f"domain must be an interval with low <= high; got {domain}.")
    try:
        eps = float(np.finfo(dtype).eps)
    except (TypeError, ValueError):
        eps = 2.0**-7  # bfloat16, which NumPy does not know
    # Infinite ends and what they meet are part of the arithmetic.
    with np.errstate(all="ignore"):
        return _slopes(_reduced(nodes), low, high, eps)


class LocalSlopes(NamedTuple):
    """Of one function on many intervals, arrays (n,).

    Attributes:
      low, high: its difference quotients lie between.
      centre_low, centre_high: its value in the middle.
    """

    low: np.ndarray
    high: np.ndarray
    centre_low: np.ndarray
    centre_high: np.ndarray


def slopes_on(nodes: Sequence[Node], intervals: np.ndarray, dtype: Any = "float32") -> LocalSlopes:
    """The slopes on each of some finite intervals (2, n), in a few pieces each.

    Args:
      nodes, dtype: as in ``slopes``, which is asked of all intervals together first: for jumps.
      intervals: (2, n).
    Returns:
      ``LocalSlopes``: never wider than those of all intervals together.
    Raises:
      Jump, Unknown: as in ``slopes``, of the interval that spans all.
    Example:
      >>> square = [Node("var"), Node("mul", (Ref(0), Ref(0)))]
      >>> found = slopes_on(square, np.array([[1.0, -1.0], [2.0, 0.0]]))
      >>> print(found.low.round(6), found.high.round(6))
      [ 2. -2.] [4. 0.]
    """
    whole = slopes(nodes, (float(intervals[0].min()), float(intervals[1].max())), dtype)
    program, n = _reduced(nodes), intervals.shape[1]
    # Ends of pieces meet exactly, and the outermost are those of the interval.
    parts = np.linspace(0.0, 1.0, _PIECES + 1)[:, None]
    edges = intervals[0] + parts * (intervals[1] - intervals[0])
    edges = np.clip(edges, intervals[0], intervals[1])
    edges[0], edges[-1] = intervals
    boxes = np.stack([edges[:-1], edges[1:]]).reshape(2, -1)
    with np.errstate(all="ignore"):
        found = _examined(program, boxes)[0]
        unsure = found.unsure | np.isnan(found.first).any(0)
        low = np.where(unsure, whole.low, np.maximum(found.first[0], whole.low))
        high = np.where(unsure, whole.high, np.minimum(found.first[1], whole.high))
        middle = intervals.mean(0)
        value = Evaluation(np.stack([middle, middle])).run(program)[-1].value
    low, high = low.reshape(_PIECES, n).min(0), high.reshape(_PIECES, n).max(0)
    return LocalSlopes(low, high, *np.array(_full(value, n)))


def _reduced(nodes: Sequence[Node]) -> tuple:
    program = Program(RULES)
    done: list[Any] = []
    for node in nodes:
        args = [done[a] if isinstance(a, Ref) else scalar(a) for a in node.args]
        done.append(program.add(node.op, args, node.params))
    return program.reduced(done[-1])


@lru_cache(maxsize=4096)
def _slopes(program: tuple, low: float, high: float, eps: float) -> Slopes:
    """Through the last affine node that all the rest depends on: its kinks are at exact places."""
    rest, prefix = _rooted(program)
    if not prefix:
        found = _bounded(program, low, high, eps)
    else:
        jet = Evaluation(np.array([[low], [high]])).run(prefix)[-1]
        ends = [float(x) for x in jet.value.ends[:, 0]]
        try:
            inner = _bounded(rest, *ends, eps)
        except Jump as jump:
            start = Evaluation(np.zeros((2, 1))).run(prefix)[-1]
            at = (jump.at - start.value.ends[0, 0]) / start.first.ends[0, 0]
            raise Jump(jump.size, at) from None
        slope = times(np.array([[inner.low], [inner.high]]), jet.first.ends)
        found = inner._replace(low=float(slope[0, 0]), high=float(slope[1, 0]))
    return found if _is_finite(found) else _by_parts(program, low, high, eps, found)


def _is_finite(found: Slopes) -> bool:
    return math.isfinite(found.low) and math.isfinite(found.high)


def _by_parts(program: tuple, low: float, high: float, eps: float, found: Slopes) -> Slopes:
    """Slopes of the parts, multiplied or added: looser, but of functions that have kinks without
    end in a tail, or many after each other, each part alone may still be bounded."""
    last = len(program) - 1
    ends = np.array([[found.low], [found.high]])
    for root in range(1, last):
        rest = None if program[root][0] in PREDICATES else _between(program, root, last)
        if rest is None:
            continue
        with contextlib.suppress(Jump):  # of a part, whose other parts make up for it
            inner = _slopes(_required(program, root), low, high, eps)
            if _is_finite(inner):
                outer = _slopes(rest, inner.value_low, inner.value_high, eps)
                if _is_finite(outer):
                    ends = meet(ends, times(_column(inner), _column(outer)))
    op, args, _ = program[last]
    if op in ("add", "sub") and not np.isfinite(ends).all():
        with contextlib.suppress(Jump):
            a, b = (
                _column(_slopes(_required(program, int(arg)), low, high, eps))
                if isinstance(arg, Ref)
                else np.zeros((2, 1))
                for arg in args
            )
            ends = meet(ends, plus(a, b if op == "add" else -b[::-1]))
    return found._replace(low=float(ends[0, 0]), high=float(ends[1, 0]))


def _column(found: Slopes) -> np.ndarray:
    return np.array([[found.low], [found.high]])


def _required(program: tuple, out: int) -> tuple:
    """The program of node ``out``."""
    required = _between(program, 0, out)
    assert required is not None, "every node depends on the variable alone"
    return required


def _between(program: tuple, root: int, out: int) -> tuple | None:
    """Node ``out`` as a program of node ``root``; None if it depends on the variable otherwise."""
    needed, stack = {root}, [out]
    while stack:
        i = stack.pop()
        if i not in needed:
            needed.add(i)
            stack += [int(a) for a in program[i][1] if isinstance(a, Ref)]
    if root and 0 in needed:
        return None
    order = [root, *sorted(needed - {root})]  # what is of constants alone may stand before it
    new = {old: Ref(i) for i, old in enumerate(order)}
    body = (
        (op, tuple(new[int(a)] if isinstance(a, Ref) else a for a in args), params)
        for op, args, params in (program[i] for i in order[1:])
    )
    return (("var", (), None), *body)


def _rooted(program: tuple) -> tuple[tuple, tuple]:
    """(the program as one of an affine node, the program of that node), () if it is node 0."""
    affine = {0}
    for i, (op, args, _) in enumerate(program):
        linear = op in ("add", "mul", "div", "neg") and isinstance(args[0], Ref)
        linear = linear and int(args[0]) in affine
        if linear and not any(isinstance(a, Ref) or not math.isfinite(a) for a in args[1:]):
            affine.add(i)
    for root in sorted(affine - {0}, reverse=True):
        if (rest := _between(program, root, len(program) - 1)) is not None:
            return rest, program[: root + 1]
    return program, ()


class _Boxes(NamedTuple):
    """Boxes (2, n) with what is known of f' and f there (2, n).

    ``split`` is where each divides; ``inner`` are slopes and values that f has or exceeds.
    """

    x: np.ndarray
    first: np.ndarray
    value: np.ndarray
    unsure: np.ndarray
    split: np.ndarray


def _full(interval: Interval, n: int) -> np.ndarray:
    return np.broadcast_to(interval.ends, (2, n))


def _examined(program: tuple, x: np.ndarray) -> tuple[_Boxes, np.ndarray, np.ndarray]:
    """The boxes, and f' and f at their centres."""
    n = x.shape[1]
    centre = 0.5 * x[0] + 0.5 * x[1]
    run = Evaluation(np.concatenate([x, np.array([centre, centre])], axis=1))
    jet = run.run(program)[-1]
    value, first, second = (_full(part, 2 * n) for part in jet[:3])
    unsure = np.broadcast_to(jet.unsure, 2 * n)[:n]
    offset = plus(x, -np.array([centre, centre]))
    # Mean-value forms: f' = f'(c) + f''(.) (x - c), and the same of f.
    mean = plus(first[:, n:], times(second[:, :n], offset))
    tight = np.where(unsure, first[:, :n], meet(first[:, :n], mean))
    mean = plus(value[:, n:], times(tight, offset))
    # A monotone piece has its extremes at its ends, which the interval may not show.
    tight_value = np.where(unsure, value[:, :n], meet(value[:, :n], mean))
    split = np.where((x[0] == 0) & ~np.isfinite(tight).all(0), x[1] * 2.0**-12, centre)
    split = np.where((x[1] == 0) & ~np.isfinite(tight).all(0), x[0] * 2.0**-12, split)
    for undecided, target in run.kinks:
        undecided = np.broadcast_to(undecided, 2 * n)[:n]
        target = np.broadcast_to(target, 2 * n)[n:]
        rounded = target.astype(np.float32).astype(float)
        near = np.abs(rounded - target) <= 1e-12 * np.abs(target)
        target = np.where(near, rounded, target)
        split = np.where(undecided & (x[0] < target) & (target < x[1]), target, split)
    return _Boxes(x, tight, tight_value, unsure, split), first[:, n:], value[:, n:]


def _grid(low: float, high: float) -> np.ndarray:
    """Edges of the first boxes, one beyond where the last tail begins."""
    powers = 2.0 ** np.arange(-1, 130)
    points = np.concatenate([-powers[::-1], [0.0], powers])
    ends = [max(low, points[0]), min(high, points[-1])]
    inside = points[(points > ends[0]) & (points < ends[1])]
    return np.concatenate([[ends[0]], inside, [ends[1]]])


@lru_cache(maxsize=4096)
def _bounded(program: tuple, low: float, high: float, eps: float) -> Slopes:
    if len(program) == 1:
        return Slopes(1.0, 1.0, low, high)
    if low == high or low >= _TAILS[-1] or high <= -_TAILS[-1]:
        return _at_once(program, low, high)
    edges = _grid(low, high)
    sure = _check_edges(program, edges, eps)
    boxes, slope, value = _examined(program, np.array([edges[:-1], edges[1:]]))
    outer = {"first": (math.inf, -math.inf), "value": (math.inf, -math.inf)}
    kept = np.ones(boxes.x.shape[1], bool)
    for side, end in ((-1, low), (1, high)):
        if side * end > _TAILS[-1]:
            begin, tail = _tail(program, side, (low, high), slope, value)
            kept &= side * boxes.x[(side + 1) // 2] <= begin
            outer = {k: (min(v[0], tail[k][0]), max(v[1], tail[k][1])) for k, v in outer.items()}
    boxes = _Boxes(*(part[..., kept] for part in boxes))
    lost = _is_lost(slope[:, kept])
    for target, gap in (("first", _GAP), ("value", 1e-7)):
        if not lost:
            boxes, slope, value = _refined(program, boxes, slope, value, target, outer[target], gap)
    steepest = float(np.abs(boxes.first).max())
    sure &= _check_edges(program, np.union1d(boxes.x[0], edges), eps, steepest)
    first = boxes.first
    if np.any(boxes.unsure):
        trusted = ~boxes.unsure
        trusted[boxes.unsure] = _small_steps(
            program, boxes.x[:, boxes.unsure], edges[[0, -1]], eps, steepest
        )
        sure &= bool(trusted.all())
    value = boxes.value
    if not sure:  # what a point beside an unknown has may be in no box
        first = value = np.array([[-np.inf], [np.inf]])
    ends = []
    for name, found in (("first", first), ("value", value)):
        ends += [min(outer[name][0], found[0].min()), max(outer[name][1], found[1].max())]
    return Slopes(*(float(end) + 0.0 for end in ends))


def _at_once(program: tuple, low: float, high: float) -> Slopes:
    jet = Evaluation(np.array([[low], [high]])).run(program)[-1]
    first = jet.first.ends if not jet.unsure.any() else np.array([[-np.inf], [np.inf]])
    ends = np.concatenate([first[:, 0], jet.value.ends[:, 0]])
    return Slopes(*map(float, ends))


def _on_tail(program: tuple, side: int, begin: float, end: float) -> dict:
    boxes = np.array([[begin], [end]] if side > 0 else [[end], [-begin]])
    jet = Evaluation(boxes, begin).run(program)[-1]
    # The derivative by y = |x|, turned back into one by x.
    first = jet.first.ends[:, 0] if side > 0 else -jet.first.ends[::-1, 0]
    if jet.unsure.any():
        first = np.array([-np.inf, np.inf])
    value = jet.value.ends[:, 0]
    return {"first": (first[0], first[1]), "value": (value[0], value[1])}


def _tail(
    program: tuple,
    side: int,
    domain: tuple[float, float],
    slope: np.ndarray,
    value: np.ndarray,
) -> tuple[float, dict]:
    """Where the tail begins and what holds there: as soon as it widens no range."""
    other, end = domain[::side]
    last = _on_tail(program, side, _TAILS[-1], end)
    for begin in _TAILS[:-1]:
        if begin <= side * other:
            continue
        found = _on_tail(program, side, begin, end)
        for name, known, gap in (("first", slope, _GAP), ("value", value, 1e-7)):
            low, high = _reached(known, last[name])
            slack = gap * _scale(low, high)
            if not (low - slack <= found[name][0] and found[name][1] <= high + slack):
                break
        else:
            return begin, found
    return _TAILS[-1], last


def _reached(known: np.ndarray, outer: tuple[float, float]) -> tuple[float, float]:
    """(low, high) that the range is at least as wide as: of points, and of what is not split."""
    finite = np.isfinite(known).all(0)
    low = min(outer[0], known[1][finite].min(initial=np.inf))
    return float(low), float(max(outer[1], known[0][finite].max(initial=-np.inf)))


def _scale(*values: float) -> float:
    return max([abs(v) for v in values if math.isfinite(v)], default=0.0)


def _refined(
    program: tuple,
    boxes: _Boxes,
    slope: np.ndarray,
    value: np.ndarray,
    target: str,
    outer: tuple[float, float],
    gap: float,
) -> tuple[_Boxes, np.ndarray, np.ndarray]:
    """Boxes split until the range of the target is known to the gap."""
    most_boxes = boxes.x.shape[1] + _MOST_BOXES
    for _ in range(_MOST_ROUNDS):
        bounds = getattr(boxes, target)
        known = slope if target == "first" else value
        least, most = _reached(known, outer)
        scale = _scale(least, most)
        size = np.abs(boxes.x).max(0)
        width = boxes.x[1] - boxes.x[0]
        wide = (width > 2.0**-46 * size) & (width > 1e-40)
        excess = np.maximum(bounds[1] - most, least - bounds[0])
        excess = np.where(np.isnan(excess), 0.0, excess)
        if target == "first":
            excess = np.where(boxes.unsure, np.inf, excess)
        active = np.flatnonzero(wide & (excess > gap * scale))
        if not len(active) or len(width) > most_boxes:
            break
        if len(active) > _BATCH:
            active = active[np.argsort(-excess[active], kind="stable")[:_BATCH]]
        low, high = boxes.x[:, active]
        cut = boxes.split[active]
        cut = np.where((low < cut) & (cut < high), cut, 0.5 * low + 0.5 * high)
        halves = np.array([np.concatenate([low, cut]), np.concatenate([cut, high])])
        new, more_slope, more_value = _examined(program, halves)
        # What was known of a box holds of its halves.
        first, old = (np.tile(part[:, active], 2) for part in (boxes.first, boxes.value))
        whole = np.tile(boxes.unsure[active], 2)
        new = new._replace(
            first=np.where(whole, new.first, meet(new.first, first)),
            value=np.where(whole, new.value, meet(new.value, old)),
        )
        boxes = _Boxes(*(
            np.concatenate([np.delete(a, active, axis=-1), b], axis=-1)
            for a, b in zip(boxes, new, strict=True)
        ))  # fmt: skip
        slope = np.concatenate([slope, more_slope], axis=1)
        value = np.concatenate([value, more_value], axis=1)
        if _is_lost(more_slope):
            break
    return boxes, slope, value


def _is_lost(slope: np.ndarray) -> bool:
    """Whether nothing is known of the slope at a single point, so that no box around it has more
    to say: as where f is no number."""
    return bool(np.isinf(slope).all(0).any())


def _within_rounding(jet: Jet, x: np.ndarray, eps: float, steepest: float) -> np.ndarray:
    """What a few units of f or of x change: pieces that close are taken to meet.

    The units are the program's own, but no finer than the smallest boxes can show.
    """
    n = x.shape[1]
    slope = np.abs(_full(jet.first, n)).max(0)
    slope = np.minimum(np.where(np.isfinite(slope), slope, 0.0), steepest)
    ends = np.abs(_full(jet.value, n))
    size = np.where(np.isfinite(ends), ends, 0.0).max(0)
    return 4 * max(eps, 2.0**-44) * np.maximum(size, slope * np.abs(x).max(0))


def _check_edges(program: tuple, edges: np.ndarray, eps: float, steepest: float = math.inf) -> bool:
    """Raises Jump where f just left of an edge, on it, and just right of it are apart.

    Returns whether it could be told everywhere.
    """
    n = len(edges)
    left = np.array([np.nextafter(edges, -np.inf), edges])
    right = np.array([edges, np.nextafter(edges, np.inf)])
    left[0, 0] = edges[0]
    right[1, -1] = edges[-1]
    x = np.concatenate([left, [edges, edges], right], axis=1)
    jet = Evaluation(x).run(program)[-1]
    value = _full(jet.value, 3 * n)
    rounding = _within_rounding(jet, x, eps, steepest)
    unsure = np.broadcast_to(jet.unsure, 3 * n)
    # Beside a pole the values are apart as well, but infinitely steep is what is said of it.
    ends = np.where(unsure, np.array([[-np.inf], [np.inf]]), value).reshape(2, 3, n)
    apart = ends[0].max(0) - ends[1].min(0)
    bad = apart > rounding.reshape(3, n).max(0)
    if bad.any():
        first = np.argmin(np.where(bad, np.abs(edges), np.inf))
        raise Jump(apart[first], edges[first])
    # What an edge alone has, and what rounding hides beside it, is in no box that is judged later.
    return not np.any(unsure & ~(value[1] - value[0] <= rounding))


def _small_steps(
    program: tuple, x: np.ndarray, ends: np.ndarray, eps: float, steepest: float
) -> np.ndarray:
    """Whether f varies by rounding only in each of the boxes x where a select is undecided."""
    n = x.shape[1]
    jet = Evaluation(x).run(program)[-1]
    value, first = _full(jet.value, n), _full(jet.first, n)
    small = value[1] - value[0] <= _within_rounding(jet, x, eps, steepest)
    size = np.abs(x).max(0)
    # A little further away the predicate is decided, where on the box itself rounding hides it.
    around = x + np.array([[-1.0], [1.0]]) * size * 2.0**-34
    around = np.clip(around, *ends)
    points = Evaluation(around.reshape(1, -1).repeat(2, 0)).run(program)[-1].value
    left, right = _full(points, 2 * n)[:, :n], _full(points, 2 * n)[:, n:]
    apart = np.maximum(left[0], right[0]) - np.minimum(left[1], right[1])
    # What a steep slope does over so short a way is no jump.
    way = 4 * np.abs(first).max(0) * (around[1] - around[0])
    jumps = ~small & (x[1] - x[0] <= 1e-12 * size)
    jumps &= apart > np.maximum(way, _within_rounding(jet, x, eps, steepest))
    if jumps.any():
        raise Jump(apart[jumps][0], x[0][jumps][0])
    return small
