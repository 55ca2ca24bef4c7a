"""One run from its options to its numbers and pictures."""

import dataclasses
import resource
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import processes
from experiments.cli import UserError, provenance, read_json, usable, write_json
from experiments.data import load
from experiments.gan import evaluate, fid, plots
from experiments.gan.loop import read_rows, train
from experiments.gan.networks import ARCHITECTURES, fit, fitting_size
from experiments.gan.train import Config, Data, scaled

N_SHOWN = 100


class RealImages(NamedTuple):
    """What a run is trained on and measured against, at the size of its networks."""

    train: Data
    test: Data
    n_classes: int
    note: str
    """How they were made to fit; empty where they are as they come."""


def open_folder(config: Config) -> dict[str, Any] | None:
    """Make the output folder this run's own; the summary of this very run if it is finished.

    Raises:
      UserError: it cannot be written, or holds something else; nothing in it is changed then.
    """
    out = config.out
    # A run may be prolonged, unless what it did depends on where it was to end.
    free = set() if config.schedule == "linear" else {"steps"}
    with usable(out):
        if (out / "config.json").exists():
            if not config.resume:
                raise UserError(
                    f"{out} holds a run: pass --resume to continue it, or another --out."
                )
            # What an older version did not have yet was as the default is.
            recorded = dataclasses.asdict(Config()) | read_json(out / "config.json")
            differing = [
                f"{name} is {recorded.get(name)} there and {value} here"
                for name, value in config.identity().items()
                if recorded.get(name) != value and name not in free
            ]
            if differing:
                raise UserError(
                    f"{out} holds a run with other options ({'; '.join(differing)}): "
                    "give the same ones, or another --out."
                )
            if (out / "summary.json").exists():
                summary = read_json(out / "summary.json")
                if summary["config"] == config.identity() and not fid.missing(config, config.steps):
                    return summary
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"{out} holds files that are not of a run: give another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", config.identity(), indent=2)
    return None


def real_images(config: Config) -> RealImages:
    """The run's data set, made to fit its networks.

    Raises:
      UserError: there is no such data set, or the networks do not fit ``config.size``.
    """
    if config.size is not None:
        try:
            ARCHITECTURES[config.architecture].n_levels(config.size)
        except ValueError as error:
            raise UserError(
                str(error).replace("pad or resize them to", "give a --size of")
            ) from error
    return _real_images(config.dataset, config.data_dir, config.architecture, config.size)


@lru_cache(maxsize=1)
def _real_images(
    dataset: str, data_dir: Path | None, architecture: str, size: int | None
) -> RealImages:
    splits = [load(dataset, split, data_dir) for split in ("train", "test")]
    h, w = splits[0][0].shape[1:3]
    target = size or fitting_size(architecture, max(h, w))
    how = "resized" if target < max(h, w) else "padded"
    note = "" if (h, w) == (target, target) else f"{how} from {h}x{w} to {target}x{target}"
    train, test = (Data(np.asarray(fit(images, target)), labels) for images, labels in splits)
    return RealImages(train, test, int(max(data.labels.max() for data in (train, test))) + 1, note)


@lru_cache(maxsize=1)
def _judge(
    dataset: str, data_dir: Path | None, architecture: str, size: int | None
) -> evaluate.Judge:
    real = _real_images(dataset, data_dir, architecture, size)
    return evaluate.train_classifier(real.train.images, real.train.labels)


def run(config: Config) -> dict[str, Any]:
    """Train, measure, draw; returns what summary.json says, in the first of several processes.

    Raises:
      UserError, Diverged, Paused, KeyboardInterrupt: as ``loop.train``.
    """
    start = time.perf_counter()
    real = real_images(config)
    device = jax.devices()[0]
    note = f", {real.note}" if real.note else ""
    if config.progress and processes.is_first():
        print(
            f"Training on {len(real.train.images)} images of {config.dataset}{note}, "
            f"{device.device_kind}"
        )
    measure_fid = partial(fid.measure, config, real.train, real.n_classes)
    training, state = train(config, real.train, real.n_classes, measure_fid)
    trained = time.perf_counter()
    if not processes.is_first():
        return {}

    samples = evaluate.generated(training, state, evaluate.N_SAMPLES, real.n_classes)
    fake = np.concatenate(list(samples))
    quality = None
    if real.n_classes > 1:
        if config.progress:
            print("Measuring the samples")
        source = config.dataset, config.data_dir, config.architecture, config.size
        train_images, test_images = real.train.images[: len(fake)], real.test.images
        quality = evaluate.quality(
            _judge(*source), fake, scaled(train_images), scaled(test_images), real.test.labels
        )
    measure_fid(training, state)
    fids = fid.rows(config.out)
    rows = read_rows(config.out)
    title = (
        f"{config.dataset}, {config.architecture}, normalization {config.normalization}, "
        f"{config.loss} loss, setting {config.setting}, {config.steps} steps, seed {config.seed}"
    )
    shown = np.asarray(scaled(real.test.images[:N_SHOWN]))
    plots.save_samples(config.out / "samples.png", fake, shown, title)
    plots.save_curves(config.out / "curves.png", rows, title)
    if len({row["step"] for row in fids}) > 1:
        plots.save_fid(config.out / "fid.png", fids, title)

    singular_values = {  # of the kernels in use
        path: np.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False).tolist()
        for path, w in jax.device_get(training.spectra(state)[1]).items()
    }
    plots.save_spectra(config.out / "spectra.png", {config.normalization: singular_values}, title)
    speeds = [row["steps_per_second"] for row in rows]
    memory = device.memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = {
        "config": config.identity(),
        "images": real.note or "as they come",
        "seed": config.seed,
        "quality": quality,
        "fid": [row for row in fids if row["step"] == config.steps],
        "singular_values": singular_values,
        "seconds": {
            "training": rows[-1]["seconds"],  # of all the processes that a run was resumed in
            "evaluation": time.perf_counter() - trained,
            "this process": time.perf_counter() - start,
        },
        "steps_per_second": float(np.median(speeds)),
        "memory": {
            "device_peak_bytes": memory.get("peak_bytes_in_use"),  # null: the device cannot tell
            "process_peak_bytes": peak if sys.platform == "darwin" else 1024 * peak,
        },
    } | provenance()
    write_json(config.out / "summary.json", summary, indent=2, allow_nan=False)
    return summary


def report(config: Config, summary: dict[str, Any]) -> str:
    """The numbers and where the pictures are."""
    seconds = summary["seconds"]
    memory = summary["memory"]["device_peak_bytes"] or summary["memory"]["process_peak_bytes"]
    where = "device" if summary["memory"]["device_peak_bytes"] else "the process"
    return "\n".join(
        [
            "",
            *_quality_lines(summary["quality"]),
            *map(_fid_line, summary["fid"]),
            "",
            f"{config.steps} steps, {summary['steps_per_second']:.1f} a second; "
            f"{seconds['training']:.0f} s training, {seconds['evaluation']:.0f} s evaluation, "
            f"{memory / 2**20:.0f} MiB of {where} at most, on {summary['device']['kind']}",
            f"samples  {config.out / 'samples.png'}",
            f"curves   {config.out / 'curves.png'}",
        ]
    )


def _quality_lines(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return ["The images have no classes, so no classifier judged the samples."]
    fractions = quality["class_fractions"]
    present = sum(fraction > 0 for fraction in fractions)
    n = quality["n_real"]
    table = [
        ("", "generated", "real", ""),
        ("Frechet distance", f"{quality['frechet_fake']:.1f}", f"{quality['frechet_real']:.1f}",
         f"{n} generated, {n} training images; each against {n} held-out ones"),
        ("mean confidence", f"{quality['confidence_fake']:.3f}",
         f"{quality['confidence_real']:.3f}",
         f"of the classifier, {quality['classifier_accuracy']:.1%} right on held-out images"),
        ("classes present", f"{present}/{len(fractions)}", "", f"{quality['n_samples']} samples"),
        ("rarest class", f"{min(fractions):.1%}", "", ""),
    ]  # fmt: skip
    return [f"{name:<17}{fake:>10}{real:>8}   {note}".rstrip() for name, fake, real, note in table]


def _fid_line(row: dict[str, Any]) -> str:
    return (
        f"{'FID':<17}{row['fid']:>10.2f}{'':>11}{row['n_fake']} generated, {row['n_real']} "
        f"training images; KID {1000 * row['kid']:.2f} / 1000, "
        f"precision {row['precision']:.2f}, recall {row['recall']:.2f}"
    )
