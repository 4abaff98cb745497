"""BraTS as released: a folder for each case with one file for each sequence."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from tinyunet.data.cases import Case, Dataset
from tinyunet.data.nifti import DataError

# Channels and classes come in the order of the Decathlon's brain-tumour task, so that a model
# trained on one can be used on the other.
MODALITIES = ("FLAIR", "T1w", "t1gd", "T2w")
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
# In the files 1 is necrotic and non-enhancing tumour, 2 edema, 4 enhancing tumour; nothing is 3.
LABEL_VALUES = (0, 2, 1, 4)

_SEQUENCES = ("flair", "t1", "t1ce", "t2")
# One case of BraTS 2020 (Training_355) was released with "_Segm".
_FILE = re.compile(r".+_(flair|t1ce|t1|t2|seg|segm)\.nii(\.gz)?", re.IGNORECASE)

# What the name of a class tells, and that of a sequence, the first that is met: "non-enhancing" is no
# enhancing tumour. Short forms stand alone: ED, NCR, ET are BraTS', SNFH and NETC those of its later years.
_CLASSES = {
    "edema": r"edema|hyperintens|\b(ed|snfh)\b",
    "core": r"non|necro|core|\b(ncr|net|netc)\b",
    "enhancing": r"enhanc|\bet\b",
}
_MODALITIES = {
    "flair": r"flair|t2f\b",
    "t1ce": r"t1.*(gd|gad|ce|contrast|post)|t1c\b",
    "t1": r"t1",
    "t2": r"t2",
}


def tumour_classes(names: Sequence[str]) -> tuple[int, int, int]:
    """Which of four classes are edema, non-enhancing and enhancing tumour.

    Parameters
    ----------
    names
        Of all classes, the background first. BraTS from 2023 on counts 1 necrosis, 2 edema, 3 enhancing.

    Returns
    -------
    classes
        By the names, where those tell all three; otherwise 1, 2, 3.
    """
    return _told_classes(names) or (1, 2, 3)


def _told_classes(names: Sequence[str]) -> tuple[int, int, int] | None:
    kinds = [_told(name, _CLASSES) for name in names[1:]]
    if set(kinds) != set(_CLASSES) or len(kinds) != len(_CLASSES):
        return None
    edema, core, enhancing = (kinds.index(kind) + 1 for kind in _CLASSES)
    return edema, core, enhancing


def label_values(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the number of each class in BraTS' files; None if the names are not those of its classes."""
    classes = _told_classes(names)
    if classes is None:
        return None
    return tuple(value for _, value in sorted(zip((0, *classes), LABEL_VALUES, strict=True)))


def choose_files(image_paths: Sequence[Path], modalities: Sequence[str]) -> tuple[Path, ...] | None:
    """Choose the files of a case that a model has learnt from, in the order of its channels.

    Parameters
    ----------
    image_paths
        From :func:`case_files`.
    modalities
        Names of the model's channels, such as "FLAIR", "T1w", "t1gd", "T2w".

    Returns
    -------
    paths
        One for each channel. None if a name tells none of the four sequences, or two the same.
    """
    kinds = [_told(name, _MODALITIES) for name in modalities]
    if None in kinds or len(set(kinds)) < len(kinds):
        return None
    by_kind = dict(zip(_SEQUENCES, image_paths, strict=True))
    return tuple(by_kind[kind] for kind in kinds if kind)


def _told(name: str, kinds: Mapping[str, str]) -> str | None:
    """Return the first kind whose pattern is in a name; "_" stands between words."""
    words = name.lower().replace("_", " ")
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, words)), None)


def read_brats(path: str | Path) -> Dataset:
    """Find the labelled cases under a folder, however deep (``HGG/``, ``LGG/``, ...).

    Parameters
    ----------
    path
        Folder with a folder for each case. Files ``*_flair``, ``*_t1``, ``*_t1ce``, ``*_t2`` and
        ``*_seg`` with ``.nii`` or ``.nii.gz``, in upper or lower case; others are not looked at.

    Returns
    -------
    dataset
        The cases that have labels; those without (BraTS' own validation data) are left out.

    Raises
    ------
    DataError
        No such case, a case with a sequence missing or twice, or two cases of one name.
    """
    path = Path(path)
    found: dict[str, Case] = {}
    walked: set[str] = set()
    for folder, subfolders, names in os.walk(path, onerror=_not_listed, followlinks=True):
        # A link may lead back to where it lies, or to a case that is there already.
        real = os.path.realpath(folder)
        if real in walked:
            subfolders.clear()
            continue
        walked.add(real)
        subfolders.sort()
        if not any(kind_of(name) for name in names):
            continue
        image_paths, label_path = case_files(folder)
        if label_path is None:
            continue
        name = Path(os.path.abspath(folder)).name  # "." has none
        if name in found:
            other = found[name].label_path.parent
            raise DataError(f"{folder}: a case of this name is also in {other}; expected one")
        found[name] = Case(name, image_paths, label_path, len(MODALITIES), LABEL_VALUES)
    if not found:
        raise DataError(
            f"{path}: neither a dataset.json nor a labelled BraTS case in it; "
            "expected folders with *_flair, *_t1, *_t1ce, *_t2 and *_seg as .nii or .nii.gz"
        )
    cases = tuple(found[name] for name in sorted(found))
    return Dataset(path, cases, MODALITIES, LABELS, LABEL_VALUES)


def case_files(folder: str | Path) -> tuple[tuple[Path, ...], Path | None]:
    """Find the files of one case.

    Parameters
    ----------
    folder
        The case's own folder.

    Returns
    -------
    image_paths
        FLAIR, T1w, t1gd, T2w.
    label_path
        None if the case has no labels.

    Raises
    ------
    DataError
        The folder cannot be listed, or a sequence is missing or there twice.
    """
    folder = Path(folder)
    files: dict[str, Path] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        _not_listed(error)
    for name in names:
        kind = kind_of(name)
        if kind is None:
            continue
        if kind in files:
            raise DataError(
                f"{folder}: both {files[kind].name} and {name}; expected one {kind} file"
            )
        files[kind] = folder / name
    missing = [kind for kind in _SEQUENCES if kind not in files]
    if missing:
        others = "" if files else " (images of other names are given as files)"
        raise DataError(
            f"{folder}: {len(_SEQUENCES) - len(missing)} sequences, no {', '.join(missing)}; "
            f"expected {len(_SEQUENCES)}: *_flair, *_t1, *_t1ce and *_t2{others}"
        )
    return tuple(files[kind] for kind in _SEQUENCES), files.get("seg")


def _not_listed(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def kind_of(name: str) -> str | None:
    """Return what BraTS keeps in a file of this name: "flair", "t1", "t1ce", "t2" or "seg".

    Returns
    -------
    kind
        None if it is no name of BraTS.
    """
    match = _FILE.fullmatch(name)
    # Archives packed on a Mac hold a "._name" beside each file.
    if match is None or name.startswith("._"):
        return None
    kind = match[1].lower()
    return "seg" if kind == "segm" else kind
