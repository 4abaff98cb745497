"""Data sets as folders: a Medical Segmentation Decathlon task, or BraTS as released."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyunet.common.errors import DataError, one_line, said
from tinyunet.common.files import read_json
from tinyunet.data.brats import read_brats
from tinyunet.data.cases import Case, Dataset
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.data.nifti import stem


def read_dataset(
    path: str | Path, files_are_there: bool = True, labels: str | None = None, allow_missing: bool = False
) -> Dataset:
    """Find the labelled cases of a folder; no volume is read.

    Parameters
    ----------
    path
        A Decathlon task (a folder with ``dataset.json``: its ``modality``, ``labels`` and ``training`` are
        used, ``test`` is not, as it has no labels), or, without that file, a BraTS folder as
        :func:`tinyunet.data.brats.read_brats` takes it. DataError if it is neither.
    files_are_there
        Whether to check that every file named in ``dataset.json`` is there: DataError if not.
    labels
        Key of :data:`tinyunet.data.conventions.CONVENTIONS` for the numbers in the label files; without
        it, ``dataset.json`` or the names of BraTS' files tell the convention.
    allow_missing
        Whether BraTS cases may lack sequences: see :func:`tinyunet.data.brats.case_files`.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a Decathlon task or a BraTS folder")
    file = path / "dataset.json"
    if not file.exists():
        return read_brats(path, labels, allow_missing or not files_are_there)
    try:
        dataset = _read_decathlon(file, files_are_there)
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply; expected a Decathlon description") from error
    if labels is None:
        return dataset
    meaning = CONVENTIONS[labels].classes(f"--labels {labels}")
    cases = tuple(replace(case, label_values=meaning.values) for case in dataset.cases)
    return Dataset(path, cases, dataset.modalities, *meaning)


def _read_decathlon(file: Path, files_are_there: bool) -> Dataset:
    try:
        description = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({said(error)})") from error
    except ValueError as error:  # not JSON, or not even text
        raise DataError(f"{file}: not JSON ({said(error)}); expected a Decathlon description") from error
    if not isinstance(description, dict):
        raise DataError(f"{file}: holds no object; expected modality, labels and training")
    modalities, labels = (_numbered(file, description, key) for key in ("modality", "labels"))
    if list(modalities) != list(range(len(modalities))):
        raise DataError(f'{file}: "modality" is not numbered 0, 1, 2, ... without a gap')
    if next(iter(labels)) != 0 or len(labels) < 2 or max(labels) > 255:
        numbers = ", ".join(map(str, labels))
        expected = "expected 0 for the background and others up to 255"
        raise DataError(f'{file}: "labels" has numbers {numbers}; {expected}')
    names = tuple(labels.values())
    if len({*names}) < len(names):
        raise DataError(f'{file}: "labels" has names {", ".join(names)}; expected another for each number')
    cases: dict[str, Case] = {}
    for image, label in _training_files(file, description):
        for path in (image, label) if files_are_there else ():
            if not path.is_file():
                special = path.exists() and not path.is_dir()
                what = "not a regular file" if special else "no such file"
                raise DataError(f"{path}: {what}, though {file} names it")
        name = stem(image)
        if name in cases:
            raise DataError(f"{file}: {image.name} is named twice; expected each case once")
        cases[name] = Case(name, (image,), label, len(modalities), tuple(labels))
    in_order = tuple(cases[name] for name in sorted(cases))
    return Dataset(file.parent, in_order, tuple(modalities.values()), names, tuple(labels), file.name)


def _numbered(file: Path, description: dict[str, Any], key: str) -> dict[int, str]:
    """Return an entry such as ``{"0": "FLAIR", "1": "T1w"}`` with integer keys, sorted."""
    entry = description.get(key)
    if not isinstance(entry, dict) or not entry:
        raise DataError(f'{file}: no "{key}"; expected names by number, as {{"0": ...}}')
    try:
        # A line break in a name would break tables.
        named = {int(number): one_line(str(entry[number])) for number in sorted(entry, key=int)}
    except ValueError as error:
        raise DataError(f'{file}: "{key}" has a key that is no integer ({said(error)})') from error
    if len(named) < len(entry):
        raise DataError(f'{file}: "{key}" has one number twice; expected each once')
    return named


def _training_files(file: Path, description: dict[str, Any]) -> list[tuple[Path, Path]]:
    """Return image and label file of each training case."""
    entries = description.get("training")
    if not isinstance(entries, list):
        raise DataError(f'{file}: no "training"; expected a list of image and label files')
    files = []
    for entry in entries:
        match entry:
            case {"image": str(image), "label": str(label)}:
                # Archives packed on a Mac hold a "._name" beside each file, and some lists name them.
                if not Path(image).name.startswith("._"):
                    files.append((file.parent / image, file.parent / label))
            case _:
                shown = json.dumps(entry)[:200]
                raise DataError(f'{file}: training case {shown}; expected {{"image": ..., "label": ...}}')
    if not files:
        raise DataError(f'{file}: "training" names no case; expected one at least')
    return files
