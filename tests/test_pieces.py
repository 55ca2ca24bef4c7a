"""Linear operations on stacks by NumPy, against JAX's own."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from sn_jax import _graph, _pieces


def check(fn, x):
    """What ``apply`` makes of a stack is what ``fn``, linear up to a constant, makes of each."""
    node = _graph.graph_of(fn, x, "cpu").outputs[0]
    (source,) = node.inputs
    assert source.op == "x"
    stack = np.random.default_rng(1).standard_normal((3, *x.shape))
    zero = fn(jnp.zeros(x.shape))
    expected = np.stack([fn(jnp.asarray(row)) - zero for row in stack])
    np.testing.assert_allclose(_pieces.apply(node, {source: stack}), expected, atol=1e-12)
    return node, source


@st.composite
def convolutions(draw):
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(n)]  # noqa: E731
    space, window = each(3, 6), each(1, 3)
    letters = "DHW"[:n]
    sizes = {
        "N": 2,
        "C": groups * draw(st.integers(1, 2)),
        **dict(zip(letters, space, strict=True)),
    }
    kernel = {"I": sizes["C"] // groups, "O": groups * draw(st.integers(1, 2)),
              **dict(zip(letters, window, strict=True))}  # fmt: skip
    layouts = ["".join(draw(st.permutations(s + letters))) for s in ("NC", "IO", "NC")]
    options = {
        "window_strides": each(1, 3), "padding": list(zip(each(-1, 3), each(-1, 3), strict=True)),
        "lhs_dilation": each(1, 2), "rhs_dilation": each(1, 2),
        "dimension_numbers": tuple(layouts), "feature_group_count": groups,
    }  # fmt: skip
    return [sizes[c] for c in layouts[0]], [kernel[c] for c in layouts[1]], options


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_any_convolution(case):
    shape, kernel_shape, options = case
    kernel = np.random.default_rng(0).standard_normal(kernel_shape)
    x = np.zeros(shape)
    node, source = check(lambda x: lax.conv_general_dilated(x, kernel, **options), x)
    ones = _pieces.apply(node, {source: np.ones((1, *shape))}, absolute=True)[0]
    expected = lax.conv_general_dilated(jnp.ones(shape), abs(kernel), **options)
    np.testing.assert_allclose(ones, expected, atol=1e-12)


def test_a_large_stack_is_done_in_parts(monkeypatch):
    monkeypatch.setattr(_pieces, "_MOST_WINDOWS", 200)
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 4))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "window_strides": (1, 2)}
    check(lambda x: lax.conv_general_dilated(x, kernel, padding="SAME", **options),
          np.zeros((1, 5, 6, 2)))  # fmt: skip


PADS = {
    "low and high": [(1, 2, 0), (0, 0, 0), (3, 0, 0)],
    "between": [(0, 0, 1), (1, 0, 2), (0, 0, 0)],
    "cut": [(-1, 0, 0), (0, -2, 0), (-1, -1, 1)],
    "all cut": [(-1, 0, 0), (-2, -2, 0), (0, 0, 0)],
}


@pytest.mark.parametrize("config", PADS.values(), ids=PADS)
def test_pads(config):
    check(lambda x: lax.pad(x, 7.0, config), np.zeros((2, 4, 3)))


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((0, 0), (1, 2), (0, 1))])
@pytest.mark.parametrize("base", [(1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 2, 1)])
def test_sums_of_windows(padding, base, dilation):
    def fn(x):
        return lax.reduce_window(
            x, 0.0, lax.add, (1, 2, 3), (1, 2, 1), padding, base_dilation=base,
            window_dilation=dilation,
        )  # fmt: skip

    check(fn, np.zeros((2, 5, 4)))


def test_what_jax_computes():
    """Convolutions by batch groups, and of what depends on x."""
    options = {
        "window_strides": (1,),
        "padding": "SAME",
        "dimension_numbers": ("NWC", "WIO", "NWC"),
    }
    kernel = np.random.default_rng(0).standard_normal((3, 1, 4))
    check(lambda x: lax.conv_general_dilated(x, kernel, batch_group_count=2, **options),
          np.zeros((4, 5, 1)))  # fmt: skip
    image = np.random.default_rng(0).standard_normal((2, 5, 3))
    check(lambda w: lax.conv_general_dilated(image, w, **options), np.zeros((3, 3, 2)))
    check(lambda x: x[np.array([2, 0, 0, 1])], np.zeros((3, 2)))
