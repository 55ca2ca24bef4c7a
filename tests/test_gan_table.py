"""The engine's files, and the table of methods with its figures."""

import dataclasses
import json
import shlex
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event

from experiments.cli import parse
from experiments.gan import __main__ as cli
from experiments.gan import evaluate, loop, run, table2
from experiments.gan.train import PRESETS, Config, Data, make_training

pytestmark = [pytest.mark.float32, pytest.mark.xdist_group("gan methods")]

OPTIONS = {"width": 2, "batch_size": 8, "size": 4, "log_every": 2, "progress": False,
           "loss": "non-saturating"}  # fmt: skip


@pytest.fixture
def data():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    return Data(images, np.arange(40, dtype=np.int32) % 10)


@pytest.fixture
def judge(monkeypatch):
    """Instead of a trained classifier: class by the mean brightness, features of 2x2 corners."""

    def judge(x):
        classes = np.clip((x.mean((1, 2, 3)) + 1) * 5, 0, 9).astype(int)
        return np.eye(10)[classes] * 0.9 + 0.01, x[:, :2, :2, 0].reshape(len(x), 4)

    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: judge)
    run._judge.cache_clear()
    yield
    run._judge.cache_clear()


def events(out):
    """step -> tag -> value, as TensorBoard reads the files: what a restart purges is gone."""
    found = {}
    for path in sorted(out.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found = {step: tags for step, tags in found.items() if step < event.step}
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_a_run_in_pieces_is_the_run(data, tmp_path):
    config = Config(**OPTIONS, normalization="none", steps=7, out=tmp_path / "whole")
    config.out.mkdir()
    _, whole = loop.train(config, data, 10)
    pieces = dataclasses.replace(config, out=tmp_path / "pieces", minutes=1e-9)
    pieces.out.mkdir()
    for step in range(1, 7):
        with pytest.raises(loop.Paused, match=f"step {step} of 7 is saved"):
            loop.train(pieces, data, 10)
    _, last = loop.train(pieces, data, 10)
    jax.tree.map(np.testing.assert_array_equal, whole, last)
    for out in (config.out, pieces.out):
        seen = events(out)
        assert list(seen) == [2, 4, 6, 7]
        for row in loop.read_rows(out):
            tags = seen[row["step"]]
            assert tags["loss_d"] == pytest.approx(row["loss_d"], rel=1e-6)
            assert tags["sigma_bar/Conv_0/kernel"] == pytest.approx(
                row["sigma_bar"]["Conv_0/kernel"], rel=1e-6
            )


def test_a_pause_is_no_error(capsys, monkeypatch, tmp_path):
    def paused(config):
        raise loop.Paused("step 3 of 9 is saved")

    monkeypatch.setattr(cli, "run", paused)
    assert cli.main(["--minutes", "1", "--out", str(tmp_path / "run")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "Paused: step 3 of 9 is saved; continue with: python -m experiments.gan --minutes 1 "
        f"--out {tmp_path / 'run'} --resume"
    )


def test_what_is_not_finite_is_never_saved(data, tmp_path, monkeypatch):
    def made(*args):
        training = make_training(*args)

        def step(state, data):
            state, losses = training.step(state, data)
            if int(state.step) == 6:  # after the row's step, at the checkpoint's
                kernel = state.d_params["Dense_0"]["kernel"]
                state.d_params["Dense_0"]["kernel"] = kernel.at[0].set(jnp.nan)
            return state, losses

        return training._replace(step=step)

    monkeypatch.setattr(loop, "make_training", made)
    options = OPTIONS | {"log_every": 5}
    config = Config(**options, normalization="none", steps=9, checkpoint_every=3, out=tmp_path)
    with pytest.raises(loop.Diverged, match=r"before step 6.*the checkpoint of step 3 is, and st"):
        loop.train(config, data, 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_presets_are_where_options_start():
    config = cli.options(["--preset", "resnet-authors", "--n-dis", "1"])
    assert config.architecture == "resnet-authors"
    assert config.adam() == (2e-4, 0.0, 0.9, 1)
    assert (config.batch_size, config.g_batch_size, config.steps) == (64, 128, 50_000)
    assert config.schedule == "linear"
    config = cli.options(["--preset", "cosgrove"])
    assert config.adam() == (2e-4, 0.0, 0.9, 5)
    assert (config.steps, config.schedule, config.iterate) == (2000 * 781, "epochs", "forward")
    assert config.same_real
    for name in PRESETS:
        assert cli.options(["--preset", name]).preset == name
    assert cli.options([]) == Config()


def test_prolonging_a_linear_schedule_is_another_run(capsys, tmp_path):
    config = Config(schedule="linear", steps=5, out=tmp_path / "run", resume=True)
    assert run.open_folder(config) is None
    with pytest.raises(loop.UserError, match="steps is 5 there and 6 here"):
        run.open_folder(dataclasses.replace(config, steps=6))


def test_a_run_of_before_an_option_goes_on(tmp_path):
    config = Config(out=tmp_path / "run", resume=True)
    run.open_folder(config)
    path = config.out / "config.json"
    before = {k: v for k, v in json.loads(path.read_text()).items() if k != "iterate"}
    path.write_text(json.dumps(before))
    assert run.open_folder(config) is None
    path.write_text(json.dumps(before))
    with pytest.raises(loop.UserError, match="iterate is update there and forward here"):
        run.open_folder(dataclasses.replace(config, iterate="forward"))


def test_images_without_classes(tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i}.png")
    args = ["--dataset", f"{tmp_path / 'images'}", "--width", "2", "--batch-size", "8", "--steps",
            "1", "--out", f"{tmp_path / 'run'}", "--no-progress", "--size", "4",
            "--normalization", "none", "--loss", "non-saturating"]  # fmt: skip
    assert cli.main(args) == 0
    assert "no classes, so no classifier judged" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["quality"] is None
    assert summary["images"] == "resized from 5x6 to 4x4"
    assert summary["memory"]["process_peak_bytes"] > 2**20


# --- The table ----------------------------------------------------------------------------------


def test_every_row_is_one_command():
    """The command that a table says is the row's run."""
    for rows in table2.PRESETS.values():
        for name, config in rows.items():
            if config.setting not in "CE" or config.seed:  # as these, and parsing takes its time
                continue
            words = shlex.split(table2.command(config))
            assert words[:3] == ["python", "-m", "experiments.gan"]
            parsed = parse(Config, "test", words[3:])
            assert parsed.identity() == config.identity(), name
            assert (parsed.fid, parsed.fid_every) == (config.fid, config.fid_every)


def test_presets_have_the_rows_that_they_promise():
    tiny, small, cifar10 = (
        list(table2.PRESETS[name]) for name in ("tiny", "small", "cifar10-small")
    )
    assert len(tiny) == 7 * 3 + (2 + 3) * 2 * 3
    assert cifar10 == ["none, C, seed 0", "SN, C, seed 0", "WGAN-GP, C, seed 0",
                       "none, E, seed 0", "SN, E, seed 0"]  # fmt: skip
    assert small == [f"{m}, C, seed 0" for m in ("none", "SN", "WN", "WGAN-GP")]
    paper = {config.normalization for config in table2.PRESETS["paper"].values()}
    assert paper == {options["normalization"] for options in table2.METHODS.values()}


def test_a_table_is_resumed_and_says_what_is_missing(monkeypatch, capsys, tmp_path, judge):
    base = Config(**OPTIONS, normalization="none", steps=3)
    rows = {
        "none, C, seed 0": base,
        "none, A, seed 0": dataclasses.replace(base, setting="A"),
        "clip, C, seed 0": dataclasses.replace(base, normalization="clip"),
        "SN, C, seed 0": dataclasses.replace(base, normalization="sn"),
    }
    monkeypatch.setitem(table2.PRESETS, "tiny", rows)
    made, trained = table2.run, []

    def recorded(config):
        trained.append((config.normalization, config.setting))
        if config.normalization == "clip":
            raise loop.Diverged(2, 0)
        return made(config)

    draw = table2.draw
    monkeypatch.setattr(table2, "run", recorded)
    monkeypatch.setattr(table2, "draw", lambda *args: None)  # at the end, for the test's time
    monkeypatch.setattr(table2, "times", lambda configs: pytest.fail("rows are missing"))
    args = ["--out", str(tmp_path), "--no-progress"]
    for name in ("none, A, seed 0", "none, C, seed 0", "clip, C, seed 0"):
        assert table2.main([*args, "--row", name]) == 0
    assert trained == [("none", "A"), ("none", "C"), ("clip", "C")]
    text = (tmp_path / "table.md").read_text()
    assert "Not run: SN, C, seed 0." in text
    assert "| diverged before update 2 |" in text
    assert text.count("| not converged |") == 2

    ratios = {"none": {"seconds_per_100": 2.0, "ratio": 1.0, "quartiles": [1.0, 1.0]}}
    monkeypatch.setattr(table2, "times", lambda configs: ratios)
    monkeypatch.setattr(table2, "draw", draw)
    assert table2.main(args) == 0  # the last row only
    monkeypatch.setattr(table2, "draw", lambda *args: None)
    assert table2.main(args) == 0  # nothing
    shutil.rmtree(tmp_path / "runs")  # what the table has of runs that are gone stays
    (tmp_path / "times.json").unlink()
    assert table2.main(args) == 0
    assert trained[3:] == [("sn", "C")]
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["not_run"] == []
    assert results["times"] == ratios
    assert [row["name"] for row in results["rows"]] == list(rows)
    (clip,) = (row for row in results["rows"] if row["method"] == "clip")
    assert clip["diverged_at"] == 2
    for row in results["rows"]:
        wanted = {"method", "setting", "loss", "seed", "g_updates"}
        if row is not clip:
            wanted |= {"n_real", "n_fake", "frechet", "coverage", "seconds", "device"}
        assert wanted <= set(row)
    assert set(results["spectra"]) == set(results["sigma_bar"]) == {"none", "SN"}
    for values in results["spectra"]["SN"].values():
        assert values[0] == pytest.approx(1, abs=0.05)
        assert values == sorted(values, reverse=True)
    table = (tmp_path / "table.md").read_text()
    assert "| SN | C | 0 | non-saturating |" in table
    assert "| 29.3 |" in table  # the paper's SN
    # Methods over settings; the samples of these networks lack classes.
    (none,) = (line for line in table.splitlines() if line.startswith("| none |") and "*" in line)
    assert len(none.split("|")) == 6
    assert "| clip |  | diverged | 42.6 |" in table
    for name in ("figure1", "figure3", "figure9", "figure10"):
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.02

    # What a folder holds of another run does not count: it is prolonged.
    rows["none, A, seed 0"] = dataclasses.replace(rows["none, A, seed 0"], steps=4)
    assert table2.main(args) == 0
    assert trained[4:] == [("none", "A")]
    (row,) = (r for r in json.loads((tmp_path / "results.json").read_text())["rows"]
              if r["name"] == "none, A, seed 0")  # fmt: skip
    assert row["g_updates"] == 4


def test_times_are_taken_in_turns(tmp_path):
    base = Config(**OPTIONS, normalization="none", steps=3)
    configs = {
        "none, C, seed 0": base,
        "SN, C, seed 0": dataclasses.replace(base, normalization="sn"),
        "SN, A, seed 0": dataclasses.replace(base, normalization="sn", setting="A"),
    }
    times = table2.times(configs, updates=1, rounds=2)
    assert list(times) == ["none", "SN"]
    assert times["none"]["ratio"] == 1
    assert all(time["seconds_per_100"] > 0 for time in times.values())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--preset", "large"], "invalid choice 'large' for argument '--preset'"),
        (["--row", "SN, X, seed 0"], "no row 'SN, X, seed 0': choose from none, C, seed 0"),
    ],
)
def test_wrong_options_of_the_table(capsys, args, said):
    assert table2.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_cell_is_the_mean_of_its_seeds():
    rows = [{"frechet": x, "coverage": 10, "n_classes": 10} for x in (2.0, 3.0, 7.0)]
    assert table2.cell(rows, "frechet") == "4.0 (2.0 to 7.0)"
    assert table2.cell(rows[:1], "frechet") == "2.0"
    assert table2.cell([rows[0] | {"coverage": 9}], "frechet") == "2.0*"
    assert table2.cell([rows[0], {"diverged_at": 3}], "frechet") == "diverged"
    assert table2.cell([], "frechet") == ""


def test_a_row_with_its_own_hyperparameters_says_so():
    rows = table2.study({}, (["SN", "ResNet SN hinge"], "A", [0]))
    assert list(rows) == ["SN, A, seed 0", "ResNet SN hinge, own, seed 0"]


def test_kid_on_the_way_is_in_the_row_and_drawn(tmp_path):
    config = Config(fid=("50/50", "200/200"), fid_every=500, steps=1000, out=tmp_path / "run")
    config.out.mkdir()
    numbers = {"precision": 0.5, "recall": 0.1, "fid": 9.0}
    measured = [{"step": step, "n_real": n, "n_fake": n, "kid": 1 / (step + n)} | numbers
                for step, n in [(500, 50), (1000, 50), (1000, 200)]]  # fmt: skip
    (config.out / "fid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
    quality = {"class_fractions": [0.5, 0.5], "n_real": 9, "n_fake": 9, "frechet_fake": 1.0,
               "frechet_real": 0.5, "confidence_fake": 0.9}  # fmt: skip
    summary = {"config": config.identity(), "fid": measured[-1:], "quality": quality,
               "images": "as they come", "seconds": {"training": 1.0}}  # fmt: skip
    (config.out / "summary.json").write_text(json.dumps(summary))
    row = table2.collect("SN, C, seed 0", config)
    assert row["kid"] == measured[-1]["kid"], "of most images"
    assert row["kid_on_the_way"] == {"images": 50, "points": [(500, 1 / 550), (1000, 1 / 1050)]}
    table2.draw(tmp_path, {"preset": "x", "rows": [row], "spectra": {}})
    assert (tmp_path / "kid.png").stat().st_size > 10_000
