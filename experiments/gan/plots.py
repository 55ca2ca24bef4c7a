"""The pictures of a run (samples; losses and spectral norms over training) and of a table."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def save_samples(path: Path, fake: np.ndarray, real: np.ndarray, title: str) -> None:
    """Two grids of ten by ten images side by side: generated, and real.

    Args:
      path: of the PNG file.
      fake: (n, h, w, c) in [-1, 1]; the first hundred are shown, none are chosen.
      real: likewise.
      title: what was run.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, images, name in zip(
        figure.subplots(1, 2), (fake, real), ("Generated", "Real, held out"), strict=True
    ):
        # A border between the images; nearest-neighbour, so that single pixels can be seen.
        shown = images[:100] / 2 + 0.5
        tiles = np.pad(shown, [(0, 100 - len(shown)), (1, 0), (1, 0), (0, 0)])
        _, h, w, c = tiles.shape
        grid = tiles.reshape(10, 10, h, w, c).swapaxes(1, 2).reshape(10 * h, 10 * w, c)
        grid = np.pad(grid, [(0, 1), (0, 1), (0, 0)])
        axes.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    figure.savefig(path, dpi=150)


def save_fid(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """FID over training, a line for every pair of numbers of images.

    Args:
      path: of the PNG file.
      rows: of fid.jsonl.
      title: what was run.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots()
    for n_real, n_fake in dict.fromkeys((row["n_real"], row["n_fake"]) for row in rows):
        points = [
            (row["step"], row["fid"])
            for row in rows
            if (row["n_real"], row["n_fake"]) == (n_real, n_fake)
        ]
        axes.plot(*zip(*sorted(points), strict=True), "o-", lw=1.2, ms=4,
                  label=f"{n_real} real, {n_fake} generated")  # fmt: skip
    axes.set(xlabel="generator updates", ylabel="FID", yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def save_curves(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Losses, sigma hat of every W if estimated, true sigma of every W bar (the paper's fig. 9).

    Args:
      path: of the PNG file.
      rows: of metrics.jsonl.
      title: what was run.
    """
    steps = [row["step"] for row in rows]
    norms = {
        "sigma_hat": r"Estimate $\hat\sigma(W)$ of the raw kernels",
        "sigma_bar": r"True $\sigma(\bar W)$ of the kernels in use, by SVD",
    }
    norms = {name: axes_title for name, axes_title in norms.items() if rows[0][name]}
    figure = Figure(figsize=(5 + 5 * len(norms), 4.5), layout="constrained")
    figure.suptitle(title)
    losses, *spectra = figure.subplots(1, 1 + len(norms))
    for name, label in [("loss_d", "discriminator"), ("loss_g", "generator")]:
        losses.plot(steps, [row[name] for row in rows], label=label, lw=1)
    losses.set(title="Losses, of one batch each", ylabel="loss")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside left center")
    for axes, (name, axes_title) in zip(spectra, norms.items(), strict=True):
        layers = list(rows[0][name])
        colours = colormaps["plasma"](np.linspace(0, 0.9, len(layers)))  # by depth
        for layer, colour in zip(layers, colours, strict=True):
            values = [row[name][layer] for row in rows]
            axes.plot(steps, values, label=layer.removesuffix("/kernel"), color=colour, lw=1.2)
        axes.set(title=axes_title, ylabel="spectral norm")
    figure.legend(*spectra[-1].get_legend_handles_labels(), loc="outside right center")
    for axes in (losses, *spectra):
        axes.set_xlabel("generator updates")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# --- Of a table -----------------------------------------------------------------------------

_MARKERS = "osD^vP*Xd<>hp8H1"


def _colours(methods: list[str]) -> dict[str, Any]:
    """Of the methods in the order of the table; SN's are red, none is black."""
    others = [method for method in methods if method != "none" and not method.startswith("SN")]
    own = [method for method in methods if method.startswith("SN")]
    return (
        {"none": "black"}
        | dict(zip(others, colormaps["viridis"](np.linspace(0, 0.9, len(others))), strict=True))
        | dict(zip(own, colormaps["Reds"](np.linspace(0.9, 0.4, len(own))), strict=True))
    )


def save_robustness(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """The Fréchet distance of every row over the settings (the paper's figures 1 and 2).

    Args:
      path: of the PNG file.
      rows: of results.json; hollow marks are of rows whose samples lack a class.
      title: what was run.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    settings = sorted({row["setting"] for row in rows})
    colours = _colours(methods)
    figure = Figure(figsize=(3 + 2.2 * len(settings), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method and "frechet" in row]
        axes.plot([], [], _MARKERS[i % len(_MARKERS)], color=colours[method], label=method)
        for row in own:
            x = settings.index(row["setting"]) + (i + 0.5) * width - 0.4
            whole = row["coverage"] == row["n_classes"]
            axes.plot(x, row["frechet"], _MARKERS[i % len(_MARKERS)], color=colours[method],
                      mfc=colours[method] if whole else "none")  # fmt: skip
    for x in range(1, len(settings)):
        axes.axvline(x - 0.5, color="0.8", lw=0.8)
    real = next((row["frechet_real"] for row in rows if "frechet_real" in row), None)
    if real:
        axes.axhline(real, color="0.5", ls="--", lw=1, label="real images")
    axes.set_xticks(range(len(settings)), [f"setting {name}" for name in settings])
    axes.set(title=title, ylabel="Fréchet distance (log), a mark per seed;\n"
             "hollow: not every class is there", yscale="log",
             xlim=(-0.5, len(settings) - 0.5))  # fmt: skip
    axes.grid(axis="y", which="both", alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)


def save_spectra(path: Path, spectra: dict[str, dict[str, list[float]]], title: str) -> None:
    """Squared singular values of each layer's kernel, over the largest (the paper's figure 3).

    Args:
      path: of the PNG file.
      spectra: method -> layer -> singular values in descending order.
      title: what was run.
    """
    layers = list(next(iter(spectra.values())))
    colours = _colours(list(spectra))
    # A matrix with one column has one singular value, which says nothing here.
    layers = [layer for layer in layers if len(next(iter(spectra.values()))[layer]) > 1]
    n_rows = -(-len(layers) // 4)
    figure = Figure(figsize=(13, 3.4 * n_rows + 0.4), layout="constrained")
    figure.suptitle(f"Squared singular values of the kernels in use, over the largest; {title}")
    grid = figure.subplots(n_rows, -(-len(layers) // n_rows), squeeze=False, sharey=True)
    for axes, layer in zip(grid.flat, layers, strict=False):
        for method, values in spectra.items():
            squares = np.square(values[layer]) / np.square(values[layer][0])
            axes.plot(np.arange(1, len(squares) + 1), squares, label=method,
                      color=colours[method], lw=2 if method == "SN" else 1.2)  # fmt: skip
        axes.set(title=layer.removesuffix("/kernel"), xlabel="index", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(layers) :]:
        axes.axis("off")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)


def save_norms(path: Path, norms: dict[str, list[dict[str, float]]], title: str) -> None:
    """True spectral norm of every kernel in use over training, by method (figure 9 for SN).

    Args:
      path: of the PNG file.
      norms: method -> rows of step and norm by layer.
      title: what was run.
    """
    n_rows = -(-len(norms) // 4)
    figure = Figure(figsize=(14, 3.3 * n_rows + 0.4), layout="constrained")
    figure.suptitle(rf"True $\sigma$ of the kernels in use; {title}")
    grid = figure.subplots(n_rows, -(-len(norms) // n_rows), squeeze=False)
    for axes, (method, rows) in zip(grid.flat, norms.items(), strict=False):
        layers = [name for name in rows[0] if name != "step"]
        for layer, colour in zip(
            layers, colormaps["plasma"](np.linspace(0, 0.9, len(layers))), strict=True
        ):
            axes.plot([row["step"] for row in rows], [row[layer] for row in rows], color=colour,
                      lw=1.2, label=layer.removesuffix("/kernel"))  # fmt: skip
        axes.set(title=method, xlabel="generator updates")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(norms) :]:
        axes.axis("off")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)


def save_times(path: Path, times: dict[str, dict[str, Any]], title: str) -> None:
    """Time of a generator update with its discriminator updates, over none's (figure 10).

    Args:
      path: of the PNG file.
      times: method -> ratio, its quartiles, and seconds per 100 updates.
      title: what was run.
    """
    figure = Figure(figsize=(2.5 + len(times), 4.5), layout="constrained")
    axes = figure.subplots()
    colours = _colours(list(times))
    for i, (method, time) in enumerate(times.items()):
        low, high = time["quartiles"]
        error = [[time["ratio"] - low], [high - time["ratio"]]]
        axes.bar(i, time["ratio"], color=colours[method], yerr=error, ecolor="0.4")
        axes.annotate(f"{time['seconds_per_100']:.1f} s", (i, high), ha="center", va="bottom",
                      xytext=(0, 2), textcoords="offset points")  # fmt: skip
    axes.axhline(1, color="0.5", ls="--", lw=1)
    axes.margins(y=0.1)  # for the text on the highest
    axes.set_xticks(range(len(times)), list(times), rotation=30, ha="right")
    axes.set(title=f"{title}\nseconds per 100 updates", ylabel="time over none's")
    figure.savefig(path, dpi=150)
