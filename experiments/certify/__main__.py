"""``python -m experiments.certify``: true norms of a trained network; ``--attack``: their proof."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.certify import attack, study
from experiments.cli import commit, run_in_folder, versions, write_text


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small network with flattened and with operator spectral normalization, and certify
    its norms; or attack the certificates with random cases."""

    attack: bool = False
    """Attack norm_bounds with random cases instead of training; about 10 minutes."""
    cases: int = 10_000
    """Cases of the attack."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int = 500
    """Training steps of each network."""
    out: Path = Path("runs/certify")
    """Output folder; files of an earlier run are replaced."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("cases", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}.")


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 for a certificate that is wrong; 2 for what the user can put
    right; 130 after Ctrl-C."""

    def chosen(config: Config) -> int:
        return run_attack(config) if config.attack else run_study(config)

    prog = "python -m experiments.certify"
    return run_in_folder(Config, prog, args, chosen, "nothing was written.")


def run_attack(config: Config) -> int:
    """Attack, write attack.json, print the table; 1 if a certificate is wrong."""
    results = attack.attack(config.cases, config.seed, progress=config.progress)
    path = config.out / "attack.json"
    # Every violation; of what is only a nuisance the first ones, and n_found says how many.
    short = {name: results[name][:20] for name in ("errors", "rtol_missed")}
    write_text(path, json.dumps(results | short | provenance(), indent=1))
    print(attack.report(results))
    print(f"results  {path}")
    return int(any(results[name] for name in ("violations", "errors", "rtol_missed")))


def run_study(config: Config) -> int:
    """Train and measure, write study.json and norms.png, print the table."""
    results = study.study(config.steps, config.seed, progress=config.progress)
    path = config.out / "study.json"
    summary = {"steps": config.steps, "seed": config.seed, "networks": results} | provenance()
    write_text(path, json.dumps(summary, indent=1))
    picture = config.out / "norms.png"
    title = f"A small network on digits, {config.steps} steps, seed {config.seed}"
    study.save_norms(picture, results, title)
    print(study.report(results))
    print(f"\nresults  {path}\npicture  {picture}")
    return 0


def provenance() -> dict[str, Any]:
    """On what it ran."""
    device = jax.devices()[0]
    return {
        "device": {"kind": device.device_kind, "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "commit": commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
