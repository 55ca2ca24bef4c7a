"""What every view must satisfy under every transformation. A new view: add cases to helpers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    by_definition,
    checking_leaks,
    count_compilations,
    needs_float16,
    normalize,
    state_of,
)
from jax.test_util import check_grads

import sn_jax

# Grouped so that one worker compiles what the tests of a case share.
pytestmark = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.xdist_group(case.name), id=case.name) for case in CASES],
)
F32, F64 = jnp.float32, jnp.float64


def test_matvec_is_the_matrix(case):
    w = case.weights(0)
    batch, domain = case.view.batch_shape(w.shape), case.view.domain(w.shape)
    assert batch == case.batch
    x = np.random.default_rng(1).standard_normal((*batch, *domain))
    y = np.asarray(case.view.matvec(jnp.asarray(w), jnp.asarray(x)))
    expected = case.to_dense(w) @ x.reshape(*batch, -1, 1)
    np.testing.assert_allclose(y.reshape(*batch, -1), expected[..., 0], rtol=1e-12, atol=1e-12)


def test_scale_multiplies_each_batch_element(case):
    w = case.weights(0)
    factor = np.arange(1.0, 1 + int(np.prod(case.batch))).reshape(case.batch)
    scaled = case.view.scale(jnp.asarray(w), jnp.asarray(factor))
    np.testing.assert_allclose(
        case.to_dense(np.asarray(scaled)), case.to_dense(w) * factor[..., None, None]
    )


@pytest.mark.parametrize(("gap", "k"), [(0.1, 1), (0.01, 3)])
def test_sigma_converges_to_the_svd(case, gap, k):
    w = jnp.asarray(case.weights(1, gap))
    state = sn_jax.calibrate({"w": w}, state_of(case, w, warmup=1, n_vectors=k), rtol=1e-7)
    np.testing.assert_allclose(state["w"].sigma, case.norms(w), rtol=1e-12)
    norms = sn_jax.spectral_norms({"w": w}, state)["w"]
    np.testing.assert_allclose(norms, case.norms(w), rtol=1e-12)
    normalized = normalize(w, state, bound=0.7)
    np.testing.assert_allclose(case.norms(normalized), 0.7, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_sigma_rises_and_never_exceeds_the_norm(case, k):
    w = jnp.asarray(case.weights(2))
    state = state_of(case, w, warmup=0, n_vectors=k)
    previous = np.zeros(case.batch)
    for _ in range(8):
        _, state = sn_jax.spectral_normalize({"w": w}, state)
        sigma = np.asarray(state["w"].sigma)
        assert np.all(sigma <= case.norms(w) * (1 + case.rtol))
        assert np.all(sigma >= previous * (1 - case.rtol))
        previous = sigma


def test_vectors_are_unit_and_unflattened(case):
    w = jnp.asarray(case.weights(2))
    for k in (1, 2):
        singular = state_of(case, w, n_vectors=k)["w"]
        assert singular.v.shape == (*case.batch, k, *case.view.domain(w.shape))
        for x in (singular.u, singular.v):
            axes = tuple(range(len(case.batch) + 1, x.ndim))
            np.testing.assert_allclose(np.sum(np.square(x), axes), 1, rtol=1e-12)


def test_gradient_is_the_closed_form(case):
    """Miyato et al. (2018), equation 12: (G - <G, W_bar> u v^T) / sigma."""
    w = jnp.asarray(case.weights(3))
    state = state_of(case, w, warmup=1)  # not converged: the formula holds all the same
    g = jnp.asarray(np.random.default_rng(4).standard_normal(w.shape))
    grad = jax.grad(lambda w: jnp.sum(g * normalize(w, state, n_steps=0)))(w)
    dense_w, dense_g, dense_grad = (case.to_dense(np.asarray(x)) for x in (w, g, grad))
    b = len(case.batch)
    u = np.asarray(state["w"].u).reshape(*case.batch, -1, 1)
    v = np.asarray(state["w"].v).reshape(*case.batch, 1, -1)
    sigma = np.sum(u * dense_w * v, (-2, -1), keepdims=True)
    inner = np.sum(dense_g * dense_w / sigma, (-2, -1), keepdims=True)
    if case.from_dense is not None:
        np.testing.assert_allclose(dense_grad, (dense_g - inner * u * v) / sigma, atol=1e-12)
    orthogonal = jnp.sum(grad * w, tuple(range(b, w.ndim))) if b == 0 else jnp.sum(grad * w)
    np.testing.assert_allclose(orthogonal, 0, atol=1e-10)


def test_gradient_is_that_of_the_true_norm_once_converged(case):
    w = jnp.asarray(case.weights(5))
    state = sn_jax.calibrate({"w": w}, state_of(case, w), rtol=1e-10, max_steps=5000)
    g = jnp.asarray(np.random.default_rng(6).standard_normal(w.shape))

    def exact(w):
        columns = jax.vmap(case.view.matvec, (None, -1), -1)
        domain = case.view.domain(w.shape)
        basis = jnp.eye(int(np.prod(domain))).reshape(*domain, -1)
        basis = jnp.broadcast_to(basis, (*case.batch, *basis.shape))
        dense = columns(w, basis)
        dense = dense.reshape(*case.batch, -1, dense.shape[-1])
        return jnp.sum(g * case.view.scale(w, 1 / jnp.linalg.norm(dense, 2, (-2, -1))))

    ours = jax.grad(lambda w: jnp.sum(g * normalize(w, state, n_steps=0)))(w)
    np.testing.assert_allclose(ours, jax.grad(exact)(w), atol=1e-8)


def test_every_derivative_is_that_of_the_definition(case):
    w = jnp.asarray(case.weights(7))
    state = state_of(case, w, warmup=1)
    _, after = sn_jax.spectral_normalize({"w": w}, state, n_steps=2)
    rng = np.random.default_rng(8)
    a, b = (jnp.asarray(rng.standard_normal(w.shape)) for _ in range(2))

    def ours(w):
        return jnp.sum(jnp.sin(a * normalize(w, state, n_steps=2)))

    def definition(w):  # the vectors after two steps from here, held constant
        return jnp.sum(jnp.sin(a * by_definition(case, w, after)))

    def penalty(f):  # reverse over reverse, as in a gradient penalty
        return jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2))

    def forward_over_reverse(f):
        return lambda w: jax.jvp(jax.grad(f), (w,), (b,))[1]

    def forward_over_forward(f):
        return lambda w: jax.jvp(lambda w: jax.jvp(f, (w,), (b,))[1], (w,), (a,))[1]

    transforms = {
        "grad": jax.grad,
        "jvp": lambda f: lambda w: jax.jvp(f, (w,), (b,))[1],
        "jacfwd": jax.jacfwd,
        "reverse over reverse": penalty,
        "forward over reverse": forward_over_reverse,
        "forward over forward": forward_over_forward,
        "reverse over forward": lambda f: jax.grad(lambda w: jax.jvp(f, (w,), (b,))[1]),
        "grad of jit": lambda f: jax.grad(jax.jit(f)),
    }
    for name, got, expected in zip(
        transforms,
        jax.jit(lambda w: [transform(ours)(w) for transform in transforms.values()])(w),
        jax.jit(lambda w: [transform(definition)(w) for transform in transforms.values()])(w),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=name)
    check_grads(jax.jit(definition), (w,), order=1, modes=["rev"])  # the yardstick itself


def test_traced_steps_give_the_same_values_and_gradients(case):
    w = jnp.asarray(case.weights(9))
    state = state_of(case, w, n_vectors=2)

    def loss(w, n):
        normalized, new = sn_jax.spectral_normalize({"w": w}, state, n_steps=n)
        return jnp.sum(normalized["w"] ** 3), new

    both = jax.value_and_grad(loss, has_aux=True)
    traced, numbers = jax.jit(both), (0, 1, 3)
    static = jax.jit(lambda w: [both(w, n) for n in numbers])(w)
    for n, expected in zip(numbers, static, strict=True):
        got = traced(w, n)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, expected)
        if n == 0:
            jax.tree.map(np.testing.assert_array_equal, got[0][1], state)


def test_jit_equals_eager_and_vmap_equals_a_loop(case):
    ws = jnp.stack([jnp.asarray(case.weights(seed)) for seed in (10, 11)])
    states = [state_of(case, w) for w in ws]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    step = partial(sn_jax.spectral_normalize, n_steps=2)
    eager = [step({"w": w}, s) for w, s in zip(ws, states, strict=True)]
    jitted = [jax.jit(step)({"w": w}, s) for w, s in zip(ws, states, strict=True)]
    mapped = jax.vmap(step)({"w": ws}, stacked)
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, eager, jitted)
    jax.tree.map(close, jax.tree.map(lambda *xs: jnp.stack(xs), *eager), mapped)


def test_scan_carries_the_state(case):
    w = jnp.asarray(case.weights(12))
    state = state_of(case, w, warmup=0)

    def body(state, _):
        return sn_jax.spectral_normalize({"w": w}, state)[1], None

    scanned, _ = jax.lax.scan(body, state, None, length=3)
    _, stepped = sn_jax.spectral_normalize({"w": w}, state, n_steps=3)
    np.testing.assert_allclose(scanned["w"].u, stepped["w"].u, atol=1e-12)


def test_nothing_leaks_or_compiles_twice(case):
    w = jnp.asarray(case.weights(13), F32)

    def everything(w, seed):
        state = state_of(case, w, seed)
        normalized, state = sn_jax.spectral_normalize({"w": w}, state, bound=1.0 + seed)
        state = sn_jax.calibrate(normalized, state, rtol=1e-2 / (1 + seed))
        sn_jax.spectral_penalty(normalized, state)
        return sn_jax.spectral_norms(normalized, state)

    with checking_leaks():  # seen by tracing alone
        jax.jit(everything, static_argnums=1).trace(w, 0)
    everything(w, 1)
    other = w + 1
    with count_compilations() as compiled:
        everything(other, 2)
    assert not compiled


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        pytest.param(jnp.float16, "divide", marks=needs_float16),
        (jnp.bfloat16, "clip"),
        (F32, "divide"),
        (F64, "clip"),
    ],
)
def test_dtype_and_structure_are_kept(case, dtype, mode):
    w = jnp.asarray(case.weights(14), dtype)
    params = {"w": w, "bias": jnp.ones(3, dtype), "step": 7}
    state = sn_jax.init(params, jax.random.key(0), {"w": case.view}, warmup=60)
    normalized, new = sn_jax.spectral_normalize(params, state, bound=0.5, mode=mode)
    assert normalized["w"].dtype == dtype
    assert normalized["bias"] is params["bias"]
    assert normalized["step"] == 7
    assert jax.tree.structure(normalized) == jax.tree.structure(params)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, new)
    assert jax.tree.all(same)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert new["w"].u.dtype == (F64 if dtype == F64 else F32)
    # bfloat16 rounds the result, not the iteration
    np.testing.assert_allclose(np.asarray(new["w"].sigma), case.norms(w.astype(F64)), rtol=0.02)
    eps = float(jnp.finfo(dtype).eps)
    ratio = case.norms(normalized["w"].astype(F64)) * np.asarray(new["w"].sigma)
    rtol = 2 * eps + case.rtol  # of the entries' rounding, and of the two SVDs
    np.testing.assert_allclose(ratio, 0.5 * case.norms(w.astype(F64)), rtol=rtol)


@pytest.mark.parametrize("k", [1, 2])
def test_scale_invariance(case, k):
    w = np.asarray(case.weights(15), np.float32)

    @jax.jit
    def value_and_grad(w):
        state = state_of(case, w, n_vectors=k)
        value, pullback = jax.vjp(lambda w: jnp.sin(normalize(w, state)), w)
        return value, pullback(jnp.ones_like(w))[0]

    value, grad = value_and_grad(w)
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        scaled_value, scaled_grad = value_and_grad(w * np.float32(scale))
        np.testing.assert_allclose(scaled_value, value, rtol=2e-5, atol=1e-6)
        scaled_grad = np.asarray(scaled_grad, np.float64) * scale
        np.testing.assert_allclose(scaled_grad, grad, rtol=2e-3, atol=2e-5)
    # Where float32 ends: right or NaN, never left as it was.
    huge = np.asarray(value_and_grad(w * np.float32(1e38))[0])
    assert np.all(np.isnan(huge) | np.isclose(huge, value, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize(("k", "mode"), [(1, "divide"), (2, "clip")])
def test_zero_gives_zero_finite_gradients_and_recovers(case, k, mode):
    zero = jnp.zeros(case.shape, F32)
    state = state_of(case, zero, n_vectors=k)

    def loss(w):
        return jnp.sum(normalize(w, state, mode=mode) * 3)

    value, grad = jax.jit(jax.value_and_grad(loss))(zero)
    assert value == 0
    np.testing.assert_array_equal(grad, jnp.full(case.shape, 3.0, F32))
    step = partial(sn_jax.spectral_normalize, n_steps=60, mode=mode)
    _, state = step({"w": zero}, state)
    assert np.all(np.asarray(state["w"].sigma) == 0)
    w = jnp.asarray(case.weights(16), F32)
    _, state = step({"w": w}, state)
    np.testing.assert_allclose(state["w"].sigma, case.norms(w), rtol=1e-4)


@pytest.mark.parametrize(
    ("bad", "k", "mode"), [(np.nan, 1, "clip"), (np.inf, 1, "divide"), (-np.inf, 2, "clip")]
)
def test_non_finite_weights_are_not_hidden_and_recover(case, bad, k, mode):
    w = jnp.asarray(case.weights(17), F32)
    state = state_of(case, w, n_vectors=k)
    broken = w.at[(0,) * w.ndim].set(bad)
    step = partial(sn_jax.spectral_normalize, n_steps=60, mode=mode)
    normalized, after = step({"w": broken}, state)
    dense = case.to_dense(np.asarray(normalized["w"])).reshape(*case.batch, -1)
    index = (0,) * len(case.batch)
    assert not np.any(np.isfinite(dense[index][dense[index] != 0]))
    if case.batch:  # the other heads or layers are untouched
        assert np.isfinite(dense[tuple(n - 1 for n in case.batch)]).all()
    for x in (after["w"].u, after["w"].v):
        assert np.isfinite(x).all()
    _, after = step({"w": w}, after)
    np.testing.assert_allclose(after["w"].sigma, case.norms(w), rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_rank_one_and_tied(case, k):
    if case.from_dense is None:
        pytest.skip("the view does not reach every matrix")
    shape = case.to_dense(np.zeros(case.shape)).shape
    rng = np.random.default_rng(18)
    rank_one = rng.standard_normal((*shape[:-1], 1)) * rng.standard_normal(
        (*shape[:-2], 1, shape[-1])
    )
    tied = np.broadcast_to(np.eye(*shape[-2:]), shape)
    for dense in (rank_one, tied):
        w = jnp.asarray(case.from_dense(np.array(dense)), F32)
        state = state_of(case, w, n_vectors=k)
        for _ in range(3):
            _, state = sn_jax.spectral_normalize({"w": w}, state)
        np.testing.assert_allclose(state["w"].sigma, case.norms(w), rtol=1e-5)
        grad = jax.grad(lambda w, s=state: jnp.sum(normalize(w, s) ** 3))(w)
        assert np.isfinite(grad).all()


def test_clip_scales_down_only(case):
    w = jnp.asarray(case.weights(19))
    norms = case.norms(w)
    state = sn_jax.calibrate({"w": w}, state_of(case, w), rtol=1e-8, max_steps=5000)
    above = normalize(w, state, bound=0.5 * norms.min(), mode="clip")
    np.testing.assert_allclose(case.norms(above), 0.5 * norms.min(), rtol=1e-9)
    below = normalize(w, state, bound=2 * norms.max(), mode="clip")
    np.testing.assert_array_equal(below, w)
    grad = jax.grad(lambda w: jnp.sum(normalize(w, state, bound=2 * norms.max(), mode="clip")))(w)
    np.testing.assert_array_equal(grad, jnp.ones_like(w))


def test_a_bound_from_rms_to_rms(case):
    """c sqrt(n_out / n_in) of the matrix, however the view makes it; wherever bound= is taken."""
    w = jnp.asarray(case.weights(24))
    state = sn_jax.calibrate({"w": w}, state_of(case, w), rtol=1e-8, max_steps=5000)
    *_, n_out, n_in = case.to_dense(np.asarray(w)).shape
    radius = 0.3 * np.sqrt(n_out / n_in)
    for bound in (sn_jax.rms_bound(0.3), {"w": sn_jax.rms_bound(jnp.full(case.batch, 0.3))}):
        np.testing.assert_allclose(case.norms(normalize(w, state, bound=bound)), radius, rtol=1e-9)
    traced = jax.jit(lambda c: normalize(w, state, bound=sn_jax.rms_bound(c)))(0.3)
    np.testing.assert_allclose(case.norms(traced), radius, rtol=1e-9)


def test_stopped_gradient_holds_sigma_constant(case):
    w = jnp.asarray(case.weights(20))
    state = state_of(case, w)
    sigma = sn_jax.spectral_norms({"w": w}, state)["w"]
    grad = jax.grad(lambda w: jnp.sum(normalize(w, state, n_steps=0, gradient="stop")))(w)
    np.testing.assert_allclose(grad, case.view.scale(jnp.ones_like(w), 1 / sigma), rtol=1e-12)


def test_penalty_and_its_gradient(case):
    w = jnp.asarray(case.weights(21))
    state = sn_jax.calibrate({"w": w}, state_of(case, w), rtol=1e-9, max_steps=5000)
    value, grad = jax.value_and_grad(lambda w: sn_jax.spectral_penalty({"w": w}, state))(w)
    np.testing.assert_allclose(value, 0.5 * np.sum(case.norms(w) ** 2), rtol=1e-10)
    # <grad, W> = sum sigma^2, as sigma u v^T says (Yoshida & Miyato 2017)
    np.testing.assert_allclose(jnp.sum(grad * w), np.sum(case.norms(w) ** 2), rtol=1e-10)


def test_penalty_with_a_target_and_a_power(case):
    """Each batch element is pulled to its target: less than the norm, the norm, more."""
    w = jnp.asarray(case.weights(21))
    state = sn_jax.calibrate({"w": w}, state_of(case, w), rtol=1e-9, max_steps=5000)
    norms = case.norms(w)
    for power, targets in ((None, 0.9 * norms), (2, norms), (3, {"w": 1.1 * norms})):
        t = np.asarray(targets["w"] if isinstance(targets, dict) else targets)
        targets = jax.tree.map(jnp.asarray, targets)
        value, grad = jax.value_and_grad(
            lambda w, k=power, t=targets: sn_jax.spectral_penalty(
                {"w": w}, state, target=t, power=k
            )
        )(w)
        k = power or 1
        expected = np.sum((norms**k - t**k) ** 2) * (1 if power else 0.5)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
        # <grad, W> = sum sigma d penalty / d sigma
        slope = (norms**k - t**k) * k * norms ** (k - 1) * (2 if power else 1)
        np.testing.assert_allclose(jnp.sum(grad * w), np.sum(norms * slope), rtol=1e-8, atol=1e-8)


def test_averaged_or_scaled_vectors_do_not_change_sigma(case):
    """REFERENCE: an exponential average of the state shrinks u; sigma must not follow."""
    w = jnp.asarray(case.weights(22))
    state = state_of(case, w)
    sigma = sn_jax.spectral_norms({"w": w}, state)["w"]
    shrunk = jax.tree.map(lambda x: 1e-3 * x, state)
    np.testing.assert_allclose(sn_jax.spectral_norms({"w": w}, shrunk)["w"], sigma, rtol=1e-12)


def test_a_sign_flip_of_the_weights_flips_nothing_else(case):
    w = jnp.asarray(case.weights(23))
    state = state_of(case, w)
    np.testing.assert_allclose(
        normalize(-w, state, n_steps=0), -normalize(w, state, n_steps=0), rtol=1e-12
    )
