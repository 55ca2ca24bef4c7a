"""lipschitz_bound of models as users hold them: wrappers in eval, converted checkpoints, the
networks of the experiments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from test_convert import APIS, CASES, recorded, template_of
from test_lipschitz import stretch, upper

import sn_jax
import sn_jax.linen
import sn_jax.nnx
from experiments.gan.networks import ARCHITECTURES
from experiments.transformer.model import Block
from sn_jax.convert import from_torch

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
IMAGE, VECTOR, SIGNAL, MANY = (
    np.zeros(shape, np.float32) for shape in [(1, 6, 6, 2), (1, 5), (1, 7, 3), (12, 5)]
)
# What float32 adds to a Jacobian's norm: the certified function is that of real arithmetic.
ROUNDING = 1e-5


def bounds(fn, x) -> dict[str, float]:
    return dict(sn_jax.lipschitz_bound(fn, x, progress=False).bounds)


def attacked(fn, x, steps=30, scale=1.0) -> float:
    return float(sn_jax.lipschitz_attack(fn, KEY, x, steps, restarts=2, scale=scale).lower)


def exactly(fn, x) -> None:
    """The bound of a function that is affine is its norm."""
    sigma = stretch(fn, x)
    assert sigma > 0
    np.testing.assert_allclose(upper(fn, x), sigma, rtol=ROUNDING)


# Wrapped layers: each is affine, so that its Jacobian's SVD says what the bound must be.

OPTIONS = {
    "dense": (nn.Dense(4), VECTOR, {}),
    "many rows": (nn.Dense(4), MANY, {}),  # the kernel is scaled, not the product
    "stateless": (nn.Dense(4), VECTOR, {"stateless": True}),
    "clipped": (nn.Dense(4), VECTOR, {"mode": "clip", "bound": 0.3}),
    "learned scale": (nn.Dense(4), VECTOR, {"use_scale": True}),
    "v kept, two vectors": (nn.Dense(4), VECTOR, {"store_v": True, "n_vectors": 2}),
    "heads": (nn.DenseGeneral((2, 3)), VECTOR, {}),
    "standardized": (nn.WeightNorm(nn.Dense(4)), VECTOR, {}),
    "conv, reshape": (nn.Conv(4, (3, 3), 2), IMAGE, {"conv": "reshape"}),
    "conv, operator": (nn.Conv(4, (3, 3), 2), IMAGE, {"conv": "operator"}),
    "circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), IMAGE, {"conv": "operator"}),
    "groups": (nn.Conv(4, (3, 3), feature_group_count=2), IMAGE, {"conv": "operator"}),
    "transposed": (nn.ConvTranspose(4, (4, 4), (2, 2)), IMAGE, {"conv": "operator"}),
    "causal": (nn.Conv(4, 3, padding="CAUSAL"), SIGNAL, {"conv": "operator"}),
    "block": (nn.Sequential([nn.Conv(3, (3, 3)), nn.Conv(2, (1, 1))]), IMAGE, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrapped_linen_layers(name):
    layer, x, options = OPTIONS[name]
    model = sn_jax.linen.SpectralNorm(layer, **options)
    variables = model.init(KEY, x)
    exactly(lambda x: model.apply(variables, x), x)


NNX_OPTIONS = {
    "linear": (lambda rngs: nnx.Linear(5, 4, rngs=rngs), VECTOR, {}),
    "many rows": (lambda rngs: nnx.Linear(5, 4, rngs=rngs), MANY, {}),
    "stateless": (lambda rngs: nnx.Linear(5, 4, rngs=rngs), VECTOR, {"stateless": True}),
    "learned scale": (lambda rngs: nnx.Linear(5, 4, rngs=rngs), VECTOR, {"use_scale": True}),
    "v kept": (lambda rngs: nnx.Linear(5, 4, rngs=rngs), VECTOR, {"store_v": True}),
    "conv": (lambda rngs: nnx.Conv(2, 4, (3, 3), 2, rngs=rngs), IMAGE, {}),
    "LoRA": (lambda rngs: nnx.LoRALinear(5, 4, lora_rank=2, rngs=rngs), VECTOR, {}),
}


@pytest.mark.parametrize("name", NNX_OPTIONS)
def test_wrapped_nnx_layers(name):
    make, x, options = NNX_OPTIONS[name]
    model = sn_jax.nnx.SpectralNorm(make(nnx.Rngs(0)), rngs=nnx.Rngs(1), **options)
    model.eval()
    exactly(model, x)


@pytest.mark.parametrize("conv", ["reshape", "operator"])
def test_a_wrapped_nnx_model(conv):
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), 2, rngs=nnx.Rngs(0)), nnx.relu, lambda x: x.reshape(len(x), -1),
        nnx.Linear(36, 3, rngs=nnx.Rngs(1)),
    )  # fmt: skip
    views = sn_jax.nnx.views(model, IMAGE, conv=conv)
    model = sn_jax.nnx.wrap(model, views, rngs=nnx.Rngs(2), warmup=200)
    model.eval()
    found = upper(model, IMAGE)
    plain = sn_jax.nnx.bake(model)
    # The wrapper scales a product where the plain layer has a scaled kernel: rounded elsewhere.
    np.testing.assert_allclose(found, upper(plain, IMAGE), rtol=1e-6)
    kernel = np.asarray(plain.layers[0].kernel[...])
    sigma = sn_jax.spectral_norm(kernel, sn_jax.Conv((6, 6), 2))
    product = upper(model, IMAGE, "product")
    np.testing.assert_allclose(product, sigma, rtol=1e-4)  # the dense layer's is 1
    assert sigma == pytest.approx(1, rel=1e-4) if conv == "operator" else sigma > 1.05
    assert attacked(model, IMAGE) <= found * (1 + ROUNDING) <= product * (1 + 2 * ROUNDING)


# Whole networks.


class Discriminator(nn.Module):
    """The README's, for smaller images."""

    conv: str = "reshape"
    features: int = 8

    @nn.compact
    def __call__(self, x):
        wrap = partial(sn_jax.linen.SpectralNorm, conv=self.conv, warmup=200)
        x = nn.leaky_relu(wrap(nn.Conv(self.features, (4, 4), strides=2))(x))
        return wrap(nn.Dense(1))(x.reshape(len(x), -1))


@pytest.mark.parametrize("conv", ["reshape", "operator"])
def test_the_readme_discriminator(conv):
    model = Discriminator(conv)
    variables = model.init(KEY, IMAGE)
    fn = lambda x: model.apply(variables, x)  # noqa: E731
    plain = sn_jax.linen.bake(model, variables, IMAGE)
    kernel = plain["params"]["Conv_0"]["kernel"]
    sigma = sn_jax.spectral_norm(np.asarray(kernel), sn_jax.Conv((6, 6), 2))
    product = upper(fn, IMAGE, "product")
    np.testing.assert_allclose(product, sigma, rtol=1e-4)
    assert sigma == pytest.approx(1, rel=1e-4) if conv == "operator" else sigma > 1.05
    assert attacked(fn, IMAGE) <= upper(fn, IMAGE) * (1 + ROUNDING) <= product * (1 + 2 * ROUNDING)


def test_a_batch_has_the_constant_of_one():
    model = Discriminator(features=3)
    variables = model.init(KEY, IMAGE)
    fn = lambda x: model.apply(variables, x)  # noqa: E731
    one, eight = (
        dict(sn_jax.lipschitz_bound(fn, jnp.zeros((n, *IMAGE.shape[1:]))).bounds) for n in (1, 8)
    )
    assert one.keys() == eight.keys()
    for name, value in eight.items():
        np.testing.assert_allclose(value, one[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("api", APIS)
def test_a_converted_torch_network(api):
    """As torch computes it, channels first, and as Flax does after the conversion."""
    module, name, views = CASES["network"]
    record = recorded(api)[name]
    params, state = from_torch(record["state"], template_of("network"), views)
    params, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
    torch = {key: np.asarray(value) for key, value in record["state"].items()}
    stats = {"mean": torch["1.running_mean"], "var": torch["1.running_var"]}
    kernels = {i: np.asarray(params[path]["kernel"]).T.copy()
               for i, path in {7: "Dense_1", 9: "Dense_0"}.items()}  # fmt: skip
    kernels |= {i: np.asarray(params[path]["kernel"]).transpose(3, 2, 0, 1).copy()
                for i, path in {0: "Conv_0", 3: "Conv_1"}.items()}  # fmt: skip

    def conv(i, x, stride):
        padding = [(1, 1)] * 2
        y = lax.conv_general_dilated(x, kernels[i], (stride,) * 2, padding)
        return y + torch[f"{i}.bias"][:, None, None]

    def as_torch(x):
        x = conv(0, x, 2)
        scale = torch["1.weight"] / jnp.sqrt(stats["var"] + 1e-5)
        x = (x - stats["mean"][:, None, None]) * scale[:, None, None]
        x = conv(3, jax.nn.relu(x + torch["1.bias"][:, None, None]), 1).mean((2, 3))
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * torch["6.weight"] + torch["6.bias"]
        return jax.nn.relu(x @ kernels[7].T + torch["7.bias"]) @ kernels[9].T + torch["9.bias"]

    x = record["x"]
    np.testing.assert_allclose(as_torch(x), record["eval"], rtol=1e-4, atol=1e-5)
    variables = {"params": params, "batch_stats": {"BatchNorm_0": stats}}
    here = bounds(lambda x: module.apply(variables, x), jnp.zeros((1, 8, 8, 2)))
    found = min(here.values())
    assert found < np.inf
    assert attacked(as_torch, jnp.asarray(x[:1])) <= found * (1 + ROUNDING)
    # x as Flax has it, so that the order of the inputs is not the only difference.
    there = bounds(lambda x: as_torch(x.transpose(0, 3, 1, 2)), jnp.zeros((1, 8, 8, 2)))
    for other in (bounds(as_torch, x[:1]), there):
        for name, value in here.items():  # "tight" is searched for
            np.testing.assert_allclose(other[name], value, rtol=1e-6 if name == "tight" else 1e-9)


@pytest.mark.parametrize("architecture", ["cnn", "resnet"])
def test_the_discriminators_of_the_experiments(architecture):
    model, x = ARCHITECTURES[architecture].discriminator(width=3), jnp.zeros((1, 8, 8, 1))
    variables = model.init(KEY, x)
    views = sn_jax.linen.views(model, variables, x, conv="operator")
    state = sn_jax.init(variables["params"], KEY, views)
    state = sn_jax.calibrate(variables["params"], state, rtol=1e-4, max_steps=10_000)
    params, _ = sn_jax.spectral_normalize(variables["params"], state, n_steps=0)
    fn = lambda x: model.apply({"params": params}, x)  # noqa: E731
    found = bounds(fn, x)
    lower = attacked(fn, x)
    assert 0 < lower <= min(found.values()) * (1 + ROUNDING)
    # A chain of maps of norm 1; of a block with its shortcut 2 at most, and of a sum of 4 pixels 2.
    top = {"cnn": 1, "resnet": 2**4 * 2}[architecture]
    assert found["joint"] <= found["merged"] <= found["product"] <= top * (1 + 1e-3)
    assert min(found.values()) < top / 2


def test_the_transformer_example():
    """RMSNorm bounds what attention multiplies, at 1,000 a layer; without it there is no bound."""
    model, x = Block(2), jnp.zeros((1, 4, 8))
    variables = model.init(KEY, x, None)
    fn = lambda x: model.apply(variables, x, None)[0]  # noqa: E731
    bound = sn_jax.lipschitz_bound(fn, x, method="joint")
    # Where the variance of an argument is that of epsilon.
    small = 1e-3 * jax.random.normal(KEY, x.shape)
    assert 1e3 < attacked(fn, small, scale=1e-3) <= bound.upper < np.inf
    attention = nn.MultiHeadDotProductAttention(2)
    variables = attention.init(KEY, x)
    bound = sn_jax.lipschitz_bound(lambda x: x + attention.apply(variables, x), x)
    assert bound.upper == bound.log_upper == np.inf
    reasons = [op for op in bound.ops if op.reason]
    assert reasons
    assert all(op.log_bound == np.inf and op.where for op in reasons)
    assert f"infinite: {reasons[0].where}: {reasons[0].reason}" in str(bound)


CELLS = {
    "LSTM, linen": lambda: nn.RNN(nn.LSTMCell(3)),
    "GRU, linen": lambda: nn.RNN(nn.GRUCell(3)),
    "LSTM, nnx": lambda: nnx.RNN(nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0))),
    "GRU, nnx": lambda: nnx.RNN(nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells(name):
    model, x = CELLS[name](), jnp.zeros((1, 3, 2))
    if isinstance(model, nn.Module):
        variables = model.init(KEY, x)
        fn = lambda x: model.apply(variables, x)  # noqa: E731
    else:  # it counts the keys it draws, so that a trace needs a copy of its own
        parts = nnx.split(model)
        fn = lambda x: nnx.merge(*parts, copy=True)(x)  # noqa: E731
    found = upper(fn, x)
    lower = attacked(fn, x)
    assert 0.1 < lower <= found < 50 * lower


def test_dilated_max_pools():
    """Window 3, stride 2, dilation 2: every pixel of even index is in three windows a dimension,
    and one that is larger than all others moves all of them."""

    def pool(x):
        n = x.ndim
        return lax.reduce_window(x, -jnp.inf, lax.max, (3,) * n, (2,) * n, "VALID",
                                 window_dilation=(2,) * n)  # fmt: skip

    for n in (1, 2):
        x = np.zeros((11,) * n, np.float32)
        x[(4,) * n] = 1
        np.testing.assert_allclose(upper(pool, x), 3 ** (n / 2), rtol=1e-6)
        # JAX has no derivative of these.
        reached = np.linalg.norm(pool(2 * x) - pool(x)) / np.linalg.norm(x)
        np.testing.assert_allclose(reached, 3 ** (n / 2), rtol=1e-6)


def test_bfloat16_says_so():
    model = sn_jax.linen.SpectralNorm(nn.Dense(4, dtype=jnp.bfloat16))
    variables = model.init(KEY, VECTOR)
    bound = sn_jax.lipschitz_bound(lambda x: model.apply(variables, x), VECTOR)
    assert any("bfloat16" in note for note in bound.notes)
    assert "bfloat16" in str(bound)
    plain = sn_jax.lipschitz_bound(lambda x: 2 * x, VECTOR)
    assert not plain.notes
    # sigma is 1, but for the rounding of the kernel to 8 bits.
    assert bound.upper == pytest.approx(1, rel=2e-2)
