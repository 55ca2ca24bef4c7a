"""sn_jax.nnx: views of whole models, the drop-in wrapper under every transformation, bake."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import sn_jax
from sn_jax.nnx import SpectralNorm, SpectralStat, bake, views, wrap

pytestmark = pytest.mark.float32
X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
IMAGES = np.random.default_rng(1).standard_normal((2, 6, 6, 3)).astype(np.float32)


class Net(nnx.Module):
    """A bit of everything: padding, dropout, batch norm, a tied layer, a scanned stack."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.tied
        self.up = nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), rngs=rngs)

        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.stack = stack(rngs)

    def __call__(self, x):
        x = self.drop(self.bn(self.conv(x)))
        x = self.up(self.again(self.tied(x)))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, layer):
            return nnx.relu(layer(x))

        return apply(x, self.stack)

    def encode(self, x):
        return self.conv(x)


def test_views_see_strides_padding_sizes_ties_and_stacks():
    model = Net(nnx.Rngs(0))
    count = int(model.bn.mean[...].sum())
    flat = sn_jax.Matrix((0, 1, 2), 3)
    expected = {
        "conv/kernel": flat,
        "stack/kernel": sn_jax.Matrix(1, 2),
        "again/kernel": sn_jax.Matrix(0, 1),  # shared: NNX knows it by its first name
        "up/kernel": flat,
    }
    assert views(model, IMAGES) == expected
    assert views(model, jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)) == expected
    operators = views(model, IMAGES, conv="operator")
    assert operators["conv/kernel"] == sn_jax.Conv((6, 6), 2, "CIRCULAR")
    assert operators["up/kernel"] == sn_jax.Conv((3, 3), 2, transpose=True)
    assert int(model.bn.mean[...].sum()) == count  # untouched
    state = sn_jax.init(nnx.state(model, nnx.Param), jax.random.key(0), operators)
    assert state["stack/kernel"].sigma.shape == (5,)


def test_views_of_every_layer():
    rngs = nnx.Rngs(0)
    x = jnp.ones((2, 5, 8))
    query = sn_jax.Matrix(0, (1, 2))
    cases = [
        (nnx.LinearGeneral(8, (2, 4), rngs=rngs), (x,), {"kernel": query}),
        (nnx.LinearGeneral(8, 3, batch_axis={0: 2}, rngs=rngs), (x,),
         {"kernel": sn_jax.Matrix(1, 2)}),
        (nnx.Einsum("bti,ihd->bthd", (8, 2, 4), rngs=rngs), (x,), {"kernel": query}),
        (nnx.Embed(7, 4, rngs=rngs), (jnp.array([1]),), {"embedding": sn_jax.Matrix(0, 1)}),
        (nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs), (x,),
         {"key/kernel": query, "query/kernel": query, "value/kernel": query,
          "out/kernel": sn_jax.Matrix((0, 1), 2)}),
        (nnx.Conv(8, 4, 3, padding="CAUSAL", rngs=rngs), (x,),
         {"kernel": sn_jax.Matrix((0, 1), 2)}),
    ]  # fmt: skip
    for layer, args, expected in cases:
        assert views(layer, *args) == expected
    operator = views(cases[-1][0], x, conv="operator")
    assert operator == {"kernel": sn_jax.Conv((5,), padding="CAUSAL")}


def test_outputs_equal_flax_given_flax_statistics():
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    flax = nnx.SpectralNorm(nnx.clone(layer), rngs=nnx.Rngs(1))
    ours = SpectralNorm(nnx.clone(layer), rngs=nnx.Rngs(2))
    ours.batch_stats["kernel"]["u"][...] = flax.batch_stats["kernel", "u"][...]
    np.testing.assert_allclose(ours(X), flax(X, update_stats=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        ours.batch_stats["kernel"]["sigma"][...], flax.batch_stats["kernel", "sigma"][...]
    )


def model_and_optimizer():
    rngs = nnx.Rngs(3)
    model = nnx.Sequential(
        SpectralNorm(nnx.Linear(8, 16, rngs=rngs), rngs=rngs),
        nnx.relu,
        SpectralNorm(nnx.Linear(16, 1, rngs=rngs), rngs=rngs),
    )
    return model, optax.sgd(0.1)


def test_training_is_the_same_through_nnx_jit_and_through_split_merge():
    model, tx = model_and_optimizer()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def object_step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(5):
        object_step(model, optimizer)
    expected = nnx.to_pure_dict(nnx.state(model))

    model, tx = model_and_optimizer()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    opt_state = tx.init(params)

    @jax.jit
    def functional_step(params, stats, opt_state):
        def loss(params, stats):
            # A copy: jax.grad traces params only, and NNX guards variables of an outer trace
            # (nnx.BatchNorm needs the same).
            model = nnx.merge(graphdef, params, stats, copy=True)
            return jnp.mean((model(X) - 1) ** 2), nnx.state(model, nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(params, stats)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    for _ in range(5):
        params, stats, opt_state = functional_step(params, stats, opt_state)
    got = nnx.to_pure_dict(nnx.merge_state(params, stats))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_wrap_a_built_model_delegates_and_keeps_sharing():
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    wrapped = wrap(model, views(model, IMAGES), rngs=nnx.Rngs(1))
    for _ in range(3):
        wrapped(IMAGES)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert np.any(model.bn.mean[...] != 0)  # the layers' own state advances
    assert wrapped.conv is model.conv
    wrapped.eval()
    plain = bake(wrapped)
    assert type(plain) is Net
    assert plain.tied is plain.again
    np.testing.assert_allclose(plain(IMAGES), wrapped(IMAGES), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.encode(IMAGES), wrapped.encode(IMAGES), rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such


def test_train_eval_and_view_switch_it():
    layer = SpectralNorm(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    def moves(layer):
        before = np.array(layer.batch_stats["kernel"]["u"][...])
        layer(X)
        return not np.array_equal(before, layer.batch_stats["kernel"]["u"][...])

    assert moves(layer)
    layer.eval()
    assert not moves(layer)
    layer.train()
    assert moves(layer)
    assert not moves(nnx.view(layer, use_running_average=True))
    assert (
        not nnx.view(nnx.Sequential(layer), use_running_average=False).layers[0].use_running_average
    )
    layer.eval()
    layer(X, update_stats=True)


def test_recurrent_cells_take_more_than_one_argument():
    rngs = nnx.Rngs(0)
    cell = SpectralNorm(nnx.GRUCell(8, 4, rngs=rngs), rngs=rngs)
    carry = cell.initialize_carry((3, 8), rngs=rngs)
    _, y = cell(carry, X)
    assert y.shape == (3, 4)
    assert nnx.RNN(cell)(X[None]).shape == (1, 3, 4)
    assert {path for path, _ in cell.views} == {"dense_h/kernel", "dense_i/kernel"}


def stacked(n, features, **options):
    """n wrapped layers, made under nnx.vmap."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return SpectralNorm(nnx.Linear(8, features, rngs=rngs), rngs=rngs, **options)

    return make(nnx.Rngs(0))


def test_vmap_ensembles_remat_and_gradients_of_the_input():
    members = stacked(3, 4, warmup=60)
    y = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(members, X)
    assert y.shape == (3, 3, 4)
    kernels = np.asarray(members.layer_instance.kernel[...])
    np.testing.assert_allclose(
        members.batch_stats["kernel"]["sigma"][...], np.linalg.norm(kernels, 2, (1, 2)), rtol=1e-4
    )
    layer = SpectralNorm(nnx.Linear(8, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    remat = nnx.grad(lambda m: nnx.remat(lambda m, x: m(x))(m, X).sum())(layer)
    direct = nnx.grad(lambda m: m(X).sum())(layer)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-3)  # noqa: E731
    jax.tree.map(close, nnx.to_pure_dict(remat), nnx.to_pure_dict(direct))
    layer.eval()
    grad = jax.grad(lambda x: layer(x).sum())(X)  # closes over the model
    np.testing.assert_allclose(grad[0], bake(layer).kernel[...][:, 0], rtol=1e-5)


def test_scan_over_a_stack_of_wrapped_layers():
    layers = stacked(4, 8, warmup=2)
    graphdef, state = nnx.split(layers)
    members = [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(4)]

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return jnp.tanh(layer(x))

    grads = nnx.grad(lambda m: forward(X, m).sum())(layers)  # one update of each layer
    y = X
    for layer in members:
        y = jnp.tanh(layer(y))
    expected = jnp.stack([layer.batch_stats["kernel"]["u"][...] for layer in members])
    np.testing.assert_allclose(layers.batch_stats["kernel"]["u"][...], expected, atol=1e-6)
    layers.eval()
    y = X
    for layer in members:
        layer.eval()
        y = jnp.tanh(layer(y))
    np.testing.assert_allclose(forward(X, layers), y, atol=1e-6)
    assert np.all(np.any(grads["layer_instance"]["kernel"][...] != 0, axis=(1, 2)))


def test_pure_dict_and_orbax_round_trips(tmp_path):
    layer = SpectralNorm(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), rngs=nnx.Rngs(0))
    expected = layer(X)
    layer.eval()
    expected = layer(X)
    graphdef, state = nnx.split(layer)
    pure = nnx.to_pure_dict(state)
    assert list(pure["batch_stats"]) == ["layers"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", pure)
    nnx.replace_by_pure_dict(state, restored)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(X), expected)


def test_options():
    rngs = nnx.Rngs(0)
    init = nnx.initializers.constant(0.1)  # norm 0.1 * sqrt(32)
    clipped = SpectralNorm(nnx.Linear(8, 4, kernel_init=init, rngs=rngs), mode="clip", rngs=rngs)
    np.testing.assert_allclose(clipped(jnp.ones((1, 8))), 0.8, rtol=1e-5)
    learned = SpectralNorm(nnx.Linear(8, 4, rngs=rngs), use_scale=True, stateless=True, rngs=rngs)
    assert not jax.tree.leaves(nnx.state(learned, SpectralStat))
    learned.scales["kernel"]["scale"][...] = 3.0
    np.testing.assert_allclose(np.linalg.norm(bake(learned).kernel[...], 2), 3, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"stateless": True}, {"mode": "clip", "bound": 0.1}])
def test_sigma_reparam_begins_as_the_raw_layer(options):
    options = {"use_scale": True, "scale_init": "sigma", **options}
    rngs = nnx.Rngs(0)
    heads = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    for rules in (None, {"kernel": sn_jax.Matrix(0, 2)}):
        wrapper = SpectralNorm(heads, rules=rules, rngs=rngs, **options)
        expected = heads(X)
        for _ in range(2):  # training, eval
            np.testing.assert_allclose(wrapper(X), expected, rtol=1e-4, atol=1e-5)
            wrapper.eval()
        shape = wrapper.scales["kernel"]["scale"].shape
        assert shape == (() if rules is None else (2,))
        np.testing.assert_allclose(bake(wrapper).kernel[...], heads.kernel[...], rtol=1e-4)


def test_sigma_reparam_needs_to_see_the_kernels():
    class Scored(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    rngs = nnx.Rngs(0)
    layer, options = Scored(rngs), {"use_scale": True, "scale_init": "sigma"}
    with pytest.raises(ValueError, match=r"Scored: scale_init=\"sigma\" needs .*sn_jax.nnx.views"):
        SpectralNorm(layer, rngs=rngs, **options)
    wrapper = SpectralNorm(layer, rngs=rngs, rules=views(layer, X), **options)
    np.testing.assert_allclose(wrapper(X), layer(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="give use_scale=True, too"):
        SpectralNorm(layer, rngs=rngs, scale_init="sigma")


def test_options_of_the_norm():
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
    half = bake(SpectralNorm(linear, dtype=jnp.bfloat16, rngs=rngs))
    assert half.kernel[...].dtype == jnp.bfloat16
    by_size = sn_jax.rms_bound(0.5 * 2**0.5)  # 0.5 for 8 to 4 features
    for bound in (0.5, by_size, {"kernel": by_size}, sn_jax.rms_bound(jnp.asarray(by_size.c))):
        bounded = bake(SpectralNorm(linear, bound=bound, warmup=100, rngs=rngs))
        np.testing.assert_allclose(np.linalg.norm(bounded.kernel[...], 2), 0.5, rtol=1e-4)

    def dot(**options):
        """<dL/dW, W>: zero where the gradient goes through sigma."""
        model = SpectralNorm(linear, rngs=rngs, **options)
        grads = nnx.grad(lambda m: m(jnp.ones((1, 8))).sum())(model)
        return float(jnp.sum(grads["layer_instance"]["kernel"][...] * linear.kernel[...]))

    assert abs(dot()) < 1e-4 < 1e-2 < abs(dot(gradient="stop"))
    twice = {"kernel": sn_jax.Linear(doubled, 8)}
    baked = bake(SpectralNorm(linear, rules=twice, warmup=100, rngs=rngs))
    np.testing.assert_allclose(np.linalg.norm(baked.kernel[...], 2), 0.5, rtol=1e-4)


def doubled(w, x):
    return 2 * (x @ w)


def test_counters_and_new_variables_of_the_layer_are_kept():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 4, rngs=rngs)
            self.count = nnx.Variable(jnp.zeros((), int))

        def __call__(self, x):
            self.count[...] += 1
            self.seen = nnx.Variable(x.sum())
            return self.linear(x)

    rngs = nnx.Rngs(0)
    model = SpectralNorm(Layer(rngs), rngs=rngs)
    model(jnp.ones((1, 8)))
    model(jnp.ones((1, 8)))
    assert model.count[...] == 2
    assert model.seen[...] == 8


def test_a_stack_of_wrappers_is_baked_inside_vmap():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return SpectralNorm(nnx.Linear(4, 4, rngs=rngs), warmup=100, rngs=rngs)

    stack = make(nnx.Rngs(0))
    stack.eval()
    with pytest.raises(ValueError, match=r"stack made by nnx.vmap.*inside"):
        bake(stack)
    kernels = nnx.vmap(bake)(stack).kernel[...]
    np.testing.assert_allclose(np.linalg.norm(kernels, 2, (1, 2)), 1, rtol=1e-4)


def test_bad_use_says_what_to_do():
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(8, 4, rngs=rngs)
    with pytest.raises(ValueError, match="finds no kernel to normalize among bias, scale"):
        SpectralNorm(nnx.LayerNorm(4, rngs=rngs), rngs=rngs)
    with pytest.raises(ValueError, match="holds a SpectralNorm already"):
        SpectralNorm(SpectralNorm(linear, rngs=rngs), rngs=rngs)
    with pytest.raises(ValueError, match=r"stack/kernel of shape \(5, 4, 4\).*rules="):
        SpectralNorm(Net(rngs), rngs=rngs)
    with pytest.raises(ValueError, match="n_steps >= 1"):
        SpectralNorm(linear, n_steps=0, rngs=rngs)
    with pytest.raises(ValueError, match="error_on_non_matrix"):
        SpectralNorm(nnx.Conv(3, 4, (3, 3), rngs=rngs), error_on_non_matrix=True, rngs=rngs)
    with pytest.raises(ValueError, match="in this Linear: it is plain"):
        bake(linear)
    with pytest.raises(TypeError, match="wraps a module"):
        SpectralNorm(nnx.relu, rngs=rngs)

    class TwoSizes(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(self.conv(x)[:, ::2])

    assert views(TwoSizes(), IMAGES) == {"conv/kernel": sn_jax.Matrix((0, 1, 2), 3)}
    with pytest.raises(ValueError, match=r"conv/kernel.*acts in 2 ways"):
        views(TwoSizes(), IMAGES, conv="operator")


def test_nan_weights_give_nan_and_recover():
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    wrapped = SpectralNorm(layer, rngs=nnx.Rngs(0))
    good = np.array(layer.kernel[...])
    layer.kernel[...] = layer.kernel[...].at[0, 0].set(jnp.nan)
    assert np.isnan(wrapped(X)).all()
    layer.kernel[...] = good
    for _ in range(30):
        wrapped(X)
    np.testing.assert_allclose(
        wrapped.batch_stats["kernel"]["sigma"][...], np.linalg.norm(good, 2), rtol=1e-4
    )
