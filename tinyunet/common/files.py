"""Reads files of strangers with limits; writes files that appear whole and replace only files of ours.

Functions that write take these parameters:

path : Path or str
    The file to make or replace. Its folder must exist.
follow_links : bool
    True for a name that the user has given: a link stays, and the file that it leads to is replaced. False:
    the link itself is replaced, because a link in someone else's folder may lead anywhere.

They raise ``OSError`` with ``path`` as its ``filename``, never a temporary name.
"""

import contextlib
import csv
import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from tinyunet.common.errors import UserError

#: No JSON file of a data set or a cache is longer, in bytes: 100,000 cases take 15 MB.
LONGEST_JSON = 2**26
#: Our JSON files, pictures and pages hold this text.
SIGNATURE = "written by tinyunet"
#: Message for a file of someone else's.
NOT_OURS = "is there already, and this program did not write it; expected another name"
#: How a CSV file of scores begins, which has no place for a signature.
TABLE_HEAD = "case,group,name,dice,"
_BEGINNINGS = (b"{", b"\x89PNG", b"<?xml", b"%PDF", b"<!DOCTYPE html")  # of JSON, pictures, pages


def open_file(path: Path | str) -> BufferedReader:
    """Open a regular file; OSError for a pipe, a device or a socket, which may send nothing or never end."""
    _refuse_special(os.stat(path).st_mode)  # first, because some devices act when they are opened
    # Another process may have put a pipe there since: this open does not wait for the pipe's other end.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    try:
        _refuse_special(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def _refuse_special(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def read_json(path: Path | str) -> Any:
    """Return the content of a JSON file in UTF-8, with or without a byte order mark.

    OSError if it cannot be read; ValueError, of one line without the file's name, if it is too long or not
    JSON.
    """
    with open_file(path) as file:
        content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ValueError(f"longer than {LONGEST_JSON} bytes")
    return parse_json(content.decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text; ValueError if it is not JSON, is nested too deeply, or holds NaN."""

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
    """Give a temporary file, open for writing and reading; it becomes ``path`` when the block ends well.

    The temporary file lies in the same folder, because a rename does not cross file systems, and nobody can
    foresee its name. It is on the disk before it is renamed: after a power cut, too, ``path`` is the old file
    or the whole new one. After an error nothing of it is left.

    ``previous`` is another name in that folder, which the replaced file gets. At each moment at least one of
    the two names leads to a whole file.
    """
    temporary = None
    with _named(path, follow_links) as target:
        try:
            with open(_temporary(target), "x+b") as file:  # "x": follows no link that lies there
                temporary = Path(file.name)
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and target.is_file() and not target.is_symlink():
                os.replace(target, previous)
            os.replace(temporary, target)
        finally:
            # Where nothing can be removed, a second error would hide the first one.
            with contextlib.suppress(OSError):
                if temporary is not None:
                    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path for a library that writes files by name; it becomes ``path`` as in `atomic`."""
    with _named(path, follow_links=True) as target:
        temporary = _temporary(target)
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path | str, follow_links: bool) -> Iterator[Path]:
    """Give the file to replace, unless it is special; name ``path`` in an OSError of the block."""
    target = Path(os.path.realpath(path) if follow_links else path)
    try:
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(target).st_mode
            if not stat.S_ISLNK(mode):
                _refuse_special(mode)
        yield target
    except OSError as error:
        # A full disk raises without a name, and a temporary name would help nobody.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _temporary(path: Path) -> Path:
    """Return a new name beside a file."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}{path.suffix}")


def try_writing(path: Path | str, follow_links: bool = False) -> None:
    """Raise the OSError that writing this file would raise, before hours of work end in it."""
    with _named(path, follow_links) as target:
        temporary = _temporary(target)
        temporary.touch(exist_ok=False)
        temporary.unlink(missing_ok=True)


def can_be_written(path: Path | str, follow_links: bool = False) -> bool:
    """Whether `try_writing` raises nothing."""
    try:
        try_writing(path, follow_links)
    except OSError:
        return False
    return True


def write_json(path: Path | str, content: Any, follow_links: bool = False) -> None:
    """Write ``content`` as indented JSON, atomically; ValueError for NaN and infinities, which JSON lacks."""
    with atomic(path, follow_links=follow_links) as file:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        # A file name in it may not be UTF-8.
        file.write((text + "\n").encode("utf-8", errors="backslashreplace"))


def write_csv(path: Path | str, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of a table, the head first, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic(path, follow_links=True) as file:
        file.write(text.getvalue().encode("utf-8", errors="backslashreplace"))


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content for a JSON file with our signature."""
    return {"program": SIGNATURE, **content}


def is_replaceable(path: Path | str) -> bool:
    """Whether there is no such file, or it is a table, or JSON, a picture or a page with our signature."""
    path = Path(path)
    if not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_JSON)
    except OSError:
        return False
    if content.startswith(TABLE_HEAD.encode()):
        return True
    return content.startswith(_BEGINNINGS) and SIGNATURE.encode() in content


def check_replaceable(option: str, path: Path | str) -> None:
    """Raise UserError, which begins with the option, if ``path`` is a file of someone else's."""
    if not is_replaceable(path):
        raise UserError(f"{option}: {path} {NOT_OURS}")
