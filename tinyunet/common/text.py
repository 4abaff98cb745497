"""Tables, names and figures as text."""

from collections.abc import Sequence


def count(number: int, word: str, words: str = "") -> str:
    """Return a number and a word, as ``1 rank`` or ``4 ranks``."""
    return f"{number} {word if number == 1 else words or word + 's'}"


def printable(text: str, keep: str = "") -> str:
    r"""Return a text of one line that does nothing but appear.

    A name of a file or a class may come from a stranger. Characters that move a terminal's cursor,
    begin a line or turn the direction of writing, and bytes that are no text, are written as ``repr``
    writes them: ``\x1b``.

    Parameters
    ----------
    text : str
    keep : str
        Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is no UTF-8
        code -= 0xDC00
    return chr(code).encode("unicode_escape").decode()


def in_bytes(*numbers: int) -> list[str]:
    """Return numbers of bytes as text, such as 1.3 MB, with as many digits as tell them apart."""
    largest = max(numbers)
    unit, size = "GB", 10**9
    for smaller, name in ((10**6, "MB"), (10**3, "kB")):
        if largest < size:
            unit, size = name, smaller
    for digits in range(1, 10):
        texts = [f"{number / size:.{digits}f} {unit}" for number in numbers]
        if len({*texts}) == len({*numbers}):
            break
    return texts


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as text, the first ``left`` columns flush left, the others right, a rule under the head."""
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
