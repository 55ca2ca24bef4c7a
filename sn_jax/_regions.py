"""Where a piecewise linear function is steepest: all its linear regions, one after the other.

A region is where the signs of all kinks (arguments of max, abs, comparisons) stay the same. From
a region one comes to its neighbours through its facets, each found by a linear program, and to
all of them in the end: regions that only a corner joins are joined by others as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog

from sn_jax._graph import Graph, graph_of
from sn_jax._pieces import ELEMENTWISE, Constant, Operation, is_linear
from sn_jax._symbols import on_host

_COMPARISONS = {"lt", "le", "gt", "ge"}
_KINKS = _COMPARISONS | {"max", "min", "abs", "larger", "smaller"}
_LOGIC = {"and", "or", "not", "select_n"}
_MOST_KINKS = 64
# A facet that is narrower than this, where lengths are about 1, is taken for none.
_NARROW = 1e-9


def steepest(fn: Callable[..., Any], x0: np.ndarray, most: int) -> np.ndarray | None:
    """A point of the region with the largest norm of the Jacobian; None where the function is not
    piecewise linear, or has more than ``most`` regions or more than 64 kinks."""
    try:
        graph = graph_of(fn, x0, jax.default_backend())
    except (TypeError, ValueError):
        return None
    order = _order(graph)
    if order is None or graph.platforms:
        return None
    with on_host():
        run = jax.jit(lambda x: _run(graph, order, x.reshape(graph.x.shape)))
        slopes = jax.jit(jax.jacfwd(lambda x: run(x)))
        if run(np.zeros(x0.size))[0].size > _MOST_KINKS:
            return None
        # A little beside x0, which may be on a kink itself.
        step = 1e-3 * np.random.default_rng(0).standard_normal(x0.size)
        todo = [np.asarray(x0, np.float64).ravel() + step]
        # Where r hyperplanes have independent normals there are 2^r regions at least.
        rows = np.asarray(slopes(todo[0])[0])
        if rows.size and np.linalg.matrix_rank(rows) > np.log2(most):
            return None
        seen, best, place = set(), -1.0, todo[0]
        while todo:
            x = todo.pop()
            kinks, matrices = np.asarray(run(x)[0]), [np.asarray(m) for m in slopes(x)]
            pattern = (kinks > 0).tobytes()
            if pattern in seen:
                continue
            seen.add(pattern)
            if len(seen) > most:
                return None
            norm = np.linalg.norm(matrices[1], 2) if matrices[1].size else 0.0
            if norm > best:
                best, place = norm, x
            todo += _neighbours(x, kinks, matrices[0])
    return place.reshape(x0.shape)


def _order(graph: Graph) -> list[Operation] | None:
    """The operations in order, if they are linear or have kinks only."""
    found, todo = set(), list(graph.outputs)
    while todo:
        a = todo.pop()
        if a in found or a is graph.x:
            continue
        found.add(a)
        logical = a.op in _LOGIC and not is_linear(a)
        if not (is_linear(a) or a.op in _KINKS or logical):
            return None
        todo += a.inputs
    return sorted(found, key=lambda a: a.depth)


def _run(graph: Graph, order: Sequence[Operation], x: Any) -> tuple[Any, Any]:
    """(what the kinks are at the zeros of, the outputs), flat."""
    known, kinks = {graph.x: x}, [jnp.zeros(0)]
    for node in order:
        args = [known[a] if isinstance(a, Operation) else _constant(a, node) for a in node.args]
        if node.op in _KINKS:
            kinks.append(jnp.ravel(args[0] if node.op == "abs" else args[0] - args[1]))
        if node.op in ("larger", "smaller"):
            known[node] = (jnp.maximum if node.op == "larger" else jnp.minimum)(*args)
            continue
        params = dict(node.params)
        if params.get("preferred_element_type") is not None:
            params["preferred_element_type"] = np.dtype(np.float64)
        assert node.primitive is not None
        y = node.primitive.bind(*map(jnp.asarray, args), **params)
        known[node] = y[node.out] if node.primitive.multiple_results else y
    outputs = [jnp.ravel(known[a]) for a in graph.outputs]
    return jnp.concatenate(kinks), jnp.concatenate([jnp.zeros(0), *outputs])


def _constant(c: Constant, node: Operation) -> np.ndarray:
    value = np.asarray(c.value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        value = c.array
    return np.broadcast_to(value, node.shape) if node.op in ELEMENTWISE else value


def _neighbours(x: np.ndarray, kinks: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """A point just behind each facet of the region of x."""
    lengths = np.linalg.norm(rows, axis=1)
    moving = lengths > 1e-12 * max(1.0, lengths.max(initial=0.0))
    # Unit normals into the region, and how far x is from each hyperplane.
    sign = np.where(kinks[moving] > 0, 1.0, -1.0)
    normals = sign[:, None] * rows[moving] / lengths[moving, None]
    away = np.abs(kinks[moving]) / lengths[moving]
    found = []
    for i, (normal, distance) in enumerate(zip(normals, away, strict=True)):
        same = (normals @ normal > 1 - 1e-12) & (np.abs(away - distance) < 1e-12 * (1 + distance))
        if same[:i].any():
            continue
        # The largest ball around a point of the facet that touches no other one.
        others = normals[~same]
        a = np.concatenate([-others, np.ones((len(others), 1))], 1)
        result = linprog(
            np.append(np.zeros(x.size), -1.0), a, away[~same], np.append(normal, 0.0)[None],
            [-distance], bounds=[(None, None)] * x.size + [(None, 1.0)],
        )  # fmt: skip
        if result.status == 0 and result.x[-1] > _NARROW:
            found.append(x + result.x[:-1] - 0.1 * result.x[-1] * normal)
    return found
