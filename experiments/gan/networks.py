"""The paper's standard CNN (Miyato et al. 2018, table 3), for any square image size.

Initialized as Flax does by default, with a variance of 1 / fan-in. The authors' N(0, 0.02^2)
suits their width of 64: at width 16 it leaves a discriminator that is not normalized with hardly
any signal, which would flatter spectral normalization (it does not depend on the scale).
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


def n_stages(size: int) -> int:
    """How often the discriminator halves, and the generator doubles, an image of this size.

    The paper's networks have three such stages, at 32x32 and 48x48 alike. Small images have room
    for fewer: log2(size / 4) + 1, which is two at 8x8 and leaves the last 3x3 convolution a grid
    of 2x2 pixels.

    Raises:
      ValueError: the size is below 4, or cannot be halved that often.
    """
    stages = min(3, int(math.log2(size / 4)) + 1) if size >= 4 else 1
    if size < 4 or size % 2**stages:
        raise ValueError(
            f"The standard CNN does not fit images of {size}x{size} pixels: pad or resize them "
            f"to at least 4, to a multiple of {2**stages}."
        )
    return stages


class Generator(nn.Module):
    """Latent vectors (n, 128) to images (n, size, size, channels) in (-1, 1).

    At size 32 and width 64: dense to 4x4x512; 4x4 deconvolutions of stride 2 to 256, 128 and 64
    channels, each with batch normalization and ReLU; a 3x3 convolution and tanh.
    """

    size: int
    channels: int
    width: int = 64

    @nn.compact
    def __call__(self, z: Array, train: bool) -> Array:
        stages = n_stages(self.size)
        start = self.size // 2**stages
        features = self.width * 2**stages
        x = nn.Dense(start * start * features)(z)
        x = x.reshape(-1, start, start, features)
        for _ in range(stages):
            features //= 2
            # No bias: the normalization would take it away again.
            x = nn.ConvTranspose(features, (4, 4), (2, 2), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return jnp.tanh(nn.Conv(self.channels, (3, 3))(x))


class Discriminator(nn.Module):
    """Images (n, size, size, channels) in [-1, 1] to scores (n,).

    At size 32 and width 64: 3x3 and 4x4 stride-2 convolutions of 64, 128 and 256 channels in
    turn, a 3x3 convolution of 512, dense to 1; leaky ReLU with slope 0.1 in between.
    """

    width: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = self.width
        for _ in range(n_stages(x.shape[-2])):
            for kernel, stride in [(3, 1), (4, 2)]:
                conv = nn.Conv(features, (kernel,) * 2, (stride,) * 2)
                x = nn.leaky_relu(conv(x), 0.1)
            features *= 2
        x = nn.leaky_relu(nn.Conv(features, (3, 3))(x), 0.1)
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]
