"""The pictures of a run: a grid of samples, and its losses and spectral norms over training."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def save_samples(path: Path, fake: np.ndarray, real: np.ndarray, title: str) -> None:
    """Two grids of ten by ten images side by side: generated, and real.

    Args:
      path: of the PNG file.
      fake: (n >= 100, h, w, c) in [-1, 1]; the first hundred are shown, none are chosen.
      real: likewise.
      title: what was run.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, images, name in zip(
        figure.subplots(1, 2), (fake, real), ("Generated", "Real, held out"), strict=True
    ):
        # A border between the images; nearest-neighbour, so that single pixels can be seen.
        tiles = np.pad(images[:100] / 2 + 0.5, [(0, 0), (1, 0), (1, 0), (0, 0)])
        _, h, w, c = tiles.shape
        grid = tiles.reshape(10, 10, h, w, c).swapaxes(1, 2).reshape(10 * h, 10 * w, c)
        grid = np.pad(grid, [(0, 1), (0, 1), (0, 0)])
        axes.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
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
