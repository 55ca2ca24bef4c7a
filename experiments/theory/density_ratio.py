"""The discriminator as an estimator of the log ratio of densities, from few samples.

For q = N(2 e_1, I) and p = N(0, I) in d dimensions ``f* = ln q/p = 2 x_1 - 2``. Networks f are
trained on 200 + 200 samples, and compared with f* on new points of the mixture. In f-GAN's terms
(Nowozin et al. 2016) every divergence has the same f behind an activation T = g(f) of its own:

    JS (the GAN):  E_q softplus(-f) + E_p softplus(f)           T = -softplus(-f)
    KL:            -E_q (1 + f) + E_p exp f                      T = 1 + f
    Pearson:       -2 E_q (exp f - 1) + E_p (exp 2f - 1)         T = 2 (exp f - 1)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.theory import nets
from experiments.theory.page import Claim, Track, array, band, finish, ink, said

QUESTION = "Is the density ratio that a discriminator learns inaccurate, and does SN help?"
K = (1, 2, 5)
N, N_TEST = 200, 2000
DIVERGENCES = {
    "JS": lambda q, p: jax.nn.softplus(-q).mean() + jax.nn.softplus(p).mean(),
    "KL": lambda q, p: -(1 + q).mean() + jnp.exp(p).mean(),
    "Pearson": lambda q, p: -2 * jnp.expm1(q).mean() + jnp.expm1(2 * p).mean(),
}


def samples(key: jax.Array, n: int, d: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(key, (2, n, d), jnp.float32)
    return x[0].at[:, 0].add(2), x[1]


def run(d: int, name: str, ks: tuple[int, ...], steps: int, every: int) -> dict[str, np.ndarray]:
    """Root mean square of f - f* on new points, over updates."""

    def problem(key: jax.Array) -> tuple[Any, Any]:
        train_key, test_key = jax.random.split(key)
        q, p = samples(train_key, N, d)
        test = jnp.concatenate(samples(test_key, N_TEST, d))
        look = lambda f: jnp.sqrt(jnp.mean((f(test) - (2 * test[:, 0] - 2)) ** 2))  # noqa: E731
        return lambda f: DIVERGENCES[name](f(q), f(p)), look

    return nets.discriminators((d, 64, 64, 1), problem, ks, steps, every)


def measure(fast: bool, track: Track) -> dict[str, Any]:
    steps, every = (500, 100) if fast else (2500, 50)
    dimensions, ks = ((8,), (2,)) if fast else ((2, 8, 32), K)
    errors = {f"d = {d}": run(d, "JS", ks, steps, every) for d in track(dimensions, "dimensions")}
    others = {}
    for name in track([] if fast else ["KL", "Pearson"], "divergences"):
        found = run(8, name, (2,), steps, every)
        others |= {f"{name}, {way}": x for way, x in found.items()}
    return {"errors": errors, "divergences": others, "steps": np.arange(0, steps + 1, every)}


def final(runs: Any) -> np.ndarray:
    return array(runs)[:, -1]


def answer(numbers: dict[str, Any]) -> str:
    at = {
        d: ", ".join(f"{way} {said(final(x))}" for way, x in runs.items())
        + f" (none at its best update {array(runs['none']).mean(0).min():.3g})"
        for d, runs in numbers["errors"].items()
    }
    others = ", ".join(
        f"{way} {said(final(x)) if np.isfinite(final(x)).all() else 'not finite'}"
        for way, x in numbers["divergences"].items()
    )
    return (
        "Yes: the root mean square error of the log ratio, whose own standard deviation is 2.8, is "
        + "; ".join(f"for {d}: {text}" for d, text in at.items())
        + f". A small K is bias, a large one variance. Other divergences (d = 8): {others}: KL "
        "finds the same f, Pearson's, whose samples weigh exp 2f, is worse than a constant."
    )


def claims(numbers: dict[str, Any]) -> list[Claim]:
    result = []
    for d, runs in numbers["errors"].items():
        ratio = final(runs["none"]).min() / final(runs["K = 2"]).max()
        result.append(Claim(f"{d}: K = 2 is closer than none", ratio, low=1.5))
    if len(numbers["errors"]) > 1:
        for d, runs in numbers["errors"].items():
            best = final(runs["K = 2"]).mean()
            result += [
                Claim(f"{d}: {name} is worse than K = 2", final(runs[name]).mean() / best, low=1)
                for name in ("K = 1", "K = 5")
            ]
    if others := {name: final(runs) for name, runs in numbers["divergences"].items()}:
        pearson = others["Pearson, K = 2"].min()
        result.append(Claim("KL finds the same f", others["KL, K = 2"].max(), high=2.0))
        result.append(Claim("Pearson's is worse than a constant", pearson, low=np.sqrt(8.0)))
    return result


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    panels = figure.subplots(1, len(numbers["errors"]) + 1, sharey=True)
    for axes, (d, runs) in zip(panels, numbers["errors"].items(), strict=False):
        for way, errors in runs.items():
            band(axes, numbers["steps"], errors, nets.COLOURS[way], way)
        axes.set(title=d)
    middle = numbers["errors"].get("d = 8", {})
    js = {f"JS, {way}": middle[way] for way in ("none", "K = 2") if way in middle}
    for way, errors in (js | numbers["divergences"]).items():
        colour = {"JS": ink.black, "KL": ink.red, "Pearson": ink.pink}[way.split(",")[0]]
        band(panels[-1], numbers["steps"], errors, colour, way, "--" if "none" in way else "-")
    panels[-1].set(title="d = 8, divergences")
    panels[0].set_ylabel("RMS error of ln q/p")
    for axes in panels:
        axes.set(yscale="log", xlabel="updates", ylim=(0.3, 100))
    finish(*panels)
