"""How every picture is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinyunet.files import atomic


def write(figure: Figure, path: Path | str, **options: Any) -> None:
    """Write a figure atomically; without a ``format`` the ending of the name decides it.

    Parameters
    ----------
    options
        Of ``Figure.savefig``.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, **options)
