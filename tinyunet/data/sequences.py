"""Names of MRI sequences, and which of a file's sequences a model takes.

The same sequence has many names: FLAIR is T2-FLAIR or t2f, T1 with contrast is t1ce, t1gd or t1c. Names are
compared by what they mean; a name that means no sequence of BraTS (ADC, CT) by its letters.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tinyunet.common.errors import UserError

_CONTRAST = "gd|gad|contrast|post"
_NO_CONTRAST = r"\b(non|no|pre|without|un)[- ]*(contrast|gad|gd|ce|enhanced)\w*"
# The first pattern that fits a name counts.
_PATTERNS = {
    "flair": r"flair|t2f\b",
    "t1ce": rf"t1.*({_CONTRAST}|ce)|t1c\b|({_CONTRAST}).*t1",
    "t1": r"t1",
    "t2": r"t2",
}


class Choice(NamedTuple):
    """Which sequences of a file with all of them a model takes: their numbers, of how many."""

    numbers: tuple[int, ...]
    of: int


def kind_of(name: str) -> str | None:
    """Return "flair", "t1", "t1ce" or "t2" for the name of a sequence; None if it tells none of them."""
    words = re.sub(_NO_CONTRAST, "", name.lower().replace("_", " "))
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, words)), None)


def choose(wanted: Sequence[str] | None, there: Sequence[str], where: str) -> tuple[int, ...]:
    """Return the number of each wanted sequence among those that are there: all of them if none is wanted.

    UserError, which begins with ``where`` the sequences are, if one is not there, is asked for twice, or its
    name fits two.
    """
    if wanted is None:
        return tuple(range(len(there)))
    numbers: list[int] = []
    for name in wanted:
        found = [n for n, other in enumerate(there) if other.lower() == name.lower()]
        found = found or [n for n, other in enumerate(there) if kind_of(name) == kind_of(other) is not None]
        if len(found) != 1 or found[0] in numbers:
            what = "not there" if not found else "not the name of one" if len(found) > 1 else "there already"
            expected = f"expected some of {', '.join(there)}, each once"
            raise UserError(f"--modalities: {name} is {what} among the sequences of {where}; {expected}")
        numbers += found
    return tuple(numbers)


def choice_of(chosen: Sequence[str], there: Sequence[str]) -> Choice | None:
    """Return which of a file's sequences were chosen, by their names; None if all are, in their order."""
    if list(chosen) == list(there) or not {*chosen} <= {*there}:
        return None
    return Choice(tuple(there.index(name) for name in chosen), len(there))
