"""Which cases are of one patient, and a split of cases that keeps them together."""

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import DataError, said
from tinyunet.common.files import LONGEST_JSON, open_file
from tinyunet.common.terminal import count
from tinyunet.data.cases import Case

#: Gives the patient of a case, by the case's name.
PatientOf = Callable[[str], str]

# BraTS since 2023: BraTS-GLI-00000-000 is the first examination of patient 00000, -001 the second.
_EXAMINATION = re.compile(r"(BraTS-[A-Z-]+-\d+)-\d+", re.IGNORECASE)


def patient_of(case: str) -> str:
    """Return the patient whom a case's name tells; the name itself if it tells none."""
    match = _EXAMINATION.fullmatch(case)
    return match[1] if match else case


def read_patients(path: Path | str) -> PatientOf:
    """Read a CSV file with the columns ``case`` and ``patient``; cases that it does not name tell their own.

    DataError, which names the file, if it cannot be read, lacks a column or a value, or names a case twice
    with different patients.
    """
    try:
        with open_file(path) as file:
            text = file.read(LONGEST_JSON).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({said(error)}); expected CSV with case,patient") from error
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, patient = (row.get("case") or "").strip(), (row.get("patient") or "").strip()
        if not case or not patient:
            raise DataError(f"{path}: line {number} lacks case or patient; expected these two columns")
        if (other := patients.setdefault(case, patient)) != patient:
            raise DataError(f"{path}: {case} is of two patients, {other} and {patient}; expected one")
    return lambda case: patients.get(case, patient_of(case))


class Parts(NamedTuple):
    """The cases of a data set, divided."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]


def split(
    cases: Sequence[Case],
    train_test_split: float = 0.85,
    validate_test_split: float = 0.5,
    seed: int = 0,
    patient_of: PatientOf = patient_of,
    folds: tuple[int, int] | None = None,
) -> Parts:
    """Split cases into training, validation and test: all cases of a patient go into one part.

    The order of patients comes from a hash of the seed and each one's name. It depends on nothing else: not
    on the number of ranks, the order of the files on disk, or the version of a random generator.
    ``train_test_split`` is the share of the patients to train on, ``validate_test_split`` the share of the
    others to validate on: ValueError unless both are between 0 and 1. With ``folds``, number N and which one,
    the test is each N-th patient, and validation gets the share of the rest that is not to train on. Each
    part gets a patient at least; of two patients, the second is for validation and for test. DataError for
    fewer than two; with folds for fewer than N or three, or four for two folds.
    """
    for name, share in (("train_test_split", train_test_split), ("validate_test_split", validate_test_split)):
        if not 0 < share < 1:
            raise ValueError(f"{name}: {share}; expected a share between 0 and 1")
    patients: dict[str, list[Case]] = {}
    for case in cases:
        patients.setdefault(patient_of(case.name), []).append(case)
    least = max(folds[0], 3 + (folds[0] == 2)) if folds else 2  # two at least are left of a fold
    if len(patients) < least:
        found = f"{count(len(cases), 'labelled case')} of {count(len(patients), 'patient')}"
        reason = f" for {folds[0]} folds" if folds else ""
        raise DataError(f"{found}; expected at least {least} patients{reason}")
    order = _shuffled([alone[0].name if len(alone) == 1 else name for name, alone in patients.items()], seed)
    groups = [list(patients.values())[index] for index in order]
    if folds:
        of_fold = [number % folds[0] == folds[1] for number in range(len(groups))]
        test = list(itertools.compress(groups, of_fold))
        rest = [group for group, is_test in zip(groups, of_fold, strict=True) if not is_test]
        validation = min(max(round(len(rest) * (1 - train_test_split)), 1), len(rest) - 1)
        train, valid = rest[validation:], rest[:validation]
    elif len(groups) == 2:
        train, valid, test = groups[:1], groups[1:], groups[1:]
    else:
        others = min(max(round(len(groups) * (1 - train_test_split)), 2), len(groups) - 1)
        first = len(groups) - others
        last = first + min(max(round(others * validate_test_split), 1), others - 1)
        train, valid, test = groups[:first], groups[first:last], groups[last:]
    return Parts(*(list(itertools.chain(*part)) for part in (train, valid, test)))


def _shuffled(names: Sequence[str], seed: int) -> list[int]:
    """Return the order of the hashes of names with a seed."""
    texts = [f"{seed}:{name}".encode(errors="surrogateescape") for name in names]  # not always UTF-8
    return sorted(range(len(names)), key=lambda index: hashlib.sha256(texts[index]).digest())
