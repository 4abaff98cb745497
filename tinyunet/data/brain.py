"""Finds the brain in an image, normalises intensities inside it, and reports oddities to a person.

Images come skull-stripped. The background around the brain is 0 in most data sets, another number in some
(-1, or the value that 0 gets when a whole volume is scaled), and a little noise in others. The corners of a
volume show the background: a head is round, and leaves them free also where the volume was cut closely.

An image has shape=(D, H, W, C), the mask of its brain shape=(D, H, W). Notes are given by sequence, from 0
on.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_CORNER = 1 / 8  # side of a corner, as a share of the volume's
# Share of the corners' voxels that must have one value: in any case, for a value other than 0, for 0. A brain
# may reach into a corner; 0 is the likeliest background.
_ALL, _MOST, _HALF = 0.99, 0.9, 0.5
_FAINT = 0.1  # largest noise of a background, as a share of the signal
_FLAT = 0.3  # a sequence with one value in more of the brain than this share hardly shows a brain


def find_brain(image: NDArray[Any]) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Return the mask where any sequence is not background, and a note for each background other than 0."""
    brain = np.zeros(image.shape[:3], np.bool_)
    odd: dict[int, str] = {}
    found = [_background(image[..., channel]) for channel in range(image.shape[-1])]
    if not any(found):
        note = "no background around the brain; expected a skull-stripped image with 0 around it"
        return np.asarray(image.any(axis=-1)), dict.fromkeys(range(image.shape[-1]), note)
    for channel, background in enumerate(found):
        if background is None:  # the other sequences show the brain
            continue
        value, noise = background
        voxels = image[..., channel]
        if noise:
            with np.errstate(over="ignore"):
                differs = np.abs(voxels - value) > noise
            note = f"background is noise around {value:.2g}, not 0; voxels like it are left out"
        else:
            differs = voxels != value
            note = f"background is {value:.3g}, not 0; it is left out" if value else ""
        brain |= differs
        if note and differs.any():
            odd[channel] = note
    return brain, odd


def _background(volume: NDArray[Any]) -> tuple[float, float] | None:
    """Return the background's value in one sequence and the largest noise around it; None without one."""
    sides = [max(1, int(size * _CORNER)) for size in volume.shape]
    ends = [np.r_[:side, size - side : size] for side, size in zip(sides, volume.shape, strict=True)]
    corners = volume[np.ix_(*ends)].ravel()
    values, counts = np.unique(corners, return_counts=True)
    value, share = values[counts.argmax()], counts.max() / corners.size
    if share < _ALL:
        middle = np.median(corners)
        steps = tuple(slice(None, None, max(1, size // 50)) for size in volume.shape)
        with np.errstate(over="ignore"):
            noise = np.percentile(np.abs(corners - middle), 99.9)
            signal = np.percentile(np.abs(volume[steps] - middle), 99)
        if noise <= _FAINT * signal:
            return float(middle), float(2 * noise)
    return (float(value), 0.0) if share >= (_MOST if value else _HALF) else None


def empty_sequences(image: NDArray[Any], brain: NDArray[np.bool_]) -> dict[int, str]:
    """Return a note for each sequence that has one value in the whole brain: there is nothing in it."""
    empty: dict[int, str] = {}
    for channel in range(image.shape[-1]):
        inside = image[..., channel][brain]
        # One voxel alone has one value.
        if brain.size > 1 and (not inside.size or inside.min() == inside.max()):
            value = image[..., channel].flat[0] if not inside.size else inside[0]
            empty[channel] = f"is {value:.4g} everywhere, as if it was absent"
    return empty


def odd_sequences(image: NDArray[Any], brain: NDArray[np.bool_]) -> dict[int, str]:
    """Return a note for each sequence that is nearly constant, or a copy of another sequence."""
    odd: dict[int, str] = {}
    empty = empty_sequences(image, brain)
    for channel in range(image.shape[-1]):
        inside = image[..., channel][brain]
        if channel in empty or not inside.size:
            continue
        values, counts = np.unique(inside[:: max(1, inside.size // 100_000)], return_counts=True)
        share = counts.max() / counts.sum()
        if counts.sum() > 1000 and share > _FLAT:
            odd[channel] = f"is {values[counts.argmax()]:.4g} in {share:.0%} of the brain"
            continue
        earlier = (other for other in range(channel) if other not in {**odd, **empty})
        twin = next((o for o in earlier if np.array_equal(image[..., o], image[..., channel])), None)
        if twin is not None:
            odd[channel] = f"is the same as sequence {twin + 1}"
    return odd


def normalise(image: NDArray[Any], brain: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Return an image whose sequences have mean 0 and deviation 1 inside the brain, and are 0 outside.

    One mask serves all sequences: a dark voxel of one sequence (fluid in FLAIR) is brain nevertheless. A
    sequence that is constant inside the brain becomes 0. So all channels are exactly 0 outside, and at least
    one is not 0 inside (but for constant images): the mask can be found again. The result is float32 and
    C-contiguous; mean and deviation are computed in float64.
    """
    if brain is None:
        brain, _ = find_brain(image)
    normalised = np.zeros(image.shape, np.float32)
    for channel in range(image.shape[-1]):
        inside = image[..., channel][brain].astype(np.float64)
        # Dividing by a power of two rounds nothing, and keeps squares from being too large or too small.
        _, exponent = np.frexp(np.abs(inside).max(initial=0.0))
        inside = np.ldexp(inside, -exponent)
        if inside.size and np.ptp(inside) > 0:
            normalised[brain, channel] = (inside - inside.mean()) / inside.std()
    return normalised
