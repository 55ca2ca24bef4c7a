"""One process of a small GAN in float64: ``gan_processes.py out mesh seed steps``; see
test_processes.py. Trains without measuring."""

import sys
from pathlib import Path

from experiments import processes
from experiments.cli import UserError
from experiments.gan.loop import train
from experiments.gan.run import real_images
from experiments.gan.train import Config

out, mesh, seed, steps = sys.argv[1:]
config = Config(
    out=Path(out),
    mesh=mesh if mesh != "-" else None,
    seed=int(seed),
    size=4,  # a network of one stage, which traces and compiles fast
    width=4,
    batch_size=8,
    steps=int(steps),
    checkpoint_every=2,
    log_every=5,
    dtype="float64",
    progress=False,
)
try:
    processes.start()
    processes.agree(config.identity())
    real = real_images(config)
    if processes.is_first():
        config.out.mkdir(exist_ok=True)
    processes.wait("folder")
    train(config, real.train, real.n_classes)
except UserError as error:
    sys.exit(f"error: {error}")
