"""``python -m experiments.transformer``: a small decoder with bounded layers, beside one without.

Expected, and how long it takes: see docs/scale.md.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure

from experiments import cli
from experiments.cli import UserError
from experiments.mesh import make_mesh
from experiments.pictures import picture
from experiments.transformer.train import Method, Sizes, certified, settled, train

NAMES = {"baseline": "unconstrained", "reparam": "sigma-reparam", "projection": "projection"}
PANELS = ("loss", "largest logit", "maximum entropy", "largest sigma")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a decoder on the sources and documentation that come with Python, in three ways."""

    method: Method | None = None
    """One of them only."""
    steps: int = 300
    """Of training, each way."""
    learning_rate: float = 1e-2
    """Of Adam: far more than the unconstrained model is happy with."""
    bound: float = 2.0
    """Of the projection: largest singular value of every kernel."""
    width: int = 128
    """Of the hidden state."""
    depth: int = 4
    """Layers, which are scanned."""
    heads: int = 4
    """Of the attention."""
    context: int = 64
    """Bytes that are seen."""
    batch: int = 16
    """Windows in a step."""
    quick: bool = False
    """A model and a run of seconds, for the tests."""
    mesh: str | None = None
    """Sizes of the axes: fsdp=4,tp=2; by default all devices along fsdp."""
    seed: int = 0
    """Everything random follows from it."""
    out: Path = Path("runs/transformer")
    """Output folder; finished ways with the same options are not run again."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        whole = ("steps", "width", "depth", "heads", "context", "batch")
        cli.check_positive(self, whole=whole, real=("learning_rate", "bound"))
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width, {self.width}.")
        cli.check_seed(self.seed)


QUICK = {"steps": 20, "width": 32, "depth": 2, "heads": 4, "context": 32, "batch": 8}


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what the user can put right; 130 after Ctrl-C."""

    def sized(config: Config) -> int:
        return run(dataclasses.replace(config, **QUICK) if config.quick else config)

    kept = "what was finished is kept, and not run again."
    prog = "python -m experiments.transformer"
    return cli.command(Config, prog, args, cli.in_folder(sized), interrupted=kept)


def run(config: Config) -> int:
    mesh = make_mesh(config.mesh, ("fsdp", "tp"))
    if config.batch % mesh.shape["fsdp"]:
        raise UserError(
            f"A batch of {config.batch} cannot be split over fsdp={mesh.shape['fsdp']}: choose "
            "--batch or --mesh so that it can."
        )
    sizes = Sizes(config.width, config.depth, config.heads, config.context, config.batch)
    options = {field: getattr(config, field) for field in
               (*sizes._fields, "steps", "learning_rate", "bound", "seed")}  # fmt: skip
    results: dict[str, Any] = {}
    for method in (config.method,) if config.method else get_args(Method):
        path = config.out / f"{method}.json"
        results[method] = finished(path, options)
        if results[method] is None:
            trained = train(
                method, sizes, mesh, steps=config.steps, learning_rate=config.learning_rate,
                bound=config.bound, seed=config.seed, progress=config.progress,
            )  # fmt: skip
            results[method] = {
                "options": options,
                "history": trained.history,
                "norms": certified(trained),
                "seconds": trained.seconds,
                "mesh": dict(mesh.shape),
            } | cli.provenance()
            cli.write_json(path, results[method])
    curves = config.out / "curves.png"
    save_curves(curves, results, f"{config.steps} steps at {config.learning_rate:g}")
    print(f"{report(results)}\n\nresults  {config.out}\npicture  {curves}")
    return 0


def finished(path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier run with the same options, if there are any."""
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        return results if results["options"] == options else None
    except (ValueError, KeyError, TypeError):
        kept = path.with_suffix(".broken")
        path.replace(kept)
        print(f"{path} is broken; it is kept as {kept.name}, and made again.", file=sys.stderr)
        return None


def report(results: dict[str, Any]) -> str:
    """The last tenth of training, and the certified norms."""
    rows = [["", "loss", "largest logit", "max entropy", "min entropy", "sigma",
             "certified norms", "seconds"]]  # fmt: skip
    for method, result in results.items():
        history = result["history"]
        lower = min(np.min(norm["lower"]) for norm in result["norms"].values())
        upper = max(np.max(norm["upper"]) for norm in result["norms"].values())
        rows.append([
            NAMES[method], f"{settled(history['loss']):.3f}",
            f"{np.max(history['largest logit']):.3g}",
            f"{settled(history['maximum entropy']):.2f}",
            f"{settled(history['minimum entropy']):.2f}",
            f"{history['largest sigma'][-1]:.3g}", f"{lower:.3g} to {upper:.3g}",
            f"{result['seconds']:.0f}",
        ])  # fmt: skip
    return cli.aligned(rows)


@picture(13, 3.4, dpi=120)
def save_curves(figure: Figure, results: dict[str, Any], title: str) -> None:
    """Loss, logits, entropy and sigma over the steps."""
    for axes, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for method, result in results.items():
            axes.plot(result["history"][name], label=NAMES[method], lw=1)
        axes.set(xlabel="step", title=name)
        if name in ("largest logit", "largest sigma"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"A decoder on Python's own sources, {title}")


if __name__ == "__main__":
    sys.exit(main())
