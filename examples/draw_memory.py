"""Draw where a Winograd convolution keeps what: brick, slab, plane, point, tile, slot and register tile.

    python examples/draw_memory.py [FILE.png]

The words are those of docs/glossary.md; sizes are of F(4, 4, 4): 36 planes, 6 points along w.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

INK, PALE, LIT, DEEP = "#334155", "#e2e8f0", "#fbbf24", "#2563eb"


def cuboid(axes: Axes, x: float, y: float, wide: float, high: float, deep: float, colour: str) -> None:
    """A box with its front at (x, y); depth runs up and to the right."""
    dx, dy = 0.45 * deep, 0.3 * deep
    front = [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]
    top = [(x, y + high), (x + dx, y + high + dy), (x + wide + dx, y + high + dy), (x + wide, y + high)]
    side = [(x + wide, y), (x + wide + dx, y + dy), (x + wide + dx, y + high + dy), (x + wide, y + high)]
    for face in (front, top, side):
        axes.add_patch(Polygon(face, facecolor=colour, edgecolor=INK, linewidth=0.7))


def grid(
    axes: Axes, x: float, y: float, rows: int, cols: int, size: tuple[float, float], colour: str
) -> None:
    """``rows`` by ``cols`` rectangles with their lower left corner at (x, y)."""
    wide, high = size
    for row in range(rows):
        for col in range(cols):
            corner = x + col * wide, y + row * high
            axes.add_patch(Rectangle(corner, wide, high, facecolor=colour, edgecolor=INK, linewidth=0.6))


def title(axes: Axes, heading: str, text: str) -> None:
    """A heading, and below it what it means."""
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.text(0, -0.06, text, transform=axes.transAxes, va="top", fontsize=8.5, color=INK)


def brick(axes: Axes) -> None:
    """A volume, cut into bricks of whole rows."""
    for plane in (2, 1, 0):
        for row in (0, 1, 2):
            lit = (plane, row) == (0, 1)
            cuboid(axes, 0.9 * plane, 1.5 * row + 0.6 * plane, 5, 1.5, 2, LIT if lit else PALE)
    axes.text(2.5, 2.25, "brick", ha="center", va="center", fontsize=10)
    title(
        axes,
        "main memory: the output",
        "A brick is some planes by some rows, at full width.\nA thread computes one brick at a time.",
    )


def slab(axes: Axes) -> None:
    """The planes of points of a slab, one of them lit, with its tiles."""
    for sheet in range(9, -1, -1):
        corner = (0.32 * sheet, 0.26 * sheet)
        lit = sheet == 0
        axes.add_patch(Rectangle(corner, 5, 3, facecolor=LIT if lit else PALE, edgecolor=INK, linewidth=0.7))
    grid(axes, 0, 0, 3, 6, (5 / 6, 1), "none")
    axes.add_patch(Rectangle((5 / 6, 1), 5 / 6, 1, facecolor=DEEP, edgecolor=INK))
    axes.annotate(
        "one tile's share",
        (1.25, 1.5),
        (0.2, -0.9),
        fontsize=8.5,
        arrowprops={"arrowstyle": "-", "color": INK},
    )
    axes.text(6.1, 5.45, "36 planes", fontsize=8.5)
    title(
        axes,
        "second-level cache: the slab",
        "The packed source of the brick, transformed along d and h.\n"
        "Each plane belongs to one pair of points along d and h.",
    )


def slots(axes: Axes) -> None:
    """The slots of one plane's points along w: M one before V."""
    for point in range(7):
        colour = "#fecaca" if point == 0 else LIT
        grid(axes, 1.15 * point, 0, 4, 1, (1, 0.8), colour)
        axes.text(1.15 * point + 0.5, 3.5, "M" if point == 0 else f"V {point - 1}", ha="center", fontsize=8.5)
    axes.add_patch(Rectangle((1.15 * 3, 1.6), 1, 0.8, facecolor=DEEP, edgecolor=INK))
    axes.annotate("", (0.5, 4.3), (1.65, 4.3), arrowprops={"arrowstyle": "->", "color": INK})
    axes.text(1.9, 4.2, "product at a point, one slot back", fontsize=8.5)
    axes.text(4.05, -0.55, "a slot: all tiles of one point, a cache line each", ha="center", fontsize=8.5)
    title(
        axes,
        "first-level cache: slots",
        "\nA plane is transformed along w: six points, six slots.\n"
        "An odd number of cache lines from slot to slot uses all sets.",
    )


def registers(axes: Axes) -> None:
    """The register tile of the product at one point."""
    grid(axes, 0, 0, 6, 2, (2, 0.6), "#bbf7d0")
    for row in range(6):
        axes.text(-0.15, 0.6 * row + 0.3, f"tile {5 - row}", ha="right", va="center", fontsize=8)
    for col, text in enumerate(("channels 0..15", "channels 16..31")):
        axes.text(2 * col + 1, 3.75, text, ha="center", fontsize=8)
    title(
        axes,
        "registers: the register tile",
        "Sums over input channels at one point.\nrows x cols multiply-adds for rows + cols loads.",
    )


def main(path: str) -> None:
    """Draw the four places side by side."""
    figure, places = plt.subplots(1, 4, figsize=(15, 4.2))
    limits = (
        ((-0.2, 8.2), (-0.2, 6.8)),
        ((-0.2, 8.4), (-1.3, 5.9)),
        ((-0.2, 8.3), (-1.0, 5.0)),
        ((-1.3, 4.2), (-0.3, 4.3)),
    )
    for axes, draw, (x, y) in zip(places, (brick, slab, slots, registers), limits, strict=True):
        axes.set(xlim=x, ylim=y)
        axes.axis("off")
        draw(axes)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.2, wspace=0.08)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "memory-words.png")
