"""Archives of arrays that end in a checksum: a stranger's archive is checked before it takes memory.

The file is what ``numpy.savez`` writes, with the SHA-256 of all its bytes as the archive's comment. Nothing
in it is compressed, so its arrays are no larger than the file, and no array holds pickled objects.
"""

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tinyunet.common.errors import said
from tinyunet.common.files import open_file

Arrays = dict[str, NDArray[Any]]

# Hexadecimal digits of a SHA-256, and bytes that are hashed at once.
_DIGITS, _PART = 64, 2**20


def seal(file: io.BufferedRandom) -> None:
    """Append to an archive the SHA-256 of all its bytes, as its comment."""
    file.seek(-2, io.SEEK_END)  # an archive ends in the length of its comment, which is still 0
    file.write(_DIGITS.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, io.SEEK_END)
    file.write(digest.encode())


def read(path: Path) -> Arrays:
    """Return the arrays of a sealed archive by their names.

    OSError if the file cannot be opened, MemoryError if it is too large. ValueError, of one line without the
    file's name, if it is cut off, changed anywhere, or not an archive as :func:`numpy.savez` writes it.
    """
    with open_file(path) as file:
        _check_seal(file)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_sizes(members, file.seek(0, io.SEEK_END))
                return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile and NumPy raise nearly any type
            raise ValueError(f"not a checkpoint ({said(error)})") from error


def _check_seal(file: io.BufferedReader) -> None:
    left = file.seek(0, io.SEEK_END) - _DIGITS
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (part := file.read(min(left, _PART))):
        digest.update(part)
        left -= len(part)
    if left or file.read() != digest.hexdigest().encode():
        raise ValueError("damaged, or not a checkpoint (its checksum is wrong)")


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    """Check that members are not compressed, differ in name, and together are no larger than the file."""
    for member in members:
        if not member.filename.endswith(".npy"):
            raise ValueError(f"{member.filename!a} is no array")
        plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        if not plain or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename!a} is compressed or encrypted")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two arrays have one name")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its arrays are larger than the file")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Read an array, after comparing its header with the number of bytes that follow."""
    name = ascii(member.filename)
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} is written in version {version}, not (1, 0)")
        shape, _, dtype = npy.read_array_header_1_0(file)
        held = member.file_size - file.tell()
        if dtype.kind not in "fiuU":
            raise ValueError(f"{name} is of type {dtype}, not of numbers or text")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{name} has {held} bytes, not those of shape {shape}")
        file.seek(0)
        return np.asarray(npy.read_array(file, allow_pickle=False))
