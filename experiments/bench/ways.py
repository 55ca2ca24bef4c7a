"""One step of a model, without and with spectral normalization, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import sn_jax
import sn_jax.linen
from experiments.bench import models

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Step:
    """A step and what it takes."""

    # (params, state, x) -> (loss, new state), to be differentiated.
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    params: Any
    state: Any
    # (params, state) -> state, once and outside the loss; None where the loss does it.
    update: Callable[[Any, Any], Any] | None = None

    def forward(self, params, state, x):
        """The loss and the new state."""
        return self.loss(params, self.update(params, state) if self.update else state, x)

    def gradients(self, params, state, x):
        """The gradients and the new state."""
        state = self.update(params, state) if self.update else state
        return jax.grad(self.loss, has_aux=True)(params, state, x)


def contenders(model: nn.Module, x: jax.Array) -> dict[str, Step]:
    """The same model without SN, and with it in three ways from the same ``u``.

    "sn_jax" is the model, one of ``models``, with spectral_normalize around it; "sn_jax.linen" and
    "flax.linen" wrap its layers.
    """
    plain, ours, flaxs = (
        model.clone(wrap=wrap) for wrap in (models.plain, models.by_sn_jax, models.by_flax)
    )
    # From shapes: their own inits take longer to compile than the steps.
    shapes = jax.eval_shape(flaxs.init, KEY, x)
    params, stats = _random(shapes["params"]), _random(shapes["batch_stats"])
    views = sn_jax.linen.views(plain, {"params": params}, x)
    state = _random(jax.eval_shape(partial(sn_jax.init, rules=views), params, KEY))
    for (*scope, name), u in flatten_dict(stats).items():
        # ("Block_0", "SpectralNorm_2", "Dense_2/kernel/u") is of Block_0/Dense_2/kernel.
        path, _, what = "/".join([*scope[:-1], name]).rpartition("/")
        if what == "u":
            old = state[path]
            state[path] = sn_jax.Singular(u, old.v, old.sigma, old.view)
    return {
        "without": Step(partial(_plain, plain), params, {}),
        "sn_jax.linen": Step(partial(_wrapped, ours), params, stats),
        "sn_jax": Step(partial(_around, plain), params, state, update),
        "flax.linen": Step(partial(_wrapped, flaxs), params, stats),
    }


def _random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(
            rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]) or 1), x.dtype
        ),
        shapes,
    )


def _plain(model, params, state, x):
    return jnp.mean(model.apply({"params": params}, x) ** 2), state


def _wrapped(model, params, stats, x):
    variables = {"params": params, "batch_stats": stats}
    y, updates = model.apply(variables, x, mutable=["batch_stats"])
    return jnp.mean(y**2), updates["batch_stats"]


def update(params, state, n_steps: int = 1):
    """The state after so many steps of power iteration."""
    return sn_jax.spectral_normalize(params, state, n_steps=n_steps)[1]


def _around(model, params, state, x):
    normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
    return jnp.mean(model.apply({"params": normalized}, x) ** 2), state
