"""Scores of label files: find the truth for each prediction and the meaning of its numbers, then compare.

The meaning comes from the user (``--labels``, ``--label-values``); or from a Decathlon task or BraTS folder;
or from names, numbers and marks of the files; otherwise each number is a class without a name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tinyunet.common.errors import DataError, UserError
from tinyunet.data import conventions
from tinyunet.data.brats import LABEL_ENDINGS
from tinyunet.data.cases import Dataset, on_same_voxels
from tinyunet.data.conventions import (
    CONVENTIONS,
    Meaning,
    ask,
    kind_of_class,
    listed,
    numbers_of,
    read_as,
    regions_of,
)
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.description import descriptions
from tinyunet.data.labels import PROBABILITIES, label_numbers, marked_meaning, read_labels
from tinyunet.data.nifti import files_by_name, stem
from tinyunet.segmentation.metrics import measure, measure_lesions

_NAMED = 5  # cases without a prediction

#: ``{"classes": {name: {metric: value}}, "regions": {name: {metric: value}}}``
Measures = dict[str, dict[str, dict[str, float]]]


class Pair(NamedTuple):
    """Two label files of one case, and the number of each class in the prediction."""

    name: str
    prediction: Path
    truth: Path
    values: tuple[int, ...] = ()


class Pairs(NamedTuple):
    """Files to compare, the meaning of the true labels, and names of the truths that have no prediction.

    ``regions`` are those that the data set names; None for BraTS' own.
    """

    pairs: list[Pair]
    truth: Meaning
    missing: Sequence[str] = ()
    regions: Mapping[str, Sequence[int]] | None = None

    def notes(self) -> list[str]:
        """Return the lines that say how labels are read."""
        others = {pair.values for pair in self.pairs if pair.values != self.truth.values}
        lines = [read_as(self.truth.names, values, "as they say") for values in sorted(others)]
        lines = [read_as(*self.truth), *(f"predictions{line[6:]}" for line in lines)]
        if self.missing:
            one = len(self.missing) == 1
            have, are = ("case has", "is") if one else ("cases have", "are")
            which = ", ".join(self.missing[:_NAMED]) + ", ..." * (len(self.missing) > _NAMED)
            lines.append(f"{len(self.missing)} labelled {have} no prediction and {are} not scored: {which}")
        return lines


def find_pairs(
    predictions: Path | str,
    labels: Path | str,
    label_values: Sequence[int] | None = None,
    convention: str | None = None,
) -> Pairs:
    """Find the truth for each prediction, and the meaning of the numbers in both.

    ``predictions`` is a label file, or a folder of them as ``python -m tinyunet.predict`` fills it.
    ``labels`` is the label file; or a folder of files named as the predictions are, perhaps with ``_seg`` or
    ``-seg`` behind; or the folder of a Decathlon task or of BraTS cases. Labels without a prediction are
    ignored. For all files ``label_values`` are the numbers that stand for background, edema, non-enhancing
    and enhancing tumour, or ``convention`` is the key of :data:`tinyunet.data.conventions.CONVENTIONS`.
    UserError if a file or folder is missing, there is no prediction, or no truth for one, or two; or if the
    numbers cannot stand for classes, or it is not clear what they mean.
    """
    predictions, labels = Path(predictions), Path(labels)
    for path in (predictions, labels):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected labels as .nii or .nii.gz")
    found, truths = _label_files(predictions), _label_files(labels)
    # Where the user gives the numbers, what a data set says of them is not needed.
    known = convention or ("decathlon" if label_values is not None else None)
    dataset = _dataset(labels, truths, found, known)
    if not labels.is_dir() and not predictions.is_dir():
        pairs = [Pair(stem(predictions), predictions, labels)]
    elif not found:
        raise UserError(f"{predictions}: no label files in it; expected .nii or .nii.gz")
    else:
        if labels.is_dir() and dataset and set(map(_case, truths)).isdisjoint(map(_case, found)):
            truths = {case.name: case.label_path for case in dataset.cases}
        pairs = [_pair(name, path, truths, labels) for name, path in found.items()]
    given = _given(label_values, convention, dataset)
    truth = given or (dataset.meaning if dataset else _meaning_of_truths(pairs, str(labels)))
    values = [given.values if given else _prediction_values(pair.prediction, truth) for pair in pairs]
    compared = {pair.truth for pair in pairs}
    missing = [name for name, path in truths.items() if path not in compared] if labels.is_dir() else []
    regions = dataset.regions if dataset and not given else None
    numbered = [pair._replace(values=its) for pair, its in zip(pairs, values, strict=True)]
    return Pairs(numbered, truth, missing, regions)


def measure_pairs(
    found: Pairs, part: slice, tolerance: float, lesion_wise: bool, shown: bool = True
) -> list[tuple[str, Measures]]:
    """Compare a part of the pairs, one after the other, behind a progress bar; return names and measures.

    ``tolerance`` is in millimetres, as of :func:`tinyunet.segmentation.metrics.measure`. UserError if a file
    is damaged, holds other labels, or the two of a pair do not lie on the same voxels.
    """
    rows = []
    for pair in tqdm(found.pairs[part], unit="case", leave=False, disable=not shown):
        prediction, geometry = read_labels(pair.prediction, pair.values)
        truth, true_geometry = read_labels(pair.truth, found.truth.values)
        prediction = on_same_voxels(prediction, pair.prediction, geometry, pair.truth, true_geometry)
        spacing = true_geometry.spacing
        measures: Measures = {"classes": {}, "regions": {}}
        known: dict[tuple[int, ...], dict[str, float]] = {}  # a class may be a region, too
        for group, name, members in _masks(found.truth.names, found.regions):
            if members not in known:
                masks = _among(prediction, members), _among(truth, members)
                values = measure(*masks, spacing, tolerance)
                known[members] = values | (measure_lesions(*masks, spacing) if lesion_wise else {})
            measures[group][name] = known[members]
        rows.append((pair.name, measures))
    return rows


def _masks(
    names: Sequence[str], regions: Mapping[str, Sequence[int]] | None
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return group, name and labels of each class but the background, and of each region."""
    masks: list[tuple[str, str, tuple[int, ...]]] = []
    masks += [("classes", name, (label,)) for label, name in enumerate(names) if label]
    regions = regions_of(names) if regions is None else regions
    return masks + [("regions", name, tuple(members)) for name, members in regions.items()]


def _among(labels: NDArray[np.uint8], members: Sequence[int]) -> NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)
    table[list(members)] = True
    return table[labels]


# --- Which files -----------------------------------------------------------------------------------------


def _dataset(
    labels: Path, files: Mapping[str, Path], predictions: Mapping[str, Path], known: str | None
) -> Dataset | None:
    """Return the data set that a path of labels, with files in it, belongs to, if it belongs to one.

    A folder in which nothing is named as a prediction may be one of BraTS cases. If the meaning of the
    numbers is ``known``, the ``dataset.json`` of another program is ignored.
    """
    for file in descriptions(labels if labels.is_dir() else labels.parent):
        # Images, and labels without a prediction, may be elsewhere.
        try:
            return read_dataset(file.parent, files_are_there=False)
        except DataError:
            if known is None:
                raise
    if labels.is_file() or not set(map(_case, files)).isdisjoint(map(_case, predictions)):
        return None
    try:
        return read_dataset(labels, labels=known, allow_missing=True)
    except DataError:
        if files:
            return None
        raise


def _label_files(path: Path) -> dict[str, Path]:
    """Return the label files of a folder by their names; probabilities beside labels are none."""
    found = files_by_name(path)
    beside = {name + PROBABILITIES for name in found}
    return {name: file for name, file in found.items() if name not in beside}


def _pair(name: str, prediction: Path, truths: Mapping[str, Path], labels: Path) -> Pair:
    """Find the truth for a prediction."""
    found = [path for other, path in truths.items() if _case(other) == _case(name)]
    truth = truths.get(name, found[0] if len(found) == 1 else None)
    if truth is None or not truth.is_file():
        raise UserError(f"{prediction}: no labels named {name} in {labels}")
    return Pair(name, prediction, truth)


def _case(name: str) -> str:
    """Return the name of a case: the name of a label file without BraTS' ending."""
    return re.sub(f"({'|'.join(LABEL_ENDINGS)})$", "", name, flags=re.IGNORECASE)


# --- What their numbers mean -----------------------------------------------------------------------------


def _given(values: Sequence[int] | None, convention: str | None, dataset: Dataset | None) -> Meaning | None:
    """Return the meaning that the user has given, after checking numbers, which take one byte each."""
    if values is None:
        return CONVENTIONS[convention].classes(f"--labels {convention}") if convention else None
    if convention:
        raise UserError("--label-values: given beside --labels; expected one of them")
    if not 2 <= len(values) <= 256:
        raise UserError(f"--label-values: {len(values)} of them; expected 2 to 256")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--label-values: {value} is there twice; expected different numbers")
    brats = CONVENTIONS["brats2018"].classes().values
    if {*values} == {*brats} and tuple(values) != brats:
        given, expected = (" ".join(map(str, numbers)) for numbers in (values, brats))
        parts = "the numbers of background, edema, non-enhancing and enhancing tumour"
        raise UserError(f"--label-values: {given} are {parts}; BraTS has {expected}: --labels brats2018")
    names = dataset.labels if dataset else CONVENTIONS["decathlon"].classes().names
    if len(values) != len(names):
        names = ("background", *(f"label {value}" for value in values[1:]))
    return Meaning(names, tuple(values), "--label-values")


def _meaning_of_truths(pairs: Sequence[Pair], where: str) -> Meaning:
    """Return what the numbers in true labels without a ``dataset.json`` mean.

    The names of the files come first, then the numbers, then the marks of the predictions. ``where`` begins
    the message of a UserError, if these contradict each other.
    """
    truths, predictions = [pair.truth for pair in pairs], [pair.prediction for pair in pairs]
    if any(conventions.allowed_by_name(path) is not None for path in truths):
        decided = conventions.decide(where, truths, label_numbers)
        return decided.classes(decided.title)
    numbers = _numbers(truths, where)
    alone = conventions.by_numbers_alone(numbers)
    if alone is None:
        marks = [marked_meaning(path) for path in predictions]
        said = marks[0]
        if said and marks.count(said) == len(marks):
            return Meaning(("background", *said.values()), (0, *said), "as the predictions say")
        if any(marks):
            raise ask(f"{where}: the predictions do not say the same, and", numbers)
        found = _numbers(predictions, where)
        if {(3 in some, 4 in some) for some in (numbers, found)} == {(True, False), (False, True)}:
            raise ask(f"{where}: the predictions hold {listed(found)}, and", numbers)
        numbers |= found
        alone = conventions.by_numbers_alone(numbers)
    if alone:
        return alone.classes(f"{alone.title}, by the numbers")
    values = sorted(numbers - {0}) or [1]
    names = ("background", *(f"label {value}" for value in values))
    return Meaning(names, (0, *values), "nothing says what they mean: --labels does")


def _numbers(paths: Sequence[Path], where: str) -> set[int]:
    """Return the numbers in label files, which must not follow two conventions."""
    each = [label_numbers(path) for path in paths]
    together = {number for some in each for number in some}
    if {3, 4} <= together and not any({3, 4} <= some for some in each):
        raise ask(f"{where}: some files hold 3, others 4, none both, so", together)
    return together


def _prediction_values(prediction: Path, truth: Meaning) -> tuple[int, ...]:
    """Return the number of each class of the truth in a prediction: by its mark, or as in the truth."""
    said = marked_meaning(prediction)
    if said is not None:
        values = _values_of(truth, said)
        if values is None:
            classes = ", ".join(f"{number} {name}" for number, name in sorted(said.items()))
            raise UserError(f"{prediction}: says of itself {classes}, but {read_as(*truth)}")
        return values
    keys = conventions.allowed_by_name(prediction)
    if keys is not None and truth.values not in [_values_of(truth, CONVENTIONS[key].meaning) for key in keys]:
        named = f"named as files are that count otherwise, but {read_as(*truth)}"
        raise UserError(f"{prediction}: {named}; if both mean the same, say what with --labels")
    return truth.values


def _values_of(truth: Meaning, meaning: Mapping[int, str]) -> tuple[int, ...] | None:
    """Return the numbers that a file with another meaning has for the classes of the truth.

    A class that the file lacks gets a number that is in no file. None if the file has other classes.
    """
    for tell in (str, kind_of_class):
        numbers = numbers_of(truth.names, meaning, tell)
        if numbers and len(numbers) - numbers.count(None) == 1 + len(meaning):
            unused = iter(range(256, 512))
            return tuple(next(unused) if number is None else number for number in numbers)
    return None
