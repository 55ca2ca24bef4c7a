"""Spectral normalization for Flax NNX: whole-model views, a drop-in wrapper, and export."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from sn_jax import _core, _flax, _trace
from sn_jax._views import Matrix, Scaled, View

ConvView = Literal["reshape", "operator"]


def views(
    model: nnx.Module,
    *args: Any,
    conv: ConvView = "reshape",
    rules: _core.Rules | None = None,
    **kwargs: Any,
) -> dict[str, View]:
    """How every kernel of an NNX model acts, with the strides, padding and sizes it runs at.

    One abstract evaluation of ``model(*args, **kwargs)`` on a copy: nothing is computed and the
    model is not changed. Layers stacked by ``nnx.scan`` and ``nnx.vmap`` get their stacking axis
    as a batch axis. Made for ``wrap``, and for ``sn_jax.init(nnx.state(model, nnx.Param), ...)``.

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

    Returns:
      dict: path, such as ``layers/0/kernel`` -> view; a set of rules.

    Raises:
      ValueError: parameters named kernel, w, weight or embedding (all at once) are not seen, act
        in two ways, or change on their way to the product other than by constants (LoRA, too);
        the ways out are ``rules`` and, for the last, ``SpectralNorm``.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> conv, dense = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
      >>> for path, view in views(nnx.Sequential(conv, dense), jnp.ones((1, 8, 8, 3))).items():
      ...     print(path, view)
      layers/0/kernel Matrix(in_axes=(0, 1, 2), out_axes=(3,))
      layers/1/kernel Matrix(in_axes=(0,), out_axes=(1,))
    """
    graphdef, state = nnx.split(model)
    params = _params(state)
    uses, beside = _uses(graphdef, state, args, kwargs, conv, "__call__", constants=True)
    return _flax.resolve(params, uses, beside, rules, "sn_jax.nnx.views").views


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _array(v: Any) -> jax.Array:
    """The array (or its type) of a variable, or of an attribute that is one."""
    raw = _raw(v)
    return v[...] if isinstance(v, nnx.Variable) and isinstance(raw, jax.Array) else raw


def _with_array(v: Any, array: jax.Array) -> Any:
    return v.replace(array) if isinstance(v, nnx.Variable) else array


def _told(v: nnx.Variable) -> nnx.Variable:
    """A variable that notes, where it is read, which axes its reader knows of."""
    hooks = v.get_metadata().get("on_get_value", ())
    hooks = hooks if isinstance(hooks, tuple) else (hooks,)
    return v.replace(on_get_value=(_note_axes, *hooks))


def _note_axes(_, value):
    return _trace.seen_as(value)


def _params(state: nnx.State) -> dict[str, jax.Array]:
    return {_name(path): _array(v) for path, v in nnx.to_flat_state(state)
            if isinstance(v, nnx.Param)}  # fmt: skip


def _uses(graphdef, state, args, kwargs, conv, method, *, constants: bool):
    """How a call of a model's method uses its parameters, and what layers made from stock ones
    have beside kernels.

    Args:
      graphdef, state: the model; nothing in it is changed.
      args, kwargs: of the call.
      conv: as in ``views``.
      constants: whether arrays that are no parameters (masks, statistics) keep their values.
    """
    variables = {_name(path): (path, v) for path, v in nnx.to_flat_state(state)}
    leaves = {name: _array(v) for name, (_, v) in variables.items() if isinstance(v, nnx.Param)}
    others = {name: _array(v) for name, (_, v) in variables.items() if name not in leaves}
    arrays, rebuild = _trace.split_arrays(args, kwargs)
    weights = _flax.weight_paths(leaves)
    beside: dict[str, str] = {}

    def call(leaves, traced):
        arrays, known = traced
        values = {**(others if constants else known), **leaves}
        flat = [(path, _with_array(v, values[name])) for name, (path, v) in variables.items()]
        flat = [(path, _told(v) if _name(path) in weights else v) for path, v in flat]
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        for path, layer in nnx.iter_modules(model):
            kind = _kind(layer)
            if isinstance(layer, nnx.LoRA) or (kind is not None and type(layer) is not kind):
                beside.update(_beside_kernel(path, layer))
            if kind is not None:
                name = _name((*path, _ADAPTERS[kind].name))
                _at_product(layer, _mark(layer, kind, conv, name))
        args, kwargs = rebuild(arrays)
        outputs = getattr(model, method)(*args, **kwargs), nnx.state(model)
        return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

    known = {} if constants else others
    return _trace.uses_of(call, leaves, weights, (arrays, known)), beside


def _kind(layer: nnx.Module) -> type | None:
    """The stock layer that ``layer`` is, or is made from."""
    return next((kind for kind in _ADAPTERS if isinstance(layer, kind)), None)


def _beside_kernel(path, layer) -> dict[str, str]:
    """Paths of what a layer made from a stock one has beside kernel and bias, with its name."""
    own = ("kernel",), ("embedding",), ("bias",)
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {_name((*path, *key)): type(layer).__name__ for key, _ in flat if key not in own}


def _mark(layer, kind, conv, name):
    # Plain attributes only: the layer itself would be a leaked reference to its arrays.
    static = SimpleNamespace(**{key: value for key, value in vars(layer).items()
                                if not isinstance(value, nnx.Variable | jax.Array)})  # fmt: skip
    adapter = _ADAPTERS[kind].view

    def mark(kernel, x):
        view = adapter(static, _flax.input_size(static, x), conv)
        return _trace.seen_as(kernel) if view is None else _trace.tag(kernel, view, name)

    return mark


def _at_product(layer: nnx.Module, change) -> None:
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


_ADAPTERS = {
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


def _is_known(layer: nnx.Module) -> bool:
    """Whether a layer is Flax's own and multiplies by what it stores: no trace is needed."""
    if type(layer) in _ADAPTERS:
        return all(
            any(getattr(layer, name, None) is value for value in (None, *stock))
            for name, stock in _STOCK_PRODUCTS.items()
        )
    return type(layer).__module__.startswith("flax.nnx") and not isinstance(layer, nnx.WeightNorm)


# Attributes by which a layer's product can be its own, and their values that are Flax's.
_STOCK_PRODUCTS = dict.fromkeys(_core.PRODUCT, ()) | {
    "promote_dtype": (promote_dtype,),
    "dot_general": (jax.lax.dot_general,),
    "conv_general_dilated": (jax.lax.conv_general_dilated,),
}


def _lora_groups(model: nnx.Module) -> dict[str, tuple[str | None, str, str]]:
    """Path of the state -> paths (kernel, a, b) of the layers that act as kernel + a b."""
    groups, inside = {}, set()
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.LoRALinear):
            a, b = (_name((*path, "lora", name)) for name in ("lora_a", "lora_b"))
            groups[_name((*path, "kernel"))] = _name((*path, "kernel")), a, b
            inside.add(a)
        elif isinstance(layer, nnx.LoRA):
            a, b = (_name((*path, name)) for name in ("lora_a", "lora_b"))
            base, kernel = layer.base_module, _name((*path, "base_module", "kernel"))
            if base is None:
                groups[b] = None, a, b
            elif type(base) is nnx.Linear:
                groups[kernel] = kernel, a, b
            else:
                raise ValueError(
                    f"SpectralNorm: the LoRA {_name(path) or 'at the root'} adds to a "
                    f"{type(base).__name__}, and the norm of the sum is not seen; normalize an "
                    "nnx.Linear with LoRA, or merge the adapter into the model first."
                )
    # A LoRALinear holds a LoRA without a base.
    return {name: group for name, group in groups.items() if group[0] or group[1] not in inside}


class SpectralStat(nnx.BatchStat):
    """State of spectral normalization (``u`` or ``sigma``).

    A BatchStat to every existing filter and loop; a type of its own, so that averages of the
    batch statistics can leave it out.
    """


class SpectralNorm(nnx.Module):
    """A layer whose kernels are divided by their spectral norms at every call.

    A drop-in for ``flax.nnx.SpectralNorm`` that never writes to a Param: the layer runs on a
    copy with normalized kernels, in training and in eval. Miyato et al. (2018), algorithm 1.
    Biases are left alone. A kernel that its layer changes on the way to the product (masks, weight
    standardization, ``nnx.WeightNorm``) is normalized there, and LoRA layers as kernel + a b; the
    first call of such a layer takes ``warmup`` steps. In training (``.train()``) a call stores
    ``n_steps`` of power iteration; in eval it computes the same and stores nothing.

    Args:
      layer_instance: any module: ``nnx.Linear``, attention, a recurrent cell, a whole model. Its
        attributes and methods are this module's too.
      n_steps: power-iteration steps per call, >= 1; None is 1, or 15 if stateless.
      epsilon: accepted for flax's sake; no floor is needed.
      dtype: of the normalized kernel; None keeps the kernel's own.
      param_dtype: of the stored ``u`` and ``sigma``.
      error_on_non_matrix: raise for kernels with more than 2 axes.
      update_stats: start in training mode.
      rngs: its ``params`` stream gives the start.
      bound, mode, gradient: as in ``sn_jax.spectral_normalize``.
      rules: path in the layer -> view or None; from ``views`` for stacked layers and for
        convolutions as operators, which a layer that has not yet run does not tell.
      n_vectors, warmup: as in ``sn_jax.init``.
      use_scale: multiply each normalized kernel by a learned scale, initially 1 (the gamma of
        sigma-Reparam, Zhai et al. 2023).
      stateless: iterate from a fixed start at every call, without a state.

    Raises:
      ValueError: no kernel to normalize, or one whose use cannot be seen; ``n_steps`` < 1.

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
        bound: float = 1.0,
        mode: Literal["divide", "clip"] = "divide",
        gradient: Literal["through", "stop"] = "through",
        rules: _core.Rules | None = None,
        n_vectors: int = 1,
        warmup: int = 15,
        use_scale: bool = False,
        stateless: bool = False,
    ):
        what = f"SpectralNorm around {type(layer_instance).__name__}"
        if not isinstance(layer_instance, nnx.Module):
            raise TypeError(
                f"SpectralNorm wraps a module such as nnx.Linear, not {layer_instance!r}."
            )
        if n_steps is not None and n_steps < 1:
            raise ValueError(
                f"SpectralNorm needs n_steps >= 1, got {n_steps}; without the wrapper the layer is "
                "left alone."
            )
        if any(isinstance(layer, SpectralNorm) for _, layer in nnx.iter_modules(layer_instance)):
            raise ValueError(f"{what}, which holds a SpectralNorm already: wrap a layer once.")
        self.layer_instance = layer_instance
        self.n_steps = n_steps or (15 if stateless else 1)
        self.epsilon, self.dtype, self.param_dtype = epsilon, dtype, param_dtype
        self.bound, self.mode, self.gradient = bound, mode, gradient
        self.n_vectors, self.stateless = n_vectors, stateless
        # The name that flax's .train() and .eval() set on modules.
        self.use_running_average = not update_stats

        params = _params(nnx.state(layer_instance, nnx.Param))
        found = {}
        for path, layer in nnx.iter_modules(layer_instance):
            kind = _kind(layer)
            key = _name((*path, _ADAPTERS[kind].name)) if kind else None
            if key not in params:
                continue
            if error_on_non_matrix and params[key].ndim > 2:
                raise ValueError(
                    f"{what}: {key} has shape {params[key].shape} and error_on_non_matrix is "
                    "True; leave it False to normalize it."
                )
            if params[key].ndim == _ADAPTERS[kind].n_axes(layer):  # not stacked
                found[key] = {_ADAPTERS[kind].view(layer, None, "reshape")}
        for key, w in params.items():
            if key in _flax.weight_paths(params) and w.ndim == 2:
                found.setdefault(key, {Matrix()})
        self.loras = tuple(sorted(_lora_groups(layer_instance).items()))
        found |= {key: {_LORA} for key, _ in self.loras}
        uses = _trace.Uses(found, frozenset(), frozenset(params))
        resolved = _flax.resolve(params, uses, {}, rules, what).views
        # Where a layer may change its kernel on the way to the product, each call is looked at,
        # unless the rules say how to see every kernel.
        given = _core.compile_rules(rules, params)
        self.known = all(given(path, None) is not None for path in resolved) or all(
            _is_known(layer) for _, layer in nnx.iter_modules(layer_instance)
        )
        self.views = tuple(sorted(resolved.items()))  # hashable: a static attribute
        self.ndims = tuple((path, params[path].ndim) for path in sorted(resolved))
        self.warmup, self.rules = warmup, tuple((rules or {}).items())
        params = self._effective(params)

        state = {}
        if not stateless:
            state = _core.init(params, rngs.params(), resolved, n_vectors=n_vectors, warmup=warmup)
        stats: dict[str, Any] = {}
        for path, singular in state.items():
            node = _descend(stats, path)
            node["u"] = SpectralStat(singular.u.astype(param_dtype))
            # Zero until what enters the product has been seen: the first call warms up then.
            sigma = singular.sigma if self.known else jnp.zeros_like(singular.sigma)
            node["sigma"] = SpectralStat(sigma.astype(param_dtype))
        self.batch_stats = nnx.data(stats)
        scales: dict[str, Any] = {}
        for path, view in self.views if use_scale else ():
            ones = jnp.ones(view.batch_shape(params[path].shape), param_dtype)
            _descend(scales, path)["scale"] = nnx.Param(ones)
        self.scales = nnx.data(scales)

    def set_view(self, use_running_average: bool | None = None, **kwargs) -> dict:
        """For ``nnx.view``.

        Args:
          use_running_average: True for eval, False for training.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs

    def __call__(self, *args, update_stats: bool | jax.Array | None = None, **kwargs):
        """The layer's output with normalized kernels.

        Args:
          *args, **kwargs: for the layer.
          update_stats: store the update; by default whether in training mode.
        """
        return self._run("__call__", args, kwargs, update_stats)

    def __getattr__(self, name: str):
        # Only for names that this module lacks: the layer's attributes and methods.
        if name.startswith("__") or "layer_instance" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        layer = vars(self)["layer_instance"]
        value = getattr(layer, name)
        if inspect.ismethod(value) and value.__self__ is layer:
            return lambda *args, **kwargs: self._run(name, args, kwargs, None)
        return value

    def is_stacked(self) -> bool:
        """Whether this is a stack of wrappers, as ``nnx.vmap`` makes them."""
        params = nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param))
        shapes = {_name(path): v.shape for path, v in params}
        return any(len(shapes[path]) != n_axes for path, n_axes in self.ndims)

    def _run(self, method, args, kwargs, update_stats):
        """A method of the layer, on a copy with normalized kernels."""
        if update_stats is None:
            update_stats = not self.use_running_average
        if _trace.looking.get():  # views are of the stored kernels
            return getattr(self.layer_instance, method)(*args, **kwargs)
        graphdef, state = nnx.split(self.layer_instance)
        variables = dict(nnx.to_flat_state(state))
        seen = self._seen(graphdef, state, args, kwargs, method)
        leaves = self._normalized(variables, seen.views, update_stats)
        replaced = self._replaced(variables, leaves)
        for path, v in variables.items():
            if _name(path) in seen.at_product:  # the layer may write to it, as nnx.WeightNorm does
                replaced[path] = _with_array(v, _array(v))
        before = {path: _raw(v) for path, v in replaced.items()}
        copy = nnx.merge(graphdef, nnx.from_flat_state(list(replaced.items())))
        # Inside other layers nnx.jit and the like may run, where an array from out here is a leak.
        scaled = type(copy) in (*_dense_layers(), nnx.MultiHeadAttention)
        for path, layer in nnx.iter_modules(copy):
            kind, stock = _kind(layer), _dense_layers().get(type(layer))
            name = _name((*path, _ADAPTERS[kind].name)) if kind else None
            if name in seen.at_product:
                _at_product(layer, self._normalizer(name, seen.at_product[name], update_stats))
            elif scaled and stock and name in leaves and _core.is_plain_product(layer, stock):
                layer.dot_general = _core.scaled_product(leaves[name])
        out = getattr(copy, method)(*args, **kwargs)
        # What the call changed (batch statistics, counters, sown values) goes back to the layer.
        changed = [
            (path, v) for path, v in nnx.to_flat_state(nnx.state(copy))
            if replaced.get(path) is variables.get(path) and before.get(path) is not _raw(v)
        ]  # fmt: skip
        if changed:
            nnx.update(self.layer_instance, nnx.from_flat_state(changed))
        return out

    def _seen(self, graphdef, state, args, kwargs, method) -> _flax.Resolved:
        """What this call normalizes, and how."""
        if self.known:
            return _flax.Resolved(dict(self.views), {})
        who = f"SpectralNorm around {type(self.layer_instance).__name__}"
        baking = _baking.get()
        if baking is not None:
            options = method, self.loras, self.rules, "bake", who
            seen = baking[id(self.layer_instance)] = _resolved(
                graphdef, state, args, kwargs, *options
            )
            return seen
        leaves, treedef = jax.tree.flatten((state, args, kwargs))
        types = tuple(jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
        seen = _resolved_types(
            graphdef, types, treedef, method, self.loras, self.rules, "wrap", who
        )
        unknown = {*seen.views, *seen.at_product} - {path for path, _ in self.views}
        if unknown:
            raise ValueError(
                f"{who} has no state for {_core.listed(sorted(unknown))}, which this call uses as "
                "kernels: name them by rules when it is made, with sn_jax.nnx.views(layer, x)."
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
        params = self._effective({_name(path): _array(v) for path, v in variables.items()})
        return {
            name: self._leaf(name, params[name], view, update_stats, warm=isinstance(view, Scaled))
            for name, view in views.items()
        }

    def _effective(self, params):
        """Parameters with kernel + a b in place of what LoRA adds to."""
        sums = {}
        for name, (kernel, a, b) in self.loras:
            product = params[a] @ params[b]
            sums[name] = product if kernel is None else params[kernel] + product
        return {**params, **sums}

    def _leaf(self, name, w, view, update_stats, *, warm: bool) -> _core.Leaf:
        """One normalized kernel; ``warm`` if the stored vectors may be those of another matrix,
        as long as sigma is zero."""
        n_steps, old = self.n_steps, self._stored(name, w, view)
        if warm and not self.stateless and not self.known:
            first = jnp.all(old.sigma == 0)
            n_steps = jnp.where(first, max(n_steps, self.warmup), n_steps)
        bounds = _core.bounds_by_path(self.bound, dict(self.views))
        leaf = _core.normalized_leaves(
            {name: w}, {name: old},
            n_steps=n_steps, bound={name: bounds[name]}, mode=self.mode, gradient=self.gradient,
        )[name]  # fmt: skip
        self._store(name, old, leaf.singular, update_stats)
        if self.scales:
            leaf = leaf.rescaled(_descend(self.scales, name)["scale"][...])
        return leaf if self.dtype is None else leaf.cast(self.dtype)

    def _replaced(self, variables, leaves) -> dict[tuple, Any]:
        """The layer's variables with normalized kernels."""
        scaled = {name: leaf.scaled for name, leaf in leaves.items()}
        loras, arrays = dict(self.loras), {_name(path): _array(v) for path, v in variables.items()}
        for name in loras.keys() & leaves.keys():
            kernel, _, b = loras[name]
            leaf = leaves[name]
            scaled.pop(name)
            for part in filter(None, (kernel, b)):  # kernel + a b, each times the factor
                scaled[part] = leaf.singular.view.scale(arrays[part], leaf.factor)
        return {
            path: _with_array(v, scaled[_name(path)]) if _name(path) in scaled else v
            for path, v in variables.items()
        }

    def _stored(self, name, w, view):
        """The state of one kernel: u and sigma as stored; v to be iterated from u."""
        if self.stateless:
            return _core.start_state(w, view, self.n_vectors)
        stats = _descend(self.batch_stats, name)
        return _core.stored_state(w, view, stats["u"][...], stats["sigma"][...])

    def _store(self, name, old, new, update_stats):
        if not self.stateless and update_stats is not False:
            stats = _descend(self.batch_stats, name)
            for key in ("u", "sigma"):
                stats[key][...] = _core.chosen(update_stats, getattr(new, key), getattr(old, key))


# By the layer's identity what a call of it uses; None where no call is looked at for ``bake``.
_baking: ContextVar[dict[int, _flax.Resolved] | None] = ContextVar("_baking", default=None)
_LORA = Matrix(0, 1)


def _resolved(graphdef, state, args, kwargs, method, loras, rules, task, who) -> _flax.Resolved:
    """What a call normalizes; constants only for "bake", as others may change between calls."""
    constants = task == "bake"
    uses, beside = _uses(graphdef, state, args, kwargs, "reshape", method, constants=constants)
    for _, (_, a, b) in loras:
        beside.pop(a, None)
        beside.pop(b, None)
    seen = _flax.resolve(_params(state), uses, beside, dict(rules), who, task)
    return seen._replace(views={name: _LORA for name, _ in loras} | seen.views)


@lru_cache(maxsize=256)
def _resolved_types(graphdef, types, treedef, *options) -> _flax.Resolved:
    """The same, looked at once for all calls with arrays of these types."""
    return _resolved(graphdef, *treedef.unflatten(types), *options)


def _raw(v: Any) -> Any:
    return v.get_raw_value() if isinstance(v, nnx.Variable) else v


@cache
def _dense_layers() -> dict[type, nnx.Module]:
    """Layers whose products can be scaled instead of their kernels, as Flax makes them."""
    layers = nnx.eval_shape(
        lambda: (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.LinearGeneral(1, 1, rngs=nnx.Rngs(0)))
    )
    return {type(layer): layer for layer in layers}


def _descend(tree, path: str):
    """The node at ``path`` in nested dicts, made where it is not there yet."""
    for key in path.split("/"):
        tree = tree.setdefault(key, {})
    return tree


def wrap(
    model: nnx.Module, rules: _core.Rules | None = None, *, rngs: nnx.Rngs, **options: Any
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
      ValueError: as ``SpectralNorm``.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu)
      >>> wrapped = wrap(model, views(model, jnp.ones((1, 2))), rngs=rngs)
      >>> wrapped(jnp.ones((1, 2))).shape
      (1, 3)
    """
    return SpectralNorm(model, rules=rules, rngs=rngs, **options)


def bake(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """The plain model, without any SpectralNorm, that gives the same outputs in eval.

    Args:
      model: a model with SpectralNorm wrappers anywhere, or wrapped at the root; not changed.
      *args, **kwargs: of a call of the model. Needed where a wrapped layer is not Flax's own and
        no rules say how its kernels act: a call shows that.

    Returns:
      nnx.Module: a copy in which each wrapper is its layer, with kernels ``W / sigma``.

    Raises:
      ValueError: the model holds no SpectralNorm; a layer changes its kernel on the way to the
        product other than by constants, so that no stored kernel gives the same outputs.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(SpectralNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs), nnx.relu)
      >>> model.eval()
      >>> x = jnp.ones((1, 2))
      >>> bool(jnp.allclose(bake(model)(x), model(x)))
      True
    """
    if not any(isinstance(layer, SpectralNorm) for _, layer in nnx.iter_modules(model)):
        raise ValueError(
            f"bake found no sn_jax.nnx.SpectralNorm in this {type(model).__name__}: it is plain."
        )
    copy, seen = nnx.clone(model), {}
    place = {_name(path): id(layer.layer_instance) for path, layer in nnx.iter_modules(copy)
             if isinstance(layer, SpectralNorm)}  # fmt: skip
    if args or kwargs:
        copy.eval()
        token = _baking.set(seen)
        try:
            copy(*args, **kwargs)
        finally:
            _baking.reset(token)

    def plain(path, node):
        if not isinstance(node, SpectralNorm):
            return node
        where = f"bake: the SpectralNorm {_name(path) or 'at the root'}"
        if node.is_stacked():
            raise ValueError(
                f"{where} is a stack made by "
                "nnx.vmap, of which each element normalizes its own kernel: call bake inside "
                "nnx.vmap, nnx.vmap(sn_jax.nnx.bake)(model)."
            )
        if node.loras:
            raise ValueError(
                f"{where} normalizes kernel + a b of LoRA ({', '.join(dict(node.loras))}), which "
                "is no stored kernel: merge the adapter into the kernel first."
            )
        views = dict(node.views)
        if not node.known:
            if place[_name(path)] not in seen:
                raise ValueError(
                    f"{where} is around {type(node.layer_instance).__name__}, which may change a "
                    "kernel before its product: call bake(model, x) with the arguments of a call "
                    "that runs it, or wrap it with rules from sn_jax.nnx.views."
                )
            views = seen[place[_name(path)]].views
        graphdef, state = nnx.split(node.layer_instance)
        variables = dict(nnx.to_flat_state(state))
        variables = node._replaced(variables, node._normalized(variables, views, False))
        return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))

    return nnx.recursive_map(plain, copy)
