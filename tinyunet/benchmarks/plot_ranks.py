"""Pictures of what ranks do: allreduces and scaling."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinyunet.viz.colours import of_line
from tinyunet.viz.figure import write


def draw_allreduce(
    path: Path | str,
    title: str,
    sizes: Sequence[int],
    times: Mapping[str, Sequence[float]],
    bound: Sequence[float],
) -> None:
    """Draw time and GB/s over the size of the array, a line an algorithm.

    Parameters
    ----------
    sizes : sequence of int
        Bytes.
    times : mapping of sequence
        Milliseconds of each algorithm.
    bound : sequence of float
        Milliseconds that the least that must be sent takes.
    """
    figure, (left, right) = _panels(2)
    for index, (name, line) in enumerate(times.items()):
        speed = [size / ms / 1e6 for size, ms in zip(sizes, line, strict=True)]
        left.plot(sizes, line, marker="o", markersize=4, color=of_line(index), label=name)
        right.plot(sizes, speed, marker="o", markersize=4, color=of_line(index), label=name)
    best = [size / ms / 1e6 for size, ms in zip(sizes, bound, strict=True)]
    for axes, line in ((left, bound), (right, best)):
        axes.plot(sizes, line, color="0.4", linestyle="--", label="bound: 2 (N - 1) / N of a plain exchange")
        axes.set_xscale("log")
        axes.set_xlabel("bytes")
    left.set_yscale("log")
    left.set(title=title, ylabel="ms")
    right.set(ylabel="GB/s: bytes of the array a second")
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    write(figure, path)


def draw_efficiency(
    path: Path | str, ranks: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draw predicted efficiency over the number of ranks: a panel a network, a line a way."""
    figure, all_axes = _panels(len(panels))
    for axes, (network, lines) in zip(all_axes, panels.items(), strict=True):
        for index, (name, line) in enumerate(lines.items()):
            style = "--" if name.endswith("no overlap") else "-"
            axes.plot(ranks, line, style, color=of_line(index // 2), label=name)
        axes.set_xscale("log", base=2)
        axes.set(title=network, xlabel="ranks", ylim=(0, 1.03))
        axes.set_xticks(ranks[1::2], [str(n) for n in ranks[1::2]])
    all_axes[0].set_ylabel("efficiency of weak scaling, predicted")
    all_axes[0].legend(frameon=False, fontsize=8)
    write(figure, path)


def _panels(count: int) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(4.6 * count, 4.2), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes
