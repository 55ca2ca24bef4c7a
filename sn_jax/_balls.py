r"""What values the operations of a graph can have while x stays in a ball.

Each is ``mid + A d + e`` with d the step of x, ``|d| <= radius``, and ``|e_i| <= rest_i`` (affine
arithmetic over a Euclidean ball): linear operations take it along, and others a linear part of it.
So a value lies within ``radius |A_i| + rest_i`` of its middle, entry by entry.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sn_jax._pieces import Constant, Operation, apply, rounding_terms
from sn_jax._symbols import UNIT, gamma

# Entries of one matrix A; without it only intervals are kept.
_MOST_ENTRIES = 2**22
_ADDED = {"add", "add_any", "sub", "concatenate", "stack"}


class Ball(NamedTuple):
    """Of one operation; arrays of its shape.

    Attributes:
      mid: the middle.
      slopes: (x, *shape), what it is a linear function of d by; None where that is not kept.
      rest: by how much it can be off.
      wide: how far from the middle it can be at most.
      low, high: the values it can have, which may be known better.
    """

    mid: np.ndarray
    slopes: np.ndarray | None
    rest: np.ndarray
    wide: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return self.low / 2 + self.high / 2

    @property
    def half(self) -> np.ndarray:
        """At least the distance of both ends from the centre."""
        ends = np.maximum(self.high - self.centre, self.centre - self.low)
        return np.maximum(ends, 0.0) * (1 + 4 * UNIT) + 1e-300


class Balls:
    """Of all operations of a graph, as far as they are known.

    Args:
      x: the argument.
      centre: its value.
      radius: of the ball.
    """

    def __init__(self, x: Operation, centre: np.ndarray, radius: float):
        self.radius = radius
        self.n_x = x.size
        centre = np.asarray(centre, np.float64)
        slopes = np.eye(x.size).reshape(x.size, *x.shape) if x.size**2 <= _MOST_ENTRIES else None
        zero = np.zeros(x.shape)
        wide = zero + radius * (1 + 8 * UNIT) + 4 * UNIT * np.abs(centre)
        rest = zero if slopes is not None else wide
        self.known: dict[Operation, Ball] = {
            x: Ball(centre, slopes, rest, wide, centre - wide, centre + wide)
        }

    def get(self, node: Operation) -> Ball | None:
        return self.known.get(node)

    def put(self, node: Operation, mid, slopes, rest) -> None:
        """Unless it is infinite."""
        mid, rest = (np.broadcast_to(part, node.shape) for part in (mid, rest))
        if slopes is None:
            wide = rest
        else:
            length = np.sqrt(np.sum(slopes**2, 0)) * (1 + gamma(2 * self.n_x + 16))
            wide = (self.radius * length + rest) * (1 + 8 * UNIT)
        wide = wide + 8 * UNIT * np.abs(mid) + 1e-300
        if np.all(np.isfinite(mid)) and np.all(np.isfinite(wide)):
            self.known[node] = Ball(mid, slopes, rest, wide, mid - wide, mid + wide)

    def clip(self, node: Operation, low: float, high: float) -> None:
        """What is known of all values of an operation."""
        if (ball := self.known.get(node)) is not None:
            low_, high_ = np.clip(ball.low, low, high), np.clip(ball.high, low, high)
            self.known[node] = ball._replace(low=low_, high=high_)

    def linear(self, node: Operation) -> None:
        """Of what is linear up to a constant, in things that are known."""
        balls = {a: self.known.get(a) for a in node.inputs}
        if any(ball is None for ball in balls.values()):
            return
        # What is added can be constant: an operation like others, that does not move.
        last = len(node.args) if node.op in _ADDED else 2
        first = 1 if node.op == "select_n" else 0
        takes = node.op in {*_ADDED, "select_n", "pad", "dynamic_update_slice", "scatter",
                            "scatter-add"}  # fmt: skip
        args, fixed = [], {}
        for i, a in enumerate(node.args):
            added = takes and first <= i and (i < last or node.op == "select_n")
            if node.op in ("scatter", "scatter-add"):
                added = i in (0, 2)
            if isinstance(a, Constant) and added:
                entrywise = node.op in ("add", "add_any", "sub", "select_n")
                value = np.broadcast_to(a.array, node.shape) if entrywise else a.array
                a = Operation("constant", (), {}, value.shape, np.float64, node.where)
                fixed[a] = value
            args.append(a)
        whole = Operation(node.op, tuple(args), node.params, node.shape, node.dtype, node.where,
                          node.primitive, node.out)  # fmt: skip
        mids = {a: ball.mid for a, ball in balls.items() if ball} | fixed
        rests = {a: ball.rest for a, ball in balls.items() if ball}
        if any(ball.slopes is None for ball in balls.values() if ball) or (
            node.size * self.n_x > _MOST_ENTRIES
        ):
            slopes, rests = None, {a: ball.half for a, ball in balls.items() if ball}
            mids |= {a: ball.centre for a, ball in balls.items() if ball}
        else:
            stacks = {a: ball.slopes for a, ball in balls.items() if ball}
            slopes = apply(whole, stacks)  # type: ignore
        mid = apply(whole, {a: m[None] for a, m in mids.items()})[0]
        sizes = {a: np.abs(m)[None] for a, m in mids.items()}
        for a, ball in balls.items():
            assert ball is not None
            sizes[a] = sizes[a] + ball.wide
        rounding = gamma(rounding_terms(node) + 8) * apply(whole, sizes, absolute=True)[0]
        rest = apply(whole, {a: r[None] for a, r in rests.items()}, absolute=True)[0]
        self.put(node, mid, slopes, rest * (1 + gamma(rounding_terms(node) + 8)) + 2 * rounding)

    def combined(
        self, node: Operation, mid, terms: Sequence[tuple[Operation, Any]], rest: Any
    ) -> None:
        """Of ``mid + sum of factor * (argument - its middle)``, up to ``rest``."""
        balls = [(self.known[a], factor) for a, factor in terms]
        slopes, moves = None, sum(ball.wide * np.abs(f) for ball, f in balls)
        if all(ball.slopes is not None for ball, _ in balls):
            slopes = sum(ball.slopes * f for ball, f in balls)
            rest = rest + 16 * UNIT * moves + sum(ball.rest * np.abs(f) for ball, f in balls)
        else:
            rest = rest + moves
        self.put(node, mid, slopes, rest * (1 + 64 * UNIT) + 64 * UNIT * np.abs(mid))
