"""Views: how a parameter acts as a linear map."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
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


def _scale(w: Array, factor: Array, batch_axes: Shape) -> Array:
    factor = lax.broadcast_in_dim(factor, w.shape, batch_axes)
    # Multiplied in the (wider) dtype of the factor, rounded once.
    return (w.astype(factor.dtype) * factor).astype(w.dtype)


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype to iterate in: at least float32, whatever the parameter is stored in."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


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
        return _scale(w, factor, batch)


def _per_dimension(value, dimensions: int, name: str) -> Shape:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dimensions
    if len(values) != dimensions or any(operator.index(v) < 1 for v in values):
        raise ValueError(
            f"Conv({name}={value!r}): give one integer >= 1, or one for each of the "
            f"{dimensions} dimensions of input_shape."
        )
    return tuple(operator.index(v) for v in values)


@dataclass(frozen=True)
class Conv:
    """A convolution kernel as the operator that it is on images of a given size.

    Exactly the linear map of flax's ``Conv`` and ``ConvTranspose`` (channels last, without
    bias), so its norm is the layer's Lipschitz constant, which the flattened kernel's is not:
    that can be too small by up to the square root of the number of taps per output.

    Args:
      input_shape: spatial size of the layer's input, one to three integers.
      strides: one integer or one per dimension.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT" (not transposed), "CAUSAL" (1-D), one
        integer, or one integer or pair (low, high) per dimension.
      input_dilation: zeros are put between the input's pixels; lax's lhs_dilation.
      kernel_dilation: spacing of the kernel's taps; lax's rhs_dilation.
      feature_group_count: groups of channels; input channels for a depthwise convolution.
      transpose: the map of ``nn.ConvTranspose``.
      transpose_kernel: of ``nn.ConvTranspose``; the kernel's last axes are (out, in) then.
      batch_axes: axes of the kernel that are stacks of kernels (scanned layers, ensembles);
        by default the leading ones before (*spatial, in, out).

    Raises:
      ValueError: an option does not fit the dimensions or the kernel.

    Example:
      >>> view = Conv(input_shape=(32, 32), strides=2)
      >>> view.domain((3, 3, 16, 64)), view.batch_shape((3, 3, 16, 64))
      ((32, 32, 16), ())
    """

    input_shape: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence = "SAME"
    input_dilation: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    transpose: bool = False
    transpose_kernel: bool = False
    batch_axes: Sequence[int] | None = None

    def __post_init__(self):
        size = self.input_shape
        size = tuple(size) if isinstance(size, Sequence) else (size,)
        n = len(size)
        if not 1 <= n <= 3:
            raise ValueError(f"Conv(input_shape={size}): give one to three spatial sizes.")
        fields = {"input_shape": _per_dimension(size, n, "input_shape")}
        for name in ("strides", "input_dilation", "kernel_dilation"):
            fields[name] = _per_dimension(getattr(self, name), n, name)
        fields["padding"] = self._padding(n)
        if self.batch_axes is not None:
            fields["batch_axes"] = tuple(operator.index(axis) for axis in self.batch_axes)
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if self.transpose and (self.feature_group_count != 1 or set(self.input_dilation) != {1}):
            raise ValueError("Conv(transpose=True) has neither groups nor input_dilation.")

    def _padding(self, n: int):
        padding = self.padding
        if isinstance(padding, str):
            named = ["SAME", "VALID", "CIRCULAR"] + (["SAME_LOWER"] if not self.transpose else [])
            named += ["REFLECT"] if not self.transpose else []
            named += ["CAUSAL"] if n == 1 and not self.transpose else []
            if padding.upper() not in named:
                raise ValueError(f"Conv(padding={padding!r}): choose from {', '.join(named)}.")
            return padding.upper()
        if not isinstance(padding, Sequence):
            padding = (padding,) * n
        pairs = tuple(tuple(p) if isinstance(p, Sequence) else (p, p) for p in padding)
        if len(pairs) != n or any(len(p) != 2 for p in pairs):
            raise ValueError(
                f"Conv(padding={self.padding!r}): give a name, an integer, or an integer or pair "
                f"(low, high) for each of {n} dimensions."
            )
        return tuple((operator.index(low), operator.index(high)) for low, high in pairs)

    def _batch_axes(self, ndim: int) -> Shape:
        n_batch = ndim - len(self.input_shape) - 2
        axes = tuple(range(n_batch)) if self.batch_axes is None else self.batch_axes
        if n_batch < 0 or len(axes) != n_batch or not all(-ndim <= a < ndim for a in axes):
            raise ValueError(
                f"{self} needs a kernel of (*batch, *spatial, in, out) with "
                f"{len(self.input_shape)} spatial axes and batch_axes as many as are left, but "
                f"the kernel has {ndim} axes."
            )
        return tuple(sorted(axis % ndim for axis in axes))

    def _split(self, shape: Shape) -> tuple[Shape, Shape]:
        """(batch shape, kernel shape)."""
        batch = self._batch_axes(len(shape))
        kernel = tuple(size for axis, size in enumerate(shape) if axis not in batch)
        return tuple(shape[axis] for axis in batch), kernel

    def batch_shape(self, shape: Shape) -> Shape:
        return self._split(shape)[0]

    def domain(self, shape: Shape) -> Shape:
        _, kernel = self._split(shape)
        channels = kernel[-1 if self.transpose and self.transpose_kernel else -2]
        return (*self.input_shape, channels * self.feature_group_count)

    def matvec(self, w: Array, x: Array) -> Array:
        batch = self._batch_axes(w.ndim)
        apply = self._transposed_map if self.transpose else self._map
        for axis in reversed(batch):  # the innermost vmap sees the last batch axis of both
            apply = jax.vmap(apply, in_axes=(axis - batch.index(axis), 0))
        return apply(w, x)

    def _map(self, w: Array, x: Array) -> Array:
        n, padding = len(self.input_shape), self.padding
        reach = [(k - 1) * d for k, d in zip(w.shape[:n], self.kernel_dilation, strict=True)]
        if padding in ("CIRCULAR", "REFLECT"):
            mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
            x = jnp.pad(x, [(r // 2, (r + 1) // 2) for r in reach] + [(0, 0)], mode=mode)
            padding = "VALID"
        elif padding == "CAUSAL":
            padding = ((reach[0], 0),)
        y = lax.conv_general_dilated(
            x[None],
            w,
            self.strides,
            padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_channels_last(n),
            feature_group_count=self.feature_group_count,
            precision=lax.Precision.HIGHEST,
        )
        return y[0]

    def _transposed_map(self, w: Array, x: Array) -> Array:
        circular = self.padding == "CIRCULAR"
        y = lax.conv_transpose(
            x[None],
            w,
            self.strides,
            "VALID" if circular else self.padding,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_channels_last(len(self.input_shape)),
            transpose_kernel=self.transpose_kernel,
            precision=lax.Precision.HIGHEST,
        )[0]
        if circular:
            # Fold what lies outside one period (input size times stride) back into it, with the
            # start where flax puts it: its odd pixel lies left, or right for a transposed kernel.
            for axis, (size, stride) in enumerate(zip(self.input_shape, self.strides, strict=True)):
                period = size * stride
                excess = -(y.shape[axis] - period) % (2 * period)
                low = (excess + (not self.transpose_kernel)) // 2
                pads = [(0, 0)] * y.ndim
                pads[axis] = (low, excess - low)
                y = jnp.pad(y, pads)
                y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
        return y

    def scale(self, w: Array, factor: Array) -> Array:
        return _scale(w, factor, self._batch_axes(w.ndim))


def _channels_last(dimensions: int) -> tuple[str, str, str]:
    spatial = "DHW"[-dimensions:]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
