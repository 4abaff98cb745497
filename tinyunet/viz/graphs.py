"""A graph as a picture: execution goes to the right, resolution goes up, so a U-Net draws its U.

Each box is a node, each line a value that is read; a value that is kept for long is a long line. Boxes
are as high as the bytes they move, and grey where the eager operator runs.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tinyunet.files import atomic
from tinyunet.graph.cost import nbytes
from tinyunet.graph.ir import PLAIN, Graph, Node
from tinyunet.graph.show import Stage, is_unfused, main_value
from tinyunet.viz.colours import GREY, of_line

_FAMILIES = ("convolution", "batch_norm", "pool", "concatenation", "reorder")


def draw_graph(path: Path | str, stages: Sequence[Stage]) -> None:
    """Draw the first and the last of some stages one above the other, and write a PNG atomically.

    Parameters
    ----------
    path : Path or str
        The file to make or replace.
    stages : sequence of Stage
        From ``Compiled.stages``.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    shown = [stages[0], stages[-1]] if len(stages) > 1 else list(stages)
    figure = Figure(figsize=(14, 4.2 * len(shown)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(len(item.graph.nodes) for item in shown)
    for axes, item in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _draw_nodes(axes, item.graph)
        nodes, _, moved, _ = item.figures
        axes.set_title(
            f"{item.name}: {nodes} nodes, {moved / 1e6:.0f} MB moved, arena {item.arena / 1e6:.0f} MB",
            loc="left",
        )
        axes.set_xlim(-1, longest)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_nodes(axes: Axes, graph: Graph) -> None:
    levels = [_level(node, graph) for node in graph.nodes]
    bottom = min((level for level in levels if level is not None), default=0.0) - 1
    heights = [bottom if level is None else level for level in levels]
    made_at = {v: at for at, node in enumerate(graph.nodes) for v in node.outputs.values()}
    lines = [
        ((made_at[value], heights[made_at[value]]), (at, heights[at]))
        for at, node in enumerate(graph.nodes)
        for value in node.inputs.values()
        if value in made_at
    ]
    axes.add_collection(LineCollection(lines, colors="0.8", linewidths=0.6, zorder=1))
    most = max(nbytes(node, graph) for node in graph.nodes) or 1
    for at, (node, height) in enumerate(zip(graph.nodes, heights, strict=True)):
        size = 0.15 + 1.2 * nbytes(node, graph) / most
        axes.add_patch(
            Rectangle(
                (at - 0.4, height - size / 2),
                0.8,
                size,
                facecolor=_colour(node),
                edgecolor=GREY if is_unfused(node) else "black",
                linewidth=0.6,
                zorder=2,
            )
        )
    axes.set_ylim(min(heights) - 1, max(heights) + 1)
    axes.set_yticks(sorted(set(heights)))
    axes.set_ylabel("log2 of voxels along an axis")
    axes.set_xlabel("order of execution")
    axes.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        Line2D([], [], marker="s", linestyle="", color=of_line(i), label=name)
        for i, name in enumerate(_FAMILIES)
    ]
    handles.append(Line2D([], [], marker="s", linestyle="", color="0.75", label="other"))
    axes.legend(handles=handles, ncols=len(handles), fontsize=7, frameon=False, loc="lower right")


def _level(node: Node, graph: Graph) -> float | None:
    """How fine the volume is that a node makes, or reads if it makes none."""
    shapes = [graph.values[value].shape for value in node.inputs.values()]
    value = main_value(node, graph)
    volumes = [value.shape] if value.layout != PLAIN else [s for s in shapes if len(s) == 5]
    voxels = max((math.prod(shape[1:4]) for shape in volumes), default=0)
    return round(math.log2(voxels) / 3, 1) if voxels else None


def _colour(node: Node) -> str:
    for index, family in enumerate(_FAMILIES):
        if family in node.op:
            return of_line(index)
    return "0.75"
