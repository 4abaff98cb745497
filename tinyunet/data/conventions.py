"""Meanings of the numbers in a label file: a table of conventions, and how the right one is found.

The same number means different things in different data sets: 1 is edema in the Medical Segmentation
Decathlon, necrosis in BraTS, and enhancing tumour in the paediatric BraTS. So a convention is taken from
the data set itself: first from the names of its files, then from the numbers in them. Where two
meanings are left, the user is asked for ``--labels``.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import UserError

# The parts of a tumour: a pattern for class names, where "_" is a space and "non-enhancing" one word, and
# what the part is for BraTS' three regions: 0 no tumour, 1 edema, 2 core, 3 enhancing tumour.
_KINDS = {
    "edema": (r"edema|hyperintens|\b(ed|snfh)\b", 1),
    "core": (r"nonenhanc|necro|core|\b(ncr|net|netc)\b", 2),
    "enhancing": (r"\benhanc|\bet\b", 3),
    "cyst": (r"cyst|\bcc\b", 2),
    "cavity": (r"cavity|resection|\brc\b", 0),
}
#: The parts of each region that BraTS scores.
REGIONS: Mapping[str, tuple[int, ...]] = {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing": (3,)}
_NON_ENHANCING = r"\b(non|un|not|no)[- ]*(contrast[- ]*|gd[- ]*|gadolinium[- ]*)?enhanc\w*"
_NEGATION = r"\b(non|no|not|without|outside|except)\b"
# Conventions that agree differ in a cavity only: so many files, from the first to the last, are read to see
# whether there is one. It takes 0.1 s a file.
_FILES_READ = 50
_NEWEST = 2026  # the last release that the table knows


class Meaning(NamedTuple):
    """Name and number of each class, the background first, and where both come from."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    source: str


class Convention(NamedTuple):
    """A value of ``--labels``, the data sets that use it, and a name for each number."""

    key: str
    title: str
    meaning: Mapping[int, str]
    also: str = ""  # other values of ``--labels`` for it
    sequences: tuple[str, ...] | None = None  # if a case has not the usual four

    def classes(self, source: str = "") -> Meaning:
        """Return the classes in the order of the Decathlon's brain-tumour task: edema first."""
        order = [*_KINDS, None]
        numbers = sorted(self.meaning, key=lambda n: (order.index(kind_of_class(self.meaning[n])), n))
        names = ("background", *(self.meaning[number] for number in numbers))
        return Meaning(names, (0, *numbers), source)


_EDEMA, _ENHANCING, _CAVITY = "edema", "enhancing tumour", "resection cavity"
_NOW = {1: "necrotic core", 2: _EDEMA, 3: _ENHANCING}
_CHILDREN = {1: _ENHANCING, 2: "non-enhancing tumour", 3: "cystic component", 4: _EDEMA}
_2012 = {1: "necrosis", 2: _EDEMA, 3: "non-enhancing tumour", 4: _ENHANCING}
_2017 = {1: "necrotic and non-enhancing core", 2: _EDEMA, 4: _ENHANCING}
_TASK = {1: _EDEMA, 2: "non-enhancing tumor", 3: _ENHANCING}


def _since(year: int, *kinds: str) -> str:
    """Return the names of data sets since a year, such as "brats2023-ped"."""
    return " ".join(f"brats{each}{kind}" for each in range(year, _NEWEST + 1) for kind in kinds)


_TABLE = (
    Convention("decathlon", "Medical Segmentation Decathlon", _TASK, "msd"),
    Convention("brats2015", "BraTS 2012 to 2016", _2012, "brats2012 brats2013 brats2014 brats2016"),
    Convention("brats2018", "BraTS 2017 to 2021", _2017, "brats2017 brats2019 brats2020 brats2021 brats2022"),
    Convention(
        "brats2023",
        "BraTS 2023",
        _NOW,
        "brats2023-gli brats-ssa brats-men brats2023-men brats2025-men brats2026-men "
        + _since(2023, "-ssa", "-goat"),
    ),
    Convention(
        "brats2024", "BraTS 2024 post-treatment glioma", _NOW | {4: _CAVITY}, _since(2024, "", "-gli")
    ),
    Convention("brats-met", "BraTS metastases", _NOW | {4: _CAVITY}, _since(2023, "-met", "-mets")),
    Convention(
        "brats-ped", "BraTS paediatric from 2024 on", _CHILDREN, "brats-peds " + _since(2023, "-ped", "-peds")
    ),
    Convention(
        "brats-men-rt",
        "BraTS meningioma radiotherapy",
        {1: "target volume"},
        _since(2024, "-men-rt"),
        ("t1gd",),
    ),
)
CONVENTIONS: Mapping[str, Convention] = {convention.key: convention for convention in _TABLE}
_ALIASES = {alias: convention.key for convention in _TABLE for alias in convention.also.split()}

# Names of cases as released, and the conventions that such a case may follow; the first row that fits counts.
_SINCE_2023 = ("brats2023", "brats2024", "brats-met", "brats-ped")
_RELEASES = (
    (r"brats.*men-?rt", ("brats-men-rt",)),
    (r"brats.*[-_]peds?[-_]", ("brats2023", "brats-ped")),
    (r"brats.*-met-", ("brats2023", "brats-met")),
    (r"brats.*-gli-", ("brats2023", "brats2024")),
    (r"brats.*-(ssa|men)-", ("brats2023",)),
    (r"brats[-_]?(20)?1[2-6](?!\d)", ("brats2015",)),
    (r"brats[-_]?(20)?(17|18|19|20|21)(?!\d)", ("brats2018",)),
    (r"brats[-_]?(20)?2[3-9](?!\d)", _SINCE_2023),
)
# Endings of label files: possible conventions, and the usual one if the case's name is in no row above.
_ENDINGS = (
    (r"_segm?$", ("brats2015", "brats2018"), ("brats2018",)),
    (r"-segm?$", _SINCE_2023, ("brats2023",)),
    (r"[-_]gtv$", ("brats-men-rt",), ("brats-men-rt",)),
)


def key_of(text: str) -> str:
    """Return the key of a convention for one of its names, such as "brats2023-ped"; other text as it is."""
    return _ALIASES.get(text.lower(), text.lower())


def kind_of_class(name: str) -> str | None:
    """Return the part of a tumour that a class is, by its name such as "non-enhancing tumor".

    A part is "edema", "core" (necrotic or non-enhancing), "enhancing", "cyst" or "cavity"; None if the name
    tells none of them, or two, such as "enhancing core".
    """
    words = re.sub(_NON_ENHANCING, "nonenhanc", name.lower().replace("_", " "))
    if "hyperintens" in words:  # "surrounding non-enhancing FLAIR hyperintensity" is edema
        words = words.replace("nonenhanc", "")
    kinds = [kind for kind, (pattern, _) in _KINDS.items() if re.search(pattern, words)]
    return kinds[0] if len(kinds) == 1 and not re.search(_NEGATION, words) else None


def tumour_parts(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the part of each class in the scored regions: 0 no tumour, 1 edema, 2 core, 3 enhancing tumour.

    The names (background first) must be unmistakable: one edema, one enhancing tumour, one or more classes of
    core, and beside these only a resection cavity. Otherwise the result is None.
    """
    kinds = [kind_of_class(name) for name in names[1:]]
    counts = Counter(kinds)
    if None in counts or counts["edema"] != 1 or counts["enhancing"] != 1 or not counts["core"]:
        return None
    return (0, *(_KINDS[kind][1] for kind in kinds if kind))


def regions_of(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the classes of BraTS' three regions, by name; none if the names are not those of a tumour."""
    parts = tumour_parts(names) or ()
    regions = REGIONS.items() if parts else ()
    return {name: tuple(c for c, part in enumerate(parts) if part in members) for name, members in regions}


def numbers_of(
    names: Sequence[str], meaning: Mapping[int, str], tell: Callable[[str], str | None] = kind_of_class
) -> tuple[int | None, ...] | None:
    """Return the number that each class, background first, has in another meaning; None for a class it lacks.

    ``tell`` says by which word two names are compared. The whole result is None where ``tell`` gives a class
    no word, or two names of one side the same.
    """
    classes = [tell(name) for name in names[1:]]
    numbers = {tell(name): number for number, name in meaning.items()}
    if None in classes or len({*classes}) < len(classes) or len(numbers) < len(meaning):
        return None
    return (0, *(numbers.get(each) for each in classes))


def allowed_by_name(label_path: Path) -> tuple[str, ...] | None:
    """Return keys of the conventions that a label file may follow, by its name and its folder's name.

    The result is empty if the two names contradict each other, and None if they tell nothing.
    """
    allowed: list[tuple[str, ...]] = []
    name, folder = label_path.name.lower().split(".nii")[0], label_path.parent.name.lower()
    for words in (name, folder):
        allowed += islice((keys for pattern, keys in _RELEASES if re.search(pattern, words)), 1)
    for pattern, possible, usual in _ENDINGS:
        if re.search(pattern, name):
            allowed.append(possible if allowed else usual)
    return _common(allowed) if allowed else None


def _common(allowed: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the keys that are in each of some lists."""
    return tuple(key for key in allowed[0] if all(key in keys for keys in allowed[1:]))


def decide(where: str, label_paths: Sequence[Path], read: Callable[[Path], set[int]]) -> Convention:
    """Choose among the conventions that the names of all label files allow, by the numbers in the files.

    ``read`` returns the numbers in a file; no more files are read than needed. If no convention fits, or two
    that differ, UserError asks for ``--labels``; the message begins with ``where``.
    """
    allowed = [allowed_by_name(path) or () for path in label_paths]
    for path, keys in zip(label_paths, allowed, strict=True):
        if not _common([allowed[0], keys]):
            names = path.name if not keys else f"{label_paths[0].name} and {path.name}"
            raise ask(f"{where}: as {names} is named", set())
    left = [CONVENTIONS[key] for key in _common(allowed)]
    found: set[int] = set()
    step = -(-len(label_paths) // _FILES_READ) if _agree(left) else 1
    for path in label_paths[::step] if len(left) > 1 else ():
        found |= read(path)
        left = [c for c in left if found <= {0, *c.meaning}]
        if len(left) < 2:
            break
    if not left or not _agree(left):
        raise ask(where, found, left)
    return min(left, key=lambda c: len(c.meaning))


def _agree(conventions: Sequence[Convention]) -> bool:
    """Whether a number that several conventions have means the same in each."""
    meanings = {(number, name) for c in conventions for number, name in c.meaning.items()}
    return len({number for number, _ in meanings}) == len(meanings)


def by_numbers_alone(numbers: set[int]) -> Convention | None:
    """Return the only convention that has exactly these numbers; only BraTS 2018's leaves out 3."""
    if not {1, 2} <= numbers:
        return None
    fitting = [c for c in CONVENTIONS.values() if {*c.meaning} == numbers - {0}]
    return fitting[0] if len(fitting) == 1 else None


def ask(where: str, numbers: set[int], fitting: Sequence[Convention] = ()) -> UserError:
    """Return the error that asks for ``--labels``."""
    held = f" of the labels {listed(numbers)}" if numbers else ""
    fitting = fitting or [c for c in CONVENTIONS.values() if numbers <= {0, *c.meaning}]
    ways = ", ".join(f"{c.key} ({_shown(c.meaning)})" for c in fitting)
    unclear = f"the meaning{held} is not clear from names and numbers"
    return UserError(f"{where}: {unclear}; say it with --labels: {ways}")


def listed(numbers: Iterable[int]) -> str:
    """Return numbers in order, such as "0, 1, 4"."""
    return ", ".join(map(str, sorted(numbers)))


def read_as(names: Sequence[str], values: Sequence[int], source: str) -> str:
    """Return the line that says how labels are read: the entries of a :class:`Meaning`."""
    shown = _shown(dict(zip(values[1:], names[1:], strict=True)))
    return f"labels read as: {shown}" + (f" ({source})" if source else "")


def _shown(meaning: Mapping[int, str]) -> str:
    named = {number: f" {name}" for number, name in meaning.items() if name != f"label {number}"}
    return ", ".join(f"{number}{named.get(number, '')}" for number in sorted(meaning))
