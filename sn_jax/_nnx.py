"""NNX modules as graphs: a copy that runs in a module's place, and what wrappers keep in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from sn_jax._views import kind_of


def name_of(path: tuple) -> str:
    return "/".join(map(str, path))


def raw(v: Any) -> Any:
    return v.get_raw_value() if isinstance(v, nnx.Variable) else v


def array_of(v: Any) -> Any:
    """The array (or its type) of a variable, or of an attribute that is one."""
    value = raw(v)
    return v[...] if isinstance(v, nnx.Variable) and isinstance(value, jax.Array) else value


def with_array(v: Any, array: Any) -> Any:
    return v.replace(array) if isinstance(v, nnx.Variable) else array


def described(x: Any) -> str:
    """For errors: what somebody gave in place of something else."""
    if isinstance(x, type):
        return f"the class {x.__name__}"
    return kind_of(x) if hasattr(x, "dtype") else repr(x)


class Twin:
    """A copy of a module that runs in its place, with some of its variables replaced.

    The other variables are shared. What a run changes besides their values (attributes: counters,
    arrays, new variables and modules) is set on the module afterwards.

    Args:
      module: the module.
      graphdef: of it.
      leaves: path -> variable or array: its flat state, with replacements.
    """

    def __init__(self, module: nnx.Module, graphdef: nnx.GraphDef, leaves: Mapping[tuple, Any]):
        self.copy = nnx.merge(graphdef, nnx.from_flat_state(list(leaves.items())))
        nodes = dict(nnx.iter_graph(self.copy))
        self._original = {id(nodes[path]): node for path, node in nnx.iter_graph(module)
                          if isinstance(node, nnx.Pytree | nnx.Variable)}  # fmt: skip

    def run(self, method: str, args, kwargs) -> Any:
        """The output of the copy's method."""
        before = {id(node): _attributes(node) for node in _nodes(self.copy)}
        out = getattr(self.copy, method)(*args, **kwargs)
        for node in _nodes(self.copy):
            old, new = before.get(id(node), {}), _attributes(node)
            original, marks = self._back(node), getattr(node, _MARKS)
            for name in old.keys() - new.keys():
                delattr(original, name)
            for name, (parts, structure) in new.items():
                if name not in old or not _same(old[name], new[name]):
                    static = structure is None
                    value = parts[0] if static else structure.unflatten(map(self._back, parts))
                    mark = {True: nnx.data, False: nnx.static}.get(marks.get(name), _unmarked)
                    setattr(original, name, mark(value))
        return self._back(out)

    def _back(self, part):
        """What a part of the copy stands for; anything else is itself."""
        return self._original.get(id(part), part)


# NNX's own record of which attributes hold arrays and modules. A new attribute is recorded as that
# of the module that made it.
_MARKS = "_pytree__nodes"


def _unmarked(value):
    return value


def _nodes(module: nnx.Module) -> list[nnx.Pytree]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Pytree)]


def _attributes(node: nnx.Pytree) -> dict[str, tuple[list[Any], Any]]:
    """Attribute -> (parts, structure) of what it holds, containers opened; static ones, which
    module and copy share, whole."""
    marks = getattr(node, _MARKS)
    values = {name: x for name, x in vars(node).items() if not name.startswith("_pytree__")}
    return {
        name: jax.tree.flatten(x, is_leaf=_is_node) if marks.get(name, True) else ([x], None)
        for name, x in values.items()
    }


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _same(a, b) -> bool:
    return a[1] == b[1] and all(x is y for x, y in zip(a[0], b[0], strict=True))


class HashableDict(dict):
    """A mapping that is part of a module's static description; not changed once made."""

    def __hash__(self):
        return hash(tuple(sorted(self.items(), key=lambda item: item[0])))


class Stats(dict[Any, Any]):
    """The wrapper's state by path: nested dicts, the last of which hold ``u`` and ``sigma``.

    ``nnx.update`` with the state of ``flax.nnx.SpectralNorm``, whose keys are tuples, loads it.
    """

    def at(self, path: Iterable[str]) -> dict[str, Any]:
        """The node at a path, made where it is not there yet."""
        node = self
        for key in path:
            node = node.setdefault(key, {})
        return node

    def _set(self, key: Any, value: Any) -> None:
        if not isinstance(key, tuple):
            self[key] = value
            return
        *path, field = map(str, key)
        node: Any = self
        for part in path:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        what = f"{field} of {name_of(tuple(path))} in the state of flax.nnx.SpectralNorm"
        if field not in node:
            raise ValueError(
                f"{what} belongs to no kernel that is normalized here: load the parameters alone, "
                "nnx.update(model, nnx.state(flax_model, nnx.Param)), or name it by rules."
            )
        if "v" in node:
            raise ValueError(
                f"{what} comes without v, which store_v=True keeps: load it into a wrapper "
                "without store_v."
            )
        if node[field].shape != raw(value).shape:
            raise ValueError(
                f"{what} has shape {raw(value).shape}, but here it has {node[field].shape}: flax "
                "flattens kernels to matrices of another shape. Load the parameters alone, "
                "nnx.update(model, nnx.state(flax_model, nnx.Param))."
            )
        node[field][...] = array_of(value).astype(node[field].dtype)


def _flat(stats):
    return sorted(stats.items()), None


nnx.graph.register_pytree_node_type(
    Stats,
    flatten=_flat,
    unflatten=lambda items, _: Stats(items),
    set_key=Stats._set,
    pop_key=lambda stats, key: stats.pop(key),
)
jax.tree_util.register_pytree_with_keys(
    Stats,
    lambda stats: (
        [(jax.tree_util.DictKey(key), stats[key]) for key in sorted(stats)],
        tuple(sorted(stats)),
    ),
    lambda keys, values: Stats(zip(keys, values, strict=True)),
)
