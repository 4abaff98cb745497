"""Images to segment: files, BraTS cases, and folders of either."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.errors import DataError, UserError
from tinyunet.data import brats
from tinyunet.data.nifti import files_by_name, stem

# nnU-Net has a file for each channel: CASE_0000.nii.gz, CASE_0001.nii.gz, ...
_CHANNEL = re.compile(r"(.+)_(\d{4})")


class Image(NamedTuple):
    """An image: its name, its files, and the BraTS case folder that they come from, if they do."""

    name: str
    paths: tuple[Path, ...]
    folder: Path | None = None


def find_images(given: str | Path, modalities: Sequence[str], allow_missing: bool = False) -> list[Image]:
    """Return the images that a path stands for, sorted by name.

    ``given`` is a NIfTI file; the folder of a BraTS case, of which the files of ``modalities`` are taken; a
    folder of NIfTI files, one an image, or as nnU-Net names them, one a channel; or a folder with such BraTS
    cases in it, however deep. UserError or DataError, which name the path, if there is none, or a BraTS case
    has not these sequences; with ``allow_missing`` a sequence may lack its file.
    """
    path = Path(given)
    # The name of a link, not of the file behind it; for "." the folder's name.
    name = stem(Path(os.path.abspath(path)))
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file; expected a NIfTI file, a BraTS case or a folder of these")
        return [Image(name, (path,))]
    cases = list(brats.case_folders(path))
    if cases:
        named = [(name if case == path else Path(os.path.abspath(case)).name, case) for case in cases]
        return [
            Image(name, _sequences(case, modalities, allow_missing), case) for name, case in sorted(named)
        ]
    images = sorted(_of_files(path, len(modalities)))
    if not images:
        # The reason is that of the case which it may have been meant to be.
        brats.case_files(path)
        raise DataError(f"{path}: holds no image; expected .nii or .nii.gz files")
    return images


def _sequences(case: Path, modalities: Sequence[str], allow_missing: bool) -> tuple[Path, ...]:
    """Return the files of a case for these sequences; a sequence that is not asked for may be missing."""
    paths = brats.choose_files(brats.case_files(case, allow_missing=True)[0], modalities) or ()
    if not allow_missing and not all(path.exists() for path in paths):
        brats.case_files(case)  # says which are missing
    if not paths:
        reason = f"a BraTS case, but the model's sequences are {', '.join(modalities)}"
        raise UserError(f"{case}: {reason}; expected a NIfTI file with these")
    return paths


def _of_files(folder: Path, channels: int) -> Iterator[Image]:
    """Yield the images in a folder: a file each, or a file for each channel."""
    files = files_by_name(folder)
    parts: dict[str, dict[int, str]] = {}
    for name in files:
        if match := _CHANNEL.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = name
    for name, by_channel in parts.items():
        if sorted(by_channel) == list(range(channels)):
            yield Image(name, tuple(files.pop(by_channel[channel]) for channel in range(channels)))
    for name, file in files.items():
        yield Image(name, (file,))
