"""How a run is carried out and kept: the loop, its metrics and its checkpoints."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

from experiments import cli, processes
from experiments.cli import UserError
from experiments.gan.place import Place
from experiments.gan.train import Config, Data, State, Training, make_training

# Its writer imports all of PyTorch where that is installed, seconds of every start, and needs none.
if hidden := "torch" not in sys.modules:
    sys.modules["torch"] = None
try:
    from tensorboardX import SummaryWriter
finally:
    if hidden:
        del sys.modules["torch"]

# A look at the run where a checkpoint was saved or restored; returns scalars for TensorBoard.
AtCheckpoint = Callable[[Training, State], dict[str, float]]


class Paused(Exception):
    """The time is up; its text says which checkpoint is saved."""


class Diverged(UserError):
    """A loss or weight is not finite; ``step`` is the last one made."""

    def __init__(self, step: int, saved: int):
        super().__init__(
            f"Training diverged before step {step}: a loss or weight is not finite "
            f"(the checkpoint of step {saved} is, and stays). "
            "Start again in another --out with a setting of smaller learning rate, such as A or B."
        )
        self.step = step


def train(
    config: Config, data: Data, n_classes: int = 1, at_checkpoint: AtCheckpoint | None = None
) -> tuple[Training, State]:
    """Train from the output folder's last checkpoint, or from the start if it has none.

    Writes metrics.jsonl, the same rows as TensorBoard's events, and checkpoints to the output
    folder. Killed at any moment and called again, it ends in exactly the state of a run that was
    never stopped.

    Args:
      config: the run.
      data: the real images, and their labels below ``n_classes``.
      n_classes: how many a conditional network tells apart.
      at_checkpoint: called before the end whenever a checkpoint was saved or restored.

    Returns:
      The run's functions and its last state.

    Raises:
      UserError: a damaged checkpoint, or one from beyond ``config.steps``.
      Diverged: a loss or weight is not finite; no checkpoint holds such a thing.
      Paused: ``config.minutes`` have passed, after saving a checkpoint.
      KeyboardInterrupt: on Ctrl-C, after saving a checkpoint; its text says which.
    """
    start = time.perf_counter()
    training = make_training(config, data.images.shape[1:], n_classes)
    place = Place(config)
    data = place.data(data)
    # On a CPU, where XLA's convolutions are many times slower inside a compiled loop, every
    # update is a dispatch; on an accelerator all the steps up to the next thing to write are one.
    many = jax.default_backend() != "cpu"

    with _deferred_interrupt() as interrupt:
        if saved_steps(config.out):
            state = _restore(config, training, place)
        else:
            state = place.state(training.init(jax.random.key(config.seed)))
        step = int(state.step)
        # What was written from this step on comes again. What other processes write goes nowhere.
        first = processes.is_first()
        rows, rows_file = [], config.out / "metrics.jsonl" if first else Path(os.devnull)
        if first:
            kept = [row for row in read_rows(config.out) if row["step"] <= step]
            rows = cli.write_rows(rows_file, kept)
        events = SummaryWriter(
            str(config.out), purge_step=step + 1 if step else None, filename_suffix=f".{step}",
            write_to_disk=first,
        )  # fmt: skip
        seconds = rows[-1]["seconds"] if rows else 0.0
        row_step, row_time = step, time.perf_counter()
        silent = not (config.progress and first)
        bar = tqdm(initial=step, total=config.steps, unit="step", disable=silent)
        bar.set_postfix_str("compiling")
        with rows_file.open("a") as metrics, events, bar:
            on_disk = step > 0  # there is a checkpoint of this very state
            while step < config.steps:
                if at_checkpoint and on_disk:
                    looked = time.perf_counter()
                    local = place.host(state)
                    values = at_checkpoint(training, local) if first else {}
                    for tag, value in values.items():
                        events.add_scalar(tag, value, step)
                    row_time += time.perf_counter() - looked  # no time of the training
                row_at = _next_multiple(step, config.log_every)
                save_at = _next_multiple(step, config.checkpoint_every)
                stop = min(row_at, save_at, config.steps) if many else step + 1
                with place.on_mesh():
                    if many:
                        state, losses = training.steps(state, data, stop - step)
                    else:
                        state, losses = training.step(state, data)
                state = place.state(state)
                bar.update(stop - step)
                step = stop
                if step in (row_at, config.steps):
                    row = {"step": step} | _measure(config, training, place, state, losses)
                    now = time.perf_counter()
                    seconds += now - row_time
                    speed = (step - row_step) / (now - row_time)
                    row |= {"seconds": round(seconds, 3), "steps_per_second": round(speed, 2)}
                    row_step, row_time = step, now
                    # Before the checkpoint, so that no row of a checkpoint's past is ever missing.
                    metrics.write(json.dumps(row, allow_nan=False) + "\n")
                    metrics.flush()
                    for tag, value in _scalars(row):
                        events.add_scalar(tag, value, step)
                    events.flush()
                    bar.set_postfix_str(_postfix(row))
                late = bool(config.minutes) and time.perf_counter() - start > 60 * config.minutes
                stopped = interrupt.is_set()
                if jax.process_count() > 1:  # all or none, so not asked at every step
                    asked = step in (row_at, config.steps)
                    stopped, late = (asked and processes.anywhere(x) for x in (stopped, late))
                on_disk = step in (save_at, config.steps) or stopped or late
                if on_disk:
                    _require_finite(config, step, place.host(state))
                    _save(config.out, state)
                saved = f"step {step} of {config.steps} is saved"
                if stopped:
                    raise KeyboardInterrupt(saved)
                if late and step < config.steps:
                    raise Paused(saved)
        state = state if place.mesh is None else place.host(state)
    return training, state


def read_rows(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Of a file in the folder of a run."""
    return cli.read_rows(out / name)


# --- Metrics --------------------------------------------------------------------------------


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def _require_finite(config: Config, step: int, tree: Any) -> None:
    """Raises Diverged unless all of the tree is."""
    leaves = jax.tree.leaves(jax.device_get(tree))
    if not all(np.isfinite(x).all() for x in leaves):
        raise Diverged(step, max(saved_steps(config.out), default=0))


def _measure(
    config: Config, training: Training, place: Place, state: State, losses: dict[str, Array]
) -> dict[str, Any]:
    """The losses, and for every layer the two norms of the paper's fig. 9.

    ``sigma_hat`` is the method's estimate of the raw kernel's norm; ``sigma_bar`` the true norm
    of the kernel that the network runs with, by SVD.
    """
    losses, (estimates, kernels) = place.host((losses, training.spectra(state)))
    _require_finite(config, int(state.step), (losses, kernels))
    matrices = {path: w.reshape(-1, w.shape[-1]) for path, w in kernels.items()}
    return {name: float(loss) for name, loss in losses.items()} | {
        "sigma_hat": {path: float(sigma) for path, sigma in estimates.items()},
        "sigma_bar": {path: float(np.linalg.norm(w, 2)) for path, w in matrices.items()},
    }


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What a row says, by TensorBoard's tag."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{path}", number) for path, number in value.items())
        elif name != "step":
            yield name, value


def _postfix(row: dict[str, Any]) -> str:
    text = f"D {row['loss_d']:.3f}, G {row['loss_g']:.3f}"
    if row["sigma_hat"]:
        sigmas = row["sigma_hat"].values()
        text += f", sigma {min(sigmas):.2f} to {max(sigmas):.2f}"
    return text


# --- Checkpoints and interrupts ---------------------------------------------------------------


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step is finished and saved; a second one ends at once."""
    event = threading.Event()

    def handle(signum, frame):
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def saved_steps(out: Path) -> list[int]:
    """The steps of the complete checkpoints, from the first to the last."""
    paths = (out / "checkpoints").glob("*/checksums.json")  # which is written last
    return sorted(int(path.parent.name) for path in paths if path.parent.name.isdigit())


def _folder(out: Path, step: int) -> Path:
    return (out / "checkpoints" / str(step)).absolute()  # as orbax demands


def _save(out: Path, state: State) -> None:
    """Write a checkpoint that is there as a whole or not at all; keep it and the one before."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    folder = _folder(out, int(state.step))
    with ocp.CheckpointManager(folder.parent, options=options, item_names=("state",)) as manager:
        for step in {*manager.all_steps()} - {*saved_steps(out)}:
            manager.delete(step)  # killed before it was complete
        manager.save(int(folder.name), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    if processes.is_first():
        cli.write_json(folder / "checksums.json", _checksums(folder), indent=2)
    processes.wait("saved")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _restore(config: Config, training: Training, place: Place) -> State:
    """The last checkpoint, laid out as this run is, however it was when it was written."""
    *before, step = saved_steps(config.out)
    if step > config.steps:
        raise UserError(
            f"{config.out} is already trained to step {step}: "
            f"pass --steps {step} or more, or another --out."
        )
    folder = _folder(config.out, step)
    remedy = f"move {folder} away to continue from step {max(before, default=0)}"
    # Orbax does not notice changed bytes, and says that a file is cut in a hundred tracebacks.
    try:
        recorded = json.loads((folder / "checksums.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'checksums.json'} is damaged: {remedy}.") from error
    present = _checksums(folder)
    for name, checksum in recorded.items():
        if present.get(name) != checksum:
            raise UserError(f"{folder / name} is damaged: {remedy}.")
    shapes = training.shapes(jax.random.key(config.seed))
    structure = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, place.shardings(shapes))
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder / "state", args=ocp.args.StandardRestore(structure))
    except ValueError as error:  # whole, but of another version of this program or of orbax
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{folder} cannot be read ({reason}): {remedy}.") from error
