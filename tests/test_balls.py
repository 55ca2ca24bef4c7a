"""lipschitz_bound in a ball: never below what is found in it, near the Jacobian in small ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sn_jax
from experiments.certify.programs import random_program

W = [jnp.asarray(np.random.default_rng(i).standard_normal((6, 6)) / 2) for i in range(4)]
relu = jax.nn.relu


def attention(x):
    x = x.reshape(3, 2)
    q, k, v = (x @ w[:2, :4] for w in W[:3])
    return jax.nn.softmax(q @ k.T / 2) @ v


SMOOTH = {
    "tanh": lambda x: W[2] @ jnp.tanh(W[1] @ jnp.tanh(W[0] @ x + 0.3)) - x,
    "gated": lambda x: W[2] @ ((W[0] @ x + 1) * jax.nn.sigmoid(W[1] @ x)),
    "exp": lambda x: jnp.exp(W[0] @ x) + W[1] @ jnp.sin(x),
    "squares": lambda x: x**2 * W[0][0] + x * (W[1] @ x),
    "quotient": lambda x: (W[0] @ x) / (3 + jnp.cos(W[1] @ x)),
    "logits": lambda x: x @ (W[0] @ x),
    "attention": attention,
    "softmax": lambda x: W[1] @ jax.nn.softmax(3 * (W[0] @ x)),
}
OTHERS = {
    "relu": lambda x: W[2] @ relu(W[1] @ relu(W[0] @ x + 0.3)),
    "max and min": lambda x: jnp.concatenate(
        [jnp.maximum(x[:3], x[3:]), jnp.minimum(x[:3], W[0][:3] @ x)]),
    "sorted product": lambda x: jnp.sort(W[0] @ x) * x,
    "pool": lambda x: jnp.exp(lax.cummax(x)) * jnp.pad(x[:5], (0, 1), constant_values=2.0),
    "logsumexp": lambda x: jax.nn.logsumexp(W[0] @ x) * x,
    "layer norm": lambda x: (x - x.mean()) * lax.rsqrt(x.var() + 0.5) * (W[0] @ x),
    "where": lambda x: jnp.where(jnp.arange(6) > 2, jnp.exp(x), 3.0) * jnp.flip(x),
}  # fmt: skip


def local(fn, x, radius, method="tight"):
    return sn_jax.lipschitz_bound(fn, x, radius=radius, method=method, progress=False)


def found(fn, x, radius, seed=0) -> float:
    """The largest stretch that random points of the ball show, by Jacobians and by pairs."""
    rng = np.random.default_rng(seed)
    flat = jax.jit(jax.vmap(lambda x: jnp.ravel(fn(x))))
    steps = rng.standard_normal((200, x.size))
    steps *= radius / np.linalg.norm(steps, axis=1, keepdims=True)
    steps[::2] *= rng.uniform(0, 1, (100, 1))
    points = np.concatenate([x[None], x + (1 - 1e-9) * steps])
    jacobians = jax.vmap(jax.jacobian(lambda x: jnp.ravel(fn(x))))(points)
    by_pairs = np.linalg.norm(np.diff(flat(points), axis=0), axis=1)
    by_pairs /= np.linalg.norm(np.diff(points, axis=0), axis=1)
    return max(float(np.linalg.norm(jacobians, 2, (-2, -1)).max()), float(by_pairs.max()))


@pytest.mark.parametrize("name", [*SMOOTH, *OTHERS])
def test_in_a_ball(name):
    fn = (SMOOTH | OTHERS)[name]
    x = np.random.default_rng(5).standard_normal(6)
    last = np.inf
    for share in (0.3, 1e-2, 1e-4):
        radius = share * np.linalg.norm(x)
        bound = local(fn, x, radius).upper
        lower = found(fn, x, radius)
        assert lower * (1 - 1e-9) <= bound < np.inf
        assert bound <= last * (1 + 1e-6)
        last = bound
    if name in SMOOTH:
        assert last <= 1.05 * lower


def test_of_one_number():
    """Known constants: exp and x^2 at the end of the interval, relu on each side of its kink."""
    x = np.array([0.5])
    for radius in (1e-3, 0.4, 3.0):
        assert np.exp(0.5 + radius) <= local(jnp.exp, x, radius).upper <= 1.0001 * np.exp(
            0.5 + radius)  # fmt: skip
        assert 1 + 2 * radius <= local(lambda x: x * x, x, radius).upper <= 1.0001 * (
            1 + 2 * radius)  # fmt: skip
    assert local(relu, x, 0.4).upper == pytest.approx(1, rel=1e-9)
    assert local(lambda x: relu(-x), x, 0.4).upper <= 1e-9
    assert local(lambda x: relu(-x), x, 0.6).upper == pytest.approx(1, rel=1e-9)
    assert local(lambda x: relu(x) * 2 + x, -x, 0.4).upper == pytest.approx(1, rel=1e-9)


def test_what_bends_twice():
    """exp(exp(x)), exp(x^2) and a softmax of a square: steepest at the end of the interval, where
    values are off the linear part of the first."""
    x, radius = np.array([0.5]), 0.4
    end = 0.5 + radius
    cases = [
        (lambda x: jnp.exp(jnp.exp(x)), np.exp(end + np.exp(end))),
        (lambda x: jnp.exp(x * x), 2 * end * np.exp(end**2)),
        (lambda x: jnp.exp(9 * jax.nn.softmax(jnp.concatenate([x, -x]))[1:]), None),
    ]
    for fn, exact in cases:
        exact = exact or found(fn, x, radius)
        assert exact <= local(fn, x, radius).upper <= 99 * exact


def test_affine_arithmetic_is_of_the_euclidean_ball():
    """Intervals alone would see sums of absolute values: here the kinks are just out of reach."""
    w = np.asarray(W[0])
    x = np.linalg.solve(w, np.full(6, 1.0))
    reach = 1 / np.linalg.norm(w, axis=1).max()  # of W x = 0 in some entry
    fn = lambda x: W[1] @ relu(-(W[0] @ x))  # noqa: E731
    assert local(fn, x, 0.99 * reach).upper <= 1e-6
    assert local(fn, x, 1.1 * reach).upper > 0.01


def test_what_is_asked_of_x():
    with pytest.raises(ValueError, match="radius must be > 0"):
        local(jnp.sin, np.ones(2), 0.0)
    with pytest.raises(ValueError, match="values of x count"):
        local(jnp.sin, jax.ShapeDtypeStruct((2,), np.float32), 1.0)
    with pytest.raises(ValueError, match="values of x count"):
        local(jnp.sin, np.array([np.nan]), 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_in_a_ball(seed):
    """Of all kinds of operations; 42 more were tried once."""
    fn, x = random_program(np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    radius = (0.01, 0.3)[seed % 2] * np.linalg.norm(x)
    steps = rng.standard_normal((12, *x.shape))
    steps *= radius / np.linalg.norm(steps.reshape(12, -1), axis=1).reshape(12, *[1] * x.ndim)
    # Forwards, since loops may not be differentiated backwards.
    jacobians = jax.vmap(jax.jacfwd(lambda x: jnp.ravel(fn(x))))(x + steps)
    lower = np.linalg.norm(np.asarray(jacobians).reshape(12, -1, x.size), 2, (-2, -1)).max()
    assert lower <= local(fn, x, radius, "ellipsoid").upper * (1 + 1e-9)
