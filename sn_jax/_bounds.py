"""Bounds on norms, as users give them: one number, one for each path, or relative to the sizes.

Here belongs what turns them into a number for each parameter, and their errors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import register_dataclass

from sn_jax._rules import closest, label, listing
from sn_jax._views import kind_of


@partial(register_dataclass, data_fields=("c",), meta_fields=())
@dataclass(frozen=True)
class RmsBound:
    """What ``rms_bound(c)`` returns; to ``jit`` a pytree with the one leaf ``c``."""

    c: Any

    def __repr__(self) -> str:
        return f"rms_bound({self.c!r})"


# A bound for all norms, or for each path; for each element of a batch where it is an array.
Bound = float | Array | np.ndarray | RmsBound
Norms = Bound | Mapping[str, Bound]


def rms_bound(c: float | Array | np.ndarray = 1.0) -> RmsBound:
    r"""A bound on the RMS to RMS norm: ``R = c sqrt(n_out / n_in)`` for each parameter's own map.

    With ``|x|_RMS = |x| / sqrt(n)``, the norm of a map from RMS to RMS is
    ``sigma sqrt(n_in / n_out)`` (Bernstein & Newhouse 2024, section 2), so that with this bound it
    is at most c, whatever the widths are: what the spectral sphere and Muon with spectral radii
    use. ``n_in`` and ``n_out`` are the sizes of the view's domain and codomain, batch axes
    apart: features of a dense layer, ``(heads, dim)`` together or of one head, channels times
    pixels of a convolution as an operator (with stride s, R contains ``1 / s``).

    Args:
      c: > 0, a number, which may be traced, or an array of the norms' shape.

    Returns:
      RmsBound: to be given wherever ``bound`` is taken, or as a value of a mapping from paths.

    Raises:
      ValueError, TypeError: (where it is used) c is no positive, finite number, or of a wrong
        shape.

    Example:
      >>> import jax, sn_jax
      >>> params = {"up": {"kernel": jnp.ones((16, 64))}, "down": {"kernel": jnp.ones((64, 16))}}
      >>> state = sn_jax.init(params, jax.random.key(0))
      >>> params, state = sn_jax.spectral_normalize(params, state, bound=rms_bound(0.5))
      >>> norms = sn_jax.spectral_norms(params, state)
      >>> print({path: round(float(sigma), 3) for path, sigma in norms.items()})
      {'down/kernel': 0.25, 'up/kernel': 1.0}
    """
    return RmsBound(c)


def by_path(
    bound: Norms, state: Mapping[str, Any], name: str = "bound", *, zero: bool = False
) -> Mapping[str, Any]:
    """A number or array for each path; checked against its norms where the state's entry is given.

    Args:
      bound: as the user gave it.
      state: path -> Singular, or None where it is not known yet; an ``rms_bound`` stays one there.
      name: of the argument, for errors.
      zero: whether 0 will do.
    """
    bounds = bound if isinstance(bound, Mapping) else dict.fromkeys(state, bound)
    if bounds.keys() != state.keys():
        missing = sorted(state.keys() - bounds.keys())
        unknown = sorted(bounds.keys() - state.keys())
        near = closest(unknown[0], state, 1) if unknown else []
        raise ValueError(
            f"{name} as a mapping needs exactly the paths of the state"
            + (f"; missing: {listing(missing)}" if missing else "")
            + (f"; unknown: {listing(unknown)}" if unknown else "")
            + (f" (the closest to the first is {near[0]})" if near else "")
            + "."
        )
    found = {}
    for path, value in bounds.items():
        who, entry = f"{name} for {label(path)}", state[path]
        if isinstance(value, RmsBound):
            c = _checked(f"c of the rms_bound as {who}", value.c, entry, zero)
            if entry is not None and isinstance(c, Array):
                c = c.astype(entry.sigma.dtype)
            found[path] = RmsBound(c) if entry is None else c * _rms_ratio(entry)
        else:
            found[path] = _checked(who, value, entry, zero)
    return found


def _rms_ratio(singular: Any) -> float:
    """sqrt(n_out / n_in) of the map whose vectors these are: (*batch, k, *space)."""
    n_out, n_in = (math.prod(x.shape[singular.sigma.ndim + 1 :]) for x in (singular.u, singular.v))
    return math.sqrt(max(n_out, 1) / max(n_in, 1))  # an empty map has norm 0 anyway


def _checked(who: str, value: Any, singular: Any, zero: bool) -> Any:
    known = not isinstance(value, Tracer)
    number = np.asarray(value) if known else value
    numeric = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(number.dtype, kind) for kind in numeric):
        raise TypeError(
            f"{who} must be a positive number, rms_bound(c), or a mapping from paths to such; "
            f"got {kind_of(value)}."
        )
    wanted = "finite number >= 0" if zero else "positive, finite number"
    if known and not (np.all(number >= 0 if zero else number > 0) and np.all(np.isfinite(number))):
        raise ValueError(f"{who} must be a {wanted}; got {number}.")
    norms = number.shape if singular is None else singular.sigma.shape
    if number.shape not in ((), norms):
        raise ValueError(
            f"{who} has shape {number.shape}, but its norms have {norms}: give "
            "one number, or an array of that shape; where shapes differ, a mapping from paths."
        )
    return value if number.shape == () else jnp.asarray(value)
