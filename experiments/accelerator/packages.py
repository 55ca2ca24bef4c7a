"""The experiments' Python packages as one file, for a machine where none can be installed.

Only what the library itself does not need, and what is pure Python: it is imported from the zip
file as it is. What the machine has of its own goes first. Nothing is imported here that it may
lack.
"""

import argparse
import importlib.metadata
import sys
import zipfile
from pathlib import Path

NAME = "sn-packages.zip"


def write(folder: Path) -> Path:
    """Put the packages of this environment into one file.

    Raises:
      importlib.metadata.PackageNotFoundError: sn_jax is not installed here with its extras.
    """
    names = _needed("sn_jax", ("experiments", "bench")) - _needed("sn_jax")
    path = folder / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names):
            distribution = importlib.metadata.distribution(name)
            if "Root-Is-Purelib: true" not in (distribution.read_text("WHEEL") or ""):
                continue
            for file in distribution.files or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    archive.write(file.locate(), str(file))
    return path


def _needed(name: str, extras: tuple[str, ...] = ()) -> set[str]:
    """A distribution, and all that it and its extras need."""
    from packaging.requirements import Requirement

    found, todo = set(), [(name, extra) for extra in ("", *extras)]
    while todo:
        name, extra = one = todo.pop()
        if one not in found:
            found.add(one)
            for text in importlib.metadata.requires(name) or ():
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    todo += [(requirement.name, e) for e in ("", *requirement.extras)]
    return {name for name, _ in found}


def use(args: list[str]) -> None:
    """Let what is missing here be found in the data folder that the options name.

    Args:
      args: of the command line; what parses the rest of them may be missing too.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path)
    folder = parser.parse_known_args(args)[0].data_dir
    if folder and (folder / NAME).exists():
        sys.path.append(str(folder / NAME))
