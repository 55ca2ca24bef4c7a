"""``python -m experiments.certify``: true norms of a trained network, and Lipschitz constants;
``--attack`` and ``--lipschitz-attack``: their proof."""

import dataclasses
import json
import sys
from pathlib import Path

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
from experiments.cli import (
    check_positive,
    check_seed,
    command,
    in_folder,
    provenance,
    write_text,
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
        check_positive(self, whole=("cases", "steps", "seeds"))
        check_seed(self.seed)
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
    return command(Config, prog, args, in_folder(chosen), interrupted=kept)


def run_attack(config: Config) -> int:
    """Attack, write attack.json, print the table; 1 if a certificate is wrong."""
    results = attack.attack(config.cases or 10_000, config.seed, progress=config.progress)
    path = config.out / "attack.json"
    # Every violation; of what is only a nuisance the first ones, and n_found says how many.
    short = {name: results[name][:20] for name in ("errors", "rtol_missed")}
    write_text(path, json.dumps(results | short | provenance(), indent=1))
    print(attack.report(results))
    print(f"results  {path}")
    return int(any(results[name] for name in ("violations", "errors", "rtol_missed")))


def run_mode_attack(config: Config) -> int:
    """Attack, write mode-attack.json, print the table; 1 if a norm lies above its bound."""
    results = in_program.attack(config.cases or 10_000, config.seed, progress=config.progress)
    results["costs"] = in_program.costs(progress=config.progress)
    path = config.out / "mode-attack.json"
    write_text(path, json.dumps(results | provenance(), indent=1))
    print(in_program.report(results))
    print(f"results  {path}")
    return int(bool(results["violations"]))


def run_study(config: Config) -> int:
    """Train and measure, write study.json and norms.png, print the table."""
    steps = config.steps or 500
    results = study.study(steps, config.seed, progress=config.progress)
    path = config.out / "study.json"
    summary = {"steps": steps, "seed": config.seed, "networks": results} | provenance()
    write_text(path, json.dumps(summary, indent=1))
    picture = config.out / "norms.png"
    title = f"A small network on digits, {steps} steps, seed {config.seed}"
    study.save_norms(picture, results, title)
    print(study.report(results))
    print(f"\nresults  {path}\npicture  {picture}")
    return 0


def run_lipschitz(config: Config) -> int:
    """Train and bound, write two files of results and two pictures, print the tables."""
    options = {"seed": config.seed, "progress": config.progress}
    steps = config.steps or 1000
    networks = lipschitz.discriminators(steps, out=config.out / "gan", **options)
    title = f"The demo's discriminator on digits, {steps} steps, seed {config.seed}"
    save_parts(config, "constants", networks, steps, lipschitz.save_constants, title)
    print(lipschitz.constants_report("discriminator", networks))
    steps = config.steps or 2000
    classifiers = lipschitz.robustness(steps, **options)
    title = f"A classifier of the digits trained for a margin, {steps} steps, seed {config.seed}"
    save_parts(config, "radii", classifiers, steps, lipschitz.save_robustness, title)
    print(lipschitz.constants_report("classifier", classifiers))
    print(lipschitz.radii_report(classifiers))
    return 0


def save_parts(config: Config, name: str, results, steps: int, save, title: str) -> None:
    """Results and their picture, as soon as they are there."""
    summary = {"steps": steps, "seed": config.seed, "networks": results} | provenance()
    write_text(config.out / f"{name}.json", json.dumps(summary, indent=1))
    save(config.out / f"{name}.png", results, title)
    print(f"results  {config.out / name}.json\npicture  {config.out / name}.png\n")


def run_lipschitz_attack(config: Config) -> int:
    """Attack, write lipschitz-attack.json, print the table; 1 if a bound is wrong."""
    results = sandwich.attack(
        config.cases or 5000, config.seed, config.out, progress=config.progress
    )
    path = config.out / "lipschitz-attack.json"
    short = {name: results[name][:20] for name in ("errors", "infinite")}
    write_text(path, json.dumps(results | short | provenance(), indent=1))
    print(sandwich.report(results))
    print(f"results  {path}")
    return int(any(results[name] for name in ("violations", "errors")))


def run_nets(config: Config) -> int:
    """Bound the networks, write nets.json, print the medians."""
    which = nets.LARGE if config.large else nets.NETS
    results = nets.table(config.out, config.seeds, config.seed, which, progress=config.progress)
    path = config.out / "nets.json"
    summary = {
        "seed": config.seed,
        "seeds": config.seeds,
        "medians": nets.medians(results),
        "bounds": results,
    }
    write_text(path, json.dumps(summary | {"bounds": results} | provenance(), indent=1))
    print(nets.report(results))
    print(f"\nresults  {path}")
    return 0


def run_classifier(config: Config) -> int:
    """Train and certify, write classifier.json and classifier.png, print the tables; 1 if an
    attack succeeds where it is proved that none can."""
    steps = config.steps or 1500
    results = classifier.study(steps, config.seed, progress=config.progress)
    title = f"Classifiers trained for a margin, {steps} steps, seed {config.seed}"
    save_parts(config, "classifier", results, steps, classifier.save, title)
    print(classifier.report(results))
    return int(any(result["violations"] for result in results.values()))


def run_models(config: Config) -> int:
    """Bound and attack the networks, write models.json, print the table; 1 if a bound is wrong."""
    results = models.table(config.out, config.seed, progress=config.progress)
    path = config.out / "models.json"
    write_text(
        path, json.dumps({"seed": config.seed, "networks": results} | provenance(), indent=1)
    )
    print(models.report(results))
    print(f"\nresults  {path}")
    wrong = models.violations(results)
    if wrong:
        print(f"stretched more than their bound: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


RUNS = {
    "attack": run_attack,
    "mode_attack": run_mode_attack,
    "lipschitz": run_lipschitz,
    "lipschitz_attack": run_lipschitz_attack,
    "nets": run_nets,
    "models": run_models,
    "classifier": run_classifier,
}

if __name__ == "__main__":
    sys.exit(main())
