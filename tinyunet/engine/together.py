"""Processes that do a step's common work together, each a part of it, in memory that all of them see.

Ranks of a data-parallel training find gradients of different patches, and from their sum on all compute the
same: the optimizer's step, and the new weights packed for the kernels. That is a twentieth of a step of
64^3 on one core. Ranks of a node need do it only once between them::

    each by itself   |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
                     |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
    a crew           |forward, backward|sum|Adam 1|pack 1|forward, backward
                     |forward, backward|sum|Adam 2|pack 2|forward, backward

Whoever writes to memory of a crew must know that nobody reads it any more: after the sum of the gradients
nobody does; but between the batches of one step there is no sum, so before weights are packed all meet.
Whoever reads it waits first for those who write. What a part holds is the same bits, whoever computes it.

Source: the idea of parts is that of Rajbhandari et al., "ZeRO" (2020), section 5, there between nodes.
"""

from typing import Any

import numpy.typing as npt

_ITEMS = 16  # a part begins with a cache line of float32


class Crew:
    """A process by itself; :mod:`tinyunet.parallel.crew` has more of them.

    Attributes
    ----------
    rank, size : int
        This process among them.
    alike : bool
        Whether at present all of them run batches of the same shape, and so the same program. If not,
        each packs all weights that its own program needs.
    """

    rank, size = 0, 1
    alike = True

    def zeros(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of zeros that all of them see: each must ask, in the same order.

        Parameters
        ----------
        size : int
            Items, the same for all.
        dtype : numpy dtype
        """
        # Here, because a command reads its options before it loads Numba, which kernels do.
        from kernels.base.buffers import empty

        array = empty((size,), dtype)
        array.fill(0)
        return array

    def zeros_of_each(self, size: int, dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """Return such an array for each of them, in their order: all see all."""
        length = -(-size // _ITEMS) * _ITEMS
        memory = self.zeros(length * self.size, dtype)
        return [memory[length * rank :][:size] for rank in range(self.size)]

    def is_same(self, text: str) -> bool:
        """Return whether all of them gave the same text: each must ask."""
        return True

    def wait(self) -> None:
        """Wait until all of them are here."""

    def part(self, size: int) -> slice:
        """Return this process' part of a flat array: as equal as whole cache lines allow."""
        lines = -(-size // _ITEMS)
        first, end = (lines * rank // self.size * _ITEMS for rank in (self.rank, self.rank + 1))
        return slice(first, min(end, size))


#: Who shares with nobody.
ALONE = Crew()
