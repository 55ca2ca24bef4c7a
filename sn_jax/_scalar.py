"""Functions of one number as programs: a list of primitives, rewritten where that says more.

Nodes are not repeated, guards against NaN are decided, and what would overflow on the way (as
``log(1 + exp(x))``) becomes the operation that it is. Nothing is evaluated here.
"""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sn_jax._numbers import ANYWHERE

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


class Unknown(ValueError):
    """A primitive that this module does not know; its name is the attribute ``op``."""

    def __init__(self, op: str):
        super().__init__(f"no slopes are known of the primitive {op!r}.")
        self.op = op


def scalar(value: Any) -> float | bool:
    return bool(value) if isinstance(value, (bool, np.bool_)) else float(value)


_SAME = {"copy", "copy_p", "stop_gradient", "reduce_precision", "optimization_barrier"}
_FLIP = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
COMPARE = {"lt", "le", "gt", "ge", "eq", "ne"}
_LOGIC = {"and", "or", "not", "xor"}
PREDICATES = COMPARE | _LOGIC | {"select_bool", "is_finite", "doubt"}


class Program:
    """Nodes without repetition, rewritten where plain evaluation would lose the tails.

    Args:
      known: the operations that whoever evaluates it has rules for, beyond those decided here.
    """

    def __init__(self, known: Collection[str]):
        self.known = known
        self.nodes: list[tuple[str, tuple, Any]] = []
        self.index: dict[Any, Ref] = {}
        self.number = True
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
        return self.nodes[arg][0] in PREDICATES

    def add(self, op: str, args: list[Any], params: Mapping[str, Any]) -> Any:
        if op == "var":
            self.number = params.get("number", True)
            return Ref(0)
        if op in _SAME:
            return args[0]
        if op == "convert_element_type":
            return self.convert(args[0], params.get("new_dtype", "float32"))
        if op == "is_finite":
            return self.is_number(args[0])
        if op in _LOGIC:
            return self.logic(op, args)
        if op in COMPARE:
            return self.compare(op, *args)
        if op == "select_n":
            return self.select(*args)
        if op == "clamp":
            return self.add("min", [self.add("max", args[:2], {}), args[2]], {})
        rewrite = getattr(self, f"make_{op}", None)
        if rewrite is not None:
            return rewrite(*args, **({"y": params["y"]} if op == "integer_pow" else {}))
        if op not in self.known:
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
            if not isinstance(a, Ref):
                return {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
                        "eq": a == b, "ne": a != b}[op]  # fmt: skip
            # Identical operands: a guard against NaN.
            number = op not in ("lt", "gt") and self.is_number(a)
            return self.logic("not", [number]) if op == "ne" else number
        if not isinstance(a, Ref):
            return self.compare(_FLIP.get(op, op), b, a)
        if isinstance(b, float) and not math.isfinite(b):
            number = self.is_number(a)
            below = op in (("lt", "le") if b > 0 else ("gt", "ge"))
            return number if below or op == "ne" else self.logic("not", [number])
        (base, p), (other, q) = self.multiple(a), self.multiple(b)
        if isinstance(b, Ref) and base == other:
            # x > x / 10 is x > 0, which is decided on the tails as well.
            if p == q:
                return self.compare(op, base, base)
            return self.compare(op, base if p > q else self.make_neg(base), 0.0)
        return self.emit(op, a, b)

    def is_number(self, arg: Any) -> Any:
        """Whether it is a real number: decided, or a predicate."""
        if not isinstance(arg, Ref):
            return math.isfinite(arg)
        if not self.number:
            return self.emit("doubt", arg)
        return self.is_total(arg) or self.emit("is_finite", arg)

    def zero(self, arg: Ref) -> Any:
        """0 where ``arg`` is a number."""
        return 0.0 if self.is_total(arg) else self.emit("zero", arg)

    def is_total(self, arg: Ref) -> bool:
        """Whether it is a number wherever the variable is, by its operations."""
        todo, seen = [arg], set()
        while todo:
            a = todo.pop()
            if not isinstance(a, Ref):
                if isinstance(a, float) and not math.isfinite(a):
                    return False
            elif a not in seen:
                seen.add(a)
                op, args, param = self.nodes[a]
                if op == "integer_pow" and param < 0:
                    return False
                if op not in PREDICATES:
                    if op not in ANYWHERE and op not in ("integer_pow", "exponential"):
                        return False
                    todo += args
        return True

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
            return self.zero(a)
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
                return self.zero(a)
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
