"""What the person at the keyboard can put right: one line on the screen and exit code 2.

Anything else that is raised is a fault of the program, and shows its traceback.
"""


class UserError(ValueError):
    """A file, an option or a machine is not as it must be; the message is one line that says so."""


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
        SIGINT or SIGTERM.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.code = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


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


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks and runs of spaces made single spaces."""
    return " ".join(text.split())
