"""Thousands of adversarial cases against ``spectral_normalize(mode="certified")``.

The cases are those of ``attack``, under ``jit`` and in the dtype of their kernels. What comes out
is judged as it is, rounded: an explicit matrix, and its SVD in float64.
"""

import time
from collections import defaultdict
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

import sn_jax
from experiments.certify import oracle
from experiments.certify.attack import TOLERANCE, Problem, kernel_of, problem_of

# One for each view and shape, since each is compiled for, in turn.
DTYPES = ("float32", "bfloat16", "float32", "float64", "float32", "float16", "float32")


def attack(n_cases: int, seed: int, *, n_configs: int = 24, progress: bool = False) -> dict:
    """Normalize random kernels, each to a random bound, and take the norms that they then have.

    Args:
      n_cases: how many.
      seed: of the values.
      n_configs: views and shapes to draw from, each in one dtype.
      progress: show a bar on stderr.

    Returns:
      dict: ``violations``, each with its case; ``table``, rows of ``1 - norm / bound`` by family
      and by kind of values in float32, and by dtype; seconds.
    """
    violations, slack = [], defaultdict(list)
    start = time.perf_counter()
    with jax.enable_x64(True):
        for index in tqdm(range(n_cases), unit="case", disable=not progress):
            problem, kind, w, c = make_case(index, seed, n_configs)
            norms = np.atleast_1d(oracle.norms(normalized(problem, w, c), problem.view))
            if not np.all(norms <= c * (1 + TOLERANCE)):  # also NaN
                violations.append(
                    {"index": index, "seed": seed, "n_configs": n_configs, "kind": kind}
                    | {"view": repr(problem.view), "shape": w.shape, "dtype": w.dtype.name}
                    | {"bound": c, "norms": norms.tolist()}
                )
            if not np.all(norms > 0):  # a kernel of zeros has no slack to speak of
                continue
            worst = float(np.max(1 - norms / c))
            slack["dtype", w.dtype.name].append(worst)
            if w.dtype == np.float32:
                slack["family", problem.family].append(worst)
                slack["kind", kind].append(worst)
    return {
        "n_cases": n_cases,
        "seed": seed,
        "n_configs": n_configs,
        "violations": violations,
        "table": [
            {"by": by, "name": name, "cases": len(values)}
            | {"median": float(np.median(values)), "worst": float(np.max(values))}
            for (by, name), values in sorted(slack.items())
        ],
        "seconds": time.perf_counter() - start,
    }


def make_case(index: int, seed: int, n_configs: int) -> tuple[Problem, str, np.ndarray, float]:
    """(problem, kind of values, kernel, bound), the same at every call."""
    rng = np.random.default_rng([seed, index])
    problem = problem_of(index, n_configs, large=False)
    kind, w = kernel_of(rng, problem, DTYPES[index % n_configs % len(DTYPES)])
    return problem, kind, w, float(10.0 ** rng.uniform(-2, 2))


def normalized(problem: Problem, w: np.ndarray, c: float) -> np.ndarray:
    """The kernel as it comes out of the program."""
    state = _state(problem, w.dtype.name)
    return np.asarray(_certified({"kernel": jnp.asarray(w)}, state, c)["kernel"])


@cache
def _state(problem: Problem, dtype: str) -> sn_jax.State:
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    params = {"kernel": jnp.ones(problem.shape, dtype)}
    return sn_jax.init(params, jax.random.key(0), {"kernel": problem.view}, warmup=0)


@jax.jit
def _certified(params: Any, state: sn_jax.State, c: float) -> Any:
    return sn_jax.spectral_normalize(params, state, n_steps=0, bound=c, mode="certified")[0]


COSTS = [
    *((sn_jax.Matrix(), (side, side)) for side in (256, 512, 1024)),
    *((sn_jax.Conv((32, 32), padding=padding), (3, 3, 64, 64)) for padding in ("CIRCULAR", "SAME")),
    (sn_jax.Conv((8, 8), padding="CIRCULAR"), (3, 3, 256, 256)),
]


def costs(costs=COSTS, batch: int = 64, *, progress: bool = False) -> list[dict[str, Any]]:
    """CPU milliseconds of one call for a Gaussian kernel in float32, least of three: certified,
    divided after one power iteration, and the layer's own gradients for a batch; and by how much
    the norm stays below its bound."""
    rows = []
    for view, shape in tqdm(costs, unit="kernel", disable=not progress):
        w = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        params = {"kernel": w}
        state = sn_jax.init(params, jax.random.key(1), {"kernel": view})
        x = jax.random.normal(jax.random.key(2), (batch, *view.domain(shape)), jnp.float32)

        def loss(w, x, view=view):
            return jnp.sum(jax.vmap(lambda x: view.matvec(w, x))(x) ** 2)

        calls = {
            "certified": partial(_certified, params, state, 1.0),
            "divide": partial(_divided, params, state),
            "layer": partial(jax.jit(jax.grad(loss, (0, 1))), w, x),
        }
        out = _certified(params, state, 1.0)["kernel"]
        slack = 1 - float(sn_jax.spectral_norm(out, view, rtol=1e-5))
        row = {"view": repr(view), "shape": shape, "1 - norm": slack}
        rows.append(row | {name: 1e3 * _seconds(call) for name, call in calls.items()})
    return rows


_divided = jax.jit(sn_jax.spectral_normalize)


def _seconds(call) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        start = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - start)
    return min(times)


def report(results: dict[str, Any]) -> str:
    """The table, and what went wrong with how to reproduce it."""
    lines = [f"{'1 - norm / bound':40}{'cases':>7}{'median':>10}{'worst':>10}"]
    for row in results["table"]:
        name = f"{row['by']}: {row['name']}"
        lines.append(f"{name:40}{row['cases']:7}{row['median']:10.1e}{row['worst']:10.1e}")
    lines.append(
        f"\n{results['n_cases']} cases over {results['n_configs']} views and shapes: "
        f"{len(results['violations'])} violations, {results['seconds']:.0f} s"
    )
    for row in results["violations"][:20]:
        lines.append(f"violation: {row}")
    head = f"{'kernel':56}{'1 - norm':>10}{'certified':>12}{'divide':>9}{'layer':>9}"
    lines.append(f"\nCPU milliseconds\n{head}" if results.get("costs") else "")
    for row in results.get("costs", []):
        name = f"{'x'.join(map(str, row['shape']))}, {row['view'].removeprefix('Matrix')[:40]}"
        times = f"{row['certified']:12.1f}{row['divide']:9.2f}{row['layer']:9.1f}"
        lines.append(f"{name:56}{row['1 - norm']:10.1e}{times}")
    return "\n".join(lines)
