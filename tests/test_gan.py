"""The GAN experiment: its numbers against the paper, and a run that survives what users do."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import svd_rtol
from kills import KILL_SEED, moments
from matplotlib.image import imread

import sn_jax
from experiments.data import load
from experiments.gan import __main__ as cli
from experiments.gan import evaluate, loop
from experiments.gan.networks import Discriminator, Generator, n_stages
from experiments.gan.train import EPOCH, LOSSES, SETTINGS, Config, Data, make_training
from experiments.metrics import frechet_distance

# One group: the tests of runs share them, and a second worker would make its own.
pytestmark = [pytest.mark.float32, pytest.mark.xdist_group("gan")]

ROOT = Path(__file__).parent.parent
TINY = ["--width", "2", "--batch-size", "8", "--no-progress"]


# --- Against the paper ----------------------------------------------------------------------


def kernel_shapes(module, x, **static):
    init = partial(module.init, **static)
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    kernels = [layer["kernel"].shape for layer in params.values() if "kernel" in layer]
    return kernels, sum(leaf.size for leaf in jax.tree.leaves(params))


def test_discriminator_at_32_is_the_papers():
    kernels, size = kernel_shapes(Discriminator(), jnp.zeros((1, 32, 32, 3)))
    assert kernels == [
        (3, 3, 3, 64),
        (4, 4, 64, 64),
        (3, 3, 64, 128),
        (4, 4, 128, 128),
        (3, 3, 128, 256),
        (4, 4, 256, 256),
        (3, 3, 256, 512),
        (4 * 4 * 512, 1),
    ]
    assert round(size / 1e6, 1) == 2.9


def test_generator_at_32_is_the_papers():
    kernels, size = kernel_shapes(Generator(32, 3), jnp.zeros((1, 128)), train=True)
    assert sorted(kernels, key=len) == [
        (128, 4 * 4 * 512),
        (4, 4, 512, 256),
        (4, 4, 256, 128),
        (4, 4, 128, 64),
        (3, 3, 64, 3),
    ]
    assert round(size / 1e6, 1) == 3.8


@pytest.mark.parametrize(("size", "stages"), [(4, 1), (8, 2), (12, 2), (16, 3), (32, 3), (48, 3)])
def test_stages_follow_the_image_size(size, stages):
    assert n_stages(size) == stages
    generate = partial(Generator(size, 2, width=1).init_with_output, train=True)
    images, _ = jax.eval_shape(generate, jax.random.key(0), jnp.zeros((5, 128)))
    scores, _ = jax.eval_shape(Discriminator(1).init_with_output, jax.random.key(0), images)
    assert images.shape == (5, size, size, 2)
    assert scores.shape == (5,)


@pytest.mark.parametrize("size", [1, 3, 10, 28])
def test_sizes_that_do_not_fit_say_so(size):
    with pytest.raises(ValueError, match=f"{size}x{size} pixels: pad or resize"):
        n_stages(size)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("name", "d_value", "d_real", "d_fake", "g_value", "g_fake"),
    [
        pytest.param(
            "hinge",
            lambda r, f: np.mean(np.maximum(0, 1 - r)) + np.mean(np.maximum(0, 1 + f)),
            lambda r: np.where(r < 1, -1.0, 0.0),
            lambda f: np.where(f > -1, 1.0, 0.0),
            lambda f: -np.mean(f),
            lambda f: -np.ones_like(f),
            id="hinge",
        ),
        pytest.param(
            "wasserstein",
            lambda r, f: np.mean(f) - np.mean(r),
            lambda r: -np.ones_like(r),
            lambda f: np.ones_like(f),
            lambda f: -np.mean(f),
            lambda f: -np.ones_like(f),
            id="wasserstein",
        ),
        pytest.param(
            "least-squares",
            lambda r, f: (np.mean((r - 1) ** 2) + np.mean(f**2)) / 2,
            lambda r: r - 1,
            lambda f: f,
            lambda f: np.mean((f - 1) ** 2) / 2,
            lambda f: f - 1,
            id="least-squares",
        ),
        pytest.param(
            "non-saturating",
            lambda r, f: -np.mean(np.log(sigmoid(r))) - np.mean(np.log(1 - sigmoid(f))),
            lambda r: sigmoid(r) - 1,
            lambda f: sigmoid(f),
            lambda f: -np.mean(np.log(sigmoid(f))),
            lambda f: sigmoid(f) - 1,
            id="non-saturating",
        ),
    ],
)
def test_losses_and_gradients_against_closed_forms(name, d_value, d_real, d_fake, g_value, g_fake):
    rng = np.random.default_rng(0)
    real, fake = 2 * rng.standard_normal((2, 7)).astype(np.float32)
    loss = LOSSES[name]
    np.testing.assert_allclose(loss.discriminator(real, fake), d_value(real, fake), rtol=1e-5)
    np.testing.assert_allclose(loss.generator(fake), g_value(fake), rtol=1e-5)
    grads = jax.grad(loss.discriminator, (0, 1))(real, fake)
    np.testing.assert_allclose(grads[0], d_real(real) / 7, rtol=1e-4)
    np.testing.assert_allclose(grads[1], d_fake(fake) / 7, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(loss.generator)(fake), g_fake(fake) / 7, rtol=1e-4)


# --- The step -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    """A corner of each digit: a network of one stage compiles fast."""
    images, labels = load("digits", "train")
    return Data(images[:, 2:6, 2:6], labels)


@pytest.fixture(scope="module")
def tiny():
    return make_training(Config(width=2, batch_size=8), (4, 4, 1))


def test_a_step_advances_u_once_and_keeps_the_raw_weights(tiny, images):
    state = tiny.init(jax.random.key(0))
    old_params = jax.tree.map(np.array, state.d_params)
    _, once = sn_jax.spectral_normalize(state.d_params, state.d_method)
    state, losses = tiny.step(state, images)
    assert int(state.step) == 1
    assert all(np.isfinite(loss) for loss in losses.values())
    # From the weights before the step, whose generator half left it as it was.
    assert list(once) == [f"Conv_{i}/kernel" for i in range(3)] + ["Dense_0/kernel"]
    for path, singular in once.items():
        atol = svd_rtol((singular.u.size, singular.v.size), np.float32)
        np.testing.assert_allclose(state.d_method[path].u, singular.u, atol=atol)
        np.testing.assert_allclose(state.d_method[path].sigma, singular.sigma, rtol=1e-5)
    # Adam's first step moves a weight by the learning rate at most: none was divided by sigma.
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.d_params, old_params)
    assert 0 < max(jax.tree.leaves(moved)) < 1.01 * SETTINGS["C"].learning_rate


def test_the_step_of_cosgroves_code(images):
    """One real batch a step, an iteration a pass, a learning rate that falls every epoch."""
    config = Config(
        width=2, batch_size=8, n_dis=1, same_real=True, iterate="forward", schedule="epochs"
    )
    training = make_training(config, (4, 4, 1))
    start = training.init(jax.random.key(0))
    start = start._replace(step=jnp.int32(3 * EPOCH))
    old = jax.tree.map(np.array, start)
    state, _ = training.step(start, images)
    # Two iterations of an update, on the old weights, and the generator's, on the new ones.
    method = old.d_method
    for weights in (old.d_params, old.d_params, state.d_params):
        _, method = sn_jax.spectral_normalize(weights, method)
    for path, singular in method.items():
        atol = svd_rtol((singular.u.size, singular.v.size), np.float32)
        np.testing.assert_allclose(state.d_method[path].u, singular.u, atol=atol)
    # Adam's first step moves a weight by the learning rate.
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.d_params, old.d_params)
    rate = SETTINGS["C"].learning_rate * 0.99**3
    assert max(jax.tree.leaves(moved)) == pytest.approx(rate, rel=1e-3)


def test_a_step_can_keep_to_one_real_batch(images):
    """Seen by the loss of a discriminator that stands still; generated images are all the same."""
    config = Config(width=2, batch_size=8, n_dis=1, same_real=True, loss="wasserstein",
                    normalization="none", learning_rate=1e-30)  # fmt: skip
    one = make_training(config, (4, 4, 1))
    two = make_training(dataclasses.replace(config, n_dis=2), (4, 4, 1))
    state = one.init(jax.random.key(0))
    state = state._replace(g_params=jax.tree.map(jnp.zeros_like, state.g_params))
    _, second = two.step(jax.tree.map(jnp.array, state), images)
    state, first = one.step(state, images)
    _, other = one.step(state, images)
    assert float(second["loss_d"]) == pytest.approx(float(first["loss_d"]), rel=1e-5)
    assert float(other["loss_d"]) != pytest.approx(float(first["loss_d"]), rel=1e-2)


def test_steps_in_one_scan_are_the_same_steps(tiny, images):
    single = tiny.init(jax.random.key(1))
    for _ in range(3):
        single, losses = tiny.step(single, images)
    scanned, scanned_losses = tiny.steps(tiny.init(jax.random.key(1)), images, 3)
    assert int(scanned.step) == 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-5), scanned, single)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3), scanned_losses, losses)


def test_spectra_are_of_the_kernels_in_use(tiny):
    state = tiny.init(jax.random.key(0))
    estimates, kernels = tiny.spectra(state)
    assert list(estimates) == list(kernels)
    for path, kernel in kernels.items():
        layer, name = path.split("/")
        np.testing.assert_allclose(
            kernel, state.d_params[layer][name] / estimates[path], rtol=1e-5, err_msg=path
        )


# --- Data and quality -----------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    (train, train_labels), (test, test_labels) = load("digits", "train"), load("digits", "test")
    assert train.shape == (1347, 8, 8, 1)
    assert test.shape == (450, 8, 8, 1)
    assert train.dtype == np.uint8
    assert (train.min(), train.max()) == (0, 255)
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    assert np.bincount(test_labels).min() >= 43
    assert len(train_labels) == 1347


def test_quality_counts_classes_and_confidence():
    def judge(images):
        """Class = the first pixel, with confidence .75; features = the first two pixels."""
        first = images[:, 0, 0, 0].astype(int)
        probabilities = np.full((len(images), 3), 0.125)
        probabilities[np.arange(len(images)), first] = 0.75
        return probabilities, images[:, 0, :2, 0]

    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 3, (2, 40, 2, 2, 1)).astype(np.float32)
    fake = np.zeros((100, 2, 2, 1), np.float32)
    fake[75:] = 2
    right = test[:, 0, 0, 0].astype(int)
    wrong = np.where(np.arange(40) < 10, (right + 1) % 3, right)
    result = evaluate.quality(judge, fake, train, test, wrong)
    assert result["class_fractions"] == [0.75, 0.0, 0.25]
    assert result["confidence_fake"] == pytest.approx(0.75)
    assert result["classifier_accuracy"] == 0.75
    assert (result["n_real"], result["n_fake"], result["n_samples"]) == (40, 40, 100)
    assert result["frechet_real"] == frechet_distance(train[:, 0, :2, 0], test[:, 0, :2, 0])
    assert result["frechet_fake"] == frechet_distance(fake[:40, 0, :2, 0], test[:, 0, :2, 0])


# --- Runs -----------------------------------------------------------------------------------

STEPS, ROW, SAVE = 160, 7, 20
RUN = [*TINY, "--steps", f"{STEPS}", "--log-every", f"{ROW}", "--checkpoint-every", f"{SAVE}"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the program on a folder; all its processes share one cache of compiled code."""
    cache = str(tmp_path_factory.mktemp("cache"))
    processes = []

    def start(out, *more):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.gan", *RUN, "--out", str(out), *more],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def kill(process):
    process.kill()
    return finish(process)


def wait_for_step(process, out, step):
    """Until a checkpoint of this step or a later one is complete."""
    while process.poll() is None:
        steps = [int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()]
        if max(steps, default=-1) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"ended before step {step}: {process.communicate()}")


def last_checkpoint(out):
    """Every array of the last checkpoint by name."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((out / "checkpoints" / f"{STEPS}" / "state").resolve())
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start):
    """The folders of one run left alone, and of the same one interrupted, killed and resumed."""
    alone, stopped = (tmp_path_factory.mktemp("runs") / name for name in ("alone", "stopped"))
    whole = start(alone)
    wait_for_step(whole, alone, SAVE)
    process = start(stopped, "--resume")
    wait_for_step(process, stopped, SAVE)
    process.send_signal(signal.SIGINT)
    interrupted = finish(process)
    process = start(stopped, "--resume")
    wait_for_step(process, stopped, 60)
    time.sleep(moments("gan").uniform(0, 1))
    killed = kill(process)
    process = start(stopped, "--resume")
    wait_for_step(process, stopped, STEPS)
    resumed = kill(process)  # in the evaluation, which the other run shows
    return {
        "alone": alone, "stopped": stopped, "whole": finish(whole), "interrupted": interrupted,
        "killed": killed, "resumed": resumed,
    }  # fmt: skip


def test_interrupt_saves_and_says_so(runs):
    code, _, stderr = runs["interrupted"]
    assert code == 130, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("Interrupted: step ")
    assert f"of {STEPS} is saved; continue with: python -m experiments.gan --width 2" in line
    assert line.endswith("--resume")


def test_a_killed_run_resumes_to_exactly_the_same_parameters(runs):
    assert runs["killed"][0] == -signal.SIGKILL, f"ended before it was killed ({KILL_SEED=})"
    assert runs["whole"][0] == 0
    for name in ("whole", "killed", "resumed"):
        assert runs[name][2] == "", "nothing on stderr"
    alone, stopped = last_checkpoint(runs["alone"]), last_checkpoint(runs["stopped"])
    assert list(alone) == list(stopped)
    assert len(alone) > 50
    for path, x in alone.items():
        np.testing.assert_array_equal(x, stopped[path], err_msg=f"{path}, {KILL_SEED=}")


def test_interrupt_of_the_evaluation(capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["--steps", "9", "--width", "9", "--out", str(tmp_path), "--resume"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"experiments.gan --steps 9 --width 9 --out {tmp_path} --resume")


def test_many_steps_a_dispatch_as_on_an_accelerator(monkeypatch, tiny, images, tmp_path):
    dispatches = []

    def steps(state, images, n):
        dispatches.append(n)
        return tiny.steps(state, images, n)

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(loop, "make_training", lambda *args: tiny._replace(steps=steps))
    config = Config(steps=7, log_every=3, checkpoint_every=6, out=tmp_path, progress=False)
    _, state = loop.train(config, images)
    assert int(state.step) == 7
    assert dispatches == [3, 3, 1]
    assert [row["step"] for row in loop.read_rows(tmp_path)] == [3, 6, 7]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


def test_a_run_that_diverges_is_stopped(monkeypatch, tiny, images, tmp_path):
    def step(state, images):
        state, losses = tiny.step(state, images)
        return state, losses | {"loss_g": jnp.nan}

    monkeypatch.setattr(loop, "make_training", lambda *args: tiny._replace(step=step))
    config = Config(steps=4, log_every=2, out=tmp_path, progress=False)
    with pytest.raises(loop.UserError, match="diverged before step 2: a loss or weight"):
        loop.train(config, images)
    assert loop.read_rows(tmp_path) == []


def test_metrics_have_every_row_once(runs):
    rows = {}
    for name in ("alone", "stopped"):
        lines = (runs[name] / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows[name]] == [*range(ROW, STEPS, ROW), STEPS]
        for row in rows[name]:
            assert row.pop("seconds") > 0
            assert row.pop("steps_per_second") > 0
    assert rows["alone"] == rows["stopped"]
    assert set(rows["alone"][0]["sigma_hat"]) == set(rows["alone"][0]["sigma_bar"])


def test_output_folder(runs):
    out = runs["alone"]
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    config = json.loads((out / "config.json").read_text())
    assert (
        config
        == summary["config"]
        == Config(width=2, batch_size=8, steps=STEPS, log_every=ROW).identity()
    )
    quality = summary["quality"]
    assert quality["classifier_accuracy"] >= 0.95
    assert quality["n_samples"] == 2000
    assert sum(quality["class_fractions"]) == pytest.approx(1)
    assert quality["n_real"] == quality["n_fake"] == 450
    assert 0 < quality["frechet_real"] < quality["frechet_fake"]
    assert summary["versions"]["jax"] == jax.__version__
    for name in ("samples.png", "curves.png", "spectra.png"):
        picture = imread(out / name)
        assert min(picture.shape[:2]) >= 600
        assert picture[..., :3].std() > 0.05
    table = runs["whole"][1]
    assert f"{out / 'samples.png'}" in table
    assert f"{quality['frechet_fake']:.1f}" in table


# --- Bad input ------------------------------------------------------------------------------


def fingerprint(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in files}


def refused(capsys, *args):
    """The one line on stderr that a wrong command ends with."""
    assert cli.main([*map(str, args)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in captured.out
    return line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--dataset", "cifar"], "Unknown data set 'cifar': choose from digits, mnist"),
        (["--setting", "G"], "('A', 'B', 'C', 'D', 'E', 'F')"),
        (["--loss", "mse"], "invalid choice 'mse' for argument '--loss'"),
        (["--normalization", "dn"], "invalid choice 'dn' for argument '--normalization'"),
        (["--size", "9"], "does not fit images of 9x9 pixels: give a --size of at least 4, to"),
        (["--strength", "3"], "normalization sn has no strength"),
        (["--ema", "1"], "ema must be from 0 to 1, and below 1, got 1"),
        (["--minutes", "0"], "minutes must be positive and finite, got 0"),
        (["--preset", "mine"], "invalid choice 'mine' for argument '--preset'"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--width", "-3"], "width must be at least 1, got -3"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_wrong_options_are_named(capsys, tmp_path, args, said):
    assert said in refused(capsys, "--out", tmp_path / "run", *args)
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_used(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert f"{out} cannot be used" in refused(capsys, "--out", out)
        assert "not of a run" in refused(capsys, "--out", tmp_path, "--resume")
    assert fingerprint(tmp_path) == {"file": hashlib.sha256(b"mine").digest()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_folder_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be used (Permission denied)" in refused(capsys, "--out", tmp_path / "run")


def test_a_finished_run_is_not_overwritten_nor_run_again(capsys, monkeypatch, runs):
    out = runs["alone"]
    before = fingerprint(out)
    monkeypatch.setattr(cli, "run", lambda *args: pytest.fail("ran again"))
    assert "pass --resume" in refused(capsys, *RUN, "--out", out)
    line = refused(capsys, *RUN, "--out", out, "--resume", "--width", "3", "--setting", "A")
    assert "(width is 2 there and 3 here; setting is C there and A here)" in line
    assert cli.main([*RUN, "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.strip() in runs["whole"][1]
    assert fingerprint(out) == before


def test_fewer_steps_than_trained(capsys, runs, tmp_path):
    out = shutil.copytree(runs["alone"], tmp_path / "run")
    line = refused(capsys, *RUN, "--out", out, "--resume", "--steps", STEPS - 1)
    assert f"already trained to step {STEPS}: pass --steps {STEPS} or more" in line


@pytest.fixture
def truncated(runs, tmp_path):
    """A run whose last checkpoint lost the end of its largest file: run, checkpoint, file."""
    out = shutil.copytree(runs["alone"], tmp_path / "run")
    (out / "summary.json").unlink()
    newest = out / "checkpoints" / f"{STEPS}"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    return out, newest, victim


def test_a_truncated_checkpoint_is_named_and_kept(capsys, truncated, start, tmp_path):
    out, newest, victim = truncated
    before = fingerprint(out / "checkpoints")
    line = refused(capsys, *RUN, "--out", out, "--resume")
    assert f"{victim} is damaged: move {newest} away" in line
    assert f"to continue from step {STEPS - SAVE}" in line
    assert fingerprint(out / "checkpoints") == before
    # What it said to do works, and a run may be prolonged.
    shutil.move(newest, tmp_path / "kept")
    process = start(out, "--resume", "--steps", f"{STEPS + 5}")
    wait_for_step(process, out, STEPS + 5)
    kill(process)
    assert [row["step"] for row in loop.read_rows(out)][-2:] == [STEPS + 1, STEPS + 5]


def test_a_checkpoint_without_checksums_is_damaged(capsys, truncated):
    out, newest, _ = truncated
    (newest / "checksums.json").write_text("{")
    line = refused(capsys, *RUN, "--out", out, "--resume")
    assert f"{newest / 'checksums.json'} is damaged: move {newest} away" in line


@pytest.mark.parametrize("then", [3, 4])
def test_a_kill_before_the_checksums_costs_that_checkpoint_only(then, tiny, tmp_path):
    state = tiny.init(jax.random.key(0))
    for step in (1, 2, 3):
        loop._save(tmp_path, state._replace(step=jnp.int32(step)))
    assert loop.saved_steps(tmp_path) == [2, 3], "the last and the one before"
    (tmp_path / "checkpoints" / "3" / "checksums.json").unlink()
    assert loop.saved_steps(tmp_path) == [2]
    loop._save(tmp_path, state._replace(step=jnp.int32(then)))
    assert loop.saved_steps(tmp_path) == [2, then]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", f"{then}"]


def test_a_checkpoint_of_another_program_is_named_and_kept(capsys, truncated):
    import orbax.checkpoint as ocp

    out, newest, _ = truncated
    shutil.rmtree(newest)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(newest / "state", args=ocp.args.StandardSave({"x": jnp.zeros(3)}))
    (newest / "checksums.json").write_text("{}")
    before = fingerprint(out / "checkpoints")
    assert f"{newest} cannot be read (" in refused(capsys, *RUN, "--out", out, "--resume")
    assert fingerprint(out / "checkpoints") == before


def test_a_damaged_config_is_named(capsys, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"width": ')
    assert f"{out / 'config.json'} is damaged" in refused(capsys, "--out", out, "--resume")
