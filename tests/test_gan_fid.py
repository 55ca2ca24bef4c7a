"""FID of a run, and the presets of the paper's CIFAR-10 numbers."""

import dataclasses
import json
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import UserError
from experiments.gan import fid, loop, plots
from experiments.gan.__main__ import main, options
from experiments.gan.train import Config, Data

pytestmark = pytest.mark.float32

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 1), np.uint8)
DATA = Data(IMAGES, np.zeros(90, np.int32))


# --- Presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Miyato et al. (2018), section 4 and table 2; the ResNet as the authors' code trains it.
        ("cifar10-cnn", {"architecture": "cnn", "loss": "non-saturating", "steps": 100_000,
                         "adam": (2e-4, 0.5, 0.999, 1), "g_batch_size": None}),
        ("cifar10-cnn-hinge", {"architecture": "cnn", "loss": "hinge", "steps": 100_000,
                               "adam": (2e-4, 0.5, 0.999, 1), "g_batch_size": None}),
        ("cifar10-resnet", {"architecture": "resnet-authors", "loss": "hinge", "steps": 50_000,
                            "adam": (2e-4, 0.0, 0.9, 5), "g_batch_size": 128,
                            "schedule": "linear"}),
    ],
)  # fmt: skip
def test_presets_of_the_headline_runs(name, expected):
    config = options(["--preset", name])
    common = {"dataset": "cifar10", "normalization": "sn", "width": 64, "batch_size": 64,
              "fid": ("paper", "common"), "ema": None}  # fmt: skip
    found = dataclasses.asdict(config) | {"adam": tuple(config.adam())}
    assert {key: found[key] for key in expected | common} == expected | common
    assert [fid.counts(n) for n in config.fid] == [(10_000, 5_000), (50_000, 50_000)]
    assert config.steps % config.fid_every == 0
    # What is given beside it counts.
    assert options(["--preset", name, "--steps", "20", "--fid", "256/256"]).fid == ("256/256",)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fid", "many"], "fid must be paper, common, or as 256/256, got many"),
        (["--fid", "0/50"], "got 0/50"),
        (["--fid-every", "500"], "give --fid too"),
        (["--fid", "50/50", "--fid-every", "7"], "a multiple of checkpoint_every, 500, got 7"),
        (["--fid", "paper"], "--fid paper takes 10000 real images, and digits has 1347"),
    ],
)
def test_wrong_options(capsys, tmp_path, args, said):
    assert main([*args, "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


# --- Measuring --------------------------------------------------------------------------------


def state_at(step):
    return SimpleNamespace(step=jnp.int32(step), key=jax.random.key_data(jax.random.key(0)))


def sample(state, z, labels):
    """Images that tell the step and the label: grey levels 10 step + label."""
    level = (10 * state.step + labels) / 127.5 - 1
    return jnp.broadcast_to(level[:, None, None, None], (len(z), 4, 4, 1))


@pytest.fixture
def evaluated(monkeypatch):
    calls = []

    def evaluate(real, fake, **options):
        calls.append((real, fake, options))
        names = ("fid", "kid", "precision", "recall")
        return dict.fromkeys(names, len(calls)) | {"n_real": options["n_real"], "n_fake": len(fake)}

    monkeypatch.setattr(fid, "evaluate", evaluate)
    return calls


def measure(config, step):
    return fid.measure(config, DATA, 3, SimpleNamespace(sample=sample), state_at(step))


def test_what_is_measured_when(evaluated, tmp_path):
    config = Config(steps=9, fid=("50/120", "70/30"), fid_every=2, checkpoint_every=2, out=tmp_path)
    assert measure(config, 0) == {}
    assert measure(config, 3) == {}
    assert measure(config, 4) == {"fid/50/120": 1}
    real, fake, asked = evaluated[0]
    assert real is IMAGES
    assert asked["n_real"] == 50
    assert fake.dtype == np.uint8
    assert fake.shape == (120, 4, 4, 1)
    assert set(np.unique(fake)) == {40, 41, 42}, "all classes, and the levels that were meant"
    assert measure(config, 9) == {"fid/50/120": 2, "fid/70/30": 3}
    # A run that is resumed does not measure again, one that is prolonged does.
    assert measure(config, 4) == measure(config, 9) == {}
    assert fid.missing(dataclasses.replace(config, steps=11), 11) == ["50/120", "70/30"]
    rows = fid.rows(tmp_path)
    assert [(r["step"], r["n_real"], r["n_fake"]) for r in rows] == [
        (4, 50, 120), (9, 50, 120), (9, 70, 30)
    ]  # fmt: skip
    # A kill in the middle of a row leaves the others.
    path = tmp_path / "fid.jsonl"
    path.write_text(path.read_text()[:-20])
    assert measure(config, 9) == {"fid/70/30": 4}
    assert [json.loads(line)["fid"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_no_fid_unless_asked_for(evaluated, tmp_path):
    assert measure(Config(steps=9, out=tmp_path), 9) == {}
    fid.check(Config(), DATA)  # nothing is fetched


def test_without_the_network_a_run_does_not_start(monkeypatch):
    def cannot(data_dir):
        raise UserError("cannot be fetched")

    monkeypatch.setattr(fid, "inception_params", cannot)
    with pytest.raises(UserError, match="cannot be fetched"):
        fid.check(Config(fid=("50/50",)), DATA)


class Counter(NamedTuple):
    """A state that counts and does nothing else."""

    step: jax.Array


def test_the_loop_looks_at_checkpoints(monkeypatch, tmp_path):
    """Saved and restored ones, and never twice at the end, where the run measures itself."""

    def init(key):
        return Counter(jnp.int32(0))

    training = SimpleNamespace(
        init=init,
        shapes=lambda key: jax.eval_shape(init, key),
        step=lambda state, data: (Counter(state.step + 1), {}),
        steps=lambda state, data, n: (Counter(state.step + n), {}),
    )
    monkeypatch.setattr(loop, "make_training", lambda *args: training)
    monkeypatch.setattr(loop, "_measure", lambda *args: {"loss_d": 0.0, "loss_g": 0.0})
    monkeypatch.setattr(loop, "_scalars", lambda row: [])
    monkeypatch.setattr(loop, "_postfix", lambda row: "")
    monkeypatch.setattr(loop, "_require_finite", lambda *args: None)
    seen = []

    def look(training, state):
        seen.append(int(state.step))
        return {"fid/50/50": 1.0}

    config = Config(steps=5, log_every=5, checkpoint_every=2, out=tmp_path, progress=False)
    loop.train(config, DATA, 1, look)
    assert seen == [2, 4]
    loop.train(dataclasses.replace(config, steps=7), DATA, 1, look)
    assert seen == [2, 4, 5, 6]


def test_picture(tmp_path):
    rows = [{"step": s, "fid": 300 / s, "n_real": n, "n_fake": 5} for s in (1, 2) for n in (5, 9)]
    plots.save_fid(tmp_path / "fid.png", rows, "title")
    assert (tmp_path / "fid.png").stat().st_size > 5000
