"""Notebooks from their sources: `python docs/notebooks/make.py [--out FOLDER] [NAME ...]`.

Each .py here (jupytext's percent format) becomes an .ipynb beside it, executed, with its outputs.
Here belongs what all of them share: the first cell, the badge, how they run, what is kept of a run.
"""

import argparse
import configparser
import os
import re
import resource
import sys
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode, v4, write

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SOURCES = sorted(path for path in FOLDER.glob("[0-9]*.py"))
MOST_BYTES = 300_000
PATIENCE = {"timeout": 3000, "startup_timeout": 600}  # seconds; there may be other work

settings = configparser.ConfigParser()
settings.read(ROOT / "setup.cfg")
REPOSITORY = settings["repository"]["url"].strip()
WHERE = (
    f'source = "git+{REPOSITORY}"'
    if REPOSITORY
    else """from google.colab import files

    print("Choose the wheel of sn_jax (in a clone: pip wheel --no-deps -w dist .)")
    (source,) = files.upload()"""
)
SETUP = f"""\
# Does something in Colab only: installs sn_jax beside the JAX that is there.
import importlib.metadata
import subprocess
import sys

if "google.colab" in sys.modules:
    {WHERE}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", source]
    subprocess.run(pip, check=True)
    import jax
    from packaging.requirements import Requirement

    needs = map(Requirement, importlib.metadata.requires("sn_jax"))
    for need in (need for need in needs if need.marker is None):  # extras have one
        there = [d.version for d in importlib.metadata.distributions(name=need.name)]
        if not there or there[0] not in need.specifier:
            print(f"sn_jax needs {{need}}: run  %pip install -U {{need.name}}  and restart.")
    print(jax.devices())"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{path}/blob/main/docs/notebooks/{name}.ipynb)"
)


def notebook(source: Path) -> NotebookNode:
    """The notebook of a source, not yet run: its cells, a badge if there is somewhere to go."""
    made = jupytext.read(source)
    github = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(\.git)?/?", REPOSITORY)
    if github:
        badge = v4.new_markdown_cell(BADGE.format(path=github[1], name=source.stem))
        made.cells.insert(0, badge)
    for i, cell in enumerate(made.cells):
        cell.id = f"cell-{i}"
        hidden = "hide-cell" in cell.metadata.get("tags", ())  # folded on the site
        cell.metadata = NotebookNode(tags=["hide-cell"]) if hidden else NotebookNode()
    made.metadata.clear()
    made.metadata.kernelspec = {
        "display_name": "Python 3", "language": "python", "name": "python3"
    }  # fmt: skip
    return made


def with_setup(text: str) -> str:
    """The source with the first cell as it is to be."""
    return re.sub(r"(?s)(# %% tags=\[\"setup\".*?\n).*?(?=\n\n+# %%)", lambda m: m[1] + SETUP, text)


def run(source: Path, out: Path, progress: bool) -> None:
    """Make, execute and write one notebook.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
      ValueError: it is larger than it may be.
    """
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = notebook(source)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, **PATIENCE, resources={"metadata": {"path": folder}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # when each ran
    if made.metadata.get("language_info"):
        made.metadata.language_info = {"name": "python"}
    path = out / f"{source.stem}.ipynb"
    write(made, path)
    if progress:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime
        size = path.stat().st_size // 1000
        print(f"{path}: {seconds:.0f} s of CPU time, {size} kB", file=sys.stderr)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; all notebooks if none is given")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the .ipynb go")
    parser.add_argument("--quiet", action="store_true", help="say nothing on stderr")
    options = parser.parse_args()
    # Kernels find the library of this tree, and plot without a screen.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options.out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if not options.names or any(name in source.stem for name in options.names):
            source.write_text(with_setup(source.read_text()))
            run(source, options.out, not options.quiet)


if __name__ == "__main__":
    main()
