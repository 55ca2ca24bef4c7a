"""margin_bounds and certified_radius: distances to known boundaries, moves within the radius."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from sn_jax import certified_radius, margin_bounds

W = np.random.default_rng(0).standard_normal((4, 3))


def test_a_linear_classifier_changes_just_beyond_the_radius():
    margins = margin_bounds(lambda x: W @ x, np.zeros(3))
    distances = np.linalg.norm(W[:, None] - W, axis=-1)
    np.testing.assert_allclose(margins, distances, rtol=1e-9)
    assert np.all(margins >= distances * (1 - 1e-15))
    points = np.random.default_rng(1).standard_normal((50, 3))
    logits = points @ W.T
    radii = certified_radius(logits, margins)
    top = logits.argmax(1)
    changed = np.zeros(len(points), bool)
    for other in range(4):
        direction = W[other] - W[top]
        direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-300)
        inside = points + radii[:, None] * (1 - 1e-9) * direction
        assert np.array_equal((inside @ W.T).argmax(1), top)
        outside = points + radii[:, None] * (1 + 1e-6) * direction
        changed |= (outside @ W.T).argmax(1) != top
    assert changed.all()
    # By one constant of all outputs the radius is smaller, and never zero here.
    whole = sn_jax.lipschitz_bound(lambda x: W @ x, np.zeros(3))
    by_one = certified_radius(logits, whole)
    assert np.all((by_one > 0) & (by_one <= radii))
    np.testing.assert_array_equal(by_one, certified_radius(logits, whole.upper))


def test_nothing_within_the_radius_changes_a_network():
    rng = np.random.default_rng(2)
    w1, w2 = rng.standard_normal((16, 3)), rng.standard_normal((3, 16))
    net = lambda x: w2 @ jax.nn.relu(w1 @ x)  # noqa: E731
    crude = margin_bounds(net, np.zeros(3), method="product")
    tight = margin_bounds(net, np.zeros(3), method="tight")
    assert np.all(tight[~np.eye(3, dtype=bool)] < 0.9 * crude[~np.eye(3, dtype=bool)])
    points = rng.standard_normal((40, 3))
    batched = jax.jit(jax.vmap(net))
    logits = np.asarray(batched(points))
    radii = certified_radius(logits, tight, error=1e-12)
    top = logits.argmax(1)
    gradients = np.asarray(jax.vmap(jax.jacobian(net))(points))
    steps = gradients - gradients[np.arange(40), top][:, None]
    steps = np.concatenate([steps, rng.standard_normal((40, 30, 3))], 1)
    steps /= np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), 1e-300)
    moved = points[:, None] + radii[:, None, None] * steps
    assert np.all(np.asarray(batched(moved.reshape(-1, 3))).reshape(40, -1, 3).argmax(-1)
                  == top[:, None])  # fmt: skip


def test_radii_of_ties_errors_and_constants():
    logits = np.array([[1.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(certified_radius(logits, 1.0), [0, 1 / math.sqrt(2)], rtol=1e-14)
    np.testing.assert_allclose(certified_radius(logits, 1.0, error=0.6), [0, 0])
    assert certified_radius(logits[1], 0.0) == math.inf
    assert certified_radius(logits[0], 0.0) == 0
    assert certified_radius(jnp.asarray(logits, jnp.float32), 1.0).dtype == np.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: certified_radius([1.0], 1.0), "k >= 2"),
        (lambda: certified_radius([1.0, 2.0], -1.0), "constant >= 0"),
        (lambda: certified_radius([1.0, 2.0], math.nan), "constant >= 0"),
        (lambda: certified_radius([1.0, 2.0], np.ones(2)), "each pair of the 2 logits"),
        (lambda: certified_radius([1.0, 2.0], 1.0, error=-1), "error must be >= 0"),
        (lambda: margin_bounds(jnp.sum, np.zeros(3)), "no margins between 1"),
    ],
)  # fmt: skip
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
