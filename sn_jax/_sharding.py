"""Kernels that are spread over a mesh: by XLA, by explicit types, or by hand in ``shard_map``.

Only vectors travel. Where XLA distributes (automatic axes) nothing is needed. On explicit axes
the iteration runs as on automatic ones, and u and v leave it with the types that the kernel's
axes give them. Inside ``shard_map`` a kernel is a block; its view's ``split`` says of what, each
device keeps whole vectors, and one sum over devices completes each product.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Names = tuple[str, ...]


# Arrays.


def varying(x: Any) -> tuple[str, ...]:
    """Mesh axes along which an array inside ``shard_map`` (with check_vma) may differ."""
    kind = jax.typeof(x)
    # JAX 0.9 calls it vma.
    names = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return tuple(sorted(names))


def pcast(x: Array, names: Iterable[str]) -> Array:
    """``x`` as an array that may differ along all mesh axes named."""
    return lax.pcast(x, tuple(name for name in names if name not in varying(x)), to="varying")


def anywhere(flag: Array) -> Array:
    """Inside ``shard_map``: whether it is so on any device; all must take as many steps."""
    names = varying(flag)
    return lax.psum(flag.astype(jnp.int32), names) > 0 if names else flag


def broadcast_like(factor: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """``factor``, whose axes are those of ``x`` named, with the shape and sharding of ``x``.

    Typed before it grows, so that it is summed over axes before it is summed over devices in the
    backward pass; and explicitly, as the transpose of a product would gather it otherwise.
    """
    out = jax.typeof(x).sharding if is_explicit(x) else None
    return lax.broadcast_in_dim(pcast(factor, varying(x)), x.shape, axes, out_sharding=out)


def is_whole(w: Array) -> bool:
    """Whether no axis of w can be split over devices here: flattening it would gather it.

    Its type tells the mesh if one was set or came with an argument; a ``jit`` without either may
    still be given shardings, unless there is one device.
    """
    mesh = jax.typeof(w).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if mesh.empty:
        return jax.device_count() == 1
    # Inside shard_map, w is this device's block.
    return all(name in mesh.manual_axes or size == 1 for name, size in mesh.shape.items())


# Views.


def vector_axes(view: Any, ndim: int) -> tuple[tuple, tuple, tuple] | None:
    """The view's own answer; None for a view that has none, whose vectors are replicated."""
    method = getattr(view, "vector_axes", None)
    return method(ndim) if method else None


# Explicit axes.


def types(view: Any, w: Array) -> tuple[NamedSharding, NamedSharding, NamedSharding]:
    """How (sigma, u, v) are sharded as the kernel's axes imply."""
    sharding, axes = jax.typeof(w).sharding, vector_axes(view, w.ndim)
    spec = (*sharding.spec, *[None] * (w.ndim - len(sharding.spec)))

    def typed(*kernel_axes):
        entries = (None if axis is None else spec[axis] for axis in kernel_axes)
        return NamedSharding(sharding.mesh, P(*entries))

    if axes is None:
        return typed(), typed(), typed()
    batch, ins, outs = axes
    return typed(*batch), typed(*batch, None, *outs), typed(*batch, None, *ins)


def is_explicit(x: Array) -> bool:
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def lift_types(run: Callable[..., tuple], w: Array, out: tuple[NamedSharding, ...]):
    """``run(w, ...)`` also on explicit axes, where a sum over a sharded one must say how its result
    is sharded: it runs as on automatic axes, and its results come out as ``out`` says. Its arrays
    are all arguments: one that it closed over would keep its explicit type."""
    if not is_explicit(w):
        return run
    return jax.sharding.auto_axes(lambda *args: tuple(run(*args)), out_sharding=out)


def take_types(values: tuple[Array, ...], w: Array, out: tuple[NamedSharding, ...]):
    """``values`` sharded as ``out`` says, if the axes of ``w`` are explicit."""
    return tuple(map(jax.sharding.reshard, values, out)) if is_explicit(w) else values


def like(new: Array, old: Array) -> Array:
    """``new`` with the dtype and the explicit sharding of ``old``, to take its place in a carry."""
    new = new.astype(old.dtype)
    return jax.sharding.reshard(new, jax.typeof(old).sharding) if is_explicit(old) else new


# Inside shard_map.


def split_names(view: Any, ndim: int) -> tuple[Names, ...]:
    """For each kernel axis the mesh axes it is split over here: none outside of ``shard_map``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    split = (getattr(view, "split", None) or ()) if manual else ()
    entries = (*split, *[()] * (ndim - len(split)))
    return tuple(tuple(name for name in entry if name in manual) for entry in entries)


def check_split(view: Any, w: Any) -> None:
    """Raise where a block of a kernel would be taken for the whole.

    Raises:
      ValueError: inside ``shard_map``, the kernel varies over mesh axes that the view's split does
        not name, or the other way round; or an axis is split that cannot be.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return
    names = split_names(view, w.ndim)
    flat = [name for entry in names for name in entry]
    unnamed = [name for name in varying(w) if name not in flat]
    if unnamed:
        raise ValueError(
            f"inside shard_map it differs along the mesh axes {unnamed}, so that this is one block "
            f"of it, but {view} does not name them. Give the kernel's in_spec to the view: "
            "sn_jax.Matrix(in_axes, out_axes, split=P(...)); a kernel for each device needs an "
            "axis of its own (of size 1 here)."
        )
    constant = [name for name in flat if name not in varying(w)]
    if constant:
        raise ValueError(
            f"the split of {view} names the mesh axes {constant}, along which this kernel does not "
            "differ: either it is whole, and the split must not name them, or this is "
            "shard_map(check_vma=False), under which adjoints would be wrong: leave check_vma on."
        )
    axes = vector_axes(view, w.ndim)
    for axis, entry in enumerate(names):
        if entry and (axes is None or not any(axis in group for group in axes)):
            raise ValueError(
                f"{view} cannot be split along axis {axis} of the kernel (mesh axes {entry}): its "
                "taps and groups belong together. Split channels of ungrouped convolutions, or "
                "batch axes."
            )


def whole_shape(view: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the kernel whose vectors are kept here: a block's, with split inputs and outputs
    whole; batch axes stay as they are."""
    names = split_names(view, len(shape))
    if not any(names):
        return shape
    batch, _, _ = vector_axes(view, len(shape))
    kept = [() if axis in batch else entry for axis, entry in enumerate(names)]
    return whole(shape, kept)


def matvec(view: Any, w: Array, x: Array) -> Array:
    """``A_w x`` of whole vectors, also where ``w`` is a block: the blocks' products, summed."""
    names = split_names(view, w.ndim)
    if not any(names):
        return view.matvec(w, x)
    batch, ins, outs = vector_axes(view, w.ndim)
    blocks = [[() if axis is None else names[axis] for axis in group] for group in (ins, outs)]
    reduced = tuple(name for group in blocks for entry in group for name in entry)
    y = view.matvec(w, own_blocks(x, [()] * len(batch) + blocks[0]))
    for axis, entry in enumerate(blocks[1], len(batch)):
        if entry:
            n = y.shape[axis]
            shape = (*y.shape[:axis], n * lax.axis_size(entry), *y.shape[axis + 1 :])
            place = lax.axis_index(entry) * n
            y = lax.dynamic_update_slice_in_dim(jnp.zeros(shape, y.dtype), y, place, axis)
    return lax.psum(y, reduced) if reduced else y


def own_blocks(x: Array, names: Sequence[Names]) -> Array:
    """This device's part of each of the first axes, split over the mesh axes named."""
    for axis, entry in enumerate(names):
        if entry:
            n = x.shape[axis] // lax.axis_size(entry)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(entry) * n, n, axis)
    return x


def batch_names(view: Any, ndim: int) -> tuple[Names, ...]:
    """For each batch axis the mesh axes it is split over."""
    names = split_names(view, ndim)
    return tuple(names[axis] for axis in vector_axes(view, ndim)[0]) if any(names) else ()


def whole(shape: tuple[int, ...], names: Sequence[Names]) -> tuple[int, ...]:
    """Shape of the batch of which ``shape`` is a block."""
    if not names:
        return shape
    return tuple(n * lax.axis_size(entry) for n, entry in zip(shape, names, strict=True))
