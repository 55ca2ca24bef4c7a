"""Networks of convolutions on a torus: never below the tightest bound of single entries."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from test_lipschitz import every_slope

import sn_jax
from sn_jax import _fronts, _graph, _lipschitz, _torus

relu = jax.nn.relu


def bounds(fn, x) -> tuple[float, float]:
    """(by one multiplier for each source, for each channel)."""
    graph = _graph.graph_of(fn, x, "cpu")
    torus = _lipschitz._Bounds(graph, 1e-6, lambda _: None).torus()
    return torus.by_sources(), torus.by_channels()


def conv(x, k, stride=1, padding="SAME", dilation=1, base=1):
    n = k.ndim - 2
    names = "N" + "HW"[:n] + "C", "HW"[:n] + "IO", "N" + "HW"[:n] + "C"
    if padding == "CIRCULAR":
        reach = k.shape[0] - 1
        width = [(0, 0), *[(reach // 2, reach - reach // 2)] * n, (0, 0)]
        x, padding = jnp.pad(x, width, mode="wrap"), "VALID"
    if padding == "SAME" and base == 1:
        padding = lax.padtype_to_pads(x.shape[1:-1], [(m - 1) * dilation + 1 for m in k.shape[:n]],
                                      (stride,) * n, "SAME")  # fmt: skip
    return lax.conv_general_dilated(
        x, k, (stride,) * n, padding, (base,) * n, (dilation,) * n, dimension_numbers=names
    )


# Matrices that are the same at every pixel.


def dense(fronts: _fronts.Fronts, theta) -> np.ndarray:
    """All of it, over pixels."""
    variables = fronts.variables
    ends = np.cumsum([0, *(math.prod(v.torus) * v.channels for v in variables)])
    out = np.eye(ends[-1])
    for c, (left, right) in zip(fronts.couplings, fronts.factors(theta), strict=True):
        a, b = variables[c.row], variables[c.column]
        finer = np.maximum(a.torus, b.torus)
        block = np.zeros((*a.torus, a.channels, *b.torus, b.channels))
        taps = itertools.product(*c.shifts)
        for matrix, tap in zip(c.kernel, taps, strict=True):
            for o, moves in itertools.product(np.ndindex(*a.torus), itertools.product(*tap)):
                at = (finer // a.torus * o + moves) % finer
                place, off = np.divmod(at, finer // b.torus)
                if not off.any():
                    block[(*o, slice(None), *place)] += matrix * left[:, None] * right
        rows, columns = (slice(ends[v], ends[v + 1]) for v in (c.row, c.column))
        block = block.reshape(rows.stop - rows.start, -1)
        out[rows, columns] += block
        out[columns, rows] += block.T
    return out


@pytest.mark.parametrize("point", [True, False])
def test_elimination_is_that_of_the_matrix(point, monkeypatch):
    rng = np.random.default_rng(0)
    fine, coarse = (4, 6), (2, 3)
    variables = [
        _fronts.Variable(fine, 2),
        _fronts.Variable(fine, 3, np.array([0, 1, 2])),
        _fronts.Variable(coarse, 2, np.array([3, 3])),
        _fronts.Variable(fine, 1, np.array([4])),  # the first to go, and made of what is coarser
        _fronts.Variable(coarse, 3, np.array([0, 1, 2]), -1),
        *[_fronts.Variable((1, 1), 2, np.array([5, 5]))] * point,
    ]

    def coupling(row, column, scaled):
        a, b = variables[row], variables[column]
        shifts = tuple(
            tuple(tuple(map(int, rng.integers(0, n, rng.integers(1, 3)))) for _ in range(2))
            for n in np.maximum(a.torus, b.torus)
        )
        kernel = rng.standard_normal((4, a.channels, b.channels)) * 0.04
        return _fronts.Coupling(row, column, kernel, shifts, np.zeros(kernel.shape[1:]), scaled)

    pairs = [(1, 0, True), (2, 1, True), (2, 0, True), (3, 2, True), (3, 1, True), (4, 1, False)]
    pairs += [(5, 3, False), (5, 2, False)] * point
    monkeypatch.setattr(_fronts, "_CHUNK", 2000)
    fronts = _fronts.Fronts(variables, [coupling(*pair) for pair in pairs])
    assert len(fronts.bands) > 1
    theta = 0.2 * rng.standard_normal(fronts.count)
    matrix = dense(fronts, theta)
    value, gradient = fronts.barrier(theta, 0.01)
    np.testing.assert_allclose(value, -np.linalg.slogdet(matrix - 0.01 * np.eye(len(matrix)))[1])
    step, counts = 1e-5 * rng.standard_normal(fronts.count), [0.1] * (len(variables) - 1) + [0.5]
    for weights in (None, counts):
        ends = [fronts.barrier(theta + s * step, 0.01, weights)[0] for s in (1, -1)]
        gradient = fronts.barrier(theta, 0.01, weights)[1]
        np.testing.assert_allclose(gradient @ step, (ends[0] - ends[1]) / 2, rtol=1e-6)
    least = np.linalg.eigvalsh(matrix)[0]
    assert fronts.definite(theta, least - 1e-9)
    assert not fronts.definite(theta, least + 1e-9)


# Networks.


def layers(rng):
    """Kernels 3 taps wide, one after the other."""

    def kernel(*shape):
        return rng.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))

    k1, k2, k3, back = kernel(3, 2, 3), kernel(3, 3, 2), kernel(3, 2, 3), kernel(3, 3, 2)
    w1, w2, w3, four = kernel(8, 3), kernel(3, 3), kernel(2, 3), kernel(4, 3, 2)
    square, last = kernel(3, 3, 1, 2), kernel(4, 4, 2, 2)
    scale = rng.standard_normal((1, 1, 3))

    def residual(x, activate=relu):
        y = x + conv(activate(conv(x, k1)), k2)
        return y + conv(activate(conv(y, k3)), back)

    def preactivated(x):
        y = conv(x, k1)
        y = y + conv(relu(conv(relu(y), k2)), k1)
        return conv(relu(y * scale + 1), back, 2)

    def head(x):
        y = relu(conv(relu(conv(x, k1)), k2, 2))
        return relu(relu(y.reshape(1, -1) @ w1) @ w2)[:, 0]

    def pooled(x):
        y = nn.max_pool(relu(conv(x, k1)), (2,), (2,))
        return jnp.tanh(conv(y, k2)).sum(1) @ w3

    wide, image = np.zeros((1, 8, 2)), np.zeros((1, 4, 4, 1))
    return {
        "zeros": (lambda x: conv(relu(conv(relu(conv(x, k1)), k2)), k3), wide),
        "around": (lambda x: conv(relu(conv(x, k1, 1, "CIRCULAR")), k2, 1, "CIRCULAR"), wide),
        "leaky, around, strided": (
            lambda x: conv(nn.leaky_relu(conv(x, k1, 1, "CIRCULAR"), 0.3), four, 2, "CIRCULAR"),
            wide,
        ),
        "strided": (lambda x: conv(relu(conv(relu(conv(x, k1, 2)), k2)), k3, 2), wide),
        "dilated": (lambda x: conv(relu(conv(x, k1, dilation=2)), k2), wide),
        "gelu": (lambda x: conv(jax.nn.gelu(conv(jax.nn.gelu(conv(x, k1)), k2, 2)), k3), wide),
        "residual": (residual, wide[:, :7]),
        "residual, gelu": (lambda x: residual(x, jax.nn.gelu), wide[:, :5]),
        "preactivated": (preactivated, wide[:, :7]),
        "dense head": (head, wide),
        "pools": (pooled, wide),
        "two dimensions": (lambda x: conv(relu(conv(x, square)), last, 2), image),
        "a batch": (lambda x: conv(relu(conv(x, k1)), k2), np.zeros((2, 5, 2))),
    }


@pytest.mark.parametrize("name", layers(np.random.default_rng(0)))
def test_never_below_the_best_of_single_entries(name):
    """The tightest bound of single entries is below every one by channels, and above the truth."""
    for seed in range(1):
        fn, x = layers(np.random.default_rng(seed))[name]
        least = sn_jax.lipschitz_bound(fn, x, method="tight", progress=False)
        by_sources, by_channels = bounds(fn, x)
        tight = dict(least.bounds)["tight"]
        assert tight * (1 - 1e-5) <= by_channels <= by_sources * (1 + 1e-6)
        assert by_channels <= 1.3 * least.bounds[0][1]


def test_around_a_torus_nothing_is_lost():
    """Without borders the best multipliers are the same at every pixel (their mean over all shifts
    is as good); the search ends 1.018 times above them."""
    rng = np.random.default_rng(0)
    k1, k2 = rng.standard_normal((3, 1, 2)), rng.standard_normal((3, 2, 1))
    fn = lambda x: conv(relu(conv(x, k1, 1, "CIRCULAR")), k2, 1, "CIRCULAR")  # noqa: E731
    x = np.zeros((1, 5, 1))
    first, last = (
        np.asarray(jax.jacobian(lambda x, k=k: conv(x, k, 1, "CIRCULAR").ravel())(np.zeros(shape)))
        for k, shape in ((k1, (1, 5, 1)), (k2, (1, 5, 2)))
    )
    exact = every_slope(last.reshape(5, 10), first.reshape(10, 5))
    tight = dict(sn_jax.lipschitz_bound(fn, x, method="tight", progress=False).bounds)["tight"]
    assert exact <= tight * (1 - 1e-6) <= bounds(fn, x)[1] <= 1.05 * tight


def test_a_torus_that_is_too_small_is_none():
    table = np.array([[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, -1]])
    assert _torus._shifts(table, 4, 4, 4) is None  # the last output would see the first pixel
    assert _torus._shifts(table, 4, 5, 5) == ((4,), (0,), (1,))
    assert _torus._shifts(table % 4 + 4 * (table < 0), 4, 5, 5) is None
    around = np.array([[3, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 0]])
    assert _torus._shifts(around, 4, 4, 4) == ((3,), (0,), (1,))
    assert _torus._shifts(around, 4, 5, 5) is None


def test_mirrored_borders_are_no_torus():
    k = np.random.default_rng(0).standard_normal((3, 2, 2))
    mirrored = lambda x: conv(jnp.pad(x, ((0, 0), (1, 1), (0, 0)), "reflect"), k, 1, "VALID")  # noqa: E731
    with pytest.raises(_torus.NoTorusError):
        bounds(lambda x: mirrored(relu(mirrored(x))), np.zeros((1, 6, 2)))
