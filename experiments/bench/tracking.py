"""How closely sigma follows moving weights, and what an update, a start and a calibration cost."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse.linalg import svds

import sn_jax
from experiments import data
from experiments.bench import ways
from experiments.bench.timing import Row, compare, interleaved

DRIFT = 0.02
BURN_IN = 20
KEY = jax.random.key(0)
_update = jax.jit(ways.update)


def rows(quick: bool) -> Iterator[list[Row]]:
    """Times of updates by size, then errors on drifting Gaussians and in a recorded training.

    The errors come last: the true norms take a CPU minutes, whatever the device.
    """
    sizes = {256: 1} if quick else {512: 8, 2048: 3}
    for size in sizes:
        yield from _times(size, large=size >= 2048)
    for size, walks in sizes.items():
        yield _errors(size, walks, steps=30 if quick else 50)
    yield training(200 if quick else 600)


def _errors(size: int, walks: int, steps: int) -> list[Row]:
    # Of several walks: what one vector loses depends on how often the two largest singular values
    # come close, and the ratio in one walk can be anything from 0.05 to 1.
    found = []
    for seed in range(walks):
        path = ({"kernel": w} for w in walk(gaussian(size, seed), BURN_IN + steps, seed))
        found.append(relative_errors(path, (1, 4)))
    errors = {k: np.mean([walk[k]["kernel"][BURN_IN:] for walk in found]) for k in (1, 4)}
    return [error_row(f"{size}x{size}, {DRIFT:.0%} drift", errors, 4, target=1 / 8)]


def _times(size: int, large: bool) -> Iterator[list[Row]]:
    params = {"kernel": gaussian(size)}
    updates = {f"n_vectors={k}": Updates(params, k) for k in (1, 4)}

    target = 1.2 if jax.default_backend() == "gpu" else 1.6
    seconds = interleaved(updates, rounds=20)
    yield compare(
        "tracking", f"{size}x{size}, {DRIFT:.0%} drift, update with n_vectors=4", seconds,
        ours="n_vectors=4", targets={"n_vectors=1": target} if large else None,
    )  # fmt: skip

    state = sn_jax.init(params, KEY)
    calls = {
        "init, 15 warm-up steps": partial(sn_jax.init, params, KEY),
        "calibrate": partial(sn_jax.calibrate, params, state),
        "n_vectors=1": updates["n_vectors=1"],
    }
    seconds = interleaved(calls, rounds=15)
    one = {"one update": seconds.pop("n_vectors=1")}
    yield [compare("tracking", f"{size}x{size}, {name}", {name: times} | one, ours=name)[0]
           for name, times in seconds.items()]  # fmt: skip


def gaussian(size: int, seed: int = 0) -> jax.Array:
    """A square Gaussian matrix with a norm near 2."""
    noise = np.random.default_rng([seed, 0]).standard_normal((size, size), np.float32)
    return jnp.asarray(noise / np.sqrt(np.float32(size)))


def walk(w: jax.Array, steps: int, seed: int = 0) -> Iterator[jax.Array]:
    """So many steps of a random walk from w: each is Gaussian, and DRIFT times as long as the
    weights."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        noise = rng.standard_normal(w.shape, np.float32)
        w = w + noise * (DRIFT * jnp.linalg.norm(w) / np.linalg.norm(noise))
        yield w


class Updates:
    """One power iteration a call, each from where the last one ended."""

    def __init__(self, params: dict[str, jax.Array], n_vectors: int):
        self._params, self.state = params, sn_jax.init(params, KEY, n_vectors=n_vectors)

    def __call__(self) -> sn_jax.State:
        self.state = _update(self._params, self.state)
        return self.state


def relative_errors(
    path: Iterable[dict[str, jax.Array]], n_vectors: Sequence[int]
) -> dict[int, dict[str, list[float]]]:
    """|1 - sigma / norm| of every 2-D kernel, at every step of one update each.

    Args:
      path: parameters, step by step; states are made for the first ones.
      n_vectors: of the states.

    Returns:
      Number of vectors -> name of the kernel -> errors.
    """
    states, errors = {}, {k: {} for k in n_vectors}
    for params in path:
        norms = {name: true_norm(np.asarray(w, np.float64)) for name, w in params.items()}
        for k in n_vectors:
            states[k] = _update(params, states.get(k) or sn_jax.init(params, KEY, n_vectors=k))
            for name, singular in states[k].items():
                error = abs(1 - float(singular.sigma) / norms[name])
                errors[k].setdefault(name, []).append(error)
    return errors


def true_norm(w: np.ndarray) -> float:
    """By LAPACK, or ARPACK where that takes too long; no iteration of sn_jax."""
    if min(w.shape) <= 256:
        return np.linalg.norm(w, 2)
    return svds(w, k=1, tol=1e-7, return_singular_vectors=False, rng=0)[0]


def error_row(case: str, errors: dict[int, float], n_vectors: int, target: float | None) -> Row:
    """Mean error with so many vectors over that with one, by number of vectors in ``errors``."""
    return Row(
        "tracking", f"{case}, n_vectors={n_vectors}", "mean error of sigma", errors[n_vectors],
        errors[1], "n_vectors=1", errors[n_vectors] / errors[1], target=target,
    )  # fmt: skip


def training(steps: int) -> list[Row]:
    """Kernels recorded while a small network learns the digits in so many steps of Adam; each
    number of vectors sees the same ones."""
    found = relative_errors(record(steps), (1, 2, 4))
    errors = {
        k: float(np.mean([values[BURN_IN:] for values in kernels.values()]))
        for k, kernels in found.items()
    }
    return [
        error_row(f"{steps} steps on the digits", errors, k, target)
        for k, target in [(2, None), (4, 1 / 8)]
    ]


def record(steps: int) -> list[dict[str, jax.Array]]:
    """The raw kernels of a normalized network, 64-256-256-10, after every step of Adam at 1e-3 on
    batches of 64."""
    images, labels = data.load("digits", "train")
    images = jnp.asarray(images.reshape(len(images), -1) / 255, jnp.float32)
    rng = np.random.default_rng(0)
    sizes = [64, 256, 256, 10]
    params = {
        f"{i}/kernel": jnp.asarray(rng.standard_normal(shape) * np.sqrt(2 / shape[0]), jnp.float32)
        for i, shape in enumerate(pairwise(sizes))
    }
    tx = optax.adam(1e-3)
    state, opt_state = sn_jax.init(params, KEY), tx.init(params)

    @jax.jit
    def step(params, state, opt_state, x, y):
        def loss(params):
            normalized, new_state = sn_jax.spectral_normalize(params, state, bound=2.0)
            *hidden, last = normalized.values()
            h = x
            for w in hidden:
                h = jax.nn.relu(h @ w)
            losses = optax.softmax_cross_entropy_with_integer_labels(h @ last, y)
            return losses.mean(), new_state

        grads, state_ = jax.grad(loss, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), state_, opt_state_

    recorded = []
    for _ in range(steps):
        rows = rng.integers(len(images), size=64)
        params, state, opt_state = step(params, state, opt_state, images[rows], labels[rows])
        recorded.append(params)
    return recorded
