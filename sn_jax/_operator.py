"""A parameter bound to its view: the linear map that it is, wherever its array lies.

Here belongs what needs both, the meaning of a kernel and its array: products, shapes of vectors,
and what a mesh makes of them, so that iterations need not know of it. Only vectors travel between
devices. On explicit axes an iteration runs as on automatic ones, and u and v leave it with the
types that the kernel's axes give them. Inside ``shard_map`` a kernel is a block; its view's
``split`` says of what, each device keeps whole vectors, and one sum over devices completes each
product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass

from sn_jax import _mesh
from sn_jax._views import (
    Conv,
    Matrix,
    Scaled,
    Shape,
    VectorAxes,
    View,
    compute_dtype,
    name_of,
    vector_axes,
)


class Spaces(NamedTuple):
    """Shapes of what a map takes and gives, for each element of its batch."""

    batch: Shape
    domain: Shape
    codomain: Shape


@partial(register_dataclass, data_fields=("w",), meta_fields=("view",))
@dataclass(frozen=True, eq=False)
class Operator:
    """The linear map ``x -> A_w x`` of the kernel of which ``w`` is a part, or the whole.

    Attributes:
      view: how the kernel acts (static).
      w: the array; inside ``shard_map`` a block of the kernel.
    """

    view: View
    w: Array

    @property
    def spaces(self) -> Spaces:
        """Shapes of whole vectors, and of this device's part of the batch."""
        shape, names = self.w.shape, self._names
        if names:
            batch, _, _ = self._axes
            kept = [() if axis in batch else entry for axis, entry in enumerate(names)]
            shape = _mesh.whole_shape(shape, kept)
        return _spaces(self.view, shape)

    @property
    def batch_ndim(self) -> int:
        return len(self.spaces.batch)

    @property
    def is_split(self) -> bool:
        """Whether ``w`` is one block of a kernel that ``shard_map`` splits."""
        return bool(self._names)

    @property
    def frozen(self) -> "Operator":
        """The same as a constant of the gradient."""
        return replace(self, w=lax.stop_gradient(self.w))

    def mv(self, x: Array) -> Array:
        """``A_w x`` for ``x`` (*batch, *domain), or of k vectors, (*batch, k, *domain)."""
        batch, domain, _ = self.spaces
        if x.ndim > len(batch) + len(domain):
            return jax.vmap(self._product, len(batch), len(batch))(x)
        return self._product(x)

    def rmv(self, y: Array) -> Array:
        """``A_w^T y``, (*batch, *domain), for ``y`` (*batch, *codomain); likewise of k vectors."""
        batch, domain, codomain = self.spaces
        k = y.shape[len(batch) : y.ndim - len(codomain)]
        x = _mesh.struct_like((*batch, *k, *domain), y)
        return jax.linear_transpose(self.mv, x)(y)[0]

    def _product(self, x):
        """The products of the blocks, summed, where ``w`` is one."""
        names = self._names
        if not names:
            return self.view.matvec(self.w, x)
        batch, ins, outs = self._axes
        taken, given = ([() if a is None else names[a] for a in axes] for axes in (ins, outs))
        y = self.view.matvec(self.w, _mesh.own_block(x, [()] * len(batch) + taken))
        y = _mesh.in_place(y, given, len(batch))
        summed = tuple(name for entry in (*taken, *given) for name in entry)
        return lax.psum(y, summed) if summed else y

    def start(self, k: int, draw: Callable[[int, Shape, Any], Array]) -> tuple[Array, Array, Array]:
        """(sigma, u, v) to start from: zero, and ``k`` vectors on each side.

        Args:
          k: at most the size of the smaller space is taken.
          draw: ``draw(side, shape, dtype)`` makes those of the whole batch, (*batch, k, *space),
            for side 0 (u) and 1 (v); each device then takes its own part.
        """
        batch, domain, codomain = self.spaces
        names, dtype = self._batch_names, compute_dtype(self.w.dtype)
        k = min(k, *(max(1, math.prod(space)) for space in (domain, codomain)))
        whole = (*_mesh.whole_shape(batch, names), k)
        u, v = (
            _mesh.own_block(draw(side, (*whole, *space), dtype), names)
            for side, space in enumerate((codomain, domain))
        )
        values = _mesh.as_varying(jnp.zeros(batch, dtype), sum(names, ())), u, v
        if not _mesh.is_explicit(self.w):
            return values
        return tuple(map(jax.sharding.reshard, values, self.shardings()))

    def summed(self, parts: Array) -> Array:
        """The sum over the blocks of the kernel of ``parts``, (*batch,), where ``w`` is one."""
        if not self._names:
            return parts
        kept = {name for entry in self._batch_names for name in entry}
        names = tuple(n for entry in self._names for n in entry if n not in kept)
        return lax.psum(parts, names) if names else parts

    def run(
        self, method: Callable[..., tuple], u: Array, v: Array, n_more: int = 0, **options
    ) -> tuple:
        """``method(operator, u, v, **options)``, in at least float32.

        Args:
          method: an iteration of ``_power``, which gives (sigma, u, v) and ``n_more`` arrays
            (*batch,).
          u, v: constants of the gradient, also where a user differentiates through a state.
          options: integers, which are static, and arrays.
        """
        dtype, names = compute_dtype(self.w.dtype), sum(self._batch_names, ())
        u, v = (_mesh.as_varying(lax.stop_gradient(x).astype(dtype), names) for x in (u, v))
        static = {name: x for name, x in options.items() if isinstance(x, int)}
        arrays = {name: x for name, x in options.items() if name not in static}

        def run(w, u, v, arrays):
            return method(Operator(self.view, w), u, v, **static, **arrays)

        if _mesh.is_explicit(self.w):
            shardings = self.shardings()
            run = _mesh.on_automatic_axes(run, (*shardings, *[shardings[0]] * n_more))
        return tuple(run(self.w.astype(dtype), u, v, arrays))

    def shardings(self) -> tuple[NamedSharding, NamedSharding, NamedSharding]:
        """How (sigma, u, v) are sharded as the kernel's explicit axes imply."""
        sharding, axes = jax.typeof(self.w).sharding, vector_axes(self.view, self.w.ndim)
        spec = (*sharding.spec, *[None] * (self.w.ndim - len(sharding.spec)))
        batch, ins, outs = axes or ((), (), ())

        def typed(*kernel_axes):
            entries = (None if axis is None else spec[axis] for axis in kernel_axes)
            return NamedSharding(sharding.mesh, P(*entries))

        return typed(*batch), typed(*batch, None, *outs), typed(*batch, None, *ins)

    @property
    def _names(self) -> _mesh.Names:
        """For each axis of ``w`` the mesh axes it is split over; () outside of ``shard_map``."""
        split = getattr(self.view, "split", None)
        return _mesh.names_here(split, self.w.ndim) if split else ()

    @property
    def _batch_names(self) -> _mesh.Names:
        """The same for the axes of the batch."""
        names = self._names
        return tuple(() if a is None else names[a] for a in self._axes[0]) if names else ()

    @property
    def _axes(self) -> VectorAxes:
        """The kernel's axes, of a view that has a split: ``check`` refuses those without axes."""
        axes = vector_axes(self.view, self.w.ndim)
        assert axes is not None
        return axes


@lru_cache(maxsize=4096)
def _spaces(view: View, shape: Shape) -> Spaces:
    batch, domain = view.batch_shape(shape), view.domain(shape)
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (*batch, *domain)))
    return Spaces(batch, domain, jax.eval_shape(view.matvec, w, x).shape[len(batch) :])


def check(operator: Operator) -> None:
    """Raise where the view does not fit the kernel, or a block would be taken for the whole.

    Raises:
      ValueError: the view does not fit the shape. Inside ``shard_map``: the kernel varies over mesh
        axes that the view's split does not name, or the other way round; or an axis is split that
        cannot be.
    """
    view, w = operator.view, operator.w
    view.batch_shape(w.shape)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return
    names = _mesh.names_here(getattr(view, "split", None), w.ndim)
    flat, varying = [name for entry in names for name in entry], _mesh.varying(w)
    unnamed = [name for name in varying if name not in flat]
    if unnamed:
        raise ValueError(
            f"inside shard_map it differs along the mesh axes {unnamed}, so that this is one block "
            f"of it, but {view} does not name them. Give the kernel's in_spec to the view: "
            "sn_jax.Matrix(in_axes, out_axes, split=P(...)); a kernel for each device needs an "
            "axis of its own (of size 1 here)."
        )
    constant = [name for name in flat if name not in varying]
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


def check_linear(operator: Operator, *, in_w: bool) -> None:
    """Raise if the map is not linear in ``x``, or (``in_w``) not linear in ``w``.

    By its jaxpr, and where ``w`` is no tracer also by numbers: an affine map transposes without an
    error.

    Raises:
      ValueError: it is not.
      TypeError: the view's map does not return one array.
    """
    view, w = operator.view, operator.w
    while isinstance(view, Scaled):
        view = view.view
    if isinstance(view, Matrix | Conv):
        return
    name = name_of(getattr(view, "fn", view))
    dtype = compute_dtype(w.dtype)
    x = jax.ShapeDtypeStruct((*view.batch_shape(w.shape), *view.domain(w.shape)), dtype)
    weight = jax.ShapeDtypeStruct(w.shape, dtype)
    y = jax.eval_shape(view.matvec, weight, x)
    if not hasattr(y, "shape"):
        raise TypeError(
            f"{name} returns a {type(y).__name__}; a view's map returns one array: leave out what "
            "is not its output, and join several outputs by jnp.concatenate."
        )
    try:
        jax.eval_shape(lambda w, y: jax.linear_transpose(partial(view.matvec, w), x)(y), weight, y)
    except Exception as error:
        raise ValueError(
            f"{name} is not linear in x: it cannot be transposed ({_first_line(error)}). A view's "
            "map must be; leave activations, biases and normalizations out of it."
        ) from error
    if isinstance(w, Tracer):
        return
    defects = _defects(jnp.asarray(w, dtype), view=view)
    for what, defect in zip(("x", "w"), defects, strict=True):
        # A defect that is not finite says that the weights are not, or overflow, which is
        # reported elsewhere.
        if (what == "x" or in_w) and bool(defect > 1e-2):
            raise ValueError(
                f"{name} is not linear in {what}: f(0) is not 0, or f(2 a - 3 b) not "
                "2 f(a) - 3 f(b). Leave biases and other constants out of it."
            )


@partial(jax.jit, static_argnames="view")
def _defects(w: Array, *, view: View) -> Array:
    """By how much the map fails to be linear in x, and in w, relative to its values."""
    shape = (*view.batch_shape(w.shape), *view.domain(w.shape))
    a, b = jax.random.normal(jax.random.key(0), (2, *shape), w.dtype)
    other = jnp.flip(w) + jnp.mean(w)

    def defect(f, a, b):
        parts = 2 * f(a), 3 * f(b)
        scale = sum(jnp.max(jnp.abs(part), initial=0) for part in parts)
        gap = jnp.max(jnp.abs(f(2 * a - 3 * b) - (parts[0] - parts[1])), initial=0)
        ratio = gap / jnp.where(scale > 0, scale, jnp.ones_like(scale))
        # A constant is an error even if it is small beside the values.
        return jnp.where(jnp.any(f(jnp.zeros_like(a)) != 0), 1.0, ratio)

    return jnp.stack(
        [defect(partial(view.matvec, w), a, b), defect(lambda w: view.matvec(w, a), w, other)]
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
