"""Tables and figures as text."""

from collections.abc import Sequence


def count(number: int, word: str, words: str = "") -> str:
    """Return a number and a word, as ``1 rank`` or ``4 ranks``."""
    return f"{number} {word if number == 1 else words or word + 's'}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as text, the first ``left`` columns flush left, the others right, a rule under the head."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])
