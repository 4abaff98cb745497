"""The ranks of a job: their exchanges, and how a rank waits for the others.

A rank is one process of an MPI job. Without MPI the same program runs as one rank, on which every operation
has the result that it has among one rank.

How a rank waits
    MPI spins. With more ranks than cores, a waiting rank takes the core from a rank that computes. So each
    operation starts without blocking; :meth:`Communicator.wait` tests it 50 times and gives the core away in
    between, and then tests it between sleeps of 20 us growing to 1 ms. Measured on 2 cores, 22.6 MB a step;
    4 ranks of which one computes 400 ms and three 200 ms, so 500 ms at best::

        blocking Allreduce          779 ms a step
        test, give the core away    818 ms
        test, sleep 0.5 ms          626 ms
        this module                 609 ms

    If every rank has a core of its own, the first 2 ms are without sleep, and no sleep is longer than
    0.1 ms: Linux lets a rank sleep 60 us longer than it asked for, and the other ranks then wait for this
    rank in turn. With synchronised batch norm, 36 sums a step, that cost 8 ms of 157 (2 ranks, 64^3).
    Between the tests Python sees Ctrl-C.

Errors
    If one rank has an error in a :meth:`Communicator.together` block, all ranks raise it at the end of the
    block: all leave, one rank prints the message, and no rank waits for another that has left.
    :meth:`Communicator.abort` is for errors elsewhere.
"""

import contextlib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import AgreedError, UserError, as_user_error, one_line
from tinyunet.local_ranks import LocalRanks
from tinyunet.parallel.shared_memory import SharingRanks, shared_memory
from tinyunet.parallel.stall import StallWatch
from tinyunet.parallel.timeline import WAITS, Timeline, file_of_rank

T = TypeVar("T")

# What mpirun, mpiexec or srun sets in each process that it starts: MPICH and Intel MPI, Open MPI, PMIx.
_LAUNCHERS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
# The number of processes started; srun sets the last one also where it does not support this MPI.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_EAGER_TESTS = 50
_EAGER_SECONDS = 2e-3  # without sleep, where each rank has a core of its own
# Windows has no such call, but a sleep of 0 s; on Linux that sleep would take 60 us or more.
_give_core_away = getattr(os, "sched_yield", lambda: time.sleep(0))
_SHORTEST_SLEEP = 20e-6
# With more ranks than cores, and with a core for each rank: a large message of TCP needs many tests.
_LONGEST_SLEEP, _LONGEST_SLEEP_ALONE = 1e-3, 1e-4
_NO_QUOTA = 1 << 20  # more cores than there are


class Communicator:
    """A group of ranks that call the same operations in the same order.

    ``mpi`` is an ``mpi4py.MPI.Intracomm``; without it, this process is alone.
    """

    def __init__(self, mpi: Any = None) -> None:
        self._mpi = mpi
        #: This process among all ranks, and their number; then the same among the ranks of this node.
        self.rank, self.size = (int(mpi.rank), int(mpi.size)) if mpi else (0, 1)
        self.local_rank, self.local_size = 0, 1
        #: The ranks of this node; this rank alone where they cannot share memory.
        self.local: LocalRanks = LocalRanks()
        #: A text that the ranks of this node share with no other rank.
        self.node_token = f"{os.getpid()}-{time.time_ns()}"
        #: Records every wait.
        self.timeline: Timeline | None = None
        self._sharing = 1  # ranks that share this one's cores
        self._quota: float = _NO_QUOTA  # cores' worth of time, of all ranks on this node
        self._stalls: StallWatch | None = None
        self._waits = 0
        self._levels: tuple[Any, Any] | None = None
        self._spoken: Any = bytearray(1)
        if self.size > 1:
            self._find_node()

    def _find_node(self) -> None:
        """Find the ranks of this node, and how many of them share this process' cores."""
        from mpi4py import MPI

        node = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        mine = _affinity()
        # A launcher may bind each rank to cores of its own; only ranks with equal sets share cores.
        self._sharing = sum(other == mine for other in node.allgather(mine))
        self.node_token = node.bcast(self.node_token)
        shared = shared_memory(node, 1)
        if shared is not None:
            self._spoken = shared
        shares = shared is not None and node.size > 1
        self.local = SharingRanks(node if shares else None, self.wait)
        if set(self._mpi.allgather(self.local.size)) == {self.local.size} and shares:
            self._levels = node, self._mpi.Split(node.rank)
        if node.rank == 0:
            _unname_shared_memory()

    def is_first_to_speak(self) -> bool:
        """Return whether no rank of this node has called this before, to within microseconds."""
        spoken, self._spoken[0] = self._spoken[0], 1
        return not spoken

    def threads(self) -> int:
        """Return this rank's threads: its cores divided by the ranks that share them, at least 1."""
        # Imported here: a command reads its options before it loads Numba, which kernels need.
        from kernels.base.limits import cpu_quota

        self._quota = min(cpu_quota(), _NO_QUOTA)
        of_quota = math.ceil(self._quota) // self.local_size  # the container's, for all ranks of the node
        return max(1, min(len(_affinity()) // self._sharing, of_quota))

    def warn_of_stalls(self, seconds: float) -> None:
        """From now on name, on the terminal, each rank that the others have waited for this long."""
        if self.size > 1:
            self._stalls = StallWatch(self.duplicates(1)[0], seconds)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Name no rank inside this block: one rank is known to take long."""
        stalls, self._stalls = self._stalls, None
        try:
            yield
        finally:
            self._stalls = stalls

    @contextlib.contextmanager
    def recorded(self, path: Path | str | None) -> Iterator[None]:
        """Record the kernels and waits of every rank in a block, and write a file, also if the block raises.

        With several ranks :func:`file_of_rank` changes ``path``; None records nothing. A file that cannot be
        written is a line on stderr, no error: the block's work is worth more.
        """
        if path is None:
            yield
            return
        self.barrier()  # all ranks have the same zero of time: when the last of them came here
        timeline = self.timeline = Timeline(self.rank, time.perf_counter())
        try:
            yield
        finally:
            self.timeline = None
            try:
                timeline.save(file_of_rank(path, self.rank, self.size))
            except OSError as error:
                print("the timeline is lost:", as_user_error(error), file=sys.stderr, flush=True)

    def duplicates(self, count: int) -> list[Any]:
        """Return MPI communicators of the same ranks; messages of one never mix with those of another."""
        return [self._mpi.Dup() for _ in range(count)] if self.size > 1 else [None] * count

    def levels(self, count: int) -> list[tuple[Any, Any]]:
        """Return pairs of MPI communicators: this rank's node, and the ranks of its number on all nodes.

        There are none if ranks do not share memory, or nodes have different numbers of ranks.
        """
        if not self._levels:
            return []
        node, peers = self._levels
        return [(node.Dup(), peers.Dup()) for _ in range(count)]

    def allreduce_sum(self, array: NDArray[Any]) -> None:
        """Replace an array, C-contiguous, by its sum over the ranks, in place: the same bits on each."""
        self._allreduce(array, "SUM", "allreduce")

    def _allreduce(self, array: NDArray[Any], operation: str, name: str) -> None:
        if self.size > 1:
            from mpi4py import MPI

            self.wait(self._mpi.Iallreduce(MPI.IN_PLACE, array, op=getattr(MPI, operation)).Test, name)

    def allreduce_mean(self, array: NDArray[np.floating[Any]]) -> None:
        """Replace an array of floats by its mean over the ranks; otherwise as :meth:`allreduce_sum`."""
        if self.size > 1:
            self.allreduce_sum(array)
            array *= array.dtype.type(1 / self.size)

    def broadcast(self, array: NDArray[Any]) -> None:
        """Replace an array by rank 0's array; otherwise as :meth:`allreduce_sum`."""
        if self.size > 1:
            self.wait(self._mpi.Ibcast(array, root=0).Test, "broadcast")

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return the object that rank ``root`` gave; the objects of other ranks are ignored."""
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

    def gather_in_turns(self, values: list[T]) -> list[T]:
        """Return at rank 0 a list whose part ``[rank::size]`` each rank gives; an empty list elsewhere."""
        missing = object()
        turns = itertools.zip_longest(*self.gather(values), fillvalue=missing)
        return [cast(T, value) for turn in turns for value in turn if value is not missing]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            self.wait(self._mpi.Ibarrier().Test, "barrier")

    def wait(self, is_done: Callable[[], bool], name: str = "wait") -> None:
        """Wait until an operation is done, and leave the cores to ranks that compute.

        ``is_done`` is such as ``Test`` of MPI's requests; ``name`` is for the timeline.
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
        """Run a block, on all ranks or on some, after which all ranks go on or all raise.

        The block must not communicate: a rank that has an error leaves it early. If on any rank the block
        raises an error that :func:`as_user_error` knows, every rank raises an AgreedError with the message of
        the lowest such rank.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = as_user_error(raised)
            if error is None:
                raise
        first = np.array([self.rank if error else self.size])
        self._allreduce(first, "MIN", "agree")
        if first[0] < self.size:
            raise AgreedError(self.broadcast_object(str(error), root=int(first[0])))

    def abort(self, code: int) -> NoReturn:
        """End every rank at once, wherever it is: for errors that :meth:`together` cannot catch."""
        if self.size > 1:
            self._mpi.Abort(code)
        raise SystemExit(code)


def world() -> Communicator:
    """Return all ranks of this job: one, if no MPI launcher started it.

    mpi4py is only imported under a launcher; elsewhere that would cost start-up time, and on some
    clusters MPI refuses to start on a login node. UserError if a launcher started several processes and
    mpi4py cannot be used, or finds only this one: each process would do all of the work.
    """
    started = max(int(os.environ.get(name) or 1) for name in _SIZES)
    if not any(name in os.environ for name in _LAUNCHERS) and started == 1:
        return Communicator()
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI, which then needs no locks
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = f"started by an MPI launcher, but mpi4py cannot be used ({one_line(str(error))})"
        raise UserError(f'{reason}; install it with: pip install "tinyunet[mpi]"') from error
    if MPI.COMM_WORLD.size == 1 < started:
        reason = f"the launcher started {started} processes, and each of them finds itself alone"
        version = one_line(MPI.Get_library_version())[:40]
        raise UserError(f"{reason}; expected a launcher of the MPI that mpi4py uses ({version})")
    return Communicator(MPI.COMM_WORLD)


def _unname_shared_memory() -> None:
    """Remove the name of the memory that MPICH shares on a node, once all ranks have opened it.

    A rank that ends by a signal leaves the name in /dev/shm, which in a container has room for some twenty.
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
