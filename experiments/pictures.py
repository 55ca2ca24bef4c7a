"""What the pictures of the commands share: a PNG file from a function that draws on a figure."""

import functools
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure


def picture(width: float, height: float, dpi: int = 150) -> Callable[[Callable], Callable]:
    """Make of ``draw(figure, ...)`` what writes a file: ``save(path, ...)``.

    As a rule the other arguments are the numbers, and a title that says what was run.

    Args:
      width, height: of the figure in inches; ``draw`` may change them.
      dpi: pixels an inch.
    """

    def decorate(draw: Callable) -> Callable:
        @functools.wraps(draw)
        def save(path: Path, *args) -> None:
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, *args)
            figure.savefig(path, dpi=dpi)

        return save

    return decorate
