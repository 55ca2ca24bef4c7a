"""What enters a product is what gets normalized: checked by an oracle that knows no views.

The oracle runs each linear layer, wherever in a model it runs, on a batch of basis vectors and
takes the singular values of the matrix that comes out.
"""

import pickle
from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sn_jax
import sn_jax.convert
import sn_jax.linen
import sn_jax.nnx
from sn_jax.linen import SpectralNorm, bake, views

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
        try:
            apply()
        except ValueError as error:
            if "data dependency on the scan body" not in str(error):
                raise
            pytest.skip("no layer can be watched: Flax's scan takes no callbacks with this JAX")
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


class Positions(nn.Module):
    """Tables that are read at constant places, one of a single row."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Embed(5, 8)(jnp.arange(5)) + nn.Embed(1, 8)(jnp.zeros((2, 5), int))
        return nn.Dense(4)(x)


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
    "positions": (Positions(), (X,), {}),
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


def changing_message(fn, *parts):
    with pytest.raises(ValueError, match="changed on its way") as error:
        fn()
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("layer", "x", "parts"),
    [
        (Standardized(6, (3, 3)), IMAGES, ["kernel of shape (3, 3, 4, 6)", "sub", "rsqrt"]),
        (
            nn.WeightNorm(nn.Dense(6)),
            X,
            ["layer_instance/kernel of", "layer_instance/kernel/scale"],
        ),
        (Gain(6), X, ["kernel of shape (8, 6)", "mul", "with gain"]),
        (LowRank(6), X, ["kernel of shape (8, 6)", "add", "with a, b"]),
        (Orthogonalized(6), X, ["kernel of shape (8, 6)", "scan"]),
        (ByHand(), X, ["no stock layer", "sub"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_changes_is_refused_by_views_and_bake(layer, x, parts):
    variables = jax.jit(layer.init)(KEY, x)
    changing_message(lambda: views(layer, variables, x), *parts, "rules={", "SpectralNorm")
    wrapped = SpectralNorm(layer)
    if isinstance(layer, ByHand):
        changing_message(lambda: wrapped.init(KEY, x), *parts)
        return
    variables = jax.jit(wrapped.init)(KEY, x)
    changing_message(lambda: bake(wrapped, variables, x), *parts, "no stored kernel")


def test_a_runtime_factor_is_refused_only_where_it_is_unknown():
    layer = Runtime(6)
    variables = jax.jit(layer.init)(KEY, X)
    (view,) = views(layer, variables, X).values()
    assert view == sn_jax.Scaled(sn_jax.Matrix(0, 1), np.full((1, 1), 7, np.float32))
    abstract = {**variables, "temperature": jax.eval_shape(lambda: variables["temperature"])}
    changing_message(lambda: views(layer, abstract, X), "mul")


def test_lora_by_hand_is_refused():
    """What a subclass adds beside the stock product is not seen, so nothing is claimed."""
    layer = AddsOutside(6)
    variables = layer.init(KEY, X)
    for call in (
        lambda: views(layer, variables, X),
        lambda: SpectralNorm(layer).init(KEY, X),
    ):
        with pytest.raises(ValueError, match=r"a of shape \(8, 2\).*; b of shape \(2, 6\)"):
            call()


def test_inside_a_transformation_the_wrapper_says_where_to_go():
    class Block(nn.Module):
        wrap: bool = False

        @nn.compact
        def __call__(self, x, _):
            layer = Gain(8)
            return (SpectralNorm(layer) if self.wrap else layer)(x), None

    scanned = stack(Block)
    changing_message(
        lambda: SpectralNorm(scanned).init(KEY, X, None), "inside the transformation", "gain"
    )
    inner = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )(wrap=True)  # fmt: skip
    variables = inner.init(KEY, X, None)
    norms = norms_of_layers(lambda: inner.apply(variables, X, None))
    np.testing.assert_allclose(*norms.values(), 1, rtol=0.05)


def test_the_gradient_goes_through_the_change():
    """It is that of K / |K|, K the kernel that enters the product."""
    layer = SpectralNorm(Standardized(6, (3, 3), use_bias=False), warmup=400)
    variables = jax.jit(layer.init)(KEY, IMAGES)
    plain = nn.Conv(6, (3, 3), use_bias=False)

    def ours(params):
        y = layer.apply({**variables, "params": params}, IMAGES)
        return jnp.sum(jnp.sin(y))

    def expected(params):
        k = standardized(params["layer_instance"]["kernel"])
        k = k / jnp.linalg.norm(k.reshape(-1, 6), 2)
        return jnp.sum(jnp.sin(plain.apply({"params": {"kernel": k}}, IMAGES)))

    got, wanted = (jax.jit(jax.grad(f))(variables["params"]) for f in (ours, expected))
    scale = np.abs(jax.tree.leaves(wanted)[0]).max()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * scale), got, wanted)


def test_masked_two_by_two():
    """W = [[1, 1], [1, -1]], mask [[1, 1], [1, 0]]: the stored norm would leave 1.1441."""
    w, mask = jnp.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, 1.0], [1.0, 0.0]], np.float32)
    stored = np.linalg.norm(np.asarray(w) * mask, 2) / np.linalg.norm(w, 2)
    np.testing.assert_allclose(stored, 1.1441, atol=1e-4)
    view = sn_jax.Scaled(sn_jax.Matrix(), mask)
    state = sn_jax.init({"w": w}, KEY, {"w": view}, warmup=100)
    normalized = sn_jax.spectral_normalize({"w": w}, state)[0]["w"]
    np.testing.assert_allclose(np.linalg.norm(normalized * mask, 2), 1, rtol=1e-6)
    np.testing.assert_allclose(normalized[1, 1] / normalized[0, 0], -1, rtol=1e-6)
    lower, upper = sn_jax.norm_bounds(w, view)
    assert lower <= np.linalg.norm(np.asarray(w, float) * mask, 2) <= upper <= lower * 1.001
    np.testing.assert_allclose(sn_jax.spectral_norm(w, view), lower, rtol=1e-3)


def test_the_constant_is_part_of_the_view():
    mask = np.tril(np.ones((4, 3), np.float32))
    view, same = (sn_jax.Scaled(sn_jax.Matrix(), m) for m in (mask, jnp.asarray(mask)))
    other = sn_jax.Scaled(sn_jax.Matrix(), mask.T.reshape(4, 3))
    assert view == same
    assert hash(view) == hash(same)
    assert view != other
    mask[:] = 7  # the view keeps what it was given
    assert view == same
    assert pickle.loads(pickle.dumps(view)) == view
    params = {"kernel": jnp.ones((4, 3))}
    state = sn_jax.init(params, KEY, {"kernel": view})
    exported = jax.export.export(jax.jit(sn_jax.spectral_normalize))(params, state)
    again = jax.export.deserialize(exported.serialize())
    assert again.call(params, state)[1]["kernel"].view == view
    restored = sn_jax.convert.from_state_dict(sn_jax.convert.to_state_dict(state), state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    traces = []
    step = jax.jit(lambda p, s: (traces.append(1), sn_jax.spectral_normalize(p, s))[1])
    _, state = step(params, state)
    step(params, sn_jax.init(params, KEY, {"kernel": same}))
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"does not broadcast to a kernel of shape \(4, 4\)"):
        sn_jax.init({"kernel": jnp.ones((4, 4))}, KEY, {"kernel": view})
    with pytest.raises(TypeError, match="Scaled gives the class Matrix"):
        sn_jax.Scaled(sn_jax.Matrix, mask)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda m: sn_jax.Scaled(sn_jax.Matrix(), m).matvec(m, m[0]))(mask)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_a_product_that_rounds(seed):
    """In float64 the product factor * w is rounded: the bracket must hold for the exact one."""
    rng = np.random.default_rng(seed)
    w, factor = rng.standard_normal((1, 1)), rng.standard_normal((1, 1))
    lower, upper = sn_jax.norm_bounds(w, sn_jax.Scaled(sn_jax.Matrix(), factor), rtol=1e-12)
    exact = abs(Fraction(w.item()) * Fraction(factor.item()))
    assert Fraction(float(lower)) <= exact <= Fraction(float(upper))


# The same in NNX.


class NnxMasked(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (8, 6)))

    def __call__(self, x):
        return x @ (self.kernel[...] * MASK)


class NnxStandardized(nnx.Conv):
    def __call__(self, x):
        raw = self.kernel
        self.kernel = nnx.Param(standardized(raw[...]))
        y = super().__call__(x)
        self.kernel = raw
        return y


class NnxGain(nnx.Linear):
    def __init__(self, *args, rngs):
        super().__init__(*args, rngs=rngs)
        self.gain = nnx.Param(jnp.asarray(1.7))

    def __call__(self, x):
        kernel = self.kernel[...] * self.gain[...]
        x, kernel, bias = self.promote_dtype((x, kernel, self.bias[...]), dtype=self.dtype)
        return self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


class NnxTable(nnx.Embed):
    def __call__(self, tokens):
        return self.embedding[...][tokens] * 2.0


def lora_linear(rngs):
    layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)
    layer.lora.lora_b[...] = jax.random.normal(rngs.params(), (2, 6))
    return layer


def lora_around(rngs):
    linear = nnx.Linear(8, 6, rngs=rngs)
    layer = nnx.LoRA(8, 2, 6, base_module=linear, rngs=rngs)
    layer.lora_b[...] = jax.random.normal(rngs.params(), (2, 6))
    return layer


def lora_alone(rngs):
    layer = nnx.LoRA(8, 2, 6, rngs=rngs)
    layer.lora_b[...] = jax.random.normal(rngs.params(), (2, 6))
    return layer


def standardized_conv(rngs):
    return NnxStandardized(4, 6, (3, 3), padding="CIRCULAR", rngs=rngs)


def weight_normed(rngs):
    return nnx.WeightNorm(nnx.Linear(8, 6, rngs=rngs), rngs=rngs)


CONV_MASK = np.tril(np.ones((36, 6), np.float32)).reshape(3, 3, 4, 6)
# name: (make, input, whether the stored kernel times a constant is the whole story)
NNX = {
    "mask": (NnxMasked, FLAT, True),
    "masked conv": (
        lambda rngs: nnx.Conv(4, 6, (3, 3), mask=jnp.asarray(CONV_MASK), rngs=rngs), IMAGES, True,
    ),
    "standardized": (standardized_conv, IMAGES, False),
    "weight norm": (weight_normed, FLAT, False),
    "LoRALinear": (lora_linear, FLAT, False),
    "LoRA around": (lora_around, FLAT, False),
    "LoRA alone": (lora_alone, FLAT, False),
}  # fmt: skip


def nnx_norm(layer, x, flattened=None) -> float:
    _, matrix = with_matrix(layer, x)
    return float(np.linalg.norm(matrix, 2))


@pytest.mark.parametrize("name", NNX)
def test_nnx_wrapper_views_and_bake(name):
    make, x, constant = NNX[name]
    layer = make(nnx.Rngs(0))
    wrapped = sn_jax.nnx.SpectralNorm(make(nnx.Rngs(0)), warmup=100, rngs=nnx.Rngs(1))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(wrapped.layer_instance)))
    nnx.jit(lambda m, x: m(x))(wrapped, x)  # one call warms up
    after = nnx.to_pure_dict(nnx.state(wrapped.layer_instance))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    wrapped.eval()
    if x is IMAGES:
        # The flattened kernel has norm 1: that of the whole map over the map's with that kernel.
        kernel = np.asarray(layer.kernel[...])
        kernel = kernel * CONV_MASK if constant else np.asarray(standardized(kernel))
        plain = nnx.Conv(4, 6, (3, 3), padding=layer.padding, rngs=nnx.Rngs(0))
        plain.kernel[...] = jnp.asarray(kernel / np.linalg.norm(kernel.reshape(-1, 6), 2))
        expected = nnx_norm(plain, x)
    else:
        expected = 1.0
    np.testing.assert_allclose(nnx_norm(wrapped, x), expected, rtol=1e-3)
    if constant:
        (view,) = sn_jax.nnx.views(layer, x).values()
        assert isinstance(view, sn_jax.Scaled)
        baked = sn_jax.nnx.bake(wrapped, x)
        assert type(baked) is type(layer)
        np.testing.assert_allclose(baked(x), wrapped(x), rtol=1e-5, atol=1e-6)
        by_rules = sn_jax.nnx.wrap(layer, sn_jax.nnx.views(layer, x), rngs=nnx.Rngs(0), warmup=100)
        np.testing.assert_allclose(nnx_norm(by_rules, x), expected, rtol=1e-3)
        return
    with pytest.raises(ValueError, match=r"kernel|lora"):
        sn_jax.nnx.views(layer, x)
    with pytest.raises(ValueError, match=r"changed on its way|merge the adapter"):
        sn_jax.nnx.bake(wrapped, x)


def test_nnx_bake_asks_for_a_call_where_it_cannot_know():
    wrapped = sn_jax.nnx.SpectralNorm(NnxMasked(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"around NnxMasked.*bake\(model, x\)"):
        sn_jax.nnx.bake(wrapped)


def test_nnx_subclasses_and_models_of_hubs():
    """Subclasses of Embed that read their table themselves, and bare tables, are seen."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(NnxTable(7, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))
    found = sn_jax.nnx.views(model, TOKENS)
    matrix = sn_jax.Matrix(0, 1)
    assert found == {"layers/0/embedding": matrix, "layers/1/kernel": matrix}

    class HeadsEinsum(nnx.Module):  # (heads, features, dim), as Gemma keeps its queries
        def __init__(self):
            self.w = nnx.Param(jnp.ones((2, 8, 4)))

        def __call__(self, x):
            return jnp.einsum("btd,ndh->btnh", x, self.w[...])

    assert sn_jax.nnx.views(HeadsEinsum(), X) == {"w": sn_jax.Matrix(1, (0, 2))}

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return NnxMasked(rngs)

    class Ensemble(nnx.Module):
        def __init__(self):
            self.members = make(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.members, x)

    (view,) = sn_jax.nnx.views(Ensemble(), FLAT).values()
    assert view == sn_jax.Scaled(sn_jax.Matrix(1, 2), MASK[None])


def test_nnx_learned_gain():
    layer = NnxGain(8, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"changed on its way.*with gain"):
        sn_jax.nnx.views(layer, FLAT)
    wrapped = sn_jax.nnx.SpectralNorm(layer, warmup=100, rngs=nnx.Rngs(0))
    wrapped(FLAT)
    wrapped.eval()
    np.testing.assert_allclose(nnx_norm(wrapped, FLAT), 1, rtol=1e-3)


def test_all_that_is_unseen_is_listed_at_once():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = (
                self.param(name, nn.initializers.normal(1.0), (8, 8)) for name in ("kernel", "w")
            )
            return x * jnp.sum(a**2) + x * jnp.sum(b) + nn.Dense(8)(x)

    variables = Two().init(KEY, X)
    with pytest.raises(
        ValueError, match=r"kernel of shape \(8, 8\).*; w of shape \(8, 8\)"
    ) as error:
        views(Two(), variables, X)
    assert "Dense_0" not in str(error.value)


def test_views_of_one_network_are_not_taken_for_those_of_a_stack():
    """Of an ensemble whose parameters vmap has stacked they would be norms of wrong slices."""
    model = nn.Dense(8)
    keys = jax.random.split(KEY, 3)
    one, stacked = model.init(KEY, X), jax.vmap(lambda key: model.init(key, X))(keys)
    found = views(model, one, X)
    sn_jax.init(one["params"], KEY, found)
    message = r"kernel of shape \(3, 8, 8\).*2 axes.*Matrix\(-2, -1\)"
    with pytest.raises(ValueError, match=message):
        sn_jax.init(stacked["params"], KEY, found)
    state = sn_jax.init(stacked["params"], KEY, {"kernel": sn_jax.Matrix(-2, -1)}, warmup=200)
    expected = np.linalg.norm(stacked["params"]["kernel"], 2, (1, 2))
    np.testing.assert_allclose(state["kernel"].sigma, expected, rtol=1e-4)
