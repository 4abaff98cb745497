"""The convolution ladder on the U-Net's layers: time, speed, share of the peak, error, scaling.

Each rung is checked against float64 before it is timed. All are timed on one core and on all of them,
and the fastest of the runs counts. A core's clock changes from minute to minute, so the peak that a rung
is compared with is measured just before and just after it. Rungs and peers run in processes of their own:
our rungs share one for each number of threads. Times are of whole calls, arrays or tensors in to arrays or
tensors out: packing and reordering count, but in the last rung, ``fused``, which is what the compiled net
runs.
"""

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kernels.base.arguments import Array
from kernels.base.conv_shapes import Geometry, geometry
from kernels.ladder import im2col
from tinyunet.benchmarks import roofline
from tinyunet.benchmarks.nets import USUAL_FILTERS
from tinyunet.benchmarks.peers import ladder
from tinyunet.benchmarks.problem import CHANNELS, CLASSES, DEPTH, convolution_arrays
from tinyunet.benchmarks.process import Process, WorkerError
from tinyunet.benchmarks.systems import System

RUNGS = tuple(
    System(name, name, "kernels", ladder.__name__, ("conv",), {"rung": name})
    for name in (*ladder.RUNGS, ladder.FUSED)
)
DIRECTIONS = ("forward", "backward_data", "backward_weights")

_SECONDS = 0.6
_TOLERANCE = 1e-4
# The definition runs at about a GFLOP/s, and on one core whatever it is given: it is timed on as few planes
# as make this many FLOPs, and its time for the whole layer is marked as scaled up.
_SLOW = "naive"
_SLOW_FLOPS = 2e8
_CHECKED_FLOPS = 2e8


class Layer(NamedTuple):
    """One convolution of the U-Net: ``IC`` to ``OC`` channels at ``size``^3, kernel ``K``^3."""

    IC: int
    OC: int
    size: int
    K: int

    def __str__(self) -> str:
        return f"{self.IC:3d} ->{self.OC:4d} {self.size:4d}^3 k{self.K}"

    def sizes(self, planes: int) -> Geometry:
        """Geometry of the layer, or of as many planes of it."""
        kernel = (self.OC, self.IC, self.K, self.K, self.K)
        return geometry((1, planes, self.size, self.size, self.IC), kernel)

    def planes(self, flops: float) -> int:
        """Planes of the layer that make about this many FLOPs: 1 at least, all at most."""
        return int(np.clip(flops / self.sizes(self.size).flops * self.size, 1, self.size))


class Measurement(NamedTuple):
    """One rung or peer on one layer in one direction.

    Attributes
    ----------
    one, many : list of float
        Milliseconds of each run, on one core and on all.
    flops : float
        Of a run, as the definition counts them.
    peak : float
        GFLOP/s of one core's multiply-adds, measured before and after.
    scaled_up : bool
        Whether the times are from a few planes.
    settings : str
        What a peer chose for speed.
    """

    layer: Layer
    name: str
    direction: str
    one: list[float]
    many: list[float]
    flops: float
    peak: float
    error: float
    scaled_up: bool = False
    settings: str = ""

    @property
    def gflops(self) -> float:
        """GFLOP/s of one core."""
        return self.flops / min(self.one) / 1e6

    def about(self) -> dict[str, Any]:
        """Return the keys of a row in a file that say what was measured."""
        ours = self.name in {system.name for system in RUNGS}
        case = f"{self.direction} {self.layer.IC}->{self.layer.OC} k{self.layer.K}"
        return {
            "system": f"tinyunet {self.name}" if ours else self.name,
            "case": case,
            "size": self.layer.size,
        }


def unet_layers(size: int) -> list[Layer]:
    """Every different convolution of the usual U-Net on ``size``^3 voxels."""
    layers = []
    for level in range(DEPTH):
        width, side = USUAL_FILTERS << level, max(size >> level, 1)
        layers.append(Layer(width // 2 if level else CHANNELS, width, side, 3))
        layers.append(Layer(width, width, side, 3))
        if level < DEPTH - 1:
            layers.append(Layer(2 * width, width, side, 3))
    layers.append(Layer(USUAL_FILTERS, CLASSES, size, 1))
    return layers


# ---- measuring -------------------------------------------------------------------------------------


class Workers:
    """A process for each peer (all rungs are one) and number of threads, started when it is first asked."""

    def __init__(self, folder: Path) -> None:
        self._output = str(folder / "output.npz")
        self._started: dict[tuple[str, int], tuple[Process, str]] = {}

    def result(self, system: System, sizes: Geometry) -> dict[str, Array]:
        """Result of each direction."""
        self._ask(system, 1, sizes, "convolve", output=self._output)
        with np.load(self._output) as file:
            return dict(file)

    def times(self, system: System, threads: int, sizes: Geometry) -> dict[str, list[float]]:
        """Milliseconds of the runs in each direction."""
        return self._ask(system, threads, sizes, "time", seconds=_SECONDS)

    def settings(self, system: System) -> str:
        """What it chose for speed."""
        return self._started[system.peer, 1][1]

    def _ask(self, system: System, threads: int, sizes: Geometry, do: str, **more: Any) -> dict[str, Any]:
        key = system.peer, threads
        if key not in self._started:
            process = Process(threads)
            self._started[key] = process, ""
            about = process.ask("start", peer=system.peer, case="conv", threads=threads, options={})
            self._started[key] = process, about["settings"]
        shapes = [sizes.src_shape, sizes.weights_shape]
        return self._started[key][0].ask(do, shapes=shapes, options=system.options, **more)

    def end(self) -> None:
        """End the processes."""
        for process, _ in self._started.values():
            process.end()


def measure(
    layers: list[Layer], threads: int, peers: Sequence[System]
) -> tuple[list[Measurement], list[str]]:
    """Check and time every rung and peer in every direction, with a progress bar.

    Returns
    -------
    measurements : list of Measurement
        By layer, then rung or peer, then direction.
    failures : list of str
        A line for each rung or peer that could not go on.
    """
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    # There is no Winograd of a kernel of 1.
    jobs = [
        (layer, system)
        for layer in layers
        for system in (*RUNGS, *peers)
        if system.key not in ("minimal_filtering", "winograd") or layer.K == 3
    ]
    with tempfile.TemporaryDirectory(prefix="tinyunet-bench-") as folder, contextlib.ExitStack() as stack:
        workers = Workers(Path(folder))
        stack.callback(workers.end)
        for layer, system in (bar := stack.enter_context(tqdm(jobs, unit="rung", leave=False))):
            bar.set_description(f"{layer} {system.name}")
            if system.name not in failures:
                try:
                    measurements += _measure(layer, system, threads, workers)
                except WorkerError as failure:
                    failures[system.name] = f"{system.name}: {layer}: {failure}"
    return measurements, list(failures.values())


def _measure(layer: Layer, system: System, threads: int, workers: Workers) -> Iterator[Measurement]:
    errors = _errors(workers.result(system, layer.sizes(layer.planes(_CHECKED_FLOPS))), _exact(layer))
    slow = system.key == _SLOW
    planes = layer.planes(_SLOW_FLOPS) if slow else layer.size
    sizes, up = layer.sizes(planes), layer.size / planes
    before = roofline.peak_gflops()
    one = workers.times(system, 1, sizes)
    peak = (before + roofline.peak_gflops()) / 2
    many = one if slow or threads == 1 else workers.times(system, threads, sizes)
    settings = workers.settings(system)
    for name in DIRECTIONS:
        times = [up * ms for ms in one[name]], [up * ms for ms in many[name]]
        yield Measurement(
            layer, system.name, name, *times, up * sizes.flops, peak, errors[name], up > 1, settings
        )


@functools.lru_cache(maxsize=1)
def _exact(layer: Layer) -> dict[str, Array]:
    """Results in float64, on a few planes."""
    sizes = layer.sizes(layer.planes(_CHECKED_FLOPS))
    arrays = convolution_arrays(sizes.src_shape, sizes.weights_shape)
    src, weights, diff_dst = (array.astype(np.float64) for array in arrays)
    calls = ladder.whole_calls(im2col, src, weights, diff_dst)
    return {name: call() for name, (call, _) in calls.items()}


def _errors(found: dict[str, Array], exact: dict[str, Array]) -> dict[str, float]:
    """Largest error, relative to the largest value.

    Raises
    ------
    WorkerError
        A result is so far off that its time would mean nothing (NaN included).
    """
    errors = {}
    for direction, right in exact.items():
        if found[direction].shape != right.shape:
            raise WorkerError(f"{direction} is wrong: shape {found[direction].shape}, not {right.shape}")
        errors[direction] = float(np.abs(found[direction] - right).max() / np.abs(right).max())
        if not errors[direction] < _TOLERANCE:
            raise WorkerError(f"{direction} is wrong by {errors[direction]:.1e} of the largest value")
    return errors


# ---- what is shown ---------------------------------------------------------------------------------


def table(measurements: list[Measurement], threads: int) -> str:
    """Rows of layers and rungs, a group of columns for each direction."""
    group = "      ms  GF/s  peak    error" + ("    x" if threads > 1 else "")
    titles = "".join(f" | {direction.center(len(group))}" for direction in DIRECTIONS)
    width = max(len(m.name) for m in measurements)
    head = f"{'':18s} {'':{width}s}{titles}"
    lines = [head, f"{'layer':18s} {'rung':{width}s}" + f" | {group}" * len(DIRECTIONS)]
    before = None
    for start in range(0, len(measurements), len(DIRECTIONS)):
        row = measurements[start : start + len(DIRECTIONS)]
        layer = row[0].layer
        lines += ["-" * len(head)] if layer != before else []
        name = "" if layer == before else str(layer)
        lines.append(f"{name:18s} {row[0].name:{width}s}" + "".join(_cells(m, threads) for m in row))
        before = layer
    lines.append(
        "ms, GF/s: one core, fastest run; peak: share of its multiply-adds' speed, measured beside it; "
        "error: of the largest value, against float64; fused: tensors blocked and weights packed before"
    )
    if threads > 1:
        lines.append(f"x: times faster on {threads} cores; ~: timed on a few planes and scaled up")
    chosen = {m.name: m.settings for m in measurements if m.settings}
    return "\n".join(lines + [f"{name}: {settings}" for name, settings in chosen.items()])


def _cells(m: Measurement, threads: int) -> str:
    fastest = min(m.one)
    ms = f"{'~' if m.scaled_up else ''}{fastest:.{1 if fastest < 1e4 else 0}f}"
    cells = f" | {ms:>8s} {m.gflops:5.0f} {m.gflops / m.peak:5.0%} {m.error:8.1e}"
    times = fastest / min(m.many)
    return cells + (f" {times:4.{1 if times >= 1 else 2}f}" if threads > 1 else "")


def rows(measurements: list[Measurement], threads: int) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a rung or peer, layer, direction and number of threads."""
    return [
        m.about()
        | {"threads": count, "median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
        | {"peak_gb": None}
        for m in measurements
        for count, ms in {1: m.one, threads: m.many}.items()
    ]


def peaks(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Return for a file what the multiply-adds of one core reached beside each rung."""
    return [m.about() | {"gflops": m.peak} for m in measurements]


def draw(measurements: list[Measurement], path: Path) -> None:
    """Draw GFLOP/s by layer, a panel a direction, and the highest peak that was measured beside them."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.viz.figure import line_style, panels, write

    layers = list(dict.fromkeys(m.layer for m in measurements))
    found = {(m.direction, m.name, m.layer): m.gflops for m in measurements}
    peak = max(m.peak for m in measurements)
    figure, (row,) = panels(4.6 * len(DIRECTIONS), 4.6, columns=len(DIRECTIONS), sharey=True)
    for axes, direction in zip(row, DIRECTIONS, strict=True):
        axes.axhline(peak, color="0.7", linestyle="--", linewidth=1)
        note = {"ha": "right", "va": "bottom", "fontsize": 8, "color": "0.4"}
        axes.text(len(layers) - 0.5, peak, "peak of one core", **note)
        for index, name in enumerate(dict.fromkeys(m.name for m in measurements)):
            speeds = [found.get((direction, name, layer), float("nan")) for layer in layers]
            axes.plot(speeds, marker="o", markersize=4, label=name, **line_style(index))
        labels = [f"{x.IC}->{x.OC} {x.size}^3 k{x.K}" for x in layers]
        axes.set_xticks(range(len(layers)), labels, rotation=60, ha="right", fontsize=8)
        axes.set(title=direction, xlim=(-0.5, len(layers) - 0.5))
    # Last, because the panels share their y axis.
    row[0].set_ylim(bottom=0)
    row[0].set_ylabel("GFLOP/s of one core")
    # Below, once for all panels: within one it would hide points.
    handles, names = row[0].get_legend_handles_labels()
    style = {"ncols": len(names), "handlelength": 3.5, "frameon": False, "fontsize": 8}
    figure.legend(handles, names, loc="outside lower center", **style)
    write(figure, path)
