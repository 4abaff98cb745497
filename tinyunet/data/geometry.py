"""Where the voxels of a file lie in space: the way into a common orientation, and back."""

from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

# nibabel has type hints in some places only; what is without is named here once.
_orientations: Any = nibabel.orientations


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a file lie in space, and how to bring them into the common frame and back.

    The common frame is nibabel's closest canonical one: axes are permuted and flipped, never
    resampled, until they run most nearly to the right, to the front and up ("RAS"). An oblique
    volume thus stays oblique, and the way back is exact.

    Attributes
    ----------
    affine
        From voxel indices as stored in the file to millimetres. shape=(4, 4), float64.
    shape
        Size of the volume as stored in the file, without the sequences.
    header
        The file's header; its position fields are written again by :func:`save_labels`.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    header: Any

    @property
    def orientation(self) -> NDArray[np.float64]:
        """For each stored axis: the canonical axis it becomes; 1, or -1 if flipped. shape=(3, 2)."""
        orientation: NDArray[np.float64] = _orientations.io_orientation(self.affine)
        return orientation

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """From voxel indices in the common frame to millimetres. shape=(4, 4), float64."""
        affine: NDArray[np.float64] = self.affine @ _orientations.inv_ornt_aff(self.orientation, self.shape)
        return affine

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Size of the volume in the common frame."""
        d, h, w = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return d, h, w

    @property
    def millilitres(self) -> float:
        """What a voxel holds; also where its axes are not at right angles."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in millimetres along the axes of the common frame."""
        d, h, w = np.linalg.norm(self.canonical_affine[:3, :3], axis=0).tolist()
        return d, h, w

    def to_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array as stored, ``self.shape + (...)``, in the common frame."""
        view: NDArray[Any] = _orientations.apply_orientation(voxels, self.orientation)
        return view

    def from_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array of the common frame as it would be stored in the file."""
        back = _orientations.ornt_transform(_orientations.axcodes2ornt("RAS"), self.orientation)
        view: NDArray[Any] = _orientations.apply_orientation(voxels, back)
        return view

    def distance(self, other: "Geometry") -> float:
        """Return how far apart the corners of two volumes of one shape lie at most, in voxels."""
        return _farthest(self.canonical_affine, other.canonical_affine, self.canonical_shape)

    def stored_distance(self, other: "Geometry") -> float:
        """Return the same for the volumes as they are stored in their files."""
        return _farthest(self.affine, other.affine, self.shape)


def _farthest(affine: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    """Return how far another affine moves the corners of a volume at most, in voxels of the first."""
    d, h, w = shape
    corners = np.stack(np.meshgrid([0, d], [0, h], [0, w], [1])).reshape(4, -1)
    millimetres = ((other - affine) @ corners)[:3]
    return float(np.linalg.norm(np.linalg.solve(affine[:3, :3], millimetres), axis=0).max())
