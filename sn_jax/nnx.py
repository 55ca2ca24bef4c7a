"""Spectral normalization for Flax NNX: whole-model views, a drop-in wrapper, and export."""

import inspect
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sn_jax import _core, _trace
from sn_jax._views import Matrix, View

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
      ValueError: a parameter named kernel, w, weight or embedding is not seen, or acts in two
        ways; the way out is ``rules``.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> conv, dense = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
      >>> for path, view in views(nnx.Sequential(conv, dense), jnp.ones((1, 8, 8, 3))).items():
      ...     print(path, view)
      layers/0/kernel Matrix(in_axes=(0, 1, 2), out_axes=(3,))
      layers/1/kernel Matrix(in_axes=(0,), out_axes=(1,))
    """
    copy = nnx.clone(model)
    for _, layer in nnx.iter_modules(copy):
        if type(layer) in _ADAPTERS:
            layer.promote_dtype = _Tagging(layer.promote_dtype, layer, conv)
    graphdef, state = nnx.split(copy)
    variables = {_name(path): (path, v) for path, v in nnx.to_flat_state(state)}
    leaves = {name: jax.eval_shape(lambda v=v: v[...]) for name, (_, v) in variables.items()}
    arrays, rebuild = _trace.split_arrays(args, kwargs)

    def call(leaves, arrays):
        flat = [(path, v.replace(leaves[name])) for name, (path, v) in variables.items()]
        args, kwargs = rebuild(arrays)
        nnx.merge(graphdef, nnx.from_flat_state(flat))(*args, **kwargs)

    found = _trace.views_of(call, leaves, arrays)
    params = {name: leaves[name] for name, (_, v) in variables.items() if isinstance(v, nnx.Param)}
    return _core.resolve_views(params, found, rules, "sn_jax.nnx.views")


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


class _Tagging:
    """A layer's ``promote_dtype`` that tags its kernel first.

    It sees the kernel where the layer uses it, inside every transformation. Compared by
    identity: it is a static attribute of a copy that lives for one trace.
    """

    def __init__(self, promote_dtype, layer, conv):
        # Plain attributes only: the layer itself would be a leaked reference to its arrays.
        self.promote_dtype, self.conv = promote_dtype, conv
        self.kind = type(layer)
        self.static = {name: value for name, value in vars(layer).items()
                       if not isinstance(value, nnx.Variable)}  # fmt: skip

    def __call__(self, arrays, **kwargs):
        position = 0 if len(arrays) == 1 else 1  # (embedding,), (query, embedding), (x, kernel, _)
        layer = SimpleNamespace(**self.static)
        adapter, _ = _ADAPTERS[self.kind]
        view = adapter(layer, _spatial(layer, arrays[0]), self.conv)
        if view is not None:
            _trace.tag(arrays[position], view)
        return self.promote_dtype(arrays, **kwargs)


def _spatial(layer, x) -> tuple[int, ...] | None:
    """Spatial size of a convolution's input; ``x`` has been padded for some paddings."""
    kernel_size = getattr(layer, "kernel_size", None)
    if kernel_size is None:
        return None
    kernel_size = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    n = len(kernel_size)
    size = x.shape[-n - 1 : -1]
    if layer.padding in ("CIRCULAR", "REFLECT", "CAUSAL") and not hasattr(
        layer, "transpose_kernel"
    ):
        dilation = layer.kernel_dilation or 1
        dilation = (dilation,) * n if isinstance(dilation, int) else dilation
        reach = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        size = [s - r for s, r in zip(size, reach, strict=True)]
    return tuple(size)


def _dense(layer, size, conv):
    return Matrix(0, 1)


def _linear_general(layer, size, conv):
    b, i, o = (len(x) for x in (layer.batch_axis, layer.in_features, layer.out_features))
    return Matrix(tuple(range(b, b + i)), tuple(range(b + i, b + i + o)))


# View and number of kernel axes, by exact type: a subclass may do anything with its kernel.
_ADAPTERS = {
    nnx.Linear: (_dense, lambda layer: 2),
    nnx.LinearGeneral: (
        _linear_general,
        lambda layer: len((*layer.batch_axis, *layer.in_features, *layer.out_features)),
    ),
    nnx.Einsum: (
        lambda layer, size, conv: _trace.einsum_view(layer.einsum_str),
        lambda layer: len(layer.kernel_shape),
    ),
    nnx.Embed: (_dense, lambda layer: 2),
    nnx.Conv: (partial(_trace.conv_view, transpose=False), lambda layer: 2 + _spatial_ndim(layer)),
    nnx.ConvTranspose: (
        partial(_trace.conv_view, transpose=True),
        lambda layer: 2 + _spatial_ndim(layer),
    ),
}


def _spatial_ndim(layer) -> int:
    return 1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)


class SpectralStat(nnx.BatchStat):
    """State of spectral normalization (``u`` or ``sigma``).

    A BatchStat to every existing filter and loop; a type of its own, so that averages of the
    batch statistics can leave it out.
    """


class SpectralNorm(nnx.Module):
    """A layer whose kernels are divided by their spectral norms at every call.

    A drop-in for ``flax.nnx.SpectralNorm`` that never writes to a Param: the layer runs on a
    copy with normalized kernels, in training and in eval. Miyato et al. (2018), algorithm 1.
    Biases are left alone. In training (``.train()``) a call stores ``n_steps`` of power
    iteration; in eval it computes the same and stores nothing.

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

        params = {_name(path): v[...] for path, v in
                  nnx.to_flat_state(nnx.state(layer_instance, nnx.Param))}  # fmt: skip
        found = {}
        for path, layer in nnx.iter_modules(layer_instance):
            for name in ("kernel", "embedding"):
                key = _name((*path, name))
                if key not in params or type(layer) not in _ADAPTERS:
                    continue
                if error_on_non_matrix and params[key].ndim > 2:
                    raise ValueError(
                        f"{what}: {key} has shape {params[key].shape} and error_on_non_matrix is "
                        "True; leave it False to normalize it."
                    )
                adapter, n_axes = _ADAPTERS[type(layer)]
                if params[key].ndim == n_axes(layer):  # not stacked
                    found[key] = {adapter(layer, None, "reshape")}
        for key, w in params.items():
            if key.rpartition("/")[2] in _core.WEIGHT_NAMES and w.ndim == 2:
                found.setdefault(key, {Matrix()})
        resolved = _core.resolve_views(params, found, rules, what)
        self.views = tuple(sorted(resolved.items()))  # hashable: a static attribute
        self.ndims = tuple((path, params[path].ndim) for path in sorted(resolved))

        state = {}
        if not stateless:
            state = _core.init(params, rngs.params(), resolved, n_vectors=n_vectors, warmup=warmup)
        stats: dict[str, Any] = {}
        for path, singular in state.items():
            node = _descend(stats, path)
            node["u"] = SpectralStat(singular.u.astype(param_dtype))
            node["sigma"] = SpectralStat(singular.sigma.astype(param_dtype))
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
        graphdef, state = nnx.split(self.layer_instance)
        variables = dict(nnx.to_flat_state(state))
        leaves = self._normalized(variables, update_stats)
        for path, leaf in leaves.items():
            variables[path] = variables[path].replace(leaf.scaled)
        before = {path: v.get_raw_value() for path, v in variables.items()}
        copy = nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))
        # Inside other layers nnx.jit and the like may run, where an array from out here is a leak.
        if type(copy) in (*_dense_layers(), nnx.MultiHeadAttention):
            for path, layer in nnx.iter_modules(copy):
                leaf, stock = leaves.get((*path, "kernel")), _dense_layers().get(type(layer))
                if leaf and stock and _core.is_plain_product(layer, stock):
                    layer.dot_general = _core.scaled_product(leaf)
        out = getattr(copy, method)(*args, **kwargs)
        # What the call changed (batch statistics, counters, sown values) goes back to the layer.
        changed = [
            (path, v) for path, v in nnx.to_flat_state(nnx.state(copy))
            if path not in leaves and before.get(path) is not v.get_raw_value()
        ]  # fmt: skip
        if changed:
            nnx.update(self.layer_instance, nnx.from_flat_state(changed))
        return out

    def _normalized(self, variables, update_stats) -> dict[tuple, _core.Leaf]:
        """Path -> Leaf; stores the new state if ``update_stats``."""
        paths = {_name(path): path for path in variables}
        params = {name: variables[paths[name]][...] for name, _ in self.views}
        state = {name: self._stored(name, params[name], view) for name, view in self.views}
        leaves = _core.normalized_leaves(
            params, state,
            n_steps=self.n_steps, bound=self.bound, mode=self.mode, gradient=self.gradient,
        )  # fmt: skip
        for name, _ in self.views:
            self._store(name, state[name], leaves[name].singular, update_stats)
            if self.scales:
                scale = _descend(self.scales, name)["scale"][...]
                leaves[name] = leaves[name].rescaled(scale)
            if self.dtype is not None:
                leaves[name] = leaves[name].cast(self.dtype)
        return {paths[name]: leaf for name, leaf in leaves.items()}

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


def bake(model: nnx.Module) -> nnx.Module:
    """The plain model, without any SpectralNorm, that gives the same outputs in eval.

    Args:
      model: a model with SpectralNorm wrappers anywhere, or wrapped at the root; not changed.

    Returns:
      nnx.Module: a copy in which each wrapper is its layer, with kernels ``W / sigma``.

    Raises:
      ValueError: the model holds no SpectralNorm.

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

    def plain(path, node):
        if not isinstance(node, SpectralNorm):
            return node
        if node.is_stacked():
            raise ValueError(
                f"bake: the SpectralNorm {_name(path) or 'at the root'} is a stack made by "
                "nnx.vmap, of which each element normalizes its own kernel: call bake inside "
                "nnx.vmap, nnx.vmap(sn_jax.nnx.bake)(model)."
            )
        graphdef, state = nnx.split(node.layer_instance)
        variables = dict(nnx.to_flat_state(state))
        for path, leaf in node._normalized(variables, update_stats=False).items():
            variables[path] = variables[path].replace(leaf.scaled)
        return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))

    return nnx.recursive_map(plain, nnx.clone(model))
