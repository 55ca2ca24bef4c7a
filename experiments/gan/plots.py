"""The pictures of a run (samples; losses and spectral norms over training) and of a table."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pictures import picture


@picture(11, 6)
def save_samples(figure: Figure, fake: np.ndarray, real: np.ndarray, title: str) -> None:
    """Two grids of ten by ten images, (n, h, w, c) in [-1, 1], generated and real: the first
    hundred, none are chosen."""
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


@picture(7, 4.5)
def save_kid(figure: Figure, rows: list[dict[str, Any]], title: str) -> None:
    """KID over training, a line for each row of a table that has it: its method and setting."""
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots()
    rows = [row for row in rows if "kid_on_the_way" in row]
    colours = _colours([*dict.fromkeys(row["method"] for row in rows)])
    settings = sorted({row["setting"] for row in rows})
    for row in rows:
        axes.plot(
            *zip(*row["kid_on_the_way"]["points"], strict=True),
            marker="o", ms=4, linestyle=("-", "--", ":", "-.")[settings.index(row["setting"]) % 4],
            color=colours[row["method"]], label=f"{row['method']}, setting {row['setting']}",
        )  # fmt: skip
    images = rows[0]["kid_on_the_way"]["images"]
    axes.set(xlabel="generator updates", ylabel=f"KID of {images} images", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


@picture(7, 4.5)
def save_fid(figure: Figure, rows: list[dict[str, Any]], title: str) -> None:
    """FID over training, from fid.jsonl: a line for every pair of numbers of images."""
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots()
    for n_real, n_fake in dict.fromkeys((row["n_real"], row["n_fake"]) for row in rows):
        points = [(row["step"], row["fid"]) for row in rows
                  if (row["n_real"], row["n_fake"]) == (n_real, n_fake)]  # fmt: skip
        axes.plot(*zip(*sorted(points), strict=True), "o-", lw=1.2, ms=4,
                  label=f"{n_real} real, {n_fake} generated")  # fmt: skip
    axes.set(xlabel="generator updates", ylabel="FID", yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _by_layer(axes: Axes, steps: list[int], norms: list[dict[str, float]]) -> None:
    """A line over the steps for each layer, coloured by depth."""
    layers = [name for name in norms[0] if name != "step"]
    colours = colormaps["plasma"](np.linspace(0, 0.9, len(layers)))
    for layer, colour in zip(layers, colours, strict=True):
        axes.plot(steps, [row[layer] for row in norms], label=layer.removesuffix("/kernel"),
                  color=colour, lw=1.2)  # fmt: skip


@picture(10, 4.5)
def save_curves(figure: Figure, rows: list[dict[str, Any]], title: str) -> None:
    """From metrics.jsonl: losses, sigma hat of every W if estimated, true sigma of every W bar
    (the paper's figure 9)."""
    steps = [row["step"] for row in rows]
    norms = {
        "sigma_hat": r"Estimate $\hat\sigma(W)$ of the raw kernels",
        "sigma_bar": r"True $\sigma(\bar W)$ of the kernels in use, by SVD",
    }
    norms = {name: axes_title for name, axes_title in norms.items() if rows[0][name]}
    figure.set_figwidth(5 + 5 * len(norms))
    figure.suptitle(title)
    losses, *spectra = figure.subplots(1, 1 + len(norms))
    for name, label in [("loss_d", "discriminator"), ("loss_g", "generator")]:
        losses.plot(steps, [row[name] for row in rows], label=label, lw=1)
    losses.set(title="Losses, of one batch each", ylabel="loss")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside left center")
    for axes, (name, axes_title) in zip(spectra, norms.items(), strict=True):
        _by_layer(axes, steps, [row[name] for row in rows])
        axes.set(title=axes_title, ylabel="spectral norm")
    figure.legend(*spectra[-1].get_legend_handles_labels(), loc="outside right center")
    for axes in (losses, *spectra):
        axes.set_xlabel("generator updates")
        axes.grid(alpha=0.3)


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


@picture(3, 5)
def save_robustness(figure: Figure, rows: list[dict[str, Any]], title: str) -> None:
    """The Fréchet distance of every row of results.json over the settings (the paper's figures 1
    and 2); hollow marks are of rows whose samples lack a class."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    settings = sorted({row["setting"] for row in rows})
    colours = _colours(methods)
    figure.set_figwidth(3 + 2.2 * len(settings))
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


def _grid(figure: Figure, n: int, height: float, title: str, sharey: bool = False) -> list[Axes]:
    """So many panels in rows of at most four, each of this height."""
    n_rows = -(-n // 4)
    figure.set_figheight(height * n_rows + 0.4)
    figure.suptitle(title)
    panels = figure.subplots(n_rows, -(-n // n_rows), squeeze=False, sharey=sharey).flat
    for axes in panels[n:]:
        axes.axis("off")
    for axes in panels[:n]:
        axes.grid(alpha=0.3)
    return list(panels[:n])


@picture(13, 3.8)
def save_spectra(figure: Figure, spectra: dict[str, dict[str, list[float]]], title: str) -> None:
    """Squared singular values, method -> layer -> from the largest to the least, over the largest
    (the paper's figure 3)."""
    layers = list(next(iter(spectra.values())))
    colours = _colours(list(spectra))
    # A matrix with one column has one singular value, which says nothing here.
    layers = [layer for layer in layers if len(next(iter(spectra.values()))[layer]) > 1]
    title = f"Squared singular values of the kernels in use, over the largest; {title}"
    panels = _grid(figure, len(layers), 3.4, title, sharey=True)
    for axes, layer in zip(panels, layers, strict=True):
        for method, values in spectra.items():
            squares = np.square(values[layer]) / np.square(values[layer][0])
            axes.plot(np.arange(1, len(squares) + 1), squares, label=method,
                      color=colours[method], lw=2 if method == "SN" else 1.2)  # fmt: skip
        axes.set(title=layer.removesuffix("/kernel"), xlabel="index", ylim=(0, 1.02))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


@picture(14, 3.7)
def save_norms(figure: Figure, norms: dict[str, list[dict[str, float]]], title: str) -> None:
    """True norm of every kernel in use over training, from method -> rows of step and norm by
    layer (figure 9 for SN)."""
    title = rf"True $\sigma$ of the kernels in use; {title}"
    panels = _grid(figure, len(norms), 3.3, title)
    for axes, (method, rows) in zip(panels, norms.items(), strict=True):
        _by_layer(axes, [row["step"] for row in rows], rows)
        axes.set(title=method, xlabel="generator updates")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


@picture(2.5, 4.5)
def save_times(figure: Figure, times: dict[str, dict[str, Any]], title: str) -> None:
    """Time of a generator update with its discriminator updates, over none's (figure 10), from
    method -> ratio, its quartiles, and seconds per 100 updates."""
    figure.set_figwidth(2.5 + len(times))
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
