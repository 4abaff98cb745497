"""Random patches for training, a share of them around foreground."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the random generator of one training sample.

    Every sample of every epoch has its own stream, which depends on these three numbers only: not on
    which rank draws it, nor on what was drawn before. The patches of a run thus repeat bit for bit,
    also of one that goes on from a checkpoint.

    Parameters
    ----------
    seed, epoch, sample
        Zero or more.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, sample)))


def sample_patch(
    image: NDArray[np.float32],
    labels: NDArray[np.uint8],
    patch_size: Sequence[int],
    foreground_share: float,
    generator: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a patch at random.

    With probability ``foreground_share`` it is centred, as far as the volume allows, on a voxel of
    the foreground: a class is drawn among those that are there, then one of its voxels, so that rare
    classes come as often as common ones. Otherwise, and where nothing is foreground, every place is
    equally likely.

    Parameters
    ----------
    image
        shape=(D, H, W, C).
    labels
        shape=(D, H, W); 0 is the background.
    patch_size
        (PD, PH, PW), at most the volume's size.
    foreground_share
        0 to 1.
    generator
        From :func:`generator`.

    Returns
    -------
    image
        shape=(PD, PH, PW, C), a C-contiguous copy.
    labels
        shape=(PD, PH, PW), a C-contiguous copy.

    Raises
    ------
    ValueError
        The shapes do not agree, the patch is larger than the volume, or the share is no share.
    """
    volume = labels.shape
    if image.ndim != 4 or image.shape[:3] != volume:
        raise ValueError(f"image: shape {image.shape}; expected {(*volume, 'C')} as the labels")
    if len(patch_size) != 3 or any(
        not 1 <= patch <= size for patch, size in zip(patch_size, volume, strict=True)
    ):
        raise ValueError(f"patch_size: {tuple(patch_size)}; expected 1 up to the volume's {volume}")
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share: {foreground_share}; expected 0 to 1")
    room = np.subtract(volume, patch_size)
    corner = generator.integers(0, room + 1)
    if generator.random() < foreground_share:
        voxel = _foreground_voxel(labels, generator)
        if voxel is not None:
            corner = np.clip(voxel - np.asarray(patch_size) // 2, 0, room)
    box = tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
    return image[box].copy(), labels[box].copy()


def _foreground_voxel(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.intp] | None:
    """Draw a class, then one of its voxels. shape=(3,); None if there is no foreground."""
    # In random order until one is there: no pass over the volume just to see which are.
    for label in generator.permutation(np.arange(1, int(labels.max()) + 1)):
        voxels = np.flatnonzero(labels == label)
        if voxels.size:
            chosen: Any = np.unravel_index(generator.choice(voxels), labels.shape)
            return np.array(chosen)
    return None
