"""What spectral normalization does that penalties do not: a force that the data decide.

Through ``Wbar = W / sigma`` the loss has at W the gradient ``(G + lambda u v^T) / sigma`` with
``lambda = -<G, Wbar>``: a regularizer whose factor, and sign, come from the data. A penalty's force
is the same for all data: ``-W`` (L2), ``-sign W`` (lasso), ``-sigma u v^T`` (spectral). In a
network of ReLUs without biases lambda is the same in all layers, as each scales the output alike:
``<dL/dWbar_l, Wbar_l> = E <dL/df, f>`` by Euler's identity for homogeneous functions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.gan.methods import METHODS
from experiments.theory import nets
from experiments.theory.page import Claim, Track, array, band, finish, ink, said

QUESTION = "Is spectral normalization data dependent, and are penalties not?"
# Least squares to diag(1, t) with white inputs: the data of t = 1 stretch all directions alike,
# those of t = 0 one alone.
DATA = {"equal": 1.0, "one": 0.0}


def force(name: str, t: float | None, s: jax.Array) -> jax.Array:
    """Minus the gradient at diag(s), of the loss for SN, of the penalty for the others."""
    method = METHODS[nets.NAMES[name]]

    def objective(s):
        params = {"layer": {"kernel": jnp.diag(s)}}
        state = method.init(params, jax.random.key(0), lambda conv: None)
        # At diag(s) with s_1 > s_2 the vectors are the first axis', whatever the iteration says.
        if t is None:
            return method.penalty(params, state, None)
        weights = method.apply(params, state)["layer"]["kernel"]
        return jnp.sum((weights - jnp.diag(jnp.array([1.0, t], s.dtype))) ** 2) / 2

    return -jax.grad(objective)(s)


def fields() -> dict[str, Any]:
    """Forces over the plane of two singular values, sigma_1 > sigma_2."""
    first, second = np.meshgrid(np.linspace(0.2, 2, 10), np.linspace(0.1, 1.9, 10))
    kept = first > 1.15 * second
    s = jnp.asarray(np.stack([first[kept], second[kept]], 1), jnp.float32)
    of = lambda name, t: jax.jit(jax.vmap(lambda s: force(name, t, s)))(s)  # noqa: E731
    found = {f"SN, {data}": of("SN", t) for data, t in DATA.items()}
    return {"s": s, **found, **{name: of(name, None) for name in [*nets.NAMES][2:]}}


def trained(method: str, biases: bool, steps: int, every: int) -> dict[str, jax.Array]:
    """Digits: lambda by layer, the largest |cosine| of W and the force, and layer 2's spectrum."""

    def look(moment: nets.Moment) -> dict[str, jax.Array]:
        pairs = zip(nets.kernels(moment.weight_gradient), nets.kernels(moment.weights), strict=True)
        raw = zip(nets.kernels(moment.gradient), nets.kernels(moment.params), strict=True)
        cosines = [nets.inner(g, w) / jnp.linalg.norm(g) / jnp.linalg.norm(w) for g, w in raw]
        return {
            "lambda": jnp.stack([-nets.inner(g, w) for g, w in pairs]),
            "cosine": jnp.abs(jnp.stack(cosines)).max(),
            "spectrum": nets.spectra(moment.params)[1],
        }

    return nets.train_on_digits(look, method, steps, every, biases=biases)


def measure(fast: bool, track: Track) -> dict[str, Any]:
    steps, every = (100, 10) if fast else (3000, 50)
    cases = {"SN": ("SN", False), "SN with biases": ("SN", True)}
    cases |= {} if fast else {name: (name, False) for name in [*nets.NAMES][1:]}
    runs = {name: trained(*cases[name], steps, every) for name in track([*cases], "training")}
    start = {name: runs[name]["lambda"][:, 0] for name in ("SN", "SN with biases")}
    for run in runs.values():
        run["stable rank"] = (run["spectrum"] ** 2).sum(-1) / run["spectrum"][..., 0] ** 2
        run["spectrum"] = run["spectrum"][:, -1]
    return {"fields": fields(), "steps": np.arange(0, steps + 1, every), "runs": runs,
            "lambda at the start": start}  # fmt: skip


def opposed(numbers: dict[str, Any]) -> np.ndarray:
    """Cosines of the forces that the two data sets give through SN."""
    a, b = (array(numbers["fields"][f"SN, {data}"]) for data in DATA)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def unequal(numbers: dict[str, Any], name: str) -> float:
    """How far the lambdas of the layers are apart, over the largest of the run."""
    of = array(numbers["runs"][name]["lambda"])
    return float((of.max(-1) - of.min(-1)).max() / np.abs(of).max())


def answer(numbers: dict[str, Any]) -> str:
    runs, start = numbers["runs"], array(numbers["lambda at the start"]["SN"])
    of = array(runs["SN"]["lambda"])
    ranks = {name: array(run["stable rank"])[:, -1] for name, run in runs.items()}
    return (
        f"Yes: for two data sets the forces of SN are opposite (cosine {opposed(numbers).max():.4f}"
        f" everywhere), a penalty's are one field. Without biases lambda is equal in all layers (to"
        f" {unequal(numbers, 'SN'):.0e}; with biases it differs by up to "
        f"{unequal(numbers, 'SN with biases'):.0%}), {said(start.mean(-1))} at the start and "
        f"negative in {np.mean(of < 0):.0%} of what was seen, and W feels no force along itself "
        f"(cosine at most {array(runs['SN']['cosine']).max():.0e}). Stable rank of layer 2 at the "
        "end: " + ", ".join(f"{name} {said(x)}" for name, x in ranks.items()) + "."
    )  # fmt: skip


def claims(numbers: dict[str, Any]) -> list[Claim]:
    runs, of = numbers["runs"], array(numbers["fields"]["s"])
    return [
        Claim("two data sets, opposite forces", opposed(numbers).max(), high=-0.999),
        Claim("L2 pulls along W", np.abs(array(numbers["fields"]["L2"]) + of).max(), high=1e-5),
        Claim("SN never along W", array(runs["SN"]["cosine"]).max(), high=1e-5),
        Claim("lambda is equal in all layers without biases", unequal(numbers, "SN"), high=1e-4),
        Claim("and not with them", unequal(numbers, "SN with biases"), low=1e-2),
        Claim("lambda may be negative", array(runs["SN"]["lambda"]).min(), high=-1e-3),
        Claim("and positive", array(runs["SN"]["lambda"]).max(), low=1e-3),
    ]


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, middle, right, last = figure.subplots(1, 4)
    s = array(numbers["fields"]["s"])
    shown = np.all(np.round(s / 0.2 - 0.6).astype(int) % 2 == 0, 1)  # every other one
    styles = {"SN, equal": (left, ink.blue), "SN, one": (left, ink.orange)}
    styles |= {name: (middle, nets.COLOURS[name]) for name in ("L2", "lasso", "spectral penalty")}
    for name, (axes, colour) in styles.items():
        arrows = array(numbers["fields"][name])[shown]
        arrows = arrows / np.linalg.norm(arrows, axis=-1, keepdims=True)
        axes.quiver(*s[shown].T, *arrows.T, color=colour, label=name, scale=9, width=0.012)
    for axes, title in ((left, "SN, two data sets"), (middle, "Penalties, any data")):
        axes.set(aspect="equal", xlabel="sigma 1", ylabel="sigma 2", title=title)
        axes.set(xlim=(0, 2.3), ylim=(-0.3, 2.3))
        axes.legend(fontsize=7, loc="upper left")
    for name, colour in (("SN", ink.blue), ("SN with biases", ink.orange)):
        for layer, style in enumerate(("-", "--", ":")):
            runs = array(numbers["runs"][name]["lambda"])[..., layer]
            right.plot(numbers["steps"], runs.mean(0), style, color=colour, lw=1.4,
                       label=f"{name}, layer {layer + 1}")  # fmt: skip
    right.set(xlabel="updates", title="lambda, mean of seeds")
    for name in [name for name in nets.NAMES if name in numbers["runs"]]:
        runs = numbers["runs"][name]["stable rank"]
        band(last, numbers["steps"], runs, nets.COLOURS[name], name)
    last.set(xlabel="updates", title="Stable rank, layer 2")
    finish(right, last)
