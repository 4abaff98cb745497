"""The table ``allreduce``: MPI's algorithm and the two that are written out, by size.

No algorithm can let a rank send less than 2 (N - 1) / N of the array. The bound is that many times
what a plain exchange of the array takes: each rank sends it to its right, and gets one from its left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet.benchmarks import mpi
from tinyunet.common.terminal import aligned
from tinyunet.parallel.options import ALLREDUCES

# From a batch norm's sums to all gradients of the usual net.
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 22_600_000)


class Measured(NamedTuple):
    """Median seconds by algorithm and size, and of plain exchanges by size."""

    ranks: int
    sizes: Sequence[int]
    seconds: dict[str, list[float]]
    exchanges: list[float]

    def bounds(self) -> list[float]:
        """Return for each size the seconds that the least that must be sent takes."""
        return [2 * (self.ranks - 1) / self.ranks * seconds for seconds in self.exchanges]


def measure(ranks: int, wrapper: Sequence[str] = (), sizes: Sequence[int] = SIZES) -> Measured:
    """Run every algorithm on every size.

    Raises
    ------
    AgreedError
        As :func:`tinyunet.benchmarks.mpi.run`.
    """
    task = {"do": "allreduce", "sizes": list(sizes), "algorithms": ALLREDUCES}
    found = mpi.run(ranks, task, wrapper)
    exchanges = found.pop("exchange")
    return Measured(ranks, sizes, found, exchanges)


def table(measured: Measured) -> str:
    """Return the table and what its columns mean, as text."""
    head = ["bytes", *(f"{name} us" for name in measured.seconds), "bound us"]
    head += [f"{name} GB/s" for name in measured.seconds]
    body = []
    for row, size in enumerate(measured.sizes):
        times = [seconds[row] for seconds in measured.seconds.values()]
        line = [f"{size:,}", *(f"{1e6 * t:.1f}" for t in times)]
        line += [f"{1e6 * measured.bounds()[row]:.1f}", *(f"{size / t / 1e9:.2f}" for t in times)]
        body.append(line)
    share = 2 * (measured.ranks - 1) / measured.ranks
    return (
        f"allreduce among {measured.ranks} ranks\n\n{aligned(head, body)}\n"
        f"bound: {share:.2f} times a plain exchange of the array, each way at once;\n"
        "GB/s: bytes of the array a second"
    )


def rows(measured: Measured) -> list[dict[str, Any]]:
    """Return the figures for a file: one row an algorithm and size."""
    return [
        {
            "algorithm": name,
            "ranks": measured.ranks,
            "bytes": size,
            "seconds": seconds[row],
            "gb_per_s": size / seconds[row] / 1e9,
            "bound_seconds": measured.bounds()[row],
        }
        for name, seconds in measured.seconds.items()
        for row, size in enumerate(measured.sizes)
    ]


def draw(measured: Measured, path: Path) -> None:
    """Draw time and speed over the size, with the bound."""
    from tinyunet.benchmarks.plot_ranks import draw_allreduce

    times = {name: [1e3 * t for t in times] for name, times in measured.seconds.items()}
    bound = [1e3 * seconds for seconds in measured.bounds()]
    title = f"allreduce among {measured.ranks} ranks"
    draw_allreduce(path, title, measured.sizes, times, bound)
