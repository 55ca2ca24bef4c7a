"""Small networks and their training, whole runs in one scan, so that seeds can be mapped over."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.data import load
from experiments.gan.methods import METHODS, Method
from experiments.theory.page import ink, over_seeds

Params = dict[str, dict[str, Array]]
# The methods' names here, and in experiments.gan.
NAMES = {"SN": "sn", "none": "none", "spectral penalty": "sn-regularization", "L2": "l2",
         "lasso": "lasso"}  # fmt: skip
COLOURS = {
    "SN": ink.blue, "none": ink.grey, "spectral penalty": ink.red, "L2": ink.green,
    "lasso": ink.orange, "K = 1": ink.blue, "K = 2": ink.green, "K = 5": ink.orange,
}  # fmt: skip


def mlp_init(key: Array, sizes: tuple[int, ...], *, biases: bool = True) -> Params:
    """Kernels (in, out) of variance 2 / in, and zero biases."""
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n, m), jnp.float32)
        params[f"layer_{i}"] = {"kernel": kernel * np.float32(np.sqrt(2 / n))}
        if biases:
            params[f"layer_{i}"]["bias"] = jnp.zeros(m, jnp.float32)
    return params


def mlp(params: Params, x: Array) -> Array:
    """Outputs (..., out) of a network of ReLUs at inputs (..., in)."""
    for i, layer in enumerate(params.values()):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"]
        x = x + jnp.broadcast_to(layer["bias"], x.shape) if "bias" in layer else x
    return x


def kernels(params: Params) -> list[Array]:
    """From the first layer to the last."""
    return [layer["kernel"] for layer in params.values()]


def spectra(params: Params) -> list[Array]:
    """Singular values of every kernel, the largest first."""
    return [jnp.linalg.svd(w, compute_uv=False) for w in kernels(params)]


def inner(a: Array, b: Array) -> Array:
    return jnp.sum(a * b)


@cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 64) in [-1, 1] and labels (n,)."""
    images, labels = load("digits", split)
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1, labels


def digits_loss(weights: Params, key: Array) -> Array:
    """Cross entropy of a batch of 128."""
    images, labels = map(jnp.asarray, digits("train"))
    rows = jax.random.randint(key, (128,), 0, len(labels))
    scores = mlp(weights, images[rows])
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels[rows]).mean()


def digits_accuracy(weights: Params) -> Array:
    """On the held-out digits."""
    images, labels = map(jnp.asarray, digits("test"))
    return jnp.mean(jnp.argmax(mlp(weights, images), -1) == labels, dtype=jnp.float32)


class Moment(NamedTuple):
    """A run as it is before an update."""

    key: Array  # of the update
    params: Params  # raw
    weights: Params  # that the network runs with
    loss: Array
    gradient: Params  # of the whole objective, at the raw parameters
    weight_gradient: Params  # of the loss, at the weights


def train(
    key: Array,
    params: Params,
    loss: Callable[[Params, Array], Array],
    look: Callable[[Moment], Any],
    *,
    method: str | Method = "none",
    tx: optax.GradientTransformation,
    steps: int,
    every: int,
) -> Any:
    """What ``look`` saw before the updates 0, every, 2 every, ... and after the last one.

    Args:
      key, params: of everything random in the run, and to begin with.
      loss: of the weights and a key.
      look: from a moment to a tree of arrays; the results are stacked.
      method: what is done to the weights, by its name here or as in experiments.gan.
      tx: the optimizer.
      steps, every: of the run, a multiple of those between two looks.
    """
    chosen = METHODS[NAMES[method]] if isinstance(method, str) else method
    strength = chosen.strength or 0.0
    start_key, run_key = jax.random.split(key)
    state = chosen.init(params, start_key, lambda conv: None)

    def prepared(params, state, i):
        """The method's state for update i, and the objective."""
        state, step_key = chosen.update(params, state), jax.random.fold_in(run_key, i)

        def objective(params):
            penalty = chosen.penalty(params, state, None) if strength else 0.0
            return loss(chosen.apply(params, state), step_key) + strength * penalty

        return state, step_key, objective

    def step(carry, i):
        params, state, opt_state = carry
        state, _, objective = prepared(params, state, i)
        updates, opt_state = tx.update(jax.grad(objective)(params), opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), None

    def stretch(carry, start):
        params, state, _ = carry
        state, step_key, objective = prepared(params, state, start)
        weights = chosen.apply(params, state)
        # What look does not use of this is not computed.
        value, gradient = jax.value_and_grad(objective)(params)
        at_weights = jax.grad(loss)(weights, step_key)
        seen = look(Moment(step_key, params, weights, value, gradient, at_weights))
        return lax.scan(step, carry, start + jnp.arange(every))[0], seen

    starts = jnp.arange(0, steps + 1, every)
    return lax.scan(stretch, (params, state, tx.init(params)), starts)[1]


def train_on_digits(
    look: Callable[[Moment], Any],
    method: str | Method,
    steps: int,
    every: int,
    *,
    biases: bool = True,
    tx: optax.GradientTransformation | None = None,
) -> Any:
    """``train`` of a network 64-64-64-10 on the digits, over the seeds; by Adam unless told."""

    def run(key: Array) -> Any:
        return train(
            key, mlp_init(key, (64, 64, 64, 10), biases=biases), digits_loss, look, method=method,
            tx=tx or optax.adam(1e-3), steps=steps, every=every,
        )  # fmt: skip

    return over_seeds(run)


def discriminators(
    sizes: tuple[int, ...],
    problem: Callable[[Array], tuple[Callable[..., Array], Callable[..., Any]]],
    ks: tuple[int, ...],
    steps: int,
    every: int,
) -> dict[str, Any]:
    """Trains f free, "none", and K times a network under SN, "K = 2", for every K; over the seeds.

    ``problem`` makes, from a key, an objective of f and a look at f, which maps (..., inputs) to
    (...). Layers have the given sizes.
    """

    def one(key: Array, method: str, k: Any) -> Any:
        net_key, problem_key = jax.random.split(key)
        objective, look = problem(problem_key)
        f = lambda weights: lambda x: k * mlp(weights, x)[..., 0]  # noqa: E731
        return train(
            key, mlp_init(net_key, sizes), lambda weights, _: objective(f(weights)),
            lambda moment: look(f(moment.weights)), method=method, tx=optax.adam(1e-3),
            steps=steps, every=every,
        )  # fmt: skip

    scales = jnp.asarray(ks, jnp.float32)
    free = over_seeds(lambda key: one(key, "none", 1.0))
    bound = over_seeds(lambda key: jax.vmap(lambda k: one(key, "SN", k))(scales))
    return {"none": free} | {
        f"K = {k}": jax.tree.map(lambda x, i=i: x[:, i], bound) for i, k in enumerate(ks)
    }
