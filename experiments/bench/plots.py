"""The pictures of a benchmark: of its rows, with the device in the title."""

import numpy as np
from matplotlib.figure import Figure

from experiments.bench.timing import Row
from experiments.pictures import picture

LEAST = 1 / 64


@picture(10, 1.5)
def save_ratios(figure: Figure, rows: list[Row], device: str) -> None:
    """Ours over the peer's, one bar per comparison that has a ratio, on a logarithmic scale."""
    rows = [row for row in rows if row.ratio is not None][::-1]
    figure.set_figheight(1.5 + 0.32 * len(rows))
    axes = figure.subplots()
    # A ratio of bytes or of added time can be 0 or less: drawn at the edge.
    ratios = np.maximum([row.ratio for row in rows], LEAST)
    spread = np.maximum([row.spread or (row.ratio, row.ratio) for row in rows], LEAST)
    colours = [{None: "0.6", True: "tab:green", False: "tab:red"}[row.met] for row in rows]
    places = np.arange(len(rows))
    # Bars from 1: to the left is better.
    axes.barh(places, np.log2(ratios), color=colours, height=0.6)
    error = np.abs(np.log2(spread).T - np.log2(ratios))
    axes.errorbar(np.log2(ratios), places, xerr=error, fmt="none", color="black", lw=1)
    for place, row, right in zip(places, rows, np.log2(spread).max(1), strict=True):
        if row.target is not None:
            axes.plot([np.log2(row.target)] * 2, [place - 0.4, place + 0.4], color="black", lw=2)
        right = max(0, right, np.log2(row.target or 1))
        axes.annotate(f" {row.ratio:.2f}", (right, place), va="center")
    axes.axvline(0, color="black", lw=0.8)
    ticks = np.arange(
        np.floor(min(-1, np.log2(spread).min())), np.ceil(max(1, np.log2(spread).max())) + 1
    )
    axes.set_xticks(ticks, [f"1/{2**-tick:g}" if tick < 0 else f"{2**tick:g}" for tick in ticks])
    names = [f"{row.suite}: {row.case}\n{row.metric} vs {row.peer_name}" for row in rows]
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set(title=f"Time or size of sn_jax / that of the peer ({device})",
             xlabel="ratio: left of 1 is better; black line: target")  # fmt: skip
    axes.grid(axis="x", alpha=0.3)


@picture(10, 4.5)
def save_scaling(figure: Figure, rows: list[Row], device: str) -> None:
    """Of the suite "scaling": time of an update against the bytes that it reads, logarithmic."""
    panels = {"matrix": "side of one matrix", "leaves": "number of 64x64 matrices"}
    for axes, (kind, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        chosen = [row for row in rows if (row.suite, row.metric) == ("scaling", "ms")
                  and row.case.split()[0] == kind]  # fmt: skip
        if chosen:
            x = np.array([int(row.case.split()[1]) for row in chosen])
            ours, floor = np.array([(row.ours, row.peer) for row in chosen]).T
            axes.loglog(x, ours, "o-", label="sn_jax: one update")
            axes.loglog(x, floor, "s--", color="0.5", label=chosen[0].peer_name)
            # As the bytes grow, through the largest.
            bytes_ = (x / x[-1]) ** (2.0 if kind == "matrix" else 1.0)
            axes.loglog(x, ours[-1] * bytes_, ":", color="black", label="as the bytes")
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
            axes.legend()
        axes.set(xlabel=label, ylabel="milliseconds")
        axes.grid(alpha=0.3)
    figure.suptitle(f"Cost of an update of u, v and sigma ({device})")


@picture(8, 4.5)
def save_comm(figure: Figure, rows: list[Row], device: str) -> None:
    """Of "comm": bytes sent by a device against how many there are; hollow where fitted."""
    curves: dict[str, list[tuple[int, float, bool]]] = {}
    for row in rows:
        if (row.suite, row.metric) == ("comm", "bytes a device") and ", update, " in row.case:
            layout, _, devices = row.case.split(", ")
            curves.setdefault(layout, []).append(
                (int(devices.split()[0]), row.ours, devices.endswith("(fitted)"))
            )
    axes = figure.subplots()
    for layout, points in curves.items():
        x, y, is_fitted = (np.array(column) for column in zip(*points, strict=True))
        (line,) = axes.loglog(x[~is_fitted], y[~is_fitted], "o-", label=layout)
        axes.loglog(x[is_fitted], y[is_fitted], "o--", mfc="none", color=line.get_color())
    axes.set(title=f"One update of sigma (programs compiled on {device}; hollow: fitted)",
             xlabel="devices", ylabel="bytes a device sends for one kernel")  # fmt: skip
    ticks = sorted({x for points in curves.values() for x, *_ in points})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
