"""Spectra and statistics of every view against SVDs of its explicit matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, count_compilations, needs_float16, state_of, svd_rtol
from jax.test_util import check_grads

import sn_jax

KEY = jax.random.key(0)


def basis_matrix(view, w):
    """(*batch, out, in) of any view, column by column through its own products."""
    batch, domain = view.batch_shape(w.shape), view.domain(w.shape)
    n = int(np.prod(domain))
    basis = np.broadcast_to(np.eye(n).reshape(n, *(1,) * len(batch), *domain), (n, *batch, *domain))
    columns = jax.vmap(view.matvec, (None, 0))(jnp.asarray(w), jnp.asarray(basis))
    return np.moveaxis(np.asarray(columns).reshape(n, *batch, -1), 0, -1)


CONVS = {
    "circular": (sn_jax.Conv((6, 5), padding="CIRCULAR"), (3, 3, 2, 4)),
    "circular, strides": (sn_jax.Conv((6, 8), strides=2, padding="CIRCULAR"), (3, 3, 3, 2)),
    "circular, a stride that does not divide": (
        sn_jax.Conv((5, 6), strides=2, padding="CIRCULAR"), (3, 3, 2, 2)),
    "circular, a kernel larger than the image": (sn_jax.Conv(3, padding="CIRCULAR"), (5, 2, 3)),
    "circular, one tap": (sn_jax.Conv((4, 6), strides=2, padding="CIRCULAR"), (1, 1, 3, 2)),
    "circular, transposed": (
        sn_jax.Conv((3, 4), strides=2, padding="CIRCULAR", transpose=True), (3, 3, 2, 2)),
    "reflected": (sn_jax.Conv((4, 3), padding="REFLECT"), (3, 5, 2, 2)),
    "groups": (sn_jax.Conv((5, 4), feature_group_count=2), (3, 3, 2, 4)),
    "circular groups": (sn_jax.Conv(6, padding="CIRCULAR", feature_group_count=2), (3, 2, 6)),
    "dilated": (sn_jax.Conv(8, padding=2, kernel_dilation=2, input_dilation=2), (3, 2, 3)),
    "transposed": (sn_jax.Conv((3, 4), strides=2, transpose=True), (3, 3, 2, 3)),
    "flax transposed kernel": (
        sn_jax.Conv(4, strides=2, transpose=True, transpose_kernel=True), (3, 2, 3)),
    "a stack": (sn_jax.Conv((4, 4), batch_axes=(3,)), (3, 3, 2, 3, 2)),
    "a circular stack": (sn_jax.Conv(4, padding="CIRCULAR"), (2, 3, 2, 3)),
}  # fmt: skip


def examples():
    for case in CASES:
        yield pytest.param(case.view, case.weights(0), id=case.name)
    for name, (view, shape) in CONVS.items():
        yield pytest.param(view, np.random.default_rng(1).standard_normal(shape), id=name)


@pytest.mark.parametrize(("view", "w"), [*examples()])
def test_singular_values_and_the_norm_of_the_map(view, w):
    matrix = basis_matrix(view, w)
    s = np.linalg.svd(matrix, compute_uv=False)
    rtol = svd_rtol(matrix.shape)
    got = sn_jax.singular_values(w, view)
    assert got.shape == s.shape
    np.testing.assert_allclose(got, s, atol=rtol * s.max())
    np.testing.assert_allclose(sn_jax.singular_values(w, view, k=2), s[..., :2], rtol=rtol)

    params, rules = {"w": jnp.asarray(w)}, {"w": view}
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY, rules), rtol=1e-7, max_steps=20_000)
    stats = jax.jit(sn_jax.spectral_stats)(params, state)["w"]
    np.testing.assert_allclose(stats.frobenius, np.linalg.norm(matrix, axis=(-2, -1)), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, s[..., 0], rtol=1e-10)
    np.testing.assert_allclose(stats.stable_rank, np.sum((s / s[..., :1]) ** 2, -1), rtol=1e-9)
    ratio = np.sqrt(matrix.shape[-1] / matrix.shape[-2])
    np.testing.assert_allclose(stats.rms, s[..., 0] * ratio, rtol=1e-10)


def test_how_often_taps_of_a_strided_convolution_count():
    """Of 3 x 3 x 4 x 5 on 8 x 8, SAME, stride 2: 16 outputs, and the border takes some."""
    counts = [16, 16, 12, 16, 16, 12, 12, 12, 9]
    w = np.random.default_rng(0).standard_normal((3, 3, 4, 5))
    params = {"w": jnp.asarray(w)}
    state = sn_jax.init(params, KEY, {"w": sn_jax.Conv((8, 8), strides=2)}, warmup=0)
    squares = np.sum(w**2, (2, 3)).ravel()
    got = sn_jax.spectral_stats(params, state)["w"].frobenius
    np.testing.assert_allclose(got**2, np.sum(counts * squares), rtol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frobenius_norms_are_differentiable(case):
    w = jnp.asarray(case.weights(0))
    state = state_of(case, w)
    check_grads(
        lambda w: sn_jax.spectral_stats({"w": w}, state)["w"].stable_rank, (w,), 1, ("fwd", "rev")
    )


HALF = [jnp.bfloat16, pytest.param(jnp.float16, marks=needs_float16)]


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [jnp.float32, *HALF])
def test_every_dtype_and_scale(dtype):
    case, scales = CASES[3], [1e-30, 1e30] if dtype == jnp.float32 else [1e-3, 1.0]
    for scale in scales:
        w = jnp.asarray(scale * case.weights(0), dtype)
        stats = sn_jax.spectral_stats({"w": w}, state_of(case, w, warmup=60))["w"]
        dense = case.to_dense(np.asarray(w, np.float64))
        assert stats.frobenius.dtype == jnp.float32
        np.testing.assert_allclose(stats.frobenius, np.linalg.norm(dense), rtol=1e-5)
        expected = (np.linalg.norm(dense) / np.linalg.norm(dense, 2)) ** 2
        np.testing.assert_allclose(stats.stable_rank, expected, rtol=1e-2)
        np.testing.assert_allclose(
            sn_jax.singular_values(w, case.view),
            np.linalg.svd(dense, compute_uv=False),
            atol=1e-12 * np.linalg.norm(dense),
        )


@pytest.mark.float32
def test_zero_empty_and_not_finite():
    view = sn_jax.Matrix()
    for w, expected in ((jnp.zeros((2, 4, 3)), 0.0), (jnp.full((2, 4, 3), jnp.inf), np.nan)):
        state = sn_jax.init({"w": w}, KEY, {"w": view})
        np.testing.assert_array_equal(
            sn_jax.spectral_stats({"w": w}, state)["w"].stable_rank, expected
        )
    np.testing.assert_array_equal(sn_jax.singular_values(jnp.zeros((4, 3))), np.zeros(3))
    assert sn_jax.singular_values(jnp.zeros((0, 3))).shape == (0,)
    empty = {"w": jnp.zeros((0, 3))}
    stats = sn_jax.spectral_stats(empty, sn_jax.init(empty, KEY, {"w": view}))["w"]
    assert [float(x) for x in stats] == [0, 0, 0, 0]


def test_the_largest_of_many_by_iteration():
    """Ties among them, and the same for a matrix and a map without one."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 600)))[0] for n in (700, 600))
    s = np.sort(np.concatenate([[3.0, 3.0, 2.0, 2.0, 2.0], rng.uniform(0, 1.5, 595)]))[::-1]
    w = (u * s) @ v.T
    for view in (sn_jax.Matrix(), sn_jax.Linear(transposed_product, 700)):
        got = sn_jax.singular_values(w, view, k=6)
        np.testing.assert_allclose(got, s[:6], rtol=1e-9)


def transposed_product(w, x):
    return w.T @ x


def test_flat_scalars_for_a_logger():
    params = {"heads": jnp.ones((4, 3, 2)), "out": jnp.ones((2, 2))}
    rules = {"heads": sn_jax.Matrix(0, 2), "out": sn_jax.Matrix()}
    state = sn_jax.init(params, KEY, rules)
    stats = sn_jax.spectral_stats(params, state)
    flat = sn_jax.flat_scalars(stats)
    assert len(flat) == 4 * 4
    assert flat["heads[2]/sigma"] == stats["heads"].sigma[2]
    assert flat["out/stable_rank"].shape == ()
    reduced = sn_jax.flat_scalars(stats, reduce=jnp.mean)
    assert reduced["heads/rms"] == jnp.mean(stats["heads"].rms)
    assert {*sn_jax.flat_scalars(sn_jax.spectral_norms(params, state))} == {
        "heads[0]", "heads[1]", "heads[2]", "out",
    }  # fmt: skip
    grid = sn_jax.flat_scalars({"w": jnp.ones((2, 3))})
    assert [*grid][-1] == "w[1,2]"
    with pytest.raises(TypeError, match=r"reduce must return a scalar.* heads/sigma .* \(3,\)"):
        sn_jax.flat_scalars(stats, reduce=jnp.cumsum)


def test_in_a_jitted_step_nothing_compiles_twice():
    params, others = ({"w": jnp.asarray(CASES[3].weights(seed))} for seed in (0, 1))
    state = sn_jax.init(params, KEY, {"w": CASES[3].view})
    step = jax.jit(lambda params: sn_jax.flat_scalars(sn_jax.spectral_stats(params, state)))
    step(params)
    with count_compilations() as compiled:
        step(others)
    assert not compiled


def test_norm_of_attention_logits_per_head():
    """The three-liner of docs/spectra.md: queries and keys together, against the SVD."""
    q, k = np.random.default_rng(0).standard_normal((2, 12, 3, 4))
    bilinear = np.einsum("ihd,jhd->hij", q, k) / 2
    q, k, d = jnp.asarray(q), jnp.asarray(k), 4

    def logits(x):
        return jnp.einsum("ihd,hd->hi", q, jnp.einsum("jhd,hj->hd", k, x)) / d**0.5

    v0 = jax.random.normal(KEY, (3, 12))
    sigma = sn_jax.power_iteration(logits, v0, 200, batch_ndim=1).sigma
    np.testing.assert_allclose(sigma, np.linalg.norm(bilinear, 2, (-2, -1)), rtol=1e-9)


def test_errors_are_sentences():
    w = np.ones((4, 3))
    for k in (0, 4, 1.0):
        with pytest.raises(ValueError, match=r"k must be an integer from 1 to 3.*\(4, 3\)"):
            sn_jax.singular_values(w, k=k)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(sn_jax.singular_values)(w)
    large = sn_jax.Linear(weighted, 5000)
    with pytest.raises(ValueError, match=r"5000 singular values.* give k, at most 500"):
        sn_jax.singular_values(np.ones(5000), large)
    with pytest.raises(ValueError, match="1 of 12 weights"):
        sn_jax.singular_values(np.where(np.arange(12).reshape(4, 3) == 1, np.nan, 1.0))


def weighted(w, x):
    return w * x
