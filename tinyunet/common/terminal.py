"""Text for people: names, numbers and tables, and streams on which no text moves the terminal's cursor."""

import errno
import os
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, TextIO, cast

_OURS = "\n\r\t"  # control characters of our own lines and progress bars


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with control characters written as ``repr`` writes them: ``\x1b``.

    The name of a file or a class may come from a stranger. Characters that move a terminal's cursor, begin
    a line or turn the direction of writing, and bytes that are not text, become visible. ``keep`` lists
    characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        code -= 0xDC00
    return chr(code).encode("unicode_escape").decode()


def count(number: int, word: str, words: str = "") -> str:
    """Return a number and a word, as ``1 rank`` or ``4 ranks``."""
    return f"{number} {word if number == 1 else words or word + 's'}"


def in_bytes(*numbers: int) -> list[str]:
    """Return numbers of bytes as text, such as 1.3 MB; different numbers get different texts."""
    largest = max(numbers)
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    size, unit = next((unit for unit in units if largest >= unit[0]), units[-1])
    for digits in range(1, 10):
        texts = [f"{number / size:.{digits}f} {unit}" for number in numbers]
        if len({*texts}) == len({*numbers}):
            break
    return texts


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table as text with a rule under its head: ``left`` columns flush left, the others right."""
    lines = [[printable(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


class _Terminal:
    """A stream that shows control characters as text, and may lose its terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, printable(text, keep=_OURS))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *text: str) -> None:
        """Ignore that nobody can see the output any more: a training still has a checkpoint to write."""
        try:
            action(*text)
        except OSError as error:
            if error.errno != errno.EIO:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal_stream(stream: TextIO | None) -> TextIO:
    """Return a stream to put in the place of ``sys.stdout`` or ``sys.stderr``: it shows any name as text.

    A character that the terminal lacks becomes a question mark. For None, which Python sets where the shell
    has closed a stream (``>&-``), the output is lost.
    """
    if isinstance(stream, _Terminal):
        return cast(TextIO, stream)
    if stream is None:
        stream = open(os.devnull, "w")  # noqa: SIM115 - stays open to the end
    if isinstance(stream, TextIOWrapper):  # not a stream that a test has put there
        stream.reconfigure(errors="replace")
    return cast(TextIO, _Terminal(stream))
