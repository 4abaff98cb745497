"""Results that a command may replace: those that it has written, and nobody else's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyunet.common.errors import UserError

#: What our results say of themselves.
SIGNATURE = "written by tinyunet"
#: What is said of the files of others.
NOT_OURS = "is there already, and this program did not write it; expected another name"
# How JSON and pictures begin; the signature of ours is somewhere in them.
_BEGINNINGS = (b"{", b"\x89PNG", b"<?xml", b"%PDF")
_MOST_BYTES = 2**26


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be written as JSON, with our signature."""
    return {"program": SIGNATURE, **content}


def is_replaceable(path: Path | str) -> bool:
    """Whether there is no file, or a result of ours: JSON or a picture."""
    path = Path(path)
    if not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
    except OSError:
        return False
    return content.startswith(_BEGINNINGS) and SIGNATURE.encode() in content


def check_replaceable(option: str, path: Path | str) -> None:
    """Check that nobody else's file will be replaced.

    Parameters
    ----------
    option : str
        That named the file; begins the message.
    path : Path or str
        Where JSON or a picture will be written.

    Raises
    ------
    UserError
        If there is a file which is not a result of ours.
    """
    if not is_replaceable(path):
        raise UserError(f"{option}: {path} {NOT_OURS}")
