"""Ties of the largest singular values: how improbable, what happens on one, what training does.

The m x n matrices with sigma_1 = sigma_2 > 0 have codimension 2: one singular value fewer is free,
and the stabilizer of the singular vectors gains a rotation of the tied plane, one dimension more.
So a random matrix with a density has no tie with probability 1, and its gap is below eps with a
probability of order eps^2; for complex matrices, whose stabilizer gains more, eps^3. On a tie and
near it any unit u and v give an eps-subgradient u v^T, with ``eps = sigma - <u, W v>``:

    |W'| >= <u, W' v> = |W| + <u v^T, W' - W> - eps   for all W'.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sn_jax
from experiments.theory import nets
from experiments.theory.page import SEEDS, Claim, Track, array, band, finish, ink, over_seeds, said

QUESTION = "Multiplicities happen with probability 0? And if one does, what then?"
ENSEMBLES = {"2x2": (2, 2, False), "3x2": (3, 2, False), "8x8": (8, 8, False),
             "complex 2x2": (2, 2, True)}  # fmt: skip


def gaps_of(name: str, seed: int, n: int) -> np.ndarray:
    """sigma_1 - sigma_2 of n Gaussian matrices, sorted."""
    *shape, is_complex = ENSEMBLES[name]
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, *shape))
    w = w + 1j * rng.standard_normal(w.shape) if is_complex else w
    s = np.linalg.svd(w, compute_uv=False)
    return np.sort(s[:, 0] - s[:, 1])


def slope(gaps: np.ndarray, fraction: float) -> float:
    """Of log P(gap < eps), by maximum likelihood from this smallest fraction (Hill's estimator)."""
    lowest = gaps[: int(fraction * len(gaps))]
    return float(1 / np.mean(np.log(lowest[-1] / lowest[:-1])))


def violations(key: jax.Array) -> jax.Array:
    """How many of 400 pairs after two steps of power iteration are no eps-subgradients."""
    w, other, start = jax.random.normal(key, (3, 400, 5, 4), jnp.float64)
    w = w.at[::2, :, 1].set(jnp.roll(w[::2, :, 0], 1, 1)).at[::2, :, 2:].multiply(0.1)  # near ties
    multiply = lambda v: jnp.einsum("nij,nj->ni", w, v)  # noqa: E731
    found = sn_jax.power_iteration(multiply, start[:, 0], 2, batch_ndim=1)
    norm, others = jnp.linalg.norm(w, 2, (1, 2)), jnp.linalg.norm(other, 2, (1, 2))
    change = jnp.einsum("ni,nij,nj->n", found.u, other - w, found.v)
    return jnp.sum(others < norm + change - (norm - found.sigma) - 1e-12)


def on_a_tie(key: jax.Array) -> dict[str, jax.Array]:
    """The gradients of sigma at diag(1, 1, .3): their rank, and whether they are subgradients."""
    w = jnp.diag(jnp.array([1.0, 1.0, 0.3]))
    state = sn_jax.init({"kernel": w}, key, warmup=100)
    ours = jax.grad(lambda w: sn_jax.spectral_norms({"kernel": w}, state)["kernel"])(w)
    by_svd = jax.grad(lambda w: jnp.linalg.norm(w, 2))(w)
    others = w + jax.random.normal(key, (1000, 3, 3), w.dtype)
    norms = jnp.linalg.norm(others, 2, (1, 2))
    margin = lambda g: jnp.min(norms - 1 - jnp.sum((others - w) * g, (1, 2)))  # noqa: E731
    return {
        "power iteration": ours,
        "second singular value": jnp.linalg.svd(ours, compute_uv=False)[1],
        "jnp.linalg.norm": by_svd,
        "least margin": jnp.minimum(margin(ours), margin(by_svd)),
    }


def look(moment: nets.Moment) -> dict[str, jax.Array]:
    """Relative gaps of all layers; in layer 2, the values within a tenth of the largest."""
    s = [s / s[0] for s in nets.spectra(moment.params)]
    return {"gaps": jnp.stack([1 - x[1] for x in s]), "near the top": jnp.sum(s[1] > 0.9)}


def measure(fast: bool, track: Track) -> dict[str, Any]:
    n, fraction = (20_000, 0.02) if fast else (400_000, 0.005)
    slopes, curves = {}, {}
    for name in track(ENSEMBLES, "random matrices"):
        samples = [gaps_of(name, seed, n) for seed in SEEDS]
        slopes[name] = [slope(gaps, fraction) for gaps in samples]
        at = np.unique(np.geomspace(20, n, 40).astype(int)) - 1
        curves[name] = {"eps": samples[0][at], "P": (at + 1) / n}
    with jax.enable_x64(True):
        tie, violated = over_seeds(lambda key: (on_a_tie(key), violations(key)))
    steps, every, methods = (200, 20, ["SN"]) if fast else (4000, 20, nets.NAMES)
    runs = {m: nets.train_on_digits(look, m, steps, every) for m in track(methods, "training")}
    found = {x: {m: run[x] for m, run in runs.items()} for x in ("gaps", "near the top")}
    return {"slopes": slopes, "curves": curves, "on a tie": tie, "violations of 400": violated,
            "steps": np.arange(0, steps + 1, every), **found}  # fmt: skip


def mean_gap(runs: Any) -> np.ndarray:
    """Geometric mean over layers: (seeds, times)."""
    return np.exp(np.log(array(runs)).mean(-1))


def answer(numbers: dict[str, Any]) -> str:
    slopes, gaps = numbers["slopes"], numbers["gaps"]
    smallest, least = min((array(runs).min(), method) for method, runs in gaps.items())
    near = {method: array(runs)[:, -1] for method, runs in numbers["near the top"].items()}
    ends = (f"{method} {said(mean_gap(runs)[:, -1], 2)}, {said(near[method], 2)}"
            for method, runs in gaps.items())  # fmt: skip
    return (
        "Yes, for any law with a density: P(gap < eps) falls as eps to the "
        + ", ".join(f"{said(slopes[name], 3)} ({name})" for name in slopes)
        + f". A tie does no harm: {sum(numbers['violations of 400'])} of 1200 pairs were no "
        "eps-subgradients; on one power iteration returns a pair that depends on its start, "
        "jnp.linalg.norm half the identity. Training made none: the geometric mean of gaps is "
        f"{said(mean_gap(gaps['SN'])[:, 0], 2)} at the start, at the end (then the number of "
        f"values within a tenth of the largest in layer 2) {'; '.join(ends)}; smallest seen "
        f"{smallest:.1e} ({least})."
    )


def claims(numbers: dict[str, Any]) -> list[Claim]:
    tie, orders = numbers["on a tie"], []
    for name, slopes in numbers["slopes"].items():
        order, mean = 3 if "complex" in name else 2, np.mean(slopes)
        orders.append(Claim(f"{name}: of order eps^{order}", mean, order - 0.25, order + 0.25))
    half = np.abs(array(tie["jnp.linalg.norm"]) - np.diag([0.5, 0.5, 0])).max()
    apart = np.ptp(array(tie["power iteration"]), axis=0).max()
    smallest = min(array(runs).min() for runs in numbers["gaps"].values())
    return [
        *orders,
        Claim("every pair is an eps-subgradient", sum(numbers["violations of 400"]), high=0),
        Claim("on a tie a rank of one", max(tie["second singular value"]), high=1e-12),
        Claim("which depends on the start", apart, low=0.01),
        Claim("and jnp.linalg.norm half the identity", half, high=1e-12),
        Claim("both are subgradients", min(tie["least margin"]), low=-1e-12),
        Claim("training makes no tie", smallest, low=1e-6),
    ]


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    colours = (ink.blue, ink.sky, ink.green, ink.pink)
    for (name, curve), colour in zip(numbers["curves"].items(), colours, strict=True):
        label = f"{name}: slope {np.mean(numbers['slopes'][name]):.2f}"
        left.loglog(array(curve["eps"]), array(curve["P"]), color=colour, label=label)
    left.set(xlabel="eps", ylabel="P(gap < eps)", title="Gaussian matrices")
    for method, runs in numbers["gaps"].items():
        colour, logs = nets.COLOURS[method], np.log10(array(runs)).ravel()
        band(middle, numbers["steps"], mean_gap(runs), colour, method)
        right.hist(logs, 40, density=True, histtype="step", color=colour, label=method)
    middle.set(yscale="log", xlabel="updates", title="Relative gap (geometric mean of layers)")
    right.set(xlabel="log10 of the relative gap", title="All gaps seen", ylabel="density")
    finish(left, middle, right)
