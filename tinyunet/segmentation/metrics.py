"""Dice: how well two segmentations agree, by class and by tumour region.

Dice of two sets of voxels A and B is ``2 |A and B| / (|A| + |B|)``. Where both are empty it is 1
(nothing was there and nothing was found), where one is empty it is 0. All voxels given are counted
together: give one case at a time to average over cases.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

# Labels as in the Medical Segmentation Decathlon: 1 edema, 2 non-enhancing, 3 enhancing tumour.
REGIONS: Mapping[str, tuple[int, ...]] = {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing": (3,)}


def dice_per_class(
    prediction_labels: npt.ArrayLike, labels: npt.ArrayLike, classes: int
) -> NDArray[np.float64]:
    """Dice of each class.

    Parameters
    ----------
    prediction_labels, labels : array of int, same shape
        From 0 to ``classes - 1``.
    classes : int

    Returns
    -------
    array, shape = (classes,)
        From 0 to 1, never NaN.

    Raises
    ------
    TypeError
        One of them does not hold integers.
    ValueError
        The shapes differ, or there is a label that is not a class.
    """
    counts = _confusion(prediction_labels, labels, classes)
    return np.array([_dice(counts, (label,)) for label in range(classes)])


def region_dice(prediction_labels: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Dice of whole tumour {1, 2, 3}, tumour core {2, 3} and enhancing tumour {3}.

    Parameters
    ----------
    prediction_labels, labels : array of int, same shape
        From 0 to 3.

    Returns
    -------
    dict
        Name of the region -> Dice, from 0 to 1, never NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`dice_per_class`.
    """
    counts = _confusion(prediction_labels, labels, 4)
    return {name: _dice(counts, members) for name, members in REGIONS.items()}


def _confusion(prediction_labels: npt.ArrayLike, labels: npt.ArrayLike, classes: int) -> NDArray[np.int64]:
    """Voxels by label (row) and prediction (column)."""
    found = _check("prediction_labels", prediction_labels, classes)
    truth = _check("labels", labels, classes)
    if found.shape != truth.shape:
        raise ValueError(
            f"prediction_labels and labels must have one shape, not {found.shape} and {truth.shape}"
        )
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
