"""A training that meets its end in a given step: ``python stopped_training.py HOW RANK STEP ...``.

In step 0 none does. No pictures are drawn: they take a third of the time, and other tests look at them.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import tinyunet.commandline
from tinyunet import train
from tinyunet.training.loop import Trainer
from tinyunet.training.run import Run


def terminate_after(seconds: float) -> None:
    """Send SIGTERM to this process; a second one within a second may be the same."""
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGTERM)


ENDS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    "hung up": lambda: os.kill(os.getpid(), signal.SIGHUP),
    "terminated twice": lambda: [terminate_after(seconds) for seconds in (0.0, 1.2)],
    "fault": lambda: 1 / 0,
}


def main() -> None:
    """Train, and on the rank named, in the step named, do it."""
    how, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    unchanged = Trainer._step

    def ending_step(self: Trainer, batches: Any) -> Any:
        if self._communicator.rank == rank and self.optimizer.steps + 1 == step:
            ENDS[how]()
        return unchanged(self, batches)

    Trainer._step = ending_step  # type: ignore[method-assign]
    Run._draw = lambda *_: None  # type: ignore[method-assign]
    tinyunet.commandline.run("tinyunet.train", lambda ranks: train.main(ranks, sys.argv[4:]))


if __name__ == "__main__":
    main()
