"""What an SN-GAN run computes: its options, losses, state and step.

Equation numbers are those of Miyato et al. (2018), https://arxiv.org/abs/1802.05957.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax import Array

from experiments.data import Dataset
from experiments.gan.methods import METHODS
from experiments.gan.networks import Discriminator, Generator

LATENT = 128  # size of z ~ N(0, I)


# --- Configuration --------------------------------------------------------------------------


class Setting(NamedTuple):
    """Adam's hyperparameters and the discriminator updates per generator update."""

    learning_rate: float
    b1: float
    b2: float
    n_dis: int


# Table 1 of the paper.
SETTINGS = {
    "A": Setting(1e-4, 0.5, 0.9, 5),
    "B": Setting(1e-4, 0.5, 0.999, 1),
    "C": Setting(2e-4, 0.5, 0.999, 1),
    "D": Setting(1e-3, 0.5, 0.9, 5),
    "E": Setting(1e-3, 0.5, 0.999, 5),
    "F": Setting(1e-3, 0.9, 0.999, 5),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a spectrally normalized GAN (Miyato et al. 2018) on real images, and measure it."""

    dataset: Dataset = "digits"
    """Real images: scikit-learn's 8x8 handwritten digits, which need no download."""
    width: int = 16
    """Channels of the first discriminator stage; the paper has 64."""
    steps: int = 3000
    """Generator updates; the paper makes 100000."""
    setting: Literal["A", "B", "C", "D", "E", "F"] = "C"
    """The paper's name for Adam's learning rate, beta1, beta2
    and discriminator updates per generator update.
    A 1e-4 .5 .9 5, B 1e-4 .5 .999 1, C 2e-4 .5 .999 1,
    D 1e-3 .5 .9 5, E 1e-3 .5 .999 5, F 1e-3 .9 .999 5."""
    loss: Literal["hinge", "non-saturating"] = "hinge"
    """What the two networks minimize."""
    normalization: Literal["sn", "none"] = "sn"
    """What is done to the discriminator's weights: spectral normalization, or nothing."""
    batch_size: int = 64
    """Real images, and as many generated ones, per update."""
    seed: int = 0
    """Everything random follows from it: two runs with one seed are the same run."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    out: Path = Path("runs/digits")
    """Output folder."""
    resume: bool = False
    """Continue the run in the output folder (to more steps, if
    they are given), or start it if there is none."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}.")

    def identity(self) -> dict[str, Any]:
        """The options that decide what is computed; the others only say where and how."""
        elsewhere = {"checkpoint_every", "out", "resume", "progress"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}


# --- Losses ---------------------------------------------------------------------------------


class Loss(NamedTuple):
    """Both are minimized, over scores of shape (n,)."""

    discriminator: Callable[[Array, Array], Array]
    """From the scores of real and of generated images."""
    generator: Callable[[Array], Array]
    """From the scores of generated images."""


LOSSES = {
    # Eqs. 16 and 17, negated.
    "hinge": Loss(
        lambda real, fake: jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)),
        lambda fake: -jnp.mean(fake),
    ),
    # Eq. 1 with D = sigmoid(score); the generator maximizes log D(G(z)).
    "non-saturating": Loss(
        lambda real, fake: jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)),
        lambda fake: jnp.mean(jax.nn.softplus(-fake)),
    ),
}


# --- State and step -------------------------------------------------------------------------


class State(NamedTuple):
    """All that a run carries from step to step: what a checkpoint holds."""

    step: Array  # generator updates made, int32
    key: Array  # the step's randomness is fold_in(key, step), so that a resumed run is exact
    g_params: Any
    g_stats: Any  # running statistics of the batch normalization
    g_opt: optax.OptState
    d_params: Any  # raw weights, never overwritten by normalized ones
    d_opt: optax.OptState
    d_method: Any  # of the discriminator's normalization: u, v and sigma of every layer for SN


class Training(NamedTuple):
    """The functions that a run consists of, all jitted."""

    init: Callable[[Array], State]
    """A fresh state from a key."""
    step: Callable[[State, Array, int], tuple[State, dict[str, Array]]]
    """From a state, which is donated, and uint8 images (n, h, w, c): so many steps in one
    dispatch, each one generator update and its n_dis discriminator updates; the last's losses."""
    sample: Callable[[State, Array], Array]
    """From a state and latents (n, 128): images (n, h, w, c) in (-1, 1)."""
    spectra: Callable[[State], tuple[dict[str, Array], dict[str, Array]]]
    """The discriminator's estimates of sigma(W), and its normalized kernels, by path."""


def scaled(images: Array) -> Array:
    """From uint8 to float32 in [-1, 1], the generator's range."""
    return images.astype(jnp.float32) / 127.5 - 1


def make_training(config: Config, image_shape: tuple[int, int, int]) -> Training:
    """Build the run's functions for images of shape (size, size, channels)."""
    size, _, channels = image_shape
    generator = Generator(size, channels, config.width)
    discriminator = Discriminator(config.width)
    method = METHODS[config.normalization]
    loss = LOSSES[config.loss]
    setting = SETTINGS[config.setting]
    adam = optax.adam(setting.learning_rate, setting.b1, setting.b2)

    def generate(params, stats, key):
        """A training batch of images, and the batch statistics that it leaves behind."""
        z = jax.random.normal(key, (config.batch_size, LATENT), jnp.float32)
        variables = {"params": params, "batch_stats": stats}
        images, updates = generator.apply(variables, z, train=True, mutable=["batch_stats"])
        return images, updates["batch_stats"]

    def score(params, method_state, images):
        return discriminator.apply({"params": method.apply(params, method_state)}, images)

    # It runs once: the time goes into compiling its random numbers, not into drawing them.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def init(key):
        key, g_key, d_key, method_key = jax.random.split(key, 4)
        g_variables = generator.init(g_key, jnp.zeros((1, LATENT), jnp.float32), train=True)
        d_params = discriminator.init(d_key, jnp.zeros((1, *image_shape), jnp.float32))["params"]
        return State(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
            g_params=g_variables["params"],
            g_stats=g_variables["batch_stats"],
            g_opt=adam.init(g_variables["params"]),
            d_params=d_params,
            d_opt=adam.init(d_params),
            d_method=method.init(d_params, method_key),
        )

    def discriminator_step(state, images, key):
        data_key, z_key = jax.random.split(key)
        # The one update of u per discriminator step, from the weights alone, outside the loss.
        d_method = method.update(state.d_params, state.d_method)
        rows = jax.random.randint(data_key, (config.batch_size,), 0, len(images))
        real = scaled(images[rows])
        fake, _ = generate(state.g_params, state.g_stats, z_key)

        def objective(params):
            scores = score(params, d_method, jnp.concatenate([real, fake]))
            return loss.discriminator(*jnp.split(scores, 2))

        value, grads = jax.value_and_grad(objective)(state.d_params)
        updates, d_opt = adam.update(grads, state.d_opt)
        d_params = optax.apply_updates(state.d_params, updates)
        return state._replace(d_params=d_params, d_opt=d_opt, d_method=d_method), value

    def generator_step(state, key):
        def objective(params):
            fake, stats = generate(params, state.g_stats, key)
            # The discriminator's u stays as its own step left it.
            return loss.generator(score(state.d_params, state.d_method, fake)), stats

        (value, g_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.g_params)
        updates, g_opt = adam.update(grads, state.g_opt)
        g_params = optax.apply_updates(state.g_params, updates)
        return state._replace(g_params=g_params, g_stats=g_stats, g_opt=g_opt), value

    def one_step(state, images):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        *d_keys, g_key = jax.random.split(key, setting.n_dis + 1)
        for d_key in d_keys:  # unrolled: convolutions in a compiled loop are slow on a CPU
            state, d_loss = discriminator_step(state, images, d_key)
        state, g_loss = generator_step(state, g_key)
        return state._replace(step=state.step + 1), {"loss_d": d_loss, "loss_g": g_loss}

    @partial(jax.jit, static_argnames="length", donate_argnames="state")
    def step(state, images, length):
        if length == 1:
            return one_step(state, images)
        state, losses = jax.lax.scan(lambda s, _: one_step(s, images), state, length=length)
        return state, jax.tree.map(lambda x: x[-1], losses)

    @jax.jit
    def sample(state, z):
        variables = {"params": state.g_params, "batch_stats": state.g_stats}
        return generator.apply(variables, z, train=False)

    @jax.jit
    def spectra(state):
        weights = flatten_dict(method.apply(state.d_params, state.d_method), sep="/")
        kernels = {path: w for path, w in weights.items() if w.ndim > 1}
        return method.norms(state.d_params, state.d_method), kernels

    return Training(init, step, sample, spectra)
