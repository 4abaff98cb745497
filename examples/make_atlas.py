"""Make tinyunet/data/phantom/atlas.npz: shares of fluid, grey and white matter of two brains.

It needs two T1 templates, skull-stripped, in millimetres of the ICBM atlas:
ICBM 2009a (``mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz`` in nilearn 0.14's folder datasets/data), and
Colin 27 (``ch2bet.nii.gz`` of MRIcron; in Debian's package mricron-data).

Run it: .venv/bin/python examples/make_atlas.py ICBM.nii.gz COLIN.nii.gz
"""

import sys
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FIRST, LAST, SPACING = (-80, -114, -72), (80, 82, 90), 2.0  # millimetres
# Signal of fluid, grey and white matter in each template: the peaks of its histogram.
ICBM_PEAKS, COLIN_PEAKS = (62, 163, 219), (34, 83, 113)
ATLAS = Path(__file__).parents[1] / "tinyunet" / "data" / "phantom" / "atlas.npz"


def shares(path: str, peaks: tuple[float, float, float], rim: int) -> NDArray[np.uint8]:
    """Return shares from 0 to 15 of fluid, grey and white matter, shape=(3, X, Y, Z).

    A voxel between two peaks has both tissues. What lies in sulci, and in a rim of ``rim`` mm around the
    brain, is fluid, also where the program that stripped the skull left it out.
    """
    template = nibabel.load(path)
    signal = np.asarray(template.dataobj, np.float32)
    brain = signal > 0
    if rim:
        margin = 8
        closed = ndimage.binary_closing(np.pad(brain, margin), iterations=4)
        brain |= closed[(slice(margin, -margin),) * 3]
        brain = ndimage.binary_dilation(brain, iterations=rim)
    brain = ndimage.binary_fill_holes(brain)
    fluid, grey, white = peaks
    signal = np.maximum(signal, fluid)
    of_fluid = np.clip((grey - signal) / (grey - fluid), 0, 1) * brain
    of_white = np.clip((signal - grey) / (white - grey), 0, 1) * brain
    axes = [np.arange(start, end + 1, SPACING) for start, end in zip(FIRST, LAST, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    origin, steps = template.affine[:3, 3], np.diag(template.affine)[:3]
    index = (points - origin[:, None, None, None]) / steps[:, None, None, None]
    found = [
        ndimage.map_coordinates(ndimage.gaussian_filter(each.astype(np.float32), 0.6), index, order=1)
        for each in (of_fluid, brain - of_fluid - of_white, of_white)
    ]
    return np.rint(np.stack(found) * 15).clip(0, 15).astype(np.uint8)


def main() -> None:
    """Write the atlas from the two templates."""
    if len(sys.argv) != 3:
        print(__doc__)
        return
    icbm, colin = sys.argv[1:]
    both = np.stack([shares(icbm, ICBM_PEAKS, 0), shares(colin, COLIN_PEAKS, 1)])
    np.savez_compressed(ATLAS, shares=both, first=np.array(FIRST), spacing=np.array(SPACING))
    print(f"{ATLAS}: {both.shape}, {ATLAS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
