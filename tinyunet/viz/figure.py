"""Colours, panels and lines of all pictures, and the function that writes pictures.

Each class and region has one colour in every picture; the colour-blind can distinguish them, too.

Source: Okabe and Ito, "Color Universal Design" (2008).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

from tinyunet.common.files import SIGNATURE, atomic
from tinyunet.common.terminal import printable
from tinyunet.viz import FORMATS

GREY = "#808080"
_SKY, _YELLOW, _VERMILION = "#56B4E9", "#F0E442", "#D55E00"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"

#: Of classes 1, 2, 3, ... over grey images: for brain tumours edema, non-enhancing, enhancing.
CLASSES = (_SKY, _YELLOW, _VERMILION, _GREEN, _PURPLE, _ORANGE, _BLUE)
#: Of lines on white: for brain tumours whole tumour, tumour core, enhancing. Darker where the
#: class it grows from is too pale for a line.
LINES = (_BLUE, _ORANGE, _VERMILION, _GREEN, _PURPLE, _SKY, GREY)
#: Style of a line that no measured one crosses.
BOUND = {"color": "0.5", "linestyle": "--", "linewidth": 1, "marker": ""}


def class_colour(label: int) -> str:
    """Return the colour of a class from 1 on; they repeat after the seventh."""
    return CLASSES[(label - 1) % len(CLASSES)]


def line_colour(index: int) -> str:
    """Return the colour of a line, counted from 0; they repeat after the seventh."""
    return LINES[index % len(LINES)]


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of a line on white: no two of the first 28 look the same."""
    dashes = ("-", "--", ":", "-.")[index // len(LINES) % 4]
    return {"color": line_colour(index), "linestyle": dashes}


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, grid: str = "both", **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of so many inches, and an array (rows, columns) of its axes.

    ``grid`` names the axes that have grid lines: "x", "y", "both" or "". ``options`` are of
    ``Figure.subplots``.
    """
    # No pyplot: it looks for a display, and keeps figures alive.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in all_axes.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        if grid:
            axes.grid(axis=grid, color="0.9")
    return figure, all_axes


def draw_lines(
    axes: Axes,
    x: ArrayLike,
    lines: Mapping[str, ArrayLike],
    styles: Mapping[str, Mapping[str, Any]],
    **about: Any,
) -> None:
    """Draw lines over ``x`` by their names, each in its style or the next one free.

    ``about`` is for ``Axes.set``: a title, labels, scales.
    """
    for index, (name, y) in enumerate(lines.items()):
        style = {"marker": "o", "markersize": 4.0, **line_style(index), **styles.get(name, {})}
        axes.plot(x, y, label=name, **style)
    axes.set(**about)


def write(figure: Figure, path: Path | str, **options: Any) -> None:
    """Write a figure atomically; without a ``format`` the ending of the name decides it.

    Names in it may hold what no font has: bytes that are no text, control characters. ``options`` are of
    ``Figure.savefig``. OSError if the file cannot be written.
    """
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text(), keep="\n"))
    options.setdefault("format", Path(path).suffix.removeprefix(".") or None)
    # So that a later run knows that it may replace the picture.
    field = "Software" if options["format"] == "png" else "Creator"
    signs = f".{options['format']}" in FORMATS
    options.setdefault("metadata", {field: SIGNATURE} if signs else None)
    with atomic(path) as file:
        figure.savefig(file, **options)
