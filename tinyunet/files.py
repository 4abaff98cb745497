"""Writing files so that a reader sees the old one or the whole new one, never a half."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path | str, previous: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` when the block ends well.

    The temporary file lies in the same folder (a rename does not cross file systems) and keeps the
    ending of the name, which some libraries read. After an error nothing of it is left. It is on
    the disk before it gets its name: after a power cut, too, the name leads to a whole file.

    Parameters
    ----------
    path : Path or str
        The file to make or replace; where it is a link, what that leads to. Its folder must exist.
    previous : Path, optional
        Another name in that folder, which the file replaced gets. At each moment at least one of
        the two names leads to a whole file.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    OSError
        As writing and renaming do; ``filename`` is then ``path``, not the temporary name.
    """
    named, path = path, Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a rename would replace it
            raise OSError(errno.EINVAL, "not a regular file")
        yield temporary
        _to_disk(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        # A disk that is full raises without a name, and a temporary name would help nobody.
        raise OSError(error.errno, error.strerror or str(error), str(named)) from error
    finally:
        # Where nothing can be removed, the error that says so would hide the first one.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return the name beside a file that it has until it is whole."""
    return path.with_name(f".{os.getpid()}-{path.name}")


def _to_disk(path: Path) -> None:
    """Wait until the disk holds what has been written to a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def try_writing(path: Path | str) -> None:
    """Raise what would be raised if a file was made or replaced here; nothing of it is left.

    Parameters
    ----------
    path : Path or str
        Where a file is to be written later, after work that should not be in vain.

    Raises
    ------
    OSError
        With ``path`` as its ``filename``.
    """
    real = Path(os.path.realpath(path))
    try:
        if real.exists() and not real.is_file():
            number = errno.EISDIR if real.is_dir() else errno.EINVAL
            raise OSError(number, os.strerror(number))
        temporary = _temporary(real)
        temporary.write_bytes(b"")
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def can_be_written(path: Path | str) -> bool:
    """Whether a file can be made or replaced here: see `try_writing`."""
    try:
        try_writing(path)
    except OSError:
        return False
    return True


def write_json(path: Path | str, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically.

    Parameters
    ----------
    path : Path or str
        The file to make or replace.
    content : Any
        What ``json`` can write; NaN and infinities are refused, because JSON has none.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with atomic(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        # A file name that is not UTF-8 may be in it.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
