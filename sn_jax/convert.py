"""Torch checkpoints in and out; the state as plain arrays comes along by name.

Needs NumPy and JAX only: torch tensors are read through their own ``detach().cpu().numpy()``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sn_jax import _core, _rules
from sn_jax._core import Singular, State, from_state_dict, to_state_dict
from sn_jax._rules import Params, Rules
from sn_jax._views import Conv, Matrix, Scaled, View, compute_dtype

__all__ = ["from_state_dict", "from_torch", "to_state_dict", "to_torch"]

# The end of a key in a torch state dict -> what it holds; None for what is no parameter.
_TORCH_FIELDS = {
    "weight": "weight",
    "weight_orig": "weight",
    "weight_bar": "weight",
    "parametrizations.weight.original": "weight",
    "bias": "bias",
    "weight_u": "u",
    "weight_v": "v",
    "parametrizations.weight.0._u": "u",
    "parametrizations.weight.0._v": "v",
    "running_mean": None,
    "running_var": None,
    "num_batches_tracked": None,
}
_FLAX_WEIGHTS = ("kernel", "embedding", "scale")


def from_torch(
    state_dict: Mapping[str, Any],
    template: Params,
    views: Rules | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[Params, State]:
    r"""Parameters for a Flax model, and their state, from a torch model's ``state_dict``.

    Reads what both of torch's functions leave, ``torch.nn.utils.spectral_norm``
    (``weight_orig``, ``weight_u``, ``weight_v``) and its successor in ``parametrizations``
    (``parametrizations.weight.original``, ``.0._u``, ``.0._v``), and a wrapper of the time before
    them (``module.weight_bar``, ``.weight_u``, ``.weight_v``), beside plain ``weight`` and
    ``bias``. A layer that torch lists under several names counts once where the template has
    it once. The parameters are the raw ones; the state has an entry for each weight that torch
    normalizes, so ``spectral_normalize(params, state, n_steps=0)`` divides as torch does in
    eval, for both. In train mode the first iterates ``v``, then ``u``, as ``n_steps=1`` does; the
    second ``u``, then ``v``: its sigma lies between ours of that step and the next. (Before
    training, the first has random vectors and may divide by a negative number; sigma is
    ``|W v|`` here where ``<u, W v> <= 0``.)

    ============== =========================== ==========================
    torch          weight                      flax
    ============== =========================== ==========================
    Linear         (out, in)                   kernel (in, out)
    Conv1d-3d      (out, in / groups, \*k)     kernel (\*k, in / groups, out)
    ConvTranspose  (in, out, \*k)              kernel (\*k, in, out), flipped in space
    the same, for  transpose_kernel=True       kernel (\*k, out, in), not flipped
    Embedding      (num, dim)                  embedding (num, dim)
    Batch-, Layer- weight, bias                scale, bias
    ============== =========================== ==========================

    Outputs are equal if ``nn.Conv`` has torch's ``padding=p``, and if ``nn.ConvTranspose`` has
    ``padding=[(r - p, r - p + o), ...]`` with torch's ``padding`` p, ``output_padding`` o and
    r = dilation * (kernel_size - 1), for both values of ``transpose_kernel``. For stride s,
    ``"SAME"`` is that if o = 0 and r + 1 - s = 2 p, or if p = 0 and o = s - r - 1, and
    ``"VALID"`` if p = 0 and o = max(s - r - 1, 0). A kernel that could be of a Conv or of a
    ConvTranspose (more than 2 axes, as many input as output channels) needs ``views`` to say.

    Torch's ``u`` (out,) carries over as it is; ``v`` is permuted as the kernel is, and stays
    unflattened. All arrays are copies: torch may train on. Running statistics of BatchNorm are no
    parameters and are left aside.

    Args:
      state_dict: torch's names -> tensors, or arrays. bfloat16 is read through float32.
      template: the Flax model's parameters (nested dicts; ``jax.eval_shape`` of ``init`` will
        do): their paths, shapes and dtypes are those of the result.
      views: regular expression -> view, as for ``sn_jax.init``, or what ``sn_jax.linen.views``
        returns. A ``Conv`` says by ``transpose`` and ``transpose_kernel`` what a kernel is; a
        ``Matrix`` with the last axis as output says Conv of a module that Flax named ``Conv_0``
        or so, and one with the last but one ConvTranspose with ``transpose_kernel=True``. A
        ``Matrix`` is also the view of the entry in the state. Otherwise that is the matrix which
        torch flattens to, also for a ``Conv``, of whose operator torch has no vectors.
      names: torch's module -> Flax module, such as ``{"main.0": "Conv_0"}``. Modules it does not
        name are matched by equal names, then by their shapes, and where several have the same by
        the numbers in their names (``Conv_2`` before ``Conv_10``). What these leave open raises:
        an order of appearance alone decides nothing.

    Returns:
      (params, State): parameters like ``template``; sigma in the state is ``<u, W v>``.

    Raises:
      ValueError: modules, shapes or vectors do not fit each other, a key is not understood, or a
        kernel may be that of a Conv or of a ConvTranspose. Both sides are named.

    Example:
      >>> import sn_jax
      >>> torch = {"0.weight_orig": np.diag([2.0, 4.0]), "0.bias": np.zeros(2),
      ...          "0.weight_u": np.array([0.0, 1.0]), "0.weight_v": np.array([0.0, 1.0])}
      >>> template = {"Dense_0": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
      >>> params, state = from_torch(torch, template)
      >>> print(state["Dense_0/kernel"].sigma)
      4.0
      >>> normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
      >>> print(normalized["Dense_0"]["kernel"])
      [[0.5 0. ]
       [0.  1. ]]
    """
    changed, state = {}, {}
    for module in _matched(state_dict, template, views, names):
        dtype = module.leaf.dtype
        weight = module.layout.to_flax(module.arrays["weight"], range(len(module.shape)))
        # Copied, here and below, since jnp.asarray may share the memory that torch trains on.
        changed[module.path] = jnp.array(weight, dtype)
        if "bias" in module.arrays:
            changed[module.bias_path] = jnp.array(module.arrays["bias"], module.bias.dtype)
        if "u" not in module.keys:
            continue
        module = module.with_v()
        axes, vectors = module.vector_axes(), {}
        for field, kept in axes.items():
            x = module.arrays[field].reshape([module.shape[axis] for axis in kept])
            vectors[field] = jnp.array(module.layout.to_flax(x, kept)[None], compute_dtype(dtype))
        view, swapped = module.view_of(axes, None if isinstance(module.view, Conv) else module.view)
        u, v = (vectors[field] for field in ("vu" if swapped else "uv"))
        state[module.path] = Singular(u, v, jnp.zeros((), u.dtype), view)
    params = _with_leaves(template, changed)
    norms = _core.spectral_norms(params, state)
    return params, {path: replace(entry, sigma=norms[path]) for path, entry in state.items()}


def to_torch(
    params: Params,
    state: State,
    template: Mapping[str, Any],
    views: Rules | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """The way back from ``from_torch``: a state dict for a torch model.

    The round trip is exact: the same numbers in the same places. Load the result by
    ``model.load_state_dict({name: torch.from_numpy(x) for name, x in result.items()})``.

    Args:
      params: the Flax model's parameters.
      state: entries for the weights that the torch model normalizes, and for no others. Of
        several vectors the leading one is taken.
      template: the torch model's own ``state_dict``. Its names decide which of torch's two
        functions is meant; what is no parameter (running statistics) is taken from it.
      views, names: as for ``from_torch``.

    Returns:
      dict: the keys of ``template`` -> NumPy arrays of its dtypes (float32 for bfloat16).

    Raises:
      ValueError: as ``from_torch``; the state has an entry too many or too few.

    Example:
      >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 2.0, 3.0]])}}
      >>> to_torch(params, {}, template={"0.weight": np.zeros((3, 1))})["0.weight"]
      array([[1.],
             [2.],
             [3.]])
    """
    _core.check_state(state)
    result = {key: np.array(_as_array(value)) for key, value in template.items()}
    unused = dict(state)

    def put(module, field, x):
        old = module.arrays[field]
        for keys in (module.keys, *module.others):
            result[keys[field]] = np.array(x, old.dtype, order="C").reshape(old.shape)

    for module in _matched(template, params, views, names):
        weight = np.asarray(module.leaf)
        put(module, "weight", module.layout.to_torch(weight, range(len(module.shape))))
        if "bias" in module.arrays:
            put(module, "bias", module.bias)
        if "u" not in module.keys:
            continue
        if module.path not in unused:
            raise ValueError(
                f"The torch model normalizes {module.name!r}, but the state has no entry "
                f"{module.path!r}; make one with sn_jax.init, or a template without "
                "spectral_norm there."
            )
        entry = unused.pop(module.path)
        axes = module.vector_axes()
        _, swapped = module.view_of(axes, entry.view)
        for field, ours in zip("uv", "vu" if swapped else "uv", strict=True):
            leading = np.asarray(getattr(entry, ours))[0]
            put(module, field, module.layout.to_torch(leading, axes[field]))
    if unused:
        raise ValueError(
            f"The state has entries that the torch model does not normalize: "
            f"{_rules.listing(unused)}. Leave them out, with the parameters normalized or raw as "
            "torch shall have them, or take the template from a model with spectral_norm there."
        )
    return result


# One torch module matched with one Flax module.


class _Layout(NamedTuple):
    """Where torch's axes are in a Flax kernel."""

    axes: tuple[int, ...]  # the torch axis that each Flax axis is
    out: int  # the torch axis of u
    flip: bool = False  # in space: torch's axes from 2 on

    def to_flax(self, x: np.ndarray, kept) -> np.ndarray:
        """A torch array with the axes ``kept`` (ascending) of the weight, as Flax has them."""
        order = [axis for axis in self.axes if axis in kept]
        x = x.transpose([list(kept).index(axis) for axis in order])
        return self._flipped(x, order)

    def to_torch(self, x: np.ndarray, kept) -> np.ndarray:
        """The inverse."""
        order = [axis for axis in self.axes if axis in kept]
        return self._flipped(x, order).transpose([order.index(axis) for axis in kept])

    def _flipped(self, x, order):
        return np.flip(x, tuple(i for i, a in enumerate(order) if a >= 2)) if self.flip else x


def _layouts(leaf_name: str, torch_shape, shape) -> dict[str, _Layout]:
    """What the layer can be, by name, to judge from the shapes of its weight."""
    n = len(torch_shape)
    if n != len(shape):
        return {}
    space = tuple(range(2, n))
    if leaf_name != "kernel":
        layouts = {leaf_name: _Layout(tuple(range(n)), 0)}
    elif n == 2:
        layouts = {"Dense": _Layout((1, 0), 0)}
    else:
        layouts = {
            "Conv": _Layout((*space, 1, 0), 0),
            "ConvTranspose": _Layout((*space, 0, 1), 1, flip=True),
            "ConvTranspose(transpose_kernel=True)": _Layout((*space, 1, 0), 1),
        }
    return {
        name: layout
        for name, layout in layouts.items()
        if tuple(torch_shape[axis] for axis in layout.axes) == tuple(shape)
    }


class _Module(NamedTuple):
    name: str  # torch's
    keys: dict[str, str]  # weight, bias, u, v -> key of the state dict
    arrays: dict[str, np.ndarray]  # the same -> torch's arrays
    path: str  # of the weight in the Flax tree
    leaf: Any
    bias_path: str
    bias: Any
    layout: _Layout
    view: View | None  # from the user
    others: tuple[dict[str, str], ...]  # ``keys`` of the same layer's other names

    @property
    def shape(self):
        return self.arrays["weight"].shape

    def with_v(self) -> "_Module":
        """With the v that follows from u, ``W^T u / |W^T u|``, where torch has kept none."""
        if "v" in self.arrays:
            return self
        weight, u = self.arrays["weight"], self.arrays["u"]
        for axis in (self.layout.out, *range(weight.ndim)):
            if u.shape == (weight.shape[axis],):
                v = np.tensordot(u, weight, (0, axis)).ravel()
                v = v / max(np.linalg.norm(v), np.finfo(v.dtype).tiny)
                return self._replace(arrays={**self.arrays, "v": v})
        raise ValueError(
            f"Torch's {self.name!r} has a weight of shape {weight.shape}, but u of shape "
            f"{u.shape}: it fits none of its flattenings. Take all from one state_dict."
        )

    def vector_axes(self) -> dict[str, list[int]]:
        """Torch's axes of u and of v: torch flattens all but one, its argument ``dim``."""
        n, u, v = len(self.shape), self.arrays["u"].size, self.arrays["v"].size
        for axis in (self.layout.out, *range(n)):
            if n > 1 and u == self.shape[axis] and u * v == math.prod(self.shape):
                return {"u": [axis], "v": [a for a in range(n) if a != axis]}
        raise ValueError(
            f"Torch's {self.name!r} has a weight of shape {self.shape}, but u of {u} and v of {v} "
            "entries: they fit none of its flattenings. Take all from one state_dict."
        )

    def view_of(self, axes, view: View | None) -> tuple[View, bool]:
        """The view, checked to be torch's matrix, and whether its input is torch's output."""
        ins, outs = (
            tuple(i for i, a in enumerate(self.layout.axes) if a in axes[field]) for field in "vu"
        )
        # A dense kernel gets the view that sn_jax.init takes by default, so that the states agree.
        default = Matrix() if (ins, outs) == ((0,), (1,)) else Matrix(ins, outs)
        if view is None:
            return default, False
        if isinstance(view, Matrix):
            groups = view.axis_groups(len(self.shape))
            if groups in (((), ins, outs), ((), outs, ins)):
                return view, groups == ((), outs, ins)
        raise ValueError(
            f"{self.path} of shape {self.leaf.shape} is seen as {view}, but torch keeps the "
            f"vectors of {default} for {self.name!r}; use that view here, and for another norm "
            "begin a new state with sn_jax.init."
        )


def _matched(state_dict, tree, views, names) -> list[_Module]:
    """Torch's modules with their Flax partners, checked against each other."""
    torch_modules, flax_modules = _torch_modules(state_dict), _flax_modules(tree)
    paths = {_joined(path, leaf) for path, leaves in flax_modules.items() for leaf in leaves}
    view_of = _rules.compile_rules(views, paths)
    arrays = {
        name: {field: _as_array(state_dict[key]) for field, key in keys.items()}
        for name, keys in torch_modules.items()
    }
    others: dict[str, tuple[dict[str, str], ...]] = {}
    if len(arrays) > len(flax_modules):
        for name, first in _repeated(arrays, names or {}).items():
            others[first] = (*others.get(first, ()), torch_modules[name])
            del arrays[name]
    matched = []
    for name, module in _paired(arrays, flax_modules, names or {}).items():
        leaves, layouts = flax_modules[module], _fitting(arrays[name], flax_modules[module])
        if not layouts:
            _raise_misfit(name, arrays[name], module, leaves)
        (weight,) = (leaf for leaf in leaves if leaf in _FLAX_WEIGHTS)
        path = _joined(module, weight)
        view = view_of(path, None)
        matched.append(
            _Module(
                name, torch_modules[name], arrays[name], path, leaves[weight],
                _joined(module, "bias"), leaves.get("bias"),
                _layout(path, name, layouts, view, arrays[name]), view, others.get(name, ()),
            )
        )  # fmt: skip
    return matched


def _fitting(arrays, leaves) -> dict[str, _Layout]:
    """What a torch module with these arrays can be as the Flax module with these leaves."""
    weights = [leaf for leaf in leaves if leaf in _FLAX_WEIGHTS]
    if len(weights) != 1 or {"weight", *leaves} - {*weights} != arrays.keys() - {"u", "v"}:
        return {}
    if "bias" in leaves and arrays["bias"].shape != leaves["bias"].shape:
        return {}
    return _layouts(weights[0], arrays["weight"].shape, leaves[weights[0]].shape)


def _raise_misfit(name, arrays, module, leaves):
    torch_side = {field: x.shape for field, x in arrays.items() if field not in "uv"}
    flax_side = {leaf: x.shape for leaf, x in leaves.items()}
    raise ValueError(
        f"Torch's module {name!r} ({_shapes(torch_side)}) does not fit the template's {module!r} "
        f"({_shapes(flax_side)}), or any other that is left for it. Where names= says which is "
        f"which, correct it: names={{{name!r}: <path of its Flax module>, ...}}."
    )


def _layout(path, name, layouts, view, arrays) -> _Layout:
    """The layout that the view tells, where the shapes leave more than one."""
    transposed = "ConvTranspose(transpose_kernel=True)"
    said = list(layouts)
    while isinstance(view, Scaled):
        view = view.view
    if isinstance(view, Conv):
        said = ["Conv"]
        if view.transpose:
            said = [transposed if view.transpose_kernel else "ConvTranspose"]
    elif isinstance(view, Matrix) and len(layouts) > 1:
        n = arrays["weight"].ndim
        out = tuple(axis % n for axis in view.out_axes)
        said = {(n - 1,): ["Conv"], (n - 2,): [transposed]}.get(out, said)
        # linen.views sees a Conv and a ConvTranspose as this matrix; a name given by Flax decides.
        if said == ["Conv"] and not re.search(r"(^|/)Conv_\d+/", path):
            said = list(layouts)
    possible = {kind: layout for kind, layout in layouts.items() if kind in said}
    if not possible:
        raise ValueError(
            f"{path} is a {said[0]} by its view, but from torch's {name!r} of shape "
            f"{arrays['weight'].shape} its shape can only come as {' or '.join(layouts)}; "
            "correct the view or names."
        )
    if len({(layout.axes, layout.flip) for layout in possible.values()}) > 1:
        raise ValueError(
            f"{path}, from torch's {name!r} of shape {arrays['weight'].shape}, has as many input "
            "as output channels, so it may be that of a Conv or of a ConvTranspose; say which by "
            f"views={{{path!r}: sn_jax.Conv(input_shape, transpose=False or True)}}, as "
            'sn_jax.linen.views(..., conv="operator") does.'
        )
    # A Conv and a transposed kernel have the same layout and differ in the axis that u belongs to.
    fitting = [x for x in possible.values()
               if "u" in arrays and arrays["u"].size == arrays["weight"].shape[x.out]]  # fmt: skip
    return (fitting or list(possible.values()))[0]


def _torch_modules(state_dict) -> dict[str, dict[str, str]]:
    """module -> {weight, bias, u, v: key}, in order of appearance."""
    modules: dict[str, dict[str, str]] = {}
    for key in state_dict:
        ends = [end for end in _TORCH_FIELDS if f".{key}".endswith(f".{end}")]
        module = key[: -len(ends[0])].rstrip(".") if ends else key
        if not ends or "parametrizations" in module.split("."):
            raise ValueError(
                f"The key {key!r} of torch's state_dict is not understood: it is no weight or bias "
                "of a Linear, Conv, ConvTranspose, Embedding or norm layer, plain or under one "
                "spectral_norm of its weight. Take it out, and convert it by hand."
            )
        field = _TORCH_FIELDS[ends[0]]
        if field is None:
            continue
        fields = modules.setdefault(module, {})
        if field in fields:
            raise ValueError(
                f"{fields[field]!r} and {key!r} are both the {field} of torch's module "
                f"{module!r}; leave the one that does not count out of state_dict."
            )
        fields[field] = key
    for module, fields in modules.items():
        plain = fields.get("weight", "weight").rpartition(".")[2] == "weight"
        # PyTorch 0.4 and older keep u alone.
        if {"u", "v"} & fields.keys() not in ([set()] if plain else [{"u"}, {"u", "v"}]):
            raise ValueError(
                f"Torch's module {module!r} has only {_rules.listing(fields.values())}: a weight "
                "under spectral_norm comes with its u and v, and a plain one without. Other "
                "parametrizations must be removed first "
                "(torch.nn.utils.parametrize.remove_parametrizations)."
            )
    return modules


def _repeated(arrays, names) -> dict[str, str]:
    """Torch modules that are another one under a second name -> that one.

    A torch module that is registered twice is twice in the state dict. Those have all numbers
    alike, and by their numbers they are known, since a file need not keep shared memory shared.
    Constant weights (norms before training) say nothing.
    """
    firsts: dict[Any, str] = {}
    repeated = {}
    # Those that the user names come first, then the order of appearance.
    for name in sorted(arrays, key=lambda name: name not in names):
        weight = arrays[name].get("weight", np.zeros(1))
        if np.all(weight == weight.flat[0]):
            continue
        numbers = tuple((field, x.shape, x.tobytes()) for field, x in sorted(arrays[name].items()))
        first = firsts.setdefault(numbers, name)
        if first != name and name not in names:
            repeated[name] = first
    return repeated


def _flax_modules(tree) -> dict[str, dict[str, Any]]:
    """module path -> {leaf name: leaf}."""
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"The Flax parameters must be nested dicts, as variables['params'] are; got "
            f"{type(tree).__name__}."
        )
    modules = {}

    def walk(tree, path):
        leaves = {str(name): x for name, x in tree.items() if not isinstance(x, Mapping)}
        for name, x in leaves.items():
            if not hasattr(x, "shape"):
                raise ValueError(
                    f"{_joined(path, name)} of the template is a {type(x).__name__}, not an "
                    "array; take boxed parameters out of their boxes by flax.core.meta.unbox."
                )
        if leaves:
            modules[path] = leaves
        for name, x in tree.items():
            if isinstance(x, Mapping):
                walk(x, _joined(path, name))

    walk(tree, "")
    return modules


def _paired(arrays, flax_modules, names) -> dict[str, str]:
    """torch module -> Flax module: as names says, by equal names, by shapes, by numbers.

    Args:
      arrays: torch module -> its arrays.
      flax_modules: path -> leaves.
      names: the user's.

    Raises:
      ValueError: names has what is not there; one side has more modules; one fits none; several
        that fit each other are told apart neither by their names nor by numbers in them.
    """
    for given, known, side in (
        (names.keys(), arrays, "torch's state_dict"),
        (names.values(), flax_modules, "the template"),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or len(set(given)) < len(given):
            raise ValueError(
                f"names has {_rules.listing(unknown or given)} for {side}, which "
                + ("is no module there" if unknown else "names a module twice")
                + f". The modules with parameters are: {_rules.listing(known)}."
            )
    rest = [name for name in arrays if name not in names]
    targets = [path for path in flax_modules if path not in names.values()]
    if len(rest) != len(targets):
        raise ValueError(
            f"Torch's state_dict has {len(rest)} modules with parameters ({_rules.listing(rest)}), "
            f"and the template has {len(targets)} ({_rules.listing(targets)}). Each needs a "
            "partner: take out what is not in the other model, and give names= where names differ."
        )
    pairs, fits = dict(names), {}
    for name, path in zip(rest, targets, strict=True):
        fits[name] = [p for p in targets if _fitting(arrays[name], flax_modules[p])]
        if not fits[name]:
            _raise_misfit(name, arrays[name], path, flax_modules[path])
    for name in rest:
        same = [path for path in fits[name] if _words(path) == _words(name)]
        if len(same) == 1:
            pairs[name] = same[0]
    for name in rest:  # without the wrapper around a layer
        bare = [word for word in _words(name) if word != "module"]
        same = [p for p in fits[name] if _words(p) == bare and p not in pairs.values()]
        if len(same) == 1 and name not in pairs:
            pairs[name] = same[0]
    for group, partners in _groups({t: [p for p in paths if p not in pairs.values()]
                                    for t, paths in fits.items() if t not in pairs}):  # fmt: skip
        found = _by_names(group, [path for path in targets if path in partners])
        if not found or not all(found[name] in fits[name] for name in group):
            raise ValueError(
                f"Torch's {_rules.listing(group)} and the template's {_rules.listing(partners)} "
                "fit each other by their shapes, and neither names nor numbers in them say "
                f"which is which: give names={{{group[0]!r}: <path of its Flax module>, ...}}."
            )
        pairs |= found
    return {name: pairs[name] for name in arrays}


def _words(name: str) -> list[str]:
    return re.split("[./]", name.lower())


def _groups(fits: Mapping[str, list[str]]) -> list[tuple[list[str], list[str]]]:
    """Connected parts of who fits whom: (torch modules, Flax modules)."""
    groups: list[tuple[list[str], list[str]]] = []
    for name, paths in fits.items():
        touched = [group for group in groups if {*group[1]} & {*paths}]
        merged = [n for group in touched for n in group[0]] + [name]
        partners = dict.fromkeys(path for group in (*touched, ([], paths)) for path in group[1])
        groups = [group for group in groups if group not in touched] + [(merged, [*partners])]
    return groups


def _by_names(group: list[str], partners: list[str]) -> dict[str, str]:
    """Partners by kinds of names, and of each kind by the numbers in them; {} if they do not say.

    A kind is a name without its numbers. Where both sides have one kind these go together, else
    those whose last words are the same. Failing that, names all of which stand in one sequence
    (0.conv, 0.2.conv and 1) go by its order.
    """
    ours, theirs = _kinds(group), _kinds(partners)
    if len(ours) == len(theirs) == 1:
        pairs = [(*ours.values(), *theirs.values())]
    else:
        by_word = {_words(kind)[-1].strip("_"): paths for kind, paths in theirs.items()}
        pairs = [(x, by_word.pop(_words(kind)[-1].strip("_"), [])) for kind, x in ours.items()]
    if any(len(names) != len(paths) for names, paths in pairs):
        pairs = [(_sequence(group), _sequence(partners))]
    if any(len(names) != len(paths) for names, paths in pairs):
        return {}
    return {name: path for one in pairs for name, path in zip(*one, strict=True)}


def _kinds(names: list[str]) -> dict[str, list[str]]:
    """Name without numbers -> names, by their numbers."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        kinds.setdefault(re.sub(r"\d+", "", name), []).append(name)
    return kinds


def _sequence(names: list[str]) -> list[str]:
    """In order, if any two first differ in a number; [] if not."""
    tokens = [re.findall(r"\d+|\D+", name) for name in names]
    tokens.sort(key=lambda x: [(y.isdigit(), int(y) if y.isdigit() else 0, y) for y in x])
    for one, next_one in pairwise(tokens):
        together = zip(one, next_one, strict=False)
        differing = next((pair for pair in together if len({*pair}) == 2), ("",))
        if not all(x.isdigit() for x in differing):
            return []
    return ["".join(x) for x in tokens]


def _with_leaves(tree, changed: Mapping[str, Any], path: str = ""):
    """Not by jax.tree, which would sort the keys: people look at them in the order of the model."""
    if not isinstance(tree, Mapping):
        return changed[path]
    kind: Any = type(tree)
    return kind({name: _with_leaves(x, changed, _joined(path, name)) for name, x in tree.items()})


def _joined(path, name) -> str:
    return f"{path}/{name}" if path else str(name)


def _as_array(x) -> np.ndarray:
    """A torch tensor, or anything that NumPy takes, as an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def _shapes(arrays: Mapping[str, tuple]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in arrays.items())
