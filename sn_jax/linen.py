"""Spectral normalization for Flax linen."""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from sn_jax import _core, _power
from sn_jax._views import Matrix


class SpectralNorm(nn.Module):
    """A layer whose kernel is divided by its spectral norm at every call.

    Miyato et al. (2018), algorithm 1, with convolutions flattened to (kh * kw * in, out) as in
    the paper. The raw parameters are never written: ``params`` holds what the optimizer set, at
    ``init`` too. The state lies in ``batch_stats`` in flax's own layout, one ``u`` (1, out) and
    one ``sigma`` () per kernel, so that existing train loops and checkpoints work. Biases are
    left alone.

    A call with the collection mutable stores the update (one power iteration); a call with it
    immutable computes the same and stores nothing. ``init`` warms up.

    Attributes:
      layer_instance: the layer, such as ``nn.Dense(64)`` or ``nn.Conv(64, (4, 4))``.
      n_steps: power-iteration steps per call, >= 1.
      epsilon: accepted for flax's sake; vectors are scaled before they are normalized, so that
        no floor is needed and the result does not depend on the kernel's scale.
      dtype: of the normalized kernel; None keeps the kernel's own.
      param_dtype: of the stored ``u`` and ``sigma``.
      error_on_non_matrix: raise for kernels with more than 2 axes instead of flattening them.
      collection_name: where the state is kept.
      bound, mode, gradient: as in ``sn_jax.spectral_normalize``.
      warmup: power-iteration steps at ``init``.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> model = SpectralNorm(nn.Dense(4))
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, updates = model.apply(variables, x, mutable=["batch_stats"])     # training
      >>> y = model.apply(variables, x)                                       # eval: frozen
      >>> jax.tree.map(jnp.shape, variables["batch_stats"])
      {'layer_instance/kernel/sigma': (), 'layer_instance/kernel/u': (1, 4)}
    """

    layer_instance: nn.Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    bound: float = 1.0
    mode: str = "divide"
    gradient: str = "through"
    warmup: int = 15

    @nn.compact
    def __call__(self, *args, update_stats: bool | None = None, **kwargs):
        """The layer's output with normalized kernels.

        Args:
          *args, **kwargs: for the layer.
          update_stats: store the update; by default whether the collection is mutable.

        Raises:
          ValueError: ``update_stats=True`` with an immutable collection; ``n_steps`` < 1.
        """
        if self.n_steps < 1:
            raise ValueError(
                f"SpectralNorm needs n_steps >= 1, got {self.n_steps}; without the wrapper the "
                "layer is left alone."
            )
        mutable = self.is_mutable_collection(self.collection_name)
        if update_stats is None:
            update_stats = mutable
        elif update_stats is True and not mutable:
            raise ValueError(
                f"update_stats=True, but the collection {self.collection_name!r} is immutable: "
                f"pass mutable=[{self.collection_name!r}] to apply, or update_stats=False."
            )
        if self.is_initializing():
            # Creates the raw parameters, which the second call below reads.
            self.layer_instance(*args, **kwargs)

        return nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            trans_in_fn=lambda variables: self._normalized(variables, mutable, update_stats),
            init=False,
            mutable=False,
        )(self.layer_instance)

    def _normalized(self, variables, mutable, update_stats):
        """trans_in_fn of map_variables: {"params": tree} -> the same, normalized."""
        variables = meta.unbox(variables)
        params = traverse_util.flatten_dict(variables.get("params", {}), sep="/")
        views = {path: self._view(path, w.shape) for path, w in params.items()}
        views = {path: view for path, view in views.items() if view is not None}
        if not views:
            raise ValueError(
                f"SpectralNorm around {type(self.layer_instance).__name__} "
                f"({self.layer_instance.name}) finds no kernel to normalize among "
                f"{sorted(params)}; wrap the layers that have one."
            )
        state = {path: self._stored(path, params[path], view) for path, view in views.items()}
        normalized, new_state = _core.spectral_normalize(
            params, state,
            n_steps=self.n_steps, bound=self.bound, mode=self.mode, gradient=self.gradient,
        )  # fmt: skip
        for path in views:
            if not self.is_initializing() and mutable:
                self._store(path, state[path], new_state[path], update_stats)
            if self.dtype is not None:
                normalized[path] = normalized[path].astype(self.dtype)
        return {**variables, "params": traverse_util.unflatten_dict(normalized, sep="/")}

    def _view(self, path, shape):
        name = path.rpartition("/")[2]
        if name not in _core.WEIGHT_NAMES or len(shape) < 2:
            return None
        if self.error_on_non_matrix and len(shape) > 2:
            raise ValueError(
                f"{self.layer_instance.name}/{path} has shape {shape} and error_on_non_matrix "
                "is True; leave it False to flatten all axes but the last."
            )
        return Matrix(tuple(range(len(shape) - 1)), len(shape) - 1)

    def _stored(self, path, w, view):
        """The state of one kernel: u and sigma as stored, v to be iterated from u."""
        key = f"{self.layer_instance.name}/{path}"
        if not self.has_variable(self.collection_name, f"{key}/u"):
            rules = {re.escape(path): view}
            initial = _core.init({path: w}, self.make_rng("params"), rules, warmup=self.warmup)
            for name in ("u", "sigma"):
                value = jax.lax.stop_gradient(getattr(initial[path], name))
                value = value.astype(self.param_dtype)
                self.variable(self.collection_name, f"{key}/{name}", lambda value=value: value)
        u, sigma = (
            self.get_variable(self.collection_name, f"{key}/{name}") for name in ("u", "sigma")
        )
        # v is only a fallback: with it a u that is zero (as flax leaves it after a zero kernel)
        # recovers.
        v = _power.noise(0, (1, *view.domain(w.shape)), self.param_dtype)
        return _core.Singular(u, v, sigma, view)

    def _store(self, path, old, new, update_stats):
        for name in ("u", "sigma"):
            value = jnp.where(update_stats, getattr(new, name), getattr(old, name))
            key = f"{self.layer_instance.name}/{path}/{name}"
            self.put_variable(self.collection_name, key, value)
