"""experiments.certify: the attacks in small, their oracles, and the command line."""

import dataclasses
import json
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from experiments.certify import __main__ as certify
from experiments.certify import attack, classifier, lipschitz, models, nets, oracle, sandwich

pytestmark = pytest.mark.float32


def test_a_small_attack_finds_nothing():
    results = attack.attack(400, seed=3, n_configs=24, large=False)
    assert results["n_cases"] == 400
    for kind in ("violations", "errors", "rtol_missed"):
        assert results[kind] == []
    # It looked: many kinds of maps, and brackets decided in 50 digits among them.
    assert len(results["table"]) >= 12
    assert sum(results["counts"]["decided in 50 digits"].values()) > 10


# In 50 digits a lower end takes longer to refute than an upper one.
@pytest.mark.parametrize(("factor", "n_cases"), [(1 - 1e-12, 20), (1 + 1e-12, 4)])
def test_an_attack_finds_brackets_that_miss_by_little(factor, n_cases, monkeypatch):
    """The certificates shifted by 1e-12, which is far inside what rtol allows."""
    honest = sn_jax.norm_bounds

    def shifted(w, view, *, rtol):
        bounds = honest(w, view, rtol=1e-15 if rtol < 1e-9 else rtol)
        sigma = oracle.norms(w, view)
        ends = (sigma * factor, bounds.upper) if factor > 1 else (bounds.lower, sigma * factor)
        return sn_jax.Bounds(*ends)

    monkeypatch.setattr(sn_jax, "norm_bounds", shifted)
    results = attack.attack(n_cases, seed=3, n_configs=6, large=False)
    assert len(results["violations"]) >= n_cases // 2


def test_the_recheck_decides_in_many_digits():
    w = np.random.default_rng(0).standard_normal((6, 4))
    sigma = np.linalg.norm(w, 2)
    assert oracle.recheck(w, sigma * (1 - 1e-13), sigma * (1 + 1e-13)) == (True, True)
    assert oracle.recheck(w, sigma * (1 + 1e-13), sigma * (1 - 1e-13)) == (False, False)


def test_the_study_writes_its_table_and_picture(tmp_path, capsys):
    args = ["--steps", "3", "--out", str(tmp_path), "--no-progress"]
    assert certify.main(args) == 0
    results = json.loads((tmp_path / "study.json").read_text())["networks"]
    for network in results.values():
        for layer in network["layers"].values():
            assert layer["lower"] <= layer["true"] * (1 + 1e-6)
            assert layer["true"] <= layer["upper"]
    assert (tmp_path / "norms.png").stat().st_size > 10_000
    assert "Conv_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--cases", "many"], "many"),
        (["--frobnicate"], "frobnicate"),
        (["--out", "/dev/null/x"], "cannot be used"),
        (["--nets", "--attack"], "separate runs"),
    ],
)
def test_bad_options_are_one_line(args, match, capsys):
    assert certify.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert match in error
    assert error.count("\n") == 1


# lipschitz_bound.


def test_random_programs_are_bounded_and_a_stopped_attack_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sandwich, "CLIMB_STEPS", 0)  # which the next test makes
    args = ["--lipschitz-attack", "--no-progress", "--out", str(tmp_path)]
    assert certify.main([*args, "--cases", "3"]) == 0
    rows = (tmp_path / sandwich.ROWS).read_text()
    # As a kill leaves it: the third row is cut short.
    (tmp_path / sandwich.ROWS).write_text(rows[:-20])
    assert certify.main([*args, "--cases", "5"]) == 0
    results = json.loads((tmp_path / "lipschitz-attack.json").read_text())
    assert (results["n_cases"], results["violations"], results["errors"]) == (5, [], [])
    lines = (tmp_path / sandwich.ROWS).read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[:2] == rows.splitlines()[:2]
    assert results["slack"]["upper"]["median"] >= 1
    assert "5 programs: 0 violations" in capsys.readouterr().out


def test_a_bound_that_is_too_small_is_found(tmp_path, monkeypatch):
    """By one part in a million, of a function whose constant is reached."""
    monkeypatch.setattr(sandwich, "random_program", lambda rng: (lambda x: 3.0 * x, np.zeros(2)))
    monkeypatch.setattr(sandwich, "ROUNDS", 1)
    honest = sn_jax.lipschitz_bound

    def shrunk(fn, x, **options):
        return dataclasses.replace(honest(fn, x, **options), upper=3 * (1 - 1e-6))

    monkeypatch.setattr(sn_jax, "lipschitz_bound", shrunk)
    results = sandwich.attack(1, 7, tmp_path)
    (row,) = results["violations"]
    assert row["violated"] == ["upper"]
    assert row["reproduce"] == "experiments.certify.sandwich.run_case(0, 7)"
    # Two values alone say so, without any derivative.
    assert row["reached"]["values"] > 3 * (1 - 1e-7)


def test_descent_finds_what_a_linear_classifier_withstands():
    """There the smallest perturbation that changes a decision is margin / |w_y - w_j|."""
    rng = np.random.default_rng(0)
    w, images = rng.standard_normal((16, 2)), rng.standard_normal((40, 4, 4, 1))
    margins = images.reshape(40, 16) @ (w[:, 0] - w[:, 1])
    labels = np.zeros(40, int)
    withstood = margins / np.linalg.norm(w[:, 0] - w[:, 1])
    radii = np.array([0.0, 0.3, 0.9])
    left = lipschitz.under_attack(lambda x: x.reshape(len(x), -1) @ jnp.asarray(w), images,
                                  labels, radii)  # fmt: skip
    np.testing.assert_allclose(left.mean(1), [(withstood > r).mean() for r in radii], atol=1 / 40)


def test_constants_and_pictures(tmp_path, monkeypatch, capsys):
    """All but the trainings: a linear network, whose every constant is its norm."""
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    monkeypatch.setattr(lipschitz, "ATTACK_STEPS", 2)
    found = lipschitz.constants(lambda x: x @ w, np.zeros((1, 4), np.float32), {"kernel": w}, 0)
    for key in lipschitz.QUANTITIES:
        np.testing.assert_allclose(found[key], np.linalg.norm(w, 2), rtol=1e-5)
    assert found["lower"] <= found["upper"] * (1 + 1e-5)
    radii, share = [0.1 * i for i in range(31)], [1 - 0.03 * i for i in range(31)]
    classifier = found | {
        "accuracy": 0.9, "radii": radii, "attacked radii": radii[::3], "under attack": share[::3],
        "claims": dict.fromkeys(("flattened", "product", "upper"), share),
    }  # fmt: skip
    monkeypatch.setattr(lipschitz, "discriminators", lambda *a, **k: {"none": found})
    monkeypatch.setattr(lipschitz, "robustness", lambda *a, **k: dict.fromkeys("ab", classifier))
    assert certify.main(["--lipschitz", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "constants.json").read_text())["networks"]["none"] == found
    assert len(list(tmp_path.glob("*.png"))) == 2
    out = capsys.readouterr().out
    for label, *_ in lipschitz.QUANTITIES.values():
        assert label in out


def test_the_table_of_networks(tmp_path, monkeypatch, capsys):
    name = "MLP 16-64-64-10, relu"
    monkeypatch.setattr(nets, "NETS", {name: nets.NETS[name]})
    args = ["--nets", "--seeds", "1", "--no-progress", "--out", str(tmp_path)]
    assert certify.main(args) == 0
    row = json.loads((tmp_path / "nets.json").read_text())["medians"][name]
    bounds = [row[method] for method in nets.METHODS]
    assert bounds == sorted(bounds, reverse=True)
    assert 0 < row["lower"] <= bounds[-1] * (1 + 1e-5)
    assert f"| {name} | " in capsys.readouterr().out


def test_certified_accuracy_is_below_what_an_attack_leaves(tmp_path, monkeypatch, capsys):
    """On the digits alone, hardly trained."""
    monkeypatch.setattr(classifier, "WIDTH", 16)
    monkeypatch.setattr(classifier, "train", cache(classifier.train))
    honest = classifier.study
    monkeypatch.setattr(classifier, "study", lambda *a, **k: honest(*a, data=("digits",), **k))
    args = ["--classifier", "--steps", "150", "--no-progress", "--out", str(tmp_path)]
    assert certify.main(args) == 0
    result = json.loads((tmp_path / "classifier.json").read_text())["networks"]["digits"]
    assert result["violations"] == 0
    assert result["accuracy"] > 0.5
    constants = result["constants"]
    assert constants["tight"] < constants["product"]
    shares = np.array([result["certified"][key] for key in ("product", "tight", "margins")])
    np.testing.assert_allclose(shares[:, 0], result["accuracy"])
    # Each of the next certifies more, and none what the attack takes.
    assert np.all(np.diff(shares, axis=0) >= 0)
    assert shares[2].sum() > shares[0].sum()
    assert np.all(shares <= result["under attack"])
    assert (tmp_path / "classifier.png").stat().st_size > 10_000
    assert "| left under attack |" in capsys.readouterr().out
    # Of constants that are ten times too small the attack says so.
    monkeypatch.setattr(sn_jax, "margin_bounds", lambda fn, x, **_: np.full((10, 10), 0.1))
    assert certify.main(args) == 1


def test_the_models_of_the_repository(tmp_path, monkeypatch, capsys):
    """Two of them, one in a ball; and a bound that is too small is found."""
    few = {"a": models._linen(classifier.Network(), (1, 4, 4, 1)),
           "b": models.Model(lambda key: lambda x: x * x, (1, 3), 0.1)}  # fmt: skip
    monkeypatch.setattr(models, "MODELS", few)
    args = ["--models", "--no-progress", "--out", str(tmp_path)]
    assert certify.main(args) == 0
    rows = json.loads((tmp_path / "models.json").read_text())["networks"]
    for row in rows.values():
        assert 0 < row["lower"] <= row["upper"] * (1 + 1e-6)
    assert rows["a"]["upper"] < rows["a"]["bounds"]["product"]
    assert rows["b"]["upper"] < 2.5 * rows["b"]["lower"]
    assert "| b |" in capsys.readouterr().out
    shrunk = {"a": rows["a"] | {"upper": 0.9 * rows["a"]["lower"]}}
    assert models.violations(rows | shrunk) == ["a"]
