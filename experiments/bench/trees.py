"""Parameter trees of real models, as shapes: {"conv_00": {"w": (3, 3, 3, 64)}, ...}."""

from collections.abc import Iterable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

import sn_jax

Shape = tuple[int, ...]


def sn_gan_cnn() -> dict[str, Shape]:
    """The standard discriminator of Miyato et al. (2018), 32x32 images."""
    convs = [(3, 3, 64), (4, 64, 64), (3, 64, 128), (4, 128, 128), (3, 128, 256), (4, 256, 256),
             (3, 256, 512)]  # fmt: skip
    return _named([(k, k, i, o) for k, i, o in convs], [(8192, 1)])


def sn_gan_resnet() -> dict[str, Shape]:
    """The residual discriminator of Miyato et al. (2018), CIFAR-10."""
    convs = [(3, 3), (3, 128), (1, 3), (3, 128), (3, 128), (1, 128)] + 4 * [(3, 128)]
    return _named([(k, k, i, 128) for k, i in convs], [(128, 1)])


def biggan(width: int = 80) -> dict[str, Shape]:
    """Residual blocks as in BigGAN's discriminator for 128x128 images, at 5/6 of its width."""
    channels = [3] + [width * n for n in (1, 2, 4, 8, 16, 16)]
    convs = []
    for i, o in pairwise(channels):
        convs += [(3, 3, i, o), (3, 3, o, o)] + [(1, 1, i, o)] * (i != o)
    return _named(convs, [(channels[-1], 1)])


def vit(blocks: int = 12, width: int = 768) -> dict[str, Shape]:
    """The blocks of a Vision Transformer: query-key-value, out, and the two of the MLP."""
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return _named([], block * blocks)


def _named(convs: list[Shape], denses: list[Shape]) -> dict[str, Shape]:
    # Padded with zeros: the order of the names is then that of the leaves, in every library.
    names = [f"conv_{i:02}" for i in range(len(convs))]
    names += [f"dense_{i:02}" for i in range(len(denses))]
    return dict(zip(names, convs + denses, strict=True))


def views(names: Iterable[str]) -> dict[str, sn_jax.View]:
    """For sn_jax.init: the paper's flattened convolutions, and dense kernels."""
    flattened = sn_jax.Matrix((0, 1, 2), 3)
    return {f"{name}/w": flattened if name.startswith("conv") else sn_jax.Matrix()
            for name in names}  # fmt: skip


def weights(shapes: dict[str, Shape], seed: int = 0) -> dict[str, dict[str, jax.Array]]:
    """float32 kernels whose leading singular value is some three times the second.

    So every library's iteration converges in a few steps, wherever it starts, and results can
    be compared. Shapes have outputs last.
    """
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in shapes.items():
        m, n = int(np.prod(shape[:-1])), shape[-1]
        w = rng.standard_normal((m, n), np.float32) / (np.sqrt(m) + np.sqrt(n))
        u, v = (x / np.linalg.norm(x) for x in (rng.standard_normal(m), rng.standard_normal(n)))
        w += np.outer(3 * u, v)
        tree[name] = {"w": jnp.asarray(w.reshape(shape), jnp.float32)}
    return tree


def cotangents(shapes: dict[str, Shape], seed: int = 1) -> dict[str, dict[str, jax.Array]]:
    """Noise in place of the gradients with respect to the normalized kernels."""
    rng = np.random.default_rng(seed)
    return {name: {"w": jnp.asarray(rng.standard_normal(shape, np.float32))}
            for name, shape in shapes.items()}  # fmt: skip
