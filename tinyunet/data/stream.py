"""Reads the bytes of a file, plain or compressed, and never more than the caller asks for.

A compressed file of 6 MB can hold 6 GB of zeros. So a caller reads a header first, compares the size in the
header with the size of the file, and takes memory only then.
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, said
from tinyunet.common.files import open_file

_GZIP_MAGIC = b"\x1f\x8b"
_HIGHEST_RATIO = 1032  # deflate makes at most so many bytes of one (https://zlib.net/zlib_tech.html)
_PART = 2**20  # bytes that are decompressed at once


class Stream:
    """The bytes of a file from the first on; decompressed if the content (not the name) is gzip's.

    ``position`` is how many bytes have been read. ``least`` and ``most`` are bounds of how many there
    are: exact unless it is ``compressed``. A compressed file, unless padded, is shorter than twice its
    content and a MB.
    """

    def __init__(self, file: BufferedReader) -> None:
        self.compressed = file.peek(2).startswith(_GZIP_MAGIC)
        self.position = 0
        self._bytes = gzip.GzipFile(fileobj=file) if self.compressed else file
        self.least = self.most = file.seek(0, 2)
        file.seek(0)
        if self.compressed:
            self.least, self.most = (self.least - _PART) // 2, self.most * _HIGHEST_RATIO

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes, or fewer if the file ends or is cut off."""
        found = b""
        with contextlib.suppress(EOFError):
            while len(found) < count and (part := self._bytes.read1(count - len(found))):
                found += part
        self.position += len(found)
        return found

    def fill(self, array: NDArray[np.uint8]) -> int:
        """Read into an array of bytes; return how many bytes there were."""
        done, view = 0, array.data
        while done < len(view) and (count := self._bytes.readinto(view[done : done + _PART])):
            done += count
        self.position += done
        return done

    def skip(self, count: int) -> int:
        """Pass over ``count`` bytes; return how many bytes there were."""
        passed, part = 0, np.empty(min(count, _PART), np.uint8)
        while passed < count and (some := self.fill(part[: count - passed])):
            passed += some
        return passed


@contextlib.contextmanager
def open_stream(path: Path, expected: str) -> Iterator[Stream]:
    """Open a regular file; an error of the block becomes a DataError that says what was ``expected``."""
    try:
        with open_file(path) as file, memory_for(path):
            yield Stream(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected {expected}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; expected {expected}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = f"truncated or damaged ({said(error)})"
        raise DataError(f"{path}: {reason}; expected a whole .nii.gz file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({said(error)}); expected {expected}") from error


@contextlib.contextmanager
def memory_for(path: Path | str) -> Iterator[None]:
    """Name the file in a MemoryError of the block, as a DataError."""
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory ({said(error)})") from error
