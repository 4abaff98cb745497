"""What the ranks of a run say to each other, and how they wait.

A rank is one process of an MPI job. The same program runs as one rank where there is no MPI: every
operation is then what it would be among one.

How a rank waits
    MPI spins. With more ranks than cores, a rank that waits takes the core from one that computes.
    So each operation is started without blocking, tested 50 times with the core given away in
    between, and from then on tested between sleeps of 20 us growing to 1 ms. Measured on 2 cores,
    22.6 MB a step; 4 ranks of which one computes 400 ms and three 200 ms, so 500 ms at best::

        blocking Allreduce          779 ms a step
        test, give the core away    818 ms
        test, sleep 0.5 ms          626 ms
        what is done here           609 ms

    If every rank has a core of its own, the first 2 ms are without sleep, and no sleep is longer than
    0.1 ms: Linux lets a rank sleep 60 us longer than it asked for, which the other ranks then wait for in
    turn. With synchronised batch norm, 36 sums a step, that was 8 ms of 157 (2 ranks, 64^3); now it is 1.
    Between the tests Python sees Ctrl-C.

    What is tested is MPI's request; or, for a few numbers of ranks that are all on one node, what they have
    written in memory that they share (`board`), which takes another 1 % off a step.

What happens on an error
    An error that one rank meets in a :meth:`Communicator.together` block is raised by all of them
    at the end of the block, so that all leave, the message is shown once, and nobody is left
    waiting. :meth:`Communicator.abort` is for what is met elsewhere.

What happens when nothing happens
    After :meth:`Communicator.warn_of_stalls`, ranks that are waited for too long are named.
"""

import contextlib
import math
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import AgreedError, UserError, as_user_error, one_line
from tinyunet.engine.together import ALONE, Crew
from tinyunet.parallel.board import MOST, Board
from tinyunet.parallel.crew import NodeCrew, shared_memory
from tinyunet.parallel.stall import StallWatch
from tinyunet.parallel.timeline import WAITS, Timeline

T = TypeVar("T")

# What mpirun, mpiexec or srun sets in each process it starts: MPICH and Intel MPI, Open MPI, PMIx.
_LAUNCHERS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
# How many processes they say they have started; under srun also where it speaks no language of MPI.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_EAGER_TESTS = 50
# Of tests between which nobody sleeps, where each rank has a core of its own.
_EAGER_SECONDS = 2e-3
# Where there is no such call (Windows), a sleep of nothing; elsewhere that would take 60 us or more.
_give_core_away = getattr(os, "sched_yield", lambda: time.sleep(0))
_SHORTEST_SLEEP = 20e-6
# Where ranks outnumber cores, and where they do not: a large message of TCP needs many tests.
_LONGEST_SLEEP, _LONGEST_SLEEP_ALONE = 1e-3, 1e-4
_NO_QUOTA = 1 << 20  # more cores than there are


class Communicator:
    """A group of ranks that does everything in the same order.

    Parameters
    ----------
    mpi : mpi4py.MPI.Intracomm, optional
        Who belongs to it; left out, this process is alone.

    Attributes
    ----------
    rank, size : int
        This process among all of them.
    local_rank, local_size : int
        This process among those on the same node.
    node_token : str
        What those share, and nobody else.
    crew : Crew
        Those, to share work and memory; this rank alone where they cannot share memory.
    timeline : Timeline or None
        Is told of every wait.
    """

    def __init__(self, mpi: Any = None) -> None:
        self._mpi = mpi
        self.rank: int = mpi.rank if mpi else 0
        self.size: int = mpi.size if mpi else 1
        self.local_rank, self.local_size, self._sharing = 0, 1, 1
        self._quota: float = _NO_QUOTA  # cores' worth of time, of all ranks on this node
        self.node_token = f"{os.getpid()}-{time.time_ns()}"
        self.timeline: Timeline | None = None
        self._stalls: StallWatch | None = None
        self._waits = 0
        self.crew: Crew = ALONE
        self._levels: tuple[Any, Any] | None = None
        self._board: Board | None = None  # of all ranks, if they are on one node
        self._spoken: mmap.mmap | bytearray = bytearray(1)
        if self.size > 1:
            self._look_around()

    def _look_around(self) -> None:
        """Find who is on this node, and how many of them share this process' cores."""
        from mpi4py import MPI

        node = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        mine = _affinity()
        # A launcher may bind each rank to cores of its own; only those of equal sets share.
        self._sharing = sum(other == mine for other in node.allgather(mine))
        self.node_token = node.bcast(self.node_token)
        self._spoken = _shared_byte(node)
        if node.rank == 0:
            _unname_shared_memory()
        can_share = shared_memory(node, 1) is not None
        sharing = node if can_share else node.Split(node.rank)
        self.crew = crew = NodeCrew(sharing, self.wait)
        sizes = set(self._mpi.allgather(sharing.size))
        if sizes == {sharing.size} and sharing.size > 1:
            self._levels = sharing, self._mpi.Split(sharing.rank)
        if sharing.size == self.size:
            self._board = crew.board

    def is_first_to_speak(self) -> bool:
        """Whether no rank of this node has asked before: of what many meet at once, one speaks.

        Two that ask within microseconds may both be the first.
        """
        spoken, self._spoken[0] = self._spoken[0], 1
        return not spoken

    def threads(self) -> int:
        """Threads for this rank: its cores divided among the ranks that share them, at least 1.

        A container's quota counts as one of all ranks on the node.
        """
        # Here, because a command reads its options before it loads Numba, which kernels do.
        from kernels.base.limits import cpu_quota

        self._quota = min(cpu_quota(), _NO_QUOTA)
        of_quota = math.ceil(self._quota) // self.local_size
        return max(1, min(len(_affinity()) // self._sharing, of_quota))

    def warn_of_stalls(self, seconds: float) -> None:
        """From now on name, on the screen, each rank that the others have waited for so long."""
        if self.size > 1:
            self._stalls = StallWatch(self.duplicates(1)[0], seconds)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, nobody is named: one rank is known to take long."""
        stalls, self._stalls = self._stalls, None
        try:
            yield
        finally:
            self._stalls = stalls

    def duplicates(self, count: int) -> list[Any]:
        """Return MPI communicators of the same ranks: what is sent in one meets nothing of another."""
        return [self._mpi.Dup() for _ in range(count)] if self.size > 1 else [None] * count

    def levels(self, count: int) -> list[tuple[Any, Any]]:
        """Return MPI communicators, two at a time: of the crew, and of this rank's peers in other crews.

        Peers have the same place. There are none, and nothing is returned, if crews are not all of one size,
        or each rank is by itself.
        """
        if not self._levels:
            return []
        crew, peers = self._levels
        return [(crew.Dup(), peers.Dup()) for _ in range(count)]

    def allreduce_sum(self, array: NDArray[Any]) -> None:
        """Replace an array, in place, by its sum over the ranks: the same bits on each.

        Parameters
        ----------
        array : ndarray, any shape, C-contiguous
            The same shape and dtype on every rank.
        """
        if self._board and array.dtype == np.float64 and array.size <= MOST:
            shown = self._board.show(array.reshape(-1), "allreduce")
            shown.sum(axis=0, out=array.reshape(-1))
        elif self.size > 1:
            from mpi4py import MPI

            self.wait(self._mpi.Iallreduce(MPI.IN_PLACE, array, op=MPI.SUM).Test, "allreduce")

    def allreduce_mean(self, array: NDArray[np.floating[Any]]) -> None:
        """Replace an array, in place, by its mean over the ranks: the same bits on each.

        Parameters
        ----------
        array : ndarray, any shape, float32 or float64, C-contiguous
            The same shape and dtype on every rank.
        """
        if self.size > 1:
            self.allreduce_sum(array)
            array *= array.dtype.type(1 / self.size)

    def broadcast(self, array: NDArray[Any]) -> None:
        """Replace an array, in place, by that of rank 0.

        Parameters
        ----------
        array : ndarray, any shape, C-contiguous
            The same shape and dtype on every rank.
        """
        if self.size > 1:
            self.wait(self._mpi.Ibcast(array, root=0).Test, "broadcast")

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return the object that rank ``root`` gave; what the others give is ignored."""
        if self.size == 1:
            return value
        self.barrier()
        received: T = self._mpi.bcast(value, root=root)
        return received

    def gather(self, value: T) -> list[T]:
        """Return at rank 0 the objects of all ranks, in their order; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        self.barrier()
        return self._mpi.gather(value, root=0) or []

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.wait(self._mpi.Ibarrier().Test, "barrier")

    def agree(self, error: UserError | None) -> None:
        """Raise the error of the lowest rank that has one, on every rank.

        Parameters
        ----------
        error : UserError or None
            What this rank has met.

        Raises
        ------
        AgreedError
            On every rank, with the same message, if any rank has an error.
        """
        first = np.array([float(self.rank if error else self.size)])
        if self._board:
            first = self._board.show(first, "agree").min(axis=0)
        elif self.size > 1:
            from mpi4py import MPI

            self.wait(self._mpi.Iallreduce(MPI.IN_PLACE, first, op=MPI.MIN).Test, "agree")
        if first[0] < self.size:
            raise AgreedError(self.broadcast_object(str(error), root=int(first[0])))

    def wait(self, is_done: Callable[[], bool], name: str = "wait") -> None:
        """Wait for what has been started, leaving the cores to those who compute.

        Parameters
        ----------
        is_done : callable
            Such as ``Test`` of MPI's requests.
        name : str
            For the timeline.
        """
        start, tests = time.perf_counter(), 0
        crowded = self._sharing > len(_affinity()) or self.local_size > self._quota
        longest = _LONGEST_SLEEP if crowded else _LONGEST_SLEEP_ALONE
        self._waits += 1
        while not is_done():
            tests += 1
            eager = not crowded and time.perf_counter() - start < _EAGER_SECONDS
            if eager or tests <= _EAGER_TESTS:
                _give_core_away()
            else:
                if self._stalls:
                    self._stalls.look(self._waits, time.perf_counter() - start)
                time.sleep(min(_SHORTEST_SLEEP * (tests - _EAGER_TESTS), longest))
        if self.timeline:
            self.timeline.span(WAITS, name, start, time.perf_counter())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block, on all ranks or on some, after which all go on or all raise.

        The block must not communicate: a rank that has an error leaves it early.

        Raises
        ------
        AgreedError
            On every rank, if the block of any raised what :func:`as_user_error` knows.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = as_user_error(raised)
            if error is None:
                raise
        self.agree(error)

    def abort(self, code: int) -> NoReturn:
        """End every rank, at once, wherever it is: for what :meth:`together` cannot catch."""
        if self.size > 1:
            self._mpi.Abort(code)
        raise SystemExit(code)


def world() -> Communicator:
    """Return all ranks of this job: one, if it was not started by an MPI launcher.

    mpi4py is only imported under a launcher; elsewhere that would cost start-up time, and on some
    clusters MPI refuses to start on a login node.

    Raises
    ------
    UserError
        If a launcher started several processes and mpi4py cannot be used, or finds only this one: each
        would do all of the work.
    """
    started = max(int(os.environ.get(name) or 1) for name in _SIZES)
    if not any(name in os.environ for name in _LAUNCHERS) and started == 1:
        return Communicator()
    try:
        import mpi4py

        # Only the main thread talks to MPI; no locks are needed.
        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by an MPI launcher, but mpi4py cannot be used ({one_line(str(error))}); "
            'install it with: pip install "tinyunet[mpi]"'
        ) from error
    if MPI.COMM_WORLD.size == 1 < started:
        raise UserError(
            f"the launcher started {started} processes, and each of them finds itself alone; expected "
            f"a launcher of the MPI that mpi4py uses ({one_line(MPI.Get_library_version())[:40]})"
        )
    return Communicator(MPI.COMM_WORLD)


def _shared_byte(node: Any) -> mmap.mmap | bytearray:
    """Return a byte, 0 so far, that the ranks of a node share; one of this rank's own if that fails.

    By way of a file: a single byte costs nothing on disk, and it works also where ranks have no
    :func:`shared_memory`.
    """
    name, shared = "", bytearray(1)  # type: str, mmap.mmap | bytearray
    with contextlib.suppress(OSError):
        if node.rank == 0:
            descriptor, name = tempfile.mkstemp(prefix="tinyunet-")
            os.write(descriptor, bytes(1))
            os.close(descriptor)
    name = node.bcast(name)
    with contextlib.suppress(OSError), open(name, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 1)
    node.Barrier()
    if node.rank == 0 and name:  # it stays where it is mapped
        Path(name).unlink(missing_ok=True)
    return shared


def _unname_shared_memory() -> None:
    """Remove the name of the memory that MPICH shares on a node, once all ranks have opened it.

    A rank that ends by a signal leaves it in /dev/shm, which in a container has room for some twenty.
    """
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for name in set(re.findall(r"/dev/shm/mpich_shm_\w+$", maps, re.MULTILINE)):
            Path(name).unlink()


def _affinity() -> frozenset[int]:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
