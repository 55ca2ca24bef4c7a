"""A look into a checkpoint: what ``python -m sn_jax inspect`` finds, and how it is shown.

Here belongs what is said of each weight. Formats are the business of ``_readers``.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sn_jax._norms import norm_bounds, spectral_norm
from sn_jax._readers import CheckpointError, Leaf
from sn_jax._rules import NO_WEIGHTS, WEIGHT_NAMES, closest
from sn_jax._spectra import singular_values
from sn_jax._views import Conv, Matrix, View

# Names of weights, beside those that init knows, as PyTorch gives them.
_WEIGHT = re.compile(
    "|".join((*WEIGHT_NAMES, r"weight_[ih]h(_l\d+(_reverse)?)?", "weight_orig", "in_proj_weight"))
)
_FLOATS = re.compile(r"(b?float|F|BF)\d*", re.IGNORECASE)
COLUMNS = ("path", "sigma", "stable_rank", "condition", "parameters")


class Weight(NamedTuple):
    """One array with two axes or more; numbers are of the element of its batch with the largest.

    Attributes:
      path, shape, dtype: as stored.
      view: how it is seen, as text; None where neither names nor ``--view`` say it.
      guessed: whether names said it.
      sigma: the norm; None without a view, or where entries are not finite.
      lower, upper: the certified bracket, if it was asked for.
      stable_rank: ``|A|_F^2 / sigma^2``; None where the map is too large.
      condition: the largest over the smallest singular value, likewise.
      not_finite: the share of entries that are not finite.
      spectra: singular values, for each element of the batch, likewise.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    view: str | None
    guessed: bool
    sigma: float | None
    lower: float | None
    upper: float | None
    stable_rank: float | None
    condition: float | None
    not_finite: float
    spectra: list[list[float]] | None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def parsed_rules(texts: Iterable[str]) -> dict[str, View | None]:
    """``regex=Matrix(...)``, ``regex=Conv(...)`` or ``regex=None`` as rules; nothing is executed.

    Raises:
      CheckpointError: a text is none of these.
    """
    rules = {}
    for text in texts:
        pattern, equals, view = text.rpartition("=") if text.endswith("=None") else _split(text)
        try:
            re.compile(pattern)
            rules[pattern] = _view(view.strip())
            if not equals:
                raise ValueError("no '='")
        except (ValueError, TypeError, SyntaxError, re.error) as error:
            raise CheckpointError(
                f"--view {text!r} is no rule ({error}): write 'regex=Matrix(in_axes, out_axes)', "
                "'regex=Conv(input_shape, ...)' or 'regex=None'."
            ) from None
    return rules


def _split(text: str) -> tuple[str, str, str]:
    """At the last = that a view's name follows, since options of a view have signs of their own."""
    signs = [match.start() for match in re.finditer(r"=\s*(sn_jax\.)?(Matrix|Conv)\(", text)]
    return (text[: signs[-1]], "=", text[signs[-1] + 1 :]) if signs else (text, "", "")


def _view(text: str) -> View | None:
    if text == "None":
        return None
    call = ast.parse(text.removeprefix("sn_jax."), mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError(f"{text!r} is no view")
    kinds = {"Matrix": Matrix, "Conv": Conv}
    if call.func.id not in kinds:
        raise ValueError(f"{call.func.id} is no view that can be written here")
    args = [ast.literal_eval(x) for x in call.args]
    options = {str(x.arg): ast.literal_eval(x.value) for x in call.keywords}
    return kinds[call.func.id](*args, **options)


def guessed_view(name: str, ndim: int) -> View | None:
    """What the names alone say; None where they do not.

    Two axes of what is called a weight are a matrix. More are one where the layer is called a
    convolution (Flax and Haiku: output last; PyTorch and Equinox: first, unless it is transposed)
    or is a projection of Flax's attention.
    """
    parts = re.split(r"[/.]", name)
    parts = parts[:-1] if parts[-1] == "value" and len(parts) > 1 else parts
    *layers, leaf = parts
    if not _WEIGHT.fullmatch(leaf) or ndim < 2:
        return None
    if ndim == 2:
        return Matrix()
    layer = layers[-1].lower() if layers else ""
    if leaf in ("kernel", "w") and ndim == 3 and layer in ("query", "key", "value", "out"):
        return Matrix((0, 1), 2) if layer == "out" else Matrix(0, (1, 2))
    if "conv" not in layer or ndim > 5:
        return None
    if leaf in ("kernel", "w"):
        return Matrix(tuple(range(ndim - 1)), ndim - 1)
    transposed = re.search("trans|deconv|up", layer)
    return None if transposed else Matrix(tuple(range(1, ndim)), 0)


def looked_at(
    leaves: Sequence[Leaf],
    rules: dict[str, View | None],
    *,
    certify: bool,
    largest_side: int,
    progress: Callable[[Iterable[Leaf]], Iterable[Leaf]],
) -> tuple[list[Weight], dict[str, Any]]:
    """(weights, totals), array by array, of which no two are held at once.

    Raises:
      CheckpointError: a rule matches no path, or does not fit a shape.
    """
    for pattern in rules:
        if not any(re.fullmatch(pattern, leaf.name) for leaf in leaves):
            near = ", ".join(closest(pattern, [leaf.name for leaf in leaves]))
            raise CheckpointError(
                f"--view {pattern!r} matches no path in full; the closest are: {near}."
            )
    weights, others, parameters, not_finite = [], 0, 0, 0
    for leaf in progress(leaves):
        name = re.split(r"[/.]", leaf.name)[-1]
        is_weight = len(leaf.shape) > 1 and _FLOATS.match(leaf.dtype) and name not in NO_WEIGHTS
        array = leaf.read()
        parameters += array.size
        if not np.issubdtype(array.dtype, np.floating):
            others += 1
            continue
        bad = array.size - int(np.isfinite(array).sum())
        not_finite += bad
        view, guessed = guessed_view(leaf.name, len(leaf.shape)), True
        for pattern, said in rules.items():
            if re.fullmatch(pattern, leaf.name):
                view, guessed = said, False
                break
        given = not guessed and view is not None
        if not (given or (guessed and is_weight)):
            others += 1
            continue
        weights.append(_weight(leaf, array, view, guessed, bad, certify, largest_side))
        del array
    return weights, {
        "weights": len(weights),
        "other arrays": others,
        "parameters": parameters,
        "not finite": not_finite,
        "without a view": sum(weight.view is None for weight in weights),
    }


def _weight(leaf, array, view, guessed, bad, certify, largest_side) -> Weight:
    fields: dict[str, Any] = dict.fromkeys(Weight._fields)
    fields |= {
        "path": leaf.name, "shape": tuple(leaf.shape), "dtype": leaf.dtype,
        "view": None if view is None else repr(view), "guessed": guessed and view is not None,
        "not_finite": bad / max(1, array.size),
    }  # fmt: skip
    if view is None or bad or not array.size:
        return Weight(**fields)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bracket that is wide is shown as it is
            spectra = _spectra(array, view, largest_side)
            sigmas = spectral_norm(array, view) if spectra is None else spectra[..., 0]
            which = np.unravel_index(np.argmax(sigmas), sigmas.shape)
            fields["sigma"] = float(sigmas[which])
            if spectra is not None:
                s = spectra[which]
                fields["spectra"] = spectra.reshape(-1, spectra.shape[-1]).tolist()
                fields["stable_rank"] = float(np.sum((s / s[0]) ** 2)) if s[0] else 0.0
                fields["condition"] = float(s[0] / s[-1]) if s[-1] else math.inf
            elif isinstance(view, Matrix):
                _, ins, outs = view.axis_groups(array.ndim)
                scaled = array.astype(np.float64) / np.max(np.abs(array))
                frobenius = np.max(np.abs(array)) * np.sqrt(np.sum(scaled**2, (*ins, *outs)))
                fields["stable_rank"] = float((frobenius[which] / sigmas[which]) ** 2)
            if certify:
                bounds = norm_bounds(array, view)
                fields["lower"], fields["upper"] = (float(np.max(end)) for end in bounds)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{leaf.name} of shape {tuple(leaf.shape)}: {error}") from None
    return Weight(**fields)


def _spectra(array: np.ndarray, view: View, largest_side: int) -> np.ndarray | None:
    """(*batch, n); None where there are more than ``largest_side``."""
    if isinstance(view, Matrix):
        _, ins, outs = view.axis_groups(array.ndim)
        side = min(math.prod(array.shape[a] for a in axes) for axes in (ins, outs))
    else:
        side = math.prod(view.domain(array.shape))
    return singular_values(array, view) if side <= largest_side else None


def sorted_weights(weights: Iterable[Weight], column: str) -> list[Weight]:
    """By path as people count (layer 2 before layer 10), or by a number, the largest first."""
    weights = sorted(weights, key=lambda w: [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", w.path)
    ])  # fmt: skip
    if column == "path":
        return weights

    def size(weight: Weight) -> float:
        value = getattr(weight, column)
        return -math.inf if value is None else value

    return sorted(weights, key=size, reverse=True)


def table(weights: Sequence[Weight], totals: dict[str, Any], kind: str) -> str:
    """What is printed."""
    certified = any(weight.lower is not None for weight in weights)
    header = ["path", "shape", "type", "view", "sigma", *(["certified"] * certified),
              "stable rank", "condition", "not finite"]  # fmt: skip
    rows = [header]
    for weight in weights:
        shape = "x".join(map(str, weight.shape))
        bracket = "" if weight.lower is None else f"{weight.lower:.5g} to {weight.upper:.5g}"
        view = "none: give --view" if weight.view is None else weight.view
        view = re.sub(r"(in|out)_axes=", "", re.sub(r"\((-?\d+),\)", r"\1", view))
        rows.append([
            weight.path, shape, weight.dtype, view + " by name" * weight.guessed,
            _number(weight.sigma), *([bracket] * certified), _number(weight.stable_rank),
            _number(weight.condition), f"{weight.not_finite:.2%}" if weight.not_finite else "0",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    total = ", ".join(f"{value:,} {name}" for name, value in totals.items())
    return "\n".join([*lines, "", f"{kind}: {total}"])


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def as_json(weights: Sequence[Weight], totals: dict[str, Any], kind: str) -> str:
    """The same for programs; what is not finite is a string, as JSON has no number for it."""

    def plain(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return str(x)
        return x

    entries = [{k: plain(v) for k, v in weight._asdict().items()} for weight in weights]
    return json.dumps({"format": kind, "totals": totals, "weights": entries})


def save_picture(path: Path, weights: Sequence[Weight], most: int = 30) -> None:
    """Singular values over their rank, those of each weight one line; at most ``most`` of them.

    Raises:
      CheckpointError: Matplotlib is missing; no spectrum; the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise CheckpointError("--plot takes matplotlib: pip install 'sn_jax[inspect]'.") from None
    shown = [weight for weight in weights if weight.spectra][:most]
    if not shown:
        raise CheckpointError("--plot: no weight has a view and a spectrum that can be drawn.")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.95, len(shown)))
    for weight, color in zip(shown, colors, strict=True):
        for i, s in enumerate(weight.spectra or ()):
            s = np.maximum(s, np.finfo(float).tiny)
            x = np.linspace(0, 1, len(s)) if len(s) > 1 else [0.0]
            label = None if i else weight.path
            axes.plot(x, s, color=color, lw=1, marker="." if len(s) == 1 else None, label=label)
    top = max(weight.sigma or 0 for weight in shown)
    axes.set(xlabel="rank, from the largest singular value to the smallest", yscale="log",
             ylabel="singular value", ylim=(top * 1e-6, top * 2) if top else None)  # fmt: skip
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=6)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--plot {path} cannot be written: {error}.") from None
