"""The ranks of one node: they divide the work that all ranks would repeat, in memory that they share.

Ranks of a data-parallel training compute gradients of different patches. From the sum of the gradients on,
all ranks compute the same: the optimizer's step, and the new weights packed for the kernels. That is a
twentieth of a step of 64^3 on one core. So each rank of a node does one part of it, and all read the result::

    nothing shared   |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
                     |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
    local ranks      |forward, backward|sum|Adam 1|pack 1|forward, backward
                     |forward, backward|sum|Adam 2|pack 2|forward, backward

A barrier must separate writing and reading in both directions: ranks read only parts that all have
written, and write only parts that no rank still reads. The sum of the gradients is such a barrier. Between
the batches of one step there is no sum, so a barrier comes before weights are packed. A part has the same
bits, whichever rank computes it.

Here is the rank that shares with nobody; :mod:`tinyunet.parallel.shared_memory` has those that do.

Source: the division into parts is that of Rajbhandari et al., "ZeRO" (2020), section 5, there between nodes.
"""

from typing import Any

import numpy.typing as npt

_ITEMS = 16  # a part begins at a cache line of float32


class LocalRanks:
    """The ranks of one node that share memory: here, one that shares with nobody.

    Attributes
    ----------
    rank, size : int
        This process among them, and their number.
    alike : bool
        Whether at present all of them run batches of the same shape, and so the same program. If not,
        each rank packs all weights that its own program needs.
    """

    rank, size = 0, 1
    alike = True

    def zeros(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array, shape=(size,), of zeros that all local ranks share: all of them call this."""
        # Imported here: a command reads its options before it loads Numba, which kernels need.
        from kernels.base.buffers import empty

        array = empty((size,), dtype)
        array.fill(0)
        return array

    def zeros_of_each(self, size: int, dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """Return an array as of `zeros` for each local rank, in their order; every rank can read all."""
        length = -(-size // _ITEMS) * _ITEMS
        memory = self.zeros(length * self.size, dtype)
        return [memory[length * rank :][:size] for rank in range(self.size)]

    def is_same(self, text: str) -> bool:
        """Return whether all local ranks gave the same text: all of them call this."""
        return True

    def barrier(self) -> None:
        """Wait until all local ranks have called this."""

    def part(self, size: int) -> slice:
        """Return this rank's part of a flat array: as equal as whole cache lines allow."""
        lines = -(-size // _ITEMS)
        first, end = (lines * rank // self.size * _ITEMS for rank in (self.rank, self.rank + 1))
        return slice(first, min(end, size))


#: A rank that shares with nobody.
ALONE = LocalRanks()
