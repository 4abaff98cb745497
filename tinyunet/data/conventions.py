"""What the numbers in a label file stand for: a table of conventions, and how the right one is found.

The same number means different things in different data sets: 1 is edema in the Medical Segmentation
Decathlon, necrosis in BraTS, and enhancing tumour in the paediatric BraTS. So a convention is taken
from what a data set says of itself, the names of its files first, then the numbers in them. Where
that leaves two meanings, the user is asked: ``--labels``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import UserError

# What the name of a class may tell: "_" stands between words, and "non-enhancing" is one word.
_KINDS = {
    "edema": r"edema|hyperintens|\b(ed|snfh)\b",
    "core": r"nonenhanc|necro|core|\b(ncr|net|netc)\b",
    "enhancing": r"\benhanc|\bet\b",
    "cyst": r"cyst|\bcc\b",
    "cavity": r"cavity|resection|\brc\b",
}
_NON_ENHANCING = r"\b(non|un|not|no)[- ]*(contrast[- ]*|gd[- ]*|gadolinium[- ]*)?enhanc\w*"
_NEGATION = r"\b(non|no|not|without|outside|except)\b"
#: The three regions that BraTS scores are made of these: edema, core, enhancing tumour.
_PARTS = {"edema": 1, "core": 2, "cyst": 2, "enhancing": 3, "cavity": 0}
# A cavity is an addition to three parts that are always the same: so many files are asked for one.
_FILES_ASKED = 10


class Convention(NamedTuple):
    """What numbers stand for: the word for ``--labels``, where they are used, a name for each."""

    key: str
    title: str
    meaning: Mapping[int, str]

    @property
    def values(self) -> tuple[int, ...]:
        """Number of each class, in the order of the Decathlon's brain-tumour task: edema first."""
        kinds = list(_KINDS)

        def place(number: int) -> tuple[int, int]:
            kind = kind_of_class(self.meaning[number])
            return kinds.index(kind) if kind else len(kinds), number

        return (0, *sorted(self.meaning, key=place))

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each class, the background first."""
        return ("background", *(self.meaning[number] for number in self.values[1:]))


_CORE, _EDEMA, _ENHANCING, _CAVITY = ("necrotic core", "edema", "enhancing tumour", "resection cavity")
_NOW = {1: _CORE, 2: _EDEMA, 3: _ENHANCING}
_TABLE = (
    Convention(
        "decathlon", "Medical Segmentation Decathlon", {1: _EDEMA, 2: "non-enhancing tumor", 3: _ENHANCING}
    ),
    Convention(
        "brats2015",
        "BraTS 2012 to 2016",
        {1: "necrosis", 2: _EDEMA, 3: "non-enhancing tumour", 4: _ENHANCING},
    ),
    Convention(
        "brats2018", "BraTS 2017 to 2021", {1: "necrotic and non-enhancing core", 2: _EDEMA, 4: _ENHANCING}
    ),
    Convention("brats2023", "BraTS 2023", _NOW),
    Convention("brats2024", "BraTS 2024 post-treatment glioma", _NOW | {4: _CAVITY}),
    Convention("brats-met", "BraTS metastases", _NOW | {4: _CAVITY}),
    Convention(
        "brats-ped",
        "BraTS paediatric from 2024 on",
        {1: _ENHANCING, 2: "non-enhancing tumour", 3: "cystic component", 4: _EDEMA},
    ),
    Convention("brats-men-rt", "BraTS meningioma radiotherapy", {1: "target volume"}),
)
CONVENTIONS: Mapping[str, Convention] = {convention.key: convention for convention in _TABLE}

# Names of cases as released, and whose numbers such a case may have; the first that fits.
_RELEASES = (
    (r"brats.*men-?rt", ("brats-men-rt",)),
    (r"brats.*[-_]peds?[-_]", ("brats2023", "brats-ped")),
    (r"brats.*-met-", ("brats2023", "brats-met")),
    (r"brats.*-gli-", ("brats2023", "brats2024")),
    (r"brats.*-(ssa|men)-", ("brats2023",)),
    (r"brats[-_]?(20)?1[2-6](?!\d)", ("brats2015",)),
    (r"brats[-_]?(20)?(17|18|19|20|21)(?!\d)", ("brats2018",)),
    (r"brats[-_]?(20)?2[3-9](?!\d)", ("brats2023", "brats2024", "brats-met", "brats-ped")),
)
# Endings of label files: whose they may be, and whose they are if the case has a name of another kind.
_ENDINGS = (
    (r"_segm?$", ("brats2015", "brats2018"), ("brats2018",)),
    (r"-segm?$", ("brats2023", "brats2024", "brats-met", "brats-ped"), ("brats2023",)),
    (r"[-_]gtv$", ("brats-men-rt",), ("brats-men-rt",)),
)


def kind_of_class(name: str) -> str | None:
    """Return the one part of a tumour that the name of a class tells.

    Parameters
    ----------
    name
        Such as "non-enhancing tumor". Short forms stand alone: ED, NCR, ET are BraTS', SNFH and NETC
        those of its later years.

    Returns
    -------
    kind
        "edema", "core" (necrotic or non-enhancing), "enhancing", "cyst" or "cavity". None if the name
        tells none of them, or two, such as "enhancing core".
    """
    words = re.sub(_NON_ENHANCING, "nonenhanc", name.lower().replace("_", " "))
    if "hyperintens" in words:  # "surrounding non-enhancing FLAIR hyperintensity" is edema
        words = words.replace("nonenhanc", "")
    told = [kind for kind, pattern in _KINDS.items() if re.search(pattern, words)]
    return told[0] if len(told) == 1 and not re.search(_NEGATION, words) else None


def tumour_parts(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return what each class is for the regions: 0 no tumour, 1 edema, 2 core, 3 enhancing tumour.

    Parameters
    ----------
    names
        Of all classes, the background first.

    Returns
    -------
    parts
        None unless the names say so unmistakably: one edema, one enhancing tumour, one or more classes
        of core; beside these only a resection cavity.
    """
    kinds = [kind_of_class(name) for name in names[1:]]
    counts = Counter(kinds)
    if None in counts or counts["edema"] != 1 or counts["enhancing"] != 1 or not counts["core"]:
        return None
    return (0, *(_PARTS[kind] for kind in kinds if kind))


def numbers_of(names: Sequence[str], convention: Convention) -> tuple[int, ...] | None:
    """Return the number of each class in another convention; None if the names do not tell it."""
    numbers = {kind_of_class(name): number for number, name in convention.meaning.items()}
    kinds = [kind_of_class(name) for name in names[1:]]
    if len({*numbers}) < len(convention.meaning) or len({*kinds}) < len(kinds):
        return None
    if None in kinds or not {*kinds} <= {*numbers}:
        return None
    return (0, *(numbers[kind] for kind in kinds))


def told_by_name(label_path: Path) -> tuple[str, ...] | None:
    """Return the conventions that a label file may follow by its name and that of its folder.

    Parameters
    ----------
    label_path
        The file.

    Returns
    -------
    keys
        Of :data:`CONVENTIONS`; none if the names contradict each other. None if they tell nothing.
    """
    told = []
    name, folder = label_path.name.lower().split(".nii")[0], label_path.parent.name.lower()
    for words in (name, folder):
        match = (keys for pattern, keys in _RELEASES if re.search(pattern, words))
        told += [*islice(match, 1)]
    for pattern, possible, usual in _ENDINGS:
        if re.search(pattern, name):
            told.append(possible if told else usual)
    return common(told) if told else None


def common(told: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the conventions that all of some files may follow."""
    return tuple(key for key in told[0] if all(key in keys for keys in told[1:]))


def decide(where: str, keys: Sequence[str], numbers: Iterable[set[int]]) -> Convention:
    """Choose among conventions by the numbers that there are.

    Parameters
    ----------
    where
        Begins the message of an error.
    keys
        From :func:`told_by_name`.
    numbers
        Of each label file; no more files are read than needed.

    Raises
    ------
    UserError
        None of them fits, or two that differ; the message asks for ``--labels``.
    """
    left = [CONVENTIONS[key] for key in keys]
    found: set[int] = set()
    asked = islice(numbers, _FILES_ASKED) if _agree(left) else numbers
    for some in asked if len(left) > 1 else ():
        found |= some
        left = [c for c in left if found <= {0, *c.meaning}]
        if len(left) < 2:
            break
    if not left or not _agree(left):
        raise ask(where, found, left)
    return min(left, key=lambda c: len(c.meaning))


def _agree(conventions: Sequence[Convention]) -> bool:
    """Whether a number that several of them have means the same in each."""
    meanings = {(number, name) for c in conventions for number, name in c.meaning.items()}
    return len({number for number, _ in meanings}) == len(meanings)


def by_numbers_alone(numbers: set[int]) -> Convention | None:
    """Return the only convention that has exactly these numbers: none but BraTS 2018's leaves out 3."""
    if not {1, 2} <= numbers:
        return None
    fitting = [c for c in CONVENTIONS.values() if {*c.meaning} == numbers - {0}]
    return fitting[0] if len(fitting) == 1 else None


def ask(where: str, numbers: set[int], fitting: Sequence[Convention] = ()) -> UserError:
    """Return the error that asks for ``--labels``."""
    held = f" of the labels {listed(numbers)}" if numbers else ""
    if not fitting:
        fitting = [c for c in CONVENTIONS.values() if numbers <= {0, *c.meaning}]
    ways = ", ".join(f"{c.key} ({_meaning(c.meaning)})" for c in fitting)
    return UserError(
        f"{where}: the meaning{held} is not clear from names and numbers; say it with --labels: {ways}"
    )


def listed(numbers: Iterable[int]) -> str:
    """Return numbers in order, such as "0, 1, 4"."""
    return ", ".join(map(str, sorted(numbers)))


def read_as(names: Sequence[str], values: Sequence[int], source: str) -> str:
    """Return the line that says how labels are read.

    Parameters
    ----------
    names, values
        Name and number of each class, the background first.
    source
        Where that comes from.
    """
    meaning = dict(zip(values[1:], names[1:], strict=True))
    return f"labels read as: {_meaning(meaning)}" + (f" ({source})" if source else "")


def _meaning(meaning: Mapping[int, str]) -> str:
    named = {number: f" {name}" for number, name in meaning.items() if name != f"label {number}"}
    return ", ".join(f"{number}{named.get(number, '')}" for number in sorted(meaning))
