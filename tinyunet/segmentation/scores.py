"""Dice of each class and region of a case, and a table of them for people to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.terminal import printable
from tinyunet.data.conventions import tumour_parts
from tinyunet.segmentation.metrics import dice_per_class, region_dice

#: ``{"classes": {name: Dice}, "regions": {name: Dice}}``; regions are empty where labels are not
#: those of brain tumours.
Scores = dict[str, dict[str, float]]

# Of a column: as the heading " classes " of a group, which may have one column only.
_LEAST_WIDTH = 9


def score(prediction: NDArray[np.uint8], labels: NDArray[np.uint8], names: Sequence[str]) -> Scores:
    """Compare a segmentation with the truth.

    Parameters
    ----------
    prediction, labels : ndarray, shape=(D, H, W), uint8
        Class of each voxel.
    names : sequence of str
        Name of each class; class 0 is the background and is not scored. There are regions where the
        names say unmistakably which class is which part of a tumour.

    Returns
    -------
    scores : dict
        Dice between 0 and 1; what an absent class or region scores is told in
        :mod:`tinyunet.segmentation.metrics`.
    """
    classes = dice_per_class(prediction, labels, len(names))
    parts = tumour_parts(names)
    as_parts = np.array(parts or (), np.uint8)
    regions = region_dice(as_parts[prediction], as_parts[labels]) if parts else {}
    return {
        "classes": {name: float(dice) for name, dice in zip(names[1:], classes[1:], strict=True)},
        "regions": {name: float(dice) for name, dice in regions.items()},
    }


def mean(scores: Sequence[Scores]) -> Scores:
    """Return the mean over cases of each class and region; ``scores`` holds one case at least."""
    return {
        group: {name: float(np.mean([case[group][name] for case in scores])) for name in entries}
        for group, entries in scores[0].items()
    }


def overall(scores: Scores) -> float:
    """Return one number to compare models by: the mean over regions, or over classes."""
    return float(np.mean(list((scores["regions"] or scores["classes"]).values())))


def summary(rows: Sequence[tuple[str, Scores]]) -> dict[str, Any]:
    """Return what is written to a file: mean Dice by class and region, and that of each case.

    Parameters
    ----------
    rows : sequence of (name of the case, its scores)
        One at least.

    Returns
    -------
    content : dict
        ``classes`` and ``regions``: means by name. ``cases``: the scores of each, by its name.
    """
    return {**mean([scores for _, scores in rows]), "cases": dict(rows)}


def table(rows: Sequence[tuple[str, Scores]]) -> str:
    """Return an aligned table: a row a case, a column a class or region, their mean in the end.

    Parameters
    ----------
    rows : sequence of (name of the case, its scores)
        One at least.

    Returns
    -------
    text : str
        Lines without a line break at the end.
    """
    rows = [(printable(name), scores) for name, scores in rows]
    groups = [(group, list(names)) for group, names in rows[0][1].items() if names]
    width = max(len(name) for name, _ in [*rows, ("case", {})])
    over, heads = " " * width, "case".ljust(width)
    for group, names in groups:
        columns = "".join(f"  {_column(name)}" for name in names)
        title = f" {group} "
        over += "  " + title.center(len(columns) - 2, "─")
        heads += columns
    lines = [over, heads, "─" * len(heads)]
    lines += [_row(name.ljust(width), scores) for name, scores in rows]
    if len(rows) > 1:
        lines += ["─" * len(heads), _row("mean".ljust(width), mean([s for _, s in rows]))]
    return "\n".join(lines)


def _row(name: str, scores: Scores) -> str:
    for entries in scores.values():
        for column, dice in entries.items():
            name += f"  {dice:.3f}".rjust(len(_column(column)) + 2)
    return name


def _column(name: str) -> str:
    return printable(name).rjust(_LEAST_WIDTH)
