"""One colour for each class and region in every picture, told apart also by the colour-blind.

Source: Okabe and Ito, "Color Universal Design" (2008).
"""

from typing import Any

GREY = "#808080"
_SKY, _YELLOW, _VERMILION = "#56B4E9", "#F0E442", "#D55E00"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"

#: Of classes 1, 2, 3, ... over grey images: for brain tumours edema, non-enhancing, enhancing.
CLASSES = (_SKY, _YELLOW, _VERMILION, _GREEN, _PURPLE, _ORANGE, _BLUE)
#: Of lines on white: for brain tumours whole tumour, tumour core, enhancing. Darker where the
#: class it grows from is too pale for a line.
LINES = (_BLUE, _ORANGE, _VERMILION, _GREEN, _PURPLE, _SKY, GREY)


def of_class(label: int) -> str:
    """Return the colour of a class from 1 on; they come again after the seventh."""
    return CLASSES[(label - 1) % len(CLASSES)]


def of_line(index: int) -> str:
    """Return the colour of a line, counted from 0; they come again after the seventh."""
    return LINES[index % len(LINES)]


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of a line on white: no two of the first 28 look the same."""
    dashes = ("-", "--", ":", "-.")[index // len(LINES) % 4]
    return {"color": of_line(index), "linestyle": dashes}
