"""Networks of many kinds with random weights: what each domain of ``lipschitz_bound`` gains.

Bounds are for comparison with each other; weights are normal with a variance of 1 / fan-in unless
a network says otherwise.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from tqdm import tqdm

import sn_jax
from experiments.cli import markdown, resumed
from experiments.gan.networks import ARCHITECTURES
from sn_jax import linen as sn_linen

ROWS = "nets.jsonl"
METHODS = ("product", "merged", "joint", "shift", "ellipsoid", "tight")
dense = partial(nn.Dense, kernel_init=nn.initializers.variance_scaling(1, "fan_in", "normal"))
conv = partial(nn.Conv, kernel_init=nn.initializers.variance_scaling(1, "fan_in", "normal"))


class MLP(nn.Module):
    """Vectors (n, 16) to (n, 10) through two hidden layers of 64."""

    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.activation(dense(64)(x))
        return dense(10)(x)


class ScannedResidual(nn.Module):
    """Vectors (n, 8): four blocks x + B relu(A x) in a scan, rematerialized."""

    @nn.compact
    def __call__(self, x):
        @nn.remat
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + 0.5 * dense(8)(nn.relu(dense(16)(x))), None

        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scanned()(x, None)[0]


class ConvPool(nn.Module):
    """Images (n, 8, 8, 1): convolution, average and ReLU, twice, then dense."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.relu(nn.avg_pool(conv(features, (3, 3))(x), (2, 2), (2, 2)))
        return dense(10)(x.reshape(len(x), -1))


class ResNet(nn.Module):
    """Images (n, 8, 8, 3): two residual blocks with BatchNorm in eval, mean, dense."""

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, True, scale_init=nn.initializers.normal(1))
        x = conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm()(conv(8, (3, 3))(x)))
            x = nn.relu(x + norm()(conv(8, (3, 3))(y)))
        return dense(10)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Images (n, 8, 8, 3): two blocks in which each convolution sees what all before it have made,
    each with a transition, 1x1 and an average (Huang et al. 2017) without BatchNorm; dense."""

    @nn.compact
    def __call__(self, x):
        x = conv(4, (3, 3))(x)
        for _ in range(2):
            for _ in range(2):
                x = jnp.concatenate([x, nn.relu(conv(4, (3, 3))(x))], -1)
            x = nn.avg_pool(conv(4, (1, 1))(x), (2, 2), (2, 2))
        return dense(10)(x.reshape(len(x), -1))


class Mixer(nn.Module):
    """Tokens (n, 8, 8): two blocks of an MLP-Mixer (Tolstikhin et al. 2021) without LayerNorm."""

    @nn.compact
    def __call__(self, x):
        def mlp(x):
            return dense(x.shape[-1])(nn.gelu(dense(16)(x)))

        for _ in range(2):
            x = x + mlp(x.swapaxes(1, 2)).swapaxes(1, 2)
            x = x + mlp(x)
        return dense(10)(x.mean(1))


class Net(NamedTuple):
    """A module and the shape of its input; whether its maps are divided by their norms; up to
    which methods it is bounded."""

    module: nn.Module
    shape: tuple[int, ...]
    normalized: bool = False
    method: str = "auto"


NETS = {
    "MLP 16-64-64-10, relu": Net(MLP(nn.relu), (1, 16)),
    "MLP, gelu": Net(MLP(nn.gelu), (1, 16)),
    "scan + remat residual, 4 blocks": Net(ScannedResidual(), (1, 8)),
    "conv-pool-conv-pool-dense": Net(ConvPool(), (1, 8, 8, 1)),
    "ResNet + BatchNorm, 2 blocks, 8x8": Net(ResNet(), (1, 8, 8, 3)),
    "DenseNet-like": Net(DenseNet(), (1, 8, 8, 3)),
    "MLP-Mixer, no LayerNorm": Net(Mixer(), (1, 8, 8)),
    "SN-GAN's CNN, not normalized, 8x8, width 16": Net(
        ARCHITECTURES["cnn"].discriminator(width=16), (1, 8, 8, 1)
    ),
}
# Whose merged maps are too large for matrices.
LARGE = {
    f"SN-GAN's {name}, {how}, 32x32, width 16": Net(
        ARCHITECTURES[name.lower()].discriminator(width=16), (1, 32, 32, 3), normalized, "tight"
    )
    for name in ("CNN", "ResNet")
    for how, normalized in (("not normalized", False), ("operator SN", True))
}


def table(
    out: Path,
    n_seeds: int,
    seed: int = 0,
    nets: Mapping[str, Net] = NETS,
    *,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Bounds of each network by each method, and what an attack reaches, for each seed.

    Args:
      out: folder of nets.jsonl, a row a network and seed; those that are there are not run again.
      n_seeds: how many.
      seed: the first, of the weights.
      nets: the networks.

    Returns:
      Network -> method -> list of bounds, None where it did not run; also "lower".
    """
    every = {(name, seed + i): partial(_measured, nets[name], seed + i)
             for i in range(n_seeds) for name in nets}  # fmt: skip
    known = kept(out / ROWS, every, progress=progress)
    return {
        name: {key: [known[name, seed + i][key] for i in range(n_seeds)]
               for key in (*METHODS, "lower")}
        for name in nets
    }  # fmt: skip


def kept(
    path: Path, every: dict[tuple[str, int], Callable[[], dict[str, Any]]], *, progress: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """What measures each (network, seed), run where its row is not yet in a file."""
    with tqdm(total=len(every), unit="network", disable=not progress) as bar:

        def row(name, seed, measure):
            bar.set_postfix_str(name)
            return {"network": name, "seed": seed, "bounds": measure()}

        jobs = {key: partial(row, *key, measure) for key, measure in every.items()}
        found = {}
        for key, made in resumed(path, jobs, lambda row: (row["network"], row["seed"])):
            found[key] = made["bounds"]
            bar.update()
    return found


def _measured(net: Net, seed: int) -> dict[str, float | None]:
    init_key, stats_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    sn_key = jax.random.fold_in(init_key, 1)
    x = jnp.zeros(net.shape)
    variables = net.module.init(init_key, x)
    # Running statistics as training could leave them, for the zeros and ones of a new network.
    flat = flatten_dict(variables.get("batch_stats", {}))
    for key, (path, old) in zip(jax.random.split(stats_key, len(flat)), flat.items(), strict=True):
        new = jax.random.uniform(key, old.shape, minval=0.1, maxval=1.1)
        flat[path] = new if path[-1] == "var" else jax.random.normal(key, old.shape)
    variables = {**variables, "batch_stats": unflatten_dict(flat)}
    if net.normalized:
        views = sn_linen.views(net.module, variables, x, conv="operator")
        state = sn_jax.calibrate(
            variables["params"], sn_jax.init(variables["params"], sn_key, views)
        )
        params, _ = sn_jax.spectral_normalize(variables["params"], state, n_steps=0)
        variables = {**variables, "params": params}

    def fn(x):
        return net.module.apply(variables, x)

    bound = sn_jax.lipschitz_bound(fn, x, method=net.method, progress=False)
    bounds, seconds = dict(bound.bounds), sum(dict(bound.seconds).values())
    found = jax.jit(partial(sn_jax.lipschitz_attack, fn, steps=60, restarts=7))(attack_key, x)
    others = {"lower": float(found.lower), "seconds": seconds}
    return {name: bounds.get(name) for name in METHODS} | others


def medians(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Network -> method -> median over the seeds, None where it did not run on one of them."""
    return {
        name: {key: None if None in values else float(np.median(values))
               for key, values in row.items()}
        for name, row in results.items()
    }  # fmt: skip


def report(results: dict[str, dict[str, Any]]) -> str:
    """The medians as a table in Markdown."""
    columns = (*METHODS, "lower")
    rows = [["network", *columns]]
    rows += [[name, *("" if row[key] is None else f"{row[key]:.4g}" for key in columns)]
             for name, row in medians(results).items()]  # fmt: skip
    return "\n".join(markdown(rows))
