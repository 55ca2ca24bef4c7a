"""Clipped singular values: the nearest point by SVD in float64, and true norms under the cap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CASES, count_compilations, needs_float16, state_of, svd_rtol

import sn_jax
from sn_jax.transforms import clip_singular_values as clip_updates

METHODS = ("svd", "polar")


def clipped_in_float64(dense, c):
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u * np.minimum(s, np.asarray(c)[..., None])[..., None, :]) @ vt


FAR = 7


def spectra(m, n):
    """Matrices (kinds, m, n) of norms around 1, as hostile to float32 as they come."""
    rng = np.random.default_rng(0)
    r = min(m, n)
    kinds = {
        "Gaussian": rng.uniform(0.1, 1.5, r),
        "all tied above": np.full(r, 1.01),
        "all tied at the cap": np.full(r, 1.0),
        "tied a little above": np.full(r, 1 + 3e-6),
        "half tied": np.where(np.arange(r) < r // 2, 1.0, 1 + 1e-5),
        "geometric": 2.0 * 10.0 ** -np.linspace(0, 12, r),
        "one far above": np.where(np.arange(r) == 0, 1e4, 0.9999),
        "all far above": np.full(r, 1e4),
        "rank one": np.where(np.arange(r) == 0, 1.2, 0.0),
        "zero": np.zeros(r),
        "inside": rng.uniform(0.1, 0.3, r),
    }
    out = []
    for s in kinds.values():
        u, v = (np.linalg.qr(rng.standard_normal((k, r)))[0] for k in (m, n))
        out.append((u * s) @ v.T)
    signs = np.ones((m, n)) * 2 / np.sqrt(m * n)  # equal entries, whose rounding errors add up
    assert [*kinds][FAR] == "all far above"
    return np.stack([*out, signs, np.eye(m, n) * 1.5, rng.standard_normal((m, n)) / 7])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_view_is_clipped_to_the_nearest_point_or_refused(case):
    w = jnp.asarray(case.weights(0))
    state = state_of(case, w, warmup=0)
    c = 0.6 * float(np.min(case.norms(w)))
    if case.from_dense is None:
        with pytest.raises(ValueError, match=r"w of shape .* no kernel of that kind again"):
            sn_jax.clip_singular_values({"w": w}, state, c)
        return
    expected = case.from_dense(clipped_in_float64(case.to_dense(np.asarray(w)), c))
    for method in METHODS:
        got = sn_jax.clip_singular_values({"w": w}, state, c, method=method)["w"]
        np.testing.assert_allclose(got, expected, atol=1e-12 * c)
    bounds = np.asarray(c * (1 + np.arange(np.prod(case.batch))).reshape(case.batch))
    each = sn_jax.clip_singular_values({"w": w}, state, {"w": jnp.asarray(bounds)})["w"]
    expected = case.from_dense(clipped_in_float64(case.to_dense(np.asarray(w)), bounds))
    np.testing.assert_allclose(each, expected, atol=1e-11 * c)


HALF = [jnp.bfloat16, pytest.param(jnp.float16, marks=needs_float16)]


@pytest.mark.float32
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, *HALF])
def test_the_true_norm_is_under_the_cap(method, dtype):
    """As the brackets of norm_bounds say, too."""
    w = jnp.asarray(spectra(48, 32), dtype)
    for c in (1.0, 0.37):
        state = sn_jax.init({"w": w}, jax.random.key(0), {"w": sn_jax.Matrix()}, warmup=0)
        got = sn_jax.clip_singular_values({"w": w}, state, c, method=method)["w"]
        assert got.dtype == dtype
        _, upper = sn_jax.norm_bounds(np.asarray(got, np.float64), sn_jax.Matrix(), rtol=1e-7)
        assert np.all(upper <= c * (1 + 1e-5))
        before = np.linalg.norm(np.asarray(w, np.float64), 2, (-2, -1))
        after = np.linalg.norm(np.asarray(got, np.float64), 2, (-2, -1))
        close = 1 - (1e-5 if dtype == jnp.float32 else 0.02)
        assert np.all(after >= np.minimum(before, c) * close)
        inside = before < c * (1 - 1e-5)
        np.testing.assert_array_equal(got[inside], w[inside])
        assert np.any(got[inside] != 0)
        expected = clipped_in_float64(np.asarray(w, np.float64), np.full(len(w), c))
        error = np.linalg.norm(np.asarray(got, np.float64) - expected, axis=(-2, -1))
        rounding = svd_rtol(w.shape, jnp.float32) * np.maximum(before, c)
        half = 0 if dtype == jnp.float32 else 0.02 * np.linalg.norm(expected, axis=(-2, -1))
        assert np.all(error <= rounding + half)
        if method == "svd":  # whatever the distance, where all are above
            assert error[FAR] <= 1e-4 * c + np.max(half)


@pytest.mark.float32
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_any_scale_and_what_is_not_finite(scale):
    w = jnp.asarray(scale * spectra(12, 7), jnp.float32)
    state = sn_jax.init({"w": w}, jax.random.key(0), {"w": sn_jax.Matrix()}, warmup=0)
    got = sn_jax.clip_singular_values({"w": w}, state, 0.5 * scale)["w"]
    norms = np.linalg.norm(np.asarray(got, np.float64), 2, (-2, -1)) / scale
    assert np.all(norms <= 0.5 * (1 + 1e-5))
    assert np.all(norms[:8] >= 0.49)
    bad = w.at[0, 0, 0].set(jnp.nan)
    got = sn_jax.clip_singular_values({"w": bad}, state, 0.5 * scale)["w"]
    assert np.isnan(got[0]).any(), "never hidden"
    assert np.isfinite(got[1:]).all()
    empty = {"w": jnp.zeros((0, 4))}
    state = sn_jax.init(empty, jax.random.key(0), {"w": sn_jax.Matrix()})
    assert sn_jax.clip_singular_values(empty, state)["w"].shape == (0, 4)


@pytest.mark.float32
def test_transformations_and_one_compilation():
    w, other = (jnp.asarray(x * spectra(12, 7)[-4:], jnp.float32) for x in (1, 2))
    state = sn_jax.init({"w": w}, jax.random.key(0), {"w": sn_jax.Matrix()}, warmup=0)
    for method in METHODS:

        def clip(w, state, c, method=method):
            return sn_jax.clip_singular_values({"w": w}, state, c, method=method)["w"]

        eager = clip(w, state, 0.9)
        jitted = jax.jit(clip)
        np.testing.assert_allclose(jitted(w, state, 0.9), eager, atol=1e-6)
        with count_compilations() as compiled:
            jitted(w, state, 0.8)  # the cap may be traced
            clip(other, state, 0.9)
        assert not compiled
        alone = sn_jax.init({"w": w[0]}, jax.random.key(0), {"w": sn_jax.Matrix()}, warmup=0)
        each = jax.vmap(clip, (0, None, None))(w, alone, 0.9)
        np.testing.assert_allclose(each, eager, atol=1e-6)


@pytest.mark.float32
def test_a_number_times_a_kernel_is_clipped_as_the_product():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
    for factor, c in ((-0.25, 0.3), (0.0, 0.3)):
        view = sn_jax.Scaled(sn_jax.Matrix(), factor)
        state = sn_jax.init({"w": w}, jax.random.key(0), {"w": view}, warmup=0)
        got = sn_jax.clip_singular_values({"w": w}, state, c)["w"]
        if factor:
            product = np.asarray(factor * got, np.float64)
            expected = clipped_in_float64(np.asarray(factor * w, np.float64), c)
            np.testing.assert_allclose(product, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, w)


@pytest.mark.float32
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_an_optimizers_last_step(method, dtype):
    """Updates after which rounding of params + updates included, the true norm is under the cap."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.standard_normal((3, 16, 12)), dtype), "b": jnp.ones(3, dtype)}
    clip = clip_updates({"w": sn_jax.Matrix()}, bound=sn_jax.rms_bound(0.8), method=method)
    optimizer = optax.chain(optax.sgd(0.5), clip)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    cap = 0.8 * np.sqrt(12 / 16)
    for scale in (0.0, 0.1, 10.0, 0.01):
        grads = jax.tree.map(
            lambda x, scale=scale: jnp.asarray(scale * rng.standard_normal(x.shape), dtype), params
        )
        stepped = np.asarray(params["w"] - 0.5 * grads["w"], np.float64)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        got = np.asarray(params["w"], np.float64)
        assert np.all(np.linalg.norm(got, 2, (-2, -1)) <= cap * (1 + 1e-5))
        if dtype == jnp.float32:
            np.testing.assert_allclose(got, clipped_in_float64(stepped, np.full(3, cap)), atol=1e-4)
    np.testing.assert_array_equal(updates["b"], -0.5 * grads["b"])


def test_errors_are_sentences():
    w = jnp.ones((3, 3, 2, 4))
    rules = {"w": sn_jax.Conv((8, 8), padding="CIRCULAR")}
    params, state = {"w": w}, sn_jax.init({"w": w}, jax.random.key(0), rules)
    with pytest.raises(ValueError, match=r"w of shape .*flattened, as Matrix\(\(0, 1, 2\), 3\)"):
        sn_jax.clip_singular_values(params, state)
    with pytest.raises(ValueError, match=r"w of shape .* as large as the image"):
        clip_updates(rules).init(params)
    state = sn_jax.init(params, jax.random.key(0), {"w": sn_jax.Matrix((0, 1, 2), 3)})
    with pytest.raises(TypeError, match=r"The order is \(params, state\)"):
        sn_jax.clip_singular_values(state, params)
    with pytest.raises(ValueError, match='method must be "svd" or "polar"'):
        sn_jax.clip_singular_values(params, state, method="qr")
    with pytest.raises(ValueError, match="bound for w must be a positive, finite number; got 0"):
        sn_jax.clip_singular_values(params, state, 0)
    flat = clip_updates({"w": sn_jax.Matrix((0, 1, 2), 3)})
    with pytest.raises(ValueError, match="clip_singular_values needs the parameters"):
        flat.update(params, flat.init(params))
