"""Views: how a parameter acts as a linear map."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from sn_jax import _mesh

Shape = tuple[int, ...]
# For each axis of a kernel the mesh axes that it is split over.
Split = tuple[tuple[str, ...], ...]
# For each axis of batch, x and y which axis of the kernel it is.
VectorAxes = tuple[tuple[int | None, ...], tuple[int | None, ...], tuple[int | None, ...]]
# A name, or (low, high) for each dimension.
Padding = str | tuple[tuple[int, int], ...]


@runtime_checkable
class View(Protocol):
    """What a parameter means as a linear map ``x -> A_w x``.

    Everything else (power iteration, its adjoint, gradients, norms) is derived from these
    four methods. A view is static: frozen, hashable, and free of arrays, so that it can be a
    ``jit``-static argument and travel in the treedef of a state. To support a new kind of
    layer, write one frozen dataclass with these methods. One more, ``vector_axes(ndim)``, is
    optional: three tuples that say for each axis of batch, x and y which axis of the kernel it
    is, or None; on explicit meshes u and v are sharded so, and replicated without it.

    Example:
      >>> import sn_jax
      >>> @dataclass(frozen=True)
      ... class Diagonal:                              # y = w * x, entry by entry
      ...     def batch_shape(self, shape):
      ...         return ()
      ...     def domain(self, shape):
      ...         return shape
      ...     def matvec(self, w, x):
      ...         return w * x
      ...     def scale(self, w, factor):
      ...         return w * factor.astype(w.dtype)
      >>> params = {"gain": jnp.array([1.0, -4.0])}
      >>> state = sn_jax.init(params, jax.random.key(0), {"gain": Diagonal()})
      >>> print(sn_jax.spectral_normalize(params, state)[0]["gain"])
      [ 0.25 -1.  ]
    """

    def batch_shape(self, shape: Shape) -> Shape:
        """Shape of the axes whose maps are normalized independently (heads, layers, experts).

        Args:
          shape: of the parameter.

        Returns:
          tuple: sizes of the batch axes; () for one map.

        Raises:
          ValueError: the view does not fit a parameter of this shape.
        """
        ...

    def domain(self, shape: Shape) -> Shape:
        """Shape of ``x`` without batch axes.

        Args:
          shape: of the parameter.

        Returns:
          tuple: sizes of the axes of one ``x``.

        Raises:
          ValueError: the view does not fit a parameter of this shape.
        """
        ...

    def matvec(self, w: Array, x: Array) -> Array:
        """The product ``y = A_w x``, for each element of the batch on its own.

        Args:
          w: the parameter.
          x: (*batch, *domain), of the same dtype.

        Returns:
          Array: ``y`` (*batch, *codomain), linear in ``w`` and in ``x``.
        """
        ...

    def scale(self, w: Array, factor: Array) -> Array:
        """The parameter times one factor for each element of the batch.

        Args:
          w: the parameter.
          factor: (*batch,), of a dtype that may be wider than that of ``w``.

        Returns:
          Array: the product, of the shape and dtype of ``w``.
        """
        ...


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # else JAX keeps the broadcast factor
def _scale(w: Array, factor: Array, batch_axes: Shape) -> Array:
    factor = _mesh.broadcast_like(factor, w, batch_axes)
    # The product is taken in the dtype of the factor, which is the wider one, and rounded once.
    return (w.astype(factor.dtype) * factor).astype(w.dtype)


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype to iterate in: at least float32, whatever the parameter is stored in."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _set(frozen: object, /, **fields: Any) -> None:
    """Gives a frozen dataclass its fields, while it is made."""
    for name, value in fields.items():
        object.__setattr__(frozen, name, value)


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


def _as_split(split: Any) -> Split | None:
    """A PartitionSpec, hashable and with a tuple of names for each axis."""
    if split is None:
        return None
    if not isinstance(split, Sequence | PartitionSpec) or isinstance(split, str):
        raise TypeError(
            f"split={split!r}: give the kernel's in_spec, jax.sharding.PartitionSpec('data', None)."
        )
    entries = ((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in split)
    return tuple(entries)


def _check_split(view: "Matrix | Conv", ndim: int) -> None:
    n = len(view.split or ())
    if n > ndim:
        raise ValueError(f"{view}: split has {n} entries, but the kernel has {ndim} axes.")


@dataclass(frozen=True, init=False, repr=False)
class Matrix:
    """A kernel as a matrix: ``y = sum over in_axes of w * x``; every other axis is batch.

    Covers dense layers, embeddings, attention projections, stacks of layers, experts, and the
    flattened convolution of Miyato et al. (2018), section 2.1, ``Matrix((0, 1, 2), 3)``. The
    order of the axes within a group does not matter: norms do not depend on it.

    Args:
      in_axes: axis or axes of the kernel that are summed over. Shape of ``x``: their sizes.
      out_axes: axis or axes of the output. Axes in neither group are normalized independently.
      split: for kernels that ``shard_map`` splits: their ``PartitionSpec`` in its ``in_specs``,
        so that products and norms are those of the whole kernel. Of no effect outside.
      rank: number of the kernel's axes in the model that the view was read off, as
        ``sn_jax.linen.views`` sets it: a kernel with more of them is refused.

    Raises:
      ValueError: an axis is repeated, in both groups, or out of range for a kernel.
      TypeError: an axis is not an integer, or ``split`` no ``PartitionSpec``.

    Example:
      >>> per_head = Matrix(in_axes=0, out_axes=2)        # (features, heads, dim)
      >>> per_head.batch_shape((64, 8, 16)), per_head.domain((64, 8, 16))
      ((8,), (64,))
    """

    in_axes: Shape = (-2,)
    out_axes: Shape = (-1,)
    split: Split | None = None
    rank: int | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __init__(
        self,
        in_axes: int | Sequence[int] = -2,
        out_axes: int | Sequence[int] = -1,
        split: PartitionSpec | Split | None = None,
        *,
        rank: int | None = None,
    ) -> None:
        _set(self, in_axes=in_axes, out_axes=out_axes, split=split, rank=rank)
        self.__post_init__()

    def __post_init__(self) -> None:  # also of dataclasses that inherit, whose __init__ is theirs
        _set(
            self,
            in_axes=_as_axes(self.in_axes, "in_axes"),
            out_axes=_as_axes(self.out_axes, "out_axes"),
            split=_as_split(self.split),
        )

    def __repr__(self) -> str:
        split = "" if self.split is None else f", split={PartitionSpec(*self.split)}"
        return f"Matrix(in_axes={self.in_axes}, out_axes={self.out_axes}{split})"

    def axis_groups(self, ndim: int) -> tuple[Shape, Shape, Shape]:
        """(batch, in, out) axes of a kernel with ``ndim`` axes, each sorted and non-negative.

        Raises:
          ValueError: an axis is out of range or named twice, or the kernel has more than ``rank``
            axes.
        """
        if self.rank is not None and ndim > self.rank:
            raise ValueError(
                f"{self} was read off a model whose kernel has {self.rank} axes, and this one has "
                f"{ndim}: for a stack of kernels, as vmap makes it, take the views of the model "
                "that uses the stack, or give axes counted from the end, such as Matrix(-2, -1)."
            )
        return _axis_groups(self, ndim)

    def vector_axes(self, ndim: int) -> tuple[Shape, Shape, Shape]:
        """Which of ``ndim`` kernel axes each axis of batch, x and y is: they are sharded so."""
        return self.axis_groups(ndim)

    def batch_shape(self, shape: Shape) -> Shape:
        batch, _, _ = self.axis_groups(len(shape))
        return tuple(shape[axis] for axis in batch)

    def domain(self, shape: Shape) -> Shape:
        _, ins, _ = self.axis_groups(len(shape))
        return tuple(shape[axis] for axis in ins)

    def matvec(self, w: Array, x: Array) -> Array:
        batch, ins, outs = self.axis_groups(w.ndim)
        if max(len(ins), len(outs)) > 1 and _mesh.is_whole(w):
            for first, last in ((ins, outs), (outs, ins)):
                if (*batch, *first, *last) == tuple(range(w.ndim)):
                    return self._flat_matvec(w, x, len(batch), len(first), ins < outs)
        x_batch = tuple(range(len(batch)))
        x_in = tuple(range(len(batch), x.ndim))
        dims = ((ins, x_in), (batch, x_batch))
        return lax.dot_general(w, x, dims, precision=lax.Precision.HIGHEST)

    def _flat_matvec(self, w, x, n_batch, n_first, in_first):
        """The same with both groups of axes flattened, where they lie together in memory.

        XLA transposes a copy of a kernel whose contraction runs over several axes; of a flat one
        it does not.
        """
        batch, rest = w.shape[:n_batch], w.shape[n_batch:]
        first, last = rest[:n_first], rest[n_first:]
        sizes = math.prod(first), math.prod(last)
        x = x.reshape(*batch, sizes[not in_first])
        x_batch = tuple(range(n_batch))
        dims = ((n_batch + (not in_first),), (n_batch,)), (x_batch, x_batch)
        y = lax.dot_general(w.reshape(*batch, *sizes), x, dims, precision=lax.Precision.HIGHEST)
        return y.reshape(*batch, *(last if in_first else first))

    def scale(self, w: Array, factor: Array) -> Array:
        batch, _, _ = self.axis_groups(w.ndim)
        return _scale(w, factor, batch)


@lru_cache(maxsize=4096)  # each leaf asks some six times
def _axis_groups(view: Matrix, ndim: int) -> tuple[Shape, Shape, Shape]:
    _check_split(view, ndim)
    for axis in (*view.in_axes, *view.out_axes):
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{view} names axis {axis}, but the kernel has {ndim} axes; "
                f"give a view whose axes lie in [-{ndim}, {ndim})."
            )
    ins = sorted(axis % ndim for axis in view.in_axes)
    outs = sorted(axis % ndim for axis in view.out_axes)
    named = ins + outs
    if len(set(named)) < len(named):
        raise ValueError(
            f"{view} names an axis twice on a kernel with {ndim} axes (in {ins}, out {outs}); "
            "each axis is input, output, or (left out) batch."
        )
    batch = [axis for axis in range(ndim) if axis not in named]
    return tuple(batch), tuple(ins), tuple(outs)


def _per_dimension(value, dimensions: int, name: str) -> Shape:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dimensions
    if len(values) != dimensions or any(operator.index(v) < 1 for v in values):
        raise ValueError(
            f"Conv({name}={value!r}): give one integer >= 1, or one for each of the "
            f"{dimensions} dimensions of input_shape."
        )
    return tuple(operator.index(v) for v in values)


def _as_padding(
    padding: str | int | Sequence[int | Sequence[int]], n: int, transpose: bool
) -> Padding:
    if isinstance(padding, str):
        named = ["SAME", "VALID", "CIRCULAR"] + (["SAME_LOWER"] if not transpose else [])
        named += ["REFLECT"] if not transpose else []
        named += ["CAUSAL"] if n == 1 and not transpose else []
        if padding.upper() not in named:
            raise ValueError(f"Conv(padding={padding!r}): choose from {', '.join(named)}.")
        return padding.upper()
    each = padding if isinstance(padding, Sequence) else (padding,) * n
    pairs = tuple(tuple(p) if isinstance(p, Sequence) else (p, p) for p in each)
    if len(pairs) != n or any(len(p) != 2 for p in pairs):
        raise ValueError(
            f"Conv(padding={padding!r}): give a name, an integer, or an integer or pair "
            f"(low, high) for each of {n} dimensions."
        )
    return tuple((operator.index(low), operator.index(high)) for low, high in pairs)


@dataclass(frozen=True, init=False, repr=False)
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
      split: as of ``Matrix``: the ``PartitionSpec`` of a kernel that ``shard_map`` splits along
        batch axes or the channels of an ungrouped convolution.

    Raises:
      ValueError: an option does not fit the dimensions or the kernel.

    Example:
      >>> view = Conv(input_shape=(32, 32), strides=2)
      >>> view.domain((3, 3, 16, 64)), view.batch_shape((3, 3, 16, 64))
      ((32, 32, 16), ())
    """

    input_shape: Shape
    strides: Shape = 1  # pyright: ignore[reportAssignmentType]  # one for each dimension, when made
    padding: Padding = "SAME"
    input_dilation: Shape = 1  # pyright: ignore[reportAssignmentType]
    kernel_dilation: Shape = 1  # pyright: ignore[reportAssignmentType]
    feature_group_count: int = 1
    transpose: bool = False
    transpose_kernel: bool = False
    batch_axes: Shape | None = None
    split: Split | None = None

    def __init__(
        self,
        input_shape: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str | int | Sequence[int | Sequence[int]] = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        transpose: bool = False,
        transpose_kernel: bool = False,
        batch_axes: Sequence[int] | None = None,
        split: PartitionSpec | Split | None = None,
    ) -> None:
        _set(
            self,
            input_shape=input_shape,
            strides=strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            transpose=transpose,
            transpose_kernel=transpose_kernel,
            batch_axes=batch_axes,
            split=split,
        )
        self.__post_init__()

    def __post_init__(self) -> None:  # as in Matrix
        size: Any = self.input_shape
        size = tuple(size) if isinstance(size, Sequence) else (size,)
        n = len(size)
        if not 1 <= n <= 3:
            raise ValueError(f"Conv(input_shape={size}): give one to three spatial sizes.")
        if any(map(export.is_symbolic_dim, size)):
            raise ValueError(
                f"Conv(input_shape={size}): a convolution has another norm at each size, so no "
                "symbolic one; export it at fixed sizes, or take the flattened kernel, "
                'Matrix((0, 1, 2), 3), which is conv="reshape".'
            )
        batch_axes = self.batch_axes
        _set(
            self,
            input_shape=_per_dimension(size, n, "input_shape"),
            strides=_per_dimension(self.strides, n, "strides"),
            padding=_as_padding(self.padding, n, self.transpose),
            input_dilation=_per_dimension(self.input_dilation, n, "input_dilation"),
            kernel_dilation=_per_dimension(self.kernel_dilation, n, "kernel_dilation"),
            batch_axes=None if batch_axes is None else tuple(map(operator.index, batch_axes)),
            split=_as_split(self.split),
        )
        if self.transpose and (self.feature_group_count != 1 or set(self.input_dilation) != {1}):
            raise ValueError("Conv(transpose=True) has neither groups nor input_dilation.")

    def __repr__(self) -> str:
        # Only what differs from the default, since people read the views of whole models.
        n = len(self.input_shape)
        _, *options = inspect.signature(Conv).parameters.values()
        values = {option: getattr(self, option.name) for option in options}
        given = [
            f"{option.name}={value!r}"
            for option, value in values.items()
            if value not in (option.default, (1,) * n)
        ]
        return f"Conv({', '.join([repr(self.input_shape), *given])})"

    def vector_axes(self, ndim: int) -> VectorAxes:
        """Which of ``ndim`` kernel axes each axis of batch, x and y is; None for pixels, groups."""
        pixels = (None,) * len(self.input_shape)
        batch = self.kernel_batch_axes(ndim)
        ins, outs = [axis for axis in range(ndim) if axis not in batch][-2:]
        if self.feature_group_count > 1:
            return batch, (*pixels, None), (*pixels, None)
        if self.transpose and self.transpose_kernel:
            ins, outs = outs, ins
        return batch, (*pixels, ins), (*pixels, outs)

    def kernel_batch_axes(self, ndim: int) -> Shape:
        """Axes of a kernel with ``ndim`` axes that are stacks of kernels, sorted.

        Raises:
          ValueError: ``ndim`` is not that of the spatial, channel and batch axes.
        """
        return _kernel_batch_axes(self, ndim)

    def _split(self, shape: Shape) -> tuple[Shape, Shape]:
        """(batch shape, kernel shape)."""
        batch = self.kernel_batch_axes(len(shape))
        kernel = tuple(size for axis, size in enumerate(shape) if axis not in batch)
        if kernel[-1] % self.feature_group_count:
            raise ValueError(
                f"{self}: {self.feature_group_count} groups do not divide the {kernel[-1]} output "
                f"channels of a kernel {kernel}; its shape is (*spatial, in / groups, out)."
            )
        if 0 not in kernel and 0 in _output_shape(replace(self, batch_axes=()), kernel):
            raise ValueError(
                f"{self} leaves no output: a kernel of {kernel[: len(self.input_shape)]} does not "
                "fit into the padded input. Give a larger input_shape, or padding."
            )
        return tuple(shape[axis] for axis in batch), kernel

    def batch_shape(self, shape: Shape) -> Shape:
        return self._split(shape)[0]

    def domain(self, shape: Shape) -> Shape:
        return self._domain(self._split(shape)[1])

    def _domain(self, kernel: Shape) -> Shape:
        channels = kernel[-1 if self.transpose and self.transpose_kernel else -2]
        return (*self.input_shape, channels * self.feature_group_count)

    def matvec(self, w: Array, x: Array) -> Array:
        batch = self.kernel_batch_axes(w.ndim)
        apply = self._transposed_map if self.transpose else self._map
        for axis in reversed(batch):  # the innermost vmap sees the last batch axis of both
            apply = jax.vmap(apply, in_axes=(axis - batch.index(axis), 0))
        return apply(w, x)

    def reach(self, kernel_size: Shape) -> Shape:
        """Pixels beyond one that a dilated kernel of ``kernel_size`` taps covers, by dimension."""
        return tuple((k - 1) * d for k, d in zip(kernel_size, self.kernel_dilation, strict=True))

    def _map(self, w: Array, x: Array) -> Array:
        n, padding = len(self.input_shape), self.padding
        reach = self.reach(w.shape[:n])
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
        return _scale(w, factor, self.kernel_batch_axes(w.ndim))


@lru_cache(maxsize=4096)
def _kernel_batch_axes(view: Conv, ndim: int) -> Shape:
    _check_split(view, ndim)
    n_batch = ndim - len(view.input_shape) - 2
    axes = tuple(range(n_batch)) if view.batch_axes is None else view.batch_axes
    if n_batch < 0 or len(axes) != n_batch or not all(-ndim <= a < ndim for a in axes):
        raise ValueError(
            f"{view} needs a kernel of (*batch, *spatial, in, out) with "
            f"{len(view.input_shape)} spatial axes and batch_axes as many as are left, but "
            f"the kernel has {ndim} axes."
        )
    return tuple(sorted(axis % ndim for axis in axes))


@lru_cache(maxsize=1024)
def _output_shape(view: Conv, kernel: Shape) -> Shape:
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (kernel, view._domain(kernel)))
    return jax.eval_shape(view.matvec, w, x).shape


def _channels_last(dimensions: int) -> tuple[str, str, str]:
    spatial = "DHW"[-dimensions:]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


@dataclass(frozen=True, init=False, repr=False)
class Linear:
    """Any function ``fn(w, x)`` that is linear in ``x``, as the map of a parameter ``w``.

    For layers that are neither a matrix nor a convolution: Fourier operators, masked or
    tied weights, products with constants. To be normalized it must be linear in ``w`` too, so
    that ``W / sigma`` has norm 1.

    ``fn`` is static: hashed, compared, and pickled by name. Define it at module level. A fresh
    lambda is a new function each time: it compiles again, and does not pickle. What it closes over
    (globals, the object of a method) is compiled in and must not change: what changes is ``w``.

    Args:
      fn: ``fn(w, x) -> y``, arrays of any shape; written in JAX.
      domain: shape of ``x``; an integer for a vector.

    Raises:
      TypeError: ``fn`` is no function, or ``domain`` not made of integers.
      ValueError: a size is negative.

    Example:
      >>> def smooth(w, x):                     # a learned filter of a signal's spectrum
      ...     return jnp.fft.irfft(w * jnp.fft.rfft(x), len(x))
      >>> view = Linear(smooth, domain=8)
      >>> view.domain((5,)), view.matvec(jnp.ones(5), jnp.ones(8)).shape
      ((8,), (8,))
    """

    fn: Callable[[Array, Array], Array]
    domain_shape: Shape

    def __init__(self, fn: Callable[[Array, Array], Array], domain: int | Sequence[int]) -> None:
        if not callable(fn):
            raise TypeError(f"Linear(fn={fn!r}): give a function fn(w, x) that is linear in x.")
        try:
            sizes = tuple(domain) if isinstance(domain, Sequence) else (domain,)
            sizes = tuple(operator.index(size) for size in sizes)
        except TypeError:
            raise TypeError(f"Linear(domain={domain!r}): give the shape of x.") from None
        if any(size < 0 for size in sizes):
            raise ValueError(f"Linear(domain={domain!r}): sizes are at least 0.")
        _set(self, fn=fn, domain_shape=sizes)

    def __repr__(self) -> str:
        return f"Linear({name_of(self.fn)}, domain={self.domain_shape})"

    def batch_shape(self, shape: Shape) -> Shape:
        return ()

    def domain(self, shape: Shape) -> Shape:
        return self.domain_shape

    def matvec(self, w: Array, x: Array) -> Array:
        return self.fn(w, x)

    def scale(self, w: Array, factor: Array) -> Array:
        return _scale(w, factor, ())


class Values:
    """An array as a static value: compared and hashed by what it holds."""

    def __init__(self, array: Any) -> None:
        self.array: np.ndarray = np.array(array)  # a copy, which nobody else writes to
        self.array.flags.writeable = False
        self._key = self.array.shape, str(self.array.dtype), self.array.tobytes()
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type["Values"], tuple[np.ndarray]]:
        # Hashes of strings differ from process to process.
        return Values, (self.array,)


@dataclass(frozen=True, init=False, repr=False)
class Scaled:
    """A kernel that the layer multiplies by a constant first: ``A_w x = B_(factor * w) x``.

    For masked convolutions and autoregressive layers, and kernels scaled by a fixed number such
    as 1/sqrt(fan_in): what enters the product is normalized, so that its norm is ``bound``. The
    constant is held by value: part of the view, of its hash, and of what pickle keeps.

    Args:
      view: how ``factor * w`` acts.
      factor: the constant: a number, or an array that broadcasts to the shape of ``w``, with as
        many axes. Real.

    Raises:
      TypeError: ``view`` is no view, or ``factor`` is traced or not real.
      ValueError: (when used) ``factor`` does not broadcast to the kernel.

    Example:
      >>> mask = jnp.array([[1.0, 1.0], [1.0, 0.0]])
      >>> view = Scaled(Matrix(), mask)
      >>> view.matvec(jnp.ones((2, 2)), jnp.array([1.0, 2.0])).tolist()
      [3.0, 1.0]
    """

    view: View
    values: Values

    def __init__(self, view: View, factor: Any) -> None:
        check_view(view, "Scaled")
        if isinstance(factor, Tracer):
            raise TypeError(
                "Scaled(factor=...) is traced: its values must be known, as they are part of the "
                "view. Make the view outside of jit."
            )
        values = np.asarray(factor)
        if values.dtype == bool or np.issubdtype(values.dtype, np.integer):
            values = values.astype(np.float32)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise TypeError(f"Scaled(factor=...) of dtype {values.dtype}: give real numbers.")
        _set(self, view=view, values=Values(values))

    def __repr__(self) -> str:
        factor = self.factor
        value = repr(factor.item()) if factor.size == 1 else f"<array of shape {factor.shape}>"
        return f"Scaled({self.view!r}, {value})"

    @property
    def factor(self) -> np.ndarray:
        """The constant, read-only."""
        return self.values.array

    @property
    def split(self) -> Split | None:
        """The split of the scaled kernel's view; None where it has none."""
        return getattr(self.view, "split", None)

    def vector_axes(self, ndim: int) -> VectorAxes | None:
        """Which of ``ndim`` kernel axes each axis of batch, x and y is; None: not known."""
        return vector_axes(self.view, ndim)

    def batch_shape(self, shape: Shape) -> Shape:
        factor = self.factor.shape
        whole = _mesh.whole_shape(shape, _mesh.names_here(self.split, len(shape)))
        if factor and (
            len(factor) != len(shape)
            or any(n not in (1, size) for n, size in zip(factor, whole, strict=True))
        ):
            raise ValueError(
                f"{self}: the factor does not broadcast to a kernel of shape {shape}; give one "
                "with as many axes, each of the kernel's size or 1."
            )
        return self.view.batch_shape(shape)

    def domain(self, shape: Shape) -> Shape:
        return self.view.domain(shape)

    def effective(self, w: Array) -> Array:
        """``factor * w``, the kernel that enters the product."""
        factor = jnp.asarray(self.factor, w.dtype)
        if factor.ndim:
            names = _mesh.names_here(self.split, w.ndim)
            names = [() if n == 1 else entry for n, entry in zip(factor.shape, names, strict=False)]
            factor = jnp.broadcast_to(_mesh.own_block(factor, names), w.shape)
        return w * factor

    def matvec(self, w: Array, x: Array) -> Array:
        return self.view.matvec(self.effective(w), x)

    def scale(self, w: Array, factor: Array) -> Array:
        return self.view.scale(w, factor)


def vector_axes(view: View, ndim: int) -> VectorAxes | None:
    """The view's own answer; None for a view that has none, whose vectors are replicated."""
    method = getattr(view, "vector_axes", None)
    return method(ndim) if method else None


def check_view(view: Any, who: str, instead: str = "") -> None:
    """Raise unless ``who`` gives a view; ``instead`` says what else would do."""
    if isinstance(view, type):
        arguments = "" if view is Matrix else "..."
        raise TypeError(
            f"{who} gives the class {view.__name__}, which is no view itself: write "
            f"{view.__name__}({arguments})."
        )
    if not isinstance(view, View):
        if isinstance(getattr(view, "view", None), View):  # an entry of a state
            instead = f"; its .view is {view.view}"
        raise TypeError(
            f"{who} gives {kind_of(view)}, which is no view; use one such as "
            f"sn_jax.Matrix(){instead}."
        )


def kind_of(x: Any) -> str:
    """What x is, in words short enough for a sentence."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of {x.dtype} with shape {tuple(x.shape)}"
    name = type(x).__name__
    name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    if isinstance(x, Mapping):
        return f"{name} with the keys {list(x)[:5]}"
    text = repr(x) if isinstance(x, str | int | float | tuple | View) or callable(x) else ""
    return f"{name}, {text}" if 0 < len(text) <= 60 else name


def name_of(function: Any) -> str:
    """As the author wrote it, if it has a name."""
    return getattr(function, "__name__", repr(function))
