"""Lipschitz constants from below: known norms, known constants, transformations of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from sn_jax import lipschitz_attack, local_lipschitz

A = np.sin(1.0 + np.arange(16.0).reshape(4, 4))
B = np.cos(3 * A)
KEY = jax.random.key(0)


def residual(x):
    return x + B @ jax.nn.relu(A @ x)


@pytest.mark.parametrize("shape", [(3, 5), (7, 2), (4, 4)])
@pytest.mark.parametrize("key", [None, 0])
def test_a_linear_map_has_its_norm(shape, key):
    matrix = np.random.default_rng(0).normal(size=shape)
    key = None if key is None else jax.random.key(key)
    sigma = local_lipschitz(lambda x: matrix @ x, np.ones(shape[1]), n_steps=300, key=key)
    np.testing.assert_allclose(sigma, np.linalg.norm(matrix, 2), rtol=1e-9)


def test_the_jacobian_of_any_shape():
    x = jax.random.normal(jax.random.key(0), (2, 3))

    def fn(x):
        return jnp.tanh(x @ A[:3]) + jnp.sin(x).sum()

    jacobian = jax.jacobian(fn)(x).reshape(8, 6)
    np.testing.assert_allclose(local_lipschitz(fn, x, n_steps=200),
                               np.linalg.norm(jacobian, 2), rtol=1e-9)  # fmt: skip


def test_it_is_never_above():
    x = jax.random.normal(jax.random.key(1), (4,))
    exact = np.linalg.norm(jax.jacobian(jnp.tanh)(A @ x) @ A, 2)
    for n_steps in range(6):
        assert local_lipschitz(lambda x: jnp.tanh(A @ x), x, n_steps=n_steps) <= exact * (1 + 1e-12)


def test_the_default_iterates_until_it_is_close():
    x = jax.random.normal(jax.random.key(2), (4,))
    exact = np.linalg.norm(jax.jacobian(residual)(x), 2)
    np.testing.assert_allclose(local_lipschitz(residual, x), exact, rtol=1e-3)
    # The vector that it starts from is far from the one it finds.
    assert local_lipschitz(residual, x, n_steps=0) < 0.9 * exact


def test_it_is_jitted_and_mapped():
    xs = jax.random.normal(jax.random.key(0), (5, 4))
    single = [float(local_lipschitz(residual, x)) for x in xs]
    mapped = jax.jit(jax.vmap(partial(local_lipschitz, residual)))(xs)
    np.testing.assert_allclose(mapped, single, rtol=1e-12)


def test_small_and_zero_jacobians():
    assert local_lipschitz(lambda x: 0 * x, jnp.ones(3)) == 0
    tiny = local_lipschitz(lambda x: 1e-200 * x, jnp.ones(3))
    np.testing.assert_allclose(tiny, 1e-200)
    x = jnp.ones(3, jnp.float32)
    assert local_lipschitz(lambda x: 2 * x, x).dtype == jnp.float32


def test_the_gradient_is_that_of_the_norm():
    def sigma(x):
        return local_lipschitz(lambda x: A @ jnp.sin(x), x, n_steps=300)

    x = jnp.linspace(0.1, 1.0, 4)
    exact = jax.grad(lambda x: jnp.linalg.norm(A * jnp.cos(x)[None], 2))(x)
    np.testing.assert_allclose(jax.grad(sigma)(x), exact, rtol=1e-7)


def test_the_attack_reaches_the_constant_of_a_residual_net():
    lower, x = lipschitz_attack(residual, jax.random.key(0), jnp.ones(4), regions=0)
    # A has rank 2: of the 16 patterns, whose largest norm is 3.858103905, x reaches eight.
    np.testing.assert_allclose(lower, 3.8440867858244, rtol=1e-9)
    jacobian = jax.jacobian(residual)(x)
    np.testing.assert_allclose(lower, np.linalg.norm(jacobian, 2), rtol=1e-9)


KINKED = {
    "relu": lambda x, w, v: v @ jax.nn.relu(w @ x + w[:, 0]),
    "leaky": lambda x, w, v: x - v @ jax.nn.leaky_relu(w @ x - 0.3, 0.2),
    "two layers": lambda x, w, v: jax.nn.relu(w @ jax.nn.relu(v @ jax.nn.relu(w @ x) - 0.1)),
    "max-min, abs": lambda x, w, v: v @ jnp.abs(jnp.maximum(w @ x, w @ x[::-1] + 1)),
    "clip": lambda x, w, v: jnp.clip(v @ jnp.clip(w @ x, -1, 0.5), -0.2, 0.2),
    "opposite": lambda x, w, v: v @ (jax.nn.relu(w @ x) + 2 * jax.nn.relu(-(w @ x))),
}


@pytest.mark.parametrize("name", KINKED)
def test_piecewise_linear_functions_are_enumerated(name):
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((4, 2)), rng.standard_normal((2, 4))
    fn = partial(KINKED[name], w=w, v=v)
    lower, _ = lipschitz_attack(fn, jax.random.key(0), jnp.ones(2), 1, restarts=0)
    # In the plane many points find every region that is not tiny.
    points = np.concatenate([s * rng.standard_normal((3000, 2)) for s in (0.3, 1.0, 10.0)])
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacobian(fn)))(points))
    np.testing.assert_allclose(lower, np.linalg.norm(jacobians, 2, (1, 2)).max(), rtol=1e-9)
    assert lower <= sn_jax.lipschitz_bound(fn, jnp.ones(2), progress=False).upper


def test_too_many_regions_are_climbed():
    attack = partial(lipschitz_attack, residual, jax.random.key(0), jnp.ones(4), 20, restarts=2)
    assert attack(regions=3).lower == attack(regions=0).lower < attack().lower


def test_the_attack_climbs_a_smooth_function():
    lower, _ = lipschitz_attack(jax.nn.gelu, jax.random.key(0), jnp.zeros(2), 300)
    np.testing.assert_allclose(lower, 1.12899307, rtol=1e-5)
    few = lipschitz_attack(jax.nn.gelu, jax.random.key(0), jnp.zeros(2), 3, restarts=0)
    assert few.lower < lower


def test_the_attack_is_jitted():
    attack = jax.jit(partial(lipschitz_attack, residual, steps=20, restarts=2))
    key = jax.random.key(0)
    eager = lipschitz_attack(residual, key, jnp.ones(4), 20, restarts=2, regions=0)
    np.testing.assert_allclose(attack(key, jnp.ones(4)).lower, eager.lower, rtol=1e-9)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating"):
        local_lipschitz(jnp.sin, jnp.arange(3))
    with pytest.raises(TypeError, match="floating"):
        local_lipschitz(lambda x: (x > 0).astype(int), jnp.ones(3))


@pytest.mark.parametrize("attack", [local_lipschitz, lambda fn, x: lipschitz_attack(fn, KEY, x, 3)])
def test_what_has_no_backward_pass_is_named(attack):
    """Loops of unknown length, and pools that JAX cannot transpose."""

    def pool(x):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(jnp.tanh(x), -jnp.inf, jax.lax.max, window, (1, 1, 1, 1),
                                     "VALID", window_dilation=window)  # fmt: skip

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0] > 1, jnp.sin, x)

    for fn, x, words in (
        (pool, np.ones((1, 4, 4, 1)), "dilation"),
        (loop, np.ones(3), "while_loop"),
    ):
        with pytest.raises(ValueError, match=f"no backward pass .*{words}"):
            attack(fn, x)
