r"""Linear pieces between images, as sums over taps, and which of these are one convolution.

A map of images is kept as ``y[o] = sum_k W_k x[i_k(o)]``: in every dimension a table says which
pixel each output sees by which tap, or none. Such maps compose exactly, borders included:
convolutions, pools, factors of channels, pads (of zeros, around or mirrored), crops, sums. Taps
that see the same pixels are added. In the end the tables say whether a view has just these taps.
Two convolutions with zeros at both borders are not one: what the second sees of the first beyond
the border is cut off, unless the first sees nothing there either, as pools and 1x1 taps do.
"""

import math
from collections.abc import Container, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from sn_jax._pieces import Constant, Operation, rounding_terms
from sn_jax._symbols import gamma
from sn_jax._views import Conv

# Entries of a kernel that is made.
_MOST_ENTRIES = 2**24


class TapSum(NamedTuple):
    """A map from the source to an operation, ``y[o] = sum_k W_k x[i_k(o)]``.

    Attributes:
      axes: per axis of the result its dimension, -1 for channels, None for a new one of size 1.
      tables: per dimension (outputs, taps), the pixel of the source or -1.
      sizes: per dimension, of the source.
      kernel: (*taps, in, out).
      absolute: the same of absolute values.
      terms: how many roundings an entry of the kernel has gone through.
    """

    axes: tuple[int | None, ...]
    tables: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    kernel: np.ndarray
    absolute: np.ndarray
    terms: int


class One(NamedTuple):
    """One convolution: its kernel, by how much it errs in norm, and its view."""

    kernel: np.ndarray
    error: float
    view: Conv


class _NoTapsError(Exception):
    """It is not of this form, or too large."""


def tap_sums(
    source: Operation,
    order: Sequence[Operation],
    ends: Container[Operation] = (),
    channel: int | None = None,
) -> dict[Operation, TapSum | None]:
    """What linear operations, in the order of the graph, make of a source; None of those that are
    no sums of taps, and nothing of what comes after ``ends``. Channels are along the axis that is
    given, or by which most are."""
    n, best, most = len(source.shape), {}, 0
    axes = sorted(range(n), key=lambda i: (i != n - 1, source.shape[i] == 1, i))
    for axis in axes if channel is None else [channel]:
        known: dict[Operation, TapSum | None] = {source: _identity(source.shape, axis)}
        for node in order:
            open_ = {a: form for a, form in known.items() if a not in ends}
            if any(a in open_ for a in node.inputs):
                try:
                    known[node] = _next(node, open_)
                except _NoTapsError:
                    known[node] = None
        found = sum(form is not None for form in known.values())
        if found > most:
            best, most = known, found
        if found == len(known):
            break
    return best


def summed(parts: Sequence[tuple[TapSum, float]]) -> TapSum | None:
    """The sum of multiples of maps of one source."""
    try:
        return reduce(_sum, (_scaled(form, np.float64(c)) for form, c in parts))
    except _NoTapsError:
        return None


def beside(parts: Sequence[tuple[TapSum, float]]) -> TapSum | None:
    """The sum of multiples of maps of as many sources of one size: their channels side by side."""
    widths = np.cumsum([0, *(form.kernel.shape[-2] for form, _ in parts)])
    wide = []
    for (form, factor), at in zip(parts, widths, strict=False):
        form = _scaled(form, np.float64(factor))
        width = [(0, 0)] * (form.kernel.ndim - 2)
        width += [(at, widths[-1] - at - form.kernel.shape[-2]), (0, 0)]
        wide.append((_widened(form, width), 1.0))
    return summed(wide)


def _widened(form: TapSum, width: Sequence[tuple[int, int]]) -> TapSum:
    kernel, absolute = (np.pad(w, width) for w in (form.kernel, form.absolute))
    return form._replace(kernel=kernel, absolute=absolute)


def as_convolution(form: TapSum) -> One | None:
    """A view with just these taps, up to shifts of circles and pixels that nothing sees."""
    try:
        form = _without_dead(form)
    except _NoTapsError:
        return None
    *n_taps, c_in, c_out = form.kernel.shape
    # A dimension along which nothing happens does not matter to the norm.
    kept = [
        d
        for d, (table, n) in enumerate(zip(form.tables, form.sizes, strict=True))
        if not (table.shape == (n, 1) and np.array_equal(table[:, 0], np.arange(n)))
    ]
    if len(kept) > 3:
        return None
    shape = [n_taps[d] for d in kept] or [1]
    lines = [(form.tables[d], form.sizes[d]) for d in kept] or [(np.zeros((1, 1), int), 1)]
    for fit in (_with_zeros, _circular, _mirrored):
        fits = [fit(*line) for line in lines]
        if all(f is not None for f in fits):
            break
    else:
        return None
    fits = [f for f in fits if f is not None]
    kernel = form.kernel.reshape(*shape, c_in, c_out)
    kernel = _placed(kernel, [(f.place, f.n_taps) for f in fits])
    copies = math.prod(
        float(max(np.bincount(column[column >= 0], minlength=1).max() for column in table.T))
        for table, _ in lines
    )
    # A tap's matrix has at most the norm that it has by its entries; which pixels it joins, at
    # most the root of how often it sees one.
    size = math.sqrt(copies) * float(np.sum(np.sqrt(np.sum(form.absolute**2, (-1, -2)))))
    padding = fits[0].padding
    view = Conv(
        input_shape=[f.n for f in fits],
        strides=[f.stride for f in fits],
        padding=padding if isinstance(padding, str) else [f.padding for f in fits],  # type: ignore
    )
    return One(kernel, gamma(form.terms + 2) * size * (1 + 1e-9), view)


# From one operation to the next.


def _identity(shape: tuple[int, ...], channel: int) -> TapSum:
    dimensions = [i for i in range(len(shape)) if i != channel]
    axes = tuple(-1 if i == channel else dimensions.index(i) for i in range(len(shape)))
    eye = np.eye(shape[channel]).reshape(*[1] * len(dimensions), *[shape[channel]] * 2)
    sizes = tuple(shape[i] for i in dimensions)
    return TapSum(axes, tuple(np.arange(n)[:, None] for n in sizes), sizes, eye, eye, 0)


def _next(node: Operation, known) -> TapSum:
    op, p = node.op, node.params
    moving = [a for a in node.inputs if a in known]
    if any(known[a] is None for a in moving):
        if op == "dot_general" and len(moving) == 1 and moving[0].op == "reshape":
            return _flattened(node, moving[0], known)
        raise _NoTapsError
    forms = [known[a] for a in moving]
    form = forms[0]
    if op in ("add", "add_any", "sub"):
        signs = [1.0, -1.0 if op == "sub" else 1.0]
        total, *others = (
            _scaled(known[a], s) for a, s in zip(node.args, signs, strict=True) if a in known
        )
        return _sum(total, others[0]) if others else total
    if op == "concatenate":
        return _concatenated(node, known)
    if len(forms) > 1:
        raise _NoTapsError
    (a,) = moving
    if op == "neg":
        return _scaled(form, -1.0)
    if op in ("mul", "div"):
        return _multiplied(node, form)
    if op == "slice":
        strides = p["strides"] or (1,) * len(a.shape)
        for axis, (start, stop, step) in enumerate(
            zip(p["start_indices"], p["limit_indices"], strides, strict=True)
        ):
            if (start, stop, step) != (0, a.shape[axis], 1):
                form = _rows(form, axis, np.arange(start, stop, step))
        return form
    if op == "rev":
        for axis in p["dimensions"]:
            form = _rows(form, axis, np.arange(a.shape[axis])[::-1])
        return form
    if op == "pad" and a is node.args[0]:
        for axis, (low, high, inner) in enumerate(p["padding_config"]):
            if (low, high, inner) != (0, 0, 0):
                at = np.arange(-low, (a.shape[axis] - 1) * (inner + 1) + 1 + high)
                inside = (at >= 0) & (at % (inner + 1) == 0) & (at // (inner + 1) < a.shape[axis])
                form = _rows(form, axis, np.where(inside, at // (inner + 1), -1))
        return form
    if op == "squeeze":
        gone = {int(i) % len(a.shape) for i in p["dimensions"]}
        return form._replace(axes=tuple(d for i, d in enumerate(form.axes) if i not in gone))
    if op in ("reshape", "expand_dims", "broadcast_in_dim", "transpose"):
        return form._replace(axes=_axes(node, a, form))
    if op == "reduce_sum":
        for axis in p["axes"]:
            form = _seen(form, axis, np.arange(a.shape[axis])[None])
        axes = tuple(d for i, d in enumerate(form.axes) if i not in p["axes"])
        return form._replace(axes=axes, terms=form.terms + _sum_terms(node))
    if op == "reduce_window_sum":
        for axis, (k, s, d, base, (low, _)) in enumerate(
            zip(p["window_dimensions"], p["window_strides"], p["window_dilation"],
                p["base_dilation"], p["padding"], strict=True)
        ):  # fmt: skip
            if (k, s, low) != (1, 1, 0) or node.shape[axis] != a.shape[axis]:
                form = _seen(
                    form, axis, _table(node.shape[axis], a.shape[axis], k, s, low, d, base)
                )
        return form._replace(terms=form.terms + _sum_terms(node))
    if op == "conv_general_dilated" and a is node.args[0]:
        return _convolved(node, a, form)
    if op == "dot_general":
        return _mixed(node, form)
    raise _NoTapsError


def _sum_terms(node: Operation) -> int:
    return (
        4 + node.inputs[0].size // max(1, node.size)
        if node.op == "reduce_sum"
        else 4 + math.prod(node.params["window_dimensions"])
    )


def _table(n_out: int, n_in: int, k: int, stride: int, low: int, dilation: int, base: int):
    """(outputs, taps): the pixel under each tap, -1 beyond borders and between pixels."""
    at = np.arange(n_out)[:, None] * stride + np.arange(k) * dilation - low
    inside = (at >= 0) & (at % base == 0) & (at // base < n_in)
    return np.where(inside, at // base, -1)


def _dimension(form: TapSum, axis: int) -> tuple[TapSum, int]:
    """The dimension of an axis that is no channel; a new axis of size 1 becomes one."""
    d = form.axes[axis]
    if d == -1:
        raise _NoTapsError
    if d is not None:
        return form, d
    n = len(form.sizes)
    axes = (*form.axes[:axis], n, *form.axes[axis + 1 :])
    kernel, absolute = (w[..., None, :, :] for w in (form.kernel, form.absolute))
    return TapSum(axes, (*form.tables, np.zeros((1, 1), int)), (*form.sizes, 1), kernel, absolute,
                  form.terms), n  # fmt: skip


def _rows(form: TapSum, axis: int, which: np.ndarray) -> TapSum:
    """Outputs chosen along an axis, -1 for zeros."""
    if form.axes[axis] == -1:
        if which.min(initial=0) < 0:
            raise _NoTapsError
        return form._replace(kernel=form.kernel[..., which], absolute=form.absolute[..., which])
    form, d = _dimension(form, axis)
    table = np.where(which[:, None] >= 0, form.tables[d][which], -1)
    return _merged(form, d, table)


def _merged(form: TapSum, d: int, table: np.ndarray) -> TapSum:
    """With another table of a dimension, in which taps can have become the same."""
    columns, place = np.unique(table, axis=1, return_inverse=True)
    if columns.shape[1] < table.shape[1]:
        table, place = columns, np.ravel(place)
        kernel, absolute = (
            _gathered(w, d, place, columns.shape[1]) for w in (form.kernel, form.absolute)
        )
        form = form._replace(kernel=kernel, absolute=absolute, terms=form.terms + len(place))
    return form._replace(tables=(*form.tables[:d], table, *form.tables[d + 1 :]))


def _seen(form: TapSum, axis: int, table: np.ndarray) -> TapSum:
    """Sums over the taps of a table along an axis, of every channel by itself."""
    form, d = _dimension(form, axis)
    kernels = [np.broadcast_to(w[None], (table.shape[1], *w.shape))
               for w in (form.kernel, form.absolute)]  # fmt: skip
    return _composed(form, [(d, table)], *kernels)


def _composed(form: TapSum, tables: Sequence[tuple[int, np.ndarray]], kernel, absolute) -> TapSum:
    """The map with more taps on top: kernels (*new taps, *taps, in, out)."""
    left, new = len(tables), list(form.tables)
    for d, table in tables:
        both = np.where(table[:, :, None] >= 0, form.tables[d][table], -1).reshape(len(table), -1)
        new[d], place = np.unique(both, axis=1, return_inverse=True)
        # The first of the new axes that are left goes to its dimension, whose taps it multiplies.
        left -= 1
        at = left + d
        kernel, absolute = (np.moveaxis(w, 0, at) for w in (kernel, absolute))
        kernel, absolute = (
            _gathered(w.reshape(*w.shape[:at], -1, *w.shape[at + 2 :]), at, np.ravel(place),
                      new[d].shape[1])
            for w in (kernel, absolute)
        )  # fmt: skip
    return _without_dead(form._replace(tables=tuple(new), kernel=kernel, absolute=absolute))


def _gathered(w: np.ndarray, axis: int, place: np.ndarray, n: int) -> np.ndarray:
    """Entries along an axis added up by their places."""
    if w.size > _MOST_ENTRIES:
        raise _NoTapsError
    out = np.zeros((n, *np.delete(w.shape, axis)))
    np.add.at(out, place, np.moveaxis(w, axis, 0))
    return np.moveaxis(out, 0, axis)


def _without_dead(form: TapSum) -> TapSum:
    """Without taps that see no pixel at all."""
    kernel, absolute, tables = form.kernel, form.absolute, list(form.tables)
    for d, table in enumerate(tables):
        alive = np.flatnonzero((table >= 0).any(0))
        if len(alive) < table.shape[1]:
            if not len(alive):
                raise _NoTapsError
            tables[d] = table[:, alive]
            kernel, absolute = (np.take(w, alive, d) for w in (kernel, absolute))
    return form._replace(tables=tuple(tables), kernel=kernel, absolute=absolute)


def _scaled(form: TapSum, factor) -> TapSum:
    """Every channel multiplied."""
    if np.ndim(factor) == 0 and factor == 1:
        return form
    exact = np.ndim(factor) == 0 and abs(factor) == 1
    return form._replace(
        kernel=form.kernel * factor,
        absolute=form.absolute * np.abs(factor),
        terms=form.terms + (0 if exact else 2),
    )


def _multiplied(node: Operation, form: TapSum) -> TapSum:
    constant = next(c for c in node.args if isinstance(c, Constant))
    if node.op == "div" and constant is node.args[0]:
        raise _NoTapsError
    c = np.asarray(constant.array)
    if node.op == "div":
        with np.errstate(divide="ignore"):
            c = 1 / c
    if not (c.size and np.isfinite(c).all()):
        raise _NoTapsError
    c = np.broadcast_to(c, node.shape)
    if np.all(c == c.flat[0]):
        return _scaled(form, c.flat[0])
    if -1 not in form.axes:
        raise _NoTapsError
    axis = form.axes.index(-1)
    first = np.moveaxis(c, axis, -1).reshape(-1, c.shape[axis])
    if np.any(first != first[0]):
        raise _NoTapsError
    return _scaled(form, first[0])


def _sum(a: TapSum, b: TapSum) -> TapSum:
    # A new axis of size 1 and a dimension are told apart by how they came about, not by what is.
    a, b = _settled(a, b), _settled(b, a)
    if a.axes != b.axes or a.sizes != b.sizes:
        raise _NoTapsError
    tables, places = [], []
    for mine, theirs in zip(a.tables, b.tables, strict=True):
        columns, place = np.unique(np.concatenate([mine, theirs], 1), axis=1, return_inverse=True)
        tables.append(columns)
        places.append(np.split(np.ravel(place), [mine.shape[1]]))
    if math.prod(t.shape[1] for t in tables) * math.prod(a.kernel.shape[-2:]) > _MOST_ENTRIES:
        raise _NoTapsError
    placed = [
        [_placed(w, [(p[i], t.shape[1]) for p, t in zip(places, tables, strict=True)])
         for w in (form.kernel, form.absolute)]
        for i, form in enumerate((a, b))
    ]  # fmt: skip
    return a._replace(
        tables=tuple(tables),
        kernel=placed[0][0] + placed[1][0],
        absolute=placed[0][1] + placed[1][1],
        terms=max(a.terms, b.terms) + 2,
    )


def _settled(a: TapSum, b: TapSum) -> TapSum:
    for axis, (mine, theirs) in enumerate(zip(a.axes, b.axes, strict=True)):
        if mine is None and theirs is not None and theirs >= 0:
            a, _ = _dimension(a, axis)
    return a


def _placed(w: np.ndarray, places: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """A kernel with its taps at other places of a larger one."""
    out = np.zeros((*(n for _, n in places), *w.shape[-2:]))
    out[np.ix_(*(place for place, _ in places))] = w
    return out


def _concatenated(node: Operation, known) -> TapSum:
    axis, forms = node.params["dimension"], [known.get(a) for a in node.args]
    sizes = [a.shape[axis] for a in node.args]
    first = next(form for form in forms if form is not None)
    if first.axes[axis] != -1:
        # Pieces of one map, or zeros, side by side.
        first, d = _dimension(first, axis)
        tables = []
        for form, n in zip(forms, sizes, strict=True):
            if form is None:
                tables.append(np.full((n, first.tables[d].shape[1]), -1))
                continue
            form, own = _dimension(form, axis)
            alike = form.axes == first.axes and np.array_equal(form.kernel, first.kernel)
            alike = (
                alike
                and own == d
                and all(
                    i == d or np.array_equal(*tables_of)
                    for i, tables_of in enumerate(zip(form.tables, first.tables, strict=True))
                )
            )
            if not alike:
                raise _NoTapsError
            tables.append(form.tables[d])
        tables = (*first.tables[:d], np.concatenate(tables), *first.tables[d + 1 :])
        most = np.max([form.absolute for form in forms if form is not None], 0)
        terms = max(form.terms for form in forms if form is not None)
        return first._replace(tables=tables, absolute=most, terms=terms)
    total, at = None, 0
    for form, n in zip(forms, sizes, strict=True):
        if form is not None:
            width = [(0, 0)] * (form.kernel.ndim - 1) + [(at, sum(sizes) - at - n)]
            form = _widened(form, width)
            total = form if total is None else _sum(total, form)
        at += n
    assert total is not None
    return total


def _axes(node: Operation, a: Operation, form: TapSum) -> tuple[int | None, ...]:
    """Where axes go, if all that comes and goes are axes of size 1 along which nothing lies."""
    if node.op == "transpose":
        return tuple(form.axes[i] for i in node.params["permutation"])
    if node.size != a.size:
        raise _NoTapsError
    if node.op == "broadcast_in_dim":
        places = node.params["broadcast_dimensions"]
        return tuple(
            form.axes[places.index(i)] if i in places else None for i in range(len(node.shape))
        )
    wide = [n for n in a.shape if n > 1]
    if wide != [n for n in node.shape if n > 1]:
        raise _NoTapsError
    # Axes of size 1 are the same to all; a channel of size 1 is not.
    if -1 in form.axes and a.shape[form.axes.index(-1)] == 1:
        raise _NoTapsError
    given = iter(d for d, n in zip(form.axes, a.shape, strict=True) if n > 1)
    return tuple(next(given) if n > 1 else None for n in node.shape)


def _convolved(node: Operation, a: Operation, form: TapSum) -> TapSum:
    p, constant = node.params, node.args[1]
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if not isinstance(constant, Constant) or p["batch_group_count"] != 1:
        raise _NoTapsError
    batch, channel, *spatial = numbers.lhs_spec
    out, in_, *taps = numbers.rhs_spec
    if form.axes[channel] != -1:
        raise _NoTapsError
    w = constant.array.transpose(*taps, in_, out)
    if groups > 1:
        w = _ungrouped(w, groups)
    tables = []
    for axis, k, s, (low, _), base, dilation, o in zip(
        spatial, w.shape, p["window_strides"], p["padding"], p["lhs_dilation"],
        p["rhs_dilation"], numbers.out_spec[2:], strict=False,
    ):  # fmt: skip
        form, d = _dimension(form, axis)
        tables.append((d, _table(node.shape[o], a.shape[axis], k, s, low, dilation, base)))
    new_axes: list[int | None] = [None] * len(node.shape)
    new_axes[numbers.out_spec[0]], new_axes[numbers.out_spec[1]] = form.axes[batch], -1
    for axis, o in zip(spatial, numbers.out_spec[2:], strict=True):
        new_axes[o] = form.axes[axis]
    form = form._replace(axes=tuple(new_axes), terms=form.terms + rounding_terms(node))
    return _composed(form, tables, *_products(w, form))


def _products(w: np.ndarray, form: TapSum) -> Iterator[np.ndarray]:
    """(*new taps, *taps, in, out) of a kernel (*new taps, middle, out) after a map; of absolute
    values next."""
    if form.kernel.size // max(1, w.shape[-2]) * w.size > _MOST_ENTRIES * w.shape[-2]:
        raise _NoTapsError
    n = w.ndim - 2
    for first, second in ((form.kernel, w), (form.absolute, np.abs(w))):
        # (*taps, in, *new taps, out)
        both = np.tensordot(first, second, (-1, -2))
        m = first.ndim - 1
        yield both.transpose(*range(m, m + n), *range(m), m + n)


def _ungrouped(w: np.ndarray, groups: int) -> np.ndarray:
    *taps, c_in, c_out = w.shape
    full = np.zeros((*taps, groups, c_in, groups, c_out // groups))
    for g in range(groups):
        full[..., g, :, g, :] = w[..., g * c_out // groups : (g + 1) * c_out // groups]
    return full.reshape(*taps, groups * c_in, c_out)


def _mixed(node: Operation, form: TapSum) -> TapSum:
    """A product of the channels of each pixel with one matrix."""
    place = next(i for i, a in enumerate(node.args) if isinstance(a, Constant))
    contract, batch = node.params["dimension_numbers"]
    c = node.args[place].array  # type: ignore
    if batch[0] or len(contract[0]) != 1 or c.ndim != 2:
        raise _NoTapsError
    (mine,), (theirs,) = contract[1 - place], contract[place]
    if form.axes[mine] != -1:
        raise _NoTapsError
    free = tuple(d for i, d in enumerate(form.axes) if i != mine)
    w = c if theirs == 0 else c.T
    axes = (*free, -1) if place == 1 else (-1, *free)
    kernel, absolute = _products(w, form)
    return form._replace(
        axes=axes, kernel=kernel, absolute=absolute, terms=form.terms + 4 + c.shape[theirs]
    )


def _flattened(node: Operation, flat: Operation, known) -> TapSum:
    """A product of all numbers of an image with one matrix, whose rows are its taps."""
    (a,) = flat.inputs
    form, place = known.get(a), next(i for i, b in enumerate(node.args) if isinstance(b, Constant))
    contract, batch = node.params["dimension_numbers"]
    c, n = node.args[place].array, len(flat.shape) - 1  # type: ignore
    same = flat.shape[:-1] == a.shape[:n] and contract[1 - place] == (n,)
    if form is None or not same or batch[0] or c.ndim != 2 or -1 not in form.axes[n:]:
        raise _NoTapsError
    w = (c if contract[place] == (0,) else c.T).reshape(*a.shape[n:], -1)
    channel = form.axes.index(-1) - n
    w = np.moveaxis(w, channel, -2)
    tables = []
    for axis in range(n, len(a.shape)):
        if axis != channel + n:
            form, d = _dimension(form, axis)
            tables.append((d, np.arange(a.shape[axis])[None]))
    axes = (*form.axes[:n], -1) if place == 1 else (-1, *form.axes[:n])
    form = form._replace(axes=axes, terms=form.terms + 4 + c.size)
    return _composed(form, tables, *_products(w, form))


# Tables as views have them.


class _Fit(NamedTuple):
    """How a view sees a dimension: n pixels, the stride, the padding, how many taps, and the place
    of every tap of the table among them."""

    n: int
    stride: int
    padding: str | tuple[int, int]
    n_taps: int
    place: np.ndarray


def _with_zeros(table: np.ndarray, n: int) -> _Fit | None:
    stride = _stride(table)
    if stride is None:
        return None
    o = np.arange(len(table))[:, None]
    first = np.argmax(table >= 0, 0)
    offset = table[first, np.arange(table.shape[1])] - stride * first
    at = stride * o + offset
    if len(np.unique(offset)) < len(offset):
        return None
    if not np.array_equal(np.where((at >= 0) & (at < n), at, -1), table):
        return None
    n_taps = int(np.ptp(offset)) + 1
    low = -int(offset.min())
    high = stride * (len(table) - 1) + n_taps - low - n
    # Pixels that nothing sees are left out.
    return _Fit(n + min(low, 0) + min(high, 0), stride, (max(low, 0), max(high, 0)), n_taps,
                offset - offset.min())  # fmt: skip


def _circular(table: np.ndarray, n: int) -> _Fit | None:
    stride = n // len(table)
    if stride * len(table) != n or table.min() < 0:
        return None
    offset = table[0]
    if len(np.unique(offset)) < len(offset):
        return None
    if not np.array_equal((stride * np.arange(len(table))[:, None] + offset) % n, table):
        return None
    # Counted from behind the widest gap; where a circle begins does not matter.
    ends = np.sort(offset)
    start = np.roll(ends, -1)[np.argmax(np.diff(ends, append=ends[0] + n))]
    place = (offset - start) % n
    return _Fit(n, stride, "CIRCULAR", int(place.max()) + 1, place)


def _mirrored(table: np.ndarray, n: int) -> _Fit | None:
    stride = _stride(table)
    if stride is None or table.min() < 0 or n < 2:
        return None
    # The view reaches equally far to both sides: every tap has to be one of those.
    for n_taps in range(table.shape[1], 2 * n):
        low = (n_taps - 1) // 2
        at = stride * np.arange(len(table))[:, None] + np.arange(n_taps) - low
        if (n - 1) // stride + 1 != len(table) or low >= n or n_taps - 1 - low >= n:
            return None
        at = np.abs(at)
        at = np.where(at < n, at, 2 * (n - 1) - at)
        same = (table[:, :, None] == at[:, None]).all(0)
        if same.any(1).all():
            return _Fit(n, stride, "REFLECT", n_taps, np.argmax(same, 1))
    return None


def _stride(table: np.ndarray) -> int | None:
    """How far taps move from one output to the next."""
    if len(table) < 2:
        return 1
    steps = np.diff(table, axis=0)[(table[1:] >= 0) & (table[:-1] >= 0)]
    steps = steps[steps > 0]
    if not len(steps):
        return None
    return int(np.bincount(steps).argmax())
