"""One case as arrays: reading image and labels, and the split of cases into three parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError
from tinyunet.data.brain import empty_sequences, find_brain, normalise, odd_sequences
from tinyunet.data.conventions import Meaning
from tinyunet.data.geometry import Geometry
from tinyunet.data.labels import read_labels
from tinyunet.data.nifti import read_volume
from tinyunet.data.resample import resample_image, resample_labels
from tinyunet.data.sequences import Choice
from tinyunet.data.spacing import Spacing, in_mm, shape_for
from tinyunet.data.stream import memory_for

# Voxels of a resampled volume: four sequences of so many take 2 GB.
_MOST_VOXELS = 512**3
_LARGEST = 2300.0  # millilitres of a brain
_DARK = 0.1  # per cent of the brain that is darker than its darkest tissue: outliers

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Case:
    """The files of one patient."""

    name: str  # unique within the data set
    image_paths: tuple[Path, ...]  # one file with all sequences, or one for each in the order of the channels
    label_path: Path
    channels: int  # number of sequences
    label_values: tuple[int, ...]  # [i] is the number that stands for class i in the label file
    choice: Choice | None = None  # the sequences of one file, if not all of them


@dataclass(frozen=True)
class Dataset:
    """The labelled cases of a folder."""

    path: Path
    cases: tuple[Case, ...]  # sorted by name
    modalities: tuple[str, ...]  # name of each channel of an image
    labels: tuple[str, ...]  # name of each class, the background first
    label_values: tuple[int, ...]  # as in each Case
    source: str = ""  # where names and numbers come from
    file_modalities: tuple[str, ...] = ()  # of all sequences that a file has, or its case
    regions: Mapping[str, tuple[int, ...]] | None = None  # the classes of each region, if the data name some

    @property
    def meaning(self) -> Meaning:
        """Name and number of each class, and where both come from."""
        return Meaning(self.labels, self.label_values, self.source)


def load_case(
    case: Case, notes: list[str] | None = None, spacing: Spacing | None = None, allow_missing: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Return the image of a case, its labels, shape=(D, H, W) uint8 C-contiguous, and the image's geometry.

    Parameters and errors are as for :func:`load_image` and :func:`tinyunet.data.labels.read_labels`. The
    labels lie on the voxels of the image that is returned.
    """
    how = notes, spacing, allow_missing, case.choice
    image, geometry = load_image(case.image_paths, case.channels, *how)
    labels = load_labels(case, geometry)
    return image, resample_labels(labels, image.shape[:3]), geometry


def load_labels(case: Case, geometry: Geometry) -> NDArray[np.uint8]:
    """Return the class of each voxel of a case's image, never resampled: shape=(D, H, W), C-contiguous.

    ``geometry`` is the image's. DataError as :func:`on_same_voxels` and
    :func:`tinyunet.data.labels.read_labels`.
    """
    labels, label_geometry = read_labels(case.label_path, case.label_values)
    return on_same_voxels(labels, case.label_path, label_geometry, case.image_paths[0], geometry)


def load_image(
    paths: Sequence[str | Path],
    channels: int | None = None,
    notes: list[str] | None = None,
    spacing: Spacing | None = None,
    allow_missing: bool = True,
    choice: Choice | None = None,
) -> tuple[NDArray[np.float32], Geometry]:
    """Read an image as the network sees it: shape=(D, H, W, C), float32, C-contiguous, normalised.

    ``paths`` are one file with all sequences, or one file for each in the order of the channels; the geometry
    comes from the first. ``channels`` is the expected number of sequences, if there is one; if a file has as
    many as a ``choice`` is made of, only the chosen ones are taken. ``notes`` gets a
    line for each file in which something is odd. If voxels differ from ``spacing``, in millimetres along the
    axes of the common frame, the image is resampled to it. With ``allow_missing`` a sequence that has no
    file, or nothing in it, becomes 0. DataError without; or if a file is damaged, the number, size or
    position of the sequences is wrong, or there is nothing in any of them.
    """
    if not paths:
        raise ValueError("paths: no files; expected one for all sequences or one for each")
    first = first_present(paths) if allow_missing else paths[0]
    image, geometry = read_volume(first)
    absent: dict[int, str] = {}
    if len(paths) > 1 or image.ndim == 3:
        volumes = []
        for channel, path in enumerate(paths):
            volume, other = image, geometry
            if allow_missing and not Path(path).exists():
                absent[channel] = "no such file; the model does without this sequence"
                volume = np.zeros(image.shape[:3], image.dtype)
            elif path != first:
                volume, other = read_volume(path)
            volumes.append(on_same_voxels(volume, path, other, first, geometry))
        for path, volume in zip(paths, volumes, strict=True):
            if volume.ndim != 3:
                found = f"{volume.shape[3]} sequences in one of {len(volumes)} files"
                raise DataError(f"{path}: {found}; expected one sequence a file")
        with memory_for(paths[0]):
            image = np.stack(volumes, axis=-1)
    if choice and image.shape[-1] == choice.of:
        image = image[..., list(choice.numbers)]
    if channels is not None and image.shape[-1] != channels:
        raise DataError(f"{paths[0]}: {image.shape[-1]} sequences; expected {channels}")
    brain, odd = find_brain(image)
    empty = empty_sequences(image, brain) | absent
    if empty and (len(empty) == image.shape[-1] or not allow_missing):
        shown = "; ".join(_notes(paths, empty))
        expected = "--allow-missing lets a model do without, as one trained with --sequence-dropout can"
        expected = expected if len(empty) < image.shape[-1] else "expected an image of a head"
        raise DataError(f"{shown}; {expected}")
    if notes is not None:
        notes += _notes(paths, odd | odd_sequences(image, brain, empty) | empty)
        content = float(np.count_nonzero(brain) * geometry.millilitres)
        if content > _LARGEST and not brain.all():
            notes.append(
                f"{first}: what is not background has {content:,.0f} ml, more than a brain; is it the head?"
            )
    with memory_for(paths[0]):
        return _for_network(image, brain, geometry, spacing, paths[0]), geometry


def first_present(paths: Sequence[str | Path]) -> Path:
    """Return the first of the files of an image that is there; the first of all if none is."""
    return Path(next((path for path in paths if Path(path).exists()), paths[0]))


def network_shape(
    path: str | Path, shape: Sequence[int], geometry: Geometry, spacing: Spacing | None
) -> tuple[int, int, int]:
    """Return the shape (D, H, W) that :func:`load_image` gives to a volume of another shape (D, H, W).

    DataError, which names the file, if it would become too large.
    """
    resampled = shape_for(shape, geometry.spacing, spacing)
    if spacing is not None and math.prod(resampled) > max(_MOST_VOXELS, math.prod(shape)):
        size = f"{_size(resampled)} voxels when resampled from {in_mm(geometry.spacing)} to {in_mm(spacing)}"
        raise DataError(f"{path}: {size}; expected at most {_MOST_VOXELS} (another --spacing, or keep)")
    return resampled


def _for_network(
    image: NDArray[Any],
    brain: NDArray[np.bool_],
    geometry: Geometry,
    spacing: Spacing | None,
    path: Path | str,
) -> NDArray[np.float32]:
    """Normalise an image, and resample it if need be; outside the brain it is exactly 0 on both grids.

    Voxels at the surface of the brain are partly outside, where a scanner of larger voxels would have seen no
    signal, too: for resampling, what is outside is as dark as the darkest tissue. (The 0 of normalised images
    is the mean. A net trained at 2.75 mm lost 0.02 to 0.07 of Dice with it on a scan of 1 mm.)
    """
    shape, normalised = image.shape[:3], normalise(image, brain)
    if spacing is None or network_shape(path, shape, geometry, spacing) == shape:
        return normalised
    if brain.any():
        normalised[~brain] = np.percentile(normalised[brain], _DARK, axis=0)
    resampled = resample_image(normalised, geometry.spacing, spacing)
    part = resample_image(brain[..., None], geometry.spacing, spacing, linear=True)
    return normalise(resampled, part[..., 0] >= 0.5)


def _notes(paths: Sequence[str | Path], odd: Mapping[int, str]) -> list[str]:
    """Return a line for each file in which something is odd."""
    if len(paths) > 1:
        return [f"{paths[channel]}: {note}" for channel, note in odd.items()]
    alike: dict[str, list[str]] = {}
    for channel, note in odd.items():
        alike.setdefault(note, []).append(str(channel + 1))
    parts = [f"sequence {', '.join(channels)}: {note}" for note, channels in alike.items()]
    return [f"{paths[0]}: {'; '.join(parts)}"] if parts else []


def on_same_voxels(
    voxels: NDArray[Scalar],
    path: str | Path,
    geometry: Geometry,
    reference_path: str | Path,
    reference: Geometry,
) -> NDArray[Scalar]:
    """Return a volume, shape=geometry.canonical_shape + (...), in the common frame of another file.

    Axes that are turned by 45 degrees are nearest to two, and the last digit of an affine decides between
    them: the common frames of two files that are stored alike may have different orders of axes. Then the
    result is a C-contiguous copy, otherwise it is ``voxels``. DataError, which names both files, if sizes
    differ, or positions differ by more than half a voxel.
    """
    turned = not np.array_equal(geometry.orientation, reference.orientation)
    if turned and geometry.shape == reference.shape and geometry.distance(reference, stored=True) <= 0.5:
        return np.ascontiguousarray(reference.to_canonical(geometry.from_canonical(voxels)))
    shape, expected = geometry.canonical_shape, reference.canonical_shape
    if shape != expected:
        raise DataError(f"{path}: {_size(shape)} voxels; expected {_size(expected)} as in {reference_path}")
    distance = geometry.distance(reference)
    if distance > 0.5:
        moved = f"its affine puts it up to {distance:.1f} voxels away from {reference_path}"
        raise DataError(f"{path}: {moved}; expected both on the same voxels")
    return voxels


def check_patch_fits(path: str | Path, shape: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise DataError, which names the file, if a patch (D, H, W) is larger than a volume (D, H, W, ...)."""
    volume = tuple(shape[:3])
    if any(patch > size for patch, size in zip(patch_size, volume, strict=True)):
        large = f"the patch of {_size(patch_size)} voxels is larger than the volume of {_size(volume)}"
        raise DataError(f"{path}: {large}; expected a patch of at most that size")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
