"""An accelerator's minutes in little, on a CPU: stages that are killed, that wait, that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from kills import KILL_SEED, moments
from test_data import flipped, md5

import sn_jax
from experiments.accelerator import __main__ as entry
from experiments.accelerator import command, packages, smoke, stages
from experiments.accelerator.command import Clock, Options
from experiments.accelerator.stages import Outcome, Stage, read_summary
from experiments.bench import __main__ as bench
from experiments.bench.timing import Row
from experiments.certify import oracle
from experiments.cli import UserError
from experiments.data import parts
from experiments.data.fetch import Archive, Source
from experiments.data.official import SOURCES
from experiments.gan.loop import read_rows
from experiments.metrics import extract, weights

pytestmark = [pytest.mark.float32, pytest.mark.xdist_group("accelerator")]

ROOT = Path(__file__).parent.parent
# One class, so that no classifier is trained.
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 60, 3073), np.uint8)
IMAGES[..., 0] = 0
CIFAR10 = SOURCES["cifar10"]
FOLDER = {path: x.tobytes() for path, x in zip(CIFAR10.files, IMAGES, strict=True)}
ARCHIVE = Archive("cifar-10-binary.tar.gz", "", {path: md5(x) for path, x in FOLDER.items()})
WEIGHTS = np.random.default_rng(0).standard_normal(150_000, np.float32).tobytes() + b"end"
NETWORK = Source(
    name="inception-v3", archives=(Archive("nowhere.whl", "", {weights.FILE: md5(WEIGHTS)}),)
)


# --- What stands in for what is large -------------------------------------------------------------


class Projection:
    """Eight features of an image, whatever its network is said to be."""

    def __init__(self, data_dir):
        assert md5((data_dir / weights.FILE).read_bytes()) == md5(WEIGHTS)

    def __call__(self, images, bar):
        bar.update(len(images))
        pixels = images.reshape(len(images), -1) / 255
        matrix = np.random.default_rng(0).standard_normal((pixels.shape[1], 8))
        return (pixels @ matrix).astype(np.float32)


def suite(quick):
    """Two cases in no time."""
    yield [Row("a", "first", "ms", 1.0, 2.0, "flax", 0.5, (0.4, 0.6), target=0.8)]
    yield [Row("a", "second, sn_jax", "real images/s", 640.0)]


@contextmanager
def stand_ins():
    """300 images in CIFAR-10's format, a network of eight features, quick suites, no pictures."""
    images = replace(CIFAR10, archives=(ARCHIVE,), urls=(), mirror=None)
    with (
        patch.dict(SOURCES, {"cifar10": images}),
        patch.dict(bench.SUITES, dict.fromkeys(bench.SUITES, suite)),
        patch.object(stages, "save_ratios"),
        patch("experiments.gan.run.plots"),
        patch.object(weights, "SOURCE", NETWORK),
        patch.object(extract, "_Network", Projection),
        patch.object(extract, "N_FEATURES", 8),
    ):
        yield


def tiny_work(name, task):
    """In a process of its own, where what stands in has to be put again."""
    with stand_ins():
        stages.work(name, task)


def tiny_main(args):
    with stand_ins():
        return command.main(["--tiny", *args], tiny_work)


@pytest.fixture
def packed(tmp_path):
    """A data folder with parts and nothing else; the last has the network."""
    written = parts.write(FOLDER | {weights.FILE: WEIGHTS}, tmp_path / "data", limit=600_000)
    assert len(written) == 3
    return tmp_path / "data"


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process."""

    def in_process(call, clock):
        clock.write()
        call()
        return 0

    monkeypatch.setattr(command, "in_process", in_process)


# --- From a packed folder, killed once ------------------------------------------------------------


def ended(group):
    """Whether all processes of a group are gone, within half a minute."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_killed_and_resumed(packed, tmp_path, here, capsys):
    out = tmp_path / "out"
    run = out / "cifar10-cnn-hinge" / "run"
    args = ["--data-dir", str(packed), "--out", str(out), "--no-progress", "--stages",
            "bench-step", "cifar10-cnn-hinge"]  # fmt: skip
    code = "import sys, test_accelerator as t; sys.exit(t.tiny_main(sys.argv[1:]))"
    nobody = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], "http://127.0.0.1:9")
    env = os.environ | nobody | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", code, *args], env=env, start_new_session=True)
    # While it compiles, or after its first checkpoint, when it is measured.
    rng = moments("accelerator")
    mark, most = rng.choice([("config.json", 3.0), ("checkpoints/2", 0.5)])
    moment = rng.uniform(0, most)
    while process.poll() is None and not (run / mark).exists():
        time.sleep(0.02)
    time.sleep(moment)
    process.kill()
    # Shown if the test fails.
    print(f"killed {moment:.2f} s after {mark} (KILL_SEED={KILL_SEED})")
    assert process.wait() < 0, "it ended before it was killed"
    assert ended(process.pid), "whom it started ends with it"
    assert read_summary(out / "bench-step")["state"] == "done"
    spent = json.loads((out / "spent.json").read_text())
    assert len(spent) == 1

    assert tiny_main(args) == 0
    said = capsys.readouterr().out
    summaries = {name: read_summary(out / name) for name in ("bench-step", "cifar10-cnn-hinge")}
    assert [summary["state"] for summary in summaries.values()] == ["done", "done"]
    assert len(summaries["bench-step"]["starts"]) == 1, "it was done"
    assert [row["step"] for row in read_rows(run)] == [2, 4]
    fids = read_rows(run, "fid.jsonl")
    assert [(row["step"], row["n_real"], row["n_fake"]) for row in fids] == [(4, 16, 16)]
    assert summaries["cifar10-cnn-hinge"]["numbers"]["fid"] == fids
    assert {"device", "versions", "commit", "date", "seconds"} <= summaries["bench-step"].keys()
    # A killed call's seconds are kept, and count.
    now = json.loads((out / "spent.json").read_text())
    assert len(now) == 2
    assert now[0] >= spent[0] > 0
    assert "4 of 4 steps" in said
    assert f"{fids[0]['fid']:.1f} (16/16)" in (out / "table.txt").read_text()
    # Nothing is left to do.
    assert tiny_main(args) == 0
    assert read_summary(out / "cifar10-cnn-hinge") == summaries["cifar10-cnn-hinge"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_all_of_it(packed, tmp_path):
    """Every stage as it is, but for the data and FID's network: minutes."""
    out = tmp_path / "out"
    suites = dict(bench.SUITES)
    with stand_ins(), patch.dict(bench.SUITES, suites):
        args = ["--tiny", "--data-dir", str(packed), "--out", str(out), "--minutes", "60"]
        with patch.object(command, "in_process", lambda call, clock: call() or 0):
            assert command.main(args, stages.work) == 0
    for name in stages.table_of(tiny=True):
        assert read_summary(out / name)["state"] == "done", name


def test_options_of_the_trainings():
    """The paper's numbers of steps, its FIDs, and the rows that it compares them with."""
    found = stages.trainings(tiny=False)
    assert list(found)[:2] == ["cifar10-cnn-hinge", "cifar10-resnet"]
    assert {name: (c.normalization, c.loss) for name, c in found.items()} == {
        "cifar10-cnn-hinge": ("sn", "hinge"),
        "cifar10-resnet": ("sn", "hinge"),
        "cifar10-cnn": ("sn", "non-saturating"),
        "cifar10-cnn-none": ("none", "non-saturating"),
        "cifar10-cnn-wgan-gp": ("gp", "wasserstein"),
    }
    for name, config in found.items():
        assert config.steps == (50_000 if "resnet" in name else 100_000)
        assert (config.dataset, config.width, config.fid) == ("cifar10", 64, ("paper", "common"))
        assert config.steps % config.fid_every == config.fid_every % config.checkpoint_every == 0
    table = stages.table_of(tiny=False)
    order = ["smoke", "bench-gan", "bench-step", "bench-transform", "bench-memory",
             "bench-tracking", "bench-compile", *found]  # fmt: skip
    assert list(table) == order
    assert stages.table_of(tiny=True).keys() == table.keys()


# --- Stages ---------------------------------------------------------------------------------------


def task_of(folder, **changes):
    folder.mkdir(exist_ok=True)
    deadline = time.monotonic() + 100
    task = stages.Task(folder, None, deadline, {}, tiny=True, progress=False)
    return task._replace(**changes)


def test_a_suite_keeps_its_rows(tmp_path, monkeypatch):
    """What was measured before a crash or the end of the time stays, and is never made less."""
    cases = list(suite(True))

    def crashes(quick):
        yield cases[0]
        raise MemoryError("all of it")

    monkeypatch.setitem(bench.SUITES, "step", crashes)
    task = task_of(tmp_path / "bench-step")
    monkeypatch.setitem(stages.table_of.__globals__, "table_of", lambda tiny: {
        "bench-step": Stage(partial(stages.measure, "step"), 1.0)})  # fmt: skip
    stages.work("bench-step", task)
    assert read_summary(task.folder)["state"] == "failed"
    assert read_summary(task.folder)["why"] == "out of memory, MemoryError: all of it"
    rows = json.loads((task.folder / "rows.json").read_text())
    assert [row.get("case") for row in rows] == ["first", None]

    monkeypatch.setitem(bench.SUITES, "step", suite)
    late = task_of(tmp_path / "late", deadline=time.monotonic())
    outcome = stages.measure("step", late)
    assert (outcome.state, outcome.why) == ("paused", "its time was over after the case first")
    outcome = stages.measure("step", late)  # a second time is no better: that is what there is
    assert (outcome.state, outcome.why) == ("done", "its time was over after the case first")
    outcome = stages.measure("step", task_of(tmp_path / "late"))
    assert outcome.why == ""
    assert outcome.numbers["images_per_second"] == {"sn_jax": 640.0}
    assert outcome.numbers["headline"] == "640 images/s (sn_jax), 1 of 1 aims met"
    assert stages.measure("step", late).state == "done"
    rows = json.loads((late.folder / "rows.json").read_text())
    assert [row.get("case") for row in rows] == ["first", "second, sn_jax", None]


def test_a_training_without_fids_network(packed, tmp_path, monkeypatch):
    """It is trained, and measured when the network has come."""
    config = stages.trainings(tiny=True)["cifar10-cnn-hinge"]
    asked = []

    def run(config):
        asked.append((config.fid, config.fid_every))
        row = {"step": 4, "seconds": 2.0, "steps_per_second": 2.0}
        (config.out / "metrics.jsonl").write_text(json.dumps(row))

    monkeypatch.setattr(stages, "run", run)
    task = task_of(tmp_path / "a", lacking={"inception-v3": "a part is missing"})
    outcome = stages.train(config, task)
    assert (outcome.state, outcome.why) == ("waiting", "trained, but a part is missing")
    assert outcome.numbers["headline"] == "4 of 4 steps, 2.0 a second"
    stage = Stage(partial(stages.train, config), 1.0, config)
    assert stage.needs({}) == ["cifar10"]
    assert stage.needs({"numbers": outcome.numbers}) == ["cifar10", "inception-v3"]
    assert stages.train(config, task_of(tmp_path / "a")).state == "done"
    assert asked == [((), None), (("16/16",), 4)]
    # With less time than the next rows take it is not begun.
    slow = task_of(tmp_path / "a", deadline=time.monotonic() + 0.9)
    assert stages.train(config, slow).state == "paused"
    assert len(asked) == 2


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch, here):
    """Put stages of no cost into the table: name -> what it does, or least minutes and that."""

    def put(**works):
        made = {
            name: Stage(*(work if isinstance(work, tuple) else (work, 0.0)))
            for name, work in works.items()
        }
        monkeypatch.setattr(command, "table_of", lambda tiny: made)
        monkeypatch.setattr(stages, "table_of", lambda tiny: made)
        monkeypatch.setattr(command, "missing_data", lambda options: {})

    return put


def call(out, *args):
    return command.main(["--tiny", "--no-progress", "--out", str(out), *args])


def done(task):
    return Outcome("done", "", {"headline": "all of it"})


def states(out):
    return {path.parent.name: read_summary(path.parent)["state"]
            for path in sorted(out.glob("*/summary.json"))}  # fmt: skip


def test_what_fails_does_not_stop_the_rest_and_is_not_tried_again(table, tmp_path, capsys):
    tried = []

    def wrong(task):
        tried.append("wrong")
        raise UserError("That cannot be.")

    def without(task):
        tried.append("without")
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    table(wrong=wrong, without=without, last=done)
    assert call(tmp_path) == 1
    assert states(tmp_path) == {"last": "done", "without": "waiting", "wrong": "failed"}
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("wrong") and line.endswith("That cannot be.") for line in shown)
    assert read_summary(tmp_path / "without")["why"] == "the package torch is not installed here"
    for _ in range(4):
        call(tmp_path)
    assert tried == ["wrong", "without", *["without"] * 2]
    assert states(tmp_path)["without"] == "failed"
    why = read_summary(tmp_path / "without")["why"]
    assert why.startswith("started 3 times without getting further: the package torch")


def test_a_stage_that_gets_further_is_started_as_often_as_it_takes(table, tmp_path):
    def slow(task):
        step = len(list((task.folder / "run" / "checkpoints").glob("*"))) + 1
        state = task.folder / "run" / "checkpoints" / str(step)
        state.mkdir(parents=True)
        (state / "checksums.json").write_text("{}")  # one without them counts for nothing
        return Outcome("done" if step == 6 else "paused", "", {})

    table(slow=slow)
    for _ in range(6):
        assert call(tmp_path) == 0
    assert states(tmp_path) == {"slow": "done"}


def test_processes_that_crash_or_take_too_long(table, tmp_path, monkeypatch):
    codes = iter([-signal.SIGSEGV, 7, None])
    table(crash=done)
    monkeypatch.setattr(command, "in_process", lambda call, clock: next(codes))
    for why in ("SIGSEGV", "exit code 7", "its time being over"):
        assert call(tmp_path) == 0
        assert read_summary(tmp_path / "crash")["why"] == f"its process was ended by {why}"
        assert states(tmp_path) == {"crash": "paused"}
    assert call(tmp_path) == 1
    assert states(tmp_path) == {"crash": "failed"}


def test_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "GRACE", 0.0)
    clock = Clock(Options(minutes=1, out=tmp_path))
    assert command.in_process(partial(os._exit, 7), clock) == 7
    assert json.loads((tmp_path / "spent.json").read_text())[0] >= 0  # rounded to tenths
    clock.deadline = time.monotonic() + 0.5
    assert command.in_process(partial(time.sleep, 1000), clock) is None


def test_minutes_are_counted_over_calls(table, tmp_path, capsys):
    begun = []

    def noted(task):
        begun.append(task.deadline - time.monotonic())
        return Outcome("paused", "", {})

    (tmp_path / "spent.json").write_text("[30.0, 60.0]")
    table(first=noted)
    assert call(tmp_path, "--minutes", "9", "--piece", "2") == 0
    assert call(tmp_path, "--minutes", "3.5", "--piece", "2.5") == 0
    assert [round(left) for left in begun] == [120, 120]
    spent = json.loads((tmp_path / "spent.json").read_text())
    assert spent[:2] == [30.0, 60.0]
    assert len(spent) == 4
    capsys.readouterr()
    assert call(tmp_path, "--minutes", "1.5") == 2
    assert "1.5 minutes are spent: give more by --minutes" in capsys.readouterr().err


def test_what_takes_longer_than_is_left_is_left_to_the_next_call(table, tmp_path):
    """But for the first of a call: it would never be begun."""
    table(long=(done, 50.0), longer=(done, 50.0), short=(done, 1.0))
    assert call(tmp_path, "--piece", "9") == 0
    assert states(tmp_path) == {"long": "done", "short": "done"}
    assert call(tmp_path, "--piece", "9") == 0
    assert states(tmp_path)["longer"] == "done"


def test_one_call_at_a_time(table, tmp_path, capsys):
    def again(task):
        assert call(tmp_path) == 2
        return done(task)

    table(again=again)
    assert call(tmp_path) == 0
    assert f"Another call works in {tmp_path}: wait for its end." in capsys.readouterr().err


def test_parts_that_come_over_several_calls(packed, tmp_path, here, monkeypatch, capsys):
    """What needs them waits with a sentence, the rest does not; nothing asks the network."""
    monkeypatch.setattr(stages, "run", lambda config: pytest.fail("no images"))
    args = ["--data-dir", str(packed), "--out", str(tmp_path / "out"), "--stages", "bench-gan",
            "cifar10-cnn"]  # fmt: skip
    whole = {path: path.read_bytes() for path in sorted(packed.glob("*.zip"))}
    _, second, third = whole
    for path in (second, third):
        path.unlink()
    assert tiny_main(args) == 0
    assert states(tmp_path / "out") == {"bench-gan": "done", "cifar10-cnn": "waiting"}
    assert f"{packed} has not {second.name} and {third.name} yet" in capsys.readouterr().err
    second.write_bytes(flipped(whole[second]))
    assert tiny_main(args) == 0
    assert f"{second} is damaged: copy it again" in (tmp_path / "out" / "table.txt").read_text()

    def run(config):
        assert config.fid == ()
        row = {"step": 4, "seconds": 1.0, "steps_per_second": 4.0}
        (config.out / "metrics.jsonl").write_text(json.dumps(row))

    monkeypatch.setattr(stages, "run", run)
    second.write_bytes(whole[second])  # images are complete, the network is not
    for _ in range(5):  # waiting is no start
        assert tiny_main(args) == 0
        assert states(tmp_path / "out")["cifar10-cnn"] == "waiting"
    monkeypatch.setattr(stages, "run", lambda config: None)
    third.write_bytes(whole[third])
    assert tiny_main(args) == 0
    assert states(tmp_path / "out")["cifar10-cnn"] == "done"


def test_plan(tmp_path):
    """From guesses, from the benchmark of the step, from a run's own rows."""
    table = stages.table_of(tiny=False)
    options = Options(minutes=30, piece=4, out=tmp_path)

    def lines():
        text = command.plan(options, table, Clock(options))
        return {line.split()[0]: line.split()[1:] for line in text.splitlines()[3:] if line}

    plan = lines()
    assert plan["smoke"] == ["to", "do", "1.5", "guess", "now"]
    assert plan["bench-step"][-1] == "later"
    assert plan["cifar10-cnn-hinge"] == ["to", "do", "?", "with", "what", "is", "left"]

    numbers = {"images_per_second": {"sn_jax": 6400.0, "no SN": 12800.0}}
    stages.write_summary(tmp_path / "bench-gan", state="done", numbers=numbers)
    plan = lines()
    assert plan["bench-gan"] == ["done"]
    # 100,000 steps at 100 a second, and three FIDs on the way, two at the end.
    minutes = (1000 + 5 * command.FID_SECONDS) / 60
    assert plan["cifar10-cnn-hinge"][2:5] == [f"{minutes:.1f}", "by", "bench-gan"]
    assert plan["cifar10-resnet"][2] == "?"

    run = tmp_path / "cifar10-cnn-hinge" / "run"
    run.mkdir(parents=True)
    rows = [{"step": 2500 * (i + 1), "seconds": i, "steps_per_second": [9.0, 200.0, 200.0][i]}
            for i in range(3)]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {"step": 5000, "n_real": 10_000, "n_fake": 5_000, "fid": 50.0, "seconds": 60.0}
    (run / "fid.jsonl").write_text(json.dumps(row))
    minutes = (92_500 / 200 + 4 * 60) / 60
    assert lines()["cifar10-cnn-hinge"][2:4] == [f"{minutes:.1f}", "measured"]


def test_wrong_calls(tmp_path, capsys, monkeypatch, here):
    def said(*args, main=command.main):
        assert main([*args, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    assert "There is no stage 'all': choose from smoke, bench-gan" in said("--stages", "all")
    assert "piece must be positive and finite, got 0.0" in said("--piece", "0")
    monkeypatch.setattr(command, "in_process", lambda call, clock: stages.NO_ACCELERATOR)
    assert "JAX finds no accelerator, only a CPU" in said()
    assert read_summary(tmp_path / "out" / "smoke")["state"] == "to do"
    # Where a package is missing that the command itself needs.
    monkeypatch.setitem(sys.modules, "experiments.accelerator.command", None)
    monkeypatch.delattr("experiments.accelerator.command")
    assert "is not installed here: install it, or put sn-packages.zip" in said(main=entry.main)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "tyro, which reads the options, is not installed here" in said()


def test_no_accelerator(tmp_path):
    with pytest.raises(SystemExit) as stop:
        stages.work("smoke", task_of(tmp_path / "smoke", tiny=False))
    assert stop.value.code == stages.NO_ACCELERATOR


# --- The packed files -----------------------------------------------------------------------------


def test_packages_are_found_after_those_that_are_there(tmp_path):
    """In an interpreter without site-packages: what the experiments need and is pure Python."""
    path = packages.write(tmp_path)
    code = (
        "import sys; from experiments.accelerator import packages; "
        "packages.use(['--tiny', '--data-dir', sys.argv[1]]); "
        "assert sys.path[-1].endswith('.zip'); "
        "import tyro, tensorboardX.summary, pooch, importlib.metadata as m; "
        "print(tyro.__file__, m.version('tyro'))"
    )
    # What they need in turn and is not pure, or the library needs too, stays to be installed.
    site = [p for p in sys.path if p.endswith("site-packages")]
    (tmp_path / "site").mkdir()
    for name in ("numpy", "numpy.libs", "google", "typing_extensions.py"):
        for folder in site:
            if (Path(folder) / name).exists():
                (tmp_path / "site" / name).symlink_to(Path(folder) / name)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}
    said = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(str(path))
    names = {name.split("/")[0] for name in packages.zipfile.ZipFile(path).namelist()}
    assert {"tyro", "tensorboardX", "haiku", "equinox"} <= names
    assert not {"jax", "flax", "numpy", "matplotlib"} & names


def test_pack(tmp_path, monkeypatch, capsys):
    """What --pack writes is what --data-dir reads."""
    source = tmp_path / "source"
    for path, content in (FOLDER | {weights.FILE: WEIGHTS}).items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    with stand_ins():
        args = ["--data-dir", str(source), "--out", str(tmp_path / "out")]
        assert command.main([*args, "--pack", str(tmp_path / "pack")]) == 0
        said = capsys.readouterr().out.splitlines()
        names = [line.split()[0].rpartition("/")[2] for line in said]
        assert names == ["sn-data-1-of-1.zip", packages.NAME]
        assert command.missing_data(Options(data_dir=tmp_path / "pack")) == {}
        for path, content in (FOLDER | {weights.FILE: WEIGHTS}).items():
            assert (tmp_path / "pack" / path).read_bytes() == content
        (tmp_path / "file").write_text("mine")
        assert command.main([*args, "--pack", str(tmp_path / "file")]) == 2
        assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err


# --- Smoke ----------------------------------------------------------------------------------------


RECORDED = dict(np.load(smoke.RECORDED))


def test_recorded_values_are_those_of_the_matrices():
    """Norms, and gradients by the closed form (Miyato et al. 2018, equation 12), in float64."""
    for name, (view, shape) in smoke.VIEWS.items():
        w, gradient = (RECORDED[key].astype(np.float64) for key in (name, f"gradient of {name}"))
        matrix = oracle.matrices(w, view)
        u, v = RECORDED[f"u of {name}"].ravel(), RECORDED[f"v of {name}"].ravel()
        norm = RECORDED[f"sigma of {name}"]
        np.testing.assert_allclose(norm, np.linalg.norm(matrix, 2), rtol=1e-12)
        np.testing.assert_allclose(matrix @ v, norm * u, atol=1e-5 * norm)
        assert w.shape == gradient.shape == shape
        assert abs(np.sum(gradient * w)) < 1e-4, "orthogonal to the kernel"
        if isinstance(view, sn_jax.Matrix):
            cotangent = oracle.matrices(w + 1, view)
            inner = np.sum(cotangent * matrix) / norm
            expected = (cotangent - inner * np.outer(u, v)) / norm
            found = oracle.matrices(gradient, view)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_this_cpu_agrees_with_the_recorded_one(tmp_path, monkeypatch):
    """Two views and one variant of the step here; all of them on an accelerator."""
    views = {name: smoke.VIEWS[name] for name in ("matrix", "flattened")}
    monkeypatch.setattr(smoke, "VIEWS", views)
    monkeypatch.setattr(smoke, "PRECISIONS", ("bfloat16",))
    variant = smoke.steps()["default products"]
    monkeypatch.setattr(smoke, "steps", lambda: {"default products": variant})
    outcome = stages.check(task_of(tmp_path / "smoke"))
    checks = outcome.numbers["checks"]
    assert (outcome.state, outcome.why) == ("done", "")
    assert len(checks) == 2 * (3 + 2) + 4
    assert outcome.numbers["headline"] == "14 of 14 checks met"
    json.dumps(outcome.numbers, allow_nan=False)


def test_rounded_products_are_noticed(tmp_path, monkeypatch):
    """With factors of 11 bits, as TensorFloat-32 has them, or with NaN."""

    def rounded(x):
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)

    found = {}
    for name in ("matrix", "circular"):
        view, shape = smoke.VIEWS[name]
        dense = oracle.matrices(np.full(shape, smoke.COHERENT, np.float32), view)
        u, _, vt = np.linalg.svd(dense, full_matrices=False)
        product = rounded(dense) @ rounded(vt[0])
        found[f"sigma of constant {name}"] = u[:, 0] @ product
    for precision in smoke.PRECISIONS[1:]:
        monkeypatch.setattr(smoke, "PRECISIONS", (precision,))
        monkeypatch.setattr(smoke, "library", lambda kernels: found | {"sigma of matrix": np.nan})
        monkeypatch.setattr(smoke, "steps", dict)
        missed = [check for check in smoke.checks(RECORDED) if not check.met]
        assert [check.name for check in missed] == [f"{what}, {precision}" for what in
                                                    [*found, "sigma of matrix"]]  # fmt: skip
