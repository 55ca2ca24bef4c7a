"""sn_jax.linen.SpectralNorm behaves as the module it is around."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import module as module_lib
from test_convert import recorded

import sn_jax
from sn_jax import convert
from sn_jax.linen import SpectralNorm, bake, load_state, spectral_norms, views

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
TOKENS = np.array([1, 2, 3])


class AutoEncoder(nn.Module):
    """Methods, a helper that Flax does not wrap, a property, a field, and raw submodules."""

    width: int = 3

    def setup(self):
        self.enc, self.dec = nn.Dense(self.width), nn.Dense(5)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x, *, double=False):
        return self.enc(x) * (2 if double else 1)

    def decode(self, z):
        return self.dec(z)

    @nn.nowrap
    def shape_of(self, n):
        return (n, self.width)

    @property
    def size(self):
        return self.width**2


def norm_of(apply, size):
    """Of an affine map, by basis vectors."""
    eye = jnp.eye(size + 1, size)
    y = apply(eye)
    return np.linalg.norm(y[:size] - y[size], 2)


def test_interceptors_run_once_a_layer_and_see_no_tracers_of_ours():
    model = SpectralNorm(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]))
    variables = model.init(KEY, X)
    calls = []

    def shift(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        last = isinstance(context.module, nn.Dense) and context.module.features == 3
        # Flax itself checks setup methods by a function of its own.
        if last and context.method_name == "__call__":
            calls.append(y)
            return y + 1
        return y

    with nn.intercept_methods(shift):
        for mutable in (False, ["batch_stats"]):
            shifted = model.apply(variables, X, mutable=mutable)
            plain = model.apply(variables, X) if mutable else shifted
            shifted = shifted[0] if mutable else shifted
            assert np.shape(plain) == np.shape(shifted)
        initial, _ = model.init_with_output(KEY, X)
    assert len(calls) == 4
    assert all(isinstance(y, jax.Array) and not isinstance(y, jax.core.Tracer) for y in calls)
    eager = model.apply(variables, X)
    with nn.intercept_methods(shift):
        np.testing.assert_allclose(model.apply(variables, X) - eager, 1, rtol=1e-5)
        np.testing.assert_allclose(initial - model.init_with_output(KEY, X)[0], 0, atol=1e-6)


def test_intermediates_are_captured_once():
    model = SpectralNorm(nn.Sequential([nn.Dense(4)]))
    variables = model.init(KEY, X)
    _, captured = model.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    entries = captured["intermediates"]["layer_instance"]["layers_0"]["__call__"]
    assert [y.shape for y in entries] == [(2, 4)]


def test_flax_keeps_what_we_hide_interceptors_by():
    """Private names of Flax that ``_quiet`` uses."""
    assert isinstance(module_lib._global_interceptor_stack._storage, list)
    assert isinstance(module_lib._context.capture_stack, list)
    assert isinstance(module_lib._context.call_info_stack, list)


def test_methods_run_with_normalized_kernels():
    model = SpectralNorm(AutoEncoder(), warmup=100)
    variables = model.init(KEY, X)
    encode = lambda x: model.apply(variables, x, method="encode")  # noqa: E731
    np.testing.assert_allclose(norm_of(encode, 5), 1, rtol=1e-3)
    np.testing.assert_allclose(
        model.apply(variables, X, method="encode", double=True), 2 * encode(X), rtol=1e-6
    )
    z = encode(X)
    np.testing.assert_allclose(
        model.apply(variables, z, method="decode"), model.apply(variables, X), rtol=1e-5, atol=1e-6
    )
    by_function = model.apply(variables, X, method=lambda m, x: m.decode(m.encode(x)))
    np.testing.assert_allclose(by_function, model.apply(variables, X), rtol=1e-5, atol=1e-6)
    # Training: what the method uses is updated, the rest is not.
    _, updates = model.apply(variables, X, method="encode", mutable=["batch_stats"])
    assert updates["batch_stats"].keys() == variables["batch_stats"].keys()
    plain = bake(model, variables, X, method="encode")
    np.testing.assert_allclose(np.linalg.norm(plain["params"]["enc"]["kernel"], 2), 1, rtol=1e-3)
    raw = variables["params"]["layer_instance"]["dec"]["kernel"]
    np.testing.assert_array_equal(plain["params"]["dec"]["kernel"], raw)
    whole = bake(model, variables, X)
    np.testing.assert_allclose(
        AutoEncoder().apply(whole, X, method="encode"), encode(X), rtol=1e-5, atol=1e-6
    )
    seen = views(AutoEncoder(), {"params": variables["params"]["layer_instance"]}, X,
                 method="encode", rules={"dec/.*": None})  # fmt: skip
    assert list(seen) == ["enc/kernel"]


def test_plain_attributes_are_the_layers_and_raw_submodules_are_not_handed_out():
    model = SpectralNorm(AutoEncoder())
    assert (model.size, model.width, model.shape_of(2)) == (9, 3, (2, 3))
    with pytest.raises(AttributeError, match=r"no attribute 'decoder'.*AutoEncoder|AutoEncoder"):
        _ = model.decoder

    class Holder(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    with pytest.raises(AttributeError, match="inner is a raw submodule of Holder"):
        _ = SpectralNorm(Holder(nn.Dense(2))).inner


def test_a_tied_embedding_reads_and_multiplies_by_one_normalized_table():
    class Tied(nn.Module):
        def setup(self):
            self.embed = SpectralNorm(nn.Embed(7, 4), warmup=100)

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    model = Tied()
    variables = model.init(KEY, TOKENS)
    table = variables["params"]["embed"]["layer_instance"]["embedding"]
    table = table / np.linalg.norm(table, 2)
    expected = table[TOKENS] @ table.T
    np.testing.assert_allclose(model.apply(variables, TOKENS), expected, rtol=1e-3, atol=1e-5)


def test_cells_in_an_rnn():
    x = np.ones((2, 3, 5), np.float32)
    stateless = nn.RNN(SpectralNorm(nn.SimpleCell(4), stateless=True))
    assert stateless.apply(stateless.init(KEY, x), x).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"SpectralNorm\(nn.RNN\(cell\)\)"):
        nn.RNN(SpectralNorm(nn.SimpleCell(4))).init(KEY, x)
    around = SpectralNorm(nn.RNN(nn.SimpleCell(4)))
    assert around.apply(around.init(KEY, x), x).shape == (2, 3, 4)


def torch_case(name):
    layers = {
        "linear": nn.Dense(4),
        "conv2d": nn.Conv(6, (3, 2), 2, padding=1, feature_group_count=2),
    }
    record = recorded("hook")[name]
    x = np.moveaxis(record["x"], 1, -1) if record["x"].ndim > 2 else record["x"]
    return layers[name], jnp.asarray(x), record


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_eval_is_torchs_with_the_stored_pair(name):
    layer, x, record = torch_case(name)
    wrapped = SpectralNorm(layer, store_v=True)
    variables = wrapped.init(KEY, x)
    template = variables["params"]["layer_instance"]
    loaded = load_state(variables, *convert.from_torch(record["state"], template))
    y = np.moveaxis(wrapped.apply(loaded, x), -1, 1)
    scale = np.abs(record["eval"]).max()
    np.testing.assert_allclose(y, record["eval"], atol=1e-6 * scale)
    for output in record["train"]:
        y, updates = wrapped.apply(loaded, x, mutable=["batch_stats"])
        loaded = {**loaded, **updates}
        np.testing.assert_allclose(np.moveaxis(y, -1, 1), output, atol=1e-5 * scale)
    # Without the option eval iterates from u, as flax's does.
    flax_like = SpectralNorm(layer)
    variables = load_state(flax_like.init(KEY, x), *convert.from_torch(record["state"], template))
    stored = {key.rpartition("/")[2] for key in variables["batch_stats"]}
    assert stored == {"u", "sigma"}
    assert np.abs(np.moveaxis(flax_like.apply(variables, x), -1, 1) - record["eval"]).max() > 1e-6


class Two(nn.Module):
    wrap: bool

    @nn.compact
    def __call__(self, x):
        sn = SpectralNorm if self.wrap else lambda layer: layer
        x = nn.relu(sn(nn.Dense(4))(x))
        return sn(nn.DenseGeneral((2, 3)))(x)


def test_sigmas_come_out_and_states_go_in_by_the_paths_of_the_plain_model():
    model, plain = Two(True), Two(False)
    variables = model.init(KEY, X)
    params = plain.init(jax.random.key(1), X)["params"]
    seen = views(plain, {"params": params}, X)
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY, seen))
    loaded = load_state(variables, params, state)
    norms = spectral_norms(loaded)
    assert norms.keys() == {"Dense_0/kernel", "DenseGeneral_0/kernel"}
    for path, sigma in sn_jax.spectral_norms(params, state).items():
        np.testing.assert_allclose(norms[path], sigma, rtol=1e-6)
    normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=1)
    expected = plain.apply({"params": normalized}, X)
    np.testing.assert_allclose(model.apply(loaded, X), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"normalize Dense_0/kernel.*state holds none"):
        load_state(variables, params, {})
    bad = {**params, "Dense_0": {**params["Dense_0"], "kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"Dense_0/kernel of shape \(5, 4\).*params have \(2, 2\)"):
        load_state(variables, bad, state)
    with pytest.raises(ValueError, match="holds no state of SpectralNorm"):
        spectral_norms({"params": params})
    with pytest.raises(TypeError, match="what init returned"):
        views(plain, X)
