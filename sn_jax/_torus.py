r"""Networks of convolutions on a torus: the tightest bound with one multiplier for each channel.

Every source is an image, zero outside of its grid, laid on a torus that is large enough for no
convolution to reach around it. There ``p = sum K s`` of the sources before, a convolution around
the torus, is right on the grid, and whatever it is elsewhere. With slopes in [a, b] that hold 0,

    (s - a p) (s - b p) <= 0

at every pixel: on the grid by the slopes, and outside because s is 0. So cutting off at borders is
one more slope, and where two convolutions follow each other with nothing between them that cuts
off, a source with slopes in [0, 1] does. With a multiplier t for the sum over the torus of each
channel, ``|y|^2 <= rho |x|^2`` follows from

    M = |x|^2 + sum t (s - a p) (s - b p) - |y|^2 / rho >= 0    for all x and s

(LipSDP of Fazlyab et al. 2019, for any graph). M commutes with shifts: it is a Hermitian matrix for
each frequency. ``- t c |p|^2`` with c >= 0, and ``- |y|^2 / rho``, stand there as variables of
their own, whose Schur complements they are, so that everything is linear in neighbours.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np

from sn_jax._convolutions import TapSum, tap_sums
from sn_jax._fronts import Coupling, Fronts, Variable, factor_of
from sn_jax._pieces import Operation
from sn_jax._sources import Source
from sn_jax._symbols import UNIT, gamma

# How many sources cut off at borders, and how much larger than the grid a torus becomes.
_MOST_CUTS, _MOST_SIZE = 64, 2
# Floating-point operations of a search, its steps, and how few are not worth it.
_EFFORT, _MOST_STEPS, _FEWEST = 2e11, 60, 8
# By how much multipliers are smaller than the largest at the start, and the bound larger.
_WIDE, _ROOM = (2.0, 1.5, 1.25), 1.2
# Weights of the barrier.
_OUTPUTS, _OTHERS = 0.3, 1e-5


class NoTorusError(Exception):
    """It is no network of convolutions, as far as is seen."""


class _Demand(NamedTuple):
    """What bounds a source: slopes in one operation, or lengths of several.

    Attributes:
      node: the source.
      slopes: (operation, least, largest), or None.
      lengths: (operation, factor) otherwise.
      entrywise: whether entry by entry.
    """

    node: Operation
    slopes: tuple[Operation, Any, Any] | None
    lengths: tuple[tuple[Operation, Any], ...]
    entrywise: bool

    @property
    def roots(self) -> list[Operation]:
        return [self.slopes[0]] if self.slopes else [a for a, _ in self.lengths]


class _Network:
    """Sources, what they are made of, and the tori that they lie on.

    Attributes:
      forms: start -> operation -> what it makes of it.
      axes: start or root -> per axis the dimension, -1 for channels, None for none.
      tori: start or root -> (size in each dimension).
    """

    def __init__(self, x: Operation, demands: Sequence[_Demand], outputs: Sequence[Operation]):
        self.x, self.outputs = x, list(outputs)
        self.demands = {d.node: d for d in demands}
        self.forms: dict[Operation, dict[Operation, TapSum | None]] = {}
        self.channels: dict[Operation, int | None] = {}
        while True:
            self._trace()
            cut = self._first_cut()
            if cut is None:
                break
            if len(self.demands) - len(demands) >= _MOST_CUTS:
                raise NoTorusError("borders are cut off too often")
            self.demands[cut] = _Demand(cut, (cut, 0.0, 1.0), (), True)
            for start in [a for a, forms in self.forms.items() if cut in forms or a is cut]:
                del self.forms[start]
        self.starts = [x, *sorted(self.demands, key=lambda a: a.depth)]
        self._lay_out()

    @property
    def targets(self) -> list[tuple[Operation, Operation | None]]:
        """(operation, the source that it bounds), None for outputs."""
        roots = [(root, a) for a, d in self.demands.items() for root in d.roots]
        return [*roots, *((a, None) for a in self.outputs)]

    def _trace(self) -> None:
        ends = {self.x, *self.demands}
        order: set[Operation] = set()
        todo = [root for root, start in self.targets if root is start or root not in ends]
        while todo:
            a = todo.pop()
            if a not in order:
                order.add(a)
                todo += [b for b in a.inputs if b not in ends]
        inside = sorted(order, key=lambda a: a.depth)
        for start in sorted(ends, key=lambda a: a.depth):
            channel = None
            if start is not self.x:
                demand = self.demands[start]
                axes = {form.axes.index(-1) for root in demand.roots
                        for form in self.of(root, start).values()
                        if form is not None and -1 in form.axes}  # fmt: skip
                channel = axes.pop() if len(axes) == 1 else None
            if start not in self.forms or self.channels[start] != channel:
                later = [a for a in inside if a is not start]
                self.forms[start] = tap_sums(start, later, ends - {start}, channel)
                self.channels[start] = channel

    def of(self, target: Operation, start: Operation | None) -> dict[Operation, TapSum | None]:
        """What a target, as it bounds ``start``, is of each source."""
        if target is self.x or (target in self.demands and target is not start):
            return {target: self.forms[target][target]}
        return {a: forms[target] for a, forms in self.forms.items()
                if target in forms and a is not start}  # fmt: skip

    def _good(self, a: Operation, start: Operation | None) -> bool:
        return all(form is not None and _ratios(form) is not None
                   for form in self.of(a, start).values())  # fmt: skip

    def _first_cut(self) -> Operation | None:
        """The deepest good operation before a bad one that a bad target is made of."""
        todo = [a for a, start in self.targets if not self._good(a, start)]
        if not todo:
            return None
        found, seen = [], set()
        while todo:
            a = todo.pop()
            if a in seen:
                continue
            seen.add(a)
            for b in a.inputs:
                if b not in self.demands and b is not self.x:
                    (found if self._good(b, None) else todo).append(b)
        if not found:
            raise NoTorusError("a linear piece is no convolution")
        return max(found, key=lambda a: a.depth)

    def _lay_out(self) -> None:
        """Dimensions of all axes, and the smallest tori on which every piece is right."""
        channel = next(d for d in self.forms[self.x].values() if d is not None).axes.index(-1)
        dims = iter(count())
        self.axes: dict[Operation, tuple[int | None, ...]] = {}
        self.axes[self.x] = tuple(-1 if i == channel else next(dims)
                                  for i in range(len(self.x.shape)))  # fmt: skip
        self.n_dims = len(self.x.shape) - 1
        if not self.n_dims:
            raise NoTorusError("it has no images")
        ratios: dict[Operation, list[Fraction | None]] = {
            self.x: [Fraction(1) if n > 1 else None for n in self.grid(self.x)]
        }
        for start in self.starts[1:]:
            roots = self.demands[start].roots
            for root in roots:
                self._place(root, start, ratios)
            if len({(self.axes[root], root.shape) for root in roots}) > 1:
                raise NoTorusError("a source is made of images that are not alike")
            self.axes[start] = self.axes[roots[0]]
            alike = len(start.shape) == len(roots[0].shape) and -1 in self.axes[start]
            if not alike or self.axes[start].index(-1) != self.channels[start]:
                raise NoTorusError("a source has other axes than what it is made of")
            before, after = self.grid(roots[0]), self.grid(start)
            ratios[start] = [
                None if m == 1 or r is None else r if n == m else r / round(n / m)
                for r, n, m in zip(ratios[roots[0]], before, after, strict=True)
            ]
        for output in self.outputs:
            self._place(output, None, ratios)
        self.tori: dict[Operation, tuple[int, ...]] = dict.fromkeys(ratios, ())
        for d in range(self.n_dims):
            for a, n in self._sizes(d, {a: r[d] for a, r in ratios.items()}).items():
                self.tori[a] = (*self.tori[a], n)

    def grid(self, a: Operation) -> list[int]:
        out = [1] * self.n_dims
        for n, d in zip(a.shape, self.axes[a], strict=True):
            if d is not None and d >= 0:
                out[d] = n
        return out

    def _place(self, root: Operation, owner: Operation | None, ratios) -> None:
        if root in self.axes:
            return
        found: list[tuple[int | None, ...]] = []
        for start, form in self.of(root, owner).items():
            assert form is not None
            own = [d for d in self.axes[start] if d != -1]
            if any(n > 1 for n in form.sizes[len(own) :]):
                raise NoTorusError("an axis comes from nowhere")
            found.append(tuple(
                -1 if d == -1 else own[d] if d is not None and d < len(own) and n > 1 else None
                for d, n in zip(form.axes, root.shape, strict=True)
            ))  # fmt: skip
        if not found or any(axes != found[0] for axes in found):
            raise NoTorusError("axes of an image change their places")
        self.axes[root] = found[0]
        own = ratios.setdefault(root, [None] * self.n_dims)
        for start, form in self.of(root, owner).items():
            assert form is not None
            for d, ratio in zip(self._dimensions(start), _ratios(form) or [], strict=False):
                if d is None or ratio is None or ratios[start][d] is None:
                    continue
                if own[d] not in (None, ratios[start][d] / ratio):
                    raise NoTorusError("strides on two ways do not agree")
                own[d] = ratios[start][d] / ratio
        for n, r in zip(self.grid(root), own, strict=True):
            if n > 1 and r is None:
                raise NoTorusError("an image comes from a single pixel")

    def _dimensions(self, start: Operation) -> list[int | None]:
        """Of each table of a form of this source, the dimension."""
        return [d for d in self.axes[start] if d != -1]

    def _sizes(self, d: int, ratios: dict[Operation, Fraction | None]) -> dict[Operation, int]:
        """Of all tori in a dimension: the smallest on which all tables are right."""
        grids = {a: self.grid(a)[d] for a in ratios}
        lines = []
        for root, owner in self.targets:
            for start, form in self.of(root, owner).items():
                assert form is not None
                for e, table in zip(self._dimensions(start), form.tables, strict=False):
                    if e == d:
                        lines.append((start, root, table))
        if all(np.array_equal(t, np.arange(grids[a])[:, None]) for a, _, t in lines):
            return dict.fromkeys(ratios, 1)  # nothing happens along it
        known = {a: r for a, r in ratios.items() if r is not None}
        if not known:
            return dict.fromkeys(ratios, 1)
        unit = math.lcm(*(r.denominator for r in known.values()))
        whole = {a: int(r * unit) for a, r in known.items()}
        common = math.gcd(*whole.values())
        whole = {a: r // common for a, r in whole.items()}
        first = max(-(-grids[a] // r) for a, r in whole.items())
        for m in range(first, _MOST_SIZE * first + 8):
            sizes = {a: whole[a] * m if a in whole else 1 for a in ratios}
            if all(
                _shifts(table, grids[a], sizes[a], sizes[b]) is not None for a, b, table in lines
            ):
                return sizes
        raise NoTorusError("a convolution is none on a torus")

    def fronts(self) -> tuple[Fronts, np.ndarray]:
        """(the matrix, the source of each multiplier; the outputs' is the last)."""
        variables = [Variable(self.tori[self.x], self._width(self.x))]
        at, couplings, ties = {self.x: 0}, [], []

        def couple(row, root, owner, factor, scaled):
            """A row of what a root is of all sources, its channels multiplied."""
            for start, form in self.of(root, owner).items():
                assert form is not None
                kernel, absolute, shifts = self._laid(start, root, form)
                many = math.prod(max(map(len, taps), default=1) for taps in shifts)
                sizes = absolute.sum(0) * many
                terms = form.terms + 2 * len(kernel) * many + 64 * len(shifts) + 64
                each = np.broadcast_to(factor, kernel.shape[1])[:, None]
                error = gamma(2 * terms) * sizes * np.abs(each) * (1 + gamma(len(kernel)))
                if error.any():
                    couplings.append(Coupling(row, at[start], kernel * each, shifts, error, scaled))

        for number, start in enumerate(self.starts[1:]):
            demand = self.demands[start]
            width = self._width(start)
            group = len(ties) + (np.arange(width) if demand.entrywise else np.zeros(width, int))
            ties += [number] * (1 + int(group[-1]) - len(ties))
            rows, cross = [], np.zeros(width)
            if demand.slopes:
                root, *ends = demand.slopes
                low = np.minimum(self._by_channel(root, ends[0], np.min), 0.0)
                high = np.maximum(self._by_channel(root, ends[1], np.max), 0.0)
                # s^2 - (low + high) s p + low high p^2, the last no larger than it is.
                cross = low + high
                minus = np.where((low == 0) | (high == 0), 0.0, _parabola(low, high, cross))
                rows = [(root, np.sqrt(minus) * (1 + 4 * UNIT))]
            else:
                rows = [(root, self._by_channel(root, f, np.max)) for root, f in demand.lengths]
            for root, factor in rows:
                if factor.any():
                    width = self._width(root)
                    own = group if len(group) == width else np.full(width, group[0])
                    variables.append(Variable(self.tori[root], width, own, -1))
                    couple(len(variables) - 1, root, start, factor, False)
            variables.append(Variable(self.tori[start], self._width(start), group))
            if demand.slopes:
                couple(len(variables) - 1, root, start, -cross / 2, True)
            at[start] = len(variables) - 1
        for output in self.outputs:
            width = self._width(output)
            variables.append(Variable(self.tori[output], width, np.full(width, len(ties))))
            couple(len(variables) - 1, output, None, 1.0, False)
        tori = sorted({v.torus for v in variables}, key=math.prod)
        for coarse, fine in pairwise(tori):
            if any(n % m for n, m in zip(fine, coarse, strict=True)):
                raise NoTorusError("grids do not divide each other")
        return Fronts(variables, couplings), np.array([*ties, max(ties, default=-1) + 1])

    def _laid(self, start: Operation, root: Operation, form: TapSum):
        """(kernel (taps, out, in), that of absolute values, shifts in each dimension)."""
        own, grid, order = self._dimensions(start), self.grid(start), []
        kernel, absolute = form.kernel, form.absolute
        shifts: list[tuple[tuple[int, ...], ...]] = [((0,),)] * self.n_dims
        for e, table in enumerate(form.tables):
            d = own[e] if e < len(own) else None
            if d is not None and max(self.tori[start][d], self.tori[root][d]) > 1:
                found = _shifts(table, grid[d], self.tori[start][d], self.tori[root][d])
                assert found is not None
                shifts[d] = found
                order.append((d, e))
            else:  # one pixel, or the same at every pixel
                alive = np.flatnonzero(table[0] >= 0)
                kernel, absolute = (np.take(w, alive, e).sum(e, keepdims=True)
                                    for w in (kernel, absolute))  # fmt: skip
        axes = [e for _, e in sorted(order)]
        rest = [e for e in range(len(form.tables)) if e not in axes]
        n = len(form.tables)
        kernel, absolute = (w.transpose(*rest, *axes, n + 1, n).reshape(-1, *w.shape[:-3:-1])
                            for w in (kernel, absolute))  # fmt: skip
        return kernel, absolute, tuple(shifts)

    def _width(self, a: Operation) -> int:
        axes = self.axes[a]
        return a.shape[axes.index(-1)] if -1 in axes else 1

    def _by_channel(self, a: Operation, values: Any, most: Callable) -> np.ndarray:
        values = np.broadcast_to(np.asarray(values, np.float64), a.shape)
        axes = self.axes[a]
        if -1 not in axes:
            return most(values).reshape(1)
        return most(np.moveaxis(values, axes.index(-1), -1).reshape(-1, self._width(a)), 0)


def _parabola(low: np.ndarray, high: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """At least what c makes of ``(s - low p)(s - high p) <= 0``: |s - p cross/2| <= r |p|."""
    middle = cross / 2
    radius = np.maximum(high - middle, middle - low) * (1 + 4 * UNIT)
    return np.maximum((radius - middle) * (radius + middle), -low * high) * (1 + 16 * UNIT)


def _ratios(form: TapSum) -> list[Fraction | None] | None:
    """By how much the torus of the source is larger in each dimension; None where a table is no
    convolution around a torus, whatever its size."""
    out = []
    for table, n in zip(form.tables, form.sizes, strict=True):
        m = len(table)
        if n == 1 or m == 1:
            out.append(None)
            continue
        down = [Fraction(k) for k in range(1, n + 1) if k == 1 or k * (m - 1) <= n]
        up = [Fraction(1, k) for k in range(2, m + 1) if k * (n - 1) < m]
        for r in (*down, *up):
            wide = 2 * (n + m) * r.numerator * r.denominator
            circle = (n, Fraction(n) / r)
            sizes = [(wide, wide / r), circle]
            if any(b.denominator == 1 and _shifts(table, n, a, int(b)) for a, b in
                   ((a, Fraction(b)) for a, b in sizes)):  # fmt: skip
                out.append(r)
                break
        else:
            return None
    return out


def _shifts(table: np.ndarray, n: int, size: int, size_out: int):
    """How far each tap moves on tori of two sizes, if it sees there just what the table says:
    pixel ``(o / size_out + shift / finer) size`` of those in n."""
    finer = max(size, size_out)
    if finer % size or finer % size_out or len(table) > size_out or n > size:
        return None
    of_in, of_out = finer // size, finer // size_out
    o = np.arange(len(table))
    out = []
    for column in table.T:
        seen = column >= 0
        moves = np.unique((of_in * column[seen] - of_out * o[seen]) % finer)
        if len(moves) > of_in:
            return None
        at = (of_out * o[:, None] + moves) % finer
        index = np.where(at % of_in == 0, at // of_in, n)
        hits = index < n
        if np.any(hits.sum(1) != seen) or np.any(np.max(np.where(hits, index, -1), 1, initial=-1)
                                                 != np.where(seen, column, -1)):  # fmt: skip
            return None
        out.append(tuple(int(s) for s in moves))
    return tuple(out)


def demands(sources: Sequence[Source]) -> list[_Demand]:
    """What bounds each source, as far as this knows it."""
    out = []
    for source in sources:
        if source.slopes is not None and source.linear is not None:
            ((root, _),) = source.linear.terms
            if root.shape == source.node.shape:
                out.append(_Demand(source.node, (root, *source.slopes), (), source.entrywise))
                continue
        rows = source.rows.rows
        if any(len(row.terms) != 1 or row.is_infinite for row in rows):
            raise NoTorusError("a source is bounded by sums")
        lengths = tuple(row.terms[0] for row in rows)
        many = math.sqrt(len(rows)) if source.rows.added else 1.0
        lengths = tuple((a, np.abs(f) * many * (1 + 4 * UNIT)) for a, f in lengths)
        entrywise = source.entrywise and all(a.shape == source.node.shape for a, _ in lengths)
        out.append(_Demand(source.node, None, lengths, entrywise))
    return out


class Torus:
    """The bounds of one network: by one multiplier for each source, and for each channel.

    Args:
      x, sources, outputs: of a graph.
      say: told what is done.

    Raises:
      NoTorusError: it is no network of convolutions, or too large.
    """

    def __init__(self, x: Operation, sources: Sequence[Source], outputs: Sequence[Operation],
                 say: Callable[[str], None]):  # fmt: skip
        network = _Network(x, demands(sources), outputs)
        self.fronts, self.ties = network.fronts()
        last = int(self.ties[-1])
        self.outputs = np.array([v.group is not None and self.ties[v.group[0]] == last
                                 for v in self.fronts.variables])  # fmt: skip
        self.say, self.upper = say, math.inf
        self.most = int(_EFFORT / self.fronts.flops)
        if self.most < _FEWEST:
            raise NoTorusError(
                f"the search on tori takes {_FEWEST * self.fronts.flops:.1g} operations"
            )
        say(f"on tori up to {self.fronts.grids[0].sizes}")
        found = [self._recursion(wide) for wide in _WIDE]
        self.theta = min((t for t in found if t is not None), key=lambda t: t[-1], default=None)
        if self.theta is None:
            raise NoTorusError("no multipliers were found")

    def by_sources(self) -> float:
        """One multiplier for each source."""
        assert self.theta is not None
        self.theta = self._search(self.theta, self.ties)
        self.upper = self._certified(self.theta[self.ties])
        return self.upper

    def by_channels(self) -> float:
        """One for each channel; after ``by_sources``."""
        assert self.theta is not None
        self.theta = self._search(self.theta[self.ties], np.arange(len(self.ties)))
        self.ties = np.arange(len(self.ties))
        return min(self.upper, self._certified(self.theta))

    def _recursion(self, wide: float) -> np.ndarray | None:
        """In the order of the graph the largest multipliers that are possible, over ``wide``."""
        fronts, ties = self.fronts, self.ties
        n = int(ties[-1]) + 1
        theta = np.full(n, -math.inf)  # no source is there
        theta[-1] = math.inf
        probe = 40.0
        for number in range(n):
            mine = {i for i, v in enumerate(fronts.variables)
                    if v.group is not None and ties[v.group[0]] == number}  # fmt: skip
            sign = 1 if number < n - 1 else -1
            theta[number] = -sign * probe
            tops = dict.fromkeys(mine, 0.0)

            def visit(i, _, found, tops=tops):
                v = fronts.order[i]
                if v in tops:
                    tops[v] = max(tops[v], -float(np.linalg.eigvalsh(found[0])[:, 0].min()))

            end = max(fronts.order.index(v) for v in mine)
            if not fronts.eliminate(theta[ties], visit, _with_block, end):
                return None
            top = sum(tops.values())
            # Where nothing moves it, a multiplier does not matter.
            log = math.log(top) + probe if top > 0 else -probe
            theta[number] = -sign * (log + math.log(wide if sign > 0 else _ROOM))
        return theta if math.isfinite(fronts.barrier(theta[ties], 0.0)[0]) else None

    def _search(self, theta: np.ndarray, ties: np.ndarray) -> np.ndarray:
        """The best of the logarithms of multipliers ``theta[ties]``, and a bound that fits them.

        A barrier of outputs alone would make rho what it must be; the weak one of all others keeps
        frequencies apart from the border that outputs do not see.
        """
        fronts = self.fronts
        shift = 2 * fronts.hidden(theta[ties])
        weights = np.where(self.outputs, _OUTPUTS, _OTHERS).tolist()

        def value(theta):
            barrier, gradient = fronts.barrier(theta[ties], shift, weights)
            gradient = np.bincount(ties, gradient, len(theta))
            gradient[-1] += 1
            self.say(f"on tori: {math.exp(min(theta[-1] / 2, 700.0)):.6g}")
            return theta[-1] + barrier, gradient

        return _descend(value, theta, min(self.most, _MOST_STEPS))

    def _closest(self, theta: np.ndarray) -> np.ndarray:
        """With rho as small as a single output lets it be."""
        (*_, last) = np.flatnonzero(self.outputs)
        if np.count_nonzero(self.outputs) > 1 or self.fronts.order[-1] != last:
            return theta
        top, theta = 0.0, theta.copy()

        def visit(i, _, found):
            nonlocal top
            if self.fronts.order[i] == last:
                top = max(top, -float(np.linalg.eigvalsh(found[0])[:, 0].min()))

        if self.fronts.eliminate(theta, visit, _with_block) and 0 < top < 1:
            theta[-1] += math.log(top) + 1e-7
        return theta

    def _certified(self, theta: np.ndarray) -> float:
        """The bound that these multipliers prove, rounding included."""
        theta, step = self._closest(theta), 1e-6
        for _ in range(40):
            if self.fronts.definite(theta, self.fronts.hidden(theta)):
                scales = self.fronts.scales(theta)
                return float(scales[np.argmax(self.outputs)][0]) * (1 + 8 * UNIT)
            theta[-1] += step
            step *= 2
        return math.inf


def _with_block(block: np.ndarray, row: np.ndarray):
    """A step of an elimination that shows its block."""
    factor = factor_of(block, 1.0)
    return None if factor is None else (block, np.linalg.inv(factor) @ row)


def _descend(value: Callable, theta: np.ndarray, most: int) -> np.ndarray:
    """A minimum by L-BFGS, within a domain outside of which the value is infinite."""
    f, g = value(theta)
    used, idle, pairs = 1, 0, []
    while used < most:
        d = -g
        alphas = []
        for s, y, r in reversed(pairs):
            a = r * (s @ d)
            alphas.append(a)
            d = d - a * y
        if pairs:
            s, y, r = pairs[-1]
            d = d * ((s @ y) / (y @ y))
        for (s, y, r), a in zip(pairs, reversed(alphas), strict=True):
            d = d + s * (a - r * (y @ d))
        slope = g @ d
        if slope >= 0:
            pairs, d, slope = [], -g, -(g @ g)
        longest = np.max(np.abs(d))
        if longest == 0:
            break
        step = min(1.0, 1.0 / longest) if pairs else min(1.0, 0.3 / longest)
        while used < most:
            new, grad = value(theta + step * d)
            used += 1
            if new <= f + 1e-4 * step * slope:
                break
            step *= 0.3
            if step < 1e-8:
                break
        else:
            break
        if step < 1e-8:
            if not pairs:
                break
            pairs = []  # once more, by the gradient alone
            continue
        s, y = step * d, grad - g
        theta, gain, f, g = theta + s, f - new, new, grad
        if s @ y > 1e-12 * (y @ y):
            pairs = [*pairs[-29:], (s, y, 1 / (s @ y))]
        idle = idle + 1 if gain < 1e-6 else 0
        if idle == 3:
            break
    return theta
