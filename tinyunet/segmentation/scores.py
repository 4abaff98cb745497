"""Dice of each class and tumour region, and a table of cases for people to read.

Dice of two sets of voxels A and B is ``2 |A and B| / (|A| + |B|)``: 1 where both are empty (nothing was
there and nothing was found), 0 where one is empty. All voxels given are counted together: give one case at
a time to average over cases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from tinyunet.common.terminal import printable
from tinyunet.data.conventions import REGIONS, regions_of

#: ``{"classes": {name: Dice}, "regions": {name: Dice}}``; without regions where labels are no brain tumours.
Scores = dict[str, dict[str, float]]

_LEAST_WIDTH = 9  # of a column: as the heading " classes " of a group, which may have one column only


def dice_per_class(
    prediction_labels: npt.ArrayLike, labels: npt.ArrayLike, classes: int
) -> NDArray[np.float64]:
    """Return Dice of each class, from 0 to 1, never NaN. shape=(classes,).

    Both arrays hold integers from 0 to ``classes - 1``. TypeError for other types, ValueError if the shapes
    differ or a label is not a class.
    """
    counts = confusion(prediction_labels, labels, classes)
    return np.array([_dice(counts, (label,)) for label in range(classes)])


def region_dice(prediction_labels: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Return Dice of each of ``REGIONS``, by name; parameters and errors as :func:`dice_per_class`."""
    counts = confusion(prediction_labels, labels, 4)
    return {name: _dice(counts, members) for name, members in REGIONS.items()}


def confusion(prediction_labels: npt.ArrayLike, labels: npt.ArrayLike, classes: int) -> NDArray[np.int64]:
    """Count voxels by label (row) and prediction (column), shape=(classes, classes); as `dice_per_class`."""
    found = _check("prediction_labels", prediction_labels, classes)
    truth = _check("labels", labels, classes)
    if found.shape != truth.shape:
        shapes = f"{found.shape} and {truth.shape}"
        raise ValueError(f"prediction_labels and labels must have one shape, not {shapes}")
    pairs = truth.astype(np.intp).ravel() * classes + found.astype(np.intp).ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _check(name: str, labels: npt.ArrayLike, classes: int) -> NDArray[np.integer]:
    array = np.asarray(labels)
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= classes):
        raise ValueError(f"{name} must be from 0 to {classes - 1}, not from {array.min()} to {array.max()}")
    return array


def _dice(counts: NDArray[np.int64], members: Sequence[int]) -> float:
    both = counts[np.ix_(members, members)].sum()
    total = counts[list(members)].sum() + counts[:, list(members)].sum()
    return float(2 * both / total) if total else 1.0


def score(
    prediction: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    names: Sequence[str],
    regions: Mapping[str, Sequence[int]] | None = None,
) -> Scores:
    """Compare the class of each voxel, shape=(D, H, W), with the truth.

    Class 0 is the background and is not scored. ``regions`` are the classes of each region; without them
    BraTS' regions are scored where the names say unmistakably which class is which part of a tumour.
    """
    return score_counts(confusion(prediction, labels, len(names)), names, regions)


def score_counts(
    counts: NDArray[np.int64], names: Sequence[str], regions: Mapping[str, Sequence[int]] | None = None
) -> Scores:
    """Score voxels counted by :func:`confusion`; the sum of several cases' counts scores them as one.

    One number to choose a model by is better taken of the sum: with a region that is empty in one case of
    four, a single wrong voxel there moves the mean over cases by 0.25.
    """
    regions = regions_of(names) if regions is None else regions
    return {
        "classes": {name: _dice(counts, (label,)) for label, name in enumerate(names) if label},
        "regions": {name: _dice(counts, members) for name, members in regions.items()},
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
    """Return content for a file, from names and scores of cases: the means, and under "cases" each case."""
    return {**mean([scores for _, scores in rows]), "cases": dict(rows)}


def table(rows: Sequence[tuple[str, Scores]]) -> str:
    """Return an aligned table: a row for each case, a column for each class or region, the mean below."""
    rows = [(printable(name), scores) for name, scores in rows]
    width = max(len(name) for name, _ in [*rows, ("case", {})])
    groups = {
        group: [printable(name).rjust(_LEAST_WIDTH) for name in rows[0][1][group]] for group in rows[0][1]
    }
    heads = [name for names in groups.values() for name in names]

    def row(name: str, scores: Scores) -> str:
        values = [dice for entries in scores.values() for dice in entries.values()]
        cells = [f"{dice:{len(head)}.3f}" for dice, head in zip(values, heads, strict=True)]
        return "  ".join([name.ljust(width), *cells])

    over = [f" {group} ".center(len("  ".join(names)), "─") for group, names in groups.items() if names]
    lines = ["  ".join([" " * width, *over]), "  ".join(["case".ljust(width), *heads])]
    rule = "─" * len(lines[1])
    lines += [rule, *(row(*each) for each in rows)]
    if len(rows) > 1:
        lines += [rule, row("mean", mean([scores for _, scores in rows]))]
    return "\n".join(lines)
