"""``python -m experiments.gan``: train an SN-GAN on real images, and measure its samples."""

import json
import os
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.cli import UserError, commit, parse, versions, write_text
from experiments.data import load
from experiments.gan import evaluate, plots
from experiments.gan.loop import read_json, read_rows, train
from experiments.gan.train import LATENT, Config, scaled


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    start = time.perf_counter()
    try:
        config = parse(Config, "python -m experiments.gan", args)
        summary = open_folder(config) or run(config, start)
        print(report(config, summary))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        resume = [] if "--resume" in args else ["--resume"]
        again = shlex.join(["python", "-m", "experiments.gan", *args, *resume])
        what = str(interrupt) or "what was saved is kept"
        print(f"Interrupted: {what}; continue with: {again}", file=sys.stderr)
        return 130


def open_folder(config: Config) -> dict[str, Any] | None:
    """Make the output folder this run's own; the summary of this very run if it is finished.

    Raises:
      UserError: it cannot be written, or holds something else; nothing in it is changed then.
    """
    out = config.out
    try:
        if (out / "config.json").exists():
            if not config.resume:
                raise UserError(
                    f"{out} holds a run: pass --resume to continue it, or another --out."
                )
            recorded = read_json(out / "config.json")
            differing = [
                f"{name} is {recorded.get(name)} there and {value} here"
                for name, value in config.identity().items()
                if recorded.get(name) != value and name != "steps"  # a run may be prolonged
            ]
            if differing:
                raise UserError(
                    f"{out} holds a run with other options ({'; '.join(differing)}): "
                    "give the same ones, or another --out."
                )
            if (out / "summary.json").exists():
                summary = read_json(out / "summary.json")
                if summary["config"] == config.identity():
                    return summary
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"{out} holds files that are not of a run: give another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(config.identity(), indent=2))
    except OSError as error:
        raise UserError(
            f"{out} cannot be used ({error.strerror}): give a folder that can be written by --out."
        ) from error
    return None


def run(config: Config, start: float) -> dict[str, Any]:
    """Train, measure, draw; returns what summary.json says."""
    images, labels = load(config.dataset, "train")
    test_images, test_labels = load(config.dataset, "test")
    device = jax.devices()[0]
    print(f"Training on {len(images)} images of {config.dataset}, {device.device_kind}")
    training, state = train(config, images)
    trained = time.perf_counter()

    print("Measuring the samples")
    # The first key that no training step has used.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    shape = evaluate.N_SAMPLES // 100, 100, LATENT
    latents = jax.random.normal(key, shape, np.float32)
    fake = np.concatenate([training.sample(state, z) for z in latents])
    real, held_out = scaled(images), scaled(test_images)
    judge = evaluate.train_classifier(real, labels)
    quality = evaluate.quality(judge, fake, real, held_out, test_labels)
    title = (
        f"{config.dataset}, normalization {config.normalization}, {config.loss} loss, "
        f"setting {config.setting}, {config.steps} steps, seed {config.seed}"
    )
    rows = read_rows(config.out)
    plots.save_samples(config.out / "samples.png", fake, held_out, title)
    plots.save_curves(config.out / "curves.png", rows, title)

    summary = {
        "config": config.identity(),
        "seed": config.seed,
        "quality": quality,
        "seconds": {
            "training": rows[-1]["seconds"],  # of all the processes that a run was resumed in
            "evaluation": time.perf_counter() - trained,
            "this process": time.perf_counter() - start,
        },
        "steps_per_second": float(np.median([row["steps_per_second"] for row in rows])),
        "device": {"kind": device.device_kind, "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "commit": commit(),
    }
    write_text(config.out / "summary.json", json.dumps(summary, indent=2, allow_nan=False))
    return summary


def report(config: Config, summary: dict[str, Any]) -> str:
    """The numbers and where the pictures are."""
    quality, seconds = summary["quality"], summary["seconds"]
    fractions = quality["class_fractions"]
    present = sum(fraction > 0 for fraction in fractions)
    n = quality["n_real"]
    table = [
        ("", "generated", "real", ""),
        (
            "Frechet distance",
            f"{quality['frechet_fake']:.1f}",
            f"{quality['frechet_real']:.1f}",
            f"{n} generated, {n} training images; each against {n} held-out ones",
        ),
        (
            "mean confidence",
            f"{quality['confidence_fake']:.3f}",
            f"{quality['confidence_real']:.3f}",
            f"of the classifier, {quality['classifier_accuracy']:.1%} right on held-out images",
        ),
        ("classes present", f"{present}/{len(fractions)}", "", f"{quality['n_samples']} samples"),
        ("rarest class", f"{min(fractions):.1%}", "", ""),
    ]
    rows = [f"{name:<17}{fake:>10}{real:>8}   {note}".rstrip() for name, fake, real, note in table]
    return "\n".join(
        [
            "",
            *rows,
            "",
            f"{config.steps} steps, {summary['steps_per_second']:.1f} a second; "
            f"{seconds['training']:.0f} s training, {seconds['evaluation']:.0f} s evaluation, "
            f"on {summary['device']['kind']}",
            f"samples  {config.out / 'samples.png'}",
            f"curves   {config.out / 'curves.png'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
