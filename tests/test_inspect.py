"""python -m sn_jax inspect: every format, what is broken or hostile, and the memory it takes."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from sn_jax.__main__ import main

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
DENSE = RNG.standard_normal((8, 5)).astype(np.float32)
CONV = RNG.standard_normal((3, 3, 2, 4)).astype(np.float32)
TREE = {"Dense_0": {"kernel": DENSE, "bias": np.ones(5, np.float32)}, "Conv_0": {"kernel": CONV}}

# Orbax leaves loops of its own to the garbage collector, whenever that comes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def norm(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64), 2)


def save_orbax(path, tree=TREE):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.StandardSave(tree))


def save_safetensors(path, tensors):
    """The format by hand: the length of a JSON header, the header, the data."""
    header, data = {}, b""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": names[str(x.dtype)], "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def made(kind, folder):
    path = folder / f"checkpoint.{kind}"
    torch_names = {"fc.weight": DENSE.T, "conv1.weight": CONV.transpose(3, 2, 0, 1)}
    if kind == "npz":
        np.savez(path, **{"Dense_0/kernel": DENSE, "Conv_0/kernel": CONV, "step": np.arange(3)})
    elif kind == "msgpack":
        path.write_bytes(serialization.to_bytes({**TREE, "step": 3}))
    elif kind == "orbax":
        save_orbax(path, {**TREE, "step": 3, "list": [np.ones(2, np.float32), None]})
    elif kind == "orbax manager":
        with ocp.CheckpointManager(path) as manager:
            for step, tree in ((3, {}), (10, TREE)):
                tree = tree or {"old": np.ones(2, np.float32)}
                manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    elif kind == "safetensors":
        pytest.importorskip("safetensors")
        arrays = {name: np.ascontiguousarray(x) for name, x in torch_names.items()}
        save_safetensors(path, arrays)
    elif kind == "shards":
        pytest.importorskip("safetensors")
        path.mkdir()
        for i, (name, x) in enumerate(torch_names.items()):
            save_safetensors(path / f"model-{i}.safetensors", {name: np.ascontiguousarray(x)})
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in torch_names.items()}
        nested = {"state_dict": tensors, "epoch": 3}
        torch.save(nested, path, _use_new_zipfile_serialization=kind == "torch")
    return path


KINDS = ["npz", "msgpack", "orbax", "orbax manager", "safetensors", "shards", "torch", "old torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind, tmp_path, capsys):
    path = made(kind, tmp_path)
    options = ["--json", "--certify", "--no-progress", "--sort", "sigma"]
    assert main(["inspect", str(path), *options]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["totals"]["without a view"] == 0
    flat = CONV.reshape(-1, 4)
    by_name = {("conv" if "onv" in w["path"] else "dense"): w for w in found["weights"]}
    assert len(found["weights"]) == 2
    for name, matrix in (("dense", DENSE), ("conv", flat)):
        weight, s = by_name[name], np.linalg.svd(np.float64(matrix), compute_uv=False)
        assert weight["lower"] <= s[0] <= weight["upper"] <= 1.001 * weight["lower"]
        np.testing.assert_allclose(weight["sigma"], s[0], rtol=1e-12)
        np.testing.assert_allclose(weight["stable_rank"], np.sum((s / s[0]) ** 2), rtol=1e-10)
        np.testing.assert_allclose(weight["condition"], s[0] / s[-1], rtol=1e-8)
        np.testing.assert_allclose(weight["spectra"], s[None], rtol=1e-8)
        assert weight["guessed"]
        assert weight["not_finite"] == 0
    sigmas = [w["sigma"] for w in found["weights"]]
    assert sigmas == sorted(sigmas, reverse=True)


def test_what_is_printed(tmp_path, capsys):
    """Stacks by --view, weights that are not finite, types that NumPy lacks, a picture."""
    bad, stack = DENSE.copy(), RNG.standard_normal((3, 6, 4)).astype(np.float32)
    bad[0, 0], bad[1, 1] = np.nan, np.inf
    half = DENSE.astype(ml_dtypes.bfloat16)
    tree = {"layer10": {"w": bad}, "layer2": {"w": half}, "stack": {"w": stack}, "b": {"b": bad[0]},
            "scanned": {"scale": bad}}  # fmt: skip
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.to_bytes(tree))
    picture = tmp_path / "x.png"
    command = ["inspect", str(path), "--no-progress", "--plot", str(picture)]
    assert main([*command, "--view", "stack/.*=Matrix(-2, out_axes=-1)"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["layer2/w", "layer10/w", "stack/w"]
    assert f"{norm(half.astype(np.float64)):.4g}" in lines[1]
    assert "bfloat16" in lines[1]
    assert "5.00%" in lines[2]
    assert f"{max(norm(x) for x in stack):.4g}" in lines[3]
    assert "by name" not in lines[3]
    assert lines[-1].startswith("msgpack: 3 weights, 2 other arrays, 197 parameters, 5 not finite")
    assert picture.stat().st_size > 10_000
    # Without a view, it is said; with None, it is left out.
    assert main(["inspect", str(path), "--no-progress"]) == 0
    assert "none: give --view" in capsys.readouterr().out
    assert main(["inspect", str(path), "--no-progress", "--view", "stack.*=None"]) == 0
    assert "stack" not in capsys.readouterr().out
    # Of larger ones than this, no spectrum, but the norm and the stable rank all the same.
    options = ["--largest-side", "3", "--json", "--no-progress", "--view", "stack.*=Matrix()"]
    assert main(["inspect", str(path), *options]) == 0
    weight = json.loads(capsys.readouterr().out)["weights"][2]
    assert weight["spectra"] is None
    largest = max(stack, key=norm)
    np.testing.assert_allclose(weight["sigma"], norm(largest), rtol=1e-6)
    expected = (np.linalg.norm(largest) / norm(largest)) ** 2
    np.testing.assert_allclose(weight["stable_rank"], expected, rtol=1e-5)


def test_views_are_parsed_and_not_executed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **{"a/kernel": CONV})
    view = "a/.*=sn_jax.Conv((8, 8), strides=2, padding='CIRCULAR')"
    assert main(["inspect", "x.npz", "--no-progress", "--json", "--view", view]) == 0
    assert "Conv((8, 8)" in json.loads(capsys.readouterr().out)["weights"][0]["view"]
    for rule, message in {
        "a/.*=__import__('os').system('touch pwned')": "is no rule",
        "a/.*=Matrix(__import__('os').system('touch pwned'))": "is no rule",
        "a/.*": "write 'regex=Matrix(in_axes, out_axes)'",
        "a/.*=Linear(x)": "is no rule",
        "(=Matrix()": "is no rule",
        "b/.*=Matrix()": "matches no path in full; the closest are: a/kernel",
        "a/.*=Matrix(0, 9)": "a/kernel of shape (3, 3, 2, 4): ",
    }.items():
        assert main(["inspect", "x.npz", "--no-progress", "--view", rule]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not Path("pwned").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_broken_and_hostile_files_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = {kind: made(kind, tmp_path) for kind in ("npz", "msgpack", "orbax")}
    Path("empty").touch()
    Path("folder").mkdir()
    Path("text").write_text("just text")
    Path("evil.bin").write_bytes(pickle.dumps({"w": Evil()}))
    np.savez("evil.npz", w=np.array([Evil()], object))
    Path("cut.npz").write_bytes(whole["npz"].read_bytes()[:-300])
    Path("cut.msgpack").write_bytes(whole["msgpack"].read_bytes()[:100])
    Path("deep.msgpack").write_bytes(b"\x81\xa1a" * 5000 + b"\xc0")
    Path("none.msgpack").write_bytes(serialization.to_bytes({"step": "three"}))
    header = {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    Path("long.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    Path("cut.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{")
    Path("noise.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    with zipfile.ZipFile("huge.npz", "w") as archive:
        shape = str({"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)})
        start = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
        archive.writestr("w.npy", start + shape.ljust(117).encode() + b"\n")
    for file in whole["orbax"].glob("**/d/*"):
        file.unlink()
    files = ["missing", "empty", "folder", "text", "evil.bin", "evil.npz", "cut.npz", "cut.msgpack",
             "deep.msgpack", "none.msgpack", "long.safetensors", "cut.safetensors", "huge.npz",
             "noise.safetensors", str(whole["orbax"])]  # fmt: skip
    if importlib.util.find_spec("torch"):
        import torch

        torch.save({"w": Evil()}, "evil.pt")
        torch.save({"w": torch.ones(30, 30)}, "whole.pt")
        content = Path("whole.pt").read_bytes()
        Path("cut.pt").write_bytes(content[: len(content) // 2])
        files += ["evil.pt", "cut.pt"]
    for file in files:
        assert main(["inspect", file, "--no-progress"]) == 2, file
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {file}"), (file, captured.err)
        assert len(captured.err.splitlines()) == 1, (file, captured.err)
        assert captured.out == ""
    assert not Path("pwned").exists()


def test_a_library_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    save_safetensors(tmp_path / "x.safetensors", {"w": DENSE})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--no-progress"]) == 2
    assert "takes safetensors: pip install 'sn_jax[inspect]'" in capsys.readouterr().err


MEMORY = """
import json, resource, sys
from pathlib import Path
from sn_jax import __main__

small, large, margin = sys.argv[1:]

def kilobytes(field):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])

most = 0
looked_at = __main__._inspect.looked_at
def watched(leaves, *args, **options):
    def each(leaves):
        global most
        for leaf in leaves:
            yield leaf
            most = max(most, kilobytes("RssAnon"))
    return looked_at(leaves, *args, **options | {"progress": each})
__main__._inspect.looked_at = watched

assert __main__.main(["inspect", small, "--no-progress"]) == 0
used, most = kilobytes("VmData"), 0
before = kilobytes("RssAnon")
limit = (used << 10) + (int(margin) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert __main__.main(["inspect", large, "--no-progress"]) == 0
print(json.dumps((most - before) / 1024))
"""
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped on Linux")
@pytest.mark.parametrize("kind", ["safetensors", "orbax", "torch", "npz"])
def test_a_file_of_500_mb_is_read_leaf_by_leaf(kind, tmp_path):
    """Under a limit of the system's, which counts stacks of orbax's threads and torch's map of the
    file, too, whose pages are not the process's own."""

    def arrays(mib, n):
        return {f"layer{i}/bias": np.zeros(mib * MIB // 4, np.float32) for i in range(n)}

    paths = []
    for name, mib, n in (("small", 1, 2), ("large", 20, 25)):
        path = tmp_path / name
        if kind == "orbax":
            save_orbax(path, arrays(mib, n))
        elif kind == "npz":
            path = path.with_suffix(".npz")
            np.savez(path, **arrays(mib, n))
        elif kind == "torch":
            torch = pytest.importorskip("torch")
            torch.save({k: torch.tensor(x) for k, x in arrays(mib, n).items()}, path)
        else:
            pytest.importorskip("safetensors")
            entries = {f"l{i}.bias": {"dtype": "F32", "shape": [mib * MIB // 4],
                                      "data_offsets": [i * mib * MIB, (i + 1) * mib * MIB]}
                       for i in range(n)}  # fmt: skip
            text = json.dumps(entries).encode()
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + n * mib * MIB)
        paths.append(path)
    margin = 200 + {"torch": 500, "orbax": 200}.get(kind, 0)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths), str(margin)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) < 300


def test_as_a_program_without_any_extra(tmp_path):
    """msgpack and npz take what is always there; the exit codes are the shell's."""
    path = made("npz", tmp_path)
    code = """
import sys
for name in ("torch", "orbax", "safetensors", "matplotlib"):
    sys.modules[name] = None
from sn_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "Dense_0/kernel" in result.stdout
    plot = subprocess.run([*command, "--plot", "x.png"], capture_output=True, text=True, cwd=ROOT)
    assert plot.returncode == 2
    assert "--plot takes matplotlib: pip install 'sn_jax[inspect]'" in plot.stderr
