"""Random patches for training, a share of them around foreground.

An image has shape=(D, H, W, C) and is normalised, its labels have shape=(D, H, W) with 0 for the
background. No function changes them: patches are C-contiguous copies.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the random generator of one training sample; all three numbers are 0 or more.

    Every sample of every epoch has its own stream, which depends on these numbers only: not on which rank
    draws the sample, nor on earlier draws. So the patches of a run repeat bit for bit, also after a resume.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, sample)))


def sample_patch(
    image: NDArray[np.float32],
    labels: NDArray[np.uint8],
    patch_size: Sequence[int],
    foreground_share: float,
    generator: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a patch of image and labels at random; parameters and errors as :func:`choose_corner`."""
    check_shapes(image, labels)
    corner = choose_corner(labels, patch_size, foreground_share, generator)
    box = tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
    return image[box].copy(), labels[box].copy()


def choose_corner(
    labels: NDArray[np.uint8],
    patch_size: Sequence[int],
    foreground_share: float,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Choose at random where a patch of ``patch_size`` begins in a volume; shape=(3,).

    With probability ``foreground_share`` the patch is centred, as far as the volume allows, on a voxel of the
    foreground: first a class is drawn among those in the volume, then one of its voxels, so that rare classes
    come as often as common ones. Otherwise, and without foreground, every position is equally likely.

    ValueError if ``patch_size`` (D, H, W) is larger than the volume, or the share is not from 0 to 1.
    """
    volume = labels.shape
    if len(patch_size) != 3 or min(patch_size) < 1 or np.any(np.greater(patch_size, volume)):
        raise ValueError(f"patch_size: {tuple(patch_size)}; expected 1 up to the volume's {volume}")
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share: {foreground_share}; expected 0 to 1")
    last = np.subtract(volume, patch_size)
    corner = generator.integers(0, last + 1)
    if generator.random() < foreground_share:
        voxel = _foreground_voxel(labels, generator)
        if voxel is not None:
            corner = np.clip(voxel - np.asarray(patch_size) // 2, 0, last)
    return corner


def check_shapes(image: NDArray[np.float32], labels: NDArray[np.uint8]) -> None:
    """Raise ValueError unless labels (D, H, W) belong to an image (D, H, W, C)."""
    if image.ndim != 4 or image.shape[:3] != labels.shape:
        raise ValueError(f"image: shape {image.shape}; expected {(*labels.shape, 'C')} as the labels")


def _foreground_voxel(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.intp] | None:
    """Draw a class, then one of its voxels. shape=(3,); None if there is no foreground."""
    # Classes in random order until one is in the volume: no extra pass finds out which are.
    for label in generator.permutation(np.arange(1, int(labels.max()) + 1)):
        voxels = np.flatnonzero(labels == label)
        if voxels.size:
            chosen: Any = np.unravel_index(generator.choice(voxels), labels.shape)
            return np.array(chosen)
    return None
