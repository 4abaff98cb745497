"""Errors that the user can correct: one line on the terminal and exit code 2.

Any other exception is a fault of the program, and shows its traceback.
"""

import signal

from tinyunet.common.terminal import printable

#: Signals that ask the program to end, and the word for each.
ENDING: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


class UserError(ValueError):
    """A file, an option or a machine is wrong; the message is one line that says what is expected.

    The message may hold names as strangers gave them: control characters are made visible.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DataError(UserError):
    """The user's data cannot be used; the message names the file."""


class AgreedError(UserError):
    """A :class:`UserError` that every rank raises at the same point, so each rank can simply leave."""

    #: Exit code of the program.
    code = 2


class StoppedError(AgreedError):
    """A signal (one of ``ENDING``) asked the program to end, and every rank has stopped at a safe point."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.code = 128 + signal_number


class Interrupted(KeyboardInterrupt):
    """A signal of ``ENDING`` has come; KeyboardInterrupt alone would mean SIGINT."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def as_user_error(error: BaseException) -> UserError | None:
    """Return ``error`` as a :class:`UserError` of one line, or None if it is a fault of the program.

    A :class:`UserError` comes back as it is. ``OSError`` (no such file, disk full, no permission) and a lack
    of memory are errors that the user can correct; the line holds the system's message.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(f"{error.filename}: {said(error)}" if error.filename else said(error))
    if isinstance(error, MemoryError):
        return UserError(f"out of memory: {one_line(str(error)) or 'no more to be had'}")
    return None


def said(error: BaseException) -> str:
    """Return in one line what the system or the exception says; if neither says anything, its name."""
    return one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks and runs of spaces made single spaces."""
    return " ".join(text.split())
