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
    path = folder / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(_needed("experiments", "bench") - _needed()):
            for file in importlib.metadata.distribution(name).files or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    archive.write(file.locate(), str(file))
    return path


def _needed(*extras: str) -> set[str]:
    """The pure distributions that sn_jax and its extras need.

    Not what only others need: where these are installed, it is too.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pure, seen, todo = set(), set(), [("sn-jax", extra) for extra in ("", *extras)]
    while todo:
        name, extra = one = todo.pop()
        # sn_jax itself may be installed from this folder, with no word of a wheel.
        if one in seen or not (name == "sn-jax" or _is_pure(name)):
            continue
        seen.add(one)
        pure.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                todo += [(needed, e) for e in ("", *requirement.extras)]
    return pure - {"sn-jax"}


def _is_pure(name: str) -> bool:
    wheel = importlib.metadata.distribution(name).read_text("WHEEL") or ""
    return "Root-Is-Purelib: true" in wheel


def use(args: list[str]) -> None:
    """Let what is missing here be found in the data folder that the command line's options name;
    what parses the rest of them may be missing too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path)
    folder = parser.parse_known_args(args)[0].data_dir
    if folder and (folder / NAME).exists():
        sys.path.append(str(folder / NAME))
