"""``python tests/fuzz_slopes.py [programs] [seed]``: slopes of random programs against 60 digits.

Each program is evaluated by mpmath at points near zero and far out on both tails, and every
difference quotient must lie in what ``slopes`` gives, as every value must. Prints what does not.
"""

import math
import sys

import mpmath
import numpy as np
from tqdm import tqdm

from sn_jax import _scalar, _slopes

Node, Ref = _scalar.Node, _scalar.Ref
_HUGE = mpmath.mpf(10) ** 30
mp = mpmath.mp.clone()
mp.dps = 60

UNARY = {
    "neg": lambda x: -x, "abs": abs, "tanh": mp.tanh, "sin": mp.sin, "cos": mp.cos, "exp": mp.exp,
    "expm1": mp.expm1, "log1p": lambda x: mp.log(1 + x), "log": mp.log, "atan": mp.atan,
    "asinh": mp.asinh, "sqrt": mp.sqrt, "rsqrt": lambda x: 1 / mp.sqrt(x), "cosh": mp.cosh,
    "sinh": mp.sinh, "square": lambda x: x * x, "erf": mp.erf, "erfc": mp.erfc,
    "logistic": lambda x: 1 / (1 + mp.exp(-x)), "cbrt": lambda x: mp.sign(x) * mp.cbrt(abs(x)),
}  # fmt: skip
BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "max": max, "min": min,
}  # fmt: skip
GROWING = {"exp", "expm1", "cosh", "sinh", "logistic", "tanh", "erf", "erfc", "sin", "cos"}


def random_nodes(rng: np.random.Generator) -> list:
    """A program without jumps; rational ones and products of what grows and decays are common."""
    nodes, numbers = [Node("var")], [Ref(0)]
    for _ in range(int(rng.integers(1, 9))):
        pick = lambda things: things[int(rng.integers(len(things)))]  # noqa: E731
        old = numbers[-1] if rng.random() < 0.6 else pick(numbers)
        kind = int(rng.integers(10))
        constant = float(pick([1.0, -1.0, 0.5, 2.0, 3.0, 0.3, -1.7, float(rng.normal())]))
        if kind < 4:
            nodes.append(Node(pick(sorted(UNARY)), (old,)))
        elif kind == 4:
            nodes.append(Node("integer_pow", (old,), {"y": int(rng.integers(-2, 4))}))
        elif kind == 5:  # a positive number to divide by
            nodes.append(Node("square", (old,)))
            nodes.append(Node("add", (Ref(len(nodes) - 1), 1.0)))
        elif kind == 6:
            nodes.append(Node("gt", (old, 0.0)))
            nodes.append(Node("mul", (old, constant)))
            nodes.append(Node("select_n", (Ref(len(nodes) - 2), Ref(len(nodes) - 1), old)))
        else:
            pair = [old, constant if rng.random() < 0.4 else pick(numbers)]
            nodes.append(Node(pick(sorted(BINARY)), tuple(pair if rng.random() < 0.5
                                                          else pair[::-1])))  # fmt: skip
        numbers.append(Ref(len(nodes) - 1))
    return nodes


def exactly(nodes, x):
    """The value at x; None where there is none, or none that can be computed."""
    done = [mp.mpf(x)]
    try:
        for node in nodes[1:]:
            args = [done[a] if isinstance(a, Ref) else mp.mpf(a) for a in node.args]
            if node.op == "gt":
                done.append(args[0] > args[1])
                continue
            if node.op == "select_n":
                y = args[2] if args[0] else args[1]
            elif node.op == "integer_pow":
                y = args[0] ** node.params["y"]
            elif node.op in UNARY:
                if node.op in GROWING and abs(args[0]) > _HUGE:
                    return None
                y = UNARY[node.op](args[0])
            else:
                y = BINARY[node.op](*args)
            if not isinstance(y, mp.mpf) or not mp.isfinite(y):
                return None
            done.append(y)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return done[-1]


def violations(nodes, domain, rng: np.random.Generator, n_points: int = 24) -> list[str]:
    """What contradicts the slopes of a program."""
    try:
        found = _slopes.slopes(nodes, domain, "float64")
    except _slopes.Jump:
        return []
    low, high = domain
    ends = [rng.normal(size=n_points) * 10.0 ** rng.integers(-3, 2, n_points),
            rng.choice([-1, 1], n_points) * 2.0 ** rng.uniform(3, 90, n_points)]  # fmt: skip
    points = np.clip(np.concatenate(ends), max(low, -1e30), min(high, 1e30))
    out = []
    for a in points:
        b = float(np.clip(a + rng.normal() * 10.0 ** rng.integers(-3, 1) * max(1.0, abs(a)),
                          max(low, -1e30), min(high, 1e30)))  # fmt: skip
        f, g = exactly(nodes, float(a)), exactly(nodes, b)
        if f is None or g is None or a == b:
            continue
        # 60 digits lose as many as the values on the way are larger than their difference.
        quotient = (f - g) / (mp.mpf(float(a)) - mp.mpf(b))
        slack = mp.mpf(10) ** -25 * (1 + abs(f) + abs(g)) / abs(mp.mpf(float(a)) - mp.mpf(b))
        if not (found.low - slack <= quotient <= found.high + slack):
            out.append(f"({a!r}, {b!r}): {mp.nstr(quotient, 20)} outside {found[:2]}")
        if not (found.value_low <= f + abs(f) * 1e-25 and f - abs(f) * 1e-25 <= found.value_high):
            out.append(f"{a!r}: value {mp.nstr(f, 20)} outside {found[2:]}")
    return out


def random_domain(rng: np.random.Generator) -> tuple[float, float]:
    kind = int(rng.integers(4))
    start = float(rng.normal() * 3)
    return ((-math.inf, math.inf), (-math.inf, start), (start, math.inf),
            (start, start + float(rng.exponential(3)) + 0.01))[kind]  # fmt: skip


def main(n_programs: int = 1000, seed: int = 0) -> int:
    bad = 0
    for i in tqdm(range(n_programs), unit="program"):
        rng = np.random.default_rng([seed, i])
        nodes, domain = random_nodes(rng), random_domain(rng)
        for line in violations(nodes, domain, rng):
            bad += 1
            print(f"[{seed}, {i}] on {domain}: {line}\n  {nodes}")
    print(f"{n_programs} programs, seed {seed}: {bad} violations")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
