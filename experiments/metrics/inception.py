"""Inception-v3 as FID takes its features (the graph of 2015-12-05), up to its last pooling.

It differs from the Inception-v3 of model zoos: average pools leave the padding out, the last
block has a maximum pool, batch normalization has no scale and an epsilon of 1e-3 (folded into the
kernels here), and images are enlarged without centring the pixels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

SIZE = 299
N_FEATURES = 2048
MULTIPLY_ADDS = 5.7e9  # of an image

# Features have to agree to three digits: TensorFloat-32 and bfloat16 do not.
_Conv = partial(nn.Conv, precision=jax.lax.Precision.HIGHEST)
_average = partial(
    nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)
_maximum = partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
_halve = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


class Layer(nn.Module):
    """A convolution and ReLU; one of stride 2 is not padded."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = self.padding or ("SAME" if self.strides == 1 else "VALID")
        conv = _Conv(self.features, self.kernel, (self.strides,) * 2, padding, name="conv")
        return nn.relu(conv(x))


class Tower(nn.Module):
    """Layers in turn, called conv, conv_1, ... by the original."""

    layers: tuple[tuple, ...]  # arguments of each Layer
    pool: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x if self.pool is None else self.pool(x)
        for i, arguments in enumerate(self.layers):
            x = Layer(*arguments, name=f"conv_{i}" if i else "conv")(x)
        return x


class Block(nn.Module):
    """Branches side by side, their channels one after the other."""

    branches: Callable[[], list[Callable[[Array], Array]]]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([branch(x) for branch in self.branches()], -1)


def _squares(pooled: int) -> list:
    return [
        Layer(64, name="conv"),
        Tower(((48,), (64, (5, 5))), name="tower"),
        Tower(((64,), (96, (3, 3)), (96, (3, 3))), name="tower_1"),
        Tower(((pooled,),), _average, name="tower_2"),
    ]


def _squares_halving() -> list:
    return [
        Layer(384, (3, 3), 2, name="conv"),
        Tower(((64,), (96, (3, 3)), (96, (3, 3), 2)), name="tower"),
        _halve,
    ]


def _lines(w: int) -> list:
    row, column = (1, 7), (7, 1)
    return [
        Layer(192, name="conv"),
        Tower(((w,), (w, row), (192, column)), name="tower"),
        Tower(((w,), (w, column), (w, row), (w, column), (192, row)), name="tower_1"),
        Tower(((192,),), _average, name="tower_2"),
    ]


def _lines_halving() -> list:
    return [
        Tower(((192,), (320, (3, 3), 2)), name="tower"),
        Tower(((192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)), name="tower_1"),
        _halve,
    ]


class LastBlock(nn.Module):
    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Layer(384, name="tower_conv")(x)
        b = Layer(448, name="tower_1_conv")(x)
        b = Layer(384, (3, 3), name="tower_1_conv_1")(b)
        branches = [
            Layer(320, name="conv")(x),
            Layer(384, (1, 3), name="tower_mixed_conv")(a),
            Layer(384, (3, 1), name="tower_mixed_conv_1")(a),
            Layer(384, (1, 3), name="tower_1_mixed_conv")(b),
            Layer(384, (3, 1), name="tower_1_mixed_conv_1")(b),
            Layer(192, name="tower_2_conv")(self.pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """Images (n, 299, 299, 3) in [-1, 1) to features (n, 2048)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Layer(32, (3, 3), 2, name="conv")(x)
        x = Layer(32, (3, 3), padding="VALID", name="conv_1")(x)
        x = Layer(64, (3, 3), name="conv_2")(x)
        x = _halve(x)
        x = Layer(80, name="conv_3")(x)
        x = Layer(192, (3, 3), padding="VALID", name="conv_4")(x)
        x = _halve(x)
        blocks = [
            *(partial(_squares, pooled) for pooled in (32, 64, 64)), _squares_halving,
            *(partial(_lines, w) for w in (128, 160, 160, 192)), _lines_halving,
        ]  # fmt: skip
        for i, branches in enumerate(blocks):
            x = Block(branches, name=f"mixed_{i}" if i else "mixed")(x)
        x = LastBlock(_average, name="mixed_9")(x)
        x = LastBlock(_maximum, name="mixed_10")(x)
        return x.mean((1, 2))


def enlarge(images: Array, size: int = SIZE) -> Array:
    """Bilinear interpolation as the graph does it: pixel i of the result lies at i h / size.

    Beyond the last pixel it stays what it was. Images that are larger are sampled, not averaged.

    Args:
      images: (n, h, w, c).
      size: of the result, (n, size, size, c).
    """

    def weights(old: int) -> np.ndarray:
        place = np.arange(size) * (old / size)
        low = place.astype(int)
        matrix = np.zeros((size, old), np.float32)
        np.add.at(matrix, (np.arange(size), low), 1 - (place - low))
        np.add.at(matrix, (np.arange(size), np.minimum(low + 1, old - 1)), place - low)
        return matrix

    _, h, w, _ = images.shape
    rows, columns = weights(h), weights(w)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,nhwc->nyxc", rows, columns, images, precision=highest)


def embed(params: dict, images: Array) -> Array:
    """Features, float32 (n, 2048), of images as they are stored, uint8 (n, h, w, 1 or 3), of which
    grey ones are made colour; parameters are those of ``inception_params``."""
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    x = enlarge((x - 128) / 128)
    return Inception().apply({"params": params}, x)
