"""BraTS as released: a folder for each case with one file for each sequence."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tinyunet.common.errors import DataError, said
from tinyunet.common.terminal import count
from tinyunet.data.cases import Case, Dataset
from tinyunet.data.conventions import CONVENTIONS, allowed_by_name, decide, numbers_of
from tinyunet.data.labels import label_numbers
from tinyunet.data.nifti import CONVERT_PAIR

_CONTRAST = "gd|gad|contrast|post"
# The sequences of a case, in the order of the channels of the Decathlon's brain-tumour task, so that a model
# trained on one can be used on the other: name of the channel; endings of file names, with "_" until 2021,
# with "-" from 2023 on, with "_" again for radiotherapy; a pattern for the names of a model's channels.
_SEQUENCES = {
    "flair": ("FLAIR", ("_flair", "-t2f"), r"flair|t2f\b"),
    "t1": ("T1w", ("_t1", "-t1n"), r"t1"),
    "t1ce": ("t1gd", ("_t1ce", "-t1c", "_t1c"), rf"t1.*({_CONTRAST}|ce)|t1c\b|({_CONTRAST}).*t1"),
    "t2": ("T2w", ("_t2", "-t2w"), r"t2"),
}
MODALITIES = tuple(name for name, _, _ in _SEQUENCES.values())
_SPECIFIC_FIRST = ("flair", "t1ce", "t1", "t2")  # the first pattern that fits a name counts
_NO_CONTRAST = r"\b(non|no|pre|without|un)[- ]*(contrast|gad|gd|ce|enhanced)\w*"

_ENDINGS = {ending: kind for kind, (_, endings, _) in _SEQUENCES.items() for ending in endings}
LABEL_ENDINGS = ("_seg", "-seg", "_gtv", "_segm")  # _segm: Training_355 of BraTS 2020
_ENDINGS |= dict.fromkeys(LABEL_ENDINGS, "seg")
_FILE = re.compile(rf"(.+)({'|'.join(_ENDINGS)})\.nii(\.gz)?", re.IGNORECASE)
_NAMES = "*_flair, *_t1, *_t1ce and *_t2 (or *-t2f, *-t1n, *-t1c and *-t2w)"
_SHOWN = 4  # file names in a message


def choose_files(image_paths: Sequence[Path], modalities: Sequence[str]) -> tuple[Path, ...] | None:
    """Choose from the files of a case (:func:`case_files`) one for each channel of a model, by its name.

    None if a name, such as "T1w" or "t1gd", tells none of the four sequences, or two tell the same.
    """
    kinds = []
    for name in modalities:
        words = re.sub(_NO_CONTRAST, "", name.lower().replace("_", " "))
        kinds.append(next((kind for kind in _SPECIFIC_FIRST if re.search(_SEQUENCES[kind][2], words)), None))
    if None in kinds or len(set(kinds)) < len(kinds):
        return None
    by_kind = dict(zip(_SEQUENCES, image_paths, strict=True))
    return tuple(by_kind[kind] for kind in kinds if kind)


def read_brats(path: str | Path, labels: str | None = None, allow_missing: bool = False) -> Dataset:
    """Find the labelled cases under a folder, however deep (``HGG/``, ``LGG/``, ...).

    Each case has a folder. Its files are known by their endings, in upper or lower case, with ``.nii`` or
    ``.nii.gz``; others are ignored. Cases without labels (BraTS' own validation data) are left out.
    ``labels`` is the key of a convention; without it, names of files and numbers tell the convention, or
    UserError says that they do not. DataError if there is no such case, a case with a sequence twice, or
    missing unless ``allow_missing``, or two cases of one name.
    """
    path = Path(path)
    found: dict[str, tuple[tuple[Path, ...], Path]] = {}
    unlabelled = 0
    for folder in case_folders(path):
        image_paths, label_path = case_files(folder, allow_missing)
        if label_path is None:
            unlabelled += 1
            continue
        name = Path(os.path.abspath(folder)).name  # "." has none
        if name in found:
            other = found[name][1].parent
            raise DataError(f"{folder}: a case of this name is also in {other}; expected one")
        found[name] = image_paths, label_path
    if not found:
        but = f" (but {count(unlabelled, 'case')} without labels)" if unlabelled else ""
        expected = f"expected folders with {_NAMES} and *_seg (or *-seg) as .nii or .nii.gz{_others(path)}"
        raise DataError(f"{path}: neither a dataset.json nor a labelled BraTS case in it{but}; {expected}")
    label_paths = [found[name][1] for name in sorted(found)]
    if labels:
        meaning = CONVENTIONS[labels].classes(f"--labels {labels}")
    else:
        decided = decide(str(path), label_paths, map(label_numbers, label_paths))
        meaning = decided.classes(decided.title)
    cases = tuple(Case(name, *found[name], len(MODALITIES), meaning.values) for name in sorted(found))
    return Dataset(path, cases, MODALITIES, *meaning)


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
    """Return the files of one case: FLAIR, T1w, t1gd and T2w; and the labels, or None.

    With ``allow_missing`` a missing file has the name that it would have, if one sequence is there. DataError
    if the folder cannot be listed, or a sequence is missing or there twice.
    """
    folder = Path(folder)
    files: dict[str, Path] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        _not_listed(error)
    for name in names:
        kind = _kind_of(name)
        if kind is None:
            continue
        if kind in files:
            other = files[kind].name
            of_cases = {match[1] for match in map(_FILE.fullmatch, (other, name)) if match}
            each = ", a folder for each case" if len(of_cases) > 1 else ""
            raise DataError(f"{folder}: both {other} and {name}; expected one {kind} file{each}")
        files[kind] = folder / name
    missing = [kind for kind in _SEQUENCES if kind not in files]
    if allow_missing and len(missing) < len(_SEQUENCES):
        there = next(path for kind, path in files.items() if kind != "seg")
        match = _FILE.fullmatch(there.name)
        assert match
        for kind in missing:
            endings = [ending for ending in _SEQUENCES[kind][1] if ending[0] == match[2][0]]
            files[kind] = there.with_name(f"{match[1]}{endings[0]}{there.name[match.end(2) :]}")
    elif missing:
        found = f"{len(_SEQUENCES) - len(missing)} sequences, no {', '.join(missing)}"
        expected = f"expected {len(_SEQUENCES)}: {_NAMES} as .nii or .nii.gz{_others(folder)}"
        raise DataError(f"{folder}: {found}; {expected}")
    return tuple(files[kind] for kind in _SEQUENCES), files.get("seg")


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


def numbers_for(folder: Path, label_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the number of each class (background first) in the BraTS release that a case is named after.

    None if the names of the classes do not tell parts of a tumour, or the case may be of several releases
    that number them differently. The case needs no labels.
    """
    match = _FILE.fullmatch(case_files(folder, allow_missing=True)[0][0].name)
    assert match
    labels = f"{match[1]}{match[2][0]}seg.nii"  # the name that its labels would have
    keys = allowed_by_name(Path(os.path.abspath(folder)) / labels) or ()
    found = {numbers_of(label_names, CONVENTIONS[key].meaning) for key in keys}
    whole = [[n for n in numbers if n is not None] for numbers in found if numbers and None not in numbers]
    return tuple(whole[0]) if len(whole) == 1 else None
