"""A sum over ranks of which only bfloat16 travels: half the bytes of :mod:`~tinyunet.parallel.algorithms`.

bfloat16 has 8 bits of a number. Were every sum on the way rounded to it, errors would grow with the
ranks; so each number is rounded twice and no more, and every sum is made in float32, in order of the
ranks, by the rank whose part of the array it is::

    gradients > round > all to all > sum of my part > round > all gather > the sum

What the roundings take is kept where it was taken, and added the next time (error feedback).
"""

from typing import Any

import numpy as np

from kernels.ops import bfloat16
from tinyunet.parallel.algorithms import Array, Messages


class CompressedSum:
    """The sum of an array that is summed again and again: it remembers what was rounded away.

    Parameters
    ----------
    size : int
        Items of the array.
    ranks : int

    Attributes
    ----------
    residual : float32 array, shape=(size,)
        What this rank has still to send.
    residual_of_sum : float32 array, shape=(part,)
        What this rank, having summed its part, has still to give to all.
    """

    def __init__(self, size: int, ranks: int) -> None:
        part = -(-size // ranks)
        self.residual = np.zeros(size, np.float32)
        self.residual_of_sum = np.zeros(part, np.float32)
        # Zeros behind the array's end fill the last part.
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
