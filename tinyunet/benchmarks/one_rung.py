"""One rung of the ladder on one layer: its time, the roofline that limits it, and what the rung does new.

The roofline says how fast a loop can be at most, given how many operations it does for each byte that goes
through memory (its intensity)::

    GFLOP/s = min(peak of the multiply-adds, intensity * bandwidth of memory)

The bytes are counted, not measured: those of every array that a rung reads or writes as a whole. Numbers that
stay in a cache between two uses count once. So a rung can be slower than its roof in two ways: its loop does
more than multiply-adds (loads and stores of sums, transforms), or its arrays do not stay in the caches.
Minimal filtering can be faster than the roof, because it skips multiplications of the definition.

Source: Williams, Waterman and Patterson, "Roofline" (2009).
"""

import contextlib
import math
import statistics
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from kernels.base import machine
from kernels.base.layout import blocks
from kernels.ladder.direct import FEW_CHANNELS
from tinyunet.benchmarks import roofline
from tinyunet.benchmarks.conv import ONLY_3, SLOW, Layer
from tinyunet.benchmarks.peers import ladder
from tinyunet.benchmarks.process import Process

_SECONDS = 1.5  # that each of the two rungs is timed, in turns
_TURNS = 5
_SLOW_FLOPS = 2e8  # the definition runs at about a GFLOP/s: so many operations are enough to time
_COLUMNS = 100  # of text
_WIDTH, _HEIGHT = 60, 12  # of the roofline in a terminal, in characters


class Lesson(NamedTuple):
    """What a rung teaches."""

    new: str  # what it does that the rung before it does not
    limit: str  # what keeps it from its roof


LESSONS = {
    "naive": Lesson(
        "runs the definition: a loop over every output, tap and channel.",
        "one multiply-add at a time, and each waits for the sum of the one before",
    ),
    "im2col": Lesson(
        "copies each voxel's neighbourhood into a row, so that one matrix product of NumPy's BLAS does all "
        "multiply-adds, with registers and caches used well.",
        "writing and reading the columns, beside a matrix with few columns",
    ),
    "blocked": Lesson(
        "copies src once instead of 27 times, in blocks of 16 channels: one vector multiply-add updates 16 "
        "output channels.",
        "loads and stores: each multiply-add loads a sum and stores it again",
    ),
    "direct": Lesson(
        "keeps a tile of sums in registers until they are complete, where blocked loads and stores each sum "
        "for every tap and input channel.",
        "packing src and reordering dst, which cost as much as a few taps where channels are few",
    ),
    "minimal_filtering": Lesson(
        "transforms tiles of 4^3 voxels, so that 64 multiplications do the work of 216.",
        "the transformed tensors, which go through memory",
    ),
    "winograd": Lesson(
        "transforms a brick of tiles that stays in cache, and larger tiles: up to 8 times fewer "
        "multiplications.",
        "transforms, and reordering src and dst",
    ),
    "fused": Lesson(
        "is the kernel of the compiled net: tensors are blocked and weights packed before, and the kernel "
        "normalises what it reads and sums what it writes.",
        "transforms of small tensors",
    ),
}
_NAMES = tuple(LESSONS)
_WAYS = {
    "forward": ("src, read", "weights, read", "dst, written"),
    "backward_data": ("diff_dst, read", "weights, read", "diff_src, written"),
    "backward_weights": ("src, read", "diff_weights, written", "diff_dst, read"),
}


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


def previous(rung: str) -> str | None:
    """Return the rung before one, or None for the first."""
    return _NAMES[_NAMES.index(rung) - 1] if rung != _NAMES[0] else None


def bytes_moved(rung: str, layer: Layer, direction: str) -> dict[str, int]:
    """Return the bytes of each array that a rung reads or writes as a whole.

    Channels of a blocked array are rounded up to 16; few channels of a first layer are not blocked.
    """
    swapped = layer._replace(IC=layer.OC, OC=layer.IC)
    g = (swapped if direction == "backward_data" else layer).sizes(layer.size)
    sizes = (4 * math.prod(shape) for shape in (g.src_shape, g.weights_shape, g.dst_shape))
    source, weights, result = _WAYS[direction]
    ends = dict(zip((source, weights, result), sizes, strict=True))
    voxels = 4 * layer.size**3
    ic, oc = (16 * blocks(c) for c in g.channels)
    ic = g.channels[0] if g.channels[0] <= FEW_CHANNELS else ic
    packed, name, other = voxels * ic, source.split(",")[0], result.split(",")[0]

    def twice(what: str, nbytes: int) -> dict[str, int]:
        return {f"{what}, written and read": 2 * nbytes}

    panel = twice(f"panel of {name}", 4 * math.prod(g.panel_size) * ic)
    blocked = twice(f"{other} in blocks", voxels * oc)
    eight = twice(f"V, 8 times {name}", 8 * packed) | twice(f"M, 8 times {other}", 8 * voxels * oc)
    return {
        "naive": ends,
        "im2col": ends | twice(f"columns, {g.taps} times {name}", g.taps * voxels * g.channels[0]),
        "blocked": ends | panel | blocked,
        "direct": ends | panel | blocked,
        "minimal_filtering": ends | panel | eight | blocked,
        "winograd": ends | twice(f"{name} in blocks", packed) | blocked,
        "fused": ends | {source: packed, result: voxels * oc},
    }[rung]


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
        planes = {n: layer.planes(_SLOW_FLOPS) if n == SLOW else layer.size for n in workers}
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
    return Report(
        layer,
        direction,
        times[0],
        times[1] if before else None,
        bytes_moved(rung, layer, direction),
        layer.sizes(layer.size).flops,
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
        *_picture(report),
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


def _picture(report: Report) -> list[str]:
    """Draw the roofline: intensity to the right, GFLOP/s upwards, both logarithmic."""
    speed = report.gflops(report.rung.ms)
    ridge = report.peak / report.bandwidth
    left, right = np.log(min(report.intensity, ridge) / 4), np.log(max(report.intensity, ridge) * 4)
    top = np.log(max(report.peak, speed) * 1.5)
    low = np.log(min(speed, report.roof, np.exp(left) * report.bandwidth) / 1.5)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def row_of(gflops: float) -> int:
        place = (np.log(gflops) - low) / (top - low)
        return int(np.clip(round((1 - place) * (_HEIGHT - 1)), 0, _HEIGHT - 1))

    for column in range(_WIDTH):
        at = float(np.exp(left + (right - left) * column / (_WIDTH - 1)))
        flat = at * report.bandwidth >= report.peak
        grid[row_of(min(report.peak, at * report.bandwidth))][column] = "-" if flat else "/"
    column = round((np.log(report.intensity) - left) / (right - left) * (_WIDTH - 1))
    row = row_of(speed)
    grid[row][column] = "*"
    name = report.rung.name
    start = column + 2 if column + 2 + len(name) < _WIDTH else column - 1 - len(name)
    grid[row][start : start + len(name)] = name
    labels = {row_of(report.peak): f"{report.peak:5.0f}", row: f"{speed:5.3g}"}
    lines = [f"{labels.get(y, ''):>8s} |{''.join(cells).rstrip()}" for y, cells in enumerate(grid)]
    ends = f"{np.exp(left):.2g}", f"{np.exp(right):.3g} operations a byte"
    axis = f"{'GFLOP/s':>8s} +{'-' * _WIDTH}"
    return [*lines, axis, f"{'':10s}{ends[0]}{ends[1]:>{_WIDTH - len(ends[0])}s}"]


def draw(report: Report, path: Path) -> None:
    """Draw the roofline with both rungs as dots."""
    from tinyunet.viz.figure import BOUND, line_colour, panels, write

    figure, ((axes,),) = panels(6.0, 4.5)
    ridge = report.peak / report.bandwidth
    xs = np.geomspace(min(report.intensity, ridge) / 8, max(report.intensity, ridge) * 8, 200)
    axes.plot(xs, np.minimum(report.peak, xs * report.bandwidth), **BOUND)
    for index, each in enumerate(t for t in (report.rung, report.before) if t):
        x = report.flops / sum(bytes_moved(each.name, report.layer, report.direction).values())
        y = report.gflops(each.ms)
        axes.plot([x], [y], "o", color=line_colour(index))
        axes.annotate(each.name, (x, y), xytext=(6, -3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s of one core")
    axes.set_title(f"{report.layer} {report.direction}")
    write(figure, path)


def rows(report: Report) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a rung."""
    about = {"case": report.direction, "layer": list(report.layer), "peak_gflops": report.peak}
    return [
        {"system": f"tinyunet {each.name}", "min_ms": each.ms, "gflops": report.gflops(each.ms)}
        | about
        | {"bytes": sum(bytes_moved(each.name, report.layer, report.direction).values())}
        for each in (report.rung, report.before)
        if each
    ]
