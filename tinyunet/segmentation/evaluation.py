"""Dice of label files against the truth, also in files."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tinyunet.common.errors import UserError
from tinyunet.data.cases import on_same_voxels
from tinyunet.data.conventions import CONVENTIONS, read_as
from tinyunet.data.decathlon import Dataset, read_dataset, read_labels
from tinyunet.data.nifti import DataError, stem
from tinyunet.segmentation.meaning import Meaning, Pair, of_prediction, of_truths
from tinyunet.segmentation.scores import Scores, score

_ENDINGS = (".nii", ".nii.gz")
# What --label-values gives the numbers of, if they are four.
_FOUR = CONVENTIONS["decathlon"].names


class Pairs(NamedTuple):
    """What is to be compared, and the classes.

    Attributes
    ----------
    pairs
        Two files for each case.
    truth
        What the numbers in the true labels mean.
    prediction_values
        For each pair the number of each class in the prediction.
    """

    pairs: list[Pair]
    truth: Meaning
    prediction_values: list[tuple[int, ...]]

    def notes(self) -> list[str]:
        """Return the lines that say how labels are read."""
        names, values, _ = self.truth
        others = {found for found in self.prediction_values if found != values}
        lines = [read_as(names, found, "as they say") for found in sorted(others)]
        return [read_as(*self.truth), *(f"predictions{line[6:]}" for line in lines)]


def find_pairs(
    predictions: Path | str,
    labels: Path | str,
    label_values: Sequence[int] | None = None,
    convention: str | None = None,
) -> Pairs:
    """Find the truth for each prediction, and what the numbers in both mean.

    Parameters
    ----------
    predictions : path
        A label file, or a folder of them as ``python -m tinyunet.predict`` fills it.
    labels : path
        The label file; or a folder of files named as the predictions are, perhaps with ``_seg`` or
        ``-seg`` behind; or that of a Decathlon task or of BraTS cases. Labels without a prediction are
        not looked at.
    label_values : sequence of int, optional
        Numbers that stand for background, edema, non-enhancing and enhancing tumour in all files.
    convention : str, optional
        Or what the numbers in all files mean, of :data:`tinyunet.data.conventions.CONVENTIONS`.
        Without both they mean what the Decathlon task (in or above ``labels``) says, or what
        :mod:`tinyunet.segmentation.meaning` finds.

    Raises
    ------
    UserError
        A file or folder is missing, there is no prediction, or no truth for one, or two; or the
        numbers cannot be those of classes, or it is not clear what they mean.
    """
    if label_values is not None:
        _check_values(label_values, convention)
    predictions, labels = Path(predictions), Path(labels)
    for path in (predictions, labels):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected labels as .nii or .nii.gz")
    found, truths = _label_files(predictions), _label_files(labels)
    # Where the numbers are given, what a data set says of them is not asked for.
    known = convention or ("decathlon" if label_values is not None else None)
    dataset = _dataset(labels, truths, found, known)
    if not labels.is_dir() and not predictions.is_dir():
        pairs = [Pair(stem(predictions), predictions, labels)]
    elif not found:
        raise UserError(f"{predictions}: no label files in it; expected .nii or .nii.gz")
    else:
        if labels.is_dir() and dataset and not _cases(truths) & _cases(found):
            truths = {case.name: case.label_path for case in dataset.cases}
        pairs = [_pair(name, path, truths, labels) for name, path in found.items()]
    given = _given(label_values, convention, dataset)
    if given:
        return Pairs(pairs, given, [given.values] * len(pairs))
    truth = Meaning(*dataset.meaning) if dataset else of_truths(pairs, str(labels))
    return Pairs(pairs, truth, [of_prediction(pair.prediction, truth) for pair in pairs])


def _given(
    label_values: Sequence[int] | None, convention: str | None, dataset: Dataset | None
) -> Meaning | None:
    """Return the meaning that the user has given."""
    if convention:
        given = CONVENTIONS[convention]
        return Meaning(given.names, given.values, f"--labels {convention}")
    if label_values is None:
        return None
    names = dataset.labels if dataset else _FOUR
    if len(label_values) != len(names):
        names = ("background", *(f"label {value}" for value in label_values[1:]))
    return Meaning(names, tuple(label_values), "--label-values")


def score_pairs(found: Pairs) -> list[tuple[str, Scores]]:
    """Compare one pair after the other, behind a progress bar; return names and scores.

    Raises
    ------
    UserError
        A file is damaged, holds other labels, or the two of a pair do not lie on the same voxels.
    """
    rows = []
    cases = list(zip(found.pairs, found.prediction_values, strict=True))
    for (name, prediction_path, truth_path), values in tqdm(cases, unit="case", leave=False):
        prediction, geometry = read_labels(prediction_path, values)
        truth, true_geometry = read_labels(truth_path, found.truth.values)
        prediction = on_same_voxels(prediction, prediction_path, geometry, truth_path, true_geometry)
        rows.append((name, score(prediction, truth, found.truth.names)))
    return rows


def _dataset(
    labels: Path, files: Mapping[str, Path], predictions: Mapping[str, Path], known: str | None
) -> Dataset | None:
    """Return the data set that a path of labels, with files in it, belongs to, if it belongs to one.

    A folder in which nothing is named as a prediction may be one of BraTS cases. If it is ``known`` what its
    numbers mean, the ``dataset.json`` of another program is passed over.
    """
    here = Path(os.path.abspath(labels))  # "." has no parent
    folder = here if here.is_dir() else here.parent
    for place in (folder, folder.parent):
        if (place / "dataset.json").is_file():
            # Images, and labels that nobody has predicted, may be elsewhere.
            try:
                return read_dataset(place, files_are_there=False)
            except DataError:
                if known is None:
                    raise
    if labels.is_file() or _cases(files) & _cases(predictions):
        return None
    try:
        return read_dataset(labels, labels=known)
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


def _pair(name: str, prediction: Path, truths: Mapping[str, Path], labels: Path) -> Pair:
    """Find the truth for a prediction."""
    found = [path for other, path in truths.items() if _case(other) == _case(name)]
    truth = truths.get(name, found[0] if len(found) == 1 else None)
    if truth is None or not truth.is_file():
        raise UserError(f"{prediction}: no labels named {name} in {labels}")
    return Pair(name, prediction, truth)


def _case(name: str) -> str:
    """Return the name of a file without what BraTS adds to that of the case."""
    return re.sub(r"([_-]seg|_segm|_gtv)$", "", name, flags=re.IGNORECASE)


def _cases(files: Mapping[str, Path]) -> set[str]:
    return {_case(name) for name in files}


def _check_values(values: Sequence[int], convention: str | None) -> None:
    """Check numbers that are to stand for classes, which are kept as one byte each."""
    if convention:
        raise UserError("--label-values: given beside --labels; expected one of them")
    if not 2 <= len(values) <= 256:
        raise UserError(f"--label-values: {len(values)} of them; expected 2 to 256")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--label-values: {value} is there twice; expected different numbers")
    brats = CONVENTIONS["brats2018"]
    if {*values} == {*brats.values} and tuple(values) != brats.values:
        raise UserError(
            f"--label-values: {' '.join(map(str, values))} are the numbers of background, edema, "
            f"non-enhancing and enhancing tumour; BraTS has {' '.join(map(str, brats.values))}: "
            f"--labels {brats.key}"
        )
