"""spectral_normalize(mode="certified"): true norms under the bound, judged by explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs_float16

import sn_jax
from experiments.certify import in_program, oracle
from sn_jax import _certified

KEY = jax.random.key(0)
C = 0.1  # no float32


@jax.jit
def certified(params, state, c=C):
    return sn_jax.spectral_normalize(params, state, n_steps=0, bound=c, mode="certified")[0]


def normalized(w, view, c=C):
    params = {"w": jnp.asarray(w)}
    state = sn_jax.init(params, KEY, {"w": view}, warmup=0)
    return np.asarray(certified(params, state, c)["w"])


def with_spectrum(rng, m, n, spectrum):
    u, v = (np.linalg.qr(rng.standard_normal((k, len(spectrum))))[0] for k in (m, n))
    return (u * spectrum) @ v.T


def hostile(m=48, n=32):
    """Name -> (matrix, how far below the bound its norm may come out)."""
    rng = np.random.default_rng(0)
    gaussian, ramp = rng.standard_normal((m, n)), np.linspace(0, 1, n)
    return {
        "Gaussian": (gaussian, 2e-3),
        "tied": (with_spectrum(rng, m, n, np.ones(n)), 0.015),
        "two tied": (with_spectrum(rng, m, n, np.r_[1, 1, ramp[:-2] / 2]), 4e-3),
        "nearly tied": (with_spectrum(rng, m, n, 1 - 1e-6 * ramp), 0.015),
        "rank one": (np.outer(gaussian[:, 0], gaussian[0]), 1e-4),
        "all ones": (np.ones((m, n)), 1e-4),
        "one huge entry": (gaussian + 1e12 * (np.indices((m, n)).sum(0) == 5), 1e-4),
        "graded": (gaussian * 10.0 ** (-30 * ramp), 2e-4),
        "1e30": (gaussian * 1e30, 2e-3),
        "1e-30": (gaussian * 1e-30, 2e-3),
        "near the least number": (gaussian * 1e-37, 1.0),
    }


@pytest.mark.float32
def test_hostile_matrices_come_under_the_bound_and_close_to_it():
    kinds = hostile()
    w = np.stack([matrix for matrix, _ in kinds.values()]).astype(np.float32)
    norms = np.linalg.norm(normalized(w, sn_jax.Matrix()).astype(float), 2, (-2, -1))
    assert np.all(norms <= C * (1 + 1e-13))
    for (name, (_, slack)), norm in zip(kinds.items(), norms, strict=True):
        assert norm >= C * (1 - slack), name


CIRCULAR = [
    (sn_jax.Conv((6, 5), padding="CIRCULAR"), (3, 3, 4, 5)),
    (sn_jax.Conv((8,), 2, "CIRCULAR", kernel_dilation=2, feature_group_count=2), (3, 2, 6)),
    (sn_jax.Conv((3, 4), padding="CIRCULAR", batch_axes=(2,)), (5, 3, 2, 2, 3)),  # wraps around
]
PADDED = [
    (sn_jax.Conv((6, 6), 2), (3, 3, 4, 5)),
    (sn_jax.Conv((5, 4), 2, transpose=True, transpose_kernel=True), (4, 4, 2, 3)),
    (sn_jax.Conv((7,), padding="REFLECT"), (3, 4, 5)),
    (sn_jax.Conv((300,), padding="SAME"), (5, 2, 1)),  # on a coarser grid than its frequencies
]


@pytest.mark.parametrize(("view", "shape"), CIRCULAR + PADDED, ids=str)
def test_convolutions_come_under_the_bound(view, shape):
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    norms = oracle.norms(normalized(w, view), view)
    assert np.all(norms <= C * (1 + 1e-13))
    circular = view.padding == "CIRCULAR"
    assert np.all(norms >= C * (1 - (2e-3 if circular else 0.5)))


@pytest.mark.parametrize(
    ("dtype", "slack"),
    [(jnp.bfloat16, 0.04), pytest.param(jnp.float16, 0.01, marks=needs_float16), (float, 0.015)],
    ids=str,
)
def test_what_is_rounded_is_what_is_bounded(dtype, slack):
    """In half precision, too, the norm is that of the numbers that come out."""
    w = np.stack([hostile()[name][0] for name in ("Gaussian", "tied", "all ones")])
    out = normalized(jnp.asarray(w, dtype), sn_jax.Matrix())
    assert out.dtype == jnp.dtype(dtype)
    norms = np.linalg.norm(out.astype(float), 2, (-2, -1))
    assert np.all((norms <= C * (1 + 1e-13)) & (norms >= C * (1 - slack)))


@pytest.mark.parametrize("imaginary", [0, 1j])
def test_the_bound_covers_the_worst_rounding_of_its_products(imaginary, monkeypatch):
    """As if each product erred by all that it may, in an arithmetic of four digits."""
    monkeypatch.setattr(_certified, "_unit", lambda dtype: 1e-4)
    exact = _certified._product

    def product(a, b):
        return exact(a, b) - _certified._gamma(len(a), a.dtype) * exact(jnp.abs(a), jnp.abs(b))

    monkeypatch.setattr(_certified, "_product", product)
    rng = np.random.default_rng(2)
    for a in (np.ones((40, 30)), np.abs(rng.standard_normal((40, 30))), np.ones((600, 3))):
        above = _certified._above(jnp.asarray(a + imaginary * a))
        assert above >= np.linalg.norm(a + imaginary * a, 2)


def test_rounding_of_the_result_may_all_go_one_way():
    c = np.linspace(1, 2, 16, dtype=np.float32)
    out = normalized(jnp.ones((16, 4, 3), jnp.bfloat16), sn_jax.Matrix(), jnp.asarray(c))
    assert np.all(np.linalg.norm(out.astype(float), 2, (-2, -1)) <= c)


def test_zero_stays_zero_and_what_is_not_finite_shows():
    w = np.zeros((4, 6, 3), np.float32)
    w[1:] = 1
    w[2, 0, 0], w[3, 0, 0] = np.nan, np.inf
    out = normalized(w, sn_jax.Matrix())
    assert np.all(out[0] == 0)
    assert np.all(np.isnan(out[2:]))
    assert C * (1 - 1e-4) < np.linalg.norm(out[1], 2) <= C


def test_masked_kernels_and_bounds_of_each_element():
    rng = np.random.default_rng(3)
    mask = np.tril(np.ones((6, 4))) / 3
    w, c = rng.standard_normal((2, 6, 4)).astype(np.float32), np.array([0.5, 3.0], np.float32)
    view = sn_jax.Scaled(sn_jax.Matrix(), mask[None])
    norms = np.linalg.norm(normalized(w, view, jnp.asarray(c)) * mask, 2, (-2, -1))
    assert np.all((norms <= c * (1 + 1e-13)) & (norms >= c * (1 - 1e-3)))


def test_the_gradient_is_that_of_division_by_sigma():
    """With W_bar = f W: dL/dW = f (G - <G, W> u v^T / sigma), and symmetric second derivatives."""
    rng = np.random.default_rng(4)
    w, g = rng.standard_normal((2, 6, 4))
    params = {"w": jnp.asarray(w)}
    state = sn_jax.init(params, KEY, {"w": sn_jax.Matrix()}, warmup=100)

    def loss(w, c, gradient="through"):
        options = {"n_steps": 0, "mode": "certified", "gradient": gradient}
        normalized, _ = sn_jax.spectral_normalize({"w": w}, state, bound=c, **options)
        return jnp.sum(g * normalized["w"])

    u, v = np.asarray(state["w"].u[0]), np.asarray(state["w"].v[0])
    f = certified(params, state)["w"][0, 0] / w[0, 0]
    expected = f * (g - np.sum(g * w) * np.outer(v, u) / (v @ w @ u))
    by_w, by_c = jax.grad(loss, (0, 1))(params["w"], C)
    np.testing.assert_allclose(by_w, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_c, loss(w, C) / C, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(w, C, "stop"), f * g, rtol=1e-12)
    hessian = jax.hessian(loss)(params["w"], C).reshape(w.size, w.size)
    assert np.max(np.abs(hessian)) > 1e-3
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


def test_the_state_moves_as_in_every_mode():
    params = {"w": jnp.asarray(np.random.default_rng(5).standard_normal((6, 4)))}
    state = sn_jax.init(params, KEY, {"w": sn_jax.Matrix()}, warmup=0)
    _, new = sn_jax.spectral_normalize(params, state, mode="certified")
    _, expected = sn_jax.spectral_normalize(params, state)
    jax.tree.map(np.testing.assert_array_equal, new, expected)


def test_a_small_attack_finds_nothing_and_would_find_what_is_wrong(monkeypatch):
    results = in_program.attack(60, seed=3, n_configs=3)
    assert results["violations"] == []
    assert " 0 violations" in in_program.report(results)
    right = in_program.normalized
    monkeypatch.setattr(in_program, "normalized", lambda *case: right(*case) * 1.2)
    assert in_program.attack(6, seed=3, n_configs=3)["violations"]
