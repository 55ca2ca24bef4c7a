"""What a certified Lipschitz constant costs, in all and by method."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import sn_jax
from experiments.bench.models import ResNet18
from experiments.bench.timing import Row
from experiments.certify.nets import NETS, Mixer


class Case(NamedTuple):
    """A network with random weights."""

    module: nn.Module
    shape: tuple[int, ...]  # of its input
    method: str = "auto"  # up to which methods run, by default all
    aim: float | None = None  # seconds; None where they are only reported


CASES = {
    "MLP-Mixer, 2 blocks": Case(Mixer(), (1, 8, 8), aim=10),
    "SN-GAN's CNN, 8x8, width 16": Case(
        *NETS["SN-GAN's CNN, not normalized, 8x8, width 16"][:2], aim=10
    ),
    "ResNet-18, 32x32": Case(ResNet18(), (1, 32, 32, 3), "merged"),
}
QUICK = {"MLP-Mixer, 2 blocks": CASES["MLP-Mixer, 2 blocks"]}


def rows(quick: bool) -> Iterator[list[Row]]:
    """CPU seconds of a first call, network by network, in all and of each method.

    The first method's are with tracing, and with the slopes that no call before has found.
    """
    for name, case in (QUICK if quick else CASES).items():
        x = jnp.zeros(case.shape)
        variables = case.module.init(jax.random.key(0), x)

        def fn(x, case=case, variables=variables):
            return case.module.apply(variables, x)

        bound = sn_jax.lipschitz_bound(fn, x, method=case.method, progress=False)
        seconds = dict(bound.seconds)
        total, aimed = sum(seconds.values()), {}
        if case.aim:
            aimed = {"peer": case.aim, "peer_name": "aim", "ratio": total / case.aim, "target": 1}
        yield [
            Row("lipschitz", f"{name}, in all", "CPU s", total, **aimed),
            *(Row("lipschitz", f"{name}, {m}", "CPU s", value) for m, value in seconds.items()),
        ]
