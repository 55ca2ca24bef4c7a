"""What a certified Lipschitz constant costs, in all and by method."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import sn_jax
from experiments.bench.models import ResNet18
from experiments.bench.timing import Row
from experiments.certify.nets import NETS, Mixer

METHODS = ("product", "merged", "joint", "shift", "ellipsoid")


class Case(NamedTuple):
    """A network with random weights.

    Attributes:
      module, shape: of its input.
      method: up to which methods run, by default all.
      aim: seconds; None where they are only reported.
    """

    module: nn.Module
    shape: tuple[int, ...]
    method: str = "auto"
    aim: float | None = None


CASES = {
    "MLP-Mixer, 2 blocks": Case(Mixer(), (1, 8, 8), aim=10),
    "SN-GAN's CNN, 8x8, width 16": Case(
        *NETS["SN-GAN's CNN, not normalized, 8x8, width 16"], aim=10
    ),
    "ResNet-18, 32x32": Case(ResNet18(), (1, 32, 32, 3), "merged"),
}
QUICK = {"MLP-Mixer, 2 blocks": CASES["MLP-Mixer, 2 blocks"]}


def rows(quick: bool) -> Iterator[list[Row]]:
    """Seconds of the first call in this process, network by network, and what each method adds."""
    for name, case in (QUICK if quick else CASES).items():
        x = jnp.zeros(case.shape)
        variables = case.module.init(jax.random.key(0), x)

        def fn(x, case=case, variables=variables):
            return case.module.apply(variables, x)

        seconds = timed(fn, x, case.method)
        aimed = {}
        if case.aim:
            aimed = {"peer": case.aim, "peer_name": "aim", "ratio": seconds / case.aim, "target": 1}
        found = [Row("lipschitz", f"{name}, first call", "s", seconds, **aimed)]
        before = 0.0
        methods = METHODS if case.method == "auto" else METHODS[: METHODS.index(case.method) + 1]
        for method in methods:
            # Each method runs after the cruder ones, and slopes are known by now.
            seconds = timed(fn, x, method)
            found.append(Row("lipschitz", f"{name}, {method}", "s", max(seconds - before, 0.0)))
            before = seconds
        yield found


def timed(fn, x, method: str) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    sn_jax.lipschitz_bound(fn, x, method=method, progress=False)
    return time.perf_counter() - start
