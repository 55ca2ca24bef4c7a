"""Lipschitz constants of trained networks: from what products of norms say to what is certified.

The demo's discriminator is trained with three normalizations, and a classifier of the digits for a
margin; one call of ``sn_jax.lipschitz_bound`` certifies each, and an attack says what is reached.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array
from matplotlib.figure import Figure
from tqdm import tqdm

import sn_jax
from experiments import cli
from experiments.certify import study
from experiments.gan.loop import train as train_gan
from experiments.gan.methods import METHODS
from experiments.gan.networks import ARCHITECTURES
from experiments.gan.run import open_folder, real_images
from experiments.gan.train import Config, scaled
from experiments.pictures import picture

NORMALIZATIONS = {"none": "no normalization", "sn": "flattened SN", "sn-operator": "operator SN"}
# The margin's classifiers: logits over so much enter the cross entropy.
TEMPERATURE = 0.05
ATTACK_STEPS, RESTARTS = 60, 7

# What is shown: key -> (label, whether it bounds the constant, colour).
QUANTITIES = {
    "flattened": ("product of flattened norms", "no bound", "#b8b8b8"),
    "product": ("product of certified norms", "bound, proved", "#9dbbd8"),
    "merged": ("merged", "bound, proved", "#6d9bc9"),
    "upper": ("tightest", "bound, proved", "#27567f"),
    "lower": ("attacked", "the constant is no smaller", "#c4473a"),
}


def discriminators(
    steps: int, seed: int, out: Path, *, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Train the demo's discriminator with each normalization, and bound it from both sides.

    Args:
      steps, seed: of the GAN's training; the demo makes 3,000 steps.
      out: folder of the trainings, each of which continues where it was stopped.

    Returns:
      Name of the normalization -> ``constants``: ``QUANTITIES``, all bounds by method, the table
      that the bound prints as, and its CPU seconds.
    """
    results = {}
    for normalization, name in NORMALIZATIONS.items():
        config = Config(normalization=normalization, steps=steps, seed=seed, resume=True,
                        out=out / normalization, progress=progress)  # fmt: skip
        open_folder(config)
        images = real_images(config).train
        _, state = train_gan(config, images)
        # As the network runs: raw weights by the norms that its last step has estimated.
        params = METHODS[normalization].apply(state.d_params, state.d_method)
        model = ARCHITECTURES[config.architecture].discriminator(width=config.width)
        results[name] = constants(
            lambda x, params=params, model=model: model.apply({"params": params}, x),
            np.asarray(scaled(jnp.asarray(images.images[:1]))), params, seed, progress=progress,
        )  # fmt: skip
    return results


def constants(
    fn: Callable[[Array], Array], x: np.ndarray, params: Any, seed: int, *, progress: bool = False
) -> dict[str, Any]:
    """One network's constant, from what its kernels say, from above and from below: of ``fn``, the
    network in eval with ``params``, of a batch of one; the attack begins at x."""
    bound = sn_jax.lipschitz_bound(fn, x, progress=progress)
    attacked = jax.jit(partial(sn_jax.lipschitz_attack, fn, steps=ATTACK_STEPS, restarts=RESTARTS))
    return {
        "flattened": math.prod(
            np.linalg.norm(np.asarray(w, np.float64).reshape(-1, w.shape[-1]), 2)
            for w in flatten_dict(params).values() if np.ndim(w) > 1
        ),
        **dict(bound.bounds),
        "upper": bound.upper,
        "lower": float(attacked(jax.random.key(seed), jnp.asarray(x)).lower),
        "method": bound.method,
        "table": str(bound),
        "seconds": sum(value for _, value in bound.seconds),  # CPU time
    }  # fmt: skip


def robustness(steps: int, seed: int, *, progress: bool = False) -> dict[str, dict[str, Any]]:
    """Accuracy that is certified at each radius, of classifiers trained for a margin.

    A perturbation smaller than ``margin / (sqrt(2) L)`` in the l2 norm changes no decision: the
    difference of two logits is sqrt(2) L-Lipschitz (Tsuzuku et al. 2018, proposition 1,
    https://arxiv.org/abs/1802.04034).

    Returns:
      Name of the normalization -> ``constants`` of the classifier, ``radii``, the accuracy that
      each of "flattened", "product" and "upper" claims at each of them, and what is left under
      attack.
    """
    results = {}
    images, labels = study.scaled_images("test")
    for conv, name in study.METHODS.items():
        trained = study.train(conv, steps, seed, temperature=TEMPERATURE, progress=progress)
        fn = partial(study.Network().apply, {"params": trained.params})
        found = constants(fn, images[:1], trained.params, seed, progress=progress)
        with jax.enable_x64(True):
            logits = exact_logits(study.Network(), trained.params, images)
            margins = np.asarray(_margins(jnp.asarray(logits), labels))
        radii = np.linspace(0, 1.5, 31)
        claims = {
            key: [float(np.mean(margins > math.sqrt(2) * found[key] * r)) for r in radii]
            for key in ("flattened", "product", "upper")
        }
        left = under_attack(fn, images, labels, radii[::3], progress=progress)
        results[name] = found | {"accuracy": trained.accuracy, "radii": radii.tolist(),
                                 "claims": claims, "attacked radii": radii[::3].tolist(),
                                 "under attack": left.mean(1).tolist()}  # fmt: skip
    return results


def exact_logits(model: nn.Module, params: Any, images: np.ndarray) -> np.ndarray:
    """Logits in float64, of the constants that are certified: float32 weights as they are."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), params)
        return np.array(model.apply({"params": wide}, images.astype(np.float64)))


def _margins(logits: Array, labels: np.ndarray) -> Array:
    """By how much the right logit exceeds the others."""
    right = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return right - others.max(1)


def under_attack(
    fn: Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    radii: np.ndarray,
    *,
    steps: int = 40,
    progress: bool = False,
) -> np.ndarray:
    """What projected gradient descent leaves at each radius: robust accuracy is no more.

    Madry et al. (2018), https://arxiv.org/abs/1706.06083, in the l2 norm.

    Args:
      fn: images to logits.
      images, labels: whose decisions are to be changed.
      radii: of the balls, ascending; what falls in one has fallen in the larger ones.
      steps: of the descent in each ball, from where the last one ended.

    Returns:
      (radii, images), bool: which images still are what they are.
    """

    def of_length(z, length):
        norm = optax.safe_norm(z.reshape(len(z), -1), 1e-12, axis=1)
        return z * (length / norm)[:, None, None, None], norm

    @jax.jit
    def descend(delta, radius):
        gradient = jax.grad(lambda d: _margins(fn(images + d), labels).sum())(delta)
        delta = delta - of_length(gradient, 2.5 * radius / steps)[0]
        inside, norm = of_length(delta, radius)
        delta = jnp.where((norm > radius)[:, None, None, None], inside, delta)
        return delta, _margins(fn(images + delta), labels) <= 0

    delta = jnp.zeros_like(images)
    fallen = np.array(_margins(fn(images), labels) <= 0)
    left = []
    for radius in tqdm(radii, desc="attack", unit="radius", disable=not progress):
        for _ in range(steps if radius else 0):
            delta, wrong = descend(delta, jnp.float32(radius))
            fallen |= np.asarray(wrong)
        left.append(~fallen)
    return np.stack(left)


def constants_report(title: str, networks: dict[str, Any]) -> str:
    """A table of the ``constants`` of networks by name."""
    rows = [[title, *networks]]
    rows += [[f"  {label}", *(f"{result[key]:.4f}" for result in networks.values())]
             for key, (label, _, _) in QUANTITIES.items()]  # fmt: skip
    rows.append(["  tightest by", *(result["method"] for result in networks.values())])
    rows.append(["  CPU seconds", *(f"{result['seconds']:.1f}" for result in networks.values())])
    return cli.aligned(rows, ["", *(note for _, note, _ in QUANTITIES.values()), "", ""]) + "\n"


def radii_report(classifiers: dict[str, Any]) -> str:
    """The accuracy that is claimed and left at each radius, of ``robustness``."""
    lines = []
    for name, result in classifiers.items():
        lines.append(f"{name}: accuracy {result['accuracy']:.1%}; certified at a radius of")
        claims = {QUANTITIES[key][:2]: values[::3] for key, values in result["claims"].items()}
        claims["left under attack", "robust accuracy is no more"] = result["under attack"]
        rows = [["", *(f"{r:.2f}" for r in result["radii"][::3])]]
        rows += [[f"  {label}", *(f"{x:.1%}" for x in values)]
                 for (label, _), values in claims.items()]  # fmt: skip
        lines.append(cli.aligned(rows, ["", *(note for _, note in claims)]))
    return "\n".join(lines)


@picture(11, 5)
def save_constants(figure: Figure, networks: dict[str, Any], title: str) -> None:
    """Bars of each network's constant, from both sides."""
    figure.suptitle(title)
    axes = figure.subplots()
    at = np.arange(len(networks))
    for i, (key, (label, note, colour)) in enumerate(QUANTITIES.items()):
        values = [result[key] for result in networks.values()]
        drawn = axes.bar(at + 0.17 * (i - 2), values, 0.16, color=colour, label=f"{label}: {note}")
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], fontsize=8, padding=2)
    for x, result in zip(at, networks.values(), strict=True):
        axes.fill_between([x - 0.45, x + 0.45], result["lower"], result["upper"], color="black",
                          alpha=0.08, lw=0)  # fmt: skip
    every = [result[key] for result in networks.values() for key in QUANTITIES]
    axes.set_yscale("log")
    axes.set_ylim(min(every) / 2, max(every) * 20)  # room for the legend
    axes.set_xticks(at, list(networks))
    axes.set(ylabel="Lipschitz constant; the true one lies in the shaded band")
    axes.legend(loc="upper right", fontsize=8)


@picture(11, 4.4)
def save_robustness(figure: Figure, classifiers: dict[str, Any], title: str) -> None:
    """Certified accuracy over the radius, beside what an attack leaves."""
    figure.suptitle(title)
    styles = {
        "flattened": ("#888888", "--"), "product": ("#6d9bc9", "-"), "upper": ("#27567f", "-"),
    }  # fmt: skip
    for axes, (name, result) in zip(figure.subplots(1, 2, sharey=True), classifiers.items(),
                                    strict=True):  # fmt: skip
        for key, (colour, line) in styles.items():
            label, note, _ = QUANTITIES[key]
            axes.plot(result["radii"], result["claims"][key], line, color=colour,
                      label=f"{label} ({result[key]:.3g}): {note}")  # fmt: skip
        axes.plot(result["attacked radii"], result["under attack"], "o-", color="#c4473a", ms=4,
                  drawstyle="steps-post",  # it never rises with the radius
                  label="left under attack: the truth is no more")  # fmt: skip
        axes.set(title=f"{name}, accuracy {result['accuracy']:.1%}", xlim=(0, None), ylim=(0, 1.02),
                 xlabel="radius (l2; pixels from 0 to 1)", ylabel="accuracy, held out")  # fmt: skip
        axes.legend(loc="upper right", fontsize=8)
