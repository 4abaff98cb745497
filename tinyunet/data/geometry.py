"""Where the voxels of a file lie in space, and the way into the common frame and back.

The common frame is nibabel's closest canonical one ("RAS"): axes are permuted and flipped, never resampled,
until they run most nearly to the right, to the front and up. An oblique volume stays oblique, and the way
back is exact.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError

# nibabel has type hints in some places only: its modules without hints are named here once.
_affines: Any = nibabel.affines
_orientations: Any = nibabel.orientations
_RAS = np.array([[0, 1], [1, 1], [2, 1]])

# Millimetres of the other units that a header may have, by code: metres and micrometres.
_MILLIMETRES = {1: 1000.0, 3: 0.001}
#: Millimetres that the side of a voxel may have, from MRI microscopy to a localiser's slices.
SIDES = 0.01, 100.0
# Volume of a voxel with sides of length 1: 0 if its axes lie in one plane, 0.87 for a gantry at 30 degrees.
_LEAST_VOLUME = 0.1
_FARTHEST = 1e6  # millimetres from the origin, which lies in the scanner or the brain


@dataclass(frozen=True, eq=False)
class Geometry:
    """Position of a volume in space."""

    affine: NDArray[np.float64]  # from voxel indices as stored in the file to millimetres, shape=(4, 4)
    shape: tuple[int, int, int]  # as stored in the file, without the sequences
    header: Any  # of the file; :func:`tinyunet.data.labels.save_labels` writes its position fields again

    @property
    def orientation(self) -> NDArray[np.float64]:
        """For each stored axis: the canonical axis that it becomes; 1, or -1 if flipped. shape=(3, 2)."""
        return _orientations.io_orientation(self.affine)

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """From voxel indices in the common frame to millimetres. shape=(4, 4), float64."""
        return self.affine @ _orientations.inv_ornt_aff(self.orientation, self.shape)

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Size of the volume in the common frame."""
        d, h, w = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return d, h, w

    @property
    def millilitres(self) -> float:
        """Volume of a voxel, also of one whose axes are not at right angles."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in millimetres along the axes of the common frame."""
        d, h, w = _affines.voxel_sizes(self.canonical_affine).tolist()
        return d, h, w

    def to_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view in the common frame of an array as stored, ``self.shape + (...)``."""
        return _orientations.apply_orientation(voxels, self.orientation)

    def from_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array in the common frame, with axes as the file stores them."""
        back = _orientations.ornt_transform(_RAS, self.orientation)
        return _orientations.apply_orientation(voxels, back)

    def distance(self, other: "Geometry", stored: bool = False) -> float:
        """Return how far another volume of the same shape moves the corners of this one at most, in voxels.

        Both volumes lie in the common frame, or as they are ``stored`` in their files.
        """
        affine = self.affine if stored else self.canonical_affine
        moved = (other.affine if stored else other.canonical_affine) - affine
        d, h, w = self.shape if stored else self.canonical_shape
        corners = np.stack(np.meshgrid([0, d], [0, h], [0, w], [1])).reshape(4, -1)
        voxels = np.linalg.solve(affine[:3, :3], (moved @ corners)[:3])
        return float(np.linalg.norm(voxels, axis=0).max())


def affine_of(path: Path, fields: Any) -> NDArray[np.float64]:
    """Return the affine of a NIfTI header (``nibabel.Nifti1Header``) in millimetres.

    DataError if no scanner gives such voxels: the affine holds NaN or infinity, its axes lie in one plane, or
    voxels are too small, too large or too far away.
    """
    affine = np.array(fields.get_best_affine(), np.float64)
    affine[:3] *= _MILLIMETRES.get(int(fields["xyzt_units"]) & 7, 1.0)
    if not np.isfinite(affine).all():
        raise DataError(f"{path}: the affine holds NaN or infinity; expected millimetres")
    with np.errstate(over="ignore"):
        sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.min() == 0:
        raise DataError(f"{path}: the affine is singular; expected three spatial axes")
    least, most = SIDES
    # No float32 is exactly 0.01.
    if sides.min() < least * 0.999 or sides.max() > most * 1.001:
        shown = " x ".join(f"{side:.4g}" for side in sides)
        raise DataError(f"{path}: voxels of {shown} mm; expected sides of {least:g} to {most:g} mm")
    if abs(np.linalg.det(affine[:3, :3] / sides)) < _LEAST_VOLUME:
        flat = "the affine is singular, or nearly so: the axes of a voxel lie in one plane"
        raise DataError(f"{path}: {flat}; expected three spatial axes")
    away = np.abs(affine[:3, 3]).max()
    if away > _FARTHEST:
        expected = f"expected at most {_FARTHEST:g} mm"
        raise DataError(f"{path}: its first voxel lies {away:.4g} mm from the origin; {expected}")
    return affine
