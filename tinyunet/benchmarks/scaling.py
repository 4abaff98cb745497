"""The tables of ranks: the sum of arrays over them, and training on more and more of them.

``allreduce`` compares MPI's algorithm with the two that are written out. No algorithm can let a rank send
less than 2 (N - 1) / N of the array. The bound is that many times what a plain exchange of the array takes:
each rank sends it to its right, and gets one from its left.

``scaling`` measures what fits on this machine and predicts the rest. Weak scaling gives each rank ``batch``
patches, strong scaling shares the patches of the most ranks among fewer. Efficiency is the throughput of a
rank as a share of that of one rank alone; in weak scaling the two are measured in turn. From one rank's step,
and the moments at which its buckets were complete, :mod:`tinyunet.benchmarks.scaling_model` predicts what
networks would make of it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyunet.benchmarks import mpi
from tinyunet.benchmarks.nets import milliseconds, thread_counts
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
from tinyunet.parallel.algorithms import ALGORITHMS

# From a batch norm's sums to all gradients of the usual net.
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 22_600_000)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: What makers say of Ethernet and InfiniBand: Gbit/s, and microseconds a message.
LATENCY_US = {1.0: 50.0, 10.0: 20.0, 100.0: 2.0}
_ROUNDS = 3


# ---- allreduce -------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Median seconds of allreduces by algorithm and size, and of plain exchanges by size."""

    ranks: int
    sizes: Sequence[int]
    seconds: dict[str, list[float]]
    exchanges: list[float]

    @property
    def share(self) -> float:
        """How much of the array each rank must send at least."""
        return 2 * (self.ranks - 1) / self.ranks

    @property
    def bounds(self) -> list[float]:
        """For each size the seconds that the least that must be sent takes."""
        return [self.share * seconds for seconds in self.exchanges]


def measure_sums(ranks: int, wrapper: Sequence[str] = (), sizes: Sequence[int] = SIZES) -> Sums:
    """Run every algorithm on every size.

    Raises
    ------
    AgreedError
        As :func:`tinyunet.benchmarks.mpi.run`.
    """
    task = {"do": "allreduce", "sizes": list(sizes), "algorithms": list(ALGORITHMS)}
    found = mpi.run(ranks, task, wrapper)
    exchanges = found.pop("exchange")
    return Sums(ranks, sizes, found, exchanges)


def sums_table(sums: Sums) -> str:
    """Return the table and what its columns mean, as text."""
    head = ["bytes", *(f"{name} us" for name in sums.seconds), "bound us"]
    head += [f"{name} GB/s" for name in sums.seconds]
    body = []
    for size, bound, *times in zip(sums.sizes, sums.bounds, *sums.seconds.values(), strict=True):
        speeds = [f"{size / seconds / 1e9:.2f}" for seconds in times]
        body.append([f"{size:,}", *(f"{1e6 * seconds:.1f}" for seconds in (*times, bound)), *speeds])
    return (
        f"allreduce among {sums.ranks} ranks\n\n{aligned(head, body)}\n"
        f"bound: {sums.share:.2f} times a plain exchange of the array, each way at once;\n"
        "GB/s: bytes of the array a second"
    )


def sums_rows(sums: Sums) -> list[dict[str, Any]]:
    """Return the figures for a file: one row an algorithm and size."""
    return [
        {
            "algorithm": name,
            "ranks": sums.ranks,
            "bytes": size,
            "seconds": seconds,
            "gb_per_s": size / seconds / 1e9,
            "bound_seconds": bound,
        }
        for name, times in sums.seconds.items()
        for size, seconds, bound in zip(sums.sizes, times, sums.bounds, strict=True)
    ]


def draw_sums(sums: Sums, path: Path) -> None:
    """Draw time and speed over the size, with the bound."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.viz.figure import line_colour, panels, write

    figure, ((left, right),) = panels(9.2, 4.2, columns=2)
    styles = [{"color": line_colour(n), "marker": "o", "markersize": 4} for n in range(len(sums.seconds))]
    styles.append({"color": "0.4", "linestyle": "--"})
    lines = sums.seconds | {"bound: 2 (N - 1) / N of a plain exchange": sums.bounds}
    for (name, line), style in zip(lines.items(), styles, strict=True):
        left.plot(sums.sizes, 1e3 * np.array(line), label=name, **style)
        right.plot(sums.sizes, np.array(sums.sizes) / line / 1e9, label=name, **style)
    left.set(title=f"allreduce among {sums.ranks} ranks", ylabel="ms", yscale="log")
    right.set(ylabel="GB/s: bytes of the array a second")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="bytes")
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    write(figure, path)


# ---- scaling, measured -----------------------------------------------------------------------------


class Run(NamedTuple):
    """A measured training: ranks, patches a rank, and what :func:`tinyunet.benchmarks.ranks.train` found."""

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

    @property
    def own_work(self) -> float:
        """Seconds of a step that are not waiting."""
        return self.seconds - float(self.found["waited"])


class Measured(NamedTuple):
    """Runs, what the model needs to know of a rank alone, and the network fitted to allreduces."""

    weak: list[Run]
    strong: list[Run]
    step: Step
    network: Network | None


def measure(size: int, batch: int, filters: int, most: int, rounds: int) -> Measured:
    """Measure one rank with one thread, and 2, 4, ... up to ``most``, these in turn with one alone."""
    net, counts = {"size": size, "filters": filters}, thread_counts(most)
    weak = [
        _run(ranks, batch, net, rounds=rounds if ranks > 1 else _ROUNDS, in_turn=ranks > 1)
        for ranks in counts
    ]
    shared = [ranks for ranks in counts[:-1] if batch * most % ranks == 0]
    strong = [*(_run(ranks, batch * most // ranks, net) for ranks in shared), weak[-1]]
    network = None
    if most > 1:
        sums = measure_sums(most)
        network = fit(most, sums.sizes, sums.seconds["mpi"])
    found = weak[0].found
    buckets = [(float(ready), int(nbytes)) for ready, nbytes in found["buckets"]]
    return Measured(weak, strong, Step(weak[0].seconds, float(found["backward_end"]), buckets), network)


def _run(ranks: int, batch: int, net: dict[str, int], wrapper: Sequence[str] = (), **options: Any) -> Run:
    task = {"do": "train", **net, "batch": batch, "rounds": _ROUNDS, **options}
    return Run(ranks, batch, mpi.run(ranks, task, wrapper))


def measured_table(measured: Measured) -> str:
    """Return what was measured, as text."""
    head = ("ranks x 1 thread", "patches a rank", "step ms", "waited ms", "efficiency")
    weak = []
    for run in measured.weak:
        alone = {"alone": run.seconds, "efficiency": 1.0, "beside_efficiency": 1.0} | run.found
        cells = _cells(run, alone["efficiency"])
        weak.append((*cells, milliseconds(1e3 * alone["alone"]), f"{alone['beside_efficiency']:.2f}"))
    lines = ["weak scaling", "", aligned((*head, "alone ms", "beside"), weak)]
    if len(measured.strong) > 1:
        base = measured.strong[0].throughput
        strong = [_cells(run, run.throughput / base) for run in measured.strong]
        lines += ["", "strong scaling", "", aligned(head, strong)]
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


def _cells(run: Run, share: float) -> tuple[str, ...]:
    times = (milliseconds(1e3 * seconds) for seconds in (run.seconds, run.found["waited"]))
    return str(run.ranks), str(run.batch), *times, f"{share:.2f}"


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
        sums = measure_sums(2, wrapper, [nbytes for nbytes in SIZES if nbytes > mpi.BUCKET_BYTES])
        runs = {o: _run(2, batch, net, wrapper, overlap=o) for o in (True, False)}
    network = fit(2, sums.sizes, sums.seconds["mpi"])
    # Two ranks share memory and caches here as they would not on two nodes: their own work is what
    # two ranks take that have nothing to wait for.
    pair = next((run for run in measured.weak if run.ranks == 2), measured.weak[0])
    own_work = measured.step.seconds + pair.own_work - measured.weak[0].own_work
    step = measured.step._replace(seconds=own_work)
    rows = [
        (f"step, {_way(overlap)}", step_seconds(step, "ring", 2, network, overlap), run.seconds)
        for overlap, run in runs.items()
    ]
    rows += [
        (f"allreduce of {nbytes:,} bytes", allreduce_seconds("ring", 2, nbytes, network), seconds)
        for nbytes, seconds in zip(sums.sizes, sums.seconds["mpi"], strict=True)
    ]
    head = (f"2 ranks held to {gbit:g} Gbit/s", "model ms", "measured ms")
    text = aligned(head, [(name, *(milliseconds(1e3 * s) for s in seconds)) for name, *seconds in rows])
    figures = f"{1e6 * network.alpha:.0f} us a message, {8e-9 / network.beta:.2f} Gbit/s"
    return f"{text}\nmodel: {figures}, fitted to these allreduces"


def _way(overlap: bool) -> str:
    return "overlap" if overlap else "no overlap"


# ---- scaling, predicted ----------------------------------------------------------------------------


class Line(NamedTuple):
    """Predicted efficiencies on ``RANKS`` of a network, an algorithm and a way to send."""

    gbit: float
    algorithm: str
    overlap: bool
    efficiencies: list[float]

    @property
    def name(self) -> str:
        """The algorithm, and whether gradients are sent only at the end."""
        return self.algorithm + ("" if self.overlap else f", {_way(False)}")


def networks(gbits: Sequence[float]) -> dict[float, Network]:
    """Return a network for each speed in Gbit/s; of one that is not listed, the latency lies between."""
    speeds, latencies = (np.log([*values]) for values in (LATENCY_US, LATENCY_US.values()))
    return {
        gbit: network_of(gbit, float(np.exp(np.interp(np.log(gbit), speeds, latencies)))) for gbit in gbits
    }


def predicted(step: Step, gbits: Sequence[float]) -> Iterator[Line]:
    """Every network, algorithm and way to send, in the order they are shown."""
    for gbit, network in networks(gbits).items():
        for algorithm in ("ring", "tree"):
            for overlap in (True, False):
                shares = [efficiency(step, algorithm, ranks, network, overlap) for ranks in RANKS]
                yield Line(gbit, algorithm, overlap, shares)


def predicted_table(step: Step, gbits: Sequence[float]) -> str:
    """Return the efficiency that is predicted, as text."""
    head = ("weak scaling, predicted", *map(str, RANKS))
    body = [
        (f"{line.gbit:g} Gbit/s {line.name}", *(f"{share:.2f}" for share in line.efficiencies))
        for line in predicted(step, gbits)
    ]
    latencies = ", ".join(f"{1e6 * n.alpha:g} us at {gbit:g} Gbit/s" for gbit, n in networks(gbits).items())
    return f"{aligned(head, body)}\na message takes {latencies}, and its bytes"


def rows(measured: Measured, gbits: Sequence[float]) -> list[dict[str, Any]]:
    """Return the figures for a file: what was measured, then what is predicted."""
    found: list[dict[str, Any]] = [
        {"kind": kind, "ranks": run.ranks, "batch": run.batch, **run.found}
        for kind, runs in (("weak", measured.weak), ("strong", measured.strong))
        for run in runs
    ]
    for gbit, algorithm, overlap, shares in predicted(measured.step, gbits):
        about = {"gbit_per_s": gbit, "algorithm": algorithm, "overlap": overlap}
        for ranks, share in zip(RANKS, shares, strict=True):
            found.append({"kind": "predicted", "ranks": ranks, **about, "efficiency": share})
    return found


def draw(measured: Measured, gbits: Sequence[float], path: Path) -> None:
    """Draw the predicted efficiency over the ranks, a panel a network."""
    from tinyunet.viz.figure import line_colour, panels, write

    figure, (row,) = panels(4.6 * len({*gbits}), 4.2, columns=len({*gbits}))
    by_network = dict(zip(networks(gbits), row, strict=True))
    for line in predicted(measured.step, gbits):
        axes, colour = by_network[line.gbit], line_colour(line.algorithm == "tree")
        axes.plot(RANKS, line.efficiencies, "-" if line.overlap else "--", color=colour, label=line.name)
    for gbit, axes in by_network.items():
        axes.set_xscale("log", base=2)
        axes.set(title=f"{gbit:g} Gbit/s", xlabel="ranks", ylim=(0, 1.03))
        axes.set_xticks(RANKS[1::2], [str(ranks) for ranks in RANKS[1::2]])
    row[0].set_ylabel("efficiency of weak scaling, predicted")
    row[0].legend(frameon=False, fontsize=8)
    write(figure, path)
