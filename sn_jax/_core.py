"""The functional API: a state of singular vectors, and parameters divided by their norms.

Here belongs what a state is, and every function of (params, state).
"""

import difflib
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.tree_util import register_dataclass

from sn_jax import _bounds, _power, _serial
from sn_jax._bounds import Norms
from sn_jax._mesh import carried_as
from sn_jax._operator import Operator, check_linear
from sn_jax._rules import (
    Params,
    Rules,
    checked_weight,
    label,
    listing,
    named_leaves,
    select,
    with_leaves,
)
from sn_jax._views import Conv, View, kind_of


@partial(register_dataclass, data_fields=("u", "v", "sigma"), meta_fields=("view",))
@dataclass(frozen=True)
class Singular:
    """The leading singular vectors of one normalized parameter, as far as the iteration got.

    Attributes:
      u: (*batch, k, *codomain), unit; the first of the k is the leading left singular vector.
      v: (*batch, k, *domain), unit; right singular vectors.
      sigma: (*batch,), the norm's estimate at the last update, from below: never a bound.
      view: how the parameter acts (static).

    Example:
      >>> state = init({"kernel": jnp.eye(3, 5)}, jax.random.key(0), n_vectors=2)
      >>> entry = state["kernel"]
      >>> entry.u.shape, entry.v.shape, entry.sigma.shape
      ((2, 5), (2, 3), ())
      >>> entry.view
      Matrix(in_axes=(-2,), out_axes=(-1,))
    """

    u: Array
    v: Array
    sigma: Array
    view: View

    def __post_init__(self) -> None:
        # sn_jax does not import Flax. Whoever saves a state with Flax has imported it by the time
        # that a Singular is made, so this is where the state can be registered with it.
        _serial.register_with_flax(type(self))


State = dict[str, Singular]

_serial.register(Singular)
_serial.register_namedtuple(_power.PowerResult)


def init(
    params: Params,
    key: Array,
    rules: Rules | None = None,
    *,
    n_vectors: int = 1,
    warmup: int = 15,
) -> State:
    """State for the parameters that the rules select: random vectors, then warm-up steps.

    The state is the whole specification of what is normalized and how: its keys are the paths
    of the leaves, and each entry holds its view. Vectors of one leaf depend on ``key`` and the
    path only, so adding a layer does not change those of others.

    Args:
      params: any pytree of arrays. Paths join its keys with "/": ``Conv_0/kernel``.
      key: PRNG key.
      rules: regular expression -> view, matched in full against each path, first match wins;
        ``None`` for a view leaves the leaf alone, as do paths that no rule matches. Without
        rules, leaves that are named as Flax, Haiku and Equinox name weights (kernel, w, weight,
        embedding, and those of recurrent cells), and ``params`` that are one array: with 2 axes
        ``Matrix()``; the weight of an Equinox convolution is output-first; others with more
        raise. What else has two axes or more is listed in a warning; biases and scales are not.
      n_vectors: singular vectors iterated together (at most the smaller side of the matrix).
        More of them follow a drifting weight more closely.
      warmup: power-iteration steps, ``>= 0``.

    Returns:
      State: path -> Singular.

    Raises:
      ValueError: a rule matches nothing, or no rule anything; a view does not fit a shape; a bad
        regular expression.
      TypeError: a selected leaf is not floating point; rules that are no mapping to views.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}}
      >>> state = init(params, jax.random.key(0))
      >>> list(state), state["dense/kernel"].u.shape, state["dense/kernel"].v.shape
      (['dense/kernel'], (1, 5), (1, 3))
      >>> print(f"{state['dense/kernel'].sigma:.4f}")        # sqrt(15)
      3.8730
    """
    if not isinstance(n_vectors, int) or n_vectors < 1:
        raise ValueError(f"n_vectors must be an integer >= 1; got {n_vectors!r}.")
    warmup = int(_power.as_steps(warmup))
    check_key(key, "init(params, key, rules)")
    leaves = named_leaves(params)
    if list(leaves) == [""] and not hasattr(params, "shape"):
        raise TypeError(
            f"params must be a tree of arrays; got {kind_of(params)}. Of Flax models they are "
            'variables["params"], or nnx.state(model, nnx.Param).'
        )
    bits = jax.random.bits(key, (), jnp.uint32)
    state = {}
    for path, view in select(params, leaves, rules).items():
        w = checked_weight(path, leaves[path], view)
        try:
            check_linear(Operator(view, w), in_w=True)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{label(path)} of shape {jnp.shape(w)}: {error}") from error
        seed = bits ^ np.uint32(zlib.crc32(path.encode()))
        state[path] = _start(w, seed, view=view, n_vectors=n_vectors, warmup=warmup)
    return state


def spectral_normalize(
    params: Params,
    state: State,
    *,
    n_steps: int | Array = 1,
    bound: Norms = 1.0,
    mode: Literal["divide", "clip", "certified"] = "divide",
    gradient: Literal["through", "stop"] = "through",
) -> tuple[Params, State]:
    r"""Divide each parameter in ``state`` by its spectral norm, after ``n_steps`` of iteration.

    Miyato et al. (2018), equation 8 and algorithm 1: ``W_bar = c W / sigma``, with
    ``sigma = <u, A_W v>`` and ``u``, ``v`` from power iteration, which are constants of the
    gradient. So for ``G = dL/dW_bar`` and ``c = 1``,
    ``dL/dW = (G - <G, W_bar> u v^T) / sigma`` (their equation 12), and derivatives of every
    order and direction are those of that formula. ``sigma`` is an estimate from below: after
    few steps the true norm of ``W_bar`` can exceed ``c``.

    Update once per optimizer step, outside the loss; inside, pass the new state with
    ``n_steps=0``. Parameters that are not in ``state`` pass through. A zero parameter comes back
    as zero (times c, so that gradients still move it); one that is not finite comes back as
    NaN, and the state keeps the last good vectors.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init``.
      n_steps: iterations, ``>= 0``. 0 takes the stored vectors, computes sigma from the current
        parameters, and returns ``state`` unchanged. May be a traced integer.
      bound: c > 0, one number or a mapping path -> number (all paths of ``state``); or arrays of
        the norms' shape, a number for each batch element; or ``rms_bound(c)`` for any of them.
      mode: "divide" gives norm c; "clip" multiplies by min(1, c / sigma). "certified" divides by an
        upper bound of the norm, proved in the program's own arithmetic, so that the true norm of
        what is returned, rounded as it is, is at most c: for ``Matrix`` and ``Conv``. It takes
        seven products of matrices of the smaller side (of all symbols of a convolution) at every
        call, ``n_steps=0`` too; derivatives are those of "divide", times a constant.
      gradient: "through" differentiates sigma; "stop" holds it constant.

    Returns:
      (params, state): same structure, shapes and dtypes as given.

    Raises:
      ValueError: ``state`` does not fit ``params`` (a path or shape is named); bad option; a view
        whose norm "certified" cannot bound.
      TypeError: a parameter is not floating point; ``n_steps`` no signed integer; ``bound`` no
        number.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> state = init(params, jax.random.key(0))
      >>> normalized, state = spectral_normalize(params, state)
      >>> print(normalized["kernel"])
      [[0.5 0. ]
       [0.  1. ]]
      >>> certified, _ = spectral_normalize(params, state, n_steps=0, mode="certified")
      >>> bool(0.999 < jnp.max(certified["kernel"]) <= 1.0)
      True
    """
    n_steps = _power.as_steps(n_steps)
    modes = ("divide", "clip", "certified")
    leaves = normalized_leaves(
        params, state, n_steps=n_steps, bound=bound, mode=mode, gradient=gradient, modes=modes
    )
    changed = {path: leaf.scaled for path, leaf in leaves.items()}
    if isinstance(n_steps, jax.Array) or n_steps > 0:
        state = {path: leaf.singular for path, leaf in leaves.items()}
    return with_leaves(params, changed), state


class Leaf(NamedTuple):
    """A normalized parameter: ``scaled = w * factor``, and its new state."""

    w: Array
    scaled: Array
    factor: Array
    singular: Singular

    def rescaled(self, scale: Array) -> "Leaf":
        scaled = self.singular.view.scale(self.scaled, scale)
        return self._replace(scaled=scaled, factor=self.factor * scale)

    def cast(self, dtype) -> "Leaf":
        return self._replace(scaled=self.scaled.astype(dtype))


def normalized_leaves(
    params: Params, state: State, *, n_steps, bound, mode, gradient, modes=("divide", "clip")
):
    """Path -> Leaf, as ``spectral_normalize`` says, after ``n_steps`` that are an int or traced.

    What it wraps may multiply the product instead of the kernel, or cast the kernel once more: no
    certificate holds then, and ``modes`` leaves it out.
    """
    if mode not in modes:
        named = " or ".join(f'"{mode}"' for mode in modes)
        hint = ""
        if mode == "certified":
            hint = "; that one is of sn_jax.spectral_normalize(params, state) alone"
        raise ValueError(f"mode must be {named}; got {mode!r}{hint}.")
    if gradient not in ("through", "stop"):
        raise ValueError(f'gradient must be "through" or "stop"; got {gradient!r}.')
    static = n_steps if isinstance(n_steps, int) else None
    weights = weights_of(params, state)
    bounds = _bounds.by_path(bound, state)
    if mode == "certified":
        from sn_jax import _certified  # on first use, since it imports SciPy

        for path, w in weights.items():
            _certified.check(path, w, state[path].view)
    return {
        path: Leaf(w, *_normalize(
            w, state[path], bounds[path], n_steps if static is None else None,
            static_steps=static, mode=mode, gradient=gradient,
        ))
        for path, w in weights.items()
    }  # fmt: skip


def spectral_norms(params: Params, state: State) -> dict[str, Array]:
    """Estimated spectral norm of every parameter in ``state``, by path; no iteration.

    ``<u, A_W v>`` with the stored vectors and the current parameters (Miyato et al. 2018,
    equation 19): at most the true norm. Differentiable.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init`` or ``spectral_normalize``.

    Returns:
      dict: path -> sigma of the view's batch shape, ready for a logger.

    Raises:
      ValueError: ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> norms = spectral_norms(params, init(params, jax.random.key(0)))
      >>> print({path: round(float(sigma), 3) for path, sigma in norms.items()})
      {'kernel': 4.0}
    """
    return {path: _norm(w, state[path]) for path, w in weights_of(params, state).items()}


def residuals(params: Params, state: State) -> dict[str, Array]:
    """How far each stored triple is from a singular triple of the current parameter, by path.

    ``|A^T u - sigma v| / sigma`` with the stored vectors, made unit, and ``sigma = <u, A_W v>``
    (as ``spectral_norms``); of several vectors the leading pair. Right after an update, when
    ``A v = sigma u`` holds, some singular value lies within ``residual * sigma`` of sigma; later
    it tells how stale the estimate has become. A zero parameter has 0, one that is not finite NaN.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init`` or ``spectral_normalize``.

    Returns:
      dict: path -> residual of the view's batch shape, >= 0, a constant of the gradient; ready for
        a logger, also inside ``jit``.

    Raises:
      ValueError: ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> state = init(params, jax.random.key(0), warmup=30)
      >>> print({path: round(float(r), 3) for path, r in residuals(params, state).items()})
      {'kernel': 0.0}
      >>> other = {"kernel": jnp.array([[4.0, 0.0], [3.0, 0.0]])}
      >>> bool(residuals(other, state)["kernel"] > 0.5)
      True
    """
    return {path: _residual(w, state[path]) for path, w in weights_of(params, state).items()}


def calibrate(
    params: Params, state: State, *, rtol: float | Array = 1e-3, max_steps: int | Array = 1000
) -> State:
    """Iterate until the residual says that each triple has converged.

    Use after loading weights, or before freezing them. Stops when
    ``|A^T u - sigma v| <= rtol * sigma`` (with ``A v = sigma u`` exact), which puts a singular
    value within ``rtol * sigma`` of sigma, or after ``max_steps``. Usually the error is about
    its square. It remains an estimate from below.

    Args:
      params: the pytree that ``state`` was made for.
      state: where to start.
      rtol: relative residual, > 0. May be traced.
      max_steps: most steps per parameter, ``>= 0``. May be a traced integer.

    Returns:
      State: the converged state. Outside of ``jit`` a warning names the paths that did not
        converge; ``residuals`` tells how far each is, also inside.

    Raises:
      ValueError: ``rtol`` or ``max_steps`` out of range; ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([0.99, 1.0]))}
      >>> state = init(params, jax.random.key(0), warmup=0)
      >>> state = calibrate(params, state, rtol=1e-4)
      >>> print(f"{state['kernel'].sigma:.6f}")
      1.000000
    """
    if not (isinstance(rtol, Tracer) or rtol > 0):
        raise ValueError(f"rtol must be > 0; got {rtol}.")
    max_steps = _power.as_steps(max_steps)
    new, stale = {}, {}
    for path, w in weights_of(params, state).items():
        new[path], stale[path] = _calibrate(w, state[path], rtol, max_steps)
    # Looked at only now, since each look waits for the device.
    unfinished = [label(path) for path, x in stale.items() if not isinstance(x, Tracer) and x]
    if unfinished:
        warnings.warn(
            f"calibrate took {max_steps} steps, and the residual of these is still above rtol = "
            f"{rtol:g}: {listing(unfinished)}. Singular values that lie close together take many "
            "steps, fewer from a state of several n_vectors, and below the rounding of its dtype "
            "no residual falls: give more max_steps, n_vectors, or a larger rtol.",
            stacklevel=2,
        )
    return new


def spectral_penalty(
    params: Params, state: State, *, target: Norms = 0.0, power: int | None = None
) -> Array:
    r"""How far spectral norms are from a target, summed over leaves and batch axes.

    ``1/2 sum (sigma - t)^2``, which for t = 0 is spectral norm regularization (Yoshida & Miyato
    2017, equation 5): add ``lambda`` times it to a loss. Its gradient for one parameter is
    ``(sigma - t) u v^T``. With ``power=k`` it is ``sum (sigma^k - t^k)^2``, which with t = 1
    and k = 2 keeps networks plastic that learn one task after another (Lewandowski et al. 2024,
    section 4). Update ``state`` once per step with ``spectral_normalize``, whose normalized
    parameters may be ignored.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init`` or ``spectral_normalize``.
      target: t >= 0, in all the ways of ``bound``: a number, a mapping from paths, an array of the
        norms' shape, ``rms_bound(c)``.
      power: an integer k >= 1, or None.

    Returns:
      Array: scalar.

    Raises:
      ValueError: ``state`` does not fit ``params``; ``target`` or ``power`` out of range.
      TypeError: ``target`` is no number.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> state = init(params, jax.random.key(0))
      >>> print(f"{spectral_penalty(params, state):.3f}")
      8.000
      >>> print(f"{spectral_penalty(params, state, target=1.0, power=2):.3f}")  # (16 - 1)^2
      225.000
    """
    if power is not None and not (isinstance(power, int) and power >= 1):
        raise ValueError(f"power must be an integer >= 1, or None; got {power!r}.")
    norms = spectral_norms(params, state)
    k, targets = power or 1, _bounds.by_path(target, state, "target", zero=True)
    penalties = []
    for path, sigma in norms.items():
        gap = sigma**k - jnp.asarray(targets[path], sigma.dtype) ** k
        penalties.append(jnp.sum(jnp.square(gap)))
    dtype = jnp.result_type(*penalties) if penalties else jnp.float32
    total = sum((penalty.astype(dtype) for penalty in penalties), jnp.zeros((), dtype))
    return total if power else 0.5 * total


# One leaf. Each is jitted on its own: called eagerly it compiles once per shape and view, and
# inside a user's jit leaves of equal shape and view are traced once.


def start_state(w: Array, view: View, n_vectors: int, seed: Array | int = 0) -> Singular:
    """Unit noise for one leaf, before any iteration.

    u and v are both random: where the weights give no direction yet (zeros), either is a start.
    """
    operator, seed = Operator(view, w), jnp.asarray(seed, jnp.uint32)

    def draw(side, shape, dtype):
        noise = _power.noise(~seed if side else seed, shape, dtype)
        return _power.unit(noise, 0.0, operator.batch_ndim + 1)

    sigma, u, v = operator.start(n_vectors, draw)
    return Singular(u, v, sigma, view)


@partial(jax.jit, static_argnames=("view", "n_vectors", "warmup"))
def _start(w, seed, *, view, n_vectors, warmup):
    start = start_state(w, view, n_vectors, seed)
    return _updated(start, *_run(_power.iterate, w, start, n_steps=warmup))


@partial(jax.jit, static_argnames=("static_steps", "mode", "gradient"))
def _normalize(w, singular, bound, traced_steps, *, static_steps, mode, gradient):
    n_steps = static_steps if traced_steps is None else traced_steps
    sigma, u, v = _run(_power.iterate, w, singular, n_steps=n_steps)
    value, factor = _factor(sigma, bound, mode, gradient, w, singular.view)
    if traced_steps is not None:
        value = jnp.where(n_steps > 0, value, singular.sigma)
    return singular.view.scale(w, factor), factor, _updated(singular, value, u, v)


def _factor(sigma, bound, mode, gradient, w, view):
    """(sigma held constant, what to multiply by for a norm of ``bound``)."""
    value = lax.stop_gradient(sigma)
    tiny = jnp.finfo(value.dtype).tiny
    safe = jnp.where(value < tiny, jnp.ones_like(value), value)
    inverse = 1 / safe
    if mode == "certified":
        from sn_jax import _certified

        factor = _certified.factor(w, bound, view)
    else:
        factor = jnp.asarray(bound, value.dtype) / safe
    # For weights this large the factor is a subnormal number, which processors flush to zero.
    factor = jnp.where(factor < tiny, jnp.nan, factor)
    if gradient == "through":
        # The factor is a constant divided by a ratio whose value is 1. Its derivatives contain no
        # 1 / sigma^2, which would overflow float32 long before the weights are tiny.
        factor = factor / _power.with_value(sigma * inverse, jnp.ones_like(value))
    if mode == "clip":
        factor = jnp.where(value <= bound, jnp.ones_like(factor), factor)
    return value, factor


@jax.jit
def _norm(w, singular):
    return _run(_power.iterate, w, singular, n_steps=0)[0]


@jax.jit
def _calibrate(w, singular, rtol, max_steps):
    options = {"rtol": rtol, "max_steps": max_steps}
    *new, residual = _run(_power.converge, w, singular, n_more=1, **options)
    return _updated(singular, *new), jnp.any(residual > rtol)


@jax.jit
def _residual(w, singular):
    return _run(_power.residual, w, singular)[0]


def _run(method, w, singular, **options):
    return Operator(singular.view, w).run(method, singular.u, singular.v, **options)


def _updated(singular, sigma, u, v):
    """The state keeps its dtypes and shardings, so that it can be a scan's carry."""
    old = singular.sigma, singular.u, singular.v
    sigma, u, v = map(carried_as, (sigma, u, v), old)
    return replace(singular, u=u, v=v, sigma=sigma)


# State dicts.


def to_state_dict(state: State) -> dict[str, Any]:
    """A state as nested dicts of NumPy arrays and a version, for any checkpoint format.

    The views are not stored: they come from the template when it is read. Sharded states need
    not pass through here; a ``State`` is a pytree of arrays.

    Args:
      state: from ``sn_jax.init``.

    Returns:
      dict: ``{"version": 1, "state": {path: {"u": ..., "v": ..., "sigma": ...}}}``.

    Raises:
      TypeError: ``state`` is not a state.

    Example:
      >>> import jax, sn_jax
      >>> state = sn_jax.init({"kernel": jnp.ones((2, 3))}, jax.random.key(0))
      >>> plain = to_state_dict(state)
      >>> plain["version"], plain["state"]["kernel"]["u"].shape
      (1, (1, 3))
    """
    check_state(state)
    entries = {path: {name: np.asarray(getattr(entry, name)) for name in _serial.ARRAYS}
               for path, entry in state.items()}  # fmt: skip
    return {"version": _serial.VERSION, "state": entries}


def from_state_dict(d: Mapping[str, Any], template: State | Mapping[str, View]) -> State:
    """The state that ``to_state_dict``, or a checkpoint library, made plain.

    Args:
      d: the result of ``to_state_dict``, or what a checkpoint library made of it; or the nested
        dicts ``{path: {"u": ..., "v": ..., "sigma": ...}}`` that one reads without a template
        from a checkpoint that was written of a ``State`` itself.
      template: a state of the same model (``jax.eval_shape`` of ``sn_jax.init`` will do): paths,
        shapes, dtypes and views are taken from it. Or the views alone, path -> view: then
        shapes and dtypes are those of ``d``, and are checked when parameters come.

    Returns:
      State: like ``template``, with copies of the arrays of ``d``.

    Raises:
      ValueError: another version, other paths or other shapes than the template's.
      TypeError: ``template`` is neither a state nor views.

    Example:
      >>> import jax, sn_jax
      >>> state = sn_jax.init({"kernel": jnp.ones((2, 3))}, jax.random.key(0))
      >>> template = sn_jax.init({"kernel": jnp.ones((2, 3))}, jax.random.key(1))
      >>> again = from_state_dict(to_state_dict(state), template)
      >>> bool(jnp.all(again["kernel"].u == state["kernel"].u))
      True
      >>> again = from_state_dict(to_state_dict(state), {"kernel": sn_jax.Matrix()})
      >>> jax.tree.structure(again) == jax.tree.structure(state)
      True
    """
    by_views = isinstance(template, Mapping) and all(
        isinstance(like, View) and not isinstance(like, type) for like in template.values()
    )
    if not by_views:
        check_state(template, " Views alone, path -> view, will do, too.")
    if not isinstance(d, Mapping) or not (
        {"version", "state"} <= d.keys()
        or all(isinstance(x, Mapping) and {*_serial.ARRAYS} <= x.keys() for x in d.values())
    ):
        raise ValueError(
            "This is no result of sn_jax.convert.to_state_dict: that has the keys 'version' and "
            "'state', or is a state read as dicts, path -> u, v and sigma; got "
            f"{sorted(d) if isinstance(d, Mapping) else type(d).__name__}."
        )
    entries = d
    if "version" in d:
        _serial.check_version(d["version"])
        entries = d["state"]
    missing, unknown = template.keys() - entries.keys(), entries.keys() - template.keys()
    if missing or unknown:
        raise ValueError(
            f"The stored state is of another model than the template. Only the template has: "
            f"{listing(sorted(missing))}; only the stored state has: "
            f"{listing(sorted(unknown))}. Make the template by sn_jax.init with the "
            "parameters and rules of the model that was saved."
        )
    state = {}
    for path, like in template.items():
        like = like if isinstance(like, Singular) else _as_stored(entries[path], like, path)
        state[path] = _serial.restored(entries[path], like, path)
    return state


def _as_stored(entry: Mapping[str, Any], view: View, path: str) -> Singular:
    """A template for one entry from its own shapes, as far as they fit each other."""
    shapes = {name: np.shape(entry[name]) for name in _serial.ARRAYS if name in entry}
    lead = len(shapes.get("sigma", ())) + 1
    if len(shapes) < 3 or not (
        len(shapes["u"]) >= lead
        and shapes["u"][:lead] == shapes["v"][:lead]
        and shapes["u"][: lead - 1] == shapes["sigma"]
    ):
        raise ValueError(
            f"{path} is stored with the shapes {shapes}, which are those of no u (*batch, k, "
            "*codomain), v (*batch, k, *domain) and sigma (*batch,): give what was written of a "
            "state."
        )
    arrays: dict[str, Any] = {name: np.asarray(entry[name]) for name in _serial.ARRAYS}
    return Singular(**arrays, view=view)


# Checks.


def check_key(key: Any, order: str) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.uint32)
    ):
        raise TypeError(
            f"key must be a PRNG key, such as jax.random.key(0); got {kind_of(key)}. The order is "
            f"{order}."
        )


def check_state(state: Any, hint: str = "") -> None:
    if not isinstance(state, Mapping) or not all(isinstance(s, Singular) for s in state.values()):
        entries = state.values() if isinstance(state, Mapping) else ()
        if any(isinstance(s, Mapping) and {*_serial.ARRAYS} <= s.keys() for s in entries):
            hint += (
                " Dicts of arrays, as a checkpoint may be read, become a state by "
                "sn_jax.convert.from_state_dict(dicts, views)."
            )
        raise TypeError(
            "A state is what sn_jax.init returned (a dict path -> Singular); got "
            f"{kind_of(state)}.{hint}"
        )


def weights_of(params: Params, state: State) -> dict[str, Array]:
    """The leaves that ``state`` names, checked against its shapes."""
    check_state(state, " The order is (params, state).")
    leaves = named_leaves(params)
    weights = {}
    for path, singular in state.items():
        if path not in leaves:
            close = difflib.get_close_matches(path, leaves, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"state has an entry {path!r}, but params have no such leaf{hint} "
                f"Make the state with sn_jax.init from these parameters. They are: "
                f"{listing(leaves)}."
            )
        w = checked_weight(path, leaves[path], singular.view)
        batch, domain, codomain = Operator(singular.view, w).spaces
        k = singular.v.shape[len(batch)] if singular.v.ndim > len(batch) else 1
        for name, space in (("v", domain), ("u", codomain)):
            expected, got = (*batch, k, *space), getattr(singular, name).shape
            if got != expected:
                _raise_changed(path, w, singular.view, name, expected, got)
        weights[path] = w
    return weights


def _raise_changed(path, w, view, name, expected, got):
    if isinstance(view, Conv) and len(got) == len(expected) and got[-1] == expected[-1]:
        n = len(view.input_shape)
        what = {"u": "outputs", "v": "inputs"}[name]
        if got[: -n - 1] == expected[: -n - 1]:
            raise ValueError(
                f"{label(path)} is seen as {view}, with {what} of size {expected[-n - 1 : -1]}, "
                f"but the state was made for {what} of size {got[-n - 1 : -1]}: not the parameter "
                "but the image size has changed. Make a new state, or keep to the old size."
            )
    raise ValueError(
        f"{label(path)} has shape {jnp.shape(w)}, which asks for {name} of shape {expected}, "
        f"but the state holds {got}: the parameter's shape has changed since "
        "sn_jax.init. Make a new state."
    )
