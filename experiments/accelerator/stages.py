"""What an accelerator is used for, in order of value, and how a stage of it is carried out.

A stage has a folder. What it has done lies in files that are replaced as a whole, summary.json
among them, so that it can be killed at any moment and started again.
"""

import dataclasses
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import cli
from experiments.accelerator import smoke
from experiments.bench import __main__ as bench
from experiments.bench.plots import save_ratios
from experiments.cli import UserError
from experiments.data import SOURCES
from experiments.data.fetch import Source
from experiments.gan import table2
from experiments.gan.loop import Paused, read_rows, saved_steps
from experiments.gan.networks import fitting_size
from experiments.gan.run import open_folder, run
from experiments.gan.train import PRESETS, Config
from experiments.metrics import weights

NO_ACCELERATOR = 3  # exit code of a process that finds a CPU only
SUITE_MINUTES = 4.0  # of one suite: it ends after the case in which they are over


class Outcome(NamedTuple):
    """How far a stage has come."""

    state: str
    """done; paused: it goes on in the next call; waiting: for what is missing; failed."""
    why: str
    numbers: dict[str, Any]


class Task(NamedTuple):
    """One start of a stage."""

    folder: Path
    data_dir: Path | None
    deadline: float
    """In seconds of time.monotonic()."""
    lacking: dict[str, str]
    """Why a source of data is not there, by its name."""
    tiny: bool
    progress: bool


class Stage(NamedTuple):
    """One thing to do."""

    work: Callable[[Task], Outcome]
    least: float
    """Minutes: if fewer are left of a call, it is begun in the next. Of all but a training it is
    also our guess how long it takes on a GPU."""
    config: Config | None = None
    """Of a training."""

    def needs(self, summary: dict[str, Any]) -> list[str]:
        """Sources of data that a training cannot go on without, after what is known of it."""
        trained = summary.get("numbers", {}).get("step") == self.config.steps
        return [source.name for source in sources()[: 1 + trained]]


def sources() -> list[Source]:
    """What trainings are made from, and what they are measured by."""
    return [SOURCES["cifar10"], weights.SOURCE]


def table_of(tiny: bool) -> dict[str, Stage]:
    """All stages, the most valuable first."""
    suites = {"gan": 2.5, "step": 2.0, "transform": 4.0, "memory": 0.5, "tracking": 3.0,
              "compile": 4.0}  # fmt: skip
    table = {"smoke": Stage(check, 1.5)}
    for suite, minutes in suites.items():
        table[f"bench-{suite}"] = Stage(partial(measure, suite), minutes)
    for name, config in trainings(tiny).items():
        table[name] = Stage(partial(train, config), 1.5, config)
    return {k: stage._replace(least=0.0) for k, stage in table.items()} if tiny else table


def trainings(tiny: bool) -> dict[str, Config]:
    """The paper's headline runs, and what they are compared with at the same setting.

    Rows and checkpoints are rarer than in the presets: on a fast device the singular values of
    every layer, by a CPU, take longer than the steps between them.
    """
    headline = {name: dataclasses.replace(Config(), **PRESETS[name])
                for name in ("cifar10-cnn-hinge", "cifar10-resnet", "cifar10-cnn")}  # fmt: skip
    cnn = headline["cifar10-cnn"]
    headline["cifar10-cnn-none"] = dataclasses.replace(cnn, **table2.METHODS["none"])
    headline["cifar10-cnn-wgan-gp"] = dataclasses.replace(cnn, **table2.METHODS["WGAN-GP"])
    if tiny:
        small = {"width": 2, "batch_size": 8, "g_batch_size": None, "steps": 4, "log_every": 2,
                 "checkpoint_every": 2, "fid": ("16/16",), "fid_every": 4}  # fmt: skip
        return {
            name: dataclasses.replace(config, size=fitting_size(config.architecture, 4), **small)
            for name, config in headline.items()
        }
    rarer = {"log_every": 2500, "checkpoint_every": 5000, "fid_every": 25_000}
    return {
        name: dataclasses.replace(
            config, **{k: v * config.steps // 100_000 for k, v in rarer.items()}
        )
        for name, config in headline.items()
    }


# --- The kinds of stages ------------------------------------------------------------------------


def check(task: Task) -> Outcome:
    """Values against those of a CPU."""
    recorded = dict(np.load(smoke.RECORDED))
    checks = list(smoke.checks(recorded))
    cells = [["", "error", "tolerance", ""]]
    cells += [[c.name, f"{c.error:.1e}", f"{c.tolerance:.1e}", "" if c.met else "MISSED"]
              for c in checks]  # fmt: skip
    cli.write_text(task.folder / "checks.txt", cli.aligned(cells))
    missed = [c.name for c in checks if not c.met]
    numbers = {"checks": [c._asdict() | {"met": c.met} for c in checks]}
    numbers["headline"] = f"{len(checks) - len(missed)} of {len(checks)} checks met"
    return Outcome("failed" if missed else "done", "; ".join(missed), numbers)


def measure(suite: str, task: Task) -> Outcome:
    """A suite of benchmarks, case by case."""
    path = task.folder / "rows.json"
    kept = cli.read_json(path) if path.exists() else []
    rows, why = [], ""
    limit = min(task.deadline, time.monotonic() + 60 * SUITE_MINUTES)
    for found in bench.SUITES[suite](task.tiny):
        rows += found
        if len(rows) >= len(kept):  # an earlier start may have got further than this
            cli.write_json(path, bench.as_json(rows), indent=2, allow_nan=False)
        if time.monotonic() > limit:
            why = f"its time was over after the case {found[0].case}"
            break
    if why and not kept and time.monotonic() > task.deadline:
        return Outcome("paused", why, {"headline": f"{len(rows)} rows"})
    cli.write_text(task.folder / "table.txt", bench.table(rows))
    if any(row.ratio is not None for row in rows):
        save_ratios(task.folder / "ratios.png", rows, bench.device())
    aims = [row.met for row in rows if row.met is not None]
    speeds = {row.case.rpartition(", ")[2]: row.ours for row in rows if row.metric.endswith("/s")}
    said = [f"{speed:.0f} images/s ({name})" for name, speed in speeds.items()]
    said += [f"{sum(aims)} of {len(aims)} aims met"] if aims else [f"{len(rows)} rows"]
    return Outcome("done", why, {"images_per_second": speeds, "headline": ", ".join(said)})


def train(config: Config, task: Task) -> Outcome:
    """A training that keeps itself in checkpoints, and its FID as soon as that can be had."""
    out = task.folder / "run"
    no_fid = task.lacking.get(weights.SOURCE.name, "")
    speed = steps_per_second(out)
    # A run looks at the clock after each row, and then saves.
    reserve = (config.log_every / speed if speed else 0) + (0 if task.tiny else 15)
    minutes = (task.deadline - time.monotonic() - reserve) / 60
    if minutes <= 0:
        return Outcome("paused", "no time for the next steps", training_numbers(config, out))
    config = dataclasses.replace(
        config, out=out, data_dir=task.data_dir, resume=True, progress=task.progress,
        minutes=minutes, **{"fid": (), "fid_every": None} if no_fid else {},
    )  # fmt: skip
    try:
        _ = open_folder(config) or run(config)
    except Paused as pause:
        return Outcome("paused", str(pause), training_numbers(config, out))
    if no_fid:
        return Outcome("waiting", f"trained, but {no_fid}", training_numbers(config, out))
    return Outcome("done", "", training_numbers(config, out))


def steps_per_second(out: Path) -> float | None:
    """The median over a run's rows, without its first, which has the compilation; None before."""
    speeds = [row["steps_per_second"] for row in read_rows(out)]
    return float(np.median(speeds[1:] or speeds)) if speeds else None


def training_numbers(config: Config, out: Path) -> dict[str, Any]:
    """How far a run is, its speed, and all of its FIDs."""
    rows, fids, speed = read_rows(out), read_rows(out, "fid.jsonl"), steps_per_second(out)
    step = rows[-1]["step"] if rows else 0
    said = [f"{step:,} of {config.steps:,} steps"]
    said += [f"{speed:.1f} a second"] if speed else []
    last = {(row["n_real"], row["n_fake"]): row for row in fids}
    said += [f"FID {row['fid']:.1f} ({n_real}/{n_fake}) at {row['step']:,}"
             for (n_real, n_fake), row in last.items()]  # fmt: skip
    numbers = {
        "step": step,
        "steps": config.steps,
        "steps_per_second": speed,
        "real_images_per_second": (speed or 0) * config.batch_size * config.adam().n_dis,
        "training_seconds": rows[-1]["seconds"] if rows else 0.0,
        "fid": fids,
        "headline": ", ".join(said),
    }
    if (out / "summary.json").exists():
        summary = cli.read_json(out / "summary.json")
        numbers |= {name: summary[name] for name in ("config", "quality", "memory", "seconds")}
    return numbers


# --- A start of a stage ---------------------------------------------------------------------------


def progress_of(folder: Path) -> list[int]:
    """Numbers that grow if a start of a stage has done anything that is kept."""
    run, rows = folder / "run", folder / "rows.json"
    return [max(saved_steps(run), default=0), len(read_rows(run, "fid.jsonl")),
            len(cli.read_json(rows)) if rows.exists() else 0]  # fmt: skip


def read_summary(folder: Path) -> dict[str, Any]:
    """What is known of a stage; ``{"state": "to do"}`` of one that was never started."""
    path = folder / "summary.json"
    return cli.read_json(path) if path.exists() else {"state": "to do"}


def write_summary(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change some of what is known of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = read_summary(folder) | {"stage": folder.name} | changes
    cli.write_json(folder / "summary.json", summary, indent=2, allow_nan=False)
    return summary


def work(name: str, task: Task) -> None:
    """One start of a stage, in a process of its own; it ends with the one that started it."""
    stage = table_of(task.tiny)[name]
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
        if stage.config:  # what is compiled is there at the next start; a benchmark compiles anew
            cache = task.folder.parent / "cache"
            jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
    if jax.default_backend() == "cpu" and not task.tiny:
        raise SystemExit(NO_ACCELERATOR)
    write_summary(task.folder, **cli.provenance())
    numbers: dict[str, Any] = {}
    try:
        state, why, numbers = stage.work(task)
    except KeyboardInterrupt as interrupt:
        state, why = "paused", str(interrupt) or "interrupted"
    except ModuleNotFoundError as error:
        state, why = "waiting", f"the package {error.name} is not installed here"
    except UserError as error:
        state, why = "failed", str(error)
    except Exception as error:
        cli.write_text(task.folder / "error.txt", traceback.format_exc())
        line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        state, why = "failed", f"out of memory, {line}" if memory else line
    if stage.config and not numbers:
        numbers = training_numbers(stage.config, task.folder / "run")
    write_summary(task.folder, state=state, why=why, numbers=numbers)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
