"""Slopes of scalar functions: intervals that hold every difference quotient of a small program.

The function is a list of primitives. It is evaluated on boxes as an interval jet (f, f', f''),
rounded outwards; branch and bound splits the boxes until the range of f' is tight. On the two
tails every intermediate also carries an envelope: x * logistic(x) has a finite slope there.
Nothing here knows JAX: the caller translates, and decides what is one function of one number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import scipy.special

# Relative errors that NumPy's and SciPy's functions are granted, and those of composed formulas.
_LIBRARY = 2.0**-46
_FORMULA = 2.0**-40
# Where the two tails may begin; beyond the last, float32 holds no number.
_TAILS = tuple(2.0**k for k in (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128))
_MAX = np.finfo(float).max
_LN2, _LN2_UP = math.log(2.0), 0.6931471805599454
# Branch and bound stops at this gap, relative to the largest slope seen.
_GAP = 1e-8
_BATCH = 256
_MOST_BOXES = 20_000
_MOST_ROUNDS = 200

Number = int | float


class Ref(int):
    """The index of an earlier node; unlike a plain int, never equal to a constant's hash."""

    def __hash__(self):
        return hash(("Ref", int(self)))

    def __eq__(self, other):
        return isinstance(other, Ref) and int(self) == int(other)

    def __ne__(self, other):
        return not self == other


class Node(NamedTuple):
    """One primitive of a scalar program.

    Attributes:
      op: the name of the JAX primitive; "var" for the variable.
      args: references to earlier nodes, or constants.
      params: static parameters, as the exponent ``y`` of integer_pow.
    """

    op: str
    args: tuple[Number, ...] = ()
    params: Mapping[str, Any] = MappingProxyType({})


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
    """The function is discontinuous: no Lipschitz constant exists."""


class Unknown(ValueError):
    """A primitive that this module does not know; its name is the attribute ``op``."""

    def __init__(self, op: str):
        super().__init__(f"no slopes are known of the primitive {op!r}.")
        self.op = op


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
    program = _Program()
    done: list[Any] = []
    for node in nodes:
        args = [done[a] if isinstance(a, Ref) else _constant(a) for a in node.args]
        done.append(program.add(node.op, args, node.params))
    # Infinite ends and what they meet are part of the arithmetic.
    with np.errstate(all="ignore"):
        return _slopes(program.reduced(done[-1]), low, high, eps)


# Programs -----------------------------------------------------------------------------------------


def _constant(value: Any) -> float | bool:
    return bool(value) if isinstance(value, (bool, np.bool_)) else float(value)


_SAME = {"copy", "copy_p", "stop_gradient", "reduce_precision", "optimization_barrier"}
_FLIP = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_COMPARE = {"lt", "le", "gt", "ge", "eq", "ne"}
_LOGIC = {"and", "or", "not", "xor"}


class _Program:
    """Nodes without repetition, rewritten where plain evaluation would lose the tails."""

    def __init__(self):
        self.nodes: list[tuple[str, tuple, Any]] = []
        self.index: dict[Any, Ref] = {}
        self.emit("var")

    def emit(self, op: str, *args: Any, param: Any = None) -> Ref:
        # Ref(1), 1.0 and True are equal, and must not be taken for each other.
        key = op, tuple((type(a), repr(a)) for a in args), param
        if key not in self.index:
            self.index[key] = Ref(len(self.nodes))
            self.nodes.append((op, args, param))
        return self.index[key]

    def match(self, arg: Any, op: str) -> tuple | None:
        """The arguments of ``arg`` if it is that operation."""
        if isinstance(arg, Ref) and self.nodes[arg][0] == op:
            return self.nodes[arg][1]
        return None

    def is_bool(self, arg: Any) -> bool:
        if not isinstance(arg, Ref):
            return isinstance(arg, bool)
        return self.nodes[arg][0] in _COMPARE | _LOGIC | {"select_bool"}

    def add(self, op: str, args: list[Any], params: Mapping[str, Any]) -> Any:
        if op == "var":
            return Ref(0)
        if op in _SAME:
            return args[0]
        if op == "convert_element_type":
            return self.convert(args[0], params.get("new_dtype", "float32"))
        if op == "is_finite":
            return not (isinstance(args[0], float) and not math.isfinite(args[0]))
        if op in _LOGIC:
            return self.logic(op, args)
        if op in _COMPARE:
            return self.compare(op, *args)
        if op == "select_n":
            return self.select(*args)
        if op == "clamp":
            return self.add("min", [self.add("max", args[:2], {}), args[2]], {})
        rewrite = getattr(self, f"make_{op}", None)
        if rewrite is not None:
            return rewrite(*args, **({"y": params["y"]} if op == "integer_pow" else {}))
        if op not in _RULES:
            raise Unknown(op)
        return self.emit(op, *args)

    def convert(self, arg: Any, dtype: Any) -> Any:
        name = getattr(dtype, "name", str(dtype))
        if name == "bool":
            return arg if self.is_bool(arg) else self.compare("ne", arg, 0.0)
        if self.is_bool(arg):
            return self.select(arg, 0.0, 1.0)
        if "int" in name and isinstance(arg, Ref):
            arg = self.emit("trunc", arg)
        return arg

    def logic(self, op: str, args: list[Any]) -> Any:
        if not all(map(self.is_bool, args)):
            raise Unknown(op)
        if op == "not":
            return self.emit(op, *args) if isinstance(args[0], Ref) else not args[0]
        a, b = sorted(args, key=lambda x: isinstance(x, Ref))
        if isinstance(a, bool):
            if op == "xor":
                return self.logic("not", [b]) if a else b
            return b if a == (op == "and") else a
        if a == b:
            return False if op == "xor" else a
        return self.emit(op, a, b)

    def compare(self, op: str, a: Any, b: Any) -> Any:
        if self.is_bool(a) or self.is_bool(b):
            if op in ("eq", "ne"):
                return self.logic("xor", [a, b] if op == "ne" else [self.logic("not", [a]), b])
            raise Unknown(op)
        if isinstance(a, Ref) == isinstance(b, Ref) and (a == b or not isinstance(a, Ref)):
            # Identical operands: the guards against NaN, never true of real numbers.
            return {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
                    "eq": a == b, "ne": a != b}[op]  # fmt: skip
        if not isinstance(a, Ref):
            return self.compare(_FLIP.get(op, op), b, a)
        if isinstance(b, float) and not math.isfinite(b):
            return op == "ne" or (op in ("lt", "le") if b > 0 else b < 0 and op in ("gt", "ge"))
        (base, p), (other, q) = self.multiple(a), self.multiple(b)
        if isinstance(b, Ref) and base == other:
            # x > x / 10 is x > 0, which is decided on the tails as well.
            if p == q:
                return self.compare(op, 0.0, 0.0)
            return self.compare(op, base if p > q else self.make_neg(base), 0.0)
        return self.emit(op, a, b)

    def multiple(self, x: Any) -> tuple[Any, float]:
        """(base, c) where x is c times base."""
        factors = self.match(x, "mul")
        if factors is not None and isinstance(factors[1], float) and math.isfinite(factors[1]):
            return factors[0], factors[1]
        negated = self.match(x, "neg")
        return (x, 1.0) if negated is None else (negated[0], -1.0)

    def select(self, which: Any, *cases: Any) -> Any:
        if not self.is_bool(which):
            if isinstance(which, Ref) or len(cases) <= which:
                raise Unknown("select_n")
            return cases[int(which)]
        false, true = cases
        if isinstance(which, bool):
            return true if which else false
        if self.same(true, false):
            return true
        if self.is_bool(true) or self.is_bool(false):
            yes = self.logic("and", [which, true])
            no = self.logic("and", [self.logic("not", [which]), false])
            return self.logic("or", [yes, no])
        return self.emit("select_n", which, false, true)

    @staticmethod
    def same(a: Any, b: Any) -> bool:
        return type(a) is type(b) and a == b

    # Rewrites: real arithmetic allows them, and the tails of what they give are finite.

    def make_neg(self, x: Any) -> Any:
        inner = self.match(x, "neg")
        if inner is not None:
            return inner[0]
        return self.emit("neg", x) if isinstance(x, Ref) else -x

    def make_sub(self, a: Any, b: Any) -> Any:
        if self.same(a, b) and isinstance(a, Ref):
            return 0.0
        return self.make_add(a, self.make_neg(b))

    def make_add(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Ref):
            a, b = b, a
        if not isinstance(b, Ref):
            if b == 0:
                return a
            if b == 1 and isinstance(a, Ref):
                negated = self.match(a, "neg")
                sign, inner = (a, 1.0) if negated is None else (negated[0], -1.0)
                for name, scale in (("tanh", 2.0), ("erf", 1.0)):
                    found = self.match(sign, name)
                    if found is not None and name == "tanh":
                        argument = self.make_mul(found[0], scale * inner)
                        return self.make_mul(self.emit("logistic", argument), 2.0)
                    if found is not None:
                        argument = found[0] if inner < 0 else self.make_neg(found[0])
                        return self.emit("erfc", argument)
                found = self.match(sign, "logistic")
                if found is not None and inner < 0:
                    return self.emit("logistic", self.make_neg(found[0]))
        return self.emit("add", a, b)

    def make_mul(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Ref):
            a, b = b, a
        if isinstance(a, Ref) and self.same(a, b):
            return self.make_integer_pow(a, 2)
        sine, cosine = (self.match(a, "sin") or self.match(b, "sin"),
                        self.match(a, "cos") or self.match(b, "cos"))  # fmt: skip
        if sine is not None and sine == cosine:
            return self.make_mul(self.emit("sin", self.make_mul(sine[0], 2.0)), 0.5)
        if isinstance(b, float) and isinstance(a, Ref):
            if b == 1:
                return a
            if b == -1:
                return self.make_neg(a)
            if b == 0:
                return 0.0
        return self.emit("mul", a, b)

    def one_plus_exp(self, x: Any) -> Any:
        """w where x is 1 + exp(w)."""
        terms = self.match(x, "add")
        if terms is not None and terms[1] == 1.0 and not isinstance(terms[1], Ref):
            inner = self.match(terms[0], "exp")
            return None if inner is None else inner[0]
        return None

    def make_div(self, a: Any, b: Any) -> Any:
        w = self.one_plus_exp(b)
        if w is not None:
            below = self.emit("logistic", self.make_neg(w))
            terms = self.match(a, "add") or (a, 0.0)
            for exp, sign in ((terms[0], 1.0), ((self.match(terms[0], "neg") or (None,))[0], -1.0)):
                inner = self.match(exp, "exp")
                if inner is not None and self.same(inner[0], w) and isinstance(terms[1], float):
                    # (c + exp w) / (1 + exp w), as tanh is often written.
                    above = self.make_mul(self.emit("logistic", w), sign)
                    return self.make_add(above, self.make_mul(below, terms[1]))
            return self.make_mul(a, below)
        if self.same(b, 1.0):
            return a
        return self.emit("div", a, b)

    def make_log(self, x: Any) -> Any:
        w = self.one_plus_exp(x)
        inner = self.match(x, "cosh")
        if inner is not None:
            return self.emit("log_cosh", *inner)
        return self.emit("log", x) if w is None else self.emit("softplus", w)

    def make_log1p(self, x: Any) -> Any:
        inner = self.match(x, "exp")
        return self.emit("log1p", x) if inner is None else self.emit("softplus", inner[0])

    def make_square(self, x: Any) -> Any:
        return self.make_integer_pow(x, 2)

    def make_integer_pow(self, x: Any, y: int) -> Any:
        if y == 0:
            return 1.0
        for name, half in (("sin", -0.5), ("cos", 0.5)):
            inner = self.match(x, name)
            if inner is not None and y == 2:
                double = self.emit("cos", self.make_mul(inner[0], 2.0))
                return self.make_add(self.make_mul(double, half), 0.5)
        return x if y == 1 else self.emit("integer_pow", x, param=int(y))

    def make_pow(self, x: Any, y: Any) -> Any:
        if isinstance(y, Ref):
            if isinstance(x, Ref) or x <= 0:
                raise Unknown("pow")
            if x == 1:
                return 1.0
            return self.emit("exponential", y, param=x)
        if y == int(y) and abs(y) < 64:
            return self.make_integer_pow(x, int(y))
        return self.emit("power", x, param=float(y))

    def make_atan2(self, y: Any, x: Any) -> Any:
        if isinstance(x, Ref) or x <= 0:
            raise Unknown("atan2")
        return self.emit("atan", self.make_div(y, x))

    def make_round(self, x: Any) -> Any:
        # Halves round another way, which moves a jump by nothing.
        return self.emit("floor", self.make_add(x, 0.5)) if isinstance(x, Ref) else float(round(x))

    def make_ceil(self, x: Any) -> Any:
        return self.make_neg(self.emit("floor", self.make_neg(x)))

    def reduced(self, output: Any) -> tuple:
        """What the output needs, as a hashable tuple; a constant stays one node."""
        if not isinstance(output, Ref):
            return ("var", (), None), ("constant", (float(output),), None)
        if self.is_bool(output):
            output = self.select(output, 0.0, 1.0)
        needed, stack = {0}, [int(output)]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack += [int(a) for a in self.nodes[i][1] if isinstance(a, Ref)]
        new = {old: Ref(i) for i, old in enumerate(sorted(needed))}
        return tuple(
            (op, tuple(new[int(a)] if isinstance(a, Ref) else a for a in args), param)
            for op, args, param in (self.nodes[i] for i in sorted(needed))
        )


# Intervals ----------------------------------------------------------------------------------------


def _outwards(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Rows (low, high) moved by one float where the error, whose sign counts, asks for it."""
    low, high = values
    low = np.where(error[0] >= 0, low, np.nextafter(low, -np.inf))
    return np.array([low, np.where(error[1] <= 0, high, np.nextafter(high, np.inf))])


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
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


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
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
        touched = _times(a, np.where(np.isnan(inverse), 0.0, inverse))
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
            out = _times(out, np.abs(point))
        ends.append(out[end])
    return np.array(ends)


# An envelope (alpha, p, e) of a magnitude on a tail: log |u| against alpha + p log y + e y, where
# y = |x| is at least where the tail begins.
_Envelope = tuple[float, float, float]


def _top(envelope: _Envelope, tail: float) -> float:
    """The largest value under an upper envelope, rounded up."""
    alpha, p, e = envelope
    if e > 0 or (e == 0 and p > 0) or (p > 0 and p / tail + e >= 0):
        return math.inf
    growth = p * math.log(tail)
    exponent = alpha + growth + e * tail
    exponent += 1e-12 * (1 + abs(growth) + abs(alpha) + abs(e) * tail)
    return math.inf if exponent > 700 else math.exp(exponent) * (1 + 1e-12) + 5e-324


def _both(a: _Envelope, b: _Envelope, sign: float = 1.0) -> _Envelope:
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
    return _times(lead[1], _growth(lead[0], tail))


def _aligned(a: _Lead, b: _Lead, tail: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The faster of two growths, and what stands before it in each."""
    p = max(a[0], b[0])
    first, second = (_times(c, _growth(q - p, tail)) for q, c in (a, b))
    return p, first, second


def _join(pick: Callable[[float, float], float], a: _Envelope, b: _Envelope) -> _Envelope:
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
        upper: _Envelope | None = None,
        under: _Envelope | None = None,
        lead: _Lead | None = None,
    ):
        self.ends, self.tail, self.upper, self.under, self.lead = ends, tail, upper, under, lead
        if not tail:
            return
        if lead is not None:
            ends = _meet(ends, _spread(lead, tail))
            self.ends = ends
        low, high = float(ends[0, 0]), float(ends[1, 0])
        if upper is not None and (top := _top(upper, tail)) < math.inf:
            low, high = max(low, -top), min(high, top)
            self.ends = np.array([[low], [high]])
        largest = max(abs(low), abs(high))
        if largest < math.inf and (lead is None or lead[0] >= 0):
            self.lead = (0.0, self.ends)
        if largest < math.inf and (upper is None or (upper[2], upper[1]) > (0.0, 0.0)):
            self.upper = (_log_up(largest), 0.0, 0.0)
        if low > 0 or high < 0:
            least = (-_log_up(1 / min(abs(low), abs(high))), 0.0, 0.0)
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
        ends = _sum(self.ends, other.ends)
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
            lead = p, _sum(a, b)
        return Interval(ends, self.tail, upper, under, lead)

    def __sub__(self, other: "Interval") -> "Interval":
        return self + -other

    def __mul__(self, other: "Interval") -> "Interval":
        if self.zero or other.zero:
            return self if self.zero else other
        ends = _times(self.ends, other.ends)
        if not (self.tail and other.tail):
            return Interval(ends)
        upper = _both(self.upper, other.upper) if self.upper and other.upper else None
        under = _both(self.under, other.under) if self.under and other.under else None
        lead = None
        if self.lead and other.lead:
            lead = self.lead[0] + other.lead[0], _times(self.lead[1], other.lead[1])
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


def _log_up(x: float) -> float:
    if x <= 0:
        return -1e300
    return math.log(x) + 1e-12 * (1 + abs(math.log(x))) if x < math.inf else 745.2


def constant(value: float, tail: float = 0.0) -> Interval:
    if math.isnan(value):
        return entire(tail)
    return Interval(np.array([[value], [value]]), tail)


def entire(tail: float = 0.0) -> Interval:
    return Interval(np.array([[-np.inf], [np.inf]]), tail)


def _middle(x: Interval) -> np.ndarray:
    return 0.5 * x.low + 0.5 * x.high


# Functions of one variable ------------------------------------------------------------------------


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


def _scaled(envelope: _Envelope | None, q: float, log_c: float) -> _Envelope | None:
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
    return (_log_up(most + 1.0), 0.36787944117144233 + 1e-15, 0.0), None


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


def _power_function(c: float) -> Unary:
    def piece(factor: float, q: float) -> Piecewise:
        at = _quiet(lambda x: factor * np.power(x, q))
        return Piecewise(at, envelope=_like_power(q, factor, True))

    return Unary(piece(1.0, c), piece(c, c - 1), piece(c * (c - 1), c - 2), 0.0)


def _exponential_function(base: float) -> Unary:
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


_UNARY: dict[str, Unary] = {
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
    "sqrt": _power_function(0.5),
    "rsqrt": _power_function(-0.5),
    "cbrt": Unary(
        Piecewise(np.cbrt, envelope=_like_power(1 / 3, 1.0, True)),
        Piecewise(lambda x: 1 / (3 * np.cbrt(x) ** 2), (0.0,), 0.0,
                  envelope=_like_power(-2 / 3, 1 / 3, True)),
        _cubic_root_second,
    ),
}  # fmt: skip


# Jets ---------------------------------------------------------------------------------------------


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


class _Evaluation:
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
        for op, args, param in program[1:]:
            read = [jets[a] if isinstance(a, Ref) else
                    Truth(np.array([a]), np.array([not a])) if isinstance(a, bool) else
                    self.constant(a) for a in args]  # fmt: skip
            rule = _RULES[op]
            jets.append(rule(self, *read) if param is None else rule(self, *read, param))
        return jets

    def kink(self, undecided: np.ndarray, difference: Jet) -> None:
        if not self.tail and np.any(undecided & self.open):
            step = _middle(difference.value) / _middle(difference.first)
            self.kinks.append((undecided, _middle(self.x.value) - step))

    def moving(self, difference: Jet) -> np.ndarray:
        """Strictly monotone, so that a bound is reached at an end of the open box only."""
        slope = difference.first
        return self.open & ((slope.low > 0) | (slope.high < 0)) & ~difference.unsure


def _ends(a: Jet) -> tuple[np.ndarray, np.ndarray]:
    """No real number is infinite."""
    return np.maximum(a.value.low, -_MAX), np.minimum(a.value.high, _MAX)


def _compare(op: str):
    def rule(run: _Evaluation, a: Jet, b: Jet) -> Truth:
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


def _select(run: _Evaluation, which: Truth, no: Jet, yes: Jet) -> Jet:
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


def _unary(fn: Unary, run: _Evaluation, u: Jet) -> Jet:
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


def _maximum(run: _Evaluation, a: Jet, b: Jet) -> Jet:
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


def _minimum(run: _Evaluation, a: Jet, b: Jet) -> Jet:
    return _negate(run, _maximum(run, _negate(run, a), _negate(run, b)))


def _absolute(run: _Evaluation, u: Jet) -> Jet:
    jet = _maximum(run, u, _negate(run, u))
    around = (u.value.low < 0) & (u.value.high > 0)
    low = np.where(around, 0.0, jet.value.low)
    value = jet.value
    value = Interval(
        np.array([low, value.high]), run.tail, u.value.upper, u.value.under, value.lead
    )
    return jet._replace(value=value)


def _step(run: _Evaluation, u: Jet, low: np.ndarray, high: np.ndarray) -> Jet:
    value = Interval(np.array(np.broadcast_arrays(low, high)), run.tail)
    undecided = low != high
    zero = constant(0.0, run.tail)
    return Jet(value, zero, entire(run.tail).where(undecided, zero), u.unsure | undecided)


def _sign(run: _Evaluation, u: Jet) -> Jet:
    low, high = u.value.ends
    moving = run.moving(u)
    sign_low = np.where(moving & (low == 0), 1.0, np.sign(low))
    sign_high = np.where(moving & (high == 0), -1.0, np.sign(high))
    run.kink(sign_low < sign_high, u)
    return _step(run, u, sign_low, sign_high)


def _floor(run: _Evaluation, u: Jet) -> Jet:
    low, high = np.floor(u.value.ends)
    high = np.where(run.moving(u) & (high == u.value.high) & (high > low), high - 1, high)
    if np.any(low != high):
        nearest = np.round(_middle(u.value))
        run.kink(low != high, u._replace(value=Interval(u.value.ends - nearest)))
    return _step(run, u, low, high)


def _trunc(run: _Evaluation, u: Jet) -> Jet:
    down = _floor(run, u)
    up = _negate(run, _floor(run, _negate(run, u)))
    low = np.where(u.value.low >= 0, down.value.low, up.value.low)
    high = np.where(u.value.high > 0, down.value.high, up.value.high)
    return _step(run, u, low + 0.0, high + 0.0)


_RULES: dict[str, Callable] = {
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
    "integer_pow": _integer_power,
    "power": lambda run, u, c: _unary(_power_function(c), run, u),
    "exponential": lambda run, u, base: _unary(_exponential_function(base), run, u),
    **{op: _compare(op) for op in _COMPARE},
    **{op: (lambda run, u, fn=fn: _unary(fn, run, u)) for op, fn in _UNARY.items()},
}


# Branch and bound ---------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _slopes(program: tuple, low: float, high: float, eps: float) -> Slopes:
    """Through the last affine node that all the rest depends on: its kinks are at exact places."""
    rest, prefix = _rooted(program)
    if not prefix:
        return _bounded(program, low, high, eps)
    jet = _Evaluation(np.array([[low], [high]])).run(prefix)[-1]
    ends = [float(x) for x in jet.value.ends[:, 0]]
    inner = _bounded(rest, *ends, eps)
    slope = _times(np.array([[inner.low], [inner.high]]), jet.first.ends)
    return inner._replace(low=float(slope[0, 0]), high=float(slope[1, 0]))


def _rooted(program: tuple) -> tuple[tuple, tuple]:
    """(the program as one of an affine node, the program of that node), () if it is node 0."""
    affine = {0}
    for i, (op, args, _) in enumerate(program):
        linear = op in ("add", "mul", "div", "neg") and isinstance(args[0], Ref)
        linear = linear and int(args[0]) in affine
        if linear and not any(isinstance(a, Ref) or not math.isfinite(a) for a in args[1:]):
            affine.add(i)
    for root in sorted(affine - {0}, reverse=True):
        needed, stack = set(), [len(program) - 1]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack += [int(a) for a in program[i][1] if isinstance(a, Ref)] * (i != root)
        if 0 not in needed:
            needed |= {root}
            order = [root, *sorted(needed - {root})]
            new = {old: Ref(i) for i, old in enumerate(order)}
            rest = tuple(
                (program[i][0],
                 tuple(new[int(a)] if isinstance(a, Ref) else a for a in program[i][1]),
                 program[i][2])
                for i in order[1:]
            )  # fmt: skip
            return (("var", (), None), *rest), program[: root + 1]
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


def _meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.array([np.maximum(a[0], b[0]), np.minimum(a[1], b[1])])
    # Both hold the truth; where rounding leaves nothing between them, neither is trusted more.
    return np.where(out[0] <= out[1], out, a)


def _examined(program: tuple, x: np.ndarray) -> tuple[_Boxes, np.ndarray, np.ndarray]:
    """The boxes, and f' and f at their centres."""
    n = x.shape[1]
    centre = 0.5 * x[0] + 0.5 * x[1]
    run = _Evaluation(np.concatenate([x, np.array([centre, centre])], axis=1))
    jet = run.run(program)[-1]
    value, first, second = (_full(part, 2 * n) for part in jet[:3])
    unsure = np.broadcast_to(jet.unsure, 2 * n)[:n]
    offset = _sum(x, -np.array([centre, centre]))
    # Mean-value forms: f' = f'(c) + f''(.) (x - c), and the same of f.
    mean = _sum(first[:, n:], _times(second[:, :n], offset))
    tight = np.where(unsure, first[:, :n], _meet(first[:, :n], mean))
    mean = _sum(value[:, n:], _times(tight, offset))
    # A monotone piece has its extremes at its ends, which the interval may not show.
    tight_value = np.where(unsure, value[:, :n], _meet(value[:, :n], mean))
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
    for target, gap in (("first", _GAP), ("value", 1e-7)):
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
    if not sure:
        first = np.array([[-np.inf], [np.inf]])
    ends = []
    for name, found in (("first", first), ("value", boxes.value)):
        ends += [min(outer[name][0], found[0].min()), max(outer[name][1], found[1].max())]
    return Slopes(*(float(end) + 0.0 for end in ends))


def _at_once(program: tuple, low: float, high: float) -> Slopes:
    jet = _Evaluation(np.array([[low], [high]])).run(program)[-1]
    first = jet.first.ends if not jet.unsure.any() else np.array([[-np.inf], [np.inf]])
    ends = np.concatenate([first[:, 0], jet.value.ends[:, 0]])
    return Slopes(*map(float, ends))


def _on_tail(program: tuple, side: int, begin: float, end: float) -> dict:
    boxes = np.array([[begin], [end]] if side > 0 else [[end], [-begin]])
    jet = _Evaluation(boxes, begin).run(program)[-1]
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
            first=np.where(whole, new.first, _meet(new.first, first)),
            value=np.where(whole, new.value, _meet(new.value, old)),
        )
        boxes = _Boxes(*(
            np.concatenate([np.delete(a, active, axis=-1), b], axis=-1)
            for a, b in zip(boxes, new, strict=True)
        ))  # fmt: skip
        slope = np.concatenate([slope, more_slope], axis=1)
        value = np.concatenate([value, more_value], axis=1)
    return boxes, slope, value


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
    jet = _Evaluation(x).run(program)[-1]
    value = _full(jet.value, 3 * n)
    rounding = _within_rounding(jet, x, eps, steepest)
    unsure = np.broadcast_to(jet.unsure, 3 * n)
    # Beside a pole the values are apart as well, but infinitely steep is what is said of it.
    ends = np.where(unsure, np.array([[-np.inf], [np.inf]]), value).reshape(2, 3, n)
    apart = ends[0].max(0) - ends[1].min(0)
    bad = apart > rounding.reshape(3, n).max(0)
    if bad.any():
        raise Jump(f"the function jumps by {apart[bad][0]:.3g} at {edges[bad][0]:.9g}.")
    # The boxes beside an edge are judged as such; what happens on it alone is judged here.
    doubt = unsure & ~(value[1] - value[0] <= rounding)
    return not doubt[n : 2 * n].any()


def _small_steps(
    program: tuple, x: np.ndarray, ends: np.ndarray, eps: float, steepest: float
) -> np.ndarray:
    """Whether f varies by rounding only in each of the boxes x where a select is undecided."""
    n = x.shape[1]
    jet = _Evaluation(x).run(program)[-1]
    value, first = _full(jet.value, n), _full(jet.first, n)
    small = value[1] - value[0] <= _within_rounding(jet, x, eps, steepest)
    size = np.abs(x).max(0)
    # A little further away the predicate is decided, where on the box itself rounding hides it.
    around = x + np.array([[-1.0], [1.0]]) * size * 2.0**-34
    around = np.clip(around, *ends)
    points = _Evaluation(around.reshape(1, -1).repeat(2, 0)).run(program)[-1].value
    left, right = _full(points, 2 * n)[:, :n], _full(points, 2 * n)[:, n:]
    apart = np.maximum(left[0], right[0]) - np.minimum(left[1], right[1])
    # What a steep slope does over so short a way is no jump.
    way = 4 * np.abs(first).max(0) * (around[1] - around[0])
    jumps = ~small & (x[1] - x[0] <= 1e-12 * size)
    jumps &= apart > np.maximum(way, _within_rounding(jet, x, eps, steepest))
    if jumps.any():
        at = x[0][jumps][0]
        raise Jump(f"the function jumps by {apart[jumps][0]:.3g} near {at:.9g}.")
    return small
