"""sn_jax.linen around and inside every kind of model: views, lifted transforms, bake."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from sn_jax.linen import SpectralNorm, bake, views

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
IMAGES = np.random.default_rng(1).standard_normal((2, 6, 6, 4)).astype(np.float32)
CARRY = np.ones((2, 4), np.float32)
FLAT = sn_jax.Matrix((0, 1, 2), 3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(x), None


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(1.0), (8, 3))


def scanned(block, axis=0, collections=("params",)):
    axes = dict.fromkeys(collections, axis)
    return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=5)()


QUERY = sn_jax.Matrix(0, (1, 2))
# name: (layer, arguments, {path: shape of u})
LAYERS = {
    "dense": (nn.Dense(4), (X,), {"kernel": (1, 4)}),
    "general": (nn.DenseGeneral((2, 3)), (X,), {"kernel": (1, 2, 3)}),
    "general-batched": (nn.DenseGeneral(4, batch_dims=(0,)), (X,), {"kernel": (2, 1, 4)}),
    "einsum": (nn.Einsum((8, 2, 3), "bti,ihd->bthd"), (X,), {"kernel": (1, 2, 3)}),
    "conv": (nn.Conv(6, (3, 3), strides=2, feature_group_count=2), (IMAGES,), {"kernel": (1, 6)}),
    "conv-1d": (nn.Conv(6, 3, padding="CAUSAL"), (X,), {"kernel": (1, 6)}),
    "conv-3d": (nn.Conv(5, (2, 2, 2)), (IMAGES[:, None],), {"kernel": (1, 5)}),
    "conv-transpose": (nn.ConvTranspose(5, (3, 3)), (IMAGES,), {"kernel": (1, 5)}),
    "embed": (nn.Embed(10, 4), (np.array([1, 2]),), {"embedding": (1, 4)}),
    "attention": (nn.MultiHeadDotProductAttention(2), (X,), {
        "key/kernel": (1, 2, 4), "query/kernel": (1, 2, 4), "value/kernel": (1, 2, 4),
        "out/kernel": (1, 8)}),
    "sequential": (nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), (X,),
                   {"layers_0/kernel": (1, 4), "layers_2/kernel": (1, 3)}),
    "gru": (nn.GRUCell(4), (CARRY, X[:, 0]), {
        f"{name}/kernel": (1, 4) for name in ("hn", "hr", "hz", "in", "ir", "iz")}),
    "lstm": (nn.OptimizedLSTMCell(4), ((CARRY, CARRY), X[:, 0]), {
        f"{side}{gate}/kernel": (1, 4) for side in "hi" for gate in "fgio"}),
    "rnn": (nn.RNN(nn.SimpleCell(4)), (X,), {"cell/h/kernel": (1, 4), "cell/i/kernel": (1, 4)}),
    "scan": (scanned(Block, axis=1), (X, None), {"Dense_0/kernel": (5, 1, 8)}),
    "custom": (Custom(), (X,), {"kernel": (1, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_wrapped_layer_and_its_baked_twin(name):
    layer, args, shapes = LAYERS[name]
    model = SpectralNorm(layer)
    variables = jax.jit(model.init)(KEY, *args)
    _, updates = jax.jit(lambda v, a: model.apply(v, *a, mutable=["batch_stats"]))(variables, args)
    got = {key.removeprefix("layer_instance/").removesuffix("/u"): value.shape
           for key, value in updates["batch_stats"].items() if key.endswith("/u")}  # fmt: skip
    assert got == shapes
    plain = jax.jit(lambda v, a: bake(model, v, *a))(variables, args)
    assert set(plain) == {"params"}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, jax.jit(layer.apply)(plain, *args), jax.jit(model.apply)(variables, *args))


class Everything(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True)(x)
        x = nn.MultiHeadDotProductAttention(2)(x.reshape(len(x), -1, 4))
        x = x + self.param("position", nn.initializers.normal(1.0), x.shape[1:])
        x, _ = scanned(nn.remat(Block), axis=1)(nn.Dense(8)(x), None)
        ensemble = nn.vmap(
            nn.Dense, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 0},
            split_rngs={"params": True},
        )  # fmt: skip
        return nn.jit(nn.Dense)(2)(ensemble(4)(x))


def test_views_of_a_whole_model():
    model = Everything()
    variables = jax.jit(model.init)(KEY, IMAGES)
    rngs = {"dropout": KEY}
    attention = {f"MultiHeadDotProductAttention_0/{name}/kernel": QUERY
                 for name in ("query", "key", "value")}  # fmt: skip
    expected = {
        "Conv_0/kernel": FLAT,
        "ConvTranspose_0/kernel": sn_jax.Matrix((0, 1, 3), 2),
        **attention,
        "MultiHeadDotProductAttention_0/out/kernel": sn_jax.Matrix((0, 1), 2),
        "Dense_0/kernel": sn_jax.Matrix(0, 1),
        "ScanCheckpointBlock_0/Dense_0/kernel": sn_jax.Matrix(0, 2),
        "VmapDense_0/kernel": sn_jax.Matrix(1, 2),
        "JitDense_0/kernel": sn_jax.Matrix(0, 1),
    }
    found = views(model, variables, IMAGES, train=True, rngs=rngs)
    assert found == expected
    assert views(model, jax.eval_shape(lambda: variables), IMAGES) == expected
    operators = views(model, variables, IMAGES, conv="operator")
    assert operators["Conv_0/kernel"] == sn_jax.Conv((6, 6), 2, "CIRCULAR")
    assert operators["ConvTranspose_0/kernel"] == sn_jax.Conv(
        (3, 3), 2, transpose=True, transpose_kernel=True
    )
    state = sn_jax.init(variables["params"], KEY, operators)
    assert {path: s.sigma.shape for path, s in state.items() if s.sigma.shape} == {
        "ScanCheckpointBlock_0/Dense_0/kernel": (5,), "VmapDense_0/kernel": (3,)
    }  # fmt: skip
    normalized, _ = sn_jax.spectral_normalize(variables["params"], state)
    assert model.apply({**variables, "params": normalized}, IMAGES).shape == (3, 2, 36, 2)
    rules = {r"Multi.*/(query|key|value)/kernel": sn_jax.Matrix(0, 2), r"Dense_0/.*": None}
    per_head = views(model, variables, IMAGES, rules=rules)
    assert per_head["MultiHeadDotProductAttention_0/key/kernel"] == sn_jax.Matrix(0, 2)
    assert "Dense_0/kernel" not in per_head


class Einsum(nn.Module):
    """The string comes with the call."""

    @nn.compact
    def __call__(self, x):
        return nn.Einsum((8, 2, 3))(x, "bti,ihd->bthd")


def double(variables):
    return jax.tree.map(lambda w: 2 * w, variables)


def test_views_see_products_that_the_model_uses():
    model = Einsum()
    found = views(model, model.init(KEY, X), X)
    assert found == {"Einsum_0/kernel": sn_jax.Matrix(0, (1, 2))}
    # Flax runs such a layer twice, and throws away what comes of its raw parameters.
    model = nn.map_variables(nn.Dense, "params", double, init=True)(4)
    found = views(model, model.init(KEY, X), X)
    assert found == {"kernel": sn_jax.Scaled(sn_jax.Matrix(0, 1), np.full((1, 1), 2, np.float32))}


def test_views_say_what_they_cannot_see():
    model = nn.ConvLocal(3, (2, 2))
    variables = model.init(KEY, IMAGES)
    with pytest.raises(ValueError, match=r"kernel of shape \(6, 6, 16, 3\) cannot be seen.*rules="):
        views(model, variables, IMAGES)
    rules = {"kernel": sn_jax.Matrix(2, 3)}
    assert views(model, variables, IMAGES, rules=rules) == rules
    model = Custom()
    assert views(model, model.init(KEY, X), X) == {"kernel": sn_jax.Matrix(0, 1)}

    class TwoSizes(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(4, (3, 3))
            return conv(conv(x)[:, ::2])

    model = TwoSizes()
    variables = model.init(KEY, IMAGES)
    assert views(model, variables, IMAGES) == {"Conv_0/kernel": FLAT}
    with pytest.raises(ValueError, match=r"Conv_0/kernel.*acts in 2 ways.*Conv"):
        views(model, variables, IMAGES, conv="operator")

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(10, 4)
            return embed.attend(embed(tokens))

    model = Tied()
    tokens = np.array([1, 2])
    assert list(views(model, model.init(KEY, tokens), tokens)) == ["Embed_0/embedding"]


def ensemble_of(wrapper):
    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(wrapper(nn.Dense(16))(x)))

    return Critic


def test_stateless_ensemble_of_critics_has_parameters_only():
    def stateless(layer):
        return SpectralNorm(layer, stateless=True, n_steps=60)

    critics = nn.vmap(
        ensemble_of(stateless), variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=None, out_axes=0, axis_size=4,
    )()  # fmt: skip
    variables = jax.jit(critics.init)(KEY, X)
    assert set(variables) == {"params"}
    baked = jax.jit(lambda v: bake(critics, v, X))(variables)
    (kernel,) = (w for w in jax.tree.leaves(baked) if w.shape == (4, 8, 16))
    np.testing.assert_allclose(np.linalg.norm(kernel, 2, (1, 2)), 1, rtol=1e-3)
    grads = jax.jit(jax.grad(lambda p: critics.apply({"params": p}, X).sum()))(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("lift", ["jit", "remat", "vmap", "scan"])
def test_wrapper_inside_lifted_transforms(lift):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return SpectralNorm(nn.Dense(8))(x), None

    def lifted(block):
        if lift == "scan":
            return scanned(block, collections=("params", "batch_stats"))
        if lift == "vmap":
            return nn.vmap(
                block, in_axes=None, out_axes=0, axis_size=3,
                variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
            )()  # fmt: skip
        return (nn.jit if lift == "jit" else nn.remat)(block)()

    model, plain = lifted(Wrapped), lifted(Block)
    variables = jax.jit(model.init)(KEY, X, None)
    _, updates = jax.jit(partial(model.apply, mutable=["batch_stats"]))(variables, X, None)
    u = updates["batch_stats"]["SpectralNorm_0"]["Dense_0/kernel/u"]
    assert u.shape == {"scan": (5, 1, 8), "vmap": (3, 1, 8)}.get(lift, (1, 8))
    baked = jax.jit(lambda v: bake(model, v, X, None))(variables)
    expected = jax.jit(model.apply)(variables, X, None)[0]
    np.testing.assert_allclose(plain.apply(baked, X, None)[0], expected, rtol=1e-5, atol=1e-6)

    def loss(params):
        return model.apply({**variables, "params": params}, X, None)[0].sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert np.any(grads["Dense_0"]["kernel"] != 0)


def test_inner_state_still_updates_and_shared_wrappers_bake():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))

    class Shared(nn.Module):
        def setup(self):
            self.layer = SpectralNorm(Inner())

        def __call__(self, x):
            return self.layer(self.layer(x))

    class Plain(nn.Module):
        def setup(self):
            self.layer = Inner()

        def __call__(self, x):
            return self.layer(self.layer(x))

    model = Shared()
    variables = model.init(KEY, X)
    _, updates = model.apply(variables, X, mutable=["batch_stats"])
    mean = updates["batch_stats"]["layer"]["layer_instance"]["BatchNorm_0"]["mean"]
    assert np.any(mean != 0)
    baked = bake(model, variables, X)
    got, _ = Plain().apply(baked, X, mutable=["batch_stats"])
    # In training mode the second call of the wrapper starts from the u of the first, so sigma
    # differs by what one more step adds.
    expected, _ = model.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.02)
    assert list(baked["batch_stats"]["layer"]) == ["BatchNorm_0"]


def test_rules_and_more_vectors_in_the_wrapper():
    attention = nn.MultiHeadDotProductAttention(2)
    rules = {r"(query|key|value)/kernel": sn_jax.Matrix(0, 2), r"out/.*": None}
    model = SpectralNorm(attention, rules=rules, n_vectors=3, warmup=60)
    variables = model.init(KEY, X)
    shapes = jax.tree.map(jnp.shape, variables["batch_stats"])
    assert shapes["layer_instance/query/kernel/u"] == (2, 3, 4)  # heads, vectors, dim
    assert shapes["layer_instance/query/kernel/sigma"] == (2,)
    assert not any("out" in name for name in shapes)
    kernel = bake(model, variables, X)["params"]["query"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel.swapaxes(0, 1), 2, (1, 2)), 1, rtol=1e-4)


class Residual(nn.Module):
    inner: nn.Module

    def __call__(self, x):
        return x + self.inner(x)


class Inline(nn.Module):
    """Composites made and wrapped inside another module, which keeps their layers' parameters."""

    norm: bool

    @nn.compact
    def __call__(self, x):
        wrapped = SpectralNorm if self.norm else lambda layer: layer
        x = wrapped(nn.Sequential([nn.Dense(4), nn.relu, Residual(nn.Dense(4)), nn.Dense(8)]))(x)
        x = wrapped(Residual(nn.Dense(8)))(x)
        return wrapped(nn.RNN(nn.SimpleCell(4)))(x)


def test_composites_made_inside_a_module():
    model, plain = Inline(True), Inline(False)
    variables = model.init(KEY, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(
        jnp.shape, plain.init(KEY, X)["params"]
    )
    stats = variables["batch_stats"]
    assert "Sequential_0/layers_2/inner/kernel/u" in stats["SpectralNorm_0"]
    _, updates = model.apply(variables, X, mutable=["batch_stats", "params"])
    jax.tree.map(np.testing.assert_array_equal, updates["params"], variables["params"])
    variables = {**variables, "batch_stats": updates["batch_stats"]}
    baked = bake(model, variables, X)
    np.testing.assert_allclose(plain.apply(baked, X), model.apply(variables, X), atol=1e-6)
    for leaf in jax.tree.leaves(baked["params"]):
        if leaf.ndim == 2:
            np.testing.assert_allclose(np.linalg.norm(leaf, 2), 1, rtol=0.02)


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return SpectralNorm(nn.Dense(4, use_bias=False), warmup=100)(x)


JitWrapped, JitConv = nn.jit(Wrapped), nn.jit(nn.Conv)


class Calls(nn.Module):
    layer: type
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.layer(*self.options, name="layer")(x)


def test_traces_that_nn_jit_keeps_are_not_mixed_up():
    """One class under nn.jit, traced for training, for bake and for views, in every order."""
    model = Calls(JitWrapped)
    variables = model.init(KEY, X)
    for _ in range(2):
        _, updates = model.apply(variables, X, mutable=True)
        jax.tree.map(np.testing.assert_array_equal, updates["params"], variables["params"])
        kernel = bake(model, variables, X)["params"]["layer"]["Dense_0"]["kernel"]
        np.testing.assert_allclose(np.linalg.norm(kernel, 2), 1, rtol=1e-4)
    model = Calls(JitConv, (3, (3, 3)))
    variables = model.init(KEY, IMAGES)
    model.apply(variables, IMAGES, mutable=True)
    for _ in range(2):
        assert views(model, variables, IMAGES) == {"layer/kernel": FLAT}
        operator = {"layer/kernel": sn_jax.Conv((6, 6))}
        assert views(model, variables, IMAGES, conv="operator") == operator


def test_options_of_the_wrapper():
    layer = nn.Dense(4, use_bias=False)
    variables = SpectralNorm(layer, warmup=200, use_scale=True).init(KEY, X)
    params = variables["params"]
    scaled = {**params, "layer_instance/kernel/scale": jnp.asarray(3.0)}
    wrapper = SpectralNorm(layer, use_scale=True)
    baked = bake(wrapper, {**variables, "params": scaled}, X)["params"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(baked, 2), 3, rtol=1e-4)
    found = views(
        nn.Sequential([SpectralNorm(layer, use_scale=True)]),
        {"params": {"layers_0": params}, "batch_stats": {"layers_0": variables["batch_stats"]}},
        X,
    )
    assert list(found) == ["layers_0/layer_instance/kernel"]
    plain = {"params": {"layer_instance": params["layer_instance"]},
             "batch_stats": variables["batch_stats"]}  # fmt: skip
    half = bake(SpectralNorm(layer, dtype=jnp.bfloat16), plain, X)["params"]["kernel"]
    assert half.dtype == jnp.bfloat16

    by_size = SpectralNorm(layer, warmup=200, bound=sn_jax.rms_bound(0.3))
    small = bake(by_size, plain, X)["params"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(small, 2), 0.3 * 0.5**0.5, rtol=1e-4)

    def dot(wrapper):
        """<dL/dW, W>: zero where the gradient goes through sigma."""
        grads = jax.grad(lambda p: wrapper.apply({**plain, "params": p}, X).sum())(plain["params"])
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(plain["params"]), strict=True)
        return sum(float(jnp.sum(g * w)) for g, w in pairs)

    assert abs(dot(SpectralNorm(layer))) < 1e-4
    assert abs(dot(SpectralNorm(layer, gradient="stop"))) > 1e-2


SCALED = {
    "dense": (nn.Dense(4), {}),
    "heads": (nn.DenseGeneral((2, 3)), {"rules": {".*kernel": sn_jax.Matrix(0, 2)}, "bound": 0.7}),
    "scanned": (scanned(Block), {}),
    "clipped": (nn.Dense(4), {"mode": "clip", "bound": 0.1}),
    "stateless": (nn.Dense(4), {"stateless": True}),
    "zero": (nn.Dense(4, kernel_init=nn.initializers.zeros), {}),
}


@pytest.mark.parametrize("name", SCALED)
def test_sigma_reparam_begins_as_the_raw_layer(name):
    """scale_init="sigma": the same outputs at the start, training or not."""
    layer, options = SCALED[name]
    args = (X, None) if name == "scanned" else (X,)
    wrapper = SpectralNorm(layer, use_scale=True, scale_init="sigma", **options)
    variables = wrapper.init(KEY, *args)
    scales = {k: v for k, v in variables["params"].items() if k.endswith("scale")}
    raw = {k: v for k, v in variables["params"].items() if not k.endswith("scale")}
    (inner,) = raw.values()
    expected = jax.tree.leaves(layer.apply({"params": inner}, *args))[0]
    for mutable in (False, ["batch_stats"]):
        out = wrapper.apply(variables, *args, mutable=mutable)
        np.testing.assert_allclose(jax.tree.leaves(out)[0], expected, rtol=1e-4, atol=1e-5)
    twice = {**variables, "params": {**raw, **jax.tree.map(lambda x: 2 * x, scales)}}
    kernel = bake(wrapper, twice, *args)["params"]
    np.testing.assert_allclose(
        max(jnp.abs(x).max() for x in jax.tree.leaves(kernel) if x.ndim > 1),
        2 * max(jnp.abs(x).max() for x in jax.tree.leaves(inner) if x.ndim > 1), rtol=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match='scale_init must be "one" or "sigma"'):
        SpectralNorm(layer, use_scale=True, scale_init="two").init(KEY, *args)
    with pytest.raises(ValueError, match="give use_scale=True, too"):
        SpectralNorm(layer, scale_init="sigma").init(KEY, *args)


def doubled(w, x):
    return 2 * (x @ w)


def test_any_linear_map_in_the_wrapper():
    rules = {"kernel": sn_jax.Linear(doubled, 8)}
    model = SpectralNorm(nn.Dense(4, use_bias=False), rules=rules, warmup=100)
    kernel = bake(model, model.init(KEY, X), X)["params"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, 2), 0.5, rtol=1e-4)


def test_operator_convolutions_of_a_block_in_the_wrapper():
    block = nn.Sequential([nn.Conv(3, (3, 3)), nn.relu])
    model = SpectralNorm(block, conv="operator")
    stats = model.init(KEY, IMAGES)["batch_stats"]
    assert stats["layer_instance/layers_0/kernel/u"].shape == (1, 6, 6, 3)


def test_operator_convolutions_in_the_wrapper():
    layer = nn.Conv(6, (3, 3), strides=2)
    model = SpectralNorm(layer, conv="operator", warmup=200)
    variables = model.init(KEY, IMAGES)
    assert variables["batch_stats"]["layer_instance/kernel/u"].shape == (1, 3, 3, 6)
    plain = bake(model, variables, IMAGES)
    apply = lambda x: layer.apply(plain, x[None])[0].ravel()  # noqa: E731
    jacobian = jax.jacobian(apply)(IMAGES[0]).reshape(54, -1)
    np.testing.assert_allclose(np.linalg.norm(jacobian, 2), 1, rtol=1e-3)


def test_bad_use():
    x = X
    with pytest.raises(ValueError, match="wrap a layer once"):
        SpectralNorm(SpectralNorm(nn.Dense(4))).init(KEY, x)
    with pytest.raises(ValueError, match="wrap a layer once"):
        SpectralNorm(Wrapped()).init(KEY, x)
    with pytest.raises(ValueError, match="finds no kernel"):
        SpectralNorm(nn.Dropout(0.1, deterministic=True)).init(KEY, x)
    with pytest.raises(TypeError, match="wraps a module"):
        SpectralNorm(nn.relu).init(KEY, x)
    model = SpectralNorm(nn.Dense(4))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match="no 'batch_stats' for Dense"):
        model.apply({"params": variables["params"]}, x)
    with pytest.raises(ValueError, match="no 'batch_stats' for Dense"):
        model.apply({"params": variables["params"]}, x, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="immutable"):
        model.apply(variables, x, update_stats=np.True_)
    u_alone = {"layer_instance/kernel/u": variables["batch_stats"]["layer_instance/kernel/u"]}
    with pytest.raises(ValueError, match="no sigma"):
        model.apply({**variables, "batch_stats": u_alone}, x)
    with pytest.raises(ValueError, match="stateless"):
        SpectralNorm(nn.Dense(4), stateless=True).init_with_output(KEY, x, update_stats=True)
    with pytest.raises(ValueError, match=r"bake found no sn_jax.linen.SpectralNorm.*Dense"):
        bake(nn.Dense(4), {"params": variables["params"]["layer_instance"]}, x)
    other = SpectralNorm(nn.Dense(7)).init(KEY, x)
    with pytest.raises(ValueError, match="the state holds"):
        model.apply({**variables, "batch_stats": other["batch_stats"]}, x)
    broken = jax.tree.map(lambda p: p.at[..., 0].set(jnp.nan), variables["params"])
    assert np.isnan(model.apply({**variables, "params": broken}, x)).all()
