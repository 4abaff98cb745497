"""A sum over ranks that sends bfloat16: half the bytes of :mod:`~tinyunet.parallel.algorithms`.

bfloat16 has 8 bits of a number. If every partial sum were rounded to it, errors would grow with the number of
ranks. So each number is rounded twice and no more: each rank sums one part of the array in float32, in
order of the ranks::

    gradients > round > all to all > sum of my part > round > all gather > the sum

Each rank keeps its rounding errors, and adds them to the next array (error feedback).
"""

from typing import Any

import numpy as np

from kernels.ops import bfloat16
from tinyunet.parallel.algorithms import Array, Messages


class CompressedSum:
    """Sums an array again and again, and keeps the rounding errors for the next time."""

    def __init__(self, size: int, ranks: int) -> None:
        part = -(-size // ranks)
        # What this rank has still to send of its array, and of the part that it sums.
        self.residual = np.zeros(size, np.float32)
        self.residual_of_sum = np.zeros(part, np.float32)
        # Zeros after the array's end fill the last part.
        self._sent = np.zeros(part * ranks, np.uint16)
        self._received = np.empty((ranks, part), np.uint16)
        self._sum = np.empty(part, np.float32)
        self._sent_sum = np.empty(part, np.uint16)

    def __call__(self, ranks: Any, array: Array) -> Messages:
        """Replace an array by its sum, as :func:`tinyunet.parallel.algorithms.mpi` does."""
        bfloat16.encode(array, self.residual, self._sent[: array.size])
        yield [ranks.Ialltoall(self._sent, self._received)]
        bfloat16.decode_sum(self._received, self._sum)
        bfloat16.encode(self._sum, self.residual_of_sum, self._sent_sum)
        yield [ranks.Iallgather(self._sent_sum, self._received)]
        bfloat16.decode_sum(self._received.reshape(1, -1)[:, : array.size], array)
