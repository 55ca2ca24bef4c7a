"""Random programs against ``sn_jax.lipschitz_bound``: how far do they stretch, and is it within.

Every bound that is reported must hold at every point: the norm of the Jacobian where a search has
led, and the distance of two values over that of their arguments, which owes nothing to derivatives.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sn_jax
from experiments.certify.programs import random_program
from experiments.cli import aligned, resumed
from experiments.gan.train import runs_once

TOLERANCE = 1e-9  # relative: rounding of a Jacobian in float64, far below any real miss
POINTS, ROUNDS, SCALES = 16, 12, (0.1, 1.0, 3.0, 10.0)
# One case in so many is also attacked by gradients, which costs a second compilation.
CLIMB_EVERY, CLIMB_STEPS = 20, 40
FORGET_EVERY = 25  # cases between clearings of JAX's caches, which would fill the memory

ROWS = "programs.jsonl"

_QUANTILES = {"median": 0.5, "90 %": 0.9, "worst": 1.0}


def attack(n_cases: int, seed: int, out: Path, *, progress: bool = False) -> dict[str, Any]:
    """Bound random programs, and stretch them as far as a search can.

    Args:
      n_cases: how many; those of a shorter attack with this seed are the first of a longer one.
      seed: of the programs and the points.
      out: folder of programs.jsonl, a row a case; those that are there are not run again.

    Returns:
      ``violations`` (a bound below what is reached), ``errors`` (exceptions), ``infinite``
      (no bound, though every program has a constant), each a list of reproductions; ``slack``:
      quantiles of bound over what is reached, by method; counts; seconds.
    """
    jobs = {(index, seed): partial(run_case, index, seed) for index in range(n_cases)}
    rows, bad = [], 0
    with tqdm(total=n_cases, unit="program", disable=not progress) as bar:
        for _, row in resumed(out / ROWS, jobs, lambda row: (row["index"], row["seed"])):
            rows.append(row)
            if row.get("violated"):
                bad += 1
                bar.write(f"violation: {row}\n  reproduce: {_reproduce(row)}")
            bar.set_postfix_str(f"{bad} violations")
            bar.update()
            if row["index"] % FORGET_EVERY == 0:
                jax.clear_caches()
    return summary(rows) | {"seed": seed}


def run_case(index: int, seed: int) -> dict[str, Any]:
    """One case of an attack, the same at every call: to reproduce what it reported.

    Returns:
      ``index``, ``seed``; ``error``, or ``bounds`` (method -> bound), ``reached``, by what,
      and ``violated``: the methods whose bound is below it; seconds of both.
    """
    row: dict[str, Any] = {"index": index, "seed": seed}
    with jax.enable_x64(True):
        rng = np.random.default_rng([seed, index])
        fn, x = random_program(rng)
        began = time.perf_counter()
        try:
            bound = sn_jax.lipschitz_bound(fn, x, progress=False)
        except Exception as error:  # whatever it is, the attack goes on and reports it
            return row | {"error": f"{type(error).__name__}: {error}"}
        bounded = time.perf_counter()
        reached = stretch(fn, x, rng, CLIMB_STEPS if index % CLIMB_EVERY == 0 else 0)
        bounds = dict(bound.bounds) | {"upper": bound.upper}
        # What is below rounding errors of numbers of order 1 is nothing.
        least = max(reached.values()) * (1 - TOLERANCE) - 1e-12
        return row | {
            "bounds": bounds,
            "reached": reached,
            "violated": [name for name, value in bounds.items() if not value >= least],
            "seconds": [bounded - began, time.perf_counter() - bounded],
        }


def stretch(
    fn: Callable[[jax.Array], jax.Array], x: np.ndarray, rng: np.random.Generator, climb: int
) -> dict[str, float]:
    """How far a function stretches, by several searches: each a lower bound of its constant.

    Args:
      fn, x: the function, and an argument in float64.
      rng: of the points.
      climb: steps of ascent on the Jacobian's norm by its gradient; 0: none.

    Returns:
      dict: the largest "jacobian" norm of random points and of moves around the best of them, the
      largest quotient of "values" of two points, and the best of the "climb", if any.
    """

    # Each program runs for moments: a CPU's time goes into compiling it.
    @partial(jax.jit, compiler_options=runs_once())
    @jax.vmap
    def look(flat):
        def value(flat):
            y = fn(flat.reshape(x.shape)).ravel()
            return y, y

        # Forwards, which also goes through while loops.
        jacobian, y = jax.jacfwd(value, has_aux=True)(flat)
        return jacobian, y

    best, best_at, quotient = 0.0, x.ravel(), 0.0
    scales = np.resize(SCALES, (POINTS, 1))
    for turn in range(ROUNDS):
        points = scales * rng.standard_normal((POINTS, x.size))
        if turn:  # moves from far to near, and a few points elsewhere
            points[4:] = best_at + points[4:] * 0.5**turn
        jacobians, values = (np.asarray(a) for a in look(points))
        finite = np.isfinite(jacobians).all((1, 2))
        norms = np.where(finite, np.linalg.norm(np.where(finite[:, None, None], jacobians, 0), 2,
                                                (1, 2)), 0)  # fmt: skip
        if norms.max() > best:
            best, best_at = float(norms.max()), points[norms.argmax()]
        quotient = max(quotient, _quotient(points, values, np.roll(points, 1, 0),
                                           np.roll(values, 1, 0)))  # fmt: skip
    # From the last points a step along what their Jacobians stretch most.
    directions = np.linalg.svd(np.nan_to_num(jacobians), full_matrices=False)[2][:, 0]
    moved = points + 1e-3 * directions
    quotient = max(quotient, _quotient(points, values, moved, np.asarray(look(moved)[1])))
    reached = {"jacobian": best, "values": quotient}
    if climb:
        try:
            found = sn_jax.lipschitz_attack(
                fn, jax.random.key(int(rng.integers(2**31))), jnp.asarray(x), climb, restarts=3
            )
        except ValueError as error:  # as loops whose length is not known
            if "has no backward pass" not in str(error):
                raise
        else:
            reached["climb"] = float(np.nan_to_num(found.lower))
    return reached


def _quotient(points, values, other_points, other_values) -> float:
    """The largest |f(a) - f(b)| / |a - b| of pairs of rows, less what rounding may add to it."""
    apart = np.linalg.norm(values - other_values, axis=1)
    rounding = 1e-14 * (np.linalg.norm(values, axis=1) + np.linalg.norm(other_values, axis=1))
    return float(np.nan_to_num((apart - rounding) / np.linalg.norm(points - other_points, axis=1))
                 .max())  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What an attack found, from its rows."""
    found = {
        "violations": [row for row in rows if row.get("violated")],
        "errors": [row for row in rows if "error" in row],
        "infinite": [row for row in rows if row.get("bounds", {}).get("upper") == math.inf],
    }
    slack, counts = defaultdict(list), Counter()
    disordered = 0
    for row in rows:
        if "bounds" not in row:
            continue
        reached, bounds = max(row["reached"].values()), row["bounds"]
        counts.update(row["reached"])
        for name, value in bounds.items():
            if reached > 0 and value < math.inf:
                slack[name].append(value / reached)
        crude = [bounds[name] for name in ("product", "merged", "joint") if name in bounds]
        disordered += any(b > a * (1 + 1e-9) for a, b in pairwise(crude))
    points = list(_QUANTILES.values())
    return {
        "n_cases": len(rows),
        "n_found": {name: len(found[name]) for name in found},
        **{name: [row | {"reproduce": _reproduce(row)} for row in found[name]] for name in found},
        "slack": {
            name: {"programs": len(values)}
            | dict(zip(_QUANTILES, np.quantile(values, points).tolist(), strict=True))
            for name, values in slack.items()
        },
        "product >= merged >= joint does not hold": disordered,
        "looked at": dict(counts),
        "seconds": {
            name: sum(row["seconds"][i] for row in rows if "seconds" in row)
            for i, name in enumerate(("lipschitz_bound", "search"))
        },
    }


def report(results: dict[str, Any]) -> str:
    """The table, and what went wrong with how to reproduce it."""
    rows = [["bound / reached", "programs", *_QUANTILES]]
    rows += [[name, row["programs"], *(f"{row[q]:.3f}" for q in _QUANTILES)]
             for name, row in results["slack"].items()]  # fmt: skip
    found, seconds = results["n_found"], results["seconds"]
    lines = [
        aligned(rows),
        "",
        f"{results['n_cases']} programs: {found['violations']} violations, {found['errors']} "
        f"errors, {found['infinite']} without a finite bound",
        f"{seconds['lipschitz_bound']:.0f} s lipschitz_bound, {seconds['search']:.0f} s search",
    ]
    for name in found:
        for row in results[name][:20]:
            lines += [f"{name}: {row}", f"  reproduce: {row['reproduce']}"]
    return "\n".join(lines)


def _reproduce(row: dict[str, Any]) -> str:
    return f"experiments.certify.sandwich.run_case({row['index']}, {row['seed']})"
