"""Interval arithmetic in float64, rounded outwards: on arrays of boxes, and on a tail.

A sum or product that is exact is not widened, so that kinks stay at exact places. On a tail
|x| >= t an interval also carries envelopes and a leading term: what overflows or vanishes there
still has a finite quotient.
"""

import math
from collections.abc import Callable

import numpy as np

_LN2_UP = 0.6931471805599454


def _outwards(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Rows (low, high) moved by one float where the error, whose sign counts, asks for it."""
    low, high = values
    low = np.where(error[0] >= 0, low, np.nextafter(low, -np.inf))
    return np.array([low, np.where(error[1] <= 0, high, np.nextafter(high, np.inf))])


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = a + b
    part = total - a
    # Knuth's error of a sum is exact: sums without one are not widened.
    out = _outwards(total, (a - (total - part)) + (b - part))
    out[0][np.isnan(out[0])] = -np.inf
    out[1][np.isnan(out[1])] = np.inf
    return out


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = 134217729.0 * a
    high = scaled - (scaled - a)
    return high, a - high


def _product_error(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """a b - p exactly, NaN where it cannot be told (Dekker's product)."""
    (a1, a2), (b1, b2) = _split(a), _split(b)
    error = a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2)
    error = np.where(np.abs(p) < 1e-280, np.nan, error)
    exact = (a == 0) | (b == 0) | (np.abs(a) == 1) | (np.abs(b) == 1)
    return np.where(exact, 0.0, error)


def _extremes(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    low = np.where(error >= 0, values, np.nextafter(values, -np.inf)).min(0)
    return np.array([low, np.where(error <= 0, values, np.nextafter(values, np.inf)).max(0)])


_AC, _BC = [0, 0, 1, 1], [0, 1, 0, 1]


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a[_AC], b[_BC]
    p = a * b
    # No real number is infinite: zero times whatever is zero.
    p = np.where(np.isnan(p), 0.0, p)
    return _extremes(p, _product_error(a, b, p))


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a4, b4 = a[_AC], b[_BC]
    q = a4 / b4
    # inf / inf: the other corners hold its limits.
    q = np.where(np.isnan(q), 0.0, q)
    p = q * b4
    error = ((a4 - p) - _product_error(q, b4, p)) * np.sign(b4)
    error = np.where((a4 == 0) | (np.abs(b4) == 1), 0.0, error)
    out = _extremes(q, error)
    zero = (b[0] <= 0) & (b[1] >= 0)
    if np.any(zero):
        # A divisor that touches zero from one side keeps the sign of the quotient.
        sign = np.where(b[0] == 0, 1.0, np.where(b[1] == 0, -1.0, 0.0)) * (b[0] < b[1])
        ends = np.where(sign == 0, np.nan, sign)
        near = np.where(ends > 0, b[1], b[0])
        inverse = np.sort(np.array([np.broadcast_to(ends * np.inf, near.shape), 1 / near]), axis=0)
        inverse = np.array([np.nextafter(inverse[0], -np.inf), np.nextafter(inverse[1], np.inf)])
        touched = times(a, np.where(np.isnan(inverse), 0.0, inverse))
        entire = np.array([[-np.inf], [np.inf]])
        out = np.where(zero, np.where(np.isnan(ends), entire, touched), out)
    return out


def _power(a: np.ndarray, n: int) -> np.ndarray:
    """The n-th power, n >= 1, by multiplications of magnitudes."""
    magnitudes = np.abs(a)
    if n % 2 == 0:
        inside = (a[0] <= 0) & (a[1] >= 0)
        magnitudes = np.array([np.where(inside, 0.0, magnitudes.min(0)), magnitudes.max(0)])
        out = magnitudes
        for _ in range(n - 1):
            p = out * magnitudes
            out = _outwards(p, _product_error(out, magnitudes, p))
        return out
    # Odd powers are monotone: each end on its own, rounded away from the middle.
    ends = []
    for end in (0, 1):
        point = np.array([a[end], a[end]])
        out = point
        for _ in range(n - 1):
            out = times(out, np.abs(point))
        ends.append(out[end])
    return np.array(ends)


# An envelope (alpha, p, e) of a magnitude on a tail: log |u| against alpha + p log y + e y, where
# y = |x| is at least where the tail begins.
Envelope = tuple[float, float, float]


def _top(envelope: Envelope, tail: float) -> float:
    """The largest value under an upper envelope, rounded up."""
    alpha, p, e = envelope
    if e > 0 or (e == 0 and p > 0) or (p > 0 and p / tail + e >= 0):
        return math.inf
    growth = p * math.log(tail)
    exponent = alpha + growth + e * tail
    exponent += 1e-12 * (1 + abs(growth) + abs(alpha) + abs(e) * tail)
    return math.inf if exponent > 700 else math.exp(exponent) * (1 + 1e-12) + 5e-324


def _both(a: Envelope, b: Envelope, sign: float = 1.0) -> Envelope:
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]


# (p, ends (2, 1)): y^p times a number between the ends.
_Lead = tuple[float, np.ndarray]


def _growth(p: float, tail: float) -> np.ndarray:
    """The least and the largest of y^p for y >= tail, as an interval (2, 1)."""
    if p == 0:
        return np.ones((2, 1))
    begin = math.exp(min(p * math.log(tail), 709.0))
    margin = 1e-12 * (1 + abs(p) * math.log(tail))
    ends = (begin * (1 - margin), math.inf) if p > 0 else (0.0, begin * (1 + margin) + 5e-324)
    return np.array(ends)[:, None]


def _spread(lead: _Lead, tail: float) -> np.ndarray:
    return times(lead[1], _growth(lead[0], tail))


def _aligned(a: _Lead, b: _Lead, tail: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The faster of two growths, and what stands before it in each."""
    p = max(a[0], b[0])
    first, second = (times(c, _growth(q - p, tail)) for q, c in (a, b))
    return p, first, second


def _join(pick: Callable[[float, float], float], a: Envelope, b: Envelope) -> Envelope:
    return pick(a[0], b[0]), pick(a[1], b[1]), pick(a[2], b[2])


class Interval:
    """Closed intervals: ends (2, n); on a tail |x| >= ``tail`` > 0, n = 1, also envelopes.

    ``lead`` (p, c) says that the values are ``y^p`` times numbers in the interval c: what the
    leading terms of two parts cancel, envelopes of magnitudes cannot know.
    """

    __slots__ = ("ends", "lead", "tail", "under", "upper")

    def __init__(
        self,
        ends: np.ndarray,
        tail: float = 0.0,
        upper: Envelope | None = None,
        under: Envelope | None = None,
        lead: _Lead | None = None,
    ):
        self.ends, self.tail, self.upper, self.under, self.lead = ends, tail, upper, under, lead
        if not tail:
            return
        if lead is not None:
            ends = meet(ends, _spread(lead, tail))
            self.ends = ends
        low, high = float(ends[0, 0]), float(ends[1, 0])
        if upper is not None and (top := _top(upper, tail)) < math.inf:
            low, high = max(low, -top), min(high, top)
            self.ends = np.array([[low], [high]])
        largest = max(abs(low), abs(high))
        if largest < math.inf and (lead is None or lead[0] >= 0):
            self.lead = (0.0, self.ends)
        if largest < math.inf and (upper is None or (upper[2], upper[1]) > (0.0, 0.0)):
            self.upper = (log_up(largest), 0.0, 0.0)
        if low > 0 or high < 0:
            least = (-log_up(1 / min(abs(low), abs(high))), 0.0, 0.0)
            if under is None or (under[2], under[1]) < (0.0, 0.0):
                self.under = least
        elif low < 0 < high:
            self.under = None

    @property
    def low(self) -> np.ndarray:
        return self.ends[0]

    @property
    def high(self) -> np.ndarray:
        return self.ends[1]

    @property
    def zero(self) -> bool:
        return self.ends.shape[1] == 1 and not self.ends.any()

    def __neg__(self) -> "Interval":
        lead = self.lead and (self.lead[0], -self.lead[1][::-1])
        return Interval(-self.ends[::-1], self.tail, self.upper, self.under, lead)

    def __add__(self, other: "Interval") -> "Interval":
        if self.zero:
            return other
        if other.zero:
            return self
        ends = plus(self.ends, other.ends)
        if not (self.tail and other.tail):
            return Interval(ends)
        upper = under = None
        if self.upper and other.upper:
            upper = _join(max, self.upper, other.upper)
            upper = upper[0] + _LN2_UP, upper[1], upper[2]
        same = (self.low[0] >= 0 and other.low[0] >= 0) or (
            self.high[0] <= 0 and other.high[0] <= 0
        )
        for one, two in ((self, other), (other, self)):
            if one.under is None:
                continue
            if same:
                new = one.under
            elif (
                two.upper is not None and _top(_both(two.upper, one.under, -1.0), self.tail) <= 0.5
            ):
                new = one.under[0] - _LN2_UP, one.under[1], one.under[2]
            else:
                continue
            if under is None or new[1:] > under[1:]:
                under = new
        lead = None
        if self.lead and other.lead:
            p, a, b = _aligned(self.lead, other.lead, self.tail)
            lead = p, plus(a, b)
        return Interval(ends, self.tail, upper, under, lead)

    def __sub__(self, other: "Interval") -> "Interval":
        return self + -other

    def __mul__(self, other: "Interval") -> "Interval":
        if self.zero or other.zero:
            return self if self.zero else other
        ends = times(self.ends, other.ends)
        if not (self.tail and other.tail):
            return Interval(ends)
        upper = _both(self.upper, other.upper) if self.upper and other.upper else None
        under = _both(self.under, other.under) if self.under and other.under else None
        lead = None
        if self.lead and other.lead:
            lead = self.lead[0] + other.lead[0], times(self.lead[1], other.lead[1])
        return Interval(ends, self.tail, upper, under, lead)

    def __truediv__(self, other: "Interval") -> "Interval":
        ends = _over(self.ends, other.ends)
        if not (self.tail and other.tail):
            return Interval(ends)
        upper = _both(self.upper, other.under, -1.0) if self.upper and other.under else None
        under = _both(self.under, other.upper, -1.0) if self.under and other.upper else None
        lead = None
        if self.lead and other.lead and (other.lead[1][0, 0] > 0 or other.lead[1][1, 0] < 0):
            lead = self.lead[0] - other.lead[0], _over(self.lead[1], other.lead[1])
        return Interval(ends, self.tail, upper, under, lead)

    def __pow__(self, n: int) -> "Interval":
        if n < 0:
            return constant(1.0, self.tail) / self**-n
        if n == 0:
            return constant(1.0, self.tail)
        ends = _power(self.ends, n)
        upper, under = (e and (n * e[0], n * e[1], n * e[2]) for e in (self.upper, self.under))
        lead = self.lead and (n * self.lead[0], _power(self.lead[1], n))
        return Interval(ends, self.tail, upper, under, lead)

    def hull(self, other: "Interval") -> "Interval":
        ends = np.array([np.minimum(self.low, other.low), np.maximum(self.high, other.high)])
        upper = under = None
        if self.upper and other.upper:
            upper = _join(max, self.upper, other.upper)
        if self.zero or other.zero:
            upper = other.upper if self.zero else self.upper
        if self.under and other.under:
            under = _join(min, self.under, other.under)
        lead = None
        if self.lead and other.lead:
            p, a, b = _aligned(self.lead, other.lead, self.tail)
            lead = p, np.array([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])
        return Interval(ends, self.tail, upper, under, lead)

    def where(self, mask: np.ndarray, other: "Interval") -> "Interval":
        if self.tail:
            return self if bool(mask[0]) else other
        return Interval(np.where(mask, self.ends, other.ends))


def log_up(x: float) -> float:
    if x <= 0:
        return -1e300
    return math.log(x) + 1e-12 * (1 + abs(math.log(x))) if x < math.inf else 745.2


def constant(value: float, tail: float = 0.0) -> Interval:
    if math.isnan(value):
        return entire(tail)
    return Interval(np.array([[value], [value]]), tail)


def entire(tail: float = 0.0) -> Interval:
    return Interval(np.array([[-np.inf], [np.inf]]), tail)


def middle(x: Interval) -> np.ndarray:
    return 0.5 * x.low + 0.5 * x.high


def meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.array([np.maximum(a[0], b[0]), np.minimum(a[1], b[1])])
    # Both hold the truth; where rounding leaves nothing between them, neither is trusted more.
    return np.where(out[0] <= out[1], out, a)
