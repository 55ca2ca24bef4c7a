"""The functional API: a state of singular vectors, and parameters divided by their norms."""

import difflib
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import GetAttrKey, keystr, register_dataclass, tree_flatten_with_path

from sn_jax import _power, _sharding
from sn_jax._views import Matrix, View, check_linear, compute_dtype

Params = Any
Rules = Mapping[str, View | None]
Bound = float | Array | Mapping[str, float | Array]

WEIGHT_NAMES = ("kernel", "w", "weight", "embedding")
_WAYS_OUT = (
    "take the views from the model with sn_jax.linen.views or sn_jax.nnx.views, or give one by "
    "rules, such as {r'.*kernel': sn_jax.Matrix((0, 1, 2), 3)} for flattened 2-D convolutions"
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


State = dict[str, Singular]


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
        rules, leaves named kernel, w, weight or embedding: with 2 axes ``Matrix()``, a
        ``weight`` with more is output-first (Equinox, torch), others with more raise.
      n_vectors: singular vectors iterated together (at most the smaller side of the matrix).
        More of them follow a drifting weight more closely.
      warmup: power-iteration steps, ``>= 0``.

    Returns:
      State: path -> Singular.

    Raises:
      ValueError: nothing matched; a view does not fit a shape; a bad regular expression.
      TypeError: a selected leaf is not floating point.

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
    leaves = named_leaves(params)
    bits = jax.random.bits(key, (), jnp.uint32)
    state = {}
    for path, view in _select(leaves, rules).items():
        w = _checked_weight(path, leaves[path], view)
        try:
            check_linear(view, w, in_w=True)
        except ValueError as error:
            raise ValueError(f"{path} of shape {jnp.shape(w)}: {error}") from error
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
      bound: c > 0, one number or a mapping path -> number (all paths of ``state``).
      mode: "divide" gives norm c; "clip" multiplies by min(1, c / sigma).
      gradient: "through" differentiates sigma; "stop" holds it constant.

    Returns:
      (params, state): same structure, shapes and dtypes as given.

    Raises:
      ValueError: ``state`` does not fit ``params`` (a path or shape is named); bad option.
      TypeError: a parameter is not floating point; ``n_steps`` not an integer.

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
    safe = jnp.where(value < jnp.finfo(value.dtype).tiny, jnp.ones_like(value), value)
    factor = jnp.asarray(bound, value.dtype) / safe
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


def _select(leaves: Mapping[str, Any], rules: Rules | None) -> dict[str, View]:
    if rules is None:
        selected = {path: _default_view(path, jnp.shape(leaf))
                    for path, leaf in leaves.items() if hasattr(leaf, "shape")}  # fmt: skip
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
            f"No parameter to normalize: none is {wanted}. The paths are: {listed(leaves)}. "
            "Give rules that match some of them."
        )
    return selected


def compile_rules(rules: Rules | None, leaves: Mapping[str, Any]):
    """A function (path, default) -> what the first rule that matches the path says.

    A rule matches as a regular expression, in full, or letter by letter: a dict path -> view
    from ``views`` is a set of rules, whatever characters its paths contain.
    """
    compiled = []
    for pattern, view in (rules or {}).items():
        try:
            compiled.append((pattern, re.compile(pattern), view))
        except re.error as error:
            if pattern not in leaves:
                raise ValueError(
                    f"The rule {pattern!r} is not a regular expression: {error}. Escape special "
                    "characters (re.escape) to match them literally."
                ) from None
            compiled.append((pattern, re.compile(re.escape(pattern)), view))

    def view_of(path, default):
        matches = (v for text, regex, v in compiled if text == path or regex.fullmatch(path))
        return next(matches, default)

    return view_of


def _default_view(path: str, shape: tuple[int, ...]) -> View | None:
    name = path.rpartition("/")[2]
    if name not in WEIGHT_NAMES or len(shape) < 2:
        return None
    if len(shape) == 2:
        return Matrix()
    if name == "weight":
        return Matrix(tuple(range(1, len(shape))), 0)
    raise ValueError(
        f"{path} of shape {shape} has more than 2 axes, and which of them are input, output or "
        f"batch cannot be told from the shape: {_WAYS_OUT}."
    )


def _checked_weight(path: str, w: Any, view: View) -> Array:
    """The leaf as an array that the view fits, or a sentence that says why not."""
    if not isinstance(view, View):
        raise TypeError(
            f"The rule for {path} gives {view!r}, which is no view; use one such as "
            "sn_jax.Matrix(), or None to leave the parameter alone."
        )
    if not (hasattr(w, "shape") and hasattr(w, "dtype")):
        raise TypeError(
            f"{path} is a {type(w).__name__}, not an array; exclude it by a rule "
            f"{{{re.escape(path)!r}: None}} before the others."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{path} of shape {jnp.shape(w)} is {w.dtype}; only real floating-point weights can "
            "be normalized: convert it, or exclude it by a rule with None."
        )
    try:
        view.batch_shape(w.shape)
        _sharding.check_split(view, w)
    except ValueError as error:
        raise ValueError(f"{path} of shape {jnp.shape(w)}: {error}") from None
    return w


def check_state(state: State, hint: str = "") -> None:
    if not isinstance(state, Mapping) or not all(isinstance(s, Singular) for s in state.values()):
        raise TypeError(
            "A state is what sn_jax.init returned (a dict path -> Singular); got "
            f"{type(state).__name__}.{hint}"
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
        for name, space in (("u", codomain), ("v", domain)):
            expected, got = (*batch, k, *space), getattr(singular, name).shape
            if got != expected:
                raise ValueError(
                    f"{path} has shape {jnp.shape(w)}, which asks for {name} of shape {expected}, "
                    f"but the state holds {got}: the parameter's shape has changed since "
                    "sn_jax.init. Make a new state."
                )
        weights[path] = w
    return weights


def bounds_by_path(bound: Bound, state: State) -> Mapping[str, float | Array]:
    bounds = bound if isinstance(bound, Mapping) else dict.fromkeys(state, bound)
    if bounds.keys() != state.keys():
        missing = sorted(state.keys() - bounds.keys())
        unknown = sorted(bounds.keys() - state.keys())
        raise ValueError(
            "bound as a mapping needs exactly the paths of the state"
            + (f"; missing: {listed(missing)}" if missing else "")
            + (f"; unknown: {listed(unknown)}" if unknown else "")
            + "."
        )
    for path, value in bounds.items():
        if not isinstance(value, jax.core.Tracer):
            value = np.asarray(value)
            if not (np.all(value > 0) and np.all(np.isfinite(value))):
                raise ValueError(
                    f"bound for {path} must be a positive, finite number; got {value}."
                )
    return bounds


def listed(paths, most: int = 10) -> str:
    paths = list(paths)
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none") + rest
