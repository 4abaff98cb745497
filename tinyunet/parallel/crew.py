"""The ranks of a node as a crew, and the memory they share.

Memory that has a name, in ``/dev/shm``, is often limited to 64 MB in a container, and is left behind by a
job that is killed. So rank 0 of the node takes memory without a name (``memfd_create``), which Linux
frees with the last process that has it; the others open it by way of ``/proc``.
"""

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet.common.errors import UserError
from tinyunet.common.terminal import in_bytes
from tinyunet.engine.together import Crew
from tinyunet.parallel import board
from tinyunet.parallel.board import Board

_NOTHING = np.zeros(0)
_MARK = 16  # random bytes behind the memory proper, by which a rank knows that it is the same


class NodeCrew(Crew):
    """All ranks of a node; or one of them by itself, where they cannot share memory.

    Parameters
    ----------
    node : mpi4py.MPI.Intracomm
        The ranks; nobody else uses it.
    wait : callable
        How to wait for what has been started: :meth:`tinyunet.parallel.communicator.Communicator.wait`.

    Attributes
    ----------
    board : Board or None
        To show each other a few numbers; None where that would be of no use, or must not be trusted.
    """

    def __init__(self, node: Any, wait: Callable[[Callable[[], bool], str], None]) -> None:
        self._node, self._wait = node, wait
        self.rank, self.size = node.rank, node.size
        self.board = self._make_board()

    def _make_board(self) -> Board | None:
        nbytes = board.nbytes(self.size)
        if self.size == 1 or not nbytes:
            return None
        return Board(self.zeros(nbytes, np.uint8), self.rank, self.size, self._wait)

    def zeros(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of zeros that all of them see: each must ask, in the same order.

        Raises
        ------
        UserError
            The system has no such memory; on all of them.
        """
        if self.size == 1:
            return super().zeros(size, dtype)
        nbytes = size * np.dtype(dtype).itemsize
        memory = shared_memory(self._node, nbytes)
        if memory is None:
            wanted = in_bytes(nbytes)[0]
            raise UserError(f"no memory of {wanted} for the ranks of a node to share")
        return memory.view(dtype)

    def is_same(self, text: str) -> bool:
        """Return whether all of them gave the same text: each must ask."""
        return len(set(self._node.allgather(text))) == 1

    def wait(self) -> None:
        """Wait until all of them are here."""
        if self.board:
            self.board.show(_NOTHING, "wait for the node")
        else:
            self._wait(self._node.Ibarrier().Test, "wait for the node")


def shared_memory(node: Any, nbytes: int) -> npt.NDArray[np.uint8] | None:
    """Return zeroed memory that all ranks of a node see; None, to all of them, if it cannot be had.

    Parameters
    ----------
    node : mpi4py.MPI.Intracomm
        Its ranks, each of which calls this.
    nbytes : int
    """
    mapped, descriptor, mark = None, -1, os.urandom(_MARK)
    with contextlib.suppress(OSError, AttributeError):  # there is no memfd_create but on Linux
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
    # In a container of its own, a rank may have found another process of this number.
    everyone = node.allreduce(mapped is not None and mapped[nbytes:] == mark) == node.size
    if descriptor >= 0:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8, nbytes) if everyone and mapped else None
