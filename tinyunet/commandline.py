"""What the commands share: reading options, and leaving with one line when something is wrong.

Exit codes: 0 when all is done, 2 for what the user can put right, 130 after Ctrl-C, 143 after SIGTERM,
129 after SIGHUP, 1 for a fault of the program (with its traceback).
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from tinyunet.common import verbose
from tinyunet.common.errors import (
    ENDING,
    AgreedError,
    Interrupted,
    StoppedError,
    UserError,
    as_user_error,
    one_line,
)
from tinyunet.common.terminal import terminal_stream
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.parallel import sentinel
from tinyunet.parallel.communicator import Communicator, world

# Seconds among which the ranks' turns to speak are spread.
_TURNS = 2.0
# Seconds that a launcher may take to pass on what a rank has said: once told to abort, it ends at once.
_HEARD = 0.2


class _HelpShown(SystemExit):
    """Every rank leaves after ``--help``."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, to be shown by :func:`run` like any other."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the options; every rank reads the same ones."""
        raise AgreedError(f"{one_line(message).removeprefix('argument ')} (see --help)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave, once ``--help`` is printed."""
        raise _HelpShown(status)


def whole_number(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``least`` to ``most``, for ``type=`` of an option."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            expected = f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        if number > most:
            raise argparse.ArgumentTypeError(f"{text!r}; expected at most {most}")
        return number

    return read


def number(above: float, below: float = float("inf")) -> Callable[[str], float]:
    """Return a reader of numbers strictly between two bounds, for ``type=`` of an option."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = above
        if not above < value < below:
            expected = f"a number above {above:g}"
            expected += f" and below {below:g}" if below < float("inf") else ", and not infinite"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        return value

    return read


def add_execution(group: Any) -> None:
    """Give a parser, or a group of its options, those that say how a model runs."""
    group.add_argument(
        "--eager",
        action="store_true",
        help="run the model's operators one after the other, not the compiled graph: slower, for comparison",
    )
    group.add_argument(
        "--accuracy",
        choices=("fast", "strict"),
        default="fast",
        help="what convolutions of the compiled graph may lose: strict is no worse than direct "
        "convolution in float32, fast errs by up to 5e-5 of the largest result "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="choose the algorithms of convolutions by a model of their work alone, not by the clock: "
        "the same command then gives the same bits on another machine of this kind, too, with as many "
        "threads",
    )


def add_labels(group: Any, dest: str = "convention") -> None:
    """Give a parser, or a group of its options, the one that says what numbers in labels mean."""
    group.add_argument(
        "--labels",
        dest=dest,
        choices=CONVENTIONS,
        help="what the numbers in label files mean (default: what dataset.json says, or names of "
        "files and numbers, where they leave no doubt)",
    )


def size(numbers: list[int]) -> tuple[int, int, int]:
    """Return the size of a patch given as one number for all axes or one for each.

    Raises
    ------
    AgreedError
        If they are neither one nor three.
    """
    match numbers:
        case [side]:
            return side, side, side
        case [d, h, w]:
            return d, h, w
    raise AgreedError(f"--patch-size: {len(numbers)} numbers; expected 1 or 3 (see --help)")


def use_threads(asked: int | None, communicator: Communicator) -> int:
    """Let kernels use as many threads as asked for, or this rank's share of the cores.

    Raises
    ------
    UserError
        If they are more than there are cores, or than ``NUMBA_NUM_THREADS``.
    """
    machine = load_machine()
    check_threads(asked, machine.most_threads())
    threads = asked or min(communicator.threads(), machine.most_threads())
    machine.set_threads(threads)
    return threads


def load_machine() -> ModuleType:
    """Return :mod:`kernels.base.machine`, late: so a wrong option is told before Numba is loaded.

    Raises
    ------
    OSError
        If the environment has a variable that kernels cannot run with.
    """
    from kernels.base import environment, machine

    if machine.is_interpreted():
        raise environment.refusal("NUMBA_DISABLE_JIT", "0: most kernels run only compiled")
    return machine


def check_threads(asked: int | None, most: int) -> None:
    """Check that kernels can use as many threads as asked for.

    Raises
    ------
    UserError
        If they are more than ``most``.
    """
    if asked is not None and asked > most:
        raise UserError(f"--threads: {asked}; expected at most {most}, the cores here")


def run(program: str, main: Callable[[Communicator], None]) -> NoReturn:
    """Run a command on all ranks of this job, and exit with its code.

    Parameters
    ----------
    program : str
        Name that errors begin with.
    main : callable
        The command; it is given the ranks. An error that it raises on one rank only ends all.
    """
    sys.stdout, sys.stderr = terminal_stream(sys.stdout), terminal_stream(sys.stderr)
    communicator, signals = Communicator(), Signals()
    try:
        # MPI's start does not come back to Python: a signal ends the process meanwhile, and so the others.
        communicator = world()
        signals.begin()
        verbose.name_rank(communicator.rank, communicator.size)
        if communicator.rank > 0:
            # One rank speaks for all, also when the text is argparse's own, as that of --help.
            sys.stdout = terminal_stream(None)
        with watched_over(program, communicator):
            main(communicator)
    except KeyboardInterrupt as interrupt:
        signals.ignore()
        _interrupted(program, communicator, interrupt)
    except AgreedError as error:
        if isinstance(error, StoppedError):
            signals.ignore()
        if communicator.rank == 0:
            _say(f"{program}: {error}")
        sys.exit(error.code)
    except _HelpShown:
        raise
    except BaseException as error:
        if communicator.size == 1 and isinstance(error, SystemExit):
            raise
        signals.ignore()
        if signals.noted:  # raised where a library was called back, and made another error there
            _interrupted(program, communicator, signals.noted)
        _failed(program, communicator, error)
    finally:
        signals.end()
    sys.exit(0)


class Signals:
    """The signals of ``ENDING`` as exceptions, from `begin` to `end`; before, they end the process.

    Attributes
    ----------
    noted : KeyboardInterrupt or None
        What was raised last.
    """

    def __init__(self) -> None:
        self.noted: KeyboardInterrupt | None = None
        self._before = {
            number: signal.signal(number, signal.SIG_DFL)
            for number in ENDING
            if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
        }

    def begin(self) -> None:
        """Raise what comes from now on."""
        for number in self._before:
            signal.signal(number, self._raise)

    def ignore(self) -> None:
        """Let no other signal change the exit code: Python and MPI take a while to end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def end(self) -> None:
        """Leave all as it was, unless what comes is ignored by now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: object) -> NoReturn:
        self.noted = Interrupted(number)
        raise self.noted


@contextlib.contextmanager
def watched_over(program: str, communicator: Communicator) -> Iterator[None]:
    """Inside, a rank that is killed is named; who leaves the block ends of its own accord."""
    if communicator.size == 1:  # the shell says so
        yield
        return
    address, line = f"tinyunet-{communicator.node_token}", None
    try:
        if communicator.local_rank == 0:
            sentinel.start(address, program, communicator.local_size)
            line = sentinel.Line(address, communicator.rank)
        communicator.barrier()
        line = line or sentinel.Line(address, communicator.rank)
        yield
    finally:
        (line or sentinel.Line(address, communicator.rank)).leave()


def _failed(program: str, communicator: Communicator, error: BaseException) -> NoReturn:
    """End all ranks for what one of them has met, and perhaps others at the same time."""
    known = as_user_error(error)
    code = 1 if known is None else 2
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code & 0xFF or 1  # without this rank nothing is done
    try:
        if _has_turn(communicator):
            text = "".join(traceback.format_exception(error))
            failed = f"rank {communicator.rank} failed\n{text}"
            _say(f"{program}: {failed if known is None else one_line(str(known))}")
            _let_it_be_heard(communicator)
    finally:
        communicator.abort(code)


def _interrupted(program: str, communicator: Communicator, interrupt: KeyboardInterrupt) -> NoReturn:
    """Leave at once after a signal, without waiting for other ranks, which may be anywhere.

    No rank ends MPI in order, because that would be another wait for all.
    """
    number = interrupt.signal_number if isinstance(interrupt, Interrupted) else signal.SIGINT
    note = f"; {interrupt}" if str(interrupt) else ""
    if _has_turn(communicator):
        _say(f"{program}: {ENDING[number]}{note}")
        _let_it_be_heard(communicator)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    code = 128 + number
    if communicator.size > 1:  # or the launcher kills those who have no turn yet, and says so
        communicator.abort(code)
    os._exit(code)


def _has_turn(communicator: Communicator) -> bool:
    """Let lower ranks speak first, and tell whether one has: the launcher ends all as soon as one left.

    What many ranks meet at once, such as Ctrl-C, is then said by one of them.
    """
    time.sleep(_TURNS * communicator.rank / communicator.size)
    return communicator.is_first_to_speak()


def _let_it_be_heard(communicator: Communicator) -> None:
    """Give the launcher time, but not until the next rank's turn, which may have met the same."""
    if communicator.size > 1:
        time.sleep(min(_HEARD, _TURNS / communicator.size / 2))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more; the program ends all the same
        print(line, file=sys.stderr, flush=True)
