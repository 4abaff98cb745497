"""Sizes of voxels: a network knows tumours in voxels, and nothing is resampled for it."""

from collections.abc import Mapping, Sequence

import numpy as np

_NEAR = 1.2  # a network hardly minds this ratio: augmentation does not scale, but heads differ by as much

Spacing = tuple[float, float, float]


def usual(spacings: Sequence[Spacing]) -> Spacing:
    """Return the median size of a voxel along each axis, in millimetres; of two middle ones the smaller."""
    d, h, w = np.percentile(np.asarray(spacings), 50, axis=0, method="lower").tolist()
    return d, h, w


def is_far(spacing: Sequence[float], other: Sequence[float]) -> bool:
    """Whether voxels are larger or smaller than others by more than a fifth along any axis."""
    ratios = np.asarray(spacing) / np.asarray(other)
    return bool((np.maximum(ratios, 1 / ratios) > _NEAR).any())


def notes(spacings: Mapping[str, Spacing]) -> list[str]:
    """Return a line for each file whose voxels are far from the usual size, by the name of the file."""
    most = usual(list(spacings.values()))
    return [
        f"{path}: voxels of {in_mm(spacing)}; usual are {in_mm(most)}, and nothing is resampled"
        for path, spacing in sorted(spacings.items())
        if is_far(spacing, most)
    ]


def in_mm(spacing: Sequence[float]) -> str:
    """Return the size of a voxel as text."""
    return " x ".join(f"{size:.3g}" for size in spacing) + " mm"
