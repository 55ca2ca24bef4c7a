"""experiments.theory: every page in little, its claims inverted, and what is committed of it."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.theory import __main__ as theory
from experiments.theory import errata, optimal_discriminator, ties
from experiments.theory.page import Claim, plain

pytestmark = pytest.mark.float32

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "theory"


# --- Inversions: what would have been measured if the opposite were true --------------------


def swap(tree, a, b):
    tree[a], tree[b] = tree[b], tree[a]


def invert_gradient(n):
    swap(n["errors"], "line 2", "line 4")
    swap(n["training"], "through, SGD", "stop, SGD")


def invert_power_method(n):
    for rates in n["rates"].values():
        swap(rates, "vector", "sigma")
    swap(n["worst"], "warm, 1", "warm, 8")
    n["worst"]["cold, 1"] = [0.9] * 3


def invert_ties(n):
    slopes = n["slopes"]
    n["slopes"] = {name: [5 - x for x in of] for name, of in slopes.items()}  # 2 <-> 3
    tie = n["on a tie"]
    swap(tie, "power iteration", "jnp.linalg.norm")  # that of all seeds is one
    n["violations of 400"] = [400 - x for x in n["violations of 400"]]
    tie["second singular value"] = [0.5] * 3
    tie["least margin"] = [-0.5] * 3
    n["gaps"] = {name: 0 * np.array(gaps) for name, gaps in n["gaps"].items()}


def invert_operator_norm(n):
    for side in ("ratios", "ball"):
        n["circle"][side] = [1 / 2] * 3
    for net in (*n["random"], *n["trained"].values()):
        swap(net, "attained", "product")
        net["certified"] = 0.9 + 0 * np.array(net["certified"])  # between them


def invert_optimal_discriminator(n):
    for name in n["exact"]:
        swap(n["learned"], "none", name)
        swap(n["disjoint"], "none", name)


def invert_regularizers(n):
    n["fields"]["SN, one"] = n["fields"]["SN, equal"]
    n["fields"]["L2"] = n["fields"]["lasso"]
    swap(n["runs"], "SN", "SN with biases")
    n["runs"]["SN"]["cosine"] = [[0.5]] * 3


def invert_density_ratio(n):
    for runs in n["errors"].values():
        swap(runs, "none", "K = 2")


def invert_errata(n):
    for of in n["errors"].values():
        swap(of, "written", "corrected")


def without_one_sign(n):
    """For claims that something takes both signs."""
    for sign in (1, -1):
        other = copy.deepcopy(n)
        other["runs"]["SN"]["lambda"] = sign * np.abs(n["runs"]["SN"]["lambda"])
        yield other


@pytest.mark.parametrize("name", theory.NAMES)
def test_a_page_answers_and_its_claims_can_fail(name, tmp_path, capsys):
    assert theory.main([name, "--fast", "--no-progress", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["answer"] in capsys.readouterr().out
    assert imread(tmp_path / f"{name}.png").std() > 0.05
    claims = theory.page(name).claims(result["numbers"])
    assert all(claim.holds for claim in claims)
    inverted = copy.deepcopy(result["numbers"])
    globals()[f"invert_{name}"](inverted)
    cases = [inverted]
    if name == "regularizers":
        cases += without_one_sign(result["numbers"])
    failing = {claim.text for case in cases for claim in theory.page(name).claims(case)
               if not claim.holds}  # fmt: skip
    assert failing == {claim.text for claim in claims}


# --- What is committed ----------------------------------------------------------------------


@pytest.mark.parametrize("name", theory.NAMES)
def test_the_committed_answer_is_what_the_numbers_say(name):
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    page = theory.page(name)
    assert (FOLDER / "results" / f"{name}.png").exists()
    assert result["command"] == f"python -m experiments.theory {name}"
    assert result["seeds"] == [0, 1, 2]
    assert {"date", "device", "versions", "commit"} <= result.keys()
    assert all(claim.holds for claim in page.claims(result["numbers"]))
    assert result["answer"] == page.answer(result["numbers"])
    assert result["question"] == page.QUESTION
    readme = " ".join((FOLDER / "README.md").read_text().split())
    assert result["question"] in readme
    assert result["answer"] in readme
    assert result["command"] in readme


def test_pages_are_short():
    for name in theory.NAMES:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 150, name


def test_the_derivation_marks_every_correction():
    text = (ROOT / "docs" / "theory.md").read_text()
    marked = {int(n) for n in re.findall(r"\*\*\[(\d+)\]\*\*", text)}
    assert marked == {*range(1, 22)}
    assert {int(re.match(r"\d+", name)[0]) for name in errata.TABLE} <= marked


# --- What the pages compute with ------------------------------------------------------------


@pytest.mark.parametrize("order", [2.0, 3.0])
def test_the_slope_of_a_power_law(order):
    gaps = np.sort(np.random.default_rng(0).random(100_000) ** (1 / order))
    assert ties.slope(gaps, 0.05) == pytest.approx(order, rel=4 / np.sqrt(5000))


def test_the_lipschitz_optimum_between_its_limits():
    """Without slopes the best f is 0; with enough of them it is f*, where there is anything."""
    flat = optimal_discriminator.lipschitz_optimum(1e-9)
    assert np.abs(flat["f"]).max() < 1e-3
    assert flat["loss"] == pytest.approx(2 * np.log(2), rel=1e-4)
    best = optimal_discriminator.loss_of(optimal_discriminator.F_STAR)
    free = optimal_discriminator.lipschitz_optimum(1000.0)
    assert best <= free["loss"] * (1 + 1e-6) <= 1.005 * best
    slopes = np.abs(np.diff(optimal_discriminator.lipschitz_optimum(2.0)["f"]))
    assert slopes.max() <= 2.0001 * optimal_discriminator.STEP


def test_a_claim_about_nan_does_not_hold():
    assert not Claim("", np.nan).holds
    assert not Claim("", plain(np.nan) or np.nan, high=1).holds
    assert plain({"a": [np.inf, 1]}) == {"a": [None, 1]}


def test_figures_are_drawn_again_from_the_numbers(tmp_path, capsys):
    assert theory.main(["errata", "--fast", "--no-progress", "--out", str(tmp_path)]) == 0
    before = (tmp_path / "errata.json").read_text()
    (tmp_path / "errata.png").unlink()
    assert theory.main(["errata", "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "errata.png").exists()
    assert (tmp_path / "errata.json").read_text() == before


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["everything"], "invalid choice"),
        (["ties", "--out", "/dev/null/x"], "cannot be used"),
        (["ties", "--redraw"], "ties.json is not there"),
    ],
)
def test_bad_options_are_one_line(args, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert theory.main(args) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
