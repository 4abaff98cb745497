"""Dice of label files against the truth, also in files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tinyunet.data.brats import LABEL_VALUES, LABELS
from tinyunet.data.decathlon import Dataset, read_dataset, read_labels
from tinyunet.data.nifti import stem
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
        ``labels`` has its folders or is a ``*_seg`` file, and 0, 1, 2, 3 otherwise.

    Raises
    ------
    UserError
        A file or folder is missing, there is no prediction, or no truth for one.
    """
    predictions, labels = Path(predictions), Path(labels)
    for path in (predictions, labels):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected labels as .nii or .nii.gz")
    dataset = _dataset(labels)
    names: tuple[str, ...] = LABELS
    values: tuple[int, ...] = LABEL_VALUES if stem(labels).endswith("_seg") else (0, 1, 2, 3)
    if dataset:
        names, values = dataset.labels, dataset.label_values
    if label_values is not None:
        values = tuple(label_values)
        if len(values) != len(names):
            names = tuple(f"label {value}" for value in values)
    if labels.is_file() and predictions.is_file():
        return Pairs([Pair(stem(predictions), predictions, labels)], names, values)
    found = _label_files(predictions)
    if not found:
        raise UserError(f"{predictions}: no label files in it; expected .nii or .nii.gz")
    if labels.is_dir() and dataset and not _label_files(labels):
        truths = {case.name: case.label_path for case in dataset.cases}
    else:
        truths = _label_files(labels)
    for name, prediction in found.items():
        if name not in truths:
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
        if prediction.shape != truth.shape:
            raise UserError(
                f"{prediction_path}: {_size(prediction.shape)} voxels; "
                f"expected {_size(truth.shape)} as in {truth_path}"
            )
        apart = geometry.distance(true_geometry)
        if apart > 0.5:
            raise UserError(
                f"{prediction_path}: its affine puts it up to {apart:.1f} voxels away from "
                f"{truth_path}; expected both on the same voxels"
            )
        rows.append((name, score(prediction, truth, found.names)))
    return rows


def _dataset(labels: Path) -> Dataset | None:
    """Return the data set that a path of labels belongs to, if it belongs to one."""
    folder = labels if labels.is_dir() else labels.parent
    for place in (folder, folder.parent):
        if (place / "dataset.json").is_file():
            return read_dataset(place)
    return read_dataset(labels) if labels.is_dir() and not _label_files(labels) else None


def _label_files(path: Path) -> dict[str, Path]:
    """Return the files of a folder by their names without ending; a file is all of its own."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        stem(file): file
        for file in files
        if file.name.endswith(_ENDINGS) and not file.name.startswith(".")
    }


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
