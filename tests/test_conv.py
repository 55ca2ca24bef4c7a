"""The Conv view against flax's layers and against explicit matrices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sn_jax
from sn_jax import Conv

KEY = jax.random.key(0)
F64 = jnp.float64


def explicit(view, w):
    domain = view.domain(w.shape)
    basis = jnp.eye(int(np.prod(domain))).reshape(-1, *domain)
    return np.asarray(jax.vmap(lambda x: view.matvec(w, x).ravel())(basis)).T


def assert_same_map(layer, view, channels):
    x = np.random.default_rng(0).standard_normal((1, *view.input_shape, channels))
    variables = layer.init(KEY, x)
    kernel = variables["params"]["kernel"]
    got = view.matvec(kernel, jnp.asarray(x[0]))
    expected = layer.apply(variables, x)[0]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # the adjoint that the iteration uses: <A x, y> = <x, A^T y>
    y = np.random.default_rng(1).standard_normal(got.shape)
    transpose = jax.linear_transpose(lambda x: view.matvec(kernel, x), jnp.asarray(x[0]))
    (back,) = transpose(jnp.asarray(y))
    np.testing.assert_allclose(jnp.sum(got * y), jnp.sum(back * x[0]), atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_it_is_the_map_of_flax_conv(data):
    n = data.draw(st.sampled_from([1, 1, 2, 2, 3]))
    named = ["SAME", "VALID", "CIRCULAR", "REFLECT", 1] + (["CAUSAL"] if n == 1 else [])
    padding = data.draw(st.sampled_from([*named, [(0, 2)] * n]))
    stride, dilation, groups = (data.draw(st.sampled_from([1, 2])) for _ in range(3))
    kernel = data.draw(st.sampled_from([1, 2, 3]))
    layer = nn.Conv(
        4, (kernel,) * n, stride, padding, kernel_dilation=dilation, feature_group_count=groups,
        use_bias=False, param_dtype=F64,
    )  # fmt: skip
    size = (7, 6, 5)[:n]
    view = Conv(size, stride, padding, 1, dilation, groups)
    assert_same_map(layer, view, 2)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_it_is_the_map_of_flax_conv_transpose(data):
    n = data.draw(st.sampled_from([1, 2]))
    padding = data.draw(st.sampled_from(["SAME", "VALID", "CIRCULAR", 1]))
    stride, kernel = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([2, 3, 4]))
    transpose_kernel = data.draw(st.booleans())
    layer = nn.ConvTranspose(
        3, (kernel,) * n, (stride,) * n, padding, transpose_kernel=transpose_kernel,
        use_bias=False, param_dtype=F64,
    )  # fmt: skip
    view = Conv((5, 4)[:n], stride, padding, transpose=True, transpose_kernel=transpose_kernel)
    assert_same_map(layer, view, 2)


# What sides and starts depend on, always: Hypothesis may draw others.
SIDES = [
    (nn.Conv, {"padding": "CAUSAL", "kernel_dilation": 2}, 3),
    (nn.Conv, {"padding": "CIRCULAR"}, 4),
    (nn.Conv, {"padding": "REFLECT"}, 4),
    (nn.Conv, {"padding": 1, "input_dilation": 2}, 2),
    (nn.ConvTranspose, {"padding": "CIRCULAR", "strides": (2,)}, 3),
    (nn.ConvTranspose, {"padding": "CIRCULAR", "strides": (1,), "transpose_kernel": True}, 4),
]


@pytest.mark.parametrize(("kind", "options", "k"), SIDES, ids=str)
def test_sides_of_even_kernels_and_dilations(kind, options, k):
    layer = kind(3, (k,), use_bias=False, param_dtype=F64, **options)
    view = Conv(7, **options, **({"transpose": True} if kind is nn.ConvTranspose else {}))
    assert_same_map(layer, view, 2)


GOLDEN = [
    ({"padding": "CIRCULAR"}, 15.228065977),
    ({}, 14.456205765),
    ({"padding": "VALID"}, 13.965760588),
    ({"strides": 2, "padding": "CIRCULAR"}, 9.460639481),
    ({"strides": 2}, 8.688279542),
    ({"kernel_dilation": 2}, 11.934235083),
]


@pytest.mark.parametrize(("options", "sigma"), GOLDEN, ids=str)
def test_golden_norms(options, sigma):
    """K[o, i, a, b] = sin(1 + o + 2 i + 3 a + 5 b), 4 x 3 x 3 x 3, on 8 x 8."""
    a, b, i, o = np.ogrid[:3, :3, :3, :4]
    kernel = jnp.asarray(np.sin(1 + o + 2 * i + 3 * a + 5 * b))
    view = Conv((8, 8), **options)
    np.testing.assert_allclose(np.linalg.norm(explicit(view, kernel), 2), sigma, rtol=1e-9)
    state = sn_jax.init({"w": kernel}, KEY, {"w": view}, n_vectors=4, warmup=200)
    assert sigma * 0.9999 < state["w"].sigma <= sigma * (1 + 1e-9)


def test_stacked_kernels_are_normalized_each():
    kernels = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 3, 2, 4)))  # (3, L, ...)
    view = Conv((5, 5), batch_axes=(1,))
    state = sn_jax.init({"w": kernels}, KEY, {"w": view}, n_vectors=3, warmup=100)
    single = [np.linalg.norm(explicit(Conv((5, 5)), kernels[:, i]), 2) for i in range(2)]
    np.testing.assert_allclose(state["w"].sigma, single, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Conv(()), "one to three spatial sizes"),
        (lambda: Conv((8, 8), strides=0), "strides=0"),
        (lambda: Conv((8, 8), strides=(1, 2, 3)), "one for each of the 2"),
        (lambda: Conv((8, 8), padding="MIRROR"), "choose from SAME, VALID"),
        (lambda: Conv((8, 8), padding="CAUSAL"), "choose from"),
        (lambda: Conv((8, 8), padding=(1, 2, 3)), "for each of 2 dimensions"),
        (lambda: Conv((8, 8), transpose=True, feature_group_count=2), "neither groups"),
        (lambda: Conv((8, 8)).batch_shape((3, 4, 4)), "the kernel has 3 axes"),
        (lambda: Conv((8, 8), batch_axes=(0, 1)).batch_shape((2, 3, 3, 4, 4)), "5 axes"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()
