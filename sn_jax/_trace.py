"""How each parameter of a model acts, read off one abstract evaluation; shared by both Flaxes.

A layer adapter binds ``tag`` to the kernel that enters a layer's product, with the view that the
layer gives it. The tag is an identity whose batching rule notes the axes that ``vmap`` adds,
which nothing later in the program could tell from output axes. A walk over the jaxpr then
follows every parameter through calls, loops and arithmetic to the products that it enters, and
keeps account of what becomes of it on the way: nothing, a product with constants, or more.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from sn_jax._views import Conv, Matrix, Scaled, View

_tag_p = Primitive("sn_jax_tag")
_tag_p.def_impl(lambda w, **_: w)
_tag_p.def_abstract_eval(lambda w, **_: w)
mlir.register_lowering(_tag_p, lambda _, w, **__: [w])
ad.primitive_jvps[_tag_p] = lambda primals, tangents, **params: (
    _tag_p.bind(*primals, **params),
    *tangents,
)


def _batch_tag(args, axes, *, view, axis_of, name):
    (w,), (axis,) = args, axes
    shifted = tuple(a + (a >= axis) for a in axis_of)
    return _tag_p.bind(w, view=view, axis_of=shifted, name=name), axis


batching.primitive_batchers[_tag_p] = _batch_tag


def tag(w: jax.Array, view: View | None, name: str) -> jax.Array:
    """``w``, marked as the kernel of the layer parameter ``name``, acting the way ``view`` says
    (None: as no single linear map)."""
    return _tag_p.bind(w, view=view, axis_of=tuple(range(w.ndim)), name=name)


def seen_as(w: jax.Array) -> jax.Array:
    """``w``, noted with the axes that a layer knows of: all others were added by ``vmap``."""
    return _tag_p.bind(w, view=None, axis_of=tuple(range(w.ndim)), name=None)


# True while a model runs only to see how it uses its parameters.
looking: ContextVar[bool] = ContextVar("looking", default=False)


class Change(NamedTuple):
    """A kernel that enters a product as something else than it is stored as.

    Attributes:
      name: path of the layer's parameter; None where the product is in no stock layer.
      paths: of the parameters that it is computed from.
      operations: names of the primitives on the way, in order.
      view: of the kernel that enters the product, on its own axes; None where there is none.
      lifted: whether that is inside a transformation: scan, vmap, jit, remat, a loop.
    """

    name: str | None
    paths: frozenset[str]
    operations: tuple[str, ...]
    view: View | None
    lifted: bool


class Uses(NamedTuple):
    """How a call uses its parameters.

    Attributes:
      views: path -> the views under which that parameter enters products; None among them for
        a part of it, or for no single linear map.
      changes: kernels that are not what is stored.
      read: paths of the parameters that the call reads at all.
    """

    views: dict[str, set[View | None]]
    changes: frozenset[Change]
    read: frozenset[str]


def uses_of(
    fn: Callable[..., Any], leaves: Mapping[str, Any], weights: Collection[str], *args: Any
) -> Uses:
    """How ``fn(leaves, *args)``, which binds tags, uses each leaf. Nothing is computed but
    constants that a leaf is multiplied by.

    Args:
      fn: function of a dict of arrays by path and of arrays, whose outputs say what is used.
        Concrete arrays that it closes over are constants.
      leaves: path -> array or ShapeDtypeStruct.
      weights: paths of leaves that count as kernels in products outside of tagged layers, too.
      *args: pytrees of arrays or ShapeDtypeStructs.
    """
    token = looking.set(True)
    try:
        closed = jax.make_jaxpr(fn)(dict(leaves), *args)
    finally:
        looking.reset(token)
    shapes = {path: tuple(leaves[path].shape) for path in sorted(leaves)}  # as a dict flattens
    sources: list[_Value] = [_Leaf(p, len(s), tuple(range(len(s)))) for p, s in shapes.items()]
    sources += [None] * (len(closed.jaxpr.invars) - len(sources))
    walk = _Walk(shapes, frozenset(weights))
    walk.program(closed, sources, lifted=False)
    views: dict[str, set[View | None]] = {}
    for (_, path), what in walk.found.items():
        if not isinstance(what, Change):
            views.setdefault(path, set()).add(what)
    changes = frozenset(what for what in walk.found.values() if isinstance(what, Change))
    return Uses(views, changes, frozenset(walk.read))


def split_arrays(*tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays (or ShapeDtypeStructs) in a call's arguments, and a function that puts others
    in their place: flags and strings are not traced."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays):
        arrays = iter(arrays)
        merged = [
            next(arrays) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        ]
        return treedef.unflatten(merged)

    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], rebuild


# What the walk knows of a value: a _Constant; a _Leaf; something _Computed from leaves; or None
# for what depends on the call's arguments: activations.


class _Constant:
    """A value that neither parameters nor arguments enter, computed when it is asked for.

    It may differ between the steps of scans around it: ``scans`` are their numbers, outermost
    first, and the value has a leading axis for each.
    """

    def __init__(self, compute: Callable[..., Any], *inputs: "_Constant", scans=()):
        self._compute, self._inputs, self.scans = compute, inputs, scans

    @cached_property
    def value(self) -> Any:
        with jax.ensure_compile_time_eval():
            return self._compute(*(x.value for x in self._inputs))


@dataclass(frozen=True)
class _Leaf:
    """A parameter, or a slice of one, perhaps times constants.

    Attributes:
      ndim: of the whole parameter.
      axes: for each axis the parameter's own axis; None for one that it does not have.
      scanned: (scan, the parameter's axis that it slices over).
      factor: what it has been multiplied by, on the parameter's own axes; None for 1.
      tag: key of the tag that it has passed.
    """

    path: str
    ndim: int
    axes: tuple[int | None, ...]
    scanned: tuple[tuple[int, int], ...] = ()
    factor: _Constant | None = None
    tag: tuple[int, str] | None = None


@dataclass(frozen=True)
class _Computed:
    """What is computed from parameters; ``varies`` if from arguments too."""

    paths: frozenset[str]
    operations: tuple[str, ...]
    varies: bool = False
    tag: tuple[int, str] | None = None


_Value = _Constant | _Leaf | _Computed | None


class _Tag(NamedTuple):
    params: dict[str, Any]
    lifted: bool
    view: View | None  # on the parameter's own axes, before factors


# Operations that keep the axes of their input. A slice may be shorter than its axis, which is
# checked where the view is noted.
_KEEPS_AXES = {
    "convert_element_type", "copy", "copy_p", "stop_gradient", "optimization_barrier",
    "sharding_constraint", "reduce_precision", "pvary", "slice", "dynamic_slice", "name",
    "reshard", "mesh_cast", "device_put",
}  # fmt: skip
# How a layer may rearrange its kernel for its product, after the tag.
_REARRANGES = _KEEPS_AXES | {
    "reshape", "broadcast_in_dim", "transpose", "squeeze", "rev", "concatenate", "pad", "split",
}  # fmt: skip
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}


class _Walk:
    """Follows values through a program.

    Attributes:
      found: (equation, path) -> view or Change. A loop's body is walked more than once; what an
        equation was found to be last holds.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], weights: frozenset[str]):
        self.shapes, self.weights = shapes, weights
        self.found: dict[tuple[int, str], View | Change | None] = {}
        self.tags: dict[tuple[int, str], _Tag] = {}
        # For each parameter the axes that the layers reading it have declared.
        self.own_axes: dict[str, frozenset[int | None]] = {}
        self.read: set[str] = set()
        self.scans = itertools.count()

    def program(self, closed: ClosedJaxpr, inputs: Sequence[_Value], lifted: bool) -> list[_Value]:
        """What is known of the outputs; ``lifted`` if the program is inside another equation."""
        jaxpr = closed.jaxpr
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            # A traced value is an argument of a program around this one, and no constant.
            traced = isinstance(value, Tracer)
            env[var] = None if traced else _Constant(lambda value=value: value)

        def known(var) -> _Value:
            return _Constant(lambda: var.val) if isinstance(var, Literal) else env.get(var)

        for eqn in _live(jaxpr):
            outputs = self.equation(eqn, [known(var) for var in eqn.invars], lifted)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [known(var) for var in jaxpr.outvars]

    def equation(self, eqn, inputs: list[_Value], lifted: bool) -> list[_Value]:
        name, n_out = eqn.primitive.name, len(eqn.outvars)
        if name == "scan":
            return self.scan(eqn, inputs)
        if name == "while":
            return self.while_loop(eqn, inputs)
        if name == "cond":
            branches = [self.program(b, inputs[1:], True) for b in eqn.params["branches"]]
            return [_join(values, name) for values in zip(*branches, strict=True)]
        inner = inner_program(eqn)
        if inner is not None:
            return self.program(inner, inputs, True)
        if name != _tag_p.name or eqn.params["name"]:
            self.read.update(x.path for x in inputs if isinstance(x, _Leaf))
        if name == _tag_p.name:
            return [self.tag(eqn, inputs[0], lifted)]
        constants = [x for x in inputs if isinstance(x, _Constant)]
        if len(constants) == len(inputs):
            return [None] * n_out if eqn.effects else _folded(eqn, constants)
        if not any(isinstance(x, _Leaf | _Computed) for x in inputs):
            return [None] * n_out
        if name in _PRODUCTS:
            return [self.product(eqn, inputs[:2], lifted)]
        if name in ("gather", "dynamic_slice") and self.is_lookup(eqn, inputs, lifted):
            return [None]
        if name == "broadcast_in_dim" and _tag_of(inputs[:1]) and _grows(eqn):
            return [None]  # a table of one row, read
        out = _kept(eqn, inputs) if n_out == 1 else None
        if out is None:
            out = _computed(inputs, None if name in _REARRANGES and _tag_of(inputs) else name)
        if out.tag and out not in inputs:
            # What a layer's own dot_general does to its kernel comes after the tag.
            self.note(out, out.tag)
        return [out] * n_out

    def scan(self, eqn, inputs):
        inner, (n_consts, n_carry) = eqn.params["jaxpr"], scan_counts(eqn)
        consts, carry = inputs[:n_consts], inputs[n_consts : n_consts + n_carry]
        number = next(self.scans)
        xs = [_sliced(x, number) for x in inputs[n_consts + n_carry :]]

        def body(carry):
            return self.program(inner, [*consts, *carry, *xs], True)

        carry, outputs = self.fixed_point(body, carry, "scan")
        stacked = [_computed([y], "scan") if isinstance(y, _Leaf | _Computed) else None
                   for y in outputs[n_carry:]]  # fmt: skip
        return carry + stacked

    def while_loop(self, eqn, inputs):
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]

        def body(carry):
            self.program(eqn.params["cond_jaxpr"], [*cond_consts, *carry], True)
            return self.program(eqn.params["body_jaxpr"], [*body_consts, *carry], True)

        return self.fixed_point(body, inputs[n_cond + n_body :], "while")[0]

    def fixed_point(self, body, carry, name):
        """What a loop's carry is at every step, and the outputs of its body then."""
        before = dict(self.found)
        while True:
            self.found = dict(before)
            outputs = body(carry)
            joined = [_join(pair, name) for pair in zip(carry, outputs, strict=False)]
            if joined == carry:
                return carry, outputs
            carry = joined

    def tag(self, eqn, x: _Value, lifted: bool) -> _Value:
        if not isinstance(x, _Leaf | _Computed):
            return x
        params = eqn.params
        if params["name"] is None:
            if isinstance(x, _Leaf):
                own = frozenset(x.axes[i] for i in params["axis_of"])
                self.own_axes[x.path] = own & self.own_axes.get(x.path, own)
            return x
        axis_of, sizes = params["axis_of"], eqn.invars[0].aval.shape
        lifted = lifted or axis_of != tuple(range(len(sizes)))
        if isinstance(x, _Leaf):
            key, shape = (id(eqn), x.path), self.shapes[x.path]
            whole = all(x.axes[i] is not None and sizes[i] == shape[x.axes[i]] for i in axis_of)
            leaf_axes = [x.axes[i] for i in axis_of]
            view = _on_axes(params["view"], leaf_axes, len(shape)) if whole else None
            self.tags[key] = _Tag(params, lifted, view)
        else:
            key = id(eqn), params["name"]
            self.tags[key] = _Tag(params, lifted, None)
        tagged = replace(x, tag=key)
        self.note(tagged, key)
        return tagged

    def note(self, x: _Leaf | _Computed, key: tuple[int, str]) -> None:
        """What a kernel is by now that has passed the tag ``key``."""
        params, lifted, view = self.tags[key]
        if isinstance(x, _Leaf):
            self.found[key] = _with_factor(view, x.factor)
        elif x.operations:
            change = Change(params["name"], x.paths, x.operations, params["view"], lifted)
            self.found[key] = change

    def product(self, eqn, operands: list[_Value], lifted: bool) -> _Value:
        """Notes a weight among the operands; the output is an activation, or still something
        computed from parameters alone."""
        if _tag_of(operands):
            return None
        varies = [x is None or (isinstance(x, _Computed) and x.varies) for x in operands]
        if not any(varies):
            return _computed(operands, eqn.primitive.name)
        for i, x in enumerate(operands):
            if isinstance(x, _Leaf) and eqn.primitive.name == "dot_general":
                contracted, batch = (dims[i] for dims in eqn.params["dimension_numbers"])
                free = {*range(len(x.axes))} - {*contracted, *batch}
                self.matrix(eqn, x, eqn.invars[i].aval.shape, contracted, free)
            elif isinstance(x, _Computed) and varies[1 - i]:
                self.unknown(eqn, x, lifted)
        return None

    def unknown(self, eqn, x: _Computed, lifted: bool) -> None:
        """Notes something computed from weights that enters a product outside of tagged layers."""
        weights = x.paths & self.weights
        if weights:
            change = Change(None, x.paths, x.operations, None, lifted)
            self.found[id(eqn), min(weights)] = change

    def is_lookup(self, eqn, inputs, lifted: bool) -> bool:
        """Whether this reads rows of a table at places that the arguments give; notes the table."""
        x, *places = inputs
        if not isinstance(x, _Leaf | _Computed):
            return False
        if x.tag:  # also at constant places: positions
            return eqn.primitive.name == "gather"
        if not any(place is None for place in places):
            return False
        if isinstance(x, _Computed):
            found = eqn.primitive.name == "gather" and not x.varies
            if found:
                self.unknown(eqn, x, lifted)
            return found
        batch = ()
        if eqn.primitive.name == "gather":
            batch = eqn.params["dimension_numbers"].operand_batching_dims
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        live = [axis for axis in range(len(shape)) if axis not in batch]
        rows = [axis for axis in live if sizes[axis] == 1 != shape[axis]] or live[:1]
        if len(live) != 2 or any(sizes[a] != shape[a] for a in live if a not in rows):
            return False
        self.matrix(eqn, x, shape, rows, [axis for axis in live if axis not in rows])
        return True

    def matrix(self, eqn, x: _Leaf, sizes, ins, outs) -> None:
        """Notes a weight that acts as a matrix from these axes to those, outside of tagged layers:
        without the axes that vmap has added, where its layer told them."""
        own, shape = self.own_axes.get(x.path), self.shapes[x.path]
        groups = [[x.axes[axis] for axis in group] for group in (ins, outs)]
        if own is not None:
            groups = [[axis for axis in group if axis in own] for group in groups]
        elif len(groups[0]) != 1 or len(groups[1]) != 1:
            return
        known = [sorted(axis for axis in group if axis is not None) for group in groups]
        unknown = any(axis is None for group in groups for axis in group)
        if x.path not in self.weights or unknown or not all(known):
            return
        if len(known[0]) == len(known[1]) == 1:  # a table that is read and multiplied by is one
            known.sort()
        whole = all(axis is None or sizes[i] == shape[axis] for i, axis in enumerate(x.axes))
        view = Matrix(known[0], known[1]) if whole else None
        self.found[id(eqn), x.path] = _with_factor(view, x.factor)


def _live(jaxpr: Jaxpr) -> list[Any]:
    """The equations that an output depends on, and notes of axes: what is computed and thrown
    away is no use (Flax does so where it initializes mapped variables)."""
    needed, live = {id(var) for var in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        note = eqn.primitive is _tag_p and eqn.params["name"] is None
        if note or eqn.effects or any(id(var) in needed for var in eqn.outvars):
            needed.update(map(id, eqn.invars))
            live.append(eqn)
    return live[::-1]


def _grows(eqn) -> bool:
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def scan_counts(eqn) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried.

    By ranks: what is scanned over comes in without its first axis, and leaves with one more. The
    parameters that count them have other names from JAX 0.11 on.
    """
    inner = eqn.params["jaxpr"].jaxpr
    n_xs = sum(a.aval.ndim > b.aval.ndim for a, b in zip(eqn.invars, inner.invars, strict=True))
    n_carry = sum(
        a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, inner.outvars, strict=True)
    )
    return len(eqn.invars) - n_carry - n_xs, n_carry


def inner_program(eqn) -> ClosedJaxpr | None:
    """The program of jit, remat or custom derivatives: one with the same inputs and outputs."""
    for inner in eqn.params.values():
        if isinstance(inner, Jaxpr) and not isinstance(inner, ClosedJaxpr):
            inner = ClosedJaxpr(inner, ())
        if isinstance(inner, ClosedJaxpr) and (
            len(inner.jaxpr.invars) == len(eqn.invars)
            and len(inner.jaxpr.outvars) == len(eqn.outvars)
            and len(inner.jaxpr.constvars) == len(inner.consts)
        ):
            return inner
    return None


def _on_axes(view: View | None, leaf_axes: list[int], ndim: int) -> View | None:
    """A view of an array whose axes are these of a parameter, as a view of the parameter."""
    n = len(leaf_axes)
    if isinstance(view, Matrix):
        ins, outs = ([leaf_axes[a % n] for a in g] for g in (view.in_axes, view.out_axes))
        return Matrix(sorted(ins), sorted(outs))
    if view is None or leaf_axes != sorted(leaf_axes):
        return None
    assert isinstance(view, Conv)  # adapters give no others
    batch = tuple(axis for axis in range(ndim) if axis not in leaf_axes)
    return view if not batch else replace(view, batch_axes=batch)


def _with_factor(view: View | None, factor: _Constant | None) -> View | None:
    if view is None or factor is None:
        return view
    value = np.asarray(factor.value)
    for axis in range(value.ndim):  # one number for a scalar, not an array of them
        first = value.take([0], axis) if value.shape[axis] else value
        value = first if np.array_equal(first + 0 * value, value) else value
    return view if np.all(value == 1) else Scaled(view, value)


def _tag_of(values: Sequence[_Value]) -> tuple[int, str] | None:
    return next((x.tag for x in values if isinstance(x, _Leaf | _Computed) and x.tag), None)


def _computed(inputs: Sequence[_Value], operation: str | None) -> _Computed:
    """The result of an operation on these; None for one that is not worth mentioning."""
    paths, operations, varies = set(), [], False
    for x in inputs:
        varies = varies or x is None or (isinstance(x, _Computed) and x.varies)
        if isinstance(x, _Leaf):
            paths.add(x.path)
            operations += ["mul"] if x.factor and not x.tag else []
        elif isinstance(x, _Computed):
            paths |= x.paths
            operations += x.operations
    unique = dict.fromkeys([*operations, operation] if operation else operations)
    return _Computed(frozenset(paths), tuple(unique), varies, _tag_of(inputs))


def _join(values: Sequence[_Value], operation: str) -> _Value:
    """What is known of a value that is one of these."""
    first, *others = values
    if all(first is other or first == other for other in others):
        return first
    if any(isinstance(x, _Leaf | _Computed) for x in values):
        return _computed(values, operation)
    return None


def _sliced(x: _Value, scan: int) -> _Value:
    """One step's slice of what a scan runs over."""
    if isinstance(x, _Leaf):
        gone = () if x.axes[0] is None else ((scan, x.axes[0]),)
        return replace(x, axes=x.axes[1:], scanned=x.scanned + gone)
    if isinstance(x, _Constant):
        return _Constant(lambda value: value, x, scans=(*x.scans, scan))
    return x


def evaluate(eqn, values: Sequence[Any]) -> Sequence[Any]:
    """The outputs of an equation, computed as the program would."""
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)  # JAX 0.9
    out = eqn.primitive.bind(*subfuns, *values, **params)
    return out if eqn.primitive.multiple_results else [out]


def _folded(eqn, inputs: list[_Constant]) -> list[_Value]:
    """The outputs of an equation of constants."""
    scans = tuple(sorted({scan for x in inputs for scan in x.scans}))  # numbered outside in

    def compute(*values):
        def run(*values):
            return evaluate(eqn, values)

        for scan in reversed(scans):
            run = jax.vmap(run, tuple(0 if scan in x.scans else None for x in inputs))
        return run(*values)

    outputs = _Constant(compute, *inputs)
    return [_Constant(lambda out, i=i: out[i], outputs, scans=scans)
            for i in range(len(eqn.outvars))]  # fmt: skip


def _kept(eqn, inputs: list[_Value]) -> _Leaf | None:
    """The output as a leaf, if its axes only moved or it was multiplied by constants."""
    name, params = eqn.primitive.name, eqn.params
    x = next((x for x in inputs if isinstance(x, _Leaf)), None)
    if x is None:
        return None
    if name in ("mul", "div", "neg", "select_n", "add", "sub"):
        return _multiplied(eqn, inputs, x)
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if x is not inputs[0]:
        return None
    if name in _KEEPS_AXES:
        return x if len(out) == len(x.axes) else None
    if name == "transpose":
        return replace(x, axes=tuple(x.axes[i] for i in params["permutation"]))
    if name == "squeeze":
        gone = params["dimensions"]
        return replace(x, axes=tuple(a for i, a in enumerate(x.axes) if i not in gone))
    if name == "broadcast_in_dim":
        place = [int(i) for i in params["broadcast_dimensions"]]
        if all(out[i] == size for i, size in zip(place, shape, strict=True)):
            axes = dict(zip(place, x.axes, strict=True))
            return replace(x, axes=tuple(axes.get(i) for i in range(len(out))))
    if name == "reshape" and shape == out:
        return x
    if name == "reshape" and [n for n in shape if n > 1] == [n for n in out if n > 1]:
        kept = iter([a for a, n in zip(x.axes, shape, strict=True) if n > 1])
        return replace(x, axes=tuple(next(kept) if n > 1 else None for n in out))
    return None


def _multiplied(eqn, inputs: list[_Value], x: _Leaf) -> _Leaf | None:
    """The output as ``x`` times a constant, if it is that: by products, quotients, selection
    (masks), or sums of several multiples of the one leaf."""
    if eqn.outvars[0].aval.ndim != len(x.axes) or any(
        isinstance(other, _Leaf) and replace(other, factor=x.factor) != x for other in inputs
    ):
        return None
    values = []
    for var, other in zip(eqn.invars, inputs, strict=True):
        if isinstance(other, _Leaf):
            values.append(other.factor or _ONE)
        elif isinstance(other, _Constant):
            values.append(_on_leaf_axes(other, var.aval.shape, x))
        else:
            values.append(None)
    if any(value is None for value in values):
        return None
    name, n_leaves = eqn.primitive.name, sum(isinstance(other, _Leaf) for other in inputs)
    if name == "mul" and n_leaves == 1:
        factor = _Constant(np.multiply, *values)
    elif name == "div" and inputs[0] is x and n_leaves == 1:
        factor = _Constant(np.divide, *values)
    elif name == "neg":
        factor = _Constant(np.negative, *values)
    elif name in ("add", "sub") and n_leaves == 2:
        factor = _Constant(np.add if name == "add" else np.subtract, *values)
    elif name == "select_n" and all(
        isinstance(case, _Leaf)
        or (isinstance(case, _Constant) and not np.any(np.asarray(case.value)))
        for case in inputs[1:]
    ):
        factor = _Constant(lambda which, *cases: np.choose(which.astype(int), cases), *values)
    else:
        return None
    return replace(x, factor=factor)


_ONE = _Constant(lambda: np.float32(1))


def _on_leaf_axes(constant: _Constant, shape: tuple[int, ...], x: _Leaf) -> _Constant | None:
    """A constant of the shape of ``x`` (or broadcast to it), on the parameter's own axes; None
    where it has others."""
    scanned = dict(x.scanned)
    if any(scan not in scanned for scan in constant.scans):
        return None
    own = x.axes if shape else ()
    if len(own) != len(shape) or any(
        axis is None and n > 1 for axis, n in zip(own, shape, strict=True)
    ):
        return None
    axes = [scanned[scan] for scan in constant.scans] + [axis for axis in own if axis is not None]

    def place(value):
        value = np.asarray(value)
        kept = value.shape[: len(constant.scans)] + tuple(
            n for n, axis in zip(shape, own, strict=True) if axis is not None
        )
        value = value.reshape(kept).transpose(np.argsort(axes))
        sizes = dict(zip(sorted(axes), value.shape, strict=True))
        return value.reshape([sizes.get(axis, 1) for axis in range(x.ndim)])

    return _Constant(place, constant)
