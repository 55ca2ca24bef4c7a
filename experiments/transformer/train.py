"""Training the decoder in three ways: unconstrained, sigma-reparametrized, and projected."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import sn_jax
import sn_jax.linen
import sn_jax.transforms
from experiments.mesh import layout
from experiments.transformer.model import LAYOUT, Decoder

Method = Literal["baseline", "reparam", "projection"]
# Tables of rows are no linear maps of a hidden state.
RULES = {r"(embed|positions)/embedding": None}


class Sizes(NamedTuple):
    """Of the model and of a batch."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int


class Trained(NamedTuple):
    """A model after training."""

    kernels: dict[str, Array]  # by path, as the model runs with them
    views: dict[str, sn_jax.View]  # by path
    history: dict[str, list[float]]  # name -> a value for each step
    seconds: float  # of training, compiling included


def text(most: int = 2**21) -> np.ndarray:
    """So many bytes, at most, of the standard library's own modules and documentation, in the
    order of their names."""
    import os
    import pydoc_data

    files = [
        *sorted(Path(pydoc_data.__file__).parent.glob("topics.py")),
        *sorted(Path(os.__file__).parent.glob("*.py")),
    ]
    return np.frombuffer(b"".join(file.read_bytes() for file in files)[:most], np.uint8)


def batches(tokens: np.ndarray, sizes: Sizes, seed: int) -> Callable[[int], np.ndarray]:
    """step -> (batch, context + 1) random windows; a function of the seed and the step alone."""

    def batch(step: int) -> np.ndarray:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(tokens) - sizes.context, sizes.batch)
        return tokens[starts[:, None] + np.arange(sizes.context + 1)].astype(np.int32)

    return batch


def settled(values: list[float]) -> float:
    """The mean over the last tenth of training."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def next_byte(model: Decoder, params: Any, tokens: Array) -> tuple[Array, dict[str, Array]]:
    """Mean cross entropy of each byte of (batch, context + 1) given those before it, and what the
    model says of its attention."""
    logits, statistics = model.apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), statistics


def train(
    method: Method,
    sizes: Sizes,
    mesh: Mesh,
    *,
    steps: int,
    learning_rate: float,
    bound: float,
    seed: int,
    progress: bool = False,
) -> Trained:
    """Train from scratch.

    Args:
      method: "reparam" runs with ``gamma W / sigma(W)`` and learns gamma for every kernel and layer
        (Zhai et al. 2023); "projection" puts every kernel back into the ball of norm ``bound``
        after each update.
      sizes: of model and batch.
      mesh: with axes "fsdp" and "tp"; batches are split over "fsdp".
      steps, learning_rate: of Adam, with a warm-up over the first tenth.
      bound: of the projection, on the largest singular value.

    Raises:
      UserError: the mesh does not divide the model.
    """
    started = time.perf_counter()
    model = Decoder(sizes.width, sizes.depth, sizes.heads)
    batch = batches(text(), sizes, seed)
    k_params, k_state = jax.random.split(jax.random.key(seed))
    example = jnp.zeros((1, sizes.context), jnp.int32)

    def make(key):
        return model.init(key, example)["params"]

    shardings = layout(jax.eval_shape(make, k_params), LAYOUT, mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(make, out_shardings=shardings)(k_params)
        # The layers' axis of scanned kernels is found to be a batch axis: a norm for each.
        views = sn_jax.linen.views(model, {"params": params}, example, rules=RULES)
        state = jax.jit(partial(sn_jax.init, rules=views))(params, k_state)
        gamma = sn_jax.spectral_norms(params, state) if method == "reparam" else {}
        trained = {"params": params, "gamma": gamma}  # gamma = sigma: begins as the same model

        warmed = optax.warmup_constant_schedule(0, learning_rate, max(1, steps // 10))
        optimizer = optax.adam(warmed, b2=0.95)
        if method == "projection":
            rules = {f"params/{path}": view for path, view in views.items()}
            project = sn_jax.transforms.project_spectral_norm(rules, k_state, bound=bound)
            optimizer = optax.chain(optimizer, project)
        opt_state = jax.jit(optimizer.init)(trained)

        def kernels_of(trained, state):
            if method != "reparam":
                return trained["params"]
            return sn_jax.spectral_normalize(
                trained["params"], state, n_steps=0, bound=trained["gamma"]
            )[0]

        @partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(trained, state, opt_state, tokens):
            _, state = sn_jax.spectral_normalize(trained["params"], state)

            def loss(trained):
                return next_byte(model, kernels_of(trained, state), tokens)

            (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
            updates, opt_state = optimizer.update(grads, opt_state, trained)
            trained = optax.apply_updates(trained, updates)
            sigmas = trained["gamma"] or sn_jax.spectral_norms(trained["params"], state)
            report = {
                "loss": value,
                "largest logit": jnp.max(statistics["largest logit"]),
                "maximum entropy": jnp.max(statistics["maximum entropy"]),
                "minimum entropy": jnp.min(statistics["minimum entropy"]),
                "largest sigma": jnp.max(jnp.stack([jnp.max(s) for s in sigmas.values()])),
            }
            return trained, state, opt_state, report

        reports = []
        split = NamedSharding(mesh, P("fsdp"))
        for i in tqdm(range(steps), method, disable=not progress):
            tokens = jax.device_put(batch(i), split)
            trained, state, opt_state, report = step(trained, state, opt_state, tokens)
            reports.append(report)
        reports = jax.device_get(reports)
        kernels = kernels_of(trained, state)
    flat = flatten_dict(kernels, sep="/")
    return Trained(
        kernels={path: flat[path] for path in views},
        views=views,
        history={name: [float(r[name]) for r in reports] for name in reports[0]},
        seconds=time.perf_counter() - started,
    )


def certified(trained: Trained) -> dict[str, dict[str, Any]]:
    """path -> lower and upper ends of the norm of each layer's kernel, as it is run with."""
    found = {}
    for path, view in trained.views.items():
        lower, upper = sn_jax.norm_bounds(np.asarray(trained.kernels[path]), view)
        found[path] = {"lower": np.asarray(lower).tolist(), "upper": np.asarray(upper).tolist()}
    return found
