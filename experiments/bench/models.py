"""linen models whose layers a function may wrap: as they are, by flax's SpectralNorm, by ours."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

import sn_jax.linen

Wrap = Callable[[nn.Module], Callable]


by_sn_jax = sn_jax.linen.SpectralNorm


def plain(layer: nn.Module) -> Callable:
    return layer


def by_flax(layer: nn.Module) -> Callable:
    wrapped = nn.SpectralNorm(layer)
    return lambda x: wrapped(x, update_stats=True)


class VisionTransformer(nn.Module):
    """Tokens (n, tokens, width) to (n,). Query, key, value and out are Dense layers."""

    blocks: int = 24
    width: int = 192
    heads: int = 3
    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            x = _Block(self.width, self.heads, self.wrap)(x)
        return self.wrap(nn.Dense(1))(nn.LayerNorm()(x).mean(1))[:, 0]


class _Block(nn.Module):
    width: int
    heads: int
    wrap: Wrap

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        q, k, v = (
            self.wrap(nn.Dense(self.width))(h).reshape(*h.shape[:-1], self.heads, -1)
            for _ in range(3)
        )
        h = nn.dot_product_attention(q, k, v).reshape(h.shape)
        x = x + self.wrap(nn.Dense(self.width))(h)
        h = nn.gelu(self.wrap(nn.Dense(4 * self.width))(nn.LayerNorm()(x)))
        return x + self.wrap(nn.Dense(self.width))(h)


class ResNetDiscriminator(nn.Module):
    """Images (n, 32, 32, 3) to (n,): the residual discriminator of Miyato et al. (2018)."""

    width: int = 128
    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        for i, down in enumerate([True, True, False, False]):
            x = _ResBlock(self.width, down, first=i == 0, wrap=self.wrap)(x)
        return self.wrap(nn.Dense(1))(nn.relu(x).sum((1, 2)))[:, 0]


class _ResBlock(nn.Module):
    width: int
    down: bool
    first: bool
    wrap: Wrap

    @nn.compact
    def __call__(self, x):
        def halved(x):
            return nn.avg_pool(x, (2, 2), (2, 2)) if self.down else x

        h = x if self.first else nn.relu(x)
        h = nn.relu(self.wrap(nn.Conv(self.width, (3, 3)))(h))
        h = halved(self.wrap(nn.Conv(self.width, (3, 3)))(h))
        if self.down:
            x = self.wrap(nn.Conv(self.width, (1, 1)))(halved(x) if self.first else x)
            x = x if self.first else halved(x)
        return h + x


class ResNet18(nn.Module):
    """Images (n, h, w, 3) to (n, 1000): ResNet-18 (He et al. 2016), BatchNorm in eval."""

    @nn.compact
    def __call__(self, x):
        def normed(x, features, kernel, stride):
            x = nn.Conv(features, (kernel,) * 2, stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(normed(x, 64, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for features, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1),
                                 (512, 2), (512, 1)]:  # fmt: skip
            y = nn.relu(normed(x, features, 3, stride))
            y = normed(y, features, 3, 1)
            x = normed(x, features, 1, stride) if x.shape != y.shape else x
            x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Vectors (n, width) to (n,) through dense layers of one width."""

    width: int = 1024
    layers: int = 4
    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.relu(self.wrap(nn.Dense(self.width))(x))
        return jnp.sum(x, -1)


class Critic(nn.Module):
    """Three hidden layers, as RL has them."""

    width: int
    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(self.wrap(nn.Dense(self.width))(x))
        return nn.Dense(1)(x)


class Discriminator(nn.Module):
    """SN-GAN's standard CNN (Miyato et al. 2018, table 3)."""

    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(self.wrap(nn.Conv(64, (3, 3)))(x), 0.1)
        for width in (64, 128, 256):
            x = nn.leaky_relu(self.wrap(nn.Conv(width, (4, 4), 2))(x), 0.1)
            x = nn.leaky_relu(self.wrap(nn.Conv(2 * width, (3, 3)))(x), 0.1)
        return self.wrap(nn.Dense(1))(x.reshape(len(x), -1))


class TransformerBlock(nn.Module):
    """A transformer block of ViT-B."""

    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        x = x + self.wrap(nn.MultiHeadDotProductAttention(12))(nn.LayerNorm()(x))
        y = nn.gelu(self.wrap(nn.Dense(4 * x.shape[-1]))(nn.LayerNorm()(x)))
        return x + self.wrap(nn.Dense(x.shape[-1]))(y)
