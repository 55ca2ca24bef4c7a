"""Spectral norms as an optax transformation: parameters that stay within a ball."""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from sn_jax import _core
from sn_jax._core import Bound, Rules, State
from sn_jax._views import View, compute_dtype

# Half of what exact=True promises; the rest is for the error of the norm itself.
_TOLERANCE = 5e-6
_MOST = 2**14


class ProjectSpectralNormState(NamedTuple):
    """State of ``project_spectral_norm``: what is projected, how it is seen, with which vectors.

    Attributes:
      singular: path -> Singular. Its sigma is the norm before the last projection: an estimate,
        or exact with ``exact=True``.
    """

    singular: State


def project_spectral_norm(
    rules: Rules | None,
    key: Array,
    *,
    bound: Bound = 1.0,
    n_steps: int | Array = 1,
    exact: bool = False,
) -> optax.GradientTransformation:
    """Project parameters onto the ball of spectral norm ``bound``, after every update.

    The last transformation of a chain: it turns updates into those after which
    ``optax.apply_updates`` gives ``W min(1, bound / sigma(W))``, with W the parameters that the
    updates would have given. Entries that this does not change keep their update as it is.

    By default sigma is an estimate from below by ``n_steps`` of power iteration, so the norm
    tracks the ball and exceeds it a little: as measured by ``tests/test_transforms.py`` with
    one step on a 64 x 48 and a batch of 32 x 32 kernels, by up to 2 % under Adam at 1e-3 and by
    up to 50 % where each update is a fresh Gaussian matrix as large as the parameters. With
    ``exact=True`` the norm is that of the explicit matrix, and after every update, however
    large, and in every dtype, the true norm is at most ``bound * (1 + 1e-5)``. What rounding in
    ``params + updates`` could add is taken off the target: that is less than 1e-5 in float32,
    unless the parameters were far outside of the ball, and a few percent in bfloat16.

    Args:
      rules: regular expression -> view, as for ``sn_jax.init``; ``None`` for its defaults.
        Leaves that ``optax.masked`` hides match no rule.
      key: PRNG key for the vectors.
      bound: > 0, one number or a mapping path -> number. May be traced, as
        ``optax.inject_hyperparams`` passes it.
      n_steps: power-iteration steps per update, >= 0.
      exact: take the norm of the explicit matrix, by eigenvalues of its Gram matrix on the
        smaller side. Costs the cube of that side, which must be at most 16384.

    Returns:
      optax.GradientTransformation: its state is a ``ProjectSpectralNormState``, and its
      ``update`` needs ``params``.

    Raises:
      ValueError: ``bound`` or ``n_steps`` out of range; nothing matched (at ``init``); no
        ``params`` (at ``update``); a matrix too large for ``exact=True``.
      TypeError: ``exact`` is not a bool, or ``n_steps`` not an integer.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 0.5]))}
      >>> project = project_spectral_norm(None, jax.random.key(0), bound=1.0)
      >>> optimizer = optax.chain(optax.sgd(0.1), project)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"kernel": jnp.zeros((2, 2))}, state, params)
      >>> print(optax.apply_updates(params, updates)["kernel"])
      [[1.   0.  ]
       [0.   0.25]]
    """
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be True or False, not traced; got {exact!r}.")

    def init(params):
        # Projects nothing: for the checks of bound and n_steps, where users can see the cause.
        state = _core.init(params, key, rules)
        jax.eval_shape(partial(project, n_steps=n_steps), params, state)
        return ProjectSpectralNormState(state)

    def project(stepped, state, n_steps):
        return _core.spectral_normalize(
            stepped, state, n_steps=n_steps, bound=bound, mode="clip", gradient="stop"
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "project_spectral_norm needs the parameters that it projects: call "
                "optimizer.update(grads, opt_state, params)."
            )
        stepped, state = optax.apply_updates(params, updates), state.singular
        if exact:
            projected, state = _exactly(params, stepped, state, bound)
        else:
            projected, state = project(stepped, state, n_steps)
        # Where nothing changed, the difference could differ from the update by rounding.
        updates = jax.tree.map(
            lambda new, old, p, u: jnp.where(new == old, u, (new - p).astype(u.dtype)),
            projected, stepped, params, updates,
        )  # fmt: skip
        return updates, ProjectSpectralNormState(state)

    return optax.GradientTransformation(init, update)
