"""Meshes from the command line, and parameters laid out on them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.cli import UserError


def make_mesh(text: str | None, axes: Sequence[str]) -> Mesh:
    """A mesh over all devices from "data=4,model=2"; None puts all on the first axis.

    Args:
      text: sizes; axes that are not named have size 1.
      axes: the names that the experiment knows.

    Raises:
      UserError: not of that form, an unknown axis, or not as many devices as there are.
    """
    sizes = dict.fromkeys(axes, 1)
    if text is None:
        sizes[axes[0]] = jax.device_count()
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)=([1-9]\d*)\s*", part)
        if not match or match[1] not in sizes:
            raise UserError(
                f"--mesh {text}: {part.strip()!r} is not a size of {' or '.join(axes)}; write "
                f"it as --mesh {','.join(f'{axis}=2' for axis in axes)}."
            )
        sizes[match[1]] = int(match[2])
    wanted, found = math.prod(sizes.values()), jax.device_count()
    if wanted != found:
        raise UserError(
            f"--mesh {text} needs {wanted} devices, but JAX finds {found}: change the sizes, or "
            f"try it on CPU with XLA_FLAGS=--xla_force_host_platform_device_count={wanted}."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )


def layout(params: Any, rules: Mapping[str, P], mesh: Mesh) -> Any:
    """A sharding for every parameter: regular expression on its path -> PartitionSpec, first match
    wins; what none matches is replicated.

    Raises:
      UserError: a mesh axis does not divide the axis of a parameter that it should split.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for rule, spec in rules.items() if re.fullmatch(rule, name)), P())
        for axis, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[n] for n in names)
            if leaf.shape[axis] % parts:
                raise UserError(
                    f"{name} of shape {leaf.shape} cannot be split into {parts} along axis {axis}: "
                    f"the mesh has {', '.join(f'{n}={mesh.shape[n]}' for n in names)}, which does "
                    f"not divide {leaf.shape[axis]}. Choose a mesh, or a width, that fits."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)
