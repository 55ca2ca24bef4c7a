"""FID of a run: at its end, and over training."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import UserError, write_rows
from experiments.gan.evaluate import generated
from experiments.gan.loop import read_rows
from experiments.gan.train import Config, Data, State, Training
from experiments.metrics import PROTOCOLS, evaluate
from experiments.metrics.weights import inception_params


def counts(name: str) -> tuple[int, int]:
    """Numbers of real and of generated images: of "paper", "common", or as in "256/256"."""
    return PROTOCOLS[name] if name in PROTOCOLS else tuple(map(int, name.split("/")))


def check(config: Config, data: Data) -> None:
    """Before a run of days: can its FID be measured?

    Raises:
      UserError: fewer real images than wanted, or the Inception network cannot be had.
    """
    for name in config.fid:
        if counts(name)[0] > len(data.images):
            raise UserError(
                f"--fid {name} takes {counts(name)[0]} real images, and {config.dataset} has "
                f"{len(data.images)} to train on: give smaller numbers, such as --fid 1000/1000."
            )
    if config.fid:
        inception_params(config.data_dir)


def missing(config: Config, step: int) -> list[str]:
    """What is to be measured at a step, and is not in fid.jsonl."""
    if step == config.steps:
        wanted = config.fid
    else:
        due = config.fid_every and step and step % config.fid_every == 0
        wanted = config.fid[:1] if due else ()
    done = {(row["step"], row["n_real"], row["n_fake"]) for row in rows(config.out)}
    return [name for name in wanted if (step, *counts(name)) not in done]


def measure(
    config: Config, data: Data, n_classes: int, training: Training, state: State
) -> dict[str, float]:
    """Measure what is missing at this state's step, as rows of fid.jsonl.

    Returns:
      The FIDs by their numbers of images, for a logger; often none.
    """
    step = int(state.step)
    scalars = {}
    for name in missing(config, step):
        start = time.perf_counter()
        n_real, n_fake = counts(name)
        batches = generated(training, state, n_fake, n_classes)
        fake = np.concatenate([np.round((x + 1) * 127.5).astype(np.uint8) for x in batches])
        options = {"data_dir": config.data_dir, "progress": config.progress}
        numbers = evaluate(np.asarray(data.images), fake, n_real=n_real, **options)
        row = {"step": step} | numbers | {"seconds": round(time.perf_counter() - start, 1)}
        write_rows(config.out / "fid.jsonl", [*rows(config.out), row], allow_nan=False)
        scalars[f"fid/{n_real}/{n_fake}"] = numbers["fid"]
    return scalars


def rows(out: Path) -> list[dict[str, Any]]:
    """Of fid.jsonl, in the order of measuring."""
    return read_rows(out, "fid.jsonl")
