"""Recording what all ranks do, to the same clock."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tinyunet.common.errors import as_user_error
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.timeline import Timeline, file_of_rank


@contextlib.contextmanager
def recorded(path: Path | str | None, communicator: Communicator) -> Iterator[None]:
    """Record what every rank does in a block, and write it, also if the block ends by an error.

    What cannot be written is told on stderr, and no error: what the block did is worth more.

    Parameters
    ----------
    path : Path, str or None
        None records nothing; with several ranks see :func:`file_of_rank`.
    communicator : Communicator
        Its ranks have the same zero of time: when the last of them came here.
    """
    if path is None:
        yield
        return
    communicator.barrier()
    timeline = communicator.timeline = Timeline(communicator.rank, time.perf_counter())
    try:
        yield
    finally:
        communicator.timeline = None
        try:
            timeline.save(file_of_rank(path, communicator.rank, communicator.size))
        except OSError as error:
            print("the timeline is lost:", as_user_error(error), file=sys.stderr, flush=True)
