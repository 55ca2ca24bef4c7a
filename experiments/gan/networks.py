"""The paper's networks (Miyato et al. 2018, tables 3 to 6), for any square image size that fits.

The standard CNN and the ResNet, each as the paper prints it and as the authors' code has it, and
the ResNet of Christian Cosgrove's PyTorch code (2018), smaller and much used. The paper's are
initialized as Flax does by default, with a variance of 1 / fan-in: the N(0, 0.02^2) of the
authors' CNN suits its width of 64, and at width 16 leaves a discriminator that is not normalized
with hardly any signal, which would flatter spectral normalization (it does not depend on the
scale).

A conditional discriminator is the projection of Miyato & Koyama (2018, equation 3), a conditional
generator has an offset and a scale a class in its batch normalization.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

Init = Callable[..., Array]
_LECUN, _ZEROS = nn.initializers.lecun_normal(), nn.initializers.zeros_init()


def n_stages(size: int) -> int:
    """How often the CNN's discriminator halves, and its generator doubles, an image of this size.

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


def n_doublings(size: int) -> int:
    """How often the ResNet's generator doubles its first grid, of 4x4 to 7x7, up to this size.

    Raises:
      ValueError: the size is below 8, or no such grid leads to it.
    """
    doublings = int(math.log2(size / 4)) if size >= 8 else 0
    if not doublings or size % 2**doublings:
        raise ValueError(
            f"The ResNet does not fit images of {size}x{size} pixels: pad or resize them to at "
            f"least 8, to a multiple of {2 ** max(doublings, 1)}."
        )
    return doublings


def deconvolution(x: Array, kernel: Array) -> Array:
    """``lax.conv_transpose(x, kernel, (2, 2), "SAME")`` for 4x4 kernels, as each device likes it.

    On a CPU as one product: a 2x2 window of x determines the 2x2 pixels between its centres. Its
    gradients took .43, .25 and .07 of the time that XLA's took in the CNN's generator on 8x8
    images at width 16 and on 32x32 at widths 16 and 64 (batch 64, one core of an AMD EPYC,
    2026-11-23). The discriminator's convolutions are left to XLA: nothing was faster at 32x32.

    Args:
      x: (n, h, w, c).
      kernel: (4, 4, c, features).

    Returns:
      Array: (n, 2 h, 2 w, features).
    """
    default = partial(lax.conv_transpose, strides=(2, 2), padding="SAME")
    return lax.platform_dependent(x, kernel, cpu=_deconvolution_by_product, default=default)


def _deconvolution_by_product(x: Array, kernel: Array) -> Array:
    n, h, w, c = x.shape
    # Axes: window row, pixel row, window column, pixel column, c, features.
    taps = kernel.reshape(2, 2, 2, 2, c, -1)[:, ::-1, :, ::-1]
    matrix = taps.transpose(0, 2, 4, 1, 3, 5).reshape(4 * c, -1)
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = [x[:, i : i + h + 1, j : j + w + 1] for i in range(2) for j in range(2)]
    pixels = (jnp.concatenate(windows, -1) @ matrix).reshape(n, h + 1, w + 1, 2, 2, -1)
    return pixels.swapaxes(2, 3).reshape(n, 2 * h + 2, 2 * w + 2, -1)[:, 1:-1, 1:-1]


class ConvTranspose(nn.Module):
    """``nn.ConvTranspose(features, (4, 4), (2, 2), use_bias=False)`` by ``deconvolution``."""

    features: int
    kernel_init: Init = _LECUN
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (4, 4, x.shape[-1], self.features))
        return deconvolution(*nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype))


class BatchNorm(nn.Module):
    """The generator's; with classes, each has an offset and a scale of its own.

    Dumoulin et al. (2017), https://arxiv.org/abs/1610.07629, equation 5.
    """

    n_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, labels: Array | None, train: bool) -> Array:
        own = not self.n_classes
        x = nn.BatchNorm(not train, momentum=0.9, use_bias=own, use_scale=own, dtype=self.dtype)(x)
        if own:
            return x
        embed = partial(nn.Embed, self.n_classes, x.shape[-1], dtype=self.dtype)
        scale = embed(embedding_init=nn.initializers.ones_init(), name="scale")(labels)
        offset = embed(embedding_init=_ZEROS, name="offset")(labels)
        return x * scale[:, None, None] + offset[:, None, None]


class Standardize(nn.Module):
    """Zero mean and unit variance over the given axes, then an offset a channel; no scale.

    Over (1, 2, 3) it is layer normalization, over (0, 1, 2) batch normalization by the batch's own
    statistics, as a discriminator that is never evaluated needs it. Over () it is nothing.
    """

    axes: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.axes:
            return x
        return nn.LayerNorm(
            1e-5, self.dtype, use_scale=False, reduction_axes=self.axes, feature_axes=-1
        )(x)


class _Generator(nn.Module):
    """Latent vectors (n, 128), and labels (n,) if conditional, to images in (-1, 1)."""

    size: int
    channels: int
    width: int = 64
    n_classes: int = 0  # 0: not conditional
    authors: bool = False  # their initial weights
    dtype: Any = jnp.float32


class _Discriminator(nn.Module):
    """Images (n, size, size, channels) in [-1, 1], and labels (n,) if conditional, to scores (n,).

    ``axes`` are those of ``Standardize``, which follows every hidden convolution but the first;
    ``kernel_init`` stands instead of the network's own.
    """

    width: int = 64
    n_classes: int = 0
    authors: bool = False  # their widths (CNN) and initial weights
    axes: tuple[int, ...] = ()
    kernel_init: Init | None = None
    dtype: Any = jnp.float32

    def head(self, features: Array, labels: Array | None, init: Init) -> Array:
        """Scores from features (n, k); with classes, plus each one's with its label's vector."""
        features = features.astype(jnp.float32)
        scores = nn.Dense(1, kernel_init=init)(features)[:, 0]
        if not self.n_classes:
            return scores
        directions = nn.Embed(self.n_classes, features.shape[-1], embedding_init=init)(labels)
        return scores + jnp.sum(directions * features, -1)


# --- The standard CNN -----------------------------------------------------------------------


def _cnn_init(authors: bool) -> Init:
    return nn.initializers.normal(0.02) if authors else _LECUN


class Generator(_Generator):
    """The standard CNN's.

    At size 32 and width 64: dense to 4x4x512; 4x4 deconvolutions of stride 2 to 256, 128 and 64
    channels, each with batch normalization and ReLU; a 3x3 convolution and tanh.
    """

    @nn.compact
    def __call__(self, z: Array, labels: Array | None = None, *, train: bool) -> Array:
        init, dtype = _cnn_init(self.authors), self.dtype
        stages = n_stages(self.size)
        start = self.size // 2**stages
        features = self.width * 2**stages
        x = nn.Dense(start * start * features, kernel_init=init, dtype=dtype)(z)
        x = x.reshape(-1, start, start, features)
        for _ in range(stages):
            features //= 2
            # No bias: the normalization would take it away again.
            x = ConvTranspose(features, init, dtype)(x)
            x = nn.relu(BatchNorm(self.n_classes, dtype)(x, labels, train))
        x = nn.Conv(self.channels, (3, 3), kernel_init=init, dtype=dtype)(x)
        return jnp.tanh(x.astype(jnp.float32))


class Discriminator(_Discriminator):
    """The standard CNN's.

    At size 32 and width 64: 3x3 and 4x4 stride-2 convolutions of 64, 128 and 256 channels in
    turn, a 3x3 convolution of 512, dense to 1; leaky ReLU with slope 0.1 in between. The authors'
    code has 64, 128, 128, 256, 256, 512 and 512 channels.
    """

    @nn.compact
    def __call__(self, x: Array, labels: Array | None = None) -> Array:
        init = self.kernel_init or _cnn_init(self.authors)

        def hidden(x, features, kernel, stride, axes=self.axes):
            # No bias where the normalization would take it away again.
            x = nn.Conv(features, (kernel,) * 2, (stride,) * 2, use_bias=not axes,
                        kernel_init=init, dtype=self.dtype)(x)  # fmt: skip
            return nn.leaky_relu(Standardize(axes, self.dtype)(x), 0.1)

        features = self.width
        for stage in range(n_stages(x.shape[-2])):
            x = hidden(x, features, 3, 1, self.axes if stage else ())
            x = hidden(x, features * (1 + self.authors), 4, 2)
            features *= 2
        x = hidden(x, features, 3, 1)
        return self.head(x.reshape(len(x), -1), labels, init)


# --- The ResNet -----------------------------------------------------------------------------


class Inits(NamedTuple):
    """Of a ResNet's kernels: on the residual branch, on shortcuts, and all others."""

    branch: Init
    shortcut: Init
    other: Init


def _resnet_inits(authors: bool, cosgrove: bool) -> Inits:
    glorot = partial(nn.initializers.variance_scaling, mode="fan_avg", distribution="uniform")
    one, root_two = glorot(1.0), glorot(2.0)  # gains of 1 and sqrt(2)
    if cosgrove:
        return Inits(branch=one, shortcut=root_two, other=one)
    return Inits(root_two, one, one) if authors else Inits(_LECUN, _LECUN, _LECUN)


_pool = partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))


def _twice(x: Array) -> Array:
    """Nearest-neighbour upsampling."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class ResNetGenerator(_Generator):
    """The ResNet's.

    At size 32 and width 64 (table 4): dense to 4x4x256; three residual blocks of 256 channels that
    double the grid; batch normalization, ReLU, a 3x3 convolution and tanh. Above 32 (tables 5 and
    6) the channels halve from block to block, down to 64. Cosgrove's has 128 channels in all
    blocks, and upsampling alone on their shortcuts.
    """

    cosgrove: bool = False

    @nn.compact
    def __call__(self, z: Array, labels: Array | None = None, *, train: bool) -> Array:
        inits, dtype = _resnet_inits(self.authors, self.cosgrove), self.dtype
        doublings = n_doublings(self.size)
        start = self.size // 2**doublings
        if self.cosgrove:
            first, blocks = 2 * self.width, [2 * self.width] * doublings
        elif self.size <= 32:
            first, blocks = 4 * self.width, [4 * self.width] * doublings
        else:
            blocks = [self.width * 2**i for i in reversed(range(doublings))]
            first = min(16 * self.width, 2 * blocks[0])

        def activate(x):
            return nn.relu(BatchNorm(self.n_classes, dtype)(x, labels, train))

        def conv(x, features, kernel, init):
            return nn.Conv(features, (kernel,) * 2, kernel_init=init, dtype=dtype)(x)

        x = nn.Dense(start * start * first, kernel_init=inits.other, dtype=dtype)(z)
        x = x.reshape(-1, start, start, first)
        for features in blocks:
            residual = conv(_twice(activate(x)), features, 3, inits.branch)
            residual = conv(activate(residual), features, 3, inits.branch)
            # A 1x1 convolution and nearest-neighbour upsampling commute.
            shortcut = x if self.cosgrove else conv(x, features, 1, inits.shortcut)
            x = _twice(shortcut) + residual
        x = conv(activate(x), self.channels, 3, inits.other)
        return jnp.tanh(x.astype(jnp.float32))


class ResNetDiscriminator(_Discriminator):
    """The ResNet's.

    At size 32 and width 64 (table 4): residual blocks of 128 channels, two that halve the grid and
    two that do not; ReLU, the sum over all pixels, dense to 1. Above 32 (tables 5 and 6) blocks of
    64, 128, ... channels halve it to 3x3 or 4x4, and one more does not. Cosgrove's takes the mean
    over all pixels.
    """

    cosgrove: bool = False

    @nn.compact
    def __call__(self, x: Array, labels: Array | None = None) -> Array:
        inits = _resnet_inits(self.authors, self.cosgrove)
        inits = Inits(*(self.kernel_init or init for init in inits))
        n_doublings(x.shape[-2])  # raises where nothing fits
        if x.shape[-2] <= 32:
            blocks = [(2 * self.width, down) for down in (True, True, False, False)]
        else:
            halvings = math.ceil(math.log2(x.shape[-2] / 4))
            blocks = [(self.width * 2**i, True) for i in range(halvings)]
            blocks.append((min(16 * self.width, self.width * 2**halvings), False))

        def activate(x):
            return nn.relu(Standardize(self.axes, self.dtype)(x))

        def conv(x, features, kernel, init):
            return nn.Conv(features, (kernel,) * 2, kernel_init=init, dtype=self.dtype)(x)

        for i, (features, down) in enumerate(blocks):
            hidden = features if i == 0 else x.shape[-1]
            residual = conv(activate(x) if i else x, hidden, 3, inits.branch)
            residual = conv(activate(residual), features, 3, inits.branch)
            residual = _pool(residual) if down else residual
            shortcut = x
            # A 1x1 convolution and an average commute: the average first is four times cheaper.
            shortcut = _pool(shortcut) if down else shortcut
            if down or features != x.shape[-1]:
                shortcut = conv(shortcut, features, 1, inits.shortcut)
            x = shortcut + residual
        x = activate(x).astype(jnp.float32)
        pool = jnp.mean if self.cosgrove else jnp.sum
        return self.head(pool(x, (1, 2)), labels, inits.other)


class Architecture(NamedTuple):
    """A pair of networks."""

    generator: Callable[..., nn.Module]
    discriminator: Callable[..., nn.Module]
    n_levels: Callable[[int], int]
    """How often the generator doubles its grid up to a size; ValueError where it cannot."""

    def of(self, **options: bool) -> "Architecture":
        """Both networks with these options."""
        networks = (partial(network, **options) for network in self[:2])
        return Architecture(*networks, self.n_levels)


_CNN = Architecture(Generator, Discriminator, n_stages)
_RESNET = Architecture(ResNetGenerator, ResNetDiscriminator, n_doublings)
ARCHITECTURES = {
    "cnn": _CNN, "resnet": _RESNET, "cnn-authors": _CNN.of(authors=True),
    "resnet-authors": _RESNET.of(authors=True), "cosgrove": _RESNET.of(cosgrove=True),
}  # fmt: skip


def fitting_size(architecture: str, size: int) -> int:
    """The smallest size from this one on that the networks fit."""
    for candidate in range(max(size, 4), 2 * size + 8):
        try:
            ARCHITECTURES[architecture].n_levels(candidate)
            return candidate
        except ValueError:
            continue
    raise AssertionError(f"{architecture} fits nothing from {size} on")


def fit(images: Array, size: int) -> Array:
    """Images (n, h, w, c) of uint8 made square: resized if need be, then padded with zeros.

    Images whose longer side is above ``size`` are resized, antialiased, so that it is ``size``.
    """
    n, h, w, c = images.shape
    if max(h, w) > size:
        h, w = (round(side * size / max(h, w)) for side in (h, w))
        # A batch at a time: float32 copies of a whole data set may not fit.
        resize = jax.jit(lambda x: jax.image.resize(x.astype(jnp.float32), (len(x), h, w, c),
                                                    "linear", antialias=True))  # fmt: skip
        parts = [resize(images[i : i + 1000]) for i in range(0, n, 1000)]
        images = jnp.concatenate([jnp.round(x).clip(0, 255).astype(jnp.uint8) for x in parts])
    pads = [((size - side) // 2, (size - side + 1) // 2) for side in (h, w)]
    return jnp.pad(images, [(0, 0), *pads, (0, 0)])
