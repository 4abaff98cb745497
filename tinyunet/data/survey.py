"""What a data set holds: cases, patients, shapes, voxels, volumes of classes, and files that look wrong.

Of images the headers are read alone, and the length that a file's end tells; label files, which are small,
are read whole, of a few hundred cases at most.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyunet.common.errors import DataError
from tinyunet.common.terminal import count
from tinyunet.data.cases import Case, Dataset, first_present, on_same_voxels
from tinyunet.data.geometry import Geometry
from tinyunet.data.labels import read_labels
from tinyunet.data.nifti import check_length, read_header
from tinyunet.data.patients import PatientOf, patient_of
from tinyunet.data.spacing import Spacing, differs, in_mm, usual

#: Label files that are read at most: a large one takes a second. They are spread evenly over the cases.
MOST_LABELS = 400
_ODD = 3.0  # voxels so many times larger or smaller than the usual ones are worth a look


class Survey(NamedTuple):
    """Of the cases that can be read: shapes (D, H, W), voxels and millilitres; and what is odd."""

    cases: list[Case]
    patients: int
    shapes: list[tuple[int, int, int]]
    spacings: list[Spacing]
    millilitres: dict[str, list[float]]  # of each class, by name, of the cases whose labels were read
    suspicious: list[str]  # lines that name a file

    def as_dict(self) -> dict[str, object]:
        """Return content for JSON."""
        return {**self._asdict(), "cases": [case.name for case in self.cases]}


def survey(
    dataset: Dataset,
    patient: PatientOf = patient_of,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = lambda cases: cases,
    allow_missing: bool = False,
) -> Survey:
    """Look at each case of a data set; ``progress`` may show a bar while its cases are gone through.

    A case that lacks a sequence is left out, and named, unless ``allow_missing``.
    """
    found = Survey([], 0, [], [], {name: [] for name in dataset.labels[1:]}, [])
    twins: dict[bytes, Case] = {}
    read = {number * len(dataset.cases) // MOST_LABELS for number in range(MOST_LABELS)}
    for number, case in enumerate(progress(dataset.cases)):
        try:
            missing = [path for path in case.image_paths if not path.exists()]
            if missing and not allow_missing:
                raise DataError(f"{missing[0]}: no such file; expected it, or --allow-missing")
            shape, geometry = _look(case)
            volumes, digest = _classes(case, dataset.labels, geometry) if number in read else ([], b"")
        except DataError as error:
            found.suspicious.append(str(error))
            continue
        found.cases.append(case)
        found.shapes.append(shape)
        found.spacings.append(geometry.spacing)
        if number not in read:
            continue
        for name, volume in zip(dataset.labels[1:], volumes, strict=True):
            found.millilitres[name].append(volume)
        if not any(volumes):
            found.suspicious.append(f"{case.label_path}: labels are background alone")
        elif (other := twins.setdefault(digest, case)) != case:
            found.suspicious.append(f"{case.label_path}: the same labels as {other.label_path}")
    patients = len({patient(case.name) for case in found.cases})
    return found._replace(patients=patients, suspicious=[*found.suspicious, *_outliers(found)])


def _look(case: Case) -> tuple[tuple[int, int, int], Geometry]:
    """Return shape and geometry, by the headers of all images; DataError for a bad file."""
    first = first_present(case.image_paths)
    stored, geometry = read_header(first)
    channels = stored[3] if len(stored) > 3 else 1
    expected = case.choice.of if case.choice else case.channels
    if len(case.image_paths) == 1 and channels not in (expected, case.channels):
        raise DataError(f"{first}: {count(channels, 'sequence')}; expected {expected}")
    for path in filter(Path.exists, case.image_paths):
        check_length(path)
        if path != first:
            other, place = read_header(path)
            on_same_voxels(np.empty(other[:3], np.bool_), path, place, first, geometry)
    d, h, w = stored[:3]
    return (d, h, w), geometry


def _classes(case: Case, names: Sequence[str], geometry: Geometry) -> tuple[list[float], bytes]:
    """Return the volume of each class but the background, and a digest of the labels; or raise DataError."""
    labels, label_geometry = read_labels(case.label_path, case.label_values)
    labels = on_same_voxels(
        labels, case.label_path, label_geometry, first_present(case.image_paths), geometry
    )
    counts = np.bincount(labels.ravel(), minlength=len(names))[1:]
    return (counts * geometry.millilitres).tolist(), hashlib.sha256(labels.tobytes()).digest()


def _outliers(found: Survey) -> list[str]:
    """Return a line for each case whose voxels or shape are unlike those of the others."""
    if not found.cases:
        return []
    most, common = usual(found.spacings), Counter(found.shapes).most_common(1)[0]
    lines = []
    for case, shape, spacing in zip(found.cases, found.shapes, found.spacings, strict=True):
        path = first_present(case.image_paths)
        if differs(spacing, most, _ODD):
            lines.append(f"{path}: voxels of {in_mm(spacing)}; {in_mm(most)} are usual here")
        elif common[1] > 0.9 * len(found.cases) > 9 and shape != common[0]:
            sizes = " x ".join(map(str, shape)), " x ".join(map(str, common[0]))
            lines.append(f"{path}: {sizes[0]} voxels; nearly all cases have {sizes[1]}")
    return lines
