"""One rung of the ladder on one layer: its time, the roofline that limits it, and what the rung does new.

``python -m tinyunet.benchmarks.one_rung`` runs the rung once: the process that `kernels.workbench.assembly`
gets the assembly from.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from kernels.base import machine
from kernels.workbench import assembly, roofline
from kernels.workbench.lessons import LESSONS, ONLY_3, SLOW, SLOW_FLOPS, bytes_moved, previous
from tinyunet.benchmarks.conv import Layer
from tinyunet.benchmarks.peers import ladder
from tinyunet.benchmarks.problem import convolution_arrays
from tinyunet.benchmarks.process import Process

_SECONDS = 1.5  # that each of the two rungs is timed, in turns
_TURNS = 5
_COLUMNS = 100  # of text


class Timed(NamedTuple):
    """A rung's time on one core, in milliseconds for the whole layer."""

    name: str
    ms: float  # fastest run
    spread: float  # half of the distance between the quartiles of the runs, as a share of the median
    scaled_up: bool


class Report(NamedTuple):
    """What was measured and counted."""

    layer: Layer
    direction: str
    rung: Timed
    before: Timed | None  # the rung before it
    moved: dict[str, int]  # bytes through memory, by array
    flops: float  # as the definition counts them
    peak: float  # GFLOP/s
    bandwidth: float  # GB/s of one core

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / sum(self.moved.values())

    @property
    def roof(self) -> float:
        """GFLOP/s that the roofline allows."""
        return min(self.peak, self.intensity * self.bandwidth)

    def gflops(self, ms: float) -> float:
        """Speed of a run."""
        return self.flops / ms / 1e6


def measure(layer: Layer, rung: str, direction: str = "forward") -> Report:
    """Time a rung and the one before it in turn, on one core.

    WorkerError, of one line, if a rung has no such kernel.
    """
    before = previous(rung)
    if before in ONLY_3 and layer.K != 3:
        before = "direct"
    peak = roofline.peak_gflops()
    with contextlib.ExitStack() as stack:
        workers = {name: Process(ladder.__name__, 1) for name in (rung, before) if name}
        planes = {n: layer.planes(SLOW_FLOPS) if n == SLOW else layer.size for n in workers}
        for name, worker in workers.items():
            stack.callback(worker.end)
            sizes = layer.sizes(planes[name])
            worker.ask("build", "conv", {"rung": name}, sizes.src_shape, sizes.weights_shape)
        runs: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(_TURNS):
            for name, worker in workers.items():
                runs[name] += worker.ask("time", _SECONDS / _TURNS, direction)[direction]
    times = [_timed(name, ms, layer.size / planes[name]) for name, ms in runs.items()]
    machine.set_threads(1)
    whole = layer.sizes(layer.size)
    return Report(
        layer,
        direction,
        times[0],
        times[1] if before else None,
        bytes_moved(rung, whole, direction),
        whole.flops,
        max(peak, roofline.peak_gflops()),
        roofline.copy_bandwidth(),
    )


def _timed(name: str, runs: list[float], up: float) -> Timed:
    low, _, high = statistics.quantiles(runs, n=4)
    return Timed(name, up * min(runs), (high - low) / 2 / statistics.median(runs), up > 1)


# ---- text and picture ------------------------------------------------------------------------------


def text(report: Report) -> str:
    """Return the report as lines of a terminal."""
    rung, speed = report.rung, report.gflops(report.rung.ms)
    K = report.layer.K
    title = f"{rung.name}, {report.direction}, {report.layer.IC} -> {report.layer.OC} channels, "
    title += f"{report.layer.size}^3 voxels, kernel {K}^3, one core"
    few = ", timed on a few planes and scaled up" if rung.scaled_up else ""
    moved = sum(report.moved.values())
    lines = [
        title,
        "",
        f"time    {rung.ms:9.3g} ms       fastest run; half of the runs lie within {rung.spread:.1%}{few}",
        f"speed   {speed:9.3g} GFLOP/s  {speed / report.peak:.0%} of the peak, {report.peak:.0f} GFLOP/s; "
        f"operations of the definition",
        f"moved   {moved / 1e6:9.3g} MB       {moved / rung.ms / 1e6:.2g} GB/s; memory allows "
        f"{report.bandwidth:.0f} (a copy by one core)",
        *(f"        {nbytes / 1e6:9.3g} MB       {name}" for name, nbytes in report.moved.items()),
        f"roof    {report.roof:9.3g} GFLOP/s  {report.intensity:.1f} operations a byte: {_roof(report)}",
        "",
        roofline.picture(rung.name, report.intensity, speed, report.peak, report.bandwidth),
        "",
        *wrap(f"{rung.name} {LESSONS[rung.name].new}", _COLUMNS),
        *wrap(f"What limits it: {LESSONS[rung.name].limit}.", _COLUMNS),
    ]
    if report.before:
        lines.append(_gain(report))
    if speed > report.peak:
        lines.append("It exceeds the peak, because it skips multiplications that the definition has.")
    return "\n".join(lines)


def _roof(report: Report) -> str:
    """Say what the roof is, and how near to it the rung comes."""
    roof = "memory's bandwidth" if report.roof < report.peak else "the multiply-adds' speed"
    return f"{roof}; the rung reaches {report.gflops(report.rung.ms) / report.roof:.0%} of it"


def _gain(report: Report) -> str:
    assert report.before is not None
    rung, before = report.rung, report.before
    ratio = before.ms / rung.ms
    words = f"{ratio:.3g} times as fast as" if ratio >= 1 else f"{1 / ratio:.3g} times slower than"
    noise = abs(ratio - 1) < rung.spread + before.spread
    known = " (within the noise of these runs)" if noise else ""
    return f"It is {words} {before.name}, which took {before.ms:.3g} ms in turn with it{known}."


def draw(report: Report, path: Path) -> None:
    """Draw the roofline with both rungs as dots."""
    from tinyunet.viz.figure import BOUND, line_colour, panels, write

    figure, ((axes,),) = panels(6.0, 4.5)
    ridge = report.peak / report.bandwidth
    xs = np.geomspace(min(report.intensity, ridge) / 8, max(report.intensity, ridge) * 8, 200)
    axes.plot(xs, np.minimum(report.peak, xs * report.bandwidth), **BOUND)
    whole = report.layer.sizes(report.layer.size)
    for index, each in enumerate(t for t in (report.rung, report.before) if t):
        x = report.flops / sum(bytes_moved(each.name, whole, report.direction).values())
        y = report.gflops(each.ms)
        axes.plot([x], [y], "o", color=line_colour(index))
        axes.annotate(each.name, (x, y), xytext=(6, -3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s of one core")
    axes.set_title(f"{report.layer} {report.direction}")
    write(figure, path)


def rows(report: Report) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a rung."""
    whole = report.layer.sizes(report.layer.size)
    about = {"case": report.direction, "layer": list(report.layer), "peak_gflops": report.peak}
    return [
        {"system": f"tinyunet {each.name}", "min_ms": each.ms, "gflops": report.gflops(each.ms)}
        | about
        | {"bytes": sum(bytes_moved(each.name, whole, report.direction).values())}
        for each in (report.rung, report.before)
        if each
    ]


def hot_loop(layer: Layer, rung: str, direction: str) -> str:
    """Return the listing of a rung's hot loop; RuntimeError, of one line, if it cannot be compiled."""
    sizes = layer.sizes(layer.size)
    shapes = sizes.src_shape, sizes.weights_shape
    tile = ladder.fastest(direction, *shapes) if rung == ladder.FUSED else None
    listing = assembly.report(rung, assembly.assembly_of(__name__, (rung, *shapes, direction, tile)))
    if rung == "minimal_filtering":
        return f"The products are NumPy's BLAS'; of its own loops, this is the hottest.\n{listing}"
    return listing


def run_once(
    rung: str, src_shape: Sequence[int], weights_shape: Sequence[int], direction: str, tile: Any
) -> None:
    """Run a rung once; ``tile`` is that of the last rung."""
    arrays = convolution_arrays(src_shape, weights_shape)
    if rung == ladder.FUSED:
        call, _ = ladder.PASSES[direction](*arrays, tile and tuple(tile))
    else:
        call, _ = ladder.convolution(*arrays, rung)[direction]
    call()


if __name__ == "__main__":
    run_once(*json.loads(sys.argv[1]))
