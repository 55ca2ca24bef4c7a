"""``python -m experiments.theory``: the seed's questions, each answered by running it."""

import dataclasses
import importlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.cli import UserError, command, in_folder, provenance, write_text
from experiments.theory.page import SEEDS, plain

Name = Literal[
    "optimal_discriminator", "operator_norm", "power_method", "gradient", "ties", "regularizers",
    "density_ratio", "errata",
]  # fmt: skip
NAMES = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Config:
    """Answer one of the questions, or all of them: a sentence, numbers and a figure each."""

    name: Annotated[Name | Literal["all"], tyro.conf.Positional] = "all"
    """Which question."""
    fast: bool = False
    """In little, as the tests do."""
    redraw: bool = False
    """Answer and draw again, from the numbers that lie in the output folder."""
    out: Path = Path("runs/theory")
    """Output folder; files of an earlier run are replaced."""
    progress: bool = True
    """Show a progress bar."""


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 where a claim does not hold; 2 for what the user can put right;
    130 after Ctrl-C."""
    kept = "the questions before are answered."
    return command(Config, "python -m experiments.theory", args, in_folder(run), interrupted=kept)


def run(config: Config) -> int:
    failed = 0
    for name in NAMES if config.name == "all" else (config.name,):
        path = config.out / f"{name}.json"
        if config.redraw and not path.exists():
            raise UserError(f"{path} is not there: run it once without --redraw.")
        measured = json.loads(path.read_text()) if config.redraw else measure(name, config)
        result = answered(name, measured)
        write_text(path, as_text(result))
        figure = Figure(figsize=(10, 3.4), dpi=110, layout="constrained")
        page(name).draw(result["numbers"], figure)
        figure.savefig(path.with_suffix(".png"))
        wrong = [claim["text"] for claim in result["claims"] if not claim["holds"]]
        failed += len(wrong)
        lines = [f"{name}: {result['question']}", result["answer"]]
        print("\n".join([*lines, *(f"DOES NOT HOLD: {text}" for text in wrong), f"{path}\n"]))
    return int(failed > 0)


def as_text(result: dict[str, Any]) -> str:
    """JSON with a line for each list of numbers."""
    text = json.dumps(result, indent=1, allow_nan=False)
    return re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)


def page(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.theory.{name}")


def measure(name: str, config: Config) -> dict[str, Any]:
    """One question's numbers, and on what they were had."""
    start = time.process_time()
    track = partial(tqdm, disable=not config.progress, leave=False)
    numbers = page(name).measure(config.fast, lambda x, what: track(x, f"{name}: {what}"))
    return {
        "command": f"python -m experiments.theory {name}" + " --fast" * config.fast,
        "seeds": SEEDS,
        "cpu_seconds": round(time.process_time() - start, 1),
        **provenance(),
        "numbers": plain(numbers),
    }


def answered(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """With the question, the answer and the claims, as the numbers have them."""
    numbers = measured["numbers"]
    said = {
        "question": page(name).QUESTION,
        "answer": page(name).answer(numbers),
        "claims": [plain(x._asdict()) | {"holds": x.holds} for x in page(name).claims(numbers)],
    }
    return said | {key: value for key, value in measured.items() if key not in said}


if __name__ == "__main__":
    sys.exit(main())
