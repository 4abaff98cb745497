"""Whether an affine gives voxels a size and a place that a scanner could have given them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.stream import DataError

# Millimetres of the units that a header may have, by their codes: metres and micrometres.
_MILLIMETRES = {1: 1000.0, 3: 0.001}
#: Millimetres that the side of a voxel may have, from MRI microscopy to a localiser's slices.
SIDES = 0.01, 100.0
# Of a voxel with sides of length 1: axes that lie in one plane have none, a gantry tilted by 30 degrees 0.87.
_LEAST_VOLUME = 0.1
# Millimetres from the origin, which lies in the scanner or the brain.
_FARTHEST = 1e6


def affine_of(path: Path, fields: Any) -> NDArray[np.float64]:
    """Return the affine of a NIfTI header, in millimetres.

    Parameters
    ----------
    path : Path
        The file, for messages.
    fields : nibabel.Nifti1Header

    Raises
    ------
    DataError
        It holds NaN or infinity, its axes lie in one plane, or voxels are too small, too large or too
        far away.
    """
    affine = np.array(fields.get_best_affine(), np.float64)
    affine[:3] *= _MILLIMETRES.get(int(fields["xyzt_units"]) & 7, 1.0)
    _check(path, affine)
    return affine


def _check(path: Path, affine: NDArray[np.float64]) -> None:
    """Check that voxels have a size and a place that a scanner could have given them."""
    if not np.isfinite(affine).all():
        raise DataError(f"{path}: the affine holds NaN or infinity; expected millimetres")
    with np.errstate(over="ignore"):
        sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.min() == 0:
        raise DataError(f"{path}: the affine is singular; expected three spatial axes")
    least, most = SIDES
    # A side of 0.01 is none in float32.
    if sides.min() < least * 0.999 or sides.max() > most * 1.001:
        shown = " x ".join(f"{side:.4g}" for side in sides)
        raise DataError(f"{path}: voxels of {shown} mm; expected sides of {least:g} to {most:g} mm")
    if abs(np.linalg.det(affine[:3, :3] / sides)) < _LEAST_VOLUME:
        raise DataError(
            f"{path}: the affine is singular, or nearly so: the axes of a voxel lie in one plane; "
            "expected three spatial axes"
        )
    if np.abs(affine[:3, 3]).max() > _FARTHEST:
        raise DataError(
            f"{path}: its first voxel lies {np.abs(affine[:3, 3]).max():.4g} mm from the origin; "
            f"expected at most {_FARTHEST:g} mm"
        )
