"""What is written to files: the arrays of a state, and its views as text, both with a version.

Checkpoints hold arrays, and take the views from a template. An exported program
(``jax.export``) holds the views, as JSON: named, with their fields. Functions and views of one's
own are found by module and name when they are read, as by pickle.
"""

import base64
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export

from sn_jax._views import Conv, Linear, Matrix, Scaled, Values, View

VERSION = 1
ARRAYS = ("u", "v", "sigma")

_VIEWS = {"Matrix": Matrix, "Conv": Conv, "Linear": Linear, "Scaled": Scaled}


# Arrays.


def check_version(version: Any) -> None:
    """Raise unless this release reads it."""
    if int(version) != VERSION:
        raise ValueError(
            f"The state was written in version {int(version)} of the format, and this release of "
            f"sn_jax reads version {VERSION}; install the release that wrote it."
        )


def restored(stored: Mapping[str, Any], like: Any, where: str) -> Any:
    """``like``, the entry of a state, with stored arrays: copies, of its shapes and dtypes."""
    arrays = {}
    for name in ARRAYS:
        expected = getattr(like, name)
        got = np.shape(stored[name]) if name in stored else "nothing"
        if got != expected.shape:
            raise ValueError(
                f"{name} of {where} is stored with shape {got}, but the template's is "
                f"{expected.shape}: the parameter's shape, its view or n_vectors differ. "
                "Make the template as the saved state was made."
            )
        arrays[name] = jnp.array(stored[name], expected.dtype)
    return replace(like, **arrays)


def register(singular: type) -> None:
    """Make ``jax.export`` know the entries of a state."""
    with contextlib.suppress(ValueError):  # that a reloaded module has registered it before
        # The aux data of a dataclass are its static fields.
        export.register_pytree_node_serialization(
            singular,
            serialized_name="sn_jax.Singular",
            serialize_auxdata=lambda static: view_to_bytes(*static),
            deserialize_auxdata=view_from_bytes,
            from_children=lambda aux_data, children: singular(*children, aux_data),
        )


def register_namedtuple(kind: type) -> None:
    """The same for a result."""
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(kind, serialized_name=f"sn_jax.{kind.__name__}")


def register_with_flax(singular: type) -> None:
    """Make ``flax.serialization`` know them, if it has been imported."""
    flax = sys.modules.get("flax.serialization")
    if flax is None or flax.is_serializable(singular):
        return

    def to_plain(entry):
        return {"version": VERSION} | {name: getattr(entry, name) for name in ARRAYS}

    def from_plain(like, stored):
        check_version(stored.get("version", VERSION))
        return restored(stored, like, flax.current_path())

    flax.register_serialization_state(singular, to_plain, from_plain)


# Views.


def view_to_bytes(view: View) -> bytes:
    """``view`` as versioned text.

    Raises:
      ValueError: it holds something without a name at module level, or is no dataclass.
    """
    return json.dumps({"version": VERSION, "view": _encoded(view, view)}).encode()


def view_from_bytes(text: bytes) -> View:
    """The inverse of ``view_to_bytes``.

    Raises:
      ValueError: another version; a function or class that is no longer where it was.
    """
    stored = json.loads(text)
    check_version(stored["version"])
    return _decoded(stored["view"])


def _encoded(x: Any, view: View) -> Any:
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, tuple):
        return [_encoded(item, view) for item in x]
    if is_dataclass(x) and not isinstance(x, type):
        known = [name for name, kind in _VIEWS.items() if type(x) is kind]
        kind = {"view": known[0]} if known else {"class": _name_of(type(x), view)}
        return kind | {"fields": {f.name: _encoded(getattr(x, f.name), view) for f in fields(x)}}
    if isinstance(x, Values):
        data = base64.b64encode(x.array.tobytes()).decode()
        return {"dtype": str(x.array.dtype), "shape": x.array.shape, "data": data}
    if isinstance(x, Callable):
        return {"name": _name_of(x, view)}
    raise ValueError(
        f"{view} holds {x!r}, which cannot be written: a view is a frozen dataclass of numbers, "
        "strings, tuples of them, and functions that are defined at module level."
    )


def _decoded(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_decoded, x))
    if not isinstance(x, dict):
        return x
    if "name" in x:
        return _named(x["name"])
    if "data" in x:
        data = base64.b64decode(x["data"])
        return Values(np.frombuffer(data, jnp.dtype(x["dtype"])).reshape(x["shape"]))
    kind = _VIEWS[x["view"]] if "view" in x else _named(x["class"])
    view = object.__new__(kind)
    for name, value in x["fields"].items():
        object.__setattr__(view, name, _decoded(value))
    return view


def _name_of(x: Any, view: View) -> str:
    path = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    name = f"{getattr(x, '__module__', None)}:{path}"
    try:
        found = _named(name) is x
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"{view} cannot be written: {x!r} is not found again as {name}. Define it at module "
            "level, in a module that can be imported where the program is read."
        )
    return name


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ValueError(
            f"A view needs {name}, which is not there: import or restore the module that defines "
            "it."
        ) from None
    return found
