"""Guards against NaN and infinity: what they see where x decides whether there is a number."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from sn_jax import _graph

W = jnp.asarray(np.sin(1 + np.arange(9).reshape(3, 3)))
X = np.zeros(3)
MASK = np.array([[True, False, True], [False, True, True], [True, True, False]])


def upper(fn, x=X, **kwargs) -> float:
    return sn_jax.lipschitz_bound(fn, x, progress=False, **kwargs).upper


# Each jumps where its inner function begins to be a number.
SEEN = {
    "isnan": lambda x: jnp.isnan(jnp.log(x)),
    "not isnan": lambda x: ~jnp.isnan(jnp.log(x)),
    "isnan or": lambda x: jnp.isnan(jnp.sqrt(x)) | (x > 1),
    "isfinite": lambda x: jnp.isfinite(jnp.log1p(x)),
    "isinf at a pole": lambda x: jnp.isinf(1 / x),
    "isfinite at a pole": lambda x: jnp.isfinite(1 / x),
    "below infinity": lambda x: jnp.arccosh(x) < jnp.inf,
    "above minus infinity": lambda x: -jnp.inf <= jnp.arcsin(x),
    "not infinity": lambda x: jnp.log(x) == -jnp.inf,
    "equals itself": lambda x: jnp.arctanh(x) == jnp.arctanh(x),
    "times zero": lambda x: jnp.log(x) * 0 > -1,
    "less itself": lambda x: jnp.log(x) - jnp.log(x) > -1,
    "power": lambda x: jnp.isnan(x**0.5),
    "negative power": lambda x: jnp.isfinite(x**-2),
    "after a map": lambda x: jnp.isnan(W @ jnp.log(x)),
    "after a map, divided": lambda x: jnp.isnan((W @ jnp.log(x)) / 3),
    "of all": lambda x: jnp.isnan(jnp.sum(jnp.sqrt(x))),
    "a sum of squares, less": lambda x: jnp.isnan(jnp.sqrt(jnp.sum(x**2) - 1)),
    "no eps": lambda x: jnp.isnan(x / jnp.sqrt(jnp.sum(x**2))),
    "loop": lambda x: jnp.isnan(jax.lax.scan(lambda c, _: (jnp.log(c), None), x, None, 5000)[0]),
    "taken by NaN": lambda x: jnp.isnan(jnp.take(x, jnp.array([0, 1, 7]))),
}


@pytest.mark.parametrize("predicate", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("other", [lambda x: 0 * x, jnp.tanh], ids=["constants", "tanh"])
def test_a_guard_that_x_decides_bounds_nothing(predicate, other):
    def fn(x):
        return jnp.where(predicate(x), 5.0, other(x))

    with contextlib.suppress(ValueError):  # which says that it jumps
        assert upper(fn) == np.inf


# Numbers for every x: the guard is never taken, and the bound is that of the other branch.
NEVER = {
    "x": lambda x: x,
    "softplus": jax.nn.softplus,
    "mish of a map": lambda x: jax.nn.mish(W @ x),
    "log of 1 + exp": lambda x: jnp.log(1 + jnp.exp(x)),
    "root of eps": lambda x: jnp.sqrt(1e-3 + x**2),
    "root of what is not negative": lambda x: jnp.sqrt(jnp.maximum(x, 0)),
    "layer norm": lambda x: (x - x.mean()) / jnp.sqrt(x.var() + 1e-5),
    "over 1 + |x|": lambda x: x / (1 + jnp.abs(x)),
    "power": lambda x: (1 + jnp.square(x)) ** -0.7,
    "guarded itself": lambda x: jnp.where(x > 0, jnp.tanh(x), x),
    "softmax": lambda x: jnp.log(jax.nn.softmax(x) + 1e-3),
    "indexed": lambda x: x[jnp.array([2, 0, 1])],
    "log_softmax": jax.nn.log_softmax,
    "taken": lambda x: jnp.take(x, jnp.array([1, 1, 0])),
    "set": lambda x: jnp.zeros(3).at[jnp.array([2, 0])].set(x[:2]),
    "loop": lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c + x), None), x, None, 5000)[0],
}


@pytest.mark.parametrize("inner", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("guard", [jnp.isnan, lambda y: ~jnp.isfinite(y), jnp.isinf],
                         ids=["isnan", "isfinite", "isinf"])  # fmt: skip
def test_a_guard_that_is_never_taken_costs_nothing(inner, guard):
    with jax.numpy_rank_promotion("allow"):
        found = upper(lambda x: jnp.where(guard(inner(x)), 5.0, jnp.tanh(x)))
    assert found == pytest.approx(1, rel=1e-9)


def test_what_is_no_number_in_either_branch_needs_no_guard():
    """In a ball where both logarithms are numbers, which structure does not know."""
    inside = {"x": np.full(3, 2.0), "radius": 1.0}

    def twice(x):
        return jnp.logaddexp(jnp.log(x[:1]), jnp.log(x[1:2]))

    assert upper(twice, **inside) <= 2
    assert upper(lambda x: jnp.where(jnp.isnan(jnp.log(x)), 5.0, x), **inside) == pytest.approx(1)
    assert upper(lambda x: jnp.log(x) - jnp.log(x) + x, **inside) == pytest.approx(1)
    # A branch that has a number where the guarded value has none.
    with pytest.raises(ValueError, match="jump"):
        upper(lambda x: jnp.where(jnp.isnan(W @ jnp.log(x)), jnp.tanh(x), x))


KNOWN = NEVER | {
    "root of a sum": lambda x: jnp.sqrt(jnp.sum(x**2)),
    "min": lambda x: jnp.minimum(jnp.exp(x), 2.0),
    "stack": lambda x: jnp.concatenate([jnp.cosh(x), jnp.abs(x), jnp.ones(3)]),
    "product": lambda x: jnp.abs(x) * jnp.exp(x),
    "nonnegative map": lambda x: jnp.abs(W) @ jax.nn.sigmoid(x),
    "log1p": lambda x: jnp.log1p(jnp.square(x)),
    "padded": lambda x: jnp.pad(1 + jnp.cosh(x), 1, constant_values=-2.0),
    "cumsum": lambda x: jnp.cumsum(jnp.abs(x)),
    "even": lambda x: x**4 - 1,
    "odd": lambda x: x**3 + jnp.tanh(x) + 1,
    "expm1": lambda x: jnp.expm1(x) * 0.5,
    "reversed": lambda x: jnp.flip(jnp.sort(jnp.cos(x))),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "divided": lambda x: jnp.abs(x) / 3,
    "erfc": lambda x: jax.scipy.special.erfc(x),
    "larger than what is masked": lambda x: jnp.maximum(jnp.where(MASK, jnp.exp(x), -jnp.inf), x),
}
# Infinite or no number for some x below.
LOST = {
    "log": jnp.log,
    "log1p": jnp.log1p,
    "root": jnp.sqrt,
    "1/x": lambda x: 1 / x,
    "x^-2": lambda x: x**-2,
    "x^1.5": lambda x: x**1.5,
    "log |x|": lambda x: jnp.log(jnp.abs(x)),
    "rsqrt": lambda x: jax.lax.rsqrt(jnp.square(x)),
    "below": lambda x: jnp.sqrt(jnp.cos(x)),
    "divided": lambda x: x / jnp.minimum(jnp.exp(x), 0.0),
    "less": lambda x: jnp.log(jnp.square(x) + -1.0),
    "cases": lambda x: jnp.where(x > 0.7, x, jnp.log(x)),
    "infinite": lambda x: x + jnp.asarray([0.0, jnp.inf, 0.0]),
    "arcsin": jnp.arcsin,
}


def output(fn):
    with jax.numpy_rank_promotion("allow"):
        return _graph.graph_of(fn, X, "cpu").outputs[0]


@pytest.mark.parametrize("fn", KNOWN.values(), ids=KNOWN)
def test_structure_knows_numbers_and_what_they_are_not_below(fn):
    node = output(fn)
    assert node.number
    rng = np.random.default_rng(0)
    with jax.numpy_rank_promotion("allow"):
        values = [fn(jnp.asarray(x)) for x in (X, *(3 * rng.standard_normal((50, 3))))]
    assert np.isfinite(values).all()
    assert np.min(values) >= node.least


MASKED = {
    "select": lambda x: jnp.where(MASK, x[:, None] + x, -jnp.inf),
    "sum": lambda x: (x[:, None] + x) + jnp.where(MASK, 0, -jnp.inf),
    "larger": lambda x: jnp.maximum(jnp.where(MASK, x, -jnp.inf), jnp.where(MASK.T, x, -jnp.inf)),
    "moved": lambda x: jnp.flip(jnp.where(MASK, x, -jnp.inf).T.reshape(3, 1, 3)[::2], 0) - x,
    "largest": lambda x: jnp.max(jnp.where(MASK, x, -jnp.inf), 0, keepdims=True),
    "largest of few": lambda x: jnp.max(jnp.where(MASK & (np.arange(3) != 1), x, -jnp.inf), 1),
    "exponential": lambda x: jnp.exp(jnp.where(MASK, x, -jnp.inf)),
    "softmax": lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf)),
}


@pytest.mark.parametrize("fn", MASKED.values(), ids=MASKED)
def test_structure_knows_what_masks_make_infinite(fn):
    """And x has no say in it, so a guard is known as well."""
    node = output(fn)
    assert node.number
    places = np.zeros(node.shape, bool) if node.lost is None else node.lost
    with jax.numpy_rank_promotion("allow"):
        for x in np.random.default_rng(0).standard_normal((10, 3)):
            value = fn(jnp.asarray(x))
            np.testing.assert_array_equal(value == -np.inf, places)
            np.testing.assert_array_equal(np.isfinite(value), ~places)
        guarded = upper(lambda x: jnp.where(jnp.isfinite(fn(x)), 2.0, 5.0) * jnp.tanh(x))
    alike = np.full(node.shape, 2.0)
    alike[places] = 5.0
    with jax.numpy_rank_promotion("allow"):
        expected = upper(lambda x: jnp.asarray(alike) * jnp.tanh(x))
    assert guarded == pytest.approx(expected)


def test_guards_of_what_masks_make_infinite_are_not_taken_for_never():
    """The other case may be a number where the mask is, in a ball where the logarithm is one."""

    def fn(x):
        masked = jnp.where(MASK[0], x, -jnp.inf)
        return jnp.where(jnp.isfinite(masked + jnp.log(x)), x / 10, jnp.log(x))

    def of_all(x):
        largest = jnp.max(jnp.where(MASK & MASK[0], x[:, None], -jnp.inf), 0)
        return jnp.where(jnp.isfinite(largest * 2), x / 10, x)

    for wrong in (fn, of_all):
        with contextlib.suppress(ValueError):  # which says that it jumps
            assert upper(wrong, np.full(3, 2.0), radius=1.0) >= 1


def test_what_x_or_no_number_decides_is_not_known_to_be_infinite():
    with jax.numpy_rank_promotion("allow"):
        for fn in (
            lambda x: jnp.where(x > 0, x, -jnp.inf),
            lambda x: jnp.where(MASK, x, jnp.inf),
            lambda x: jnp.where(MASK, x, -jnp.inf) * x,
            lambda x: jnp.where(MASK, x, -jnp.inf) - jnp.where(MASK, x, -jnp.inf),
            lambda x: x - jnp.where(MASK, x, -jnp.inf),
            lambda x: jax.nn.softmax(jnp.where(MASK & (np.arange(3) < 1), x, -jnp.inf)),
            lambda x: jnp.where(MASK, x, -jnp.inf) @ W,
        ):
            assert not output(fn).number


@pytest.mark.parametrize("fn", LOST.values(), ids=LOST)
def test_structure_does_not_take_for_a_number_what_may_be_none(fn):
    assert not output(fn).number
    points = (X, np.array([-2.0, 2.0, 0.5]))
    assert not all(np.isfinite(fn(jnp.asarray(x))).all() for x in points)
