"""Sizes of voxels: a network knows tumours in voxels, so volumes are resampled to the size it has learnt."""

from collections.abc import Sequence

import numpy as np

from tinyunet.common import schema
from tinyunet.common.errors import UserError
from tinyunet.data.geometry import SIDES
from tinyunet.data.resample import resampled_shape

_ALIKE = 1.05  # a network does not mind this ratio, and interpolation would cost sharpness: heads differ more

#: From this ratio on, resampling loses details, or cannot show those that a network has learnt.
FAR = 1.5

Spacing = tuple[float, float, float]
#: The value of an option that leaves the grids of volumes as they are.
KEEP = "keep"


def usual(spacings: Sequence[Spacing]) -> Spacing:
    """Return the median size of a voxel along each axis, in millimetres; of two middle ones the smaller."""
    d, h, w = np.percentile(np.asarray(spacings), 50, axis=0, method="lower").tolist()
    return d, h, w


def differs(spacing: Sequence[float], other: Sequence[float], ratio: float = _ALIKE) -> bool:
    """Whether voxels are larger or smaller than others by more than a ratio (a twentieth) along any axis."""
    ratios = np.asarray(spacing) / np.asarray(other)
    return bool((np.maximum(ratios, 1 / ratios) > ratio).any())


def of_network(choice: str | Spacing | None, spacings: Sequence[Spacing]) -> Spacing | None:
    """Return the size of voxels that a network is trained on, in millimetres.

    ``choice`` is this size, None for the usual one of the data, or "keep": then it is the usual one, too, but
    None if those of the data differ.
    """
    if choice is not None and not isinstance(choice, str):
        return choice
    most = usual(spacings)
    return None if choice == KEEP and any(differs(each, most) for each in spacings) else most


def shape_for(shape: Sequence[int], spacing: Spacing, wanted: Spacing | None) -> tuple[int, int, int]:
    """Return the shape (D, H, W) of a volume for a network: resampled if its voxels differ from the wanted.

    Without a wanted size the shape stays.
    """
    if wanted is None or not differs(spacing, wanted):
        d, h, w = shape
        return d, h, w
    return resampled_shape(shape, spacing, wanted)


def in_mm(spacing: Sequence[float]) -> str:
    """Return the size of a voxel as text."""
    return " x ".join(f"{size:.3g}" for size in spacing) + " mm"


def rule(value: object, where: str) -> None:
    """Allow "keep" and three sizes in millimetres, as a rule of :mod:`tinyunet.common.schema`."""
    sizes = schema.each(schema.number(*SIDES), 3, 3)
    (schema.one_of(KEEP) if isinstance(value, str) else sizes)(value, where)


def from_words(words: Sequence[str] | None) -> str | Spacing | None:
    """Return what the words behind ``--spacing`` choose: "keep", or one size for all axes or three, in mm.

    None stays None. UserError for other words.
    """
    if words is None:
        return None
    if list(words) == [KEEP]:
        return KEEP
    least, most = SIDES
    try:
        sizes = [float(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3) or not all(least <= size <= most for size in sizes):
        expected = f"one size or three (right, front, up), each from {least:g} to {most:g} mm; or {KEEP}"
        raise UserError(f"--spacing: {' '.join(words)}; expected {expected}")
    d, h, w = sizes * (3 // len(sizes))
    return d, h, w
