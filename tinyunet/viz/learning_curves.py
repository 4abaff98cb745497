"""The picture of a training: loss and Dice over the epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from tinyunet.viz.figure import GREY, line_style, panels, write


# Names are the data set's: a "$" in one begins no formula.
@matplotlib.rc_context({"text.parse_math": False})
def draw_learning_curves(path: Path | str, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the loss on the left, Dice on the right, and write a PNG atomically.

    Parameters
    ----------
    path : Path or str
        The file to make or replace.
    history : sequence of mapping
        One entry an epoch, one at least: ``epoch``, ``loss``, ``dice`` (of the training patches),
        and ``validation``, the scores of each class and region.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    figure, ((left, right),) = panels(9, 4.0, columns=2)
    epochs = [entry["epoch"] for entry in history]
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}

    left.plot(epochs, [entry["loss"] for entry in history], color="black", **style)
    left.set(title="Loss of the training patches", xlabel="epoch", ylabel="soft Dice + cross-entropy")
    left.set_ylim(bottom=0)

    validation = [entry["validation"]["regions"] or entry["validation"]["classes"] for entry in history]
    for index, name in enumerate(validation[0]):
        dice = [scores.get(name, math.nan) for scores in validation]
        label = f"{name}, validation ({dice[-1]:.2f})"
        right.plot(epochs, dice, label=label, **line_style(index), **style)
    patches = [entry["dice"] for entry in history]
    label = f"all but background, training patches ({patches[-1]:.2f})"
    style |= {"linestyle": "--", "linewidth": 1.2, "markersize": 2.0}
    right.plot(epochs, patches, color=GREY, label=label, **style)
    right.set(title="Dice", xlabel="epoch", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)

    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    write(figure, path, format="png")
