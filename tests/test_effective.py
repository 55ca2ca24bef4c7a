"""What enters a product is what gets normalized: checked by an oracle that knows no views.

The oracle runs each linear layer, wherever in a model it runs, on a batch of basis vectors and
takes the singular values of the matrix that comes out.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
import sn_jax.linen
import sn_jax.nnx
from sn_jax.linen import SpectralNorm, views

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 8)).astype(np.float32)
FLAT = X[:, 0]
IMAGES = RNG.standard_normal((2, 6, 6, 4)).astype(np.float32)
TOKENS = np.array([[1, 2, 3], [4, 5, 1]])
MASK = np.tril(np.ones((8, 6), np.float32))
STOCK = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose)


def with_matrix(layer, x) -> tuple[jax.Array, jax.Array]:
    """Outputs of an affine layer, and its matrix (in, out), from one call: Flax allows no more."""
    size = int(np.prod(x.shape[1:]))
    basis = jnp.eye(size + 1, size, dtype=x.dtype).reshape(size + 1, *x.shape[1:])  # and zero
    y = layer(jnp.concatenate([basis, x]))
    return y[size + 1 :], (y[:size] - y[size]).reshape(size, -1)


def norms_of_layers(apply) -> dict[str, list[float]]:
    """Norms of every linear layer that the call runs, by path; once for each time it runs."""
    found: dict[str, list[float]] = {}
    running = []

    def note(path, matrix):
        for m in matrix.reshape(-1, *matrix.shape[-2:]):
            found.setdefault(path, []).append(np.linalg.norm(m, 2))

    def oracle(next_fun, args, kwargs, context):
        layer, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not args or layer in running:
            return next_fun(*args, **kwargs)
        running.append(layer)
        try:
            return observed(next_fun, args, kwargs, layer, path)
        finally:
            running.pop()

    def observed(next_fun, args, kwargs, layer, path):
        if isinstance(layer, nn.Embed):
            rows = layer.num_embeddings
            y = next_fun(jnp.concatenate([jnp.arange(rows), args[0].ravel()]))
            matrix, y = y[:rows], y[rows:].reshape(*args[0].shape, -1)
        elif isinstance(layer, STOCK) or hasattr(layer, "is_linear"):
            y, matrix = with_matrix(lambda x: next_fun(x, *args[1:], **kwargs), args[0])
        else:
            return next_fun(*args, **kwargs)
        jax.debug.callback(lambda m: note(path, np.asarray(m)), matrix)
        return y

    with nn.intercept_methods(oracle):
        apply()
    jax.effects_barrier()
    return found


# Layers that multiply by something else than they store.


class Plain(nn.Module):
    """x @ W, in no stock layer."""

    is_linear = True

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(1.0), (8, 6))


class OutFirst(nn.Module):
    is_linear = True

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(1.0), (6, 8))
        return jnp.einsum("oi,...i->...o", weight, x)


class Masked(nn.Dense):
    """A subclass that masks its kernel in its own product."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features))
        return x @ (kernel * MASK[: x.shape[-1], : self.features])


class Triangular(nn.Dense):
    """A subclass whose stock product gets the upper triangle, scaled, with a sign."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        return -jnp.triu(w) / np.sqrt(w.shape[0]) if name == "kernel" else w


class TwoParts(nn.Dense):
    """Sums and selections of multiples of one kernel are one multiple."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        random = jax.random.bernoulli(jax.random.key(3), 0.5, w.shape)
        return jnp.where(random, w, 0.25 * w) + 0.5 * w


class Standardized(nn.Conv):
    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        return standardized(w) if name == "kernel" else w


def standardized(w):
    axes = tuple(range(w.ndim - 1))
    return (w - w.mean(axes)) * jax.lax.rsqrt(w.var(axes) + 1e-5)


class Gain(nn.Dense):
    """The kernel times a learned gain."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        return w * super().param("gain", nn.initializers.constant(1.5), ())


class LowRank(nn.Dense):
    """kernel + a b, in the product of the stock layer."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        a = super().param("a", nn.initializers.normal(1.0), (w.shape[0], 2))
        return w + a @ super().param("b", nn.initializers.normal(1.0), (2, w.shape[1]))


class Runtime(nn.Dense):
    """The kernel times a number that a collection holds and every call may change."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        return w * self.variable("temperature", "value", lambda: jnp.asarray(7.0)).value


class AddsOutside(nn.Dense):
    """LoRA by hand: the sum is on the outputs."""

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(1.0), (x.shape[-1], 2))
        b = self.param("b", nn.initializers.normal(1.0), (2, self.features))
        return super().__call__(x) + x @ a @ b


class Orthogonalized(nn.Dense):
    """The kernel goes through a loop of products with itself (Bjorck)."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        step = lambda _, w: 1.5 * w - 0.5 * w @ (w.T @ w)  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, w / 4)


class ByHand(nn.Module):
    """Standardized in no stock layer: nothing to put a hook on."""

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.normal(1.0), (8, 6))
        return x @ standardized(w)


class Through(nn.Module):
    """Products that are changed after the layer has promoted its kernel."""

    @nn.compact
    def __call__(self, x):
        def dot_general(x, w, dims, precision=None, **kwargs):
            return jax.lax.dot_general(x, w * jnp.float32(3), dims, precision=precision, **kwargs)

        return nn.Dense(6, dot_general=dot_general)(x)


# Models.


class GQA(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((4, 2), name="query")(x)
        k, v = (nn.DenseGeneral((2, 2), name=name)(x) for name in ("key", "value"))
        k, v = (jnp.repeat(y, 2, axis=-2) for y in (k, v))
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.dot_product_attention(q, k, v))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = nn.Conv(3, (3, 3), strides=2)(nn.relu(nn.Conv(4, (3, 3))(x)))
        up = nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True)(nn.relu(down))
        return nn.Conv(2, (3, 3), padding="CIRCULAR")(jnp.concatenate([up, x], -1))


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean, log = nn.Dense(3)(x), nn.Dense(3)(x)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        return nn.Dense(8)(nn.Dropout(0.5, deterministic=False)(mean + jnp.exp(log) * noise))


class ScaledEmbed(nn.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * np.sqrt(self.features).astype(np.float32)


class Tied(nn.Module):
    """A table that is read, and multiplied by, also directly."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        x = nn.Dense(4)(embed(tokens))
        return embed.attend(x), x @ embed.embedding.T


class ReadDirectly(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("embedding", nn.initializers.normal(1.0), (7, 8))
        return nn.Dense(4)(table[tokens] * 3.0)


class ScanMasked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.relu(Triangular(8)(x)), None


def stack(block, axis=0, **axes):
    return nn.scan(
        block, variable_axes={"params": axis, **axes}, split_rngs={"params": True}, length=3
    )()


def ensemble(layer, **options):
    return nn.vmap(
        layer, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 0},
        split_rngs={"params": True},
    )(**options)  # fmt: skip


def attention(**options):
    return nn.MultiHeadDotProductAttention(2, **options)


# name: (model, arguments, options of apply)
RIGHT = {
    "x @ W": (Plain(), (X,), {}),
    "output first": (OutFirst(), (X,), {}),
    "mask in __call__": (Masked(6), (X,), {}),
    "triangle, sign, factor": (Triangular(6), (X,), {}),
    "sum of multiples": (TwoParts(6), (X,), {}),
    "masked conv": (nn.Conv(6, (3, 3), mask=np.tril(np.ones((36, 6), np.float32)).reshape(
        3, 3, 4, 6)), (IMAGES,), {}),
    "masked transpose": (nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True,
        mask=np.tril(np.ones((36, 4), np.float32)).reshape(3, 3, 4, 4)), (IMAGES,), {}),
    "factor after promote": (Through(), (X,), {}),
    "scan of triangles": (stack(ScanMasked, axis=1), (X, None), {}),
    "ensemble of masked": (ensemble(Masked, features=6), (X,), {}),
    "ensemble of triangles": (ensemble(Triangular, features=6), (X,), {}),
    "grouped queries": (GQA(), (X,), {}),
    "U-Net": (UNet(), (IMAGES,), {}),
    "VAE": (VAE(), (X,), {"rngs": {"noise": KEY, "dropout": KEY}}),
    "decode cache": (attention(decode=True), (X[:, :1],), {"mutable": ["cache"]}),
    "RNN": (nn.RNN(nn.GRUCell(4)), (X,), {}),
    "scaled embedding": (nn.Sequential([ScaledEmbed(7, 4), nn.Dense(3)]), (TOKENS,), {}),
    "tied table": (Tied(), (TOKENS,), {}),
    "table read directly": (ReadDirectly(), (TOKENS,), {}),
}  # fmt: skip
AT_PRODUCT = {
    "standardized": (Standardized(6, (3, 3)), (IMAGES,), {}),
    "weight norm": (nn.WeightNorm(nn.Dense(6)), (X,), {}),
    "learned gain": (Gain(6), (X,), {}),
    "low rank": (LowRank(6), (X,), {}),
    "runtime factor": (Runtime(6), (X,), {}),
    "loop": (Orthogonalized(6), (X,), {}),
    "block": (nn.Sequential([Standardized(6, (3, 3)), nn.relu, nn.Conv(4, (3, 3))]), (IMAGES,), {}),
}


def expected_norm(name, path):
    """The factor that a layer applies to its outputs is its own."""
    return 2.0 if (name, path) == ("scaled embedding", "layers_0") else 1.0


@pytest.mark.parametrize("name", RIGHT)
def test_views_say_what_enters_the_product(name):
    model, args, options = RIGHT[name]
    rngs = options.get("rngs")
    variables = jax.jit(model.init)({"params": KEY, **(rngs or {})}, *args)
    seen = views(model, variables, *args, conv="operator", rngs=rngs)
    params = variables["params"]
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY, seen), rtol=1e-4)
    normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
    norms = norms_of_layers(
        jax.jit(lambda: model.apply({**variables, "params": normalized}, *args, **options))
    )
    assert norms or name == "table read directly"
    for path, found in norms.items():
        np.testing.assert_allclose(found, expected_norm(name, path), rtol=1e-3, err_msg=path)
    if name == "table read directly":
        np.testing.assert_allclose(np.linalg.norm(normalized["embedding"], 2), 1, rtol=1e-3)


@pytest.mark.parametrize("name", [*RIGHT, *AT_PRODUCT])
def test_the_wrapper_normalizes_what_enters_the_product(name):
    model, args, options = (RIGHT | AT_PRODUCT)[name]
    wrapped, rngs = (
        SpectralNorm(model, conv="operator", n_vectors=3, warmup=300),
        options.get("rngs"),
    )
    init_rngs = {"params": KEY, **(rngs or {})}
    variables = jax.jit(wrapped.init)(init_rngs, *args)
    plain = jax.eval_shape(model.init, init_rngs, *args)["params"]
    shapes = jax.tree.map(jnp.shape, variables["params"]["layer_instance"])
    assert shapes == jax.tree.map(jnp.shape, plain)
    train = partial(wrapped.apply, mutable=["batch_stats", "cache"], rngs=rngs)
    _, updates = jax.jit(train)(variables, *args)
    variables = {**variables, "batch_stats": updates["batch_stats"]}
    norms = norms_of_layers(jax.jit(lambda: wrapped.apply(variables, *args, **options)))
    norms = {path.removeprefix("layer_instance/"): value for path, value in norms.items()}
    assert norms or name == "table read directly"
    for path, found in norms.items():
        np.testing.assert_allclose(found, expected_norm(name, path), rtol=1e-3, err_msg=path)
