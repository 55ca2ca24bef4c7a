"""Arrays that are spread over a mesh: by XLA, by explicit types, or by hand in ``shard_map``.

Here belongs what concerns arrays alone, whatever they mean. Where XLA distributes (automatic axes)
nothing is needed. On explicit axes the type of an array says how it is sharded. Inside
``shard_map`` an array is one device's block, and its type says along which mesh axes it differs
("varies"); ``names`` are, for each axis of an array, the mesh axes that it is split over.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Shape = tuple[int, ...]
Names = Sequence[tuple[str, ...]]


def is_whole(w: Array) -> bool:
    """Whether no axis of ``w`` can be split over devices here, so that flattening it is free.

    Its type tells the mesh if one was set or came with an argument; a ``jit`` without either may
    still be given shardings, unless there is one device.
    """
    mesh = jax.typeof(w).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if mesh.empty:
        return jax.device_count() == 1
    # Inside shard_map, w is this device's block.
    return all(name in mesh.manual_axes or size == 1 for name, size in mesh.shape.items())


def broadcast_like(factor: Array, x: Array, axes: Shape) -> Array:
    """``factor`` with the shape and the sharding of ``x``, of which its axes are those named.

    Marked as varying while it is still small: the transpose of that mark is a sum over devices,
    and so comes after the sum over axes in the backward pass. The sharding is said explicitly, as
    the transpose of the product with ``x`` would gather it otherwise.
    """
    out = jax.typeof(x).sharding if is_explicit(x) else None
    return lax.broadcast_in_dim(as_varying(factor, varying(x)), x.shape, axes, out_sharding=out)


def carried_as(new: Array, old: Array) -> Array:
    """``new`` with the dtype and the explicit sharding of ``old``, to take its place in a carry."""
    new = new.astype(old.dtype)
    return jax.sharding.reshard(new, jax.typeof(old).sharding) if is_explicit(old) else new


# Explicit axes.


def is_explicit(x: Array) -> bool:
    """Whether the type of ``x`` says how it is sharded."""
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def on_automatic_axes(run: Callable[..., tuple], out: tuple[NamedSharding, ...]) -> Callable:
    """``run`` for arguments on explicit axes, where a sum over a sharded axis would not be allowed
    without a word on its result.

    It runs as on automatic axes, and its results come out as ``out`` says. All its arrays must be
    arguments: one that it closed over would keep its explicit type.
    """
    return jax.sharding.auto_axes(lambda *args: tuple(run(*args)), out_sharding=out)


# Inside shard_map.


def varying(x: Any) -> tuple[str, ...]:
    """Mesh axes along which ``x`` may differ."""
    kind = jax.typeof(x)
    return tuple(sorted(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying))


def as_varying(x: Array, names: Iterable[str]) -> Array:
    """``x`` as an array that may differ along all mesh axes named."""
    return lax.pcast(x, tuple(name for name in names if name not in varying(x)), to="varying")


def struct_like(shape: Shape, x: Array) -> jax.ShapeDtypeStruct:
    """The type of an array of another shape that varies as ``x`` does, in its dtype."""
    if not varying(x):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    kind = jax.typeof(x)
    name = "vma" if hasattr(kind, "vma") else "manual_axis_type"  # the former in JAX 0.9
    sharding = NamedSharding(kind.sharding.mesh, P())
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding, **{name: getattr(kind, name)})


def anywhere(flag: Array) -> Array:
    """Whether ``flag`` holds on any device: so that all of them take as many steps of a loop."""
    names = varying(flag)
    return lax.psum(flag.astype(jnp.int32), names) > 0 if names else flag


def largest(x: Array) -> Array:
    """The largest ``x`` of all devices where it differs along mesh axes."""
    names = varying(x)
    return lax.pmax(x, names) if names else x


def names_here(split: Names | None, ndim: int) -> Names:
    """For each axis the mesh axes of ``split`` that are manual here; () outside ``shard_map``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not (split and manual):
        return ()
    entries = (*split, *[()] * (ndim - len(split)))
    names = tuple(tuple(name for name in entry if name in manual) for entry in entries)
    return names if any(names) else ()


def own_block(x: Array, names: Names) -> Array:
    """This device's part of ``x``, whose first axes are split over the mesh axes named."""
    for axis, entry in enumerate(names):
        if entry:
            n = x.shape[axis] // lax.axis_size(entry)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(entry) * n, n, axis)
    return x


def in_place(x: Array, names: Names, first: int) -> Array:
    """The inverse of ``own_block``, with zeros in the place of the other devices' parts.

    Args:
      x: the block.
      names: of the axes from ``first`` on.
    """
    for axis, entry in enumerate(names, first):
        if entry:
            n = x.shape[axis]
            shape = (*x.shape[:axis], n * lax.axis_size(entry), *x.shape[axis + 1 :])
            zeros = jnp.zeros(shape, x.dtype)
            x = lax.dynamic_update_slice_in_dim(zeros, x, lax.axis_index(entry) * n, axis)
    return x


def whole_shape(shape: Shape, names: Names) -> Shape:
    """Shape of the array of which one of ``shape`` is a block; () for names splits nothing."""
    if not names:
        return shape
    return tuple(n * lax.axis_size(entry) for n, entry in zip(shape, names, strict=True))
