"""Spectral normalization of a parameter tree by sn_jax and by its peers, as pure functions."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import sn_jax
from experiments.bench import trees

KEY = jax.random.key(0)
Tree = dict[str, dict[str, jax.Array]]


class Contender(NamedTuple):
    """One library's way from raw to normalized kernels."""

    weights: Any  # the kernels in its own layout; the leaves are in the order of the names
    state: Any  # whatever else it keeps between steps
    forward: Callable[[Any, Any], tuple[Any, Any]]  # from and to these: one step of training
    outputs_first: bool = False  # whether its layout is (out, in, ...)


def outputs_first(w):
    """(*taps, in, out), as in Flax, to (out, in, *taps), as in Equinox and torch."""
    return w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2))


def outputs_last(w):
    return w.transpose(*range(2, w.ndim), 1, 0)


def ours(weights: Tree) -> Contender:
    state = sn_jax.init(weights, KEY, trees.views(weights))
    return Contender(weights, state, sn_jax.spectral_normalize)


def by_hand(weights: Tree) -> Contender:
    """Algorithm 1 of the paper in five lines, which keep as much as a ``State``: what ours takes
    beside it is for scales (plain norms overflow and underflow) and for zeros."""

    def step(w, u):
        matrix = w.reshape(-1, w.shape[-1])
        v = lax.stop_gradient(matrix @ u)
        v /= jnp.linalg.norm(v)
        y = v @ matrix
        sigma = jnp.linalg.norm(y)
        return {"w": w / sigma}, (y / sigma, v, sigma)

    def forward(weights, state):
        found = [step(leaf["w"], u)
                 for leaf, (u, _, _) in zip(weights.values(), state, strict=True)]  # fmt: skip
        return [w for w, _ in found], [lax.stop_gradient(kept) for _, kept in found]

    matrices = [leaf["w"].reshape(-1, leaf["w"].shape[-1]) for leaf in weights.values()]
    state = [(jax.random.normal(KEY, w.shape[1:]), jnp.zeros(len(w)), 0.0) for w in matrices]
    return Contender(weights, state, forward)


def haiku(weights: Tree) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import haiku as hk

    model = hk.without_apply_rng(hk.transform_with_state(lambda tree: hk.SNParamsTree()(tree)))
    _, state = jax.jit(model.init)(KEY, weights)
    return Contender(weights, state, lambda weights, state: model.apply({}, state, weights))


# The Flax and Equinox wrappers normalize inside a layer's call. The layer here gives its kernel
# back, so that nothing but the normalization is timed.


class _LinenWeight(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.zeros, self.shape)


class _LinenTree(nn.Module):
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self):
        return {
            name: nn.SpectralNorm(_LinenWeight(shape, name=name))(update_stats=True)
            for name, shape in self.shapes
        }


def linen(weights: Tree) -> Contender:
    model = _LinenTree(tuple((name, leaf["w"].shape) for name, leaf in weights.items()))
    # Its init of zero kernels leaves u zero for good: the vectors are made as it makes them.
    shapes = jax.eval_shape(model.init, KEY)["batch_stats"]
    state = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), shapes)

    def forward(weights, state):
        variables = {"params": weights, "batch_stats": state}
        normalized, updates = model.apply(variables, mutable=["batch_stats"])
        return normalized, updates["batch_stats"]

    return Contender(weights, state, forward)


class _NnxWeight(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, _):
        return self.w[...]


class _NnxTree(nnx.Module):
    def __init__(self, weights, rngs):
        self.layers = nnx.List(
            [nnx.SpectralNorm(_NnxWeight(leaf["w"]), rngs=rngs) for leaf in weights.values()]
        )

    def __call__(self):
        return [layer(None, update_stats=True) for layer in self.layers]


def nnx_(weights: Tree) -> Contender:
    # split and merge around jax.jit, as its guide advises where the overhead of nnx.jit matters.
    graphdef, params, state = nnx.split(_NnxTree(weights, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def forward(params, state):
        # Copied: variables may be written at the trace level that made them only.
        model = nnx.merge(graphdef, params, state, copy=True)
        normalized = model()
        return normalized, nnx.state(model, nnx.BatchStat)

    return Contender(params, state, forward)


def equinox(weights: Tree) -> Contender:
    import equinox as eqx

    class Weight(eqx.Module):
        weight: jax.Array

        def __call__(self, _):
            return self.weight

    class WholeTree(eqx.Module):
        layers: list

        def __init__(self, weights, key):
            self.layers = [
                eqx.nn.SpectralNorm(Weight(w), "weight", key=k)
                for w, k in zip(weights, jax.random.split(key, len(weights)), strict=True)
            ]

        def __call__(self, state):
            normalized = []
            for layer in self.layers:
                w, state = layer(None, state)
                normalized.append(w)
            return normalized, state

    flipped = [jnp.asarray(outputs_first(leaf["w"])) for leaf in weights.values()]
    model, state = eqx.nn.make_with_state(WholeTree)(flipped, KEY)
    params, static = eqx.partition(model, eqx.is_array)

    def forward(params, state):
        return eqx.combine(params, static)(state)

    return Contender(params, state, forward, outputs_first=True)


# Those that are installed; flax is part of this package.
JAX_PEERS = {
    name: make
    for name, make in {
        "haiku": haiku, "flax.linen": linen, "flax.nnx": nnx_, "equinox": equinox
    }.items()
    if importlib.util.find_spec(name.partition(".")[0])
}  # fmt: skip
