"""Certified accuracy of classifiers that are trained for a margin: what each bound is worth.

The same logits, and four constants of the same network: how many images are proved to keep their
class at a radius depends on nothing but how tight the constant is.
"""

import time
from functools import partial
from typing import Any

import numpy as np
from flax import linen as nn
from jax import Array
from matplotlib.figure import Figure

import sn_jax
from experiments.certify.lipschitz import TEMPERATURE, exact_logits, under_attack
from experiments.certify.study import scaled_images, train
from experiments.cli import markdown
from experiments.pictures import picture

DATA = {"digits": "digits, 8x8", "mnist": "MNIST, 28x28"}
WIDTH = 64
# Of the l2 norm, where the cube of images is [0, 1]: the table's, and the curve's.
RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)
CURVE = np.linspace(0, 1, 41)
# Of the logits in float64: sums of 784 products of weights that are at most 1 and pixels, twice 64
# more; 1e-11 would do.
LOGIT_ERROR = 1e-9

# What is shown: key -> (label, colour). From crude to tight.
BOUNDS = {
    "product": ("product, $\\sqrt{2}\\,L$", "#9dbbd8"),
    "merged": ("merged, $\\sqrt{2}\\,L$", "#6d9bc9"),
    "tight": ("tight, $\\sqrt{2}\\,L$", "#27567f"),
    "margins": ("margin_bounds, tight", "#2e7d4f"),
}


class Network(nn.Module):
    """Images to logits (n, 10): two hidden layers of 64, ReLU."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(10)(x)


def study(
    steps: int, seed: int, *, data: tuple[str, ...] = tuple(DATA), progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Train with spectral normalization and a small temperature, certify, attack.

    Args:
      steps: of Adam, each on a batch of 128.
      seed: of the initialization and the batches.
      data: names of ``experiments.data``.

    Returns:
      Name of the data -> "accuracy"; "constants" by key of ``BOUNDS``, for "margins" the
      smallest, the median and the largest; "radii", with the certified accuracy at each of them
      ("certified", by key) and what is left "under attack"; the same over "curve"; "violations":
      images that the attack changes within a radius at which one of the bounds certifies them;
      CPU seconds.
    """
    return {name: _measured(name, steps, seed, progress) for name in data}


def _measured(name: str, steps: int, seed: int, progress: bool) -> dict[str, Any]:
    model, seconds = Network(), {}
    images, labels = scaled_images("test", name)
    started = time.process_time()
    trained = train(
        "operator", steps, seed, data=name, model=model, temperature=TEMPERATURE, progress=progress
    )
    fn = partial(model.apply, {"params": trained.params})
    seconds["training"], started = time.process_time() - started, time.process_time()
    bound = sn_jax.lipschitz_bound(fn, images[:1], method="tight", progress=progress)
    seconds["lipschitz_bound"], started = time.process_time() - started, time.process_time()
    margins = sn_jax.margin_bounds(fn, images[:1], method="tight", progress=progress)
    seconds["margin_bounds"], started = time.process_time() - started, time.process_time()
    logits = exact_logits(model, trained.params, images)
    constants = {key: dict(bound.bounds)[key] for key in ("product", "merged", "tight")}
    right = logits.argmax(1) == labels
    withstood = {
        key: np.where(right, sn_jax.certified_radius(logits, constant, error=LOGIT_ERROR), -1.0)
        for key, constant in (constants | {"margins": margins}).items()
    }
    left = under_attack(fn, images, labels, np.array(RADII), progress=progress)
    seconds["attack"] = time.process_time() - started
    pairs = margins[np.triu_indices(len(margins), 1)]
    return {
        "accuracy": float(right.mean()),
        "images": len(images),
        "constants": constants | {"margins": np.quantile(pairs, [0, 0.5, 1]).tolist()},
        "radii": list(RADII),
        "certified": {key: _shares(r, RADII) for key, r in withstood.items()},
        "under attack": [float(share.mean()) for share in left],
        "curve": CURVE.tolist(),
        "certified over the curve": {key: _shares(r, CURVE) for key, r in withstood.items()},
        "violations": int(sum(
            np.count_nonzero((r > radius) & ~stands)
            for r in withstood.values() for radius, stands in zip(RADII, left, strict=True)
        )),
        "seconds": seconds,
    }  # fmt: skip


def _shares(withstood: np.ndarray, radii: Any) -> list[float]:
    return [float(np.mean(withstood > radius)) for radius in radii]


def report(results: dict[str, dict[str, Any]]) -> str:
    """Tables in Markdown."""
    lines = []
    for name, result in results.items():
        heads = [f"{r * 255:.0f}/255" if 0 < r < 1 else f"{r:g}" for r in result["radii"]]
        lines += [
            f"{DATA.get(name, name)}: {result['images']:,} held-out images, "
            f"accuracy {result['accuracy']:.2%}",
            "",
        ]
        rows = [["certified by", "constant", *heads]]
        for key, (label, _) in BOUNDS.items():
            constant = result["constants"][key]
            if key == "margins":
                constant = f"{constant[0]:.4f} to {constant[2]:.4f}"
            else:
                constant = f"√2 · {constant:.4f}"
            shares = (f"{share:.1%}" for share in result["certified"][key])
            rows.append([label.split(",")[0], constant, *shares])
        rows.append(["left under attack", "", *(f"{x:.1%}" for x in result["under attack"])])
        seconds = ", ".join(f"{value:.0f} s {key}" for key, value in result["seconds"].items())
        lines += [*markdown(rows), "", f"{result['violations']} violations; CPU: {seconds}", ""]
    return "\n".join(lines)


@picture(11, 4.4)
def save(figure: Figure, results: dict[str, dict[str, Any]], title: str) -> None:
    """Certified accuracy over the radius by each bound, below what an attack leaves."""
    figure.suptitle(title)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for key, (label, colour) in BOUNDS.items():
            if key == "merged":  # of layers with a nonlinearity after each the product itself
                continue
            axes.plot(result["curve"], result["certified over the curve"][key], color=colour,
                      label=label)  # fmt: skip
        axes.plot(result["radii"], result["under attack"], "o--", color="#c4473a", ms=4, lw=0.8,
                  drawstyle="steps-post",  # it never rises with the radius
                  label="left under attack: the truth is no more")  # fmt: skip
        axes.axvline(36 / 255, color="black", lw=0.8, ls=":")
        axes.annotate("36/255", (36 / 255, 0.02), (3, 0), textcoords="offset points", fontsize=8)
        axes.set(title=f"{DATA.get(name, name)}: accuracy {result['accuracy']:.1%}", xlim=(0, 1),
                 ylim=(0, 1.02), xlabel="radius (l2; pixels from 0 to 1)")  # fmt: skip
    panels[0].set_ylabel("accuracy, held out")
    panels[0].legend(loc="upper right", fontsize=8)
