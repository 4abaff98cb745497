"""The convolution ladder on the U-Net's layers: time, speed, share of the peak, error, scaling.

Each rung is checked against float64 before it is timed. All are timed on one core and on all of them,
and the fastest of the runs counts. A core's clock changes from minute to minute, so the peak that a rung
is compared with is measured just before and just after it. Rungs and peers run in processes of their own:
our rungs share one for each number of threads. Times are of whole calls, arrays or tensors in to arrays or
tensors out: packing and reordering count, except in the last rung, ``fused``, the kernel of the compiled net.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kernels.base.arguments import Array
from kernels.ladder import im2col
from kernels.ladder.shapes import Geometry, geometry
from kernels.workbench import roofline
from kernels.workbench.lessons import ONLY_3, SLOW, SLOW_FLOPS, planes
from tinyunet.benchmarks.nets import USUAL_FILTERS, figures
from tinyunet.benchmarks.peers import ladder
from tinyunet.benchmarks.problem import CHANNELS, CLASSES, DEPTH, convolution_arrays
from tinyunet.benchmarks.process import Process, WorkerError, difference
from tinyunet.benchmarks.systems import System

RUNGS = tuple(
    System(name, name, "kernels", ladder.__name__, ("conv",), {"rung": name})
    for name in (*ladder.RUNGS, ladder.FUSED)
)
DIRECTIONS = ("forward", "backward_data", "backward_weights")

_SECONDS = 0.6
_TOLERANCE = 1e-4
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
        """Return the geometry of so many planes of the layer."""
        kernel = (self.OC, self.IC, self.K, self.K, self.K)
        return geometry((1, planes, self.size, self.size, self.IC), kernel)

    def planes(self, flops: float) -> int:
        """Return how many planes make about this many FLOPs: 1 at least, all at most."""
        return planes(self.sizes(self.size), flops)


class Measurement(NamedTuple):
    """One rung or peer on one layer in one direction."""

    layer: Layer
    name: str
    direction: str
    one: list[float]  # milliseconds of each run, on one core
    many: list[float]  # on all
    flops: float  # of a run, as the definition counts them
    peak: float  # GFLOP/s of one core's multiply-adds, measured before and after
    error: float
    scaled_up: bool = False  # the times are from a few planes
    settings: str = ""  # what a peer chose for speed

    @property
    def gflops(self) -> float:
        """GFLOP/s of one core."""
        return self.flops / min(self.one) / 1e6

    def about(self) -> dict[str, Any]:
        """Return the first entries of a row in a file: system, case and size."""
        ours = self.name in {system.name for system in RUNGS}
        case = f"{self.direction} {self.layer.IC}->{self.layer.OC} k{self.layer.K}"
        return {"system": "tinyunet " * ours + self.name, "case": case, "size": self.layer.size}


def unet_layers(size: int) -> list[Layer]:
    """Return every different convolution of the usual U-Net on ``size``^3 voxels."""
    layers = []
    for level in range(DEPTH):
        width, side = USUAL_FILTERS << level, max(size >> level, 1)
        inputs = [width // 2 if level else CHANNELS, width, *([2 * width] if level < DEPTH - 1 else [])]
        layers += [Layer(channels, width, side, 3) for channels in inputs]
    return [*layers, Layer(USUAL_FILTERS, CLASSES, size, 1)]


# ---- measuring -------------------------------------------------------------------------------------


def measure(
    layers: list[Layer], threads: int, systems: Sequence[System]
) -> tuple[list[Measurement], list[str], KeyboardInterrupt | None]:
    """Check and time rungs and peers in every direction, with a progress bar.

    Returns measurements by layer, then rung or peer, then direction; a line for each rung or peer that could
    not go on; and the Ctrl-C that stopped it early, if one did.
    """
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    jobs = [
        (layer, system) for layer in layers for system in systems if system.key not in ONLY_3 or layer.K == 3
    ]
    stopped = None
    with contextlib.ExitStack() as stack:

        @functools.cache
        def process_of(peer: str, threads: int) -> Process:
            process = Process(peer, threads)
            stack.callback(process.end)
            return process

        for layer, system in (bar := stack.enter_context(tqdm(jobs, unit="rung", leave=False))):
            bar.set_description(f"{layer} {system.name}")
            if system.name not in failures:
                try:
                    measurements += list(_measure(layer, system, threads, process_of))
                except WorkerError as failure:
                    failures[system.name] = f"{system.name}: {layer}: {failure}"
                except KeyboardInterrupt as interrupt:
                    stopped = interrupt
                    break
    return measurements, list(failures.values()), stopped


def _measure(
    layer: Layer, system: System, threads: int, process_of: Callable[[str, int], Process]
) -> Iterator[Measurement]:
    def build(threads: int, sizes: Geometry) -> tuple[Process, str]:
        process, shapes = process_of(system.peer, threads), (sizes.src_shape, sizes.weights_shape)
        return process, process.ask("build", "conv", system.options, *shapes)

    found = build(1, layer.sizes(layer.planes(_CHECKED_FLOPS)))[0].ask("check")
    errors = {}
    for name, right in _exact(layer).items():
        most = np.abs(right).max()
        errors[name] = difference(found[name] / most, right / most, _TOLERANCE, f"{name} is wrong")
    slow = system.key == SLOW
    few = layer.planes(SLOW_FLOPS) if slow else layer.size
    sizes, up = layer.sizes(few), layer.size / few
    before = roofline.peak_gflops()
    process, settings = build(1, sizes)
    one = many = process.ask("time", _SECONDS)
    peak = (before + roofline.peak_gflops()) / 2
    if threads > 1 and not slow:
        many = build(threads, sizes)[0].ask("time", _SECONDS)
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
    calls = ladder.whole_calls(im2col, *(array.astype(np.float64) for array in arrays))
    return {name: call() for name, (call, _) in calls.items()}


# ---- tables, files, pictures -----------------------------------------------------------------------


def table(measurements: list[Measurement], threads: int) -> str:
    """Return rows of layers and rungs, a group of columns for each direction, as text."""
    group = "      ms  GF/s  peak    error" + "    x" * (threads > 1)
    width = max(len(m.name) for m in measurements)
    head = f"{'':18s} {'':{width}s}" + "".join(f" | {name:^{len(group)}s}" for name in DIRECTIONS)
    lines = [head, f"{'layer':18s} {'rung':{width}s}" + f" | {group}" * len(DIRECTIONS)]
    for layer, of_layer in itertools.groupby(measurements, lambda m: m.layer):
        lines.append("-" * len(head))
        title = str(layer)
        for name, row in itertools.groupby(of_layer, lambda m: m.name):
            lines.append(f"{title:18s} {name:{width}s}" + "".join(_cells(m, threads) for m in row))
            title = ""
    lines.append(
        "ms: milliseconds on one core, fastest run; ~: timed on a few planes and scaled up\n"
        "GF/s: GFLOP/s of the definition\n"
        "peak: share of this core's multiply-adds, measured beside it;\n"
        "    Winograd exceeds 100 %, because it skips multiplications of the definition\n"
        "error: largest error against float64, of the largest value\n"
        "fused: the compiled net's kernel; tensors are blocked and weights packed before"
    )
    if threads > 1:
        lines.append(f"x: times faster on {threads} cores")
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
    counts = [(m, count, ms) for m in measurements for count, ms in {1: m.one, threads: m.many}.items()]
    return [m.about() | figures(count, ms) for m, count, ms in counts]


def peaks(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Return for a file the peak of one core's multiply-adds, measured before and after each rung."""
    return [m.about() | {"gflops": m.peak} for m in measurements]


def draw(measurements: list[Measurement], path: Path) -> None:
    """Draw GFLOP/s by layer, a panel a direction, and the highest peak that was measured."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.viz.figure import BOUND, draw_lines, panels, write

    layers = list(dict.fromkeys(m.layer for m in measurements))
    found = {(m.direction, m.name, m.layer): m.gflops for m in measurements}
    names, bound = dict.fromkeys(m.name for m in measurements), "peak of one core"
    peak = [max(m.peak for m in measurements)] * len(layers)
    figure, (row,) = panels(4.6 * len(DIRECTIONS), 4.6, columns=len(DIRECTIONS), sharey=True)
    for axes, way in zip(row, DIRECTIONS, strict=True):
        lines = {name: [found.get((way, name, x), float("nan")) for x in layers] for name in names}
        draw_lines(axes, range(len(layers)), lines | {bound: peak}, {bound: BOUND}, title=way)
        labels = [f"{x.IC}->{x.OC} {x.size}^3 k{x.K}" for x in layers]
        axes.set_xticks(range(len(layers)), labels, rotation=60, ha="right", fontsize=8)
    # Last, because the panels share their y axis.
    row[0].set(ylim=(0, None), ylabel="GFLOP/s of one core")
    # Below, once for all panels: within one it would hide points.
    style = {"ncols": len(names) + 1, "handlelength": 3.5, "frameon": False, "fontsize": 8}
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", **style)
    write(figure, path)
