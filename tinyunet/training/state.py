"""What ranks have in common at the start of a training, and what each has of its own in its middle.

Parameters, optimizer and random generators are the same on every rank at all times. Within an epoch
two things need not be: batch norm's running statistics, if they are not synchronised, and what
compressed gradients have still to send. A checkpoint holds a row of these for each rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.nn import Module
from tinyunet.optim import Optimizer
from tinyunet.parallel.communicator import Communicator

Array = NDArray[Any]


def broadcast_state(model: Module, optimizer: Optimizer, communicator: Communicator) -> None:
    """Give every rank what rank 0 has: parameters, statistics, optimizer, random generators."""
    averages = [getattr(optimizer, name) for name in optimizer.averages]
    for array in (optimizer.flat_parameters, *averages, *model.buffers()):
        communicator.broadcast(array)
    optimizer.steps, optimizer.lr = communicator.broadcast_object((optimizer.steps, optimizer.lr))
    model.load_random_state(communicator.broadcast_object(model.random_state()))


def gather_rows(arrays: Sequence[Array], communicator: Communicator) -> Array:
    """Return at rank 0 the numbers of each rank, a row for each; one row if all are the same."""
    rows = communicator.gather(np.concatenate([array.ravel() for array in arrays]))
    if not rows:
        return np.empty((0, 0), np.float32)
    same = all(np.array_equal(row, rows[0]) for row in rows)
    return np.stack(rows[:1] if same else rows)


def take_row(rows: Array, arrays: Sequence[Array], communicator: Communicator) -> None:
    """Take over, in place, this rank's row; the mean of all if they are of another number of ranks."""
    if len(rows) == communicator.size:
        row = rows[communicator.rank]
    else:
        row = rows[0] if len(rows) == 1 else rows.mean(axis=0, dtype=np.float64)
    _spread(row, arrays)


def average(arrays: Sequence[Array], communicator: Communicator) -> None:
    """Give each rank, in place, the mean of all ranks' numbers."""
    flat = np.concatenate([array.ravel() for array in arrays])
    communicator.allreduce_mean(flat)
    _spread(flat, arrays)


@contextmanager
def unchanged(arrays: Sequence[Array]) -> Iterator[None]:
    """Give arrays, after the block, the numbers that they had before."""
    before = np.concatenate([array.ravel() for array in arrays])
    yield
    _spread(before, arrays)


def _spread(row: Array, arrays: Sequence[Array]) -> None:
    ends = np.cumsum([array.size for array in arrays])
    for array, part in zip(arrays, np.split(row, ends[:-1]), strict=True):
        array[...] = part.reshape(array.shape)
