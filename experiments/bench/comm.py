"""Bytes that normalization sends between devices, read off compiled programs; nothing is run.

A process's number of devices is fixed, so each mesh is compiled for in a process of its own, with
virtual CPU devices: ``python -m experiments.bench.comm 64`` prints what one of 64 gives.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sn_jax
from experiments.bench.timing import Row
from experiments.cli import UserError

DEVICES = [8, 64, 256, 1024]
FITTED = [2048, 4096]
FLOOR = "m + n floats a matrix"
TARGET = 1.0


@dataclass(frozen=True)
class Layout:
    """A kernel (*experts, m, n) and how it is split over a mesh of any number of devices."""

    shape: tuple[int, ...]
    view: sn_jax.Matrix
    spec: P
    tensor: int  # devices along the axis "tp", of 8

    def mesh_shape(self, devices: int) -> tuple[int, int]:
        """(fsdp or experts, tp): tp grows to 16 at most, as within a node or two."""
        tp = min(16, self.tensor * max(1, devices // 32)) if self.tensor > 1 else 1
        return devices // tp, tp


MATRIX = (8192, 32768)
LAYOUTS = {
    "FSDP": Layout(MATRIX, sn_jax.Matrix(), P("fsdp", None), 1),
    "TP": Layout(MATRIX, sn_jax.Matrix(), P(None, ("fsdp", "tp")), 2),
    "FSDP x TP": Layout(MATRIX, sn_jax.Matrix(), P("fsdp", "tp"), 2),
    "experts x TP": Layout((256, 2048, 8192), sn_jax.Matrix(1, 2), P("fsdp", None, "tp"), 2),
}


def rows(quick: bool) -> Iterator[list[Row]]:
    """The table at 8 devices, then the curve: measured, and fitted beyond."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for devices in DEVICES[: 1 if quick else None]:
        found = json.loads(_in_process(devices))
        yield [row for entry in found for row in _rows_of(devices, **entry)]
        for entry in found:
            key = entry["layout"], entry["program"]
            curves.setdefault(key, []).append((devices, entry["sent"]))
    if not quick:
        yield [row for (layout, program), curve in curves.items()
               for row in fitted(layout, program, curve)]  # fmt: skip


def _rows_of(devices, layout, program, sent, count, largest) -> list[Row]:
    shape = LAYOUTS[layout].shape
    floats = 4 * math.prod(shape[:-2]) * sum(shape[-2:])
    vector = math.prod(shape[:-2]) * max(shape[-2:])
    case = f"{layout}, {program}, {devices} devices"
    return [
        Row("comm", case, "bytes a device", sent, floats, FLOOR, sent / floats, target=TARGET),
        Row("comm", case, "collectives", count),
        Row("comm", case, "floats in the largest", largest, vector, "one vector",
            largest / vector, target=1.0),
    ]  # fmt: skip


def fitted(layout: str, program: str, curve: list[tuple[int, float]]) -> list[Row]:
    """Rows for meshes too large to compile for here, from a curve of (devices, bytes) as compiled.

    Least squares of ``a + b / (first mesh axis) + c / tp``: a vector is whole, or split along one.
    """

    def features(devices):
        first, tp = LAYOUTS[layout].mesh_shape(devices)
        return [1.0, 1 / first, 1 / tp]

    x, y = np.array([features(n) for n, _ in curve]), np.array([b for _, b in curve])
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    return [
        Row("comm", f"{layout}, {program}, {n} devices (fitted)", "bytes a device",
            float(np.dot(features(n), coefficients)))
        for n in FITTED
    ]  # fmt: skip


def _in_process(devices: int) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __spec__.name, str(devices)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"Compiling for {devices} virtual devices failed: "
            f"{(result.stderr.strip().splitlines() or ['killed'])[-1]}. Use --quick for 8 devices "
            "only."
        )
    return result.stdout


def compiled(devices: int) -> Iterator[dict]:
    """What the programs of every layout send, in a process that has so many devices."""
    for name, layout in LAYOUTS.items():
        mesh_shape = layout.mesh_shape(devices)
        mesh = jax.make_mesh(mesh_shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)

        def array(shape, spec, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

        params = {"w": array(layout.shape, layout.spec)}
        batch, ins, outs = layout.view.axis_groups(len(layout.shape))
        axes = {"u": (*batch, None, *outs), "v": (*batch, None, *ins), "sigma": batch}
        entries = {None: None, **dict(enumerate(layout.spec))}
        made = jax.eval_shape(
            partial(sn_jax.init, rules={"w": layout.view}), params, jax.random.key(0)
        )
        sharded = {
            part: array(getattr(made["w"], part).shape, P(*map(entries.get, of_kernel)))
            for part, of_kernel in axes.items()
        }
        state = {"w": replace(made["w"], **sharded)}
        for program, run in PROGRAMS.items():
            sent = collectives(jax.jit(run).lower(params, state).compile().as_text())
            yield {"layout": name, "program": program, "sent": sum(4 * n for n in sent),
                   "count": len(sent), "largest": max(sent, default=0)}  # fmt: skip


def _forward_backward(params, state):
    def loss(params):
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        return sum(jnp.sum(jnp.sin(w)) for w in normalized.values())

    return jax.grad(loss)(params)


PROGRAMS = {"update": sn_jax.spectral_normalize, "forward + backward": _forward_backward}


def collectives(program: str) -> list[int]:
    """Elements of every array that a program, ``compiled.as_text()``, sends or receives."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf"= (.+?) (?:{names})(?:-start)?\(", program)
    shapes = [shape for line in lines for shape in re.findall(r"\w\[([\d,]*)\]", line)]
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


if __name__ == "__main__":
    print(json.dumps(list(compiled(int(sys.argv[1])))))
