"""Every network that this repository trains or shows, between a certified bound and an attack.

Weights are as initialized: what is to be seen is that the bound is above what is reached, how far,
and at which cost.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import Array

import sn_jax
from experiments.certify import nets, study
from experiments.cli import markdown
from experiments.gan.evaluate import Classifier
from experiments.gan.networks import ARCHITECTURES
from experiments.transformer.model import Block
from sn_jax.linen import SpectralNorm
from sn_jax.nnx import SpectralNorm as NnxSpectralNorm

ROWS = "models.jsonl"
POINTS, ROUNDS = 8, 12


class Readme(nn.Module):
    """README's discriminator."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.leaky_relu(SpectralNorm(nn.Conv(64, (4, 4), strides=2))(x))
        return SpectralNorm(nn.Dense(1))(x.reshape(len(x), -1))


class Critic(nnx.Module):
    """README's critic."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = NnxSpectralNorm(nnx.Conv(3, 16, (4, 4), strides=2, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(nnx.leaky_relu(self.conv(x)).sum((1, 2)))


class Model(NamedTuple):
    """A network of the repository."""

    make: Callable[[Array], Callable[[Array], Array]]  # from a key to the function
    shape: tuple[int, ...]  # of its argument, a batch of one
    # Of a ball around a normal x, over the length of x, where the constant is asked for; None:
    # in all of space.
    radius: float | None = None
    method: str = "auto"


def _linen(module: nn.Module, shape: tuple[int, ...], *args: Any, first: bool = False, **options):
    """A module; with ``first`` its first result only."""

    def make(key):
        variables = module.init(key, jnp.zeros(shape), *args)
        if first:
            return lambda x: module.apply(variables, x, *args)[0]
        return lambda x: module.apply(variables, x, *args)

    return Model(make, shape, **options)


def _critic(key: Array) -> Callable[[Array], Array]:
    model = Critic(nnx.Rngs(key))
    model.eval()
    return model


def _gan(name: str, size: int, channels: int, width: int, **options) -> Model:
    module = ARCHITECTURES[name].discriminator(width=width)
    return _linen(module, (1, size, size, channels), **options)


MODELS = {
    "demo's discriminator: CNN, 8x8x1, width 16": _gan("cnn", 8, 1, 16),
    # What is too large for "auto" goes up to tight.
    "CNN, 8x8x3, width 64": _gan("cnn", 8, 3, 64, method="tight"),
    "CNN, 16x16x3, width 16": _gan("cnn", 16, 3, 16, method="tight"),
    "CNN, 32x32x3, width 16": _gan("cnn", 32, 3, 16, method="tight"),
    "ResNet, 8x8x3, width 8": _gan("resnet", 8, 3, 8),
    "ResNet, 32x32x3, width 16": _gan("resnet", 32, 3, 16, method="tight"),
    "judge of the samples: 8x8x1": _linen(Classifier(10), (1, 8, 8, 1), first=True),
    "judge of the samples: 28x28x1": _linen(
        Classifier(10), (1, 28, 28, 1), first=True, method="tight"
    ),
    "classifier of the study: 8x8x1": _linen(study.Network(), (1, 8, 8, 1)),
    "README's Discriminator: 16x16x3": _linen(Readme(), (1, 16, 16, 3), method="tight"),
    "README's Critic: 32x32x3": Model(_critic, (1, 32, 32, 3), method="tight"),
    "transformer's block: 8 x 32": _linen(Block(4), (1, 8, 32), None, first=True),
    "the same, within .01 of the length of x": _linen(
        Block(4), (1, 8, 32), None, first=True, radius=0.01
    ),
}  # fmt: skip


def table(out: Path, seed: int = 0, *, progress: bool = False) -> dict[str, dict[str, Any]]:
    """Bound and attack each network.

    Args:
      out: folder of models.jsonl, a row a network; those that are there are not run again.
      seed: of weights, points and attacks.

    Returns:
      Network -> "lower", "upper", its logarithm "log10", "method", the
      "failure_probability", "bounds" by method, "notes", and CPU "seconds" of the bound.
    """
    every = {(name, seed): partial(_measured, MODELS[name], seed) for name in MODELS}
    known = nets.kept(out / ROWS, every, progress=progress)
    return {name: row for (name, _), row in known.items()}


def _measured(model: Model, seed: int) -> dict[str, Any]:
    init_key, x_key = jax.random.split(jax.random.key(seed))
    fn, x = model.make(init_key), jax.random.normal(x_key, model.shape)
    ball = None if model.radius is None else model.radius * float(jnp.linalg.norm(x))
    started = time.process_time()
    bound = sn_jax.lipschitz_bound(fn, x, method=model.method, radius=ball, progress=False)
    seconds = time.process_time() - started
    return {
        "lower": stretched(fn, np.asarray(x), np.random.default_rng(seed), ball),
        "upper": bound.upper,
        "log10": bound.log_upper / math.log(10),
        "method": bound.method,
        "failure_probability": bound.failure_probability,
        "bounds": dict(bound.bounds),
        "notes": list(bound.notes),
        "seconds": seconds,
    }


def stretched(
    fn: Callable[[Array], Array], x: np.ndarray, rng: np.random.Generator, ball: float | None
) -> float:
    """The largest norm of the Jacobian that a search finds: the constant is no smaller.

    Random points first, then moves around the best, from far to near: networks of ReLUs have
    nothing to climb. Rows of a Jacobian are few, and there is no compiled loop, in which a CPU's
    convolutions are slow.

    Args:
      fn, x: the function, and the middle of the points.
      rng: of the points.
      ball: the radius within which they must lie; None: anywhere.
    """

    @jax.jit
    @jax.vmap
    def jacobians(x):
        return jax.jacrev(lambda x: fn(x).ravel())(x).reshape(-1, x.size)

    best, best_at = 0.0, x
    for turn in range(ROUNDS):
        moves = rng.standard_normal((POINTS, *x.shape)).astype(x.dtype)
        if ball is not None:
            moves *= ball / x.size**0.5
        points = best_at + moves * 0.7**turn
        points[0] = best_at
        if ball is not None:
            far = np.linalg.norm((points - x).reshape(POINTS, -1), axis=1)
            shrink = np.minimum(1.0, 0.999 * ball / np.maximum(far, 1e-30)).astype(x.dtype)
            points = x + (points - x) * shrink.reshape(-1, *[1] * x.ndim)
        norms = np.linalg.norm(np.asarray(jacobians(points)).astype(np.float64), 2, (1, 2))
        if norms.max() > best:
            best, best_at = float(norms.max()), points[norms.argmax()]
    return best


def violations(results: dict[str, dict[str, Any]]) -> list[str]:
    """Networks that stretch more than their bound, by more than the rounding of float32."""
    return [name for name, row in results.items() if not row["lower"] <= row["upper"] * (1 + 1e-4)]


def report(results: dict[str, dict[str, Any]]) -> str:
    """A table in Markdown."""
    rows = [["network", "lower", "upper", "product", "upper / lower", "by",
             "too small with probability", "CPU seconds"]]  # fmt: skip
    for name, row in results.items():
        ratio = row["upper"] / row["lower"] if row["lower"] else math.inf
        numbers = (row["lower"], row["upper"], row["bounds"]["product"], ratio)
        rows.append([name, *(f"{number:.4g}" for number in numbers), row["method"],
                     f"{row['failure_probability']:.2g}", f"{row['seconds']:.1f}"])  # fmt: skip
    return "\n".join(markdown(rows))
