"""sn_jax.linen.SpectralNorm on Dense and Conv, against flax's own where that is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sn_jax.linen import SpectralNorm

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)


class Net(nn.Module):
    wrapper: type

    @nn.compact
    def __call__(self, x, **kwargs):
        x = self.wrapper(nn.Conv(8, (3, 3), strides=2))(x, **kwargs)
        x = nn.leaky_relu(x).reshape(x.shape[0], -1)
        x = self.wrapper(nn.Dense(5))(x, **kwargs)
        return nn.Dense(1)(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.leaky_relu(x).reshape(x.shape[0], -1)
        x = nn.Dense(5)(x)
        return nn.Dense(1)(x)


X = np.random.default_rng(1).standard_normal((4, 6, 6, 3)).astype(np.float32)
TARGET = np.arange(4, dtype=np.float32)[:, None]
OURS, FLAX = Net(SpectralNorm), Net(nn.SpectralNorm)


def close(a, b, tol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), a, b)


def test_same_layout_as_flax():
    ours, flax = OURS.init(KEY, X), FLAX.init(KEY, X, update_stats=False)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, flax)
    assert ours["batch_stats"]["SpectralNorm_0"]["Conv_0/kernel/u"].shape == (1, 8)


def test_a_flax_checkpoint_gives_flax_outputs_in_training_and_eval():
    variables = FLAX.init(KEY, X, update_stats=False)
    for _ in range(3):
        expected, flax_stats = FLAX.apply(variables, X, update_stats=True, mutable=["batch_stats"])
        got, our_stats = OURS.apply(variables, X, mutable=["batch_stats"])
        close((got, our_stats), (expected, flax_stats))
        close(OURS.apply(variables, X), FLAX.apply(variables, X, update_stats=False))
        variables = {**variables, **our_stats}


def test_raw_parameters_are_never_overwritten():
    """flax's init and mutable apply put the normalized kernel into params."""
    variables = OURS.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], Plain().init(KEY, X)["params"])
    _, updates = OURS.apply(variables, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, updates["params"], variables["params"])


def test_kernels_have_norm_one_after_init():
    variables = OURS.init(KEY, X)
    kernel = variables["params"]["Conv_0"]["kernel"]
    sigma = variables["batch_stats"]["SpectralNorm_0"]["Conv_0/kernel/sigma"]
    np.testing.assert_allclose(np.linalg.norm(kernel.reshape(-1, 8), 2), sigma, rtol=0.01)
    y, variables = OURS.init_with_output(KEY, X)
    close(y, OURS.apply(variables, X), tol=0.02)


def test_eval_is_frozen_and_training_moves_u():
    variables = OURS.init(KEY, X)
    _, updates = OURS.apply(variables, X, mutable=["batch_stats"], update_stats=False)
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, b), updates, {"batch_stats": variables["batch_stats"]}
    )
    assert jax.tree.all(same)
    _, updates = OURS.apply(variables, X, mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), updates["batch_stats"],
                         variables["batch_stats"])  # fmt: skip
    assert moved["SpectralNorm_0"]["Conv_0/kernel/u"]


def test_training_keeps_every_wrapped_kernel_at_norm_one():
    variables = OURS.init(KEY, X)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, stats, opt_state):
        def loss(params):
            y, updates = OURS.apply({"params": params, **stats}, X, mutable=["batch_stats"])
            return jnp.mean((y - TARGET) ** 2), updates

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        deltas, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, deltas), stats, opt_state, value

    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    opt_state, losses = tx.init(params), []
    for _ in range(150):
        params, stats, opt_state, value = step(params, stats, opt_state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    for wrapper, layer in (("SpectralNorm_0", "Conv_0"), ("SpectralNorm_1", "Dense_0")):
        kernel = params[layer]["kernel"]
        true = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
        assert true > 1.05  # there was something to normalize
        sigma = stats["batch_stats"][wrapper][f"{layer}/kernel/sigma"]
        np.testing.assert_allclose(sigma, true, rtol=0.03)


def test_zero_kernel_recovers_as_flax_does_not():
    model = SpectralNorm(nn.Dense(5, kernel_init=nn.initializers.zeros))
    x = jnp.ones((2, 3))
    variables = model.init(KEY, x)
    stats = {"batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}  # flax's u = 0
    np.testing.assert_array_equal(model.apply(variables, x), 0.0)
    params = jax.tree.map(lambda p: p + jax.random.normal(KEY, p.shape), variables["params"])
    for _ in range(30):
        _, stats = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
    kernel = params["layer_instance"]["kernel"]
    sigma = stats["batch_stats"]["layer_instance/kernel/sigma"]
    np.testing.assert_allclose(sigma, np.linalg.norm(kernel, 2), rtol=1e-4)


def test_options_reach_the_core():
    x = jnp.ones((2, 3))
    kernel_init = nn.initializers.constant(0.1)  # norm 0.1 * sqrt(15)
    clipped = SpectralNorm(nn.Dense(5, kernel_init=kernel_init), mode="clip")
    y = clipped.apply(clipped.init(KEY, x), x)
    np.testing.assert_allclose(y, 0.3, rtol=1e-6)
    bounded = SpectralNorm(nn.Dense(5, kernel_init=kernel_init), bound=2.0, dtype=jnp.bfloat16)
    y = bounded.apply(bounded.init(KEY, x), x)
    np.testing.assert_allclose(y, 2 * 3 / 15**0.5, rtol=1e-2)


def test_bad_use_says_what_to_do():
    x = jnp.ones((2, 3))
    model = SpectralNorm(nn.Dense(5))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match="immutable: pass mutable"):
        model.apply(variables, x, update_stats=True)
    with pytest.raises(ValueError, match="n_steps >= 1"):
        SpectralNorm(nn.Dense(5), n_steps=0).init(KEY, x)
    with pytest.raises(ValueError, match="finds no kernel to normalize"):
        SpectralNorm(nn.LayerNorm()).init(KEY, x)
    with pytest.raises(ValueError, match=r"Conv_0|layer_instance/kernel has shape"):
        SpectralNorm(nn.Conv(4, (2, 2)), error_on_non_matrix=True).init(KEY, X)
