"""The ranks of the table ``scaling``: what fits on this machine is measured, the rest predicted.

Weak scaling gives each rank ``batch`` patches, strong scaling shares the patches of the most ranks
among fewer. Efficiency is the throughput of a rank as a share of that of one rank alone; in weak
scaling the two are measured in turn. From one rank's step, and the moments at which its buckets were
complete, :mod:`tinyunet.benchmarks.scaling_model` predicts what networks would make of it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyunet.benchmarks import allreduce, mpi
from tinyunet.benchmarks.columns import milliseconds
from tinyunet.benchmarks.nets import thread_counts
from tinyunet.benchmarks.scaling_model import (
    Network,
    Step,
    allreduce_seconds,
    efficiency,
    fit,
    network_of,
    step_seconds,
)
from tinyunet.common.terminal import aligned

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN = ("ring", "tree")
#: What makers say of Ethernet and InfiniBand: Gbit/s, and microseconds a message.
LATENCY_US = {1.0: 50.0, 10.0: 20.0, 100.0: 2.0}
_STEPS = 9


class Run(NamedTuple):
    """A measured training step: ranks, patches a rank, and what :mod:`.ranks` has found.

    In weak scaling that is what both its tasks, ``steps`` and ``weak``, have found.
    """

    ranks: int
    batch: int
    found: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Median of a step."""
        return float(self.found["seconds"])

    @property
    def throughput(self) -> float:
        """Patches a second and rank."""
        return self.batch / self.seconds


class Measured(NamedTuple):
    """Runs, the allreduce between the most ranks, and the network fitted to it."""

    weak: list[Run]
    strong: list[Run]
    step: Step
    network: Network | None


def measure(size: int, batch: int, filters: int, most: int, rounds: int) -> Measured:
    """Measure one rank with one thread, and 2, 4, ... up to ``most``, these in turn with one alone."""
    counts = thread_counts(most)
    whole = {"size": size, "filters": filters}
    runs = [_run(ranks, batch, whole) for ranks in counts]
    strong = [runs[-1]]
    for ranks in reversed(counts[:-1]):
        if batch * most % ranks == 0:
            strong.insert(0, _run(ranks, batch * most // ranks, whole))
    weak = [runs[0], *(_in_turn(run, whole, rounds) for run in runs[1:])]
    network = None
    if most > 1:
        sums = allreduce.measure(most)
        network = fit(most, sums.sizes, sums.seconds["mpi"])
    return Measured(weak, strong, step_of(weak[0]), network)


def step_of(run: Run) -> Step:
    """Return what the model needs to know of a rank alone."""
    buckets = [(float(ready), int(nbytes)) for ready, nbytes in run.found["buckets"]]
    return Step(run.seconds, float(run.found["backward_end"]), buckets)


def _run(ranks: int, batch: int, net: dict[str, int], wrapper: Sequence[str] = (), **options: Any) -> Run:
    task = {"do": "steps", **net, "batch": batch, "threads": 1, "count": _STEPS, **options}
    return Run(ranks, batch, mpi.run(ranks, task, wrapper))


def _in_turn(run: Run, net: dict[str, int], rounds: int) -> Run:
    """Add what the same ranks do in turn with one alone."""
    task = {"do": "weak", **net, "batch": run.batch, "threads": 1, "rounds": rounds}
    return run._replace(found=run.found | mpi.run(run.ranks, task))


def measured_table(measured: Measured) -> str:
    """Return what was measured, as text."""
    head = ("ranks x 1 thread", "patches a rank", "step ms", "waited ms", "efficiency")
    weak = [_weak_cells(run) for run in measured.weak]
    lines = ["weak scaling", "", aligned((*head, "alone ms", "beside"), weak)]
    if len(measured.strong) > 1:
        base = measured.strong[0].throughput
        cells = [_cells(run, run.seconds, run.throughput / base) for run in measured.strong]
        lines += ["", "strong scaling", "", aligned(head, cells)]
    lines += [
        "waited: after backward, for gradients",
        "alone: what one rank takes for a step, in turn with them; efficiency is its share of theirs",
        "beside: efficiency of ranks that train beside each other, and send and share nothing",
    ]
    if measured.network:
        alpha, beta = measured.network
        speed = f"{1e-9 / beta:.1f} GB/s" if beta else "unlimited"
        lines += ["", f"allreduce here: {1e6 * alpha:.1f} us a message, {speed}"]
    return "\n".join(lines)


def _weak_cells(run: Run) -> tuple[str, ...]:
    seconds = {"alone": run.seconds, "together": run.seconds}
    found = seconds | {"efficiency": 1.0, "beside_efficiency": 1.0} | run.found
    cells = _cells(run, found["together"], found["efficiency"])
    return *cells, milliseconds(1e3 * found["alone"]), f"{found['beside_efficiency']:.2f}"


def _cells(run: Run, seconds: float, share: float) -> tuple[str, ...]:
    waited = milliseconds(1e3 * run.found["waited"])
    return str(run.ranks), str(run.batch), milliseconds(1e3 * seconds), waited, f"{share:.2f}"


def networks(gbits: Sequence[float]) -> dict[float, Network]:
    """Return a network for each speed in Gbit/s; of one that is not listed, the latency lies between."""
    speeds, latencies = (np.log([*values]) for values in (LATENCY_US, LATENCY_US.values()))
    return {
        gbit: network_of(gbit, float(np.exp(np.interp(np.log(gbit), speeds, latencies)))) for gbit in gbits
    }


def cases(gbits: Sequence[float]) -> Iterator[tuple[float, str, bool, Network]]:
    """Every network, algorithm and way to send, in the order they are shown."""
    for gbit, network in networks(gbits).items():
        for algorithm in SHOWN:
            for overlap in (True, False):
                yield gbit, algorithm, overlap, network


def predicted_table(step: Step, gbits: Sequence[float]) -> str:
    """Return the efficiency that is predicted, as text."""
    head = ("weak scaling, predicted", *map(str, RANKS))
    body = [
        (
            f"{gbit:g} Gbit/s {algorithm}{'' if overlap else ', no overlap'}",
            *(f"{efficiency(step, algorithm, n, network, overlap):.2f}" for n in RANKS),
        )
        for gbit, algorithm, overlap, network in cases(gbits)
    ]
    latencies = ", ".join(
        f"{1e6 * network.alpha:g} us at {gbit:g} Gbit/s" for gbit, network in networks(gbits).items()
    )
    return f"{aligned(head, body)}\na message takes {latencies}, and its bytes"


def validate(measured: Measured, size: int, filters: int, gbit: float) -> str:
    """Hold two ranks to a bandwidth, and compare what the model says with what they do.

    The network's figures are fitted to those allreduces on it that it hinders; the step is that of a
    rank alone.

    Raises
    ------
    AgreedError
        As :func:`tinyunet.benchmarks.mpi.throttled`.
    """
    net, batch = {"size": size, "filters": filters}, measured.weak[0].batch
    with mpi.throttled(gbit) as wrapper:
        hindered = [nbytes for nbytes in allreduce.SIZES if nbytes > mpi.BUCKET_BYTES]
        sums = allreduce.measure(2, wrapper, hindered)
        network = fit(2, sums.sizes, sums.seconds["mpi"])
        runs = {o: _run(2, batch, net, wrapper, overlap=o) for o in (True, False)}
    alone = next((run for run in measured.weak if run.ranks == 2), measured.weak[0])
    # Two ranks share memory and caches here as they would not on two nodes: their own work is what
    # two ranks take that have nothing to wait for.
    step = measured.step._replace(
        seconds=measured.step.seconds + _own_work(alone) - _own_work(measured.weak[0])
    )
    body = [
        (
            f"step, {'overlap' if overlap else 'no overlap'}",
            milliseconds(1e3 * step_seconds(step, "ring", 2, network, overlap)),
            milliseconds(1e3 * run.seconds),
        )
        for overlap, run in runs.items()
    ]
    for row, nbytes in enumerate(sums.sizes):
        body.append(
            (
                f"allreduce of {nbytes:,} bytes",
                milliseconds(1e3 * allreduce_seconds("ring", 2, nbytes, network)),
                milliseconds(1e3 * sums.seconds["mpi"][row]),
            )
        )
    head = (f"2 ranks held to {gbit:g} Gbit/s", "model ms", "measured ms")
    figures = f"{1e6 * network.alpha:.0f} us a message, {8e-9 / network.beta:.2f} Gbit/s"
    return f"{aligned(head, body)}\nmodel: {figures}, fitted to these allreduces"


def _own_work(run: Run) -> float:
    return float(run.found["seconds"] - run.found["waited"])


def rows(measured: Measured, gbits: Sequence[float]) -> list[dict[str, Any]]:
    """Return the figures for a file: what was measured, then what is predicted."""
    found: list[dict[str, Any]] = [
        {"kind": kind, "ranks": run.ranks, "batch": run.batch, **run.found}
        for kind, runs in (("weak", measured.weak), ("strong", measured.strong))
        for run in runs
    ]
    for gbit, algorithm, overlap, network in cases(gbits):
        for ranks in RANKS:
            share = efficiency(measured.step, algorithm, ranks, network, overlap)
            found.append(
                {
                    "kind": "predicted",
                    "ranks": ranks,
                    "gbit_per_s": gbit,
                    "algorithm": algorithm,
                    "overlap": overlap,
                    "efficiency": share,
                }
            )
    return found


def draw(measured: Measured, gbits: Sequence[float], path: Path) -> None:
    """Draw the predicted efficiency over the ranks, a panel a network."""
    from tinyunet.benchmarks.plot_ranks import draw_efficiency

    panels: dict[str, dict[str, list[float]]] = {}
    for gbit, algorithm, overlap, network in cases(gbits):
        line = [efficiency(measured.step, algorithm, n, network, overlap) for n in RANKS]
        name = algorithm if overlap else f"{algorithm}, no overlap"
        panels.setdefault(f"{gbit:g} Gbit/s", {})[name] = line
    draw_efficiency(path, RANKS, panels)
