"""True norms and certified brackets, against SVDs of explicit matrices and golden values."""

import math
import pickle
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from helpers import HAS_FLOAT16, svd_rtol, weighted_sums
from hypothesis import given, settings
from hypothesis import strategies as st

import sn_jax
from experiments.certify import oracle
from sn_jax import Conv, Linear, Matrix, gram_iteration, norm_bounds, spectral_norm

KEY = jax.random.key(0)
FLATTENED = Matrix((0, 1, 2), 3)

# REFERENCE kernels as (*spatial, in, out).
LINE = np.array([2.0, 7, -1])[:, None, None]
SQUARE = np.array([[2.0, 7, -1], [1, 3, -8], [5, -3, 1]])[..., None, None]
ONES = np.ones((3, 3, 1, 1))
A, B, I, O = np.ogrid[:3, :3, :3, :4]  # noqa: E741, the kernel's letters
SINES = np.sin(1 + O + 2 * I + 3 * A + 5 * B)  # 4 x 3 x 3 x 3 as output first

GOLDEN = [
    (LINE, Conv(20, padding="CIRCULAR"), 8.005633638),
    (LINE, Conv(200_000, padding="CIRCULAR"), 8.007808689),  # the supremum over frequencies
    (SQUARE, Conv((20, 20), padding="CIRCULAR"), 22.912213482),
    (SQUARE, Conv((20, 20)), 22.727533020),
    (SQUARE, Conv((20, 20), padding="VALID"), 22.679431985),
    (ONES, Conv((8, 8), padding="CIRCULAR"), 9.0),
    (ONES, Conv((8, 8)), 8.290859369),
    (ONES, FLATTENED, 3.0),
    (SINES, FLATTENED, 5.814645860),
    (SINES, Conv((8, 8), padding="CIRCULAR"), 15.228065977),
    (SINES, Conv((8, 8)), 14.456205765),
    (SINES, Conv((8, 8), padding="VALID"), 13.965760588),
    (SINES, Conv((8, 8), strides=2, padding="CIRCULAR"), 9.460639481),
    (SINES, Conv((8, 8), strides=2), 8.688279542),
    (SINES, Conv((8, 8), kernel_dilation=2), 11.934235083),
]


@pytest.mark.parametrize(("kernel", "view", "sigma"), GOLDEN, ids=lambda x: str(x)[:40])
def test_golden_values(kernel, view, sigma):
    half_digit = 0.5000001e-9 / sigma + 1e-10
    np.testing.assert_allclose(spectral_norm(kernel, view, rtol=1e-10), sigma, rtol=half_digit)
    lower, upper = norm_bounds(kernel, view, rtol=1e-10)
    assert upper <= lower * (1 + 1e-10)
    assert lower * (1 - half_digit) <= sigma <= upper * (1 + half_digit)


@pytest.mark.parametrize(("n", "bound"), [(16, 16.125146), (32, 15.804913), (64, 15.721334)])
def test_grid_to_continuum(n, bound):
    grid = spectral_norm(SINES, Conv((n, n), padding="CIRCULAR"), rtol=1e-9)
    assert abs(grid / math.cos(math.pi / n) ** 2 - bound) < 6e-7


def test_gram_iteration_converges_as_published():
    """500 x 400 Gaussian, relative excess at 5 to 9 squarings (seeds move it by some per cent)."""
    expected = [1.3e-2, 1.8e-3, 6.7e-5, 2.4e-7, 9.6e-12]
    w = np.random.default_rng(0).standard_normal((500, 400))
    sigma = np.linalg.norm(w, 2)
    uppers = [gram_iteration(w, steps).upper / sigma - 1 for steps in range(5, 10)]
    rounding = svd_rtol(w.shape)
    np.testing.assert_allclose(uppers, expected, rtol=0.1, atol=rounding)
    for steps, upper in enumerate(uppers, 5):
        lower = gram_iteration(w.T, steps).lower / sigma
        assert 1 - 4 * (1.0 + upper) ** 2 * max(upper, 1e-6) ** 0.5 < lower <= 1 + rounding


@pytest.mark.float32
def test_gram_iteration_is_no_bracket_in_float32():
    """Converged, an end is on the wrong side of the norm in about a third of random cases."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(60):
        w = rng.standard_normal((12, 8)).astype(np.float32)
        result = gram_iteration(jnp.asarray(w), 12)
        sigma = np.linalg.norm(w.astype(np.float64), 2)
        missed += not result.lower <= sigma <= result.upper
        np.testing.assert_allclose(result, sigma, rtol=1e-5)
    assert 0 < missed < 60
    assert type(result) is sn_jax.GramResult
    assert not isinstance(result, sn_jax.Bounds)


def test_gram_iteration_is_differentiable_and_batched():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)))
    lower, upper = jax.jit(gram_iteration, static_argnums=1)(w, 8)
    sigma = np.linalg.norm(w, 2, (-2, -1))
    np.testing.assert_allclose(lower, sigma, rtol=1e-3)
    assert np.all(lower <= sigma * (1 + svd_rtol(w.shape)))
    assert np.all(sigma <= upper * (1 + svd_rtol(w.shape)))
    grad = jax.grad(lambda w: gram_iteration(w, 12).upper)(w[0])
    u, _, vt = np.linalg.svd(w[0])
    np.testing.assert_allclose(grad, np.outer(u[:, 0], vt[0]), atol=1e-9)
    complex_w = np.asarray(w[0]) + 1j * np.asarray(w[1])
    np.testing.assert_allclose(gram_iteration(complex_w, 10).upper, np.linalg.norm(complex_w, 2))
    assert gram_iteration(np.zeros((2, 3))).upper == 0
    with pytest.raises(ValueError, match="n_steps >= 1"):
        gram_iteration(np.ones(3))


# Certificates of matrices.


def gaussian(rng, m, n):
    return rng.standard_normal((m, n))


MATRICES = {
    "gaussian": gaussian,
    "ones": lambda rng, m, n: np.ones((m, n)),
    "orthogonal": lambda rng, m, n: np.linalg.qr(gaussian(rng, max(m, n), min(m, n)))[0],
    "rank one": lambda rng, m, n: np.outer(gaussian(rng, m, 1), gaussian(rng, n, 1)),
    "tied": lambda rng, m, n: np.eye(m, n),
    "one huge entry": lambda rng, m, n: np.eye(m, n) + 1e9 * np.eye(m, n)[::-1, ::-1],
    "graded": lambda rng, m, n: gaussian(rng, m, n) * 10.0 ** -np.arange(n),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(MATRICES)),
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([np.float32, np.float64, *[np.float16] * HAS_FLOAT16]),
    exponent=st.integers(-20, 20),
    rtol=st.sampled_from([1e-2, 1e-6, 1e-10]),
)
def test_brackets_of_matrices_hold(kind, seed, shape, dtype, exponent, rtol):
    w = MATRICES[kind](np.random.default_rng(seed), *shape) * 10.0**exponent
    w = np.clip(w, -float(np.finfo(dtype).max), float(np.finfo(dtype).max)).astype(dtype)
    sigma = np.linalg.norm(w.astype(np.float64), 2)
    lower, upper = norm_bounds(w, rtol=rtol)
    rounding = svd_rtol(w.shape)
    assert lower <= sigma * (1 + rounding)
    assert sigma * (1 - rounding) <= upper
    assert upper <= lower * (1 + rtol)


def test_no_bracket_is_narrower_than_rounding():
    """Asked for the impossible, it gives what it can prove, and says so."""
    w = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))[0]
    with pytest.warns(UserWarning, match="rounding in float64"):
        lower, upper = norm_bounds(w, rtol=1e-16)
    assert lower < upper < 1 + 1e-10
    assert lower <= 1 + svd_rtol(w.shape)
    assert 1 - svd_rtol(w.shape) <= upper


@pytest.mark.parametrize("seed", [16, 17])
def test_all_singular_values_equal(seed):
    w = np.linalg.qr(np.random.default_rng(seed).standard_normal((18, 18)))[0]
    lower, upper = norm_bounds(w, rtol=1e-9)
    assert lower <= 1 + svd_rtol(w.shape)
    assert 1 - svd_rtol(w.shape) <= upper <= lower * (1 + 1e-9)


def test_stacks_are_bounded_each():
    w = np.random.default_rng(0).standard_normal((5, 3, 4, 6)).astype(np.float32)
    view = Matrix((0, 2), 3)
    flat = w.transpose(1, 0, 2, 3).reshape(3, 20, 6)
    bounds = norm_bounds(jnp.asarray(w), view, rtol=1e-8)
    lower = bounds.lower
    assert lower.shape == (3,)
    assert bounds.failure_probability == 0
    np.testing.assert_allclose(lower, np.linalg.norm(flat.astype(np.float64), 2, (1, 2)), rtol=1e-8)
    np.testing.assert_allclose(spectral_norm(w, view), lower, rtol=1e-6)
    kernels = np.random.default_rng(0).standard_normal((3, 2, 3, 2, 4))  # (3, stack, 3, in, out)
    lower, _ = norm_bounds(kernels, Conv((5, 5), batch_axes=(1,)))
    each = [norm_bounds(kernels[:, i], Conv((5, 5))).lower for i in range(2)]
    np.testing.assert_allclose(lower, each, rtol=svd_rtol((50, 100)))


@pytest.mark.parametrize("n", [80, 600])
def test_close_singular_values(n):
    """sigma_2 = (1 - 1e-4) sigma_1: plain power iteration needs tens of thousands of steps."""
    u, v = np.linalg.qr(np.random.default_rng(0).standard_normal((2, n, n)))[0]
    s = np.concatenate([[1.0, 1 - 1e-4, 1 - 2e-4], np.linspace(0.999, 0, n - 3)])
    w = (u * s) @ v
    rounding = svd_rtol(w.shape)
    np.testing.assert_allclose(spectral_norm(w, rtol=1e-8), 1, rtol=1e-12 + rounding)
    lower, upper = norm_bounds(w, rtol=1e-8)
    assert 1 - 1e-8 < lower <= 1 + rounding
    assert 1 - rounding <= upper < 1 + 1e-8


@pytest.mark.float32
def test_users_without_float64_get_it_here():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((30, 20)), jnp.float32)
    sigma = np.linalg.norm(np.asarray(w, np.float64), 2)
    rounding = svd_rtol(w.shape)
    np.testing.assert_allclose(spectral_norm(w), sigma, rtol=rounding)
    lower, upper = norm_bounds(w, rtol=1e-10)
    assert lower * (1 - rounding) <= sigma <= upper * (1 + rounding)
    assert upper <= lower * (1 + 1e-10)
    kernel = jnp.asarray(SINES, jnp.float32)
    assert abs(spectral_norm(kernel, Conv((8, 8)), rtol=1e-9) - 14.456205765) < 1e-6
    assert not jax.config.jax_enable_x64


# Convolutions. The attack in test_certify compares brackets of many with an oracle.


@pytest.mark.parametrize("options", [{"padding": "VALID"}, {"padding": "REFLECT"}], ids=str)
def test_without_work_the_bracket_is_open(options):
    kernel = np.random.default_rng(1).standard_normal((3, 3, 5, 20))
    view = Conv((20, 20), **options)
    with pytest.warns(UserWarning, match=r"e.0\d operations, more than work=0, .* without borders"):
        lower, upper = norm_bounds(kernel, view, work=0)
    closed = norm_bounds(kernel, view, rtol=1e-7)
    assert closed.lower <= closed.upper <= closed.lower * (1 + 1e-7)
    assert lower <= closed.upper
    assert closed.lower <= upper <= lower * (2.1 if view.padding == "REFLECT" else 1.03)


# Too large to be formed by default, and small enough for LAPACK.
BANDED = [
    ((5, 3, 4), Conv(400)),
    ((3, 3, 3), Conv(400, padding="CAUSAL", kernel_dilation=5)),
    ((5, 2, 4), Conv(603, strides=2, padding="CIRCULAR")),
    ((3, 3, 5, 4), Conv((16, 17))),
    ((4, 3, 3, 5), Conv((27, 26), strides=(2, 1), padding=((3, 0), (0, 1)))),
    ((3, 5, 4, 4), Conv((17, 16), padding="REFLECT")),
    ((3, 3, 4, 8), Conv((17, 16), kernel_dilation=2, feature_group_count=2)),
    ((4, 4, 8, 3), Conv((12, 12), strides=2, transpose=True)),
    ((2, 3, 2, 3, 3), Conv((7, 8, 7), padding=((0, 1), (0, 0), (2, 0)), input_dilation=(2, 1, 1))),
]


@pytest.mark.parametrize(("shape", "view"), BANDED, ids=str)
def test_brackets_along_the_band(shape, view):
    """Against matrices built pixel by pixel; the last block that is wrong would show at 1e-9."""
    kernel = np.random.default_rng(3).standard_normal(shape)
    matrix = oracle.matrices(kernel, view)
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    sigma = math.sqrt(np.linalg.eigvalsh(matrix @ matrix.T)[-1])
    rounding = svd_rtol(matrix.shape)
    lower, upper = norm_bounds(kernel, view, rtol=1e-9)
    assert lower <= sigma * (1 + rounding)
    assert sigma * (1 - rounding) <= upper <= lower * (1 + 1e-9)


def test_a_vector_that_is_not_the_leading_one_is_refused(monkeypatch):
    """Where Lanczos iteration misses the norm, the factorization must find out."""
    shape, view = BANDED[3]
    kernel = np.random.default_rng(3).standard_normal(shape)
    norm = norm_bounds(kernel, view, rtol=1e-6)
    search, seen = scipy.sparse.linalg.eigsh, []

    def misled(operator, v0, **options):
        seen.append(v0)
        if len(seen) > 1:
            return search(operator, v0=v0, **options)
        values, vectors = search(operator, v0=v0, **(options | {"k": 2}))
        return values[:1], vectors[:, :1]  # ascending

    monkeypatch.setattr("sn_jax._norms.eigsh", misled)
    assert norm_bounds(kernel, view, rtol=1e-6).upper >= norm.lower
    assert len(seen) == 2


LONG = [
    Conv(1100),
    Conv(1500, strides=3, padding=((5, 1),)),
    Conv(5000, padding="REFLECT"),
    Conv(4999, strides=2, padding="CIRCULAR"),
]


@pytest.mark.parametrize("view", LONG, ids=repr)
def test_long_signals_are_bracketed(view):
    """With a proof, and without one by periods beyond the grid, and borders of copies."""
    kernel = np.random.default_rng(2).standard_normal((5, 2, 4))
    sigma = spectral_norm(kernel, view)
    lower, upper = norm_bounds(kernel, view, rtol=1e-6)
    assert lower <= sigma * (1 + 1e-12)
    assert sigma <= upper <= lower * (1 + 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lower, upper = norm_bounds(kernel, view, rtol=1e-6, work=0)
    assert lower <= sigma * (1 + 1e-12)
    copies = view.padding in ("REFLECT", "CIRCULAR")
    assert sigma <= upper <= sigma * (math.sqrt(2) * 1.01 if copies else 1.001)


def test_a_sum_of_folded_taps_is_not_taken_for_exact():
    """On 2 pixels the taps of one kernel meet, here to cancel: certificates must not divide by
    what is left."""
    kernel = np.array([1e8, 1.0, -1e8, 1e-3])[:, None, None]
    view = Conv(2, padding="CIRCULAR")
    matrix = np.array([[1e8 - 1e8, 1 + 1e-3], [1 + 1e-3, 0]])  # taps 0 and 2, taps 1 and 3
    lower, upper = norm_bounds(kernel, view, rtol=1e-5)
    assert lower <= np.linalg.norm(matrix, 2) <= upper <= lower * (1 + 1e-5)


# Any linear map.


def spectrum_filter(w, x):
    return jnp.fft.irfft(w.astype(complex) * jnp.fft.rfft(x), x.shape[0])


def test_linear_views():
    w = np.random.default_rng(0).standard_normal(51)
    view = Linear(spectrum_filter, 100)
    sigma = np.abs(w).max()
    np.testing.assert_allclose(spectral_norm(w, view), sigma, rtol=1e-12)
    bounds = norm_bounds(w, view, key=KEY)
    assert 0 < bounds.failure_probability <= 1e-6
    assert sigma * (1 - 1e-3) < bounds.lower <= sigma * (1 + 1e-12)
    assert sigma <= bounds.upper <= bounds.lower * (1 + 1e-3)
    assert norm_bounds(0 * w, view, key=KEY).upper == 0
    assert pickle.loads(pickle.dumps(view)) == view
    assert hash(view) == hash(Linear(spectrum_filter, (100,)))


def test_the_random_bound_covers_what_lanczos_misses():
    """Two directions of 3,000 stand out, one a little more: a few steps cannot tell them apart."""
    w = np.full(3000, 0.5)
    w[[7, 8]] = 1.0, 1.0005
    for seed in range(5):
        lower, upper = norm_bounds(
            w, Linear(jnp.multiply, 3000), rtol=0.05, key=jax.random.key(seed)
        )
        assert lower <= 1.0005 * (1 + 1e-12)
        assert 1.0005 <= upper <= lower * 1.05


@dataclass(frozen=True)
class Stacked:
    """A view of a user's own, with a batch axis."""

    def batch_shape(self, shape):
        return shape[:1]

    def domain(self, shape):
        return (6,)

    def matvec(self, w, x):
        return jax.vmap(weighted_sums)(w, x)

    def scale(self, w, factor):
        return w * factor[:, None]


def test_views_of_ones_own():
    w = np.random.default_rng(0).standard_normal((3, 6))
    sigma = [np.linalg.norm(row[:, None] * np.tri(6), 2) for row in w]
    np.testing.assert_allclose(spectral_norm(w, Stacked()), sigma, rtol=1e-10)
    lower, upper = norm_bounds(w, Stacked(), key=KEY)
    np.testing.assert_allclose(lower, sigma, rtol=1e-10)
    assert np.all(sigma <= upper)


def affine(w, x):
    return w @ x + 1e-9


def rectified(w, x):
    return jax.nn.relu(w @ x)


def squared(w, x):
    return w @ (w @ x)


W = np.ones((4, 4))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: norm_bounds(W, rtol=0), "rtol must be > 0"),
        (lambda: norm_bounds(W, work=-1), "work must be >= 0"),
        (lambda: spectral_norm(W, rtol=-1), "rtol must be > 0"),
        (lambda: norm_bounds(W * np.nan), "16 of 16 weights .* not finite"),
        (lambda: spectral_norm(W * np.inf), "not finite"),
        (lambda: norm_bounds(W.astype(int)), "real floating-point"),
        (lambda: norm_bounds(W, Linear(jnp.matmul, 4)), "key=jax.random.key"),
        (lambda: norm_bounds(W, Linear(affine, 4), key=KEY), "affine is not linear in x"),
        (lambda: spectral_norm(W, Linear(rectified, 4)), "rectified is not linear in x"),
        (lambda: sn_jax.init({"w": W}, KEY, {"w": Linear(squared, 4)}), "w of shape .*squared is "
         "not linear in w"),
        (lambda: sn_jax.init({"w": W}, KEY, {"w": Linear(affine, 4)}), "affine is not linear in x"),
        (lambda: jax.jit(norm_bounds)(W), "outside of jit"),
        (lambda: jax.grad(spectral_norm)(jnp.ones((2, 2))), "outside of jit"),
        (lambda: norm_bounds(np.ones((5, 5, 1, 1)), Conv((4, 4), padding="VALID")), "no output"),
        (lambda: sn_jax.init({"w": np.ones((5, 1, 1))}, KEY, {"w": Conv(4, padding="VALID")}),
         "w of shape .* leaves no output"),
        (lambda: norm_bounds(np.ones((3, 2, 4)), Conv(4, feature_group_count=3)), "3 groups"),
        (lambda: Linear(3, 4), "give a function"),
        (lambda: Linear(affine, 1.5), "shape of x"),
        (lambda: Linear(affine, -1), "at least 0"),
    ],
)  # fmt: skip
def test_bad_input(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


def test_nothing_has_norm_zero():
    for shape in [(3, 4), (0, 4), (2, 0)]:
        assert tuple(norm_bounds(np.zeros(shape))) == (0, 0)
        assert spectral_norm(np.zeros(shape)) == 0
    zeros = np.zeros((3, 2, 4))
    for padding in ("SAME", "CIRCULAR"):
        assert tuple(norm_bounds(zeros, Conv(5, padding=padding))) == (0, 0)
    assert spectral_norm(zeros, Conv(50)) == 0
    # Along the band.
    assert tuple(norm_bounds(np.zeros((3, 3, 5, 5)), Conv((17, 17)))) == (0, 0)


def test_subnormal_and_huge_weights():
    w = np.random.default_rng(0).standard_normal((4, 3))
    sigma = np.linalg.norm(w, 2)
    for scale in (1e-310, 1e305):
        lower, upper = norm_bounds(w * scale)
        assert lower < sigma * scale < upper < lower * (1 + 2e-3)
