"""Streams on which whatever is printed appears as text, and does nothing else."""

import contextlib
import errno
import os
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any, TextIO, cast

from tinyunet.common.text import printable

# What our own lines and bars are made of.
_OURS = "\n\r\t"


class _Screen:
    """A stream that shows control characters as text, and may lose its terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _terminal_may_be_closed():
            self._stream.write(printable(text, keep=_OURS))
        return len(text)

    def flush(self) -> None:
        with _terminal_may_be_closed():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _terminal_may_be_closed() -> Iterator[None]:
    """Inside, what nobody can see any more is lost: a training still has a checkpoint to write."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def screen(stream: TextIO | None) -> TextIO:
    """Return a stream for people, to be ``sys.stdout`` or ``sys.stderr``.

    A name with an escape sequence would otherwise move the cursor, or write over other lines. A character
    that the terminal has not becomes a question mark.

    Parameters
    ----------
    stream : text stream or None
        What it was; None where the shell has closed it (``>&-``), and then what is printed is lost.
    """
    if isinstance(stream, _Screen):
        return cast(TextIO, stream)
    if stream is None:
        stream = open(os.devnull, "w")  # noqa: SIM115 - stays open to the end
    if isinstance(stream, TextIOWrapper):  # not one that a test has put in its place
        stream.reconfigure(errors="replace")
    return cast(TextIO, _Screen(stream))


def nowhere() -> TextIO:
    """Return a stream on which whatever is printed is lost."""
    return screen(None)
