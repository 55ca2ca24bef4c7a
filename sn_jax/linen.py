"""Spectral normalization for Flax linen: whole-model views, a drop-in wrapper, and export.

Here belongs what reads a model's variables, runs it with normalized kernels, and writes back.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MethodType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from sn_jax import _bounds, _core, _flax, _rules, _trace
from sn_jax._flax import ConvView
from sn_jax._linen_layers import (
    ADAPTERS,
    DENSE,
    quiet,
    stock_kind,
    stock_views,
    tracing,
    uses_of_call,
    with_attribute,
    with_change_at_product,
)
from sn_jax._views import View

__all__ = ["ConvView", "SpectralNorm", "bake", "load_state", "spectral_norms", "views"]

# A collection as flax.traverse_util.flatten_dict makes it, whose own type knows no arrays.
_Flat = dict[tuple[str, ...], Any]

# True while a SpectralNorm runs its layer.
_wrapped: ContextVar[bool] = ContextVar("_wrapped", default=False)


def views(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    conv: ConvView = "reshape",
    rules: _rules.Rules | None = None,
    rngs: Any = None,
    method: Any = None,
    **kwargs: Any,
) -> dict[str, View]:
    """How every kernel of a linen model acts, with the strides, padding and sizes it runs at.

    One abstract evaluation of ``module.apply(variables, *args, **kwargs)``: nothing is computed.
    Layers under ``nn.scan`` and ``nn.vmap`` get their stacking axis as a batch axis. The result
    is made for ``sn_jax.init(variables["params"], key, views)``: any model is normalized
    without being edited.

    The norm is that of the kernel which enters the product: one that is multiplied by constants
    first (a mask, a fixed factor) gets a ``Scaled`` view, one that changes in other ways is
    refused. Other collections count as constants if they are given as arrays: take the views
    again when a mask in one of them has changed.

    Args:
      module: the model.
      variables: its variables; arrays or ShapeDtypeStructs.
      *args, **kwargs: for its call; arrays or ShapeDtypeStructs.
      conv: "reshape" sees convolutions flattened to (taps * in, out), as the paper does;
        "operator" as the linear maps that they are at their input's size.
      rules: regular expression -> view or None for parameters that the trace cannot see through
        or that you want seen otherwise, such as per head: ``{r".*/query/kernel": Matrix(0, 2)}``.
      rngs, method: as in ``module.apply``.

    Returns:
      dict: path in ``variables["params"]`` -> view; a set of rules for ``sn_jax.init``.

    Raises:
      ValueError: parameters named kernel, w, weight or embedding (all at once) are not seen, act
        in two ways, or change on their way to the product other than by constants; the ways out
        are ``rules`` and, for the last, ``SpectralNorm``.

    Example:
      >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(4, (3, 3), strides=2)])
      >>> x = jnp.zeros((1, 16, 16, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> for path, view in views(model, variables, x).items():
      ...     print(path, view)
      layers_0/kernel Matrix(in_axes=(0, 1, 2), out_axes=(3,))
      layers_2/kernel Matrix(in_axes=(0, 1, 2), out_axes=(3,))
    """
    _flax.check_conv(conv)
    _check_variables(variables, "views")
    params = meta.unbox(variables["params"])
    others = {name: value for name, value in variables.items() if name != "params"}
    uses, beside = uses_of_call(module, params, others, args, kwargs, conv, rngs, method)
    leaves = _rules.named_leaves(params)
    return _flax.resolve(leaves, uses, beside, rules, "sn_jax.linen.views").views


def _check_variables(variables: Any, of: str) -> None:
    if isinstance(variables, Mapping) and "params" in variables:
        return
    got = type(variables).__name__
    if isinstance(variables, Mapping):
        got = f"{_rules.listing(variables)}: if those are parameters, give {{'params': them}}"
    raise TypeError(
        f"{of}(model, variables, x): variables are what init returned, with 'params'; got {got}."
    )


def _parts(layer: nn.Module, prefix=()) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """(path in a detached copy, module): the layer, and those of its attributes that were made
    inside another module and keep their variables there."""
    yield prefix, layer
    for field in dataclasses.fields(layer):
        if field.name in ("parent", "name") or not field.init:
            continue
        value = getattr(layer, field.name)
        for path, part in jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_module):
            if _is_module(part) and part.path[: len(layer.path)] != layer.path:
                names = (field.name, *(jax.tree_util.keystr((key,), simple=True) for key in path))
                yield from _parts(part, (*prefix, "_".join(names)))


def _is_module(x) -> bool:
    return isinstance(x, nn.Module)


def _value(leaf: Any) -> Any:
    """The array in a box of metadata."""
    box = leaf  # not narrowed: to Flax's abstract class, which declares no value
    return box.value if isinstance(leaf, meta.AxisMetadata) else leaf


def bake(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    rngs: Any = None,
    method: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Variables of the plain module, without any SpectralNorm, that give the same outputs.

    ``W / sigma``, as eval computes it, takes the place of every wrapped kernel; the wrappers'
    state is left out. For serving and export.

    Args:
      module: a model with SpectralNorm wrappers anywhere.
      variables: its variables.
      *args, **kwargs, rngs, method: for one call of ``module.apply``, which finds the wrappers.

    Returns:
      dict: variables of the model in which each ``SpectralNorm(layer)`` is ``layer``.

    Raises:
      TypeError: ``variables`` hold no params.
      ValueError: the call meets no SpectralNorm; a wrapped layer changes its kernel on the way to
        the product other than by constants, so that no stored kernel gives the same outputs.

    Example:
      >>> x = jnp.ones((2, 3))
      >>> model = nn.Sequential([SpectralNorm(nn.Dense(4)), nn.relu])
      >>> variables = model.init(jax.random.key(0), x)
      >>> plain = nn.Sequential([nn.Dense(4), nn.relu])
      >>> baked = bake(model, variables, x)
      >>> bool(jnp.allclose(plain.apply(baked, x), model.apply(variables, x)))
      True
    """
    _check_variables(variables, "bake")
    wrappers, written = {}, []

    def baking(next_fun, args, kwargs, context):
        wrapper = context.module
        if not (isinstance(wrapper, SpectralNorm) and context.method_name == "__call__"):
            return next_fun(*args, **kwargs)
        wrappers[wrapper.path] = wrapper
        kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
        call = _Call(kwargs.pop("_method", "__call__"), args, kwargs)
        return wrapper._run(call, update_stats=False, written=written)

    with nn.intercept_methods(baking), tracing(object()):
        _, updates = module.apply(
            variables, *args, rngs=rngs, method=method, mutable=True, **kwargs
        )
    if not wrappers:
        raise ValueError(
            f"bake found no sn_jax.linen.SpectralNorm in this call of {type(module).__name__}: "
            "give the arguments (and method) with which the wrapped layers are used."
        )
    baked = {**variables, "params": updates["params"]}
    for name in baked:
        flat = traverse_util.flatten_dict(baked[name])
        flat = {_without_wrappers(key, name, wrappers): value for key, value in flat.items()}
        flat.pop(None, None)
        baked[name] = traverse_util.unflatten_dict(flat)
    return {name: value for name, value in baked.items() if value}


def _without_wrappers(key, collection, wrappers):
    """The key of a variable in the plain model; None for what only the wrappers hold."""
    # The innermost come first, so that the paths of outer ones remain valid.
    for path in sorted(wrappers, key=len, reverse=True):
        wrapper, n = wrappers[path], len(path)
        if key[:n] != path:
            continue
        if len(key) == n + 1 and collection in ("params", wrapper.collection_name):
            return None  # "layer/kernel/u", "layer/kernel/scale"
        if key[n] == "layer_instance":
            key = key[:n] + key[n + 1 :]
    return key


def spectral_norms(
    variables: Mapping[str, Any], collection_name: str = "batch_stats"
) -> dict[str, jax.Array]:
    """Estimated spectral norms of all wrapped kernels, as the last update left them, by path.

    Args:
      variables: of a model with SpectralNorm wrappers.
      collection_name: the collection that they keep their state in.

    Returns:
      dict: path in the model without wrappers -> sigma, from below; flat, for any logger.

    Raises:
      ValueError: the collection holds no state of SpectralNorm.

    Example:
      >>> model = nn.Sequential([SpectralNorm(nn.Dense(4)), nn.relu])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> list(spectral_norms(variables))
      ['layers_0/kernel']
    """
    places = _places(variables, collection_name)
    flat: _Flat = traverse_util.flatten_dict(variables[collection_name])
    return {path: flat[(*where, f"{name}/sigma")] for path, (where, name) in places.items()}


def load_state(
    variables: Mapping[str, Any],
    params: Any,
    state: _core.State,
    collection_name: str = "batch_stats",
) -> dict[str, Any]:
    """Variables of a wrapped model with the parameters and singular vectors of a plain one.

    For what ``sn_jax.convert.from_torch`` returns, and for states of ``sn_jax.init``:
    ``load_state(variables, *from_torch(state_dict, template))``. With ``store_v=True`` in the
    wrappers, outputs in eval are then those of PyTorch.

    Args:
      variables: of the wrapped model, as ``init`` returns them; not changed.
      params: the parameters of the model without wrappers.
      state: path in ``params`` -> Singular, for every wrapped kernel.
      collection_name: the collection that the wrappers keep their state in.

    Returns:
      dict: the variables, with ``params``, u, sigma (and v) replaced.

    Raises:
      ValueError: paths or shapes of the two do not fit.

    Example:
      >>> import sn_jax
      >>> model, x = SpectralNorm(nn.Dense(4)), jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
      >>> loaded = load_state(variables, params, sn_jax.init(params, jax.random.key(1)))
      >>> print(f"{spectral_norms(loaded)['kernel']:.3f}")
      3.464
    """
    places = _places(variables, collection_name)
    if places.keys() != state.keys():
        raise ValueError(
            f"The wrappers normalize {_rules.listing(places)}, but the state holds "
            f"{_rules.listing(state)}: give a Singular for each. (A composite made in place, "
            "such as SpectralNorm(nn.Sequential([...])) in @nn.compact, keeps its parameters under "
            "other paths and cannot be loaded so; make it in setup.)"
        )
    new = _rules.named_leaves(params)
    raw: _Flat = traverse_util.flatten_dict(variables["params"])
    loaded = {}
    for key, leaf in raw.items():
        path = "/".join(part for part in key if part != "layer_instance")
        if path not in new or jnp.shape(new[path]) != jnp.shape(_value(leaf)):
            got = jnp.shape(new[path]) if path in new else "nothing"
            raise ValueError(
                f"{'/'.join(key)} of shape {jnp.shape(_value(leaf))} is {path} in the plain "
                f"model, where params have {got}."
            )
        box = isinstance(leaf, meta.AxisMetadata)
        loaded[key] = leaf.replace_boxed(new[path]) if box else new[path]
    stats: _Flat = traverse_util.flatten_dict(variables[collection_name])
    for path, (where, name) in places.items():
        for field in ("u", "v", "sigma"):
            key = (*where, f"{name}/{field}")
            if key in stats:
                value = getattr(state[path], field)
                if jnp.shape(value) != jnp.shape(stats[key]):
                    raise ValueError(
                        f"{field} of {path} has shape {jnp.shape(value)}, and the wrapper keeps "
                        f"{jnp.shape(stats[key])}: take the state with the wrapper's views."
                    )
                stats[key] = value.astype(stats[key].dtype)
    unflatten = traverse_util.unflatten_dict
    return {**variables, "params": unflatten(loaded), collection_name: unflatten(stats)}


def _places(variables, collection_name) -> dict[str, tuple[tuple[str, ...], str]]:
    """Path in the plain model -> (path of the wrapper, what its state calls the kernel)."""
    flat = traverse_util.flatten_dict(variables.get(collection_name, {}))
    places = {}
    for *where, key in flat:
        name, _, field = key.rpartition("/")
        if field == "u" and (*where, f"{name}/sigma") in flat:
            layer, _, inner = name.partition("/")
            # A layer made in place has its parameters beside the wrapper's, under its own name.
            inside = [*where, inner] if layer == "layer_instance" else [*where[:-1], name]
            path = "/".join(part for part in inside if part != "layer_instance")
            places[path] = tuple(where), name
    if not places:
        raise ValueError(
            f"The collection {collection_name!r} holds no state of SpectralNorm: give all that "
            "init returned, and collection_name where it is another."
        )
    return places


class _Call(NamedTuple):
    """A call of a layer's method."""

    method: str
    args: tuple
    kwargs: dict[str, Any]

    def on(self, layer: nn.Module) -> Any:
        return getattr(layer, self.method)(*self.args, **self.kwargs)


class SpectralNorm(nn.Module):
    """A layer whose kernels are divided by their spectral norms at every call.

    A drop-in for ``flax.linen.SpectralNorm``: same arguments, same parameters, same collection
    (``u`` (1, out) and ``sigma`` () per kernel), same outputs wherever flax's matrix is right.
    Miyato et al. (2018), algorithm 1. The raw parameters are never written: ``params`` holds
    what the optimizer set, at ``init`` too. Biases are left alone, attention projections and
    stacked layers are seen as the maps that they are (see ``views``). Where a layer changes its
    kernel on the way to the product (weight standardization, ``nn.WeightNorm``, a learned gain),
    what enters the product is normalized there, with the gradient through the change.

    The layer's other methods, properties and fields are this module's too: ``wrapper.attend(x)``
    and ``apply(variables, x, method="encode")`` run with normalized kernels. ``layer_instance``
    is the raw layer.

    A call with the collection mutable stores the update (``n_steps`` of power iteration from the
    stored ``u``); a call with it immutable computes the same and stores nothing.

    Attributes:
      layer_instance: any module: ``nn.Dense(64)``, attention, a recurrent cell, a whole block.
      n_steps: power-iteration steps per call, >= 1; None is 1, or 15 if stateless.
      epsilon: accepted for flax's sake; vectors are scaled before they are normalized, so that
        no floor is needed and the result does not depend on the kernel's scale.
      dtype: of the normalized kernel; None keeps the kernel's own.
      param_dtype: of the stored ``u`` and ``sigma``.
      error_on_non_matrix: raise for kernels with more than 2 axes.
      collection_name: where the state is kept.
      bound: norm of the normalized kernels, as in ``sn_jax.spectral_normalize``.
      mode: "divide" or "clip", as there.
      gradient: "through" or "stop", as there.
      conv: "reshape" or "operator", as in ``views``.
      rules: as in ``views``, on paths inside the layer: ``{r".*/out/kernel": None}``.
      n_vectors: singular vectors iterated together, as in ``sn_jax.init``.
      warmup: power-iteration steps at ``init``.
      use_scale: multiply each normalized kernel by a learned scale, in ``params`` (the gamma of
        sigma-Reparam, Zhai et al. 2023).
      stateless: iterate from a fixed start at every call; no collection. For ensembles and
        critics that are called with parameters only.
      store_v: keep v beside u, and use the stored pair without iterating where the call stores
        nothing, as PyTorch's eval does. The collection is then no longer flax's.
      scale_init: of the learned scale: "one", or "sigma" for the scale that gives back the raw
        kernel at the start.

    Raises:
      ValueError, TypeError: when it is called, as ``__call__`` says; ``layer_instance`` no module.

    Example:
      >>> model = SpectralNorm(nn.Dense(4))
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, updates = model.apply(variables, x, mutable=["batch_stats"])     # training
      >>> y = model.apply(variables, x)                                       # eval: frozen
      >>> jax.tree.map(jnp.shape, variables["batch_stats"])
      {'layer_instance/kernel/sigma': (), 'layer_instance/kernel/u': (1, 4)}
    """

    layer_instance: nn.Module
    n_steps: int | None = None
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    bound: _bounds.Norms = 1.0
    mode: Literal["divide", "clip"] = "divide"
    gradient: Literal["through", "stop"] = "through"
    conv: ConvView = "reshape"
    rules: _rules.Rules | None = None
    n_vectors: int = 1
    warmup: int = 15
    use_scale: bool = False
    stateless: bool = False
    store_v: bool = False
    scale_init: Literal["one", "sigma"] = "one"

    @nn.compact
    def __call__(
        self,
        *args: Any,
        update_stats: bool | jax.Array | None = None,
        _method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        """The layer's output with normalized kernels.

        Args:
          *args, **kwargs: for the layer.
          update_stats: store the update; by default whether the collection is mutable. May be
            traced.
          _method: which of the layer's methods to call; ``wrapper.attend(x)`` sets it.

        Returns:
          The layer's output.

        Raises:
          ValueError: ``update_stats=True`` with an immutable or missing collection; no kernel to
            normalize; a kernel whose use cannot be seen; ``n_steps`` < 1.
          TypeError: ``layer_instance`` is no module.
        """
        mutable = not self.stateless and self.is_mutable_collection(self.collection_name)
        if update_stats is None:
            update_stats = mutable
        elif isinstance(update_stats, bool | np.bool_) and update_stats and not mutable:
            raise ValueError(
                f"update_stats=True, but SpectralNorm around {self._layer} is stateless."
                if self.stateless
                else f"update_stats=True, but the collection {self.collection_name!r} is "
                f"immutable: pass mutable=[{self.collection_name!r}] to apply, or "
                "update_stats=False."
            )
        return self._run(_Call(_method, args, kwargs), update_stats)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """The layer's other methods, with normalized kernels, and its plain attributes."""
        layer = self.__dict__.get("layer_instance")
        if name.startswith("_") or not isinstance(layer, nn.Module):
            return super().__getattr__(name)
        kind = type(layer)
        value = inspect.getattr_static(kind, name, None)
        if inspect.isfunction(value) and not hasattr(value, "nowrap"):
            # Bound to this wrapper, since apply(..., method="encode") accepts no other.
            return MethodType(_calling(name), self)
        if value is None and name not in layer.__dict__:
            raise AttributeError(
                f"SpectralNorm around {kind.__name__} has no attribute {name!r}, nor has the "
                "layer a method or field of that name; what its setup makes is raw, and not "
                "handed out."
            )
        value = getattr(layer, name)
        if isinstance(value, nn.Module):
            raise AttributeError(
                f"{name} is a raw submodule of {kind.__name__}, whose kernels SpectralNorm "
                f"normalizes only in calls of {kind.__name__} itself: add a method to it, or take "
                f"layer_instance.{name} for the raw one."
            )
        return value

    @nn.nowrap
    def _steps(self, update_stats) -> int | jax.Array:
        n_steps = self.n_steps or (15 if self.stateless else 1)
        if not self.store_v or self.stateless:
            return n_steps
        return _flax.choice(update_stats, n_steps, 0)

    @property
    def _layer(self) -> str:
        return f"{type(self.layer_instance).__name__} ({self.layer_instance.name})"

    @nn.nowrap
    def _run(self, call, update_stats, written=None):
        if self.n_steps is not None:
            _flax.check_steps(self.n_steps)
        _flax.check_scale_init(self.scale_init, self.use_scale)
        _flax.check_conv(self.conv)
        if not _is_module(self.layer_instance):
            raise TypeError(
                f"SpectralNorm wraps a module such as nn.Dense(4), not {self.layer_instance!r}."
            )
        if _wrapped.get():
            raise ValueError(
                f"SpectralNorm around {self._layer} is inside another SpectralNorm: wrap a layer "
                "once."
            )
        if _trace.looking.get():  # views are of the stored kernels
            return call.on(self.layer_instance)
        token = _wrapped.set(True)
        try:
            return self._run_normalized(call, update_stats, written)
        finally:
            _wrapped.reset(token)

    @nn.nowrap
    def _run_normalized(self, call, update_stats, written):
        layer = self.layer_instance
        if self.is_initializing():
            # This call creates the raw parameters, which the second call below reads.
            with quiet():
                call.on(layer)
        parts = list(_parts(layer))
        variables: dict[str, dict] = {}
        for prefix, part in parts:
            for name, tree in part.variables.items():
                flat = traverse_util.flatten_dict(tree)
                variables.setdefault(name, {}).update({(*prefix, *k): v for k, v in flat.items()})
        flat_params = variables.pop("params", {})
        boxed = {"/".join(key): leaf for key, leaf in flat_params.items()}
        others = {name: traverse_util.unflatten_dict(flat) for name, flat in variables.items()}
        leaves, changed = {}, None
        # If the layer is shared, an earlier call may have baked it already.
        if not any(_value(leaf) is new for leaf in boxed.values() for new in written or ()):
            params = {path: meta.unbox(leaf) for path, leaf in boxed.items()}
            task = "wrap" if written is None else "bake"
            tree = {key: meta.unbox(leaf) for key, leaf in flat_params.items()}
            tree = traverse_util.unflatten_dict(tree)
            found = self._views(params, tree, others, call, task)
            names = (*found.views, *found.at_product)
            bounds = _bounds.by_path(self.bound, dict.fromkeys(names))
            leaves = self._normalized(params, found.views, bounds, update_stats)
            changed = _Changed(self, found.at_product, bounds, update_stats)
        normalized = {path: leaf.scaled for path, leaf in leaves.items()}
        if written is not None:
            written.extend(normalized.values())
        path_of = {id(_value(leaf)): path for path, leaf in boxed.items()}

        raw = []

        def substitute(variables):
            raw.append(variables)
            flat: _Flat = traverse_util.flatten_dict(variables.get("params", {}))
            for key, leaf in flat.items():
                # Flax maps each part of a composite on its own and does not say which part it is.
                path = "/".join(key) if len(parts) == 1 else path_of.get(id(_value(leaf)))
                if path in normalized:
                    w, box = normalized[path], isinstance(leaf, meta.AxisMetadata)
                    flat[key] = leaf.replace_boxed(w) if box else w
            return {**variables, "params": traverse_util.unflatten_dict(flat)}

        def restore(variables):
            return raw.pop(0)  # the parts come in order

        def on_layer(layer):
            return call.on(layer)

        on_layer.method_handler_wrapped = True  # else Flax takes it for a method of the layer
        run = nn.map_variables(
            on_layer,
            "params",
            trans_in_fn=substitute,
            trans_out_fn=restore if written is None else lambda variables: variables,
            init=False,
            # At init a layer that maps its own parameters (nn.WeightNorm) needs to write them.
            mutable=written is not None or self.is_initializing(),
        )
        if written is not None:
            return run(layer)
        paths = {part.path: prefix for prefix, part in parts}
        with nn.intercept_methods(self._intercepted(leaves, changed, paths)):
            return run(layer)

    @nn.nowrap
    def _intercepted(self, leaves, changed, paths):
        """A method interceptor: dense layers scale their products instead of their kernels, and
        kernels that change on the way are normalized at the product.

        Args:
          leaves: path -> Leaf.
          changed: ``_Changed``, of the kernels that change; None for a layer without any.
          paths: module path of each part of the layer -> its path here.
        """

        assert self.scope is not None  # this is inside of a call
        trace_level = self.scope.trace_level

        def intercept(next_fun, args, kwargs, context):
            layer, kind = context.module, stock_kind(context.module)
            inside = next((p for p in paths if layer.path[: len(p)] == p), None)
            # Inside nn.jit and the like, an array from outside would be a leaked tracer.
            here = layer.scope is not None and layer.scope.trace_level == trace_level
            if kind is None or inside is None or not here or context.method_name == "setup":
                return next_fun(*args, **kwargs)
            name, _ = ADAPTERS[kind]
            path = "/".join((*paths[inside], *layer.path[len(inside) :], name))
            if changed is not None and path in changed.views:
                with with_change_at_product(layer, lambda kernel, x: changed(path, kernel)):
                    return next_fun(*args, **kwargs)
            if (
                path in leaves
                and context.method_name == "__call__"
                and type(layer) in DENSE
                and _flax.is_plain_product(layer, DENSE[type(layer)])
            ):
                with with_attribute(layer, "dot_general", _flax.scaled_product(leaves[path])):
                    return next_fun(*args, **kwargs)
            return next_fun(*args, **kwargs)

        return intercept

    @nn.nowrap
    def _scale(self, path, leaf):
        def init(_):
            scale = _flax.raw_scale(leaf)
            scale = scale if self.scale_init == "sigma" else jnp.ones_like(scale)
            return scale.astype(self.param_dtype)

        return self.param(self._key(path, "scale"), init)

    @nn.nowrap
    def _normalized(self, params, views, bounds, update_stats):
        """path -> Leaf; stores the new statistics if told to.

        Args:
          params: path -> kernel, as stored or as it enters its product.
          views: path -> view, of those to normalize.
          bounds: path -> bound.
        """
        state = {path: self._stored(path, params[path], view) for path, view in views.items()}
        leaves = _core.normalized_leaves(
            {path: params[path] for path in views}, state,
            n_steps=self._steps(update_stats), bound={path: bounds[path] for path in views},
            mode=self.mode, gradient=self.gradient,
        )  # fmt: skip
        for path in views:
            if not self.stateless and not self.is_initializing():
                self._store(path, state[path], leaves[path].singular, update_stats)
            if self.use_scale:
                leaves[path] = leaves[path].rescaled(self._scale(path, leaves[path]))
            if self.dtype is not None:
                leaves[path] = leaves[path].cast(self.dtype)
        return leaves

    @nn.nowrap
    def _views(self, params, tree, others, call, task):
        """``_flax.Resolved``: what is normalized as stored, and what where it enters a product."""
        if self.error_on_non_matrix:
            for path, w in params.items():
                if path.rpartition("/")[2] in _rules.WEIGHT_NAMES and w.ndim > 2:
                    raise ValueError(
                        f"{self.layer_instance.name}/{path} has shape {w.shape} and "
                        "error_on_non_matrix is True; leave it False to normalize it."
                    )
        method, args, kwargs = call
        direct = stock_views(self.layer_instance, args, kwargs, self.conv)
        if direct:
            seen: dict[str, set[View | None]] = {path: {view} for path, view in direct.items()}
            uses, beside = _trace.Uses(seen, frozenset(), frozenset(params)), {}
        else:
            # A block of several layers is evaluated abstractly, on a detached copy.
            layer = self.layer_instance.clone(parent=None)
            assert self.scope is not None
            rngs = {name: jax.random.key(0) for name in self.scope.root.rngs}
            # Abstract, so that what changes from call to call is not taken for a constant.
            others = jax.tree.map(jax.typeof, others)
            uses, beside = uses_of_call(layer, tree, others, args, kwargs, self.conv, rngs, method)
        who = f"SpectralNorm around {self._layer}"
        return _flax.resolve(params, uses, beside, self.rules, who, task)

    @nn.nowrap
    def _key(self, path, name):
        return f"{self.layer_instance.name}/{path}/{name}"

    @property
    def _kept(self) -> tuple[str, ...]:
        return ("u", "v", "sigma") if self.store_v else ("u", "sigma")

    @nn.nowrap
    def _stored(self, path, w, view):
        """The state of one kernel: as stored, or u and sigma, and v to be iterated from u."""
        if self.stateless:
            return _core.start_state(w, view, self.n_vectors)
        if not self.has_variable(self.collection_name, self._key(path, "u")):
            if not self.is_mutable_collection(self.collection_name):
                raise ValueError(
                    f"The variables have no {self.collection_name!r} for {self._layer}, which "
                    "SpectralNorm reads: pass them to apply (all that init returned; what bake "
                    "returned is for the model without wrappers), or use stateless=True. Under "
                    f"nn.vmap and nn.scan give variable_axes={{..., {self.collection_name!r}: 0}}; "
                    "put SpectralNorm around nn.RNN and other loops: SpectralNorm(nn.RNN(cell))."
                )
            if not self.has_rng("params"):
                raise ValueError(
                    f"The variables have no {self.collection_name!r} for {self._layer}: pass them "
                    "to apply (all that init returned), or rngs={'params': key} to make them."
                )
            start = _core.init(
                {path: w}, self.make_rng("params"), {re.escape(path): view},
                n_vectors=self.n_vectors, warmup=self.warmup,
            )[path]  # fmt: skip
            for name in self._kept:
                value = jax.lax.stop_gradient(getattr(start, name)).astype(self.param_dtype)
                self.put_variable(self.collection_name, self._key(path, name), value)
        kept = {name: self.get_variable(self.collection_name, self._key(path, name))
                for name in self._kept}  # fmt: skip
        for name, value in kept.items():
            if value is None:
                raise ValueError(
                    f"The collection {self.collection_name!r} has {self._key(path, 'u')} but no "
                    f"{name} beside it: pass all that init returned (with the same store_v)."
                )
        state = _flax.stored_state(w, view, kept["u"], kept["sigma"])
        return dataclasses.replace(state, v=kept["v"]) if self.store_v else state

    @nn.nowrap
    def _store(self, path, old, new, update_stats):
        if self.is_mutable_collection(self.collection_name):
            for name in self._kept:
                value = _flax.choice(update_stats, getattr(new, name), getattr(old, name))
                self.put_variable(self.collection_name, self._key(path, name), value)


def _calling(name: str):
    """A method of the wrapper that calls the layer's method of that name."""

    def method(self, *args, **kwargs):
        return self(*args, _method=name, **kwargs)

    return method


class _Changed:
    """The kernels of one call that are not what is stored, normalized at their products.

    Args:
      wrapper: the SpectralNorm.
      views: path -> view of the kernel that enters the product.
      bounds: path -> bound.
      update_stats: as in the wrapper's call.
    """

    def __init__(self, wrapper, views, bounds, update_stats):
        self.wrapper, self.views, self.bounds = wrapper, views, bounds
        self.update_stats, self.leaves = update_stats, {}

    def __call__(self, path: str, kernel: jax.Array) -> jax.Array:
        view = self.views[path]
        if path in self.leaves:  # one update, however often the layer runs
            return view.scale(kernel, self.leaves[path].factor)
        self.leaves |= self.wrapper._normalized(
            {path: kernel}, {path: view}, self.bounds, self.update_stats
        )
        return self.leaves[path].scaled
