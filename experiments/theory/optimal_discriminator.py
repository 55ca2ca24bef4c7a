"""The optimal discriminator, free and K-Lipschitz, and the gradient that it leaves to a generator.

With D = sigmoid(f), the loss ``E_q softplus(-f) + E_p softplus(f)`` of data q and generator p has
the optimum ``f* = ln q - ln p``, whose slope grows without limit. Among K-Lipschitz functions of
one variable it is a convex programme in the slopes, between -K and K. Where the supports are
disjoint f grows for ever; the generator receives ``sigmoid(f) |f'|`` from ln(1 - D), and
``sigmoid(-f) |f'|`` from the non-saturating -ln D.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from experiments.theory import nets
from experiments.theory.page import Claim, Track, array, band, finish, ink, said

QUESTION = "What do an unrestricted and a K-Lipschitz discriminator learn, and what does G receive?"
K = (1, 2, 5)
X = np.linspace(-4.5, 4.5, 301)
DATA, GENERATED = norm(1, 0.6).pdf(X), norm(-1, 0.35).pdf(X)
F_STAR = norm(1, 0.6).logpdf(X) - norm(-1, 0.35).logpdf(X)
STEP = X[1] - X[0]


def loss_of(f: Any, xp: Any = np) -> Any:
    """By the rectangle rule, from f on the grid; ``xp`` is NumPy or JAX's."""
    q, p = (density.astype(f.dtype) * f.dtype.type(STEP) for density in (DATA, GENERATED))
    return xp.sum(q * xp.logaddexp(0, -f) + p * xp.logaddexp(0, f))


def lipschitz_optimum(k: float) -> dict[str, Any]:
    """Values f on the grid and their loss, by L-BFGS-B in the first value and the slopes."""
    f_of = lambda z: z[0] + STEP * np.concatenate([[0], np.cumsum(z[1:])])  # noqa: E731

    def objective(z):
        f = f_of(z)
        at_f = STEP * (GENERATED * expit(f) - DATA * expit(-f))
        after = np.cumsum(at_f[::-1])[::-1]  # of each value and those after it
        return loss_of(f), np.concatenate([after[:1], STEP * after[1:]])

    bounds = [(None, None)] + [(-k, k)] * (len(X) - 1)
    exact = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(objective, 0 * X, jac=True, bounds=bounds, options=exact)
    return {"f": f_of(found.x), "loss": found.fun}


def slopes(f: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(jax.grad(lambda x: f(x[None])[0]))(x)


def learned(ks: tuple[int, ...], steps: int) -> dict[str, Any]:
    """In one dimension: the loss, f on the grid and its largest slope, at the end."""
    x = jnp.asarray(X[:, None], jnp.float32)

    def look(f):
        return {"loss": loss_of(f(x), jnp), "f": f(x), "slope": jnp.abs(slopes(f, x)).max()}

    problem = lambda key: (lambda f: loss_of(f(x), jnp), look)  # noqa: E731
    runs = nets.discriminators((1, 64, 64, 1), problem, ks, steps, steps)
    return jax.tree.map(lambda x: x[:, -1], runs)


def disjoint(ks: tuple[int, ...], steps: int, every: int) -> dict[str, Any]:
    """Two parallel segments of length 1 at distance 1: what G receives over updates of D."""
    t = jnp.linspace(0, 1, 64, dtype=jnp.float32)
    real, fake = jnp.stack([0 * t, t], 1), jnp.stack([1 + 0 * t, t], 1)

    def look(f):
        size, value = jnp.linalg.norm(slopes(f, fake), axis=1), f(fake)
        return {"of f": size.mean(), "saturating": (jax.nn.sigmoid(value) * size).mean(),
                "non-saturating": (jax.nn.sigmoid(-value) * size).mean()}  # fmt: skip

    def objective(f):
        return (jax.nn.softplus(-f(real)) + jax.nn.softplus(f(fake))).mean()

    return nets.discriminators((2, 64, 64, 1), lambda key: (objective, look), ks, steps, every)


def measure(fast: bool, track: Track) -> dict[str, Any]:
    ks, steps, every = (K[:1], 300, 100) if fast else (K, 6000, 60)
    stages = {"learned": lambda: learned(ks, steps), "disjoint": lambda: disjoint(ks, steps, every)}
    runs = {name: stages[name]() for name in track([*stages], "training")}
    exact, times = {f"K = {k}": lipschitz_optimum(k) for k in ks}, np.arange(0, steps + 1, every)
    return {"optimum": loss_of(F_STAR), "exact": exact, "steps": times, **runs}


def received(numbers: dict[str, Any], name: str, way: str) -> np.ndarray:
    """By G at the end, on disjoint supports, of every seed."""
    return array(numbers["disjoint"][name][way])[:, -1]


def answer(numbers: dict[str, Any]) -> str:
    exact, learned = numbers["exact"], numbers["learned"]
    losses = (f"{name} {said(learned[name]['loss'], 4)} against {exact[name]['loss']:.4f}"
              for name in exact)  # fmt: skip
    left = (f"{said(received(numbers, name, 'saturating'))} ({name}; {k * expit(-k / 2):.4f})"
            for name, k in zip(exact, K, strict=False))  # fmt: skip
    free = {way: said(received(numbers, "none", way)) for way in numbers["disjoint"]["none"]}
    return (
        f"Free, f reaches the loss {said(learned['none']['loss'])} (optimum "
        f"{numbers['optimum']:.4f}), under SN nearly the exact K-Lipschitz optimum: "
        f"{', '.join(losses)}. On disjoint supports the free slope at G's points is {free['of f']} "
        f"in the end, of which ln(1 - D) leaves {free['saturating']} and -ln D "
        f"{free['non-saturating']}; under SN ln(1 - D) leaves (closed form K sigmoid(-K/2) "
        f"second) {', '.join(left)}."
    )


def claims(numbers: dict[str, Any]) -> list[Claim]:
    result = []
    for name, k in zip(numbers["exact"], K, strict=False):
        learned, exact = numbers["learned"][name], numbers["exact"][name]["loss"]
        left = received(numbers, name, "saturating").mean() / (k * expit(-k / 2))
        result += [
            Claim(f"{name}: slope at most K", max(learned["slope"]) / k, high=1.02),
            Claim(f"{name}: loss of the optimum", max(learned["loss"]) / exact, 0.98, 1.05),
            Claim(f"{name}: ln(1 - D) leaves K sigmoid(-K/2)", left, 0.8, 1.3),
        ]
    kept = received(numbers, "none", "non-saturating") / received(numbers, "none", "of f")
    little = received(numbers, "none", "saturating") / received(numbers, "K = 1", "saturating")
    return [
        *result,
        Claim("free: ln(1 - D) leaves less than under SN", little.max(), high=0.2),
        Claim("free: -ln D leaves nearly all", kept.min(), low=0.9),
    ]


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, slope, middle, right = figure.subplots(1, 4)
    left.plot(X, F_STAR, ":", color=ink.red, label="f*")
    for name, learned in numbers["learned"].items():
        colour = nets.COLOURS[name]
        left.plot(X, array(learned["f"])[0], color=colour, label=name)
        slope.plot(X[1:], np.abs(np.diff(learned["f"][0])) / STEP, color=colour, label=name)
        if name in numbers["exact"]:
            left.plot(X, numbers["exact"][name]["f"], "--", color=colour, lw=1)
        runs = numbers["disjoint"][name]
        band(middle, numbers["steps"], runs["saturating"], colour, name)
        band(right, numbers["steps"], runs["non-saturating"], colour, name)
    left.set(ylim=(-16, 16), xlabel="x", title="f (dashed: optimum)")
    slope.set(yscale="log", xlabel="x", title="|f'|", ylim=(0.3, 60))
    middle.set(yscale="log", xlabel="updates of D", title="ln(1 - D): |gradient| at G")
    right.set(yscale="log", xlabel="updates of D", title="-ln D: |gradient| at G")
    finish(left, slope, middle, right)
