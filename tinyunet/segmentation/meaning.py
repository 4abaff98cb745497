"""What the numbers in predictions and in true labels mean, from what the files say of themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import UserError
from tinyunet.data import mark
from tinyunet.data.conventions import (
    CONVENTIONS,
    ask,
    by_numbers_alone,
    common,
    decide,
    kind_of_class,
    listed,
    read_as,
    told_by_name,
)
from tinyunet.data.nifti import label_numbers, read_extensions


class Pair(NamedTuple):
    """Two label files of one case."""

    name: str
    prediction: Path
    truth: Path


class Meaning(NamedTuple):
    """Name and number of each class, the background first, and what says so."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    source: str


def of_truths(pairs: Sequence[Pair], where: str) -> Meaning:
    """Return what the numbers in true labels without a ``dataset.json`` mean.

    Parameters
    ----------
    pairs
        One at least.
    where
        Begins the message of an error.

    Returns
    -------
    meaning
        As the names of the files say; if they say nothing, as the numbers do; or as the predictions say of
        themselves. Otherwise each number is a class without a name.

    Raises
    ------
    UserError
        What they say is not clear.
    """
    truths, predictions = [pair.truth for pair in pairs], [pair.prediction for pair in pairs]
    told = [told_by_name(path) for path in truths]
    if any(keys is not None for keys in told):
        keys = common([keys or () for keys in told])
        decided = decide(where, keys, map(label_numbers, truths))
        return Meaning(decided.names, decided.values, decided.title)
    numbers = _numbers(truths, where)
    marks = [mark.meaning(read_extensions(path)) for path in predictions]
    alone = by_numbers_alone(numbers)
    if alone is None and any(marks):
        said = marks[0]
        if said is None or marks.count(said) < len(marks):
            raise ask(f"{where}: the predictions do not say the same, and", numbers)
        return Meaning(("background", *said.values()), (0, *said), "as the predictions say")
    if alone is None:
        found = _numbers(predictions, where)
        if {(3 in some, 4 in some) for some in (numbers, found)} == {(True, False), (False, True)}:
            raise ask(f"{where}: the predictions hold {listed(found)}, and", numbers)
        numbers |= found
        alone = by_numbers_alone(numbers)
    if alone is None:
        values = sorted(numbers - {0}) or [1]
        names = ("background", *(f"label {value}" for value in values))
        return Meaning(names, (0, *values), "nothing says what they mean: --labels does")
    return Meaning(alone.names, alone.values, f"{alone.title}, by the numbers")


def _numbers(paths: Sequence[Path], where: str) -> set[int]:
    """Return the numbers in label files, which must not follow two conventions."""
    each = [label_numbers(path) for path in paths]
    together = {number for some in each for number in some}
    if {3, 4} <= together and not any({3, 4} <= some for some in each):
        raise ask(f"{where}: some files hold 3, others 4, none both, so", together)
    return together


def of_prediction(prediction: Path, truth: Meaning) -> tuple[int, ...]:
    """Return the number of each class in a prediction.

    Parameters
    ----------
    prediction
        The file. Where it says nothing of itself it counts as the truth does.
    truth
        What that means.

    Raises
    ------
    UserError
        The prediction has other classes than the truth, or a name that tells of another convention.
    """
    said = mark.meaning(read_extensions(prediction))
    if said is not None:
        values = _values_of(truth, said)
        if values is None:
            classes = ", ".join(f"{number} {name}" for number, name in sorted(said.items()))
            raise UserError(f"{prediction}: says of itself {classes}, but {read_as(*truth)}")
        return values
    keys = told_by_name(prediction)
    if keys is not None and truth.values not in [_values_of(truth, CONVENTIONS[key].meaning) for key in keys]:
        raise UserError(
            f"{prediction}: named as files are that count otherwise, but {read_as(*truth)}; "
            "if both mean the same, say what with --labels"
        )
    return truth.values


def _values_of(truth: Meaning, meaning: Mapping[int, str]) -> tuple[int, ...] | None:
    """Return the numbers that a file with another meaning has for the classes of the truth.

    A class that the file does not know gets a number that is in no file. None if it knows others.
    """
    for tell in (str, kind_of_class):
        classes = [tell(name) for name in truth.names[1:]]
        numbers = {tell(name): number for number, name in meaning.items()}
        is_clear = len({*classes}) == len(classes) and len(numbers) == len(meaning)
        if is_clear and None not in classes and {*numbers} <= {*classes}:
            unused = iter(range(256, 512))
            return (0, *(numbers.get(each) or next(unused) for each in classes))
    return None
