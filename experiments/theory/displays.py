"""Every wrong display of the seed, as it is written and as corrected.

The errors of a display: how far its two sides are apart for a random matrix w (6, 4) in float64,
relative to the true one; NaN where it cannot be evaluated at all (shapes that do not fit, 0/0).
Corrections 1, 2, 3, 13, 18 and 21 are of notation or words: nothing of them can be evaluated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sn_jax

Matrix = np.ndarray
M, N = 6, 4


def svd(w: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """u (m, n), s (n,), d (n, n), singular vectors in columns."""
    u, s, dt = np.linalg.svd(w, full_matrices=False)
    return u, s, dt.T


def apart(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))


def undefined(compute: Callable[[], Any]) -> float:
    """NaN, after NumPy has refused the shapes."""
    try:
        return apart(compute(), 1.0)
    except ValueError:
        return np.nan


def radius(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    square = w[:N]
    sigma = svd(square)[1][0]
    h = svd(square)[2][:, 0]
    return (apart(np.abs(np.linalg.eigvals(square)).max(), sigma),
            apart(np.linalg.norm(square @ h), sigma))  # fmt: skip


def zero_matrix(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """For A = 0 every h attains the maximum, h = 0 too; on the sphere the argument goes through."""
    zero, h = 0 * w, np.zeros(N)
    on_sphere = np.eye(N)[0]
    with np.errstate(invalid="ignore"):
        written = np.linalg.norm(zero @ h) / np.linalg.norm(h)
    return float(written), float(np.linalg.norm(zero @ on_sphere))


def no_sum(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    _, s, d = svd(w)
    h = rng.standard_normal(N)
    terms, true = s**2 * (d.T @ h) ** 2, np.linalg.norm(w @ h)
    return min(apart(x, true) for x in np.sqrt(terms)), apart(np.sqrt(terms.sum()), true)


def eigenvector(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    square = w[:N]
    _, s, d = svd(square)
    x = d[:, 0]
    return apart(square @ x, (x @ square @ x) * x), apart(square.T @ square @ x, s[0] ** 2 * x)


def layer_index(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """Sizes 4, 6, 3 of h_0, h_1, h_2: W^1 is (6, 4), W^2 (3, 6); which of them acts on h_1?"""
    second, h = rng.standard_normal((3, M)), rng.standard_normal(M)
    return undefined(lambda: w @ h), apart(second @ h, np.einsum("ij,j->i", second, h))


def subscripts(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """|g1 o g2| over |g1| |g2|, minus 1 where above: as suprema of values, and as Lipschitz norms.

    g1 = cos and g2 = a sin with a < 1.
    """
    x, a = np.linspace(-4, 4, 4001), rng.uniform(0.1, 0.9)
    values = np.abs(np.cos(a * np.sin(x))).max() / (1 * a)
    slopes = np.abs(np.sin(a * np.sin(x)) * a * np.cos(x)).max() / (1 * a)
    return max(values - 1, 0.0), max(slopes - 1, 0.0)


def one_for_k(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """Norm of a layer made for K = 3: by W / sigma, and by K W / sigma."""
    state = sn_jax.init({"kernel": w}, jax.random.key(0), warmup=500)
    norms = [np.linalg.norm(sn_jax.spectral_normalize({"kernel": w}, state, n_steps=0, bound=k)[0]
                            ["kernel"], 2) for k in (1.0, 3.0)]  # fmt: skip
    return apart(norms[0], 3.0), apart(norms[1], 3.0)


def flattened(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """True norm of a convolution over its flattened kernel, and over the operator's norm."""
    kernel, view = jnp.asarray(rng.standard_normal((3, 3, 2, 2))), sn_jax.Conv((4, 4))
    columns = np.asarray(jax.jacobian(lambda x: view.matvec(kernel, x))(jnp.zeros((4, 4, 2))))
    true = np.linalg.norm(columns.reshape(32, 32), 2)
    flat = np.linalg.norm(np.asarray(kernel).reshape(18, 2), 2)
    operator = sn_jax.norm_bounds(kernel, view, rtol=1e-9).upper
    return apart(true / flat, 1.0), apart(true / operator, 1.0)


def steps(w: Matrix, normalized: bool, k: int, dtype: Any = np.float64) -> Matrix:
    x, w = np.ones(N, dtype), w.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(k):
            x = w.T @ (w @ x)
            x = x / np.linalg.norm(x) if normalized else x
    return x


def no_normalization(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """Twelve steps in float32 of a matrix of norm 47: how far the vector's length is from 1."""
    w = 47 * w / svd(w)[1][0]
    lengths = (np.linalg.norm(steps(w, unit, 12, np.float32)) for unit in (False, True))
    written, corrected = (apart(length, 1.0) for length in lengths)
    return written, corrected


def expansion(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """x^k from the coefficients of x^k, and of x^0."""
    _, s, d = svd(w)
    k, x0, xk = 3, steps(w, True, 0), steps(w, True, 3)
    by = lambda x: d @ (s ** (2 * k) * (d.T @ x))  # noqa: E731
    written, corrected = (apart(y / np.linalg.norm(y), xk) for y in (by(xk), by(x0)))
    return written, corrected


def largest_eigenvalue(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    s, top = svd(w)[1][0], np.linalg.eigvalsh(w.T @ w).max()
    return apart(s, top), apart(s**2, top)


def ratio(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    s = svd(w)[1]
    return float(s[1] / s[0]), float((s[1] / s[0]) ** (2 * 3000))


def limit(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    d = svd(w)[2][:, 0]
    d = -d * np.sign(d.sum())  # c_1 = <d, 1> < 0
    x = steps(w, True, 3000)
    return apart(x, d), apart(x, -d)


def no_transpose(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    _, s, d = svd(w)
    column = d[:, :1]
    return (undefined(lambda: column @ w.T @ w @ column),
            apart(np.sqrt(column.T @ w.T @ w @ column).item(), s[0]))  # fmt: skip


def gradient_line(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """Of one entry, against a central difference of W / sigma(W)."""
    u, s, d = svd(w)
    e, step = np.zeros_like(w), 1e-5
    e[0, 0] = 1
    bar = lambda w: w / np.linalg.norm(w, 2)  # noqa: E731
    true = (bar(w + step * e) - bar(w - step * e)) / (2 * step)
    slope = u[0, 0] * d[0, 0] / s[0] ** 2
    return apart(e / s[0] - slope, true), apart(e / s[0] - slope * w, true)


def no_transpose_u(w: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    u, s, d = svd(w)
    return (undefined(lambda: u[:, :1] @ w @ d[:, :1]),
            apart((u[:, :1].T @ w @ d[:, :1]).item(), s[0]))  # fmt: skip


TABLE: dict[str, Callable[[Matrix, np.random.Generator], tuple[float, float]]] = {
    "4": radius, "5": zero_matrix, "6": no_sum, "7": eigenvector, "8": layer_index,
    "9": subscripts, "10": one_for_k, "10b": flattened, "11": no_normalization, "12": expansion,
    "14": largest_eigenvalue, "15": ratio, "16": limit, "17": no_transpose, "19": gradient_line,
    "20": no_transpose_u,
}  # fmt: skip
