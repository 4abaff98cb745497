"""The picture of a training: loss and Dice over the epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from tinyunet.viz.figure import GREY, draw_lines, panels, write


# Names are the data set's: a "$" in one begins no formula.
@matplotlib.rc_context({"text.parse_math": False})
def draw_learning_curves(path: Path | str, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the loss on the left, Dice on the right, and write a PNG atomically; OSError if that fails.

    ``history`` has one entry an epoch, one at least: ``epoch``, ``loss``, ``dice`` (of the training
    patches), and ``validation``, the scores of each class and region.
    """
    figure, ((left, right),) = panels(9, 4.0, columns=2)
    epochs = [entry["epoch"] for entry in history]
    loss, patches = ([entry[name] for entry in history] for name in ("loss", "dice"))
    validation = [entry["validation"]["regions"] or entry["validation"]["classes"] for entry in history]
    title, label = "Loss of the training patches", "soft Dice + cross-entropy"
    draw_lines(left, epochs, {"": loss}, {"": {"color": "black"}}, title=title, ylabel=label, ylim=(0, None))

    lines = {}
    for name in validation[0]:
        dice = [scores.get(name, math.nan) for scores in validation]
        lines[f"{name}, validation ({dice[-1]:.2f})"] = dice
    label = f"all but background, training patches ({patches[-1]:.2f})"
    style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "markersize": 2.0}
    draw_lines(right, epochs, lines | {label: patches}, {label: style}, title="Dice", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    write(figure, path, format="png")
