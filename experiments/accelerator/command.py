"""The command: its minutes over all calls with one output folder, its stages in turn, its table.

Each stage runs in a process of its own (``stages``): one that crashes, or takes too long, costs
itself only.
"""

import dataclasses
import importlib.metadata
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from experiments import cli
from experiments.accelerator import packages
from experiments.accelerator.stages import (
    NO_ACCELERATOR,
    Stage,
    Task,
    progress_of,
    read_summary,
    sources,
    table_of,
    training_numbers,
    work,
    write_summary,  # fmt: skip
)
from experiments.cli import UserError
from experiments.data import default_data_dir, parts
from experiments.data.fetch import fetch

FINAL = ("done", "failed")
GRACE = 20.0  # seconds after its time is over in which a stage may save what it has
STARTS = 3  # of a stage, one after the other, that get it nowhere
FID_SECONDS = 30.0  # our guess of one evaluation


@dataclasses.dataclass(frozen=True)
class Options:
    """Run the checks, benchmarks and headline trainings of this repository on an accelerator, the
    most valuable first. Killed at any moment and called again, it goes on."""

    minutes: float = 25.0
    """Of all calls with this --out together."""
    piece: float | None = None
    """Minutes of this call; the same command goes on. All of them if not given."""
    out: Path = Path("runs/accelerator")
    """Output folder: a folder with a summary.json for each stage, and table.txt."""
    data_dir: Path | None = None
    """Where CIFAR-10 and FID's network lie, or parts of them that --pack has written; the user's
    cache if not given."""
    stages: tuple[str, ...] = ()
    """Only these; by default all."""
    tiny: bool = False
    """Everything in little, on a CPU too: it shows that the pieces fit together."""
    pack: Path | None = None
    """Write CIFAR-10, FID's network and this environment's packages to this folder as files of at
    most 60 MB, and do nothing else."""
    progress: bool = True
    """Say on stderr what is going on."""

    def __post_init__(self) -> None:
        cli.check_positive(self, real=("minutes", "piece"))


def main(args: list[str], worker: Callable[[str, Task], None] = work) -> int:
    """As ``experiments.accelerator.__main__.main``.

    Args:
      args: the options.
      worker: what is run for each stage, in a process of its own.
    """

    def run(options: Options) -> int:
        return write_pack(options) if options.pack else spend(options, worker)

    kept = "what was done is kept; the same command goes on."
    prog = "python -m experiments.accelerator"
    return cli.command(Options, prog, args, cli.in_folder(run), interrupted=kept)


def write_pack(options: Options) -> int:
    """Write the files that ``--data-dir`` reads; returns the exit code."""
    data_dir = options.data_dir or default_data_dir()
    files = {}
    for source in sources():
        fetch(source, data_dir)
        files |= {path: (data_dir / path).read_bytes() for path in source.files}
    try:
        written = parts.write(files, options.pack)
        written.append(packages.write(options.pack))
    except OSError as error:
        raise UserError(f"{options.pack} cannot be written ({error.strerror}).") from error
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed here, so it cannot be packed.") from error
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


# --- Time and stages ------------------------------------------------------------------------------


class Clock:
    """The seconds that calls have spent; a file keeps them, also of a call that is killed."""

    def __init__(self, options: Options):
        self._path, self._start, self._written = options.out / "spent.json", time.monotonic(), 0.0
        self._before = json.loads(self._path.read_text()) if self._path.exists() else []
        rest = 60 * options.minutes - sum(self._before)
        self.call = rest if options.piece is None else min(60 * options.piece, rest)
        self.deadline = self._start + self.call

    def spent(self) -> float:
        """By all calls."""
        return sum(self._before) + time.monotonic() - self._start

    def left(self) -> float:
        """Of this call."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """To be called often."""
        now = time.monotonic()
        if now - self._written > 1:
            self._written = now
            cli.write_json(self._path, [*self._before, round(now - self._start, 1)])


def spend(options: Options, worker: Callable[[str, Task], None]) -> int:
    """Carry out what is to be done, as far as the time goes; returns the exit code.

    Raises:
      UserError: no minutes are left, no stage has that name, another call is under way, or JAX
        finds no accelerator.
    """
    table = table_of(options.tiny)
    for name in options.stages:
        if name not in table:
            raise UserError(f"There is no stage {name!r}: choose from {', '.join(table)}.")
    table = {name: stage for name, stage in table.items() if name in (options.stages or table)}
    try:
        with FileLock(options.out / ".lock", timeout=0):
            clock = Clock(options)
            if clock.call <= 0:
                raise UserError(f"{options.minutes:g} minutes are spent: give more by --minutes.")
            print(plan(options, table, clock), flush=True)
            carry_out(options, table, clock, worker)
            text = report(options.out, table)
            cli.write_text(options.out / "table.txt", text)
    except Timeout as error:
        raise UserError(f"Another call works in {options.out}: wait for its end.") from error
    print(f"\n{text}\n\n{clock.spent() / 60:.1f} of {options.minutes:g} minutes are spent.")
    return int(any(read_summary(options.out / name)["state"] == "failed" for name in table))


def carry_out(
    options: Options, table: dict[str, Stage], clock: Clock, worker: Callable[[str, Task], None]
) -> None:
    """Start, or go on with, every stage that is not finished and that the time suffices for."""
    lacking: dict[str, str] | None = None
    begun = False

    def say(name: str, what: str) -> None:
        if options.progress:
            place = f"[{list(table).index(name) + 1}/{len(table)}]"
            print(f"{place} {name}: {what}", file=sys.stderr, flush=True)

    for name, stage in table.items():
        folder = options.out / name
        before = read_summary(folder)
        if before["state"] in FINAL or clock.left() < (60 * stage.least if begun else 1):
            continue
        if stage.config and lacking is None:
            lacking = missing_data(options)
        needed = stage.needs(before) if stage.config else ()
        if reasons := [lacking[source] for source in needed if source in lacking]:
            write_summary(folder, state="waiting", why="; ".join(reasons))
            say(name, f"waiting, {'; '.join(reasons)}")
            continue
        starts = [*before.get("starts", []), progress_of(folder)]
        if len(starts) > STARTS and starts[-STARTS:] == STARTS * [starts[-STARTS - 1]]:
            why = f"started {STARTS} times without getting further: {before['why']}"
            write_summary(folder, state="failed", why=why)
            say(name, f"failed, {why}")
            continue
        say(name, f"begun, {clock.left() / 60:.1f} minutes are left")
        write_summary(folder, state="running", why="", starts=starts)
        task = Task(
            folder, options.data_dir, clock.deadline, lacking or {}, options.tiny, options.progress
        )
        begin, begun = time.monotonic(), True
        code = in_process(partial(worker, name, task), clock)
        if code == NO_ACCELERATOR:
            write_summary(folder, state="to do", starts=starts[:-1])
            raise UserError("JAX finds no accelerator, only a CPU: --tiny does all in little.")
        changes = {"seconds": round(before.get("seconds", 0) + time.monotonic() - begin, 1)}
        if read_summary(folder)["state"] == "running":  # it could not say what became of it
            end = f"exit code {code}"
            if code is None:
                end = "its time being over"
            elif code < 0:
                end = signal.Signals(-code).name
            changes |= {"state": "paused", "why": f"its process was ended by {end}"}
        after = write_summary(folder, **changes)
        say(name, ", ".join(filter(None, [after["state"], after["why"]])))


def in_process(call: Callable[[], None], clock: Clock) -> int | None:
    """The exit code of a call in a process of its own; None if it was stopped in the end."""
    process = multiprocessing.get_context("spawn").Process(target=call)
    process.start()
    try:
        while process.is_alive() and clock.left() > -GRACE:
            process.join(0.2)
            clock.write()
    except KeyboardInterrupt:
        process.join(60)  # it was interrupted too, and saves
        raise
    finally:
        stopped = process.is_alive()
        if stopped:
            process.kill()
        process.join()
    return None if stopped else process.exitcode


def missing_data(options: Options) -> dict[str, str]:
    """Why a source is not complete, by its name; what can be unpacked or fetched is."""
    reasons = {}
    for source in sources():
        try:
            fetch(source, options.data_dir or default_data_dir())
        except UserError as error:
            reasons[source.name] = str(error)
    return reasons


# --- What is said ---------------------------------------------------------------------------------


def plan(options: Options, table: dict[str, Stage], clock: Clock) -> str:
    """What is to be done, how long it takes, from measured speeds where there are any, and when."""
    cells = [["stage", "state", "minutes", "", "when"]]
    ahead, known = 0.0, True
    for name, stage in table.items():
        state = read_summary(options.out / name)["state"]
        if state in FINAL:
            cells.append([name, state, "", "", ""])
            continue
        minutes, basis = wanted(options.out, name, stage)
        known = known and minutes is not None
        ahead += 60 * (minutes or 0.0)
        when = "with what is left"
        if known:
            later = ahead <= 60 * options.minutes - clock.spent()
            when = "later" if later else "beyond the minutes"
            when = "now" if ahead <= clock.call else when
        cells.append([name, state, "?" if minutes is None else f"{minutes:.1f}", basis, when])
    return (
        f"{options.minutes:g} minutes in all, {clock.spent() / 60:.1f} are spent, "
        f"{clock.call / 60:.1f} are for this call.\n\n{cli.aligned(cells)}\n"
    )


def wanted(out: Path, name: str, stage: Stage) -> tuple[float | None, str]:
    """Minutes that a stage still takes, None where nobody knows, and where they are from."""
    config = stage.config
    if config is None:
        return stage.least, "guess"
    numbers = training_numbers(config, out / name / "run")
    speed, basis = numbers["steps_per_second"], "measured"
    if not speed and config.architecture == "cnn" and config.adam().n_dis == 1:
        # The benchmark's step is this one.
        way = {"sn": "sn_jax", "none": "no SN"}.get(config.normalization)
        measured = read_summary(out / "bench-gan").get("numbers", {}).get("images_per_second", {})
        speed, basis = measured.get(way, 0) / config.batch_size, "by bench-gan"
    if not speed:
        return None, ""
    seconds = [row["seconds"] for row in numbers["fid"]] or [FID_SECONDS]
    evaluations = config.steps // config.fid_every - 1 + len(config.fid) - len(numbers["fid"])
    rest = (config.steps - numbers["step"]) / speed + evaluations * sum(seconds) / len(seconds)
    return rest / 60, basis


def report(out: Path, table: dict[str, Stage]) -> str:
    """A line for each stage."""
    cells, notes = [["stage", "state", "minutes"]], [""]
    for name in table:
        summary = read_summary(out / name)
        seconds = summary.get("seconds")
        cells.append([name, summary["state"], "-" if seconds is None else f"{seconds / 60:.1f}"])
        headline = summary.get("numbers", {}).get("headline", "")
        notes.append("; ".join(filter(None, [headline, summary.get("why", "")])))
    return cli.aligned(cells, notes)
