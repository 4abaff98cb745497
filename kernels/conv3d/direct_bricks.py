"""Direct convolution of blocked tensors, brick by brick, for the compiled graph.

The register tiles are those of the rung `kernels.ladder.direct`; what is added is what stands around them. A
thread reads a brick's window normalised (`read`), in a slab that stays in cache, and writes the brick biased
and summed, or masked (`write`). Direct convolution is the choice where Winograd does not pay (1^3
kernels, few voxels) or its rounding is not wanted.

Loop nest  bricks and parts of the output channels | groups, od, oh and ow tiles | icb, kd, kh | kw and ic |
           register tile | `write`
           weight gradient: parts and chunks of bricks | rows | ocb, icb, kd, kh | tile of (kw, ic) x oc
Source     as `kernels.ladder.direct`
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import worker_kernel
from kernels.base.layout import pack_weights, unpack_weights
from kernels.base.machine import threads
from kernels.base.simd import LANES, fence
from kernels.base.workers import run_workers
from kernels.conv3d.bricks import Cut, Plan, add_voxels, count_bricks, locate, share
from kernels.conv3d.read import Inputs, Slab, Window, pack_brick
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.blocked import Filters, Panel, Rows
from kernels.ladder.cook_toom import INPUT
from kernels.ladder.direct import accumulate_rows, convolve_rows, tile_shape, weight_tile

# Bytes of one thread's slab: half of a second-level cache, the rest is for weights.
_CACHED = 512 * 1024


class _Convolution(NamedTuple):
    """What the threads of `convolve` share; ``extent`` is a slab's, ``staged`` where results are."""

    inputs: Inputs
    outputs: Outputs
    filters: Filters
    before: Triple
    cut: Cut
    extent: Triple
    staged: int
    scratch: Floats


class _Gradient(NamedTuple):
    """What the threads of `backward_weights` share; the gradient's slab is at ``packed``."""

    inputs: Inputs
    gradient: Inputs
    before: Triple
    cut: Cut
    kernel: Triple
    extent: Triple
    packed: int
    parts: int
    sums: Floats
    diff_bias: Doubles
    scratch: Floats


def cut_output(dst_size: tuple[int, int, int, int], kernel: Triple, blocks: int) -> Cut:
    """Bricks of whole rows whose slabs of ``blocks`` channel blocks stay in cache."""
    MB, OD, OH, OW = dst_size
    row = (OW + kernel[2] - 1) * blocks * LANES * 4
    best, best_cost = (1, 1), float("inf")
    for planes in range(1, min(OD, 8) + 1):
        lines = int(np.clip(_CACHED // row // (planes + kernel[0] - 1) - kernel[1] + 1, 1, OH))
        lines = -(-OH // -(-OH // lines))
        # Voxels packed for each voxel computed.
        cost = (planes + kernel[0] - 1) * (lines + kernel[1] - 1) / (planes * lines)
        if cost < best_cost:
            best, best_cost = (planes, lines), cost
    return Cut(MB, OD, OH, OW, *best)


def packed_shape(p: Plan) -> tuple[int, int, int, int, int]:
    """Shape of the packed weights: ``(groups, ICB, KD * KH * KW, width, cols * 16)``."""
    cols = tile_shape(p.cut.OW, p.blocks_out).cols
    return p.blocks_out // cols, p.blocks_in, math.prod(p.kernel), p.width, cols * LANES


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool) -> None:
    """Fill weights of `packed_shape`."""
    pack_weights(weights, packed, adjoint=adjoint)


def convolve(p: Plan, inputs: Inputs, weights: Floats, outputs: Outputs, *, adjoint: bool) -> None:
    """Convolve blocked tensors, or one of few channels; see `bricks`."""
    cut, tile, extent = p.cut, tile_shape(p.cut.OW, outputs.blocks), _extent(p.cut, p.kernel)
    staged = -(-inputs.blocks * math.prod(extent) * inputs.width // LANES) * LANES
    size = staged + tile.cols * cut.planes * cut.lines * cut.OW * LANES + finish_size(1, 1)
    # Sums start from zero: `write` adds the bias.
    zeros = np.zeros(outputs.blocks * LANES, np.float32)
    filters = Filters(weights.reshape(-1), zeros, p.kernel, (1, 1, 1))
    scratch = scratchpad("direct bricks", threads(), size)
    job = _Convolution(inputs, outputs, filters, p.before, cut, extent, staged, scratch)
    run_workers(_make_convolve(*tile, inputs.width), threads(), job)


def backward_weights(p: Plan, inputs: Inputs, gradient: Inputs, diff_weights: Floats) -> Doubles:
    """Gradients of weights and bias; see `bricks`."""
    cut, kernel, ICB, OCB = p.cut, p.kernel, inputs.blocks, gradient.blocks
    # Chunks of bricks whose gradients are summed by themselves, whatever the threads.
    chunks, extent = max(1, min(cut.bricks, 16 // (ICB * OCB))), _extent(cut, kernel)
    diff_bias = np.empty((chunks, OCB * LANES))
    packed = ICB * math.prod(extent) * inputs.width
    size = packed + (OCB * cut.planes * cut.lines * cut.OW + 1) * LANES
    scratch = scratchpad("direct bricks", threads(), size)
    panel = scratchpad("weight sums", chunks, OCB, ICB, math.prod(kernel), inputs.width, LANES)
    parts, sums = max(1, min(OCB, 8 // chunks)), panel.reshape(chunks, -1)
    job = _Gradient(inputs, gradient, p.before, cut, kernel, extent, packed, parts, sums, diff_bias, scratch)
    run = _make_accumulate(kernel[2], weight_tile(kernel[2], inputs.width), inputs.width)
    run_workers(run, threads(), job)
    unpack_weights(panel, diff_weights)
    return diff_bias


def _extent(cut: Cut, kernel: Triple) -> Triple:
    """Voxels of a slab: those of a brick and what its taps meet around it."""
    return cut.planes + kernel[0] - 1, cut.lines + kernel[1] - 1, cut.OW + kernel[2] - 1


@functools.cache
def _make_convolve(wide: int, cols: int, width: int) -> Callable[..., None]:
    finishing = finish_size(1, 1)

    @worker_kernel
    def convolve_share(worker: int, job: Any) -> None:
        inputs, cut, own = job.inputs, job.cut, job.scratch[worker]
        ICB, groups = inputs.blocks, job.outputs.blocks // cols
        slab = Panel(own, 0, job.extent, ICB)
        begin, stop_unit = share(count_bricks(cut) * groups, worker, job.scratch.shape[0])
        for brick in range(begin // groups, -(-stop_unit // groups)):
            first = max(begin - brick * groups, 0) * cols
            end = min(stop_unit - brick * groups, groups) * cols
            n, start, stop = locate(cut, brick)
            origin = (start[0] - job.before[0], start[1] - job.before[1], -job.before[2])
            pack_brick(inputs, Window(n, origin, job.extent), own, Slab(0, 0, 0, 0), INPUT, 1, 1)
            extent, row = (stop[0] - start[0], cut.lines, cut.OW), cut.OW * LANES
            strides = (cut.lines * row, row, LANES, extent[0] * cut.lines * row)
            for ocb in range(first, end, cols):
                convolve_rows(
                    slab, job.filters, ocb, Rows(own, job.staged, extent, strides), wide, cols, width, 1
                )
                for c in range(cols):
                    at = job.staged + c * extent[0] * extent[1] * extent[2] * LANES
                    staged = Staged(at, 0, extent, own.size - finishing)
                    finish_block(job.outputs, cut, brick, ocb + c, own, staged, 1, 1)
        fence()

    return convolve_share


@functools.cache
def _make_accumulate(KW: int, inputs: int, width: int) -> Callable[..., None]:
    @worker_kernel
    def accumulate_share(worker: int, job: Any) -> None:
        cut, own, sums = job.cut, job.scratch[worker], job.sums
        OCB, taps = job.gradient.blocks, (job.kernel[0], job.kernel[1], 1, 1)
        inner, bricks, chunks = (cut.planes, cut.lines, cut.OW), count_bricks(cut), sums.shape[0]
        voxels, block = (
            inner[0] * inner[1] * inner[2],
            job.inputs.blocks * taps[0] * taps[1] * KW * width * LANES,
        )
        slab = Panel(own, 0, job.extent, job.inputs.blocks)
        gradient = Panel(own, job.packed, inner, OCB)
        for task in range(worker, chunks * job.parts, job.scratch.shape[0]):
            chunk, part = task // job.parts, task % job.parts
            parts = (part * OCB // job.parts, (part + 1) * OCB // job.parts)
            for i in range(parts[0] * block, parts[1] * block):
                sums[chunk, i] = 0.0
            if part == 0:
                job.diff_bias[chunk] = 0.0
            first, end = share(bricks, chunk, chunks)
            for brick in range(first, end):
                n, start, stop = locate(cut, brick)
                origin = (start[0] - job.before[0], start[1] - job.before[1], -job.before[2])
                pack_brick(job.inputs, Window(n, origin, job.extent), own, Slab(0, 0, 0, 0), INPUT, 1, 1)
                at = Slab(job.packed, 0, 0, 0)
                pack_brick(job.gradient, Window(n, start, inner), own, at, INPUT, 1, 1)
                if part == 0:
                    scratch = own[own.size - LANES :]
                    add_voxels(own, job.packed, voxels, job.diff_bias[chunk], scratch)
                rows = (stop[0] - start[0], stop[1] - start[1])
                accumulate_rows(slab, gradient, taps, parts, rows, sums[chunk], KW, inputs, width, 1)

    return accumulate_share
