"""The picture of a benchmark."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.bench.timing import Row


def save_ratios(path: Path, rows: list[Row], device: str) -> None:
    """Ours over the peer's, one bar per comparison, on a logarithmic scale.

    Args:
      path: of the PNG file.
      rows: those without a ratio are left out.
      device: for the title.
    """
    rows = [row for row in rows if row.ratio is not None][::-1]
    figure = Figure(figsize=(10, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = np.array([row.ratio for row in rows])
    spread = np.array([row.spread or (row.ratio, row.ratio) for row in rows])
    colours = [{None: "0.6", True: "tab:green", False: "tab:red"}[row.met] for row in rows]
    places = np.arange(len(rows))
    # Bars from 1: to the left is better.
    axes.barh(places, np.log2(ratios), color=colours, height=0.6)
    error = np.abs(np.log2(spread).T - np.log2(ratios))
    axes.errorbar(np.log2(ratios), places, xerr=error, fmt="none", color="black", lw=1)
    for place, row in zip(places, rows, strict=True):
        if row.target is not None:
            axes.plot([np.log2(row.target)] * 2, [place - 0.4, place + 0.4], color="black", lw=2)
        axes.annotate(f" {row.ratio:.2f}", (max(0, np.log2(row.ratio)), place), va="center")
    axes.axvline(0, color="black", lw=0.8)
    ticks = np.arange(
        np.floor(min(-1, np.log2(spread).min())), np.ceil(max(1, np.log2(spread).max())) + 1
    )
    axes.set_xticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
    axes.set_yticks(places, [f"{row.suite}: {row.case}\nvs {row.peer_name}" for row in rows],
                    fontsize=7)  # fmt: skip
    axes.set(title=f"Time or size of sn_jax / that of the peer ({device})",
             xlabel="ratio: left of 1 is better; black line: target")  # fmt: skip
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
