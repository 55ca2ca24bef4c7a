"""What clipped singular values cost: by polar decompositions, and against the SVD alone."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

import sn_jax
from experiments.bench.timing import Row, compare, interleaved

SIDES = (256, 512, 1024)
QUICK = (64,)


def rows(quick: bool) -> Iterator[list[Row]]:
    """Half of the singular values of a Gaussian matrix above the cap, which does not matter."""
    for side in QUICK if quick else SIDES:
        w = jax.random.normal(jax.random.key(0), (side, side)) / side**0.5
        params = {"w": w}
        state = sn_jax.init(params, jax.random.key(1), warmup=0)
        clip = {
            method: jax.jit(partial(sn_jax.clip_singular_values, bound=0.8, method=method))
            for method in ("svd", "polar")
        }
        calls = {
            "sn_jax": partial(clip["svd"], params, state),
            'method="polar"': partial(clip["polar"], params, state),
            "the SVD alone": partial(jax.jit(jnp.linalg.svd), w),
        }
        for name in ("sn_jax", 'method="polar"'):
            norm = sn_jax.spectral_norm(calls[name]()["w"])
            assert norm <= 0.8 * (1 + 1e-5), f"{name}: {norm}"
        yield compare("caps", f"clip {side}x{side}", interleaved(calls, rounds=5))
