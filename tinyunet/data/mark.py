"""The mark in a label file of ours: that we wrote it, and what its numbers mean.

It is a comment in the NIfTI header, as JSON: the program, the name of each number, and the SHA-256 of
the voxels. A program that changes the labels may keep the comment; the voxels are then others.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray

from tinyunet.common.errors import one_line

_PROGRAM = "tinyunet.predict"
# NIfTI's code for a comment.
_COMMENT = 6


def extension(stored: NDArray[np.uint8], meaning: Mapping[int, str]) -> Any:
    """Return the mark of a file.

    Parameters
    ----------
    stored
        The voxels as they are stored.
    meaning
        Name of each number.
    """
    names = {str(number): name for number, name in meaning.items() if number}
    content = {"written by": _PROGRAM, "labels": names, "sha256": _digest(stored)}
    make: Any = Nifti1Extension  # nibabel has type hints in some places only
    return make(_COMMENT, json.dumps(content).encode())


def meaning(extensions: Iterable[Any]) -> dict[int, str] | None:
    """Return the name of each number but 0; None if a file has no mark.

    Parameters
    ----------
    extensions
        Of the file's header.
    """
    content = _content(extensions)
    return content and content[0]


def is_untouched(extensions: Iterable[Any], stored: NDArray[Any]) -> bool:
    """Whether a file has a mark, and its voxels are those that we wrote.

    Parameters
    ----------
    extensions
        Of the file's header.
    stored
        Its voxels as they are stored.
    """
    content = _content(extensions)
    return content is not None and content[1] == _digest(stored)


def _content(extensions: Iterable[Any]) -> tuple[dict[int, str], str] | None:
    for comment in extensions:
        try:
            content = json.loads(comment.get_content())
            if comment.get_code() == _COMMENT and content["written by"] == _PROGRAM:
                names = {int(number): one_line(name) for number, name in content["labels"].items()}
                return names, content["sha256"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue  # a comment of someone else's
    return None


def _digest(stored: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest()
