"""Views: how a parameter acts as a linear map."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax

Shape = tuple[int, ...]


@runtime_checkable
class View(Protocol):
    """What a parameter means as a linear map ``x -> A_w x``.

    Everything else (power iteration, its adjoint, gradients, norms) is derived from these
    four methods. A view is static: frozen, hashable, and free of arrays, so that it can be a
    ``jit``-static argument and travel in the treedef of a state. To support a new kind of
    layer, write one frozen dataclass with these methods.
    """

    def batch_shape(self, shape: Shape) -> Shape:
        """Shape of the axes whose maps are normalized independently (heads, layers, experts)."""
        ...

    def domain(self, shape: Shape) -> Shape:
        """Shape of ``x`` without batch axes, for a parameter of the given shape."""
        ...

    def matvec(self, w: Array, x: Array) -> Array:
        """``A_w x`` for ``x`` of shape (*batch, *domain); linear in ``w`` and in ``x``."""
        ...

    def scale(self, w: Array, factor: Array) -> Array:
        """``w`` times ``factor`` of shape ``batch_shape``, in the dtype of ``w``."""
        ...


def _as_axes(axes: int | Sequence[int], name: str) -> tuple[int, ...]:
    try:
        axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
        axes = tuple(operator.index(axis) for axis in axes)
    except TypeError:
        raise TypeError(
            f"Matrix({name}={axes!r}): axes are integers; give one or a tuple."
        ) from None
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"Matrix({name}={axes}): give at least one axis, and each axis once.")
    return axes


@dataclass(frozen=True)
class Matrix:
    """A kernel as a matrix: ``y = sum over in_axes of w * x``; every other axis is batch.

    Covers dense layers, embeddings, attention projections, stacks of layers, experts, and the
    flattened convolution of Miyato et al. (2018), section 2.1, ``Matrix((0, 1, 2), 3)``. The
    order of the axes within a group does not matter: norms do not depend on it.

    Args:
      in_axes: axis or axes of the kernel that are summed over. Shape of ``x``: their sizes.
      out_axes: axis or axes of the output. Axes in neither group are normalized independently.

    Raises:
      ValueError: an axis is repeated, in both groups, or out of range for a kernel.
      TypeError: an axis is not an integer.

    Example:
      >>> per_head = Matrix(in_axes=0, out_axes=2)        # (features, heads, dim)
      >>> per_head.batch_shape((64, 8, 16)), per_head.domain((64, 8, 16))
      ((8,), (64,))
    """

    in_axes: int | Sequence[int] = -2
    out_axes: int | Sequence[int] = -1

    def __post_init__(self):
        for name in ("in_axes", "out_axes"):
            object.__setattr__(self, name, _as_axes(getattr(self, name), name))

    def _groups(self, ndim: int) -> tuple[Shape, Shape, Shape]:
        """(batch, in, out) axes of a kernel with ``ndim`` axes, each sorted and non-negative."""
        for axis in (*self.in_axes, *self.out_axes):
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"{self} names axis {axis}, but the kernel has {ndim} axes; "
                    f"give a view whose axes lie in [-{ndim}, {ndim})."
                )
        ins = sorted(axis % ndim for axis in self.in_axes)
        outs = sorted(axis % ndim for axis in self.out_axes)
        named = ins + outs
        if len(set(named)) < len(named):
            raise ValueError(
                f"{self} names an axis twice on a kernel with {ndim} axes (in {ins}, out {outs}); "
                "each axis is input, output, or (left out) batch."
            )
        batch = [axis for axis in range(ndim) if axis not in named]
        return tuple(batch), tuple(ins), tuple(outs)

    def batch_shape(self, shape: Shape) -> Shape:
        batch, _, _ = self._groups(len(shape))
        return tuple(shape[axis] for axis in batch)

    def domain(self, shape: Shape) -> Shape:
        _, ins, _ = self._groups(len(shape))
        return tuple(shape[axis] for axis in ins)

    def matvec(self, w: Array, x: Array) -> Array:
        batch, ins, _ = self._groups(w.ndim)
        x_batch = tuple(range(len(batch)))
        x_in = tuple(range(len(batch), x.ndim))
        dims = ((ins, x_in), (batch, x_batch))
        return lax.dot_general(w, x, dims, precision=lax.Precision.HIGHEST)

    def scale(self, w: Array, factor: Array) -> Array:
        batch, _, _ = self._groups(w.ndim)
        factor = lax.broadcast_in_dim(factor, w.shape, batch)
        # Multiplied in the (wider) dtype of the factor, rounded once.
        return (w.astype(factor.dtype) * factor).astype(w.dtype)


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype to iterate in: at least float32, whatever the parameter is stored in."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
