"""``python -m experiments.metrics --real cifar10 --fake samples/``: how good images are."""

import dataclasses
import io
import shlex
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from experiments import cli
from experiments.cli import UserError
from experiments.data import Dataset, Split, load, read_folder
from experiments.metrics.extract import PROTOCOLS, evaluate


@dataclasses.dataclass(frozen=True)
class Config:
    """FID, KID, precision and recall of images against real ones, by the Inception network of
    FID. An eighth of a second an image on a CPU core; what is done is kept."""

    real: str
    """Real images: digits, mnist, fashion-mnist, cifar10, a folder of images, or an .npz or .npy
    file with a uint8 array (n, h, w, 1 or 3)."""
    fake: str
    """Images to judge, likewise."""
    split: Split = "train"
    """Which part of the data set that --real names."""
    fake_split: Split = "test"
    """Which part of the data set that --fake names."""
    protocol: Literal["paper", "common"] | None = None
    """Numbers of images, real and generated: paper 10000 and 5000, common 50000 and 50000."""
    n_real: int | None = None
    """Real images, drawn at random; all of them if not given."""
    n_fake: int | None = None
    """Generated images, likewise."""
    data_dir: Path | None = None
    """Where data sets, weights and features are kept; the user's cache if not given."""
    out: Path | None = None
    """A JSON file for the numbers and how they came about."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        if self.protocol and (self.n_real or self.n_fake):
            raise ValueError("--protocol says the numbers of images: leave out --n-real, --n-fake.")
        for name in ("n_real", "n_fake"):
            if (getattr(self, name) or 4) < 4:
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}.")


def main(args: list[str] | None = None) -> int:
    """Returns the exit code of ``cli.command``."""
    prog = "python -m experiments.metrics"
    again = shlex.join([*prog.split(), *(sys.argv[1:] if args is None else args)])

    def measured(config: Config) -> None:
        if config.out:
            cli.check_writable(config.out)
        result = run(config) | {"command": again}
        if config.out:
            cli.write_json(config.out, result, indent=2, allow_nan=False)
        print(report(result))

    kept = f"what was done is kept; continue with: {again}"
    return cli.command(Config, prog, args, measured, interrupted=kept)


def run(config: Config) -> dict[str, Any]:
    """The numbers, and how they came about."""
    real = read_images(config.real, config.split, config.data_dir)
    fake = read_images(config.fake, config.fake_split, config.data_dir)
    n_real, n_fake = PROTOCOLS.get(config.protocol, (config.n_real, config.n_fake))
    for option, images, n in [("--real", real, n_real), ("--fake", fake, n_fake)]:
        if n and n > len(images):
            raise UserError(f"{n} images are wanted of {option}, which has {len(images)}.")
    start = time.perf_counter()
    numbers = evaluate(
        real, fake, n_real=n_real, n_fake=n_fake, keep_fake=True, data_dir=config.data_dir,
        progress=config.progress,
    )  # fmt: skip
    sources = {
        "real": _source(config.real, config.split, real),
        "fake": _source(config.fake, config.fake_split, fake),
        "seconds": time.perf_counter() - start,
    }
    return numbers | sources | cli.provenance()


def read_images(name: str, split: str, data_dir: Path | None) -> np.ndarray:
    """uint8 images of a data set's split, of a whole folder, or of the one array in a file.

    Raises:
      UserError: there are none.
    """
    path = Path(name)
    if name in get_args(Dataset) or not path.exists():
        return load(name, split, data_dir)[0]
    if path.is_dir():
        return read_folder(path)[0]
    try:
        arrays = np.load(io.BytesIO(path.read_bytes()))
        if isinstance(arrays, np.ndarray):
            return arrays
        with arrays:
            (only,) = arrays.files
            return arrays[only]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged, or not an .npy file or an .npz file of one array ({error})."
        ) from error


def _source(name: str, split: str, images: np.ndarray) -> str:
    part = f" {split}" if name in get_args(Dataset) else ""
    return f"{name}{part}, {len(images)} images of {'x'.join(map(str, images.shape[1:]))}"


def report(result: dict[str, Any]) -> str:
    """The table."""
    kid, std, size = 1000 * result["kid"], 1000 * result["kid_std"], result["kid_subset_size"]
    # A subset that is everything has no spread to speak of.
    spread = f"± {std:.2f}, " if size < max(result["n_real"], result["n_fake"]) else ""
    rows = [
        ["FID", f"{result['fid']:.2f}", ""],
        ["KID", f"{kid:.2f}", f"{spread}x 1000, subsets of {size}"],
        ["precision", f"{result['precision']:.3f}", "3 neighbours"],
        ["recall", f"{result['recall']:.3f}", "3 neighbours"],
        ["n_real", result["n_real"], f"of {result['real']}"],
        ["n_fake", result["n_fake"], f"of {result['fake']}"],
    ]
    table = cli.aligned([row[:2] for row in rows], [row[2] for row in rows])
    kind, cores = result["device"]["kind"], result["device"]["cpu_cores"]
    return f"{table}\n{result['seconds']:.0f} s on {kind}, {cores} CPU cores"


if __name__ == "__main__":
    sys.exit(main())
