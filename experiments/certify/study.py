"""What the product of layer norms says of a network: flattened against true convolutions.

A small network is trained on the digits twice: with every kernel divided by the norm of its
flattened matrix (Miyato et al. 2018), and by that of the linear map that it is. The product of
the layers' norms bounds the network's Lipschitz constant only where they are norms of the maps.
"""

import math
import time
from typing import Any, NamedTuple

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
import sn_jax.linen
from experiments.data import load
from experiments.pictures import picture

METHODS = {"reshape": "flattened SN", "operator": "operator SN"}
WIDTH, BATCH, LEARNING_RATE, RTOL = 16, 128, 3e-3, 1e-3


class Network(nn.Module):
    """Images (n, 8, 8, 1) to logits (n, 10): three convolutions, the second of stride 2, and a
    dense layer; ReLU in between, which is 1-Lipschitz."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(WIDTH, (3, 3))(x))
        x = nn.relu(nn.Conv(2 * WIDTH, (4, 4), (2, 2))(x))
        x = nn.relu(nn.Conv(2 * WIDTH, (3, 3))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Trained(NamedTuple):
    """A network after training."""

    params: Any  # with normalized kernels, as the network runs with them
    operators: dict[str, sn_jax.View]  # path -> view of the linear map that each kernel is
    accuracy: float  # on the held-out images
    seconds: float  # of training, compiling included


def study(steps: int, seed: int, *, progress: bool = False) -> dict[str, Any]:
    """Train with both normalizations, and measure.

    Args:
      steps: of Adam, each on a batch of 128.
      seed: of the initialization and the batches.

    Returns:
      For each method's name its ``layers`` (path -> flattened and true sigma, lower and
      upper), the products, a lower bound of the Lipschitz constant, accuracy and seconds.
    """
    results = {}
    for conv, name in METHODS.items():
        trained = train(conv, steps, seed, progress=progress)
        layers = layer_norms(trained)
        results[name] = {
            "layers": layers,
            "product of flattened sigma": math.prod(x["flattened"] for x in layers.values()),
            "product of certified upper ends": math.prod(x["upper"] for x in layers.values()),
            "largest Jacobian norm": largest_jacobian(trained.params),
            "accuracy": trained.accuracy,
            "seconds": trained.seconds,
        }
    return results


def train(
    conv: str,
    steps: int,
    seed: int,
    *,
    data: str = "digits",
    model: nn.Module | None = None,
    temperature: float = 1.0,
    progress: bool = False,
) -> Trained:
    """Train a network with one normalization.

    Args:
      conv: "reshape" or "operator", as in ``sn_jax.linen.views``.
      steps, seed: as in ``study``.
      data: the images, by their name in ``experiments.data``.
      model: from images to logits; a ``Network`` if None.
      temperature: what logits are divided by in the loss. A small one asks for margins, since
        normalized logits cannot grow instead.
    """
    start = time.perf_counter()
    images, labels = (jnp.asarray(x) for x in scaled_images("train", data))
    model, optimizer = model or Network(), optax.adam(LEARNING_RATE)
    key, init_key, state_key = jax.random.split(jax.random.key(seed), 3)
    variables = jax.jit(model.init)(init_key, images[:1])
    params = variables["params"]
    views = sn_jax.linen.views(model, variables, images[:1], conv=conv)
    state = sn_jax.init(params, state_key, views)

    def loss(params, state, x, y):
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        logits = model.apply({"params": normalized}, x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, moments, key):
        # u and v move once a step, from the weights alone, outside the loss.
        _, state = sn_jax.spectral_normalize(params, state)
        rows = jax.random.randint(key, (BATCH,), 0, len(images))
        value, grads = jax.value_and_grad(loss)(params, state, images[rows], labels[rows])
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), state, moments, value

    moments = optimizer.init(params)
    bar = tqdm(range(steps), desc=METHODS[conv], unit="step", disable=not progress)
    # One step a dispatch: on a CPU XLA's convolutions are many times slower in a compiled loop.
    for i in bar:
        params, state, moments, value = step(params, state, moments, jax.random.fold_in(key, i))
        if i % 50 == 0:
            bar.set_postfix_str(f"loss {value:.3f}")
    # One step of power iteration trails behind the weights; before they are frozen it catches up.
    state = sn_jax.calibrate(params, state)
    normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
    held_out, answers = scaled_images("test", data)
    logits = jax.jit(model.apply)({"params": normalized}, held_out)
    accuracy = float(np.mean(np.argmax(logits, -1) == answers))
    operators = sn_jax.linen.views(model, variables, images[:1], conv="operator")
    return Trained(normalized, operators, accuracy, time.perf_counter() - start)


def scaled_images(split: str, data: str = "digits") -> tuple[np.ndarray, np.ndarray]:
    """float32 images in [0, 1], and labels."""
    images, labels = load(data, split)
    return images.astype(np.float32) / 255, labels


def layer_norms(trained: Trained) -> dict[str, dict[str, float]]:
    """Of every kernel as the network runs with it: the flattened matrix's norm, the map's own,
    and the bracket that is proved for the map."""
    weights = flatten_dict(trained.params, sep="/")
    layers = {}
    for path, view in trained.operators.items():
        w = np.asarray(weights[path])
        flat = sn_jax.Matrix(tuple(range(w.ndim - 1)), -1)
        lower, upper = sn_jax.norm_bounds(w, view, rtol=RTOL)
        layers[path] = {
            "flattened": float(sn_jax.spectral_norm(w, flat)),
            "true": float(sn_jax.spectral_norm(w, view)),
            "lower": float(lower),
            "upper": float(upper),
        }
    return layers


def largest_jacobian(params: Any, n_steps: int = 100) -> float:
    """Largest norm of the network's Jacobian over the held-out images.

    Power iteration by jvp and vjp, for all images at once. Each value is ``|J v|`` for a unit
    ``v``, so the network's Lipschitz constant is no smaller, up to the rounding of float32.
    """
    images, _ = scaled_images("test")

    def logits(x):
        return Network().apply({"params": params}, x[None])[0]

    def unit(v):
        return v / jnp.maximum(jnp.linalg.norm(v.ravel()), jnp.finfo(v.dtype).tiny)

    @jax.jit
    @jax.vmap
    def step(x, v):
        forward = jax.linearize(logits, x)[1]
        u = forward(v)
        (back,) = jax.linear_transpose(forward, x)(unit(u))
        return unit(back), jnp.linalg.norm(u)

    v = jax.vmap(unit)(jax.random.normal(jax.random.key(0), images.shape))
    for _ in range(n_steps):
        v, norms = step(images, v)
    return float(norms.max())


def report(results: dict[str, Any]) -> str:
    """The table on stdout."""
    lines = [f"{'':30}{'flattened':>10}{'true':>9}   certified bracket"]
    for name, result in results.items():
        lines.append(name)
        for path, x in result["layers"].items():
            lines.append(
                f"  {path.removesuffix('/kernel'):28}{x['flattened']:10.4f}{x['true']:9.4f}"
                f"   {_bracket(x, ', ')}"
            )
    rows = [
        ("product of flattened norms", "product of flattened sigma", "no bound"),
        ("product of certified norms", "product of certified upper ends", "bound, proved"),
        ("largest Jacobian, held out", "largest Jacobian norm", "the constant is no smaller"),
        ("accuracy, held out", "accuracy", ""),
        ("seconds of training", "seconds", ""),
    ]
    lines += ["", f"{'':30}" + "".join(f"{name:>15}" for name in results)]
    for label, key, note in rows:
        digits = {"accuracy": ".1%", "seconds": ".0f"}.get(key, ".4f")
        numbers = "".join(f"{result[key]:15{digits}}" for result in results.values())
        lines.append(f"{label:30}{numbers}   {note}".rstrip())
    return "\n".join(lines)


def _bracket(layer: dict[str, float], between: str) -> str:
    """Four decimals, rounded outwards."""
    lower, upper = math.floor(layer["lower"] * 1e4) / 1e4, math.ceil(layer["upper"] * 1e4) / 1e4
    return f"[{lower:.4f}{between}{upper:.4f}]"


@picture(14, 4.6)
def save_norms(figure: Figure, results: dict[str, Any], title: str) -> None:
    """Bars of each layer's norms with the proved bracket, and what their products say."""
    figure.suptitle(title)
    *panels, products = figure.subplots(1, 3)
    top = 1.18 * max(x["upper"] for r in results.values() for x in r["layers"].values())
    grey, blue, red = "#b8b8b8", "#3b76af", "#c4473a"
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        layers = result["layers"]
        at = np.arange(len(layers))
        lower, upper, true, flat = (
            np.array([x[key] for x in layers.values()])
            for key in ("lower", "upper", "true", "flattened")
        )
        axes.bar(at - 0.2, flat, 0.38, color=grey, label="flattened $\\sigma$")
        axes.bar(at + 0.2, true, 0.38, color=blue, label="true $\\sigma$ of the map")
        middle = (lower + upper) / 2
        axes.errorbar(
            at + 0.2, middle, [middle - lower, upper - middle], fmt="none", ecolor="black",
            capsize=9, elinewidth=1, label="certified bracket",
        )  # fmt: skip
        for x, layer in zip(at, layers.values(), strict=True):
            axes.annotate(
                _bracket(layer, ",\n"), (x + 0.2, layer["upper"]), (0, 4),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
        axes.axhline(1, color="black", lw=0.8, ls=":")
        labels = [path.removesuffix("/kernel") for path in layers]
        axes.set_xticks(at, labels)
        axes.set(title=f"{name}: norms of the kernels in use", ylim=(0, top), ylabel="norm")
    panels[1].legend(loc="upper right", fontsize=8)  # where the bars are short

    bars = [
        ("product of flattened norms", "product of flattened sigma", grey),
        ("product of certified norms: a bound", "product of certified upper ends", blue),
        ("largest Jacobian: what is reached", "largest Jacobian norm", red),
    ]
    at = np.arange(len(results))
    for i, (label, key, colour) in enumerate(bars):
        values = [result[key] for result in results.values()]
        drawn = products.bar(at + 0.27 * (i - 1), values, 0.25, color=colour, label=label)
        products.bar_label(drawn, [f"{value:#.4g}" for value in values], fontsize=8, padding=2)
    products.set_yscale("log")
    every = [result[key] for result in results.values() for _, key, _ in bars]
    products.set_ylim(min(every) / 3, max(every) * 8)  # room for the legend
    products.axhline(1, color="black", lw=0.8, ls=":")
    products.set_xticks(at, list(results))
    products.set(title="Lipschitz constant of the network", ylabel="logarithmic")
    products.legend(loc="upper right", fontsize=8)
