"""The gradient of W / sigma(W): the closed form, the seed's lines one by one, and what it does.

With ``Wbar = W / sigma`` and unit singular vectors u, v of the largest singular value,

    d Wbar / d W_ij = (E_ij - [u v^T]_ij Wbar) / sigma,                        (the last line)

so that a loss with gradient G at Wbar has at W the gradient ``(G - <G, Wbar> u v^T) / sigma``,
which is orthogonal to W. Where sigma is held constant (``gradient="stop"``) it is ``G / sigma``,
and W can be pushed along itself, which changes nothing that the network computes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sn_jax
from experiments.gan.methods import METHODS
from experiments.theory import nets
from experiments.theory.page import Claim, Track, array, band, finish, ink, over_seeds, said

QUESTION = "Is the derivation of the gradient right, and does it matter that it goes through sigma?"
SHAPE = (6, 4)
LINES = ("line 1", "line 2", "line 2, with W", "line 3", "line 4", "sn_jax")
TX = {"SGD": optax.sgd(0.5), "Adam": optax.adam(1e-3)}


def lines(key: jax.Array) -> dict[str, jax.Array]:
    """Largest error of every line against automatic differentiation, float64."""
    w = jax.random.normal(key, SHAPE, jnp.float64)
    norm = lambda w: jnp.linalg.norm(w, 2)  # noqa: E731
    # Of shape (m, n, i, j): derivatives by w[i, j].
    truth = jax.jacrev(lambda w: w / norm(w))(w)
    sigma, slope, inverse_slope = norm(w), jax.grad(norm)(w), jax.grad(lambda w: 1 / norm(w))(w)
    u, _, vt = jnp.linalg.svd(w, full_matrices=False)
    outer = u[:, :1] * vt[:1]
    e = jnp.eye(w.size, dtype=w.dtype).reshape(*SHAPE, *SHAPE)
    by = lambda scalars, matrix: matrix[:, :, None, None] * scalars[None, None]  # noqa: E731
    state = sn_jax.init({"kernel": w}, key, warmup=500)
    ours = jax.jacrev(lambda w: sn_jax.spectral_normalize({"kernel": w}, state, n_steps=0)[0])(w)
    written = (
        e / sigma + by(inverse_slope, w),
        e / sigma - by(slope, jnp.ones_like(w)) / sigma**2,
        e / sigma - by(slope, w) / sigma**2,
        e / sigma - by(outer, w) / sigma**2,
        (e - by(outer, w / sigma)) / sigma,
        ours["kernel"],
    )
    return {name: jnp.abs(line - truth).max() for name, line in zip(LINES, written, strict=True)}


def trained(gradient: str, tx: str, steps: int, every: int) -> dict[str, Any]:
    """Digits: accuracy, the largest |cosine| of a W and its gradient, spectra of W."""
    method = METHODS["sn"]._replace(
        apply=lambda params, state: sn_jax.spectral_normalize(
            params, state, n_steps=0, gradient=gradient
        )[0]
    )

    def look(moment: nets.Moment) -> dict[str, Any]:
        spectra = nets.spectra(moment.params)
        pairs = zip(nets.kernels(moment.params), nets.kernels(moment.gradient), strict=True)
        cosines = [nets.inner(w, g) / jnp.linalg.norm(w) / jnp.linalg.norm(g) for w, g in pairs]
        return {
            "accuracy": nets.digits_accuracy(moment.weights),
            "cosine": jnp.abs(jnp.stack(cosines)).max(),
            "sigma": jnp.stack([s[0] for s in spectra]),
            "stable rank": jnp.sum((spectra[1] / spectra[1][0]) ** 2),
        }

    return nets.train_on_digits(look, method, steps, every, tx=TX[tx])


def measure(fast: bool, track: Track) -> dict[str, Any]:
    with jax.enable_x64(True):
        errors = over_seeds(lines)
    steps, every = (200, 20) if fast else (3000, 50)
    cases = [(way, tx) for tx in (["SGD"] if fast else TX) for way in ("through", "stop")]
    runs = {f"{way}, {tx}": trained(way, tx, steps, every) for way, tx in track(cases, "training")}
    return {"errors": errors, "steps": np.arange(0, steps + 1, every), "training": runs}


def final(numbers: dict[str, Any], what: str) -> dict[str, np.ndarray]:
    return {way: array(run[what])[:, -1] for way, run in numbers["training"].items()}


def answer(numbers: dict[str, Any]) -> str:
    errors, training = numbers["errors"], numbers["training"]
    cosine = {way: array(run["cosine"]).max() for way, run in training.items()}
    norms = {way: x.max(-1) for way, x in final(numbers, "sigma").items()}
    ranks = final(numbers, "stable rank")
    return (
        f"The last line is right (error {max(errors['line 4']):.1e}); the second, which lacks the "
        f"factor W, is off by {said(errors['line 2'], 2)}. Through sigma the gradient is "
        f"orthogonal to W (cosine at most {cosine['through, SGD']:.1e}); with sigma stopped it is "
        f"not ({cosine['stop, SGD']:.2f}), W grows along itself (sigma {said(norms['stop, SGD'])} "
        f"against {said(norms['through, SGD'])}), and its leading direction outgrows the others "
        f"(stable rank of layer 2 {said(ranks['stop, SGD'])} against "
        f"{said(ranks['through, SGD'])}). Accuracy: "
        + ", ".join(f"{way} {said(x)}" for way, x in final(numbers, "accuracy").items()) + "."
    )  # fmt: skip


def claims(numbers: dict[str, Any]) -> list[Claim]:
    errors, training = numbers["errors"], numbers["training"]
    right = max(max(errors[name]) for name in LINES if name != "line 2")
    cosine = {way: array(run["cosine"]).max() for way, run in training.items()}
    norms = {way: x.max(-1) for way, x in final(numbers, "sigma").items()}
    ranks = final(numbers, "stable rank")
    return [
        Claim("every line but the second is the derivative", right, high=1e-12),
        Claim("the second is not, without W", min(errors["line 2"]), low=1e-3),
        Claim("through sigma no force along W", cosine["through, SGD"], high=1e-5),
        Claim("with sigma stopped there is one", cosine["stop, SGD"], low=1e-2),
        Claim("which makes W grow", min(norms["stop, SGD"]) / max(norms["through, SGD"]), low=1.1),
        Claim("in its leading direction", max(ranks["stop, SGD"]) / min(ranks["through, SGD"]),
              high=0.9),
    ]  # fmt: skip


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    worst = [max(max(numbers["errors"][name]), 1e-17) for name in LINES]
    colours = [ink.orange if name == "line 2" else ink.blue for name in LINES]
    left.barh(LINES[::-1], worst[::-1], color=colours[::-1])
    left.set(xscale="log", xlabel="largest error against autodiff", title="Lines of the seed")
    styles = {"through": (ink.blue, "-"), "stop": (ink.orange, "--")}
    for way, (colour, style) in styles.items():
        run = numbers["training"][f"{way}, SGD"]
        label = {"through": "through sigma", "stop": "sigma stopped"}[way]
        cosine = np.maximum(array(run["cosine"]), 1e-9)
        band(middle, numbers["steps"], cosine, colour, label, style)
        band(right, numbers["steps"], array(run["sigma"]).max(-1), colour, label, style)
    middle.set(yscale="log", xlabel="updates (SGD)", title="|cosine| of W and its gradient")
    right.set(xlabel="updates (SGD)", title="largest sigma(W)")
    finish(middle, right)
