"""The time of one update against the size of a matrix, and against the number of leaves."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import sn_jax
from experiments.bench import ways
from experiments.bench.timing import Row, compare, interleaved

SIZES = [64 * 2**i for i in range(8)]  # to 8192
LEAVES = [1, 10, 100, 1000]
FLOOR = "two reads"
# Where time is that of the bytes: matrices from this side on, and leaves beyond the first few.
LARGE, TARGET = 1024, 1.25


def rows(quick: bool) -> Iterator[list[Row]]:
    """A row for each size and for each number of leaves: "matrix 512", "leaves 100"."""
    for size in (size for size in SIZES if size <= 1024 or not quick):
        yield _update_time(f"matrix {size}", 1, size, TARGET if size >= LARGE else None)
    found = []
    for leaves in (n for n in LEAVES if n <= 100 or not quick):
        found += _update_time(f"leaves {leaves}", leaves, 64, None)
        yield found[-1:]
    yield [growth(*found[-2:])]


def growth(fewer: Row, more: Row) -> Row:
    """The time of one leaf among many over that among fewer, of rows such as "leaves 10"."""
    (a, few), (b, many) = ((row.ours, int(row.case.split()[1])) for row in (fewer, more))
    return Row(
        "scaling", f"one of {many} leaves", "ms per leaf", b / many, a / few,
        f"one of {few} leaves", (b / many) / (a / few), target=TARGET,
    )  # fmt: skip


def _update_time(case: str, leaves: int, size: int, target: float | None) -> list[Row]:
    rng = np.random.default_rng(0)
    params = {str(i): jnp.asarray(rng.standard_normal((size, size), np.float32) / np.sqrt(size))
              for i in range(leaves)}  # fmt: skip
    state = sn_jax.init(params, jax.random.key(0), {".*": sn_jax.Matrix()}, warmup=1)
    megabytes = leaves * size * size * 4 / 1e6
    rounds = 7 if megabytes > 50 else 30
    calls = {"sn_jax": partial(jax.jit(ways.update), params, state),
             FLOOR: partial(_read_twice, params)}  # fmt: skip
    seconds = interleaved(calls, rounds)
    targets = {FLOOR: target} if target else None
    return compare("scaling", case, seconds, targets=targets, within_spread={FLOOR})


@jax.jit
def _read_twice(params):
    """A product with each matrix and one with its transpose, without the normalizations."""
    return [(w @ jnp.ones(w.shape[1])) @ w for w in params.values()]
