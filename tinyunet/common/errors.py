"""What the person at the keyboard can put right: one line on the screen and exit code 2.

Anything else that is raised is a fault of the program, and shows its traceback.
"""

import signal

from tinyunet.common.text import printable

#: Signals that ask the program to end, and what is said of each.
ENDING: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


class UserError(ValueError):
    """A file, an option or a machine is not as it must be; the message is one line that says so.

    Parameters
    ----------
    message : str
        May hold names as strangers gave them: see :func:`tinyunet.common.text.printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class AgreedError(UserError):
    """A :class:`UserError` that every rank raises at the same point, so each can simply leave."""

    #: What the program ends with.
    code = 2


class StoppedError(AgreedError):
    """The program was asked to end by a signal, and every rank has come to a good place for it.

    Parameters
    ----------
    message : str
        One line: what there is, and how to go on.
    signal_number : int
        One of ``ENDING``.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.code = 128 + signal_number


class Interrupted(KeyboardInterrupt):
    """One of the signals of ``ENDING``, as KeyboardInterrupt is SIGINT.

    Parameters
    ----------
    signal_number : int
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def as_user_error(error: BaseException) -> UserError | None:
    """Return ``error`` as a :class:`UserError` of one line, or None if it is a fault of the program.

    An ``OSError`` (no such file, disk full, no permission) is the user's to put right, and so is a
    lack of memory: both are told with what the system says.

    Parameters
    ----------
    error : BaseException
        Whatever was raised.

    Returns
    -------
    UserError or None
        An :class:`UserError` is returned as it is.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return UserError(f"{error.filename}: {reason}" if error.filename else one_line(reason))
    if isinstance(error, MemoryError):
        return UserError(f"out of memory: {one_line(str(error)) or 'no more to be had'}")
    return None


def said(error: BaseException) -> str:
    """Return what an exception says in one line, or its name if it says nothing."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks and runs of spaces made single spaces."""
    return " ".join(text.split())
