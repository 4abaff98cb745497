"""What the commands share: reading options, and leaving with one line when something is wrong.

Exit codes: 0 when all is done, 2 for what the user can put right, 130 after Ctrl-C, 1 for a fault
of the program (with its traceback).
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tinyunet.errors import AgreedError, as_user_error, one_line
from tinyunet.parallel.communicator import Communicator, world

_SPINS = "1000"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, to be shown by :func:`run` like any other."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the options; every rank reads the same ones."""
        raise AgreedError(f"{one_line(message).removeprefix('argument ')} (see --help)")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least ``least``, for ``type=`` of an option."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            expected = f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
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
            expected += f" and below {below:g}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        return value

    return read


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

    Between two kernels GNU OpenMP's threads spin for about a millisecond before they sleep. When
    other programs want the cores, too, a spinning thread is in the way of the one it waits for:
    a step of 2 threads on 2 cores that 6 processes shared took 2.5 to 16 s instead of 1.0 s. So
    they spin for some microseconds only, unless the environment says something about it.

    Raises
    ------
    AgreedError
        If they are more than there are cores.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    # Imported here, so that a wrong option is told at once.
    from kernels import machine

    if asked is not None and asked > machine.cores():
        raise AgreedError(f"--threads: {asked}; expected at most {machine.cores()}, the cores here")
    threads = asked or communicator.threads()
    machine.set_threads(threads)
    return threads


def run(program: str, main: Callable[[Communicator], None]) -> NoReturn:
    """Run a command on all ranks of this job, and exit with its code.

    Parameters
    ----------
    program : str
        Name that errors begin with.
    main : callable
        The command; it is given the ranks. An error that it raises on one rank only ends all.
    """
    communicator = Communicator()
    try:
        communicator = world()
        if communicator.rank > 0:
            # One rank speaks for all, also when the text is argparse's own, as that of --help.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open to the end
        main(communicator)
    except KeyboardInterrupt as interrupt:
        _interrupted(program, communicator, str(interrupt))
    except AgreedError as error:
        if communicator.rank == 0:
            _say(f"{program}: {error}")
        sys.exit(2)
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            traceback.print_exc()
            communicator.abort(1)
        _say(f"{program}: {one_line(str(known))}")
        communicator.abort(2)
    sys.exit(0)


def _interrupted(program: str, communicator: Communicator, note: str) -> NoReturn:
    """Leave after Ctrl-C, which every rank gets, without waiting for one in the middle of a step.

    The launcher ends all ranks as soon as one has left. Rank 0 has something to say, so the others
    give it time; no rank ends MPI in order, because that would be another wait for all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if communicator.rank > 0:
        time.sleep(5)
    else:
        _say(f"{program}: interrupted" + (f"; {note}" if note else ""))
    sys.stdout.flush()
    os._exit(130)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
