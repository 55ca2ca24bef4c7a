"""Brackets of norms and Lipschitz bounds against interval arithmetic, which proves what it says.

An SVD rounds as what it judges does. Here every number is an interval that holds its exact value,
of 200 bits, and a matrix is positive definite, or not, where all pivots have a sign: mpmath's
intervals, and Arb's balls as well where python-flint is installed.
"""

import contextlib
from itertools import product

import jax
import mpmath
import numpy as np
import pytest

import sn_jax
from experiments.certify import oracle

ARITHMETICS = {"mpmath": mpmath.iv.mpf}
with contextlib.suppress(ModuleNotFoundError):
    import flint

    ARITHMETICS["arb"] = flint.arb
METHODS = ("product", "merged", "joint", "shift", "ellipsoid", "tight")
RNG = np.random.default_rng(0)


@pytest.fixture(params=ARITHMETICS)
def exact(request, monkeypatch):
    """From arrays of floats to arrays of intervals that hold these numbers and no others."""
    monkeypatch.setattr(mpmath.iv, "prec", 200)
    if "arb" in ARITHMETICS:
        monkeypatch.setattr(flint.ctx, "prec", 200)
    number = ARITHMETICS[request.param]
    return np.vectorize(lambda x: number(float(x)), otypes=[object])


def is_definite(a: np.ndarray) -> bool:
    """Whether a symmetric matrix of intervals is positive definite, proved by the signs of the
    pivots of its LDL^T; an error where intervals are too wide to tell."""
    a = a.copy()
    for k in range(len(a)):
        pivot = a[k, k]
        if not pivot > 0:
            assert pivot < 0, f"the sign of {pivot} is not known: more bits are needed"
            return False
        for i in range(k + 1, len(a)):
            a[i, k + 1 : i + 1] -= a[k + 1 : i + 1, k] * (a[i, k] / pivot)
    return True


def is_above(c, a: np.ndarray) -> bool:
    """Whether the number c exceeds the norm of a matrix of intervals."""
    a = a if len(a) < a.shape[1] else a.T
    return is_definite(np.diag(np.full(len(a), c * c)) - a @ a.T)


def test_the_last_bit_is_decided(exact):
    a = exact([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]])  # of norm 5
    above, below = exact(np.nextafter(5.0, [6.0, 4.0]))
    assert is_above(above, a)
    assert not is_above(below, a)


def orthogonal(n: int) -> np.ndarray:
    """But for rounding: all singular values within 1e-15 of each other."""
    return np.linalg.qr(RNG.standard_normal((n, n)))[0]


DENSE, SIZE = sn_jax.Matrix(0, 1), (4, 3)
KERNEL = RNG.standard_normal((3, 2, 2, 2))
NORMS = {
    "dense": (RNG.standard_normal((9, 6)), DENSE),
    "near-orthogonal": (orthogonal(7), DENSE),
    "rank one": (np.outer(RNG.standard_normal(6), RNG.standard_normal(7)), DENSE),
    "graded": (RNG.standard_normal((6, 6)) * 10.0 ** -np.arange(0, 18, 3), DENSE),
    "small": (1e-30 * RNG.standard_normal((5, 8)), DENSE),
    "float16": (RNG.standard_normal((6, 6)).astype(np.float16), DENSE),
    "batch": (RNG.standard_normal((2, 4, 5)), sn_jax.Matrix(1, 2)),
    "SAME": (KERNEL, sn_jax.Conv(SIZE)),
    "strided": (KERNEL, sn_jax.Conv(SIZE, strides=2)),
    "circular": (KERNEL, sn_jax.Conv(SIZE, padding="CIRCULAR")),
    "reflected": (KERNEL, sn_jax.Conv(SIZE, padding="REFLECT")),
}


@pytest.mark.parametrize("name", NORMS)
def test_brackets_of_norms(exact, name):
    """At the rtol that is promised, and as tight as they go."""
    w, view = NORMS[name]
    matrices = oracle.matrices(exact(w), view).reshape(-1, *oracle.matrices(w, view).shape[-2:])
    for rtol in (1e-9, 1e-15):
        with contextlib.nullcontext() if rtol == 1e-9 else pytest.warns(UserWarning, match="rtol"):
            lower, upper = (np.ravel(end) for end in sn_jax.norm_bounds(w, view, rtol=rtol))
        for a, least, most in zip(matrices, exact(lower), exact(upper), strict=True):
            assert is_above(most, a)
            assert not is_above(least, a)


def test_a_chain_of_linear_maps(exact):
    """Merged in float64: what its products rounded away is in the bound, and no more than that."""
    rng = np.random.default_rng(1)
    maps = [rng.standard_normal(shape) for shape in ((6, 5), (7, 6), (4, 7))]

    def chain(x):
        for w in maps:
            x = w @ x
        return x

    whole = exact(np.eye(5))
    for w in maps:
        whole = exact(w) @ whole
    bound = sn_jax.lipschitz_bound(chain, np.zeros(5), method="merged", rtol=1e-13)
    found = dict(bound.bounds)
    for method, value in zip(found, exact([*found.values()]), strict=True):
        assert is_above(value, whole), method
    assert not is_above(*exact([found["merged"] * (1 - 1e-11)]), whole)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_every_pattern_of_a_hidden_layer(exact, skip):
    """More inputs than hidden units: every pattern of slopes occurs, and the largest norm of all
    these Jacobians is the constant."""
    rng = np.random.default_rng(2)
    first, last = rng.standard_normal((5, 6)), rng.standard_normal((3, 5))
    through = skip * rng.standard_normal((3, 6))

    def net(x):
        return last @ jax.nn.relu(first @ x) + through @ x

    found = dict(sn_jax.lipschitz_bound(net, np.zeros(6), method="tight").bounds)
    assert tuple(found) == METHODS
    a, b, s = exact(first), exact(last), exact(through)
    jacobians = [b @ (exact(slopes)[:, None] * a) + s for slopes in product((0.0, 1.0), repeat=5)]
    for method, value in zip(found, exact([*found.values()]), strict=True):
        assert all(is_above(value, jacobian) for jacobian in jacobians), method
    (less,) = exact([found["tight"] / 1.05])
    assert not all(is_above(less, jacobian) for jacobian in jacobians)


@pytest.mark.parametrize("method", METHODS)
def test_constants_that_are_attained(exact, method):
    """A chain of numbers: every bound is the constant itself, and rounds upwards."""
    factors = np.random.default_rng(3).uniform(0.1, 2, 12)

    def chain(x):
        for factor in factors:
            x = jax.nn.relu(factor * x)
        return x

    constant = np.prod(exact(factors))
    found = dict(sn_jax.lipschitz_bound(chain, np.zeros(1), method=method, rtol=1e-13).bounds)
    value, more = exact([found[method], found[method] * (1 - 1e-6)])
    assert constant <= value
    assert more < constant
