"""What spectral normalization adds to a whole train step: against the same step without it."""

from collections.abc import Callable, Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import models
from experiments.bench.timing import Row, compare, interleaved

# width, batch, the part of what flax adds that is aimed at.
CRITICS = [(256, 256, 1.0), (512, 256, 1.0), (1024, 256, 0.7), (2048, 64, 0.4)]


def rows(quick: bool) -> Iterator[list[Row]]:
    """What SN adds here in per cent, and what flax.linen's adds; and the steps' times."""
    for width, batch, target in CRITICS[:1] if quick else CRITICS:
        model = partial(models.Critic, width=width)
        x = jax.random.normal(jax.random.key(1), (batch, width))
        yield added(f"critic, width {width}, batch {batch}", model, x, target)
    if quick:
        return
    ensemble = nn.vmap(
        models.Critic, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
        in_axes=None, axis_size=10,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (256, 256))
    yield added("10 critics, width 256, batch 256", partial(ensemble, width=256), x, 1.0)
    x = jax.random.normal(jax.random.key(1), (4, 197, 768))
    yield added("ViT-B block, 4 x 197 tokens", models.TransformerBlock, x, 0.4)
    images = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
    yield added("SN-GAN discriminator, batch 64", models.Discriminator, images, None, most=1.03)


def added(
    case: str, model: Callable[..., nn.Module], x: jax.Array, target: float | None, most: float = 0
) -> list[Row]:
    """Time the step of ``model(wrap=...)`` on a batch with our SN, flax's and none.

    Args:
      target: the part of what flax adds that is aimed at; or
      most: the largest ratio of our step to the one without.
    """
    wraps = {"plain": models.plain, "ours": models.by_sn_jax, "flax": models.by_flax}
    calls = {name: train_step(model(wrap=wrap), x) for name, wrap in wraps.items()}
    start = interleaved(calls, rounds=1)
    seconds = interleaved(calls, rounds=int(np.clip(20 / start["plain"][0] / 3, 5, 400)))
    percent = {name: 100 * (np.median(seconds[name] / seconds["plain"]) - 1) for name in calls}
    times = {"sn_jax": seconds["ours"], "no SN": seconds["plain"], "flax.linen": seconds["flax"]}
    rows = compare("step", case, times, targets={"no SN": most} if most else None)
    if most:
        return rows
    ratio = float(percent["ours"] / max(percent["flax"], 0.1))
    added = Row("step", case, "% added", float(percent["ours"]), float(percent["flax"]),
                "flax.linen", ratio, target=target)  # fmt: skip
    return [added, *rows]


def train_step(model: nn.Module, x: jax.Array) -> Callable[[], jax.Array]:
    """A compiled step of Adam with everything donated; returns its loss."""
    variables = model.init(jax.random.key(0), x)
    stats, optimizer = variables.get("batch_stats", {}), optax.adam(1e-4)
    state = [variables["params"], stats, optimizer.init(variables["params"])]

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, opt_state, x):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, x, mutable=["batch_stats"])
            return jnp.mean(jnp.square(y - 1)), updates.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, value

    def call():
        *state[:], value = step(*state, x)
        return value

    return call
