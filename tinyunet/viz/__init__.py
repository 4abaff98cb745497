"""Pictures of data, training and predictions, drawn with matplotlib and written as files."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from tinyunet.common.errors import as_user_error, one_line
from tinyunet.common.terminal import printable

#: Endings of names, each of which says what is written.
FORMATS = (".png", ".svg", ".pdf")


@contextlib.contextmanager
def attempt(what: object) -> Iterator[None]:
    """Draw ``what``, a file, in a block that also imports matplotlib; print an error as a line on stderr.

    A picture that fails must not lose the figures that it shows, nor change the command's exit code.
    """
    # Hide warnings that a font is missing (another is used) or lacks a letter of a name (a box is drawn).
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        known = as_user_error(error)
        reason = str(known or f"{type(error).__name__}: {one_line(str(error))}")
        told = f"tinyunet: could not draw {what}: {reason.removeprefix(f'{what}: ')}"
        print(printable(told), file=sys.stderr, flush=True)
    finally:
        logging.disable(logging.NOTSET)
