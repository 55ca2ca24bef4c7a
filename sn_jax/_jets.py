"""(f, f', f'') of a scalar program on boxes or on a tail: a rule for each primitive.

Where a predicate or the larger of two is undecided on a box, both sides are joined, and whether
there is a jump is left open (``unsure``) together with where to divide the box.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from sn_jax._functions import UNARY, Unary, exponential_function, power_function
from sn_jax._intervals import Interval, constant, entire, middle
from sn_jax._scalar import COMPARE, Ref

_MAX = np.finfo(float).max


class Jet(NamedTuple):
    """f, f' and f'' on boxes; ``unsure`` where a jump has not been excluded."""

    value: Interval
    first: Interval
    second: Interval
    unsure: np.ndarray


class Truth(NamedTuple):
    """Which of its values a predicate can take on the interior of a box."""

    true: np.ndarray
    false: np.ndarray


_NOWHERE = np.zeros(1, bool)


class Evaluation:
    """One pass over the program: on boxes (2, n), some of them points, or on one tail."""

    def __init__(self, boxes: np.ndarray, tail: float = 0.0):
        self.tail = tail
        side = np.sign(boxes[0, 0])
        self.open = boxes[0] < boxes[1]
        zero = constant(0.0, self.tail)
        one = constant(-1.0 if tail and side < 0 else 1.0, tail)
        envelope = (0.0, 1.0, 0.0) if self.tail else None
        lead = (1.0, one.ends) if self.tail else None
        self.x = Jet(Interval(boxes, self.tail, envelope, envelope, lead), one, zero, _NOWHERE)
        # (undecided, where Newton's step leads) of every kink
        self.kinks: list[tuple[np.ndarray, np.ndarray]] = []

    def constant(self, value: float) -> Jet:
        zero = constant(0.0, self.tail)
        return Jet(constant(value, self.tail), zero, zero, _NOWHERE)

    def run(self, program: tuple) -> Any:
        jets: list[Any] = [self.x]
        undefined = [_NOWHERE]  # where each may be no number
        for op, args, param in program[1:]:
            read = [jets[a] if isinstance(a, Ref) else
                    Truth(np.array([a]), np.array([not a])) if isinstance(a, bool) else
                    self.constant(a) for a in args]  # fmt: skip
            rule = RULES[op]
            out = rule(self, *read) if param is None else rule(self, *read, param)
            lost = [undefined[a] if isinstance(a, Ref) else _NOWHERE for a in args]
            if op == "select_n":
                which, no, yes = cast(Truth, read[0]), *lost[1:]
                lost = [which.false & no, which.true & yes]
            none = np.logical_or.reduce(np.broadcast_arrays(_NOWHERE, *lost))
            if isinstance(out, Truth):
                # Of what is no number a predicate has some value all the same.
                out, none = Truth(out.true | none, out.false | none), _NOWHERE
            else:
                none = none | ((out.value.low == -np.inf) & (out.value.high == np.inf))
            jets.append(out)
            undefined.append(none)
        return jets

    def kink(self, undecided: np.ndarray, difference: Jet) -> None:
        if not self.tail and np.any(undecided & self.open):
            step = middle(difference.value) / middle(difference.first)
            self.kinks.append((undecided, middle(self.x.value) - step))

    def moving(self, difference: Jet) -> np.ndarray:
        """Strictly monotone, so that a bound is reached at an end of the open box only."""
        slope = difference.first
        return self.open & ((slope.low > 0) | (slope.high < 0)) & ~difference.unsure


def _ends(a: Jet) -> tuple[np.ndarray, np.ndarray]:
    """No real number is infinite."""
    return np.maximum(a.value.low, -_MAX), np.minimum(a.value.high, _MAX)


def _compare(op: str):
    def rule(run: Evaluation, a: Jet, b: Jet) -> Truth:
        difference = _subtract(run, a, b)
        moving = run.moving(difference)
        (a0, a1), (b0, b1) = _ends(a), _ends(b)
        if op in ("eq", "ne"):
            apart = (a0 > b1) | (a1 < b0) | (moving & ((a0 >= b1) | (a1 <= b0)))
            equal = (a0 == a1) & (b0 == b1) & (a0 == b0)
            truth = Truth(~apart, ~equal)
            if op == "ne":
                truth = Truth(*truth[::-1])
        else:
            if op in ("lt", "le"):
                a0, a1, b0, b1 = b0, b1, a0, a1
            if op in ("gt", "lt"):
                truth = Truth(a1 > b0, ~((a0 > b1) | (moving & (a0 >= b1))))
            else:
                truth = Truth(~((a1 < b0) | (moving & (a1 <= b0))), a0 < b1)
        run.kink(truth.true & truth.false, difference)
        return truth

    return rule


def _select(run: Evaluation, which: Truth, no: Jet, yes: Jet) -> Jet:
    both = which.true & which.false
    parts = [
        y.hull(n).where(both, y.where(which.true, n)) for y, n in zip(yes[:2], no[:2], strict=True)
    ]
    second = entire(run.tail).where(both, yes.second.where(which.true, no.second))
    unsure = np.where(both, True, np.where(which.true, yes.unsure, no.unsure))
    return Jet(parts[0], parts[1], second, unsure)


def _add(run: Any, a: Jet, b: Jet) -> Jet:
    unsure = a.unsure | b.unsure
    return Jet(a.value + b.value, a.first + b.first, a.second + b.second, unsure)


def _negate(run: Any, a: Jet) -> Jet:
    return Jet(-a.value, -a.first, -a.second, a.unsure)


def _subtract(run: Any, a: Jet, b: Jet) -> Jet:
    return _add(run, a, _negate(run, b))


def _multiply(run: Any, a: Jet, b: Jet) -> Jet:
    cross = a.first * b.first
    second = a.value * b.second + (cross + cross) + a.second * b.value
    first = a.value * b.first + a.first * b.value
    return Jet(a.value * b.value, first, second, a.unsure | b.unsure)


def _divide(run: Any, a: Jet, b: Jet) -> Jet:
    if b.first.zero:
        unsure = a.unsure | b.unsure | _around_zero(b)
        return Jet(a.value / b.value, a.first / b.value, a.second / b.value, unsure)
    reciprocal = _integer_power(run, b, -1)
    product = _multiply(run, a, reciprocal)
    return product._replace(value=a.value / b.value)


def _chain(u: Jet, value: Interval, first: Interval, second: Interval) -> Jet:
    return Jet(value, first * u.first, second * u.first**2 + first * u.second, u.unsure)


def _around_zero(u: Jet) -> np.ndarray:
    return (u.value.low <= 0) & (u.value.high >= 0)


def _integer_power(run: Any, u: Jet, n: int) -> Jet:
    tail = u.value.tail
    if n < 0:
        u = u._replace(unsure=u.unsure | _around_zero(u))
    first = constant(float(n), tail) * u.value ** (n - 1)
    second = constant(float(n * (n - 1)), tail) * u.value ** (n - 2)
    return _chain(u, u.value**n, first, second)


def _unary(fn: Unary, run: Evaluation, u: Jet) -> Jet:
    low, high = u.value.ends
    outside = (low < fn.low) | (high > fn.high)
    inside = u.value
    if np.any(outside):
        safe = 0.5 * (max(fn.low, -1.0) + min(fn.high, 3.0 + max(fn.low, -1.0)))
        inside = constant(safe, run.tail).where(outside, u.value)
    jet = _chain(u, *(part(inside) for part in fn[:3]))
    if np.any(outside):
        value, first, second = (entire(run.tail).where(outside, part) for part in jet[:3])
        jet = Jet(value, first, second, jet.unsure)
    # Poles are at the ends of the domain; on their two sides f need not meet.
    edge = (math.isfinite(fn.low) & (low <= fn.low)) | (math.isfinite(fn.high) & (high >= fn.high))
    if np.any(edge):
        pole = edge & ~np.isfinite(jet.value.ends).all(0)
        jet = jet._replace(unsure=jet.unsure | outside | pole)
    return jet


def _maximum(run: Evaluation, a: Jet, b: Jet) -> Jet:
    (a0, a1), (b0, b1) = _ends(a), _ends(b)
    first, second = a0 >= b1, b0 >= a1
    both = ~(first | second)
    if np.any(both):
        run.kink(both, _subtract(run, a, b))
    value = Interval(np.maximum(a.value.ends, b.value.ends))
    if run.tail:
        hull = a.value.hull(b.value)
        value = Interval(value.ends, run.tail, hull.upper, hull.under, hull.lead)
    value = value.where(both, a.value.where(first, b.value))
    slope = a.first.hull(b.first).where(both, a.first.where(first, b.first))
    bend = entire(run.tail).where(both, a.second.where(first, b.second))
    unsure = np.where(both, a.unsure | b.unsure, np.where(first, a.unsure, b.unsure))
    return Jet(value, slope, bend, unsure)


def _minimum(run: Evaluation, a: Jet, b: Jet) -> Jet:
    return _negate(run, _maximum(run, _negate(run, a), _negate(run, b)))


def _absolute(run: Evaluation, u: Jet) -> Jet:
    jet = _maximum(run, u, _negate(run, u))
    around = (u.value.low < 0) & (u.value.high > 0)
    low = np.where(around, 0.0, jet.value.low)
    value = jet.value
    value = Interval(
        np.array([low, value.high]), run.tail, u.value.upper, u.value.under, value.lead
    )
    return jet._replace(value=value)


def _step(run: Evaluation, u: Jet, low: np.ndarray, high: np.ndarray) -> Jet:
    value = Interval(np.array(np.broadcast_arrays(low, high)), run.tail)
    undecided = low != high
    zero = constant(0.0, run.tail)
    return Jet(value, zero, entire(run.tail).where(undecided, zero), u.unsure | undecided)


def _sign(run: Evaluation, u: Jet) -> Jet:
    low, high = u.value.ends
    moving = run.moving(u)
    sign_low = np.where(moving & (low == 0), 1.0, np.sign(low))
    sign_high = np.where(moving & (high == 0), -1.0, np.sign(high))
    run.kink(sign_low < sign_high, u)
    return _step(run, u, sign_low, sign_high)


def _floor(run: Evaluation, u: Jet) -> Jet:
    low, high = np.floor(u.value.ends)
    high = np.where(run.moving(u) & (high == u.value.high) & (high > low), high - 1, high)
    if np.any(low != high):
        nearest = np.round(middle(u.value))
        run.kink(low != high, u._replace(value=Interval(u.value.ends - nearest)))
    return _step(run, u, low, high)


def _trunc(run: Evaluation, u: Jet) -> Jet:
    down = _floor(run, u)
    up = _negate(run, _floor(run, _negate(run, u)))
    low = np.where(u.value.low >= 0, down.value.low, up.value.low)
    high = np.where(u.value.high > 0, down.value.high, up.value.high)
    return _step(run, u, low + 0.0, high + 0.0)


def _is_finite(run: Evaluation, u: Jet) -> Truth:
    """Where there is a number; what may be none is undecided by ``run``, and so are poles."""
    infinite = np.any(~np.isfinite(u.value.ends), axis=0, keepdims=False)
    return Truth(np.ones(1, bool), infinite & (not run.tail))


RULES: dict[str, Callable] = {
    "constant": lambda run, c: c,
    "add": _add,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "max": _maximum,
    "min": _minimum,
    "abs": _absolute,
    "sign": _sign,
    "floor": _floor,
    "trunc": _trunc,
    "select_n": _select,
    "and": lambda run, a, b: Truth(a.true & b.true, a.false | b.false),
    "or": lambda run, a, b: Truth(a.true | b.true, a.false & b.false),
    "xor": lambda run, a, b: Truth(
        (a.true & b.false) | (a.false & b.true), (a.true & b.true) | (a.false & b.false)
    ),
    "not": lambda run, a: Truth(a.false, a.true),
    "is_finite": _is_finite,
    "doubt": lambda run, u: Truth(np.ones(1, bool), np.ones(1, bool)),
    "zero": lambda run, u: run.constant(0.0)._replace(unsure=u.unsure),
    "integer_pow": _integer_power,
    "power": lambda run, u, c: _unary(power_function(c), run, u),
    "exponential": lambda run, u, base: _unary(exponential_function(base), run, u),
    **{op: _compare(op) for op in COMPARE},
    **{op: (lambda run, u, fn=fn: _unary(fn, run, u)) for op, fn in UNARY.items()},
}
