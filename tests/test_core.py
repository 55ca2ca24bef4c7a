"""The functional API on one matrix and on whole trees: golden values, containers, errors."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    HAS_FLOAT16,
    count_compilations,
    known_spectrum,
    state_of,
    svd_rtol,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sn_jax
from sn_jax import Matrix

W = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
G = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
KEY = jax.random.key(0)


def golden_state(view, u, v):
    return {"w": sn_jax.Singular(jnp.array([u]), jnp.array([v]), jnp.ones(()), view)}


HOOK = golden_state(Matrix(1, 0), [1.0, 0.0, 0.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("n_steps", "sigma"), [(1, 9.327379053), (2, 9.525516354), (3, 9.525518092)]
)
def test_torch_hook_order(n_steps, sigma):
    """torch.nn.utils.spectral_norm: v from u, then u."""
    _, state = sn_jax.spectral_normalize({"w": W}, HOOK, n_steps=n_steps)
    np.testing.assert_allclose(state["w"].sigma, sigma, rtol=1e-9)
    if n_steps == 1:
        np.testing.assert_allclose(state["w"].u[0], [0.23973165, 0.52740963, 0.81508761], atol=1e-8)
        np.testing.assert_allclose(state["w"].v[0], [0.4472136, 0.89442719], atol=1e-8)


@pytest.mark.parametrize(
    ("n_steps", "sigma"), [(1, 9.503382856), (2, 9.525517903), (3, 9.525518092)]
)
def test_torch_parametrization_order(n_steps, sigma):
    """torch's newer API iterates u from v first: the same steps on the transposed map."""
    state = golden_state(Matrix(0, 1), [1.0, 0.0], [1.0, 0.0, 0.0])
    _, state = sn_jax.spectral_normalize({"w": W}, state, n_steps=n_steps)
    np.testing.assert_allclose(state["w"].sigma, sigma, rtol=1e-9)


def test_torch_gradient():
    grad = jax.grad(lambda w: jnp.sum(G * sn_jax.spectral_normalize({"w": w}, HOOK)[0]["w"]))(W)
    expected = [[0.087494241, -0.039434024], [-0.043377427, 0.0204564], [0.040173412, -0.026864429]]
    np.testing.assert_allclose(grad, expected, atol=1e-9)


def test_convergence_rate_is_the_fourth_power_of_the_ratio():
    """sigma errs by O((sigma_2 / sigma_1)^(4k)): .9^4 = .656 a step (REFERENCE)."""
    w = np.diag([1.0, 0.9])
    state = golden_state(Matrix(1, 0), [1.0, 1.0], [1.0, 1.0])
    errors = []
    for n in (10, 11, 12):
        _, new = sn_jax.spectral_normalize({"w": w}, state, n_steps=n)
        errors.append(1 - float(new["w"].sigma))
    np.testing.assert_allclose(errors[1] / errors[0], 0.9**4, rtol=0.02)
    np.testing.assert_allclose(errors[2] / errors[1], 0.9**4, rtol=0.02)


def test_four_vectors_track_a_drifting_matrix_more_closely():
    rng = np.random.default_rng(0)
    drift = 0.02
    w = rng.standard_normal((192, 192))
    states = {k: sn_jax.init({"w": w}, KEY, n_vectors=k) for k in (1, 4)}
    errors = {1: [], 4: []}
    for _ in range(60):
        w = (1 - drift**2) ** 0.5 * w + drift * rng.standard_normal(w.shape)
        norm = np.linalg.norm(w, 2)
        for k in states:
            _, states[k] = sn_jax.spectral_normalize({"w": w}, states[k])
            errors[k].append(1 - float(states[k]["w"].sigma) / norm)
    assert np.mean(errors[4][10:]) < 0.2 * np.mean(errors[1][10:])


def test_several_vectors_take_shifted_steps():
    """Of diag(1, .95, .9, .9, ...), two vectors lose .9^2 = .81 a step without a shift. Less half
    of .95^2 it is (.81 - .451) / (1 - .451) = .65: after 30 steps 3e-6 in place of 2e-3."""
    w = jnp.diag(jnp.array([1, 0.95, *[0.9] * 6]))
    state = sn_jax.init({"w": w}, KEY, n_vectors=2, warmup=0)
    for _ in range(30):
        _, state = sn_jax.spectral_normalize({"w": w}, state)
    missed = np.eye(8)[0] - np.asarray(state["w"].v).T @ np.asarray(state["w"].v)[:, 0]
    assert np.linalg.norm(missed) < 1e-4


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, np.inf])
def test_several_vectors_recover_from_any_stored_v(scale):
    w = jnp.asarray(known_spectrum(np.random.default_rng(2), (8, 6), gap=0.3), jnp.float32)
    start = sn_jax.init({"w": w}, KEY, n_vectors=2, warmup=0)["w"]
    v = jnp.asarray(np.random.default_rng(3).standard_normal(start.v.shape) * scale, jnp.float32)
    state = {"w": sn_jax.Singular(start.u, v, start.sigma, start.view)}
    for _ in range(20):
        _, state = sn_jax.spectral_normalize({"w": w}, state)
        assert np.isfinite(state["w"].sigma)
    np.testing.assert_allclose(state["w"].sigma, 1, rtol=svd_rtol((8, 6), "float32"))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_maps_of_single_numbers_at_all_scales(shape):
    """A vector of one number: XLA multiplies constants with each other that it is scaled by."""
    w = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    for scale in (1e-30, 1e-15, 1.0, 1e15, 1e30):
        scaled = jnp.asarray(w * np.float32(scale))
        normalized, state = sn_jax.spectral_normalize(
            {"w": scaled}, sn_jax.init({"w": scaled}, KEY, warmup=2)
        )
        np.testing.assert_allclose(state["w"].sigma, np.linalg.norm(w) * scale, rtol=1e-6)
        np.testing.assert_allclose(normalized["w"], w / np.linalg.norm(w), rtol=2e-6)


@pytest.mark.parametrize("exponent", [-31, -28, -19, -12, 0, 10, 17, 19, 26, 37])
def test_lengths_have_no_gap_between_their_scales(exponent):
    """Across all of float32 and for entries of very different sizes, as in float64."""
    x = np.random.default_rng(5).standard_normal(40).astype(np.float32)
    x = (x * np.float32(10) ** np.linspace(-4, 0, 40, dtype=np.float32)).astype(np.float64)
    w = jnp.asarray((x * 10.0**exponent)[:, None], jnp.float32)
    state = sn_jax.init({"w": w}, KEY, warmup=1)["w"]
    exact = np.asarray(w[:, 0], np.float64)
    np.testing.assert_allclose(state.sigma, np.linalg.norm(exact), rtol=1e-6)
    np.testing.assert_allclose(np.abs(state.v[0]), np.abs(exact) / np.linalg.norm(exact), rtol=1e-6)


def test_update_and_loss_share_their_product():
    """The update's A v is the loss's own, with n_steps=0: two products in all, and no third."""
    params = {"w": jnp.ones((48, 32))}
    state = sn_jax.init(params, KEY)

    def step(params, state):
        _, state = sn_jax.spectral_normalize(params, state)

        def loss(params):
            normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
            return jnp.sum(normalized["w"] ** 3)

        return jax.grad(loss)(params), state

    program = jax.jit(step).lower(params, state).compile().as_text()
    assert len(re.findall(r" dot\(|custom-call\(.*(?:gemm|matmul)", program)) == 2


def test_calibrate_resolves_a_small_gap_and_stops_at_max_steps():
    w = jnp.asarray(known_spectrum(np.random.default_rng(0), (40, 30), gap=1e-3))
    state = sn_jax.init({"w": w}, KEY, warmup=0)
    done = sn_jax.calibrate({"w": w}, state, rtol=1e-6, max_steps=20_000)
    np.testing.assert_allclose(done["w"].sigma, 1, rtol=1e-9)
    sigma, u, v = (np.asarray(x).squeeze() for x in (done["w"].sigma, done["w"].u, done["w"].v))
    assert 1e-7 < np.linalg.norm(w @ u - sigma * v) <= 1e-6  # the kernel is (in, out)
    np.testing.assert_allclose(v @ w, sigma * u, atol=1e-12)
    with pytest.warns(UserWarning, match=r"2 steps.*above rtol = 1e-12: w\."):
        stopped = sn_jax.calibrate({"w": w}, state, rtol=1e-12, max_steps=2)
    _, two = sn_jax.spectral_normalize({"w": w}, state, n_steps=2)
    np.testing.assert_allclose(stopped["w"].u, two["w"].u, atol=1e-12)


@dataclass
class Layer:
    kernel: Any
    bias: Any


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])


class Pair(NamedTuple):
    w: Any
    b: Any


def test_every_container():
    k1, k2 = jax.random.split(KEY)
    kernel, other = jax.random.normal(k1, (4, 6)), jax.random.normal(k2, (5, 3))
    bias = jnp.ones(6)
    trees = {
        "a/b/kernel": {"a": {"b": {"kernel": kernel, "bias": bias}}},
        "0/kernel": [{"kernel": kernel}, {"bias": bias}],
        "layer/kernel": {"layer": Layer(kernel, bias)},
        "1/w": (bias, Pair(kernel, bias)),
        "enc/kernel": flax.core.freeze({"enc": {"kernel": kernel, "bias": bias}}),
        "value": {"value": kernel, "none": None},
    }
    for path, params in trees.items():
        rules = {r"value": Matrix()} if path == "value" else None
        state = sn_jax.init(params, KEY, rules)
        assert list(state) == [path]
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=30)
        assert jax.tree.structure(normalized) == jax.tree.structure(params)
        norms = [np.linalg.norm(x, 2) for x in jax.tree.leaves(normalized) if x.ndim == 2]
        np.testing.assert_allclose(norms, 1, rtol=1e-5)
        untouched = [x for x in jax.tree.leaves(normalized) if x.ndim == 1]
        assert all(x is bias for x in untouched)
    assert sn_jax.init({"x": {"kernel": kernel}, "y": {"w": other}}, KEY).keys() == {
        "x/kernel", "y/w",
    }  # fmt: skip


def test_default_rules():
    def shapes(name, shape):
        return sn_jax.init({"kernel": jnp.ones((2, 3)), name: jnp.ones(shape)}, KEY)

    for name in ("weight", "embeddings", "weight_ih", "weight_hh", "w_i", "w_h"):
        assert shapes(name, (5, 4))[name].view == Matrix()
    assert shapes("embedding", (5, 4))["embedding"].view == Matrix()
    assert "scale" not in shapes("scale", (5, 4))
    assert "weight" not in shapes("weight", (5,))
    with pytest.raises(ValueError, match=r"conv/kernel of shape \(3, 3, 4, 5\).*linen.views"):
        sn_jax.init({"conv": {"kernel": jnp.ones((3, 3, 4, 5))}}, KEY)
    # A torch state dict's, or a stack's: only Equinox's layers say which.
    with pytest.raises(
        ValueError, match=r"weight of shape \(5, 4, 3, 3\).*in_axes=\(1, 2, 3\), out_axes=\(0,\)"
    ):
        shapes("weight", (5, 4, 3, 3))


def test_rules_match_in_full_and_the_first_wins():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}}
    rules = {r"b/.*": None, r".*/kernel": Matrix(1, 0), r".*": Matrix()}
    state = sn_jax.init(params, KEY, rules)
    assert {path: s.view for path, s in state.items()} == {"a/kernel": Matrix(1, 0)}
    with pytest.raises(ValueError, match=r"No parameter to normalize.*a/kernel"):
        sn_jax.init(params, KEY, {"kernel": Matrix()})


def test_vectors_depend_on_the_path_and_key_only():
    kernel = jax.random.normal(KEY, (6, 5))
    alone = sn_jax.init({"x": {"kernel": kernel}}, KEY, warmup=1)
    beside = sn_jax.init({"a": {"w": kernel}, "x": {"kernel": kernel}}, KEY, warmup=1)
    np.testing.assert_array_equal(alone["x/kernel"].u, beside["x/kernel"].u)
    assert not np.allclose(beside["a/w"].u, beside["x/kernel"].u)
    rekeyed = sn_jax.init({"x": {"kernel": kernel}}, jax.random.key(1), warmup=1)
    assert not np.allclose(alone["x/kernel"].u, rekeyed["x/kernel"].u)


def test_starting_vectors_are_white_noise():
    w = jnp.zeros((4096, 3))
    start = np.asarray(sn_jax.init({"w": w}, KEY)["w"].v).ravel() * 64
    np.testing.assert_allclose(np.std(start), 1, rtol=0.01)
    assert abs(np.mean(start)) < 0.06
    assert np.abs(np.fft.rfft(start)).max() / 64 < 4.5  # no periodicity


def test_bounds_by_number_mapping_and_array():
    params = {"a": {"kernel": W}, "b": {"kernel": W}, "heads": jnp.stack([W, 2 * W])}
    state = sn_jax.init(params, KEY, {".*": Matrix()}, warmup=50)
    bound = {"a/kernel": 0.5, "b/kernel": jnp.array(3.0), "heads": jnp.array([1.0, 4.0])}
    normalized, _ = sn_jax.spectral_normalize(params, state, bound=bound)
    np.testing.assert_allclose(np.linalg.norm(normalized["a"]["kernel"], 2), 0.5)
    np.testing.assert_allclose(np.linalg.norm(normalized["b"]["kernel"], 2), 3.0)
    np.testing.assert_allclose(np.linalg.norm(normalized["heads"], 2, (1, 2)), [1.0, 4.0])
    # a learned bound (gamma of sigma-Reparam) gets a gradient
    grad = jax.grad(lambda c: sn_jax.spectral_normalize({"w": W}, HOOK, bound=c)[0]["w"].sum())(2.0)
    np.testing.assert_allclose(grad, sn_jax.spectral_normalize({"w": W}, HOOK)[0]["w"].sum())


def test_empty_leaves():
    params = {"a": jnp.ones((0, 4)), "b": jnp.ones((3, 0)), "c": jnp.ones((0, 3, 4)), "kernel": W}
    for k in (1, 2):
        state = sn_jax.init(params, KEY, {".*": Matrix()}, n_vectors=k)
        normalized, new = sn_jax.spectral_normalize(params, state)
        assert jax.tree.map(jnp.shape, normalized) == jax.tree.map(jnp.shape, params)
        assert float(new["a"].sigma) == 0
        assert new["c"].sigma.shape == (0,)
        sn_jax.calibrate(params, new)
        assert np.isfinite(sn_jax.spectral_penalty(params, new))


def test_power_iteration_on_a_closure_a_partial_and_a_batch():
    stack = jnp.asarray(known_spectrum(np.random.default_rng(1), (4, 6, 5), gap=0.2))
    v0 = jax.random.normal(KEY, (4, 5))
    result = sn_jax.power_iteration(
        lambda x: jnp.einsum("boi,bi->bo", stack, x), v0, 60, batch_ndim=1
    )
    np.testing.assert_allclose(result.sigma, [1, 2, 3, 4], rtol=1e-10)
    applied = jnp.einsum("boi,bi->bo", stack, result.v)
    np.testing.assert_allclose(applied, result.sigma[:, None] * result.u, atol=1e-10)

    def norm(w, n):
        return sn_jax.power_iteration(lambda x: w @ x, v0[0], n).sigma

    u, _, vt = np.linalg.svd(stack[0])
    expected = np.outer(u[:, 0], vt[0])
    for n in (80, jnp.array(80)):
        grad = jax.jit(jax.grad(norm))(stack[0], n)
        np.testing.assert_allclose(grad, expected, atol=1e-8)
    np.testing.assert_allclose(norm(stack[0], 0), np.linalg.norm(stack[0] @ v0[0]) /
                               np.linalg.norm(v0[0]))  # fmt: skip


class Changing:
    """An object whose method is a linear map that changes."""

    def __init__(self, w):
        self.w, self.factor, self.parts = w, 1.0, [w]

    def whole(self, x):
        return self.factor * (self.w @ x)

    def first(self, x):
        return self.parts[0] @ x


def test_power_iteration_is_that_of_what_is_closed_over_now():
    """It was that of the first call for ever: a hidden jit baked the closure in."""
    layer, v0 = Changing(W), jnp.ones(2)
    norm = float(np.linalg.norm(W, 2))
    closure = lambda x: layer.factor * (layer.parts[0] @ x)  # noqa: E731
    matvecs = {
        "method": layer.whole, "mutated list": layer.first, "closure": closure,
        "partial": partial(Changing.whole, layer), "Partial": jax.tree_util.Partial(layer.whole),
    }  # fmt: skip

    def norms():
        return {name: float(sn_jax.power_iteration(matvec, v0, 30).sigma)
                for name, matvec in matvecs.items()}  # fmt: skip

    assert norms() == pytest.approx(dict.fromkeys(matvecs, norm))
    layer.w, layer.parts[0] = 2 * W, 2 * W
    with count_compilations() as compiled:
        assert norms() == pytest.approx(dict.fromkeys(matvecs, 2 * norm))
    assert not compiled, "arrays are arguments of the same program"
    layer.factor = 3.0
    expected = dict.fromkeys(matvecs, 6 * norm) | {"mutated list": 2 * norm}
    assert norms() == pytest.approx(expected)
    layer.w = np.array(W) ** 2  # and NumPy's, of other values
    assert norms()["method"] == pytest.approx(3 * np.linalg.norm(layer.w, 2))


def test_power_iteration_compiles_once_for_equal_programs():
    v0, stack = jnp.ones(2), jnp.stack([W, 2 * W])

    def scanned(w, x):
        return jax.lax.scan(lambda y, w: (y + w @ x, None), jnp.zeros(3), w)[0]

    makers = [
        lambda w: jax.tree_util.Partial(scanned, w),
        lambda w: partial(scanned, w),
        lambda w: lambda x: scanned(w, x),
    ]
    sn_jax.power_iteration(makers[0](stack), v0, 5)
    for i, make in enumerate(makers):
        w = (i + 2) * stack
        with count_compilations() as compiled:
            result = sn_jax.power_iteration(make(w), v0, 5)
        assert not compiled
        np.testing.assert_allclose(result.sigma, np.linalg.norm(w.sum(0), 2), rtol=1e-8)
    # As large, but another program: different axes, a different literal inside.
    for other in (lambda x: jnp.flip(scanned(stack, x), 0) * 2, lambda x: 2.5 * scanned(stack, x)):
        expected = np.linalg.norm(jax.jacobian(other)(v0), 2)
        np.testing.assert_allclose(sn_jax.power_iteration(other, v0, 30).sigma, expected)


def test_power_iteration_inside_vmap_and_shard_like_axes():
    result = jax.vmap(
        lambda w: sn_jax.power_iteration(lambda x: jax.lax.psum(w @ x, "i"), jnp.ones(2), 30).sigma,
        axis_name="i",
    )(jnp.stack([W, 2 * W]))
    np.testing.assert_allclose(result, 3 * np.linalg.norm(W, 2))


def test_power_iteration_compiles_once_for_a_partial():
    matvec = partial(jax.tree_util.Partial, jnp.matmul)
    v0, other = jnp.ones(2), W + 1
    sn_jax.power_iteration(matvec(W), v0, 5)
    with count_compilations() as compiled:
        sn_jax.power_iteration(matvec(other), v0, 5)
    assert not compiled


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_matrix_equals_numpy_for_any_axes(data):
    ndim = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    order = data.draw(st.permutations(range(ndim)))
    n_in = data.draw(st.integers(1, ndim - 1))
    n_out = data.draw(st.integers(1, ndim - n_in))
    signs = data.draw(st.lists(st.sampled_from([0, ndim]), min_size=ndim, max_size=ndim))
    ins = [axis - sign for axis, sign in zip(order[:n_in], signs, strict=False)]
    outs = [axis - sign for axis, sign in zip(order[n_in : n_in + n_out], signs, strict=False)]
    batch = sorted(order[n_in + n_out :])
    view = Matrix(ins, outs)
    w = np.random.default_rng(0).standard_normal(shape)
    x = np.random.default_rng(1).standard_normal(view.batch_shape(shape) + view.domain(shape))
    letters = "abcde"[:ndim]
    axes_in, axes_out = sorted(order[:n_in]), sorted(order[n_in : n_in + n_out])
    pick = lambda axes: "".join(letters[a] for a in axes)  # noqa: E731
    formula = f"{letters},{pick(batch + axes_in)}->{pick(batch + axes_out)}"
    got = view.matvec(jnp.asarray(w), jnp.asarray(x))
    np.testing.assert_allclose(got, np.einsum(formula, w, x), atol=1e-12)
    factor = np.random.default_rng(2).standard_normal(view.batch_shape(shape))
    np.testing.assert_allclose(
        view.scale(jnp.asarray(w), jnp.asarray(factor)),
        np.einsum(f"{letters},{pick(batch)}->{letters}", w, factor),
    )


@settings(max_examples=8, deadline=None)
@given(
    m=st.sampled_from([1, 2, 9]),
    n=st.sampled_from([1, 3, 8]),
    k=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["bfloat16", "float32", "float64", *["float16"] * HAS_FLOAT16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_estimate_never_exceeds_the_norm_for_any_shape_and_dtype(m, n, k, dtype, seed):
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((m, n)), dtype)
    state = sn_jax.init({"w": w}, jax.random.key(seed), n_vectors=k, warmup=3)
    norm = np.linalg.norm(np.asarray(w, np.float64), 2)
    rtol = svd_rtol((m, n), "float64" if dtype == "float64" else "float32")
    assert float(state["w"].sigma) <= norm * (1 + rtol)
    # subspace iteration on all of a small side is exact at once
    if min(m, n) <= k:
        np.testing.assert_allclose(state["w"].sigma, norm, rtol=max(rtol, 1e-7))


BAD_STATES = {
    "unknown path": (
        {"x": {"kernel": W}}, lambda s: {"x/kernle": s["x/kernel"]},
        ValueError, r"'x/kernle'.*did you mean 'x/kernel'",
    ),
    "leaf missing": ({"y": W}, lambda s: s, ValueError, r"'x/kernel'.*no such leaf.*They are: y"),
    "shape changed": (
        {"x": {"kernel": jnp.ones((4, 2))}}, lambda s: s,
        ValueError, r"x/kernel has shape \(4, 2\).*since\s+sn_jax.init",
    ),
    "axes changed": (
        {"x": {"kernel": jnp.ones((5, 3, 2))}}, lambda s: s,
        ValueError, r"x/kernel has shape \(5, 3, 2\)",
    ),
    "vector": (
        {"x": {"kernel": jnp.ones(3)}}, lambda s: s, ValueError, r"x/kernel of shape \(3,\)",
    ),
    "integers": (
        {"x": {"kernel": jnp.ones((3, 2), int)}}, lambda s: s, TypeError, "x/kernel.*int64",
    ),
    "complex": (
        {"x": {"kernel": W.astype(complex)}}, lambda s: s, TypeError, "x/kernel.*complex128",
    ),
    "not an array": ({"x": {"kernel": "abc"}}, lambda s: s, TypeError, "x/kernel is a str"),
    "swapped": ({"x": {"kernel": W}}, lambda s: [s], TypeError, r"The order is \(params, state\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_that_do_not_fit(name):
    params, spoil, error, match = BAD_STATES[name]
    state = spoil(sn_jax.init({"x": {"kernel": W}}, KEY))
    for function in (
        sn_jax.spectral_normalize, sn_jax.spectral_norms, sn_jax.calibrate, sn_jax.spectral_penalty,
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            function(params, state)


BAD_CALLS = {
    "overlap": (lambda: sn_jax.init({"w": W}, KEY, {"w": Matrix(0, -2)}), "names an axis twice"),
    "out of range": (lambda: sn_jax.init({"w": W}, KEY, {"w": Matrix(0, 2)}),
                     r"w of shape.*axis 2"),
    "repeated": (lambda: Matrix((0, 0), 1), "each axis once"),
    "no axes": (lambda: Matrix((), 1), "at least one axis"),
    "axis type": (lambda: Matrix("a", 1), "axes are integers"),
    "integers": (lambda: sn_jax.init({"w": jnp.ones((2, 2), int)}, KEY), "w of shape.*int64"),
    "no leaf": (lambda: sn_jax.init({"bias": jnp.ones(3)}, KEY), "paths are: bias"),
    "empty": (lambda: sn_jax.init({}, KEY), "paths are: none"),
    "no view": (lambda: sn_jax.init({"w": W}, KEY, {"w": (0, 1)}), "which is no view"),
    "bad regex": (lambda: sn_jax.init({"w": W}, KEY, {"(w": Matrix()}), r"'\(w' is not a regular"),
    "same path": (lambda: sn_jax.init({"a/b": W, "a": {"b": W}}, KEY, {".*": Matrix()}),
                  "Two parameters have the path 'a/b'"),
    "n_vectors": (lambda: sn_jax.init({"w": W}, KEY, n_vectors=0), "n_vectors"),
    "warmup": (lambda: sn_jax.init({"w": W}, KEY, warmup=-1), "at least 0.*got -1"),
    "n_steps": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, n_steps=-1), "at least 0"),
    "device n_steps": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, n_steps=jnp.array(-1)),
                       "at least 0"),
    "float n_steps": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, n_steps=1.5), "integer"),
    "bound 0": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, bound=0), "bound for w.*got 0"),
    "bound nan": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, bound={"w": np.nan}), "finite"),
    "bound paths": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, bound={"v": 1.0}),
                    "missing: w; unknown: v"),
    "mode": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, mode="cap"), "mode must be.*'cap'"),
    "gradient": (lambda: sn_jax.spectral_normalize({"w": W}, HOOK, gradient="no"), "gradient must"),
    "rtol": (lambda: sn_jax.calibrate({"w": W}, HOOK, rtol=0), "rtol must be > 0"),
    "max_steps": (lambda: sn_jax.calibrate({"w": W}, HOOK, max_steps=-1), "at least 0"),
    "v0": (lambda: sn_jax.power_iteration(lambda x: x, jnp.arange(3), 1), "v0 must be floating"),
    "batch_ndim": (lambda: sn_jax.power_iteration(lambda x: x, jnp.ones(3), 1, batch_ndim=2),
                   "batch_ndim=2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name):
    call, match = BAD_CALLS[name]
    with pytest.raises((ValueError, TypeError), match=match) as error:
        call()
    assert re.search(r"[.)]$", str(error.value)), "a sentence"


def test_views_are_static_and_comparable():
    assert Matrix([0, 1], 2) == Matrix((0, 1), (2,))
    assert hash(Matrix(-2, -1)) == hash(Matrix())
    state = state_of(CASES[0], CASES[0].weights(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    shapes = jax.eval_shape(partial(sn_jax.init, rules={"w": Matrix()}), {"w": W}, KEY)
    assert shapes["w"].u.shape == (1, 2)
    in_jit = jax.jit(partial(sn_jax.init, rules={"w": Matrix()}))({"w": W}, KEY)
    np.testing.assert_allclose(in_jit["w"].sigma, 9.52551809, rtol=1e-8)


def test_state_pickles():
    import pickle

    again = pickle.loads(pickle.dumps(HOOK))
    assert again["w"].view == HOOK["w"].view
    np.testing.assert_array_equal(again["w"].u, HOOK["w"].u)


@dataclass(frozen=True)
class Named(Matrix):
    name: str = "dense"


@dataclass(frozen=True)
class Image(sn_jax.Conv):
    name: str = "image"


def test_a_dataclass_that_inherits_takes_what_its_parent_takes():
    assert Named(0, -1).axis_groups(2) == Matrix(0, -1).axis_groups(2)
    assert Named(in_axes=0, out_axes=1, name="head").name == "head"
    w = jnp.arange(24.0).reshape(3, 1, 4, 2)
    image, conv = Image((4, 5), strides=2, padding=1), sn_jax.Conv((4, 5), strides=2, padding=1)
    x = jnp.ones(conv.domain(w.shape))
    np.testing.assert_array_equal(image.matvec(w, x), conv.matvec(w, x))
    with pytest.raises(ValueError, match="each axis once"):
        Named((0, 0), 1)


def test_penalty_towards_one():
    """diag(2, 1/2), target 1, power 2: (4 - 1)^2, and its slope 2 (4 - 1) 2 2 in one entry."""
    params = {"w": jnp.diag(jnp.array([2.0, 0.5]))}
    state = sn_jax.calibrate(params, sn_jax.init(params, KEY), rtol=1e-12)
    loss = partial(sn_jax.spectral_penalty, state=state, target=1.0, power=2)
    value, grad = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, 9.0, rtol=1e-12)
    np.testing.assert_allclose(grad["w"], [[24.0, 0.0], [0.0, 0.0]], atol=1e-9)
    below = {"w": 0.25 * params["w"]}  # pulled up, too
    assert jax.grad(loss)(below)["w"][0, 0] < 0
    relative = sn_jax.spectral_penalty(params, state, target=sn_jax.rms_bound(2.0))
    np.testing.assert_allclose(relative, 0.0, atol=1e-12)
    for options, message in (
        ({"target": -1.0}, r"target for w must be a finite number >= 0; got -1"),
        ({"power": 0}, "power must be an integer >= 1, or None; got 0"),
        ({"target": {"v": 1.0}}, "target as a mapping .*missing: w; unknown: v"),
    ):
        with pytest.raises(ValueError, match=message):
            sn_jax.spectral_penalty(params, state, **options)


def test_no_direction_is_lost_when_images_of_the_start_nearly_depend():
    """As of this seed in float32: the small side is spanned all the same, and sigma is exact."""
    w = jnp.asarray(np.random.default_rng(98).standard_normal((9, 3)), jnp.float32)
    state = sn_jax.init({"w": w}, jax.random.key(98), n_vectors=3, warmup=3)
    gram = np.asarray(state["w"].v, np.float64) @ np.asarray(state["w"].v, np.float64).T
    np.testing.assert_allclose(gram, np.eye(3), atol=1e-5)
    norm = np.linalg.norm(np.asarray(w, np.float64), 2)
    np.testing.assert_allclose(state["w"].sigma, norm, rtol=svd_rtol((9, 3), "float32"))
