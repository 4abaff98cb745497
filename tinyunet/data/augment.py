"""Random changes of a training patch: flips, quarter turns, intensity and noise."""

from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A sequence is multiplied by a number up to this far from 1, and moved by one up to this far from 0.
# A normalised image has deviation 1, so these are the differences between scanners, not artefacts.
SCALE = 0.15
SHIFT = 0.15
# Deviation of the noise: drawn anew for each patch, between 0 and this.
NOISE = 0.1

# A normal deviate for each value of a byte, of deviation 1: ten times faster to draw than from the
# generator's own normal distribution, and 256 steps are fine enough for a little noise.
_QUANTILES = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])
_NORMAL_OF_BYTE = (_QUANTILES / _QUANTILES.std()).astype(np.float32)


def augment(
    image: NDArray[np.float32], labels: NDArray[np.uint8], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Change a patch at random; the same generator state gives the same change.

    Image and labels are flipped along each axis with even chance and turned by 0, 90, 180 or 270
    degrees in a plane of two equally long axes (if there is one; its shape thus stays). Then each
    sequence is scaled and shifted, and noise is added, in the brain only: the background, where all
    channels are exactly 0, stays 0, as it does not depend on the scanner either, and the network
    keeps seeing where the brain ends as it will in a prediction.

    Parameters
    ----------
    image
        shape=(D, H, W, C), normalised; not changed.
    labels
        shape=(D, H, W); not changed.
    generator
        From :func:`tinyunet.data.patches.generator`.

    Returns
    -------
    image
        shape=(D, H, W, C), C-contiguous, new.
    labels
        shape=(D, H, W), C-contiguous, new.

    Raises
    ------
    ValueError
        Image and labels are not of one size.
    """
    if image.ndim != 4 or image.shape[:3] != labels.shape:
        raise ValueError(f"image: shape {image.shape}; expected {(*labels.shape, 'C')} as the labels")
    image, labels = _flip_and_turn(image, labels, generator)
    return _change_intensity(image, generator), labels


def _flip_and_turn(
    image: NDArray[np.float32], labels: NDArray[np.uint8], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return contiguous copies of both, moved alike."""
    flipped = tuple(axis for axis in range(3) if generator.integers(2))
    planes = [(a, b) for a, b in combinations(range(3), 2) if labels.shape[a] == labels.shape[b]]
    turns, plane = 0, (0, 1)
    if planes:
        plane = planes[generator.integers(len(planes))]
        turns = int(generator.integers(4))

    def move(array: NDArray[Any]) -> NDArray[Any]:
        return np.rot90(np.flip(array, flipped), turns, plane).copy()

    return move(image), move(labels)


def _change_intensity(image: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Scale and shift each sequence and add noise, in place, where the image is not background."""
    width, channels = image.shape[-2:]
    brain = image[..., 0] != 0
    for channel in range(1, channels):
        brain |= image[..., channel] != 0
    scale = np.asarray(generator.uniform(1 - SCALE, 1 + SCALE, channels), np.float32)
    shift = np.asarray(generator.uniform(-SHIFT, SHIFT, channels), np.float32)
    # Line by line: NumPy's inner loop runs along the last axis, and that of the channels is short.
    lines = image.reshape(-1, width * channels)
    lines *= np.tile(scale, width)
    lines += np.tile(shift, width)
    deviates = np.float32(generator.uniform(0, NOISE)) * _NORMAL_OF_BYTE
    lines += deviates.take(generator.integers(0, 256, lines.shape, np.uint8))
    lines *= np.repeat(brain, channels).reshape(lines.shape)
    return image
