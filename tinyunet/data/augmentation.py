"""Random changes of a patch: a net sees more scanners, and more heads, than there are scans.

:func:`augment` is quick, and enough for phantoms. :func:`augment_fully` has nnU-Net's list: first
the patch is read from the volume at points that are turned, scaled and bent (:func:`warped_patch`), then
sequences change as scanners change them (:data:`CHANGES`), then the patch is mirrored.

A change of intensity is a function of the image, shape=(D, H, W, C) float32 and normalised, of its brain,
shape=(D, H, W) bool, and of a random generator. It changes the image in place, in the brain alone: the
background, where all sequences are exactly 0, does not depend on the scanner, and the net sees where the
brain ends as in a prediction.

Source: Isensee et al., "nnU-Net" (2021), supplementary note 4, for the list and its probabilities; the field
of a coil and elastic deformation are not on by default there. Ranges are those of its program.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.data.patches import check_shapes

Image: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]
Random: TypeAlias = np.random.Generator
Change: TypeAlias = Callable[[Image, Mask, Random], None]

# Each sequence is multiplied by a number up to this far from 1, and a number up to this far from 0 is added.
# A normalised image has deviation 1, so these are the differences between scanners, not artefacts.
SCALE = 0.15
SHIFT = 0.15
NOISE = 0.1  # largest deviation of the noise, which is drawn anew for each patch

# A normal deviate for each value of a byte, of deviation 1. Drawing bytes is ten times faster than drawing
# from the generator's own normal distribution, and 256 steps are fine enough for a little noise.
_QUANTILES = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])
_NORMAL_OF_BYTE = (_QUANTILES / _QUANTILES.std()).astype(np.float32)

# Probabilities and ranges of a patch's rotation about each axis, scaling and bending.
ROTATION, SCALING, ELASTIC = 0.2, 0.2, 0.1
ANGLE = np.pi / 6
ZOOM = 0.7, 1.4  # voxels of the volume per voxel of the patch
BEND = 0.06  # of the patch's length, at most
_TINY = np.float32(1e-8)


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
    check_shapes(image, labels)
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


def augment_fully(
    image: Image, labels: NDArray[np.uint8], corner: Sequence[int], size: Sequence[int], random: Random
) -> tuple[Image, NDArray[np.uint8]]:
    """Take a patch of ``size`` that begins at ``corner`` of a volume, and change it by nnU-Net's list.

    Each change comes with the probability in :data:`CHANGES`. The same state of ``random`` gives the same
    patch. Returned arrays are copies, C-contiguous. ValueError if image and labels differ in shape.
    """
    check_shapes(image, labels)
    image, labels = warped_patch(image, labels, corner, size, random)
    brain = brain_of(image)
    if brain.any():
        for change, probability in CHANGES:
            if random.random() < probability:
                change(image, brain, random)
        image *= brain[..., None]
    mirrored = tuple(axis for axis in range(3) if random.integers(2))
    return np.flip(image, mirrored).copy(), np.flip(labels, mirrored).copy()


def brain_of(image: Image) -> Mask:
    """Return where any sequence of an image differs from 0, shape=(D, H, W)."""
    brain = image[..., 0] != 0
    for channel in range(1, image.shape[-1]):  # several times faster than any(axis=-1)
        brain |= image[..., channel] != 0
    return brain


# ---- where the patch is read: rotation, scaling, elastic deformation -------------------------------------


def warped_patch(
    image: Image, labels: NDArray[np.uint8], corner: Sequence[int], size: Sequence[int], random: Random
) -> tuple[Image, NDArray[np.uint8]]:
    """Read a patch at points that are turned, scaled and bent around its middle.

    Sequences are interpolated linearly; labels, and what is brain, come from the nearest voxel. Points
    outside the volume are background.
    """
    offsets = _offsets(size, random)
    if offsets is None:
        box = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        return image[box].copy(), labels[box].copy()
    middle = np.asarray(corner) + (np.asarray(size) - 1) / 2
    points = offsets + middle[:, None, None, None].astype(np.float32)
    # Only this part of the volume is read.
    first = np.clip(np.floor(points.min((1, 2, 3))).astype(int), 0, np.subtract(labels.shape, 1))
    end = np.clip(np.ceil(points.max((1, 2, 3))).astype(int) + 1, first + 1, labels.shape)
    part = tuple(map(slice, first, end))
    points -= first[:, None, None, None].astype(np.float32)
    nearest = tuple(
        np.clip(np.rint(p).astype(np.int32), 0, n - 1) for p, n in zip(points, end - first, strict=True)
    )
    limits = np.subtract(labels.shape, first)[:, None, None, None]
    inside = np.all((points > -0.5) & (points < limits - 0.5), axis=0)
    warped = np.empty((*size, image.shape[-1]), np.float32)
    for channel in range(image.shape[-1]):
        ndimage.map_coordinates(
            image[part][..., channel], points, warped[..., channel], order=1, mode="nearest", prefilter=False
        )
    warped *= (brain_of(image[part])[nearest] & inside)[..., None]
    return warped, labels[part][nearest] * inside


def _offsets(size: Sequence[int], random: Random) -> NDArray[np.float32] | None:
    """Draw where each voxel of a patch is read, from its middle, in voxels; shape=(3, D, H, W).

    None if neither a rotation, nor a scaling, nor a deformation was drawn. A patch that is one voxel deep is
    of two dimensions: it stays in its plane.
    """
    turns, scales, bends = random.random(3) < (ROTATION, SCALING, ELASTIC)
    if not (turns or scales or bends):
        return None
    is_flat = [length == 1 for length in size]
    matrix = np.eye(3)
    if turns:
        for plane in combinations(range(3), 2):
            angle = random.uniform(-ANGLE, ANGLE)
            if not any(is_flat[axis] for axis in plane):
                matrix = matrix @ _rotation(plane, angle)
    if scales:
        matrix *= random.uniform(*ZOOM)
    axes = [np.arange(length, dtype=np.float32) - (length - 1) / 2 for length in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    points = np.tensordot(matrix.astype(np.float32), grid, 1)
    if bends:
        for axis, length in enumerate(size):
            if not is_flat[axis]:
                field = _smooth_field(size, random, 4)
                points[axis] += field * np.float32(random.uniform(0, BEND * length))
    return points


def _rotation(plane: tuple[int, int], angle: float) -> NDArray[np.float64]:
    """Return the matrix that turns two axes by an angle in radians; shape=(3, 3)."""
    matrix, (a, b) = np.eye(3), plane
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def _smooth_field(size: Sequence[int], random: Random, degree: int) -> Image:
    """Draw a smooth field between -1 and 1: a random polynomial in the three coordinates."""
    coefficients = random.uniform(-1, 1, (degree + 1,) * 3)
    axes = [np.linspace(-1, 1, length) if length > 1 else np.zeros(1) for length in size]
    field = np.asarray(np.polynomial.legendre.leggrid3d(axes[0], axes[1], axes[2], coefficients))
    return (field / np.abs(field).max()).astype(np.float32)


# ---- what scanners change -------------------------------------------------------------------------------


def noise(image: Image, brain: Mask, random: Random) -> None:
    """Add normal noise, of a deviation up to 0.1."""
    image += _noise(image.shape, random.uniform(0, NOISE), random)


def blur(image: Image, brain: Mask, random: Random) -> None:
    """Blur each second sequence or so by a Gaussian of a deviation of 0.5 to 1 voxel."""
    for channel in _some(image, 0.5, random):
        image[..., channel] = ndimage.gaussian_filter(
            image[..., channel], random.uniform(0.5, 1.0), truncate=3.0
        )


def brightness(image: Image, brain: Mask, random: Random) -> None:
    """Multiply each sequence by a number from 0.75 to 1.25."""
    image *= np.asarray(random.uniform(0.75, 1.25, image.shape[-1]), np.float32)


def contrast(image: Image, brain: Mask, random: Random) -> None:
    """Move each sequence away from its mean, or towards it, by up to a quarter; its range stays."""
    for channel in range(image.shape[-1]):
        voxels = image[..., channel][brain]
        low, high, mean = voxels.min(), voxels.max(), voxels.mean()
        changed = (voxels - mean) * np.float32(random.uniform(0.75, 1.25)) + mean
        image[..., channel][brain] = np.clip(changed, low, high)


def low_resolution(image: Image, brain: Mask, random: Random) -> None:
    """Give each second sequence or so voxels that are up to twice as long, and interpolate them back."""
    for channel in _some(image, 0.5, random):
        fine, zoom = image[..., channel], random.uniform(0.5, 1.0)
        coarse = [max(1, round(length * zoom)) for length in fine.shape]
        small = ndimage.zoom(fine, np.divide(coarse, fine.shape), order=0)
        image[..., channel] = ndimage.zoom(small, np.divide(fine.shape, coarse), order=1)


def bias_field(image: Image, brain: Mask, random: Random) -> None:
    """Multiply all sequences, above the darkest voxel of each, by the smooth field of a receiving coil."""
    field = np.exp(np.float32(random.uniform(0, 0.3)) * _smooth_field(image.shape[:3], random, 3))
    darkest = np.array([image[..., channel][brain].min() for channel in range(image.shape[-1])])
    image -= darkest
    image *= field[..., None]
    image += darkest


def gamma(image: Image, brain: Mask, random: Random, inverted: bool = False) -> None:
    """Raise each sequence, scaled to 0 to 1, to a power from 0.7 to 1.5; mean and deviation stay."""
    for channel in range(image.shape[-1]):
        voxels = image[..., channel][brain]
        mean, deviation = voxels.mean(), voxels.std()
        scaled = (voxels - voxels.min()) / max(np.ptp(voxels), _TINY)
        power = np.float32(random.uniform(0.7, 1.5))
        changed = 1 - (1 - scaled) ** power if inverted else scaled**power
        changed = (changed - changed.mean()) / max(changed.std(), _TINY)
        image[..., channel][brain] = changed * deviation + mean


def inverted_gamma(image: Image, brain: Mask, random: Random) -> None:
    """Change bright voxels as :func:`gamma` changes dark ones."""
    gamma(image, brain, random, inverted=True)


#: The changes of intensity in their order, each with its probability.
CHANGES: tuple[tuple[Change, float], ...] = (
    (noise, 0.1),
    (blur, 0.2),
    (brightness, 0.15),
    (contrast, 0.15),
    (low_resolution, 0.25),
    (bias_field, 0.15),
    (inverted_gamma, 0.1),
    (gamma, 0.3),
)


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


def _some(image: Image, probability: float, random: Random) -> NDArray[np.intp]:
    """Draw some of the sequences."""
    return np.flatnonzero(random.random(image.shape[-1]) < probability)


def _noise(shape: Sequence[int], deviation: float, random: Random) -> Image:
    deviates = np.float32(deviation) * _NORMAL_OF_BYTE
    return deviates.take(random.integers(0, 256, shape, np.uint8))


def _change_intensity(image: NDArray[np.float32], generator: np.random.Generator) -> None:
    """Scale and shift each sequence and add noise, in place, where the image is not background."""
    width, channels = image.shape[-2:]
    brain = brain_of(image)
    scale = np.asarray(generator.uniform(1 - SCALE, 1 + SCALE, channels), np.float32)
    shift = np.asarray(generator.uniform(-SHIFT, SHIFT, channels), np.float32)
    # Line by line: NumPy's inner loop runs along the last axis, and an axis of channels is short.
    lines = image.reshape(-1, width * channels)
    lines *= np.tile(scale, width)
    lines += np.tile(shift, width)
    lines += _noise(lines.shape, generator.uniform(0, NOISE), generator)
    lines *= np.repeat(brain, channels).reshape(lines.shape)
