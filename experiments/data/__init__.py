"""Real images for the experiments, as uint8 arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.cli import UserError
from experiments.data.fetch import fetch
from experiments.data.folder import read_folder
from experiments.data.official import SOURCES, Images, ImageSource

__all__ = ["Dataset", "Split", "default_data_dir", "load", "read_folder"]

Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
Split = Literal["train", "test"]


def load(
    name: str,
    split: str,
    data_dir: Path | None = None,
    *,
    sources: Mapping[str, ImageSource] = SOURCES,
) -> Images:
    """Load one split of a data set; what is not there yet is fetched, and verified.

    Args:
      name: which images.
        "digits": the 1,797 handwritten digits of 8x8 pixels inside scikit-learn's wheel. They
        come without a split: a fixed, stratified quarter of them is "test".
        "mnist", "fashion-mnist" (28x28x1) and "cifar10" (32x32x3): the official files.
        A path with images: see ``read_folder``. Its sub-folders "train" and "test" are the split
        if it has both; otherwise a fixed random quarter is "test".
      split: "train" or "test".
      data_dir: where the official files or archives lie or shall lie: ``cifar-10-binary.tar.gz``
        or ``cifar-10-batches-bin/``, ``mnist/``, ``fashion-mnist/``. None: the user's cache.
      sources: where the official files come from, by name.

    Returns:
      images: uint8, (n, height, width, channels).
      labels: int32, (n,); all 0 for a folder without sub-folders.

    Raises:
      UserError: unknown name or split, images that cannot be used, files that cannot be fetched.

    Example:
      >>> images, labels = load("digits", "train")
      >>> images.shape, images.dtype, labels.max()
      ((1347, 8, 8, 1), dtype('uint8'), np.int32(9))
    """
    if split not in get_args(Split):
        raise UserError(f"Unknown split {split!r}: choose from {', '.join(get_args(Split))}.")
    if name == "digits":
        return _digits(split)
    if name in sources:
        data_dir = default_data_dir() if data_dir is None else data_dir
        fetch(sources[name], data_dir)
        return sources[name].read(data_dir, split)
    if Path(name).is_dir():
        return _folder(Path(name), split)
    raise UserError(
        f"Unknown data set {name!r}: choose from {', '.join(get_args(Dataset))}, "
        "or give a folder of images."
    )


def default_data_dir() -> Path:
    """The folder of this user's cache where data sets and feature networks are kept."""
    import pooch

    return Path(pooch.os_cache("sn_jax"))


def _digits(split: str) -> Images:
    # Imported where used: scikit-learn takes a second to load, and only this data set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    rows = train if split == "train" else test
    return images[rows], labels[rows]


def _folder(path: Path, split: str) -> Images:
    if all((path / name).is_dir() for name in get_args(Split)):
        return read_folder(path / split)
    images, labels = read_folder(path)
    if len(images) < 4:
        raise UserError(f"{path} holds {len(images)} images: a quarter is kept for test, give 4.")
    order = np.random.default_rng(0).permutation(len(images))
    n_test = len(images) // 4
    rows = np.sort(order[n_test:] if split == "train" else order[:n_test])
    return images[rows], labels[rows]
