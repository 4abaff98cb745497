"""Draw a real scan among phantoms, at the phantoms' resolution and with the same window.

Which one is real? Run it: .venv/bin/python examples/real_or_phantom.py docs/images/real-or-phantom.png FOLDER
The folder has one labelled BraTS case; without it phantoms are drawn alone.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from tinyunet.data import phantom
from tinyunet.data.brats import MODALITIES
from tinyunet.data.cases import load_case
from tinyunet.data.decathlon import read_dataset

PLACE = 3  # of the real scan, from 0
SPACING = (2.75, 2.75, 2.75)
DARKEST, BRIGHTEST = 0.5, 99.5  # per cent of the brain's voxels


def slices(image: NDArray[np.float32], labels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Return the axial slice with most of the tumour of each sequence, in grey from 0 to 1."""
    brain, at = image.any(axis=-1), int(np.argmax((labels > 0).sum(axis=(0, 1))))
    shown = []
    for channel in range(image.shape[-1]):
        low, high = np.percentile(image[brain][:, channel], (DARKEST, BRIGHTEST))
        grey = np.clip((image[:, :, at, channel] - low) / (high - low), 0, 1)
        shown.append(np.where(brain[:, :, at], grey, 0).T)
    return shown


def main() -> None:
    """Make phantoms, and draw them, with the real scan among them if there is one."""
    path = sys.argv[1] if len(sys.argv) > 1 else "real-or-phantom.png"
    with tempfile.TemporaryDirectory() as folder:
        made = phantom.make_dataset(Path(folder) / "phantoms", 7, seed=5)
        heads = [slices(*load_case(case)[:2]) for case in read_dataset(made).cases]
    if len(sys.argv) > 2:
        (case,) = read_dataset(sys.argv[2]).cases
        heads.insert(PLACE, slices(*load_case(case, spacing=SPACING)[:2]))
    figure, grid = plt.subplots(4, 8, figsize=(12.8, 7), facecolor="black")
    for number, head in enumerate(heads):
        for channel, grey in enumerate(head):
            axes = grid[number % 4, 4 * (number // 4) + channel]
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, origin="lower")
            if channel == 0:
                axes.text(0.02, 0.9, str(number + 1), color="white", fontsize=11, transform=axes.transAxes)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid[0], MODALITIES * 2, strict=True):
        axes.set_title(name, color="white", fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.95, 0.01, 0.01)
    figure.savefig(path, dpi=75, facecolor="black")
    print(f"drawn into {path}")


if __name__ == "__main__":
    main()
