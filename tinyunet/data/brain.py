"""Where the brain is in an image, and what is odd about the image.

Images come skull-stripped. What surrounds the brain is 0 in most data sets, another number in some
(-1, or whatever 0 becomes when a whole volume is scaled), and a little noise in others. It is what the
corners of a volume hold: a head is round, and leaves them free also where it was cut out closely.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a side, in each corner.
_CORNER = 1 / 8
# Background has one value if so many voxels of the corners have it. 0 is believed sooner than another
# number, for a brain may reach into a corner.
_ALL, _MOST, _HALF = 0.99, 0.9, 0.5
# Noise is far below the brain: its size divided by that of the image.
_FAINT = 0.1
# More of the brain than this with one value, and it is hardly brain.
_FLAT = 0.3


def find_brain(image: NDArray[Any]) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Return where any sequence is not background.

    Parameters
    ----------
    image
        shape=(D, H, W, C).

    Returns
    -------
    brain
        shape=(D, H, W).
    odd
        What a person should know about the background of a sequence, by its number from 0 on; nothing
        if it is 0.
    """
    brain = np.zeros(image.shape[:3], np.bool_)
    odd: dict[int, str] = {}
    found = [_background(image[..., channel]) for channel in range(image.shape[-1])]
    if not any(found):
        told = "no background around the brain; expected a skull-stripped image with 0 around it"
        return np.asarray(image.any(axis=-1)), dict.fromkeys(range(image.shape[-1]), told)
    for channel, background in enumerate(found):
        if background is None:  # the other sequences tell
            continue
        value, noise = background
        voxels = image[..., channel]
        if noise:
            with np.errstate(over="ignore"):
                differs = np.abs(voxels - value) > noise
            told = f"background is noise around {value:.2g}, not 0; what is like it is left out"
        else:
            differs = voxels != value
            told = f"background is {value:.3g}, not 0; it is left out" if value else ""
        brain |= differs
        if told and differs.any():
            odd[channel] = told
    return brain, odd


def odd_sequences(image: NDArray[Any], brain: NDArray[np.bool_]) -> dict[int, str]:
    """Return what is odd about single sequences, by their number from 0 on.

    Parameters
    ----------
    image
        shape=(D, H, W, C).
    brain
        shape=(D, H, W).
    """
    odd: dict[int, str] = {}
    channels = image.shape[-1]
    for channel in range(channels):
        inside = image[..., channel][brain]
        if not inside.size or inside.min() == inside.max():
            value = image[..., channel].flat[0] if not inside.size else inside[0]
            odd[channel] = f"is {value:.4g} everywhere, as if it was absent"
            continue
        values, counts = np.unique(inside[:: max(1, inside.size // 100_000)], return_counts=True)
        share = counts.max() / counts.sum()
        if counts.sum() > 1000 and share > _FLAT:
            odd[channel] = f"is {values[counts.argmax()]:.4g} in {share:.0%} of the brain"
            continue
        for other in range(channel):
            if other not in odd and np.array_equal(image[..., other], image[..., channel]):
                odd[channel] = f"is the same as sequence {other + 1}"
                break
    return odd


def _corners(volume: NDArray[Any]) -> NDArray[Any]:
    """Return the voxels of all eight corners, in one row."""
    sides = [max(1, int(size * _CORNER)) for size in volume.shape[:3]]
    ends = [np.r_[:side, size - side : size] for side, size in zip(sides, volume.shape[:3], strict=True)]
    return volume[np.ix_(*ends)].ravel()


def _background(volume: NDArray[Any]) -> tuple[float, float] | None:
    """Return the value of the background and how far its noise may be from it; None if there is none.

    Parameters
    ----------
    volume
        shape=(D, H, W).
    """
    corners = _corners(volume)
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
