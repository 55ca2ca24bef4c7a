"""Where a run's arrays lie: on one device, or spread over a mesh and several processes."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.cli import UserError
from experiments.gan.train import Config, Data, State
from experiments.mesh import layout, make_mesh


class Place:
    """Where a run's arrays lie: on one device, or over the mesh that the options name."""

    def __init__(self, config: Config):
        self.mesh = None
        if config.mesh or jax.process_count() > 1:
            self.mesh = make_mesh(config.mesh, ("data", "model"))
            parts, name = self.mesh.shape["data"], f"--mesh {config.mesh or 'of all devices'}"
            for size in (config.batch_size, config.g_batch_size or config.batch_size):
                if size % parts:
                    raise UserError(
                        f"{name} splits a batch of {size} into {parts}, which does not divide it: "
                        "choose --batch-size, or --mesh, so that it does."
                    )
            # One function, or each call would compile its own.
            whole = NamedSharding(self.mesh, P())
            self._whole = jax.jit(lambda tree: tree, out_shardings=whole)
        self.width = config.width

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """For a step: its batches are split inside."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def shardings(self, state: State) -> State:
        """Kernels of hidden layers split by their outputs, wherever in the state they or their
        moments are; the rest is everywhere."""
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: device, state)
        split = {rank: P(*[None] * (rank - 1), "model") for rank in (2, 4)}
        rules = {}
        for network, params in (("g", state.g_params), ("d", state.d_params)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                if leaf.ndim in split and leaf.shape[-1] >= self.width:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    rules[rf"{network}_\w+/(.*/)?{re.escape(name)}"] = split[leaf.ndim]
        return layout(state, rules, self.mesh)

    def state(self, state: State) -> State:
        """A new one, the same on every process, or one that a step made: where it shall lie."""
        if self.mesh is None:
            return state
        if not isinstance(state.step.sharding, NamedSharding):
            if jax.process_count() > 1:  # rounded differently, the others' would stay different
                state = multihost_utils.broadcast_one_to_all(jax.device_get(state))
            return _placed(state, self.shardings(state))
        return jax.device_put(state, self.shardings(state))

    def data(self, data: Data) -> Data:
        """Each process feeds its part of the images; zeros fill up what does not divide."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, data)
        n = len(data.images)
        missing = -n % self.mesh.shape["data"]

        def filled(x):
            return np.pad(np.asarray(x), [(0, missing)] + [(0, 0)] * (x.ndim - 1))

        data = Data(filled(data.images), filled(data.labels), np.asarray(n, np.int32))
        specs = Data(P("data"), P("data"), P())
        return _placed(data, Data(*(NamedSharding(self.mesh, spec) for spec in specs)))

    def host(self, tree: Any) -> Any:
        """As NumPy arrays, whole, on every process."""
        if self.mesh is not None:
            tree = self._whole(tree)
        return jax.device_get(tree)


def _placed(tree: Any, shardings: Any) -> Any:
    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)
