"""Power iteration against its theory: rates for planted gaps, and what tracking costs in training.

After k steps from ``v = sum c_i v_i`` the part of v outside of the leading vector has shrunk by
``(sigma_2 / sigma_1)^(2k)``. The estimate ``sigma = |W v|`` is stationary at the leading vector, so
it errs by the square of that, ``(sigma_2 / sigma_1)^(4k)``, and always from below. In training one
step an update is enough only because it goes on from the last vectors (warm), while W drifts; then
what counts is how far the true norm of ``W / sigma`` gets above 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sn_jax
from experiments.gan.methods import METHODS
from experiments.theory import nets
from experiments.theory.page import Claim, Track, array, band, ink, over_seeds, said

QUESTION = "How fast is power iteration, and is one step an update enough?"
GAPS = {"0.99": 700, "0.9": 100, "0.5": 16}  # sigma_2 / sigma_1 -> steps
VECTORS = (1, 2, 4, 8)
COLD = (1, 5, 15)


def planted(key: jax.Array, r: float, steps: int) -> dict[str, jax.Array]:
    """Errors of v (sine of the angle) and of sigma after every step, for sigma = 1, r, <= r / 2."""
    keys = jax.random.split(key, 3)
    u, v = (jax.random.orthogonal(k, 32, dtype=jnp.float64) for k in keys[:2])
    s = jnp.concatenate([jnp.array([1.0, r]), jnp.linspace(r / 2, 0.0, 30)])
    w = u @ jnp.diag(s) @ v.T

    def step(x, _):
        found = sn_jax.power_iteration(lambda x: w @ x, x, 1)
        outside = found.v - v[:, 0] * jnp.dot(v[:, 0], found.v)
        return found.v, {"vector": jnp.linalg.norm(outside), "sigma": 1 - found.sigma}

    return jax.lax.scan(step, jax.random.normal(keys[2], (32,), jnp.float64), length=steps)[1]


def rate(errors: np.ndarray) -> float:
    """The factor a step, fitted where the second vector leads and no rounding is seen."""
    (steps,) = np.nonzero((errors < 1e-3) & (errors > 1e-12))
    return float(np.exp(np.polyfit(steps, np.log(errors[steps]), 1)[0]))


def tracked(n_vectors: int, cold: tuple[int, ...], steps: int, every: int) -> dict[str, jax.Array]:
    """Digits under SN: the largest true norm of a normalized kernel, and what cold starts leave."""
    start = lambda params, key, views: sn_jax.init(params, key, n_vectors=n_vectors)  # noqa: E731
    method = METHODS["sn"]._replace(init=start)

    def look(moment: nets.Moment) -> dict[str, jax.Array]:
        true = jnp.stack([s[0] for s in nets.spectra(moment.params)])
        seen = {"warm": jnp.stack([s[0] for s in nets.spectra(moment.weights)]).max()}
        for n in cold:
            started = sn_jax.init(moment.params, moment.key, warmup=n)
            sigma = jnp.stack([*sn_jax.spectral_norms(moment.params, started).values()])
            seen[f"cold, {n}"] = (true / sigma).max()
        return seen

    return nets.train_on_digits(look, method, steps, every)


def measure(fast: bool, track: Track) -> dict[str, Any]:
    curves, rates = {}, {}
    with jax.enable_x64(True):
        for r in track(["0.9"] if fast else GAPS, "planted gaps"):
            curves[r] = over_seeds(lambda key, r=r: planted(key, float(r), GAPS[r]))
            rates[r] = {what: [rate(x) for x in errors] for what, errors in curves[r].items()}
    curves = {r: {what: x[0] for what, x in of.items()} for r, of in curves.items()}  # one is drawn
    steps, every, vectors, cold = (120, 2, (1, 8), (1,)) if fast else (1200, 1, VECTORS, COLD)
    training = {}
    for n in track(vectors, "training"):
        found = tracked(n, cold if n == 1 else (), steps, every)
        training |= {("warm, " + str(n) if way == "warm" else way): x for way, x in found.items()}
    worst = {way: x[:, 10:].max(1) for way, x in training.items()}
    shown = slice(None, None, max(1, steps // every // 120))
    training = {way: x[:, shown] for way, x in training.items() if "warm" in way}
    times = np.arange(0, steps + 1, every)[shown]
    return {"rates": rates, "curves": curves, "worst": worst, "steps": times, "training": training}


def answer(numbers: dict[str, Any]) -> str:
    slowest = next(iter(numbers["rates"]))
    found, r, worst = numbers["rates"][slowest], float(slowest), numbers["worst"]
    ways = sorted(worst, key=lambda way: int(way[6:]))
    warm = (f"{said(worst[way], 4)} with {way[6:]}" for way in ways if way.startswith("warm"))
    cold = (f"{said(worst[way])} after {way[6:]}" for way in ways if way.startswith("cold"))
    return (
        "As (sigma_2/sigma_1)^(2k) says for the vector, and with the square of it for sigma: at "
        f"ratio {slowest} the errors shrink by {np.mean(found['vector']):.4f} and "
        f"{np.mean(found['sigma']):.4f} a step (theory {r**2:.4f}, {r**4:.4f}). One warm step an "
        f"update lets true norms reach, by the number of vectors, {'; '.join(warm)}; cold starts, "
        f"by the number of steps, {'; '.join(cold)}."
    )


def claims(numbers: dict[str, Any]) -> list[Claim]:
    result = []
    for r, found in numbers["rates"].items():
        for what, power in (("vector", 2), ("sigma", 4)):
            theory = float(r) ** power
            off = max(abs(x - theory) / (1 - theory) for x in found[what])
            result.append(Claim(f"{what} at ratio {r} shrinks by r^{power}", off, high=0.05))
    worst = {way: array(x) for way, x in numbers["worst"].items()}
    excess = lambda way: worst[way].mean() - 1  # noqa: E731
    most = [way for way in worst if way.startswith("warm")][-1]
    return [
        *result,
        Claim("an estimate is from below", min(x.min() for x in worst.values()), low=1 - 1e-5),
        Claim("more vectors follow closer", excess(most) / excess("warm, 1"), high=0.7),
        Claim("one cold step is worse", excess("cold, 1") / excess("warm, 1"), low=2),
    ]


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    colours = dict(zip(GAPS, (ink.blue, ink.orange, ink.green), strict=True))
    for r, curves in numbers["curves"].items():
        for what, style, power in (("vector", "-", 2), ("sigma", "--", 4)):
            error = np.abs(array(curves[what]))
            k = np.arange(1, len(error) + 1)
            label = f"ratio {r}" if what == "vector" else None
            left.loglog(k, error, style, color=colours[r], label=label, lw=1.6)
            (fitted,) = np.nonzero(error < 1e-3)
            at = fitted[0]
            theory = error[at] * float(r) ** (power * (k - k[at]))
            left.loglog(k[at:], theory[at:], ":", color=ink.black, lw=1)
    left.set(ylim=(1e-15, 2), xlabel="steps k", title="Error of v, sigma (dashed), theory")
    left.legend(loc="lower left")
    styles = zip((ink.red, ink.orange, ink.sky, ink.blue), ("-", "--", "-.", "-"), strict=True)
    for (way, runs), (colour, style) in zip(numbers["training"].items(), styles, strict=False):
        band(middle, numbers["steps"], runs, colour, f"vectors: {way[6:]}", style)
    middle.set(xlabel="updates", title="Largest true norm of W/sigma")
    middle.legend(fontsize=8)
    for kind, colour, unit in (("warm", ink.blue, "vectors"), ("cold", ink.orange, "steps")):
        ways = sorted((way for way in numbers["worst"] if kind in way), key=lambda x: int(x[6:]))
        heights = [np.mean(numbers["worst"][way]) - 1 for way in ways]
        names = [f"{way[6:]} {'v' if kind == 'warm' else 's'}" for way in ways]
        right.bar(names, heights, color=colour, label=f"{kind}, by {unit}")
    right.set(title="Worst excess over 1", ylim=(0, 1.2))
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
