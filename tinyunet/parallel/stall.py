"""Names the ranks that the others wait for.

A rank that stalls (its disk hangs, its node swaps, it is stopped) cannot report that; the ranks that wait for
it can. After each twentieth of the time limit a waiting rank sends the number of its wait to two ranks, the
first and the last. When one of these two has waited for the whole limit, it reads what has arrived: ranks
that sent nothing are missing, or have only just come.

Nothing is sent while all goes well. This works over any network that MPI works over, and from the main
thread alone, between two tests of the wait. The last rank prints only if the first is among the missing. If
both are missing, no rank is named.
"""

import platform
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BEATS = 20  # messages of a rank in the time limit
_MOST_NAMES = 8
# MPI looks for messages once in a call, and may look elsewhere first: the wait itself is another operation.
_PROBES = 100


class StallWatch:
    """Looks at every wait, and warns when it has taken ``seconds``, and again each time after as long.

    ``ranks`` is an ``mpi4py.MPI.Intracomm`` of all ranks, which nobody else uses.
    """

    def __init__(self, ranks: Any, seconds: float) -> None:
        self._ranks, self._beat_seconds = ranks, seconds / _BEATS
        self._nodes: list[str] = ranks.allgather(platform.node())
        self._listeners = {0, ranks.size - 1}
        self._number, self._beats = -1, 0
        self._sent: list[tuple[Any, NDArray[np.int64]]] = []

    def look(self, number: int, waited: float) -> None:
        """Send and warn if it is time, ``waited`` seconds after the start of a wait.

        Waits are numbered; they have the same number on every rank.
        """
        if number != self._number:
            self._number, self._beats = number, 0
        beats = int(waited / self._beat_seconds)
        if beats == self._beats:
            return
        whole = beats // _BEATS > self._beats // _BEATS
        self._beats = beats
        self._sent = [sent for sent in self._sent if not sent[0].Test()]
        for listener in self._listeners - {self._ranks.rank}:
            message = np.array([number])
            self._sent.append((self._ranks.Isend(message, listener), message))
        if whole and self._ranks.rank in self._listeners:
            self._warn(waited)

    def _warn(self, waited: float) -> None:
        """Name the ranks from which no number of this wait has come."""
        latest = self._received()
        # A rank that has all that it needs of an operation may be one wait further.
        missing = [rank for rank in range(self._ranks.size) if latest.get(rank, -1) < self._number - 1]
        if not missing or not (self._ranks.rank == 0 or 0 in missing):
            return
        names = [f"rank {rank} on {self._nodes[rank]}" for rank in missing[:_MOST_NAMES]]
        if len(missing) > _MOST_NAMES:
            names.append(f"{len(missing) - _MOST_NAMES} more")
        text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        verb, them = ("has", "it") if len(missing) == 1 else ("have", "them")
        others = f"{self._ranks.size - len(missing)} of {self._ranks.size}"
        seconds = f"{waited:.0f}" if waited >= 1 else f"{waited:.1g}"
        sentence = f"{text} {verb} not come for {seconds} s; {others} ranks wait for {them}"
        print(f"tinyunet: {sentence}", file=sys.stderr, flush=True)

    def _received(self) -> dict[int, int]:
        """Return the latest number of each rank that has sent one since the last call."""
        from mpi4py import MPI

        latest, in_vain = {self._ranks.rank: self._number}, 0
        status, number = MPI.Status(), np.zeros(1, np.int64)
        while in_vain < _PROBES:
            if not self._ranks.Iprobe(status=status):
                in_vain += 1
                continue
            source, in_vain = status.Get_source(), 0
            self._ranks.Recv(number, source)
            latest[source] = max(latest.get(source, -1), int(number[0]))
        return latest
