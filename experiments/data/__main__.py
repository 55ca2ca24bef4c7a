"""``python -m experiments.data cifar10``: fetch data sets before they are needed, and say what
is in them."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, get_args

import tyro

from experiments.cli import command
from experiments.data import Split, load


@dataclasses.dataclass(frozen=True)
class Config:
    """Fetch and verify data sets, and say what is in them."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """digits, mnist, fashion-mnist, cifar10, or folders of images."""
    data_dir: Path | None = None
    """Where official files lie or shall lie; the user's cache if not given."""


def main(args: list[str] | None = None) -> int:
    """Returns the exit code of ``cli.command``."""
    kept = "what was fetched is kept; the same command goes on."
    return command(Config, "python -m experiments.data", args, say, interrupted=kept)


def say(config: Config) -> None:
    """A line for each split of each data set."""
    for name in config.names:
        for split in get_args(Split):
            images, labels = load(name, split, config.data_dir)
            size = "x".join(map(str, images.shape[1:]))
            classes = len(set(labels.tolist()))
            print(f"{name}  {split}  {len(images)} images of {size}, {classes} classes")


if __name__ == "__main__":
    sys.exit(main())
