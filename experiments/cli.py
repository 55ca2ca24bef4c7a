"""What the experiments' command lines share: options, one-line errors, provenance, files."""

import contextlib
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sn_jax

T = TypeVar("T")


class UserError(Exception):
    """What the user can put right: one sentence that says what is wrong and what to do."""


def parse(config: type[T], prog: str, args: list[str], default: T | None = None) -> T:
    """The options; a wrong one becomes one line instead of tyro's box.

    Those that are not given are ``default``'s, or those of ``config()``.

    Raises:
      UserError: an option that is unknown, or a value that ``config`` refuses.
    """
    try:
        import tyro  # here, so that a machine without it is told so in one line
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}, which reads the options, is not installed here.") from error
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, prog=prog, args=args, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # A title row, a message of one row or more, a rule, advice.
        rows = [row.strip("│ ") for row in box.getvalue().splitlines()[1:]]
        texts = [text.strip() for text in re.split("[─╰╯-]{3,}", " ".join(rows))]
        message = next(filter(None, texts), "an option is wrong")
        raise UserError(f"{message} (see --help)") from None


def run_in_folder(
    config: type[T], prog: str, args: list[str] | None, run: Callable[[T], int], interrupted: str
) -> int:
    """A command with an output folder, ``config.out``, which is made first.

    Args:
      config, prog, args: for ``parse``; ``args`` are the process's own if None.
      run: from the options to the exit code.
      interrupted: what Ctrl-C leaves behind, for the user.

    Returns:
      The exit code: that of ``run``; 2 for what the user can put right; 130 after Ctrl-C.
    """
    try:
        options = parse(config, prog, sys.argv[1:] if args is None else args)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            return run(options)
        except OSError as error:
            raise UserError(
                f"{options.out} cannot be used ({error.strerror}): give a folder that can be "
                "written by --out."
            ) from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted: {interrupted}", file=sys.stderr)
        return 130


def versions() -> dict[str, str]:
    """Of what the numbers may depend on, as far as it is installed."""
    names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn"]
    found = {"python": platform.python_version(), "sn_jax": sn_jax.__version__}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """Commit of the repository that this file lies in, "-dirty" if changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a kill leaves the old one or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of the text in UTF-8."""
    write_bytes(path, text.encode())


def aligned(rows: list[list[Any]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    )
