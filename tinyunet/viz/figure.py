"""How every picture is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text

from tinyunet.common.files import SIGNATURE, atomic
from tinyunet.common.terminal import printable

_WITH_METADATA = ("png", "svg", "pdf")


def write(figure: Figure, path: Path | str, **options: Any) -> None:
    """Write a figure atomically; without a ``format`` the ending of the name decides it.

    Names in it may hold what no font has: bytes that are no text, control characters.

    Parameters
    ----------
    options
        Of ``Figure.savefig``.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text(), keep="\n"))
    options.setdefault("format", Path(path).suffix.removeprefix(".") or None)
    # So that a later run knows that it may replace the picture.
    field = "Software" if options["format"] == "png" else "Creator"
    signs = options["format"] in _WITH_METADATA
    options.setdefault("metadata", {field: SIGNATURE} if signs else None)
    with atomic(path) as file:
        figure.savefig(file, **options)
