"""Ways to sum an array over ranks: MPI's own, a ring, recursive halving, and a sum in shared memory.

Each replaces an ``array`` (one axis, C-contiguous) by its sum over ``ranks``, an ``mpi4py.MPI.Intracomm``.
Two operations that are under way at once need two of these. Each algorithm is a generator: it starts
messages, yields them, and is resumed when they have arrived. So one function serves an allreduce that a rank
waits for and one that goes on while the rank computes (:class:`Operation`).

Cost for N ranks, n bytes, alpha seconds a message and beta seconds a byte::

    ring                 2 (N - 1) alpha    + 2 (N - 1) / N n beta
    recursive-halving    2 log2(N) alpha    + 2 (N - 1) / N n beta

Every rank has to send N - 1 of N parts for the sum and to receive N - 1 of N parts of the result, so no
algorithm moves fewer bytes than 2 (N - 1) / N n. A ring needs more messages, all between the same
neighbours. Halving needs few, but between distant ranks; where N is no power of two it needs two more, of n
bytes each. One rank sums each element and the others copy it: all hold the same bits.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009); Rabenseifner,
"Optimization of collective reduction operations" (2004); Graham and Shipman, "MPI support for multi-core
architectures: optimized shared memory collectives" (2008).

This module imports no kernels, so that a command can check its options before they are loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import AgreedError
from tinyunet.local_ranks import LocalRanks

Array: TypeAlias = NDArray[Any]
#: What an algorithm yields: requests of MPI; it goes on when all of them are done.
Messages: TypeAlias = Iterator[list[Any]]
Algorithm: TypeAlias = Callable[[Any, Array], Messages]


class Operation:
    """An algorithm that is under way."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._waiting: list[Any] | None = next(messages, None)

    def advance(self) -> bool:
        """Take every step that is possible now, and return whether all is done."""
        from mpi4py import MPI

        while self._waiting is not None and MPI.Request.Testall(self._waiting):
            self._waiting = next(self._messages, None)
        return self._waiting is None


def mpi(ranks: Any, array: Array) -> Messages:
    """Call MPI, which knows the network."""
    from mpi4py import MPI

    yield [ranks.Iallreduce(MPI.IN_PLACE, array, op=MPI.SUM)]


def ring(ranks: Any, array: Array) -> Messages:
    """Every rank sends to its right and receives from its left, 2 (N - 1) times.

    With three ranks and parts a, b, c; a digit for each rank whose numbers are in it::

        rank 0       rank 1       rank 2
        a0 b0 c0     a1 b1 c1     a2 b2 c2
        a0 b0 c02    a01 b1 c1    a2 b12 c2         each adds what its left sent
        a0 b012 c02  a01 b1 c012  a012 b12 c2       again: each has one part of the result
        then the finished parts go round N - 1 times.
    """
    rank, size = ranks.rank, ranks.size
    right, left = (rank + 1) % size, (rank - 1) % size
    parts = np.array_split(array, size)
    for step in range(size - 1):
        mine, theirs = parts[(rank - step) % size], parts[(rank - step - 1) % size]
        received = np.empty_like(theirs)
        yield [ranks.Irecv(received, left), ranks.Isend(mine, right)]
        theirs += received
    for step in range(size - 1):
        mine, theirs = parts[(rank + 1 - step) % size], parts[(rank - step) % size]
        yield [ranks.Irecv(theirs, left), ranks.Isend(mine, right)]


def recursive_halving(ranks: Any, array: Array) -> Messages:
    """Halve the part that this rank sums, then double it again.

    At distance 4, 2, 1 each rank exchanges with a partner: it sends the half that the partner will sum, and
    adds what it receives to the half that it keeps. After that a rank has 1 / N of the result; the same
    partners, in reverse order, send each other what they have.

    If N is no power of two, the first few ranks send their numbers to a neighbour, and receive the result.
    """
    rank, power = ranks.rank, 1 << (ranks.size.bit_length() - 1)
    extra = ranks.size - power
    if rank < 2 * extra:
        if rank % 2 == 0:
            yield [ranks.Isend(array, rank + 1)]
            yield [ranks.Irecv(array, rank + 1)]
            return
        received = np.empty_like(array)
        yield [ranks.Irecv(received, rank - 1)]
        array += received
    yield from _halve_and_double(ranks, array, power, extra)
    if rank < 2 * extra:
        yield [ranks.Isend(array, rank - 1)]


def _halve_and_double(ranks: Any, array: Array, power: int, extra: int) -> Messages:
    """Among a power of two of ranks: those with an odd rank below ``2 * extra``, and all above."""
    rank = ranks.rank
    place = rank // 2 if rank < 2 * extra else rank - extra
    exchanged: list[tuple[int, Array, Array]] = []
    kept, distance = array, power // 2
    while distance:
        partner = place ^ distance
        partner = 2 * partner + 1 if partner < extra else partner + extra
        halves = kept[: kept.size // 2], kept[kept.size // 2 :]
        kept, given = halves if not place & distance else halves[::-1]
        received = np.empty_like(kept)
        yield [ranks.Irecv(received, partner), ranks.Isend(given, partner)]
        kept += received
        exchanged.append((partner, kept, given))
        distance //= 2
    for partner, kept, given in reversed(exchanged):
        yield [ranks.Irecv(given, partner), ranks.Isend(kept, partner)]


def shared_sum(node: Any, peers: Any, local: LocalRanks, arrays: Sequence[Array]) -> Messages:
    """Sum arrays in memory that the ranks of a node share: on the node no number travels.

    Each rank adds its part of all arrays, and copies the sum into all of them; only between nodes there are
    messages, from each rank to the ranks of its number on other nodes. Two ranks, parts a and b::

        array of rank 0    a0 b0             a01 b0      rank 0       a01 b01
        array of rank 1    a1 b1             a1  b01     rank 1       a01 b01
                        barrier   each adds its part   and copies it    barrier

    MPI moves more: each rank copies what the other has, adds, and has its sum copied. That makes a step of
    two ranks 4 % longer (64 x 64 x 48, 22.6 MB).

    ``node`` are the ranks of this node, ``peers`` the ranks of the same local number on all nodes. Each local
    rank has one of the ``arrays``, of one shape, in shared memory, and calls this when its own is complete.
    """
    yield [node.Ibarrier()]
    part = local.part(arrays[0].size)
    total, *others = (array[part] for array in arrays)
    for other in others:
        total += other
    if peers.size > 1:
        yield from mpi(peers, total)
    for other in others:
        other[:] = total
    yield [node.Ibarrier()]


#: By their name in the option ``--allreduce``.
ALGORITHMS: dict[str, Algorithm] = {"mpi": mpi, "ring": ring, "recursive-halving": recursive_halving}
COMPRESSIONS = ("none", "bf16")
#: With fewer patches a rank than this, batch norm's statistics are synchronised by default.
FEW_PATCHES = 4


class Exchange(NamedTuple):
    """A user's choices of how ranks exchange gradients and statistics."""

    bucket_mb: float = 4.0  # MB of gradients in a bucket, at most
    allreduce: str = "mpi"  # one of ALGORITHMS; "mpi" adds in memory that ranks share, if there is any
    compression: str = "none"  # send float32, or "bf16": bfloat16 with error feedback
    synchronize: bool = False  # whether batch norm takes the statistics over all ranks' patches

    def check(self) -> None:
        """Raise AgreedError if an algorithm is chosen beside compression, which has its own."""
        if self.compression != "none" and self.allreduce != "mpi":
            both = f"{self.allreduce} together with --compression {self.compression}"
            expected = "expected one of the two"
            raise AgreedError(f"--allreduce: {both}, which has an algorithm of its own; {expected}")
