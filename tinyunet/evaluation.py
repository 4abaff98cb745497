"""Dice of label files against the truth, also in files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tinyunet.data.brats import LABEL_VALUES, LABELS, kind_of
from tinyunet.data.cases import on_same_voxels
from tinyunet.data.decathlon import Dataset, read_dataset, read_labels
from tinyunet.data.nifti import DataError, stem
from tinyunet.errors import UserError
from tinyunet.scores import Scores, score

_ENDINGS = (".nii", ".nii.gz")


class Pair(NamedTuple):
    """Two label files of one case."""

    name: str
    prediction: Path
    truth: Path


class Pairs(NamedTuple):
    """What is to be compared, the names of the classes, and the numbers that stand for them."""

    pairs: list[Pair]
    names: tuple[str, ...]
    label_values: tuple[int, ...]


def find_pairs(
    predictions: Path | str, labels: Path | str, label_values: Sequence[int] | None = None
) -> Pairs:
    """Find the truth for each prediction.

    Parameters
    ----------
    predictions : path
        A label file, or a folder of them as ``python -m tinyunet.predict`` fills it.
    labels : path
        The label file; or a folder of files named as the predictions are; or that of a Decathlon
        task or of BraTS cases. Labels without a prediction are not looked at.
    label_values : sequence of int, optional
        Numbers that stand for background, edema, non-enhancing and enhancing tumour in all files.
        Left out, they are those of the Decathlon task (in or above ``labels``), those of BraTS if
        ``labels`` has its folders or is a file of its (``*_seg``), and 0, 1, 2, 3 otherwise.

    Raises
    ------
    UserError
        A file or folder is missing, there is no prediction, or no truth for one, or two; or the
        numbers cannot be those of classes.
    """
    if label_values is not None:
        _check_values(label_values)
    predictions, labels = Path(predictions), Path(labels)
    for path in (predictions, labels):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected labels as .nii or .nii.gz")
    found, truths = _label_files(predictions), _label_files(labels)
    dataset = _dataset(labels, truths, found, label_values is None)
    names: tuple[str, ...] = LABELS
    values: tuple[int, ...] = LABEL_VALUES if kind_of(labels.name) == "seg" else (0, 1, 2, 3)
    if dataset:
        names, values = dataset.labels, dataset.label_values
    if label_values is not None:
        values = tuple(label_values)
        if len(values) != len(names):
            names = tuple(f"label {value}" for value in values)
    if labels.is_file() and predictions.is_file():
        return Pairs([Pair(stem(predictions), predictions, labels)], names, values)
    if not found:
        raise UserError(f"{predictions}: no label files in it; expected .nii or .nii.gz")
    if labels.is_dir() and dataset and not truths.keys() & found.keys():
        truths = {case.name: case.label_path for case in dataset.cases}
    for name, prediction in found.items():
        if name not in truths or not truths[name].is_file():
            raise UserError(f"{prediction}: no labels named {name} in {labels}")
    return Pairs([Pair(name, path, truths[name]) for name, path in found.items()], names, values)


def score_pairs(found: Pairs) -> list[tuple[str, Scores]]:
    """Compare one pair after the other, behind a progress bar; return names and scores.

    Raises
    ------
    UserError
        A file is damaged, holds other labels, or the two of a pair do not lie on the same voxels.
    """
    rows = []
    for name, prediction_path, truth_path in tqdm(found.pairs, unit="case", leave=False):
        prediction, geometry = read_labels(prediction_path, found.label_values)
        truth, true_geometry = read_labels(truth_path, found.label_values)
        prediction = on_same_voxels(
            prediction, prediction_path, geometry, truth_path, true_geometry
        )
        rows.append((name, score(prediction, truth, found.names)))
    return rows


def _dataset(
    labels: Path, files: Mapping[str, Path], predictions: Mapping[str, Path], needed: bool
) -> Dataset | None:
    """Return the data set that a path of labels, with files in it, belongs to, if it belongs to one.

    A folder in which nothing is named as a prediction may be one of BraTS cases. If its numbers are not
    ``needed``, the ``dataset.json`` of another program is passed over.
    """
    here = Path(os.path.abspath(labels))  # "." has no parent
    folder = here if here.is_dir() else here.parent
    for place in (folder, folder.parent):
        if (place / "dataset.json").is_file():
            # Images, and labels that nobody has predicted, may be elsewhere.
            try:
                return read_dataset(place, files_are_there=False)
            except DataError:
                if needed:
                    raise
    if labels.is_file() or files.keys() & predictions.keys():
        return None
    try:
        return read_dataset(labels)
    except DataError:
        if files:
            return None
        raise


def _label_files(path: Path) -> dict[str, Path]:
    """Return the files of a folder by their names without ending; a file is all of its own."""
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.name.lower().endswith(_ENDINGS) or file.name.startswith("."):
            continue
        other = found.setdefault(stem(file), file)
        if other != file:
            raise UserError(f"{path}: both {other.name} and {file.name}; expected one of them")
    return found


def _check_values(values: Sequence[int]) -> None:
    """Check numbers that are to stand for classes, which are kept as one byte each."""
    if not 2 <= len(values) <= 256:
        raise UserError(f"--label-values: {len(values)} of them; expected 2 to 256")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--label-values: {value} is there twice; expected different numbers")
