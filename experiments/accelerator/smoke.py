"""Does this accelerator compute what a CPU does? A minute before hours are spent on it.

``python -m experiments.accelerator.smoke`` on a CPU writes what is compared with, recorded.npz.

Accelerators round the factors of float32 products by default: to 11 bits (TensorFloat-32) or to 8
(bfloat16). The library asks for float32 products, so its values must be right whatever the
default is; the networks of a GAN take the default.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sn_jax
from experiments.certify import oracle
from experiments.gan.train import Config, Data, make_training

RECORDED = Path(__file__).with_name("recorded.npz")

VIEWS = {
    "matrix": (sn_jax.Matrix(), (48, 32)),
    "flattened": (sn_jax.Matrix((0, 1, 2), 3), (3, 3, 4, 8)),
    "circular": (sn_jax.Conv((8, 8), padding="CIRCULAR"), (3, 3, 4, 8)),
    "padded": (sn_jax.Conv((8, 8), strides=2), (3, 3, 4, 8)),
}
# Rounded to 11 bits it is 1, and a product with it off by 4.7e-4, always in the same direction.
# With random numbers the errors cancel: sigma is right to 1e-5 whatever is rounded.
COHERENT = 1 + 0.97 * 2.0**-11

# JAX's names of defaults; "default" is another name of the last.
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
# Of the library's values, relative. Sums of some hundred products err by 1e-6 in float32, and by
# 1e-5 in convolutions that transform their tiles first: a tenth of what a rounded factor does.
TOLERANCE = 5e-5


class Check(NamedTuple):
    """One comparison."""

    name: str
    error: float
    tolerance: float

    @property
    def met(self) -> bool:
        return self.error <= self.tolerance  # not so if it is NaN


def checks(recorded: dict[str, np.ndarray]) -> Iterator[Check]:
    """All comparisons with the arrays of ``RECORDED``."""
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            for what, value in library(recorded).items():
                error = _relative(value, recorded[what])
                yield Check(f"{what}, {precision}", error, TOLERANCE)
    for name, (view, _) in VIEWS.items():
        norm = float(recorded[f"sigma of {name}"])
        lower, upper = map(float, sn_jax.norm_bounds(jnp.asarray(recorded[name]), view))
        yield Check(f"certificate holds the norm of {name}", max(lower / norm, norm / upper), 1.0)
        yield Check(f"width of the certificate of {name}", upper / lower - 1, 0.01)
    for variant, (options, precision, tolerance) in steps().items():
        with jax.default_matmul_precision(precision):
            for what, value in step(**options).items():
                error = _relative(value, recorded[what])
                yield Check(f"{what} of an SN-GAN step, {variant}", error, tolerance)


def steps() -> dict[str, tuple[dict[str, Any], str, float]]:
    """Variants of the step: options of the run, precision, tolerance.

    The tolerance is that of a relative 2-norm, of the least exact, the gradients. Networks that
    compute in bfloat16 altogether are off by 0.034 on a CPU: three times that, an eighth of it for
    TensorFloat-32, which has three bits more, and in float32 what convolutions that transform
    their tiles first may lose, 1e-5, as often enlarged as bfloat16's roundoff is.
    """
    rounded = {"cpu": 4e-4, "gpu": 0.013}.get(jax.default_backend(), 0.1)
    return {
        "float32 products": ({}, "highest", 4e-4),
        "default products": ({}, "default", rounded),
        "bfloat16 networks": ({"dtype": "bfloat16"}, "default", 0.1),
    }


def _relative(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64).ravel() for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- What is computed -------------------------------------------------------------------------


def library(kernels: dict[str, np.ndarray]) -> dict[str, Any]:
    """Norms and gradients of all kernels, of constant ones and of those given: a random one by the
    name of each view, with its singular vectors "u of ..." and "v of ..."."""
    params = {name: jnp.asarray(kernels[name]) for name in VIEWS}
    params |= {f"constant {name}": jnp.full(w.shape, COHERENT, w.dtype)
               for name, w in params.items()}  # fmt: skip
    rules = {f".*{name}": view for name, (view, _) in VIEWS.items()}
    state = sn_jax.init(params, jax.random.key(0), rules)
    state = sn_jax.calibrate(params, state, rtol=1e-4)
    values = {f"sigma of {name}": singular.sigma for name, singular in state.items()}

    random = {name: params[name] for name in VIEWS}
    exact = {
        name: sn_jax.Singular(*(kernels[f"{x} of {name}"] for x in "uv"), jnp.float32(1), view)
        for name, (view, _) in VIEWS.items()
    }

    # Cotangents of both kinds that the closed form has: along the kernel, and not.
    @jax.jit
    def gradients(random, exact):
        def value(params):
            normalized, _ = sn_jax.spectral_normalize(params, exact, n_steps=0)
            return sum(jnp.vdot(random[name] + 1, normalized[name]) for name in params)

        return jax.grad(value)(random)

    grads = gradients(random, exact)
    return values | {f"gradient of {name}": grad for name, grad in grads.items()}


def step(**options: Any) -> dict[str, np.ndarray]:
    """Losses, gradients and norms of the first step of a small SN-GAN with options of a run."""
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)
    config = Config(width=2, batch_size=128, **options)
    training = make_training(config, images.shape[1:])
    data = Data(jnp.asarray(images), jnp.zeros(len(images), jnp.int32))
    with jax.default_matmul_precision("highest"):
        state = training.init(jax.random.key(0))
    # One program for any number of steps, as in runs on accelerators.
    state, losses = training.steps(state, data, 1)

    def gradient(adam):  # the first moment after one step is that, times 1 - beta1
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(adam.mu))]
        return np.concatenate(leaves) / np.float32(1 - config.adam().b1)

    return {
        "losses": np.array([losses["loss_d"], losses["loss_g"]]),
        "discriminator's gradient": gradient(state.d_opt),
        "generator's gradient": gradient(state.g_opt),
        "norms": np.array([singular.sigma for singular in state.d_method.values()]),
    }


def record() -> dict[str, np.ndarray]:
    """The arrays of ``RECORDED``: norms in float64 by NumPy, gradients and the step by a CPU."""
    rng = np.random.default_rng(0)
    kernels, norms = {}, {}
    for name, (view, shape) in VIEWS.items():
        w = rng.standard_normal(shape).astype(np.float32)
        u, s, vt = np.linalg.svd(oracle.matrices(w, view), full_matrices=False)
        vectors = sn_jax.init({"w": jnp.asarray(w)}, jax.random.key(0), {"w": view})["w"]
        kernels |= {
            name: w,
            f"u of {name}": u[:, 0].astype(np.float32).reshape(vectors.u.shape),
            f"v of {name}": vt[0].astype(np.float32).reshape(vectors.v.shape),
        }
        norms[f"sigma of {name}"] = s[0]
        constant = np.full(shape, COHERENT, np.float32)
        norms[f"sigma of constant {name}"] = oracle.norms(constant, view)
    with jax.default_matmul_precision("highest"):
        values = {k: np.asarray(v, np.float32) for k, v in library(kernels).items()}
        return values | norms | kernels | step()


if __name__ == "__main__":
    if jax.default_backend() != "cpu":
        sys.exit("error: what accelerators are compared with is recorded on a CPU")
    np.savez_compressed(RECORDED, **record())
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes")
