"""The layers of Flax NNX: which view each has, and how a call of a model uses its parameters.

Here belongs what knows the attributes of NNX's layers.
"""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from sn_jax import _flax, _trace
from sn_jax._nnx import array_of, name_of, with_array
from sn_jax._views import Matrix, Values

# The name of a method, or a function of the model and the arguments.
Method = str | Callable[..., Any]


def run_method(model: nnx.Module, method: Method, args, kwargs) -> Any:
    return (getattr(model, method)(*args, **kwargs) if isinstance(method, str)
            else method(model, *args, **kwargs))  # fmt: skip


def _told(v: nnx.Variable) -> nnx.Variable:
    """A variable that notes, where it is read, which axes its reader knows of."""
    hooks = v.get_metadata().get("on_get_value", ())
    hooks = hooks if isinstance(hooks, tuple) else (hooks,)
    return v.replace(on_get_value=(_note_axes, *hooks))


def _note_axes(_, value):
    return _trace.seen_as(value)


def params_of(state: nnx.State) -> dict[str, jax.Array]:
    return {name_of(path): array_of(v) for path, v in nnx.to_flat_state(state)
            if isinstance(v, nnx.Param)}  # fmt: skip


def uses_of_call(graphdef, state, args, kwargs, conv, method, *, constants: bool):
    """How a call of a model's method uses its parameters, and what layers made from stock ones
    have beside kernels.

    Args:
      graphdef, state: the model; nothing in it is changed.
      args, kwargs: of the call.
      conv: as in ``views``.
      constants: whether arrays that are no parameters (masks, statistics) keep their values; those
        that are Values do in any case.
    """
    variables = {name_of(path): (path, v) for path, v in nnx.to_flat_state(state)}
    leaves = {name: array_of(v) for name, (_, v) in variables.items() if isinstance(v, nnx.Param)}
    others = {name: array_of(v) for name, (_, v) in variables.items() if name not in leaves}
    arrays, rebuild = _trace.split_arrays(args, kwargs)
    # A value that is no array, such as a number kept as data, is passed on as it is.
    known, rebuild_others = _trace.split_arrays({} if constants else others)
    weights = _flax.weight_paths(leaves)
    beside: dict[str, str] = {}

    def call(leaves, traced):
        arrays, known = traced
        (unknown,) = rebuild_others(known)
        values = {**others, **unknown, **leaves}
        values = {name: w.array if isinstance(w, Values) else w for name, w in values.items()}
        flat = [(path, with_array(v, values[name])) for name, (path, v) in variables.items()]
        flat = [(path, _told(v) if name_of(path) in weights else v) for path, v in flat]
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        for path, layer in nnx.iter_modules(model):
            kind = stock_kind(layer)
            if isinstance(layer, nnx.LoRA) or (kind is not None and type(layer) is not kind):
                beside.update(_beside_kernel(path, layer))
            if kind is not None:
                name = name_of((*path, ADAPTERS[kind].name))
                set_at_product(layer, _mark(layer, kind, conv, name))
        args, kwargs = rebuild(arrays)
        outputs = run_method(model, method, args, kwargs), nnx.state(model)
        return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

    return _trace.uses_of(call, leaves, weights, (arrays, known)), beside


def stock_kind(layer: nnx.Module) -> type | None:
    """The stock layer that ``layer`` is, or is made from."""
    return next((kind for kind in ADAPTERS if isinstance(layer, kind)), None)


def _beside_kernel(path, layer) -> dict[str, str]:
    """Paths of what a layer made from a stock one has beside kernel and bias, with its name."""
    own = ("kernel",), ("embedding",), ("bias",)
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {name_of((*path, *key)): type(layer).__name__ for key, _ in flat if key not in own}


def _mark(layer, kind, conv, name):
    # Only plain attributes are kept: a reference to the layer would keep its arrays alive.
    static = SimpleNamespace(**{key: value for key, value in vars(layer).items()
                                if not isinstance(value, nnx.Variable | jax.Array)})  # fmt: skip
    adapter = ADAPTERS[kind].view

    def mark(kernel, x):
        view = adapter(static, _flax.input_size(static, x), conv)
        return _trace.seen_as(kernel) if view is None else _trace.tag(kernel, view, name)

    return mark


def set_at_product(layer: Any, change: Callable) -> None:
    """The layer's kernel is changed where it enters the product, at every call from now on."""
    layer.promote_dtype = _flax.AtProduct(layer.promote_dtype, promote_dtype, change)


def _dense(layer, size, conv):
    return Matrix(0, 1)


def _linear_general(layer, size, conv):
    b, i, o = (len(x) for x in (layer.batch_axis, layer.in_features, layer.out_features))
    return Matrix(tuple(range(b, b + i)), tuple(range(b + i, b + i + o)))


class _Adapter(NamedTuple):
    name: str  # of the kernel
    view: Callable  # of (layer, spatial size of the input, conv)
    n_axes: Callable  # of the kernel, from the layer


ADAPTERS = {
    nnx.Linear: _Adapter("kernel", _dense, lambda layer: 2),
    nnx.LinearGeneral: _Adapter(
        "kernel",
        _linear_general,
        lambda layer: len((*layer.batch_axis, *layer.in_features, *layer.out_features)),
    ),
    nnx.Einsum: _Adapter(
        "kernel",
        lambda layer, size, conv: _flax.einsum_view(layer.einsum_str),
        lambda layer: len(layer.kernel_shape),
    ),
    nnx.Embed: _Adapter("embedding", _dense, lambda layer: 2),
    nnx.Conv: _Adapter(
        "kernel",
        partial(_flax.conv_view, transpose=False),
        lambda layer: 2 + _flax.spatial_ndim(layer),
    ),
    nnx.ConvTranspose: _Adapter(
        "kernel",
        partial(_flax.conv_view, transpose=True),
        lambda layer: 2 + _flax.spatial_ndim(layer),
    ),
}


def is_known(layer: nnx.Module) -> bool:
    """Whether a layer is Flax's own and multiplies by what it stores: no trace is needed."""
    if type(layer) in ADAPTERS:
        return all(
            any(getattr(layer, name, None) is value for value in (None, *stock))
            for name, stock in _STOCK_PRODUCTS.items()
        )
    return type(layer).__module__.startswith("flax.nnx") and not isinstance(layer, nnx.WeightNorm)


# The attributes that decide what product a layer computes, with the values that Flax gives them.
_STOCK_PRODUCTS = dict.fromkeys(_flax.PRODUCT, ()) | {
    "promote_dtype": (promote_dtype,),
    "dot_general": (jax.lax.dot_general,),
    "conv_general_dilated": (jax.lax.conv_general_dilated,),
}


def lora_groups(model: nnx.Module) -> dict[str, tuple[str | None, str, str]]:
    """Path of the state -> paths (kernel, a, b) of the layers that act as kernel + a b."""
    groups, inside = {}, set()
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.LoRALinear):
            a, b = (name_of((*path, "lora", name)) for name in ("lora_a", "lora_b"))
            groups[name_of((*path, "kernel"))] = name_of((*path, "kernel")), a, b
            inside.add(a)
        elif isinstance(layer, nnx.LoRA):
            a, b = (name_of((*path, name)) for name in ("lora_a", "lora_b"))
            base, kernel = layer.base_module, name_of((*path, "base_module", "kernel"))
            if base is None:
                groups[b] = None, a, b
            elif type(base) is nnx.Linear:
                groups[kernel] = kernel, a, b
            else:
                raise ValueError(
                    f"SpectralNorm: the LoRA {name_of(path) or 'at the root'} adds to a "
                    f"{type(base).__name__}, and the norm of the sum is not seen; normalize an "
                    "nnx.Linear with LoRA, or merge the adapter into the model first."
                )
    # A LoRALinear holds a LoRA without a base.
    return {name: group for name, group in groups.items() if group[0] or group[1] not in inside}


@cache
def dense_layers() -> dict[type, nnx.Module]:
    """Layers whose products can be scaled instead of their kernels, as Flax makes them."""
    layers = nnx.eval_shape(
        lambda: (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.LinearGeneral(1, 1, rngs=nnx.Rngs(0)))
    )
    return {type(layer): layer for layer in layers}
