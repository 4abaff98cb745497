"""Winograd convolution and both its gradients, brick by brick: one loop nest.

    V = B^T source tile B     E = A inner tile A^T      source has a halo, inner has none
    result = A^T [ sum over blocks of V * weights ] A           `multiply`
    sums  += V * E, and at the end diff_weights = G^T sums G    `accumulate`

                      source     inner      makes
    convolve          src        -          results: dst (diff_src of diff_dst with adjoint weights)
    backward_weights  src        diff_dst   sums: diff_weights
    backward          diff_dst   src        results: diff_src, and sums: diff_weights

Loop nest  chunks of bricks | slabs | planes of points | blocks: transform in along w | points along w:
           products with weights, products with inner | blocks: transform out along w || blocks: `write`
Both       ``diff_weights[k] = sum over i of src[i + k] g[i]`` is also the ``sum over j of g[j - k] src[j]``:
gradients  the weight gradient of a convolution *from* g = diff_dst, with its taps reversed. Then the halo is
           around g for both gradients, and both multiply the same tiles: g, often formed of two tensors, is
           read once for two, and so is src, which the epilogue's mask reads too::

               slab of g    --w-->  V --* weights-->  M --w-->  in src's place in its slab --> diff_src
               slab of src  --w-->  E --* V-------->  sums of each point ------------------> diff_weights

           This pays where slabs, weights and sums share the second-level cache: few channels, many tiles
Numerics   float32; chunks are added in order, so a run with as many threads repeats bit for bit
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import kernel, specialised, worker_kernel
from kernels.base.machine import threads
from kernels.base.simd import LANES, address, fence
from kernels.base.workers import run_workers
from kernels.conv3d import first_layer, many_channels
from kernels.conv3d import winograd_stages as stages
from kernels.conv3d.bricks import (
    EMPTY,
    Cut,
    Plan,
    add_voxels,
    count_bricks,
    locate,
    next_brick,
    share,
    source_tensors,
)
from kernels.conv3d.first_layer import accumulate_rows, as_vectors, multiply_rows
from kernels.conv3d.prefetch import NO_REGION, Region, part_of, tensors, upcoming
from kernels.conv3d.read import Inputs, Window, inputs, pack_brick
from kernels.conv3d.winograd_stages import Layout, Panel, Sums, Tiles, slab_planes, tile_count
from kernels.conv3d.winograd_weights import pack_weights, transform_back
from kernels.conv3d.write import Outputs, Staged, finish_block, outputs
from kernels.deferred.tensors import NO_SOURCE
from kernels.ladder.cook_toom import DIFF_DST, INPUT, sizes
from kernels.ladder.direct import tile_shape, weight_tile

# Two schedules: load and store all sums once a brick, or write and read all tiles once (`many_channels`).
# Above this many sums for each value of the tiles the second moves fewer bytes.
_SUMS_PER_TILE = 0.3
# With more sums and weights than this for each value of the tiles, the two gradients take less time one after
# the other.
_SUMS_OF_BOTH = 0.4

_NO_INPUTS, _NO_OUTPUTS = inputs(NO_SOURCE), outputs((NO_SOURCE.data, NO_SOURCE.data))


class Job(NamedTuple):
    """What the threads share; a kernel that does not use an item gets an empty one."""

    source: Inputs
    before: Triple  # zeros before the source's first voxel
    cut: Cut
    layout: Layout
    chunks: int  # of bricks times groups
    groups: int = 1  # of results
    inner: Inputs = _NO_INPUTS
    outputs: Outputs = _NO_OUTPUTS
    weights: Floats = EMPTY
    run: int = 0  # taps and channels along w of a first layer
    sums: Floats = EMPTY
    diff_bias: Doubles = np.zeros((0, 0))
    scratch: Floats = np.zeros((0, 0), np.float32)


class Form(NamedTuple):
    """Constants of a kernel: tile, register tiles (rows 0: not made), channels in a block, taps along w."""

    tile: Triple
    products: tuple[int, int]
    sums: tuple[int, int]
    width: int = LANES
    KW: int = 0


def packed_shape(p: Plan) -> tuple[int, int, int, int, int]:
    """Shape of the transformed weights: ``(points, groups, ICB, 16, cols * 16)``, or as `first_layer`."""
    if p.width < LANES:
        return first_layer.packed_shape(p)
    _, cols = stages.product_tile(tile_count(p.cut, p.form), p.blocks_out)
    return stages.points(p.form), p.blocks_out // cols, p.blocks_in, LANES, cols * LANES


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool) -> None:
    """Fill weights of `packed_shape`."""
    pack_weights(weights, p.form, packed, adjoint=adjoint)


def both_pay(p: Plan) -> bool:
    """Whether `backward` takes less time than the two gradients one by one."""
    return _sums_per_value(p) <= _SUMS_OF_BOTH


def _sums_per_value(p: Plan) -> float:
    tiles, ICB, OCB = p.cut.bricks * tile_count(p.cut, p.form), p.blocks_in, p.blocks_out
    return ICB * OCB * LANES / (tiles * (ICB + OCB))


def convolve(p: Plan, source: Inputs, weights: Floats, to: Outputs, *, adjoint: bool) -> None:
    """Convolve blocked tensors, or a first layer's few channels; see `bricks`."""
    cut, tile, cols = p.cut, p.form, weights.shape[-1] // LANES
    if p.width < LANES:
        form = Form(tile, (tile_shape(cut.OW, to.blocks).wide, cols), (0, 0), p.width)
        source, groups = as_vectors(source), 1
    else:
        form = Form(tile, (stages.product_tile(tile_count(cut, tile), to.blocks)[0], cols), (0, 0))
        groups = to.blocks // cols
    layout = stages.lay_out(cut, tile, source.blocks, 0, to.blocks, p.width)
    job = Job(source, p.before, cut, layout, threads(), groups, outputs=to)
    _run(form, job._replace(weights=weights.reshape(-1), run=weights.shape[3]))


def backward_weights(p: Plan, source: Inputs, gradient: Inputs, diff_weights: Floats) -> Doubles:
    """Gradients of weights and bias; see `bricks`."""
    cut, tile, width, ICB, OCB = p.cut, p.form, p.width, source.blocks, gradient.blocks
    if tile[2] > 1 and _sums_per_value(p) > _SUMS_PER_TILE:
        return many_channels.backward_weights(p, source, gradient, diff_weights)
    if width < LANES:
        form = Form(tile, (0, 0), (weight_tile(p.kernel[2], width), 1), width, p.kernel[2])
        source, block = as_vectors(source), p.kernel[2] * width * OCB * LANES
    else:
        form, block = Form(tile, (0, 0), stages.sums_tile(OCB)), ICB * LANES * OCB * LANES
    diff_bias = np.empty((_brick_chunks(cut), OCB * LANES))
    sums = scratchpad("winograd sums", len(diff_bias), stages.points(tile) * block)
    layout = stages.lay_out(cut, tile, ICB, OCB, 0, width)
    job = Job(source, p.before, cut, layout, len(diff_bias), inner=gradient)
    _run(form, job._replace(sums=sums.reshape(-1), diff_bias=diff_bias))
    transform_back(tile, sums, diff_weights, width, form.sums[1] * LANES)
    return diff_bias


def backward(
    p: Plan, gradient: Inputs, weights: Floats, source: Inputs, to: Outputs, diff_weights: Floats
) -> None:
    """Gradients of source and weights in one pass; weights are adjoint, padding is "same"."""
    tile, ICB, OCB, chunks = p.form, source.blocks, gradient.blocks, _brick_chunks(p.cut)
    rows, _ = stages.product_tile(tile_count(p.cut, tile), ICB)
    form = Form(tile, (rows, weights.shape[-1] // LANES), stages.sums_tile(ICB))
    sums = scratchpad("winograd sums", chunks, stages.points(tile) * OCB * LANES * ICB * LANES)
    layout = stages.lay_out(p.cut, tile, OCB, ICB, ICB)
    job = Job(gradient, p.before, p.cut, layout, chunks, inner=source, outputs=to)
    _run(form, job._replace(weights=weights.reshape(-1), sums=sums.reshape(-1)))
    # The sums are of a convolution from the gradient to the source.
    transform_back(tile, sums, diff_weights, LANES, form.sums[1] * LANES, adjoint=True)


def _brick_chunks(cut: Cut) -> int:
    """Chunks of bricks, each with sums of its own: one for each thread."""
    return max(1, min(cut.bricks, threads()))


def _run(form: Form, job: Job) -> None:
    job = job._replace(scratch=scratchpad("winograd", threads(), job.layout.size))
    run_workers(_make_kernel(form), len(job.scratch), job)


@functools.cache
def _make_kernel(form: Form) -> Callable[..., None]:
    (md, mh, mw), (rows, cols), (inner_rows, inner_cols), width, KW = form
    planes, few = slab_planes(form.tile), int(width < LANES)
    makes_results, makes_sums = int(rows > 0), int(inner_rows > 0)

    @worker_kernel
    def take_bricks(worker: int, job: Any) -> None:
        cut, groups, here, T = job.cut, job.groups, job.layout.result, job.layout.tiles
        own, blocks = job.scratch[worker], job.outputs.blocks // job.groups
        chunk_size, plane_size = job.sums.size // job.chunks, job.sums.size // job.chunks // planes
        for chunk in range(worker, job.chunks, job.scratch.shape[0]):
            begin, end = share(count_bricks(cut) * groups, chunk, job.chunks)
            if makes_sums and not makes_results:
                job.diff_bias[chunk] = 0.0
            for brick in range(begin // groups, -(-end // groups)):
                results = max(begin - brick * groups, 0) * blocks, min(end - brick * groups, groups) * blocks
                pack_slabs(job, brick, own, md, mh, few, makes_sums)
                if makes_sums and not makes_results:
                    at = job.layout.inner.sums
                    add_voxels(own, at, 1, job.diff_bias[chunk], own[at + job.inner.blocks * LANES :])
                source, inner, masks = next_regions(job, brick, md > 1, mh > 1)
                for plane in range(planes):
                    if not few:
                        v = Tiles(own, job.layout.V, job.layout.point, T, job.source.blocks)
                        at = job.layout.source.at + plane * job.layout.source.plane
                        stages.transform_in(Panel(own, at), job.layout.extent, v, 1, INPUT, mw)
                    if makes_sums:
                        sums = Sums(job.sums, chunk * chunk_size + plane * plane_size, brick == begin)
                        ahead = upcoming(NO_REGION if few or makes_results else source, inner, plane, planes)
                        if few:
                            accumulate_rows(job, own, plane, sums, ahead, KW, inner_rows, width)
                        else:
                            accumulate_plane(job, own, plane, sums, ahead, mw, inner_rows, inner_cols)
                    if makes_results and few:
                        multiply_rows(job, own, plane, rows, cols, width)
                    elif makes_results:
                        ahead = upcoming(source, NO_REGION if makes_sums else masks, plane, planes)
                        multiply_plane(job, own, plane, results, ahead, mw, rows, cols)
                for block in range(results[0], results[1]):
                    staged = Staged(here.at + block * T * mw * LANES, here.plane, here.extent, here.scratch)
                    finish_block(job.outputs, cut, brick, block, own, staged, md, mh)
        fence()

    return take_bricks


@specialised
def pack_slabs(job: Any, brick: int, own: Any, md: int, mh: int, few: int, with_inner: int) -> None:
    """Pack a brick of the source with its halo, and of the inner tensor."""
    layout = job.layout
    n, start, _ = locate(job.cut, brick)
    left = 1 if few else job.before[2]
    corner = (start[0] - job.before[0], start[1] - job.before[1], -left)
    pack_brick(job.source, Window(n, corner, layout.extent), own, layout.source, INPUT, md, mh)
    if with_inner:
        window = Window(n, start, layout.inner_extent)
        pack_brick(job.inner, window, own, layout.inner, DIFF_DST, md, mh)


@kernel
def next_regions(job: Any, brick: int, halo_d: bool, halo_h: bool) -> tuple[Region, Region, Region]:
    """What the next brick reads of source and inner tensor, and this brick's `write` of what it masks."""
    cut, out = job.cut, job.outputs
    n, start, _ = locate(cut, brick)
    size = (cut.OD, cut.OH, cut.OW)
    source = next_brick(source_tensors(job.source), cut, brick, job.before, job.source.size, halo_d, halo_h)
    inner = next_brick(source_tensors(job.inner), cut, brick, (0, 0, 0), size, False, False)
    masked = tensors(out.mask_a.x, EMPTY, out.mask_b.x, EMPTY, out.blocks_a, out.blocks)
    return source, inner, Region(masked, n, size, start, cut.planes, cut.lines)


@specialised
def multiply_plane(
    job: Any, own: Any, plane: int, results: Any, ahead: Any, mw: int, rows: int, cols: int
) -> None:
    """Multiply a transformed plane by the weights of its points; transform products back along w."""
    PW = sizes(INPUT, mw)[1]
    layout, ICB, T = job.layout, job.source.blocks, job.layout.tiles
    size, step = job.outputs.blocks * ICB * LANES * LANES, layout.point
    for point in range(PW):
        v = Tiles(own, layout.V + point * step, step, T, ICB)
        m = Tiles(own, v.at - step, step, T, job.outputs.blocks)
        at = (plane * PW + point) * size
        lines = part_of(ahead, point, PW, address(job.weights, at + size))
        stages.multiply(v, Panel(job.weights, at), m, results, True, lines, rows, cols)
    m = Tiles(own, layout.V - step, step, T, job.outputs.blocks)
    to = Panel(own, layout.result.at + plane * layout.result.plane)
    for block in range(results[0], results[1]):
        stages.transform_out(m, block, to, mw)


@specialised
def accumulate_plane(
    job: Any, own: Any, plane: int, sums: Any, ahead: Any, mw: int, rows: int, cols: int
) -> None:
    """Transform a plane of the inner tensor along w, and add its products with the source to the sums."""
    PW = sizes(INPUT, mw)[1]
    layout, T = job.layout, job.layout.tiles
    ICB, OCB = job.source.blocks, job.inner.blocks
    e = Tiles(own, layout.E, layout.inner_point, T, OCB)
    at = layout.inner.at + plane * layout.inner.plane
    stages.transform_in(Panel(own, at), layout.inner_extent, e, cols, DIFF_DST, mw)
    for point in range(PW):
        v = Tiles(own, layout.V + point * layout.point, layout.point, T, ICB)
        e = Tiles(own, layout.E + point * layout.inner_point, layout.inner_point, T, OCB)
        to = Sums(sums.data, sums.at + point * ICB * OCB * LANES * LANES, sums.fresh)
        stages.accumulate(v, e, to, part_of(ahead, point, PW, 0), rows, cols)
