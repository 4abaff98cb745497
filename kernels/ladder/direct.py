"""Rung ``direct``: sums stay in registers for the whole reduction.

Idea       ``blocked`` loads and stores each sum once for every tap and input channel. Here a tile of
           24 sums (AVX-512: 24 voxels x 16 output channels, or 12 x 32) stays in registers until it
           is complete, so memory sees only loads of operands, ``wide + cols`` for ``wide * cols``
           multiply-adds.
Loop nest  groups of output channels, od, oh | ow tile | icb, kd, kh | kw and ic | register tile
Memory     as ``blocked``; a tap's row is one run of memory, in which (kw, ic) is a single index because
           voxels are neighbours::

               panel row   | v0: c0..c15 | v1: c0..c15 | v2: c0..c15 | ...
               voxel 0       [----- kw, ic = 0..47 ----------------]
               voxel 1                     [----- kw, ic = 0..47 ------ ...

           The first layer's 1 to 4 channels are packed as they are, without padding to 16.
Traffic    src once to pack, once from the packed panel for each group of output channels; weights of
           a group stay in the second-level cache; dst once.
Gradients  ``backward_data`` is ``forward`` of ``diff_dst`` with reversed, transposed weights (with a
           stride, zeros are packed between the voxels of ``diff_dst``). ``backward_weights`` keeps a
           tile of the weight gradient in registers, (kw, ic) x 16 oc, while it walks over the voxels of
           a few rows.
Product    `convolve_rows` and `accumulate_rows`, the register tiles, are those of the compiled graph, too:
           `kernels.conv3d.direct_bricks` calls them on bricks that stay in cache.
Numerics   float32; each sum adds kd, kh, kw, ic in order (channel blocks outermost), with one
           rounding a multiply-add. No result depends on the number of threads.
Source     Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
           architectures" (2018), sections II.C to II.F
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import specialised, worker_kernel
from kernels.base.layout import blocks
from kernels.base.machine import threads, tile_vectors
from kernels.base.simd import LANES
from kernels.base.tiles import tile_fill, tile_load, tile_rank1, tile_store
from kernels.base.workers import run_workers
from kernels.ladder.blocked import Filters, Panel, Rows, convolve, weight_gradient
from kernels.ladder.naive import backward_bias
from kernels.ladder.shapes import Geometry, Rung

#: Up to this many input channels are packed, or read, as they are; more are padded to blocks of 16.
FEW_CHANNELS = 4
# Voxels whose products are added to the weight gradient at a time, but one row at least: their gradients stay
# in the first-level cache.
_VOXELS = 96
# Sums in flight that hide the latency of a fused multiply-add (4 cycles, 2 a cycle).
_LATENCY = 8


class TileShape(NamedTuple):
    """Register tile: ``wide`` voxels of a row by ``cols`` blocks of 16 output channels."""

    wide: int
    cols: int


class _Images(NamedTuple):
    """What the threads of a convolution share."""

    panel: Panel
    filters: Filters
    rows: Rows
    OCB: int
    workers: int


class _Gradients(NamedTuple):
    """What the threads of a weight gradient share; ``taps`` are KD, KH, SD and SH."""

    panel: Panel
    gradient: Panel
    taps: tuple[int, int, int, int]
    sums: Floats
    workers: int


def _convolve(src: Floats, weights: Floats, bias: Floats | None, g: Geometry, adjoint: bool) -> Floats:
    (*_, OW, OC), SW = (g.src_shape, 1) if adjoint else (g.dst_shape, g.stride[2])
    width, tile = _width(src.shape[-1]), tile_shape(OW, blocks(OC))
    worker = _make_convolve(*tile, width, SW)

    def loops(panel: Panel, filters: Filters, rows: Rows, OCB: int) -> None:
        run_workers(worker, threads(), _Images(panel, filters, rows, OCB, threads()))

    return convolve(loops, (width, tile.cols), src, weights, bias, g, adjoint=adjoint)


def _gradients(src: Floats, diff_dst: Floats, g: Geometry) -> tuple[Floats, Floats]:
    (IC, OC), KW = g.channels, g.kernel[2]
    width = _width(IC)
    # The number of chunks depends on the shape alone, and so does the order of the sums.
    chunks = max(1, min(g.out[0], 16 // (blocks(IC) * blocks(OC))))
    worker = _make_accumulate(KW, weight_tile(KW, width), width, g.stride[2])

    def accumulate(panel: Panel, gradient: Panel, kernel: Triple, stride: Triple, sums: Floats) -> None:
        taps = (*kernel[:2], *stride[:2])
        run_workers(worker, threads(), _Gradients(panel, gradient, taps, sums, threads()))

    return weight_gradient(accumulate, width, chunks, src, diff_dst, g), backward_bias(diff_dst)


_rung = Rung(_convolve, _gradients)
forward, backward_data, backward_weights = _rung.forward, _rung.backward_data, _rung.backward_weights


def _width(channels: int) -> int:
    return channels if channels <= FEW_CHANNELS else LANES


@functools.cache
def tile_shape(
    OW: int, OCB: int, sizes: tuple[int, ...] = (24, 12, 8, 6, 4, 3, 2, 1), most_cols: int = 4
) -> TileShape:
    """Register tile for rows of ``OW`` voxels and ``OCB`` channel blocks; ``sizes`` can be its voxels.

    This is the shape with the fewest cycles: tiles times the largest of multiply-adds, loads and latency. The
    last tile of a row is moved back inside the row, so it computes some voxels again: they cost cycles, too.
    """
    best, best_cost = TileShape(1, 1), float("inf")
    for cols in (1, 2, 4):
        for wide in sizes:
            if cols > most_cols or OCB % cols or wide > OW or wide * cols > tile_vectors():
                continue
            cost = -(-OW // wide) * (OCB // cols) * max(wide * cols, wide + cols, _LATENCY)
            if cost < best_cost:
                best, best_cost = TileShape(wide, cols), cost
    return best


def weight_tile(KW: int, width: int) -> int:
    """Return the input channels of the weight-gradient tile, which has all ``KW`` taps of a row."""
    fitting = [n for n in (16, 8, 4, 3, 2, 1) if width % n == 0 and KW * n <= tile_vectors()]
    return max(fitting, default=1)


@specialised
def convolve_rows(
    panel: Panel, filters: Filters, ocb: int, dst: Rows, wide: int, cols: int, width: int, SW: int
) -> Any:
    """Convolve a panel into the rows of ``dst``: ``cols`` output blocks from block ``ocb`` on."""
    step = width * SW
    (KD, KH, KW), (SD, SH, _), (D, H, W) = filters.kernel, filters.stride, panel.extent
    line, run, (planes, lines, OW), strides = W * width, KW * width, dst.size, dst.strides
    for row in range(planes * lines):
        d, h = row // lines, row % lines
        to = dst.at + d * strides[0] + h * strides[1]
        for w_tile in range(0, OW, wide):
            # The last tile is moved back inside; its voxels are written twice.
            w = min(w_tile, OW - wide)
            sums = tile_fill(filters.bias, ocb * LANES, 1, wide, cols)
            y = ocb * panel.blocks * KD * KH * run * LANES
            for icb in range(panel.blocks):
                for kd in range(KD):
                    x = panel.at + ((icb * D + d * SD + kd) * H + h * SH) * line + w * step
                    for _ in range(KH):
                        for k in range(run):
                            sums = tile_rank1(
                                sums, panel.data, x + k, 0, step, filters.weights, y + k * cols * LANES
                            )
                        x, y = x + line, y + run * cols * LANES
            tile_store(sums, dst.data, to + w * strides[2], 0, strides[2], strides[3])


@functools.cache
def _make_convolve(wide: int, cols: int, width: int, SW: int) -> Callable[..., None]:
    """Compile the loop nest for one register tile, channel width and stride along a row."""

    @worker_kernel
    def convolve_share(worker: int, job: Any) -> None:
        src, _, extent, ICB = job.panel
        weights, bias, kernel, stride = job.filters
        dst, _, (OD, OH, OW), strides = job.rows
        tasks = job.OCB // cols * OD * OH
        for task in range(worker * tasks // job.workers, (worker + 1) * tasks // job.workers):
            group, row = task // (OD * OH), task % (OD * OH)
            at = (row // OH * stride[0] * extent[1] + row % OH * stride[1]) * extent[2] * width
            here, taps = Panel(src, at, extent, ICB), Filters(weights, bias, kernel, stride)
            to = group * cols * strides[3] + row // OH * strides[0] + row % OH * strides[1]
            there = Rows(dst, to, (1, 1, OW), strides)
            convolve_rows(here, taps, group * cols, there, wide, cols, width, SW)

    return convolve_share


@specialised
def accumulate_rows(
    panel: Panel,
    gradient: Panel,
    taps: tuple[int, int, int, int],
    parts: tuple[int, int],
    rows: tuple[int, int],
    sums: Floats,
    KW: int,
    inputs: int,
    width: int,
    SW: int,
) -> Any:
    """Add the products of a panel and the first ``rows`` (planes, lines) of a gradient to the sums.

    ``taps`` are KD, KH, SD and SH. The kernel takes the gradient's blocks from ``parts[0]`` to before
    ``parts[1]``; ``sums`` are [OCB][ICB][KD * KH * KW][width][16].
    """
    step = width * SW
    (KD, KH, SD, SH), (OD, OH, OW), ICB = taps, gradient.extent, panel.blocks
    line, count = panel.extent[2] * width, rows[0] * rows[1]
    # Some rows at a time: gradients and sums stay in the first-level cache.
    group = max(1, _VOXELS // OW)
    for begin in range(0, count, group):
        for i in range(parts[0] * ICB * KD * KH, parts[1] * ICB * KD * KH):
            block, tap = i // (KD * KH), i % (KD * KH)
            ocb, icb, kd, kh = block // ICB, block % ICB, tap // KH, tap % KH
            for ic in range(0, width, inputs):
                at = (i * KW * width + ic) * LANES
                tile = tile_load(sums, at, width * LANES, LANES, 0, KW, inputs, 1)
                for row in range(begin, min(begin + group, count)):
                    d, h = row // rows[1], row % rows[1]
                    x = (icb * panel.extent[0] + d * SD + kd) * panel.extent[1] + h * SH + kh
                    x = panel.at + x * line + ic
                    y = gradient.at + ((ocb * OD + d) * OH + h) * OW * LANES
                    for w in range(OW):
                        tile = tile_rank1(
                            tile, panel.data, x + w * step, width, 1, gradient.data, y + w * LANES
                        )
                tile_store(tile, sums, at, width * LANES, LANES, 0)


@functools.cache
def _make_accumulate(KW: int, inputs: int, width: int, SW: int) -> Callable[..., None]:
    """Compile the weight-gradient loops for one register tile, channel width and stride along a row."""

    @worker_kernel
    def accumulate_share(worker: int, job: Any) -> None:
        src, _, extent, ICB = job.panel
        diff_dst, _, size, OCB = job.gradient
        taps, sums, chunks = job.taps, job.sums, job.sums.shape[0]
        tasks = chunks * OCB
        for task in range(worker * tasks // job.workers, (worker + 1) * tasks // job.workers):
            chunk, ocb = task // OCB, task % OCB
            first, end = chunk * size[0] // chunks, (chunk + 1) * size[0] // chunks
            here = Panel(src, first * taps[2] * extent[1] * extent[2] * width, extent, ICB)
            there = Panel(diff_dst, first * size[1] * size[2] * LANES, size, OCB)
            rows, parts = (end - first, size[1]), (ocb, ocb + 1)
            accumulate_rows(here, there, taps, parts, rows, sums[chunk], KW, inputs, width, SW)

    return accumulate_share
