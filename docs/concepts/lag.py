"""How far one step lags: `python docs/concepts/lag.py` prints the table of estimates.md.

A classifier of scikit-learn's digits, 64-w-w-10, every kernel normalized at every step of Adam;
the true norm of the normalized w×w kernel, by an SVD in float64 at every fifth step from the 20th
on. It would be 1 if the estimate were exact.
"""

import argparse
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import sn_jax

WAYS = {"1 vector": {}, "4 vectors": {"n_vectors": 4}, "5 steps": {"n_steps": 5}}
RATES = (1e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1)


def network(params, x):
    *layers, last = params.values()
    for layer in layers:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return 10 * (x @ last["kernel"] + last["bias"])


def init(key, width):
    sizes = (64, width, width, 10)
    return {
        f"dense{i}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, i), (m, n)) / jnp.sqrt(m),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


@partial(jax.jit, static_argnames="n_steps")
def step(params, state, opt_state, rate, x, y, *, n_steps):
    _, state = sn_jax.spectral_normalize(params, state, n_steps=n_steps)

    def loss(params):
        used, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        losses = optax.softmax_cross_entropy_with_integer_labels(network(used, x), y)
        return losses.mean(), used["dense1"]["kernel"]

    grads, kernel = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optax.adam(rate).update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state, kernel


def true_norms(width, rate, seed, *, n_vectors=1, n_steps=1, total=300):
    """The true norms of one run."""
    data = load_digits()
    rng = np.random.default_rng(seed)
    params = init(jax.random.key(seed), width)
    state = sn_jax.init(params, jax.random.key(9), n_vectors=n_vectors)
    opt_state = optax.adam(rate).init(params)
    norms = []
    for i in range(total):
        rows = rng.choice(len(data.target), 128, replace=False)
        x, y = jnp.asarray(data.data[rows] / 16, jnp.float32), jnp.asarray(data.target[rows])
        params, state, opt_state, kernel = step(
            params, state, opt_state, rate, x, y, n_steps=n_steps
        )
        if i >= 20 and i % 5 == 0:
            norms.append(np.linalg.norm(np.asarray(kernel, np.float64), 2))
    return norms


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args()
    cells = [(rate, width) for rate in RATES for width in options.widths]
    print(f"| Adam at | kernel | {' | '.join(WAYS)} |")
    print(f"| --- | --- |{' --- |' * len(WAYS)}")
    with tqdm(total=len(cells) * len(WAYS), disable=options.no_progress) as bar:
        for rate, width in cells:
            row = [f"{rate:g}", f"{width}×{width}"]
            for way in WAYS.values():
                norms = np.concatenate([true_norms(width, rate, s, **way) for s in SEEDS])
                row.append(f"{norms.mean():.3f}, {norms.max():.3f}")
                bar.update()
            bar.write(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
