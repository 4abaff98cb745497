"""Functions that the commands share: they read options, and end with one line when something is wrong.

Exit codes: 0 when all is done, 2 for errors that the user can put right, 130 after Ctrl-C, 143 after SIGTERM,
129 after SIGHUP, 1 for a fault of the program (with its traceback).
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from tinyunet.common import errors, verbose
from tinyunet.common.errors import ENDING, AgreedError, Interrupted, StoppedError, UserError, one_line
from tinyunet.common.terminal import terminal_stream
from tinyunet.parallel import sentinel
from tinyunet.parallel.communicator import Communicator, world

_TURNS = 2.0  # seconds among which the ranks' turns to print are spread
_HEARD = 0.2  # seconds that a launcher may need to pass on a message: after an abort it passes on nothing


class _HelpShown(SystemExit):
    """Every rank leaves after ``--help``."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors, and :func:`run` prints them like any other."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise an AgreedError about the options; every rank reads the same ones."""
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
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least {least}")
        if number > most:
            raise argparse.ArgumentTypeError(f"{text!r}; expected at most {most}")
        return number

    return read


def number(above: float, below: float = float("inf"), or_equal: bool = False) -> Callable[[str], float]:
    """Return a reader of numbers between two bounds for ``type=`` of an option; the lower may be included."""
    expected = f"a number of at least {above:g}" if or_equal else f"a number above {above:g}"
    expected += f" and below {below:g}" if below < float("inf") else ", and not infinite"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (above < value < below or (or_equal and value == above)):
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        return value

    return read


def add_threads(group: Any) -> None:
    """Give a parser, or a group of its options, the option for :func:`use_threads`."""
    text = "threads of each rank (default: the cores of the node, divided among its ranks)"
    group.add_argument("--threads", type=whole_number(1), metavar="N", help=text)


def use_threads(asked: int | None, communicator: Communicator) -> None:
    """Let kernels use as many threads as asked for, or this rank's share of the cores.

    UserError if there are fewer cores, or ``NUMBA_NUM_THREADS`` is less.
    """
    machine = load_machine()
    check_threads(asked, machine.most_threads())
    machine.set_threads(asked or min(communicator.threads(), machine.most_threads()))


def load_machine() -> ModuleType:
    """Return :mod:`kernels.base.machine`, late: a wrong option is reported before Numba is loaded.

    OSError if the environment has a variable that kernels cannot run with.
    """
    from kernels.base import environment, machine, notice

    notice.silence()  # commands show bars of their own
    # What a model does not fuse: each rank would print it, in two lines that name a place in this program.
    warnings.filterwarnings("ignore", "compile: ")
    if machine.is_interpreted():
        raise environment.refusal("NUMBA_DISABLE_JIT", "0: most kernels run only compiled")
    return machine


def check_threads(asked: int | None, most: int) -> None:
    """Raise UserError if kernels cannot use as many threads as asked for."""
    if asked is not None and asked > most:
        raise UserError(f"--threads: {asked}; expected at most {most}, the cores here")


def run(program: str, main: Callable[[Communicator], None]) -> NoReturn:
    """Run a command on all ranks of this job, and exit with its code.

    ``main`` gets the ranks; an error that it raises on one rank only ends all. The name of the ``program``
    begins each error.
    """
    sys.stdout, sys.stderr = terminal_stream(sys.stdout), terminal_stream(sys.stderr)
    communicator, signals = Communicator(), Signals()
    try:
        # MPI's start does not come back to Python: meanwhile a signal ends the process, and so the others.
        communicator = world()
        signals.begin()
        verbose.name_rank(communicator.rank, communicator.size)
        if communicator.rank > 0:
            # One rank prints for all, also argparse's own text, such as --help.
            sys.stdout = terminal_stream(None)
        with watched_over(program, communicator):
            main(communicator)
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
        if not isinstance(error, KeyboardInterrupt) and signals.raised:
            error = signals.raised  # raised in a callback of a library, which made another error of it
        _end_all_ranks(program, communicator, error)
    finally:
        signals.end()
    sys.exit(0)


def handle_signals(handler: Any) -> dict[int, Any]:
    """Set the handler of each signal of ``ENDING``, unless nohup ignores it; return the handlers before."""
    handled = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def restore_signals(before: dict[int, Any]) -> None:
    """Undo :func:`handle_signals`."""
    for number, handler in before.items():
        signal.signal(number, handler)


class Signals:
    """The signals of ``ENDING`` as exceptions, from `begin` to `end`; before, they end the process.

    The latest is ``raised``.
    """

    def __init__(self) -> None:
        self.raised: KeyboardInterrupt | None = None
        self._before = handle_signals(signal.SIG_DFL)

    def begin(self) -> None:
        """Raise the signals that come from now on."""
        handle_signals(self._raise)

    def ignore(self) -> None:
        """Ignore further signals, which could change the exit code while Python and MPI end."""
        handle_signals(signal.SIG_IGN)
        self._before = {}

    def end(self) -> None:
        """Restore the handlers, unless signals are ignored by now."""
        restore_signals(self._before)

    def _raise(self, number: int, frame: object) -> NoReturn:
        self.raised = Interrupted(number)
        raise self.raised


@contextlib.contextmanager
def watched_over(program: str, communicator: Communicator) -> Iterator[None]:
    """Name a rank that is killed inside this block; a rank that leaves the block ends by itself."""
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


def _end_all_ranks(program: str, communicator: Communicator, error: BaseException) -> NoReturn:
    """Print one line for an error or a signal, or a fault's traceback, and end all ranks wherever they are.

    Many ranks may fail at once. Ranks of lower number print first, within two seconds; a rank prints
    nothing after another rank of its node, and the first that has printed ends all others.
    """
    interrupted, known = isinstance(error, KeyboardInterrupt), errors.as_user_error(error)
    code = 1
    if interrupted:
        number = error.signal_number if isinstance(error, Interrupted) else signal.SIGINT
        text, code = ENDING[number] + (f"; {error}" if str(error) else ""), 128 + number
    elif known is not None:
        text, code = one_line(str(known)), 2
    else:
        text = f"rank {communicator.rank} failed\n{''.join(traceback.format_exception(error))}"
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            # sys.exit(0) of one rank is a failure, too: the others lack its part of the work.
            code = error.code & 0xFF or 1
    try:
        time.sleep(_TURNS * communicator.rank / communicator.size)
        if communicator.is_first_to_speak():
            _say(f"{program}: {text}")
            if communicator.size > 1:  # not until the next rank's turn
                time.sleep(min(_HEARD, _TURNS / communicator.size / 2))
    finally:
        if interrupted:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            if communicator.size == 1:
                os._exit(code)  # at once: threads may be waiting for a disk
        communicator.abort(code)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more; the program ends all the same
        print(line, file=sys.stderr, flush=True)
