"""Memory that the ranks of one node share (:mod:`tinyunet.local_ranks`).

It has no name: ``/dev/shm`` is often limited to 64 MB in a container, and a killed job leaves names
behind. Rank 0 of the node creates the memory by ``memfd_create``; the other ranks open it through
``/proc``; Linux frees it with the last process that maps it.
"""

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tinyunet.common.errors import UserError
from tinyunet.common.terminal import in_bytes
from tinyunet.local_ranks import LocalRanks

#: :meth:`tinyunet.parallel.communicator.Communicator.wait`
Wait: TypeAlias = Callable[[Callable[[], bool], str], None]

_MARK = 16  # random bytes after the memory: a rank that reads them has opened the right memory


class SharingRanks(LocalRanks):
    """The ranks of one node that share memory.

    Parameters
    ----------
    mpi : mpi4py.MPI.Intracomm or None
        The ranks; nobody else uses this communicator. None where they cannot share.
    wait : callable
    """

    def __init__(self, mpi: Any, wait: Wait) -> None:
        self._mpi, self._wait = mpi, wait
        if mpi is not None:
            self.rank, self.size = mpi.rank, mpi.size

    def zeros(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return zeros that all local ranks share; UserError, on all of them, without such memory."""
        if self.size == 1:
            return super().zeros(size, dtype)
        nbytes = size * np.dtype(dtype).itemsize
        memory = shared_memory(self._mpi, nbytes)
        if memory is None:
            raise UserError(f"no memory of {in_bytes(nbytes)[0]} for the ranks of a node to share")
        return memory.view(dtype)

    def is_same(self, text: str) -> bool:
        """Return whether all local ranks gave the same text: all of them call this."""
        return self._mpi is None or len(set(self._mpi.allgather(text))) == 1

    def barrier(self) -> None:
        """Wait until all local ranks have called this; on a node of one rank, too, the wait is counted."""
        is_done = self._mpi.Ibarrier().Test if self._mpi is not None else lambda: True
        self._wait(is_done, "barrier of the node")


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
