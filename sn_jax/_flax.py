"""What the two Flaxes share: what wrappers do to products, and how layers are seen.

Here belongs what both adapters need of Flax's layers; nothing is imported from Flax.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sn_jax import _core, _mesh, _power, _trace
from sn_jax._operator import Operator
from sn_jax._rules import WEIGHT_NAMES, Rules, compile_rules, listing
from sn_jax._views import Conv, Matrix, View, compute_dtype

ConvView = Literal["reshape", "operator"]


class AtProduct:
    """A layer's ``promote_dtype`` that changes its kernel where the layer is about to use it.

    Compared by identity: it is on a layer for one call or one trace.

    Args:
      promote_dtype: the layer's own.
      stock: Flax's. Any other may change the kernel itself, and goes first.
      change: ``change(kernel, x)`` -> kernel.
    """

    def __init__(self, promote_dtype: Callable, stock: Callable, change: Callable):
        self.promote_dtype, self.change = promote_dtype, change
        self.is_stock = promote_dtype is stock

    def __call__(self, *args, **kwargs):
        packed = isinstance(args[0], tuple)  # nnx: one tuple; linen: one by one
        arrays = args[0] if packed else args
        arrays = self._changed(arrays) if self.is_stock else arrays
        arrays = self.promote_dtype(*((arrays,) if packed else arrays), **kwargs)
        return arrays if self.is_stock else self._changed(arrays)

    def _changed(self, arrays):
        # Layers call it with (embedding,), (query, embedding) or (x, kernel, bias).
        x, place = arrays[0], min(1, len(arrays) - 1)
        return (*arrays[:place], self.change(arrays[place], x), *arrays[place + 1 :])


# The attributes that decide what product a Flax layer computes.
PRODUCT = (
    "dot_general", "dot_general_cls", "promote_dtype", "preferred_element_type", "mask",
    "conv_general_dilated", "conv_general_dilated_cls",
)  # fmt: skip


def is_plain_product(layer: Any, stock: Any) -> bool:
    """Whether a Flax layer's product is that of the stock layer, of which it is, in float32."""
    return all(
        getattr(layer, name, None) == getattr(stock, name, None) for name in PRODUCT
    ) and layer.dtype in (None, jnp.float32)


def scaled_product(leaf: _core.Leaf) -> Callable[..., Array]:
    """A ``dot_general`` that scales the product instead of the kernel, where that is cheaper.

    In the backward pass ``<G, W_bar>`` then comes from outputs instead of kernels, and only
    ``u v^T`` is added to the kernel's gradient; W_bar is not written. Cheaper: not many more rows
    than inputs, so that a product of outputs and their gradient costs less than one of kernels.
    The same: float32 throughout; accelerators round a kernel to less in their default precision.

    Args:
      leaf: of a dense kernel; one factor for all of it.
    """

    def dot_general(x, scaled, dimensions, precision=None, **options):
        ((axes, _), batch) = dimensions
        n_in = math.prod(x.shape[axis] for axis in axes)
        if (
            leaf.factor.ndim == 0
            and x.dtype == scaled.dtype == leaf.w.dtype == jnp.float32
            and batch == ((), ())
            # Sizes that are symbols of jax.export cannot be compared.
            and isinstance(x.size, int)
            and 0 < x.size <= 2 * n_in**2
            and (jax.default_backend() == "cpu" or precision == lax.Precision.HIGHEST)
        ):
            product = lax.dot_general(x, leaf.w, dimensions, precision=precision, **options)
            return product * _mesh.broadcast_like(leaf.factor, product, ())
        return lax.dot_general(x, scaled, dimensions, precision=precision, **options)

    return dot_general


# A wrapper's statistics.


def stored_state(w: Array, view: View, u: Array, sigma: Array) -> _core.Singular:
    """From what the wrappers store: v comes from u in the first half step.

    Until then v is something to fall back on, so that a u that is zero recovers, as flax leaves it
    after a zero kernel.
    """
    batch, domain, _ = Operator(view, w).spaces
    k = u.shape[len(batch)] if u.ndim > len(batch) else 1  # a wrong shape is told later
    v = _power.ramp((*batch, k, *domain), compute_dtype(w.dtype))
    return _core.Singular(u, v, sigma, view)


def check_scale_init(scale_init: str, use_scale: bool) -> None:
    """Raise unless the option of the wrappers can be."""
    if scale_init not in ("one", "sigma"):
        raise ValueError(f'scale_init must be "one" or "sigma"; got {scale_init!r}.')
    if scale_init == "sigma" and not use_scale:
        raise ValueError('scale_init="sigma" is that of a learned scale: give use_scale=True, too.')


def check_steps(n_steps: Any) -> None:
    """Raise unless a wrapper can take so many steps at a call."""
    try:
        steps = operator.index(n_steps)
    except TypeError:
        raise TypeError(
            f"SpectralNorm: n_steps must be an integer, such as 1; got {n_steps!r}."
        ) from None
    if steps < 1:
        raise ValueError(
            f"SpectralNorm needs n_steps >= 1, got {steps}; without the wrapper the layer is left "
            "alone."
        )


def check_conv(conv: str) -> None:
    """Raise unless it is a way to see convolutions, whether or not there are any."""
    if conv not in get_args(ConvView):
        raise ValueError(
            'conv must be "reshape" (taps and input channels by output channels) or "operator" '
            f"(the map on the input of the call); got {conv!r}."
        )


def raw_scale(leaf: _core.Leaf) -> jax.Array:
    """(*batch,): what the normalized kernel is multiplied by to be the raw one."""
    return 1 / jax.lax.stop_gradient(leaf.factor)


def choice(update: bool | Array, new: Array | int, old: Array | int) -> Array | int:
    """``new`` if the statistics are to be updated, else ``old``."""
    if isinstance(update, bool | np.bool_):
        return new if update else old
    return jnp.where(update, new, old)


# Views of the layers that both Flaxes have, from attributes that both name alike.


def conv_view(layer: Any, input_shape: tuple[int, ...] | None, conv: str, *, transpose: bool):
    """View of a Conv or ConvTranspose layer's kernel, on inputs of the given spatial size.

    ``conv="reshape"`` is the paper's: taps and input channels by output channels.
    """
    n = spatial_ndim(layer)
    swapped = transpose and layer.transpose_kernel
    if conv == "reshape":
        return Matrix((*range(n), n + swapped), n + 1 - swapped)
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


def spatial_ndim(layer: Any) -> int:
    """Number of spatial dimensions of a convolutional layer; 0 for others."""
    kernel_size = getattr(layer, "kernel_size", ())
    return 1 if isinstance(kernel_size, int) else len(kernel_size)


def input_size(layer: Any, x: Any) -> tuple[int, ...]:
    """Spatial size of a convolution's input, from what enters its product: padded already for
    some paddings."""
    n = spatial_ndim(layer)
    size = x.shape[-n - 1 : -1] if n else ()
    if not hasattr(layer, "transpose_kernel") and getattr(layer, "padding", None) in (
        "CIRCULAR", "REFLECT", "CAUSAL",
    ):  # fmt: skip
        kernel_size, dilation = layer.kernel_size, layer.kernel_dilation or 1
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
        dilation = (dilation,) * n if isinstance(dilation, int) else dilation
        reach = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        size = [s - r for s, r in zip(size, reach, strict=True)]
    return tuple(size)


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


# From what a call does with its parameters to what is normalized.


class Resolved(NamedTuple):
    """What is normalized how.

    Attributes:
      views: path -> view of the stored parameter.
      at_product: path of a layer's kernel -> view of what enters its product, which is computed
        from stored parameters in a way that a view of them cannot say.
    """

    views: dict[str, View]
    at_product: dict[str, View]


def weight_paths(leaves: Mapping[str, Any]) -> frozenset[str]:
    """Paths of the parameters that are weights by their names and number of axes."""
    return frozenset(
        path for path, leaf in leaves.items()
        if path.rpartition("/")[2] in WEIGHT_NAMES and len(jnp.shape(leaf)) >= 2
    )  # fmt: skip


def resolve(
    leaves: Mapping[str, Any],
    uses: _trace.Uses,
    beside: Mapping[str, str],
    rules: Rules | None,
    who: str,
    task: Literal["views", "wrap", "bake"] = "views",
) -> Resolved:
    """What to normalize, from what a trace found; rules come first.

    Args:
      leaves: path -> parameter.
      uses: of the parameters, by the call.
      beside: path -> class, of parameters that a layer made from a stock one has beside the
        stock one's kernel and bias.
      rules: the user's.
      who: asks; for the errors.
      task: "wrap" normalizes changed kernels at their products, and leaves alone what the call
        does not use; "bake" only the latter; "views" neither.

    Raises:
      ValueError: one for all weights that are not seen, or act in several ways, or change on the
        way to the product; nothing to normalize.
    """
    view_of, weights = compile_rules(rules, leaves), weight_paths(leaves)
    unruled = object()
    said = {path: view_of(path, unruled) for path in leaves}
    ruled: dict[str, View | None] = {p: view for p, view in said.items() if view is not unruled}
    views = {path: view for path, view in ruled.items() if view is not None}
    problems, at_product, computed = {}, {}, set()
    for change in sorted(uses.changes, key=lambda change: sorted(change.paths)):
        sources = sorted(change.paths)
        if task == "wrap" and change.name and change.view and not change.lifted:
            computed |= change.paths
            views = {path: view for path, view in views.items() if path != change.name}
            view = ruled.get(change.name, change.view)
            if view is not None:
                at_product[change.name] = view
        elif change.name not in ruled:
            name = change.name
            blamed = [name] if name is not None and name in leaves else sources
            blamed = [p for p in blamed if p in weights or p == name] or sources
            for path in blamed:
                if path not in ruled:
                    problems[path] = _changed(change, path, task)
            computed |= change.paths
    for path, leaf in leaves.items():
        if path in ruled or path in problems or path in at_product:
            continue
        seen = uses.views.get(path, set())
        if len(seen) > 1:
            ways = "; ".join(sorted(map(repr, seen)))
            problems[path] = f"acts in {len(seen)} ways ({ways}): say which one to normalize"
        elif (view := next(iter(seen), None)) is not None:
            views[path] = view
        elif path in computed or (task != "views" and path not in uses.read):
            continue
        elif path in beside and len(jnp.shape(leaf)) >= 2:
            problems[path] = (
                f"is a parameter of {beside[path]} beside the kernel, and what it adds to the "
                "layer's map is not seen"
            )
        elif path in weights and path not in uses.read:
            problems[path] = "is not used by this call"
        elif path in weights:
            what = "only a part of it enters" if seen else "it enters none as it is stored"
            problems[path] = f"cannot be seen as a linear map: of the products of this call {what}"
    if problems:
        told = "; ".join(
            f"{path} of shape {jnp.shape(leaves[path])} {problem}"
            if path in leaves else f"{path} {problem}"
            for path, problem in problems.items()
        )  # fmt: skip
        first = next(iter(problems))
        raise ValueError(
            f"{who}: {told}. Or say how the stored parameter is to be seen, with "
            f"rules={{{first!r}: sn_jax.Matrix(in_axes, out_axes)}}; None leaves it alone."
        )
    if not views and not at_product:
        raise ValueError(
            f"{who} finds no kernel to normalize among {listing(leaves)}: wrap or give a "
            "model that has one, or name one by rules."
        )
    for path, view in views.items():
        if isinstance(view, Matrix) and path not in ruled:
            views[path] = replace(view, rank=len(jnp.shape(leaves[path])))
    return Resolved({path: views[path] for path in leaves if path in views}, at_product)


def _changed(change: _trace.Change, path: str, task: str) -> str:
    ways = ", ".join(change.operations) or "rearrangement"
    others = sorted(change.paths - {path})
    ways += f" with {', '.join(others)}" if others else ""
    said = f"is changed on its way to the product (by {ways})"
    if change.name is None:
        return (
            f"{said}, which no stock layer makes: let one make it, such as a Dense whose `param` "
            "or `promote_dtype` does the change, with SpectralNorm around it"
        )
    if change.view is None:
        return f"{said}, and its layer is no single linear map"
    if task == "wrap":
        return (
            f"{said} inside a transformation (scan, vmap, jit, remat): put SpectralNorm around "
            "that layer, inside the transformation"
        )
    if task == "bake":
        return f"{said}, so that no stored kernel gives the same outputs: serve the wrapped model"
    return (
        f"{said}, so that dividing it by its norm does not make that of the product 1: put "
        "SpectralNorm around that layer, which normalizes what enters the product"
    )
