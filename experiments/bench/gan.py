"""The SN-GAN engine's train step, beside the same without SN and beside an equal one of PyTorch."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import Elsewhere, Row, compare, interleaved
from experiments.bench.torch_client import TorchFailed, torch_client
from experiments.gan.train import Config, Data, make_training

BATCH = 64
# Ratios of times aimed at on a GPU; on a CPU they are only reported.
TARGETS = {"no SN": 1.03, "torch eager": 1 / 2, "torch compiled": 1 / 1.2}


def rows(quick: bool) -> Iterator[list[Row]]:
    """The standard CNN on random images of CIFAR-10's size."""
    width, size = (8, 8) if quick else (64, 32)
    images = np.random.default_rng(0).integers(0, 256, (1024, size, size, 3), np.uint8)
    on_gpu = jax.default_backend() == "gpu"
    # As the engine does: many steps a dispatch where convolutions in loops are fast.
    steps = 50 if on_gpu else 1
    calls: dict[str, Any] = {
        "sn_jax": Engine("sn", width, images, steps),
        "no SN": Engine("none", width, images, steps),
    }
    with torch_client() as torch:
        for name, compiled in [("torch eager", False), ("torch compiled", True)] if torch else ():
            try:
                torch.ask("gan", name, compiled, width, BATCH, images)
                torch.ask("train", name, 1)  # compiles
            except TorchFailed as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
            else:
                calls[name] = Elsewhere(partial(torch.ask, "train", name, steps))
        seconds = interleaved(calls, rounds=3 if quick else 10)
    case = f"CNN, {size}x{size}, width {width}, batch {BATCH}"
    if steps > 1:
        case += f", {steps} steps"
    speeds = [
        Row("gan", f"{case}, {name}", "real images/s", float(steps * BATCH / np.median(times)))
        for name, times in seconds.items()
    ]
    yield compare("gan", case, seconds, targets=TARGETS if on_gpu else None) + speeds


class Engine:
    """A call makes so many steps of ``experiments.gan``, each one update of both networks."""

    def __init__(self, normalization: str, width: int, images: np.ndarray, steps: int):
        config = Config(normalization=normalization, width=width, batch_size=BATCH)
        self._training, self._steps = make_training(config, images.shape[1:]), steps
        self._data = Data(jnp.asarray(images), jnp.zeros(len(images), jnp.int32))
        self._state = self._training.init(jax.random.key(0))

    def __call__(self) -> Any:
        if self._steps == 1:
            self._state, losses = self._training.step(self._state, self._data)
        else:
            self._state, losses = self._training.steps(self._state, self._data, self._steps)
        return losses
