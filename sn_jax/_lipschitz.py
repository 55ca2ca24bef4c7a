"""Certified Lipschitz constants of functions: bounds of a graph, in domains from crude to tight.

The nonlinear operations of a graph are its sources; the linear pieces between them are matrices.
Every domain bounds how far each source can move for a step of length 1 of x, in the order of the
graph, and in the end how far the outputs move. Constants are kept as logarithms, rounded up.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from sn_jax._balls import Balls
from sn_jax._convolutions import One, TapSum, as_convolution, beside, summed, tap_sums
from sn_jax._cuts import Step, TooWideError, by_cuts
from sn_jax._ellipsoid import Block, Ellipsoid, ellipsoid, leading
from sn_jax._graph import Graph, NoPlatform, graph_of
from sn_jax._matrix_free import FAILURE, norm_above
from sn_jax._operation_norms import (
    MOST_ENTRIES,
    MOST_ROWS,
    convolution,
    explicit_norm,
    identity,
    is_isometric,
    norm,
    operation_norm,
)
from sn_jax._pieces import Operation, apply, is_linear, products, rounding_terms
from sn_jax._sources import RULES, Row, Rows, Source, Sources
from sn_jax._symbols import UNIT, gamma
from sn_jax._tight import tight
from sn_jax._torus import NoTorusError, Torus

METHODS = ("product", "merged", "joint", "shift", "ellipsoid", "tight")
# Entries of all matrices that a domain over all sources keeps, and directions of all sources.
_MOST_KEPT, _MOST_DIRECTIONS = 2**26, 3000
# Entries of a matrix from which on a piece that is one convolution is bounded as that.
_LARGE = 2**20
# Directions up to which "auto" is tight: half a second there, and it grows with the cube.
_MOST_TIGHT = 300
# Operations of a recursion over cuts up to which it makes one: some ten seconds.
_MOST_CUTS = 3e11


class Op(NamedTuple):
    """A line of the table of a bound.

    Attributes:
      where: file:line.
      what: the operation, or the linear piece.
      factor: its own constant; NaN where it has none of its own.
      log_bound: the logarithm of the constant from x up to here.
      reason: why it is infinite; empty otherwise.
    """

    where: str
    what: str
    factor: float
    log_bound: float
    reason: str = ""


@dataclass(frozen=True)
class LipschitzBound:
    r"""``|f(a) - f(b)| <= upper |a - b|`` for all a and b, with the way there.

    Attributes:
      upper: the bound; infinite where there is none, or beyond float64.
      log_upper: its logarithm.
      method: the domain that it comes from.
      ops: a line for each nonlinear operation and each linear piece.
      failure_probability: the probability that ``upper`` is too small; 0 where no key was drawn.
      bounds: (method, the bound by it) of those that ran.
      seconds: (method, seconds of CPU time) of the same; the first has found the slopes as well.
      notes: what was taken for what, and what did not run, as sentences.

    Example:
      >>> import jax.numpy as jnp
      >>> bound = lipschitz_bound(lambda x: 2 * jnp.sin(x), jnp.zeros(3))
      >>> print(f"{bound.upper:.6f}", [op.what for op in bound.ops])
      2.000000 ['sin [-1, 1]', 'linear to 3']
    """

    upper: float
    log_upper: float
    method: str
    ops: tuple[Op, ...]
    failure_probability: float = 0.0
    bounds: tuple[tuple[str, float], ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("where", "what", "factor", "up to here")]
        for op in self.ops:
            factor = "" if math.isnan(op.factor) else _number(_log(op.factor))
            rows.append((op.where, op.what, factor, _number(op.log_bound)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in rows
        ]
        lines.append(f"upper = {_number(self.log_upper)} by {self.method}")
        if self.failure_probability:
            lines[-1] += f", too small with probability {self.failure_probability:.1g} at most"
        lines += [f"{name}: {_number(_log(value))}" for name, value in self.bounds]
        if self.log_upper == math.inf:
            lines += [f"infinite: {op.where}: {op.reason}" for op in self.ops if op.reason]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])


def lipschitz_bound(
    fn: Callable[..., Any],
    x: Any,
    *,
    method: str = "auto",
    rtol: float = 1e-6,
    steps: int = 50,
    radius: float | None = None,
    progress: bool = True,
) -> LipschitzBound:
    r"""A certified Lipschitz constant of any function, read off the function itself.

    ``|fn(a) - fn(b)| <= upper |a - b|`` in the l2 norm for all a and b of the shape of ``x``. The
    function is traced, and its program bounded: linear operations between nonlinear ones are one
    matrix, whose norm is certified; slopes of elementwise functions are found from the program;
    softmax, normalizations, pools and the like are recognized by their structure. In domains from
    crude to tight:

    - product: the product (and sums, over branches) of the constants of single operations;
    - merged: linear operations between two nonlinear ones are one map;
    - joint: what comes from several sources is bounded as one map of all of them,
      ``min over w > 0 of sqrt(sum w_k) sigma([B_k L_k / sqrt(w_k)])``;
    - shift: a function with slopes in [a, b] is ``(a + b)/2`` times its argument and a rest;
    - ellipsoid: one ellipsoid holds all that can move together;
    - tight: the best such ellipsoid that has one number for each entry of elementwise functions,
      by an interior-point method (LipSDP-Neuron of Fazlyab et al. 2019, eq. 7, for any graph).

    Where there are too many directions, method="tight" (not "auto" yet) has the last two with one
    number for each source and for each channel of a network of convolutions, by frequencies.

    It is the constant of the real-arithmetic function of the constants that ``fn`` has. Examples
    in a batch that do not see each other have the constant of one: give a batch of one, which is
    quicker. Parts of a function that share nothing are searched one by one.

    Args:
      fn: function of one array, or of a tree that holds one; its results are taken together.
      x: an argument; its shape and dtype count.
      method: one of "product", "merged", "joint", "shift", "ellipsoid", "tight": that one and the
        cruder ones, of which the least is taken; "auto": all that the size allows, "tight" up to
        300 directions in x and all sources together, of the largest part.
      rtol: how close norms of single matrices are bounded, > 0.
      radius: of an l2 ball around x, > 0: the constant in it, which is less, and finite for
        products, exp and attention; None for all of space. By "shift" and what follows it goes to
        the norm of the Jacobian at x with the radius, but for normalizations and pools.
      steps: of the interior-point method in "tight", >= 1, each a few factorizations of a matrix of
        all directions; some 15 reach the optimum, and fewer leave a bound that holds.
      progress: whether to say on stderr what is done, after two seconds.

    Returns:
      LipschitzBound: prints as a table.

    Raises:
      ValueError: a jump, a branch or loop on x, a primitive of which nothing is known
        (``register_lipschitz``), an unknown method; ``rtol``, ``steps`` or ``radius`` out of range,
        or values of x that a radius needs and that are not there.
      TypeError: not one floating-point array in ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> bound = lipschitz_bound(lambda x: jnp.tanh(2 * x) + x, jnp.zeros(3))
      >>> print(f"{bound.upper:.6f}")
      3.000000
      >>> print(f"{lipschitz_bound(jnp.exp, jnp.zeros(3), radius=1.0).upper:.4f}")
      2.7183
    """
    if method not in (*METHODS, "auto"):
        raise ValueError(f"method must be one of {(*METHODS, 'auto')}; got {method!r}.")
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0; got {rtol}.")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius must be > 0 and finite, or None for all of space; got {radius}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    say = _Progress(progress)
    results, platforms = [], [jax.default_backend()]
    for platform in platforms:
        started = time.process_time()
        try:
            graph = graph_of(fn, x, platform)
        except NoPlatform:  # it does not run there
            if not results:
                raise
            continue
        platforms += [other for other in graph.platforms if other not in platforms]
        balls = None
        if radius is not None:
            (centre,) = (leaf for leaf in jax.tree_util.tree_leaves(x) if hasattr(leaf, "shape"))
            balls = Balls(graph.x, _concrete(centre), radius)
        results.append(_Bounds(graph, rtol, say, started, steps=steps, balls=balls).bound(method))
    found = max(results, key=lambda bound: bound.log_upper)
    # A platform whose own bound fails may stretch more than the largest of them.
    failure = sum(bound.failure_probability for bound in results)
    found = replace(found, failure_probability=failure)
    if radius is not None and found.log_upper > -math.inf:
        # What holds everywhere holds in a ball; a function may have no constant outside of it.
        with contextlib.suppress(ValueError):
            options: dict[str, Any] = {"method": method, "rtol": rtol, "steps": steps}
            everywhere = lipschitz_bound(fn, x, **options, progress=progress)
            found = min(found, everywhere, key=lambda bound: bound.log_upper)
    return found


def register_lipschitz(primitive: Any, rule: Callable[..., float]) -> None:
    """Say what the Lipschitz constant of a JAX primitive is, so that bounds know it.

    Args:
      primitive: the primitive, or its name.
      rule: ``rule(*args, **params) -> L`` with ``|out(a) - out(b)| <= L |a - b|``, over all
        arguments that depend on x together; these come as ShapeDtypeStructs, constants as arrays.

    Returns:
      None

    Raises:
      TypeError: ``rule`` is no function.

    Example:
      >>> register_lipschitz("my_projection", lambda x, **params: 1.0)
    """
    if not callable(rule):
        raise TypeError(f"rule must be a function (*args, **params) -> float; got {rule!r}.")
    RULES[getattr(primitive, "name", primitive)] = rule


def _concrete(x: Any) -> np.ndarray:
    try:
        centre = np.asarray(x).astype(np.float64)
    except (jax.errors.TracerArrayConversionError, TypeError):
        centre = np.full(1, math.nan)
    if not np.all(np.isfinite(centre)):
        raise ValueError(
            "With radius= the values of x count: give a concrete, finite array, not a traced one "
            "or a shape."
        )
    return centre


class _Progress:
    """Lines on stderr, from two seconds on."""

    def __init__(self, wanted: bool):
        self.wanted, self.start, self.last = wanted, time.monotonic(), 0.0

    def __call__(self, what: str) -> None:
        passed = time.monotonic() - self.start
        if self.wanted and passed > 2 and passed - self.last > 1:
            self.last = passed
            print(f"lipschitz_bound: {what}, {passed:.0f} s", file=sys.stderr)


# Logarithms of constants, rounded up.


def _log(x: float) -> float:
    return _up(math.log(x)) if x > 0 else -math.inf


def _up(x: float) -> float:
    return x + 8 * UNIT * (1 + abs(x)) if math.isfinite(x) else x


def _times(*logs: float) -> float:
    return -math.inf if -math.inf in logs else _up(sum(logs))


def _plus(*logs: float) -> float:
    top = max(logs, default=-math.inf)
    if not math.isfinite(top):
        return top
    return _up(top + math.log(sum(math.exp(x - top) for x in logs)) + 8 * len(logs) * UNIT)


def _hypot(*logs: float) -> float:
    return _plus(*(2 * x for x in logs)) / 2


def _number(log: float) -> str:
    if not math.isfinite(log):
        return "inf" if log > 0 else "0"
    if abs(log) > 600:
        exponent = math.floor(log / math.log(10))
        return f"{math.exp(log - exponent * math.log(10)):.4f}e{exponent:+d}"
    return f"{math.exp(log):.6g}"


class _Map(NamedTuple):
    """A linear map from a source to a target, and by how much (Frobenius) rounding errs."""

    matrix: np.ndarray  # (source, target)
    error: float


class _Forms:
    """Every operation as a linear function of what is seeded.

    Attributes:
      known: operation -> {source: (stack (n, *shape), sums of absolute values (1, *shape))}.
      terms: operation -> how many roundings its entries went through.
    """

    def __init__(self, most: int = MOST_ENTRIES, most_each: int = MOST_ENTRIES):
        self.known: dict[Operation, dict[Operation, tuple[np.ndarray, np.ndarray]]] = {}
        self.terms: dict[Operation, int] = {}
        self.most, self.most_each, self.kept = most, most_each, 0

    def seed(self, node: Operation) -> None:
        if node.size > MOST_ROWS:
            raise _TooLargeError
        ones = np.ones((1, *node.shape))
        self.known[node], self.terms[node] = {node: (identity(node), ones)}, 0

    def evaluate(self, targets: Sequence[Operation]) -> None:
        todo, order = list(targets), set()
        while todo:
            a = todo.pop()
            if a not in self.known and a not in order:
                order.add(a)
                todo += a.inputs
        for node in sorted(order, key=lambda a: a.depth):
            forms = {a: self.known[a] for a in node.inputs}
            out = {}
            for source in dict.fromkeys(s for form in forms.values() for s in form):
                given = {a: form[source] for a, form in forms.items() if source in form}
                n = len(next(iter(given.values()))[0])
                self.kept += n * node.size
                if n * node.size > self.most_each or self.kept > self.most:
                    raise _TooLargeError
                stack = apply(node, {a: pair[0] for a, pair in given.items()})
                sums = apply(node, {a: pair[1] for a, pair in given.items()}, absolute=True)
                if sums.any():
                    out[source] = stack, sums
            self.known[node] = out
            self.terms[node] = rounding_terms(node) + max(self.terms[a] for a in node.inputs)

    def row(self, row: Row):
        """{source: (stack, sums)} of a sum of multiples, and its terms."""
        out: dict[Operation, tuple[np.ndarray, np.ndarray]] = {}
        for a, factor in row.terms:
            for source, (stack, sums) in self.known[a].items():
                stack, sums = stack * factor, sums * np.abs(factor)
                if source in out:
                    stack, sums = stack + out[source][0], sums + out[source][1]
                out[source] = stack, sums
        terms = 2 * len(row.terms) + max(self.terms[a] for a, _ in row.terms)
        return out, terms

    def maps(self, rows: Sequence[Row]) -> dict[Operation, _Map]:
        """Of rows stacked."""
        self.evaluate([a for row in rows for a, _ in row.terms])
        parts = [self.row(row) for row in rows]
        sources = list(dict.fromkeys(s for form, _ in parts for s in form))
        sizes = [row.terms[0][0].size for row in rows]
        out = {}
        for source in sources:
            n = next(len(form[source][0]) for form, _ in parts if source in form)
            matrix, error = np.zeros((n, sum(sizes))), 0.0
            for (form, terms), at, size in zip(parts, np.cumsum([0, *sizes]), sizes, strict=False):
                if source in form:
                    stack, sums = form[source]
                    matrix[:, at : at + size] = stack.reshape(n, size)
                    error += gamma(terms + 2) * float(np.linalg.norm(sums))
            if matrix.any() or error:
                out[source] = _Map(matrix, error)
        return out


class _TooLargeError(Exception):
    """Matrices of this size are not formed."""


class _Bounds:
    """All domains on one graph."""

    def __init__(self, graph: Graph, rtol: float, say: _Progress, started: float = 0.0,
                 most_entries: int = MOST_ENTRIES, steps: int = 1,
                 balls: Balls | None = None):  # fmt: skip
        self.graph, self.rtol, self.say, self.started = graph, rtol, say, started
        self.steps = steps
        self.most_entries = most_entries
        self.failures = 0  # of norms that are bounded by random products
        self._products: dict[tuple[Any, ...], float] = {}
        self.all = Sources(graph.outputs, self.loop, balls)
        self.sources: list[Source] = [self.all.sources[a] for a in self.all.order
                                      if a in self.all.sources]  # fmt: skip
        self.outputs = Rows(tuple(Row(((a, 1.0),)) for a in dict.fromkeys(graph.outputs)))
        copies = max((graph.outputs.count(a) for a in graph.outputs), default=1)
        if copies > 1:
            self.outputs = Rows(tuple(Row(((a, 1.0),)) for a in graph.outputs))
        self._taps: dict[tuple[Any, ...], dict[Operation, tuple[TapSum, One]]] = {}
        self._maps: dict[tuple[Any, ...], dict[Operation, _Map] | None] = {}
        self._norms: dict[tuple[Any, ...], float] = {}
        self._operations: dict[tuple[Operation, Operation], float] = {}
        self.notes = list(graph.notes)

    def bound(self, method: str) -> LipschitzBound:
        names = METHODS if method == "auto" else METHODS[: METHODS.index(method) + 1]
        if not self.graph.outputs:
            return LipschitzBound(0.0, -math.inf, names[0], ())
        runs: dict[str, tuple[float, list[Op]]] = {}
        blocks: list[Block] = []
        found: Ellipsoid | None = None
        torus: Torus | None = None
        seconds, failures, started = {}, {}, self.started
        for name in names:
            self.say(name)
            if name in ("product", "merged", "joint"):
                runs[name] = self.plain(name)
            elif runs["product"][0] == math.inf:
                continue
            else:
                try:
                    if name == "shift":
                        runs["shift"], blocks = self.shift()
                    elif name == "ellipsoid" and blocks:
                        found = ellipsoid(self.graph.x, blocks, self.say)
                        runs[name] = self.moved(found.upper, found.lengths, runs["shift"][1])
                    elif name == "ellipsoid":
                        try:
                            runs[name] = self.by_cuts(_MOST_CUTS if method == "auto" else math.inf)
                        except (_TooLargeError, TooWideError):
                            if method == "auto":
                                raise
                            torus = self.torus()
                            runs[name] = self.alike(torus.by_sources(), runs)
                    elif found and (method == "tight" or found.directions <= _MOST_TIGHT):
                        ends = tight(self.graph.x, blocks, found, self.steps, self.say)
                        runs[name] = self.moved(*ends, runs["shift"][1])
                    elif torus:
                        runs[name] = self.alike(torus.by_channels(), runs)
                except (_TooLargeError, TooWideError):
                    hint = ' Of images method="tight" may bound it on tori.' * (method == "auto")
                    self.notes.append(
                        f"{name} did not run: too many directions for one matrix.{hint}"
                    )
                except NoTorusError as error:
                    self.notes.append(f"{name} did not run on tori: {error}.")
            if name in runs:
                seconds[name] = time.process_time() - started
                failures[name] = self.failures  # of this one's norms, or what it is the least of
            started = time.process_time()
        best = min(runs, key=lambda name: runs[name][0])
        log_upper, ops = runs[best]
        bounds = tuple((name, _exp(value)) for name, (value, _) in runs.items())
        return LipschitzBound(
            _exp(log_upper), log_upper, best, tuple(ops),
            failures[best] * FAILURE, bounds, tuple(seconds.items()), tuple(self.notes),
        )  # fmt: skip

    # Domains with a constant for every source.

    def plain(self, domain: str, starts=None) -> tuple[float, list[Op]]:
        logs: dict[Operation, float] = starts or {self.graph.x: 0.0}
        ops: list[Op] = []
        for source in self.sources:
            self.say(f"{domain}: {source.node.where} {source.what}")
            logs[source.node] = self.moves(source.rows, logs, domain, ops)
            ops.append(Op(source.node.where, source.what, source.factor, logs[source.node],
                          source.reason))  # fmt: skip
        return self.moves(self.outputs, logs, domain, ops), ops

    def loop(self, node: Operation) -> Sequence[float]:
        """Constants of a loop's output for each argument: what the carry begins with, and all
        else, of which every step sees at most the whole."""
        params, known = node.params, {}
        first, second = 0.0, -math.inf  # how far the carry can move, for either
        seen: list[tuple[float, float]] = []
        for carry, ys in params["steps"]:
            if (carry, ys) not in known:
                known[carry, ys] = [self._step_of(params, outputs) for outputs in (carry, ys)]
            (a, b), (p, q) = known[carry, ys]
            seen.append((_times(p, first), _plus(_times(p, second), q)))
            first, second = _times(a, first), _plus(_times(a, second), b)
        if not params["is_carry"]:
            first, second = (_hypot(*logs) for logs in zip(*seen, strict=True))
        n = params["starts"]
        return [_exp(first)] * n + [_exp(second)] * (len(node.args) - n)

    def _step_of(self, params, outputs) -> tuple[float, float]:
        """The constants of a step in its carry alone, and in the rest alone."""
        if not outputs:
            return -math.inf, -math.inf
        carry, rest = params["carry"], params["rest"]
        graph = Graph(carry, list(outputs), frozenset(), [])
        step = _Bounds(graph, self.rtol, self.say, most_entries=self.most_entries)
        found = (step.plain("joint", {carry: 0.0, rest: -math.inf})[0],
                 step.plain("joint", {carry: -math.inf, rest: 0.0})[0])  # fmt: skip
        self.failures += step.failures
        return found

    def moves(self, rows: Rows, logs, domain: str, ops: list[Op]) -> float:
        groups = [(row,) for row in rows.rows] if rows.added else [rows.rows]
        return _plus(*(self.target(group, logs, domain, ops) for group in groups))

    def target(self, rows: tuple[Row, ...], logs, domain: str, ops: list[Op]) -> float:
        """How far rows move, by the best that the domain has."""
        if any(row.is_infinite for row in rows):
            return math.inf
        rules = self.by_rules(rows, logs)
        best, factor, sources = rules, math.nan, None
        if domain != "product":
            sources = self.reached(rows)
            if self.is_one_operation(rows):
                pass  # the rules are as good
            elif len(taps := self.taps(rows)) == len(sources):
                parts = [_times(_log(self.by_taps(rows, s)), logs[s]) for s in sources]
                best = min(best, _plus(*parts))
                if domain == "joint" and len(sources) > 1 and best < math.inf:
                    best = min(best, self.joint_of_taps(taps, logs, parts))
            elif (maps := self.maps(rows)) is not None:
                sources = list(maps)
                parts = [_times(_log(self.norm(rows, s, maps[s])), logs[s]) for s in maps]
                best = min(best, _plus(*parts))
                if domain == "joint" and len(maps) > 1 and best < math.inf:
                    best = min(best, self.joint(maps, logs, parts))
                best = min(best, self.by_corners(rows, logs))
            else:
                norms = [(self.by_taps if s in taps else self.by_products)(rows, s)
                         for s in sources]  # fmt: skip
                parts = [_times(_log(n), logs[s]) for n, s in zip(norms, sources, strict=True)]
                best = min(best, _plus(*parts))
        else:
            sources = self.reached(rows)
        if sources is not None and len(sources) == 1 and math.isfinite(best):
            factor = math.exp(min(700.0, best - logs[sources[0]])) if best > -math.inf else 0.0
        (a, _), *_ = rows[0].terms
        if is_linear(a) or len(rows) > 1:
            shape = "x".join(map(str, a.shape)) or "scalar"
            what = "linear to " + (shape if len(rows) == 1 else f"{len(rows)} arrays")
            ops.append(Op(a.where, what, factor, best))
        return best

    def reached(self, rows) -> list[Operation]:
        """The sources that linear pieces begin at."""
        found, seen, todo = {}, set(), [a for row in rows for a, _ in row.terms]
        while todo:
            a = todo.pop()
            if a in self.all.sources or a.op == "x":
                found[a] = None
            elif a not in seen:
                seen.add(a)
                todo += a.inputs
        return list(found)

    def by_rules(self, rows: Sequence[Row], logs) -> float:
        """Operation by operation."""
        known = dict(logs)
        todo, order = [a for row in rows for a, _ in row.terms], set()
        while todo:
            a = todo.pop()
            if a not in known and a not in order:
                order.add(a)
                todo += a.inputs
        for node in sorted(order, key=lambda a: a.depth):
            inputs = [known[a] for a in node.args if isinstance(a, Operation)]
            if len(inputs) == 1:
                known[node] = _times(_log(self._factor(node, node.inputs[0])), inputs[0])
            elif node.op in ("concatenate", "stack", "select_n"):
                known[node] = _hypot(*inputs)
            elif node.op in ("add", "add_any", "sub"):
                known[node] = _plus(*inputs)
            else:
                known[node] = _plus(
                    *(_times(_log(self._factor(node, a)), known[a]) for a in node.inputs)
                )
        return _hypot(
            *(
                _plus(*(_times(known[a], _log(float(np.max(np.abs(f), initial=0.0))))
                        for a, f in row.terms))
                for row in rows
            )
        )  # fmt: skip

    def _factor(self, node: Operation, a: Operation) -> float:
        """The norm of a linear operation in one of its arguments."""
        if (node, a) not in self._operations:
            alone = len(node.operands) == 1
            norm = operation_norm if alone else partial(explicit_norm, a=a)
            value = norm(node, rtol=self.rtol)
            if value is None:
                # |A|_F is at most the length of the sums of absolute values in rows.
                sums = apply(node, {a: np.ones((1, *a.shape))}, absolute=True)
                value = float(np.linalg.norm(sums)) * (1 + 1e-6)
            self._operations[node, a] = value
        return self._operations[node, a]

    def maps(self, rows: tuple[Row, ...]) -> dict[Operation, _Map] | None:
        key = _identity(rows)
        if key not in self._maps:
            forms = _Forms(4 * self.most_entries, self.most_entries)
            try:
                for a in self.reached(rows):
                    forms.seed(a)
                self._maps[key] = forms.maps(rows)
            except _TooLargeError:
                self._maps[key] = None
        return self._maps[key]

    def between(self, rows: Sequence[Row], source: Operation | None = None) -> list[Operation]:
        """The linear operations that rows are made of, in the graph's order; none before source."""
        order, todo = set(), [a for row in rows for a, _ in row.terms]
        while todo:
            a = todo.pop()
            if a is not source and a not in order and a not in self.all.sources and a.op != "x":
                order.add(a)
                todo += a.inputs
        return sorted(order, key=lambda a: a.depth)

    def is_one_operation(self, rows: Sequence[Row]) -> bool:
        """Whether large rows are no more than a convolution, but for isometries."""
        order = self.between(rows)
        return (
            len(rows) == len(rows[0].terms) == 1
            and _uniform(rows[0].terms[0][1]) is not None
            and all(len(a.operands) == 1 for a in order)
            and sum(not is_isometric(a) for a in order) <= 1
            and max((a.size * a.inputs[0].size for a in order), default=0) > _LARGE
        )

    def taps(self, rows: tuple[Row, ...]) -> dict[Operation, tuple[TapSum, One]]:
        """The maps of a large row from those sources from which it is one convolution."""
        key = _identity(rows)
        if key not in self._taps:
            sources = self.reached(rows)
            large = max(a.size for a in sources) * rows[0].terms[0][0].size > _LARGE
            found = {s: self._tap_sum(rows, s) for s in sources} if large else {}
            self._taps[key] = {s: pair for s, pair in found.items() if pair is not None}
        return self._taps[key]

    def _tap_sum(self, rows: tuple[Row, ...], source: Operation) -> tuple[TapSum, One] | None:
        known = tap_sums(source, self.between(rows, source)) if len(rows) == 1 else {}
        parts = [(known[a], _uniform(factor)) for a, factor in rows[0].terms if a in known]
        clear = [(form, c) for form, c in parts if form is not None and c is not None]
        form = summed(clear) if len(clear) == len(parts) > 0 else None
        one = None if form is None else as_convolution(form)
        return None if form is None or one is None else (form, one)

    def by_taps(self, rows: tuple[Row, ...], source: Operation) -> float:
        """The norm of rows in one source from which they are one convolution."""
        key = (_identity(rows), source)
        if key not in self._norms:
            one = self.taps(rows)[source][1]
            self._norms[key] = norm(one.kernel, self.rtol, one.error, one.view)
        return self._norms[key]

    def joint_of_taps(self, taps: dict[Operation, tuple[TapSum, One]], logs, parts) -> float:
        """As ``joint``, of sources of one size together, at the weights of the sum."""
        alike: dict[tuple[int, ...], list[tuple[TapSum, float, float]]] = {}
        for (source, (form, _)), part in zip(taps.items(), parts, strict=True):
            if part > -math.inf:
                alike.setdefault(form.sizes, []).append((form, logs[source], part))
        totals = []
        for group in alike.values():
            total = _plus(*(part for *_, part in group))
            # sqrt(sum w) sigma([B_k L_k / sqrt(w_k)]) with w_k what B_k L_k is at most, over sums.
            scales = [log - (part + total) / 2 for _, log, part in group]
            form = None
            if len(group) > 1 and max(map(abs, scales)) < 300:
                form = beside([(f, math.exp(c)) for (f, *_), c in zip(group, scales, strict=True)])
            one = None if form is None else as_convolution(form)
            if one is not None:
                value = norm(one.kernel, self.rtol, one.error, one.view) * (1 + 8 * UNIT)
                total = min(total, _times(_log(value), total))
            totals.append(total)
        return _plus(*totals)

    def by_products(self, rows: tuple[Row, ...], source: Operation) -> float:
        """The norm of rows in one source where no matrix is formed; infinite where the rules are
        as good."""
        key = (_identity(rows), source)
        if key not in self._products:
            self._products[key] = self._by_products(rows, source)
        return self._products[key]

    def _by_products(self, rows: tuple[Row, ...], source: Operation) -> float:
        order = self.between(rows, source)
        if len(rows) == 1 and len(rows[0].terms) == 1 and all(len(a.operands) == 1 for a in order):
            factor = rows[0].terms[0][1]
            found = convolution(order) if np.ndim(factor) == 0 else None
            if found is not None:
                return abs(factor) * (1 + 4 * UNIT) * norm(*found[:1], self.rtol, *found[1:])
        self.say(f"products of {rows[0].terms[0][0].where}")

        def combine(known, absolute):
            sign = np.abs if absolute else lambda x: x
            return [
                sum(sign(np.asarray(f, np.float64)) * known[a] for a, f in row.terms if a in known)
                + np.zeros(row.terms[0][0].shape)
                for row in rows
            ]

        self.failures += 1
        return norm_above(products(order, combine, source))

    def norm(self, rows, source: Operation, part: _Map) -> float:
        key = (_identity(rows), source)
        if key not in self._norms:
            self._norms[key] = norm(part.matrix, self.rtol, part.error)
        return self._norms[key]

    def joint(self, maps: dict[Operation, _Map], logs, parts: Sequence[float]) -> float:
        """min over w > 0 of sqrt(sum w_k) sigma([B_k L_k / sqrt(w_k)]): any w is a bound."""
        live = [
            (m, logs[s], p)
            for (s, m), p in zip(maps.items(), parts, strict=True)
            if logs[s] > -math.inf
        ]
        if not live:
            return -math.inf
        top = max(max(p for _, _, p in live), max(log for _, log, _ in live) - 300)
        scale = [math.exp(min(log - top, 700.0)) for _, log, _ in live]
        if not all(map(math.isfinite, scale)):
            return math.inf
        blocks = [m.matrix * s for (m, _, _), s in zip(live, scale, strict=True)]
        errors = [m.error * s for (m, _, _), s in zip(live, scale, strict=True)]
        weights = np.array([max(math.exp(p - top), 1e-9) for _, _, p in live])
        best, best_weights = math.inf, weights
        u = np.random.default_rng(0).standard_normal(blocks[0].shape[1])
        for _ in range(30 if len(u) <= 256 else 8):
            weights = weights / weights.sum()
            value, u = _leading(blocks, weights, u)
            if value < best:
                better, best, best_weights = best - value, value, weights
            else:
                better = 0.0
            moved = np.array([np.linalg.norm(b @ u) for b in blocks])
            if better <= 1e-5 * best or not moved.any():
                break
            weights = np.sqrt(weights * np.maximum(moved, 1e-12 * moved.max()))
        stacked = np.concatenate(
            [b / math.sqrt(w) for b, w in zip(blocks, best_weights, strict=True)]
        )
        error = math.hypot(*(e / math.sqrt(w) for e, w in zip(errors, best_weights, strict=True)))
        error += 8 * UNIT * float(np.linalg.norm(stacked))
        value = norm(stacked, self.rtol, error) * math.sqrt(best_weights.sum()) * (1 + 8 * UNIT)
        return _times(_log(value), top)

    def by_corners(self, rows: tuple[Row, ...], logs) -> float:
        """With logsumexp among the sources: its gradient is in a simplex, so the norm is largest
        at a corner, where it is one entry of its argument.

        The argument is a source here, so that ``lse(z) - z_i`` is seen as one function of z.
        """
        found = [a for a in self.reached(rows) if a.op == "logsumexp"]
        if len(found) != 1:
            return math.inf
        (total,) = found
        (z,) = total.inputs
        forms = _Forms()
        try:
            others = [a for a in self.reached(rows) if a is not total]
            for a in {total, z, *others}:
                forms.seed(a)
            maps = forms.maps(rows)
        except _TooLargeError:
            return math.inf
        if total not in maps:
            return math.inf
        b = maps.pop(total)
        c = maps.pop(z, _Map(np.zeros((z.size, b.matrix.shape[1])), 0.0))
        axes = total.params["axes"]
        kept = [1 if i in axes else n for i, n in enumerate(z.shape)]
        group = np.broadcast_to(np.arange(total.size).reshape(kept), z.shape).ravel()
        if z.size * np.count_nonzero(b.matrix.any(0)) > 2**16:
            return math.inf
        pieces: dict[tuple[Any, ...], list[float]] = {}
        for g in range(total.size):
            inside = group == g
            block, row = c.matrix[inside], b.matrix[g]
            seen = np.flatnonzero(block.any(0) | (row != 0))
            corners = np.repeat(block[None][..., seen], len(block), 0)
            corners[np.arange(len(block)), np.arange(len(block))] += row[seen]
            rounding = 4 * UNIT * float(np.linalg.norm(corners[0])) if corners.size else 0.0
            pieces.setdefault(tuple(seen), []).append(norm(corners, self.rtol, rounding))
        seen = [set(key) for key in pieces]
        apart = sum(map(len, seen)) == len(set().union(*seen))
        sizes = [math.hypot(*values) for values in pieces.values()]
        value = (max(sizes) if apart else math.hypot(*sizes)) + c.error + b.error * math.sqrt(2)
        row = Row(((z, 1.0),))
        parts = [_times(_log(value * (1 + 4 * UNIT)), self.target((row,), logs, "joint", []))]
        parts += [
            _times(_log(norm(m.matrix, self.rtol, m.error)), logs[s]) for s, m in maps.items()
        ]
        return _plus(*parts)

    # Domains over all directions at once.

    @property
    def directions(self) -> int:
        return self.graph.x.size + sum(s.node.size for s in self.sources)

    def shift(self):
        """((bound, table), blocks for the ellipsoid), by constants of the rests of sources."""
        infinite = any(row.is_infinite for s in self.sources for row in s.rows.rows)
        if infinite or self.directions > _MOST_DIRECTIONS:
            raise _TooLargeError
        forms, logs, ops = _Forms(_MOST_KEPT), {self.graph.x: 0.0}, []
        forms.seed(self.graph.x)
        blocks: list[Block] = []
        for source in self.sources:
            self.say(f"shift: {source.node.where} {source.what}")
            shifted = source.linear is not None
            key = source.key if shifted and source.key is not None else source.node
            rows = source.rest if shifted and source.rest is not None else source.rows
            if key not in logs:
                log, block = self._rest(forms, rows, logs, key, source.groups if shifted else None)
                logs[key] = log
                blocks.append(block)
            stack, sums = identity(key), np.ones((1, *key.shape))
            form, terms = {}, 0
            if shifted:
                assert source.linear is not None
                forms.evaluate([a for a, _ in source.linear.terms])
                form, terms = forms.row(source.linear)
            active = _active(rows, key)
            form = {s: pair for s, pair in form.items() if pair[1].any()}
            if active.any():
                form[key] = (source.sign * stack)[active], sums * active.reshape(key.shape)
            forms.known[source.node], forms.terms[source.node] = form, terms + 2
            ops.append(Op(source.node.where, f"rest of {source.what}",
                          _largest(rows), logs[key]))  # fmt: skip
        log, block = self._rest(forms, self.outputs, logs, None)
        ops.append(Op("", "output", math.nan, log))
        return (log, ops), [*blocks, block]

    def _rest(
        self, forms: _Forms, rows: Rows, logs, key, of_entries: np.ndarray | None = None
    ) -> tuple[float, Block]:
        groups = [(row,) for row in rows.rows] if rows.added else [rows.rows]
        logs_of, maps = [], []
        for group in groups:
            part = forms.maps(group)
            if len(part) > 1:
                # Estimates, for the weights alone.
                guesses = [
                    _times(_log(_leading([m.matrix], [1.0], None)[0]), logs[s])
                    for s, m in part.items()
                ]
                best = self.joint(part, logs, guesses)
            else:
                best = _plus(*(_times(_log(norm(m.matrix, self.rtol, m.error)), logs[s])
                               for s, m in part.items()))  # fmt: skip
            logs_of.append(best)
            maps.append(part)
        total = _plus(*logs_of)
        # (p + q)^2 <= p^2 (p + q)/p + q^2 (p + q)/q, with p and q what these are at most.
        factors = [
            math.exp((total - log) / 2) * (1 + 4 * UNIT) if log > -math.inf else 0.0
            for log in logs_of
        ] if len(groups) > 1 else [1.0]  # fmt: skip
        if len(groups) > 1 and any(log == -math.inf for log in logs_of):
            factors = [1.0 if log > -math.inf else 0.0 for log in logs_of]
        columns: dict[Operation, tuple[np.ndarray, float]] = {}
        widths = [sum(row.terms[0][0].size for row in group) for group in groups]
        for part, factor, at, width in zip(maps, factors, np.cumsum([0, *widths]), widths,
                                           strict=False):  # fmt: skip
            for s, m in part.items():
                whole, error = columns.get(s, (np.zeros((len(m.matrix), sum(widths))), 0.0))
                whole[:, at : at + width] = factor * m.matrix
                columns[s] = whole, error + factor * m.error + 2 * UNIT * factor * float(
                    np.linalg.norm(m.matrix))  # fmt: skip
        if key is None:
            return total, Block(key, columns, 0)
        active = _active(rows, key)
        n = int(np.count_nonzero(active))
        alike = all(a.shape == key.shape for row in rows.rows for a, _ in row.terms)
        if of_entries is None or not alike:
            return total, Block(key, columns, n)
        of_rows = np.tile(np.where(active, of_entries, -1), len(groups))
        return total, Block(key, columns, n, of_rows, of_entries[active])

    def by_cuts(self, most: float) -> tuple[float, list[Op]]:
        """(bound, table) of the ellipsoid where all directions together are too many."""
        steps, ops, kept = [], [], 0
        for source in self.sources:
            rows = source.rows
            kept += 2 * source.node.size * sum(a.size for a in self.reached(rows.rows))
            if rows.added or kept > _MOST_KEPT or any(row.is_infinite for row in rows.rows):
                raise _TooLargeError
        for source in self.sources:
            shifted = source.linear is not None and source.rest is not None
            rows = source.rest if shifted and source.rest is not None else source.rows
            linear = self.columns((source.linear,)) if shifted and source.linear else {}
            steps.append(Step(source.node, source.node.size, linear, self.columns(rows.rows)))
            ops.append(Op(source.node.where, source.what, _largest(rows), math.nan))
        steps.append(Step(None, 0, {}, self.columns(self.outputs.rows)))
        ops.append(Op("", "output", math.nan, math.nan))
        return self.moved(*by_cuts(self.graph.x, steps, self.say, most), ops)

    def columns(self, rows: tuple[Row, ...]) -> dict[Operation, _Map]:
        maps = self.maps(rows)
        if maps is None:
            raise _TooLargeError
        return maps

    def torus(self) -> Torus:
        """As a network of convolutions."""
        outputs = list(dict.fromkeys(self.graph.outputs))
        return Torus(self.graph.x, self.sources, outputs, self.say)

    def alike(self, upper: float, runs) -> tuple[float, list[Op]]:
        """A bound of the outputs alone, with what else is known of sources."""
        log = _log(upper)
        copies = max(self.graph.outputs.count(a) for a in self.graph.outputs)
        log = _times(log, _log(copies) / 2) if copies > 1 else log
        return log, [*runs["joint"][1], Op("", "output", math.nan, log)]

    def moved(self, upper: float, lengths, ops: list[Op]) -> tuple[float, list[Op]]:
        table = [op._replace(log_bound=_log(length))
                 for op, length in zip(ops, lengths, strict=False)]  # fmt: skip
        return _log(upper), table


def _exp(log: float) -> float:
    if log == -math.inf:
        return 0.0
    return math.exp(log) * (1 + 4 * UNIT * (2 + abs(log))) if log < 709 else math.inf


def _identity(rows: Sequence[Row]) -> tuple[Any, ...]:
    return tuple(
        (a, id(f) if isinstance(f, np.ndarray) else f) for row in rows for a, f in row.terms
    )


def _uniform(factor: Any) -> float | None:
    """The one number that a factor is, or None."""
    ends = np.min(factor), np.max(factor)
    return float(ends[0]) if ends[0] == ends[1] else None


def _largest(rows: Rows) -> float:
    return max(float(np.max(np.abs(f), initial=0.0)) for row in rows.rows for _, f in row.terms)


def _active(rows: Rows, key) -> np.ndarray:
    """The entries of a source that move at all: those of an elementwise one with a factor."""
    out = np.zeros(key.size, bool)
    for row in rows.rows:
        for a, factor in row.terms:
            if a.shape != key.shape or np.ndim(factor) == 0:
                return np.ones(key.size, bool)
            out |= np.broadcast_to(factor, key.shape).ravel() != 0
    return out


def _leading(blocks: Sequence[np.ndarray], weights, start) -> tuple[float, np.ndarray]:
    """An estimate of the norm of the stacked blocks over sqrt(w), and the vector u of it."""
    n = blocks[0].shape[1]
    if n <= 256:
        gram = sum(b.T @ b / w for b, w in zip(blocks, weights, strict=True))
        value, vector = leading(gram)  # type: ignore
    else:

        def multiply(x):
            return sum(b.T @ (b @ x) / w for b, w in zip(blocks, weights, strict=True))

        operator = LinearOperator((n, n), multiply, dtype=float)  # type: ignore
        values, vectors = eigsh(operator, k=1, which="LA", tol=1e-3, v0=start)  # type: ignore
        value, vector = float(values[0]), vectors[:, 0]
    return math.sqrt(max(value, 0.0)), vector
