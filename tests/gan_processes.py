"""One process of a small GAN in float64: ``gan_processes.py out mesh seed steps``; see
test_processes.py. Trains without measuring."""

import sys
from pathlib import Path

import numpy as np

from experiments import processes
from experiments.cli import UserError
from experiments.gan.train import Config, Data


def options(out: Path, mesh: str | None = None, seed: int = 0, steps: int = 2) -> Config:
    return Config(
        out=out,
        mesh=mesh,
        seed=seed,
        width=4,
        batch_size=8,
        steps=steps,
        checkpoint_every=2,
        log_every=5,
        dtype="float64",
        progress=False,
    )


def images() -> Data:
    """Of a size whose network has one stage, which traces and compiles fast."""
    rng = np.random.default_rng(0)
    return Data(rng.integers(0, 256, (50, 4, 4, 1), np.uint8), np.arange(50, dtype=np.int32) % 10)


def main(out: str, mesh: str, seed: str, steps: str) -> None:
    config = options(Path(out), mesh if mesh != "-" else None, int(seed), int(steps))
    processes.start()
    processes.agree(config.identity())
    from experiments.gan.loop import train  # seconds of imports, not for those that disagree

    if processes.is_first():
        config.out.mkdir(exist_ok=True)
    processes.wait("folder")
    train(config, images(), 10)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
