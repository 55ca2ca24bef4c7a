"""How each parameter of a model acts, read off one abstract evaluation; shared by both Flaxes.

A layer adapter binds ``tag`` to each kernel with the view that the layer gives it. The tag is an
identity whose batching rule notes the axes that ``vmap`` adds, which nothing later in the
program could tell from output axes. A walk over the jaxpr then follows every parameter through
calls, loops and transposes to its tags.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from sn_jax._views import Conv, Matrix, View

_tag_p = Primitive("sn_jax_tag")
_tag_p.def_impl(lambda w, **_: w)
_tag_p.def_abstract_eval(lambda w, **_: w)
mlir.register_lowering(_tag_p, lambda _, w, **__: [w])
ad.primitive_jvps[_tag_p] = lambda primals, tangents, **params: (
    _tag_p.bind(*primals, **params),
    *tangents,
)


def _batch_tag(args, axes, *, view, axis_of):
    (w,), (axis,) = args, axes
    shifted = tuple(a + (a >= axis) for a in axis_of)
    return _tag_p.bind(w, view=view, axis_of=shifted), axis


batching.primitive_batchers[_tag_p] = _batch_tag


def tag(w: jax.Array, view: View) -> jax.Array:
    """``w``, marked as acting the way ``view`` says."""
    return _tag_p.bind(w, view=view, axis_of=tuple(range(w.ndim)))


def views_of(
    fn: Callable[..., Any], leaves: Mapping[str, Any], *args: Any
) -> dict[str, set[View | None]]:
    """The views that ``fn(leaves, *args)`` tags each leaf with; None for one that is not the
    whole leaf. Nothing is computed.

    Args:
      fn: function of a dict of arrays by path and of arrays, which binds tags.
      leaves: path -> array or ShapeDtypeStruct.
      *args: pytrees of arrays or ShapeDtypeStructs.
    """
    closed = jax.make_jaxpr(fn)(dict(leaves), *args)
    found: dict[str, set[View | None]] = {}
    paths = sorted(leaves)  # the order in which a dict flattens
    sources = [(path, tuple(range(len(leaves[path].shape)))) for path in paths]
    sources += [None] * (len(closed.jaxpr.invars) - len(sources))
    _walk(closed.jaxpr, sources, {path: tuple(leaves[path].shape) for path in paths}, found)
    return found


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


# Views of the layers that both Flaxes have, from attributes that both name alike.


def conv_view(layer: Any, input_shape: tuple[int, ...] | None, conv: str, *, transpose: bool):
    """View of a Conv or ConvTranspose layer's kernel, on inputs of the given spatial size.

    ``conv="reshape"`` is the paper's: taps and input channels by output channels.
    """
    kernel_size = layer.kernel_size
    n = 1 if isinstance(kernel_size, int) else len(kernel_size)
    swapped = transpose and layer.transpose_kernel
    if conv == "reshape":
        return Matrix((*range(n), n + swapped), n + 1 - swapped)
    if conv != "operator":
        raise ValueError(f'conv must be "reshape" or "operator"; got {conv!r}.')
    options = {
        "input_shape": input_shape,
        "strides": layer.strides or 1,
        "padding": layer.padding,
        "kernel_dilation": layer.kernel_dilation or 1,
    }
    if transpose:
        return Conv(**options, transpose=True, transpose_kernel=layer.transpose_kernel)
    return Conv(
        **options,
        input_dilation=layer.input_dilation or 1,
        feature_group_count=layer.feature_group_count,
    )


def einsum_view(einsum_str: str | None) -> Matrix | None:
    """View of an Einsum layer's kernel, the second operand; None where it is no single matrix."""
    if not einsum_str:
        return None
    inputs, _, output = einsum_str.replace(" ", "").partition("->")
    x, _, kernel = inputs.partition(",")
    ins = tuple(i for i, axis in enumerate(kernel) if axis in x and axis not in output)
    outs = tuple(i for i, axis in enumerate(kernel) if axis not in x and axis in output)
    summed_alone = any(axis not in x and axis not in output for axis in kernel)
    return None if summed_alone or "." in kernel or not ins or not outs else Matrix(ins, outs)


# What becomes of an array: (path, original axis of each of its axes), or None if it is no
# parameter. Axes that are gone were scanned or indexed over: batch.
_Source = tuple[str, tuple[int, ...]] | None

# Axes stay what they are, though slices may be shorter: checked at the tag.
_KEEPS_AXES = {
    "convert_element_type", "copy", "copy_p", "stop_gradient", "optimization_barrier",
    "sharding_constraint", "reduce_precision", "pvary", "slice", "dynamic_slice", "mul", "name",
}  # fmt: skip


def _walk(jaxpr: Jaxpr, sources: list[_Source], shapes, found) -> list[_Source]:
    """Record the tags in ``jaxpr`` and return the sources of its outputs."""
    env = dict(zip(jaxpr.invars, sources, strict=True))

    def source(var) -> _Source:
        return None if isinstance(var, Literal) else env.get(var)

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [source(var) for var in eqn.invars]
        outputs: list[_Source] = [None] * len(eqn.outvars)
        first = inputs[0] if inputs else None
        if name == _tag_p.name:
            if first is not None:
                view = _on_leaf(eqn, first, shapes[first[0]])
                found.setdefault(first[0], set()).add(view)
            outputs = [first]
        elif name in _KEEPS_AXES and first is not None:
            if eqn.outvars[0].aval.ndim == len(first[1]):
                outputs = [first]
        elif name == "transpose" and first is not None:
            outputs = [(first[0], tuple(first[1][i] for i in eqn.params["permutation"]))]
        elif name == "squeeze" and first is not None:
            gone = eqn.params["dimensions"]
            outputs = [(first[0], tuple(a for i, a in enumerate(first[1]) if i not in gone))]
        elif name == "scan":
            # What is scanned over comes in without its first axis, the rest as it is; the
            # parameters that say how many there are of each were renamed in jax 0.11.
            body = eqn.params["jaxpr"].jaxpr
            ranks = [var.aval.ndim for var in body.invars]
            inside = [s and (s[0], s[1][len(s[1]) - rank :])
                      for s, rank in zip(inputs, ranks, strict=True)]  # fmt: skip
            _walk(body, inside, shapes, found)
        elif name == "while":
            n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carry = inputs[n_cond + n_body :]
            _walk(eqn.params["cond_jaxpr"].jaxpr, inputs[:n_cond] + carry, shapes, found)
            body = inputs[n_cond : n_cond + n_body]
            _walk(eqn.params["body_jaxpr"].jaxpr, body + carry, shapes, found)
        elif name == "cond":
            for branch in eqn.params["branches"]:
                _walk(branch.jaxpr, inputs[1:], shapes, found)
        else:  # jit, remat, custom derivatives: one inner program with the same inputs
            for inner in eqn.params.values():
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(inner, Jaxpr) and len(inner.invars) == len(inputs):
                    results = _walk(inner, inputs, shapes, found)
                    if len(results) == len(outputs):
                        outputs = results
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [source(var) for var in jaxpr.outvars]


def _on_leaf(eqn, source, shape) -> View | None:
    """The tag's view in terms of the axes of the whole leaf."""
    _, axes = source
    leaf_axis = [axes[i] for i in eqn.params["axis_of"]]
    sizes = eqn.invars[0].aval.shape
    if any(sizes[i] != shape[axes[i]] for i in eqn.params["axis_of"]):
        return None
    view, ndim = eqn.params["view"], len(leaf_axis)
    if isinstance(view, Matrix):
        groups = ([leaf_axis[a % ndim] for a in g] for g in (view.in_axes, view.out_axes))
        return Matrix(*(tuple(sorted(group)) for group in groups))
    assert isinstance(view, Conv)  # adapters give no others
    if leaf_axis != sorted(leaf_axis):
        return None
    batch = tuple(axis for axis in range(len(shape)) if axis not in leaf_axis)
    return view if not batch else replace(view, batch_axes=batch)
