"""How often the library calls itself while a program is traced: ``python tests/calls.py``.

Counts calls of functions of ``sn_jax`` in ``spectral_normalize`` of a small network, those in mesh
code, moves from file to file, and calls from a lower floor to a higher one. Figures to compare by;
no test asserts them, as moving code between files changes them.
"""

import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp

import sn_jax

# From the ground up; what is on no floor is counted as its own.
FLOORS = [["_mesh", "_sharding"], ["_views"], ["_operator"], ["_rules", "_power"], ["_core"]]
PARAMS = {
    "dense": {"kernel": jnp.ones((8, 16))},
    "heads": {"kernel": jnp.ones((8, 2, 4))},
    "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
    "stack": {"kernel": jnp.ones((2, 8, 8))},
}
RULES = {
    "dense/kernel": sn_jax.Matrix(),
    "heads/kernel": sn_jax.Matrix(0, (1, 2)),
    "conv/kernel": sn_jax.Conv((8, 8)),
    "stack/kernel": sn_jax.Matrix(),
}


def main() -> None:
    folder = str(Path(sn_jax.__file__).parent)
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    calls, moves, upward = Counter(), Counter(), Counter()

    def ours(frame):
        while frame is not None and not frame.f_code.co_filename.startswith(folder):
            frame = frame.f_back
        return frame

    def watch(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(folder):
            return
        name, caller = Path(frame.f_code.co_filename).stem, ours(frame.f_back)
        calls[name] += 1
        if caller is None:
            return
        source = Path(caller.f_code.co_filename).stem
        if source != name:
            moves[source, name] += 1
            if floor.get(source, -1) < floor.get(name, -1):
                upward[f"{source} -> {name}.{frame.f_code.co_qualname}"] += 1

    state = sn_jax.init(PARAMS, jax.random.key(0), RULES)
    jax.clear_caches()
    sys.setprofile(watch)
    jax.jit(sn_jax.spectral_normalize).trace(PARAMS, state)
    sys.setprofile(None)
    mesh = calls["_mesh"] + calls["_sharding"]
    print(f"{calls.total()} calls ({mesh} in mesh code), {moves.total()} moves between files")
    print("by file:", ", ".join(f"{name} {n}" for name, n in calls.most_common()))
    print(f"{upward.total()} upward calls:", dict(upward) or "none")


if __name__ == "__main__":
    main()
