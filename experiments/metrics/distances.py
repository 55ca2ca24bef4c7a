"""Distances between two sets of features, whatever network they are of."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    ``|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``, the quantity called FID when the
    features are Inception's (Heusel et al. 2017, equation 6). With ``C = R R^T`` the trace of
    the root is the sum of singular values of ``R_x^T R_y``: stable without full rank.

    Args:
      x: (n, d).
      y: (m, d).
    """
    means, roots = [], []
    for features in (np.asarray(x, np.float64), np.asarray(y, np.float64)):
        values, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
        means.append(features.mean(0))
        roots.append(vectors * np.sqrt(np.maximum(values, 0)))
    traces = sum(np.sum(root**2) for root in roots)
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return float(np.sum((means[0] - means[1]) ** 2) + traces - 2 * cross)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets, and their size."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    x: np.ndarray, y: np.ndarray, *, n_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy under ``(x . y / d + 1)^3``, unbiased.

    The quantity called KID when the features are Inception's (Bińkowski et al. 2018, section 4
    and equation 4), over random subsets drawn without replacement. It is about 0 for equal
    distributions, sometimes below.

    Args:
      x: (n, d).
      y: (m, d).
      n_subsets: how many pairs of subsets.
      subset_size: points of each; all of the smaller set if it has fewer.
      seed: of the subsets.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(x), len(y))

    def kernel(a, b):
        inner = np.asarray(a @ b.T, np.float64) / a.shape[1] + 1
        return inner * inner * inner  # ten times faster than a power

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (size * (size - 1))

    estimates = []
    for _ in range(n_subsets):
        a, b = (s[rng.choice(len(s), size, replace=False)].astype(np.float32) for s in (x, y))
        within = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b))
        estimates.append(within - 2 * kernel(a, b).mean())
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)), size)


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(real: np.ndarray, fake: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equation 1).

    A set's manifold is the union of the balls around its points that reach to their k-th
    neighbours. Precision is the fraction of generated points inside of the real manifold, recall
    that of real points inside of the generated one. The paper takes VGG-16's features.

    Args:
      real: (n, d), n > k.
      fake: (m, d), m > k.
      k: neighbours, not counting the point itself.
    """
    return PrecisionRecall(_inside(real, fake, k), _inside(fake, real, k))


def _inside(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    """The fraction of points in the ball of some centre."""
    mean = np.mean(centres, 0)  # differences keep their digits in float32
    c, p = (jnp.asarray(x - mean, jnp.float32) for x in (centres, points))
    radii = jnp.concatenate([_squared_radii(rows, c, k) for rows in _blocks(c)])
    return float(np.mean(np.concatenate([_covered(rows, c, radii) for rows in _blocks(p)])))


def _blocks(x: Array) -> list[Array]:
    return [x[start : start + 1024] for start in range(0, len(x), 1024)]


def _squared_distances(x: Array, y: Array) -> Array:
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(x**2, 1)[:, None] - 2 * products + jnp.sum(y**2, 1)[None]


@partial(jax.jit, static_argnames="k")
def _squared_radii(x: Array, centres: Array, k: int) -> Array:
    nearest, _ = jax.lax.top_k(-_squared_distances(x, centres), k + 1)
    return -nearest[:, k]  # the first is the point itself


@jax.jit
def _covered(x: Array, centres: Array, squared_radii: Array) -> Array:
    return (_squared_distances(x, centres) <= squared_radii[None]).any(1)
