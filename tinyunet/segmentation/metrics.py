"""Scores of two masks: overlap, distance between their surfaces, volume; and BraTS' scores of single lesions.

Where prediction and truth are both empty, nothing was there and nothing was found: every share is 1, every
distance 0. Where only one is empty, every share but specificity is 0, and the distance is the diagonal of the
image (373 mm for BraTS): so a missed tumour counts in every mean, with the worst score there is.

The surface of a mask is its voxels that have a neighbour (along an axis) outside the mask or the image.
Distances lie between centres of voxels, in millimetres. HD95 is the larger of the two directed distances,
each the 95th percentile (linear) over a surface. NSD is the share of both surfaces that is within a tolerance
of the other. These are MONAI's definitions.

Source: Maier-Hein et al., "Metrics reloaded" (2024); Nikolov et al., "Clinically applicable segmentation of
head and neck anatomy" (2021); LaBella et al., "Analysis of the BraTS 2023 intracranial meningioma
segmentation challenge" (2024), for scores of lesions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.data.brain import box_of, widened

Mask = NDArray[np.bool_]
Spacing = Sequence[float]

#: Head of each metric in tables, and its digits; the first six are printed if none is chosen.
METRICS = {
    "dice": ("Dice", 3),
    "hd95": ("HD95 mm", 1),
    "nsd": ("NSD", 3),
    "sensitivity": ("sensitivity", 3),
    "precision": ("precision", 3),
    "difference": ("difference ml", 2),
    "specificity": ("specificity", 5),
    "volume": ("volume ml", 2),
    "true_volume": ("true ml", 2),
}
#: Those of lesions, beside.
LESION_METRICS = {
    "lesion_dice": ("lesion Dice", 3),
    "lesion_hd95": ("lesion HD95", 1),
    "lesions": ("lesions", 2),
    "missed": ("missed", 2),
    "false_positives": ("false", 2),
}
USUAL = tuple(METRICS)[:6]
_FACES, _ALL = ndimage.generate_binary_structure(3, 1), ndimage.generate_binary_structure(3, 3)
_EDGES = ndimage.generate_binary_structure(3, 2)
# BraTS 2023, glioma: three steps of dilation join lesions, those of 50 mm^3 or less do not count, and a
# lesion that is missed or is none costs 374 mm.
_DILATION, _SMALLEST, _PENALTY = 3, 50.0, 374.0


def measure(prediction: Mask, truth: Mask, spacing: Spacing, tolerance: float = 1.0) -> dict[str, float]:
    """Return the value of each of ``METRICS``.

    Parameters
    ----------
    prediction, truth : bool arrays of one shape (D, H, W)
    spacing : (D, H, W)
        Size of a voxel in millimetres.
    tolerance : float
        Of NSD, in millimetres.

    Returns
    -------
    dict of float
        Shares from 0 to 1, ``hd95`` in millimetres, volumes in millilitres; never NaN.
    """
    found, true, both = (np.count_nonzero(mask) for mask in (prediction, truth, prediction & truth))
    healthy = truth.size - true
    litres = float(np.prod(spacing)) / 1000
    hd95, nsd = surface_scores(prediction, truth, spacing, tolerance)
    neither = found == true == 0
    values = {
        "dice": 1.0 if neither else 2 * both / (found + true),
        "hd95": hd95,
        "nsd": nsd,
        "sensitivity": 1.0 if neither else both / true if true else 0.0,
        "precision": 1.0 if neither else both / found if found else 0.0,
        "difference": (found - true) * litres,
        "specificity": (healthy - (found - both)) / healthy if healthy else 1.0,
        "volume": found * litres,
        "true_volume": true * litres,
    }
    return {name: float(value) for name, value in values.items()}


def surface_scores(prediction: Mask, truth: Mask, spacing: Spacing, tolerance: float) -> tuple[float, float]:
    """Return HD95 in millimetres and NSD; parameters as of `measure`."""
    if not prediction.any() and not truth.any():
        return 0.0, 1.0
    if not prediction.any() or not truth.any():
        return float(np.linalg.norm(np.multiply(truth.shape, spacing))), 0.0
    box = box_of(prediction | truth)
    surfaces = [_surface(mask[box]) for mask in (prediction, truth)]
    apart = []
    for surface, other in (surfaces, surfaces[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        apart.append(distance[surface])
    hd95 = max(float(np.percentile(distances, 95)) for distances in apart)
    near = sum(np.count_nonzero(distances <= tolerance) for distances in apart)
    return hd95, near / sum(map(len, apart))


def _surface(mask: Mask) -> Mask:
    inside: Mask = ndimage.binary_erosion(mask, _FACES)  # outside of the box is outside of the mask
    return mask & ~inside


class Lesion(NamedTuple):
    """A true lesion, or a predicted one that is none."""

    dice: float
    hd95: float
    millilitres: float  # of the true lesion; 0 if there is none


def lesions(prediction: Mask, truth: Mask, spacing: Spacing) -> list[Lesion]:
    """Return the lesions that count, as BraTS 2023 compares them.

    True lesions whose dilations touch are one; those of 50 mm^3 or less do not count. A predicted lesion
    (26-connected) belongs to each true lesion whose dilation it touches; one that belongs to none is false.
    """
    if not (prediction.any() or truth.any()):
        return []
    # Nothing happens farther from the masks than the dilation reaches.
    box = widened(box_of(prediction | truth), _DILATION + 1, truth.shape)
    prediction, truth = prediction[box], truth[box]
    found, count = ndimage.label(prediction, _ALL)
    dilated = ndimage.binary_dilation(truth, _EDGES, iterations=_DILATION) if truth.any() else truth
    joined, _ = ndimage.label(dilated, _ALL)
    true = np.where(truth, joined, 0)
    matched, result = set[int](), []
    litres = float(np.prod(spacing)) / 1000
    for number in np.unique(true[truth]).tolist():
        lesion = true == number
        reach = ndimage.binary_dilation(lesion, _EDGES, iterations=_DILATION)
        parts = set(np.unique(found[reach]).tolist()) - {0}
        matched |= parts
        volume = np.count_nonzero(lesion) * litres
        if volume * 1000 > _SMALLEST:
            mine = np.isin(found, list(parts))
            both, sizes = np.count_nonzero(mine & lesion), np.count_nonzero(mine) + np.count_nonzero(lesion)
            hd95 = surface_scores(mine, lesion, spacing, 1.0)[0] if parts else _PENALTY
            result.append(Lesion(2 * both / sizes, hd95, volume))
    return result + [Lesion(0.0, _PENALTY, 0.0)] * (count - len(matched))


def measure_lesions(prediction: Mask, truth: Mask, spacing: Spacing) -> dict[str, float]:
    """Return the value of each of ``LESION_METRICS``: means over lesions, and how many of them are wrong."""
    each = lesions(prediction, truth, spacing)
    return {
        "lesion_dice": float(np.mean([lesion.dice for lesion in each])) if each else 1.0,
        "lesion_hd95": float(np.mean([lesion.hd95 for lesion in each])) if each else 0.0,
        "lesions": float(sum(lesion.millilitres > 0 for lesion in each)),
        "missed": float(sum(lesion.millilitres > 0 and lesion.dice == 0 for lesion in each)),
        "false_positives": float(sum(lesion.millilitres == 0 for lesion in each)),
    }


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a mean, the same for the same values; None for one value."""
    if len(values) < 2:
        return None
    array = np.asarray(values, np.float64)
    chosen = np.random.default_rng(0).integers(len(array), size=(draws, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), (2.5, 97.5)).tolist()
    return low, high
