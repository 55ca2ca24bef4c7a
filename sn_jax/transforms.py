"""Spectral norms as an optax transformation: parameters that stay within a ball."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from sn_jax import _bounds, _caps, _core, _mesh, _power, _rules, _serial
from sn_jax._bounds import Norms
from sn_jax._core import Singular, State
from sn_jax._operator import Operator
from sn_jax._rules import Params, Rules
from sn_jax._views import Conv, Matrix, View, compute_dtype

__all__ = [
    "ProjectSpectralNormState",
    "clip_singular_values",
    "muon_dimension_numbers",
    "project_spectral_norm",
]

# To optax's own type a state is of arrays, tuples and mappings, and no registered dataclass.
_OptState = Any
# Half of the tolerance that exact=True promises; the other half is for the error of the norm.
_TOLERANCE = 5e-6


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
    mode: Literal["clip", "divide"] = "clip",
    n_steps: int | Array | None = None,
    exact: bool = False,
) -> optax.GradientTransformation:
    """Scale parameters into the ball of spectral norm ``bound``, or onto its sphere.

    The last transformation of a chain: it turns updates into those after which
    ``optax.apply_updates`` gives ``W min(1, bound / sigma(W))``, with W the parameters that the
    updates would have given; or ``W bound / sigma(W)`` with ``mode="divide"``, the retraction of
    optimizers on a spectral sphere (with ``bound=sn_jax.rms_bound(c)`` at radii
    ``c sqrt(n_out / n_in)``). Entries that this does not change keep their update as it is.

    It scales, along the ray through zero, and is no projection in the sense of the nearest point,
    which cuts off the singular values above the bound alone: that is ``clip_singular_values``.

    By default sigma is an estimate from below, by ``n_steps`` of power iteration from where the
    last update left it. So the norm tracks the ball and exceeds it: by up to 4 % under Adam at
    1e-3, and to 2.3 times the bound where each update is white noise, as large as the parameters
    or larger. That is for one step, and small Gaussian kernels that start at 10 to
    15 times the bound: ``pytest tests/test_transforms.py -k tracks``.

    On the sphere the same holds of an estimate: the norm lies above the radius, by less with more
    ``n_steps`` (``pytest tests/test_transforms.py -k sphere``).

    With ``exact=True`` the norm is that of the explicit matrix, and after every update, however
    large, the true norm is at most ``bound * (1 + 1e-5)``. For that, what rounding of the target
    and of ``params + updates`` could add is taken off the target: some 1e-5 of it in float32,
    more where the parameters were far outside of the ball (from a million times the bound on,
    they become zero), and 5 to 20 % in bfloat16, which is better kept for a copy.

    Args:
      rules: regular expression -> view, as for ``sn_jax.init``; ``None`` for its defaults.
        Leaves that ``optax.masked`` hides match no rule; there, rules may match nothing.
      key: PRNG key for the vectors.
      bound: > 0, one number or a mapping path -> number, or ``sn_jax.rms_bound(c)``. May be
        traced, as ``optax.inject_hyperparams`` passes it.
      mode: "clip" leaves alone what lies within the ball; "divide" scales up, too. A zero parameter
        stays zero.
      n_steps: power-iteration steps per update, >= 0; None is 1. Of no effect with
        ``exact=True``, as a warning says.
      exact: take the norm of the explicit matrix, by eigenvalues of its Gram matrix on the
        smaller side. Costs the cube of that side, which must be at most 16384.

    Returns:
      optax.GradientTransformation: its state is a ``ProjectSpectralNormState``, and its
      ``update`` needs ``params``. To ``optax.tree_map_params`` the whole of the state is one
      field that has not the parameters' structure.

    Raises:
      ValueError: ``bound``, ``mode`` or ``n_steps`` out of range, or nothing matched (at ``init``);
        no ``params`` (at ``update``); a matrix too large for ``exact=True``.
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
    if mode not in ("clip", "divide"):
        raise ValueError(f'mode must be "clip" or "divide"; got {mode!r}.')
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
        _bounds.by_path(bound, state)
        if not exact:
            # Parameters often begin far outside of the ball, and the first step must land on it.
            state = _core.calibrate(params, state, rtol=1e-2)
        return ProjectSpectralNormState(state)

    def update(
        updates: optax.Updates,
        state: _OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, _OptState]:
        singular: State = state.singular

        def scaled(stepped, old, eps):
            if not exact:
                tree, new = _core.spectral_normalize(
                    stepped, singular, n_steps=n_steps, bound=bound, mode=mode, gradient="stop"
                )
                return _rules.named_leaves(tree), new
            bounds = _bounds.by_path(bound, singular)
            projected, new = {}, {}
            for path, w in _core.weights_of(stepped, singular).items():
                before = singular[path]
                projected[path], sigma = _scaled_to(
                    w, old[path], bounds[path], eps[path], view=before.view, mode=mode
                )
                new[path] = replace(before, sigma=sigma.astype(before.sigma.dtype))
            return projected, new

        return _changed_updates("project_spectral_norm", scaled, updates, singular, params)

    return optax.GradientTransformation(init, update)


def clip_singular_values(
    rules: Rules | None, *, bound: Norms = 1.0, method: _caps.Method = "svd"
) -> optax.GradientTransformation:
    """Move parameters to the nearest point of the ball of spectral norm ``bound``, after updates.

    The last transformation of a chain: ``optax.apply_updates`` then gives ``U min(S, c) V^T`` with
    ``U S V^T`` the parameters that the updates would have given, as
    ``sn_jax.clip_singular_values`` does, and after that the true norm is at most
    ``c * (1 + 1e-5)``, rounding of ``params + updates`` included, as by
    ``project_spectral_norm(exact=True)``.

    Args:
      rules: regular expression -> view, as for ``sn_jax.init``; ``None`` for its defaults.
      bound: c > 0, one number or a mapping path -> number, or ``sn_jax.rms_bound(c)``. May be
        traced.
      method: "svd" or "polar", as of ``sn_jax.clip_singular_values``.

    Returns:
      optax.GradientTransformation: its state holds which parameters are seen how, in a
      ``ProjectSpectralNormState`` whose vectors are not used; its ``update`` needs ``params``.

    Raises:
      ValueError: ``bound`` or ``method`` out of range, a view that is no ``Matrix``, or nothing
        matched (at ``init``); no ``params`` (at ``update``).
      TypeError: rules that are no mapping to views.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 0.5]))}
      >>> clip = clip_singular_values(None, bound=1.0)
      >>> updates, _ = clip.update({"kernel": jnp.zeros((2, 2))}, clip.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(3))
      [[1.  0. ]
       [0.  0.5]]
    """
    _caps.check_method(method)

    def init(params: optax.Params) -> _OptState:
        if isinstance(params, _placeholder()):
            one_leaf: Any = 0
            return ProjectSpectralNormState(one_leaf)
        state = _core.init(params, jax.random.key(0), _rules_here(rules, params), warmup=0)
        _bounds.by_path(bound, state)
        for path, w in _core.weights_of(params, state).items():
            _caps.check_clippable(path, w, state[path].view)
        return ProjectSpectralNormState(state)

    def update(
        updates: optax.Updates, state: _OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, _OptState]:
        singular: State = state.singular

        def clipped(stepped, old, eps):
            bounds = _bounds.by_path(bound, singular)
            projected = {}
            for path, w in _core.weights_of(stepped, singular).items():
                view, c = singular[path].view, bounds[path]
                nearest = _caps.clip(w, c, view=view, method=method, cast=False)
                projected[path], _ = _scaled_to(
                    nearest, old[path], c, eps[path], view=view, mode="clip"
                )
            return projected, singular

        return _changed_updates("clip_singular_values", clipped, updates, singular, params)

    return optax.GradientTransformation(init, update)


def muon_dimension_numbers(params: Params, views: Rules | State | None = None) -> Any:
    """The axes of every parameter for ``optax.contrib.muon``, as the views say.

    Muon replaces the momentum of a matrix by its polar factor; which axes are the matrix, and which
    are heads, experts or scanned layers with a matrix each, it takes from a tree
    ``muon_weight_dimension_numbers``. With this one, it and the spectral norms have one spec.

    A ``Conv`` counts as its kernel flattened to (taps * in, out), the one matrix that Muon can
    make of it, whose norm is not that of the operator: that is larger, by up to the square root of
    the number of taps. A ``Scaled`` counts as its view where the factor is one number.

    Args:
      params: any pytree of arrays.
      views: regular expression -> view, as for ``sn_jax.init``; ``None`` for its defaults; or the
        ``State`` that was made with them.

    Returns:
      A tree like ``params`` of ``optax.contrib.MuonDimensionNumbers``; None, which leaves a
      parameter to Adam, where there is no view.

    Raises:
      ValueError: a view that no choice of axes expresses (groups, masks, ``Linear``); nothing
        matched.
      TypeError: rules that are no mapping to views.

    Example:
      >>> params = {"query": jnp.ones((64, 8, 16)), "bias": jnp.ones(64)}
      >>> numbers = muon_dimension_numbers(params, {"query": Matrix(0, 2)})
      >>> numbers["query"]
      MuonDimensionNumbers(reduction_axis=(0,), output_axis=(2,))
      >>> optimizer = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    """
    leaves = _rules.named_leaves(params)
    if isinstance(views, Mapping):
        views = {
            re.escape(path) if isinstance(x, Singular) else path:
            x.view if isinstance(x, Singular) else x
            for path, x in views.items()
        }  # fmt: skip
    numbers = {
        path: _muon_axes(path, _rules.checked_weight(path, leaves[path], view), view)
        for path, view in _rules.select(params, leaves, views).items()
    }
    # Not by with_leaves: a parameter without a view becomes None.
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    return treedef.unflatten([numbers.get(_rules.path_name(path)) for path, _ in paths])


def _muon_axes(path: str, w: Array, view: View) -> optax.contrib.MuonDimensionNumbers:
    inner, _ = _caps.without_number(view)
    if isinstance(inner, Matrix):
        _, ins, outs = inner.axis_groups(w.ndim)
        return optax.contrib.MuonDimensionNumbers(ins, outs)
    if isinstance(inner, Conv) and inner.feature_group_count == 1:
        batch, _, (*_, out) = inner.vector_axes(w.ndim)
        assert out is not None  # None for groups
        ins = tuple(axis for axis in range(w.ndim) if axis not in (*batch, out))
        return optax.contrib.MuonDimensionNumbers(ins, (out,))
    raise ValueError(
        f"{_rules.label(path)} of shape {w.shape} is seen as {view}, which no choice of axes "
        "expresses, so that Muon cannot make its polar factor: leave it to Adam by a rule with "
        "None, or say by a Matrix which axes to take."
    )


def _changed_updates(who, change, updates, singular, params):
    """(updates after which the parameters are what ``change`` makes of them, new state).

    ``change`` takes the parameters after the updates, the leaves before by path, and the resolution
    of the updates by path, and returns the new leaves by path, and the new state.
    """
    if params is None:
        raise ValueError(
            f"{who} needs the parameters that it projects: call "
            "optimizer.update(grads, opt_state, params)."
        )
    stepped = optax.apply_updates(params, updates)
    old, mid, us = (_rules.named_leaves(tree) for tree in (params, stepped, updates))
    projected, new = change(
        stepped, old, {path: jnp.finfo(us[path].dtype).eps for path in singular}
    )
    changed = {path: _difference(projected[path], mid[path], old[path], us[path])
               for path in singular}  # fmt: skip
    return _rules.with_leaves(updates, changed), ProjectSpectralNormState(new)


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


@partial(jax.jit, static_argnames=("view", "mode"))
def _scaled_to(stepped, w, bound, update_eps, *, view, mode):
    """``stepped`` in the ball or on the sphere, so far that ``w`` plus the rounded difference is;
    and its norm."""
    operator = Operator(view, w)
    if operator.is_split:
        raise ValueError(
            f"exact=True needs the whole of a kernel of shape {w.shape} on each device, but "
            f"{view} says that shard_map splits it: use exact=False there, or project outside."
        )
    run = partial(_exact_factor, view, mode)
    if _mesh.is_explicit(w):
        run = _mesh.on_automatic_axes(run, (operator.shardings()[0],) * 2)
    factor, sigma = run(stepped, w, bound, update_eps)
    return view.scale(stepped, factor), sigma


def _exact_factor(view, mode, stepped, w, bound, update_eps):
    dtype = compute_dtype(w.dtype)
    sigma = _caps.norm(_caps.explicit(view, stepped.astype(dtype)))
    bound = jnp.asarray(bound, dtype)
    kept = sigma <= bound * (1 + _TOLERANCE)
    if mode == "divide":
        kept &= (sigma >= bound * (1 - _TOLERANCE)) | (sigma < jnp.finfo(dtype).tiny)
    safe = jnp.where(kept, jnp.ones_like(sigma), sigma)
    # The target, its difference from w and their sum are each rounded once, by at most eps / 2
    # times |target|, |target| + |w| and about |target| (1 % for the products of these). What that
    # does to the norm is at most the Frobenius norm of the matrix with these entries.
    eps = jnp.maximum(jnp.asarray(update_eps, dtype), jnp.finfo(w.dtype).eps)
    target = jnp.abs(view.scale(stepped.astype(dtype), bound / safe))
    rounding = _caps.explicit(view, 0.505 * eps * (jnp.abs(w.astype(dtype)) + 3 * target))
    slack = bound * (1 + _TOLERANCE) - jnp.sqrt(jnp.sum(jnp.square(rounding), (-2, -1)))
    factor = jnp.clip(slack, 0, bound) / safe
    factor = jnp.where(kept, jnp.ones_like(factor), factor)
    return jnp.where(jnp.isfinite(sigma), factor, jnp.nan), sigma
