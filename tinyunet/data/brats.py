"""BraTS as released: a folder for each case with one file for each sequence."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

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

# What the name of a class tells, the first that is met; "non-enhancing" is no enhancing tumour.
_KINDS = (("edema", "edema"), ("non", "core"), ("necro", "core"), ("enhanc", "enhancing"))


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
    kinds = [next((kind for word, kind in _KINDS if word in name.lower()), name) for name in names]
    edema, core, enhancing = (
        kinds.index(kind) if kind in kinds else 0 for kind in ("edema", "core", "enhancing")
    )
    told = sorted((edema, core, enhancing)) == [1, 2, 3]
    return (edema, core, enhancing) if told else (1, 2, 3)


def label_values(names: Sequence[str]) -> tuple[int, ...]:
    """Return the number of each of four classes in BraTS' files, in the order of the classes."""
    by_class = zip((0, *tumour_classes(names)), LABEL_VALUES, strict=True)
    return tuple(value for _, value in sorted(by_class))


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
    for folder, subfolders, names in os.walk(path, followlinks=True):
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
        name = Path(folder).name
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
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
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
