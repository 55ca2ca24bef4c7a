"""The headline runs from end to end, in little: ``make test-slow``, about two minutes."""

import json

import pytest
from test_data import PACKED, small

from experiments.cli import UserError
from experiments.data import default_data_dir
from experiments.data.fetch import fetch
from experiments.data.official import SOURCES
from experiments.gan.__main__ import main
from experiments.metrics.weights import FILE, SOURCE

pytestmark = [pytest.mark.float32, pytest.mark.slow]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An archive of CIFAR-10's format with 300 images to train on, and the Inception network."""
    try:
        fetch(SOURCE, default_data_dir())
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(SOURCES, "cifar10", small("http://127.0.0.1:9/")["cifar10"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-binary.tar.gz").write_bytes(PACKED)
    (tmp_path / "data" / FILE).parent.mkdir()
    (tmp_path / "data" / FILE).symlink_to(default_data_dir() / FILE)
    return tmp_path / "data"


def test_train_and_measure(data_dir, tmp_path, capsys):
    """Twenty updates of the whole network and FID of 256 images, in two pieces."""
    out = tmp_path / "run"
    command = ["--preset", "cifar10-cnn-hinge", "--steps", "20", "--batch-size", "8",
               "--log-every", "10", "--checkpoint-every", "10", "--fid", "64/64", "256/256",
               "--fid-every", "10", "--data-dir", str(data_dir), "--out", str(out),
               "--no-progress"]  # fmt: skip
    assert main([*command, "--minutes", "0.001"]) == 0
    assert "is saved; continue with: python -m experiments.gan" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "fid.jsonl").read_text().splitlines()]
    assert [(row["step"], row["n_real"], row["n_fake"]) for row in rows] == [
        (10, 64, 64), (20, 64, 64), (20, 256, 256)
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["fid"] == rows[1:]
    # Noise against a network that was hardly trained: far from everything, and finite.
    assert all(200 < row["fid"] < 600 for row in rows)
    assert f"{rows[2]['fid']:.2f}" in table
    assert "256 generated, 256 training images" in table
    for name in ("samples.png", "curves.png", "fid.png", "spectra.png"):
        assert (out / name).stat().st_size > 5000
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20]
