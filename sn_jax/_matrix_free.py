r"""The norm of a linear map that is known by its products alone, from above.

For a Gaussian vector g, ``T_k(2 M / a - 1) g`` has the entry ``T_k(2 lambda / a - 1) g_1`` along
the leading eigenvector of ``M = A^T A``, whatever a is; ``|g_1|`` is hardly ever tiny, so the
length of the vector bounds lambda. (Dixon 1983 has it for powers of M, theorem 1; Kuczynski and
Wozniakowski 1992 for Chebyshev polynomials, in the proof of theorem 4.2.) Rounding is followed
through the recurrence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special

from sn_jax._symbols import UNIT, gamma

# The probability that a bound is too small, over the start vectors.
FAILURE = 1e-10
# Start vectors, products to find where the spectrum ends, and the degree of the polynomial.
_VECTORS, _POWERS, _DEGREE = 8, 6, 48

Product = Callable[[np.ndarray], np.ndarray]


class Products(NamedTuple):
    """A linear map, by what it and its transpose make of stacks (k, n) of vectors.

    Attributes:
      forward, backward: the products, in float64.
      size: n, of the domain.
      absolute: at least the norm of the map with absolute values in place of its entries.
      terms: how many roundings lie on the way of one entry, in either.
    """

    forward: Product
    backward: Product
    size: int
    absolute: float
    terms: int


def norm_above(
    products: Products, *, degree: int = _DEGREE, failure: float = FAILURE, seed: int = 0
) -> float:
    r"""At least the norm, but for a probability of ``failure``.

    Of r independent normal vectors all have ``|g_1| < tau`` with probability
    ``erf(tau / sqrt 2)^r = failure``. For any other, with ``z = 2 lambda / a - 1 >= 1`` and local
    errors ``eta_j`` of the recurrence ``t_{j+1} = 2 (2 M / a - 1) t_j - t_{j-1}``,

        |t_k| >= |T_k(z) g_1 + sum_j U_{k-j}(z) <v, eta_j>|
              >= T_k(z) (tau - sum_j (k - j + 1) |eta_j| / T_j(z)),

    since ``U_m <= (m + 1) T_m`` and ``T_{k-j} T_j <= T_k`` there. So T_k(z), and with it lambda,
    is bounded; in the sum, T_j(z) is at least what a Rayleigh quotient on the way says. Where
    z < 1, lambda is below a.
    """
    forward, backward, n, absolute, terms = products
    if n == 0 or absolute == 0 or not math.isfinite(absolute):
        return absolute if n else 0.0
    g = np.random.default_rng(seed).standard_normal((_VECTORS, n))
    length = lambda x: np.linalg.norm(x, axis=1) * (1 + gamma(n + 16))  # noqa: E731
    # Where the spectrum ends, as far as a few powers show: any a > 0 will do.
    x, a = g, 0.0
    for _ in range(_POWERS):
        y = forward(x)
        a = max(a, float(np.max(np.sum(y * y, 1) / np.sum(x * x, 1))))
        x = backward(y)
        peak = np.max(np.abs(x), 1, keepdims=True)
        if not np.all(peak > 0):
            return absolute
        x = x / peak
    if not (math.isfinite(a) and a > 1e-280):
        return absolute
    tau = math.sqrt(2) * float(scipy.special.erfinv(failure ** (1 / _VECTORS))) * (1 - 1e-9)
    # |M t| in floating point, of |t| = 1: how much it errs, and how large it is.
    errs = (2 * gamma(terms) + gamma(terms) ** 2) * absolute**2
    large = (1 + gamma(terms)) ** 2 * absolute**2
    before, now, etas, least = np.zeros_like(g), g, [], 0.0
    for j in range(1, degree + 1):
        turn = 1.0 if j == 1 else 2.0
        y, sizes = forward(now), length(now)
        after = turn * ((2 / a) * backward(y) - now) - before
        stretch = np.linalg.norm(y, axis=1) / sizes * (1 - gamma(y.shape[1] + 16))
        least = max(least, float(np.max(stretch)) - gamma(terms) * absolute)
        eta = turn * (2 / a) * errs * sizes
        eta += 8 * UNIT * (turn * (2 / a * large + 1) * sizes + length(before))
        etas.append((degree - j + 1) * eta * (1 + 1e-9))
        before, now = now, after
    angle = math.acosh(max(1.0, (2 * least**2 / a - 1) * (1 - 1e-12)))
    growths = np.cosh(np.minimum(np.arange(1, degree + 1) * angle, 700.0)) * (1 - 1e-12)
    rest = tau - np.sum(np.array(etas) / growths[:, None], 0) * (1 + 1e-12)
    if not (np.all(rest > 0) and np.isfinite(now).all()):
        return absolute
    ratio = max(1.0, float(np.max(length(now) / rest)) * (1 + 1e-12))
    growth = math.cosh(math.acosh(ratio) / degree * (1 + 1e-12)) * (1 + 1e-12)
    return min(absolute, math.sqrt(a / 2 * (1 + growth)) * (1 + 1e-12))
