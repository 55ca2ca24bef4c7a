"""Cases that every view must pass, with independent NumPy oracles, and known spectra."""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax


def svd_rtol(shape: tuple[int, ...], dtype=np.float64) -> float:
    """How far the computed norm of matrices (..., m, n) may be from the true one, relative to it.

    The backward error of an SVD, of products and of the QR factors of a known spectrum: each is
    exact for a matrix that differs by some n eps, with n the larger side. Which BLAS kernels
    a processor runs decides how much of it is seen.
    """
    return 16 * max(shape[-2:]) * float(jnp.finfo(dtype).eps)


def compiles(dtype) -> bool:
    """Whether XLA has this type here: it has no float16 for processors without F16C."""
    try:
        jax.jit(lambda x: x.astype(jnp.float32)).lower(jax.ShapeDtypeStruct((8,), dtype)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" in str(error):
            return False
        raise
    return True


HAS_FLOAT16 = compiles(jnp.float16)
needs_float16 = pytest.mark.skipif(not HAS_FLOAT16, reason="XLA has no float16 on this processor")


@dataclass(frozen=True)
class Case:
    """A view on a kernel shape, and the explicit matrix (NumPy only) that it must act as."""

    name: str
    view: Any
    shape: tuple[int, ...]
    to_dense: Callable[[np.ndarray], np.ndarray]  # kernel -> (*batch, out, in)
    from_dense: Callable[[np.ndarray], np.ndarray] | None = None  # where any matrix can be had

    @property
    def batch(self) -> tuple[int, ...]:
        return self.to_dense(np.zeros(self.shape)).shape[:-2]

    def weights(self, seed: int, gap: float = 0.1) -> np.ndarray:
        """A random kernel; if the view allows it, with sigma_2 = (1 - gap) sigma_1."""
        rng = np.random.default_rng(seed)
        if self.from_dense is None:
            return rng.standard_normal(self.shape)
        dense = self.to_dense(np.zeros(self.shape))
        return self.from_dense(known_spectrum(rng, dense.shape, gap))

    @property
    def rtol(self) -> float:
        return svd_rtol(self.to_dense(np.zeros(self.shape)).shape)

    def norms(self, w) -> np.ndarray:
        return np.linalg.norm(self.to_dense(np.asarray(w, np.float64)), 2, (-2, -1))


def known_spectrum(rng, shape, gap: float) -> np.ndarray:
    """Matrices (*batch, m, n) with random singular vectors and norms 1 + batch index."""
    *batch, m, n = shape
    r = min(m, n)
    out = np.empty(shape)
    for i, index in enumerate(np.ndindex(*batch)):
        u = np.linalg.qr(rng.standard_normal((m, r)))[0]
        v = np.linalg.qr(rng.standard_normal((n, r)))[0]
        s = np.concatenate([[1.0], (1 - gap) * np.linspace(1, 0.1, r - 1)]) if r > 1 else [1.0]
        out[index] = (i + 1) * (u * s) @ v.T
    return out


def matrix_case(name, in_axes, out_axes, shape) -> Case:
    ndim = len(shape)
    ins = [a % ndim for a in np.atleast_1d(in_axes)]
    outs = [a % ndim for a in np.atleast_1d(out_axes)]
    batch = [a for a in range(ndim) if a not in ins + outs]
    order = (*batch, *sorted(outs), *sorted(ins))
    b, o, i = ([shape[a] for a in sorted(axes)] for axes in (batch, outs, ins))

    def to_dense(w):
        return w.transpose(order).reshape(*b, int(np.prod(o)), int(np.prod(i)))

    def from_dense(matrix):
        return matrix.reshape(*b, *o, *i).transpose(np.argsort(order))

    return Case(name, sn_jax.Matrix(in_axes, out_axes), shape, to_dense, from_dense)


def conv_matrix(w: np.ndarray, size: tuple[int, int], stride: int) -> np.ndarray:
    """(out, in) matrix of a SAME-padded 2-D convolution, pixel by pixel as XLA pads it."""
    kh, kw, cin, cout = w.shape
    outs = [-(-n // stride) for n in size]
    lows = [max((o - 1) * stride + k - n, 0) // 2
            for o, k, n in zip(outs, (kh, kw), size, strict=True)]  # fmt: skip
    matrix = np.zeros((*outs, cout, *size, cin))
    for y, x, a, b in np.ndindex(*outs, kh, kw):
        i, j = y * stride + a - lows[0], x * stride + b - lows[1]
        if 0 <= i < size[0] and 0 <= j < size[1]:
            matrix[y, x, :, i, j, :] += w[a, b].T
    return matrix.reshape(int(np.prod(outs)) * cout, -1)


def conv_case(name, shape, size, stride) -> Case:
    view = sn_jax.Conv(size, stride)
    return Case(name, view, shape, lambda w: conv_matrix(w, size, stride))


def masked_case(name, in_axes, out_axes, shape) -> Case:
    """The layer multiplies by a constant times the kernel: a mask with zeros and signs."""
    factor = np.random.default_rng(40).integers(-1, 3, shape).astype(np.float32)
    plain = matrix_case(name, in_axes, out_axes, shape)
    view = sn_jax.Scaled(plain.view, factor)
    return Case(name, view, shape, lambda w: plain.to_dense(w * factor.astype(w.dtype)))


def weighted_sums(w, x):
    return w * jnp.cumsum(x)


CASES = [
    matrix_case("dense", -2, -1, (12, 7)),
    matrix_case("per-head", 0, 2, (10, 3, 5)),
    matrix_case("scanned-heads-out", (1, 2), 3, (2, 3, 4, 9)),
    conv_case("conv-operator", (3, 3, 2, 3), (5, 4), 2),
    masked_case("masked-heads", 0, 2, (10, 3, 5)),
    Case("linear", sn_jax.Linear(weighted_sums, 6), (6,), lambda w: w[:, None] * np.tri(6)),
]


def state_of(case: Case, w, seed=0, **kwargs) -> sn_jax.State:
    return sn_jax.init({"w": w}, jax.random.key(seed), {"w": case.view}, **kwargs)


def normalize(w, state, **kwargs):
    return sn_jax.spectral_normalize({"w": w}, state, **kwargs)[0]["w"]


def by_definition(case: Case, w, state, bound=1.0):
    """c W / <u, A_W v> through a matrix made of A_W's columns, u and v constant: no library code
    but the view's matvec, which test_views checks against NumPy."""
    u, v = state["w"].u, state["w"].v
    k_axis = len(case.batch)
    u, v = jnp.take(u, 0, k_axis), jnp.take(v, 0, k_axis)
    product = u * case.view.matvec(w, v)
    sigma = jnp.sum(product, tuple(range(k_axis, product.ndim)))
    return case.view.scale(w, bound / sigma)


@contextmanager
def checking_leaks():
    """``jax.checking_leaks``. At every suspicion it has Python look through all objects; here only
    through new ones, for no older one is a tracer of what is traced inside."""
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():
        yield


@contextmanager
def count_compilations():
    """Counts XLA compilations: ``with count_compilations() as compiled: ...; len(compiled)``."""
    compiled, active = [], True

    def listener(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        active = False
