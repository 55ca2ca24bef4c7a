"""The documentation site: its pages run, name every public name, and notebooks are their sources.

Those marked slow are part of `make docs`.
"""

import configparser
import importlib
import json
import re
from pathlib import Path

import pytest

import sn_jax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("guides/*.md"), *DOCS.glob("concepts/*.md")])
NOTEBOOKS = sorted(DOCS.glob("notebooks/[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.float32
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Haiku and Equinox, imported
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.stem
)
def test_pages_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    """As a reader pastes them: each block after the ones before."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    text = page.read_text()
    for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines = "\n" * (text[: found.start()].count("\n") + 1)  # errors name the page's lines
        exec(compile(lines + found[1], str(page), "exec"), names)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text() for path in DOCS.glob("api/*.md"))
    listed = {*re.findall(r"auto(?:function|class):: (\S+)", text)}
    for module in re.findall(r"currentmodule:: (\S+)(.*?)```", text, re.DOTALL):
        listed |= {f"{module[0]}.{name}" for name in re.findall(r"py:data:: (\S+)", module[1])}
    modules = ["sn_jax", *(f"sn_jax.{path.stem}" for path in (ROOT / "sn_jax").glob("[a-z]*.py"))]
    public = {f"{module}.{name}" for module in modules
              for name in importlib.import_module(module).__all__}  # fmt: skip
    assert listed == public


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_their_sources(source):
    jupytext = pytest.importorskip("jupytext")
    committed = source.with_suffix(".ipynb")
    assert committed.stat().st_size <= 300_000
    cells = json.loads(committed.read_text())["cells"]
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    kept = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert written == kept[-len(written) :]  # but for a badge at the top
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs, "not executed"
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_one_setting_says_where_the_repository_is():
    """Links, badges and the notebooks' first cell follow it; so must the metadata's."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    url = settings["repository"]["url"].strip()
    project_urls = settings["metadata"].get("project_urls", "")
    together = "url of [repository] and project_urls of [metadata] in setup.cfg name the same place"
    assert (url in project_urls) if url else not project_urls, together
    for source in NOTEBOOKS:
        assert ("files.upload()" in source.read_text()) == (not url), "make notebooks"
    install = (DOCS / "start.md").read_text().split("## Ten lines")[0]
    assert (f"git+{url}" if url else f"sn_jax-{sn_jax.__version__}-py3-none-any.whl") in install
    for floor in ("jax", "flax"):
        version = re.search(rf"(?m)^ *{floor}>=(.*)", (ROOT / "setup.cfg").read_text())[1]
        assert f"{floor} {version}" in install


def test_the_changelog_names_what_is_public():
    text = (ROOT / "CHANGELOG.md").read_text()
    missing = [name for name in sn_jax.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_the_workflow_runs_the_steps_of_the_gate():
    gate = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r"(?m)^    (\w+)\) make ", gate)
    assert steps == re.search(r"\$# -gt 0 \] \|\| set -- (.*)", gate)[1].split()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert steps == re.search(r"step: \[(.*)\]", workflow)[1].split(", ")
