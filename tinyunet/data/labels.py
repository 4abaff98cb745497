"""Label files: from numbers to classes, and back into a file that says what its numbers mean.

A file of ours is marked by a comment in its NIfTI header, as JSON: the program, the name of each number, and
the SHA-256 of the voxels. A program that changes the labels may keep the comment, but not the checksum.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, one_line, said
from tinyunet.common.files import atomic
from tinyunet.data.geometry import Geometry
from tinyunet.data.nifti import read_extensions, read_volume
from tinyunet.data.stream import memory_for

# Header fields for the position of voxels in space, in both versions of the format.
_POSITION_FIELDS = (
    "xyzt_units",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip

#: What the name of a file of probabilities has behind that of the labels.
PROBABILITIES = "_probabilities"
_PROGRAM = "tinyunet.predict"
_COMMENT = 6  # NIfTI's code for a comment


def read_labels(path: str | Path, label_values: Sequence[int]) -> tuple[NDArray[np.uint8], Geometry]:
    """Return the class of each voxel, shape=(D, H, W), uint8, C-contiguous, common frame; and the geometry.

    ``label_values[i]`` is the number that stands for class ``i`` in the file. Numbers within 0.01 of an
    integer count as it: scaling rounds. DataError as :func:`tinyunet.data.nifti.read_volume`; also if the
    volume has more than three axes, or holds a number that is not an integer or not among ``label_values``.
    """
    voxels, geometry = read_volume(path)
    if voxels.ndim != 3:
        raise DataError(f"{path}: {voxels.shape[3]} label volumes; expected one")
    allowed = "labels " + ", ".join(map(str, sorted(label_values)))
    with memory_for(path):
        integers = np.rint(voxels)
        between = np.abs(voxels - integers) > 0.01
        if between.any():
            example = voxels[between][0]
            raise DataError(f"{path}: label {example:.6g} is not an integer; expected {allowed}")
        labels = np.zeros(voxels.shape, np.uint8)
        known = np.zeros(voxels.shape, np.bool_)
        for index, value in enumerate(label_values):
            here = integers == value
            labels[here] = index
            known |= here
        if not known.all():
            strangers = ", ".join(f"{value:.0f}" for value in np.unique(integers[~known])[:5])
            expected = f"{allowed} (where they mean something else: --labels)"
            raise DataError(f"{path}: holds label {strangers}; expected {expected}")
    return labels, geometry


def label_numbers(path: str | Path) -> set[int]:
    """Return the numbers in a label file, rounded to integers; raises as ``read_volume``."""
    return {round(number) for number in np.unique(read_volume(path)[0]).tolist()}


def save_labels(
    path: str | Path,
    labels: NDArray[np.integer[Any]],
    geometry: Geometry,
    label_values: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write labels as uint8 NIfTI that lies exactly over the file the geometry came from.

    Shape, orientation, affine and units are that file's own. The new file appears whole or not at all.

    Parameters
    ----------
    path
        ``*.nii`` or ``*.nii.gz``; folders that are missing are made. DataError if it cannot be written.
    labels
        Class of each voxel in the common frame, shape=geometry.canonical_shape, 0 to 255.
    label_values
        ``label_values[i]`` is written for class ``i``; the class itself if not given. ValueError if these are
        none of uint8, or labels do not fit them or the geometry.
    names
        Names of the classes, the background first. With names, the file is marked.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path: {path} is no name of a NIfTI file; expected *.nii or *.nii.gz")
    if labels.shape != (shape := geometry.canonical_shape):
        raise ValueError(f"labels: shape {labels.shape}; expected the image's own, {shape}")
    values = np.arange(256)
    if label_values is not None:
        check_label_values(label_values)
        values = np.asarray(label_values)
    if labels.min() < 0 or labels.max() >= len(values):
        raise ValueError(f"labels: {labels.min()} to {labels.max()}; expected 0 to {len(values) - 1}")
    meaning = None
    if names is not None:
        meaning = {str(number): name for number, name in zip(values.tolist(), names, strict=False) if number}
    _save(path, values.astype(np.uint8)[geometry.from_canonical(labels)], geometry, meaning)


def save_probabilities(
    path: str | Path, probabilities: NDArray[np.float32], geometry: Geometry, names: Sequence[str]
) -> None:
    """Write the probability of each class as float32 NIfTI with four axes, over the image's own voxels.

    ``probabilities`` are in the common frame, shape=(*geometry.canonical_shape, classes). Path, names (in the
    file's mark) and errors are as for :func:`save_labels`.
    """
    meaning = {str(number): name for number, name in enumerate(names)}
    _save(Path(path), geometry.from_canonical(probabilities), geometry, meaning)


def _save(path: Path, stored: NDArray[Any], geometry: Geometry, meaning: dict[str, str] | None) -> None:
    """Write an array as stored, in the position of the geometry's file, and marked if there is a meaning."""
    version_2 = geometry.header["sizeof_hdr"] == 540
    image_class: Any = nibabel.Nifti2Image if version_2 else nibabel.Nifti1Image
    image = image_class(stored, None)
    for field in _POSITION_FIELDS:
        image.header[field] = geometry.header[field]
    image.header["pixdim"][:4] = geometry.header["pixdim"][:4]
    if meaning is not None:
        mark = {"written by": _PROGRAM, "labels": meaning, "sha256": _digest(stored)}
        make: Any = nibabel.nifti1.Nifti1Extension  # nibabel has type hints in some places only
        image.header.extensions.append(make(_COMMENT, json.dumps(mark).encode()))
    content = image.to_bytes()
    # No time stamp: equal labels give equal files.
    level = 6 if stored.dtype == np.uint8 else 1  # probabilities are noise in most of their bits
    raw = gzip.compress(content, level, mtime=0) if path.suffix == ".gz" else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({said(error)}); nothing was left behind") from error


def check_label_values(values: Sequence[Any]) -> None:
    """Raise ValueError unless these are different whole numbers from 0 to 255, 0 (the background) first."""
    whole = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values)
    if not (whole and len({*values}) == len(values) and all(0 <= value <= 255 for value in values)):
        raise ValueError(f"label_values: {list(values)[:10]}; expected different whole numbers from 0 to 255")
    if not len(values) or values[0] != 0:
        raise ValueError(f"label_values: {list(values)[:10]}; expected 0 first, for the background")


def marked_meaning(path: str | Path) -> dict[int, str] | None:
    """Return the name of each number but 0, from the mark in a file; None without a mark."""
    mark = _read_mark(path)
    return mark and mark[0]


def is_untouched(path: str | Path) -> bool:
    """Whether we have written a label file, and nobody has changed its voxels since."""
    try:
        voxels, geometry = read_volume(path)
        mark = _read_mark(path)
    except DataError:
        return False
    return mark is not None and mark[1] == _digest(geometry.from_canonical(voxels))


def _read_mark(path: str | Path) -> tuple[dict[int, str], str] | None:
    """Return names and digest of a file's mark."""
    for comment in read_extensions(path):
        try:
            content = json.loads(comment.get_content())
            if comment.get_code() == _COMMENT and content["written by"] == _PROGRAM:
                names = {int(number): one_line(name) for number, name in content["labels"].items()}
                return names, content["sha256"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue  # someone else's comment
    return None


def _digest(stored: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest()
