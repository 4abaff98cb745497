"""BraTS as released: one file for each sequence, in a folder for each case or all in one."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from tinyunet.common.errors import DataError, said
from tinyunet.common.terminal import count
from tinyunet.data.cases import Case, Dataset
from tinyunet.data.conventions import CONVENTIONS, allowed_by_name, decide, numbers_of
from tinyunet.data.labels import label_numbers
from tinyunet.data.nifti import CONVERT_PAIR
from tinyunet.data.sequences import choose, kind_of

# The sequences of a case, in the order of the channels of the Decathlon's brain-tumour task, so that a model
# trained on one can be used on the other: name of the channel; endings of file names, with "_" until 2021,
# with "-" from 2023 on, with "_" again for radiotherapy; then endings that others use.
_SEQUENCES = {
    "flair": ("FLAIR", ("_flair", "-t2f", "-flair")),
    "t1": ("T1w", ("_t1", "-t1n", "-t1")),
    "t1ce": ("t1gd", ("_t1ce", "-t1c", "_t1c", "_t1gd", "-t1ce", "-t1gd")),
    "t2": ("T2w", ("_t2", "-t2w", "-t2")),
}
KINDS = tuple(_SEQUENCES)
MODALITIES = tuple(name for name, _ in _SEQUENCES.values())  # of the kinds, in their order

_ENDINGS = {ending: kind for kind, (_, endings) in _SEQUENCES.items() for ending in endings}
LABEL_ENDINGS = ("_seg", "-seg", "_gtv", "_segm")  # _segm: Training_355 of BraTS 2020
_ENDINGS |= dict.fromkeys(LABEL_ENDINGS, "seg")
_FILE = re.compile(rf"(.+)({'|'.join(_ENDINGS)})\.nii(\.gz)?", re.IGNORECASE)
_NAMES = "*_flair, *_t1, *_t1ce and *_t2 (or *-t2f, *-t1n, *-t1c and *-t2w)"
_SHOWN = 4  # file names in a message


class CaseFiles(NamedTuple):
    """The files of a case, in a folder of its own or of several cases."""

    where: Path  # its folder, or the beginning of its files
    sequences: dict[str, Path]  # by "flair", "t1", "t1ce" or "t2"
    labels: Path | None


def read_brats(
    path: str | Path,
    labels: str | None = None,
    allow_missing: bool = False,
    modalities: Sequence[str] | None = None,
) -> Dataset:
    """Find the labelled cases under a folder, however deep (``HGG/``, ``LGG/``, ...).

    A case has a folder of its own, or its files lie among those of other cases. Files are known by their
    endings, in upper or lower case, with ``.nii`` or ``.nii.gz``; others are ignored. Cases without labels
    (BraTS' own validation data) are left out. ``labels`` is the key of a convention; without it, names of
    files and numbers tell the convention, or UserError says that they do not. ``modalities`` are the names of
    the sequences to take; without them, all four, or T1 with contrast if the cases are of a release that has
    no other. DataError if there is no such case, a case with a sequence twice, or missing unless
    ``allow_missing``, or two cases of one name.
    """
    path = Path(path)
    found = find_cases(path)
    labelled = {name: files for name, files in found.items() if files.labels}
    if not labelled:
        but = f" (but {count(len(found), 'case')} without labels)" if found else ""
        expected = f"expected folders with {_NAMES} and *_seg (or *-seg) as .nii or .nii.gz{_others(path)}"
        raise DataError(f"{path}: neither a dataset.json nor a labelled BraTS case in it{but}; {expected}")
    label_paths = [files.labels for files in labelled.values() if files.labels]
    numbers = choose(modalities or _released(labelled, labels), MODALITIES, str(path))
    kinds, names = [[*_SEQUENCES][n] for n in numbers], tuple(MODALITIES[n] for n in numbers)
    images = {name: complete(files, kinds, allow_missing) for name, files in labelled.items()}
    if labels:
        meaning = CONVENTIONS[labels].classes(f"--labels {labels}")
    else:
        decided = decide(str(path), label_paths, label_numbers)
        meaning = decided.classes(decided.title)
    cases = tuple(
        Case(name, images[name], label, len(names), meaning.values)
        for name, label in zip(labelled, label_paths, strict=True)
    )
    return Dataset(path, cases, names, *meaning, file_modalities=MODALITIES)


def _released(cases: Mapping[str, CaseFiles], labels: str | None) -> Sequence[str] | None:
    """Return the sequences of cases whose release has no others; None for the usual four."""
    there = {kind for files in cases.values() for kind in files.sequences}
    keys = [
        (labels,) if labels else allowed_by_name(files.labels) for files in cases.values() if files.labels
    ]
    released = {CONVENTIONS[key].sequences if key else None for each in keys for key in each or (None,)}
    only = released.pop() if len(released) == 1 else None
    return only if only and there == {kind_of(name) for name in only} else None


def find_cases(path: Path) -> dict[str, CaseFiles]:
    """Return the files of each case under a folder, however deep, sorted by the names of the cases.

    DataError if a folder cannot be listed, two cases have one name, or a sequence of one is there twice.
    """
    found: dict[str, CaseFiles] = {}
    for folder in case_folders(path):
        for name, files in _cases_in(folder).items():
            other = found.get(name)
            if other and other.labels and files.labels:
                raise DataError(f"{files.where}: a case of this name is also in {other.where}; expected one")
            if not (other and other.labels):
                found[name] = files
    return dict(sorted(found.items()))


def case_folders(path: Path) -> Iterator[Path]:
    """Find the folders under a path that hold files of a case, each once."""
    walked: set[str] = set()
    for folder, subfolders, names in os.walk(path, onerror=_not_listed, followlinks=True):
        # A link may lead back to where it lies, or to a case that has been found.
        real = os.path.realpath(folder)
        if real in walked:
            subfolders.clear()
            continue
        walked.add(real)
        subfolders.sort()
        if any(map(_kind_of, names)):
            yield Path(folder)


def case_files(folder: str | Path, allow_missing: bool = False) -> tuple[tuple[Path, ...], Path | None]:
    """Return the files of the one case in a folder: FLAIR, T1w, t1gd and T2w; and the labels, or None.

    With ``allow_missing`` a missing file has the name that it would have, if one sequence is there. DataError
    if the folder cannot be listed, or a sequence is missing or there twice.
    """
    folder = Path(folder)
    (files,) = _cases_in(folder, together=True).values()
    return complete(files, [*_SEQUENCES], allow_missing), files.labels


def _cases_in(folder: Path, together: bool = False) -> dict[str, CaseFiles]:
    """Return the files of the case that a folder holds, or of several cases by the beginnings of their names.

    There are several if they have a sequence each; not if the files belong ``together``.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        _not_listed(error)
    matches = [match for match in map(_FILE.fullmatch, names) if match and _kind_of(match[0])]
    of_kind: dict[str | None, set[str]] = {}
    for match in matches:
        of_kind.setdefault(_kind_of(match[0]), set()).add(match[1])
    alone = together or all(len(names) == 1 for names in of_kind.values())
    own = Path(os.path.abspath(folder)).name  # "." has none
    cases: dict[str, dict[str, Path]] = {own: {}} if alone else {}
    for match in matches:
        files, kind = cases.setdefault(own if alone else match[1], {}), str(_kind_of(match[0]))
        if kind in files:
            other = files[kind].name
            each = ", a folder for each case" if len(of_kind[kind]) > 1 else ""
            raise DataError(f"{folder}: both {other} and {match[0]}; expected one {kind} file{each}")
        files[kind] = folder / match[0]
    return {
        name: CaseFiles(folder if alone else folder / name, files, files.pop("seg", None))
        for name, files in cases.items()
    }


def complete(files: CaseFiles, kinds: Sequence[str], allow_missing: bool = False) -> tuple[Path, ...]:
    """Return the file of each sequence of some kinds ("flair", "t1", "t1ce", "t2").

    With ``allow_missing`` a missing one has the name that it would have, if another one is there; DataError
    without.
    """
    there = dict(files.sequences)
    missing = [kind for kind in kinds if kind not in there]
    if missing and allow_missing and there:
        like = next(iter(there.values()))
        match = _FILE.fullmatch(like.name)
        assert match
        for kind in missing:
            endings = [ending for ending in _SEQUENCES[kind][1] if ending[0] == match[2][0]]
            there[kind] = like.with_name(f"{match[1]}{endings[0]}{like.name[match.end(2) :]}")
    elif missing:
        folder = files.where if files.where.is_dir() else files.where.parent
        found = f"{len(kinds) - len(missing)} sequences, no {', '.join(missing)}"
        expected = f"expected {len(kinds)}: {_NAMES} as .nii or .nii.gz{_others(folder)}"
        if len(missing) < len(kinds):
            expected += "; --modalities takes some sequences only"
        raise DataError(f"{files.where}: {found}; {expected}")
    return tuple(there[kind] for kind in kinds)


def _others(folder: Path) -> str:
    """Say what to do with images of other names or formats in a folder."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    pairs = [name for name in names if re.search(r"\.(hdr|img)(\.gz)?$", name.lower())]
    if pairs:
        return f"; {pairs[0]} belongs to a pair of files: {CONVERT_PAIR}"
    images = [n for n in names if re.search(r"\.nii(\.gz)?$", n.lower()) and not _kind_of(n)]
    if not images:
        return ""
    shown = ", ".join(images[:_SHOWN]) + (", ..." if len(images) > _SHOWN else "")
    how = "rename them, or put all sequences into one file and give that in place of the folder"
    return f"; found {shown}: {how}"


def _not_listed(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be listed ({said(error)})") from error


def _kind_of(name: str) -> str | None:
    """Return "flair", "t1", "t1ce", "t2" or "seg" for a file of this name; None if BraTS has no such name."""
    match = _FILE.fullmatch(name)
    # Archives packed on a Mac hold a "._name" beside each file.
    return None if match is None or name.startswith("._") else _ENDINGS[match[2].lower()]


def named_sequence(path: Path) -> str | None:
    """Return "flair", "t1", "t1ce", "t2" or "seg" if a file is named as one of BraTS' is."""
    return _kind_of(path.name)


def numbers_for(case: CaseFiles, label_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the number of each class (background first) in the BraTS release that a case is named after.

    None if the names of the classes do not tell parts of a tumour, or the case may be of several releases
    that number them differently. The case needs no labels.
    """
    like = next(iter(case.sequences.values()))
    match = _FILE.fullmatch(like.name)
    assert match
    labels = f"{match[1]}{match[2][0]}seg.nii"  # the name that its labels would have
    keys = allowed_by_name(Path(os.path.abspath(like.parent)) / labels) or ()
    found = {numbers_of(label_names, CONVENTIONS[key].meaning) for key in keys}
    whole = [[n for n in numbers if n is not None] for numbers in found if numbers and None not in numbers]
    return tuple(whole[0]) if len(whole) == 1 else None
