"""Finds the brain in an image, normalises intensities inside it, and reports oddities to a person.

Images come skull-stripped. The background around the brain is 0 in most data sets, another number in some
(-1, or the value that 0 gets when a whole volume is scaled), and noise in others. The corners of a volume
show the background: a head is round, and leaves them free also where the volume was cut closely. A border
of another value (padding) hides them; so the box inside the border is looked at as well.

An image has shape=(D, H, W, C), the mask of its brain shape=(D, H, W). Notes are given by sequence, from 0
on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CORNER = 1 / 8  # side of a corner, as a share of the volume's
# Share of the corners' voxels that must have one value: in any case, for a value other than 0, for 0. A brain
# may reach into a corner; 0 is the likeliest background.
_ALL, _MOST, _HALF = 0.99, 0.9, 0.5
# Less will do if the value is so many times as common as the next: the others are measured, and this is not.
_LONE, _TIMES = 0.2, 10
_FAINT = 0.12  # largest deviation of a background's noise, as a share of the signal
# Brain is a voxel that is so many deviations away from the background in one sequence; and a voxel that is so
# apart in the root mean square over the sequences, together with most of its neighbours.
_FAR, _APART = 7.0, 2.0
_SMALLEST = 0.05  # share of a volume that a brain fills at least, if its background is noise
_PADDED = 0.02  # share of a brain that must turn out to be the background within a border
_NEAR = 0.25  # such a background is hardly brighter than the border, as a share of the signal
_PLANE = 9  # voxels of a plane that may be a border
_FLAT = 0.3  # a sequence with one value in more of the brain than this share hardly shows a brain
_SAME = 0.1  # mean of a sequence in the brain and around it, in deviations, if it shows none
_NONE = "no background around the brain; expected a skull-stripped image with 0 around it"

Box = tuple[slice, ...]


class _Background(NamedTuple):
    """The value around the brain in one sequence, and the deviation of the noise there."""

    value: float
    deviation: float = 0.0

    @property
    def note(self) -> str:
        """What is odd about it."""
        if self.deviation:
            return f"background is noise around {self.value:.2g}, not 0; voxels like it are left out"
        return f"background is {self.value:.3g}, not 0; it is left out" if self.value else ""


def find_brain(image: NDArray[Any]) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Return the mask where any sequence is not background, and a note for each background other than 0."""
    found = _backgrounds(image)
    brain = _apart(image, found)
    if brain is None:
        box = _without_border(image)
        brain = np.zeros(image.shape[:3], np.bool_)
        brain[box] = image[box].any(axis=-1)
    else:
        box = box_of(brain)
    within = _background_within(image[box], brain[box], found)
    if within is not None:
        inner, found = within
        brain[:] = False
        brain[box] = inner
    if not any(found):
        return brain, dict.fromkeys(range(image.shape[-1]), _NONE)
    notes = {c: each.note for c, each in enumerate(found) if each and (image[brain, c] != each.value).any()}
    return brain, {channel: note for channel, note in notes.items() if note}


def _background_within(
    image: NDArray[Any], brain: NDArray[np.bool_], around: Sequence[_Background | None]
) -> tuple[NDArray[np.bool_], list[_Background | None]] | None:
    """Look for another background inside a border: the brain, and the background; None without it."""
    if not image.size:
        return None
    found = _backgrounds(image)
    for channel, (inner, outer) in enumerate(zip(found, around, strict=True)):
        if inner and outer and not _can_lie_within(inner, outer, image[..., channel]):
            found[channel] = None
    if all(each is None or each == outer for each, outer in zip(found, around, strict=True)):
        return None
    inside = _apart(image, found)
    if inside is None:
        return None
    inside &= brain
    size = np.count_nonzero(inside)
    too_small = size < 2 * _SMALLEST * inside.size
    alike = any(around) and size > (1 - _PADDED) * np.count_nonzero(brain)
    return None if too_small or alike else (inside, found)


def _can_lie_within(inner: _Background, outer: _Background, volume: NDArray[Any]) -> bool:
    """Whether a value inside a border may be background, too: tissue is brighter than what is around it."""
    if inner.value == 0 or inner.value <= outer.value:
        return True
    signal = np.percentile(np.abs(_thin(volume) - outer.value), 99)
    return bool(inner.value - outer.value <= _NEAR * signal)


def _backgrounds(image: NDArray[Any]) -> list[_Background | None]:
    """Return the background of each sequence; noise counts only if most sequences say so."""
    found = [_background(image[..., channel]) for channel in range(image.shape[-1])]
    exact = any(each and not each.deviation for each in found)
    most = sum(each is not None for each in found) * 2 > len(found)
    return found if exact or most else [None] * len(found)


def _background(volume: NDArray[Any]) -> _Background | None:
    """Return the background of one sequence, as the corners show it; None without one."""
    sides = [max(1, int(size * _CORNER)) for size in volume.shape]
    ends = [np.r_[:side, size - side : size] for side, size in zip(sides, volume.shape, strict=True)]
    corners = volume[np.ix_(*ends)].ravel()
    values, counts = np.unique(corners, return_counts=True)
    value, share = values[counts.argmax()], counts.max() / corners.size
    if share < _ALL:
        middle = np.median(corners)  # of zeros around a box of noise, only the noise varies
        varying = corners[corners != value] if share >= _HALF else corners
        with np.errstate(over="ignore"):
            usual, most = np.percentile(np.abs(varying - middle), (68.3, 99.5))
            signal = np.percentile(np.abs(_thin(volume) - middle), 99)
        deviation = max(usual, most / 2.8)  # of normal noise both are its deviation
        if 0 < deviation <= _FAINT * signal < np.inf:
            return _Background(float(middle), float(deviation))
    second = np.partition(counts, -2)[-2] if counts.size > 1 else 0
    alone = share >= _LONE and counts.max() >= _TIMES * second and value < volume.max()
    return _Background(float(value)) if share >= (_MOST if value else _HALF) or alone else None


def _thin(volume: NDArray[Any]) -> NDArray[np.float64]:
    """Return voxels here and there: enough for a percentile."""
    steps = tuple(slice(None, None, max(1, size // 50)) for size in volume.shape)
    return volume[steps].astype(np.float64)


def _apart(image: NDArray[Any], found: Sequence[_Background | None]) -> NDArray[np.bool_] | None:
    """Return the mask of voxels that are not background; None if no background is known."""
    if not any(found):
        return None
    brain = np.zeros(image.shape[:3], np.bool_)
    squares, noisy = np.zeros(image.shape[:3], np.float32), 0
    for channel, background in enumerate(found):
        if background is None:  # the other sequences show the brain
            continue
        if not background.deviation:
            brain |= image[..., channel] != background.value
            continue
        with np.errstate(over="ignore"):
            square = ((image[..., channel] - np.float64(background.value)) / background.deviation) ** 2
        brain |= square > _FAR**2
        squares += square.astype(np.float32)
        noisy += 1
    if not noisy:
        return brain
    apart = squares > _APART**2 * noisy
    brain |= apart & _most_neighbours(apart)
    return brain if np.count_nonzero(brain) >= _SMALLEST * brain.size else None


def _most_neighbours(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where most of the 3 x 3 x 3 voxels around a voxel are true; beyond the border nothing is."""
    counts = mask.astype(np.uint8)
    for axis in range(3):
        line, before = np.moveaxis(counts.copy(), axis, 0), np.moveaxis(counts, axis, 0)
        line[1:] += before[:-1]
        line[:-1] += before[1:]
        counts = np.moveaxis(line, 0, axis)
    return np.asarray(counts > 13)


def _without_border(image: NDArray[Any]) -> Box:
    """Return the box that is left without the outer planes in which no sequence varies."""
    box = [slice(0, size) for size in image.shape[:3]]
    for axis in (0, 1, 2, 0, 1):  # a corner of two borders is flat only without one of them
        for end in (0, -1):
            while box[axis].start < box[axis].stop:
                at = box[axis].start if end == 0 else box[axis].stop - 1
                plane = image[tuple(slice(at, at + 1) if a == axis else box[a] for a in range(3))]
                if plane[..., 0].size < _PLANE or (plane != plane[:1, :1, :1]).any():
                    break
                box[axis] = slice(at + 1, box[axis].stop) if end == 0 else slice(box[axis].start, at)
    return tuple(box)


def box_of(mask: NDArray[np.bool_]) -> Box:
    """Return the smallest box around the true voxels of a mask, shape=(D, H, W); an empty one without any."""
    box = []
    for axis in range(3):
        places = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0))
    return tuple(box)


def widened(box: Box, margin: int, shape: Sequence[int]) -> Box:
    """Return a box with a margin of so many voxels on each side, inside a volume of a shape (D, H, W)."""
    sides = zip(box, shape, strict=True)
    return tuple(slice(max(0, side.start - margin), min(side.stop + margin, n)) for side, n in sides)


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


def odd_sequences(image: NDArray[Any], brain: NDArray[np.bool_], empty: Mapping[int, str]) -> dict[int, str]:
    """Return a note for each sequence that is nearly constant, or a copy of another, and is not ``empty``."""
    odd: dict[int, str] = {}
    for channel in range(image.shape[-1]):
        inside = image[..., channel][brain]
        if channel in empty or not inside.size:
            continue
        values, counts = np.unique(inside[:: max(1, inside.size // 100_000)], return_counts=True)
        share = counts.max() / counts.sum()
        if counts.sum() > 1000 and share > _FLAT:
            odd[channel] = f"is {values[counts.argmax()]:.4g} in {share:.0%} of the brain"
            continue
        if _looks_like_noise(inside, image[..., channel][~brain]):
            odd[channel] = "looks the same in the brain and around it, as if it was noise"
            continue
        earlier = (other for other in range(channel) if other not in {**odd, **empty})
        twin = next((o for o in earlier if np.array_equal(image[..., o], image[..., channel])), None)
        if twin is not None:
            odd[channel] = f"is the same as sequence {twin + 1}"
    return odd


def _looks_like_noise(inside: NDArray[Any], outside: NDArray[Any]) -> bool:
    """Whether voxels in the brain and around it have one mean, and vary alike."""
    if min(inside.size, outside.size) < 1000:
        return False
    (mean, deviation), (around, its) = (
        (part.mean(), part.std())
        for part in (each[:: max(1, each.size // 100_000)].astype(np.float64) for each in (inside, outside))
    )
    return bool(abs(mean - around) < _SAME * deviation and its > 0.5 * deviation)


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
