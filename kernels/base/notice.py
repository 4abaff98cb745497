"""A line on stderr when kernels are compiled: without it, a first call in a notebook seems to hang.

Numba keeps what it has compiled, so the line comes once a machine (and after a change of a source file). A
program that shows a bar of its own calls `silence`.
"""

import sys
import time

from numba.core import event

_AFTER = 1.0  # seconds of compiling before the line: a single kernel needs no words
_TEXT = "compiling kernels for this machine; later starts load them"


class _Notice(event.Listener):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seconds, self.started, self.depth = 0.0, 0.0, 0

    def on_start(self, _: object) -> None:
        self.depth += 1
        if self.depth == 1:
            self.started = time.perf_counter()
        if self.seconds > _AFTER:
            silence()
            print(_TEXT, file=sys.stderr, flush=True)

    def on_end(self, _: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.started


_notice = _Notice()


def listen() -> None:
    """Print the line when kernels are compiled for longer than a second in all."""
    event.register("numba:compile", _notice)


def silence() -> None:
    """Print nothing from now on."""
    _notice.seconds = float("-inf")
