"""The tables of ranks: the sum of arrays over them, and training on more and more of them.

``allreduce`` compares MPI's algorithm with the two that are written out. No algorithm can let a rank send
less than 2 (N - 1) / N of the array. The bound is that many times what a plain exchange of the array takes:
each rank sends it to its right, and gets one from its left.

``scaling`` measures as many ranks as fit on this machine, and predicts more. Weak scaling gives each rank
``batch`` patches, strong scaling shares the patches of the most ranks among fewer. Efficiency is the
throughput of a rank as a share of that of one rank alone; in weak scaling the two are measured in turn. From
one rank's step, and the moments at which its buckets were complete,
:mod:`tinyunet.benchmarks.scaling_model` predicts the efficiency on other networks.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyunet.benchmarks import mpi
from tinyunet.benchmarks import scaling_model as model
from tinyunet.benchmarks.nets import milliseconds, thread_counts
from tinyunet.common.terminal import aligned
from tinyunet.parallel.algorithms import ALGORITHMS

# From a batch norm's sums to all gradients of the usual net.
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 22_600_000)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Ethernet and InfiniBand by their makers: Gbit/s, and microseconds a message.
LATENCY_US = {1.0: 50.0, 10.0: 20.0, 100.0: 2.0}
_ROUNDS = 3
_WITHOUT = ", no overlap"


# ---- allreduce -------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Median seconds of allreduces by algorithm and size, and the bound: the least for each size."""

    ranks: int
    sizes: Sequence[int]
    seconds: dict[str, list[float]]
    bounds: list[float]


def share_sent(ranks: int) -> float:
    """Return how much of the array each rank must send at least."""
    return 2 * (ranks - 1) / ranks


def measure_sums(ranks: int, wrapper: Sequence[str] = (), sizes: Sequence[int] = SIZES) -> Sums:
    """Run every algorithm on every size; raises as :func:`tinyunet.benchmarks.mpi.run`."""
    found = mpi.run(ranks, {"do": "allreduce", "sizes": [*sizes], "algorithms": [*ALGORITHMS]}, wrapper)
    bounds = [share_sent(ranks) * seconds for seconds in found.pop("exchange")]
    return Sums(ranks, sizes, found, bounds)


def sums_table(sums: Sums) -> str:
    """Return the table and what its columns mean, as text."""
    head = ["bytes", *(f"{name} us" for name in (*sums.seconds, "bound"))]
    head += [f"{name} GB/s" for name in sums.seconds]
    body = []
    for size, bound, *times in zip(sums.sizes, sums.bounds, *sums.seconds.values(), strict=True):
        speeds = [f"{size / seconds / 1e9:.2f}" for seconds in times]
        body.append([f"{size:,}", *(f"{1e6 * seconds:.1f}" for seconds in (*times, bound)), *speeds])
    return (
        f"allreduce among {sums.ranks} ranks\n\n{aligned(head, body)}\n"
        "us: microseconds of a sum, median\n"
        f"bound: {share_sent(sums.ranks):.2f} times a plain exchange of the array, each way at once;\n"
        "GB/s: bytes of the array a second"
    )


def sums_rows(sums: Sums) -> list[dict[str, Any]]:
    """Return the figures for a file: one row an algorithm and size."""
    return [
        {"algorithm": name, "ranks": sums.ranks, "bytes": size, "seconds": seconds}
        | {"gb_per_s": size / seconds / 1e9, "bound_seconds": bound}
        for name, times in sums.seconds.items()
        for size, seconds, bound in zip(sums.sizes, times, sums.bounds, strict=True)
    ]


def draw_sums(sums: Sums, path: Path) -> None:
    """Draw time and speed over the size, with the bound."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.viz.figure import BOUND, draw_lines, panels, write

    figure, ((left, right),) = panels(9.2, 4.2, columns=2)
    bound, sizes = "bound: 2 (N - 1) / N of a plain exchange", np.array(sums.sizes)
    lines = sums.seconds | {bound: sums.bounds}
    ms = {name: 1e3 * np.array(seconds) for name, seconds in lines.items()}
    speeds = {name: sizes / seconds / 1e9 for name, seconds in lines.items()}
    about = {"xscale": "log", "xlabel": "bytes"}
    title = f"allreduce among {sums.ranks} ranks"
    draw_lines(left, sizes, ms, {bound: BOUND}, title=title, ylabel="ms", yscale="log", **about)
    draw_lines(right, sizes, speeds, {bound: BOUND}, ylabel="GB/s: bytes of the array a second", **about)
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    write(figure, path)


# ---- scaling, measured -----------------------------------------------------------------------------


class Run(NamedTuple):
    """A measured training: ranks, patches a rank, and results of :func:`tinyunet.benchmarks.ranks.train`."""

    ranks: int
    batch: int
    found: dict[str, Any]

    @property
    def own_work(self) -> float:
        """Seconds of a step that are not waiting."""
        return float(self.found["seconds"] - self.found["waited"])


class Measured(NamedTuple):
    """Runs, the step of a rank alone for the model, and the network fitted to allreduces."""

    weak: list[Run]
    strong: list[Run]
    step: model.Step
    network: model.Network | None


def measure(size: int, batch: int, filters: int, most: int, rounds: int) -> Measured:
    """Measure one rank with one thread, and 2, 4, ... up to ``most``, these in turn with one alone."""
    net, counts = {"size": size, "filters": filters}, thread_counts(most)
    weak = [_run(1, batch, net)]
    weak += [_run(ranks, batch, net, rounds=rounds, in_turn=True) for ranks in counts[1:]]
    shared = [ranks for ranks in counts[:-1] if batch * most % ranks == 0]
    strong = [*(_run(ranks, batch * most // ranks, net) for ranks in shared), weak[-1]]
    step = model.Step(*(weak[0].found[name] for name in model.Step._fields))
    return Measured(weak, strong, step, _fit(measure_sums(most)) if most > 1 else None)


def _fit(sums: Sums) -> model.Network:
    return model.fit(sums.ranks, sums.sizes, sums.seconds["mpi"])


def _run(ranks: int, batch: int, net: dict[str, int], wrapper: Sequence[str] = (), **options: Any) -> Run:
    task = {"do": "train", **net, "batch": batch, "rounds": _ROUNDS, **options}
    return Run(ranks, batch, mpi.run(ranks, task, wrapper))


def measured_table(measured: Measured) -> str:
    """Return the measurements as text."""
    head = ("ranks x 1 thread", "patches a rank", "step ms", "waited ms", "efficiency")
    weak = []
    for run in measured.weak:
        found = {"alone": run.found["seconds"], "efficiency": 1.0, "beside_efficiency": 1.0} | run.found
        cells = _cells(run, found["efficiency"])
        weak.append((*cells, milliseconds(1e3 * found["alone"]), f"{found['beside_efficiency']:.2f}"))
    lines = ["weak scaling", "", aligned((*head, "alone ms", "beside"), weak)]
    if len(measured.strong) > 1:
        speeds = [run.batch / run.found["seconds"] for run in measured.strong]
        strong = [_cells(run, x / speeds[0]) for run, x in zip(measured.strong, speeds, strict=True)]
        lines += ["", "strong scaling", "", aligned(head, strong)]
    lines += [
        "step ms: milliseconds of a step of all ranks together, median",
        "waited ms: after backward, for gradients",
        "efficiency: throughput of a rank, as a share of that of one rank alone",
        "alone ms: a step of one rank alone, in turn with them",
        "beside: efficiency of ranks that train beside each other, and send and share nothing",
    ]
    if measured.network:
        alpha, beta = measured.network
        speed = f"{1e-9 / beta:.1f} GB/s" if beta else "unlimited"
        lines += ["", f"allreduce here: {1e6 * alpha:.1f} us a message, {speed}"]
    return "\n".join(lines)


def _cells(run: Run, share: float) -> tuple[str, ...]:
    times = (milliseconds(1e3 * run.found[name]) for name in ("seconds", "waited"))
    return str(run.ranks), str(run.batch), *times, f"{share:.2f}"


def validate(measured: Measured, size: int, filters: int, gbit: float) -> str:
    """Hold two ranks to a bandwidth, and compare the times of the model with the measured ones.

    The network's figures are fitted to those allreduces on it that it hinders; the step is that of a
    rank alone. Raises as :func:`tinyunet.benchmarks.mpi.throttled`.
    """
    net, batch = {"size": size, "filters": filters}, measured.weak[0].batch
    with mpi.throttled(gbit) as wrapper:
        sums = measure_sums(2, wrapper, [nbytes for nbytes in SIZES if nbytes > mpi.BUCKET_BYTES])
        runs = {overlap: _run(2, batch, net, wrapper, overlap=overlap) for overlap in (True, False)}
    network = _fit(sums)
    # Two ranks share memory and caches here, unlike on two nodes. So the step of the model is the
    # time of two ranks that have nothing to wait for.
    pair = next((run for run in measured.weak if run.ranks == 2), measured.weak[0])
    own_work = measured.step.seconds + pair.own_work - measured.weak[0].own_work
    step = measured.step._replace(seconds=own_work)
    rows = [
        (name, model.step_seconds(step, "ring", 2, network, overlap), runs[overlap].found["seconds"])
        for name, overlap in (("step, overlap", True), (f"step{_WITHOUT}", False))
    ]
    rows += [
        (f"allreduce of {nbytes:,} bytes", model.allreduce_seconds("ring", 2, nbytes, network), seconds)
        for nbytes, seconds in zip(sums.sizes, sums.seconds["mpi"], strict=True)
    ]
    head = (f"2 ranks held to {gbit:g} Gbit/s", "model ms", "measured ms")
    text = aligned(head, [(name, *(milliseconds(1e3 * s) for s in seconds)) for name, *seconds in rows])
    figures = f"{1e6 * network.alpha:.0f} us a message, {8e-9 / network.beta:.2f} Gbit/s"
    return f"{text}\nmodel: {figures}, fitted to these allreduces"


# ---- scaling, predicted ----------------------------------------------------------------------------


def networks(gbits: Sequence[float]) -> dict[float, model.Network]:
    """Return a network for each speed in Gbit/s; of one that is not listed, the latency lies between."""
    speeds, latencies = (np.log([*values]) for values in (LATENCY_US, LATENCY_US.values()))
    latency = {gbit: float(np.exp(np.interp(np.log(gbit), speeds, latencies))) for gbit in gbits}
    return {gbit: model.network_of(gbit, us) for gbit, us in latency.items()}


def predicted(step: model.Step, gbits: Sequence[float]) -> Iterator[tuple[float, str, bool, list[float]]]:
    """Yield Gbit/s, algorithm, whether gradients are sent during backward, and efficiencies on ``RANKS``."""
    for gbit, network in networks(gbits).items():
        for algorithm, overlap in itertools.product(("ring", "tree"), (True, False)):
            shares = [model.efficiency(step, algorithm, ranks, network, overlap) for ranks in RANKS]
            yield gbit, algorithm, overlap, shares


def predicted_table(step: model.Step, gbits: Sequence[float]) -> str:
    """Return the efficiency that is predicted, as text."""
    head = ("weak scaling, predicted", *map(str, RANKS))
    body = [
        (f"{gbit:g} Gbit/s {algorithm}{'' if overlap else _WITHOUT}", *(f"{share:.2f}" for share in shares))
        for gbit, algorithm, overlap, shares in predicted(step, gbits)
    ]
    latencies = ", ".join(f"{1e6 * n.alpha:g} us at {gbit:g} Gbit/s" for gbit, n in networks(gbits).items())
    return f"{aligned(head, body)}\na message takes {latencies}, and its bytes"


def rows(measured: Measured, gbits: Sequence[float]) -> list[dict[str, Any]]:
    """Return the figures for a file: measured, then predicted."""
    runs = [("weak", run) for run in measured.weak] + [("strong", run) for run in measured.strong]
    found = [{"kind": kind, "ranks": run.ranks, "batch": run.batch, **run.found} for kind, run in runs]
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
    for gbit, algorithm, overlap, shares in predicted(measured.step, gbits):
        style = {"linestyle": "-" if overlap else "--", "color": line_colour(algorithm == "tree")}
        by_network[gbit].plot(RANKS, shares, label=algorithm + ("" if overlap else _WITHOUT), **style)
    for gbit, axes in by_network.items():
        axes.set_xscale("log", base=2)
        axes.set(title=f"{gbit:g} Gbit/s", xlabel="ranks", ylim=(0, 1.03))
        axes.set_xticks(RANKS[1::2], [str(ranks) for ranks in RANKS[1::2]])
    row[0].set_ylabel("efficiency of weak scaling, predicted")
    row[0].legend(frameon=False, fontsize=8)
    write(figure, path)
