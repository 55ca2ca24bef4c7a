"""What a certificate costs: against the SVDs of the same symbols, and against an estimate."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import sn_jax
from experiments.bench import ways
from experiments.bench.timing import Row, compare, interleaved

# channels, size of the image, the SVDs' time over ours that is aimed at.
CASES = [(64, 32, 1.0), (512, 16, 4.0)]
QUICK = [(64, 16, None)]
_step = jax.jit(ways.update)


def rows(quick: bool) -> Iterator[list[Row]]:
    """The bracket of circular 3x3 convolutions at rtol 1e-3, case by case."""
    for channels, size, speedup in QUICK if quick else CASES:
        shape = (3, 3, channels, channels)
        kernel = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.float32))
        view = sn_jax.Conv((size, size), padding="CIRCULAR")
        params = {"kernel": jnp.asarray(kernel)}
        state = sn_jax.init(params, jax.random.key(1), {"kernel": view}, warmup=0)
        calls = {
            "sn_jax": partial(sn_jax.norm_bounds, kernel, view, rtol=1e-3),
            "SVD of all symbols": partial(by_svd, kernel, size),
            "100 power iterations": partial(estimate, params, state),
        }
        lower, upper = calls["sn_jax"]()
        for name in ("SVD of all symbols", "100 power iterations"):
            value = float(calls[name]())
            # The iteration has not converged; it lies below.
            assert value <= upper * (1 + 1e-5), f"{name}: {value} is above {upper}"
            assert value >= lower * (0.9 if "power" in name else 1 - 1e-12)
        seconds = interleaved(calls, rounds=3)
        targets = {"SVD of all symbols": 1 / speedup} if speedup else {}
        case = f"bracket {channels}x{channels}x3x3, n={size}"
        yield compare("norms", case, seconds, targets=targets)


def by_svd(kernel: np.ndarray, size: int) -> np.floating:
    """Sedghi et al. (2019): the largest singular value over half the grid of frequencies."""
    symbols = np.fft.rfft2(kernel.astype(np.float64), (size, size), axes=(0, 1))
    symbols = symbols.reshape(-1, *kernel.shape[2:])
    return np.linalg.svd(symbols, compute_uv=False).max()


def estimate(params, state) -> jax.Array:
    # One dispatch a step: XLA's convolutions are many times slower inside a loop on a CPU.
    for _ in range(100):
        state = _step(params, state)
    return state["kernel"].sigma
