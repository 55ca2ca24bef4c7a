"""Random programs that have a Lipschitz constant: what ``lipschitz_bound`` is attacked with.

A program is a chain of layers, drawn with their weights from one generator: maps along an axis,
convolutions, pools, norms, softmaxes, sorting, gates, loops, and combinations of smaller programs
(residual, concat, split, scan, jit, a constant branch). Every layer is continuous and every
program has a finite constant, so that an infinite bound is a finding as well.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Layer = Callable[[jax.Array], jax.Array]
Shape = tuple[int, ...]

MOST_ENTRIES = 96
SHAPES = ((5,), (12,), (3, 4), (6, 2), (1, 4, 4, 2), (1, 5, 6, 1))


def random_program(rng: np.random.Generator) -> tuple[Layer, np.ndarray]:
    """A function with a finite Lipschitz constant, and an argument of it.

    Args:
      rng: what everything is drawn from; equal generators give equal programs.

    Returns:
      tuple: (the function of one array, an array (float64) of normal numbers).

    Example:
      >>> fn, x = random_program(np.random.default_rng(0))
      >>> x.shape
      (1, 5, 6, 1)
    """
    shape = _one_of(rng, SHAPES)
    fn = _chain(rng, shape, int(rng.integers(1, 6)), depth=2)
    return fn, rng.standard_normal(shape)


def _one_of(rng: np.random.Generator, things):
    return things[int(rng.integers(len(things)))]


def _out_shape(fn: Layer, shape: Shape) -> Shape:
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.result_type(float))).shape


def _chain(rng: np.random.Generator, shape: Shape, n_layers: int, depth: int) -> Layer:
    layers = []
    for _ in range(n_layers):
        layer = _layer(rng, shape, depth)
        out = _out_shape(layer, shape)
        if 0 < math.prod(out) <= MOST_ENTRIES:
            layers.append(layer)
            shape = out

    def fn(x):
        for layer in layers:
            x = layer(x)
        return x

    return fn


def _layer(rng: np.random.Generator, shape: Shape, depth: int) -> Layer:
    makers = [*_ANY_RANK, *_BY_RANK.get(len(shape), ()), *(_NESTED if depth else ())]
    maker = _one_of(rng, makers)
    return maker(rng, shape, depth) if maker in _NESTED else maker(rng, shape)


def _weights(rng: np.random.Generator, *shape: int, fan_in: int) -> np.ndarray:
    return rng.standard_normal(shape) * float(rng.choice([0.5, 1.0, 1.5])) / np.sqrt(fan_in)


def _at_end(rng: np.random.Generator, shape: Shape, fn: Layer) -> Layer:
    """The layer, then a map of its channels back to those of ``shape``."""
    channels = _out_shape(fn, shape)[-1]
    w = _weights(rng, channels, shape[-1], fan_in=channels)
    return lambda x: fn(x) @ w


# Functions of one number.

FUNCTIONS: tuple[Layer, ...] = (
    jax.nn.relu, jax.nn.leaky_relu, jax.nn.elu, jax.nn.selu, jax.nn.celu, jax.nn.relu6, jnp.tanh,
    jax.nn.sigmoid, jax.nn.softplus, jax.nn.gelu, partial(jax.nn.gelu, approximate=False),
    jax.nn.silu, jax.nn.mish, jax.nn.hard_tanh, jax.nn.hard_swish, jax.nn.soft_sign,
    jax.nn.log_sigmoid, jax.nn.squareplus, jnp.sin, jnp.cos, jnp.abs, jnp.arctan, lax.erf,
    lambda x: jnp.clip(x, -0.7, 1.3), lambda x: jnp.where(x > 0.5, 2 * x - 0.5, x),
    lambda x: x / (1 + jnp.exp(-x)), lambda x: jnp.tanh(x) ** 3, lambda x: x + jnp.sin(x) ** 2,
    lambda x: jax.nn.relu(x) + jax.nn.relu(-x), lambda x: jnp.sqrt(1 + x**2), jnp.arcsinh,
    lambda x: jnp.logaddexp(x, 0.5 * x), lambda x: x * lax.rsqrt(1 + x * x),
    lambda x: jnp.log(jnp.cosh(x)), lambda x: jnp.exp(-(x**2)),
)  # fmt: skip


def _function(rng, shape):
    f = _one_of(rng, FUNCTIONS)
    kind = int(rng.integers(4))
    a, b = float(rng.normal()), float(rng.normal())
    if kind == 0:
        return lambda x: f(a * x + b)
    if kind == 1:  # other numbers for every channel
        scales = rng.standard_normal((1,) * (len(shape) - 1) + shape[-1:])
        return lambda x: f(x * scales) - scales
    return f


def _prelu(rng, shape):
    slopes = rng.standard_normal(shape)
    return lambda x: jnp.where(x >= 0, x, slopes * x)


# Linear layers.


def _dense(rng, shape):
    n = int(rng.integers(1, 7))
    w, f = _weights(rng, shape[-1], n, fan_in=shape[-1]), _one_of(rng, FUNCTIONS)
    b = rng.standard_normal((1,) * (len(shape) - 1) + (n,))
    return lambda x: f(x @ w + b)


def _mix(rng, shape):
    axis = int(rng.integers(len(shape)))
    n = shape[axis]
    w = _weights(rng, n, n, fan_in=n)
    return lambda x: jnp.moveaxis(jnp.tensordot(w, x, (1, axis)), 0, axis)


def _moved(rng, shape):
    """Entries elsewhere, several times or not at all."""
    axis = int(rng.integers(len(shape)))
    n, shift = shape[axis], int(rng.integers(-3, 4))
    order = rng.integers(n, size=n)
    return _one_of(rng, (
        lambda x: jnp.flip(x, axis), lambda x: jnp.roll(x, shift, axis),
        lambda x: jnp.take(x, order, axis), lambda x: jnp.cumsum(x, axis),
        lambda x: jnp.repeat(x, 2, axis), lambda x: x - jnp.flip(x, axis),
        lambda x: lax.slice_in_dim(x, 0, n, 2 if n > 2 else 1, axis), jnp.transpose,
        lambda x: x - x.mean(axis, keepdims=True), lambda x: x.at[0].set(0.5),
        lambda x: jnp.stack([x, 2 * x], -1).reshape(*x.shape[:-1], 2 * x.shape[-1]),
    ))  # fmt: skip


def _padded(rng, shape):
    axis = int(rng.integers(len(shape)))
    mode = _one_of(rng, ("constant", "edge", "wrap", "reflect", "symmetric"))
    low, high = (int(n) for n in rng.integers(0, 2 if shape[axis] > 1 else 1, size=2))
    widths = [(low, high) if i == axis else (0, 0) for i in range(len(shape))]
    return lambda x: jnp.pad(x, widths, mode=mode)


def _masked(rng, shape):
    mask, other = rng.random(shape) < 0.5, float(rng.normal())
    return lambda x: jnp.where(mask, x, other * jnp.flip(x, -1))


def _einsum(rng, shape):
    w = _weights(rng, 2, *shape, fan_in=shape[-1])
    letters = "abcd"[: len(shape)]
    f = _one_of(rng, FUNCTIONS)
    return lambda x: f(jnp.einsum(f"k{letters},{letters}->{letters[:-1]}k", w, x))


def _convolution(rng, shape):
    """Of images, with strides, dilations, groups and other paddings."""
    c, groups = shape[-1], _one_of(rng, (1, 1, shape[-1]))
    size = tuple(int(k) for k in rng.integers(1, 4, size=2))
    n = groups * int(rng.integers(1, 4))
    w = _weights(rng, *size, c // groups, n, fan_in=size[0] * size[1] * c // groups)
    options = {
        "window_strides": tuple(int(s) for s in rng.integers(1, 3, size=2)),
        "padding": _one_of(rng, (((1, 1), (1, 1)), ((0, 0), (0, 0)), ((1, 0), (2, 1)))),
        "rhs_dilation": _one_of(rng, ((1, 1), (1, 1), (2, 1))),
        "lhs_dilation": _one_of(rng, ((1, 1), (1, 1), (1, 2))),
        "feature_group_count": groups,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    f = _one_of(rng, FUNCTIONS)
    wrap = bool(rng.integers(4) == 0)

    def fn(x):
        if wrap:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        return f(lax.conv_general_dilated(x, w, **options))

    return fn


def _sequence_convolution(rng, shape):
    w = _weights(rng, 3, shape[1], shape[1], fan_in=3 * shape[1])
    stride = int(rng.integers(1, 3))
    numbers = ("NHC", "HIO", "NHC")
    return lambda x: lax.conv_general_dilated(x[None], w, (stride,), "SAME",
                                              dimension_numbers=numbers)[0]  # fmt: skip


def _space_to_depth(rng, shape):
    del rng
    n, h, w, c = shape
    if h % 2 or w % 2:
        return jnp.abs
    return lambda x: x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(
        n, h // 2, w // 2, 4 * c)  # fmt: skip


# Pools.


def _pool(rng, shape):
    axes = [0] if len(shape) == 2 else [1, 2]
    window, strides, dilation = [1] * len(shape), [1] * len(shape), [1] * len(shape)
    for axis in axes:
        window[axis], strides[axis] = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        dilation[axis] = _one_of(rng, (1, 1, 2))
    padding = _one_of(rng, ("SAME", "VALID"))
    sums = partial(lax.reduce_window, init_value=0.0, computation=lax.add, window_dimensions=window,
                   window_strides=strides, padding=padding, window_dilation=dilation)  # fmt: skip
    kind = int(rng.integers(4))
    if kind == 0:
        return lambda x: sums(x) / math.prod(window)
    if kind == 1:  # only the pixels that are there count
        counts = np.maximum(sums(np.ones(shape, np.float32)), 1).astype(np.float64)
        return lambda x: sums(x) / counts
    start, computation = ((-jnp.inf, lax.max), (jnp.inf, lax.min))[kind - 2]
    full = padding if kind == 3 else "SAME"  # windows without a pixel would be infinite
    return lambda x: jnp.clip(
        lax.reduce_window(x, start, computation, window, strides, full, window_dilation=dilation),
        -1e3, 1e3,
    )  # fmt: skip


# What is known only together.


def _norm(rng, shape):
    axis, scale = int(rng.integers(len(shape))), float(rng.normal())
    eps = float(rng.choice([0.03, 0.3, 1.0]))
    mean = partial(jnp.mean, axis=axis, keepdims=True)

    def layer_norm(x):
        x = x - mean(x)
        return x * lax.rsqrt(mean(x**2) + eps) * scale

    def fast_layer_norm(x):
        variance = jnp.maximum(0.0, mean(x**2) - mean(x) ** 2)
        return (x - mean(x)) / jnp.sqrt(variance + eps)

    def length_one(x):
        return x / jnp.maximum(jnp.sqrt(jnp.sum(x**2, axis, keepdims=True)), eps)

    return _one_of(rng, (
        layer_norm, fast_layer_norm, length_one,
        lambda x: scale * x / jnp.sqrt(mean(x**2) + eps),
        lambda x: jax.nn.standardize(x, axis, epsilon=eps),
        lambda x: (x - x.mean()) / jnp.sqrt(x.var() + eps),
    ))  # fmt: skip


def _batch_norm(rng, shape):
    one = (1,) * (len(shape) - 1) + shape[-1:]
    mean, scale = rng.standard_normal(one), rng.standard_normal(one)
    variance = rng.random(one) + 0.1
    return lambda x: (x - mean) * lax.rsqrt(variance + 1e-5) * scale + mean


def _softmax(rng, shape):
    axis, beta = int(rng.integers(len(shape))), float(rng.choice([0.5, 1.0, 3.0]))
    mask = rng.random(shape) < 0.6
    mask |= ~mask.any(axis, keepdims=True)
    lowest = float(rng.choice([-1e9, -1e30]))
    return _one_of(rng, (
        lambda x: jax.nn.softmax(beta * x, axis), lambda x: jax.nn.log_softmax(x, axis),
        lambda x: jax.nn.logsumexp(x, axis, keepdims=True), lambda x: x - jax.nn.logsumexp(x),
        lambda x: jax.nn.softmax(jnp.where(mask, x, lowest), axis),
        lambda x: jax.nn.softmax(jnp.where(mask, beta * x, -jnp.inf), axis),
        lambda x: jax.nn.softmax(x, axis, where=mask),
    ))  # fmt: skip


def _sorted(rng, shape):
    axis, k = int(rng.integers(len(shape))), max(1, shape[-1] // 2)
    return _one_of(rng, (
        lambda x: jnp.sort(x, axis), lambda x: lax.top_k(x, k)[0],
        lambda x: lax.cummax(x, axis), lambda x: jnp.max(x, axis, keepdims=True) - x,
        lambda x: jnp.maximum(x, jnp.flip(x, axis)), lambda x: jnp.minimum(x, 1 - jnp.sin(x)),
    ))  # fmt: skip


def _gate(rng, shape):
    c = shape[-1]
    w, v = (_weights(rng, c, c, fan_in=c) for _ in range(2))
    return _one_of(rng, (
        lambda x: jnp.tanh(x @ w) * jax.nn.sigmoid(x @ v),
        lambda x: jnp.clip(x, -1, 1) * jnp.sin(x @ w), lambda x: (x @ w) * jax.nn.sigmoid(x @ w),
        lambda x: jnp.tanh(x) / (1.5 + jnp.cos(x @ w)),
        lambda x: jax.nn.softmax(x @ w) * jnp.arctan(x),
    ))  # fmt: skip


def _constant_branch(rng, shape):
    del shape
    a, b = _one_of(rng, FUNCTIONS), _one_of(rng, FUNCTIONS)
    index = int(rng.integers(2))
    return _one_of(rng, (
        lambda x: lax.cond(index == 0, a, b, x), lambda x: lax.switch(index, (a, b, jnp.sin), x),
        lambda x: lax.platform_dependent(x, cpu=a, default=a),
    ))  # fmt: skip


def _recurrent(rng, shape):
    """Along the first axis."""
    c, f = shape[1], _one_of(rng, (jnp.tanh, jax.nn.sigmoid, jnp.sin))
    w, v = (_weights(rng, c, c, fan_in=c) for _ in range(2))
    start, reverse = rng.standard_normal(c), bool(rng.integers(2))

    def step(carry, x):
        carry = f(carry @ w + x @ v)
        return carry, carry - x

    return lambda x: lax.scan(step, start.astype(x.dtype), x, reverse=reverse)[1]


# Of smaller programs.


def _residual(rng, shape, depth):
    inner = _same_shape(rng, shape, depth)
    a, b = float(rng.choice([1.0, -0.5])), float(rng.normal())
    return lambda x: a * x + b * inner(x)


def _concat(rng, shape, depth):
    inner = _same_shape(rng, shape, depth)
    axis = int(rng.integers(len(shape)))
    if axis == len(shape) - 1:
        return _at_end(rng, shape, lambda x: jnp.concatenate([x, inner(x)], axis))
    return lambda x: jnp.concatenate([inner(x), x], axis)


def _split(rng, shape, depth):
    if shape[-1] % 2:
        return _residual(rng, shape, depth)
    half = (*shape[:-1], shape[-1] // 2)
    f, g = (_same_shape(rng, half, depth) for _ in range(2))
    join = bool(rng.integers(2))

    def fn(x):
        a, b = jnp.split(x, 2, -1)
        if join:
            return jnp.concatenate([jnp.maximum(f(a), b), jnp.minimum(f(a), b)], -1)
        return jnp.concatenate([f(a), a + g(b)], -1)

    return fn


def _loop(rng, shape, depth):
    inner = _same_shape(rng, shape, depth - 1)
    n, scales = int(rng.integers(1, 4)), rng.standard_normal(3)

    def step(carry, scale):
        return scale.astype(carry.dtype) * inner(carry), None

    return _one_of(rng, (
        lambda x: lax.scan(step, x, scales)[0],
        lambda x: lax.fori_loop(0, n, lambda _, x: 0.5 * x + inner(x), x),
        lambda x: lax.fori_loop(0, n, lambda i, x: inner(x + i.astype(x.dtype)), x),
        lambda x: lax.scan(lambda c, _: (lax.scan(step, c, scales[:2])[0], None), x, None, 2)[0],
    ))  # fmt: skip


def _wrapped(rng, shape, depth):
    inner = _chain(rng, shape, 2, depth - 1)
    return _one_of(rng, (
        jax.jit(inner), jax.checkpoint(inner), lambda x: inner(lax.stop_gradient(x)),
        lambda x: jax.vmap(inner)(x[None])[0], lambda x: lax.map(inner, x[None])[0],
    ))  # fmt: skip


def _same_shape(rng: np.random.Generator, shape: Shape, depth: int) -> Layer:
    """A chain whose values have the shape of its argument."""
    inner = _chain(rng, shape, int(rng.integers(1, 3)), max(depth - 1, 0))
    out = _out_shape(inner, shape)
    if out == shape:
        return inner
    n, m = math.prod(out), math.prod(shape)
    w = _weights(rng, n, m, fan_in=n)
    return lambda x: (inner(x).reshape(n) @ w).reshape(shape)


_ANY_RANK = (
    _function, _function, _prelu, _dense, _dense, _mix, _moved, _moved, _padded, _masked, _einsum,
    _norm, _norm, _batch_norm, _softmax, _sorted, _gate, _constant_branch,
)  # fmt: skip
_BY_RANK = {
    2: (_sequence_convolution, _pool, _recurrent, _recurrent),
    4: (_convolution, _convolution, _convolution, _pool, _pool, _space_to_depth),
}
_NESTED = (_residual, _residual, _concat, _split, _loop, _wrapped)
