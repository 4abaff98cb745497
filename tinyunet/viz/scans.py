"""From files of a scan and its labels to a page."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, UserError
from tinyunet.data import brats
from tinyunet.data.cases import load_image, on_same_voxels
from tinyunet.data.description import read_description
from tinyunet.data.geometry import Geometry
from tinyunet.data.labels import read_labels
from tinyunet.data.nifti import stem
from tinyunet.segmentation.evaluation import Measures, find_pairs, measure_pairs
from tinyunet.viz.page import Head, Page, make_page

_COLUMNS = {"dice": "Dice", "hd95": "HD95 mm", "sensitivity": "sensitivity", "precision": "precision"}
_COLUMNS |= {"volume": "ml", "true_volume": "true ml"}


def look(
    image: str | Path,
    prediction: str | Path | None = None,
    truth: str | Path | None = None,
    convention: str | None = None,
) -> Page:
    """Return a page of a scan with its labels, if there are any; Jupyter shows it when it is returned.

    ``image`` is a NIfTI file, or the folder of a BraTS case, whose labels are the truth if no other is given.
    ``convention`` says what numbers in label files mean, as ``--labels`` of the commands. UserError or
    DataError if a file cannot be used, or labels do not lie on the image's voxels.
    """
    name, paths, sequences, own = _files(Path(image))
    truth = truth or own
    notes: list[str] = []
    voxels, geometry = load_image(paths, notes=notes)
    names: Sequence[str] = ("background",)
    labels: dict[str, NDArray[np.uint8]] = {}
    scores: list[list[str]] = []
    if given := prediction or truth:
        found = find_pairs(given, truth or given, None, convention)
        notes += found.notes()
        names, (pair, *_) = found.truth.names, found.pairs
        if prediction:
            labels["prediction"] = _on_image(pair.prediction, pair.values, paths[0], geometry)
        if truth:
            labels["truth"] = _on_image(pair.truth, found.truth.values, paths[0], geometry)
        if prediction and truth:
            ((_, measures),) = measure_pairs(found, slice(None), 1.0, lesion_wise=False, shown=False)
            scores = _table(measures)
    if not sequences:
        sequences = tuple(f"sequence {number + 1}" for number in range(voxels.shape[-1]))
    head = Head(name, voxels, labels, geometry.spacing, "", scores)
    return make_page(name, [head], names, sequences)._replace(notes=notes)


def _files(image: Path) -> tuple[str, tuple[Path, ...], tuple[str, ...], Path | None]:
    """Return name, files, names of sequences (none if nothing tells them) and true labels of a scan."""
    if not image.is_dir():
        if not image.exists():
            raise UserError(f"{image}: no such file; expected a NIfTI file or the folder of a BraTS case")
        sequences: tuple[str, ...] = ()
        with contextlib.suppress(DataError):  # of a Decathlon task, if the image is in one
            sequences = read_description(image.parent.parent / "dataset.json").modalities
        return stem(image), (image,), sequences, None
    cases = brats.find_cases(image)
    if len(cases) != 1:
        raise UserError(f"{image}: {len(cases)} BraTS cases; expected the folder of one, or a NIfTI file")
    ((name, files),) = cases.items()
    kinds = [kind for kind in brats.KINDS if kind in files.sequences]
    shown = tuple(brats.MODALITIES[brats.KINDS.index(kind)] for kind in kinds)
    return name, tuple(files.sequences[kind] for kind in kinds), shown, files.labels


def _on_image(path: Path, values: Sequence[int], image: Path, geometry: Geometry) -> NDArray[np.uint8]:
    labels, own = read_labels(path, values)
    return on_same_voxels(labels, path, own, image, geometry)


def _table(measures: Measures) -> list[list[str]]:
    """Return the scores of regions and classes, a row for each, as text."""
    rows = [["", *_COLUMNS.values()]]
    for entries in (measures["regions"], measures["classes"]):
        for name, values in entries.items():
            digits = {"hd95": 1, "volume": 1, "true_volume": 1}
            rows.append([name, *(f"{values[metric]:.{digits.get(metric, 3)}f}" for metric in _COLUMNS)])
    return rows
