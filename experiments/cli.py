"""What the experiments' commands share: options, exit codes, one-line errors, provenance, files."""

import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

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


def command(
    read: type[T] | Callable[[list[str]], T],
    prog: str,
    args: list[str] | None,
    run: Callable[[T], int | None],
    *,
    interrupted: str = "nothing was written.",
) -> int:
    """A whole command, from its options to its exit code.

    Args:
      read: the dataclass of the options, for ``parse``, or what makes them of ``args``.
      prog: how the command is called.
      args: the process's own if None.
      run: from the options to the exit code; 0 if it returns none.
      interrupted: what Ctrl-C leaves behind, unless the interrupt itself says it.

    Returns:
      The exit code: that of ``run``; 2 for what the user can put right; 130 after Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    try:
        return run(parse(read, prog, args) if isinstance(read, type) else read(args)) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted: {str(interrupt) or interrupted}", file=sys.stderr)
        return 130


def in_folder(run: Callable[[T], int]) -> Callable[[T], int]:
    """What runs in the folder that its options name, ``out``: it is made first, or UserError."""

    def made(options: T) -> int:
        with usable(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
            return run(options)

    return made


@contextlib.contextmanager
def usable(folder: Path, option: str = "--out") -> Iterator[None]:
    """Raises UserError where the file system refuses what is done inside."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used ({error.strerror}): give a folder that can be written by "
            f"{option}."
        ) from error


def check_writable(path: Path) -> None:
    """Raises UserError where the file cannot be: before minutes of work, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another file."
        ) from error


def check_seed(seed: int) -> None:
    """Raises ValueError unless it is one."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}.")


def check_positive(options: Any, whole: Sequence[str] = (), real: Sequence[str] = ()) -> None:
    """Check the attributes of these names: numbers that are at least 1, or just positive and
    finite; None passes.

    Raises:
      ValueError: one is not.
    """
    for name in (*whole, *real):
        value = getattr(options, name)
        if value is None:
            continue
        if name in whole and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}.")


def provenance() -> dict[str, Any]:
    """On what, when and by which code numbers were made."""
    device = jax.devices()[0]
    pinned = hasattr(os, "sched_getaffinity")
    return {
        "date": datetime.date.today().isoformat(),
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "cpu_cores": len(os.sched_getaffinity(0)) if pinned else os.cpu_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
        "versions": versions(),
        "commit": commit(),
    }


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


def write_json(path: Path, value: Any, indent: int | None = None, **options: Any) -> None:
    """``write_text`` of the value, with options of ``json.dumps``."""
    write_text(path, json.dumps(value, indent=indent, **options))


def read_json(path: Path) -> Any:
    """Raises UserError if the file is not whole."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): give another --out.") from error


def write_rows(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Replace a file by these rows, a line of JSON each; the rows again."""
    write_text(path, "".join(json.dumps(row, **options) + "\n" for row in rows))
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, if it is there; a last one that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def resumed(
    path: Path, jobs: Mapping[Any, Callable[[], dict]], key: Callable[[dict], Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(name of the job, its row) of all jobs; rows are kept in a file as soon as they are made.

    Args:
      path: of the rows: what is there, as a kill left it, is not made again.
      jobs: name -> what makes the row.
      key: from a row to the name of its job.
    """
    known = {key(row): row for row in write_rows(path, read_rows(path))}
    with path.open("a") as file:
        for name, job in jobs.items():
            if name not in known:
                known[name] = job()
                file.write(json.dumps(known[name]) + "\n")
                file.flush()
            yield name, known[name]


def markdown(rows: Sequence[Sequence[Any]], right: Collection[int] = ()) -> list[str]:
    """The lines of a table in Markdown, the first row its head; columns ``right`` to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(rows[0]))]
    return [f"| {' | '.join(map(str, row))} |" for row in (rows[0], rule, *rows[1:])]


def aligned(rows: Sequence[Sequence[Any]], notes: Sequence[str] | None = None) -> str:
    """A table in plain text: the first column to the left, the others to the right; a note behind
    each row."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for (first, *others), note in zip(texts, notes or [""] * len(texts), strict=True):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"{'  '.join(cells)}   {note}".rstrip())
    return "\n".join(lines)
