"""Random patches for training, a share of them around foreground, with random changes.

An image has shape=(D, H, W, C) and is normalised, its labels have shape=(D, H, W) with 0 for the
background. No function changes them: patches are C-contiguous copies.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Each sequence is multiplied by a number up to this far from 1, and a number up to this far from 0 is added.
# A normalised image has deviation 1, so these are the differences between scanners, not artefacts.
SCALE = 0.15
SHIFT = 0.15
NOISE = 0.1  # largest deviation of the noise, which is drawn anew for each patch

# A normal deviate for each value of a byte, of deviation 1. Drawing bytes is ten times faster than drawing
# from the generator's own normal distribution, and 256 steps are fine enough for a little noise.
_QUANTILES = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])
_NORMAL_OF_BYTE = (_QUANTILES / _QUANTILES.std()).astype(np.float32)


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
    """Cut a patch of image and labels at random.

    With probability ``foreground_share`` the patch is centred, as far as the volume allows, on a voxel of the
    foreground: first a class is drawn among those in the volume, then one of its voxels, so that rare classes
    come as often as common ones. Otherwise, and without foreground, every position is equally likely.

    ValueError if image and labels differ in shape, ``patch_size`` (D, H, W) is larger than the volume, or the
    share is not from 0 to 1.
    """
    volume = _check_shapes(image, labels)
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
    box = tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
    return image[box].copy(), labels[box].copy()


def _check_shapes(image: NDArray[np.float32], labels: NDArray[np.uint8]) -> tuple[int, ...]:
    """Return the shape of the volume."""
    if image.ndim != 4 or image.shape[:3] != labels.shape:
        raise ValueError(f"image: shape {image.shape}; expected {(*labels.shape, 'C')} as the labels")
    return labels.shape


def _foreground_voxel(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.intp] | None:
    """Draw a class, then one of its voxels. shape=(3,); None if there is no foreground."""
    # Classes in random order until one is in the volume: no extra pass finds out which are.
    for label in generator.permutation(np.arange(1, int(labels.max()) + 1)):
        voxels = np.flatnonzero(labels == label)
        if voxels.size:
            chosen: Any = np.unravel_index(generator.choice(voxels), labels.shape)
            return np.array(chosen)
    return None


def augment(
    image: NDArray[np.float32], labels: NDArray[np.uint8], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Change a patch at random: flips, quarter turns, intensity and noise.

    Image and labels are flipped along each axis with even chance and turned by 0, 90, 180 or 270 degrees in a
    plane of two equally long axes (if there is one; so the shape stays). Then each sequence is scaled and
    shifted, and noise is added, in the brain only: the background, where all channels are exactly 0, stays 0,
    because it does not depend on the scanner, and the network sees where the brain ends as in a prediction.
    The same state of ``generator`` gives the same change. ValueError if image and labels differ in shape.
    """
    _check_shapes(image, labels)
    flipped = tuple(axis for axis in range(3) if generator.integers(2))
    planes = [(a, b) for a, b in combinations(range(3), 2) if labels.shape[a] == labels.shape[b]]
    turns, plane = 0, (0, 1)
    if planes:
        plane = planes[generator.integers(len(planes))]
        turns = int(generator.integers(4))
    image = np.rot90(np.flip(image, flipped), turns, plane).copy()
    labels = np.rot90(np.flip(labels, flipped), turns, plane).copy()
    _change_intensity(image, generator)
    return image, labels


def drop_sequences(image: NDArray[np.float32], share: float, generator: np.random.Generator) -> None:
    """Set each sequence of a patch, shape=(D, H, W, C), to 0 with probability ``share``, in place.

    A missing sequence is 0 in a normalised image: a network trained so can do without. One sequence stays at
    least. Without a share nothing is drawn from the generator. ValueError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: {share}; expected at least 0 and below 1")
    if share:
        dropped = np.less(generator.random(image.shape[-1]), share)
        if dropped.all():
            dropped[generator.integers(len(dropped))] = False
        image[..., dropped] = 0


def _change_intensity(image: NDArray[np.float32], generator: np.random.Generator) -> None:
    """Scale and shift each sequence and add noise, in place, where the image is not background."""
    width, channels = image.shape[-2:]
    brain = image[..., 0] != 0
    for channel in range(1, channels):  # several times faster than any(axis=-1)
        brain |= image[..., channel] != 0
    scale = np.asarray(generator.uniform(1 - SCALE, 1 + SCALE, channels), np.float32)
    shift = np.asarray(generator.uniform(-SHIFT, SHIFT, channels), np.float32)
    # Line by line: NumPy's inner loop runs along the last axis, and an axis of channels is short.
    lines = image.reshape(-1, width * channels)
    lines *= np.tile(scale, width)
    lines += np.tile(shift, width)
    deviates = np.float32(generator.uniform(0, NOISE)) * _NORMAL_OF_BYTE
    lines += deviates.take(generator.integers(0, 256, lines.shape, np.uint8))
    lines *= np.repeat(brain, channels).reshape(lines.shape)
