"""``python -m experiments.bench``: sn_jax beside its peers, as ratios within one run."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal, get_args

from tqdm import tqdm

from experiments.bench import (
    caps,
    comm,
    compile,
    conv,
    gan,
    lipschitz,
    memory,
    norms,
    scaling,
    sngp,
    step,
    tracking,
    transform,
)
from experiments.bench.plots import save_comm, save_ratios, save_scaling
from experiments.bench.timing import Row
from experiments.cli import aligned, check_writable, command, provenance, write_text

Suite = Literal[
    "transform", "step", "sngp", "compile", "tracking", "memory", "conv", "scaling", "norms",
    "caps", "lipschitz", "comm", "gan",
]  # fmt: skip
SUITES = {
    "transform": transform.rows,
    "step": step.rows,
    "sngp": sngp.rows,
    "compile": compile.rows,
    "tracking": tracking.rows,
    "memory": memory.rows,
    "conv": conv.rows,
    "scaling": scaling.rows,
    "norms": norms.rows,
    "caps": caps.rows,
    "lipschitz": lipschitz.rows,
    "comm": comm.rows,
    "gan": gan.rows,
}
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
        write_text(config.json, json.dumps(as_json(rows), indent=2, allow_nan=False))
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
        cells.append(
            [
                "" if row.ratio is None else f"{row.ratio:.3f}",
                "" if row.spread is None else f"{row.spread[0]:.3f}-{row.spread[1]:.3f}",
                "" if row.target is None else f"<= {row.target:.3g}",
                {None: "", True: "met", False: "MISSED"}[row.met],
                f"{row.ours:.4g}",
                "" if row.peer is None else f"{row.peer:.4g}",
                row.metric,
                f"{row.suite}: {row.case}",
                row.peer_name,
            ]
        )
    return f"{device()}; ratio = ours / peer, below 1 is better\n\n{aligned(cells)}"


def as_json(rows: list[Row]) -> list[dict]:
    return [{**dataclasses.asdict(row), "met": row.met} for row in rows] + [provenance()]


if __name__ == "__main__":
    sys.exit(main())
