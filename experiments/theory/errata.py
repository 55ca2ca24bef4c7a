"""The seed's derivation, every wrong display of it evaluated as it is written and as corrected.

docs/theory.md writes the derivation out, and marks each correction with its number in brackets;
``displays.py`` evaluates them.
"""

from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.theory.displays import TABLE, M, N
from experiments.theory.page import SEEDS, Claim, Track, array, ink

QUESTION = "Which displays of the seed are wrong as written, and right as corrected?"


def measure(fast: bool, track: Track) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with jax.enable_x64(True):
        for name in track([*TABLE], "displays"):
            rngs = map(np.random.default_rng, SEEDS)
            pairs = [TABLE[name](rng.standard_normal((M, N)), rng) for rng in rngs]
            written, corrected = np.transpose(pairs)
            found[name] = {"written": written, "corrected": corrected}
    return {"errors": found}


def is_wrong(written: Any) -> bool:
    """For every seed off by more than 1 %, or undefined."""
    return bool(np.all(np.isnan(array(written)) | (array(written) > 1e-2)))


def answer(numbers: dict[str, Any]) -> str:
    errors = numbers["errors"]
    wrong = [name for name in errors if is_wrong(errors[name]["written"])]
    none = sum(np.isnan(array(errors[name]["written"])).any() for name in wrong)
    right = max(max(errors[name]["corrected"]) for name in errors)
    return (
        f"Of 21 corrections 15 can be evaluated, in {len(errors)} displays: as written "
        f"{len(wrong)} are wrong ({none} cannot even be computed), as corrected all hold to "
        f"{right:.0e}."
    )


def claims(numbers: dict[str, Any]) -> list[Claim]:
    result = []
    for name, of in numbers["errors"].items():
        corrected = array(of["corrected"]).max()
        result.append(Claim(f"[{name}] is wrong as written", float(is_wrong(of["written"])), low=1))
        result.append(Claim(f"[{name}] is right as corrected", corrected, high=1e-6))
    return result


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    axes, names = figure.subplots(), [*numbers["errors"]]
    places = np.arange(len(names))
    for shift, what, colour in ((-0.2, "written", ink.orange), (0.2, "corrected", ink.blue)):
        errors = array([numbers["errors"][name][what] for name in names])
        heights = np.where(np.isnan(errors).any(1), np.nan, errors.max(1))
        axes.bar(places + shift, np.clip(heights, 1e-17, 50), 0.4, color=colour,
                 label=f"as {what}")  # fmt: skip
        for place in places[np.isnan(heights)]:
            axes.text(place + shift, 1.3e-17, "undefined", rotation=90, ha="center", va="bottom",
                      fontsize=8, color=colour)  # fmt: skip
    axes.set_xticks(places, [f"[{name}]" for name in names])
    axes.set(yscale="log", ylim=(1e-17, 100), xlabel="correction", ylabel="relative error, largest "
             "of the seeds", title="The seed's displays")  # fmt: skip
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
