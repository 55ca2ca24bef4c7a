"""``python -m experiments.transformer.muon``: the decoder under Muon, on spectral spheres and off.

One spec, the views, says which axes Muon orthogonalizes and whose norms are held: every layer of a
scanned kernel on the sphere of radius R = c sqrt(n_out / n_in). Expected, and how long it takes:
see docs/spectra.md.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from tqdm import tqdm

import sn_jax
import sn_jax.linen
import sn_jax.transforms
from experiments import cli
from experiments.pictures import picture
from experiments.transformer.__main__ import QUICK
from experiments.transformer.model import Decoder
from experiments.transformer.train import RULES, Sizes, batches, next_byte, settled, text

Way = Literal["sphere", "free"]
NAMES = {"sphere": "Muon on spectral spheres", "free": "Muon alone"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the decoder by Muon, its kernels on spectral spheres, and without."""

    steps: int = 100
    """Of training, each way."""
    learning_rate: float = 0.05
    """Of Muon, relative to the norm from RMS to RMS."""
    adam_learning_rate: float = 1e-2
    """Of what is no matrix: tables and scales."""
    c: float = 1.0
    """Norm from RMS to RMS of every kernel on its sphere."""
    n_steps: int = 2
    """Of power iteration after each update."""
    quick: bool = False
    """A model and a run of seconds, for the tests."""
    seed: int = 0
    """Everything random follows from it."""
    out: Path = Path("runs/muon")
    """Output folder."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        real = ("learning_rate", "adam_learning_rate", "c")
        cli.check_positive(self, whole=("steps", "n_steps"), real=real)
        cli.check_seed(self.seed)


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what the user can put right; 130 after Ctrl-C."""
    prog = "python -m experiments.transformer.muon"
    return cli.command(Config, prog, args, cli.in_folder(run))


def run(config: Config) -> int:
    results: dict[str, Any] = {}
    for way in get_args(Way):
        params, results[way] = train(way, config)
        cli.write_bytes(config.out / f"{way}.msgpack", serialization.to_bytes(params))
    options = {key: x for key, x in dataclasses.asdict(config).items() if key != "out"}
    found = {"options": options, "ways": results} | cli.provenance()
    cli.write_json(config.out / "muon.json", found)
    curves = config.out / "muon.png"
    save_curves(curves, results, config)
    print(f"{report(results)}\n\nresults  {config.out}\npicture  {curves}")
    return 0


def train(way: Way, config: Config) -> tuple[Any, dict[str, Any]]:
    """(parameters, what was logged), from scratch."""
    started = time.perf_counter()
    sizes = Sizes(**{name: QUICK[name] for name in Sizes._fields}) if config.quick else Sizes(
        width=128, depth=4, heads=4, context=64, batch=16
    )  # fmt: skip
    steps = QUICK["steps"] if config.quick else config.steps
    model = Decoder(sizes.width, sizes.depth, sizes.heads)
    batch = batches(text(), sizes, config.seed)
    k_params, k_norms = jax.random.split(jax.random.key(config.seed))
    example = jnp.zeros((1, sizes.context), jnp.int32)
    params = jax.jit(model.init)(k_params, example)["params"]

    views = sn_jax.linen.views(model, {"params": params}, example, rules=RULES)
    numbers = sn_jax.transforms.muon_dimension_numbers(params, views)
    bound = sn_jax.rms_bound(config.c)
    optimizer = optax.contrib.muon(
        config.learning_rate, muon_weight_dimension_numbers=numbers,
        adam_learning_rate=config.adam_learning_rate,
    )  # fmt: skip
    project = sn_jax.transforms.project_spectral_norm(
        views, k_norms, bound=bound, mode="divide", n_steps=config.n_steps
    )
    # Both begin on the spheres.
    state = sn_jax.init(params, k_norms, views, warmup=100)
    params, state = sn_jax.spectral_normalize(params, state, bound=bound)
    radii = {path: config.c * np.sqrt(np.prod(entry.u.shape[entry.sigma.ndim :])
                                      / np.prod(entry.v.shape[entry.sigma.ndim :]))
             for path, entry in state.items()}  # fmt: skip
    if way == "sphere":
        optimizer = optax.chain(optimizer, project)
    opt_state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens):
        loss = jax.value_and_grad(lambda params: next_byte(model, params, tokens)[0])
        value, grads = loss(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    history: dict[str, list[float]] = {"loss": [], "largest sigma / R": [], "least sigma / R": []}
    for i in tqdm(range(steps), NAMES[way], disable=not config.progress):
        params, opt_state, value = step(params, opt_state, batch(i))
        weights = flatten_dict(params, sep="/")
        # By SVD in float64, for each layer of a scanned kernel.
        ratios = [sn_jax.spectral_norm(weights[path], view) / radii[path]
                  for path, view in views.items()]  # fmt: skip
        history["loss"].append(float(value))
        history["largest sigma / R"].append(float(max(map(np.max, ratios))))
        history["least sigma / R"].append(float(min(map(np.min, ratios))))
    return params, {"history": history, "seconds": time.perf_counter() - started}


def report(results: dict[str, Any]) -> str:
    """The last tenth of training, and the worst of all of it."""
    rows = [["", "loss", "largest sigma / R", "least sigma / R", "seconds"]]
    for way, result in results.items():
        history = result["history"]
        rows.append([
            NAMES[way], f"{settled(history['loss']):.3f}",
            f"{max(history['largest sigma / R']):.4g}", f"{min(history['least sigma / R']):.4g}",
            f"{result['seconds']:.0f}",
        ])  # fmt: skip
    return cli.aligned(rows)


@picture(10, 3.4, dpi=120)
def save_curves(figure: Figure, results: dict[str, Any], config: Config) -> None:
    """Loss, and how far true norms are from the radii, over the steps."""
    left, right = figure.subplots(1, 2)
    for (way, result), color in zip(results.items(), ("C0", "C1"), strict=True):
        history = result["history"]
        steps = range(1, 1 + len(history["loss"]))
        left.plot(steps, history["loss"], label=NAMES[way], lw=1, color=color)
        right.fill_between(steps, history["least sigma / R"], history["largest sigma / R"],
                           alpha=0.5, color=color, label=NAMES[way])  # fmt: skip
    left.set(xlabel="step", title="loss")
    right.set(xlabel="step", title="true sigma / R, from the least kernel to the largest")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    left.legend()
    factor = "" if config.c == 1 else f"{config.c:g} "
    figure.suptitle(f"A decoder on Python's own sources, R = {factor}√(n_out / n_in)")


if __name__ == "__main__":
    sys.exit(main())
