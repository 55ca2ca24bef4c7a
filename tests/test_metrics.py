"""Distances between sets of features, and the Inception network that the features are of."""

import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_inception_fixtures import SIZES, image, images, random_arrays
from flax.traverse_util import flatten_dict
from PIL import Image
from tqdm import tqdm

from experiments.cli import UserError
from experiments.data import default_data_dir
from experiments.metrics import __main__ as cli
from experiments.metrics import (
    evaluate,
    extract,
    features,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from experiments.metrics.inception import Inception, embed, enlarge
from experiments.metrics.weights import FILE, folded, inception_params, read_torchscript

pytestmark = pytest.mark.float32

RECORDED = Path(__file__).parent / "fixtures" / "inception.npz"


# --- The Fréchet distance ---------------------------------------------------------------------


def gaussian(rng, mean, covariance_root, n):
    """A sample of n with exactly this mean and this covariance, ``R R^T``."""
    x = rng.standard_normal((n, covariance_root.shape[1]))
    x -= x.mean(0)
    q, _ = np.linalg.qr(x)
    return mean + np.sqrt(n - 1) * q @ covariance_root.T


def test_frechet_distance_against_closed_forms():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0.5, 2, (2, 6))
    means = rng.standard_normal((2, 6))
    # Commuting covariances Q A^2 Q^T and Q B^2 Q^T: |m - n|^2 + |a - b|^2.
    x = gaussian(rng, means[0], q * a, 50)
    y = gaussian(rng, means[1], q * b, 80)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((a - b) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # In two dimensions tr (CD)^(1/2) = sqrt(tr CD + 2 sqrt(det CD)); these do not commute.
    c, d = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    x = gaussian(rng, np.zeros(2), np.linalg.cholesky(c), 50)
    y = gaussian(rng, np.zeros(2), np.linalg.cholesky(d), 50)
    root = np.sqrt(np.trace(c @ d) + 2 * np.sqrt(np.linalg.det(c @ d)))
    expected = np.trace(c) + np.trace(d) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_points_than_dimensions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 40))
    shift = rng.standard_normal(40)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    expected = np.sum(shift**2)
    assert frechet_distance(x, x + shift) == pytest.approx(expected, rel=1e-6)


# --- Other distances --------------------------------------------------------------------------


def test_kernel_distance_against_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 5)) + 1

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    expected = (
        sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
        - 2 * sum(k(x[i], y[j]) for i, j in pairs) / n**2
    )
    result = kernel_distance(x, y, n_subsets=2)
    assert result.mean == pytest.approx(expected, rel=1e-5)
    assert result.std == pytest.approx(0, abs=1e-5)  # every subset is the whole
    assert result.subset_size == 12


def test_kernel_distance_is_unbiased():
    """Of two samples of one distribution it is 0 in the mean, where the biased one is not."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2000, 4))
    result = kernel_distance(x, y, n_subsets=200, subset_size=20)
    error = result.std / np.sqrt(200)
    assert abs(result.mean) < 4 * error
    bias = np.mean((np.sum(x**2, 1) / 4 + 1) ** 3) / 20  # of a diagonal that is left in
    assert bias > 20 * error
    shifted = kernel_distance(x, y + 1, n_subsets=200, subset_size=20)
    assert shifted.mean > 100 * error
    assert shifted == kernel_distance(x, y + 1, n_subsets=200, subset_size=20)


def test_precision_and_recall_count_the_modes():
    rng = np.random.default_rng(0)
    places = np.array([[0.0, 0], [10, 0], [20, 0]])

    def modes(*which):
        return np.concatenate([places[i] + 0.1 * rng.standard_normal((40, 2)) for i in which])

    one = modes(0, 1)
    assert precision_recall(one, one) == (1, 1)
    # It drops a mode of the real ones, and does nothing else.
    precision, recall = precision_recall(modes(0, 1), modes(0))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    # It makes up a mode, and does everything else.
    precision, recall = precision_recall(modes(0, 1), modes(0, 1, 2))
    assert 0.6 < precision <= 2 / 3
    assert recall > 0.9
    assert precision_recall(modes(0), modes(2)) == (0, 0)


def test_precision_by_hand():
    real = np.array([[0.0], [1], [3], [7]])  # with k = 1 the radii are 1, 1, 2, 4
    fake = np.array([[-0.9], [-1.1], [10.9], [11.1], [2]])
    for far in (0, 1000):
        assert precision_recall(real + far, fake + far, k=1).precision == 3 / 5


def test_precision_of_more_points_than_fit_into_a_block():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((1500, 3)), 1.5 * rng.standard_normal((1100, 3))
    distances = np.linalg.norm(real[:, None] - real, axis=-1)
    radii = np.sort(distances, 1)[:, 3]
    inside = np.linalg.norm(fake[:, None] - real, axis=-1) <= radii
    assert precision_recall(real, fake).precision == pytest.approx(inside.any(1).mean(), abs=1e-3)


# --- The network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def torch_names(params) -> dict[str, tuple[int, ...]]:
    """The original's names and shapes of the arrays that make these parameters."""
    shapes = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        layer, _, name = path.rpartition("/conv/")
        if name == "kernel":
            h, w, i, o = leaf.shape
            shapes[f"{layer}/weight"] = (o, i, h, w)
            shapes |= {f"{layer}/{part}": (o,) for part in ("mean", "var", "beta")}
    return shapes


def relative(ours, theirs) -> float:
    return float(np.max(np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)))


def test_the_network_on_random_weights_equals_the_original(records):
    """Every layer, pool and fold; the weights are made here, so that nothing is downloaded."""
    x = jnp.asarray(image(0)[None] / np.float32(128) - 1)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 21_768_352
    params = folded(random_arrays(torch_names(shapes)))
    ours = jax.jit(Inception().apply)({"params": params}, x)
    assert records["random"].std() > 1  # a network that says nothing would be equal too
    assert relative(np.asarray(ours[0]), records["random"]) < 1e-4


@pytest.fixture(scope="module")
def real_params():
    if not (default_data_dir() / FILE).exists():
        pytest.skip(f"{FILE} is not in {default_data_dir()}: make test-slow fetches it")
    return inception_params()


@pytest.mark.parametrize("i", range(len(SIZES)), ids=str)
def test_features_equal_the_original(records, real_params, i):
    ours = np.asarray(jax.jit(embed)(real_params, images()[i][None]))
    assert relative(ours[0], records["real"][i]) < 1e-4


def test_enlarging_starts_at_the_first_pixel_and_does_not_centre():
    x = np.array([[0.0, 8], [16, 40]], np.float32)[None, ..., None]
    expected = [[0, 4, 8, 8], [8, 16, 24, 24], [16, 28, 40, 40], [16, 28, 40, 40]]
    np.testing.assert_allclose(enlarge(x, 4)[0, ..., 0], expected)


class Storage:
    """What a tensor of the file names: FloatStorage, the key of its bytes, place and size."""

    def __init__(self, *pid):
        self.pid = pid


def save_torchscript(path, root, storages):
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return getattr(thing, "pid", None)

    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("some_name/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(root)
        for key, array in storages.items():
            archive.writestr(f"some_name/data/{key}", array.tobytes())


@pytest.fixture
def torch_classes(monkeypatch):
    """Classes that pickle under the names that TorchScript writes."""
    names = {}
    monkeypatch.setitem(sys.modules, "__torch__", types.ModuleType("__torch__"))
    for module, name in [("__torch__.net", "Net"), ("torch", "FloatStorage"),
                         ("torch._utils", "_rebuild_tensor_v2")]:  # fmt: skip
        names[name] = type(name, (), {"__module__": module})
        holder = types.ModuleType(module)
        setattr(holder, name, names[name])
        monkeypatch.setitem(sys.modules, module, holder)
    return names


def test_torchscript_is_read_without_torch(torch_classes, tmp_path):
    class Tensor:
        def __init__(self, offset, shape, strides):
            self.arguments = (storage, offset, shape, strides, False, {})

        def __reduce__(self):
            return torch_classes["_rebuild_tensor_v2"], self.arguments

    array = np.arange(10, dtype="<f4")
    storage = Storage("storage", torch_classes["FloatStorage"], "0", "cpu", 10)
    root, child = torch_classes["Net"](), torch_classes["Net"]()
    vars(root).update(training=True, conv=child, beta=Tensor(1, (3,), (1,)))
    vars(child).update(stride=2, weight=Tensor(4, (3, 2), (2, 1)))
    save_torchscript(tmp_path / "net.pt", root, {"0": array})
    result = read_torchscript(tmp_path / "net.pt")
    assert list(result) == ["conv/weight", "beta"]
    np.testing.assert_array_equal(result["beta"], array[1:4])
    np.testing.assert_array_equal(result["conv/weight"], array[4:].reshape(3, 2))
    child.weight = Tensor(0, (2, 3), (1, 2))
    save_torchscript(tmp_path / "net.pt", root, {"0": array})
    with pytest.raises(pickle.UnpicklingError, match="strides"):
        read_torchscript(tmp_path / "net.pt")


def test_a_file_that_would_run_something_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    save_torchscript(tmp_path / "net.pt", Trap(), {})
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not expected"):
        read_torchscript(tmp_path / "net.pt")
    assert not (tmp_path / "made").exists()


# --- Features of many images ------------------------------------------------------------------

N_PIXELS = 48
RNG = np.random.default_rng(0)
FIRST = RNG.integers(0, 256, (700, 4, 4, 3), np.uint8)


@pytest.fixture
def network(monkeypatch):
    """Instead of Inception: pixels, and a record of how many images were asked for."""

    class Network:
        stop = None

        def __init__(self, data_dir):
            pass

        def __call__(self, batch, bar):
            if len(self.seen) == self.stop:
                raise KeyboardInterrupt
            self.seen.append(len(batch))
            flat = batch.reshape(len(batch), -1)[:, :N_PIXELS]
            return np.pad(flat, [(0, 0), (0, N_PIXELS - flat.shape[1])]).astype(np.float32)

    Network.seen = []
    monkeypatch.setattr(extract, "N_FEATURES", N_PIXELS)
    monkeypatch.setattr(extract, "_Network", Network)
    return Network


def kept(data_dir) -> list[Path]:
    return sorted(data_dir.glob("inception-features/*/*.npz"))


def test_features_are_kept_and_go_on_after_a_kill(network, tmp_path):
    def get(n=None):
        return features(FIRST, n, data_dir=tmp_path, progress=False)

    network.stop = 2
    with pytest.raises(KeyboardInterrupt):
        get()
    network.stop = None
    whole = get()
    assert network.seen == [256, 256, 188]
    # In a fixed random order: each image once.
    assert len(whole) == 700
    pixels = FIRST.reshape(700, -1)
    np.testing.assert_array_equal(np.unique(whole, axis=0), np.unique(pixels, axis=0))
    assert not np.array_equal(whole, pixels)
    # Fewer images are the first of them.
    np.testing.assert_array_equal(get(300), whole[:300])
    assert network.seen == [256, 256, 188]
    # Other images are others.
    other = FIRST.copy()
    other[0, 0, 0, 0] ^= 1
    assert not np.array_equal(features(other, data_dir=tmp_path, progress=False), whole)


def test_batches_are_halved_where_memory_is_short(monkeypatch):
    """And the features are the same; what is no lack of memory is raised."""
    sizes = []

    def embed(params, images):
        sizes.append(len(images))
        if len(images) > limit:
            raise jax.errors.JaxRuntimeError(f"{reason}: 10 GB")
        return images.reshape(len(images), -1)

    monkeypatch.setattr(extract, "inception_params", lambda data_dir: {})
    network = extract._Network(Path("nowhere"))
    monkeypatch.setattr(network, "_embed", embed)
    monkeypatch.setattr(network, "_batch", 64)
    limit, reason = 20, "RESOURCE_EXHAUSTED: Out of memory"
    with tqdm(disable=True) as bar:
        found = network(FIRST[:50], bar)
        np.testing.assert_array_equal(found, FIRST[:50].reshape(50, -1))
        assert sizes == [64, 32, 16, 16, 16, 16]
        limit = 0
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            network(FIRST[:50], bar)
        assert sizes[6:] == [16, 8, 4, 2, 1]
        reason = "INTERNAL"
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            network(FIRST[:50], bar)


@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_features_are_named_kept_and_made_again(network, tmp_path, capsys, damage):
    whole = features(FIRST[:300], data_dir=tmp_path, progress=False)
    victim = kept(tmp_path)[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "other":
        np.savez(victim, features=np.zeros((3, 2048), np.float32))
    else:
        victim.write_bytes(content if damage == "bit" else content[:1000])
    again = features(FIRST[:300], data_dir=tmp_path, progress=False)
    np.testing.assert_array_equal(again, whole)
    assert network.seen == [256, 44, 256]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{victim} is cut or damaged" in line
    assert victim.with_name(f"{victim.name}.damaged").exists()


def test_evaluate_says_how_many_of_each(network, tmp_path):
    fake = FIRST[:400] // 2
    common = {"data_dir": tmp_path, "progress": False}
    result = evaluate(FIRST, fake, n_real=300, n_fake=200, **common)
    assert (result["n_real"], result["n_fake"], result["kid_subset_size"]) == (300, 200, 200)
    x, y = features(FIRST, 300, **common), features(fake, 200, keep=False, **common)
    assert result["fid"] == frechet_distance(x, y) > 0
    assert len(kept(tmp_path)) == 2, "of the real images only"
    assert evaluate(FIRST, fake, **common)["n_real"] == 700


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (FIRST / 255, "not float64 of shape (700, 4, 4, 3)"),
        (FIRST[..., :2], "not uint8 of shape (700, 4, 4, 2)"),
        (FIRST[:3], "3 real images are too few"),
    ],
)
def test_images_that_cannot_be_used(network, bad, said):
    with pytest.raises(UserError) as caught:
        evaluate(bad, FIRST, progress=False)
    assert said in str(caught.value)


# --- The command ------------------------------------------------------------------------------


NUMBERS = dict.fromkeys(["fid", "kid", "kid_std", "precision", "recall"], 0.5) | dict.fromkeys(
    ["kid_subset_size", "n_real", "n_fake"], 9
)


def run(capsys, *args):
    code = cli.main([*map(str, args), "--no-progress"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(network, capsys, tmp_path):
    np.savez(tmp_path / "fake.npz", images=FIRST[:100])
    for i, x in enumerate(FIRST[:40]):
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    command = ["--real", "digits", "--n-real", 200, "--data-dir", tmp_path]
    out = tmp_path / "new" / "result.json"
    code, table, _ = run(capsys, *command, "--fake", tmp_path / "fake.npz", "--out", out)
    assert code == 0
    result = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert (result["n_real"], result["n_fake"]) == (200, 100)
    assert result["real"] == "digits train, 1347 images of 8x8x1"
    assert result["command"].startswith("python -m experiments.metrics --real digits --n-real 200")
    for text in (f"{result['fid']:.2f}", "200   of digits train", "100   of"):
        assert text in table
    code, table, _ = run(capsys, *command, "--fake", tmp_path)
    assert code == 0
    assert "40   of" in table


def test_the_papers_numbers_of_images(capsys, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "evaluate", lambda *_, **options: asked.append(options) or NUMBERS)
    for i, n in enumerate([10_000, 5_000]):
        np.save(tmp_path / f"{i}.npy", np.resize(FIRST[..., :1], (n + 7, 2, 2, 1)))
    pair = ["--real", tmp_path / "0.npy", "--fake", tmp_path / "1.npy"]
    code, table, _ = run(capsys, *pair, "--protocol", "paper")
    assert code == 0
    assert (asked[0]["n_real"], asked[0]["n_fake"]) == (10_000, 5_000)
    assert "10007 images of 2x2x1" in table
    code, _, line = run(capsys, *pair, "--protocol", "common")
    assert code == 2
    assert "50000 images are wanted of --real, which has 10007" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--real", "cifar", "--fake", "digits"], "Unknown data set 'cifar'"),
        (["--real", "digits", "--fake", "{}/text.npz"], "text.npz is damaged, or not"),
        (["--real", "digits", "--fake", "{}/two.npz"], "an .npz file of one array"),
        (["--real", "digits", "--fake", "{}/empty"], "holds no images"),
        (["--real", "digits", "--fake", "digits", "--n-fake", "3"], "n_fake must be at least 4"),
        (["--real", "digits", "--fake", "digits", "--n-fake", "451"], "451 images are wanted"),
        (["--real", "digits", "--fake", "digits", "--n-real", "4", "--protocol", "paper"],
         "leave out --n-real"),
        (["--fake", "digits"], "--real"),
    ],
)  # fmt: skip
def test_wrong_commands(network, capsys, tmp_path, args, said):
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "two.npz", a=FIRST, b=FIRST)
    code, out, line = run(capsys, *[arg.format(tmp_path) for arg in args])
    assert code == 2
    assert line.startswith("error: ")
    assert said in line
    assert len(line.splitlines()) == 1
    assert out == ""


def test_interrupt_says_how_to_go_on(network, capsys, tmp_path):
    network.stop = 0
    code, _, line = run(capsys, "--real", "digits", "--fake", "digits", "--data-dir", tmp_path)
    assert code == 130
    assert "what was done is kept; continue with: python -m experiments.metrics --real" in line
