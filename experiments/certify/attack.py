"""Thousands of adversarial cases against ``sn_jax.norm_bounds``, judged by an explicit matrix.

A case is a view and a shape from a fixed pool (JAX compiles once for each) with fresh values. The
bracket is a violation if it misses the SVD's norm by more than ``TOLERANCE`` and 50 digits agree.
"""

import math
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

import sn_jax
from experiments.certify import oracle

TOLERANCE = 1e-13  # relative: what an SVD in float64 is good for
DTYPES = ("float16", "bfloat16", "float32", "float64")
# The last is as tight as rounding allows: promised to no one, and where a bracket breaks first.
RTOLS = (1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-15)
TABLED = (1e-3, 1e-9, 1e-15)
# The least that is promised; for large matrices what the docstring of norm_bounds names.
LEAST_RTOL, LARGE_LEAST_RTOL = 1e-9, 1e-8
# Below it, brackets of matrices with at most so many products in A^T A are decided in 50 digits.
EXACT_PRODUCTS = 100_000

MOST_ROWS = 300
# But of the cases, one in so many has a matrix of about a thousand rows, or one of up to 4,096.
LARGE_EVERY, HUGE_EVERY = 100, 2000

_STATISTICS = {"median": 0.5, "99 %": 0.99, "worst": 1.0}


@dataclass(frozen=True)
class Problem:
    """What JAX compiles for: a view and the shape of a parameter."""

    family: str  # row of the table
    view: sn_jax.View
    shape: tuple[int, ...]
    # The kernel is to be a product of one factor per dimension and one for the channels, whose
    # norms multiply: the explicit matrix would be too large for an SVD.
    separable: bool = False

    @property
    def least_rtol(self) -> float:
        """The smallest rtol that is promised: rounding limits the slack of large matrices."""
        return LEAST_RTOL if min(_sizes(self)) <= 2 * MOST_ROWS else LARGE_LEAST_RTOL


@dataclass(frozen=True)
class Case:
    """One call of ``norm_bounds``."""

    problem: Problem
    kind: str  # how the values were made
    w: np.ndarray  # the parameter, of one of ``DTYPES``
    rtol: float
    sigma: np.ndarray  # the oracle's norms, (*batch,)


def attack(
    n_cases: int, seed: int, *, n_configs: int = 200, large: bool = True, progress: bool = False
) -> dict[str, Any]:
    """Run random cases against the oracle.

    Args:
      n_cases: how many; with the same ``seed``, ``n_configs`` and ``large``, the first cases of
        a longer attack are those of a shorter one.
      seed: of the values.
      n_configs: views and shapes to draw from: what JAX compiles for.
      large: include matrices of up to 4,096 rows, and convolutions beyond that.

    Returns:
      ``violations``, ``errors`` (exceptions, and warnings that came or stayed away wrongly) and
      ``rtol_missed``, each a list of reproductions; ``table``, rows of slack by family and rtol;
      ``kinds``, the same by kind of values; counts; seconds.

    Example:
      >>> results = attack(150, seed=0, n_configs=12, large=False)     # doctest: +SKIP
      >>> results["violations"], results["errors"]                     # doctest: +SKIP
      ([], [])
    """
    options = {"seed": seed, "n_configs": n_configs, "large": large}
    found: dict[str, list] = {"violations": [], "errors": [], "rtol_missed": []}
    families, kinds = defaultdict(list), defaultdict(list)
    counts, seconds = defaultdict(Counter), Counter()
    start = time.perf_counter()
    bar = tqdm(range(n_cases), unit="case", disable=not progress)
    for index in bar:
        began = time.perf_counter()
        case = make_case(index, **options)
        ended = time.perf_counter()
        where = {
            "index": index, **options, "family": case.problem.family,
            "view": str(case.problem.view), "shape": case.problem.shape, "kind": case.kind,
            "dtype": case.w.dtype.name, "rtol": case.rtol,
        }  # fmt: skip
        outcome = _ask(case)
        seconds["oracle"] += ended - began
        seconds["norm_bounds"] += time.perf_counter() - ended
        if "error" in outcome:
            found["errors"].append(where | outcome)
            continue
        for name, rows in _judge(case, **outcome).items():
            found[name] += [where | row for row in rows]
        counts["dtype"][case.w.dtype.name] += 1
        counts["rtol"][f"{case.rtol:g}"] += 1
        counts["decided in 50 digits"][case.problem.family] += _decided_exactly(case)
        counts["warned"][case.problem.family] += bool(outcome["warned"])
        slack = _slack(case, outcome["lower"], outcome["upper"])
        if slack is not None:
            families[case.problem.family, case.rtol].append(slack)
            kinds[case.kind, case.rtol].append(slack)
        bad = len(found["violations"]) + len(found["errors"])
        bar.set_postfix_str(f"{bad} violations or errors, {len(found['rtol_missed'])} rtol missed")
    return {
        "n_cases": n_cases,
        **options,
        "n_configs_used": len({problem_of(i, n_configs, large) for i in range(n_cases)}),
        "n_found": {name: len(rows) for name, rows in found.items()},
        **found,
        "table": _rows(families, "family"),
        "kinds": _rows(kinds, "kind"),
        "counts": {name: dict(counter) for name, counter in counts.items()},
        # What is left of all of them went into rechecking in 50 digits.
        "seconds": dict(seconds) | {"all": time.perf_counter() - start},
    }


def make_case(index: int, *, seed: int, n_configs: int = 200, large: bool = True) -> Case:
    """One case of an attack of these options, the same at every call: to reproduce what it
    reported."""
    problem = problem_of(index, n_configs, large)
    rng = np.random.default_rng([seed, index])
    rtol = float(rng.choice(RTOLS))
    if problem.separable:
        kind, w, sigma = _separable(rng, problem)
        return Case(problem, kind, w, rtol, sigma)
    kind, w = kernel_of(rng, problem)
    return Case(problem, kind, w, rtol, oracle.norms(w, problem.view))


def report(results: dict[str, Any]) -> str:
    """The table, and what went wrong with how to reproduce it."""
    lines = [
        f"{'':47}{'upper / lower - 1':>27}{'upper / sigma - 1':>30}",
        f"{'':30}{'rtol':>7}{'cases':>7}" + "".join(f"{n:>10}" for n in (*_STATISTICS,) * 2),
    ]
    for row in results["table"]:
        numbers = [*row["upper/lower - 1"].values(), *row["upper/sigma - 1"].values()]
        lines.append(
            f"{row['family']:30}{row['rtol']:7.0e}{row['cases']:7}"
            + "".join(f"{number:10.1e}" for number in numbers)
        )
    seconds = results["seconds"]
    lines += [
        "",
        f"{results['n_cases']} cases over {results['n_configs_used']} views and shapes: "
        f"{len(results['violations'])} violations, {len(results['errors'])} errors, "
        f"{len(results['rtol_missed'])} wider than promised",
        f"{sum(results['counts']['decided in 50 digits'].values())} of the tightest brackets "
        "decided in 50 digits",
        f"{seconds['all']:.0f} s: {seconds['norm_bounds']:.0f} s norm_bounds, "
        f"{seconds['oracle']:.0f} s oracle",
    ]
    for name in ("violations", "errors", "rtol_missed"):
        for row in results[name][:20]:
            lines.append(f"{name}: {row}")
            lines.append(
                f"  reproduce: experiments.certify.attack.make_case({row['index']}, "
                f"seed={row['seed']}, n_configs={row['n_configs']}, large={row['large']})"
            )
    return "\n".join(lines)


def _sizes(problem: Problem) -> tuple[int, int]:
    """Numbers of inputs and of outputs of one map."""
    view, shape = problem.view, problem.shape
    return math.prod(view.domain(shape)), oracle.codomain_size(shape, view)


# --- One case -------------------------------------------------------------------------------


def _ask(case: Case) -> dict[str, Any]:
    """The bracket and whether it came with a UserWarning, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lower, upper = sn_jax.norm_bounds(case.w, case.problem.view, rtol=case.rtol)
        except Exception as error:  # whatever it is, the attack goes on and reports it
            return {"error": f"{type(error).__name__}: {error}"}
    warned = [w for w in caught if w.category is UserWarning]
    others = [w for w in caught if w.category is not UserWarning]
    kept = case.rtol >= case.problem.least_rtol
    if others or (warned and kept):
        return {"error": f"warning: {(others or warned)[0].message}"}
    lower, upper = np.asarray(lower), np.asarray(upper)
    if any(end.shape != case.sigma.shape or end.dtype != np.float64 for end in (lower, upper)):
        return {"error": f"lower is {lower.dtype}{lower.shape}, upper {upper.dtype}{upper.shape}"}
    if not warned and _wider(lower, upper, case.rtol).any():
        return {"error": f"no warning, but [{lower}, {upper}] is wider than rtol"}
    return {"lower": lower, "upper": upper, "warned": bool(warned)}


def _wider(lower, upper, rtol):
    """Where the bracket is wider than rtol; a rounding error of the division by lower is no
    broken promise, nor is a zero that is bounded by the smallest number."""
    return upper > lower * (1 + rtol) * (1 + 1e-15) + np.finfo(np.float64).tiny


def _judge(case: Case, lower, upper, warned) -> dict[str, list[dict[str, Any]]]:
    """Elements of the batch whose bracket misses sigma, or is wider than promised."""
    sigma, problem = case.sigma, case.problem
    holds = (lower <= sigma * (1 + TOLERANCE)) & (sigma * (1 - TOLERANCE) <= upper)
    if _decided_exactly(case):
        holds.flat[0] = False  # until rechecked below, without any tolerance
    violations = []
    for element in np.argwhere(~holds):  # also NaN
        at = tuple(int(i) for i in element)
        low, high = float(lower[at]), float(upper[at])
        rechecked = None  # not for separable kernels: their product of norms is what there is
        if not problem.separable and math.isfinite(low) and not math.isnan(high):
            matrix = oracle.matrices(oracle.exact(case.w), problem.view)[at]
            rechecked = oracle.recheck(matrix, low, high)
            if all(rechecked):
                continue
        row = {"element": at, "lower": low, "upper": high, "sigma": float(sigma[at])}
        violations.append(row | {"rechecked": rechecked})
    wide = _wider(lower, upper, max(case.rtol, problem.least_rtol))
    missed = [
        {"element": tuple(int(i) for i in at), "lower": float(lower[tuple(at)])}
        | {"upper": float(upper[tuple(at)]), "sigma": float(sigma[tuple(at)])}
        for at in np.argwhere(wide)
    ]
    return {"violations": violations, "rtol_missed": missed}


def _decided_exactly(case: Case) -> bool:
    """Whether the bracket of the first of the batch is rechecked though it looks right."""
    sizes = _sizes(case.problem)
    small = min(sizes) * math.prod(sizes) <= EXACT_PRODUCTS
    return small and case.rtol < LEAST_RTOL and not case.problem.separable


def _slack(case: Case, lower, upper) -> tuple[float, float] | None:
    """upper / lower - 1 and upper / sigma - 1 of the worst element; None if all are zero."""
    nonzero = case.sigma > 0
    if not nonzero.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        slack = [float(np.max(upper[nonzero] / base[nonzero] - 1)) for base in (lower, case.sigma)]
    return slack[0], slack[1]


def _rows(groups: dict[tuple[str, float], list[tuple[float, float]]], name: str):
    """Median, 99 % and worst of both slacks for each group of the rtols that are tabled."""
    rows = []
    for (group, rtol), values in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        if rtol not in TABLED:
            continue
        # No interpolation: it would make NaN of an infinite one.
        points = list(_STATISTICS.values())
        quantiles = np.quantile(values, points, axis=0, method="higher").T.tolist()
        stats = [dict(zip(_STATISTICS, row, strict=True)) for row in quantiles]
        rows.append(
            {name: group, "rtol": rtol, "cases": len(values)}
            | {"upper/lower - 1": stats[0], "upper/sigma - 1": stats[1]}
        )
    return rows


# --- Values ---------------------------------------------------------------------------------


def kernel_of(
    rng: np.random.Generator, problem: Problem, dtype: str | None = None
) -> tuple[str, np.ndarray]:
    """(kind, kernel) of one of ``DTYPES``, by default of any."""
    kind, w = _values(rng, problem)
    return kind, _scaled(rng, w, dtype or str(rng.choice(DTYPES)), kind)


def _values(rng: np.random.Generator, problem: Problem) -> tuple[str, np.ndarray]:
    """(kind, float64 values) of a parameter; several kinds mean its (taps * in, out) matrix."""
    kind = str(rng.choice(list(_KINDS)))
    view, shape = problem.view, problem.shape
    batch = view.batch_shape(shape)
    make = _KINDS[kind]
    if isinstance(view, sn_jax.Matrix):
        ins = [axis % len(shape) for axis in view.in_axes]
        outs = [axis % len(shape) for axis in view.out_axes]
        stacked = [axis for axis in range(len(shape)) if axis not in ins + outs]
        order = stacked + ins + outs
        rows = math.prod(shape[axis] for axis in ins)
        columns = math.prod(shape[axis] for axis in outs)
        each = [make(rng, (rows, columns)) for _ in range(math.prod(batch))]
        w = np.stack(each).reshape([shape[axis] for axis in order])
        w = w.transpose(np.argsort(order))
    else:
        axes = range(len(batch)) if view.batch_axes is None else view.batch_axes
        stacked = sorted(axis % len(shape) for axis in axes)
        kernel = [size for axis, size in enumerate(shape) if axis not in stacked]
        n_taps = math.prod(kernel[:-2])
        each = []
        for _ in range(math.prod(batch)):
            if kind in _AT_ONE_TAP:
                k = np.zeros((n_taps, *kernel[-2:]))
                k[n_taps // 2] = make(rng, kernel[-2:])
                if kind != "permutation":
                    k += rng.choice([0, 1e-9, 1e-5]) * rng.standard_normal(k.shape)
            else:
                k = make(rng, (n_taps * kernel[-2], kernel[-1]))
            each.append(k.reshape(kernel))
        w = np.moveaxis(np.stack(each).reshape(*batch, *kernel), range(len(batch)), stacked)
    if batch and rng.random() < 0.2:  # a dead expert among live ones
        first = stacked[0]
        w[(slice(None),) * first + (int(rng.integers(shape[first])),)] = 0
    return kind, w


def _orthogonal(rng, shape):
    rows, columns = shape
    q, _ = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    return q if rows >= columns else q.T


def _tied(rng, shape):
    """The two or more largest singular values equal, or a gap of 1e-12 to 1e-2 apart."""
    n = min(shape)
    spectrum = rng.uniform(0, 1, n)
    spectrum[: int(rng.integers(2, 6))] = 1.0
    spectrum[:1] += rng.choice([0, 10.0 ** -rng.integers(2, 13)])
    return (_orthogonal(rng, (shape[0], n)) * spectrum) @ _orthogonal(rng, (n, shape[1]))


def _rank_deficient(rng, shape):
    rank = int(rng.integers(1, max(2, min(shape) // 2 + 1)))
    return rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))


def _near_orthogonal(rng, shape):
    noise = 10.0 ** -rng.integers(1, 14)
    return _orthogonal(rng, shape) + noise * rng.standard_normal(shape)


def _toeplitz(rng, shape):
    bands = rng.standard_normal(sum(shape)) * rng.choice([0.5, 0.9, 1.0]) ** np.arange(sum(shape))
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return bands[np.where(rows >= columns, rows - columns, shape[0] + columns - rows)]


def _one_huge(rng, shape):
    w = rng.standard_normal(shape)
    w.flat[int(rng.integers(w.size))] = 10.0 ** rng.integers(2, 13)
    return w


def _graded(rng, shape):
    """Rows, columns or both fall off geometrically over up to 16 decades."""
    w = rng.standard_normal(shape)
    for axis, n in enumerate(shape):
        if rng.random() < 0.7:
            falling = 10.0 ** -np.linspace(0, rng.uniform(1, 16), n)
            w = w * (falling[:, None] if axis == 0 else falling)
    return w


def _permutation(rng, shape):
    """Norms that float64 holds exactly: a bracket that is off by one unit is wrong."""
    w = np.zeros(shape)
    n = min(shape)
    rows, columns = (rng.permutation(size)[:n] for size in shape)
    w[rows, columns] = 2.0 ** -rng.integers(0, 3, n)
    return w


def _alternating(rng, shape):
    """The highest frequency, which is on no grid of odd size."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (-1.0) ** (rows + int(rng.integers(2)) * columns) * rng.uniform(0.9, 1, shape)


_KINDS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "positive": lambda rng, shape: rng.uniform(0, 1, shape),
    "all ones": lambda rng, shape: np.ones(shape),
    "alternating": _alternating,
    "Toeplitz": _toeplitz,
    "rank-deficient": _rank_deficient,
    "tied": _tied,
    "orthogonal": _orthogonal,
    "near-orthogonal": _near_orthogonal,
    "one huge entry": _one_huge,
    "graded": _graded,
    "permutation": _permutation,
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "extreme scale": lambda rng, shape: rng.standard_normal(shape),
    "zero": lambda rng, shape: np.zeros(shape),
}
# For a convolution these matrices act on the channels at one tap, so that the operator has them.
_AT_ONE_TAP = ("tied", "orthogonal", "near-orthogonal", "permutation")


def _scaled(rng: np.random.Generator, w: np.ndarray, dtype: str, kind: str) -> np.ndarray:
    """Values of largest size 1, times a scale that the dtype can hold."""
    # float16 ends at 65504, and below 6e-5 it has fewer digits.
    decades = (-4, 4) if dtype == "float16" else (-20, 20)
    if kind == "extreme scale" and dtype == "float64":
        decades = (-290, 290)  # far beyond where a square can be held
    exponent = rng.uniform(*decades) if rng.random() < 0.7 else 0.0
    largest = np.max(np.abs(w), initial=0.0)
    if kind == "permutation":
        # Powers of two stay exact.
        exponent, largest = math.log10(2.0 ** round(exponent / math.log10(2))), 1.0
        w = np.ldexp(w, round(exponent / math.log10(2)))
    elif largest:
        w = w / largest * 10.0**exponent
    return w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _separable(rng: np.random.Generator, problem: Problem) -> tuple[str, np.ndarray, np.ndarray]:
    """(kind, kernel, norm) of a convolution that is a product of one map per dimension and one
    of the channels: their norms, of small explicit matrices, multiply.

    The factors are integers of 7 bits, so that float32 holds their product.
    """
    kind = str(rng.choice(["gaussian", "positive", "all ones", "alternating"]))
    view, (*spatial, c_in, c_out) = problem.view, problem.shape

    def factor(rows, columns):
        return np.rint(20 * _KINDS[kind](rng, (rows, columns)))

    w = factor(c_in, c_out)
    pixel = sn_jax.Conv(1, feature_group_count=view.feature_group_count)
    sigma = oracle.norms(w[None], pixel)
    for d, k in reversed(list(enumerate(spatial))):
        padding = view.padding if isinstance(view.padding, str) else (view.padding[d],)
        line = sn_jax.Conv(
            view.input_shape[d], view.strides[d], padding, view.input_dilation[d],
            view.kernel_dilation[d], 1, view.transpose, view.transpose_kernel,
        )  # fmt: skip
        taps = factor(k, 1)
        sigma = sigma * oracle.norms(taps[..., None], line)
        w = np.multiply.outer(taps[:, 0], w)
    scale = 2.0 ** int(rng.integers(-60, 60))
    return kind, (w * scale).astype(rng.choice(["float32", "float64"])), sigma * scale


# --- Views and shapes -------------------------------------------------------------------------


def problem_of(index: int, n_configs: int, large: bool) -> Problem:
    """The problem of a case: huge and large ones now and then, else the pool in turn."""
    if large and index % HUGE_EVERY == HUGE_EVERY - 1:
        return _HUGE[index // HUGE_EVERY % len(_HUGE)]
    if large and index % LARGE_EVERY == LARGE_EVERY - 1:
        return _LARGE[index // LARGE_EVERY % len(_LARGE)]
    return _pool(n_configs)[index % n_configs]


@lru_cache
def _pool(n_configs: int) -> list[Problem]:
    """Problems of at most ``MOST_ROWS`` rows and columns, the families in turn."""
    rng = np.random.default_rng(0)
    families = list(_FAMILIES)
    pool: list[Problem] = []
    while len(pool) < n_configs:
        family = families[len(pool) % len(families)]
        view, shape = _FAMILIES[family](rng)
        rows = oracle.codomain_size(shape, view)
        # Without any output the view itself refuses.
        if 0 < rows <= MOST_ROWS and math.prod(view.domain(shape)) <= MOST_ROWS:
            pool.append(Problem(family, view, shape))
    return pool


def _draw(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer from low to high, both possible; every order of magnitude has its share."""
    if rng.random() < 0.5:
        return int(rng.integers(low, high + 1))
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _dense(rng):
    return sn_jax.Matrix(), (_draw(rng, 1, MOST_ROWS), _draw(rng, 1, MOST_ROWS))


def _stacked(rng):
    a, b, c = _draw(rng, 1, 6), _draw(rng, 2, 12), _draw(rng, 2, 100)
    views = [
        (sn_jax.Matrix(), (a, b, c)),  # experts
        (sn_jax.Matrix(0, (1, 2)), (c, a, b)),  # queries
        (sn_jax.Matrix(0, 2), (c, a, b)),  # queries, head by head
        (sn_jax.Matrix((0, 1), 2), (a, b, c)),  # the projection after attention
        (sn_jax.Matrix((0, 1, 2), 3), (3, 3, b, c)),  # a flattened convolution
        (sn_jax.Matrix((-1, 1), (0,)), (c, a, 2, b)),
    ]
    return views[int(rng.integers(len(views)))]


def _conv(rng, padding, *, n=None, groups=1, depthwise=False, batch=(), **options):
    n = n or int(rng.choice([1, 2, 2, 2, 3]))
    size = [_draw(rng, 1, (80, 14, 6)[n - 1]) for _ in range(n)]
    kernel = [int(rng.integers(1, (9, 6, 4)[n - 1])) for _ in range(n)]
    c_in, c_out = _draw(rng, 1, 12), _draw(rng, 1, 12)
    if depthwise:
        groups, c_in = c_in, 1
    if padding == "explicit":
        padding = [tuple(int(p) for p in rng.integers(-1, 4, 2)) for _ in range(n)]
    view = sn_jax.Conv(
        size, padding=padding, feature_group_count=groups,
        **{name: [int(rng.integers(1, most + 1)) for _ in range(n)] if most > 1 else 1
           for name, most in options.items()},
    )  # fmt: skip
    return view, (*batch, *kernel, c_in, groups * c_out)


def _any_padding(rng):
    return str(rng.choice(["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "explicit"]))


def _transposed(rng):
    padding = str(rng.choice(["SAME", "VALID", "CIRCULAR", "explicit"]))
    view, shape = _conv(rng, padding, strides=3, kernel_dilation=2)
    flip = bool(rng.integers(2))
    return replace(view, transpose=True, transpose_kernel=flip), shape


def _kernels(rng):
    view, shape = _conv(rng, _any_padding(rng), strides=2, batch=(_draw(rng, 1, 4),))
    axis = int(rng.integers(len(shape)))
    shape = shape[1 : axis + 1] + shape[:1] + shape[axis + 1 :]
    return replace(view, batch_axes=(axis,)), shape


_FAMILIES = {
    "dense": _dense,
    "dense, axes and batches": _stacked,
    "conv, zero padding": lambda rng: _conv(
        rng, str(rng.choice(["SAME", "SAME_LOWER", "VALID", "explicit"]))
    ),
    "conv, circular": lambda rng: _conv(
        rng, "CIRCULAR", strides=2, kernel_dilation=2, groups=int(rng.integers(1, 3))
    ),
    "conv, strided": lambda rng: _conv(rng, _any_padding(rng), strides=3),
    "conv, transposed": _transposed,
    "conv, dilated kernel": lambda rng: _conv(
        rng, _any_padding(rng), strides=2, kernel_dilation=3
    ),
    "conv, dilated input": lambda rng: _conv(
        rng, "explicit", strides=2, kernel_dilation=2, input_dilation=3
    ),
    "conv, groups": lambda rng: _conv(
        rng, _any_padding(rng), strides=2, groups=int(rng.integers(2, 5)),
        depthwise=bool(rng.integers(2)),
    ),
    "conv, reflected": lambda rng: _conv(rng, "REFLECT", strides=2),
    "conv, causal": lambda rng: _conv(rng, "CAUSAL", n=1, strides=2, kernel_dilation=4),
    "conv, stacks": _kernels,
}  # fmt: skip

_BEYOND, _CIRCULAR = "conv, padded, beyond 4096", "conv, circular, beyond 4096"
_BAND = "conv, along the band"
_LARGE = [
    Problem("dense, large", sn_jax.Matrix(), (1000, 800)),
    Problem(_BEYOND, sn_jax.Conv((48, 48)), (3, 3, 4, 2), True),
    Problem("conv, large", sn_jax.Conv((16, 16)), (3, 3, 4, 4)),
    Problem(_CIRCULAR, sn_jax.Conv((64, 64), 1, "CIRCULAR"), (3, 3, 4, 8), True),
    Problem("dense, large", sn_jax.Matrix(), (4096, 300)),
    Problem(_BEYOND, sn_jax.Conv((64, 64), 2), (4, 4, 8, 6), True),
    Problem("conv, large", sn_jax.Conv((9, 9), 2, "REFLECT"), (3, 3, 16, 32)),
    Problem(_BEYOND, sn_jax.Conv((900,), 1, "CAUSAL", kernel_dilation=3), (5, 8, 6), True),
    Problem("conv, large", sn_jax.Conv((700,), 1, [(2, 1)]), (4, 1, 1)),
    Problem(_CIRCULAR, sn_jax.Conv((64, 48), 2, "CIRCULAR"), (5, 3, 8, 8), True),
    Problem("dense, large", sn_jax.Matrix(), (3, 300, 700)),
    Problem(_BEYOND, sn_jax.Conv((20, 20), transpose=True, strides=2), (4, 4, 16, 4), True),
    Problem("conv, large", sn_jax.Conv((7, 7), 2, transpose=True), (4, 4, 16, 4)),
    Problem(_BEYOND, sn_jax.Conv((24, 24), padding="VALID"), (3, 3, 12, 12), True),
    Problem(_BEYOND, sn_jax.Conv((48, 48), feature_group_count=2), (3, 3, 2, 4), True),
    Problem(_CIRCULAR, sn_jax.Conv((800,), 1, "CIRCULAR"), (7, 6, 8), True),
    # Just large enough to be factorized along the band.
    Problem(_BAND, sn_jax.Conv((16, 17), 1, [(2, 0), (0, 1)]), (3, 3, 5, 4)),
    Problem(_BAND, sn_jax.Conv((400,), padding="CAUSAL", kernel_dilation=5), (3, 3, 3)),
    Problem(_BAND, sn_jax.Conv((27, 27), 2, "CIRCULAR"), (4, 3, 2, 7)),
    Problem(_BAND, sn_jax.Conv((17, 16), padding="REFLECT"), (3, 5, 4, 4)),
    Problem(_BAND, sn_jax.Conv((24, 23), 2, feature_group_count=2), (3, 3, 1, 10)),
    Problem(_BAND, sn_jax.Conv((12, 12), 2, transpose=True), (4, 4, 8, 3)),
    Problem(_BAND, sn_jax.Conv((33, 34), padding="VALID", kernel_dilation=3), (3, 3, 1, 2)),
    Problem(_BAND, sn_jax.Conv((7, 8, 7)), (2, 3, 2, 3, 3)),
]
_HUGE = [
    Problem("conv, large", sn_jax.Conv((16, 16)), (3, 3, 8, 8)),
    Problem("dense, large", sn_jax.Matrix(), (2500, 2000)),
    Problem("conv, large", sn_jax.Conv((12, 12), padding="REFLECT"), (3, 3, 12, 6)),
    Problem("conv, large", sn_jax.Conv((64, 64)), (3, 3, 1, 1)),
    Problem("dense, large", sn_jax.Matrix(), (2048, 2048)),
]
