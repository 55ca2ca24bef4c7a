"""check_view accepts every view of ours, and names what is broken in one of each kind."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES

from sn_jax import Matrix, Scaled
from sn_jax.testing import check_view

pytestmark = pytest.mark.float32
SHAPE = (3, 5, 4)  # (batch, in, out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_views_keep_it(case):
    check_view(case.view, case.shape)


class Stack:
    """A stack of matrices, each method as it should be."""

    def batch_shape(self, shape):
        return shape[:1]

    def domain(self, shape):
        return shape[1:2]

    def matvec(self, w, x):
        return jnp.einsum("bio,bi->bo", w, x, precision="highest")

    def scale(self, w, factor):
        return (w * factor[:, None, None]).astype(w.dtype)

    def vector_axes(self, ndim):
        return (0,), (1,), (2,)


def whole(**methods):
    return dataclass(frozen=True)(type("Own", (Stack,), methods))()


def test_a_view_of_ones_own_keeps_it():
    check_view(whole(), SHAPE)


class Unequal(Stack):
    def __init__(self):
        self.key = object()

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return 0


@dataclass
class Mutable(Stack):
    sizes: list


def product(w, x):
    return Stack().matvec(w, x)


def matvec(change):
    return whole(matvec=lambda self, w, x: change(w, x))


def scale(change):
    return whole(scale=lambda self, w, f: change(w, f[:, None, None]))


def another_under_jit(w, x):
    return product(w, x * (1 if isinstance(w, jax.core.Tracer) else 2))


BROKEN = {
    "not hashable": (Mutable([]), "not hashable"),
    "not equal": (Unequal(), "differs from a copy"),
    "affine": (matvec(lambda w, x: product(w, x) + 1e-2), "not linear in x"),
    "quadratic": (matvec(lambda w, x: product(w, x * x)), "not linear in x"),
    "squares w": (matvec(lambda w, x: product(w * w, x)), "not linear in w"),
    "several arrays": (matvec(lambda w, x: (product(w, x), x)), "must return one array"),
    "batch last": (matvec(lambda w, x: product(w, x).T), "does not begin with batch"),
    "under jit": (matvec(another_under_jit), "something else under jit"),
    "mixed batch": (
        matvec(lambda w, x: product(w, x + jnp.roll(x, 1, 0))), "depends on another one's x"),
    "list": (whole(domain=lambda self, shape: [shape[1]]), "tuple of integers"),
    "scaled twice": (scale(lambda w, f: (w * f * f).astype(w.dtype)), "not f times"),
    "scaled by the first": (scale(lambda w, f: (w * f[:1]).astype(w.dtype)), "not f times"),
    "scaled wider": (scale(lambda w, f: w * f), "returns float32"),
    "scaled less": (scale(lambda w, f: (w * f).astype(w.dtype)[:1]), "returns the shape"),
    "scaled by a constant": (
        scale(lambda w, f: (w * jax.lax.stop_gradient(f)).astype(w.dtype)), "the gradient is not"),
    "wrong axes": (whole(vector_axes=lambda self, ndim: ((0,), (2,), (1,))), "vector_axes"),
    "too few axes": (whole(vector_axes=lambda self, ndim: ((), (1,), (2,))), "vector_axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
    view, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_view(view, SHAPE)


def test_what_it_does_not_take():
    with pytest.raises(TypeError, match="write Matrix"):
        check_view(Matrix, (3, 4))
    with pytest.raises(ValueError, match="smaller shape"):
        check_view(Matrix(), (4096, 4096))
    with pytest.raises(ValueError, match="names axis 3"):
        check_view(Matrix(0, 3), (3, 4))
    check_view(Scaled(replace(Matrix(), in_axes=(0,), out_axes=(1,)), np.eye(3, 4)), (3, 4))
    check_view(Matrix(), (3, 4), rtol=1e-3)
