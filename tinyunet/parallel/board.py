"""A few numbers of each rank of a node, shown to all by way of memory that they share.

Synchronised batch norm asks 36 times a step for sums of a few hundred numbers. Every other rank waits for the
late one, so what counts is the time from when the last one has come to when all have the sum. It is far
longer where arrays of some MB are copied in between, as by kernels, than at once after the last sum (3 us),
likely because code has left the caches; here there is less of it. 2 ranks, with such copies in between::

    MPI.Iallreduce, tested until it is done   27 us
    MPI.Allreduce, which spins                16 us
    a board                                   10 us

A rank writes its numbers, and then how many times it has written. It reads when all have written so often::

    round 5     rank 0   write slots[1][0]   counts[0] = 5   wait until counts are 5, 5   read slots[1]
                rank 1   write slots[1][1]   counts[1] = 5   wait until counts are 5, 5   read slots[1]

A rank may be one round ahead of another that still reads, but not two: for that, all must have written in
between, and who writes has done with reading. So there are two sets of slots, in turn.
"""

import platform
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

#: Numbers that each rank can show at a time.
MOST = 4096
_LINE = 64  # bytes; each rank's count has a line of its own, which the others read all the time
# Where all processors see what one has written in the order in which it was written. (Intel's manual, volume
# 3, section 10.2.2.) Elsewhere a count might be seen before the numbers.
_IN_ORDER = platform.machine() in ("x86_64", "AMD64")


def nbytes(ranks: int) -> int:
    """Bytes of memory that a board needs; 0 where there can be none."""
    return ranks * (_LINE + 2 * MOST * 8) if _IN_ORDER else 0


class Board:
    """Memory of a node in which each rank writes where it alone writes, and reads all.

    Parameters
    ----------
    memory : ndarray of uint8
        `nbytes` zeros, of nobody else.
    rank, ranks : int
        This one among those of the node.
    wait : callable
        How to wait: :meth:`tinyunet.parallel.communicator.Communicator.wait`.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        rank: int,
        ranks: int,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        counts, slots = np.split(memory, [ranks * _LINE])
        self._counts = counts.view(np.int64).data[:: _LINE // 8]
        self._slots = slots.view(np.float64).reshape(2, ranks, MOST)
        self._rank, self._wait, self._round = rank, wait, 0

    def show(self, numbers: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        """Return the numbers of all ranks, each of which must call this.

        Parameters
        ----------
        numbers : ndarray, shape = (N,), float64
            ``MOST`` at most, and as many as the others show.
        name : str
            Of the wait, for the timeline.

        Returns
        -------
        ndarray, shape = (ranks, N), float64
            Not to be changed, and valid until the next call.
        """
        self._round += 1
        shown, slots = self._round, self._slots[self._round % 2, :, : numbers.size]
        slots[self._rank] = numbers
        self._counts[self._rank] = shown
        self._wait(lambda: min(self._counts) >= shown, name)
        return slots
