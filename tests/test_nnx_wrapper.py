"""sn_jax.nnx.SpectralNorm behaves as the module that it wraps; its state goes in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import checking_leaks
from test_convert import recorded

import sn_jax
from sn_jax.nnx import SpectralNorm, SpectralStat, bake, load_state, spectral_norms, views, wrap

pytestmark = pytest.mark.float32
X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def scaled_linear():
    """A layer of which the norm is 10, far from that of what is normalized."""
    layer = nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    layer.kernel[...] = jnp.asarray(10 * kernel / np.linalg.norm(kernel, 2))
    return layer


class Busy(nnx.Module):
    """Everything that a call can change, and plain arrays of both kinds."""

    def __init__(self):
        self.linear = scaled_linear()
        self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
        self.mask = np.array([1, 1, 0, 1], np.float32)
        self.tables = nnx.data({"sum": jnp.zeros(()), "more": [np.ones(4, np.float32)]})
        self.count = nnx.Variable(jnp.zeros((), int))
        self.calls = 0
        self.cache = nnx.data(None)
        self.old = "to be removed"

    def __call__(self, x):
        self.calls += 1
        self.count[...] += 1
        self.tables["sum"] = self.tables["sum"] + x.sum()
        self.tables["last"] = x.mean()
        self.cache = nnx.Cache(x)
        self.same = self.linear
        if self.calls == 1:
            self.tail = Tail(self.linear)
            del self.old
        if isinstance(self.mask, np.ndarray):  # not under nnx.jit, where new arrays leak anyway
            assert self.mask[0] > 0
            self.scale = jnp.abs(x).max()
        y = self.linear(x) * self.mask
        return self.drop(self.bn(y * self.tables["more"][0]))


class Tail(nnx.Module):
    def __init__(self, linear):
        self.linear = linear


def check_busy(layer, plain):
    """The wrapped layer is what the plain one, fed the same, is after as many calls."""
    assert layer.calls == plain.calls
    assert not hasattr(layer, "old")
    assert layer.same is layer.tail.linear is layer.linear
    assert type(layer.cache) is nnx.Cache
    np.testing.assert_array_equal(layer.linear.kernel[...], plain.linear.kernel[...])  # raw
    kept = nnx.Not(nnx.Any(nnx.BatchStat, nnx.RngKey))
    ours, theirs = (nnx.to_pure_dict(nnx.state(m, kept)) for m in (layer, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    # Ten times smaller activations, up to the estimate of sigma.
    np.testing.assert_allclose(10 * layer.bn.mean[...], plain.bn.mean[...], rtol=0.05, atol=1e-6)
    assert np.abs(plain.bn.mean[...]).max() > 0.01


@pytest.mark.parametrize("how", ["eager", "jit", "rules"])
def test_what_a_call_changes_comes_back(how):
    layer, plain = Busy(), Busy()
    rules = views(layer, X) if how == "rules" else None
    assert layer.calls == 0  # looked at on a copy
    wrapped = SpectralNorm(layer, rules=rules, warmup=50, rngs=nnx.Rngs(1))
    run = nnx.jit(lambda m, x: m(x)) if how == "jit" else lambda m, x: m(x)
    for _ in range(3 if how == "eager" else 2):
        with checking_leaks():
            y = run(wrapped, jnp.asarray(X))
        assert y.shape == (3, 4)
        run(plain, jnp.asarray(X))
    check_busy(layer, plain)
    assert wrapped.calls == plain.calls


def test_bake_keeps_no_trace_of_the_call_that_it_looks_at():
    wrapped = SpectralNorm(Busy(), warmup=50, rngs=nnx.Rngs(1))
    wrapped(X)
    plain = bake(wrapped, X)
    assert plain.calls == wrapped.calls == 1
    assert plain.count[...] == 1
    plain.eval()
    wrapped.eval()
    np.testing.assert_allclose(plain(X), wrapped(X), rtol=1e-5, atol=1e-6)


class Gated(nnx.Module):
    """NumPy attributes that Python code reads."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(np.random.default_rng(2).standard_normal((8, 4)), "float32"))
        self.more = nnx.data([{"mask": np.eye(8, 4, dtype=np.float32), "open": np.array([True])}])

    def __call__(self, x):
        mask, is_open = self.more[0]["mask"], self.more[0]["open"]
        return x @ (self.w[...] * mask) if is_open[0] else jnp.zeros((len(x), 4))


def test_numpy_attributes_are_constants_of_each_call():
    layer = Gated()
    wrapped = SpectralNorm(layer, warmup=200, rngs=nnx.Rngs(0))
    norm = lambda m: np.linalg.norm(m(jnp.eye(8, dtype=jnp.float32)), 2)  # noqa: E731
    np.testing.assert_allclose(norm(wrapped), 1, rtol=1e-4)
    np.testing.assert_allclose(norm(bake(wrapped, X)), 1, rtol=1e-4)
    np.testing.assert_allclose(norm(wrap(layer, views(layer, X), rngs=nnx.Rngs(0), warmup=200)), 1,
                               rtol=1e-4)  # fmt: skip
    layer.more[0]["mask"][:] = 1  # in place
    for _ in range(200):
        wrapped(X)
    np.testing.assert_allclose(norm(wrapped), 1, rtol=1e-4)
    assert norm(layer) > 2
    layer.more[0]["open"][:] = False
    assert norm(wrapped) == 0
    conv = nnx.Conv(1, 2, (3,), mask=np.ones((3, 1, 2), np.float32), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 5, 1))
    assert list(views(conv, x)) == ["kernel"]
    wrapped = SpectralNorm(conv, rngs=nnx.Rngs(0))
    wrapped(x)
    wrapped.eval()
    np.testing.assert_allclose(bake(wrapped, x)(x), wrapped(x), rtol=1e-5)


class Counter(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), int))
        self.last = jnp.zeros(())

    def __call__(self, x):
        self.calls[...] += 1
        self.last = x.sum()
        return jnp.tanh(self.linear(x))


def test_changes_under_grad_vmap_scan_and_split_merge():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return SpectralNorm(Counter(rngs), rngs=rngs)

    members = make(nnx.Rngs(0))
    with checking_leaks():
        nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(members, X)
    np.testing.assert_array_equal(members.calls[...], [1, 1, 1])
    np.testing.assert_allclose(members.last, np.full(3, X.sum()), rtol=1e-5)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, member):
        return member(x)

    forward(jnp.asarray(X), members)
    np.testing.assert_array_equal(members.calls[...], [2, 2, 2])
    assert len(np.unique(members.last)) == 3

    wrapped = SpectralNorm(Counter(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    nnx.grad(lambda m: m(X).sum())(wrapped)
    assert wrapped.calls[...] == 1

    @jax.jit
    def step(graphdef, state, x):
        model = nnx.merge(graphdef, state)
        y = model(x)
        return y, nnx.state(model)

    graphdef, state = nnx.split(wrapped)
    _, state = step(graphdef, state, X)
    assert nnx.merge(graphdef, state).calls[...] == 2
    np.testing.assert_allclose(nnx.merge(graphdef, state).last, X.sum(), rtol=1e-5)
    assert wrapped.calls[...] == 1


def test_attention_decodes_through_the_wrapper():
    make = lambda: nnx.MultiHeadAttention(2, 8, 8, decode=True, rngs=nnx.Rngs(0))  # noqa: E731
    wrapped = SpectralNorm(make(), rngs=nnx.Rngs(1))
    wrapped.eval()
    plain = bake(wrapped)
    wrapped.init_cache((3, 5, 8))
    plain.init_cache((3, 5, 8))
    raw = make()
    raw.init_cache((3, 5, 8))
    for step in range(1, 4):
        x = jnp.asarray(X[:, None] * step)
        y = wrapped(x)
        np.testing.assert_allclose(y, plain(x), rtol=1e-4, atol=1e-6)
        assert np.abs(y - raw(x)).max() > 0.01
        assert wrapped.cache_index[...] == step


def test_sown_values_are_captured():
    class Sows(nnx.Module):
        def __init__(self):
            self.linear = scaled_linear()

        def __call__(self, x):
            y = self.linear(x)
            self.sow(nnx.Intermediate, "y", y)
            return y

    wrapped = SpectralNorm(Sows(), warmup=50, rngs=nnx.Rngs(0))
    y, sown = nnx.capture(wrapped, nnx.Intermediate)(X)
    np.testing.assert_array_equal(sown["layer_instance"]["y"][0], y)
    assert len(sown["layer_instance"]["y"].get_value()) == 1


class Autoencoder(nnx.Module):
    def __init__(self):
        self.enc, self.dec = scaled_linear(), nnx.Linear(4, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.decode(self.encode(x))

    @nnx.jit
    def encode(self, x):
        return self.enc(x)

    def decode(self, x):
        return self.dec(x)

    def itself(self):
        return self

    def encoder(self):
        return self.enc

    @property
    def width(self):
        return 8

    @staticmethod
    def double(x):
        return 2 * x


def test_methods_run_with_normalized_kernels():
    model = Autoencoder()
    encode, decode = sn_jax.Matrix(0, 1), sn_jax.Matrix(0, 1)
    both = lambda m, x: m.decode(m.encode(x))  # noqa: E731
    assert views(model, X, method="encode", rules={"dec/.*": None}) == {"enc/kernel": encode}
    assert views(model, X, method=both) == {"enc/kernel": encode, "dec/kernel": decode}
    with pytest.raises(ValueError, match=r"dec/kernel of shape \(4, 8\) is not used by this call"):
        views(model, X, method="encode")
    wrapped = SpectralNorm(model, warmup=50, rngs=nnx.Rngs(1))
    wrapped.eval()
    kernel = np.asarray(model.enc.kernel[...])
    np.testing.assert_allclose(wrapped.encode(X), X @ kernel / 10, rtol=1e-3, atol=1e-3)
    assert wrapped.itself() is wrapped
    assert wrapped.encoder() is model.enc
    assert (wrapped.width, wrapped.double(2)) == (8, 4)
    baked = bake(wrapped, X, method=both)
    np.testing.assert_allclose(baked.encode(X), wrapped.encode(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(baked(X), wrapped(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"call does not use dec/kernel.*method="):
        bake(wrapped, X, method="encode")
    flat = bake(nnx.Sequential(wrap(model, views(model, X), rngs=nnx.Rngs(0)), nnx.relu))
    assert type(flat.layers[0]) is Autoencoder


def test_a_layer_that_moves_is_told():
    model = Autoencoder()
    wrapped = wrap(model, views(model, X), rngs=nnx.Rngs(1))
    model.again = model.enc
    with pytest.raises(ValueError, match="enc/kernel, which the layer holds no longer"):
        wrapped(X)


def test_static_lists_are_not_changed_by_looking():
    class Log(nnx.Module):
        def __init__(self):
            self.linear, self.log = scaled_linear(), []

        def __call__(self, x):
            self.log.append("called")
            return self.linear(x)

    wrapped = SpectralNorm(Log(), warmup=50, rngs=nnx.Rngs(0))
    wrapped(X)
    wrapped(X)
    assert wrapped.log == ["called", "called"]


class Named(nnx.Module):
    """Attributes with the names of options."""

    def __init__(self):
        self.linear = scaled_linear()
        self.dtype, self.bound, self.mode, self.views = "a", "b", "c", "d"
        self.n_steps, self.warmup, self.rules, self.known = 10, 11, 12, 13
        self.loras, self.ndims, self.gradient, self.stateless = 14, 15, 16, 17

    def __call__(self, x):
        return self.linear(x)


def test_options_hide_no_attribute_of_the_layer():
    layer = Named()
    wrapped = SpectralNorm(layer, bound=2.0, n_steps=2, warmup=50, rngs=nnx.Rngs(0))
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            assert getattr(wrapped, name) is value, name
    wrapped.mode = "changed"
    assert layer.mode == wrapped.mode == "changed"
    np.testing.assert_allclose(wrapped(X), layer(X) / 5, rtol=1e-3, atol=1e-3)

    plain = SpectralNorm(scaled_linear(), bound=2.0, warmup=50, rngs=nnx.Rngs(0))
    assert plain.dtype is plain.layer_instance.dtype
    assert (plain.bound, plain.mode, dict(plain.views)) == (
        2.0, "divide", {"kernel": sn_jax.Matrix(0, 1)},
    )  # fmt: skip
    plain.bound = 4.0
    nnx.Sequential(plain).set_attributes(mode="clip")
    assert (plain.bound, plain.mode) == (4.0, "clip")
    np.testing.assert_allclose(plain(X), plain.layer_instance(X) * 0.4, rtol=1e-3, atol=1e-3)
    with pytest.raises(AttributeError, match=r"n_vectors is fixed.*make a new one around Linear"):
        plain.n_vectors = 2
    with pytest.raises(ValueError, match="n_steps >= 1, got 0"):
        plain.n_steps = 0
    with pytest.raises(AttributeError, match="no_such"):
        _ = plain.no_such


def test_train_and_eval_of_the_layer_stay_its_own():
    wrapped = SpectralNorm(Busy(), rngs=nnx.Rngs(0))
    dropout = SpectralNorm(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)),
                           rngs=nnx.Rngs(0))  # fmt: skip
    for model in (wrapped, dropout):
        model.eval()
        assert "deterministic" not in vars(model)
    dropout.layer_instance.deterministic = False
    assert dropout.deterministic is False


@pytest.mark.parametrize(
    "bound", [np.float32(5), jnp.asarray(5.0), {"kernel": 5.0}, {"kernel": jnp.asarray(5.0)}]
)
def test_a_bound_is_static_whatever_holds_it(bound):
    wrapped = SpectralNorm(scaled_linear(), bound=bound, warmup=50, rngs=nnx.Rngs(0))
    expected = wrapped.layer_instance(X) / 2
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(run(wrapped, X), expected, rtol=1e-3, atol=1e-3)
    assert set(nnx.to_pure_dict(nnx.state(wrapped))) == {"batch_stats", "layer_instance"}


def test_convolutions_as_operators():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 5, 3)), jnp.float32)
    with pytest.raises(ValueError, match=r"size of the input of kernel.*views\(layer, x, conv="):
        SpectralNorm(layer, conv="operator", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r'conv must be "reshape" .* or "operator"'):
        SpectralNorm(layer, conv="operators", rngs=nnx.Rngs(0))
    rules = views(layer, images, conv="operator")
    wrapped = SpectralNorm(layer, conv="operator", rules=rules, warmup=300, rngs=nnx.Rngs(0))
    ((path, view),) = wrapped.views
    assert (path, view) == ("kernel", sn_jax.Conv((5, 5)))
    columns = jax.vmap(lambda x: layer(x) - layer.bias[...])(
        jnp.eye(75, dtype=jnp.float32).reshape(75, 5, 5, 3)
    )
    (sigma,) = spectral_norms(wrapped).values()
    np.testing.assert_allclose(sigma, np.linalg.norm(columns.reshape(75, -1), 2), rtol=1e-3)
    SpectralNorm(layer, conv="reshape", rngs=nnx.Rngs(0))
    SpectralNorm(scaled_linear(), conv="operator", rngs=nnx.Rngs(0))  # needs no size


# flax.nnx.SpectralNorm's own state.


def test_the_state_of_flax_is_loaded():
    def make(module):
        rngs = nnx.Rngs(0)
        inner = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 4, rngs=rngs))
        return nnx.Dict(a=module(inner, rngs=rngs))

    flax, ours = make(nnx.SpectralNorm), make(SpectralNorm)
    for _ in range(3):
        flax.a(X, update_stats=True)
    before = jax.tree.structure(nnx.to_pure_dict(nnx.state(ours)))
    state = jax.tree.map(jnp.copy, nnx.state(flax))
    nnx.update(ours, state)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(ours))) == before
    for key, name in ((0, "0"), (2, "2")):
        node = ours.a.batch_stats["layers"][name]["kernel"]
        for field in ("u", "sigma"):
            np.testing.assert_array_equal(
                node[field][...], flax.a.batch_stats["layers", key, "kernel", field][...]
            )
    ours.eval()
    y = nnx.jit(lambda m, x: m(x))(ours.a, X)
    np.testing.assert_allclose(y, flax.a(X, update_stats=False), rtol=1e-5, atol=1e-6)


def test_the_state_of_flax_that_does_not_fit_is_refused():
    rngs = nnx.Rngs(0)

    def heads(**options):
        return nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0), **options)

    ours = SpectralNorm(heads(), rngs=rngs)
    with pytest.raises(ValueError, match=r"u of kernel.*shape \(1, 4\), but here.*\(1, 2, 4\)"):
        nnx.update(ours, nnx.state(nnx.SpectralNorm(heads(use_bias=False), rngs=rngs)))
    with pytest.raises(ValueError, match=r"of bias in .*belongs to no kernel"):
        nnx.update(ours, nnx.state(nnx.SpectralNorm(heads(), rngs=rngs)))
    ours(X)
    flax = nnx.state(nnx.SpectralNorm(scaled_linear(), rngs=rngs))
    with pytest.raises(ValueError, match="without v, which store_v"):
        nnx.update(SpectralNorm(scaled_linear(), store_v=True, rngs=rngs), flax)


# Eval with the stored pair, as torch's.


class Sequential(nnx.Module):
    """The NNX side of test_convert's "network", with or without wrappers."""

    def __init__(self, sn):
        rngs = nnx.Rngs(0)
        self.c1 = sn(nnx.Conv(2, 4, (4, 4), 2, padding=1, rngs=rngs))
        self.c2 = nnx.BatchNorm(4, rngs=rngs)
        self.c3 = sn(nnx.Conv(4, 3, (3, 3), padding=1, rngs=rngs))
        self.d1 = nnx.LayerNorm(3, epsilon=1e-5, rngs=rngs)
        self.d2 = nnx.Linear(3, 3, rngs=rngs)
        self.d3 = sn(nnx.Linear(3, 1, rngs=rngs))

    def __call__(self, x):
        x = self.c3(nnx.relu(self.c2(self.c1(x))))
        return self.d3(nnx.relu(self.d2(self.d1(x.mean((1, 2))))))


def stored(layer):
    return SpectralNorm(layer, store_v=True, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("api", ["hook", "parametrization"])
def test_eval_equals_torch(api):
    record = recorded(api)["network"]
    plain, model = Sequential(lambda layer: layer), Sequential(stored)
    template = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    kernels = {"c1/kernel": sn_jax.Matrix((0, 1, 2), 3), "c3/kernel": sn_jax.Matrix((0, 1, 2), 3)}
    names = {"0": "c1", "1": "c2", "3": "c3", "6": "d1", "7": "d2", "9": "d3"}
    params, state = sn_jax.convert.from_torch(record["state"], template, kernels, names)
    load_state(model, params, state)
    model.c2.mean[...], model.c2.var[...] = (record["state"][f"1.running_{k}"]
                                             for k in ("mean", "var"))  # fmt: skip
    model.eval()
    x = jnp.asarray(np.moveaxis(record["x"], 1, -1))
    for _ in range(2):  # nothing moves
        np.testing.assert_allclose(model(x), record["eval"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bake(model)(x), record["eval"], rtol=1e-6, atol=1e-6)
    norms = sn_jax.spectral_norms(params, state)
    assert spectral_norms(model).keys() == norms.keys() == {"c1/kernel", "c3/kernel", "d3/kernel"}
    for path, sigma in spectral_norms(model).items():
        np.testing.assert_allclose(sigma, norms[path], rtol=1e-6)


def masked():
    mask = np.random.default_rng(3).integers(0, 2, (3, 2, 4)).astype(np.float32)
    return nnx.Conv(2, 4, (3,), mask=jnp.asarray(mask), use_bias=False, rngs=nnx.Rngs(0))


def by_rules():
    layer = masked()
    return {"kernel": next(iter(views(layer, jnp.ones((1, 6, 2))).values()))}


@pytest.mark.parametrize("rules", [None, by_rules], ids=["at the product", "Scaled"])
def test_the_stored_pair_of_changed_kernels(rules):
    layer = masked()
    wrapped = SpectralNorm(layer, rules=rules and rules(), store_v=True, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 6, 2)), jnp.float32)
    for _ in range(2):
        wrapped(x)
    wrapped.eval()
    stats = wrapped.batch_stats["kernel"]
    u, v = np.asarray(stats["u"][...])[0], np.asarray(stats["v"][...])[0]
    kernel = np.asarray(layer.kernel[...]) * np.asarray(layer.mask)
    sigma = np.einsum("kio,kio->", kernel, v[..., None] * u)
    np.testing.assert_allclose(wrapped(x), layer(x) / sigma, rtol=1e-5, atol=1e-6)
    # A pair that no iteration would leave as it is.
    v = v + 0.1
    stats["v"][...] = jnp.asarray(v / np.linalg.norm(v))[None]
    changed = np.einsum("kio,kio->", kernel, (v / np.linalg.norm(v))[..., None] * u)
    assert 0.1 * sigma < changed < 0.99 * sigma
    with checking_leaks():
        y = nnx.jit(lambda m, x: m(x))(wrapped, x)
    np.testing.assert_allclose(y, layer(x) / changed, rtol=1e-4, atol=1e-5)


def test_store_v_in_training():
    pair = SpectralNorm(scaled_linear(), store_v=True, warmup=0, rngs=nnx.Rngs(0))
    single = SpectralNorm(scaled_linear(), warmup=0, rngs=nnx.Rngs(0))
    for _ in range(3):
        np.testing.assert_allclose(pair(X), single(X), rtol=1e-5)
    for update in (True, False):  # traced
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(pair, SpectralStat)))
        nnx.jit(lambda m, x, u: m(x, update_stats=u))(pair, X, jnp.asarray(update))
        after = nnx.to_pure_dict(nnx.state(pair, SpectralStat))
        assert set(after["batch_stats"]["kernel"]) == {"u", "v", "sigma"}
        same = jax.tree.leaves(jax.tree.map(np.array_equal, before, after))
        assert all(same) if not update else not any(same)
    with pytest.raises(ValueError, match="stateless keeps nothing"):
        SpectralNorm(scaled_linear(), store_v=True, stateless=True, rngs=nnx.Rngs(0))


def test_load_state_of_all_kinds_and_what_it_refuses():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return SpectralNorm(nnx.Linear(4, 4, rngs=rngs), store_v=True, use_scale=True, rngs=rngs)

    model = nnx.Dict(stack=make(nnx.Rngs(0)), plain=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {
        "stack": {"kernel": rng.standard_normal((3, 4, 4)).astype(np.float32),
                  "bias": np.ones((3, 4), np.float32)},
        "plain": {"kernel": np.eye(4, dtype=np.float32), "bias": np.ones(4, np.float32)},
    }  # fmt: skip
    transposed = sn_jax.init(params, jax.random.key(1), {"stack/kernel": sn_jax.Matrix(2, 1)})
    with pytest.raises(ValueError, match=r"stack/kernel is seen as .*by the state"):
        load_state(model, params, transposed)
    rules = {"stack/kernel": sn_jax.Matrix(1, 2)}
    state = sn_jax.init(params, jax.random.key(1), rules, warmup=60)
    load_state(model, params, state)
    norms = np.linalg.norm(params["stack"]["kernel"], 2, (1, 2))
    np.testing.assert_allclose(spectral_norms(model)["stack/kernel"], norms, rtol=1e-3)
    np.testing.assert_array_equal(model.plain.kernel[...], np.eye(4))
    np.testing.assert_array_equal(
        model.stack.batch_stats["kernel"]["v"][...], state["stack/kernel"].v
    )

    kernel = np.array(model.plain.kernel[...])
    for bad, sentence in [
        ((params | {"more": np.ones(2)}, state), "params needs exactly.*unknown: more"),
        (({"stack": params["stack"]}, state), "missing: plain/bias, plain/kernel"),
        ((params, {}), "state needs exactly.*missing: stack/kernel"),
        ((params, state | {"plain/kernel": state["stack/kernel"]}), "unknown: plain/kernel"),
        ((params | {"plain": {"kernel": np.ones((4, 5)), "bias": np.ones(4)}}, state),
         r"plain/kernel has shape \(4, 5\), but in the model \(4, 4\)"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            load_state(model, *bad)
    np.testing.assert_array_equal(model.plain.kernel[...], kernel)
    with pytest.raises(TypeError, match=r"order is \(model, params, state\)"):
        load_state(model, state, params)


def test_a_model_trains_with_store_v():
    model = Sequential(stored)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    x = jnp.ones((2, 8, 8, 2))
    grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
    optimizer.update(model, grads)
    assert all(np.isfinite(sigma) for sigma in spectral_norms(model).values())


def test_arguments_in_the_wrong_place():
    rngs, layer = nnx.Rngs(0), scaled_linear()
    for call, sentence in [
        (lambda: views(X, layer), r"views\(model, \*args\).*got an array .*\(3, 8\)"),
        (lambda: views(nnx.Linear, X), "made already.*got the class Linear"),
        (lambda: wrap(X, layer, rngs=rngs), r"wrap\(model, rules\).*an array of float32"),
        (lambda: wrap(layer, X, rngs=rngs), r"views\(model, x\) returns.*array .*\(3, 8\)"),
        (lambda: wrap(layer, [sn_jax.Matrix()], rngs=rngs), r"rules map paths.*got \[Matrix"),
        (lambda: SpectralNorm(layer(X), rngs=rngs), r"SpectralNorm\(nnx.*got an array of float32"),
        (lambda: SpectralNorm(nnx.Linear, rngs=rngs), "got the class Linear"),
        (lambda: bake(X), r"bake\(model, ...\).*array of float32"),
        (lambda: spectral_norms(nnx.state(layer)), r"spectral_norms\(model, ...\)"),
        (lambda: load_state({}, layer, {}), r"load_state\(model, ...\)"),
    ]:
        with pytest.raises(TypeError, match=sentence):
            call()
    with pytest.raises(ValueError, match=r"spectral_norms found no sn_jax.nnx.SpectralNorm"):
        spectral_norms(layer)
    stateless = SpectralNorm(layer, stateless=True, rngs=rngs)
    with pytest.raises(ValueError, match="stateless and stores no sigma"):
        spectral_norms(stateless)

    @jax.jit
    def traced(bound):
        return SpectralNorm(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), bound=bound, rngs=nnx.Rngs(0))(X)

    with pytest.raises(TypeError, match="bound of SpectralNorm is a static option"):
        traced(2.0)
