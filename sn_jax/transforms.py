"""Spectral norms as an optax transformation: parameters that stay within a ball."""

import math
import warnings
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from sn_jax import _core, _mesh, _power, _rules, _serial
from sn_jax._core import Norms, State
from sn_jax._operator import Operator
from sn_jax._rules import Rules
from sn_jax._views import View, compute_dtype

__all__ = ["ProjectSpectralNormState", "project_spectral_norm"]

# To optax's own type a state is of arrays, tuples and mappings, and no registered dataclass.
_OptState = Any
# Half of the tolerance that exact=True promises; the other half is for the error of the norm.
_TOLERANCE = 5e-6
_MOST = 2**14


class ProjectSpectralNormState(NamedTuple):
    """State of ``project_spectral_norm``: what is projected, how it is seen, with which vectors.

    Attributes:
      singular: path -> Singular. Its sigma is the norm before the last projection: an estimate,
        or exact with ``exact=True``.

    Example:
      >>> project = project_spectral_norm(None, jax.random.key(0))
      >>> state = project.init({"kernel": jnp.diag(jnp.array([2.0, 0.5]))})
      >>> print(f"{state.singular['kernel'].sigma:.2f}")
      2.00
    """

    singular: State


_serial.register_namedtuple(ProjectSpectralNormState)


def project_spectral_norm(
    rules: Rules | None,
    key: chex.PRNGKey,
    *,
    bound: Norms = 1.0,
    n_steps: int | Array | None = None,
    exact: bool = False,
) -> optax.GradientTransformation:
    """Project parameters onto the ball of spectral norm ``bound``, after every update.

    The last transformation of a chain: it turns updates into those after which
    ``optax.apply_updates`` gives ``W min(1, bound / sigma(W))``, with W the parameters that the
    updates would have given. Entries that this does not change keep their update as it is.

    By default sigma is an estimate from below, by ``n_steps`` of power iteration from where the
    last update left it. So the norm tracks the ball and exceeds it: by up to 4 % under Adam at
    1e-3, and to 2.3 times the bound where each update is white noise, as large as the parameters
    or larger. That is for one step, and small Gaussian kernels that start at 10 to
    15 times the bound: ``pytest tests/test_transforms.py -k tracks``.

    With ``exact=True`` the norm is that of the explicit matrix, and after every update, however
    large, the true norm is at most ``bound * (1 + 1e-5)``. For that, what rounding of the target
    and of ``params + updates`` could add is taken off the target: some 1e-5 of it in float32,
    more where the parameters were far outside of the ball (from a million times the bound on,
    they become zero), and 5 to 20 % in bfloat16, which is better kept for a copy.

    Args:
      rules: regular expression -> view, as for ``sn_jax.init``; ``None`` for its defaults.
        Leaves that ``optax.masked`` hides match no rule; there, rules may match nothing.
      key: PRNG key for the vectors.
      bound: > 0, one number or a mapping path -> number. May be traced, as
        ``optax.inject_hyperparams`` passes it.
      n_steps: power-iteration steps per update, >= 0; None is 1. Of no effect with
        ``exact=True``, as a warning says.
      exact: take the norm of the explicit matrix, by eigenvalues of its Gram matrix on the
        smaller side. Costs the cube of that side, which must be at most 16384.

    Returns:
      optax.GradientTransformation: its state is a ``ProjectSpectralNormState``, and its
      ``update`` needs ``params``. To ``optax.tree_map_params`` the whole of the state is one
      field that has not the parameters' structure.

    Raises:
      ValueError: ``bound`` or ``n_steps`` out of range, or nothing matched (at ``init``); no
        ``params`` (at ``update``); a matrix too large for ``exact=True``.
      TypeError: ``exact`` is not a bool, ``n_steps`` not an integer, ``key`` no PRNG key, or
        ``rules`` no mapping to views.

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
    _core.check_key(key, "project_spectral_norm(rules, key)")
    # Silent about arrays: optax.inject_hyperparams makes one of every number, at every update.
    if exact and isinstance(n_steps, int):
        warnings.warn(
            f"project_spectral_norm(exact=True) ignores n_steps={n_steps}: the norm is that of "
            "the explicit matrix. Leave n_steps out, or take exact=False.",
            stacklevel=2,
        )
    n_steps = _power.as_steps(1 if n_steps is None else n_steps)

    def init(params: optax.Params) -> _OptState:
        if isinstance(params, _placeholder()):
            one_leaf: Any = 0
            return ProjectSpectralNormState(one_leaf)
        state = _core.init(params, key, _rules_here(rules, params))
        _core.bounds_by_path(bound, state)
        if not exact:
            # Parameters often begin far outside of the ball, and the first step must land on it.
            state = _core.calibrate(params, state, rtol=1e-2)
        return ProjectSpectralNormState(state)

    def update(
        updates: optax.Updates,
        state: _OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, _OptState]:
        if params is None:
            raise ValueError(
                "project_spectral_norm needs the parameters that it projects: call "
                "optimizer.update(grads, opt_state, params)."
            )
        singular: State = state.singular
        stepped = optax.apply_updates(params, updates)
        old, mid, us = (_rules.named_leaves(tree) for tree in (params, stepped, updates))
        if exact:
            bounds = _core.bounds_by_path(bound, singular)
            projected, new = {}, {}
            for path, w in _core.weights_of(stepped, singular).items():
                before, eps = singular[path], jnp.finfo(us[path].dtype).eps
                projected[path], sigma = _project(w, old[path], bounds[path], eps, view=before.view)
                new[path] = replace(before, sigma=sigma.astype(before.sigma.dtype))
        else:
            tree, new = _core.spectral_normalize(
                stepped, singular, n_steps=n_steps, bound=bound, mode="clip", gradient="stop"
            )
            projected = _rules.named_leaves(tree)
        changed = {path: _difference(projected[path], mid[path], old[path], us[path])
                   for path in singular}  # fmt: skip
        return _rules.with_leaves(updates, changed), ProjectSpectralNormState(new)

    return optax.GradientTransformation(init, update)


@cache
def _placeholder() -> type:
    """What ``optax.tree_map_params`` passes to ``init`` in the place of parameters."""
    seen: list[Any] = []

    def init(params: optax.Params) -> optax.OptState:
        seen.append(params)
        return ()

    optax.tree_map_params(init, lambda _: None, ())
    return type(seen[0])


def _rules_here(rules: Rules | None, params: optax.Params) -> Rules | None:
    """Without those that match nothing, if ``optax.masked`` has hidden leaves."""

    def is_hidden(node):
        return isinstance(node, optax.MaskedNode)

    if rules is None or not any(map(is_hidden, jax.tree.leaves(params, is_leaf=is_hidden))):
        return rules
    return _rules.matching_rules(rules, _rules.named_leaves(params)) or rules


def _difference(projected, stepped, w, update):
    """The update that leads from w to projected; the given one where it does so."""
    dtype = compute_dtype(w.dtype)
    difference = (projected.astype(dtype) - w.astype(dtype)).astype(update.dtype)
    return jnp.where(projected == stepped, update, difference)


@partial(jax.jit, static_argnames="view")
def _project(stepped, w, bound, update_eps, *, view):
    """``stepped`` in the ball, so far that ``w`` plus the rounded difference is; and its norm."""
    operator = Operator(view, w)
    if operator.is_split:
        raise ValueError(
            f"exact=True needs the whole of a kernel of shape {w.shape} on each device, but "
            f"{view} says that shard_map splits it: use exact=False there, or project outside."
        )
    run = partial(_exact_factor, view)
    if _mesh.is_explicit(w):
        run = _mesh.on_automatic_axes(run, (operator.shardings()[0],) * 2)
    factor, sigma = run(stepped, w, bound, update_eps)
    return view.scale(stepped, factor), sigma


def _exact_factor(view, stepped, w, bound, update_eps):
    dtype = compute_dtype(w.dtype)
    sigma = _explicit_norm(view, stepped.astype(dtype))
    bound = jnp.asarray(bound, dtype)
    inside = sigma <= bound * (1 + _TOLERANCE)
    safe = jnp.where(inside, jnp.ones_like(sigma), sigma)
    # The target, its difference from w and their sum are each rounded once, by at most eps / 2
    # times |target|, |target| + |w| and about |target| (1 % for the products of these). What that
    # does to the norm is at most the Frobenius norm of the matrix with these entries.
    eps = jnp.maximum(jnp.asarray(update_eps, dtype), jnp.finfo(w.dtype).eps)
    target = jnp.abs(view.scale(stepped.astype(dtype), bound / safe))
    rounding = _explicit(view, 0.505 * eps * (jnp.abs(w.astype(dtype)) + 3 * target))
    slack = bound * (1 + _TOLERANCE) - jnp.sqrt(jnp.sum(jnp.square(rounding), (-2, -1)))
    factor = jnp.clip(slack, 0, bound) / safe
    factor = jnp.where(inside, jnp.ones_like(factor), factor)
    return jnp.where(jnp.isfinite(sigma), factor, jnp.nan), sigma


def _explicit_norm(view: View, w: Array) -> Array:
    """(*batch,): the norm of the explicit matrix, by its Gram matrix on the smaller side.

    Squaring costs the small singular values their digits, but not the largest.
    """
    matrix = _explicit(view, w)
    if matrix.size == 0:
        return jnp.zeros(matrix.shape[:-2], w.dtype)
    peak = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True)
    matrix = matrix / jnp.where(peak > 0, peak, jnp.ones_like(peak))
    gram = jnp.matmul(matrix, jnp.matrix_transpose(matrix), precision=lax.Precision.HIGHEST)
    largest = jnp.linalg.eigvalsh(gram)[..., -1]
    return jnp.squeeze(peak, (-2, -1)) * jnp.sqrt(jnp.maximum(largest, 0))


def _explicit(view: View, w: Array) -> Array:
    """(*batch, k, n): the matrix of the map, or its transpose, whichever has k <= n."""
    operator = Operator(view, w)
    batch, side, other = operator.spaces
    apply = operator.mv
    if math.prod(other) < math.prod(side):
        side, other, apply = other, side, operator.rmv
    k, columns = math.prod(side), math.prod(other)
    if k > _MOST:
        raise ValueError(
            f"exact=True takes the norm of an explicit matrix, but {view} on a parameter of shape "
            f"{w.shape} has one with {k} x {columns} entries; use exact=False there, with "
            "n_steps=2 or more to follow the ball more closely."
        )
    basis = jnp.eye(k, dtype=w.dtype).reshape(k, *(1 for _ in batch), *side)
    rows = jax.vmap(apply)(jnp.broadcast_to(basis, (k, *batch, *side)))
    return jnp.moveaxis(rows.reshape(k, *batch, columns), 0, -2)
