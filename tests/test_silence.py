"""Nothing that is wrong passes in silence: each call here raises one sentence, which says what is
wrong, where (path, shape), and what to do instead."""

import re
import warnings
from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sn_jax
from sn_jax import Conv, Matrix
from sn_jax.transforms import project_spectral_norm

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


W = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.float32)
X = ones(1, 3)
PARAMS = {"enc": {"kernel": W}, "dec": {"kernel": 2 * W, "bias": ones(2)}}
IMAGES = {"conv": {"kernel": ones(3, 3, 2, 4)}}
HEADS = {"heads": ones(4, 3, 2)}
MATRIX = {".*": Matrix()}
TORCH = {"conv.weight": ones(5, 4, 3, 3)}


def square(x):
    return x**2


def pair(x):
    return x, x


def init(rules=None, params=PARAMS, **kwargs):
    return sn_jax.init(params, KEY, rules, **kwargs)


def normalize(params=PARAMS, rules=None, **kwargs):
    return sn_jax.spectral_normalize(params, init(rules, params), **kwargs)


def linen_block():
    return nn.Sequential([nn.Dense(4), nn.Dense(2)])


def linen_wrapper(layer, **options):
    return sn_jax.linen.SpectralNorm(layer, **options).init(KEY, X)


def linen_views(rules):
    model = linen_block()
    return sn_jax.linen.views(model, model.init(KEY, X), X, rules=rules)


def nnx_block():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))


def from_torch(views):
    return sn_jax.convert.from_torch(
        {"0.weight": np.ones((2, 3))}, {"Dense_0": {"kernel": jnp.zeros((3, 2))}}, views
    )


def other_size():
    """The state of a convolution as an operator, made at another image size."""
    state = init({"conv/kernel": Conv((8, 8), strides=2)}, IMAGES)
    entry = replace(state["conv/kernel"], view=Conv((6, 6), strides=2))
    return sn_jax.spectral_normalize(IMAGES, {"conv/kernel": entry})


def checkpoint(state):
    return {path: {name: getattr(s, name) for name in ["u", "v", "sigma"]}
            for path, s in state.items()}  # fmt: skip


# call -> what the sentence must hold.
VALUE_ERRORS = {
    "a part of a path": (
        lambda: init({"kernel": Matrix()}),
        ["rule 'kernel'", "enc/kernel", "in full", ".*kernel.*"],
    ),
    "misspelt": (
        lambda: init({"enc/kernle": Matrix(), ".*": None}),
        ["rule 'enc/kernle'", "enc/kernel"],
    ),
    "misspelt, with None": (
        lambda: init({"dec/kernels": None, ".*kernel": Matrix()}),
        ["leave alone", "rule 'dec/kernels'", "dec/kernel"],
    ),
    "an exact path of another model": (
        lambda: init({"enc/kernel": Matrix(), "mid/kernel": None}),
        ["rule 'mid/kernel'", "enc/kernel"],
    ),
    "in linen.views": (
        lambda: linen_views({"layers_O/kernel": None}),
        ["rule 'layers_O/kernel'", "layers_0/kernel"],
    ),
    "in nnx.views": (
        lambda: sn_jax.nnx.views(nnx_block(), X, rules={"layer/0/kernel": None}),
        ["rule 'layer/0/kernel'", "layers/0/kernel"],
    ),
    "in linen.SpectralNorm": (
        lambda: linen_wrapper(nn.Dense(4), rules={"kernels": Matrix()}),
        ["rule 'kernels'", "kernel"],
    ),
    "in nnx.SpectralNorm": (
        lambda: sn_jax.nnx.SpectralNorm(nnx_block(), rules={"0/kernel": None}, rngs=nnx.Rngs(0)),
        ["rule '0/kernel'", "layers/0/kernel"],
    ),
    "in nnx.wrap": (
        lambda: sn_jax.nnx.wrap(nnx_block(), {"0/kernel": None}, rngs=nnx.Rngs(0)),
        ["rule '0/kernel'", "layers/0/kernel"],
    ),
    "in the projection": (
        lambda: project_spectral_norm({"enc/kernel": Matrix(), "bec/kernel": Matrix()}, KEY).init(
            PARAMS
        ),
        ["rule 'bec/kernel'", "dec/kernel"],
    ),
    "in from_torch": (
        lambda: from_torch({"Dense_1/kernel": Matrix()}),
        ["rule 'Dense_1/kernel'", "Dense_0/kernel"],
    ),
    "a bound for a path that is none": (
        lambda: normalize(bound={"enc/kernle": 1, "dec/kernel": 1}),
        ["missing: enc/kernel", "unknown: enc/kernle"],
    ),
    "norm_bounds without a view": (
        lambda: sn_jax.norm_bounds(ones(3, 3, 2, 4)),
        ["(3, 3, 2, 4)", "Matrix((0, 1, 2), 3)", "Matrix()"],
    ),
    "spectral_norm of a vector": (lambda: sn_jax.spectral_norm(ones(3)), ["(3,)", "view"]),
    "a map that is not linear": (
        lambda: sn_jax.power_iteration(square, W[0], 3),
        ["not linear", "biases"],
    ),
    "a bound too many": (
        lambda: normalize(bound=ones(2)),
        ["dec/kernel", "(2,)", "()", "one number"],
    ),
    "a bound for each of other heads": (
        lambda: normalize(HEADS, MATRIX, bound=ones(3)),
        ["heads", "(3,)", "(4,)"],
    ),
    "a traced bound too many": (
        lambda: jax.jit(lambda c: normalize(bound=c))(ones(2)),
        ["dec/kernel", "(2,)"],
    ),
    "another image size": (
        other_size,
        ["conv/kernel", "(6, 6)", "(8, 8)", "image size", "new state"],
    ),
    "another parameter": (
        lambda: sn_jax.spectral_norms({"w": W.T}, init(params={"w": W})),
        ["w has shape (2, 3)", "parameter's shape has changed", "new state"],
    ),
    "torch's convolution": (
        lambda: init(params=TORCH),
        ["conv.weight", "(5, 4, 3, 3)", "in_axes=(1, 2, 3), out_axes=(0,)"],
    ),
    "a bare convolution": (
        lambda: init(params=ones(3, 3, 2, 4)),
        ["''", "(3, 3, 2, 4)", "Matrix((0, 1, 2), 3)"],
    ),
    "a rule for a bare array": (lambda: init({"kernel": Matrix()}, W), ["{'': view}"]),
    "a bare vector": (lambda: init(params=ones(3)), ["''", "2 axes"]),
}
TYPE_ERRORS = {
    "a class for a view": (lambda: init({".*kernel": Matrix}), ["class Matrix", "Matrix()"]),
    "another class for a view": (lambda: init({".*kernel": Conv}), ["class Conv", "Conv(...)"]),
    "a string for a view": (
        lambda: init({".*kernel": "Matrix"}),
        ["rule '.*kernel'", "no view", "sn_jax.Matrix()", "None"],
    ),
    "a list of rules": (lambda: init([Matrix()]), ["a list", "{r'.*kernel': sn_jax.Matrix()}"]),
    "a view for rules": (lambda: init(Matrix()), ["a Matrix", "{r'.*kernel'"]),
    "a function for rules": (lambda: init(lambda path, w: Matrix()), ["function", "{r'.*kernel'"]),
    "an input for rules": (
        lambda: sn_jax.nnx.wrap(nnx_block(), X, rngs=nnx.Rngs(0)),
        ["an array of float32 with shape (1, 3)", "{r'.*kernel'", "sn_jax.nnx.views"],
    ),
    "a class in a wrapper": (
        lambda: linen_wrapper(nn.Dense(4), rules={"kernel": Matrix}),
        ["rule 'kernel'", "class Matrix", "Matrix()"],
    ),
    "a number for a rule": (lambda: init({0: Matrix()}), ["rule 0", "strings"]),
    "a state for rules": (lambda: init(init()), ["a Singular", ".view is Matrix"]),
    "rules and key swapped": (
        lambda: sn_jax.init(PARAMS, {".*kernel": Matrix()}, KEY),
        ["PRNG key", "(params, key, rules)"],
    ),
    "params and key swapped": (
        lambda: sn_jax.init(KEY, PARAMS),
        ["PRNG key", "['enc', 'dec']", "(params, key, rules)"],
    ),
    "a seed for a key": (lambda: sn_jax.init(PARAMS, 0), ["an int, 0", "jax.random.key(0)"]),
    "projection swapped": (
        lambda: project_spectral_norm(KEY, {".*kernel": Matrix()}),
        ["PRNG key", "(rules, key)"],
    ),
    "a model for params": (
        lambda: init(params=nn.Dense(3)),
        ["a Dense", 'variables["params"]', "nnx.Param"],
    ),
    "params and state swapped": (
        lambda: sn_jax.spectral_normalize(init(), PARAMS),
        ["a dict", "(params, state)"],
    ),
    "a checkpoint for a state": (
        lambda: sn_jax.spectral_norms(PARAMS, checkpoint(init())),
        ["sn_jax.convert.from_state_dict"],
    ),
    "norm_bounds of params": (
        lambda: sn_jax.norm_bounds(PARAMS),
        ["one array", "['enc', 'dec']", "sn_jax.norm_bounds(leaves[path]"],
    ),
    "spectral_norm of a state": (lambda: sn_jax.spectral_norm(init()), ["one array"]),
    "norm_bounds of a list": (lambda: sn_jax.norm_bounds([W, W[:2]]), ["one array", "a list"]),
    "norm_bounds swapped": (lambda: sn_jax.norm_bounds(Matrix(), W), ["(w, view)"]),
    "norm_bounds by a number": (lambda: sn_jax.norm_bounds(W, 1e-3), ["0.001", "no view"]),
    "norm_bounds by a class": (lambda: sn_jax.norm_bounds(W, Matrix), ["Matrix()"]),
    "power_iteration swapped": (
        lambda: sn_jax.power_iteration(W[0], lambda x: W @ x, 3),
        ["a function", "(matvec, v0, n_steps)"],
    ),
    "a map to a pair": (lambda: sn_jax.power_iteration(pair, W[0], 3), ["one array", "a tuple"]),
    "a string for a bound": (lambda: normalize(bound="1"), ["dec/kernel", "'1'", "number"]),
    "None for a bound": (lambda: normalize(bound=None), ["dec/kernel", "NoneType"]),
    "a bool for a bound": (lambda: normalize(bound=True), ["dec/kernel", "True"]),
    "a function for a bound": (lambda: normalize(bound=lambda s: s), ["dec/kernel", "function"]),
    "a complex bound": (lambda: normalize(bound=1j), ["dec/kernel", "complex"]),
    "unsigned steps": (
        lambda: normalize(n_steps=jnp.uint32(1)),
        ["uint32", "n_steps.astype(jnp.int32)"],
    ),
    "traced unsigned steps": (
        lambda: jax.jit(lambda n: normalize(n_steps=n))(jnp.uint32(1)),
        ["uint32", "astype"],
    ),
    "unsigned steps of a map": (
        lambda: sn_jax.power_iteration(lambda x: x, W[0], jnp.uint8(1)),
        ["uint8", "astype"],
    ),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_one_sentence_says_it(name):
    call, parts = (VALUE_ERRORS | TYPE_ERRORS)[name]
    with pytest.raises(ValueError if name in VALUE_ERRORS else TypeError) as error:
        call()
    message = str(error.value)
    for part in parts:
        assert part in message
    assert re.search(r"[.)]$", message), "a sentence"
    assert len(message) < 600


# Without rules.


def test_what_is_left_out_is_listed_once():
    attention = {"kernel": W, "bias": ones(2, 3), "scale": ones(2, 3)}
    others = {"pos": ones(5, 3), "cls": ones(1, 1, 3), "mask": jnp.ones((2, 2), jnp.int32)}
    params = {**PARAMS, **others, "attn": attention}
    with pytest.warns(UserWarning, match=r"leaves alone .*: pos \(5, 3\)\. Give rules") as warned:
        state = sn_jax.init(params, KEY)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert list(state) == ["attn/kernel", "dec/kernel", "enc/kernel"]
    assert list(init({".*kernel": Matrix()}, params)) == list(state), "silent: it was asked for"
    assert init(params=PARAMS), "silent: biases and vectors are not weights"


def test_a_scale_beside_a_bias_of_its_shape_is_no_weight():
    """torch's LayerNorm((8, 8)) in a state dict, and a stack of norms."""
    params = {"0.weight": W, "norm.weight": ones(8, 8), "norm.bias": ones(8, 8)}
    assert list(sn_jax.init(params, KEY)) == ["0.weight"]


def test_bare_arrays_work():
    state = sn_jax.init(W, KEY, warmup=50)
    normalized, state = sn_jax.spectral_normalize(W, state)
    np.testing.assert_allclose(np.linalg.norm(normalized, 2), 1, rtol=1e-6)
    assert list(sn_jax.spectral_norms(W, state)) == [""]
    heads = sn_jax.init(HEADS["heads"], KEY, {"": Matrix()})
    assert heads[""].sigma.shape == (4,)


# Norms without a view.


def test_norms_take_two_axes_for_a_matrix_and_a_given_matrix_batches():
    exact = np.linalg.norm(np.asarray(W, np.float64), 2)
    np.testing.assert_allclose(sn_jax.spectral_norm(W), exact, rtol=1e-12)
    lower, upper = sn_jax.norm_bounds(W, rtol=1e-9)
    assert lower <= exact <= upper
    stack = np.stack([W, 2 * W])
    np.testing.assert_allclose(sn_jax.spectral_norm(stack, Matrix()), [exact, 2 * exact])
    assert sn_jax.norm_bounds(stack, Matrix()).upper.shape == (2,)
    for function in (sn_jax.spectral_norm, sn_jax.norm_bounds):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 2\) has 3 axes"):
            function(stack)


# Bounds that do fit.


def test_bounds_of_every_good_kind():
    state = init(MATRIX, HEADS, warmup=50)

    def norms(bound):
        normalized, _ = sn_jax.spectral_normalize(HEADS, state, bound=bound)
        return np.linalg.norm(normalized["heads"], 2, (1, 2))

    each = [1.0, 2.0, 3.0, 4.0]
    for bound in (each, np.array(each), jnp.array(each), np.array([1, 2, 3, 4])):
        np.testing.assert_allclose(norms(bound), each, rtol=1e-6)
    for bound in (2, 2.0, np.float64(2), jnp.array(2)):
        np.testing.assert_allclose(norms(bound), 2, rtol=1e-6)
    traced, _ = jax.jit(lambda c: sn_jax.spectral_normalize(HEADS, state, bound=c))(jnp.array(each))
    np.testing.assert_allclose(np.linalg.norm(traced["heads"], 2, (1, 2)), each, rtol=1e-6)


@pytest.mark.parametrize("dtype", [int, np.uint8, np.int64, jnp.int8, jnp.int16, jnp.int32])
def test_signed_and_static_steps_of_every_size(dtype):
    n_steps, (expected, _) = dtype(1), normalize()
    normalized, _ = normalize(n_steps=n_steps)
    np.testing.assert_allclose(normalized["enc"]["kernel"], expected["enc"]["kernel"], rtol=1e-6)


# Where float32 ends.


@pytest.mark.parametrize("diagonal", [(3e38, 1, 1), (3e38, 3e38, 0), (1.2e38, 1, 1), (8e37, 1, 1)])
def test_norms_too_large_to_invert_are_nan_in_training_and_in_eval(diagonal):
    """diag(3e38, 1, 1) gave NaN with n_steps=1, and norm 4 with n_steps=0."""
    params = {"w": jnp.diag(jnp.array(diagonal, jnp.float32))}
    state = sn_jax.init(params, KEY, {"w": Matrix()})
    np.testing.assert_allclose(state["w"].sigma, max(diagonal), rtol=1e-6)
    results = [sn_jax.spectral_normalize(params, state, n_steps=n)[0]["w"][0, 0]
               for n in (0, 1, 2, jnp.array(0), jnp.array(1))]  # fmt: skip
    expected = 1.0 if max(diagonal) < 8.5e37 else np.nan  # 1 / sigma is subnormal from there on
    np.testing.assert_allclose(results, expected, rtol=1e-6)
    np.testing.assert_allclose(sn_jax.spectral_norms(params, state)["w"], max(diagonal), rtol=1e-6)


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_subnormal_weights_are_zero_and_leave_usable_vectors(n_vectors):
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    state = init(MATRIX, {"w": jnp.asarray(w * np.float32(1e-42))}, n_vectors=n_vectors)
    chex.assert_tree_all_finite(state)
    _, state = sn_jax.spectral_normalize({"w": w}, state, n_steps=60)
    np.testing.assert_allclose(state["w"].sigma, np.linalg.norm(w, 2), rtol=1e-5)


# The projection.


def test_exact_says_that_it_ignores_steps():
    with pytest.warns(UserWarning, match=r"exact=True\) ignores n_steps=3.*exact=False"):
        project_spectral_norm({".*kernel": Matrix()}, KEY, n_steps=3, exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_spectral_norm({".*kernel": Matrix()}, KEY, exact=True)
        project_spectral_norm({".*kernel": Matrix()}, KEY, n_steps=3)


def test_rules_for_leaves_that_optax_hides_may_match_nothing():
    rules = {"enc/kernel": Matrix(), "dec/kernel": Matrix()}
    leaf_by_leaf = {"enc": {"kernel": True}, "dec": {"kernel": False, "bias": False}}
    for mask in ({"enc": True, "dec": False}, leaf_by_leaf):
        state = optax.masked(project_spectral_norm(rules, KEY), mask).init(PARAMS)
        assert list(state.inner_state.singular) == ["enc/kernel"]
    with pytest.raises(ValueError, match="'mid/kernel'"):
        optax.masked(
            project_spectral_norm({"mid/kernel": Matrix()}, KEY), {"enc": True, "dec": False}
        ).init(PARAMS)
