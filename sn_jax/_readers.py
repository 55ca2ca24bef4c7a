"""Checkpoints of any kind as named arrays that are read one at a time, with nothing executed.

Here belongs what formats look like on disk. What kind a file is, its first bytes say, not its name.
"""

import contextlib
import json
import logging
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one sentence."""


class Leaf(NamedTuple):
    """One array of a checkpoint.

    Attributes:
      name: its path, keys joined by "/".
      shape: of the array.
      dtype: its name.
      read: gives the array; bfloat16 and the like as float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


# What a folder of a model may hold beside what orbax writes.
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".msgpack")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[str, list[Leaf]]]:
    """(format, leaves) of a file or folder; the leaves can be read as long as it is open.

    Raises:
      CheckpointError: it cannot be read, or a library that reads it is missing.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of libraries, about their formats
        if path.is_dir():
            kind, leaves = _folder(path, stack)
        else:
            kind, reader = _kind(path)
            leaves = _read(kind, path, lambda: reader(path, stack))
        if not leaves:
            raise CheckpointError(f"{path} ({kind}) holds no arrays.")
        guarded = [leaf._replace(read=_guarded(kind, path, leaf.read)) for leaf in leaves]
        yield kind, guarded


def _guarded(kind, path, read):
    return lambda: _read(kind, path, read)


def _read(kind: str, path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or a sentence on why it does not."""
    try:
        return read()
    except (CheckpointError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} is {kind}, which takes {error.name}: pip install 'sn_jax[inspect]'"
            + (", and PyTorch." if error.name == "torch" else ".")
        ) from None
    except MemoryError:
        raise CheckpointError(f"{path} ({kind}) asks for more memory than there is.") from None
    except Exception as error:
        # Whatever a library makes of a file that is broken, or made to break it.
        text = " ".join((str(error) or type(error).__name__).split())
        raise CheckpointError(f"{path} cannot be read as {kind}: {text[:200]}") from None


def _kind(path: Path) -> tuple[str, Callable]:
    size = path.stat().st_size
    if not size:
        raise CheckpointError(f"{path} is empty.")
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{path} begins as a zip archive (npz or torch) and is cut off."
            ) from None
        if any(name.endswith(".npy") for name in names):
            return "npz", _npz
        return "torch", _torch
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "torch (a pickle)", _torch
    if start[:6] == b"\x93NUMPY":
        return "npy", _npy
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 2**40:
        return "safetensors", _safetensors
    if start[0] & 0xF0 == 0x80 or start[0] in (0xDE, 0xDF):  # a map
        return "msgpack", _msgpack
    raise CheckpointError(
        f"{path} is no checkpoint of a known kind: npz, msgpack of Flax, safetensors, torch, or a "
        "folder of orbax."
    )


def _folder(path: Path, stack: contextlib.ExitStack) -> tuple[str, list[Leaf]]:
    """An orbax checkpoint, at most two levels down (the last of several steps), or shards."""
    items = [path] if (path / "_METADATA").exists() else []
    if not items:
        found = [p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/_METADATA")]
        steps = {p.relative_to(path).parts[0] for p in found}
        numbers = [step for step in steps if step.isdigit()]
        last = max(numbers, key=int) if numbers else None
        items = sorted(p for p in found if last in (None, p.relative_to(path).parts[0]))
    if items:
        leaves = []
        for item in items:
            prefix = "/".join(item.relative_to(path).parts)
            for leaf in _read("orbax", item, lambda item=item: _orbax(item, stack)):
                leaves.append(leaf._replace(name=f"{prefix}/{leaf.name}" if prefix else leaf.name))
        return "orbax", leaves
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if not files:
        raise CheckpointError(
            f"{path} is a folder without a checkpoint: neither orbax's _METADATA, nor files "
            f"{', '.join(_SUFFIXES)}."
        )
    leaves, kinds = [], []
    for file in files:
        kind, reader = _kind(file)
        kinds.append(kind)
        for leaf in _read(kind, file, lambda reader=reader, file=file: reader(file, stack)):
            leaves.append(leaf._replace(read=_guarded(kind, file, leaf.read)))
    return f"{len(files)} files, {', '.join(sorted({*kinds}))}", leaves


def _npz(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    archive = stack.enter_context(np.load(path, allow_pickle=False))
    leaves = []
    for name in archive.files:
        with archive.zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version[0] == 1:
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        leaves.append(Leaf(name, shape, str(dtype), lambda name=name: archive[name]))
    return leaves


def _npy(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return [Leaf(path.stem, array.shape, str(array.dtype), lambda: np.array(array))]


def _safetensors(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    with path.open("rb") as file:  # said plainly here, as the library's own errors are codes
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size - 8:
            raise CheckpointError(f"{path} (safetensors) is cut off within its header.")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise CheckpointError(f"{path} begins as safetensors, but has no header.") from None
    from safetensors import safe_open  # pyright: ignore[reportMissingImports]

    file: Any = stack.enter_context(safe_open(path, framework="numpy"))
    leaves = []
    for name in file.keys():  # noqa: SIM118  # it is no mapping
        entry = header[name]

        def read(name=name) -> np.ndarray:
            return _plain(file.get_tensor(name))

        leaves.append(Leaf(name, tuple(entry["shape"]), entry["dtype"], read))
    return leaves


def _msgpack(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    from flax.serialization import msgpack_restore

    tree = msgpack_restore(path.read_bytes())
    return list(_arrays(tree, lambda x: isinstance(x, np.ndarray | np.generic), _plain))


def _torch(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    import pickle

    import torch  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        # Maps the file: a tensor's pages are read when it is, and stay the system's.
        tree = torch.load(path, mmap=zipfile.is_zipfile(path), **options)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is torch, but not weights alone: it names code, which is not run here. Save "
            "model.state_dict() instead of the model."
        ) from None

    def is_array(x):
        return isinstance(x, torch.Tensor)

    def read(x) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x).numpy()

    if is_array(tree):
        tree = {"": tree}
    return [
        leaf._replace(dtype=leaf.dtype.removeprefix("torch."))
        for leaf in _arrays(tree, is_array, read)
    ]


def _orbax(path: Path, stack: contextlib.ExitStack) -> list[Leaf]:
    logging.getLogger("absl").setLevel(logging.ERROR)
    import jax
    import orbax.checkpoint as ocp
    from jax.tree_util import keystr, tree_flatten_with_path

    restorer = stack.enter_context(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
    metadata: Any = restorer.metadata(path.absolute())
    tree = metadata.item_metadata.tree
    paths, treedef = tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))

    def read(number: int) -> np.ndarray:
        here = [i == number for i in range(len(paths))]
        wanted: Any = jax.ShapeDtypeStruct(paths[number][1].shape, paths[number][1].dtype)
        item = treedef.unflatten([wanted if x else ocp.PLACEHOLDER for x in here])
        as_numpy = treedef.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(paths))
        restored = restorer.restore(
            path.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
        )
        return _plain(treedef.flatten_up_to(restored)[number])

    return [
        Leaf(
            keystr(key, simple=True, separator="/"),
            tuple(leaf.shape),
            str(leaf.dtype),
            lambda number=number: read(number),
        )
        for number, (key, leaf) in enumerate(paths)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]


def _arrays(tree: Any, is_array: Callable, read: Callable) -> Iterator[Leaf]:
    """Of nested dicts, lists and tuples; with a stack of our own, as they may be nested deeply."""
    todo: list[tuple[str, Any]] = [("", tree)]
    while todo:
        name, node = todo.pop()
        if is_array(node):
            yield Leaf(name, tuple(node.shape), str(node.dtype), lambda node=node: read(node))
        elif isinstance(node, Mapping):
            todo += [(f"{name}/{key}" if name else str(key), x) for key, x in node.items()][::-1]
        elif isinstance(node, list | tuple):
            todo += [(f"{name}/{i}" if name else str(i), x) for i, x in enumerate(node)][::-1]


def _plain(x: Any) -> np.ndarray:
    """Types that NumPy has not (bfloat16, float8) as float32."""
    x = np.asarray(x)
    if x.dtype.kind == "V" and x.dtype.names is None and "float" in x.dtype.name:
        return x.astype(np.float32)
    return x
