"""Naming the ranks that the others wait for.

A rank that stalls (its disk hangs, its node swaps, it is stopped) cannot say so. Those that wait for
it can: a rank that has waited for a twentieth of the time after which to warn sends a message of one
number to two ranks, the first and the last, and again after each quarter. When one of those two has
waited for the whole time itself, it reads what has come: whoever has sent nothing is missing, or has
only just come.

Nothing is sent while all goes well. It works over any network that MPI works over, and from the main
thread alone, in between looking whether the wait is over. The last rank speaks only if the first is
among the missing. If both are, as when all nodes but some in the middle hang, nobody is named.
"""

import platform
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the missing ranks, so many are named.
_MOST_NAMES = 8
# A message is seen only after MPI has looked for it, which it does once in a call: the wait itself may be for
# something else.
_PROBES = 100


class StallWatch:
    """Told of every wait, warns of one that takes too long.

    Parameters
    ----------
    ranks : mpi4py.MPI.Intracomm
        Of all ranks; nobody else uses it.
    seconds : float
        After which to warn, and again each time after as long.
    """

    def __init__(self, ranks: Any, seconds: float) -> None:
        self._ranks, self._quarter = ranks, seconds / 4
        self._nodes: list[str] = ranks.allgather(platform.node())
        self._ears = {0, ranks.size - 1} - {ranks.rank}
        self._number, self._told = -1, -1
        self._on_the_way: list[tuple[Any, NDArray[np.int64]]] = []

    def look(self, number: int, waited: float) -> None:
        """Do what is due.

        Parameters
        ----------
        number : int
            Of this wait, counted the same on every rank.
        waited : float
            Seconds so far.
        """
        if number != self._number:
            self._number, self._told = number, -1
        if waited < self._quarter / 5:
            return
        quarters = int(waited / self._quarter)
        if quarters <= self._told:
            return
        whole = quarters // 4 > max(self._told, 0) // 4
        self._told = quarters
        self._tell()
        if whole and self._ranks.rank in (0, self._ranks.size - 1):
            self._warn(waited)

    def _tell(self) -> None:
        """Send the number of this wait to those who listen."""
        self._on_the_way = [sent for sent in self._on_the_way if not sent[0].Test()]
        for ear in self._ears:
            number = np.array([self._number])
            self._on_the_way.append((self._ranks.Isend(number, ear), number))

    def _warn(self, waited: float) -> None:
        """Name those who have not told that they wait here, or just behind."""
        heard = self._heard()
        everyone = range(self._ranks.size)
        # A rank may have all that it needs of an operation, and be one further.
        missing = [rank for rank in everyone if heard.get(rank, -1) < self._number - 1]
        if missing and (self._ranks.rank == 0 or 0 in missing):
            print(self._sentence(missing, waited), file=sys.stderr, flush=True)

    def _heard(self) -> dict[int, int]:
        """Return the latest number of each rank that has sent one since the last time."""
        from mpi4py import MPI

        heard = {self._ranks.rank: self._number}
        status, number = MPI.Status(), np.zeros(1, np.int64)
        in_vain = 0
        while in_vain < _PROBES:
            if self._ranks.Iprobe(status=status):
                source = status.Get_source()
                self._ranks.Recv(number, source)
                heard[source] = max(heard.get(source, -1), int(number[0]))
                in_vain = 0
            else:
                in_vain += 1
        return heard

    def _sentence(self, missing: list[int], waited: float) -> str:
        names = [f"rank {rank} on {self._nodes[rank]}" for rank in missing[:_MOST_NAMES]]
        if len(missing) > _MOST_NAMES:
            names.append(f"{len(missing) - _MOST_NAMES} more")
        verb, them = ("has", "it") if len(missing) == 1 else ("have", "them")
        others = self._ranks.size - len(missing)
        seconds = f"{waited:.0f}" if waited >= 1 else f"{waited:.1g}"
        return (
            f"tinyunet: {' and '.join([', '.join(names[:-1]), names[-1]][len(names) < 2 :])} {verb} "
            f"not come for {seconds} s; {others} of {self._ranks.size} ranks wait for {them}"
        )
