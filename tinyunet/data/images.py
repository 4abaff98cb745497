"""Images to segment: files, BraTS cases, and folders of either."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import DataError, UserError
from tinyunet.data import brats
from tinyunet.data.nifti import files_by_name, stem
from tinyunet.data.sequences import Choice, kind_of

# nnU-Net has a file for each channel: CASE_0000.nii.gz, CASE_0001.nii.gz, ...
_CHANNEL = re.compile(r"(.+)_(\d{4})")


class Image(NamedTuple):
    """An image: its name, its files, and the BraTS case that they are of, if they are."""

    name: str
    paths: tuple[Path, ...]
    case: brats.CaseFiles | None = None


def find_images(
    given: str | Path, modalities: Sequence[str], allow_missing: bool = False, choice: Choice | None = None
) -> list[Image]:
    """Return the images that a path stands for, sorted by name.

    ``given`` is a NIfTI file; the folder of a BraTS case, of which the files of ``modalities`` are taken; a
    folder of NIfTI files, one an image, or as nnU-Net names them, one a channel; or a folder with such BraTS
    cases in it, however deep. If an image has a file for each of the sequences that ``choice`` is made of,
    the chosen ones are taken. UserError or DataError, which name the path, if there is none, or a BraTS case
    has not these sequences; with ``allow_missing`` a sequence may lack its file.
    """
    path = Path(given)
    # The name of a link, not of the file behind it; for "." the folder's name.
    name = stem(Path(os.path.abspath(path)))
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file; expected a NIfTI file, a BraTS case or a folder of these")
        return [Image(name, (path,))]
    cases = brats.find_cases(path)
    if cases:
        return [
            Image(name, _sequences(files, modalities, allow_missing), files) for name, files in cases.items()
        ]
    images = sorted(_of_files(path, len(modalities), choice))
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


def _of_files(folder: Path, channels: int, choice: Choice | None) -> Iterator[Image]:
    """Yield the images in a folder: a file each, or a file for each channel."""
    files = files_by_name(folder)
    parts: dict[str, dict[int, str]] = {}
    for name in files:
        if match := _CHANNEL.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = name
    for name, by_channel in parts.items():
        there = sorted(by_channel)
        if there == list(range(channels)) or (choice and there == list(range(choice.of))):
            paths = [files.pop(by_channel[channel]) for channel in there]
            yield Image(
                name,
                tuple(paths[n] for n in choice.numbers)
                if choice and len(paths) == choice.of
                else tuple(paths),
            )
    for name, file in files.items():
        yield Image(name, (file,))
