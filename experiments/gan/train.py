"""What an SN-GAN run computes: its options, losses, state and step.

Equation numbers are those of Miyato et al. (2018), https://arxiv.org/abs/1802.05957.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array, lax
from jax.sharding import PartitionSpec as P

import sn_jax.linen
from experiments.cli import check_positive, check_seed
from experiments.gan.methods import METHODS, Batch
from experiments.gan.networks import ARCHITECTURES

LATENT = 128  # size of z ~ N(0, I)
EPOCH = 50_000 // 64  # steps in an epoch of CIFAR-10


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

    preset: Literal[
        "demo", "cnn-authors", "resnet", "resnet-authors", "cifar10-cnn", "cifar10-cnn-hinge",
        "cifar10-resnet", "cosgrove",
    ] = "demo"  # fmt: skip
    """Options to start from; those given beside it replace the preset's. The cifar10 ones are the
    paper's headline runs, FID included; cosgrove is Cosgrove's PyTorch code of 2018, on CIFAR-10;
    the others but the demo need a --dataset."""
    dataset: str = "digits"
    """Real images: digits (scikit-learn's of 8x8 pixels, which need no download), mnist,
    fashion-mnist, cifar10, or a folder of images; its sub-folders are the classes."""
    data_dir: Path | None = None
    """Where the files of data sets lie or shall lie; the user's cache if not given."""
    size: int | None = None
    """Side of the images; larger ones are resized, smaller ones padded with zeros.
    By default the first size from theirs on that the networks fit."""
    architecture: Literal["cnn", "resnet", "cnn-authors", "resnet-authors", "cosgrove"] = "cnn"
    """The networks: the paper's, those of the authors' code, or Cosgrove's ResNet."""
    conditional: bool = False
    """Give both networks the labels: projection discriminator, conditional batch normalization."""
    width: int = 16
    """Channels of the first discriminator stage; the paper has 64."""
    steps: int = 3000
    """Generator updates; the paper makes 100000."""
    setting: Literal["A", "B", "C", "D", "E", "F"] = "C"
    """The paper's name for Adam's learning rate, beta1, beta2
    and discriminator updates per generator update.
    A 1e-4 .5 .9 5, B 1e-4 .5 .999 1, C 2e-4 .5 .999 1,
    D 1e-3 .5 .9 5, E 1e-3 .5 .999 5, F 1e-3 .9 .999 5."""
    learning_rate: float | None = None
    """Instead of the setting's."""
    b1: float | None = None
    """Instead of the setting's."""
    b2: float | None = None
    """Instead of the setting's."""
    n_dis: int | None = None
    """Instead of the setting's."""
    schedule: Literal["constant", "linear", "epochs"] = "constant"
    """Of the learning rate; linear goes to 0 at the last step, epochs is times .99 after every
    781 steps, which is an epoch of CIFAR-10 in batches of 64."""
    same_real: bool = False
    """All discriminator updates of a step see the same real images."""
    iterate: Literal["update", "forward"] = "update"
    """When a method iterates on its norms: once before every discriminator update, or before
    every pass through the discriminator, two of an update and the generator's."""
    loss: Literal["hinge", "non-saturating", "wasserstein", "least-squares"] = "hinge"
    """What the two networks minimize."""
    normalization: Literal[
        "sn", "none", "clip", "gp", "wn", "bn", "ln", "orthonormal", "l2", "lasso",
        "sn-regularization", "sn-operator", "sn-gp", "projection",
    ] = "sn"  # fmt: skip
    """What is done to the discriminator: spectral normalization of flattened kernels,
    nothing, weight clipping, gradient penalty, weight / batch / layer normalization,
    a penalty (orthonormality, L2, lasso, spectral norm), spectral normalization of
    convolutions as operators, or with gradient penalty, projection after the update."""
    strength: float | None = None
    """The method's number instead of its default: a penalty's factor, the bound of clip
    and projection."""
    batch_size: int = 64
    """Real images, and as many generated ones, per discriminator update."""
    g_batch_size: int | None = None
    """Generated images per generator update; by default as many."""
    ema: float | None = None
    """Sample from an average of the generator's weights with this decay, such as .9999."""
    flip: bool = False
    """Mirror every real image with probability 1/2."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What the networks compute in; weights, losses and norms are float32, or all float64
    (with JAX_ENABLE_X64=1)."""
    fid: tuple[str, ...] = ()
    """Measure FID at the end, of so many images. paper: 10000 real and 5000 generated ones;
    common: 50000 and 50000; or numbers such as 256/256. On a CPU core an image takes an eighth
    of a second."""
    fid_every: int | None = None
    """Measure the first of these FIDs also at steps that are multiples of this."""
    mesh: str | None = None
    """Devices to spread over: data=4,model=2 splits every batch in four and the channels of the
    kernels in two. By default one device, or all processes' devices along data."""
    seed: int = 0
    """Everything random follows from it: two runs with one seed are the same run."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    minutes: float | None = None
    """Save a checkpoint and exit after so many; --resume continues."""
    out: Path = Path("runs/digits")
    """Output folder."""
    resume: bool = False
    """Continue the run in the output folder (to more steps, if
    they are given), or start it if there is none."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            whole=("width", "steps", "batch_size", "g_batch_size", "n_dis", "log_every",
                   "checkpoint_every"),
            real=("learning_rate", "strength", "minutes"),
        )  # fmt: skip
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to 1, and below 1, got {value}.")
        for name in self.fid:
            if name not in ("paper", "common") and not re.fullmatch(r"\d{2,}/\d{2,}", name):
                raise ValueError(f"fid must be paper, common, or as 256/256, got {name}.")
        if self.fid_every is not None:
            if self.fid_every < 1 or self.fid_every % self.checkpoint_every:
                raise ValueError(
                    f"fid_every must be a multiple of checkpoint_every, {self.checkpoint_every}, "
                    f"got {self.fid_every}."
                )
            if not self.fid:
                raise ValueError("fid_every needs numbers of images: give --fid too.")
        check_seed(self.seed)
        if self.strength is not None and METHODS[self.normalization].strength is None:
            raise ValueError(f"normalization {self.normalization} has no strength.")

    def identity(self) -> dict[str, Any]:
        """The options that decide what is computed; the others only say where and how."""
        elsewhere = {"preset", "data_dir", "fid", "fid_every", "checkpoint_every", "minutes", "out",
                     "resume", "progress"}  # fmt: skip
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}

    def program(self) -> "Config":
        """The options that compiled functions depend on; the others are the defaults."""
        names = ("architecture", "conditional", "width", "normalization", "loss", "batch_size",
                 "flip", "same_real", "iterate", "dtype")  # fmt: skip
        return Config(
            **{name: getattr(self, name) for name in names},
            g_batch_size=self.g_batch_size or self.batch_size,
            ema=None if self.ema is None else 0.0,  # whether, not how long
        )

    def adam(self) -> Setting:
        """The setting, with what is given instead."""
        setting = SETTINGS[self.setting]
        given = {name: getattr(self, name) for name in Setting._fields}
        return setting._replace(**{k: v for k, v in given.items() if v is not None})


# Options that a run starts from. The paper's ResNet (section 4) and the authors' code, whose
# networks are wider before (CNN) or start otherwise (ResNet).
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "cnn-authors": {
        "architecture": "cnn-authors", "width": 64, "steps": 100_000, "setting": "C",
        "out": Path("runs/cnn-authors"),
    },
    "resnet": {
        "architecture": "resnet", "width": 64, "steps": 100_000, "learning_rate": 2e-4, "b1": 0.0,
        "b2": 0.9, "n_dis": 5, "out": Path("runs/resnet"),
    },
    "resnet-authors": {
        "architecture": "resnet-authors", "width": 64, "steps": 50_000, "learning_rate": 2e-4,
        "b1": 0.0, "b2": 0.9, "n_dis": 5, "g_batch_size": 128, "schedule": "linear",
        "out": Path("runs/resnet-authors"),
    },
    # https://github.com/christiancosgrove/pytorch-spectral-normalization-gan: 2000 epochs, hinge.
    "cosgrove": {
        "dataset": "cifar10", "architecture": "cosgrove", "width": 64, "steps": 2000 * 781,
        "learning_rate": 2e-4, "b1": 0.0, "b2": 0.9, "n_dis": 5, "schedule": "epochs",
        "same_real": True, "iterate": "forward", "log_every": 500, "checkpoint_every": 2500,
        "out": Path("runs/cosgrove"),
    },
}  # fmt: skip

# The paper's headline numbers (table 2), FID with 10,000 real and 5,000 generated images: 29.3 and
# 25.5 with the standard CNN; 21.7 with the ResNet, which is trained as the authors' code does it.
_CIFAR10 = {
    "dataset": "cifar10", "log_every": 500, "checkpoint_every": 2500, "fid": ("paper", "common"),
    "fid_every": 10_000,
}  # fmt: skip
_CIFAR10_CNN = {"architecture": "cnn", "width": 64, "steps": 100_000, "setting": "C"} | _CIFAR10
PRESETS |= {
    "cifar10-cnn": {"loss": "non-saturating", "out": Path("runs/cifar10-cnn")} | _CIFAR10_CNN,
    "cifar10-cnn-hinge": {"loss": "hinge", "out": Path("runs/cifar10-cnn-hinge")} | _CIFAR10_CNN,
    "cifar10-resnet": PRESETS["resnet-authors"]
    | {"loss": "hinge", "out": Path("runs/cifar10-resnet")}
    | _CIFAR10,
}


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
    # Eq. 18 without its penalty (Arjovsky et al. 2017).
    "wasserstein": Loss(
        lambda real, fake: jnp.mean(fake) - jnp.mean(real),
        lambda fake: -jnp.mean(fake),
    ),
    # Mao et al. (2017), https://arxiv.org/abs/1611.04076, equation 9 (a = 0, b = c = 1).
    "least-squares": Loss(
        lambda real, fake: jnp.mean((real - 1) ** 2) / 2 + jnp.mean(fake**2) / 2,
        lambda fake: jnp.mean((fake - 1) ** 2) / 2,
    ),
}


def spread(batch: Any) -> Any:
    """A batch's examples, split over the mesh axis "data" if a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, P("data")), batch)


# --- State and step -------------------------------------------------------------------------


class Data(NamedTuple):
    """The real images, on the device or spread over a mesh."""

    images: Array  # uint8, (n, size, size, channels)
    labels: Array  # int32, (n,)
    n: Array | None = None  # where images fill up the last device: those before are real


class State(NamedTuple):
    """All that a run carries from step to step: what a checkpoint holds."""

    step: Array  # generator updates made, int32
    key: Array  # the step's randomness is fold_in(key, step), so that a resumed run is exact
    g_params: Any
    g_stats: Any  # running statistics of the batch normalization
    g_opt: optax.OptState
    g_ema: Any  # averages of g_params and g_stats, or nothing
    d_params: Any  # raw weights, never overwritten by normalized ones
    d_opt: optax.OptState
    d_method: Any  # of the discriminator's normalization: u, v and sigma of every layer for SN


class Hyper(NamedTuple):
    """Numbers that are traced: runs that differ only in them share their compiled functions."""

    adam: Setting
    decay: Array  # of the learning rate, as a fraction of it per step
    epoch_factor: Array  # of the learning rate, after every EPOCH steps
    strength: Array
    ema: Array


class Training(NamedTuple):
    """The functions that a run consists of, all jitted. A state given to a step is donated."""

    init: Callable[[Array], State]
    """A fresh state from a key."""
    shapes: Callable[[Array], State]
    """What ``init`` would return, as shapes and types."""
    step: Callable[[State, Data], tuple[State, dict[str, Array]]]
    """n_dis discriminator updates, a dispatch each, the last one with the generator's; the losses
    of these two."""
    steps: Callable[[State, Data, int], tuple[State, dict[str, Array]]]
    """So many of these steps in one dispatch."""
    sample: Callable[[State, Array, Array], Array]
    """From a state, latents (n, 128) and labels (n,): images (n, h, w, c) in (-1, 1)."""
    spectra: Callable[[State], tuple[dict[str, Array], dict[str, Array]]]
    """The discriminator's estimates of sigma(W), and its normalized kernels, by path."""


def runs_once() -> dict[str, int] | None:
    """Compiler options of a program that is not worth being optimized."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def scaled(images: Array, dtype=jnp.float32) -> Array:
    """From uint8 to [-1, 1], the generator's range."""
    return images.astype(dtype) / 127.5 - 1


def make_training(
    config: Config, image_shape: tuple[int, int, int], n_classes: int = 1
) -> Training:
    """The run's functions for images of shape (size, size, channels)."""
    program = compiled(config.program(), image_shape, n_classes)
    adam, strength = config.adam(), config.strength or METHODS[config.normalization].strength
    hyper = Hyper(
        adam=adam,
        decay=1 / config.steps if config.schedule == "linear" else 0.0,
        epoch_factor=0.99 if config.schedule == "epochs" else 1.0,
        strength=strength or 0.0,
        ema=config.ema or 0.0,
    )
    hyper = jax.tree.map(
        lambda x: np.asarray(x, np.int32 if isinstance(x, int) else np.float32), hyper
    )

    def step(state, data):
        *first, last = (np.int32(i) for i in range(adam.n_dis))
        for i in first:
            state, _ = program.discriminator_step(hyper, state, data, i)
        return program.last_step(hyper, state, data, last)

    return Training(
        init=partial(program.init, hyper),
        shapes=partial(jax.eval_shape, program.init, hyper),
        step=step,
        steps=lambda state, data, n: program.steps(hyper, state, data, np.int32(n)),
        sample=program.sample,
        spectra=program.spectra,
    )


@lru_cache(maxsize=16)
def compiled(program: Config, image_shape: tuple[int, int, int], n_classes: int) -> SimpleNamespace:
    """The functions of all runs whose programs are equal, by name: those of ``Training`` as they
    are before they know their ``Hyper``; ``last_step`` is the last discriminator update of a step,
    and the generator's.

    Args:
      program: of ``Config.program``.
      image_shape, n_classes: as in ``make_training``.
    """
    size, _, channels = image_shape
    method, loss = METHODS[program.normalization], LOSSES[program.loss]
    floats = jnp.promote_types(program.dtype, jnp.float32)  # of all but the networks' insides
    networks = ARCHITECTURES[program.architecture]
    shared = {
        "width": program.width,
        "n_classes": n_classes if program.conditional else 0,
        "dtype": jnp.dtype(program.dtype),
    }
    generator = networks.generator(size, channels, **shared)
    discriminator = networks.discriminator(
        axes=method.axes, kernel_init=method.kernel_init, **shared
    )

    def generate(params, stats, key, n):
        """A training batch of images and their labels, and the batch statistics left behind."""
        z_key, label_key = jax.random.split(key)
        z = jax.random.normal(z_key, (n, LATENT), floats)
        labels = jax.random.randint(label_key, (n,), 0, n_classes)
        z, labels = spread((z, labels))
        variables = {"params": params, "batch_stats": stats}
        images, updates = generator.apply(variables, z, labels, train=True, mutable=["batch_stats"])
        return images, labels, updates["batch_stats"]

    def scores(weights, images, labels):
        return discriminator.apply({"params": weights}, images, labels)

    def updated(hyper, step, grads, opt_state, params):
        rate = hyper.adam.learning_rate * (1 - hyper.decay * step)
        rate *= hyper.epoch_factor ** (step // EPOCH)
        adam = optax.scale_by_adam(hyper.adam.b1, hyper.adam.b2)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.tree.add_scale(params, -rate, updates), opt_state

    adam_init = optax.scale_by_adam().init  # the same for all b1 and b2

    # It runs once: a CPU's time goes into compiling its random numbers, not into drawing them.
    @partial(jax.jit, compiler_options=runs_once())
    def init(hyper, key):
        key, g_key, d_key, method_key = jax.random.split(key, 4)
        labels = jnp.zeros((1,), jnp.int32)
        z, x = jnp.zeros((1, LATENT), jnp.float32), jnp.zeros((1, *image_shape))
        g_variables = generator.init(g_key, z, labels, train=True)
        d_params = discriminator.init(d_key, x, labels)["params"]

        def views(conv):
            return sn_jax.linen.views(discriminator, {"params": d_params}, x, labels, conv=conv)

        d_method = method.init(d_params, method_key, views)
        d_params, d_method = method.project(d_params, d_method, hyper.strength)
        g_params, g_stats = g_variables["params"], g_variables["batch_stats"]
        g_params, g_stats, d_params, d_method = optax.tree.cast(
            (g_params, g_stats, d_params, d_method), floats
        )
        return State(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
            g_params=g_params,
            g_stats=g_stats,
            g_opt=adam_init(g_params),
            # Copies: what is donated with a state must not be in it twice.
            g_ema=jax.tree.map(jnp.copy, (g_params, g_stats)) if program.ema is not None else (),
            d_params=d_params,
            d_opt=adam_init(d_params),
            d_method=d_method,
        )

    def step_key(state, i):
        """Of the i-th update in this step: the generator's is the 0th."""
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), i
        )

    def discriminator_step(hyper, state, data, i):
        data_key, flip_key, fake_key, penalty_key = jax.random.split(step_key(state, i + 1), 4)
        if program.same_real:
            data_key, flip_key, *_ = jax.random.split(step_key(state, 1), 4)
        # The one update of u per discriminator step, from the weights alone, outside the loss.
        d_method = for_real = method.update(state.d_params, state.d_method)
        if program.iterate == "forward":  # another one for the generated images
            d_method = method.update(state.d_params, for_real)
        n = len(data.images) if data.n is None else data.n
        rows = jax.random.randint(data_key, (program.batch_size,), 0, n)
        real, labels = spread((scaled(data.images[rows], floats), data.labels[rows]))
        if program.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(len(real), 1, 1, 1))
            real = jnp.where(mirrored, real[:, :, ::-1], real)
        fake, fake_labels, _ = generate(state.g_params, state.g_stats, fake_key, program.batch_size)

        def objective(params):
            critic = partial(scores, method.apply(params, d_method))
            if program.iterate == "forward":
                of_real = scores(method.apply(params, for_real), real, labels)
                both = of_real, critic(fake, fake_labels)
            else:
                # One pass, in which each half is a batch of its own: it may be normalized over.
                both = jax.vmap(critic)(jnp.stack([real, fake]), jnp.stack([labels, fake_labels]))
            batch = Batch(partial(critic, labels=labels), real, fake, penalty_key)
            return loss.discriminator(*both) + hyper.strength * method.penalty(
                params, d_method, batch
            )

        value, grads = jax.value_and_grad(objective)(state.d_params)
        d_params, d_opt = updated(hyper, state.step, grads, state.d_opt, state.d_params)
        d_params, d_method = method.project(d_params, d_method, hyper.strength)
        return state._replace(d_params=d_params, d_opt=d_opt, d_method=d_method), value

    def generator_step(hyper, state):
        # The discriminator's u stays as its own step left it, unless every pass iterates.
        if program.iterate == "forward":
            state = state._replace(d_method=method.update(state.d_params, state.d_method))
        critic = partial(scores, method.apply(state.d_params, state.d_method))

        def objective(params):
            fake, labels, stats = generate(
                params, state.g_stats, step_key(state, 0), program.g_batch_size
            )
            return loss.generator(critic(fake, labels)), stats

        (value, g_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.g_params)
        g_params, g_opt = updated(hyper, state.step, grads, state.g_opt, state.g_params)
        # Smaller at first, so that the average soon forgets the initial weights.
        decay = jnp.minimum(hyper.ema, (1 + state.step) / (10 + state.step))
        g_ema = ()
        if program.ema is not None:
            g_ema = optax.incremental_update((g_params, g_stats), state.g_ema, 1 - decay)
        return state._replace(
            step=state.step + 1, g_params=g_params, g_stats=g_stats, g_opt=g_opt, g_ema=g_ema
        ), value

    def last_step(hyper, state, data, i):
        state, d_loss = discriminator_step(hyper, state, data, i)
        state, g_loss = generator_step(hyper, state)
        return state, {"loss_d": d_loss, "loss_g": g_loss}

    @partial(jax.jit, donate_argnames="state")
    def steps(hyper, state, data, n):
        def one(_, carry):
            state, _ = carry
            last = hyper.adam.n_dis - 1
            state = lax.fori_loop(
                0, last, lambda i, state: discriminator_step(hyper, state, data, i)[0], state
            )
            return last_step(hyper, state, data, last)

        losses = {"loss_d": jnp.zeros(()), "loss_g": jnp.zeros(())}
        return lax.fori_loop(0, n, one, (state, losses))

    @jax.jit
    def sample(state, z, labels):
        params, stats = state.g_ema if program.ema is not None else (state.g_params, state.g_stats)
        return generator.apply({"params": params, "batch_stats": stats}, z, labels, train=False)

    @jax.jit
    def spectra(state):
        weights = flatten_dict(method.apply(state.d_params, state.d_method), sep="/")
        kernels = {path: w for path, w in weights.items() if w.ndim > 1}
        return method.norms(state.d_params, state.d_method), kernels

    return SimpleNamespace(
        init=init,
        discriminator_step=jax.jit(discriminator_step, donate_argnums=1),
        last_step=jax.jit(last_step, donate_argnums=1),
        steps=steps,
        sample=sample,
        spectra=spectra,
    )
