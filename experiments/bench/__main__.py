"""``python -m experiments.bench``: sn_jax beside its peers, as ratios within one run."""

import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from tqdm import tqdm

from experiments.bench.plots import save_comm, save_ratios, save_scaling
from experiments.bench.timing import Row
from experiments.cli import aligned, check_writable, command, provenance, write_json

Suite = Literal[
    "transform", "step", "sngp", "compile", "tracking", "memory", "conv", "scaling", "norms",
    "caps", "lipschitz", "comm", "gan",
]  # fmt: skip
# Each is a module of this folder: from whether it is to be quick, the rows of case after case.
SUITES = {name: import_module(f"experiments.bench.{name}").rows for name in get_args(Suite)}
# Suites that have curves of their own, beside the picture of the ratios.
CURVES = {"scaling": save_scaling, "comm": save_comm}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time sn_jax and its peers on whatever device JAX finds.

    PyTorch takes part in a process of its own, if this interpreter has it, or the one that the
    environment variable SN_BENCH_TORCH_PYTHON names.
    """

    suite: Suite | Literal["all"] = "all"
    """What to measure."""
    quick: bool = False
    """Small cases, for a minute."""
    json: Path | None = None
    """Also write the rows to this file."""
    picture: Path = Path("runs/bench.png")
    """Where the picture of the ratios goes; those of "scaling" and "comm" go beside it."""
    progress: bool = True
    """Show a progress bar."""


def main(args: list[str] | None = None) -> int:
    """Returns the exit code of ``cli.command``."""
    return command(Config, "python -m experiments.bench", args, run)


def run(config: Config) -> None:
    """Measure, print the table, draw."""
    for path in filter(None, (config.json, config.picture)):
        check_writable(path)
    rows = measure(config)
    print(table(rows))
    save_ratios(config.picture, rows, device())
    print(f"\npicture  {config.picture}")
    for suite, save in CURVES.items():
        if any(row.suite == suite for row in rows):
            curves = config.picture.with_stem(f"{config.picture.stem}-{suite}")
            save(curves, rows, device())
            print(f"picture  {curves}")
    if config.json:
        write_json(config.json, as_json(rows), indent=2, allow_nan=False)
        print(f"rows     {config.json}")


def measure(config: Config) -> list[Row]:
    suites = get_args(Suite) if config.suite == "all" else (config.suite,)
    rows: list[Row] = []
    with tqdm(desc="cases", disable=not config.progress, unit="") as bar:
        for suite in suites:
            for found in SUITES[suite](config.quick):
                rows += found
                bar.set_description(found[0].case)
                bar.update()
    return rows


def device() -> str:
    found = provenance()["device"]
    cores = f", {found['cpu_cores']} cores" if found["platform"] == "cpu" else ""
    return found["kind"] + cores


def table(rows: list[Row]) -> str:
    """Ratios first."""
    cells = [["ratio", "quartiles", "target", "", "ours", "peer", "unit", "case", "peer's name"]]
    for row in rows:
        cells.append([
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.spread is None else f"{row.spread[0]:.3f}-{row.spread[1]:.3f}",
            "" if row.target is None else f"<= {row.target:.3g}",
            {None: "", True: "met", False: "MISSED"}[row.met], f"{row.ours:.4g}",
            "" if row.peer is None else f"{row.peer:.4g}", row.metric, f"{row.suite}: {row.case}",
            row.peer_name,
        ])  # fmt: skip
    return f"{device()}; ratio = ours / peer, below 1 is better\n\n{aligned(cells)}"


def as_json(rows: list[Row]) -> list[dict]:
    return [{**dataclasses.asdict(row), "met": row.met} for row in rows] + [provenance()]


if __name__ == "__main__":
    sys.exit(main())
