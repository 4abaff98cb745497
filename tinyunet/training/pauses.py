"""When a training pauses between two steps: to write a checkpoint, or because it was asked to end.

SIGTERM, SIGHUP and Ctrl-C only leave a note; between two steps the ranks tell each other of it, so that all
end after the same one, with a checkpoint. A second signal ends the program at once.
"""

import signal
import time
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import ENDING, Interrupted
from tinyunet.parallel.communicator import Communicator

# Unless told otherwise, a checkpoint within an epoch is written after so many seconds.
_SECONDS = 600.0
# mpirun and the terminal may both deliver the same Ctrl-C.
_SAME_SIGNAL = 1.0
_SIGNALS = tuple(ENDING)


class Pause(NamedTuple):
    """What all ranks have agreed on: to write a checkpoint; the signal to end for, or 0."""

    checkpoint: bool
    signal: int


class Pauses:
    """Collects this rank's reasons to pause, inside of its ``with`` block.

    Attributes
    ----------
    KINDS : int
        Of reasons: for a checkpoint, and each signal.

    Parameters
    ----------
    communicator : Communicator
    every : int or None
        Steps after which a checkpoint is written; None for every ten minutes.
    """

    KINDS = 1 + len(_SIGNALS)

    def __init__(self, communicator: Communicator, every: int | None) -> None:
        self._communicator, self._every = communicator, every
        self._last_checkpoint = time.monotonic()
        self._asked: dict[int, float] = {}

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._note)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # as in the background of a script
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to end."""
        return bool(self._asked)

    def reasons(self, step: int) -> NDArray[np.float64]:
        """Return this rank's reasons after a step: to be added up over the ranks.

        Parameters
        ----------
        step : int
            Steps of the optimizer since the beginning.

        Returns
        -------
        reasons : ndarray, shape=(KINDS,)
        """
        if self._every is not None:
            due = step % self._every == 0
        else:  # one clock for all
            due = self._communicator.rank == 0 and self._waited() > _SECONDS
        return np.array([due, *(number in self._asked for number in _SIGNALS)], np.float64)

    def decide(self, reasons: NDArray[np.float64]) -> Pause:
        """Return what the reasons of all ranks, added up, come to."""
        if reasons[0]:
            self._last_checkpoint = time.monotonic()
        asked = [number for number, count in zip(_SIGNALS, reasons[1:], strict=True) if count]
        return Pause(bool(reasons[0]), max(asked, default=0))

    def agree(self) -> Pause:
        """Ask all ranks whether any was asked to end, where there is nothing else to add up."""
        reasons = self.reasons(0)
        reasons[0] = 0
        self._communicator.allreduce_sum(reasons)
        return self.decide(reasons)

    def _waited(self) -> float:
        return time.monotonic() - self._last_checkpoint

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - min(self._asked.values(), default=now) > _SAME_SIGNAL:
            before = self._before[number]
            # It keeps in mind what it raises: a library may make another error of it.
            if callable(before):
                before(number, frame)
            raise Interrupted(number)
        self._asked.setdefault(number, now)
