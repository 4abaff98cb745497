"""The ranks of one node: they divide the work that all ranks would repeat, in memory that they share.

Ranks of a data-parallel training compute gradients of different patches. From the sum of the gradients on,
all ranks compute the same: the optimizer's step, and the new weights packed for the kernels. That is a
twentieth of a step of 64^3 on one core. So each rank of a node does one part of it, and all read the result::

    nothing shared   |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
                     |forward, backward|sum|Adam 1 2|pack 1 2|forward, backward
    local ranks      |forward, backward|sum|Adam 1|pack 1|forward, backward
                     |forward, backward|sum|Adam 2|pack 2|forward, backward

A barrier has to stand between writing and reading in both directions: ranks read only what all have finished
to write, and write only what no rank still reads. The sum of the gradients is such a barrier. The batches of
one step have no sum between them, so ranks meet before they pack weights. A part has the same bits, whichever
rank computes it.

The memory has no name: ``/dev/shm`` is often limited to 64 MB in a container, and a killed job leaves names
behind. Rank 0 of the node creates the memory by ``memfd_create``; the other ranks open it through
``/proc``; Linux frees it with the last process that maps it.

Source: the division into parts is that of Rajbhandari et al., "ZeRO" (2020), section 5, there between nodes.
"""

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

#: :meth:`tinyunet.parallel.communicator.Communicator.wait`
Wait: TypeAlias = Callable[[Callable[[], bool], str], None]

_ITEMS = 16  # a part begins at a cache line of float32
_MARK = 16  # random bytes after the memory: a rank that reads them has opened the right memory


class LocalRanks:
    """The ranks of one node that share memory; without arguments, a rank that shares with nobody.

    Parameters
    ----------
    mpi : mpi4py.MPI.Intracomm, optional
        The ranks; nobody else uses this communicator.
    wait : callable, optional

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
    _mpi: Any = None
    _wait: Wait | None = None

    def __init__(self, mpi: Any = None, wait: Wait | None = None) -> None:
        self._mpi, self._wait = mpi, wait
        if mpi is not None:
            self.rank, self.size = mpi.rank, mpi.size

    def zeros(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array, shape=(size,), of zeros that all local ranks share: all of them call this.

        Raises
        ------
        UserError
            On all of them: the system has no such memory.
        """
        if self.size == 1:
            # Imported here: a command reads its options before it loads Numba, which kernels need.
            from kernels.base.buffers import empty

            array = empty((size,), dtype)
            array.fill(0)
            return array
        nbytes = size * np.dtype(dtype).itemsize
        memory = shared_memory(self._mpi, nbytes)
        if memory is None:
            # Imported here: a program without ranks needs neither.
            from tinyunet.common.errors import UserError
            from tinyunet.common.terminal import in_bytes

            raise UserError(f"no memory of {in_bytes(nbytes)[0]} for the ranks of a node to share")
        return memory.view(dtype)

    def zeros_of_each(self, size: int, dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """Return such an array for each local rank, in their order; all of them see all."""
        length = -(-size // _ITEMS) * _ITEMS
        memory = self.zeros(length * self.size, dtype)
        return [memory[length * rank :][:size] for rank in range(self.size)]

    def is_same(self, text: str) -> bool:
        """Return whether all local ranks gave the same text: all of them call this."""
        return self._mpi is None or len(set(self._mpi.allgather(text))) == 1

    def barrier(self) -> None:
        """Wait until all local ranks have called this."""
        if self._wait is not None:  # also on a node of one rank: all ranks count their waits
            is_done = self._mpi.Ibarrier().Test if self._mpi is not None else lambda: True
            self._wait(is_done, "barrier of the node")

    def part(self, size: int) -> slice:
        """Return this rank's part of a flat array: as equal as whole cache lines allow."""
        lines = -(-size // _ITEMS)
        first, end = (lines * rank // self.size * _ITEMS for rank in (self.rank, self.rank + 1))
        return slice(first, min(end, size))


#: A rank that shares with nobody.
ALONE = LocalRanks()


def shared_memory(node: Any, nbytes: int) -> npt.NDArray[np.uint8] | None:
    """Return zeroed memory that all ranks of a node share; None, on all of them, if that fails.

    Parameters
    ----------
    node : mpi4py.MPI.Intracomm
        The ranks of a node, each of which calls this.
    nbytes : int
    """
    mapped, descriptor, mark = None, -1, os.urandom(_MARK)
    with contextlib.suppress(OSError, AttributeError):  # only Linux has memfd_create
        if node.rank == 0:
            descriptor = os.memfd_create("tinyunet")
            os.ftruncate(descriptor, nbytes + _MARK)
            mapped = mmap.mmap(descriptor, nbytes + _MARK)
            mapped[nbytes:] = mark
    path, mark = node.bcast((f"/proc/{os.getpid()}/fd/{descriptor}", mark))
    with contextlib.suppress(OSError, ValueError):
        if node.rank > 0:
            with open(path, "r+b") as file:
                mapped = mmap.mmap(file.fileno(), nbytes + _MARK)
    # A rank in a container of its own may have opened the memory of another process of the same number.
    everyone = node.allreduce(mapped is not None and mapped[nbytes:] == mark) == node.size
    if descriptor >= 0:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8, nbytes) if everyone and mapped else None
