"""The convolution ladder on the U-Net's layers: time, speed, share of the peak, error, scaling.

Each rung is checked against float64 before it is timed. All are timed on one core and on all of them,
and the fastest of the runs counts. A core's clock changes from minute to minute, so the peak that a rung
is compared with is measured just before and just after it. Our rungs' times are of whole calls, arrays in
to arrays out: packing and reordering count, but in the last, ``fused``, which is what the compiled net runs.
Peers run in processes of their own, tensors in to tensors out.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from kernels.base import machine
from kernels.base.arguments import Array
from kernels.base.conv_shapes import Geometry, geometry
from kernels.conv3d import winograd
from kernels.ladder import blocked, direct, im2col, naive
from tinyunet.benchmarks import fused_conv, roofline
from tinyunet.benchmarks.nets import USUAL_FILTERS
from tinyunet.benchmarks.problem import CHANNELS, CLASSES, DEPTH, convolution_arrays
from tinyunet.benchmarks.process import Process, WorkerError
from tinyunet.benchmarks.systems import System
from tinyunet.benchmarks.timing import timed

RUNGS: dict[str, ModuleType] = {
    "naive": naive,
    "im2col": im2col,
    "blocked": blocked,
    "direct": direct,
    "winograd": winograd,
}
FUSED = "fused"
DIRECTIONS = ("forward", "backward_data", "backward_weights")

_SECONDS = 0.6
_TOLERANCE = 1e-4
# The definition runs at about a GFLOP/s: it is timed on as few planes as make this many FLOPs, and
# its time for the whole layer is marked as scaled up.
_SLOW_FLOPS = 2e8
_CHECKED_FLOPS = 2e8

# Milliseconds of the runs in each direction.
Times = dict[str, list[float]]


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


class Rung:
    """A rung of our ladder: one module of kernels."""

    settings = ""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self._module = name, module
        # The definition runs on one core whatever it is given.
        self.is_slow = module is naive

    def runs(self, layer: Layer) -> bool:
        """Whether it has a form of the layer."""
        return self._module is not winograd or layer.K == 3

    def compute(self, sizes: Geometry) -> dict[str, Array]:
        """Result of each direction."""
        return {name: call() for name, call in self._calls(sizes).items()}

    def times(self, sizes: Geometry, threads: int) -> Times:
        """Time each direction."""
        machine.set_threads(threads)
        with threadpool_limits(threads, user_api="blas"):
            return {name: timed(call, _SECONDS)[0] for name, call in self._calls(sizes).items()}

    def _calls(self, sizes: Geometry) -> dict[str, Callable[[], Any]]:
        src, weights, diff_dst = convolution_arrays(sizes.src_shape, sizes.weights_shape)
        return _directions(self._module, src, weights, diff_dst)

    def end(self) -> None:
        """Nothing to end."""


class FusedRung(Rung):
    """The last rung: what the compiled net runs."""

    def __init__(self) -> None:
        super().__init__(FUSED, fused_conv)

    def compute(self, sizes: Geometry) -> dict[str, Array]:
        """Result of each direction."""
        return {name: case.compute() for name, case in fused_conv.cases(sizes).items()}

    def _calls(self, sizes: Geometry) -> dict[str, Callable[[], Any]]:
        return {name: case.run for name, case in fused_conv.cases(sizes).items()}


class Peer:
    """Another system: a process for each number of threads."""

    is_slow = False

    def __init__(self, system: System, folder: Path) -> None:
        self.name, self.settings = system.name, ""
        self._system, self._output = system, folder / "output.npz"
        self._processes: dict[int, Process] = {}

    def runs(self, layer: Layer) -> bool:
        """Every layer."""
        return True

    def compute(self, sizes: Geometry) -> dict[str, Array]:
        """Result of each direction."""
        self._ask(1, "convolve", sizes, output=str(self._output))
        with np.load(self._output) as file:
            return dict(file)

    def times(self, sizes: Geometry, threads: int) -> Times:
        """Time each direction."""
        return self._ask(threads, "time", sizes, seconds=_SECONDS)

    def _ask(self, threads: int, do: str, sizes: Geometry, **arguments: Any) -> dict[str, Any]:
        if threads not in self._processes:
            self._processes[threads] = Process(threads)
            started = self._processes[threads].ask(
                "start", peer=self._system.peer, case="conv", threads=threads, options={}
            )
            self.settings = started["settings"]
        layer = [sizes.src_shape, sizes.weights_shape]
        return self._processes[threads].ask(do, layer=layer, **arguments)

    def end(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            process.end()


Runner = Rung | Peer


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


def measure(layers: list[Layer], threads: int, peers: list[System]) -> tuple[list[Measurement], list[str]]:
    """Check and time every rung and peer in every direction, with a progress bar.

    Returns
    -------
    measurements : list of Measurement
        By layer, then rung or peer, then direction.
    failures : list of str
        A line for each peer that could not go on.
    """
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    with _runners(peers) as runners:
        jobs = [(layer, runner) for layer in layers for runner in runners if runner.runs(layer)]
        with tqdm(jobs, unit="rung", leave=False) as bar:
            exact: dict[Layer, dict[str, Array]] = {}
            for layer, runner in bar:
                bar.set_description(f"{layer} {runner.name}")
                if layer not in exact:
                    exact = {layer: _exact(layer)}
                if runner.name not in failures:
                    try:
                        measurements += _measure(layer, runner, threads, exact[layer])
                    except WorkerError as failure:
                        failures[runner.name] = f"{runner.name}: {layer}: {failure}"
    return measurements, list(failures.values())


def _measure(layer: Layer, runner: Runner, threads: int, exact: dict[str, Array]) -> Iterator[Measurement]:
    errors = _errors(layer, runner, exact)
    planes = layer.planes(_SLOW_FLOPS) if runner.is_slow else layer.size
    sizes = layer.sizes(planes)
    before = roofline.peak_gflops()
    one = runner.times(sizes, 1)
    peak = (before + roofline.peak_gflops()) / 2
    many = one if runner.is_slow or threads == 1 else runner.times(sizes, threads)
    up = layer.size / planes
    for direction in DIRECTIONS:
        yield Measurement(
            layer,
            runner.name,
            direction,
            [up * ms for ms in one[direction]],
            [up * ms for ms in many[direction]],
            up * sizes.flops,
            peak,
            errors[direction],
            up > 1,
            runner.settings,
        )


@contextlib.contextmanager
def _runners(peers: list[System]) -> Iterator[list[Runner]]:
    with tempfile.TemporaryDirectory(prefix="tinyunet-bench-") as folder:
        runners: list[Runner] = [Rung(name, module) for name, module in RUNGS.items()]
        runners += [FusedRung(), *(Peer(system, Path(folder)) for system in peers)]
        try:
            yield runners
        finally:
            for runner in runners:
                runner.end()


def _directions(
    rung: ModuleType, src: Array, weights: Array, diff_dst: Array
) -> dict[str, Callable[[], Array]]:
    return {
        "forward": lambda: rung.forward(src, weights),
        "backward_data": lambda: rung.backward_data(diff_dst, weights, src.shape),
        "backward_weights": lambda: rung.backward_weights(src, diff_dst, weights.shape[2:])[0],
    }


def _exact(layer: Layer) -> dict[str, Array]:
    """Results in float64, on a few planes."""
    sizes = layer.sizes(layer.planes(_CHECKED_FLOPS))
    arrays = convolution_arrays(sizes.src_shape, sizes.weights_shape)
    src, weights, diff_dst = (array.astype(np.float64) for array in arrays)
    return {name: call() for name, call in _directions(im2col, src, weights, diff_dst).items()}


def _errors(layer: Layer, runner: Runner, exact: dict[str, Array]) -> dict[str, float]:
    """Largest error, relative to the largest value, on a few planes.

    Raises
    ------
    WorkerError
        A result is so far off that its time would mean nothing (NaN included).
    """
    found = runner.compute(layer.sizes(layer.planes(_CHECKED_FLOPS)))
    errors = {}
    for direction, right in exact.items():
        if found[direction].shape != right.shape:
            raise WorkerError(f"{direction} is wrong: shape {found[direction].shape}, not {right.shape}")
        errors[direction] = float(np.abs(found[direction] - right).max() / np.abs(right).max())
        if not errors[direction] < _TOLERANCE:
            raise WorkerError(f"{direction} is wrong by {errors[direction]:.1e} of the largest value")
    return errors


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
        if layer != before:
            lines.append("-" * len(head))
        name = "" if layer == before else str(layer)
        cells = "".join(_cells(m, threads) for m in row)
        lines.append(f"{name:18s} {row[0].name:{width}s}{cells}")
        before = layer
    lines.append(
        "ms, GF/s: one core, fastest run; peak: share of its multiply-adds' speed, measured beside it; "
        "error: of the largest value, against float64; fused: tensors blocked and weights packed before"
    )
    if threads > 1:
        lines.append(f"x: times faster on {threads} cores; ~: timed on a few planes and scaled up")
    chosen = {m.name: m.settings for m in measurements if m.settings}
    lines += [f"{name}: {settings}" for name, settings in chosen.items()]
    return "\n".join(lines)


def _cells(m: Measurement, threads: int) -> str:
    fastest = min(m.one)
    ms = f"{'~' if m.scaled_up else ''}{fastest:.{1 if fastest < 1e4 else 0}f}"
    cells = f" | {ms:>8s} {m.gflops:5.0f} {m.gflops / m.peak:5.0%} {m.error:8.1e}"
    times = fastest / min(m.many)
    return cells + (f" {times:4.{1 if times >= 1 else 2}f}" if threads > 1 else "")


def rows(measurements: list[Measurement], threads: int) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a rung or peer, layer, direction and number of threads."""
    return [
        {
            **_what(m),
            "threads": count,
            "median_ms": statistics.median(ms),
            "min_ms": min(ms),
            "max_ms": max(ms),
            "peak_gb": None,
        }
        for m in measurements
        for count, ms in {1: m.one, threads: m.many}.items()
    ]


def peaks(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Return for a file what the multiply-adds of one core reached beside each rung."""
    return [_what(m) | {"gflops": m.peak} for m in measurements]


def _what(m: Measurement) -> dict[str, Any]:
    """Return the keys that say what was measured."""
    return {
        "system": f"tinyunet {m.name}" if m.name in (*RUNGS, FUSED) else m.name,
        "case": f"{m.direction} {m.layer.IC}->{m.layer.OC} k{m.layer.K}",
        "size": m.layer.size,
    }


def draw(measurements: list[Measurement], path: Path) -> None:
    """Draw GFLOP/s by layer, a panel a direction, and the highest peak that was measured beside them."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.benchmarks.plot import draw_layers

    layers = list(dict.fromkeys(m.layer for m in measurements))
    names = list(dict.fromkeys(m.name for m in measurements))
    found = {(m.direction, m.name, m.layer): m.gflops for m in measurements}
    panels = {
        direction: {name: [found.get((direction, name, layer)) for layer in layers] for name in names}
        for direction in DIRECTIONS
    }
    peak = max(m.peak for m in measurements)
    draw_layers(path, peak, [f"{x.IC}->{x.OC} {x.size}^3 k{x.K}" for x in layers], panels)
