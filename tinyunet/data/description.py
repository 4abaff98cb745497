"""``dataset.json``: of the Medical Segmentation Decathlon, and of nnU-Net in its first and second version.

                Decathlon, nnU-Net 1                     nnU-Net 2
    sequences   "modality": {"0": "FLAIR"}               "channel_names": {"0": "FLAIR"}
    classes     "labels": {"0": "background"}            "labels": {"background": 0, "whole tumour": [1, 2]}
    cases       "training": [{"image", "label"}]         the files in labelsTr, with "file_ending"
    images      imagesTr/CASE.nii.gz with all sequences  imagesTr/CASE_0000.nii.gz, ..., a file for each
                (nnU-Net 1: as nnU-Net 2)

Each form of an entry is read wherever it stands.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet.common.errors import DataError, one_line, said
from tinyunet.common.files import read_json
from tinyunet.data.nifti import stem

_ENDINGS = (".nii.gz", ".nii")


class Classes(NamedTuple):
    """Name and number of each class, the background first; the classes of each region, if there are some."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: Mapping[str, tuple[int, ...]] | None = None


class CaseFiles(NamedTuple):
    """One file with all sequences, or a file for each; and the labels."""

    name: str
    images: tuple[Path, ...]
    labels: Path


class Description(NamedTuple):
    """Content of a ``dataset.json``."""

    modalities: tuple[str, ...]
    classes: Classes
    cases: list[CaseFiles]


def read_description(file: Path) -> Description:
    """Read a ``dataset.json``; DataError, which names the file, if there is something wrong in it."""
    content = _content(file)
    names, classes = _modalities(file, content), _classes(file, content)
    if isinstance(content.get("dataset"), dict):
        cases = _named_cases(file, content["dataset"], len(names))
    elif "channel_names" in content and "training" not in content:
        cases = _found_cases(file, content.get("file_ending"), len(names))
    else:
        cases = _training_cases(file, content, len(names))
    return Description(names, classes, cases)


def descriptions(folder: Path) -> list[Path]:
    """Return the ``dataset.json`` that files in a folder may belong to: its own, and that above it."""
    here = Path(os.path.abspath(folder))  # "." has no parent
    files = (place / "dataset.json" for place in (here, here.parent))
    return [file for file in files if file.is_file()]


def sequences_near(folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Return the ``dataset.json`` that names the sequences of a folder's images, and these names.

    None if there is none that does. DataError if it is damaged.
    """
    for file in descriptions(folder):
        content = _content(file)
        if not {"channel_names", "modality"}.isdisjoint(content):  # another program's has neither
            return file, _modalities(file, content)
    return None


def _content(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({said(error)})") from error
    except ValueError as error:  # not JSON, or not even text
        raise DataError(f"{file}: not JSON ({said(error)}); expected a Decathlon description") from error
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply; expected a Decathlon description") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no object; expected modality, labels and training")
    return content


def _modalities(file: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the sequences, in the order of their numbers."""
    key = "channel_names" if "channel_names" in content else "modality"
    modalities = _numbered(file, content, key)
    if list(modalities) != list(range(len(modalities))):
        raise DataError(f'{file}: "{key}" is not numbered 0, 1, 2, ... without a gap')
    return tuple(modalities.values())


def _numbered(file: Path, content: Mapping[str, Any], key: str) -> dict[int, str]:
    """Return an entry such as ``{"0": "FLAIR", "1": "T1w"}`` with integer keys, sorted."""
    entry = content.get(key)
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


def _classes(file: Path, content: Mapping[str, Any]) -> Classes:
    """Return the classes of ``{"0": name}``, or of ``{name: 0}`` with lists of numbers for regions."""
    entry = content.get("labels")
    regions: dict[str, tuple[int, ...]] = {}
    if isinstance(entry, dict) and entry and all(isinstance(v, int | list) for v in entry.values()):
        numbers: dict[int, str] = {}
        for name, value in entry.items():
            group = value if isinstance(value, list) else [value]
            if not group or not all(type(number) is int for number in group):
                raise DataError(f'{file}: "labels" has {value!r} for {name}; expected a number or numbers')
            if name == "ignore":
                raise DataError(f'{file}: "labels" has a label to ignore, {value}; expected classes alone')
            if len(group) == 1:
                if group[0] in numbers:
                    raise DataError(f'{file}: "labels" has one number twice; expected each once')
                numbers[group[0]] = one_line(str(name))
            if group != [0]:
                regions[one_line(str(name))] = tuple(group)
        for number in {number for group in regions.values() for number in group} - {*numbers}:
            numbers[number] = f"label {number}"
        named = dict(sorted(numbers.items()))
    else:
        named = _numbered(file, content, "labels")
    if next(iter(named)) != 0 or len(named) < 2 or max(named) > 255:
        shown = ", ".join(map(str, named))
        raise DataError(
            f'{file}: "labels" has numbers {shown}; expected 0 for the background and others up to 255'
        )
    if len({*named.values()}) < len(named):
        shown = ", ".join(named.values())
        raise DataError(f'{file}: "labels" has names {shown}; expected another for each number')
    place = {number: index for index, number in enumerate(named)}
    has_regions = any(len(group) > 1 for group in regions.values())
    of_classes = {name: tuple(place[n] for n in group) for name, group in regions.items()}
    return Classes(tuple(named.values()), tuple(named), of_classes if has_regions else None)


def _training_cases(file: Path, content: Mapping[str, Any], channels: int) -> list[CaseFiles]:
    """Return the cases of ``"training": [{"image", "label"}]``."""
    entries = content.get("training")
    if not isinstance(entries, list):
        raise DataError(f'{file}: no "training"; expected a list of image and label files')
    cases = []
    for entry in entries:
        match entry:
            case {"image": str(image), "label": str(label)}:
                # Archives packed on a Mac hold a "._name" beside each file, and some lists name them.
                if not Path(image).name.startswith("._"):
                    path = file.parent / image
                    cases.append(CaseFiles(stem(path), _parts(path, channels), file.parent / label))
            case _:
                shown = json.dumps(entry)[:200]
                raise DataError(f'{file}: training case {shown}; expected {{"image": ..., "label": ...}}')
    if not cases:
        raise DataError(f'{file}: "training" names no case; expected one at least')
    return cases


def _named_cases(file: Path, entries: Mapping[str, Any], channels: int) -> list[CaseFiles]:
    """Return the cases of nnU-Net 2's ``"dataset": {name: {"images": [...], "label"}}``."""
    cases = []
    for name, entry in entries.items():
        match entry:
            case {"images": [*images], "label": str(label)} if all(isinstance(i, str) for i in images):
                paths = tuple(file.parent / image for image in images)
                if len(paths) != channels:
                    raise DataError(f"{file}: {name} has {len(paths)} images; expected {channels}")
                cases.append(CaseFiles(one_line(name), paths, file.parent / label))
            case _:
                shown = json.dumps(entry)[:200]
                raise DataError(f'{file}: {name} is {shown}; expected {{"images": [...], "label": ...}}')
    if not cases:
        raise DataError(f'{file}: "dataset" names no case; expected one at least')
    return cases


def _found_cases(file: Path, ending: Any, channels: int) -> list[CaseFiles]:
    """Return the cases whose labels lie in ``labelsTr``, and whose images lie in ``imagesTr``."""
    if ending not in (None, *_ENDINGS):
        shown = json.dumps(ending)[:40]
        raise DataError(f'{file}: "file_ending" is {shown}; expected .nii.gz or .nii')
    folder = file.parent / "labelsTr"
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(ending or _ENDINGS))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({said(error)}); expected labels of cases") from error
    images, names = file.parent / "imagesTr", [name for name in names if not name.startswith(".")]
    if not names:
        raise DataError(
            f"{folder}: holds no file that ends in {ending or '.nii.gz'}; expected labels of cases"
        )
    return [CaseFiles(stem(Path(n)), _parts(images / n, channels), folder / n) for n in names]


def _parts(image: Path, channels: int) -> tuple[Path, ...]:
    """Return the file of an image, or its files ``NAME_0000.nii.gz``, ... if only these are there."""
    ending = next((ending for ending in _ENDINGS if image.name.endswith(ending)), "")
    begin = image.name.removesuffix(ending)
    parts = tuple(image.with_name(f"{begin}_{number:04}{ending}") for number in range(channels))
    return parts if parts[0].exists() and not image.exists() else (image,)
