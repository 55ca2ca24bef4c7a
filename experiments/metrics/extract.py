"""Inception features of many images, kept as they are made; and what follows from them."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.cli import UserError, usable, write_bytes
from experiments.data import default_data_dir
from experiments.data.fetch import put_aside
from experiments.metrics.distances import frechet_distance, kernel_distance, precision_recall
from experiments.metrics.inception import N_FEATURES, embed
from experiments.metrics.weights import MD5, inception_params

# Numbers of real and of generated images: Miyato et al. (2018), and Heusel et al. (2017) and
# most since. A smaller number gives a larger FID of the same generator.
PROTOCOLS = {"paper": (10_000, 5_000), "common": (50_000, 50_000)}

_CHUNK = 256  # images a file; every batch size divides it


def features(
    images: np.ndarray,
    n: int | None = None,
    *,
    keep: bool = True,
    data_dir: Path | None = None,
    progress: bool = True,
    label: str = "Inception features",
) -> np.ndarray:
    """Inception features of the first n images in a fixed random order.

    On a CPU core this takes an eighth of a second an image. What is done is kept, 8 KB an image,
    below ``data_dir/inception-features`` under a checksum of the images: a killed call goes on,
    and a larger n begins with the features of a smaller one.

    Args:
      images: uint8, (N, h, w, 1 or 3).
      n: how many; None: all of them, and the order does not matter.
      keep: False neither reads nor writes kept features.
      data_dir: where weights and features are kept; None: the user's cache.
      label: what the progress bar says.

    Returns:
      float32, (n, 2048).

    Raises:
      UserError: there are fewer images, they are not 8-bit grey or colour images, or the weights
        cannot be fetched.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise UserError(
            "Images must be uint8 of shape (n, h, w, 1 or 3), not "
            f"{images.dtype} of shape {images.shape}."
        )
    n = len(images) if n is None else n
    if n > len(images):
        raise UserError(f"{n} images are wanted and there are {len(images)}: ask for fewer.")
    data_dir = default_data_dir() if data_dir is None else data_dir
    order = np.random.default_rng(0).permutation(len(images))[:n]
    folder = data_dir / "inception-features" / _checksum(images) if keep else None
    network = None
    chunks = []
    with tqdm(desc=label, total=n, unit="image", disable=not progress) as bar:
        for start in range(0, n, _CHUNK):
            rows = order[start : start + _CHUNK]
            chunk = _kept(folder, start, len(rows)) if keep else None
            if chunk is None:
                network = network or _Network(data_dir)
                chunk = network(images[rows], bar)
                if keep:
                    _keep(folder, start, chunk)
            else:
                bar.update(len(rows))
            chunks.append(chunk)
    return np.concatenate(chunks)


def evaluate(
    real: np.ndarray,
    fake: np.ndarray,
    *,
    n_real: int | None = None,
    n_fake: int | None = None,
    keep_fake: bool = False,
    data_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """FID, KID, precision and recall of generated images.

    Args:
      real: uint8, (N, h, w, 1 or 3); their features are kept.
      fake: uint8, (M, h, w, 1 or 3).
      n_real: how many real images, drawn at random; None: all of them.
      n_fake: how many generated ones; None: all of them.
      keep_fake: whether to keep the features of the generated images too.
      data_dir: where weights and features are kept; None: the user's cache.

    Returns:
      ``fid``, ``kid`` (mean over subsets), ``kid_std``, ``kid_subset_size``, ``precision``,
      ``recall``, ``n_real`` and ``n_fake``, which belong to every one of the numbers.

    Raises:
      UserError: too few images, or as ``features``.
    """
    n_real = len(real) if n_real is None else n_real
    n_fake = len(fake) if n_fake is None else n_fake
    for kind, count in [("real", n_real), ("generated", n_fake)]:
        if count < 4:
            raise UserError(f"{count} {kind} images are too few: 4 is the least.")
    common = {"data_dir": data_dir, "progress": progress}
    x = features(real, n_real, label="Real images", **common)
    y = features(fake, n_fake, label="Generated images", keep=keep_fake, **common)
    kid = kernel_distance(x, y)
    return {
        "fid": frechet_distance(x, y),
        "kid": kid.mean,
        "kid_std": kid.std,
        "kid_subset_size": kid.subset_size,
        **precision_recall(x, y)._asdict(),
        "n_real": len(x),
        "n_fake": len(y),
    }


class _Network:
    """The jitted network with its weights on the device, for any number of images."""

    def __init__(self, data_dir: Path) -> None:
        self._params = jax.device_put(inception_params(data_dir))
        self._embed = jax.jit(embed)
        self._batch = 16 if jax.default_backend() == "cpu" else _CHUNK

    def __call__(self, images: np.ndarray, bar: tqdm) -> np.ndarray:
        done, start = [], 0
        while start < len(images):
            batch = images[start : start + self._batch]
            padding = [(0, self._batch - len(batch)), (0, 0), (0, 0), (0, 0)]
            padded = np.pad(batch, padding)  # one shape, one compilation
            try:
                found = np.asarray(self._embed(self._params, padded))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self._batch == 1:
                    raise
                self._batch //= 2  # an image's features do not depend on the others
                continue
            done.append(found[: len(batch)])
            start += len(batch)
            bar.update(len(batch))
        return np.concatenate(done)


# --- Kept features ----------------------------------------------------------------------------


def _checksum(images: np.ndarray) -> str:
    """Of everything that the features follow from."""
    digest = hashlib.sha256(f"{MD5} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()[:32]


def _path(folder: Path, start: int, length: int) -> Path:
    return folder / f"{start}-{start + length}.npz"


def _keep(folder: Path, start: int, chunk: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, features=chunk)  # the zip file has a checksum, which a plain .npy has not
    with usable(folder, "--data-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(_path(folder, start, len(chunk)), file.getvalue())


def _kept(folder: Path, start: int, length: int) -> np.ndarray | None:
    """The features of a chunk that was kept, as a whole or to the same end; None without one."""
    for size in (_CHUNK, length):
        path = _path(folder, start, size)
        if path.exists():
            try:
                with np.load(io.BytesIO(path.read_bytes())) as arrays:
                    chunk = arrays["features"]
                if chunk.shape == (size, N_FEATURES):
                    return chunk[:length]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass
            put_aside(path)
    return None
