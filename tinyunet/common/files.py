"""Reading files from anyone; writing files so that a reader sees the old one or the whole new one."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

#: No JSON file of a data set or a cache is longer, in bytes: that of 100,000 cases has 15 MB.
LONGEST_JSON = 2**26


def open_file(path: Path | str) -> BufferedReader:
    """Open a regular file for reading.

    A pipe, a device or a socket is refused: it may send nothing, or never end.

    Parameters
    ----------
    path : Path or str

    Returns
    -------
    file : BufferedReader

    Raises
    ------
    OSError
        If the file cannot be opened, or is not a regular one.
    """
    _refuse_special(os.stat(path).st_mode)  # first, because some devices act when they are opened
    # Another process may have put a pipe there since: this does not wait for its other end.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    try:
        _refuse_special(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def _refuse_special(mode: int) -> None:
    """Raise an error if the mode of a file is not that of a regular one."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def read_json(path: Path | str) -> Any:
    """Return the content of a JSON file.

    Parameters
    ----------
    path : Path or str
        In UTF-8, with or without a byte order mark.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is too long, or not JSON. The message is one line without the name of the file.
    """
    with open_file(path) as file:
        content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ValueError(f"longer than {LONGEST_JSON} bytes")
    return parse_json(content.decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deeply, or holds NaN, which JSON has not.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextlib.contextmanager
def atomic(
    path: Path | str, previous: Path | None = None, follow_links: bool = False
) -> Iterator[BufferedRandom]:
    """Give a file to write to; it becomes ``path`` when the block ends well.

    Until then it has a name in the same folder (a rename does not cross file systems) that nobody
    could foresee. After an error nothing of it is left. It is on the disk before it gets its name:
    after a power cut, too, the name leads to a whole file.

    Parameters
    ----------
    path : Path or str
        The file to make or replace. Its folder must exist.
    previous : Path, optional
        Another name in that folder, which the file replaced gets. At each moment at least one of
        the two names leads to a whole file.
    follow_links : bool
        Whether a link stays and what it leads to is replaced: for a name that the user has given.
        Left out, the link is replaced. In a folder of someone else's it may lead anywhere.

    Yields
    ------
    file : BufferedRandom
        Open for writing and reading; its ``name`` is temporary.

    Raises
    ------
    OSError
        As writing and renaming do; ``filename`` is then ``path``, not the temporary name.
    """
    target = Path(os.path.realpath(path) if follow_links else path)
    temporary = None
    try:
        _refuse_to_replace(target)
        with open(_temporary(target), "x+b") as file:  # "x": follows no link that lies there
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and target.is_file() and not target.is_symlink():
            os.replace(target, previous)
        os.replace(temporary, target)
    except OSError as error:
        # A disk that is full raises without a name, and a temporary name would help nobody.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        # Where nothing can be removed, the error that says so would hide the first one.
        with contextlib.suppress(OSError):
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _refuse_to_replace(target: Path) -> None:
    """Raise an error if what is there is neither a regular file nor a link."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(target).st_mode
        if not stat.S_ISLNK(mode):
            _refuse_special(mode)


def _temporary(path: Path) -> Path:
    """Return a new name beside a file that it has until it is whole."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}{path.suffix}")


def try_writing(path: Path | str, follow_links: bool = False) -> None:
    """Raise what would be raised if a file was made or replaced here; nothing of it is left.

    Parameters
    ----------
    path : Path or str
        Where a file is to be written later, after work that should not be in vain.
    follow_links : bool
        As for `atomic`.

    Raises
    ------
    OSError
        With ``path`` as its ``filename``.
    """
    target = Path(os.path.realpath(path) if follow_links else path)
    try:
        _refuse_to_replace(target)
        temporary = _temporary(target)
        temporary.touch(exist_ok=False)
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def can_be_written(path: Path | str, follow_links: bool = False) -> bool:
    """Whether a file can be made or replaced here: see `try_writing`."""
    try:
        try_writing(path, follow_links)
    except OSError:
        return False
    return True


def write_json(path: Path | str, content: Any, follow_links: bool = False) -> None:
    """Write ``content`` as indented JSON, atomically.

    Parameters
    ----------
    path : Path or str
        The file to make or replace.
    content : Any
        What ``json`` can write; NaN and infinities are refused, because JSON has none.
    follow_links : bool
        As for `atomic`.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with atomic(path, follow_links=follow_links) as file:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        # A file name that is not UTF-8 may be in it.
        file.write((text + "\n").encode("utf-8", errors="backslashreplace"))
