"""The convolution ladder on the U-Net's layers: time, speed, share of the peak, error, scaling.

Each rung is checked against float64 before it is timed. All rungs are timed on one core, in turn, and
the fastest of a few runs counts; the last columns say how much faster all cores are. The times are of
whole calls, arrays in to arrays out: packing and reordering count.
"""

import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from kernels import machine
from kernels.conv3d import blocked, direct, im2col, naive
from kernels.conv3d.shapes import Array, Geometry, geometry

RUNGS: tuple[ModuleType, ...] = (naive, im2col, blocked, direct)
DIRECTIONS = ("forward", "backward_data", "backward_weights")

# The definition runs at about a GFLOP/s: it is timed on as few planes as make this many FLOPs, and
# its time for the whole layer is marked as scaled up.
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


class Measurement(NamedTuple):
    """One rung on one layer in one direction."""

    layer: Layer
    rung: str
    direction: str
    ms: float
    gflops: float
    error: float
    scaling: float
    scaled_up: bool


def unet_layers(size: int, filters: int = 16, depth: int = 5, channels: int = 4) -> list[Layer]:
    """Every different convolution of the U-Net on ``size``^3 voxels."""
    layers = []
    for level in range(depth):
        width, side = filters << level, max(size >> level, 1)
        layers.append(Layer(width // 2 if level else channels, width, side, 3))
        layers.append(Layer(width, width, side, 3))
        if level < depth - 1:
            layers.append(Layer(2 * width, width, side, 3))
    layers.append(Layer(filters, channels, size, 1))
    return layers


def measure(layers: list[Layer], threads: int) -> Iterator[Measurement]:
    """Check and time every rung in every direction; yields as it goes, with a progress bar."""
    jobs = [(layer, rung) for layer in layers for rung in RUNGS]
    for layer, rung in tqdm(jobs, desc="convolutions", unit="rung", leave=False):
        errors = _errors(layer, rung)
        planes = _planes(layer, _SLOW_FLOPS) if rung is naive else layer.size
        share = planes / layer.size
        arguments = _arrays(layer.sizes(planes))
        flops = layer.sizes(planes).flops
        for direction in DIRECTIONS:
            call = _call(rung, direction, *arguments)
            one = _seconds(call, 1)
            # The definition runs on one core whatever it is given.
            many = one if rung is naive or threads == 1 else _seconds(call, threads)
            yield Measurement(
                layer,
                rung.__name__.rsplit(".", 1)[-1],
                direction,
                1e3 * one / share,
                flops / one / 1e9,
                errors[direction],
                one / many,
                share < 1,
            )


def table(measurements: list[Measurement], threads: int, peak: float) -> str:
    """Rows of layers and rungs, a group of columns for each direction."""
    group = "      ms  GF/s  peak    error" + ("    x" if threads > 1 else "")
    titles = "".join(f" | {direction.center(len(group))}" for direction in DIRECTIONS)
    head = f"{'':18s} {'':8s}{titles}"
    lines = [head, f"{'layer':18s} {'rung':8s}" + f" | {group}" * len(DIRECTIONS)]
    for start in range(0, len(measurements), len(DIRECTIONS)):
        row = measurements[start : start + len(DIRECTIONS)]
        if row[0].rung == RUNGS[0].__name__.rsplit(".", 1)[-1]:
            lines.append("-" * len(head))
        name = str(row[0].layer) if lines[-1].startswith("-") else ""
        lines.append(
            f"{name:18s} {row[0].rung:8s}" + "".join(_cells(m, threads, peak) for m in row)
        )
    return "\n".join(lines)


def _cells(m: Measurement, threads: int, peak: float) -> str:
    ms = f"{'~' if m.scaled_up else ''}{m.ms:.{1 if m.ms < 1e4 else 0}f}"
    cells = f" | {ms:>8s} {m.gflops:5.0f} {m.gflops / peak:5.0%} {m.error:8.1e}"
    return cells + (f" {m.scaling:4.1f}" if threads > 1 else "")


def _planes(layer: Layer, flops: float) -> int:
    """Planes of the layer that make about this many FLOPs: 1 at least, all at most."""
    return int(np.clip(flops / layer.sizes(layer.size).flops * layer.size, 1, layer.size))


def _arrays(sizes: Geometry, dtype: type = np.float32) -> tuple[Array, Array, Array]:
    generator = np.random.default_rng(0)
    shapes = sizes.src_shape, sizes.weights_shape, sizes.dst_shape
    arrays: list[Array] = [
        generator.standard_normal(shape, np.float32).astype(dtype) for shape in shapes
    ]
    return arrays[0], arrays[1], arrays[2]


def _call(
    rung: ModuleType, direction: str, src: Array, weights: Array, diff_dst: Array
) -> Callable[[], Array]:
    if direction == "forward":
        return lambda: rung.forward(src, weights)
    if direction == "backward_data":
        return lambda: rung.backward_data(diff_dst, weights, src.shape)
    return lambda: rung.backward_weights(src, diff_dst, weights.shape[2:])[0]


def _errors(layer: Layer, rung: ModuleType) -> dict[str, float]:
    """Largest error against float64, relative to the largest value, on a few planes.

    Raises
    ------
    ArithmeticError
        If a result is so far off that its time would mean nothing (NaN included).
    """
    sizes = layer.sizes(_planes(layer, _CHECKED_FLOPS))
    errors = {}
    for direction in DIRECTIONS:
        got = _call(rung, direction, *_arrays(sizes))()
        exact = _call(im2col, direction, *_arrays(sizes, np.float64))()
        errors[direction] = float(np.abs(got - exact).max() / np.abs(exact).max())
        if not errors[direction] < 1e-4:
            raise ArithmeticError(f"{rung.__name__}.{direction} is wrong at {layer}: {errors}")
    return errors


def _seconds(call: Callable[[], Array], threads: int) -> float:
    """Fastest of a few runs, within about a second and a half."""
    machine.set_threads(threads)
    times: list[float] = []
    with threadpool_limits(threads, user_api="blas"):
        while len(times) < 2 or (len(times) < 12 and sum(times) < 1.5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)
