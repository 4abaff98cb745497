"""Parts of a segmentation that hang together: the largest one alone, or without the smallest."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_NEIGHBOURS = np.ones((3, 3, 3), np.bool_)


def clean(
    labels: NDArray[np.uint8], millilitres: float, largest: bool = False, smallest: float = 0.0
) -> NDArray[np.uint8]:
    """Return labels, shape=(D, H, W), without some parts; what goes becomes background.

    A part is a set of voxels of any class but the background (26-connected): a tumour with all its tissues.

    Parameters
    ----------
    millilitres : float
        Volume of a voxel.
    largest : bool
        Keep the largest part alone.
    smallest : float
        Remove parts smaller than this, in millilitres.
    """
    parts, count = ndimage.label(labels > 0, _NEIGHBOURS)
    if not count or not (largest or smallest):
        return labels
    sizes = np.bincount(parts.ravel())
    kept = sizes * millilitres >= smallest
    if largest:
        kept &= np.arange(len(sizes)) == 1 + sizes[1:].argmax()
    kept[0] = False
    return np.where(kept[parts], labels, np.uint8(0))
