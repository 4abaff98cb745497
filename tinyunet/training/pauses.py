"""Pauses between two steps: to write a checkpoint, or to end.

A signal (SIGTERM, SIGHUP, Ctrl-C) is only recorded. Between two steps the ranks sum their records,
so that all end after the same step, with a checkpoint. A second signal ends the program at once.
"""

import time
from types import FrameType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tinyunet.commandline import handle_signals, restore_signals
from tinyunet.common.errors import ENDING, Interrupted
from tinyunet.parallel.communicator import Communicator

_SECONDS = 600.0  # between two checkpoints within an epoch, by default
_SAME_SIGNAL = 1.0  # seconds in which mpirun and the terminal may both deliver the same Ctrl-C
_SIGNALS = tuple(ENDING)


class Pause(NamedTuple):
    """The decision of all ranks: whether to write a checkpoint; the signal to end for, or 0."""

    checkpoint: bool
    signal: int


class Pauses:
    """Records this rank's reasons to pause, inside its ``with`` block.

    A checkpoint is due after each ``every`` steps, or after each ten minutes if ``every`` is None.
    """

    KINDS = 1 + len(_SIGNALS)  # of reasons: a checkpoint, and each signal

    def __init__(self, communicator: Communicator, every: int | None) -> None:
        self._communicator, self._every = communicator, every
        self._last_checkpoint = time.monotonic()
        self._asked: dict[int, float] = {}

    def __enter__(self) -> Self:
        self._before = handle_signals(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        restore_signals(self._before)

    @property
    def asked(self) -> bool:
        """Whether a signal has asked this rank to end."""
        return bool(self._asked)

    def reasons(self, step: int) -> NDArray[np.float64]:
        """Return this rank's reasons after a step of the optimizer, shape=(KINDS,): ranks sum them."""
        if self._every is not None:
            due = step % self._every == 0
        else:  # one clock for all
            due = self._communicator.rank == 0 and time.monotonic() - self._last_checkpoint > _SECONDS
        return np.array([due, *(number in self._asked for number in _SIGNALS)], np.float64)

    def decide(self, reasons: NDArray[np.float64]) -> Pause:
        """Return the decision from the summed reasons of all ranks."""
        if reasons[0]:
            self._last_checkpoint = time.monotonic()
        asked = [number for number, count in zip(_SIGNALS, reasons[1:], strict=True) if count]
        return Pause(bool(reasons[0]), max(asked, default=0))

    def agree(self) -> Pause:
        """Decide, on all ranks, whether to end, where there is nothing else to sum."""
        reasons = self.reasons(0)
        reasons[0] = 0
        self._communicator.allreduce_sum(reasons)
        return self.decide(reasons)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - min(self._asked.values(), default=now) > _SAME_SIGNAL:
            before = self._before[number]
            # The handler before keeps what it raises: a library may turn it into another error.
            if callable(before):
                before(number, frame)
            raise Interrupted(number)
        self._asked.setdefault(number, now)
