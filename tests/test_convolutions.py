"""Linear pieces between images as one convolution: its norm is that of the matrix."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from test_lipschitz import bounds, stretch

import sn_jax
from sn_jax import _graph, _lipschitz

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((4, 3, 3, 3))
conv = nn.Conv


def norm_of_one(fn, x) -> float | None:
    """Of an affine function by the view that it is found to be; None where it is none."""
    graph = _graph.graph_of(fn, x, "cpu")
    (row,) = (found := _lipschitz._Bounds(graph, 1e-9, lambda _: None)).outputs.rows
    pair = found._tap_sum((row,), graph.x)
    if pair is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the bracket is closed
        upper = sn_jax.norm_bounds(pair[1].kernel, pair[1].view, rtol=1e-9).upper
    assert pair[1].error <= 1e-11 * upper
    return float(upper + pair[1].error)


class Net(nn.Module):
    """A function of layers and an image."""

    layers: object

    @nn.compact
    def __call__(self, x):
        return self.layers(x)  # type: ignore


def pool(x, window, strides, padding="VALID"):
    """nn.avg_pool, which does not run in float64 without promotion."""
    zero, axes = np.zeros((), x.dtype), ((1, *window, 1), (1, *strides, 1))
    sums = lax.reduce_window(x, zero, lax.add, *axes, padding)
    return sums * np.array(1 / np.prod(window), x.dtype)


def bn(x):
    return nn.BatchNorm(use_running_average=True)(x)


def with_weights(layers, x):
    """In float64, with statistics and scales that no initialization has."""
    net = Net(layers)
    variables = jax.eval_shape(net.init, KEY, x.astype(np.float32))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda a: rng.standard_normal(a.shape) ** 2 - 0.3, variables)
    stats = variables.pop("batch_stats", {})
    stats = jax.tree.map(lambda a: np.abs(a) + 0.1, stats)
    return lambda x: net.apply({**variables, "batch_stats": stats}, x)


def roll(x, n, axis):
    return jnp.roll(x, n, axis)


def around(x, low, high):
    return jnp.pad(x, ((0, 0), (low, high), (high, low), (0, 0)), mode="wrap")


ONE = {
    "BatchNorm": lambda x: bn(conv(4, (3, 3))(x)),
    "BatchNorm before": lambda x: conv(4, (3, 3), padding="VALID")(bn(x)),
    "pool after": lambda x: pool(bn(conv(4, (3, 3))(x)), (2, 2), (2, 2)),
    "pool before": lambda x: conv(4, (3, 3))(pool(x, (2, 2), (2, 2))),
    "1x1 before": lambda x: bn(conv(5, (3, 3), 2)(conv(4, (1, 1))(x))),
    "circular twice": lambda x: conv(2, (3, 3), padding="CIRCULAR")(
        conv(4, (3, 3), padding="CIRCULAR")(x)
    ),
    "circular, strided": lambda x: conv(2, (3, 3), padding="CIRCULAR")(
        bn(conv(4, (3, 3), 2, padding="CIRCULAR")(x))
    ),
    "around, not alike": lambda x: conv(4, (4, 4), padding="VALID")(around(x, 1, 2)),
    "rolled": lambda x: 4 * x - roll(x, 1, 1) - roll(x, -1, 1) - roll(x, 1, 2) - roll(x, -1, 2),
    "mirrored": lambda x: bn(conv(4, (3, 3), padding="REFLECT")(x)),
    "mirrored, strided": lambda x: bn(conv(4, (5, 5), 2, padding="REFLECT")(x)),
    "VALID twice": lambda x: conv(2, (3, 3), padding="VALID")(conv(4, (2, 2), padding="VALID")(x)),
    "VALID last": lambda x: conv(2, (3, 3), 2, padding="VALID")(conv(4, (3, 3))(x)),
    "x + conv(x)": lambda x: x + bn(conv(3, (3, 3))(x)),
    "x - conv(x)": lambda x: x - conv(3, (3, 3), padding="CIRCULAR")(x),
    "two ways": lambda x: (
        pool(conv(4, (3, 3))(x), (2, 2), (2, 2)) + conv(4, (1, 1))(pool(x, (2, 2), (2, 2)))
    ),
    "channels side by side": lambda x: bn(jnp.concatenate([x, conv(4, (3, 3))(x)], -1)),
    "groups, then 1x1": lambda x: conv(4, (1, 1))(conv(6, (3, 3), feature_group_count=3)(x)),
    "dilated": lambda x: bn(conv(4, (3, 3), kernel_dilation=2)(x)),
    "mean of all pixels": lambda x: nn.Dense(5)(bn(conv(4, (3, 3))(x)).mean((1, 2))),
    "cropped": lambda x: conv(4, (3, 3))(x)[:, 1:5, 1:-1],
    "channels chosen": lambda x: conv(4, (3, 3))(x[..., ::-1])[..., 1:3],
    "all numbers of an image": lambda x: nn.Dense(4)(conv(4, (3, 3))(x).reshape(1, -1)),
    "differences": lambda x: x[:, 1:] - x[:, :-1],
    "channels first": lambda x: (
        lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2),
            KERNEL.astype(x.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        * np.arange(1, 5, dtype=x.dtype)[None, :, None, None]
    ),
}
# Maps that are no one convolution of a view.
NONE = {
    "zeros at both borders": lambda x: conv(2, (3, 3))(conv(4, (3, 3))(x)),
    "a pool over the border": lambda x: pool(conv(4, (3, 3))(x), (3, 3), (1, 1), "SAME"),
    "around one axis alone": lambda x: conv(4, (3, 3), padding=((0, 0), (1, 1)))(
        jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="wrap")
    ),
    "a factor for each pixel": lambda x: (
        conv(4, (3, 3))(x) * np.arange(1, 7, dtype=x.dtype)[None, :, None, None]
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_one_convolution(name):
    x = np.zeros((1, 6, 6, 3))
    fn = with_weights(ONE[name], x)
    found = norm_of_one(fn, x)
    np.testing.assert_allclose(found, stretch(fn, x), rtol=2e-8)


@pytest.mark.parametrize("name", NONE)
def test_no_convolution(name):
    x = np.zeros((1, 6, 6, 3))
    assert norm_of_one(with_weights(NONE[name], x), x) is None


def random_layers(rng):
    """Up to three linear layers of random kinds."""
    steps = []
    for _ in range(rng.integers(1, 4)):
        kind, k, s = rng.integers(6), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        low, high = rng.integers(0, 3, 2)
        padding = ["SAME", "VALID", "CIRCULAR", [(int(low), int(high))] * 2][rng.integers(4)]
        steps.append((kind, k, s, padding))

    def layers(x):
        for kind, k, s, padding in steps:
            n = min(x.shape[1:3])
            if kind == 0 and n >= 2:
                x = pool(x, (2, 2), (s, s))
            elif kind == 1:
                x = bn(x)
            elif kind == 2:
                x = x + conv(x.shape[-1], (k, k), padding="CIRCULAR")(x)
            elif kind == 3 and n > 2:
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
            elif n >= k:
                x = conv(2, (k, k), s, padding=padding)(x)
        return x

    return layers


def test_random_layers():
    found = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = np.zeros((1, int(rng.integers(3, 8)), int(rng.integers(3, 8)), 2))
        fn = with_weights(random_layers(rng), x)
        one, sigma = norm_of_one(fn, x), stretch(fn, x)
        if one is not None:
            found += 1
            np.testing.assert_allclose(one, sigma, rtol=2e-8, err_msg=str(seed))
    assert found >= 4


def test_a_residual_network_is_bounded_alike(monkeypatch):
    """By convolutions as by matrices, from two sources too."""

    def layers(x):
        x = nn.relu(bn(conv(3, (3, 3))(x)))
        y = nn.relu(bn(conv(3, (3, 3))(x)))
        y = x + bn(conv(3, (3, 3))(y))
        return pool(conv(2, (1, 1))(nn.relu(y)) + conv(2, (1, 1))(x), (2, 2), (2, 2))

    x = np.zeros((1, 6, 6, 2))
    fn = with_weights(layers, x)
    matrices = bounds(fn, x, "joint")
    monkeypatch.setattr(_lipschitz, "_LARGE", 0)
    monkeypatch.setattr(_lipschitz._Bounds, "maps", None)  # no matrix is formed
    taps = bounds(fn, x, "joint")
    np.testing.assert_allclose(taps["merged"], matrices["merged"], rtol=1e-5)
    assert matrices["joint"] * (1 - 1e-5) <= taps["joint"] < taps["merged"]
