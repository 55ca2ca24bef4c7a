"""Classifiers: constants of differences of outputs, and the radius that these certify.

Between two outputs a network moves by at most what their difference does, which is less than
``sqrt(2)`` times the constant of all outputs together.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sn_jax._graph import told_plainly
from sn_jax._lipschitz import LipschitzBound, lipschitz_bound


def margin_bounds(
    fn: Callable[[Any], Any],
    x: Any,
    *,
    method: str = "auto",
    rtol: float = 1e-6,
    steps: int = 50,
    progress: bool = True,
) -> np.ndarray:
    r"""Certified Lipschitz constants of all differences of two outputs.

    ``|(f_i - f_j)(a) - (f_i - f_j)(b)| <= L_ij |a - b|``, each the least of its own bound and of
    ``sqrt(2)`` times that of all outputs together.

    Args:
      fn: of one floating array; its result holds k numbers, in any shape.
      x: an argument, as an example of shape and dtype: one example, not a batch of them.
      method, rtol, steps: of ``lipschitz_bound``.
      progress: whether to show a bar on stderr after two seconds.

    Returns:
      numpy.ndarray: (k, k), symmetric, with zeros on the diagonal.

    Raises:
      ValueError: fewer than two outputs; whatever ``lipschitz_bound`` raises.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> print(margin_bounds(lambda x: w @ x, jnp.zeros(2))[0, 1].round(6))
      5.0
    """
    with told_plainly(jnp.shape(x)):
        n = jax.eval_shape(lambda x: jnp.ravel(fn(x)), x).size
    if n < 2:
        raise ValueError(f"There are no margins between {n} outputs: fn must have two or more.")
    options: dict[str, Any] = {"method": method, "rtol": rtol, "steps": steps, "progress": False}
    whole = math.sqrt(2) * lipschitz_bound(fn, x, **options).upper * (1 + 2.0**-50)
    out = np.zeros((n, n))
    pairs = [*combinations(range(n), 2)]
    for i, j in tqdm(pairs, "margin_bounds", delay=2, leave=False, disable=not progress):

        def difference(x, i=i, j=j):
            y = jnp.ravel(fn(x))
            return y[i] - y[j]

        out[i, j] = out[j, i] = min(whole, lipschitz_bound(difference, x, **options).upper)
    return out


def certified_radius(
    logits: Any, bound: float | LipschitzBound | np.ndarray, *, error: float = 0.0
) -> np.ndarray:
    r"""How far an input can move in l2 before the largest output is another one.

    ``min over j != i of (f_i - f_j - 2 error) / L_ij`` for the largest output i, with ``sqrt(2) L``
    in place of ``L_ij`` where one constant of all outputs is given (Tsuzuku et al. 2018, prop. 1);
    rounded down.

    Args:
      logits: (..., k), k >= 2.
      bound: a constant of all outputs together, a number or a ``LipschitzBound``; or (k, k), those
        of all differences, from ``margin_bounds``.
      error: by how much a logit may differ from that of the real-arithmetic function, >= 0: the
        constants are of that.

    Returns:
      numpy.ndarray: (...,) float64, >= 0; infinite where nothing moves.

    Raises:
      ValueError: fewer than two logits; constants of another shape, negative or NaN; ``error`` not
        >= 0.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> margins = margin_bounds(lambda x: w @ x, jnp.ones(2))
      >>> print(f"{certified_radius(w @ jnp.ones(2), margins):.6f}")
      0.200000
    """
    logits = np.asarray(logits).astype(np.float64)
    k = logits.shape[-1] if logits.ndim else 0
    if k < 2:
        raise ValueError(f"logits must be (..., k) with k >= 2; got shape {logits.shape}.")
    if not error >= 0:
        raise ValueError(f"error must be >= 0; got {error}.")
    if isinstance(bound, LipschitzBound):
        bound = bound.upper
    constants = np.asarray(bound, np.float64)
    if constants.shape == ():
        constants = np.full((k, k), constants * math.sqrt(2) * (1 + 2.0**-50))
    if constants.shape != (k, k) or not np.all(constants >= 0):
        raise ValueError(
            f"bound must be one constant >= 0, or one for each pair of the {k} logits as "
            f"margin_bounds gives them; got shape {constants.shape} with a least of "
            f"{np.min(constants, initial=math.inf)}."
        )
    top = np.argmax(logits, -1)
    margins = np.take_along_axis(logits, top[..., None], -1) - logits
    # A difference errs by a rounding of its own, and so do the products.
    margins = margins * (1 - 2.0**-50) - 2 * error * (1 + 2.0**-50)
    with np.errstate(divide="ignore", invalid="ignore"):
        radii = np.maximum(margins, 0.0) / constants[top] * (1 - 2.0**-50)
    radii = np.where(margins > 0, radii, 0.0)
    others = np.arange(k) != top[..., None]
    return np.min(np.where(others, radii, math.inf), -1)
