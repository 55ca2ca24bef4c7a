"""The layers of Flax linen: which view each has, and how a call of a model uses its parameters.

Here belongs what knows the attributes of linen's layers, and how to run one unseen or changed.
"""

import dataclasses
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen import module as module_lib
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import ConvLocal
from flax.linen.recurrent import DenseParams
from jax.core import Tracer

from sn_jax import _flax, _rules, _trace
from sn_jax._flax import ConvView
from sn_jax._views import Matrix, View

# A part of jit's cache key, so that a trace made with tags, or during a bake, is not taken for an
# ordinary one.
tracing = jax.make_user_context(None)
# Layers whose products can be scaled instead of their kernels, as Flax makes them.
# Without a parent, since this module may be imported while one of the user's runs.
DENSE = {
    nn.Dense: nn.Dense(0, parent=None),
    nn.DenseGeneral: nn.DenseGeneral(0, parent=None),
}


def uses_of_call(module, params, others, args, kwargs, conv, rngs, method):
    """How the model uses its parameters, and what layers made from stock ones have beside kernels.
    Other variables that are arrays are constants.
    """
    arrays, rebuild = _trace.split_arrays(args, kwargs)
    abstract, rebuild_others = _trace.split_arrays(others)
    constant = [isinstance(a, np.ndarray | jax.Array) and not isinstance(a, Tracer)
                for a in abstract]  # fmt: skip
    beside: dict[str, str] = {}

    def tagged(next_fun, args, kwargs, context):
        layer, kind = context.module, stock_kind(context.module)
        own = type(layer) is not kind and layer.scope is not None
        if own and context.method_name != "setup":
            for name in _rules.WEIGHT_NAMES:
                if layer.has_variable("params", name):
                    jax.tree.map(_trace.seen_as, layer.get_variable("params", name))
        if kind is None or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        name, adapter = ADAPTERS[kind]
        path = "/".join((*layer.path, name))
        if type(layer) is not kind:
            beside.update(_beside_kernel(layer, name))

        def mark(kernel, x):
            view = adapter(layer, _flax.input_size(layer, x), conv)
            if view is None and kind is not ConvLocal:  # what the product is, the walk sees
                return _trace.seen_as(kernel)
            return _trace.tag(kernel, view, path)

        if kind is DenseParams:
            kernel, bias = next_fun(*args, **kwargs)
            return mark(kernel, args[0]), bias
        with with_change_at_product(layer, mark):
            return next_fun(*args, **kwargs)

    def apply(params, traced):
        arrays, unknown = traced
        args, kwargs = rebuild(arrays)
        unknown = iter(unknown)
        (others,) = rebuild_others(
            [a if known else next(unknown) for a, known in zip(abstract, constant, strict=True)]
        )
        params = traverse_util.unflatten_dict({keys[path]: w for path, w in params.items()})
        with quiet(), nn.intercept_methods(tagged), tracing(("views", conv)):
            return module.apply(
                {**others, "params": params},
                *args, rngs=rngs, method=method, mutable=True, **kwargs,
            )  # fmt: skip

    # Paths are tuples here, since the keys of wrappers contain "/" themselves.
    flat = traverse_util.flatten_dict(params)
    keys = {"/".join(key): key for key in flat}
    leaves = {path: flat[key] for path, key in keys.items()}
    unknown = [a for a, known in zip(abstract, constant, strict=True) if not known]
    uses = _trace.uses_of(apply, leaves, _flax.weight_paths(leaves), (arrays, unknown))
    return uses, beside


def stock_kind(layer: nn.Module) -> type | None:
    """The stock layer that ``layer`` is, or is made from."""
    return next((kind for kind in ADAPTERS if isinstance(layer, kind)), None)


def _beside_kernel(layer, name) -> dict[str, str]:
    """Paths of what a layer made from a stock one has beside kernel and bias, with its name."""
    flat = traverse_util.flatten_dict(layer.variables.get("params", {}))
    return {"/".join((*layer.path, *key)): type(layer).__name__
            for key in flat if key not in ((name,), ("bias",))}  # fmt: skip


@contextmanager
def quiet():
    """No interceptor or record of intermediates of the user's sees what runs here: they count
    each layer once, and want no tracers of ours."""
    interceptors, context = module_lib._global_interceptor_stack, module_lib._context
    before = interceptors._storage, context.capture_stack, context.call_info_stack
    interceptors._storage, context.capture_stack, context.call_info_stack = [], [], []
    try:
        yield
    finally:
        interceptors._storage, context.capture_stack, context.call_info_stack = before


@contextmanager
def with_attribute(layer: nn.Module, name: str, value: Any):
    """``layer.name = value`` for one call of the layer, which is frozen."""
    before = getattr(layer, name)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        object.__setattr__(layer, name, before)


def with_change_at_product(layer: nn.Module, change):
    """For one call of a layer: its kernel is changed where it enters the product."""
    promote = layer.promote_dtype
    if isinstance(promote, _flax.AtProduct):  # a method of the layer calls another
        return nullcontext()
    return with_attribute(layer, "promote_dtype", _flax.AtProduct(promote, promote_dtype, change))


def stock_views(layer: nn.Module, args, kwargs, conv: ConvView) -> dict[str, View]:
    """The view of a stock layer's kernel, which needs no trace; empty for all others."""
    if type(layer) not in ADAPTERS or any(
        getattr(layer, f.name) is not f.default
        for f in dataclasses.fields(layer) if f.name in _flax.PRODUCT
    ):  # fmt: skip
        return {}
    name, adapter = ADAPTERS[type(layer)]
    n = _flax.spatial_ndim(layer)
    x: Any = (*args, *kwargs.values())[0] if args or kwargs else None
    view = adapter(layer, tuple(x.shape[-n - 1 : -1]) if n else (), conv)
    return {} if view is None else {name: view}


def _dense(layer, size, conv):
    return Matrix(0, 1)


def _dense_general(layer, size, conv):
    def count(value):
        return len(value) if isinstance(value, tuple | list) else 1

    n_batch, n_in, n_out = count(layer.batch_dims), count(layer.axis), count(layer.features)
    n_batch = 0 if layer.batch_dims == () else n_batch
    ins = tuple(range(n_batch, n_batch + n_in))
    return Matrix(ins, tuple(range(n_batch + n_in, n_batch + n_in + n_out)))


def _convolution(layer, size, conv):
    return _flax.conv_view(layer, size, conv, transpose=isinstance(layer, nn.ConvTranspose))


ADAPTERS = {
    nn.Dense: ("kernel", _dense),
    nn.DenseGeneral: ("kernel", _dense_general),
    nn.Einsum: ("kernel", lambda layer, size, conv: _flax.einsum_view(layer.einsum_str)),
    nn.Embed: ("embedding", _dense),
    DenseParams: ("kernel", _dense),
    ConvLocal: ("kernel", lambda layer, size, conv: None),  # one kernel per pixel: no single view
    nn.Conv: ("kernel", _convolution),
    nn.ConvTranspose: ("kernel", _convolution),
}
