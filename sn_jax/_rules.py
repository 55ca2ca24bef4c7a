"""Paths of parameters, rules on them, and which parameters are selected to be seen how.

Here belongs what names parameters: in trees, in rules and in errors.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.tree_util import DictKey, GetAttrKey, keystr, tree_flatten_with_path

from sn_jax._operator import Operator, check
from sn_jax._views import Matrix, View, check_view, kind_of

Params = Any
Rules = Mapping[str, View | None]

# How Flax, Haiku and Equinox name weights.
WEIGHT_NAMES = (
    "kernel", "w", "weight", "embedding", "embeddings", "weight_ih", "weight_hh", "w_i", "w_h",
)  # fmt: skip
NO_WEIGHTS = ("bias", "scale")
_WAYS_OUT = (
    "take the views from the model with sn_jax.linen.views or sn_jax.nnx.views, or give one by "
    "rules, such as {r'.*kernel': sn_jax.Matrix((0, 1, 2), 3)} for flattened 2-D convolutions, or "
    "sn_jax.Matrix() for stacks of matrices"
)


def path_name(path) -> str:
    # Flax boxes (NNX variables, linen partitioning) hold their array in an attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(params: Params) -> dict[str, Any]:
    leaves = {}
    for path, leaf in tree_flatten_with_path(params)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"Two parameters have the path {name!r}; rename a key (one of them contains '/')."
            )
        leaves[name] = leaf
    return leaves


def with_leaves(params: Params, changed: Mapping[str, Array]) -> Params:
    paths, treedef = tree_flatten_with_path(params)
    return treedef.unflatten([changed.get(path_name(path), leaf) for path, leaf in paths])


def select(params: Params, leaves: Mapping[str, Any], rules: Rules | None) -> dict[str, View]:
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
            f"{listing(map(label, leaves))}. "
            "Give rules that match some of them."
        )
    return selected


def compile_rules(rules: Rules | None, leaves: Collection[str]) -> Callable[[str, Any], Any]:
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

    def view_of(path: str, default: Any) -> Any:
        matches = (v for text, regex, v in compiled if text == path or regex.fullmatch(path))
        return next(matches, default)

    return view_of


def matching_rules(rules: Rules, leaves: Collection[str]) -> Rules:
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
        hint = f"it is a part of {label(part)}, and rules match in full, as r'.*{pattern}.*' would"
    raise ValueError(
        f"No parameter to {what} by the rule {pattern!r}: it matches no path. The closest of "
        f"{len(leaves)} are: {listing(closest(str(pattern), leaves))}; {hint}."
    )


def closest(name: str, paths: Iterable[str], most: int = 3) -> list[str]:
    """The paths that look most like ``name``."""

    def likeness(path):
        return difflib.SequenceMatcher(None, name, path).ratio()

    return [label(path) for path in sorted(paths, key=likeness, reverse=True)[:most]]


def label(path: str) -> str:
    """A path in a sentence: parameters that are one array have the empty one."""
    return path or "'' (params itself)"


def _default_views(params: Params, leaves: Mapping[str, Any]) -> dict[str, View]:
    """By name, without rules; and a warning that lists what may have been meant, too."""
    keys = {path_name(path): path for path, _ in tree_flatten_with_path(params)[0]}
    selected, left_out = {}, []
    for path, leaf in leaves.items():
        _, name = _parent_and_name(path)
        shape = leaf.shape if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else ()
        if len(shape) < 2 or name in NO_WEIGHTS:
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
            f"{', '.join(WEIGHT_NAMES)}, though it has two axes or more: {listing(left_out)}. Give "
            "rules to say which parameters are meant.",
            stacklevel=4,
        )
    return selected


def _default_view(path: str, shape: tuple[int, ...], owner: Any) -> View:
    if len(shape) == 2:
        return Matrix()
    first = Matrix(tuple(range(1, len(shape))), 0)
    output_first = _parent_and_name(path)[1] == "weight"
    # A convolution of Equinox, but not a stack of several.
    if output_first and getattr(owner, "num_spatial_dims", None) == len(shape) - 2:
        return first
    torch = f", or sn_jax.{first} if outputs come first, as in PyTorch" if output_first else ""
    raise ValueError(
        f"{label(path)} of shape {shape} has more than 2 axes, and which of them are input, output "
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


def checked_weight(path: str, w: Any, view: View) -> Array:
    """The leaf as an array that the view fits, or a sentence that says why not."""
    check_view(view, f"The entry or rule for {label(path)}")
    if not (hasattr(w, "shape") and hasattr(w, "dtype")):
        raise TypeError(
            f"{label(path)} is a {type(w).__name__}, not an array; exclude it by a rule "
            f"{{{re.escape(path)!r}: None}} before the others."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{label(path)} of shape {jnp.shape(w)} is {w.dtype}; only real floating-point weights "
            "can be normalized: convert it, or exclude it by a rule with None."
        )
    try:
        check(Operator(view, w))
    except ValueError as error:
        raise ValueError(f"{label(path)} of shape {jnp.shape(w)}: {error}") from None
    return w


def listing(paths, most: int = 10) -> str:
    paths = list(paths)
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none") + rest
