"""Thousands of adversarial cases against ``spectral_normalize(mode="certified")``.

The cases are those of ``attack``, under ``jit`` and in the dtype of their kernels. What comes out
is judged as it is, rounded: an explicit matrix, and its SVD in float64.
"""

import time
from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sn_jax
from experiments.certify import oracle
from experiments.certify.attack import TOLERANCE, Case, make_case

PATH = "kernel"


def attack(
    n_cases: int, seed: int, *, n_configs: int = 24, large: bool = True, progress: bool = False
) -> dict[str, Any]:
    """Normalize random kernels, each to a random bound, and take the norms that they then have.

    Args:
      n_cases: how many; those whose norm no SVD tells are left out of them.
      seed: of the values.
      n_configs: views and shapes to draw from, which JAX compiles for, in each dtype.
      large: include matrices of up to 4,096 rows.
      progress: show a bar on stderr.

    Returns:
      dict: ``violations``, each with its reproduction; ``table``, rows of ``1 - norm / bound`` by
      family in float32, by dtype and by kind of values; counts; seconds.
    """
    violations, rows = [], defaultdict(list)
    counts, states, start = Counter(), {}, time.perf_counter()
    with jax.enable_x64(True):
        for index in tqdm(range(n_cases), unit="case", disable=not progress):
            case = make_case(index, seed=seed, n_configs=n_configs, large=large)
            if case.problem.separable:
                counts["left out"] += 1
                continue
            c = float(10.0 ** np.random.default_rng([seed, index]).uniform(-2, 2))
            norms = np.atleast_1d(oracle.norms(_normalized(case, c, states), case.problem.view))
            over = ~(norms <= c * (1 + TOLERANCE))  # also NaN
            if over.any():
                violations.append(
                    {"index": index, "seed": seed, "n_configs": n_configs, "large": large}
                    | {"family": case.problem.family, "view": repr(case.problem.view)}
                    | {"shape": case.w.shape, "dtype": case.w.dtype.name, "kind": case.kind}
                    | {"bound": c, "norms": norms.tolist()}
                )
            counts[case.w.dtype.name] += 1
            live = np.atleast_1d(case.sigma) > 0
            if live.any():
                slack = float(np.max(1 - norms[live] / c))
                rows["dtype", case.w.dtype.name].append(slack)
                if case.w.dtype == np.float32:
                    rows["family", case.problem.family].append(slack)
                    rows["kind", case.kind].append(slack)
    return {
        "n_cases": n_cases,
        "seed": seed,
        "n_configs": n_configs,
        "large": large,
        "violations": violations,
        "table": [
            {"by": by, "name": name, "cases": len(slack)}
            | {"median": float(np.median(slack)), "worst": float(np.max(slack))}
            for (by, name), slack in sorted(rows.items())
        ],
        "counts": dict(counts),
        "seconds": time.perf_counter() - start,
    }


@jax.jit
def _certified(params, state, c):
    return sn_jax.spectral_normalize(params, state, n_steps=0, bound=c, mode="certified")[0]


def _normalized(case: Case, c: float, states: dict) -> np.ndarray:
    params = {PATH: jnp.asarray(case.w)}
    key = case.problem.view, case.problem.shape, case.w.dtype.name
    if key not in states:
        rules = {PATH: case.problem.view}
        states[key] = sn_jax.init(params, jax.random.key(0), rules, warmup=0)
    return np.asarray(_certified(params, states[key], c)[PATH])


def report(results: dict[str, Any]) -> str:
    """The table, and what went wrong with how to reproduce it."""
    lines = [f"{'1 - norm / bound':40}{'cases':>7}{'median':>10}{'worst':>10}"]
    for row in results["table"]:
        name = f"{row['by']}: {row['name']}"
        lines.append(f"{name:40}{row['cases']:7}{row['median']:10.1e}{row['worst']:10.1e}")
    counts = dict(results["counts"])
    left_out = counts.pop("left out", 0)
    lines += [
        "",
        f"{sum(counts.values())} cases ({left_out} more have no SVD): "
        f"{len(results['violations'])} violations, {results['seconds']:.0f} s",
    ]
    for row in results["violations"][:20]:
        lines.append(f"violation: {row}")
    return "\n".join(lines)
