"""lipschitz_bound: golden values, pitfalls, random programs, exact constants, frameworks."""

import itertools
import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import sn_jax
from experiments.certify.programs import random_program
from sn_jax import _graph, _lipschitz, _matrix_free
from sn_jax import linen as sn_linen


def waves(m: int, n: int) -> np.ndarray:
    return np.sin(1 + np.arange(m * n).reshape(m, n))


A = jnp.asarray(waves(4, 4))
B = jnp.asarray(np.cos(3 * waves(4, 4)))
X = np.zeros(4)
FIRST = np.array([[1.0, 0.0], [0.0, 0.0]])
IMAGE = np.zeros((1, 8, 8, 1), np.float32)
relu = jax.nn.relu


def bounds(fn, x=X, method="auto") -> dict[str, float]:
    return dict(sn_jax.lipschitz_bound(fn, x, method=method, progress=False).bounds)


def upper(fn, x=X, method="auto") -> float:
    return sn_jax.lipschitz_bound(fn, x, method=method, progress=False).upper


def stretch(fn, x) -> float:
    """The norm of the Jacobian at x."""
    jac = jax.jacobian(lambda flat: jnp.ravel(fn(flat.reshape(x.shape))))(jnp.ravel(x))
    return float(np.linalg.norm(np.asarray(jac, np.float64), 2))


# Golden values.

EXACT = {
    "product of matrices": (lambda x: B @ (A @ x), X, 4.08877659),
    "x + A x": (lambda x: x + A @ x, X, 2.47948916),
    "x - A x": (lambda x: x - A @ x, X, 2.69663311),
    "x - x": (lambda x: x - x, X, 0.0),
    "cumsum": (jnp.cumsum, np.zeros(6), 4.14811491),
    "softmax(3x)": (lambda x: jax.nn.softmax(3 * x), X, 1.5),
    "logsumexp": (jax.nn.logsumexp, X, 1.0),
    "log_softmax": (jax.nn.log_softmax, X, 2.0),
    "cross entropy": (lambda x: -jax.nn.log_softmax(x)[1], X, 2**0.5),
    "max-pool 2/2": (lambda x: nn.max_pool(x, (2, 2), (2, 2)), IMAGE, 1.0),
    "max-pool 3/2": (lambda x: nn.max_pool(x, (3, 3), (2, 2)), IMAGE, 2.0),
    "max-pool 3/1": (lambda x: nn.max_pool(x, (3, 3), (1, 1), "SAME"), np.zeros((1, 5, 5, 1)), 3.0),
    "nearest x2": (lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), IMAGE, 2.0),
    "mean": (jnp.mean, np.zeros((8, 8)), 1 / 8),
    "disjoint": (lambda x: jnp.concatenate([2 * x[:2], 3 * x[2:]]), X, 3.0),
    "overlapping": (lambda x: jnp.concatenate([x, x]), X, 2**0.5),
    "length": (jnp.linalg.norm, X, 1.0),
    "lengths": (lambda x: jnp.sqrt((x**2).mean(0) + 1e-3), np.zeros((3, 2)), 3**-0.5),
    "stack": (lambda x: jnp.stack([x, 2 * x], -1), X, 5**0.5),
    "set": (lambda x: 3 * x.at[1].set(0.5), X, 3.0),
    "scatter": (lambda x: jnp.zeros(2).at[jnp.array([0, 0, 0, 1])].add(x), X, 3**0.5),
    "set to x": (lambda x: x.at[0].set(x[1]), X, 2**0.5),
    "sort": (jnp.sort, X, 1.0),
    "top-k values": (lambda x: lax.top_k(x, 2)[0], X, 1.0),
    "relu(x) + relu(-x)": (lambda x: relu(x) + relu(-x), X, 1.0),
    "softplus": (jax.nn.softplus, X, 1.0),
    "log_sigmoid": (jax.nn.log_sigmoid, X, 1.0),
    "integer steps of while": (
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1],
        X,
        8.0,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_constants(name):
    fn, x, value = EXACT[name]
    found = upper(fn, x)
    assert found >= value * (1 - 1e-8)  # the digits that are given
    np.testing.assert_allclose(found, value, rtol=1e-8)


KEPT = np.tril(np.ones((4, 4), bool))
SQUARE = np.zeros((4, 4))


def normalized(e):
    return e / e.sum(-1, keepdims=True)


MASKED = {
    "lowest": (lambda x: jax.nn.softmax(jnp.where(KEPT, x, -1e9)), 0.5),
    "infinite": (lambda x: jax.nn.softmax(jnp.where(KEPT, x, -jnp.inf)), 0.5),
    "added": (lambda x: jax.nn.softmax(2 * x + jnp.where(KEPT, 0.0, -jnp.inf)), 1.0),
    "where": (lambda x: jax.nn.softmax(x, where=KEPT), 0.5),
    "zeros by select": (lambda x: normalized(jnp.where(KEPT, jnp.exp(x - x.max()), 0.0)), 0.5),
    "zeros by product": (lambda x: normalized(jnp.exp(x) * KEPT.astype(float)), 0.5),
    "along the other axis": (lambda x: jax.nn.softmax(x, axis=0, where=KEPT), 0.5),
    "fewer above": (
        lambda x: jnp.where(np.eye(4) > 0, jnp.exp(x), 0.0)
        / jnp.sum(jnp.exp(x), -1, keepdims=True, where=KEPT), 0.5,
    ),
    "log": (lambda x: jnp.where(KEPT, jax.nn.log_softmax(x, where=KEPT), 0.0), 2.0),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1, where=KEPT), 1.0),
    "weights": (lambda x: jax.nn.logsumexp(x, axis=-1, b=1.0 + KEPT), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_softmax_of_some_entries(name):
    fn, value = MASKED[name]
    rng = np.random.default_rng(0)
    found = upper(fn, SQUARE)
    lower = max(stretch(fn, 2 * rng.standard_normal((4, 4))) for _ in range(10))
    assert lower <= found <= value * (1 + 1e-8)


def test_softmax_must_divide_by_what_it_keeps():
    fn = lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True, where=KEPT)  # noqa: E731
    assert upper(fn, SQUARE) == np.inf  # exp(x_3 - x_0) is among its values
    unequal = lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x) * (1.0 + KEPT), -1, keepdims=True)  # noqa: E731
    assert upper(unequal, SQUARE) == np.inf or upper(unequal, SQUARE) >= 0.5


def test_attention_weights_by_a_constant_mask():
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=6, param_dtype=jnp.float64)
    x = np.random.default_rng(0).standard_normal((1, 4, 6))
    variables = attention.init(jax.random.key(0), x)
    mask = nn.make_causal_mask(np.ones((1, 4)))
    fn = lambda v: attention.apply(variables, x, x, v, mask=mask)  # noqa: E731
    np.testing.assert_allclose(upper(fn, x), stretch(fn, x), rtol=1e-6)
    bound = sn_jax.lipschitz_bound(lambda x: attention.apply(variables, x, mask=mask), x)
    assert bound.upper == np.inf
    assert any("two things that depend on x" in op.reason for op in bound.ops)


SLOPE = jnp.array([0.1, 0.2, -1.5, 0.3])
NEARLY = {
    "PReLU": (lambda x: jnp.where(x >= 0, x, SLOPE * x), X, 1.5),
    "tanh^3": (lambda x: jnp.tanh(x) ** 3, X, 0.75),
    "tanh sigmoid": (lambda x: jnp.tanh(x[:2]) * jax.nn.sigmoid(x[2:]), X, 1.25),
    "disjoint nonlinear": (
        lambda x: jnp.concatenate([2 * jnp.tanh(x[:2]), 3 * relu(x[2:])]), X, 3.0,
    ),
    "max-min": (
        lambda x: jnp.concatenate([jnp.maximum(x[:2], x[2:]), jnp.minimum(x[:2], x[2:])]), X, 1.0,
    ),
    "selu": (jax.nn.selu, X, 1.75809934),
    "gelu": (jax.nn.gelu, X, 1.12899307),
    "gelu, exact": (lambda x: jax.nn.gelu(x, approximate=False), X, 1.12890415),
    "silu": (jax.nn.silu, X, 1.09983932),
    "sigmoid": (jax.nn.sigmoid, X, 0.25),
    "hard_silu": (jax.nn.hard_silu, X, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
def test_stated_constants(name):
    fn, x, value = NEARLY[name]
    found = upper(fn, x)
    rng = np.random.default_rng(0)
    lower = max(stretch(fn, 2 * rng.standard_normal(x.shape)) for _ in range(20))
    assert lower <= found <= value * 1.001


@pytest.mark.float32
def test_average_pools():
    pool = nn.avg_pool
    np.testing.assert_allclose(upper(lambda x: pool(x, (2, 2), (2, 2)), IMAGE), 0.5, rtol=1e-8)
    found = upper(lambda x: pool(x, (3, 3), (1, 1), "SAME"), IMAGE)
    np.testing.assert_allclose(found, 0.921207, rtol=1e-6)
    # Pixels at borders are divided by another count: 1.0072423 in one dimension.
    fn = lambda x: pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)  # noqa: E731
    np.testing.assert_allclose(upper(fn, IMAGE), 1.014537, rtol=1e-6)


def test_residual_in_every_domain():
    found = bounds(lambda x: x + B @ relu(A @ x))
    assert found["product"] == pytest.approx(5.372862, rel=1e-6)
    assert found["shift"] == pytest.approx(4.198350, rel=1e-6)
    assert 3.858103905 <= found["ellipsoid"] <= 3.888366 * 1.001
    assert 3.858103905 <= found["tight"] <= 3.858103905 * (1 + 1e-6)


# Pitfalls, by number.


def test_1_the_guard_against_nan_is_false():
    assert upper(lambda x: jnp.logaddexp(x, 0.0)) == pytest.approx(1, rel=1e-6)
    assert upper(lambda x: jnp.logaddexp(x, 0.0) - x) >= 1 - 1e-6


def test_2_jumps_raise():
    with pytest.raises(ValueError, match=r"test_lipschitz\.py:\d+.*jump"):
        upper(lambda x: jnp.where(x > 0.3, x + 1, x))
    assert upper(lambda x: jnp.where(x > 1, 2 * x - 1, x)) == pytest.approx(2, rel=1e-6)


def test_2_predicates_that_are_moved_before_the_select():
    """As the transposes of einsum and vmap leave them."""

    def fn(x):
        y = jnp.sin(x.reshape(2, 2))
        scales = jnp.array([[0.5, 2.0], [1.0, -1.0]])
        positive = (y >= 0).T & (y > -2 * scales).T
        return jnp.where(positive, y.T, y.T * scales.T).ravel()

    assert upper(fn) == pytest.approx(2)
    with pytest.raises(ValueError, match="jumps"):
        upper(lambda x: jnp.where((x.reshape(2, 2) > 0).T, 1.0, x.reshape(2, 2).T))


def test_3_kinks_at_zero():
    assert upper(lambda x: relu(relu(x) - 0.0)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    "fn",
    [lambda x: x**2, lambda x: x * x, lambda x: jnp.exp(x), lambda x: jax.nn.silu(A @ x) * (B @ x)],
    ids=["square", "product", "exp", "GLU"],
)
def test_4_unbounded_is_infinite_with_the_reason(fn):
    bound = sn_jax.lipschitz_bound(fn, X)
    assert bound.upper == np.inf
    assert any(op.reason and op.where.startswith("test_lipschitz.py:") for op in bound.ops)
    assert "infinite: test_lipschitz.py:" in str(bound)


def standardized(x):
    return (x - x.mean()) / jnp.sqrt(x.var() + 1e-6)


FOUR = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
NORMS = {
    "linen": lambda x: nn.LayerNorm().apply({"params": FOUR}, x),
    "linen RMSNorm": lambda x: nn.RMSNorm().apply({"params": FOUR}, x),
    "linen GroupNorm": lambda x: nn.GroupNorm(1).apply({"params": FOUR}, x[None]),
    "nnx": lambda x: nnx.LayerNorm(4, rngs=nnx.Rngs(0))(x),
    "equinox": lambda x: eqx.nn.LayerNorm(4, eps=1e-6)(x),
    "plain": standardized,
    "jax.nn": lambda x: jax.nn.standardize(x, epsilon=1e-6),
}


@pytest.mark.float32
@pytest.mark.parametrize("name", NORMS)
def test_5_layer_norms(name):
    fn = NORMS[name]
    lower = stretch(fn, np.array([1e-6, -1e-6, 2e-6, 0.0], np.float32))
    found = upper(fn, X.astype(np.float32))
    assert 999 < lower <= found * (1 + 1e-6)
    assert found <= 1000 * 1.001


def test_5_axes_must_agree():
    def wrong(x):  # the mean over one axis, spread over the other
        length = jnp.sqrt(jnp.sum(x**2, 0) + 1e-2)
        return x / length[:, None]

    assert upper(wrong, np.zeros((3, 3))) == np.inf
    assert (
        upper(lambda x: x / jnp.sqrt(jnp.sum(x**2, 0, keepdims=True) + 1e-2), np.zeros((3, 3)))
        < 10.01
    )

    def no_softmax(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x), 0)[:, None]

    assert upper(no_softmax, np.zeros((3, 3))) == np.inf


def test_5_what_is_multiplied_before():
    """The group holds the factor, which can be taken from what is divided as well."""

    def unit(x):
        return x / jnp.maximum(jnp.linalg.norm(x), 0.5)

    np.testing.assert_allclose(upper(lambda x: unit(-3 * x)), 6, rtol=1e-6)
    np.testing.assert_allclose(upper(lambda x: -3 * unit(x)), 6, rtol=1e-6)

    def scaled(x):  # of two factors of what is divided, one is in the length
        return 5 * x / jnp.maximum(jnp.linalg.norm(x), 0.5)

    np.testing.assert_allclose(upper(lambda x: scaled(-x / 2)), 5, rtol=1e-6)
    np.testing.assert_allclose(upper(lambda x: scaled(0.1 * scaled(x))), 10, rtol=1e-6)


def test_6_common_subexpressions():
    fn = lambda x: (A @ x) * jax.nn.sigmoid(A @ x)  # noqa: E731
    assert upper(fn) <= np.linalg.norm(A, 2) * 1.09983933


def test_8_constants_are_those_of_the_dtype():
    third = upper(lambda x: x * (1 / 3), X.astype(np.float32))
    assert third >= float(np.float32(1 / 3))
    np.testing.assert_allclose(third, float(np.float32(1 / 3)), rtol=1e-13)


def test_9_stop_gradient_is_the_identity():
    assert upper(lambda x: x - lax.stop_gradient(x)) == 0
    assert upper(lax.stop_gradient) == pytest.approx(1)
    with pytest.raises(ValueError, match="round"):
        upper(lambda x: x + lax.stop_gradient(jnp.round(x) - x))


def test_10_platforms_and_random_constants():
    choose = lambda x: lax.platform_dependent(x, cpu=lambda x: 2 * x, default=lambda x: 3 * x)  # noqa: E731
    assert upper(choose) == pytest.approx(3)
    # A program is on one platform: steep on cpu and steep elsewhere do not meet.
    other = lambda x: lax.platform_dependent(x, tpu=lambda x: 5 * x, default=lambda x: x)  # noqa: E731
    assert upper(lambda x: choose(other(x))) == pytest.approx(15)
    nowhere_else = lambda x: lax.platform_dependent(x, cpu=lambda x: 2 * x)  # noqa: E731
    assert upper(lambda x: nowhere_else(other(x))) == pytest.approx(2)
    drawn = jax.random.normal(jax.random.key(0), (4, 4))
    found = upper(lambda x: jax.random.normal(jax.random.key(0), (4, 4)) @ x)
    np.testing.assert_allclose(found, np.linalg.norm(drawn, 2), rtol=1e-8)


def test_11_cross_entropy_in_batches():
    labels = jax.nn.one_hot(jnp.arange(3), 4)
    fn = lambda x: -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(x), -1))  # noqa: E731
    np.testing.assert_allclose(upper(fn, np.zeros((3, 4))), (2 / 3) ** 0.5, rtol=1e-8)
    np.testing.assert_allclose(upper(jax.nn.log_softmax, np.zeros((8, 4))), 2, rtol=1e-8)


def test_12_norms_are_close():
    rng = np.random.default_rng(0)
    ws = rng.standard_normal((4, 16, 16))

    def fn(x):
        for w in ws:
            x = jnp.tanh(w @ x)
        return x

    value = np.prod(np.linalg.norm(ws, 2, (1, 2)))
    np.testing.assert_allclose(upper(fn, np.zeros(16), "product"), value, rtol=4e-6)


def test_14_products_of_what_is_bounded():
    cell = nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64))
    x = np.zeros((1, 3, 2))
    variables = cell.init(jax.random.key(0), x)
    fn = lambda x: cell.apply(variables, x)  # noqa: E731
    found = upper(fn, x)
    lower = stretch(fn, np.random.default_rng(0).standard_normal(x.shape))
    assert lower <= found < np.inf


def test_15_long_scans():
    def fn(x):
        return lax.scan(lambda c, _: (jnp.tanh(c) * 0.9 + 0.1 * x, None), x, None, length=2000)[0]

    bound = sn_jax.lipschitz_bound(fn, X, progress=False)
    assert 1 <= bound.upper <= 1.001
    assert any("2000 steps" in op.what for op in bound.ops)


# Pieces too large for a matrix, at a lowered limit.

RNG = np.random.default_rng(0)
KERNELS = [RNG.standard_normal((3, 3, a, b)) / 5 for a, b in ((3, 4), (4, 3))]
WEIGHT = RNG.standard_normal((108, 60)) / 8


def conv(x, kernel, strides=(1, 1)):
    return lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


LARGE = {
    "two convolutions": lambda x: conv(conv(x, KERNELS[0]), KERNELS[1]),
    "residual": lambda x: x - conv(conv(x, KERNELS[0]), KERNELS[1]),
    "pool, dense": lambda x: (x + jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]).reshape(
        108) @ WEIGHT,
    "entries": lambda x: jnp.concatenate(
        [jnp.cumsum(x, 1)[:, ::-1], x.at[0, 1].add(x[0, 0]), x.transpose(0, 2, 1, 3)], 3)
        @ np.concatenate([np.eye(3), np.ones((3, 3)), KERNELS[0][0, 0, :, :3]]),
    "windows": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1,) * 4, "SAME")
        - jnp.take(x, np.array([0, 0, 3, 5, 5, 1]), 1),
    "a mask": lambda x: jnp.where(np.indices((1, 6, 6, 3))[1] > 1, x, 2.0)[0] @ np.ones((3, 2)),
    "a scaled convolution": lambda x: conv(2 * x + 1, KERNELS[0]) * WEIGHT[:1, None, None, :4] + 3,
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_pieces_without_a_matrix(name):
    fn, x = LARGE[name], np.zeros((1, 6, 6, 3))
    graph = _graph.graph_of(fn, x, "cpu")
    say = _lipschitz._Progress(False)
    free = _lipschitz._Bounds(graph, 1e-6, say, most_entries=50).bound("merged")
    exact = stretch(fn, x)
    found = dict(free.bounds)
    assert exact * (1 - 1e-12) <= found["merged"] <= exact * 1.015
    if name == "a scaled convolution":  # which has a view, and that a certificate
        assert free.failure_probability == 0
    elif found["merged"] < found["product"]:
        assert 0 < free.failure_probability <= 1e-9
        assert "too small with probability" in str(free)


def test_a_step_of_a_loop_that_may_fail_makes_every_bound_one_that_may():
    """A loop too long to be unrolled is bounded step by step in all domains, product included."""

    def fn(x):
        step = lambda x, _: (0.1 * LARGE["two convolutions"](x)[..., :3], None)  # noqa: E731
        return lax.scan(step, x, length=2000)[0]

    graph = _graph.graph_of(fn, np.zeros((1, 6, 6, 3)), "cpu")
    say = _lipschitz._Progress(False)
    free = _lipschitz._Bounds(graph, 1e-6, say, most_entries=50).bound("product")
    assert [name for name, _ in free.bounds] == ["product"]
    assert free.failure_probability > 0
    assert _lipschitz._Bounds(graph, 1e-6, say).bound("product").failure_probability == 0


def test_products_bound_the_norm_for_most_vectors():
    """It fails no more often than it may, and follows what rounding can hide."""
    matrix = RNG.standard_normal((40, 40))
    norm = np.linalg.norm(matrix, 2)
    most = np.sqrt(np.abs(matrix).sum(0).max() * np.abs(matrix).sum(1).max())
    known = _matrix_free.Products(lambda x: x @ matrix.T, lambda y: y @ matrix, 40, most, 50)
    for failure in (1e-10, 1e-3, 0.3):
        found = [_matrix_free.norm_above(known, failure=failure, degree=12, seed=s)
                 for s in range(60)]  # fmt: skip
        missed = np.mean(np.array(found) < norm)
        assert missed <= failure + 3 * (failure / 60) ** 0.5
        assert np.median(found) <= 1.1 * norm
    rough = _matrix_free.norm_above(known._replace(terms=10**9))
    assert _matrix_free.norm_above(known) < rough < most
    assert _matrix_free.norm_above(known._replace(terms=10**12)) == most


# Errors.


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (jnp.round, "round"),
        (jnp.argmax, "argmax"),
        (lambda x: x.astype(int), "int"),
        (lambda x: lax.cond(x[0] > 0, lambda x: x, lambda x: 2 * x, x), "branch on x"),
        (lambda x: lax.while_loop(lambda x: x[0] < 3, lambda x: 2 * x, x), "loop whose end"),
        (lambda x: jnp.linalg.cholesky(jnp.outer(x, x)), "register_lipschitz"),
        (lambda x: jnp.where(x[0] > 0, x, B @ x), "jump"),
    ],
)
def test_errors_say_where(fn, words):
    with pytest.raises(ValueError, match=words) as error:
        upper(fn)
    assert re.search(r"\.py:\d+", str(error.value))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="method"):
        sn_jax.lipschitz_bound(jnp.sin, X, method="best")
    with pytest.raises(ValueError, match="rtol"):
        sn_jax.lipschitz_bound(jnp.sin, X, rtol=0)
    with pytest.raises(ValueError, match="steps"):
        sn_jax.lipschitz_bound(jnp.sin, X, steps=0)
    with pytest.raises(TypeError, match="one array"):
        sn_jax.lipschitz_bound(lambda x: x[0], (X, X))
    with pytest.raises(TypeError, match="floating"):
        sn_jax.lipschitz_bound(lambda x: x, np.arange(3))
    with pytest.raises(TypeError, match="function"):
        sn_jax.register_lipschitz("sort", 1.0)


def test_registered_primitives():
    qr = lambda x: jnp.linalg.qr(x.reshape(2, 2))[1]  # noqa: E731
    with pytest.raises(ValueError, match="register_lipschitz"):
        upper(qr)
    from jax.extend.core import Primitive

    twice = Primitive("twice_for_this_test")
    twice.def_abstract_eval(lambda x: x)
    sn_jax.register_lipschitz(twice, lambda x, **_: 2.0)
    assert upper(lambda x: A @ twice.bind(x)) == pytest.approx(2 * np.linalg.norm(A, 2), rel=1e-6)


# Exact constants, by enumeration of the patterns of ReLUs.


@pytest.mark.parametrize("seed", range(20))
def test_never_below_the_truth(seed):
    rng = np.random.default_rng(seed)
    residual = seed % 2
    w1, w2 = rng.standard_normal((5, 3)), rng.standard_normal((3, 5))
    fn = lambda x: residual * x + w2 @ relu(w1 @ x)  # noqa: E731
    # All patterns, also those that no x has: larger, so divided into what occurs by points.
    points = rng.standard_normal((4000, 3)) * 3
    patterns = np.unique(points @ w1.T > 0, axis=0)
    exact = max(np.linalg.norm(residual * np.eye(3) + w2 @ (p[:, None] * w1), 2) for p in patterns)
    every = max(
        np.linalg.norm(residual * np.eye(3) + w2 @ (np.array(p)[:, None] * w1), 2)
        for p in itertools.product((0, 1), repeat=5)
    )
    found = bounds(fn, np.zeros(3))
    assert exact <= every <= found["ellipsoid"] <= found["product"] * (1 + 1e-3)
    assert every <= min(found.values())


def every_slope(last, first, skip=0.0) -> float:
    """The largest norm of ``skip + last D first`` over all D of zeros and ones."""
    patterns = np.array([*itertools.product((0.0, 1.0), repeat=len(first))])
    jacobians = skip + last @ (patterns[:, :, None] * first)
    return float(np.linalg.norm(jacobians, 2, (-2, -1)).max())


def ratios(nets) -> np.ndarray:
    """The tight bound of ``(fn, shape, exact constant)``, never below."""
    found = np.array([[upper(fn, np.zeros(shape), "tight"), exact] for fn, shape, exact in nets])
    assert np.all(found[:, 0] >= found[:, 1])
    return found[:, 0] / found[:, 1]


@pytest.mark.parametrize("residual", [0, 1])
def test_tight_in_dense_networks(residual):
    """Mean ratios to the exact constants: 1.0019 and 1.0032; the ellipsoid has 1.19."""
    nets = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        w1, w2 = rng.standard_normal((7, 3)), rng.standard_normal((3, 7))
        fn = lambda x, w1=w1, w2=w2: residual * x + w2 @ relu(w1 @ x)  # noqa: E731
        nets.append((fn, 3, every_slope(w2, w1, residual * np.eye(3))))
    found = ratios(nets)
    assert found.mean() <= 1.01
    assert found.min() <= 1 + 1e-6  # there it is exact


def test_tight_in_convolutional_networks():
    """Mean ratio to the exact constants: 1.014; the ellipsoid has 1.07."""

    def conv(x, k):
        return lax.conv_general_dilated(
            x[None], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0]

    nets = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        k1, k2 = rng.standard_normal((3, 1, 2)), rng.standard_normal((3, 2, 1))
        fn = lambda x, k1=k1, k2=k2: conv(relu(conv(x, k1)), k2)  # noqa: E731
        first, last = (
            np.asarray(jax.jacobian(lambda x, k=k: conv(x, k).ravel())(np.zeros(shape)))
            for k, shape in ((k1, (5, 1)), (k2, (5, 2)))
        )
        exact = every_slope(last.reshape(5, 10), first.reshape(10, 5))
        nets.append((fn, (5, 1), exact))
    assert ratios(nets).mean() <= 1.05


def test_tight_on_joint_and_dead_sources():
    """Sorted, gated, and entries that nothing moves, in one; any steps leave a bound."""
    dead = jnp.array([1.0, 0, 1, 0])

    def fn(x):
        y = jnp.tanh(B @ relu(A @ (x * dead)) * dead)
        y = jnp.tanh(jnp.maximum(A @ y, B @ x)) * jax.nn.sigmoid(A.T @ x * dead)
        return jnp.sort(y) + 0 * jnp.tanh(x) + jax.nn.softmax(B @ y)

    rng = np.random.default_rng(0)
    lower = max(stretch(fn, 2 * rng.standard_normal(4)) for _ in range(50))
    found = [
        dict(sn_jax.lipschitz_bound(fn, X, method="tight", steps=n, progress=False).bounds)
        for n in (1, 3, 50)
    ]
    assert lower <= found[2]["tight"] < found[1]["tight"] <= found[0]["tight"]
    assert found[2]["tight"] < 0.95 * found[2]["ellipsoid"]
    assert found[0]["tight"] <= found[0]["ellipsoid"]


# Random programs.


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_programs(seed):
    fn, x = random_program(np.random.default_rng(seed))
    found = bounds(fn, x)
    value = min(found.values())
    assert value < np.inf
    rng = np.random.default_rng(seed)
    jacobian = jax.jit(jax.jacfwd(lambda x: jnp.ravel(fn(x))))
    for scale in (0.1, 1.0, 3.0):
        for _ in range(4):
            jac = np.asarray(jacobian(scale * rng.standard_normal(x.shape))).reshape(-1, x.size)
            if np.isfinite(jac).all():
                assert np.linalg.norm(jac, 2) <= value * (1 + 1e-9)
    assert found["joint"] <= found["merged"] * (1 + 1e-9)
    assert found["merged"] <= found["product"] * (1 + 1e-9)


# Frameworks.


def test_the_same_network_in_four_frameworks():
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((6, 8)), rng.standard_normal((8, 3))
    x = np.zeros((1, 6))
    linen = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(3)])
    tree = {"layers_0": {"kernel": w1, "bias": np.zeros(8)},
            "layers_2": {"kernel": w2, "bias": np.zeros(3)}}  # fmt: skip
    first = nnx.Linear(6, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    second = nnx.Linear(8, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    first.kernel[...], second.kernel[...] = w1, w2
    module = eqx.nn.MLP(
        6, 3, 8, 1, activation=jax.nn.gelu, key=jax.random.key(0), dtype=jnp.float64
    )
    module = eqx.tree_at(lambda m: (m.layers[0].weight, m.layers[1].weight), module, (w1.T, w2.T))
    haiku = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([8, 3], activation=jax.nn.gelu)(x))
    )
    weights = {"mlp/~/linear_0": {"w": w1, "b": np.zeros(8)},
               "mlp/~/linear_1": {"w": w2, "b": np.zeros(3)}}  # fmt: skip
    found = [
        upper(lambda x: linen.apply({"params": tree}, x), x),
        upper(lambda x: second(nnx.gelu(first(x))), x),
        upper(module, x[0]),
        upper(lambda x: haiku.apply(weights, x), x),
        upper(lambda x: jax.nn.gelu(x @ w1) @ w2, x),
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-9)


def _chain(sizes, act, skip=False):
    """(a network without biases, its matrices)."""
    rng = np.random.default_rng(0)
    ws = [rng.standard_normal(n) / n[0] ** 0.5 for n in itertools.pairwise(sizes)]

    def fn(x):
        y = x
        for w in ws[:-1]:
            y = act(y @ w) + (y if skip and w.shape[0] == w.shape[1] else 0)
        return y @ ws[-1]

    return fn, ws


def closed_form(ws) -> float:
    """ECLipsE-Fast (Xu & Sivaranjani 2024, theorem 2) for slopes in [0, 1]."""
    x = np.eye(len(ws[0]))
    for w in ws[:-1]:
        moved = w.T @ np.linalg.inv(x) @ w
        least = 2 / np.linalg.norm(moved, 2)
        x = least * np.eye(len(moved)) - least**2 / 4 * moved
    return float(np.sqrt(np.linalg.norm(ws[-1].T @ np.linalg.inv(x) @ ws[-1], 2)))


@pytest.mark.parametrize(
    "fn",
    [
        _chain((4, 8, 8, 3), relu)[0],
        _chain((4, *[10] * 5, 2), jax.nn.gelu, skip=True)[0],
        lambda x: jnp.concatenate([_chain((4, 9, 9, 2), jnp.tanh)[0](x), 2 * x]),
        lambda x: jax.nn.softmax(relu(x @ A) @ B) @ A + relu(-abs(x)),
        lambda x: lax.top_k(relu(x @ A), 2)[0],
    ],
)
def test_cuts_of_the_graph_hold_the_same_ellipsoid(fn, monkeypatch):
    whole = bounds(fn, method="ellipsoid")
    monkeypatch.setattr(_lipschitz, "_MOST_DIRECTIONS", 0)
    cut = bounds(fn, method="ellipsoid")
    assert "shift" not in cut
    np.testing.assert_allclose(cut["ellipsoid"], whole["ellipsoid"], rtol=1e-3)


@pytest.mark.parametrize("sizes", [(20, *[100] * 40, 5), (6, 1300, 1300, 1300, 3)])
def test_networks_too_large_for_one_matrix(sizes):
    """The closed form, from which the search for better numbers starts."""
    fn, ws = _chain(sizes, relu)
    found = sn_jax.lipschitz_bound(fn, np.zeros(sizes[0]), method="tight", progress=False)
    assert found.method == "ellipsoid"
    assert found.upper <= closed_form(ws) * (1 + 1e-6)
    assert found.upper >= stretch(fn, np.full(sizes[0], 0.1))
    assert len(found.ops) == len(ws)


def _batched():
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.standard_normal(shape) / 2 for shape in ((4, 16), (16, 16), (16, 2)))
    length = lambda x: jnp.sqrt((x**2).mean(-1, keepdims=True) + 0.1)  # noqa: E731
    return {
        "relu": lambda x: relu(relu(x @ w1) @ w2) @ w3,
        "softmax": lambda x: jax.nn.softmax(jax.nn.gelu(x @ w1) @ w2) @ w3,
        "a norm": lambda x: jnp.tanh(x @ w1) / length(jnp.tanh(x @ w1)) @ w3,
        "a skip": lambda x: x + jax.nn.gelu(x @ w1) @ w1.T / 3,
        "max-min": lambda x: jnp.maximum(x @ w1, x @ w2[:4]) - jnp.minimum(x @ w1, 2 * x @ w2[:4]),
    }


@pytest.mark.parametrize("name", _batched())
def test_batches_have_the_constant_of_one(name):
    """By every method, and "auto" is as tight: the examples are searched one by one."""
    fn = _batched()[name]
    one, eight = (bounds(fn, np.zeros((n, 4))) for n in (1, 8))
    assert list(one) == list(eight) == [*_lipschitz.METHODS]
    np.testing.assert_allclose([*eight.values()], [*one.values()], rtol=1e-7)


@pytest.mark.parametrize(
    "fn", [lambda x: (x @ FIRST)[1:], lambda x: (x @ FIRST) @ FIRST[::-1] - x * 0]
)
def test_what_is_zero_only_by_its_numbers(fn):
    assert upper(fn, np.ones(2)) == 0


def test_parts_have_the_largest_of_their_constants():
    rng = np.random.default_rng(1)
    ws = [(rng.standard_normal((3, 5)), rng.standard_normal((5, 2))) for _ in range(3)]
    nets = [lambda x, w=w, v=v: relu(x @ w) @ v for w, v in ws]
    # Numbers among each other, so that nothing but the matrices can tell the parts.
    order = rng.permutation(9)

    def fn(x):
        x = x[order]
        dead = relu(-abs(x[0]) - 1.0) * jnp.ones(2)
        return jnp.concatenate([net(x[3 * i : 3 * i + 3]) for i, net in enumerate(nets)] + [dead])

    alone = [upper(net, np.zeros(3), "tight") for net in nets]
    found = upper(fn, np.zeros(9), "tight")
    assert max(every_slope(v.T, w.T) for w, v in ws) <= found
    np.testing.assert_allclose(found, max(alone), rtol=1e-6)


@pytest.mark.float32
def test_spectral_normalization_inside():
    class Discriminator(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 8):
                conv = nn.Conv(features, (3, 3), strides=2)
                x = nn.leaky_relu(sn_linen.SpectralNorm(conv)(x), 0.1)
            return sn_linen.SpectralNorm(nn.Dense(1))(x.reshape(len(x), -1))

    model, x = Discriminator(), jnp.zeros((1, 8, 8, 1))
    variables = model.init(jax.random.key(0), x)
    fn = lambda x: model.apply(variables, x)  # noqa: E731
    found = upper(fn, x)
    lower = stretch(fn, np.random.default_rng(0).standard_normal(x.shape).astype(np.float32))
    assert lower <= found < 10


@pytest.mark.float32
def test_certificates_do_not_depend_on_x64():
    w = np.asarray(A, np.float32)
    found = upper(lambda x: w @ (w @ x), X.astype(np.float32))
    exact = np.linalg.norm(w.astype(np.float64) @ w.astype(np.float64), 2)
    assert exact <= found
    np.testing.assert_allclose(found, exact, rtol=1e-9)


def test_bfloat16_is_taken_for_real_numbers():
    x = X.astype(np.float32)
    bound = sn_jax.lipschitz_bound(lambda x: jnp.tanh(x.astype(jnp.bfloat16)), x)
    assert bound.upper == pytest.approx(1, rel=1e-6)
    assert any("bfloat16" in note for note in bound.notes)


def test_constants_of_deep_networks_beyond_float64():
    fn = lambda x: lax.fori_loop(0, 400, lambda _, x: jnp.tanh(100 * x), x)  # noqa: E731
    bound = sn_jax.lipschitz_bound(fn, X, method="joint")
    assert bound.upper == np.inf
    assert bound.log_upper == pytest.approx(400 * np.log(100), rel=1e-9)
    assert "e+800" in str(bound)


def test_the_table():
    bound = sn_jax.lipschitz_bound(lambda x: B @ relu(A @ x), X, method="merged")
    lines = str(bound).splitlines()
    assert lines[0].split() == ["where", "what", "factor", "up", "to", "here"]
    assert any("max [0, 1]" in line and "test_lipschitz.py:" in line for line in lines)
    assert f"upper = {bound.upper:.6g} by" in str(bound)
    assert bound.failure_probability == 0
    assert [name for name, _ in bound.seconds] == [name for name, _ in bound.bounds]
    assert all(seconds >= 0 for _, seconds in bound.seconds)
