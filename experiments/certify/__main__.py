"""``python -m experiments.certify``: true norms of a trained network, and Lipschitz constants;
``--attack`` and ``--lipschitz-attack``: their proof."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.certify import (
    attack,
    classifier,
    in_program,
    lipschitz,
    models,
    nets,
    sandwich,
    study,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small network with flattened and with operator spectral normalization, and certify
    its norms; or what one of the flags says."""

    attack: bool = False
    """Attack norm_bounds with random cases instead; about 10 minutes."""
    mode_attack: bool = False
    """Attack spectral_normalize(mode="certified") with random cases instead; about 10 minutes."""
    lipschitz: bool = False
    """Certify the demo's discriminator by lipschitz_bound, without normalization and with both,
    and the radius of a classifier trained for a margin; continues where it was stopped."""
    lipschitz_attack: bool = False
    """Attack lipschitz_bound with random programs; continues where it was stopped."""
    nets: bool = False
    """Bounds of random networks of many kinds by each method of lipschitz_bound; continues where
    it was stopped."""
    models: bool = False
    """Every network of this repository between its bound and an attack; continues where it was
    stopped."""
    classifier: bool = False
    """Train classifiers of the digits and of MNIST for a margin, and certify their accuracy at
    every radius by each method, beside what an attack leaves."""
    large: bool = False
    """Let --nets take the SN-GAN's discriminators at 32x32 instead; some minutes a seed."""
    seeds: int = 5
    """Seeds of --nets, from --seed on."""
    cases: int | None = None
    """Cases of an attack; by default 10,000, of --lipschitz-attack 5,000."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int | None = None
    """Training steps of each network; by default 500, of --lipschitz 1,000 for a GAN and 2,000
    for a classifier, of --classifier 1,500."""
    out: Path = Path("runs/certify")
    """Output folder; files of an earlier run are replaced."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        cli.check_positive(self, whole=("cases", "steps", "seeds"))
        cli.check_seed(self.seed)
        if self.large and not self.nets:
            raise ValueError("--large is an option of --nets: give both.")
        chosen = [name for name in RUNS if getattr(self, name)]
        if len(chosen) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in chosen)
            raise ValueError(f"{flags} are separate runs: give one of them.")


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 for a certificate that is wrong; 2 for what the user can put
    right; 130 after Ctrl-C."""

    def chosen(config: Config) -> int:
        run = next((run for name, run in RUNS.items() if getattr(config, name)), run_study)
        return run(config)

    prog = "python -m experiments.certify"
    kept = "what can be continued is kept, and nothing else was written."
    return cli.command(Config, prog, args, cli.in_folder(chosen), interrupted=kept)


def write(config: Config, name: str, found: dict[str, Any]) -> str:
    """Write what was found and on what; returns a line that says where."""
    path = config.out / f"{name}.json"
    cli.write_json(path, found | cli.provenance(), indent=1)
    return f"results  {path}"


def write_parts(config: Config, name: str, results, steps: int, title: str, save, to="") -> str:
    """Write the results of networks, and their picture; returns lines that say where."""
    where = write(config, name, {"steps": steps, "seed": config.seed, "networks": results})
    picture = config.out / f"{to or name}.png"
    save(picture, results, f"{title}, {steps} steps, seed {config.seed}")
    return f"{where}\npicture  {picture}"


def run_attack(config: Config) -> int:
    """Attack, write attack.json, print the table; 1 if a certificate is wrong."""
    results = attack.attack(config.cases or 10_000, config.seed, progress=config.progress)
    # Every violation; of what is only a nuisance the first ones, and n_found says how many.
    short = {name: results[name][:20] for name in ("errors", "rtol_missed")}
    where = write(config, "attack", results | short)
    print(f"{attack.report(results)}\n{where}")
    return int(any(results[name] for name in ("violations", "errors", "rtol_missed")))


def run_mode_attack(config: Config) -> int:
    """Attack, write mode-attack.json, print the table; 1 if a norm lies above its bound."""
    results = in_program.attack(config.cases or 10_000, config.seed, progress=config.progress)
    results["costs"] = in_program.costs(progress=config.progress)
    where = write(config, "mode-attack", results)
    print(f"{in_program.report(results)}\n{where}")
    return int(bool(results["violations"]))


def run_study(config: Config) -> int:
    """Train and measure, write study.json and norms.png, print the table."""
    steps = config.steps or 500
    results = study.study(steps, config.seed, progress=config.progress)
    title = "A small network on digits"
    where = write_parts(config, "study", results, steps, title, study.save_norms, to="norms")
    print(f"{study.report(results)}\n\n{where}")
    return 0


def run_lipschitz(config: Config) -> int:
    """Train and bound, write two files of results and two pictures, print the tables."""
    options = {"seed": config.seed, "progress": config.progress}
    steps = config.steps or 1000
    networks = lipschitz.discriminators(steps, out=config.out / "gan", **options)
    title, save = "The demo's discriminator on digits", lipschitz.save_constants
    print(write_parts(config, "constants", networks, steps, title, save), end="\n\n")
    print(lipschitz.constants_report("discriminator", networks))
    steps = config.steps or 2000
    classifiers = lipschitz.robustness(steps, **options)
    title, save = "A classifier of the digits trained for a margin", lipschitz.save_robustness
    print(write_parts(config, "radii", classifiers, steps, title, save), end="\n\n")
    print(lipschitz.constants_report("classifier", classifiers))
    print(lipschitz.radii_report(classifiers))
    return 0


def run_lipschitz_attack(config: Config) -> int:
    """Attack, write lipschitz-attack.json, print the table; 1 if a bound is wrong."""
    cases, progress = config.cases or 5000, config.progress
    results = sandwich.attack(cases, config.seed, config.out, progress=progress)
    short = {name: results[name][:20] for name in ("errors", "infinite")}
    where = write(config, "lipschitz-attack", results | short)
    print(f"{sandwich.report(results)}\n{where}")
    return int(any(results[name] for name in ("violations", "errors")))


def run_nets(config: Config) -> int:
    """Bound the networks, write nets.json, print the medians."""
    which = nets.LARGE if config.large else nets.NETS
    results = nets.table(config.out, config.seeds, config.seed, which, progress=config.progress)
    found = {"seed": config.seed, "seeds": config.seeds, "medians": nets.medians(results),
             "bounds": results}  # fmt: skip
    where = write(config, "nets", found)
    print(f"{nets.report(results)}\n\n{where}")
    return 0


def run_classifier(config: Config) -> int:
    """Train and certify, write classifier.json and classifier.png, print the tables; 1 if an
    attack succeeds where it is proved that none can."""
    steps = config.steps or 1500
    results = classifier.study(steps, config.seed, progress=config.progress)
    title = "Classifiers trained for a margin"
    print(write_parts(config, "classifier", results, steps, title, classifier.save), end="\n\n")
    print(classifier.report(results))
    return int(any(result["violations"] for result in results.values()))


def run_models(config: Config) -> int:
    """Bound and attack the networks, write models.json, print the table; 1 if a bound is wrong."""
    results = models.table(config.out, config.seed, progress=config.progress)
    where = write(config, "models", {"seed": config.seed, "networks": results})
    print(f"{models.report(results)}\n\n{where}")
    wrong = models.violations(results)
    if wrong:
        print(f"stretched more than their bound: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


# By their flags.
RUNS = {
    run.__name__.removeprefix("run_"): run for run in
    (run_attack, run_mode_attack, run_lipschitz, run_lipschitz_attack, run_nets, run_models,
     run_classifier)
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
