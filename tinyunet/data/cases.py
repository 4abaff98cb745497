"""One case as arrays: reading image and labels, normalising, and the split into three parts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.brain import find_brain, odd_sequences
from tinyunet.data.nifti import DataError, Geometry, read_labels, read_shape, read_volume
from tinyunet.data.stream import memory_for

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Case:
    """The files of one patient.

    Attributes
    ----------
    name
        Unique within its data set.
    image_paths
        One file that holds all sequences, or one file for each, in the order of the channels.
    label_path
        The file with the labels.
    channels
        Number of sequences.
    label_values
        ``label_values[i]`` is the number that stands for class ``i`` in the label file.
    """

    name: str
    image_paths: tuple[Path, ...]
    label_path: Path
    channels: int
    label_values: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The labelled cases of a folder.

    Attributes
    ----------
    path
        The folder.
    cases
        Sorted by name.
    modalities
        Name of each channel of an image.
    labels
        Name of each class; class 0 is the background.
    label_values
        ``label_values[i]`` is the number that stands for class ``i`` in the label files.
    source
        What says so.
    """

    path: Path
    cases: tuple[Case, ...]
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    label_values: tuple[int, ...]
    source: str = ""

    @property
    def meaning(self) -> tuple[tuple[str, ...], tuple[int, ...], str]:
        """Name and number of each class, and what says so."""
        return self.labels, self.label_values, self.source

    @property
    def in_channels(self) -> int:
        """Number of channels of an image."""
        return len(self.modalities)

    @property
    def classes(self) -> int:
        """Number of classes, the background among them."""
        return len(self.labels)


def load_case(
    case: Case, notes: list[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Read a case for training.

    Parameters
    ----------
    case
        From a :class:`Dataset`.
    notes
        As for :func:`load_image`.

    Returns
    -------
    image
        shape=(D, H, W, C), float32, C-contiguous, normalised as by :func:`normalise`.
    labels
        shape=(D, H, W), uint8, C-contiguous.
    geometry
        Of the image as stored.

    Raises
    ------
    DataError
        A file is missing, damaged, or does not fit the others or the data set.
    """
    image, geometry = load_image(case.image_paths, case.channels, notes)
    labels, label_geometry = read_labels(case.label_path, case.label_values)
    labels = on_same_voxels(labels, case.label_path, label_geometry, case.image_paths[0], geometry)
    return image, labels, geometry


def load_image(
    paths: Sequence[str | Path], channels: int | None = None, notes: list[str] | None = None
) -> tuple[NDArray[np.float32], Geometry]:
    """Read and normalise an image, as the network sees it.

    Parameters
    ----------
    paths
        One file with all sequences, or one file for each, in the order of the channels.
    channels
        How many sequences are expected; any number if not given.
    notes
        Lines that name a file and what is odd about it are appended.

    Returns
    -------
    image
        shape=(D, H, W, C), float32, C-contiguous, normalised as by :func:`normalise`.
    geometry
        Of the first file as stored.

    Raises
    ------
    DataError
        A file is missing or damaged, or the number, size or position of the sequences is wrong.
    """
    if not paths:
        raise ValueError("paths: no files; expected one for all sequences or one for each")
    first, geometry = read_volume(paths[0])
    volumes = [first]
    for path in paths[1:]:
        volume, other = read_volume(path)
        volumes.append(on_same_voxels(volume, path, other, paths[0], geometry))
    if len(volumes) == 1 and first.ndim == 4:
        image = first
    else:
        for path, volume in zip(paths, volumes, strict=True):
            if volume.ndim != 3:
                raise DataError(
                    f"{path}: {volume.shape[3]} sequences in one of {len(volumes)} files; "
                    "expected one sequence a file"
                )
        with memory_for(paths[0]):
            image = np.stack(volumes, axis=-1)
    if channels is not None and image.shape[-1] != channels:
        raise DataError(f"{paths[0]}: {image.shape[-1]} sequences; expected {channels}")
    brain, odd = find_brain(image)
    if notes is not None:
        notes += _notes(paths, odd | odd_sequences(image, brain))
    with memory_for(paths[0]):
        return normalise(image, brain), geometry


def _notes(paths: Sequence[str | Path], odd: Mapping[int, str]) -> list[str]:
    """Return a line for each file in which something is odd."""
    if len(paths) > 1:
        return [f"{paths[channel]}: {told}" for channel, told in odd.items()]
    alike: dict[str, list[str]] = {}
    for channel, told in odd.items():
        alike.setdefault(told, []).append(str(channel + 1))
    parts = [f"sequence {', '.join(channels)}: {told}" for told, channels in alike.items()]
    return [f"{paths[0]}: {'; '.join(parts)}"] if parts else []


def normalise(image: NDArray[Any], brain: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Bring each sequence to mean 0 and deviation 1 inside the brain; outside is 0.

    The brain is where any sequence is not background, one mask for all: MRI data sets of this kind
    come skull-stripped, and a dark voxel of one sequence (fluid in FLAIR) is brain nevertheless. A
    sequence that is constant inside the brain becomes 0. So outside all channels are exactly 0, and
    inside (but for constant images) at least one is not: the mask can be found again.

    Parameters
    ----------
    image
        shape=(D, H, W, C), integers or floats; not changed.
    brain
        Where it is, shape=(D, H, W); left out, :func:`tinyunet.data.brain.find_brain` finds it.

    Returns
    -------
    normalised
        shape=(D, H, W, C), float32, C-contiguous. Mean and deviation are taken in float64.
    """
    if brain is None:
        brain, _ = find_brain(image)
    normalised = np.zeros(image.shape, np.float32)
    for channel in range(image.shape[-1]):
        inside = _near_one(image[..., channel][brain].astype(np.float64))
        if inside.size and np.ptp(inside) > 0:
            normalised[brain, channel] = (inside - inside.mean()) / inside.std()
    return normalised


def _near_one(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by a power of two, which rounds nothing, so that no square is too large or too small."""
    _, exponent = np.frexp(np.abs(values).max(initial=0.0))
    near: NDArray[np.float64] = np.ldexp(values, -exponent)
    return near


def split(
    cases: Sequence[Case], train_test_split: float = 0.85, validate_test_split: float = 0.5, seed: int = 0
) -> tuple[list[Case], list[Case], list[Case]]:
    """Split cases into training, validation and test; each gets one case at least.

    The order comes from a hash of the seed and each case's name. It depends on nothing else: not on
    the number of ranks, the order of the files on disk, or the version of a random generator.

    Parameters
    ----------
    cases
        Three at least.
    train_test_split
        Share of the cases to train on.
    validate_test_split
        Share of the other cases to validate on; what is left is for the test.
    seed
        Another seed gives another split.

    Returns
    -------
    train, validation, test
        Each case in exactly one list.

    Raises
    ------
    ValueError
        A share is not between 0 and 1.
    DataError
        Fewer than three cases.
    """
    for name, share in (("train_test_split", train_test_split), ("validate_test_split", validate_test_split)):
        if not 0 < share < 1:
            raise ValueError(f"{name}: {share}; expected a share between 0 and 1")
    if len(cases) < 3:
        raise DataError(
            f"{len(cases)} labelled cases; expected at least 3: "
            "one to train on, one to validate on and one to test on"
        )

    def drawn(case: Case) -> bytes:
        # A name need not be UTF-8.
        return hashlib.sha256(f"{seed}:{case.name}".encode(errors="surrogateescape")).digest()

    shuffled = sorted(cases, key=drawn)
    others = min(max(round(len(cases) * (1 - train_test_split)), 2), len(cases) - 1)
    validation = min(max(round(others * validate_test_split), 1), others - 1)
    train = len(cases) - others
    return shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :]


def on_same_voxels(
    voxels: NDArray[Scalar],
    path: str | Path,
    geometry: Geometry,
    reference_path: str | Path,
    reference: Geometry,
) -> NDArray[Scalar]:
    """Return a volume in the common frame of another file, after checking that both lie there.

    Axes that are turned by 45 degrees are nearest to two, and the last digit of an affine decides
    which: two files that are stored alike may have been brought into different orders.

    Parameters
    ----------
    voxels, path, geometry
        One of them. shape=geometry.canonical_shape + (...)
    reference_path, reference
        The one that it should lie on.

    Returns
    -------
    voxels
        The same ones; a copy, C-contiguous, if their axes are in another order.

    Raises
    ------
    DataError
        Sizes, or positions by more than half a voxel, are not the same; the message names both.
    """
    turned = not np.array_equal(geometry.orientation, reference.orientation)
    if turned and geometry.shape == reference.shape and geometry.stored_distance(reference) <= 0.5:
        return np.ascontiguousarray(reference.to_canonical(geometry.from_canonical(voxels)))
    shape, expected = geometry.canonical_shape, reference.canonical_shape
    if shape != expected:
        raise DataError(f"{path}: {_size(shape)} voxels; expected {_size(expected)} as in {reference_path}")
    distance = geometry.distance(reference)
    if distance > 0.5:
        raise DataError(
            f"{path}: its affine puts it up to {distance:.1f} voxels away from {reference_path}; "
            "expected both on the same voxels"
        )
    return voxels


def check_patch_fits(path: str | Path, shape: Sequence[int], patch_size: Sequence[int]) -> None:
    """Check that a patch is no larger than the volume it is to be cut from.

    Parameters
    ----------
    path
        The image's file, for the message.
    shape
        Of the volume, (D, H, W) or (D, H, W, C).
    patch_size
        (D, H, W).

    Raises
    ------
    DataError
        It is larger along some axis; the message names volume and patch.
    """
    volume = tuple(shape[:3])
    if any(patch > size for patch, size in zip(patch_size, volume, strict=True)):
        raise DataError(
            f"{path}: the patch of {_size(patch_size)} voxels is larger than the volume of "
            f"{_size(volume)}; expected a patch of at most that size"
        )


def check_patch_fits_all(cases: Sequence[Case], patch_size: Sequence[int]) -> None:
    """Check that a patch is no larger than any volume, by the headers of the files alone.

    Raises
    ------
    DataError
        As :func:`check_patch_fits`, or a file is missing or not NIfTI.
    """
    for case in cases:
        check_patch_fits(case.image_paths[0], read_shape(case.image_paths[0]), patch_size)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
