"""The spectral norm as a maximum, and the product of the layers' norms as a bound of the network.

    sigma(A) = max over h != 0 of |A h| / |h| = max over |h| <= 1 of |A h|,                      (6)

seen as the ellipse onto which A maps the circle. A network of 1-Lipschitz activations has
``|f|_Lip <= prod sigma(W_l)``; how far above the truth that is depends on how the layers' leading
directions meet, which a bound of the whole network takes into account. Below, attacks attain
what the truth is at least.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sn_jax
from experiments.theory import nets
from experiments.theory.page import SEEDS, Claim, Track, array, band, finish, ink, over_seeds, said

QUESTION = "Does (6) hold, and how tight is the product of the layers' norms?"
WIDTH, INPUTS = 32, 16


def circle(key: jax.Array) -> dict[str, jax.Array]:
    """Both sides of (6) over a grid, and the quotients of A as a function, over the norm."""
    w = jax.random.normal(key, (2, 2), jnp.float32)
    angle = jnp.linspace(0, 2 * jnp.pi, 2001, dtype=jnp.float32)
    h = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    points = jax.random.normal(key, (2, 2000), jnp.float32)
    sigma = jnp.linalg.norm(w, 2)
    ball = points / jnp.maximum(1, jnp.linalg.norm(points, axis=0, keepdims=True))
    norms = lambda x: jnp.linalg.norm(x, axis=0)  # noqa: E731
    return {
        "ratios": jnp.max(norms(w @ points) / norms(points)) / sigma,
        "ball": jnp.maximum(norms(w @ ball).max(), norms(w @ h).max()) / sigma,
        "ellipse": w @ h[:, ::20], "sigma": sigma,
    }  # fmt: skip


def bounds(params: nets.Params, x: jax.Array) -> dict[str, float]:
    """The product of the layers' norms, and the least of all certified bounds."""
    found = sn_jax.lipschitz_bound(lambda x: nets.mlp(params, x), x, method="auto", progress=False)
    return {"product": dict(found.bounds)["product"], "certified": found.upper,
            "method": found.method}  # fmt: skip


def attacked(stack: nets.Params, starts: jax.Array, steps: int) -> np.ndarray:
    """The largest Jacobian found for each of a stack of networks, each from its own start."""

    def one(params, x, key):
        return sn_jax.lipschitz_attack(lambda x: nets.mlp(params, x), key, x, steps).lower

    keys = jax.random.split(jax.random.key(7), len(starts))
    return np.asarray(jax.jit(jax.vmap(one))(stack, starts, keys))


def random_nets(depth: int, fast: bool) -> dict[str, Any]:
    """Networks of ``depth`` hidden layers whose kernels have norm 1 each."""
    sizes = (INPUTS, *[WIDTH] * depth, 1)
    stack = over_seeds(lambda key: nets.mlp_init(key, sizes, biases=False))
    stack = jax.tree.map(lambda w: w / np.linalg.norm(w, 2, (1, 2))[:, None, None], stack)
    lower = attacked(stack, jnp.zeros((len(SEEDS), INPUTS), jnp.float32), 60 if fast else 500)
    return {"attained": lower} | all_bounds(stack, INPUTS)


def all_bounds(stack: nets.Params, inputs: int) -> dict[str, Any]:
    x = jnp.zeros(inputs, jnp.float32)
    n = len(next(iter(stack.values()))["kernel"])
    found = [bounds(jax.tree.map(lambda w, i=i: w[i], stack), x) for i in range(n)]
    return {name: [each[name] for each in found] for name in found[0]}


def trained(method: str, steps: int, every: int) -> dict[str, Any]:
    """Digits: the same three numbers over training, by (seed, time)."""
    kept = nets.train_on_digits(lambda moment: moment.weights, method, steps, every)
    stack = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), kept)
    n = len(stack["layer_0"]["kernel"])
    starts = jnp.asarray(nets.digits("train")[0][:n])
    found = {"attained": attacked(stack, starts, 60), **all_bounds(stack, 64)}
    return {name: np.reshape(x, (len(SEEDS), -1)) for name, x in found.items() if name != "method"}


def measure(fast: bool, track: Track) -> dict[str, Any]:
    steps, every = (60, 60) if fast else (3000, 500)
    depths, methods = ([2], ["SN"]) if fast else ([*range(1, 9)], ["SN", "none"])
    return {
        "circle": over_seeds(circle),
        "depths": depths,
        "random": [random_nets(depth, fast) for depth in track(depths, "depths")],
        "steps": np.arange(0, steps + 1, every),
        "trained": {name: trained(name, steps, every) for name in track(methods, "training")},
    }


def answer(numbers: dict[str, Any]) -> str:
    at = "; ".join(
        f"{depth}: certified {said(net['certified'])}, attained {said(net['attained'])}"
        for depth, net in zip(numbers["depths"], numbers["random"], strict=True)
        if depth in (1, 2, 4, 8)
    )
    trained = {
        method: ", ".join(f"{name} {said(array(x)[:, -1])}" for name, x in net.items())
        for method, net in numbers["trained"].items()
    }
    return (
        "(6) holds. For random networks whose norms have the product 1 that is loose; by the "
        f"number of hidden layers, {at}. On the digits training closes the gap, under SN nearly: "
        + "; ".join(f"{method}: {text}" for method, text in trained.items()) + "."
    )  # fmt: skip


def claims(numbers: dict[str, Any]) -> list[Claim]:
    sides = array([numbers["circle"][side] for side in ("ratios", "ball")])
    layers = [*numbers["random"], *numbers["trained"].values()]
    order = [(array(x["attained"]) / array(x["certified"])).max() for x in layers]
    certified = [(array(x["certified"]) / array(x["product"])).max() for x in layers]
    deep, trained = numbers["random"][-1], numbers["trained"]["SN"]
    share = array(trained["attained"]) / array(trained["certified"])
    return [
        Claim("both maxima of (6) are sigma", np.abs(sides - 1).max(), high=1e-4),
        Claim("no attack is above a certified bound", max(order), high=1 + 1e-5),
        Claim("no certified bound is above the product", max(certified), high=1 + 1e-6),
        Claim("in deep networks the product is loose", max(deep["certified"]), high=0.7),
        Claim("training under SN closes the gap", (share[:, -1] / share[:, 0]).min(), low=1.3),
    ]


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    x, y = array(numbers["circle"]["ellipse"])[0]
    sigma = numbers["circle"]["sigma"][0]
    angle = np.linspace(0, 2 * np.pi, 100)
    left.plot(np.cos(angle), np.sin(angle), color=ink.black, lw=1, label="|h| = 1")
    around = sigma * np.cos(angle), sigma * np.sin(angle)
    left.plot(*around, ":", color=ink.blue, label="radius sigma")
    left.plot(x, y, color=ink.orange, label="A h")
    left.set(aspect="equal", title="(6): sigma touches the ellipse")
    colours = {"product": ink.black, "certified": ink.blue, "attained": ink.orange}
    for (name, colour), style in zip(colours.items(), ("-", "--", "-."), strict=True):
        runs = np.transpose([array(x[name]) for x in numbers["random"]])
        band(middle, numbers["depths"], runs, colour, name, style)
        for method, marker in zip(numbers["trained"], "so", strict=False):
            runs = array(numbers["trained"][method][name]).mean(0)
            right.plot(numbers["steps"], runs, style, marker=marker, ms=4, color=colour,
                       label=f"{method}: {name}")  # fmt: skip
    middle.set(yscale="log", xlabel="hidden layers", title="Random networks, norms 1")
    right.set(yscale="log", xlabel="updates", title="Digits, over training", ylim=(0.1, 2e3))
    finish(left, middle, right)
