"""Spectral normalization for Flax NNX: whole-model views, a drop-in wrapper, and export.

Here belongs what reads a model's variables, runs it with normalized kernels, and writes back.
"""

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import lru_cache, wraps
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from sn_jax import _bounds, _core, _flax, _rules, _trace
from sn_jax._bounds import RmsBound
from sn_jax._flax import ConvView
from sn_jax._nnx import (
    HashableDict,
    Stats,
    Twin,
    array_of,
    described,
    name_of,
    with_array,
)
from sn_jax._nnx_layers import (
    ADAPTERS,
    Method,
    dense_layers,
    is_known,
    lora_groups,
    params_of,
    run_method,
    set_at_product,
    stock_kind,
    uses_of_call,
)
from sn_jax._views import Matrix, Scaled, Values, View

__all__ = [
    "ConvView",
    "Method",
    "SpectralNorm",
    "SpectralStat",
    "bake",
    "load_state",
    "spectral_norms",
    "views",
    "wrap",
]


def views(
    model: nnx.Module,
    *args: Any,
    conv: ConvView = "reshape",
    rules: _rules.Rules | None = None,
    method: Method = "__call__",
    **kwargs: Any,
) -> dict[str, View]:
    """How every kernel of an NNX model acts, with the strides, padding and sizes it runs at.

    One abstract evaluation of ``model(*args, **kwargs)``, or of another method, on a copy: nothing
    is computed and the model is not changed. Layers stacked by ``nnx.scan`` and ``nnx.vmap`` get
    their stacking axis as a batch axis. Made for ``wrap``, and for
    ``sn_jax.init(nnx.state(model, nnx.Param), ...)``.

    The norm is that of the kernel which enters the product: one that is multiplied by constants
    first (a mask, a fixed factor, a variable that is no Param) gets a ``Scaled`` view, one that
    changes in other ways is refused.

    Args:
      model: the model.
      *args, **kwargs: for its call.
      conv: "reshape" sees convolutions flattened to (taps * in, out), as the paper does;
        "operator" as the linear maps that they are at their input's size.
      rules: regular expression -> view or None for parameters that the trace cannot see through
        or that you want seen otherwise, such as per head: ``{r".*/query/kernel": Matrix(0, 2)}``.
      method: what is called: the name of a method, or a function ``method(model, *args)``, such as
        ``lambda model, x: model.decode(model.encode(x))``.

    Returns:
      dict: path, such as ``layers/0/kernel`` -> view; a set of rules.

    Raises:
      ValueError: parameters named kernel, w, weight or embedding (all at once) are not seen, act
        in two ways, or change on their way to the product other than by constants (LoRA, too);
        the ways out are ``rules`` and, for the last, ``SpectralNorm``.
      TypeError: ``model`` is no module.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> conv, dense = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
      >>> for path, view in views(nnx.Sequential(conv, dense), jnp.ones((1, 8, 8, 3))).items():
      ...     print(path, view)
      layers/0/kernel Matrix(in_axes=(0, 1, 2), out_axes=(3,))
      layers/1/kernel Matrix(in_axes=(0,), out_axes=(1,))
    """
    _check_model(model, "views(model, *args)")
    _flax.check_conv(conv)
    graphdef, state = nnx.split(model)
    params = params_of(state)
    uses, beside = uses_of_call(graphdef, state, args, kwargs, conv, method, constants=True)
    return _flax.resolve(params, uses, beside, rules, "sn_jax.nnx.views").views


def _check_model(model: Any, call: str) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"sn_jax.nnx.{call} takes an nnx.Module first, made already: model = "
            f"Model(..., rngs=rngs). It got {described(model)}."
        )


class SpectralStat(nnx.BatchStat[Any]):
    """State of spectral normalization: ``u``, ``sigma`` or ``v`` of one kernel.

    A BatchStat to every existing filter and loop; a type of its own, so that averages of the
    batch statistics can leave it out.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> layer = SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
      >>> others = nnx.All(nnx.BatchStat, nnx.Not(SpectralStat))
      >>> [len(nnx.to_flat_state(nnx.state(layer, kind))) for kind in (SpectralStat, others)]
      [2, 0]
    """


@dataclass(frozen=True)
class _Options:
    """What a SpectralNorm was made with, and what that says of its layer; static and hashable."""

    n_steps: int
    epsilon: float
    dtype: Any
    param_dtype: Any
    bound: Any
    mode: str
    gradient: str
    conv: ConvView
    n_vectors: int
    warmup: int
    stateless: bool
    store_v: bool
    rules: HashableDict
    # True if every kernel enters its product as it is stored, so that no call need be traced.
    known: bool
    views: tuple[tuple[str, View], ...]
    ndims: tuple[tuple[str, int], ...]
    loras: tuple[tuple[str, tuple[str | None, str, str]], ...]

    def __post_init__(self):
        _flax.check_steps(self.n_steps)
        object.__setattr__(self, "bound", _frozen_bound(self.bound))

    def bounds(self) -> Mapping[str, Any]:
        def thawed(bound: Any) -> Any:
            if isinstance(bound, Mapping):
                return {path: thawed(b) for path, b in bound.items()}
            if isinstance(bound, RmsBound):
                return RmsBound(thawed(bound.c))
            return bound.array if isinstance(bound, Values) else bound

        return _bounds.by_path(thawed(self.bound), dict.fromkeys(dict(self.views)))


_OPTIONS = frozenset(field.name for field in fields(_Options))
_CHANGEABLE = {"n_steps", "epsilon", "dtype", "bound", "mode", "gradient", "warmup"}
# Attributes of the wrapper itself. Any other name is looked up on the layer first.
_OWN = {"layer_instance", "batch_stats", "scales", "use_running_average", "_options"}


def _frozen_bound(bound: Any) -> Any:
    """A bound that can be hashed: numbers as floats, arrays Values."""
    if isinstance(bound, Mapping):
        return HashableDict({path: _frozen_bound(b) for path, b in bound.items()})
    if isinstance(bound, RmsBound):
        return RmsBound(_frozen_bound(bound.c))
    if isinstance(bound, Tracer):
        raise TypeError(
            "bound of SpectralNorm is a static option and cannot be traced: give a number, or use "
            "sn_jax.spectral_normalize, which takes a traced one."
        )
    if isinstance(bound, jax.Array | np.ndarray | np.generic):
        return bound.item() if np.ndim(bound) == 0 else Values(np.asarray(bound))
    return bound


class SpectralNorm(nnx.Module):
    """A layer whose kernels are divided by their spectral norms at every call.

    A drop-in for ``flax.nnx.SpectralNorm`` that never writes to a Param: the layer runs on a
    copy with normalized kernels, in training and in eval. Miyato et al. (2018), algorithm 1.
    Biases are left alone. A kernel that its layer changes on the way to the product (masks, weight
    standardization, ``nnx.WeightNorm``) is normalized there, and LoRA layers as kernel + a b; the
    first call of such a layer takes ``warmup`` steps. In training (``.train()``) a call stores
    ``n_steps`` of power iteration; in eval it computes the same and stores nothing.

    The wrapped module behaves as the module: its methods run with normalized kernels, and what a
    call changes (statistics, caches, counters, new attributes, dropout's streams) stays changed.
    Its attributes are this module's, and come before options of the same name:
    ``SpectralNorm(nnx.Linear(...)).dtype`` is the layer's. ``layer_instance`` is the raw layer.

    Args:
      layer_instance: any module: ``nnx.Linear``, attention, a recurrent cell, a whole model.
      n_steps: power-iteration steps per call, >= 1; None is 1, or 15 if stateless.
      epsilon: accepted for flax's sake; no floor is needed.
      dtype: of the normalized kernel; None keeps the kernel's own.
      param_dtype: of the stored ``u`` and ``sigma``.
      error_on_non_matrix: raise for kernels with more than 2 axes.
      update_stats: start in training mode.
      rngs: its ``params`` stream gives the start.
      bound, mode, gradient: as in ``sn_jax.spectral_normalize``.
      conv: "reshape" sees convolutions flattened to (taps * in, out). As linear maps on their
        inputs ("operator") a layer that has not yet run cannot see them: that is given by
        ``rules=sn_jax.nnx.views(layer, x, conv="operator")``.
      rules: path in the layer -> view or None; from ``views`` for stacked layers, too.
      n_vectors, warmup: as in ``sn_jax.init``.
      use_scale: multiply each normalized kernel by a learned scale (the gamma of sigma-Reparam,
        Zhai et al. 2023).
      scale_init: "one", or "sigma" for the scale that gives back the raw kernel at the start.
      stateless: iterate from a fixed start at every call, without a state.
      store_v: keep ``v`` beside ``u``, and take the stored pair in eval, with no iteration:
        ``sigma = <u, W v>``, as torch does. See ``load_state``.

    Raises:
      ValueError: no kernel to normalize, or one whose use cannot be seen; ``n_steps`` < 1; options
        that exclude each other.
      TypeError: no module; rules that are no mapping.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> layer = SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
      >>> y = layer(jnp.ones((2, 3)))
      >>> layer.eval()
      >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, SpectralStat)))
      {'batch_stats': {'kernel': {'sigma': (), 'u': (1, 4)}}}
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int | None = None,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
        bound: _bounds.Norms = 1.0,
        mode: Literal["divide", "clip"] = "divide",
        gradient: Literal["through", "stop"] = "through",
        conv: ConvView = "reshape",
        rules: _rules.Rules | None = None,
        n_vectors: int = 1,
        warmup: int = 15,
        use_scale: bool = False,
        scale_init: Literal["one", "sigma"] = "one",
        stateless: bool = False,
        store_v: bool = False,
    ):
        if not isinstance(layer_instance, nnx.Module):
            raise TypeError(
                "SpectralNorm wraps a module such as nnx.Linear, made already, before it is "
                "called: SpectralNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)(x). It got "
                f"{described(layer_instance)}."
            )
        what = f"SpectralNorm around {type(layer_instance).__name__}"
        if not isinstance(rules, Mapping | None):
            raise TypeError(
                f"{what}: rules map paths to views, such as {{r'.*kernel': sn_jax.Matrix()}}, as "
                f"sn_jax.nnx.views(model, x) returns them; got {described(rules)}."
            )
        if stateless and store_v:
            raise ValueError(
                f"{what}: stateless keeps nothing, and store_v=True keeps v; drop one."
            )
        _flax.check_scale_init(scale_init, use_scale)
        _flax.check_conv(conv)
        if any(isinstance(layer, SpectralNorm) for _, layer in nnx.iter_modules(layer_instance)):
            raise ValueError(f"{what}, which holds a SpectralNorm already: wrap a layer once.")
        self.layer_instance: nnx.Module = layer_instance
        # The name that flax's .train() and .eval() set on modules.
        self.use_running_average: bool = not update_stats

        params = params_of(nnx.state(layer_instance, nnx.Param))
        found, sizes, given = {}, [], _rules.compile_rules(rules, params)
        for path, layer in nnx.iter_modules(layer_instance):
            kind = stock_kind(layer)
            key = name_of((*path, ADAPTERS[kind].name)) if kind else None
            if key not in params:
                continue
            if error_on_non_matrix and params[key].ndim > 2:
                raise ValueError(
                    f"{what}: {key} has shape {params[key].shape} and error_on_non_matrix is "
                    "True; leave it False to normalize it."
                )
            if params[key].ndim == ADAPTERS[kind].n_axes(layer):  # not stacked
                sized = "reshape" if conv == "operator" else conv  # until the rules say
                found[key] = {ADAPTERS[kind].view(layer, None, sized)}
                if conv == "operator" and _flax.spatial_ndim(layer) and given(key, _LORA) is _LORA:
                    sizes.append(key)
        if sizes:
            raise ValueError(
                f'{what}: conv="operator" needs the size of the input of {_rules.listing(sizes)}, '
                "which a layer that has not run does not tell: give "
                'rules=sn_jax.nnx.views(layer, x, conv="operator").'
            )
        for key, w in params.items():
            if key in _flax.weight_paths(params) and w.ndim == 2:
                found.setdefault(key, {Matrix()})
        loras = tuple(sorted(lora_groups(layer_instance).items()))
        found |= {key: {_LORA} for key, _ in loras}
        uses = _trace.Uses(found, frozenset(), frozenset(params))
        resolved = _flax.resolve(params, uses, {}, rules, what).views
        # If a layer may change its kernel on the way to the product, each call is traced, unless
        # the rules say how to see every kernel.
        known = all(given(path, None) is not None for path in resolved) or all(
            is_known(layer) for _, layer in nnx.iter_modules(layer_instance)
        )
        self._options = _Options(
            n_steps=(15 if stateless else 1) if n_steps is None else n_steps,
            epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            bound=bound, mode=mode, gradient=gradient, conv=conv,
            n_vectors=n_vectors, warmup=warmup, stateless=stateless, store_v=store_v,
            rules=HashableDict(rules or {}), known=known, views=tuple(sorted(resolved.items())),
            ndims=tuple((path, params[path].ndim) for path in sorted(resolved)), loras=loras,
        )  # fmt: skip
        params = self._effective(params)

        state = {}
        if not stateless:
            state = _core.init(params, rngs.params(), resolved, n_vectors=n_vectors, warmup=warmup)
        stats, scales = Stats(), Stats()
        for path, singular in state.items():
            node = stats.at(path.split("/"))
            for key in self._stored_fields():
                x = getattr(singular, key)
                # Zero until a call has shown what enters the product; that call warms up.
                x = jnp.zeros_like(x) if key == "sigma" and not known else x
                node[key] = SpectralStat(x.astype(param_dtype))
        self.batch_stats: Stats = nnx.data(stats)
        self.scales: Stats = nnx.data(Stats())
        if use_scale and scale_init == "sigma" and not known:
            raise ValueError(
                f'{what}: scale_init="sigma" needs the kernels as they enter their products, which '
                "only a call of this layer shows: give rules=sn_jax.nnx.views(layer, x), which say "
                "how to see every kernel."
            )
        for path in resolved if use_scale else ():
            view = resolved[path]
            if scale_init == "sigma":
                leaf = self._leaf(path, params[path], view, update_stats=False, warm=False)
                scale = _flax.raw_scale(leaf).astype(param_dtype)
            else:
                scale = jnp.ones(view.batch_shape(params[path].shape), param_dtype)
            scales.at(path.split("/"))["scale"] = nnx.Param(scale)
        self.scales = nnx.data(scales)

    def set_view(self, use_running_average: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        """Switch between training and eval, for ``nnx.view``.

        Args:
          use_running_average: True for eval, False for training; None leaves it.
          **kwargs: options of other modules.

        Returns:
          dict: ``kwargs``, of which none is for this module.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs

    def __call__(
        self, *args: Any, update_stats: bool | jax.Array | None = None, **kwargs: Any
    ) -> Any:
        """The layer's output with normalized kernels.

        Args:
          *args, **kwargs: for the layer.
          update_stats: store the update; by default whether in training mode. May be traced.

        Returns:
          The layer's output.

        Raises:
          ValueError: the layer no longer holds a kernel that it had, uses one that has no state,
            or changes one in a way that is not seen.
        """
        return self._run("__call__", args, kwargs, update_stats)

    def __getattr__(self, name: str) -> Any:
        # Asked only for names that this module lacks. The layer's own come before options.
        if name.startswith("__") or "layer_instance" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        layer = vars(self)["layer_instance"]
        if name in _OPTIONS and not hasattr(layer, name):
            return getattr(vars(self)["_options"], name)
        value = getattr(layer, name)
        if name in vars(layer) or not _is_method(inspect.getattr_static(layer, name, None)):
            return value

        @wraps(value)
        def method(*args, **kwargs):
            return self._run(name, args, kwargs, None)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name.startswith("__") or "_options" not in vars(self):
            super().__setattr__(name, value)
        elif hasattr(self.layer_instance, name):
            setattr(self.layer_instance, name, value)
        elif name in _CHANGEABLE:
            self._options = replace(self._options, **{name: value})
        elif name in _OPTIONS:
            raise AttributeError(
                f"{name} is fixed when a SpectralNorm is made: make a new one around "
                f"{type(self.layer_instance).__name__}, its layer_instance."
            )
        else:
            super().__setattr__(name, value)

    def _is_stacked(self) -> bool:
        """Whether this is a stack of wrappers, as ``nnx.vmap`` makes them."""
        params = nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param))
        shapes = {name_of(path): v.shape for path, v in params}
        return any(len(shapes[path]) != n_axes for path, n_axes in self._options.ndims)

    def _run(self, method, args, kwargs, update_stats):
        """A method of the layer, on a copy with normalized kernels."""
        layer = self.layer_instance
        if update_stats is None:
            update_stats = not self.use_running_average
        if _trace.looking.get():  # views are of the stored kernels
            return getattr(layer, method)(*args, **kwargs)
        graphdef, state = nnx.split(layer)
        variables = dict(nnx.to_flat_state(state))
        missing = {path for path, _ in self._options.ndims} - {name_of(path) for path in variables}
        if missing:
            raise ValueError(
                f"SpectralNorm around {type(layer).__name__} normalizes "
                f"{_rules.listing(sorted(missing))}, which the layer holds no longer under this "
                "path (a shared layer goes by the first of its names): wrap the layer as it is now."
            )
        seen = self._seen(graphdef, state, args, kwargs, method)
        leaves = self._normalized(variables, seen.views, update_stats)
        replaced = self._replaced(variables, leaves)
        for path, v in variables.items():
            if name_of(path) in seen.at_product:  # it may be written to, as by nnx.WeightNorm
                replaced[path] = with_array(v, array_of(v))
        twin = Twin(layer, graphdef, replaced)
        # A layer may run inside nnx.jit or the like, where an array from outside would be a leaked
        # tracer.
        scaled = type(layer) in (*dense_layers(), nnx.MultiHeadAttention)
        part: Any
        for path, part in nnx.iter_modules(twin.copy):
            kind, stock = stock_kind(part), dense_layers().get(type(part))
            name = name_of((*path, ADAPTERS[kind].name)) if kind else None
            if name in seen.at_product:
                set_at_product(part, self._normalizer(name, seen.at_product[name], update_stats))
            elif scaled and stock and name in leaves and _flax.is_plain_product(part, stock):
                part.dot_general = _flax.scaled_product(leaves[name])
        out = twin.run(method, args, kwargs)
        return self if out is layer else out

    def _seen(self, graphdef, state, args, kwargs, method) -> _flax.Resolved:
        """What this call normalizes, and how."""
        options, layer = self._options, self.layer_instance
        if options.known:
            return _flax.Resolved(dict(options.views), {})
        who = f"SpectralNorm around {type(layer).__name__}"
        baking = _baking.get()
        if baking is not None:
            seen = _resolved(graphdef, state, args, kwargs, method, options, "bake", who)
            before = baking.get(id(layer), seen)
            baking[id(layer)] = _flax.Resolved({**before.views, **seen.views}, {})
            return seen
        # NumPy attributes stay constants, since the layer's Python code may read their values.
        state = nnx.from_flat_state([(path, Values(v) if isinstance(v, np.ndarray) else v)
                                     for path, v in nnx.to_flat_state(state)])  # fmt: skip
        leaves, treedef = jax.tree.flatten((state, args, kwargs))
        types = tuple(jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
        call = graphdef, types, treedef, method, options, who
        try:
            hash(call)
        except TypeError:  # a static attribute is a list or the like, which no run shall change
            graphdef = deepcopy(graphdef)
            seen = _resolved_types.__wrapped__(graphdef, *call[1:])
        else:
            seen = _resolved_types(*call)
        unknown = {*seen.views, *seen.at_product} - {path for path, _ in options.views}
        if unknown:
            raise ValueError(
                f"{who} has no state for {_rules.listing(sorted(unknown))}, which this call uses "
                "as kernels: name them by rules when it is made, with sn_jax.nnx.views(layer, x)."
            )
        return seen

    def _normalizer(self, name, view, update_stats):
        """For a kernel that is normalized where it enters its product: kernel, x -> kernel."""
        done = {}

        def normalize(kernel, x):
            if done:  # one update, however often the layer runs
                return view.scale(kernel, done["leaf"].factor)
            done["leaf"] = self._leaf(name, kernel, view, update_stats, warm=True)
            return done["leaf"].scaled

        return normalize

    def _normalized(self, variables, views, update_stats) -> dict[str, _core.Leaf]:
        """Path -> Leaf; stores the new state if ``update_stats``."""
        params = self._effective({name_of(path): array_of(v) for path, v in variables.items()})
        return {
            name: self._leaf(name, params[name], view, update_stats, warm=isinstance(view, Scaled))
            for name, view in views.items()
        }

    def _effective(self, params):
        """Parameters with kernel + a b in place of what LoRA adds to."""
        sums = {}
        for name, (kernel, a, b) in self._options.loras:
            product = params[a] @ params[b]
            sums[name] = product if kernel is None else params[kernel] + product
        return {**params, **sums}

    def _leaf(self, name, w, view, update_stats, *, warm: bool) -> _core.Leaf:
        """One normalized kernel; ``warm`` if the stored vectors may be those of another matrix,
        as long as sigma is zero."""
        options, old = self._options, self._stored(name, w, view)
        n_steps = options.n_steps
        if options.store_v:
            n_steps = _flax.choice(update_stats, n_steps, 0)
        if warm and not options.stateless and not options.known:
            first = jnp.all(old.sigma == 0)
            n_steps = jnp.where(first, max(options.n_steps, options.warmup), n_steps)
        leaf = _core.normalized_leaves(
            {name: w}, {name: old}, n_steps=n_steps, bound={name: options.bounds()[name]},
            mode=options.mode, gradient=options.gradient,
        )[name]  # fmt: skip
        self._store(name, old, leaf.singular, update_stats)
        if self.scales:
            leaf = leaf.rescaled(self.scales.at(name.split("/"))["scale"][...])
        return leaf if options.dtype is None else leaf.cast(options.dtype)

    def _replaced(self, variables, leaves) -> dict[tuple, Any]:
        """The layer's variables with normalized kernels."""
        scaled, loras = {name: leaf.scaled for name, leaf in leaves.items()}, self._options.loras
        arrays = {name_of(path): array_of(v) for path, v in variables.items()}
        for name, (kernel, _, b) in loras:
            if name not in leaves:
                continue
            leaf = leaves[name]
            scaled.pop(name)
            for part in filter(None, (kernel, b)):  # kernel + a b, each times the factor
                scaled[part] = leaf.singular.view.scale(arrays[part], leaf.factor)
        return {
            path: with_array(v, scaled[name_of(path)]) if name_of(path) in scaled else v
            for path, v in variables.items()
        }

    def _stored_fields(self) -> tuple[str, ...]:
        return ("u", "v", "sigma") if self._options.store_v else ("u", "sigma")

    def _stored(self, name, w, view):
        """The state of one kernel: u and sigma as stored; v, too, or to be iterated from u."""
        if self._options.stateless:
            return _core.start_state(w, view, self._options.n_vectors)
        stats = self.batch_stats.at(name.split("/"))
        if self._options.store_v:
            u, v, sigma = (stats[key][...] for key in ("u", "v", "sigma"))
            return _core.Singular(u, v, sigma, view)
        return _flax.stored_state(w, view, stats["u"][...], stats["sigma"][...])

    def _store(self, name, old, new, update_stats):
        if not self._options.stateless and update_stats is not False:
            stats = self.batch_stats.at(name.split("/"))
            for key in self._stored_fields():
                stats[key][...] = _flax.choice(update_stats, getattr(new, key), getattr(old, key))


def _is_method(attribute: Any) -> bool:
    """Whether a class attribute is called with the instance first: functions, also as wrapped by
    nnx.jit and the like."""
    return hasattr(type(attribute), "__get__") and not isinstance(
        attribute, staticmethod | classmethod | property | type
    ) and callable(attribute)  # fmt: skip


# Layer's id -> how its calls use their parameters, while ``bake`` looks at a call; else None.
_baking: ContextVar[dict[int, _flax.Resolved] | None] = ContextVar("_baking", default=None)
_LORA = Matrix(0, 1)


def _resolved(graphdef, state, args, kwargs, method, options, task, who) -> _flax.Resolved:
    """What a call normalizes; constants only for "bake", as others may change between calls."""
    constants = task == "bake"
    uses, beside = uses_of_call(
        graphdef, state, args, kwargs, options.conv, method, constants=constants
    )
    parts = {part for _, group in options.loras for part in group}
    beside = {path: layer for path, layer in beside.items() if path not in parts}
    params = params_of(state)
    kernels = {path for path, _ in options.views} | parts | _flax.weight_paths(params)
    if not uses.changes and not uses.views.keys() & kernels and not uses.read & kernels:
        return _flax.Resolved({}, {})  # as init_cache, which multiplies by nothing
    seen = _flax.resolve(params, uses, beside, options.rules, who, task)
    return seen._replace(views={name: _LORA for name, _ in options.loras} | seen.views)


@lru_cache(maxsize=256)
def _resolved_types(graphdef, types, treedef, method, options, who) -> _flax.Resolved:
    """The same, looked at once for all calls with arrays of these types."""
    state, args, kwargs = treedef.unflatten(types)
    return _resolved(graphdef, state, args, kwargs, method, options, "wrap", who)


def wrap(
    model: nnx.Module, rules: _rules.Rules | None = None, *, rngs: nnx.Rngs, **options: Any
) -> SpectralNorm:
    """One SpectralNorm at the root of a built model: every kernel is normalized at every call.

    Shared layers stay shared; attributes and methods are the model's own.

    Args:
      model: the model, which the wrapper holds and does not change.
      rules: which parameters, seen how; from ``views(model, x)``, or None for what the layers'
        types tell.
      rngs: its ``params`` stream gives the start.
      **options: of ``SpectralNorm``.

    Returns:
      SpectralNorm: the wrapped model.

    Raises:
      ValueError, TypeError: as ``SpectralNorm``.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu)
      >>> wrapped = wrap(model, views(model, jnp.ones((1, 2))), rngs=rngs)
      >>> wrapped(jnp.ones((1, 2))).shape
      (1, 3)
    """
    _check_model(model, "wrap(model, rules)")
    return SpectralNorm(model, rules=rules, rngs=rngs, **options)


def bake(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """The plain model, without any SpectralNorm, that gives the same outputs in eval.

    Args:
      model: a model with SpectralNorm wrappers anywhere, or wrapped at the root; not changed.
      *args, **kwargs: of a call of the model. Needed where a wrapped layer is not Flax's own and
        no rules say how its kernels act: a call shows that. ``method=`` is what is called, as in
        ``views``: it must use all kernels of such layers.

    Returns:
      nnx.Module: a copy in which each wrapper is its layer, with kernels ``W / sigma``.

    Raises:
      ValueError: the model holds no SpectralNorm; a layer changes its kernel on the way to the
        product other than by constants, so that no stored kernel gives the same outputs.
      TypeError: ``model`` is no module.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(SpectralNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs), nnx.relu)
      >>> model.eval()
      >>> x = jnp.ones((1, 2))
      >>> bool(jnp.allclose(bake(model)(x), model(x)))
      True
    """
    _wrappers(model, "bake")
    method = kwargs.pop("method", "__call__")  # a keyword that nnx.vmap(bake) need not resolve
    calls: dict[int, _flax.Resolved] = {}
    seen = {}
    if args or kwargs or method != "__call__":
        copy = nnx.clone(model)  # what the call changes is not baked
        copy.eval()
        token = _baking.set(calls)
        try:
            run_method(copy, method, args, kwargs)
        finally:
            _baking.reset(token)
        seen = {path: calls[id(wrapper.layer_instance)]
                for path, wrapper in _wrappers(copy, "bake").items()
                if id(wrapper.layer_instance) in calls}  # fmt: skip

    def plain(path, node):
        if not isinstance(node, SpectralNorm):
            return node
        where, options = f"bake: the SpectralNorm {name_of(path) or 'at the root'}", node._options
        if node._is_stacked():
            raise ValueError(
                f"{where} is a stack made by "
                "nnx.vmap, of which each element normalizes its own kernel: call bake inside "
                "nnx.vmap, nnx.vmap(sn_jax.nnx.bake)(model)."
            )
        if options.loras:
            raise ValueError(
                f"{where} normalizes kernel + a b of LoRA ({', '.join(dict(options.loras))}), "
                "which is no stored kernel: merge the adapter into the kernel first."
            )
        views = dict(options.views)
        if not options.known:
            layer = type(node.layer_instance).__name__
            if path not in seen:
                raise ValueError(
                    f"{where} is around {layer}, which may change a "
                    "kernel before its product: call bake(model, x) with the arguments of a call "
                    "that runs it, or wrap it with rules from sn_jax.nnx.views."
                )
            unused = sorted(views.keys() - seen[path].views.keys())
            if unused:
                raise ValueError(
                    f"{where} is around {layer}, which may change a kernel before its product, "
                    f"and this call does not use {_rules.listing(unused)}: give a method "
                    "that does, such as method=lambda model, x: model.decode(model.encode(x)), or "
                    "wrap it with rules from sn_jax.nnx.views."
                )
            views = seen[path].views
        graphdef, state = nnx.split(node.layer_instance)
        variables = dict(nnx.to_flat_state(state))
        variables = node._replaced(variables, node._normalized(variables, views, False))
        return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))

    return nnx.recursive_map(plain, nnx.clone(model))


def _wrappers(model: nnx.Module, who: str) -> dict[tuple, SpectralNorm]:
    _check_model(model, f"{who}(model, ...)")
    found = {path: layer for path, layer in nnx.iter_modules(model)
             if isinstance(layer, SpectralNorm)}  # fmt: skip
    if not found:
        raise ValueError(
            f"{who} found no sn_jax.nnx.SpectralNorm in this {type(model).__name__}: it is plain."
        )
    return found


def _kernels(model: nnx.Module, who: str) -> dict[str, tuple[SpectralNorm, str]]:
    """Path in the plain model -> (wrapper, path in its layer), of kernels that have a state."""
    return {
        name_of((*path, name)): (wrapper, name)
        for path, wrapper in _wrappers(model, who).items() if not wrapper._options.stateless
        for name, _ in wrapper._options.views
    }  # fmt: skip


def spectral_norms(model: nnx.Module) -> dict[str, jax.Array]:
    """The spectral norms that a model's wrappers stored at their last updates.

    The flat dict that ``sn_jax.spectral_norms`` gives for parameters, ready for a logger.

    Args:
      model: a model with SpectralNorm wrappers anywhere, or wrapped at the root.

    Returns:
      dict: path in the plain model, that is without ``layer_instance`` -> sigma. It is zero before
      the first call of a layer that may change its kernel on the way to the product.

    Raises:
      ValueError: the model holds no SpectralNorm, or only stateless ones, which store nothing.
      TypeError: ``model`` is no module.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> linear = nnx.Linear(2, 2, kernel_init=nnx.initializers.constant(3.0), rngs=rngs)
      >>> model = nnx.Sequential(SpectralNorm(linear, rngs=rngs), nnx.relu)
      >>> print({path: round(float(sigma), 3) for path, sigma in spectral_norms(model).items()})
      {'layers/0/kernel': 6.0}
    """
    kernels = _kernels(model, "spectral_norms")
    if not kernels:
        raise ValueError(
            "spectral_norms: every SpectralNorm of this model is stateless and stores no sigma; "
            "sn_jax.spectral_norm(kernel, view) computes one."
        )
    return {path: wrapper.batch_stats.at(name.split("/"))["sigma"][...]
            for path, (wrapper, name) in kernels.items()}  # fmt: skip


def load_state(model: nnx.Module, params: _core.Params, state: _core.State) -> None:
    """Put the functional API's parameters and state into a model with wrappers, in place.

    From ``sn_jax.init`` or ``sn_jax.convert.from_torch``, which know the plain model: its paths
    are without ``layer_instance``. With ``store_v=True`` the model then gives torch's outputs in
    eval; other wrappers take ``u`` and sigma, and iterate at every call.

    Args:
      model: a model with SpectralNorm wrappers anywhere, or wrapped at the root.
      params: a pytree with all parameters of the plain model.
      state: path -> Singular, of all kernels that the wrappers normalize, and of no others.

    Raises:
      ValueError: a path is unknown or missing, or a shape or view differs; nothing is changed then.
      TypeError: ``model`` is no module, ``state`` no state.

    Example:
      >>> import sn_jax
      >>> plain = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
      >>> state = sn_jax.init(params, jax.random.key(0))
      >>> model = SpectralNorm(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), store_v=True, rngs=nnx.Rngs(2))
      >>> load_state(model, params, state)
      >>> model.eval()
      >>> normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
      >>> bool(jnp.allclose(model(jnp.eye(2)), normalized["kernel"]))
      True
    """
    kernels, wrappers = _kernels(model, "load_state"), _wrappers(model, "load_state")
    _core.check_state(state, " The order is (model, params, state).")
    leaves, targets = _rules.named_leaves(params), {}
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        (n, key) = next(((n, path[n]) for n in range(len(path)) if path[:n] in wrappers), (0, ""))
        if key != "scales":
            targets[name_of(path[:n] + path[n + 1 :] if key else path)] = v
    for what, given, known in (("params", leaves, targets), ("state", state, kernels)):
        missing, unknown = sorted(known.keys() - given.keys()), sorted(given.keys() - known.keys())
        if missing or unknown:
            raise ValueError(
                f"load_state: {what} needs exactly the paths of the plain model"
                + (f"; missing: {_rules.listing(missing)}" if missing else "")
                + (f"; unknown: {_rules.listing(unknown)}" if unknown else "")
                + "."
            )
    new = [(path, targets[path], leaf) for path, leaf in leaves.items()]
    for path, (wrapper, name) in kernels.items():
        view, ndim = dict(wrapper._options.views)[name], dict(wrapper._options.ndims)[name]
        if not _same_view(view, ndim, state[path].view, targets[path].ndim):
            raise ValueError(
                f"load_state: {path} is seen as {state[path].view} by the state, and as {view} by "
                f"its SpectralNorm: make that with rules={{{name!r}: <the state's view>}}."
            )
        stats = wrapper.batch_stats.at(name.split("/"))
        new += [(f"{key} of {path}", stats[key], getattr(state[path], key)) for key in stats]
    for what, v, x in new:
        if v.shape != jnp.shape(x):
            raise ValueError(
                f"load_state: {what} has shape {jnp.shape(x)}, but in the model {v.shape}."
            )
    for _, v, x in new:
        v[...] = jnp.asarray(x, v.dtype)


def _same_view(view: View, ndim: int, other: View, other_ndim: int) -> bool:
    """Whether views of one element of a stack and of the whole stack, its axes in front, agree."""
    if not (isinstance(view, Matrix) and isinstance(other, Matrix)):
        return view == other
    n = other_ndim - ndim
    batch, *spaces = (tuple(n + axis for axis in axes) for axes in view.axis_groups(ndim))
    return other.axis_groups(other_ndim) == ((*range(n), *batch), *spaces)
