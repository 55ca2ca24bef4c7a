"""Functions of one variable with their derivatives on intervals: exp, tanh, erf and the like.

A function is computed by NumPy or SciPy at the ends of an interval and where it turns, and widened
by what these libraries may err. On tails it knows how its envelope follows from its argument's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special

from sn_jax._intervals import Envelope, Interval, constant, entire, log_up

# Relative errors that NumPy's and SciPy's functions are granted, and those of composed formulas.
_LIBRARY = 2.0**-46
_FORMULA = 2.0**-40
_MAX = np.finfo(float).max
_LN2 = math.log(2.0)


class Piecewise(NamedTuple):
    """A function that is monotone between turning points.

    Attributes:
      at: computes it, with limits at infinite arguments.
      turns: where it turns, in floating point.
      low, high: what it never leaves.
      envelope: u -> (upper, under) on a tail.
    """

    at: Callable[[np.ndarray], np.ndarray]
    turns: tuple[float, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    envelope: Callable[[Interval], tuple] | None = None
    error: float = _FORMULA

    def __call__(self, u: Interval) -> Interval:
        ends = self.at(u.ends)
        # A result that is lost below the smallest float still has a sign.
        tiny = np.where((u.ends == 0) | np.isinf(u.ends), 0.0, 1e-300)
        spread = np.abs(ends) * self.error + np.where(np.abs(ends) < 1e-290, tiny, 0.0)
        spread = np.where(np.isinf(ends), 0.0, spread)
        low, high = (ends - spread).min(0), (ends + spread).max(0)
        for turn in self.turns:
            value = float(self.at(np.array(turn)))
            inside = (u.low <= turn) & (turn <= u.high)
            slack = abs(value) * self.error if math.isfinite(value) else 0.0
            low = np.where(inside, np.minimum(low, value - slack), low)
            high = np.where(inside, np.maximum(high, value + slack), high)
        # What overflowed is large, not infinite.
        low, high = np.minimum(low, _MAX), np.maximum(high, -_MAX)
        ends = np.array([np.maximum(low, self.low), np.minimum(high, self.high)])
        ends[0][np.isnan(ends[0])] = -np.inf
        ends[1][np.isnan(ends[1])] = np.inf
        return Interval(ends, u.tail, *(self.envelope(u) if u.tail and self.envelope else ()))


class Unary(NamedTuple):
    """A function, its derivatives, and the interval in which they exist."""

    value: Callable[[Interval], Interval]
    first: Callable[[Interval], Interval]
    second: Callable[[Interval], Interval]
    low: float = -math.inf
    high: float = math.inf


def _rate(u: Interval) -> float:
    """k such that |u| >= k y on the tail."""
    if u.under is None or u.under[1] < 1 or u.under[2] < 0:
        return 0.0
    exponent = u.under[0] + (u.under[1] - 1) * math.log(u.tail)
    return math.exp(min(exponent, 600.0)) * (1 - 1e-6)


def _decay(constant_: float, sign: int = 0):
    """|g(u)| <= constant exp(-|u|), for u of the sign or of both."""

    def envelope(u):
        rate = _rate(u)
        if rate == 0 or (sign > 0 and u.low[0] < 0) or (sign < 0 and u.high[0] > 0):
            return None, None
        return (math.log(constant_) + 1e-12, 0.0, -rate), None

    return envelope


def _scaled(envelope: Envelope | None, q: float, log_c: float) -> Envelope | None:
    return envelope and (q * envelope[0] + log_c, q * envelope[1], q * envelope[2])


def _like_power(q: float, factor: float = 1.0, exact: bool = False):
    """|g(u)| <= |factor| |u|^q, with equality if exact: g(u) = factor u^q for u > 0."""
    log_c = math.log(abs(factor)) if factor else -1e300

    def envelope(u):
        one, two = (u.upper, u.under) if q > 0 else (u.under, u.upper)
        upper = _scaled(one, q, log_c + 1e-15)
        if not exact:
            return upper, None
        lead = None
        if u.lead is not None and u.lead[1][0, 0] > 0:
            c = np.sort(factor * np.power(u.lead[1], q), axis=0)
            lead = q * u.lead[0], c + np.array([[-1e-12], [1e-12]]) * np.abs(c)
        return upper, _scaled(two, q, log_c - 1e-15), lead

    return envelope


def _like_log(u):
    """|log u|, by log log y <= log(y) / e."""
    if u.upper is None or u.under is None or u.upper[2] > 0 or u.under[2] < 0:
        return None, None
    most = max(abs(e[0]) / math.log(u.tail) + abs(e[1]) for e in (u.upper, u.under))
    return (log_up(most + 1.0), 0.36787944117144233 + 1e-15, 0.0), None


def _softplus_envelope(u):
    upper, _ = _decay(1.0, -1)(u)
    if upper is None and u.low[0] >= 1 and u.upper is not None:
        upper = u.upper[0] + 0.7, u.upper[1], u.upper[2]
    return upper, u.under if u.low[0] >= 0 else None


def _below_identity(u):
    return u.upper, None


def _quiet(fn: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """NaN at an infinite argument, as of x / x^2, is the limit 0."""

    def at(x):
        y = fn(x)
        return np.where(np.isnan(y) & np.isinf(x), 0.0, y)

    return at


def _sech2(x):
    return 1 / np.cosh(x) ** 2


def _bell(x):
    return 2 / math.sqrt(math.pi) * np.exp(-x * x)


def _tanh2(x):
    return -2 * np.tanh(x) * _sech2(x)


def _log_cosh(x):
    # Near zero the three terms would cancel.
    near = np.log1p(2 * np.sinh(0.5 * np.clip(x, -1, 1)) ** 2)
    return np.where(np.abs(x) < 1, near, np.abs(x) + (np.log1p(np.exp(-2 * np.abs(x))) - _LN2))


def _logistic2(x):
    return -np.tanh(0.5 * x) * _sech2(0.5 * x) / 4


def _sine(shift: int) -> Callable[[Interval], Interval]:
    """sin(x + shift pi / 2)."""
    at = (np.sin, np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x))[shift % 4]

    def fn(u):
        low, high = u.ends
        known = np.abs(u.ends).max(0) < 1e8
        low, high = np.where(known, low, 0.0), np.where(known, high, 0.0)
        ends = at(np.array([low, high]))
        spread = np.abs(ends) * _FORMULA + 1e-15 * np.minimum(np.abs([low, high]), 1.0)
        out = np.array([(ends - spread).min(0), (ends + spread).max(0)])
        slack = 1e-11 * (1 + np.abs(low) + np.abs(high))
        for end, quarter in ((1, 1), (0, -1)):
            top = (quarter - shift) * (math.pi / 2)
            turn = top + 2 * math.pi * np.ceil((low - slack - top) / (2 * math.pi))
            reached = ~known | (turn <= high + slack)
            out[end] = np.where(reached, 1.0 if end else -1.0, out[end])
        return Interval(np.clip(out, -1.0, 1.0), u.tail)

    return fn


def _tan_piece(k: int) -> Callable[[Interval], Interval]:
    formula = (
        Piecewise(np.tan, error=_LIBRARY),
        Piecewise(lambda t: 1 + t * t, (0.0,), low=1.0),
        Piecewise(lambda t: 2 * t * (1 + t * t)),
    )

    def fn(u):
        safe = np.where(np.abs(u.ends) < 1e8, u.ends, 0.0)
        turn = np.array([safe[0] - 1e-9, safe[1] + 1e-9]) / math.pi + 0.5
        pole = (np.floor(turn[0]) != np.floor(turn[1])) | (np.abs(u.ends).max(0) >= 1e8)
        tangent = formula[0](Interval(np.where(pole, 0.0, safe)))
        out = tangent if k == 0 else formula[k](tangent)
        return Interval(np.where(pole, np.array([[-np.inf], [np.inf]]), out.ends), u.tail)

    return fn


def _cubic_root_second(u: Interval) -> Interval:
    part = Piecewise(lambda x: -2 / (9 * np.cbrt(x) ** 5), envelope=_like_power(-5 / 3, 2 / 9))(u)
    around = (u.low <= 0) & (u.high >= 0)
    return entire(u.tail).where(around, part)


def power_function(c: float) -> Unary:
    def piece(factor: float, q: float) -> Piecewise:
        at = _quiet(lambda x: factor * np.power(x, q))
        return Piecewise(at, envelope=_like_power(q, factor, True))

    return Unary(piece(1.0, c), piece(c, c - 1), piece(c * (c - 1), c - 2), 0.0)


def exponential_function(base: float) -> Unary:
    log = math.log(base)

    def piece(factor: float) -> Piecewise:
        low, high = (0.0, math.inf) if factor >= 0 else (-math.inf, 0.0)
        return Piecewise(lambda x: factor * np.power(base, x), low=low, high=high)

    return Unary(piece(1.0), piece(log), piece(log * log))


_EXP = Piecewise(np.exp, low=0.0, envelope=_decay(1.0, -1), error=_LIBRARY)
_LOGISTIC = Piecewise(scipy.special.expit, low=0.0, high=1.0, envelope=_decay(1.0, -1))
_LOGISTIC1 = Piecewise(lambda x: _sech2(0.5 * x) / 4, (0.0,), 0.0, 0.25, _decay(1.0))
_LOGISTIC2 = Piecewise(_logistic2, (-math.log(2 + 3**0.5), math.log(2 + 3**0.5)),
                       envelope=_decay(1.0))  # fmt: skip
_TANH = Piecewise(np.tanh, (), -1.0, 1.0, _below_identity, _LIBRARY)
_SECH2 = Piecewise(_sech2, (0.0,), 0.0, 1.0, _decay(4.0))
_THIRD = math.atanh(3**-0.5)
_BELL = Piecewise(_bell, (0.0,), 0.0, envelope=_decay(2.0))
_BELL1 = Piecewise(_quiet(lambda x: -2 * x * _bell(x)), (-(0.5**0.5), 0.5**0.5),
                   envelope=_decay(3.0))  # fmt: skip


def _negative(fn: Callable[[Interval], Interval]) -> Callable[[Interval], Interval]:
    return lambda u: -fn(u)


def _grow(u: Interval) -> tuple:
    """exp(|u|) / 4 <= |g(u)| <= exp(|u|) far out, where |u| is about a multiple of y."""
    rate = _rate(u)
    under = (-1.4, 0.0, rate) if rate * u.tail > 1 else None
    if u.upper is None or u.upper[1] > 1 or u.upper[2] > 0:
        return None, under
    most = u.upper[0] + (u.upper[1] - 1) * math.log(u.tail)
    return (0.0, 0.0, math.exp(min(most, 600.0)) * (1 + 1e-12)), under


def _cosh_piece(sinh: bool) -> Piecewise:
    if sinh:
        return Piecewise(np.sinh, envelope=_grow)
    return Piecewise(np.cosh, (0.0,), low=1.0, envelope=_grow)


def _asin1(x):
    return 1 / np.sqrt((1 - x) * (1 + x))


def _asin2(x):
    return x * _asin1(x) ** 3


def _acosh1(x):
    return 1 / (np.sqrt(x - 1) * np.sqrt(x + 1))


def _asinh2(x):
    # One division at a time: the cube of the root would overflow first.
    root = np.hypot(1, x)
    return -x / root / root / root


def _erf_inv1(x):
    return math.sqrt(math.pi) / 2 * np.exp(scipy.special.erfinv(x) ** 2)


UNARY: dict[str, Unary] = {
    "exp": Unary(_EXP, _EXP, _EXP),
    "exp2": Unary(
        Piecewise(np.exp2, low=0.0),
        Piecewise(lambda x: _LN2 * np.exp2(x), low=0.0),
        Piecewise(lambda x: _LN2**2 * np.exp2(x), low=0.0),
    ),
    "expm1": Unary(
        Piecewise(np.expm1, low=-1.0, error=_LIBRARY,
                  envelope=lambda u: _below_identity(u) if u.high[0] <= 0 else (None, None)),
        _EXP, _EXP,
    ),
    "log": Unary(
        Piecewise(np.log, envelope=_like_log, error=_LIBRARY),
        lambda u: u**-1,
        lambda u: -(u**-2),
        0.0,
    ),
    "log1p": Unary(
        Piecewise(np.log1p, error=_LIBRARY,
                  envelope=lambda u: _below_identity(u) if u.low[0] >= 0 else (None, None)),
        lambda u: (u + constant(1.0, u.tail)) ** -1,
        lambda u: -((u + constant(1.0, u.tail)) ** -2),
        -1.0,
    ),
    "tanh": Unary(
        _TANH,
        _SECH2,
        Piecewise(_tanh2, (-_THIRD, _THIRD), envelope=_decay(8.0)),
    ),
    "sinh": Unary(_cosh_piece(True), _cosh_piece(False), _cosh_piece(True)),
    "cosh": Unary(_cosh_piece(False), _cosh_piece(True), _cosh_piece(False)),
    "log_cosh": Unary(
        Piecewise(_log_cosh, (0.0,), low=0.0, envelope=_below_identity), _TANH, _SECH2
    ),
    "tan": Unary(_tan_piece(0), _tan_piece(1), _tan_piece(2)),
    "sin": Unary(_sine(0), _sine(1), _sine(2)),
    "cos": Unary(_sine(1), _sine(2), _sine(3)),
    "asin": Unary(
        Piecewise(np.arcsin, error=_LIBRARY),
        Piecewise(_asin1, (0.0,)),
        Piecewise(_asin2),
        -1.0,
        1.0,
    ),
    "acos": Unary(
        Piecewise(np.arccos, error=_LIBRARY),
        _negative(Piecewise(_asin1, (0.0,))),
        _negative(Piecewise(_asin2)),
        -1.0,
        1.0,
    ),
    "atan": Unary(
        Piecewise(np.arctan, error=_LIBRARY),
        Piecewise(lambda x: 1 / (1 + x * x), (0.0,), 0.0, 1.0, _like_power(-2.0)),
        Piecewise(_quiet(lambda x: -2 * (x / (1 + x * x)) / (1 + x * x)), (-(3**-0.5), 3**-0.5),
                  envelope=_like_power(-3.0, 2.0)),
    ),
    "asinh": Unary(
        Piecewise(np.arcsinh, envelope=lambda u: (u.upper, None), error=_LIBRARY),
        Piecewise(lambda x: 1 / np.hypot(1, x), (0.0,), 0.0, 1.0, _like_power(-1.0)),
        Piecewise(_quiet(_asinh2), (-(0.5**0.5), 0.5**0.5),
                  envelope=_like_power(-2.0)),
    ),
    "acosh": Unary(
        Piecewise(np.arccosh, low=0.0),
        Piecewise(_quiet(_acosh1), low=0.0),
        Piecewise(_quiet(lambda x: -(x * _acosh1(x)) * _acosh1(x) * _acosh1(x)), high=0.0),
        1.0,
    ),
    "atanh": Unary(
        Piecewise(np.arctanh, error=_LIBRARY),
        Piecewise(lambda x: _asin1(x) ** 2, (0.0,)),
        Piecewise(lambda x: 2 * x * _asin1(x) ** 4),
        -1.0,
        1.0,
    ),
    "logistic": Unary(_LOGISTIC, _LOGISTIC1, _LOGISTIC2),
    "softplus": Unary(
        Piecewise(lambda x: np.logaddexp(0.0, x), low=0.0, envelope=_softplus_envelope),
        _LOGISTIC, _LOGISTIC1,
    ),
    "erf": Unary(Piecewise(scipy.special.erf, (), -1.0, 1.0), _BELL, _BELL1),
    "erfc": Unary(
        Piecewise(scipy.special.erfc, (), 0.0, 2.0, _decay(2.0, 1)),
        _negative(_BELL),
        _negative(_BELL1),
    ),
    "erf_inv": Unary(
        Piecewise(scipy.special.erfinv),
        Piecewise(_erf_inv1, (0.0,)),
        Piecewise(lambda x: 2 * scipy.special.erfinv(x) * _erf_inv1(x) ** 2),
        -1.0,
        1.0,
    ),
    "sqrt": power_function(0.5),
    "rsqrt": power_function(-0.5),
    "cbrt": Unary(
        Piecewise(np.cbrt, envelope=_like_power(1 / 3, 1.0, True)),
        Piecewise(lambda x: 1 / (3 * np.cbrt(x) ** 2), (0.0,), 0.0,
                  envelope=_like_power(-2 / 3, 1 / 3, True)),
        _cubic_root_second,
    ),
}  # fmt: skip
