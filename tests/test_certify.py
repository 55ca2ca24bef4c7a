"""experiments.certify: the attack in small, its oracle, and the command line."""

import json

import numpy as np
import pytest

import sn_jax
from experiments.certify import __main__ as certify
from experiments.certify import attack, oracle

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
    ],
)
def test_bad_options_are_one_line(args, match, capsys):
    assert certify.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert match in error
    assert error.count("\n") == 1
