"""The benchmark's tables and bookkeeping; no times here."""

import importlib
import inspect
import json
import math
import sys
from functools import partial
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import comm, gan, plots, scaling, step, tracking, transform, trees
from experiments.bench import compile as compile_suite
from experiments.bench.timing import Elsewhere, Row, compare, interleaved
from experiments.bench.torch_client import TorchFailed, torch_client

pytestmark = pytest.mark.float32
ROWS = [
    Row("a", "small", "ms", 1.0, 2.0, "flax", 0.5, (0.4, 0.6), target=0.8),
    Row("a", "large", "ms", 3.0, 2.0, "haiku", 1.5, (1.4, 1.6), target=1.0),
    Row("b", "alone", "MB", 12.345),
    Row("b", "nothing added", "MB added", 0.0, 4.0, "all kernels", 0.0, target=0.05),
]


# Rows, table, JSON, pictures.


@pytest.mark.parametrize(
    ("ratio", "spread", "target", "within", "met"),
    [
        (0.9, (0.8, 1.1), 1.0, False, True),
        (1.1, (0.9, 1.2), 1.0, False, False),
        (1.1, (0.9, 1.2), 1.0, True, True),
        (1.1, (1.05, 1.2), 1.0, True, False),
        (1.1, None, 1.0, True, False),
        (1.1, (0.9, 1.2), None, True, None),
    ],
)
def test_met(ratio, spread, target, within, met):
    assert Row("s", "c", "ms", 1, 1, "p", ratio, spread, target, within).met is met


def test_table():
    title, empty, head, *lines = bench.table(ROWS).splitlines()
    assert bench.device() in title
    assert not empty
    assert head.split()[:4] == ["ratio", "quartiles", "target", "ours"]
    assert [line.split() for line in lines] == [
        ["0.500", "0.400-0.600", "<=", "0.8", "met", "1", "2", "ms", "a:", "small", "flax"],
        ["1.500", "1.400-1.600", "<=", "1", "MISSED", "3", "2", "ms", "a:", "large", "haiku"],
        ["12.35", "MB", "b:", "alone"],
        ["0.000", "<=", "0.05", "met", "0", "4", "MB", "added", "b:", "nothing", "added", "all",
         "kernels"],
    ]  # fmt: skip


def test_json():
    *rows, about = json.loads(json.dumps(bench.as_json(ROWS), allow_nan=False))
    assert about.keys() == {"date", "device", "versions", "commit"}
    promised = {"suite", "case", "metric", "ours", "peer", "peer_name", "ratio", "target", "met"}
    assert all(promised <= row.keys() for row in rows)
    assert [row["met"] for row in rows] == [True, False, None, True]
    assert rows[2]["ratio"] is None


def test_pictures(tmp_path):
    plots.save_ratios(tmp_path / "ratios.png", ROWS, "a device")
    curve = [Row("scaling", f"{kind} {n}", "ms", n, n / 2, "floor", 2.0)
             for kind in ("matrix", "leaves") for n in (64, 128)]  # fmt: skip
    rows = [*ROWS, *curve, scaling.growth(*curve[-2:])]
    plots.save_scaling(tmp_path / "curves.png", rows, "a device")
    plots.save_scaling(tmp_path / "part.png", curve[:2], "a device")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_every_suite_is_there():
    assert tuple(bench.SUITES) == get_args(bench.Suite)
    for rows in bench.SUITES.values():
        assert inspect.isgeneratorfunction(rows)
        assert list(inspect.signature(rows).parameters) == ["quick"]


# Times.


def test_interleaved_takes_turns_and_drops_the_first_round():
    order = []

    def elsewhere():
        order.append("c")
        return float(order.count("c"))

    calls = {name: partial(order.append, name) for name in "ab"} | {"c": Elsewhere(elsewhere)}
    seconds = interleaved(calls, rounds=20)
    assert seconds["c"].tolist() == [float(i) for i in range(2, 22)]  # its own times, not ours
    assert seconds["a"].shape == (20,)
    # After c, which leaves the caches cold, the last call made here comes again.
    said, here = "".join(order), ""
    turns = ""
    while said:
        if turns.endswith("c") and said[0] != "c" and here:
            assert said[0] == here
            said = said[1:]
        turns, said = turns + said[0], said[1:]
        here = turns[-1] if turns[-1] != "c" else here
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 21
    assert {*map("".join, map(sorted, rounds))} == {"abc"}, "each once in a round"
    assert {*rounds} == {"abc", "acb", "bac", "bca", "cab", "cba"}, "in every order"


def test_compare_pairs_rounds():
    seconds = {"sn_jax": np.array([1.0, 2, 30]), "x": np.array([2.0, 4, 15]), "y": np.ones(3)}
    x, y = compare("s", "c", seconds, targets={"x": 0.6}, within_spread={"y"})
    assert (x.peer_name, x.ratio, x.spread, x.ours, x.peer) == ("x", 0.5, (0.5, 1.25), 2e3, 4e3)
    assert (x.target, x.within_spread, y.target, y.within_spread) == (0.6, False, None, True)


PEERS = {"haiku": 4.0, "flax.linen": 3.0, "torch hook": 5.0}


def floor_rows(ours, floor, **kwargs):
    seconds = {"sn_jax": ours, **PEERS, transform.FLOOR: floor}
    seconds = {name: np.full(3, value) for name, value in seconds.items()}
    return {row.peer_name: row.target for row in transform.against_floor("c", seconds, **kwargs)}


def test_targets_of_transform():
    found = floor_rows(2.0, 1.5, large=True, backward=True)
    assert found == {"haiku": 1.0, "flax.linen": 0.8, "torch hook": 1.0, "bytes": 1.25}
    assert floor_rows(2.0, 1.5, large=True, backward=False)["flax.linen"] == 1.0
    assert floor_rows(2.0, 1.5, large=False, backward=True)["bytes"] is None
    beaten = floor_rows(2.0, 3.5, large=True, backward=True)
    assert "bytes" not in beaten
    assert beaten["bytes (beaten)"] is None


def test_what_compiling_adds():
    seconds = {"without": np.ones(2), "flax.linen": np.array([3.0, 5]), "sn_jax": np.full(2, 2.0)}
    instructions = {"without": 100, "flax.linen": 300, "sn_jax": 150}
    time, size = compile_suite.added("c", "sn_jax", 0.4, seconds, instructions)
    assert (time.ours, time.peer, time.ratio, time.met) == (1.0, 3.0, 0.375, True)
    assert (size.ours, size.peer, size.ratio) == (50, 200, 0.25)
    assert compile_suite.count_instructions("HloModule x\n  %a = f32[] b()\n  ROOT c = d") == 2


def test_growth():
    few, many = (Row("scaling", f"leaves {n}", "ms", ms) for n, ms in [(10, 2.0), (100, 30.0)])
    assert scaling.growth(few, many).ratio == pytest.approx(1.5)


def test_without_torch(monkeypatch, capsys):
    for python in ("/nowhere/python", "true"):
        monkeypatch.setenv("SN_BENCH_TORCH_PYTHON", python)
        with torch_client() as client:
            assert client is None
        assert capsys.readouterr().err.count("\n") == 1


def test_torch_that_fails_is_left_out(monkeypatch, capsys, tmp_path):
    """A torch that can do nothing: each failure is said in one line, and the rest goes on."""
    (tmp_path / "torch.py").write_text(
        "__version__ = '0'\nset_num_threads = float\n"
        "def from_numpy(x):\n    raise RuntimeError('no memory\\nand more')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SN_BENCH_TORCH_PYTHON", sys.executable)
    with torch_client() as client:
        assert client.version == "0"
        for _ in range(2):
            with pytest.raises(TorchFailed, match=r"^RuntimeError: no memory$"):
                client.ask("gan", "eager", False, 8, 64, np.zeros((8, 8, 8, 3), np.uint8))
        client._process.kill()
        client._process.wait()
        with pytest.raises(TorchFailed, match="its process has ended"):
            client.ask("forward", "hook")
    monkeypatch.setattr(gan, "interleaved", lambda calls, rounds: {k: np.ones(3) for k in calls})
    monkeypatch.setattr(gan, "Engine", lambda *args: None)
    (rows,) = gan.rows(quick=True)
    assert {row.peer_name for row in rows if row.ratio} == {"no SN"}
    said = capsys.readouterr().err.splitlines()
    assert said == [f"torch {kind} is left out: RuntimeError: no memory"
                    for kind in ("eager", "compiled")]  # fmt: skip


def test_peers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flax" or None)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "experiments.bench.peers")
        fresh = importlib.import_module("experiments.bench.peers")
        assert list(fresh.JAX_PEERS) == ["flax.linen", "flax.nnx"]


def test_times_of_a_step(monkeypatch):
    """What is added in per cent, and every way in milliseconds."""
    seconds = {"plain": np.full(3, 0.010), "ours": np.full(3, 0.011), "flax": np.full(3, 0.012)}
    monkeypatch.setattr(step, "train_step", lambda model, x: None)
    monkeypatch.setattr(step, "interleaved", lambda calls, rounds: seconds)

    def model(wrap):
        return None

    added, *times = step.added("case", model, None, target=1.0)
    assert (added.metric, added.ratio) == ("% added", pytest.approx(0.5))
    assert [(row.peer_name, row.metric) for row in times] == [("no SN", "ms"), ("flax.linen", "ms")]
    assert [row.ours for row in times] == pytest.approx([11.0, 11.0])
    assert [row.peer for row in times] == pytest.approx([10.0, 12.0])
    assert all(row.target is None for row in times)
    times = step.added("case", model, None, None, most=1.03)
    assert [row.target for row in times] == [1.03, None]
    assert times[0].met is False


# Data.


def test_trees_are_as_large_as_they_say():
    def megabytes(shapes):
        assert list(shapes) == sorted(shapes)  # the order of the leaves
        return sum(4 * math.prod(shape) for shape in shapes.values()) / 1e6

    assert megabytes(trees.sn_gan_cnn()) == pytest.approx(12, rel=0.05)
    assert megabytes(trees.biggan()) == pytest.approx(250, rel=0.05)
    assert megabytes(trees.vit()) == pytest.approx(340, rel=0.01)


def test_weights_have_a_leading_pair():
    shapes = {"conv_00": (3, 3, 8, 16), "dense_00": (30, 20)}
    for leaf in trees.weights(shapes).values():
        first, second = np.linalg.svd(np.asarray(leaf["w"]).reshape(-1, leaf["w"].shape[-1]))[1][:2]
        assert first > 2.5 * second


def test_walk_drifts_as_it_says():
    start = tracking.gaussian(32)
    first, second = tracking.walk(start, 2)
    for old, new in [(start, first), (first, second)]:
        drift = jnp.linalg.norm(new - old) / jnp.linalg.norm(old)
        assert float(drift) == pytest.approx(tracking.DRIFT, rel=1e-4)


def test_true_norm_of_large_matrices():
    w = np.random.default_rng(0).standard_normal((300, 280))
    assert tracking.true_norm(w) == pytest.approx(np.linalg.norm(w, 2), rel=1e-9)


# What programs for several devices send.


def test_collectives():
    program = """
      %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
      ROOT %b = (f32[3]{0}, f32[]) all-reduce-start(%y, %z), to_apply=%add
      %c = f32[100]{0} add(%all-reduce.1, %d)
    """
    assert comm.collectives(program) == [32, 3, 1]


def test_comm_at_eight_devices():
    (rows,) = comm.rows(quick=True)
    assert {row.case.split(", ")[0] for row in rows} == set(comm.LAYOUTS)
    assert all(row.ours > 0 for row in rows)
    assert all(row.met for row in rows if row.target is not None)


def test_comm_beyond_what_is_compiled(tmp_path):
    def law(devices):
        first, tp = comm.LAYOUTS["FSDP x TP"].mesh_shape(devices)
        return 100 + 64e3 / first + 16e3 / tp

    rows = comm.fitted("FSDP x TP", "update", [(n, law(n)) for n in comm.DEVICES])
    assert [row.ours for row in rows] == pytest.approx([law(n) for n in comm.FITTED])
    assert all("(fitted)" in row.case for row in rows)
    measured = Row("comm", "FSDP x TP, update, 8 devices", "bytes a device", law(8))
    plots.save_comm(tmp_path / "comm.png", [measured, *rows], "a device")
    assert (tmp_path / "comm.png").stat().st_size > 10_000
