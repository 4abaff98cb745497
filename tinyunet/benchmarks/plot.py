"""Pictures of the tables, drawn with matplotlib and written atomically."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyunet.viz.colours import GREY, line_style, of_line
from tinyunet.viz.figure import write

_OURS = of_line(0)


class Bar(NamedTuple):
    """One bar.

    Attributes
    ----------
    low, high : float
        Ends of the whisker.
    note : str
        Written behind the bar.
    ours : bool
        Whether it is this project's, and so in colour.
    """

    label: str
    value: float
    low: float
    high: float
    note: str
    ours: bool


def draw_bars(path: Path | str, title: str, unit: str, bars: Sequence[Bar]) -> None:
    """Draw horizontal bars, the first on top.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    figure, axes = _figure(8, 1.3 + 0.36 * len(bars))
    values = [bar.value for bar in bars]
    whiskers = [[b.value - b.low for b in bars], [b.high - b.value for b in bars]]
    axes.barh(
        range(len(bars)),
        values,
        xerr=whiskers,
        color=[_OURS if bar.ours else GREY for bar in bars],
        height=0.66,
        error_kw={"ecolor": "0.25", "elinewidth": 1, "capsize": 2},
    )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    end = max(bar.high for bar in bars)
    for row, bar in enumerate(bars):
        axes.text(bar.high + 0.01 * end, row, bar.note, va="center", fontsize=9)
    axes.set_xlim(0, 1.22 * end)
    axes.set(xlabel=unit)
    axes.set_title(title, wrap=True)
    axes.grid(axis="x", color="0.9")
    write(figure, path)


def draw_scaling(path: Path | str, title: str, lines: Mapping[str, Mapping[int, float]]) -> None:
    """Draw how many times faster each system is on more threads.

    Parameters
    ----------
    lines : mapping of mapping
        For each system: threads, and times faster than on one.
    """
    figure, axes = _figure(6, 4)
    counts = sorted({count for line in lines.values() for count in line})
    axes.plot(counts, counts, color="0.7", linestyle="--", linewidth=1, label="all that is possible")
    for index, (name, line) in enumerate(lines.items()):
        axes.plot(list(line), list(line.values()), marker="o", label=name, **line_style(index))
    axes.set_xticks(counts)
    axes.set(xlabel="threads", ylabel="times faster than on one")
    axes.set_title(title, wrap=True)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    write(figure, path)


def draw_layers(
    path: Path | str,
    peak: float,
    layers: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> None:
    """Draw GFLOP/s by layer: a panel a direction, a line a rung or peer, and the peak.

    Parameters
    ----------
    peak : float
        GFLOP/s of one core.
    layers : sequence of str
    panels : mapping of mapping
        For each direction and rung: GFLOP/s on each layer, None where there is none.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.6), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (direction, rungs) in zip(all_axes, panels.items(), strict=True):
        axes.axhline(peak, color="0.7", linestyle="--", linewidth=1)
        note = {"ha": "right", "va": "bottom", "fontsize": 8, "color": "0.4"}
        axes.text(len(layers) - 0.5, peak, "peak of one core", **note)
        for index, (name, speeds) in enumerate(rungs.items()):
            shown = [float("nan") if speed is None else speed for speed in speeds]
            axes.plot(shown, marker="o", markersize=4, label=name, **line_style(index))
        axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        axes.set(title=direction, xlim=(-0.5, len(layers) - 0.5))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    # When all is drawn: it is the same for all.
    all_axes[0].set_ylim(bottom=0)
    all_axes[0].set_ylabel("GFLOP/s of one core")
    # Below, once for all panels: within one it would hide points.
    handles, names = all_axes[0].get_legend_handles_labels()
    style: dict[str, Any] = {"ncols": len(names), "handlelength": 3.5, "frameon": False}
    figure.legend(handles, names, loc="outside lower center", fontsize=8, **style)
    write(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # No pyplot: it looks for a screen, and keeps figures alive.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes: Any = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes
