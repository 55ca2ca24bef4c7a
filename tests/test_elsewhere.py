"""What goes wrong in other libraries, one test a point: ours is right, and the peer's behaviour
is shown by an expected failure. On the Flax it was seen on it must fail; on a later one a fix is
noticed (XPASS) and fails nothing."""

import copy
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import needs_float16

import sn_jax
import sn_jax.linen
import sn_jax.nnx

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
flax_0_12_8 = "seen on flax 0.12.8"
fails = partial(pytest.mark.xfail, strict=flax.__version__ == "0.12.8")
peer = partial(fails, raises=AssertionError)


def arange_like(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2, (-2, -1))


# 1. flax.nnx.SpectralNorm writes W / sigma over the raw parameter (google/flax#5576).


def nnx_layer(module=nnx, **kwargs):
    rngs = nnx.Rngs(0)
    init = nnx.initializers.normal(1.0)
    layer = nnx.Linear(6, 5, kernel_init=init, rngs=rngs)
    return layer, module.SpectralNorm(layer, rngs=rngs, **kwargs)


X6 = arange_like((3, 6))


def raw_norms_under_a_learning_rate_of_almost_nothing(module):
    layer, wrapped = nnx_layer(module)
    optimizer = nnx.Optimizer(wrapped, optax.sgd(1e-12), wrt=nnx.Param)
    norms = [norm(layer.kernel[...])]
    for _ in range(3):
        grads = nnx.grad(lambda m: jnp.sum(m(X6, update_stats=True)))(wrapped)
        optimizer.update(wrapped, grads)
        norms.append(norm(layer.kernel[...]))
    return norms


def test_1_nnx_training_with_lr_1e_12_leaves_the_raw_norm():
    norms = raw_norms_under_a_learning_rate_of_almost_nothing(sn_jax.nnx)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


@peer(reason=f"flax.nnx overwrites the parameter; {flax_0_12_8}")
def test_1_peer_nnx_training_with_lr_1e_12_leaves_the_raw_norm():
    norms = raw_norms_under_a_learning_rate_of_almost_nothing(nnx)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def test_1_nnx_raw_parameters_are_bit_identical_after_100_forwards():
    layer, wrapped = nnx_layer(sn_jax.nnx)
    before = np.array(layer.kernel[...])
    forward = nnx.jit(lambda m, x: m(x))
    for _ in range(100):
        forward(wrapped, X6)
    np.testing.assert_array_equal(layer.kernel[...], before)
    wrapped.eval()
    wrapped(X6)
    np.testing.assert_array_equal(layer.kernel[...], before)


@peer(reason=f"one eval call of flax.nnx changes the kernel; {flax_0_12_8}")
def test_1_peer_nnx_eval_leaves_the_kernel():
    layer, wrapped = nnx_layer()
    before = np.array(layer.kernel[...])
    wrapped(X6, update_stats=False)
    np.testing.assert_array_equal(layer.kernel[...], before)


def grucell(module):
    rngs = nnx.Rngs(0)
    cell = module.SpectralNorm(nnx.GRUCell(6, 4, rngs=rngs), rngs=rngs)
    return cell(jnp.ones((3, 4)), X6)


def test_1_nnx_wraps_layers_of_more_than_one_argument():
    assert grucell(sn_jax.nnx)[1].shape == (3, 4)


@fails(reason=f"flax.nnx passes one argument; {flax_0_12_8}")
def test_1_peer_nnx_wraps_layers_of_more_than_one_argument():
    assert grucell(nnx)[1].shape == (3, 4)


def string_keys(module):
    _, wrapped = nnx_layer(module)
    pure = nnx.to_pure_dict(nnx.state(wrapped, nnx.BatchStat))
    paths = jax.tree_util.tree_flatten_with_path(pure)[0]
    return all(isinstance(key.key, str) for path, _ in paths for key in path)


def test_1_nnx_state_has_string_keys_and_nnx_view_switches_it():
    assert string_keys(sn_jax.nnx)
    _, wrapped = nnx_layer(sn_jax.nnx)
    assert nnx.view(wrapped, use_running_average=True).use_running_average


@peer(reason=f"flax.nnx keys its state by tuples; {flax_0_12_8}")
def test_1_peer_nnx_state_has_string_keys():
    assert string_keys(nnx)


@fails(reason=f"nnx.view does not know flax.nnx's; {flax_0_12_8}")
def test_1_peer_nnx_view_switches_it():
    _, wrapped = nnx_layer(nnx)
    assert nnx.view(wrapped, use_running_average=True).use_running_average


# 2. flax.linen.SpectralNorm.


def linen_norms(wrapper):
    """Norm of the kernel in params after init, and after an apply with all of it mutable."""
    model = wrapper(nn.Dense(5, kernel_init=nn.initializers.normal(1.0)))
    variables = model.init(KEY, X6, update_stats=False)
    before = norm(variables["params"]["layer_instance"]["kernel"])
    large = jax.tree.map(lambda p: 8 * p, variables["params"])
    _, updates = model.apply({**variables, "params": large}, X6, update_stats=True, mutable=True)
    return before, norm(updates["params"]["layer_instance"]["kernel"]) / (8 * before)


def test_2_linen_init_and_mutable_apply_keep_raw_parameters():
    after_init, ratio_after_apply = linen_norms(sn_jax.linen.SpectralNorm)
    assert after_init > 2
    assert ratio_after_apply == 1


@peer(reason=f"flax.linen puts the normalized kernel into params; {flax_0_12_8}")
def test_2_peer_linen_init_and_mutable_apply_keep_raw_parameters():
    after_init, ratio_after_apply = linen_norms(nn.SpectralNorm)
    assert after_init > 2
    assert ratio_after_apply == 1


def sigma_after_a_zero_kernel(wrapper):
    model = wrapper(nn.Dense(5))
    variables = model.init(KEY, X6, update_stats=False)
    zero = jax.tree.map(jnp.zeros_like, variables["params"])
    stats = {"batch_stats": variables["batch_stats"]}
    apply = jax.jit(partial(model.apply, update_stats=True, mutable=["batch_stats"]))
    _, stats = apply({"params": zero, **stats}, X6)
    kernel = arange_like((6, 5))
    params = {"layer_instance": {**zero["layer_instance"], "kernel": kernel}}
    for _ in range(60):
        _, stats = apply({"params": params, **stats}, X6)
    return stats["batch_stats"]["layer_instance/kernel/sigma"] / norm(kernel)


def test_2_a_zero_kernel_recovers():
    np.testing.assert_allclose(sigma_after_a_zero_kernel(sn_jax.linen.SpectralNorm), 1, rtol=1e-5)


@peer(reason=f"flax.linen's u stays zero for ever; {flax_0_12_8}")
def test_2_peer_a_zero_kernel_recovers():
    np.testing.assert_allclose(sigma_after_a_zero_kernel(nn.SpectralNorm), 1, rtol=1e-5)


def attention_query(wrapper):
    """(sigma of a query kernel relative to its norm as a matrix, names in the state)."""
    model = wrapper(nn.DenseGeneral((8, 8)), n_steps=60)
    x = arange_like((2, 64))
    variables = model.init(KEY, x, update_stats=False)
    kernel = arange_like((64, 8, 8))
    variables["params"]["layer_instance"]["kernel"] = kernel
    _, updates = model.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    sigma = updates["batch_stats"]["layer_instance/kernel/sigma"]
    return sigma / norm(kernel.reshape(64, 64)), list(variables["batch_stats"])


def test_2_query_kernels_are_seen_as_the_matrix_they_are_and_biases_left_alone():
    ratio, names = attention_query(sn_jax.linen.SpectralNorm)
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)
    assert not any("bias" in name for name in names)


@peer(reason=f"flax.linen flattens (in, heads, dim) to (in * heads, dim); {flax_0_12_8}")
def test_2_peer_query_kernels_are_seen_as_the_matrix_they_are():
    ratio, _ = attention_query(nn.SpectralNorm)
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)


@peer(reason=f"flax.linen normalizes 2-D biases; {flax_0_12_8}")
def test_2_peer_two_dimensional_biases_are_left_alone():
    _, names = attention_query(nn.SpectralNorm)
    assert not any("bias" in name for name in names)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(6)(x), None


def test_2_each_layer_of_a_scanned_stack_has_its_own_norm():
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
    model = sn_jax.linen.SpectralNorm(stack, warmup=60)
    variables = model.init(KEY, X6, None)
    sigma = variables["batch_stats"]["layer_instance/Dense_0/kernel/sigma"]
    kernel = variables["params"]["layer_instance"]["Dense_0"]["kernel"]
    assert kernel.shape == (4, 6, 6)
    np.testing.assert_allclose(sigma, norm(kernel), rtol=1e-3)


@peer(reason=f"flax.linen gives a stack one sigma; {flax_0_12_8}")
def test_2_peer_each_layer_of_a_scanned_stack_has_its_own_norm():
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
    variables = nn.SpectralNorm(stack).init(KEY, X6, None, update_stats=False)
    assert variables["batch_stats"]["layer_instance/Dense_0/kernel/sigma"].shape == (4,)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_2_conv_transpose_takes_the_output_axis_of_either_layout(transpose_kernel):
    layer = nn.ConvTranspose(5, (3, 2), transpose_kernel=transpose_kernel)
    model = sn_jax.linen.SpectralNorm(layer, warmup=100)
    variables = model.init(KEY, arange_like((1, 4, 4, 7)))
    kernel = np.asarray(variables["params"]["layer_instance"]["kernel"])
    if transpose_kernel:
        kernel = kernel.swapaxes(-1, -2)
    sigma = variables["batch_stats"]["layer_instance/kernel/sigma"]
    np.testing.assert_allclose(sigma, norm(kernel.reshape(-1, 5)), rtol=1e-3)


def partitioned_and_rematerialized(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(1.0), ("in", "out"))
            return nn.remat(wrapper)(nn.Dense(5, kernel_init=init))(x, update_stats=True)

    variables = Model().init(KEY, X6)
    return jax.grad(
        lambda p: jnp.sum(Model().apply({**variables, "params": p}, X6, mutable=["batch_stats"])[0])
    )(variables["params"])


def test_2_partitioned_kernels_and_remat_with_update_stats_by_keyword():
    grads = partitioned_and_rematerialized(sn_jax.linen.SpectralNorm)
    kernel = grads["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert np.any(kernel.value != 0)


@fails(reason=f"flax.linen crashes on both; {flax_0_12_8}")
def test_2_peer_partitioned_kernels_and_remat():
    partitioned_and_rematerialized(nn.SpectralNorm)


def test_2_update_stats_has_a_default():
    model = sn_jax.linen.SpectralNorm(nn.Dense(5))
    variables = model.init(KEY, X6)
    assert model.apply(variables, X6).shape == (3, 5)


def test_2_the_first_estimate_is_warm():
    """flax's estimate is 0.71 of the norm after its first step on a 512 x 512 Gaussian."""
    model = sn_jax.linen.SpectralNorm(nn.Dense(512, kernel_init=nn.initializers.normal(1.0)))
    variables = model.init(KEY, jnp.ones((1, 512)))
    kernel = variables["params"]["layer_instance"]["kernel"]
    sigma = variables["batch_stats"]["layer_instance/kernel/sigma"]
    assert 0.97 < sigma / norm(kernel) <= 1


@peer(reason=f"flax.linen does not warm up: 0.71 after the first step; {flax_0_12_8}")
def test_2_peer_the_first_estimate_is_warm():
    model = nn.SpectralNorm(nn.Dense(512))
    variables = model.init(KEY, jnp.ones((1, 512)), update_stats=False)
    kernel = arange_like((512, 512))
    variables["params"]["layer_instance"]["kernel"] = kernel
    _, updates = model.apply(
        variables, jnp.ones((1, 512)), update_stats=True, mutable=["batch_stats"]
    )
    sigma = updates["batch_stats"]["layer_instance/kernel/sigma"]
    assert 0.97 < sigma / norm(kernel) <= 1


# 5. Two forwards in one step.


def test_5_two_forwards_with_the_frozen_state_leave_u_and_backward_works():
    params = {"kernel": arange_like((6, 5))}
    state = sn_jax.init(params, KEY)
    _, state = sn_jax.spectral_normalize(params, state)

    def loss(params):
        first, after_first = sn_jax.spectral_normalize(params, state, n_steps=0)
        second, after_second = sn_jax.spectral_normalize(params, after_first, n_steps=0)
        assert after_second is state
        return jnp.sum(jnp.tanh(X6 @ first["kernel"])) - jnp.sum(X6 @ second["kernel"])

    assert np.isfinite(jax.grad(loss)(params)["kernel"]).all()


# 6. Averages of batch_stats shrink u.


def test_6_an_averaged_u_does_not_change_the_output():
    model = sn_jax.linen.SpectralNorm(nn.Dense(5))
    variables = model.init(KEY, X6)
    shrunk = {
        **variables,
        "batch_stats": jax.tree.map(lambda x: x / 4000, variables["batch_stats"]),
    }
    np.testing.assert_allclose(model.apply(shrunk, X6), model.apply(variables, X6), rtol=1e-5)


@peer(reason=f"flax.linen divides by u's length and an eps; {flax_0_12_8}")
def test_6_peer_a_tiny_kernel_is_normalized_like_any_other():
    model = nn.SpectralNorm(nn.Dense(5, use_bias=False))
    variables = model.init(KEY, X6, update_stats=False)
    tiny = jax.tree.map(lambda x: x * 1e-12, variables)
    np.testing.assert_allclose(
        model.apply(tiny, X6, update_stats=False),
        model.apply(variables, X6, update_stats=False),
        rtol=1e-3,
    )


def test_6_a_tiny_kernel_is_normalized_like_any_other():
    model = sn_jax.linen.SpectralNorm(nn.Dense(5, use_bias=False))
    variables = model.init(KEY, X6)
    tiny = {**variables, "params": jax.tree.map(lambda x: x * 1e-12, variables["params"])}
    np.testing.assert_allclose(model.apply(tiny, X6), model.apply(variables, X6), rtol=1e-4)


def test_6_the_state_has_a_type_and_a_collection_of_its_own():
    _, wrapped = nnx_layer(sn_jax.nnx)
    _, spectral, _ = nnx.split(wrapped, sn_jax.nnx.SpectralStat, ...)
    assert len(jax.tree.leaves(spectral)) == 2
    assert issubclass(sn_jax.nnx.SpectralStat, nnx.BatchStat)
    model = sn_jax.linen.SpectralNorm(nn.Dense(5), collection_name="spectral")
    assert set(model.init(KEY, X6)) == {"params", "spectral"}


# 7. Half precision.


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=needs_float16), jnp.bfloat16])
def test_7_half_precision_weights_are_iterated_in_float32(dtype):
    w = jnp.asarray(arange_like((128, 64)) * 1e-3, dtype)
    params = {"kernel": w}
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY), rtol=1e-4)
    exact = norm(np.asarray(w, np.float64))
    np.testing.assert_allclose(state["kernel"].sigma, exact, rtol=1e-5)
    normalized, _ = sn_jax.spectral_normalize(params, state)
    np.testing.assert_allclose(norm(normalized["kernel"]), 1, rtol=float(jnp.finfo(dtype).eps))
    assert params["kernel"] is w


# 8. Zero weights.


@pytest.mark.parametrize("module", [sn_jax.linen, sn_jax.nnx])
def test_8_zero_weights_give_finite_values_and_gradients(module):
    if module is sn_jax.nnx:
        rngs = nnx.Rngs(0)
        zero = nnx.Linear(6, 5, kernel_init=nnx.initializers.zeros, rngs=rngs)
        wrapped = module.SpectralNorm(zero, rngs=rngs)
        grads = nnx.grad(lambda m: jnp.sum(m(X6)))(wrapped)
        value = wrapped(X6)
    else:
        model = module.SpectralNorm(nn.Dense(5, kernel_init=nn.initializers.zeros))
        variables = model.init(KEY, X6)
        value = model.apply(variables, X6)
        grads = jax.grad(lambda p: jnp.sum(model.apply({**variables, "params": p}, X6)))(
            variables["params"]
        )
    np.testing.assert_array_equal(value, 0)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))


# 10. Eval before train, load then eval, deepcopy, export.


def test_10_eval_before_any_training_is_already_normalized():
    _, wrapped = nnx_layer(sn_jax.nnx, update_stats=False, warmup=60)
    baked = sn_jax.nnx.bake(wrapped)
    np.testing.assert_allclose(norm(baked.kernel[...]), 1, rtol=1e-4)


def test_10_calibrate_after_a_load():
    state = sn_jax.init({"kernel": arange_like((40, 30))}, KEY)
    loaded = {"kernel": arange_like((40, 30), seed=1)}
    before = sn_jax.spectral_norms(loaded, state)["kernel"] / norm(loaded["kernel"])
    state = sn_jax.calibrate(loaded, state)
    after = sn_jax.spectral_norms(loaded, state)["kernel"] / norm(loaded["kernel"])
    assert before < 0.9
    np.testing.assert_allclose(after, 1, rtol=1e-5)


def test_10_deepcopy_and_bake():
    layer, wrapped = nnx_layer(sn_jax.nnx)
    again = copy.deepcopy(wrapped)
    wrapped.eval()
    again.eval()
    np.testing.assert_array_equal(again(X6), wrapped(X6))
    plain = sn_jax.nnx.bake(wrapped)
    assert type(plain) is nnx.Linear
    np.testing.assert_allclose(plain(X6), wrapped(X6), rtol=1e-5)
    assert layer.kernel[...] is not plain.kernel[...]


# 11. What users miss.


def test_11_cap_fix_gamma_detached_stateless_per_head_filters_and_a_flat_dict_of_sigmas():
    kernel = arange_like((10, 3, 5))
    params = {"attn": {"query": {"kernel": kernel}}, "head": {"kernel": arange_like((5, 2))}}
    rules = {r"attn/.*": sn_jax.Matrix(0, 2), r"head/.*": None}
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY, rules), rtol=1e-4)
    sigmas = sn_jax.spectral_norms(params, state)
    assert list(sigmas) == ["attn/query/kernel"]
    np.testing.assert_allclose(sigmas["attn/query/kernel"], norm(kernel.swapaxes(0, 1)), rtol=1e-5)
    capped, _ = sn_jax.spectral_normalize(params, state, mode="clip", bound=100.0, gradient="stop")
    np.testing.assert_array_equal(capped["attn"]["query"]["kernel"], kernel)

    learned = sn_jax.linen.SpectralNorm(nn.Dense(5), use_scale=True)
    variables = learned.init(KEY, X6)
    assert variables["params"]["layer_instance/kernel/scale"] == 1
    doubled = jax.tree.map(lambda x: x, variables)
    doubled["params"]["layer_instance/kernel/scale"] *= 2
    np.testing.assert_allclose(
        learned.apply(doubled, X6), 2 * learned.apply(variables, X6), rtol=1e-6
    )

    stateless = sn_jax.linen.SpectralNorm(nn.Dense(5), stateless=True)
    variables = stateless.init(KEY, X6)
    assert set(variables) == {"params"}
    plain = sn_jax.linen.bake(stateless, variables, X6)
    np.testing.assert_allclose(norm(plain["params"]["kernel"]), 1, rtol=1e-3)


# 13 and 14: tests/test_contract.py, test_nothing_leaks_or_compiles_twice and
# test_every_derivative_is_that_of_the_definition. Here: through the Flax wrappers.


def test_14_a_gradient_penalty_through_the_wrappers():
    linen_model = sn_jax.linen.SpectralNorm(nn.Dense(1))
    variables = linen_model.init(KEY, X6)

    def penalty(params):
        critic = lambda x: jnp.sum(jnp.tanh(linen_model.apply({**variables, "params": params}, x)))  # noqa: E731
        return jnp.sum(jax.grad(critic)(X6) ** 2)

    grads = jax.grad(penalty)(variables["params"])
    eps = 1e-3
    direction = jax.tree.map(lambda p: arange_like(p.shape, 3), variables["params"])
    shifted = [
        penalty(jax.tree.map(lambda p, d, s=s: p + s * eps * d, variables["params"], direction))
        for s in (1, -1)
    ]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)))
    np.testing.assert_allclose((shifted[0] - shifted[1]) / (2 * eps), slope, rtol=0.02, atol=1e-3)
    jax.jvp(penalty, (variables["params"],), (direction,))
