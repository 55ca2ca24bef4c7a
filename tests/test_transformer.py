"""The transformer example, in its fast mode, alone and on a mesh of eight devices."""

import json
import sys

import numpy as np
import pytest
from test_sharding import run_on_devices

from experiments.cli import UserError
from experiments.mesh import layout, make_mesh
from experiments.transformer import __main__ as transformer
from experiments.transformer import muon, train

pytestmark = pytest.mark.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transformer")


@pytest.fixture
def quick(folder):
    """Made once, but by a test, with JAX's defaults."""
    if not any(folder.iterdir()):
        assert transformer.main(["--quick", "--no-progress", "--out", str(folder)]) == 0
    return folder


@pytest.mark.xdist_group("transformer")
def test_three_ways(quick):
    results = {path.stem: json.loads(path.read_text()) for path in quick.glob("*.json")}
    assert set(results) == {"baseline", "reparam", "projection"}
    for result in results.values():
        history = result["history"]
        assert history["loss"][-1] < 0.9 * history["loss"][0]
        assert all(0 <= e <= np.log(32) + 1e-5 for e in history["maximum entropy"])
        for norm in result["norms"].values():
            assert np.all(np.less_equal(norm["lower"], norm["upper"]))
    # One path per kind of kernel, one norm per layer.
    norms = results["projection"]["norms"]
    assert len(norms["blocks/query/kernel"]["upper"]) == transformer.QUICK["depth"]
    # Projected by an estimate: near the ball, where the unconstrained kernels left it.
    largest = {method: max(np.max(norm["upper"]) for norm in result["norms"].values())
               for method, result in results.items()}  # fmt: skip
    assert largest["projection"] < 2.2 < largest["baseline"]
    # gamma W / sigma: what is certified is gamma, but for the estimate of sigma.
    reparam = results["reparam"]
    assert largest["reparam"] == pytest.approx(reparam["history"]["largest sigma"][-1], rel=0.1)
    assert (quick / "curves.png").stat().st_size > 10_000


@pytest.mark.xdist_group("transformer")
def test_a_finished_way_is_not_run_again(quick, monkeypatch, capsys):
    monkeypatch.setattr(transformer, "train", None)
    assert transformer.main(["--quick", "--no-progress", "--out", str(quick)]) == 0
    (quick / "reparam.json").write_text("{")
    with pytest.raises(TypeError):  # it would be
        transformer.main(["--quick", "--no-progress", "--out", str(quick)])
    assert "reparam.json is broken" in capsys.readouterr().err
    assert (quick / "reparam.broken").exists()


@pytest.mark.xdist_group("transformer")
def test_on_a_mesh_it_trains_alike(quick, tmp_path):
    alone = json.loads((quick / "projection.json").read_text())
    options = ["--quick", "--no-progress", "--mesh", "fsdp=4,tp=2", "--method", "projection"]
    command = [sys.executable, "-m", "experiments.transformer", *options, "--out", str(tmp_path)]
    result = run_on_devices(command)
    assert result.returncode == 0, result.stderr
    spread = json.loads((tmp_path / "projection.json").read_text())
    assert spread["mesh"] == {"fsdp": 4, "tp": 2}
    for name, values in alone["history"].items():
        np.testing.assert_allclose(spread["history"][name], values, rtol=2e-3, err_msg=name)


def test_muon_stays_on_its_spheres(tmp_path):
    """The recipe of docs/spectra.md, in its fast mode: near the radii, which Muon alone leaves."""
    assert muon.main(["--quick", "--no-progress", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "muon.json").read_text())["ways"]
    largest = {way: max(result["history"]["largest sigma / R"]) for way, result in results.items()}
    assert largest["sphere"] < 1.15 < 1.5 < largest["free"]
    assert min(results["sphere"]["history"]["least sigma / R"]) > 1 - 1e-4
    for result in results.values():
        assert result["history"]["loss"][-1] < 0.9 * result["history"]["loss"][0]
    assert (tmp_path / "muon.png").stat().st_size > 10_000
    assert (tmp_path / "sphere.msgpack").exists()
    assert muon.main(["--c", "0", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=4,tp=2", "needs 8 devices, but JAX finds 1"),
        ("data=1", "is not a size of fsdp or tp"),
        ("fsdp=0", "is not a size of fsdp or tp"),
    ],
)
def test_meshes_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        make_mesh(text, ("fsdp", "tp"))


def test_a_mesh_that_does_not_divide_a_kernel():
    class Mesh:
        shape = {"fsdp": 4, "tp": 3}  # noqa: RUF012

    params = {"head": {"kernel": np.zeros((32, 256))}}
    message = r"head/kernel of shape \(32, 256\) cannot be split into 3 along axis 1.*tp=3"
    with pytest.raises(UserError, match=message):
        layout(params, train.LAYOUT, Mesh())


def test_options_that_cannot_be(capsys):
    assert transformer.main(["--heads", "3"]) == 2
    assert "3 heads do not divide the width" in capsys.readouterr().err


def test_batches_follow_from_seed_and_step():
    tokens, sizes = train.text(10_000), train.Sizes(8, 1, 1, context=16, batch=4)
    batch = train.batches(tokens, sizes, seed=3)
    np.testing.assert_array_equal(batch(5), train.batches(tokens, sizes, seed=3)(5))
    assert batch(5).shape == (4, 17)
    assert not np.array_equal(batch(5), batch(6))
