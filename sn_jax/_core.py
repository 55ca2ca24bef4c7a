"""The functional API: a state of singular vectors, and parameters divided by their norms."""

import difflib
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import (
    DictKey,
    GetAttrKey,
    keystr,
    register_dataclass,
    tree_flatten_with_path,
)

from sn_jax import _power, _serial, _sharding
from sn_jax._views import (
    Conv,
    Matrix,
    View,
    check_linear,
    check_view,
    compute_dtype,
    kind_of,
)

Params = Any
Rules = Mapping[str, View | None]
Bound = float | Array | Mapping[str, float | Array]

# Those of Flax, Haiku and Equinox.
WEIGHT_NAMES = (
    "kernel", "w", "weight", "embedding", "embeddings", "weight_ih", "weight_hh", "w_i", "w_h",
)  # fmt: skip
_NO_WEIGHTS = ("bias", "scale")
_WAYS_OUT = (
    "take the views from the model with sn_jax.linen.views or sn_jax.nnx.views, or give one by "
    "rules, such as {r'.*kernel': sn_jax.Matrix((0, 1, 2), 3)} for flattened 2-D convolutions, or "
    "sn_jax.Matrix() for stacks of matrices"
)


@partial(register_dataclass, data_fields=("u", "v", "sigma"), meta_fields=("view",))
@dataclass(frozen=True)
class Singular:
    """The leading singular vectors of one normalized parameter, as far as the iteration got.

    Attributes:
      u: (*batch, k, *codomain), unit; the first of the k is the leading left singular vector.
      v: (*batch, k, *domain), unit; right singular vectors.
      sigma: (*batch,), the norm's estimate at the last update, from below: never a bound.
      view: how the parameter acts (static).
    """

    u: Array
    v: Array
    sigma: Array
    view: View

    def __post_init__(self):
        # Here, as sn_jax does not import flax: who saves with it has imported it, and holds one.
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
    for path, view in _select(params, leaves, rules).items():
        w = _checked_weight(path, leaves[path], view)
        try:
            check_linear(view, w, in_w=True)
        except ValueError as error:
            raise ValueError(f"{shown(path)} of shape {jnp.shape(w)}: {error}") from error
        seed = bits ^ np.uint32(zlib.crc32(path.encode()))
        state[path] = _start(w, seed, view=view, n_vectors=n_vectors, warmup=warmup)
    return state


def spectral_normalize(
    params: Params,
    state: State,
    *,
    n_steps: int | Array = 1,
    bound: Bound = 1.0,
    mode: Literal["divide", "clip"] = "divide",
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
        the norms' shape, a number for each batch element.
      mode: "divide" gives norm c; "clip" multiplies by min(1, c / sigma).
      gradient: "through" differentiates sigma; "stop" holds it constant.

    Returns:
      (params, state): same structure, shapes and dtypes as given.

    Raises:
      ValueError: ``state`` does not fit ``params`` (a path or shape is named); bad option.
      TypeError: a parameter is not floating point; ``n_steps`` no signed integer; ``bound`` no
        number.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> state = init(params, jax.random.key(0))
      >>> normalized, state = spectral_normalize(params, state)
      >>> print(normalized["kernel"])
      [[0.5 0. ]
       [0.  1. ]]
    """
    n_steps = _power.as_steps(n_steps)
    leaves = normalized_leaves(
        params, state, n_steps=n_steps, bound=bound, mode=mode, gradient=gradient
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


def normalized_leaves(params: Params, state: State, *, n_steps, bound, mode, gradient):
    """Path -> Leaf, as ``spectral_normalize`` says, after ``n_steps`` that are an int or traced."""
    if mode not in ("divide", "clip"):
        raise ValueError(f'mode must be "divide" or "clip"; got {mode!r}.')
    if gradient not in ("through", "stop"):
        raise ValueError(f'gradient must be "through" or "stop"; got {gradient!r}.')
    static = n_steps if isinstance(n_steps, int) else None
    weights = weights_of(params, state)
    bounds = bounds_by_path(bound, state)
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
      State: the converged state.

    Raises:
      ValueError: ``rtol`` or ``max_steps`` out of range; ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([0.99, 1.0]))}
      >>> state = init(params, jax.random.key(0), warmup=0)
      >>> state = calibrate(params, state, rtol=1e-4)
      >>> print(f"{state['kernel'].sigma:.6f}")
      1.000000
    """
    if not (isinstance(rtol, jax.core.Tracer) or rtol > 0):
        raise ValueError(f"rtol must be > 0; got {rtol}.")
    max_steps = _power.as_steps(max_steps)
    weights = weights_of(params, state)
    return {path: _calibrate(w, state[path], rtol, max_steps) for path, w in weights.items()}


def spectral_penalty(params: Params, state: State) -> Array:
    """Half the sum of squared spectral norms, ``1/2 sum sigma^2``, over leaves and batch axes.

    Spectral norm regularization (Yoshida & Miyato 2017, equation 5): add ``lambda`` times it to
    a loss. Its gradient for one parameter is ``sigma u v^T``. Update ``state`` once per
    step with ``spectral_normalize``, whose normalized parameters may be ignored.

    Args:
      params: the pytree that ``state`` was made for.
      state: from ``init`` or ``spectral_normalize``.

    Returns:
      Array: scalar.

    Raises:
      ValueError: ``state`` does not fit ``params``.

    Example:
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> state = init(params, jax.random.key(0))
      >>> print(f"{spectral_penalty(params, state):.3f}")
      8.000
    """
    squares = [jnp.sum(sigma * sigma) for sigma in spectral_norms(params, state).values()]
    dtype = jnp.result_type(*squares) if squares else jnp.float32
    return 0.5 * sum((square.astype(dtype) for square in squares), jnp.zeros((), dtype))


# One leaf. Each is jitted on its own: called eagerly it compiles once per shape and view, and
# inside a user's jit leaves of equal shape and view are traced once.


def start_state(w: Array, view: View, n_vectors: int, seed: Array | int = 0) -> Singular:
    """Unit noise for one leaf, before any iteration."""
    batch, domain, codomain = _spaces(view, _sharding.whole_shape(view, w.shape))
    k = min(n_vectors, max(1, math.prod(domain)), max(1, math.prod(codomain)))
    dtype, lead = compute_dtype(w.dtype), len(batch) + 1
    seed = jnp.asarray(seed, jnp.uint32)
    split = _sharding.batch_names(view, w.ndim)

    def vectors(seed, space):
        # Those of the whole batch, so that each device starts from its own part of them.
        shape = (*_sharding.whole(batch, split), k, *space)
        x = _sharding.own_blocks(_power.noise(seed, shape, dtype), split)
        return _power.unit(x, 0.0, lead)

    # Both random: where the weights give no direction yet (zeros), either is a start.
    u, v = vectors(seed, codomain), vectors(~seed, domain)
    sigma = _sharding.pcast(jnp.zeros(batch, dtype), sum(split, ()))
    sigma, u, v = _sharding.take_types((sigma, u, v), w, _sharding.types(view, w))
    return Singular(u, v, sigma, view)


def stored_state(w: Array, view: View, u: Array, sigma: Array) -> Singular:
    """From what the Flax wrappers store: v comes from the u in the first half step.

    A v to fall back on, so that a u that is zero (as flax leaves it after a zero kernel) recovers.
    """
    batch, domain, _ = _spaces(view, _sharding.whole_shape(view, w.shape))
    k = u.shape[len(batch)] if u.ndim > len(batch) else 1  # a wrong shape is told later
    v = _power.ramp((*batch, k, *domain), compute_dtype(w.dtype))
    return Singular(u, v, sigma, view)


def chosen(update: bool | Array, new: Array, old: Array) -> Array:
    if isinstance(update, bool | np.bool_):
        return new if update else old
    return jnp.where(update, new, old)


@partial(jax.jit, static_argnames=("view", "n_vectors", "warmup"))
def _start(w, seed, *, view, n_vectors, warmup):
    start = start_state(w, view, n_vectors, seed)
    return _updated(start, *_run(_power.iterate, w, start, n_steps=warmup))


@partial(jax.jit, static_argnames=("static_steps", "mode", "gradient"))
def _normalize(w, singular, bound, traced_steps, *, static_steps, mode, gradient):
    n_steps = static_steps if traced_steps is None else traced_steps
    sigma, u, v = _run(_power.iterate, w, singular, n_steps=n_steps)
    value, factor = _factor(sigma, bound, mode, gradient)
    if traced_steps is not None:
        value = jnp.where(n_steps > 0, value, singular.sigma)
    return singular.view.scale(w, factor), factor, _updated(singular, value, u, v)


def _factor(sigma, bound, mode, gradient):
    """(sigma held constant, what to multiply by for a norm of ``bound``)."""
    value = lax.stop_gradient(sigma)
    tiny = jnp.finfo(value.dtype).tiny
    safe = jnp.where(value < tiny, jnp.ones_like(value), value)
    factor = jnp.asarray(bound, value.dtype) / safe
    # Subnormal, which processors take for 0: the weights are too large.
    factor = jnp.where(factor < tiny, jnp.nan, factor)
    if gradient == "through":
        # As constant / ratio with a ratio of 1: derivatives then involve no 1 / sigma^2, which
        # overflows float32 long before the weights are tiny.
        factor = factor / _power.with_value(sigma / safe, jnp.ones_like(value))
    if mode == "clip":
        factor = jnp.where(value <= bound, jnp.ones_like(factor), factor)
    return value, factor


# Attributes by which a Flax layer's product is another than the stock layer's.
PRODUCT = (
    "dot_general", "dot_general_cls", "promote_dtype", "preferred_element_type", "mask",
    "conv_general_dilated", "conv_general_dilated_cls",
)  # fmt: skip


def is_plain_product(layer: Any, stock: Any) -> bool:
    """Whether a Flax layer's product is that of the stock layer, of which it is, in float32."""
    return all(
        getattr(layer, name, None) == getattr(stock, name, None) for name in PRODUCT
    ) and layer.dtype in (None, jnp.float32)


def scaled_product(leaf: Leaf) -> Callable[..., Array]:
    """A ``dot_general`` that scales the product instead of the kernel, where that is cheaper.

    In the backward pass ``<G, W_bar>`` then comes from outputs instead of kernels, and only
    ``u v^T`` is added to the kernel's gradient; W_bar is not written. Cheaper: not many more rows
    than inputs, so that a product of outputs and their gradient costs less than one of kernels.
    The same: float32 throughout; accelerators round a kernel to less in their default precision.

    Args:
      leaf: of a dense kernel; one factor for all of it.
    """

    def dot_general(x, scaled, dimensions, precision=None, **options):
        ((axes, _), batch) = dimensions
        n_in = math.prod(x.shape[axis] for axis in axes)
        if (
            leaf.factor.ndim == 0
            and x.dtype == scaled.dtype == leaf.w.dtype == jnp.float32
            and batch == ((), ())
            # Not so of the symbolic sizes of jax.export: of those nothing is known.
            and isinstance(x.size, int)
            and 0 < x.size <= 2 * n_in**2
            and (jax.default_backend() == "cpu" or precision == lax.Precision.HIGHEST)
        ):
            product = lax.dot_general(x, leaf.w, dimensions, precision=precision, **options)
            return product * _sharding.broadcast_like(leaf.factor, product, ())
        return lax.dot_general(x, scaled, dimensions, precision=precision, **options)

    return dot_general


@jax.jit
def _norm(w, singular):
    return _run(_power.iterate, w, singular, n_steps=0).sigma


@jax.jit
def _calibrate(w, singular, rtol, max_steps):
    return _updated(singular, *_run(_power.converge, w, singular, rtol=rtol, max_steps=max_steps))


def _run(method, w, singular, **options):
    """An iteration of _power on one leaf, in at least float32; options are integers or arrays."""
    view, dtype = singular.view, compute_dtype(w.dtype)
    # Vectors are constants of the gradient, also where a user differentiates through a state.
    u, v = (lax.stop_gradient(x).astype(dtype) for x in (singular.u, singular.v))
    split = _sharding.batch_names(view, w.ndim)
    u, v = (_sharding.pcast(x, sum(split, ())) for x in (u, v))
    apply, batch_ndim = partial(_sharding.matvec, view), len(view.batch_shape(w.shape))
    static = {name: x for name, x in options.items() if isinstance(x, int)}
    arrays = {name: x for name, x in options.items() if name not in static}

    def run(w, u, v, arrays):
        return method(apply, w, u, v, batch_ndim=batch_ndim, **static, **arrays)

    run = _sharding.lift_types(run, w, _sharding.types(view, w))
    return _power.PowerResult(*run(w.astype(dtype), u, v, arrays))


def _updated(singular, sigma, u, v):
    """The state keeps its dtypes and shardings, so that it can be a scan's carry."""
    old = singular.sigma, singular.u, singular.v
    sigma, u, v = map(_sharding.like, (sigma, u, v), old)
    return replace(singular, u=u, v=v, sigma=sigma)


@lru_cache(maxsize=4096)
def _spaces(view, shape):
    """Shapes (batch, domain, codomain) of a parameter of the given shape."""
    batch, domain = view.batch_shape(shape), view.domain(shape)
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (*batch, *domain)))
    return batch, domain, jax.eval_shape(view.matvec, w, x).shape[len(batch) :]


# Paths, rules and checks.


def _path_name(path) -> str:
    # Flax boxes (NNX variables, linen partitioning) hold their array in an attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(params: Params) -> dict[str, Any]:
    leaves = {}
    for path, leaf in tree_flatten_with_path(params)[0]:
        name = _path_name(path)
        if name in leaves:
            raise ValueError(
                f"Two parameters have the path {name!r}; rename a key (one of them contains '/')."
            )
        leaves[name] = leaf
    return leaves


def with_leaves(params: Params, changed: Mapping[str, Array]) -> Params:
    paths, treedef = tree_flatten_with_path(params)
    return treedef.unflatten([changed.get(_path_name(path), leaf) for path, leaf in paths])


def _select(params: Params, leaves: Mapping[str, Any], rules: Rules | None) -> dict[str, View]:
    if rules is None:
        selected = _default_views(params, leaves)
    else:
        view_of = compile_rules(rules, leaves)
        selected = {path: view_of(path, None) for path in leaves}
    selected = {path: view for path, view in selected.items() if view is not None}
    if not selected:
        wanted = (
            f"named one of {', '.join(WEIGHT_NAMES)} with 2 axes or more"
            if rules is None
            else f"matched in full by one of {list(rules)}"
        )
        raise ValueError(
            f"No parameter to normalize: none is {wanted}. The paths are: "
            f"{listed(map(shown, leaves))}. "
            "Give rules that match some of them."
        )
    return selected


def compile_rules(rules: Rules | None, leaves: Iterable[str]):
    """A function (path, default) -> what the first rule that matches the path says.

    A rule matches as a regular expression, in full, or letter by letter: a dict path -> view
    from ``views`` is a set of rules, whatever characters its paths contain.

    Raises:
      ValueError: a rule matches no path of ``leaves``, or is no regular expression.
      TypeError: ``rules`` is no mapping of these to views or None.
    """
    compiled = []
    for pattern, regex, view in _checked_rules(rules, leaves):
        if not _matches(pattern, regex, leaves):
            _raise_unmatched(pattern, regex, view, leaves)
        compiled.append((pattern, regex, view))

    def view_of(path, default):
        matches = (v for text, regex, v in compiled if text == path or regex.fullmatch(path))
        return next(matches, default)

    return view_of


def matching_rules(rules: Rules, leaves: Iterable[str]) -> Rules:
    """Those that match some path, where others may be meant for leaves that are not here."""
    return {
        pattern: view
        for pattern, regex, view in _checked_rules(rules, leaves)
        if _matches(pattern, regex, leaves)
    }


def _matches(pattern, regex, leaves) -> bool:
    return pattern in leaves or any(regex.fullmatch(path) for path in leaves)


def _checked_rules(rules, leaves):
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(
            f"rules must be a mapping of regular expressions on paths to views, such as "
            f"{{r'.*kernel': sn_jax.Matrix()}} or the result of sn_jax.linen.views or "
            f"sn_jax.nnx.views; got {kind_of(rules)}."
        )
    checked = []
    for pattern, view in (rules or {}).items():
        if view is not None:
            check_view(view, f"The rule {pattern!r}", ", or None to leave what it matches alone")
        try:
            regex = re.compile(pattern)
        except TypeError:
            raise TypeError(
                f"The rule {pattern!r} is {kind_of(pattern)}; rules are regular expressions, as "
                "strings."
            ) from None
        except re.error as error:
            if pattern not in leaves:
                raise ValueError(
                    f"The rule {pattern!r} is not a regular expression: {error}. Escape special "
                    "characters (re.escape) to match them literally."
                ) from None
            regex = re.compile(re.escape(pattern))
        checked.append((pattern, regex, view))
    return checked


def _raise_unmatched(pattern, regex, view, leaves):
    what = "normalize" if view is not None else "leave alone"
    part = next((path for path in leaves if regex.search(path)), None)
    hint = "correct it, or leave it out"
    if list(leaves) == [""]:
        hint = "params are one array, and its path is '': give {'': view}"
    elif part is not None:
        hint = f"it is a part of {shown(part)}, and rules match in full, as r'.*{pattern}.*' would"
    raise ValueError(
        f"No parameter to {what} by the rule {pattern!r}: it matches no path. The closest of "
        f"{len(leaves)} are: {listed(closest(str(pattern), leaves))}; {hint}."
    )


def closest(name: str, paths: Iterable[str], most: int = 3) -> list[str]:
    """The paths that look most like ``name``."""

    def likeness(path):
        return difflib.SequenceMatcher(None, name, path).ratio()

    return [shown(path) for path in sorted(paths, key=likeness, reverse=True)[:most]]


def check_key(key: Any, order: str) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.uint32)
    ):
        raise TypeError(
            f"key must be a PRNG key, such as jax.random.key(0); got {kind_of(key)}. The order is "
            f"{order}."
        )


def shown(path: str) -> str:
    """A path in a sentence: parameters that are one array have the empty one."""
    return path or "'' (params itself)"


def _default_views(params: Params, leaves: Mapping[str, Any]) -> dict[str, View]:
    """By name, without rules; and a warning that lists what may have been meant, too."""
    keys = {_path_name(path): path for path, _ in tree_flatten_with_path(params)[0]}
    selected, left_out = {}, []
    for path, leaf in leaves.items():
        _, name = _parent_and_name(path)
        shape = leaf.shape if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else ()
        if len(shape) < 2 or name in _NO_WEIGHTS:
            continue
        owner = _owner(params, keys[path])
        if _is_scale(path, shape, leaves, owner):
            continue
        if path == "" or name in WEIGHT_NAMES:
            selected[path] = _default_view(path, shape, owner)
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and sum(size > 1 for size in shape) > 1:
            left_out.append(f"{path} {shape}")
    if selected and left_out:
        warnings.warn(
            f"sn_jax.init without rules leaves alone what is named none of "
            f"{', '.join(WEIGHT_NAMES)}, though it has two axes or more: {listed(left_out)}. Give "
            "rules to say which parameters are meant.",
            stacklevel=4,
        )
    return selected


def _default_view(path: str, shape: tuple[int, ...], owner: Any) -> View:
    if len(shape) == 2:
        return Matrix()
    first = Matrix(tuple(range(1, len(shape))), 0)
    output_first = _parent_and_name(path)[1] == "weight"
    # Equinox's convolutions, and not a stack of them.
    if output_first and getattr(owner, "num_spatial_dims", None) == len(shape) - 2:
        return first
    torch = f", or sn_jax.{first} if outputs come first, as in PyTorch" if output_first else ""
    raise ValueError(
        f"{shown(path)} of shape {shape} has more than 2 axes, and which of them are input, output "
        f"or batch cannot be told from the shape: {_WAYS_OUT}{torch}."
    )


def _parent_and_name(path: str) -> tuple[str, str]:
    """The path up to the leaf's own name, and that: after a dot in a state dict of torch."""
    start = max(path.rfind("/"), path.rfind(".")) + 1
    return path[:start], path[start:]


def _owner(params: Params, keys: tuple) -> Any:
    """The object of which a leaf is an attribute, such as an Equinox layer; else None."""
    if not keys or not isinstance(keys[-1], GetAttrKey):
        return None
    node = params
    try:
        for key in keys[:-1]:
            if isinstance(key, GetAttrKey):
                node = getattr(node, key.name)
            else:
                node = node[key.key if isinstance(key, DictKey) else key.idx]
    except (AttributeError, LookupError, TypeError):  # a container of other keys
        return None
    return node


def _is_scale(path: str, shape: tuple[int, ...], leaves: Mapping[str, Any], owner: Any) -> bool:
    """Whether a weight multiplies entry by entry, as those of norm layers do.

    Then its bias has its shape; or the layer, which divides by something plus ``eps``, declares
    the shape, to which ``vmap`` may have added axes.
    """
    bias = leaves.get(f"{_parent_and_name(path)[0]}bias")
    if bias is not None and jnp.shape(bias) == shape:
        return True
    declared = getattr(owner, "shape", None)
    return (
        hasattr(owner, "eps")
        and isinstance(declared, tuple)
        and len(declared) > 0
        and shape[-len(declared) :] == declared
    )


def _checked_weight(path: str, w: Any, view: View) -> Array:
    """The leaf as an array that the view fits, or a sentence that says why not."""
    check_view(view, f"The entry or rule for {shown(path)}")
    if not (hasattr(w, "shape") and hasattr(w, "dtype")):
        raise TypeError(
            f"{shown(path)} is a {type(w).__name__}, not an array; exclude it by a rule "
            f"{{{re.escape(path)!r}: None}} before the others."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{shown(path)} of shape {jnp.shape(w)} is {w.dtype}; only real floating-point weights "
            "can be normalized: convert it, or exclude it by a rule with None."
        )
    try:
        view.batch_shape(w.shape)
        _sharding.check_split(view, w)
    except ValueError as error:
        raise ValueError(f"{shown(path)} of shape {jnp.shape(w)}: {error}") from None
    return w


def check_state(state: State, hint: str = "") -> None:
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
                f"{listed(leaves)}."
            )
        w = _checked_weight(path, leaves[path], singular.view)
        shape = _sharding.whole_shape(singular.view, w.shape)
        batch, domain, codomain = _spaces(singular.view, shape)
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
                f"{shown(path)} is seen as {view}, with {what} of size {expected[-n - 1 : -1]}, "
                f"but the state was made for {what} of size {got[-n - 1 : -1]}: not the parameter "
                "but the image size has changed. Make a new state, or keep to the old size."
            )
    raise ValueError(
        f"{shown(path)} has shape {jnp.shape(w)}, which asks for {name} of shape {expected}, "
        f"but the state holds {got}: the parameter's shape has changed since "
        "sn_jax.init. Make a new state."
    )


def bounds_by_path(
    bound: Bound, state: Mapping[str, Singular | None]
) -> Mapping[str, float | Array]:
    """A bound for each path; checked against the shape of its norms where the entry is given."""
    bounds = bound if isinstance(bound, Mapping) else dict.fromkeys(state, bound)
    if bounds.keys() != state.keys():
        missing = sorted(state.keys() - bounds.keys())
        unknown = sorted(bounds.keys() - state.keys())
        near = closest(unknown[0], state, 1) if unknown else []
        raise ValueError(
            "bound as a mapping needs exactly the paths of the state"
            + (f"; missing: {listed(missing)}" if missing else "")
            + (f"; unknown: {listed(unknown)}" if unknown else "")
            + (f" (the closest to the first is {near[0]})" if near else "")
            + "."
        )
    return {path: _checked_bound(path, value, state[path]) for path, value in bounds.items()}


def _checked_bound(path: str, value: Any, singular: Singular | None) -> Any:
    known = not isinstance(value, jax.core.Tracer)
    number = np.asarray(value) if known else value
    numeric = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(number.dtype, kind) for kind in numeric):
        raise TypeError(
            f"bound for {shown(path)} must be a positive number, or a mapping from paths to such; "
            f"got {kind_of(value)}."
        )
    if known and not (np.all(number > 0) and np.all(np.isfinite(number))):
        raise ValueError(
            f"bound for {shown(path)} must be a positive, finite number; got {number}."
        )
    norms = number.shape if singular is None else singular.sigma.shape
    if number.shape not in ((), norms):
        raise ValueError(
            f"bound for {shown(path)} has shape {number.shape}, but its norms have {norms}: give "
            "one number, or an array of that shape; where shapes differ, a mapping from paths."
        )
    return value if number.shape == () else jnp.asarray(value)


def listed(paths, most: int = 10) -> str:
    paths = list(paths)
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none") + rest
