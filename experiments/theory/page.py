"""What all pages share: a claim, ranges over seeds, plain numbers, the look of the figures.

A page is a module of this folder, from a question to a number, a sentence and a figure:

    QUESTION                                       the seed's
    measure(fast: bool, track: Track) -> dict      the numbers, nested dicts and lists of arrays;
                                                   ``fast`` is for the tests
    answer(numbers) -> str                         one sentence with the number
    claims(numbers) -> list[Claim]                 what they must say for it to be true
    draw(numbers, figure) -> None                  the figure, from the numbers alone
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

SEEDS = (0, 1, 2)


class ink:
    """Okabe and Ito's colours, which colour-blind readers tell apart."""

    black, orange, sky, green = "#000000", "#E69F00", "#56B4E9", "#009E73"
    blue, red, pink, grey = "#0072B2", "#D55E00", "#CC79A7", "#777777"


Track = Callable[[Iterable[Any], str], Iterable[Any]]  # a progress bar around what is iterated


class Claim(NamedTuple):
    """A sentence that holds where ``low <= value <= high``, and fails for a value that is NaN."""

    text: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def holds(self) -> bool:
        return bool(self.low <= self.value <= self.high)


def over_seeds(run: Callable[[jax.Array], Any]) -> Any:
    """``run`` of the keys of all seeds, mapped over; results have a first axis of seeds."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(SEEDS))
    return jax.device_get(jax.jit(jax.vmap(run))(keys))


def said(values: Any, digits: int = 3) -> str:
    """Mean and range of the seeds, such as ``1.43 (1.40 to 1.47)``."""
    values = np.asarray(values, np.float64)
    mean, low, high = (f"{x:.{digits}g}" for x in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})"


def plain(tree: Any) -> Any:
    """As JSON has it: six digits, and None for what is not finite."""
    if isinstance(tree, dict):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, str | bool | int | None):
        return tree
    if np.ndim(tree):
        return [plain(value) for value in np.asarray(tree)]
    if np.issubdtype(np.asarray(tree).dtype, np.integer):
        return int(tree)
    return float(f"{tree:.6g}") if np.isfinite(tree) else None


def array(values: Any) -> np.ndarray:
    """What ``plain`` made of an array, NaN for None."""
    return np.asarray(values, np.float64)


def band(axes: Axes, x: Any, runs: Any, colour: str, label: str, style: str = "-") -> None:
    """The mean of runs (seeds, points) as a line, and their range as a band."""
    runs = array(runs)
    axes.plot(x, runs.mean(0), style, color=colour, label=label, lw=1.6)
    axes.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.2, lw=0)


def finish(*panels: Axes) -> None:
    """What all panels have."""
    for axes in panels:
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
