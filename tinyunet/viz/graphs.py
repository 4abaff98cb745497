"""A graph as a picture: execution goes to the right, resolution goes up, so a U-Net draws its U.

Each box is a node, each line a volume that is read; one that is kept for long is a long line. Boxes are
as high as the bytes they move, and have a grey edge where the eager operator runs. Nodes that neither read
nor write a volume, such as packing weights, have a row of their own below the others.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tinyunet.compiler.ir import PLAIN, Graph, Node
from tinyunet.compiler.operators import normalization
from tinyunet.compiler.passes import Stage
from tinyunet.compiler.show import figures, is_unfused, main_value, nbytes
from tinyunet.viz.figure import GREY, line_colour, panels, write

_FAMILIES = ("convolution", "norm", "pool", "concatenation", "reorder")
_NORMS = {name for operator in normalization.OPERATORS for name in (operator.name, *operator.kernels)}
_OTHER = "0.75"


def draw_graph(path: Path | str, stages: Sequence[Stage]) -> None:
    """Draw the first and the last of ``Compiled.stages`` one above the other, and write them atomically.

    The ending of ``path`` is one of ``tinyunet.viz.FORMATS``. OSError if the file cannot be written.
    """
    shown = [stages[0], stages[-1]] if len(stages) > 1 else list(stages)
    figure, grid = panels(14, 4.2 * len(shown), len(shown), grid="")
    longest = max(len(item.graph.nodes) for item in shown)
    for axes, item in zip(grid[:, 0], shown, strict=True):
        _draw_nodes(axes, item.graph)
        found = figures(item)
        moved, arena = f"{found.moved / 1e6:.0f} MB moved", f"arena {found.arena / 1e6:.0f} MB"
        axes.set_title(f"{item.name}: {found.nodes} nodes, {moved}, {arena}", loc="left")
        axes.set_xlim(-1, longest)
    write(figure, path)


def _draw_nodes(axes: Axes, graph: Graph) -> None:
    levels = [_level(node, graph) for node in graph.nodes]
    bottom = min((level for level in levels if level is not None), default=0.0) - 1.5
    heights = [bottom if level is None else level for level in levels]
    made_at = {v: at for at, node in enumerate(graph.nodes) for v in node.outputs.values()}
    lines = [
        ((made_at[value], heights[made_at[value]]), (at, heights[at]))
        for at, node in enumerate(graph.nodes)
        for value in node.inputs.values()
        if value in made_at and graph.values[value].layout != PLAIN
    ]
    axes.add_collection(LineCollection(lines, colors="0.8", linewidths=0.6, zorder=1))
    most = max(nbytes(node, graph) for node in graph.nodes) or 1
    for at, (node, height) in enumerate(zip(graph.nodes, heights, strict=True)):
        size = 0.15 + 1.2 * nbytes(node, graph) / most
        box = Rectangle((at - 0.4, height - size / 2), 0.8, size, linewidth=0.6, zorder=2)
        box.set(facecolor=_colour(node), edgecolor=_edge(node))
        axes.add_patch(box)
    axes.set_ylim(min(heights) - 1, max(heights) + 1)
    rows = sorted(set(heights))
    axes.set_yticks(rows, ["no volume" if row == bottom else f"{row:g}" for row in rows])
    axes.set_ylabel("log2 of voxels along an axis")
    axes.set_xlabel("order of execution; boxes are as high as the bytes they move")
    place: dict[str, Any] = {"fontsize": 7, "frameon": False, "loc": "lower right", "bbox_to_anchor": (1, 1)}
    axes.legend(handles=_legend(graph.nodes), ncols=len(_FAMILIES) + 3, **place)


def _legend(nodes: Sequence[Node]) -> list[Line2D]:
    """Legend of the families and edges that the nodes have."""
    colours = {_family(node): _colour(node) for node in nodes}
    order = [name for name in (*_FAMILIES, "other") if name in colours]
    boxes = [(name, colours[name], colours[name]) for name in order]
    edges = {_edge(node) for node in nodes}
    known = (("fused kernel", "black"), ("eager operator", GREY))
    boxes += [(f"edge: {name}", "white", edge) for name, edge in known if edge in edges]
    return [
        Line2D([], [], marker="s", linestyle="", label=name, color=face, markeredgecolor=edge)
        for name, face, edge in boxes
    ]


def _level(node: Node, graph: Graph) -> float | None:
    """How fine the volume is that a node makes, or the finest that it reads if it makes none."""
    read = [graph.values[name] for name in node.inputs.values()]
    made = main_value(node, graph)
    volumes = [value for value in ([made] if made.layout != PLAIN else read) if value.layout != PLAIN]
    voxels = max((math.prod(value.shape[1:4]) for value in volumes), default=0)
    return round(math.log2(voxels) / 3, 1) if voxels else None


def _family(node: Node) -> str:
    if node.op.removesuffix("_backward") in _NORMS:
        return "norm"
    return next((family for family in _FAMILIES if family in node.op), "other")


def _colour(node: Node) -> str:
    family = _family(node)
    return _OTHER if family == "other" else line_colour(_FAMILIES.index(family))


def _edge(node: Node) -> str:
    return GREY if is_unfused(node) else "black"
