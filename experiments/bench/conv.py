"""The operator view in training: the update of sigma against the layer's own step at batch 64."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sn_jax
from experiments.bench import ways
from experiments.bench.timing import Row, compare, interleaved
from experiments.bench.trees import sn_gan_cnn

BATCH = 64
TARGET = 1 / 20
_update = jax.jit(ways.update, static_argnums=2)
# Kernel, size of the image, stride.
LAYER = [((3, 3, 64, 64), 32, 1)]
# What the standard discriminator's layers see: its 3x3 have stride 1, its 4x4 halve.
SIZES = [32, 32, 16, 16, 8, 8, 4]


def rows(quick: bool) -> Iterator[list[Row]]:
    """One layer, then the whole discriminator's convolutions together."""
    if quick:
        yield from _layers("conv 64->64 3x3, n=16", [((3, 3, 64, 64), 16, 1)], rounds=5)
        return
    shapes = [shape for name, shape in sn_gan_cnn().items() if name.startswith("conv")]
    discriminator = [(shape, n, 2 if shape[0] == 4 else 1)
                     for shape, n in zip(shapes, SIZES, strict=True)]  # fmt: skip
    yield from _layers("conv 64->64 3x3, n=32", LAYER, rounds=7)
    yield from _layers("SN-GAN CNN D", discriminator, rounds=7)


def _layers(case: str, layers: list, rounds: int) -> Iterator[list[Row]]:
    rng = np.random.default_rng(0)
    params = {f"conv_{i}": jnp.asarray(rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])),
                                       jnp.float32)
              for i, (shape, _, _) in enumerate(layers)}  # fmt: skip
    views = {name: sn_jax.Conv((n, n), stride)
             for name, (_, n, stride) in zip(params, layers, strict=True)}  # fmt: skip
    convolve = {name: partial(convolution, stride=stride)
                for name, (_, _, stride) in zip(params, layers, strict=True)}  # fmt: skip
    inputs = {name: jnp.asarray(rng.standard_normal((BATCH, n, n, shape[2])), jnp.float32)
              for name, (shape, n, _) in zip(params, layers, strict=True)}  # fmt: skip
    state = sn_jax.init(params, jax.random.key(0), views)
    check(params, state, convolve)

    @jax.jit
    def layers_step(params, inputs):
        def loss(params, inputs):
            outputs = [convolve[name](inputs[name], w) for name, w in params.items()]
            return sum(jnp.vdot(y, y) for y in outputs)

        return jax.grad(loss, (0, 1))(params, inputs)

    def dispatched(params, state):
        for _ in range(5):
            state = _update(params, state, 1)
        return state

    seconds = interleaved(
        {
            "n_steps=1": partial(_update, params, state, 1),
            "n_steps=5": partial(_update, params, state, 5),
            "n_steps=1, five times": partial(dispatched, params, state),
            "forward + backward": partial(layers_step, params, inputs),
        },
        rounds,
    )
    for ours, peer, target in [
        ("n_steps=1", "forward + backward", TARGET),
        ("n_steps=5", "forward + backward", None),
        # Else XLA is slower inside of the loop than outside, and it should be unrolled.
        ("n_steps=5", "n_steps=1, five times", 1.0),
    ]:
        pair = {name: seconds[name] for name in (ours, peer)}
        targets = {peer: target} if target else None
        yield compare("conv", f"{case}, {ours}", pair, ours=ours, targets=targets,
                      within_spread={"n_steps=1, five times"})  # fmt: skip


def convolution(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
    """The layer: no code of sn_jax."""
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def check(params: dict, state: sn_jax.State, convolve: dict) -> None:
    """Asserts that, a few steps on, the layer itself stretches v by sigma and no noise by more."""
    for _ in range(20):
        state = _update(params, state, 1)
    for name, w in params.items():
        singular = state[name]
        stretched = float(jnp.linalg.norm(convolve[name](singular.v, w)))
        assert abs(stretched / float(singular.sigma) - 1) < 1e-3, f"{name}: {stretched}"
        noise = np.random.default_rng(0).standard_normal(singular.v.shape).astype(np.float32)
        y = convolve[name](jnp.asarray(noise / np.linalg.norm(noise)), w)
        assert float(jnp.linalg.norm(y)) < float(singular.sigma), name
