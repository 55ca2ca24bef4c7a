"""``python -m experiments.gan.table2``: the paper's comparison of methods, row by row.

Every row is a run of ``python -m experiments.gan`` in a folder of its own; the table says its
command. Killed at any moment and called again, it goes on where it was.
"""

import dataclasses
import datetime
import itertools
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import cli
from experiments.bench.timing import interleaved, median_ratio
from experiments.cli import UserError, read_json, write_json
from experiments.gan import plots
from experiments.gan.loop import Diverged, Paused, read_rows
from experiments.gan.run import open_folder, real_images, run
from experiments.gan.train import SETTINGS, Config, make_training

# Fréchet distances (FID) of the paper's table 2 on CIFAR-10: 10,000 real and 5,000 generated.
PAPER = {
    "clip": 42.6, "GAN-GP": 37.7, "WGAN-GP": 40.2, "BN": 56.3, "LN": 33.9, "WN": 34.7,
    "orthonormal": 29.0, "SN": 29.3, "SN hinge": 25.5, "ResNet orthonormal hinge": 23.8,
    "ResNet SN hinge": 21.7,
}  # fmt: skip

# What a method of the table is: normalization and loss, and what else is not the preset's. The
# loss is the paper's: equation 1 but for WGAN-GP and where it says hinge.
_WASSERSTEIN, _HINGE = {"loss": "wasserstein"}, {"loss": "hinge"}
_RESNET = {"architecture": "resnet", "loss": "hinge", "learning_rate": 2e-4, "b1": 0.0,
           "b2": 0.9, "n_dis": 5}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    name: {"normalization": normalization} | options for name, normalization, options in [
        ("none", "none", {}), ("clip", "clip", {}), ("GAN-GP", "gp", {}),
        ("WGAN-GP", "gp", _WASSERSTEIN), ("BN", "bn", {}), ("LN", "ln", {}), ("WN", "wn", {}),
        ("orthonormal", "orthonormal", {}), ("SN", "sn", {}), ("SN hinge", "sn", _HINGE),
        ("SN operator", "sn-operator", {}), ("SN + WGAN-GP", "sn-gp", _WASSERSTEIN),
        ("SN regularization", "sn-regularization", {}), ("projection", "projection", {}),
        ("L2", "l2", {}), ("lasso", "lasso", {}),
        ("ResNet orthonormal hinge", "orthonormal", _RESNET), ("ResNet SN hinge", "sn", _RESNET),
    ]
}  # fmt: skip


def study(common: dict[str, Any], *parts: tuple[list[str], str, list[int]]) -> dict[str, Config]:
    """Rows by name: each part's seeds x methods x settings, in this order."""
    rows = {}
    for methods, settings, seeds in parts:
        for seed, method, setting in itertools.product(seeds, methods, settings):
            options = {"loss": "non-saturating"} | common | METHODS[method]
            config = Config(**options, setting=setting, seed=seed)
            rows[f"{method}, {setting_of(config)}, seed {seed}"] = config
    return rows


def setting_of(config: Config) -> str:
    """The setting's letter; "own" where the row has hyperparameters of its own."""
    return config.setting if config.adam() == SETTINGS[config.setting] else "own"


# KID of 500 images on the way; FID at the end of as many as a CPU has time for.
CIFAR10_SMALL = {"dataset": "cifar10", "width": 16, "log_every": 100,
                 "fid": ("500/500", "2000/2000"), "fid_every": 500}  # fmt: skip

SHOWN = "C", 0  # setting and seed of figures 3, 9 and 10

PRESETS = {
    # The first rows of a part are those that are wanted most: what the time does not suffice for
    # is listed as not run.
    "tiny": study(
        {"dataset": "digits", "width": 16, "steps": 1000, "log_every": 100},
        (["none", "SN", "clip", "WGAN-GP", "WN", "LN", "orthonormal"], "CAE", [0]),
        (["none", "SN"], "CAE", [1, 2]),
        (["WGAN-GP", "WN", "orthonormal"], "CAE", [1, 2]),
    ),
    "small": study(
        {"dataset": "mnist", "width": 16, "steps": 2000, "log_every": 100},
        (["none", "SN", "WN", "WGAN-GP"], "C", [0]),
    ),
    "cifar10-small": study(
        CIFAR10_SMALL | {"steps": 4000}, (["none", "SN", "WGAN-GP"], "C", [0])
    )
    | study(CIFAR10_SMALL | {"steps": 1500}, (["none", "SN"], "E", [0])),
    "paper": study(
        {"dataset": "cifar10", "width": 64, "steps": 100_000, "log_every": 1000,
         "checkpoint_every": 5000, "fid": ("paper",)},
        ([name for name in METHODS if "ResNet" not in name], "ABCDEF", [0]),
        (["ResNet orthonormal hinge", "ResNet SN hinge"], "C", [0]),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Train every row of a table, measure it, and draw the paper's figures."""

    preset: Literal["tiny", "small", "cifar10-small", "paper"] = "tiny"
    """tiny: digits at width 16, settings A, C and E. small: MNIST at 32x32, width 16, setting C.
    cifar10-small: CIFAR-10 at width 16, settings C and E, with FID of 2000 images.
    paper: CIFAR-10 at width 64, 100000 updates, every method and setting."""
    row: str | None = None
    """Only this row, such as "SN, C, seed 0"."""
    out: Path | None = None
    """Output folder; by default runs/table2-PRESET."""
    data_dir: Path | None = None
    """Where the files of data sets lie or shall lie; the user's cache if not given."""
    minutes: float | None = None
    """Save a checkpoint and exit after so many; the same command continues."""
    progress: bool = True
    """Show a progress bar."""


def main(args: list[str] | None = None) -> int:
    """Returns the exit code of ``cli.command``."""
    kept = "what was saved is kept; the same command continues."
    return cli.command(
        Options, "python -m experiments.gan.table2", args, tabulate, interrupted=kept
    )


def tabulate(options: Options) -> None:
    """Run the rows that are not there yet; write the table and the figures of all that are."""
    rows = PRESETS[options.preset]
    if options.row is not None and options.row not in rows:
        raise UserError(f"There is no row {options.row!r}: choose from {'; '.join(rows)}.")
    out = options.out or Path(f"runs/table2-{options.preset}")
    here = {"data_dir": options.data_dir, "resume": True, "progress": options.progress}
    configs = {
        name: dataclasses.replace(config, out=out / "runs" / folder_name(name), **here)
        for name, config in rows.items()
    }
    start = time.perf_counter()
    done = {row["name"] for row in earlier(out, configs)["rows"]}
    for i, (name, config) in enumerate(configs.items()):
        if options.row not in (None, name) or collect(name, config) or name in done:
            continue
        print(f"[{i + 1}/{len(configs)}] {name}", flush=True)
        if options.minutes is not None:
            left = options.minutes - (time.perf_counter() - start) / 60
            config = dataclasses.replace(config, minutes=max(left, 1e-9))
        try:
            real_images(config)
            _ = open_folder(config) or run(config)
        except Paused as pause:
            print(f"Paused: {name}, {pause}; the same command continues")
            break
        except Diverged as error:
            write_json(config.out / "diverged.json", {"step": error.step})
            print(f"{name} diverged before step {error.step}")
        write(out, options.preset, configs)
    results = write(out, options.preset, configs)
    if results["rows"]:
        draw(out, results)
        print(f"\n{(out / 'table.md').read_text()}")
    print(f"results  {out / 'results.json'}")


def folder_name(name: str) -> str:
    """Of a row: "SN, C, seed 0" becomes sn-c-seed-0."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def summary_of(config: Config) -> dict[str, Any] | None:
    """Of the row's run, if it is finished; that of another run does not count."""
    if not (config.out / "summary.json").exists():
        return None
    summary = read_json(config.out / "summary.json")
    return summary if summary["config"] == config.identity() else None


def diverged_at(config: Config) -> int | None:
    """The step before which the row's run diverged, if it did."""
    path = config.out / "diverged.json"
    return read_json(path)["step"] if path.exists() else None


def command(config: Config) -> str:
    """What runs a row alone."""
    default = Config()
    words = ["python", "-m", "experiments.gan"]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name in config.identity() and value != getattr(default, field.name):
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [f"{value}"]
    words += ["--fid", *config.fid] if config.fid else []
    words += ["--fid-every", f"{config.fid_every}"] if config.fid_every else []
    return shlex.join([*words, "--out", f"runs/{config.out.name}"])


# --- Results --------------------------------------------------------------------------------


def collect(name: str, config: Config) -> dict[str, Any] | None:
    """A row of results.json; None if its run is not finished."""
    method = name.partition(",")[0]
    row = {
        "name": name, "method": method, "setting": setting_of(config), "loss": config.loss,
        "seed": config.seed, "g_updates": config.steps, "command": command(config),
    }  # fmt: skip
    if diverged_at(config):
        return row | {"diverged_at": diverged_at(config)}
    summary = summary_of(config)
    if summary is None:
        return None
    quality = summary["quality"]
    fractions = quality["class_fractions"]
    names = ("fid", "kid", "precision", "recall", "n_real", "n_fake")
    fid = {name: summary["fid"][-1][name] for name in names} if config.fid else {}
    if config.fid_every:
        measured = read_rows(config.out, "fid.jsonl")
        images = measured[0]["n_real"]  # there are more of them at the end
        points = [(at["step"], at["kid"]) for at in measured if at["n_real"] == images]
        fid["kid_on_the_way"] = {"images": images, "points": points}
    judged = {
        "images": summary["images"],
        "n_real": quality["n_real"],
        "n_fake": quality["n_fake"],
        "frechet": quality["frechet_fake"],
        "frechet_real": quality["frechet_real"],
        # A class is there if it has a tenth of an even share.
        "coverage": sum(fraction >= 0.1 / len(fractions) for fraction in fractions),
        "n_classes": len(fractions),
        "rarest_class": min(fractions),
        "confidence": quality["confidence_fake"],
        "seconds": summary["seconds"]["training"],
    }
    on = {name: summary.get(name) for name in ("date", "device", "versions", "commit")}
    return row | judged | on | fid


def earlier(out: Path, configs: dict[str, Config]) -> dict[str, Any]:
    """What results.json holds of runs by the same commands, whose folders may be gone."""
    path = out / "results.json"
    found = read_json(path) if path.exists() else {}
    commands = {name: command(config) for name, config in configs.items()}
    rows = [row for row in found.get("rows", []) if commands.get(row["name"]) == row["command"]]
    of_rows = {row["method"] for row in rows if (row["setting"], row["seed"]) == SHOWN}
    parts = {
        part: {method: of for method, of in found.get(part, {}).items() if method in of_rows}
        for part in ("spectra", "sigma_bar")
    }
    return {"rows": rows} | parts | {key: found[key] for key in ("times",) if key in found}


def write(out: Path, preset: str, configs: dict[str, Config]) -> dict[str, Any]:
    """results.json and table.md from the runs' folders; returns what the former holds."""
    before = earlier(out, configs)
    kept = {row["name"]: row for row in before["rows"]}
    collected = {n: collect(n, config) or kept.get(n) for n, config in configs.items()}
    rows = [row for row in collected.values() if row]
    results = {
        "preset": preset,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        "not_run": [name for name, row in collected.items() if row is None],
        "spectra": before["spectra"],
        "sigma_bar": before["sigma_bar"],
    }
    for name, config in configs.items():
        method = name.partition(",")[0]
        if (config.setting, config.seed) == SHOWN and (summary := summary_of(config)):
            spectra = summary["singular_values"]
            results["spectra"][method] = {k: np.round(v, 5).tolist() for k, v in spectra.items()}
            results["sigma_bar"][method] = [
                {"step": row["step"]} | {k: round(v, 5) for k, v in row["sigma_bar"].items()}
                for row in read_rows(config.out)
            ]
    if (out / "times.json").exists():
        results["times"] = read_json(out / "times.json")
    elif "times" in before:
        results["times"] = before["times"]
    elif rows and not results["not_run"]:
        results["times"] = times(configs)
        write_json(out / "times.json", results["times"], indent=1)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results, indent=1, allow_nan=False)
    cli.write_text(out / "table.md", table(results))
    return results


def times(configs: dict[str, Config], updates: int = 10, rounds: int = 7) -> dict[str, Any]:
    """Figure 10: seconds per 100 generator updates, and the ratio to none, taking turns."""
    trainings = {}
    for name, config in configs.items():
        if (config.setting, config.seed) == SHOWN:
            real = real_images(config)
            training = make_training(config, real.train.images.shape[1:], real.n_classes)
            trainings[name.partition(",")[0]] = training
    data = jax.tree.map(jax.numpy.asarray, real.train)
    states = {method: training.init(jax.random.key(0)) for method, training in trainings.items()}

    def advance(method):
        for _ in range(updates):
            states[method], _ = trainings[method].step(states[method], data)
        return states[method]

    seconds = interleaved({method: partial(advance, method) for method in trainings}, rounds)
    compared = {method: median_ratio(s, seconds["none"]) for method, s in seconds.items()}
    return {
        method: {
            "seconds_per_100": float(100 / updates * np.median(seconds[method])),
            "ratio": ratio,
            "quartiles": quartiles,
        }
        for method, (ratio, quartiles) in compared.items()
    }


def updates(rows: list[dict[str, Any]]) -> str:
    """How many the generator got, by setting where they differ."""
    numbers = {row["setting"]: row["g_updates"] for row in rows}
    if len(set(numbers.values())) == 1:
        return f"{rows[0]['g_updates']} generator updates"
    each = ", ".join(f"{n} at setting {setting}" for setting, n in numbers.items())
    return f"generator updates: {each}"


def verdict(row: dict[str, Any]) -> str:
    if "diverged_at" in row:
        return f"diverged before update {row['diverged_at']}"
    return "" if row["coverage"] >= row["n_classes"] else "not converged"


def table(results: dict[str, Any]) -> str:
    """The table as Markdown, with the paper's numbers: methods over settings, then every row."""
    rows, not_run = results["rows"], results["not_run"]
    measured = [row for row in rows if "frechet" in row]
    key = "fid" if measured and "fid" in measured[0] else "frechet"
    name = "FID" if key == "fid" else "Fréchet distance"
    settings = sorted({row["setting"] for row in rows})
    head = [name, *(f"setting {setting}" for setting in settings), "the paper"]
    cells = [
        [method, *(cell([r for r in rows if (r["method"], r["setting"]) == (method, setting)], key)
                   for setting in settings), PAPER.get(method, "")]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]  # fmt: skip
    lines = cli.markdown([head, *cells], right=range(1, len(head)))
    columns = {name: lambda row: f"{row[key]:.1f}"}
    if key == "fid":
        columns |= {
            "KID x 1000": lambda row: f"{1000 * row['kid']:.1f}",
            "precision": lambda row: f"{row['precision']:.2f}",
            "recall": lambda row: f"{row['recall']:.2f}",
        }
    columns |= {
        "coverage": lambda row: f"{row['coverage']}/{row['n_classes']}",
        "rarest class": lambda row: f"{row['rarest_class']:.1%}",
        "confidence": lambda row: f"{row['confidence']:.3f}",
        "seconds": lambda row: f"{row['seconds']:.0f}",
    }
    own = ("method", "setting", "seed", "loss")
    cells = [[*own, *columns, ""]]
    cells += [[*(row[name] for name in own),
               *("" if "diverged_at" in row else of(row) for of in columns.values()), verdict(row)]
              for row in rows]  # fmt: skip
    lines += ["", *cli.markdown(cells, right=range(len(own), len(own) + len(columns)))]
    notes = []
    if measured:
        row = measured[0]
        versions = ", ".join(f"{k} {row['versions'][k]}" for k in ("jax", "flax", "optax"))
        padded = "" if row["images"] == "as they come" else f", {row['images']}"
        features = (
            "the Inception network's features" if key == "fid" else
            "the features of a classifier of this data set (as many training images: "
            f"{row['frechet_real']:.1f})"
        )  # fmt: skip
        notes = [
            f"{name} of {row['n_fake']} generated to {row['n_real']} real images in {features}; "
            f"{updates(rows)}{padded}. * not converged: a class has less than "
            "a tenth of an even share of the samples. The paper's numbers are FIDs of CIFAR-10 "
            "after 100,000 updates, for the best setting.",
            f"{row['device']['kind']}, {row['device']['cpu_cores']} core(s), XLA_FLAGS="
            f"'{row['device']['xla_flags']}'; {versions}; {results['date']}; "
            f"`python -m experiments.gan.table2 --preset {results['preset']}`.",
        ]
    notes += [f"Not run: {'; '.join(not_run)}."] if not_run else []
    return "\n".join([*lines, "", "\n\n".join(notes), ""])


def cell(rows: list[dict[str, Any]], key: str) -> str:
    """Of a method at a setting: the mean over the seeds and their range."""
    if not rows:
        return ""
    values = [row[key] for row in rows if key in row]
    if len(values) < len(rows):
        return "diverged"
    star = "*" if any(verdict(row) for row in rows) else ""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{star}{spread}"


def draw(out: Path, results: dict[str, Any]) -> None:
    """The paper's figures, of the rows that are there."""
    title = f"{results['preset']}: {updates(results['rows'])}"
    shown = f"{title}, setting {SHOWN[0]}, seed {SHOWN[1]}"
    plots.save_robustness(out / "figure1.png", results["rows"], title)
    if any("kid_on_the_way" in row for row in results["rows"]):
        plots.save_kid(out / "kid.png", results["rows"], title)
    if results["spectra"]:
        plots.save_spectra(out / "figure3.png", results["spectra"], shown)
        plots.save_norms(out / "figure9.png", results["sigma_bar"], shown)
    if "times" in results:
        plots.save_times(out / "figure10.png", results["times"], title)


if __name__ == "__main__":
    sys.exit(main())
