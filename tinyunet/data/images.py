"""Images to segment: files, BraTS cases, and folders of either; and which of their sequences a model gets.

Names choose the sequences: those of BraTS' files, or those in the ``dataset.json`` of the image's folder or
of the folder above. Without names an image has the order of the data that the model was trained on.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import DataError, UserError
from tinyunet.data import brats
from tinyunet.data.description import sequences_near
from tinyunet.data.nifti import files_by_name, read_header, stem
from tinyunet.data.sequences import Choice, choose, kind_of

# nnU-Net has a file for each channel: CASE_0000.nii.gz, CASE_0001.nii.gz, ...
_CHANNEL = re.compile(r"(.+)_(\d{4})")


class Image(NamedTuple):
    """An image: its name, its files, and the BraTS case that they are of, if they are."""

    name: str
    paths: tuple[Path, ...]
    case: brats.CaseFiles | None = None
    choice: Choice | None = None  # the sequences to take of one file, if not all in their order
    read_as: str = ""  # the line that says which sequences are taken; none if BraTS' names say it


class _Wanted(NamedTuple):
    """The sequences of a model, which of a folder's sequences they are, and who says so."""

    modalities: Sequence[str]
    choice: Choice | None
    file: Path | None = None  # the dataset.json that names the sequences
    there: Sequence[str] = ()  # the names in it

    def read_as(self, count: int) -> str:
        """Return the line that says which of an image's sequences are taken."""
        whole = self.choice and count == self.choice.of
        numbers = self.choice.numbers if self.choice and whole else range(len(self.modalities))
        taken = ", ".join(f"{n + 1} {name}" for n, name in zip(numbers, self.modalities, strict=True))
        of = f"of {count}, " if count > len(self.modalities) else ""
        return f"sequences read as: {taken} ({of}{self.file or 'order of the training data'})"


def find_images(
    given: str | Path, modalities: Sequence[str], allow_missing: bool = False, choice: Choice | None = None
) -> list[Image]:
    """Return the images that a path stands for, sorted by name.

    ``given`` is a NIfTI file; the folder of a BraTS case, of which the files of ``modalities`` are taken; a
    folder of NIfTI files, one an image, or as nnU-Net names them, one a channel; or a folder with such BraTS
    cases in it, however deep. Of other files than BraTS' the sequences are taken that ``dataset.json`` names
    so; without it, if an image has as many as ``choice`` is made of, those that are chosen. UserError or
    DataError, which name the path, if there is no image, or it has not these sequences; with
    ``allow_missing`` a sequence may lack its file.
    """
    path = Path(given)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file; expected a NIfTI file, a BraTS case or a folder of these")
        # The name of a link, not of the file behind it; for "." the folder's name.
        return [_of_file(stem(Path(os.path.abspath(path))), path, _wanted(path.parent, modalities, choice))]
    cases = brats.find_cases(path)
    if cases:
        return [
            Image(name, _sequences(files, modalities, allow_missing), files) for name, files in cases.items()
        ]
    images = sorted(_of_folder(path, _wanted(path, modalities, choice), allow_missing))
    if not images:
        # The reason is that of the case which it may have been meant to be.
        brats.case_files(path)
        raise DataError(f"{path}: holds no image; expected .nii or .nii.gz files")
    return images


def _sequences(case: brats.CaseFiles, modalities: Sequence[str], allow_missing: bool) -> tuple[Path, ...]:
    """Return the files of a case for these sequences; a sequence that is not asked for may be missing."""
    kinds = [kind for name in modalities if (kind := kind_of(name))]
    if len({*kinds}) < len(modalities):  # a name tells no sequence, or two names the same
        reason = f"a BraTS case, but the model's sequences are {', '.join(modalities)}"
        raise UserError(f"{case.where}: {reason}; expected a NIfTI file with these")
    return brats.complete(case, kinds, allow_missing)


def _wanted(folder: Path, modalities: Sequence[str], choice: Choice | None) -> _Wanted:
    """Return which sequences to take of the images in a folder."""
    near = sequences_near(folder)
    if near is None:
        return _Wanted(modalities, choice)
    file, there = near
    try:
        numbers = range(len(there)) if list(there) == list(modalities) else choose(modalities, there, "")
    except UserError as error:
        expected = f"expected {', '.join(modalities)}, each once, which the model was trained on"
        raise UserError(f"{file}: names {', '.join(there)}; {expected}") from error
    return _Wanted(modalities, Choice(tuple(numbers), len(there)), file, there)


def _of_file(name: str, path: Path, wanted: _Wanted) -> Image:
    """Return the image in a file with all sequences; UserError if its name says that it has another one."""
    count, choice = _count(path), wanted.choice
    if len(wanted.modalities) == count == 1:
        _check_one(path, wanted)
    if choice and (count != choice.of or choice.numbers == (*range(count),)):
        choice = None
    return Image(name, (path,), None, choice, wanted.read_as(count))


def _check_one(path: Path, wanted: _Wanted) -> None:
    """Raise UserError if a file of one sequence is named as another one than the model's only one."""
    (name,), kind = wanted.modalities, brats.named_sequence(path)
    expected = f"expected a file of {name}, which the model was trained on"
    if kind and kind_of(name) and kind != kind_of(name):
        raise UserError(f"{path}: named as {kind}; {expected}")
    match = _CHANNEL.fullmatch(stem(path))
    number = int(match[2]) if match and wanted.file else len(wanted.there)
    if wanted.choice and number < len(wanted.there) and number != wanted.choice.numbers[0]:
        raise UserError(f"{path}: {wanted.file} names channel {number} {wanted.there[number]}; {expected}")


def _of_folder(folder: Path, wanted: _Wanted, allow_missing: bool) -> Iterator[Image]:
    """Yield the images in a folder: a file each, or a file for each channel."""
    files = files_by_name(folder)
    parts: dict[str, dict[int, Path]] = {}
    for name, file in files.items():
        if match := _CHANNEL.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = file
    for name, channels in parts.items():
        numbers = _channels(folder / name, channels, wanted)
        if numbers is None:
            continue
        like = next(iter(channels.values()))
        ending = like.name.removeprefix(stem(like))
        paths = {n: channels.get(n, folder / f"{name}_{n:04}{ending}") for n in numbers}
        for modality, path in zip(wanted.modalities, paths.values(), strict=True):
            if not path.exists() and not allow_missing:
                raise DataError(f"{path}: no such file; expected {modality} there ({wanted.file})")
        for file in channels.values():
            del files[stem(file)]
        count = wanted.choice.of if wanted.file and wanted.choice else len(channels)
        yield Image(name, tuple(paths.values()), None, None, wanted.read_as(count))
    for name, file in files.items():
        yield _of_file(name, file, wanted)


def _channels(name: Path, channels: dict[int, Path], wanted: _Wanted) -> Sequence[int] | None:
    """Return the numbers of the channels to take of files NAME_0000, ...; None if each is an image.

    DataError if a model of one sequence has the choice.
    """
    there, choice, needed = sorted(channels), wanted.choice, len(wanted.modalities)
    if any(_count(file) != 1 for file in channels.values()):
        return None
    if choice and (there == [*range(choice.of)] or (wanted.file and there[-1] < choice.of)):
        return choice.numbers
    if there == [*range(needed)] and not wanted.file:
        return there
    if needed == 1 and there[0] == 0:
        unclear = f"{len(there)} channels, and nothing says which is {wanted.modalities[0]}"
        expected = "a dataset.json with channel_names, or, if each is an image, the files one by one"
        raise DataError(f"{name} has {unclear}; expected {expected}")
    return None


def _count(path: Path) -> int:
    """Return the number of sequences in a file: 1 if it cannot be read, which is told when its turn comes."""
    try:
        shape, _ = read_header(path)
    except DataError:
        return 1
    return shape[3] if len(shape) > 3 else 1
