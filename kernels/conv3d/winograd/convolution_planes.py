"""Winograd convolution where weights are large and tiles few: plane of points after plane.

Brick after brick, each thread would read all transformed weights, megabytes, for a few tiles, and where
there is one brick all threads would pack it. So the source is packed first, as `planes`. Each plane is a
convolution along w alone, of all tiles at once, whose weights nobody else needs; its results take its place::

    planes[block][row][w][16]  --transform_in, multiply, transform_out-->  planes[ocb][row][w][16]
    planes                     --epilogue, transforms along h and d----->  destination

Loop nest: pack || planes of points | transform in | points along w, groups, icb, ic: register tile |
transform out || ocb, bricks: epilogue.
"""

import functools
from collections.abc import Callable

from kernels.checks import Floats, Triple
from kernels.compiler import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    signed,
    worker_kernel,
)
from kernels.conv3d.bricks import Cut, Epilogue, Prologue, count_bricks, finish_block
from kernels.conv3d.cook_toom import INPUT, sizes
from kernels.conv3d.epilogue import finish_size
from kernels.conv3d.winograd.cutting import gemm_tile, multiplied_at_once, slab_planes
from kernels.conv3d.winograd.planes import Planes, pack_planes
from kernels.conv3d.winograd.stages import multiply, slot_size, transform_in, transform_out
from kernels.machine import threads
from kernels.memory import scratchpad
from kernels.simd import LANES, address, fence


def convolve(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    epilogue: Epilogue,
    cut: Cut,
    tile: Triple,
) -> None:
    """Convolve blocked tensors, stride 1; arguments as of `convolution.convolve`."""
    ICB, OCB = prologue.blocks, epilogue.blocks
    T, widest = multiplied_at_once(cut, tile, ICB, OCB), max(ICB, OCB)
    rows, _ = gemm_tile(T, OCB)
    # Results take the source's place.
    planes = pack_planes("planes", prologue, src_size, before, cut, tile, INPUT, widest)
    workers = threads()
    size = (sizes(INPUT, tile[2])[1] + 1) * slot_size(widest, T) + finish_size(tile[0], tile[1])
    scratch = scratchpad("winograd", workers, size)
    cols = weights.shape[-1] // LANES
    for worker in (_make_products(*tile, rows, cols), _make_finish(*tile)):
        run_workers(
            share_planes,
            worker,
            planes,
            weights.reshape(-1),
            epilogue,
            cut,
            scratch,
        )


@parallel_kernel
def share_planes(
    address: int,
    planes: Planes,
    weights: Floats,
    epilogue: Epilogue,
    cut: Cut,
    scratch: Floats,
) -> None:
    """Driver of both stages' workers: each its share, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, planes, weights, epilogue, cut, scratch)


@functools.cache
def _make_products(md: int, mh: int, mw: int, rows: int, cols: int) -> Callable[..., None]:
    PW, count = sizes(INPUT, mw)[1], slab_planes((md, mh, mw))
    halo = sizes(INPUT, mw)[0] - mw

    @worker_kernel
    def convolve_planes(
        worker: int,
        planes: Planes,
        weights: Floats,
        epilogue: Epilogue,
        cut: Cut,
        scratch: Floats,
    ) -> None:
        data, apart, ICB, _ = planes
        OCB, tiles = epilogue.blocks, -(-cut.OW // mw)
        lines = count_bricks(cut) * (cut.planes // md) * (cut.lines // mh)
        T, extent = lines * tiles, (1, lines, tiles * mw + halo)
        slot, own = slot_size(max(ICB, OCB), T), scratch[worker]
        M, V = 0, slot
        each = OCB * ICB * LANES * LANES
        for plane in range(worker, count, scratch.shape[0]):
            at = plane * apart
            transform_in(data, at, extent, ICB, own, V, slot, T, 1, INPUT, mw)
            following = at + min(scratch.shape[0], count - 1 - plane) * apart
            for point in range(PW):
                w = (plane * PW + point) * each
                # The next point's weights, and a part of the next plane.
                near, source = address(weights, w + each), following + point * apart // PW
                soon = (near, address(data, source), each // LANES)
                v, m = V + point * slot, M + point * slot
                multiply(own, v, m, ICB, T, 0, OCB, weights, w, soon, rows, cols)
            for ocb in range(OCB):
                transform_out(own, M, slot, data, at, lines, tiles, ocb, mw)

    return convolve_planes


@functools.cache
def _make_finish(md: int, mh: int, mw: int) -> Callable[..., None]:
    finishing = finish_size(md, mh)

    @worker_kernel
    def finish_share(
        worker: int,
        planes: Planes,
        weights: Floats,
        epilogue: Epilogue,
        cut: Cut,
        scratch: Floats,
    ) -> None:
        # The weights are given to both stages, and were needed by the first.
        bricks, wide = count_bricks(cut), -(-cut.OW // mw) * mw
        extent = (cut.planes // md, cut.lines // mh, wide)
        own = scratch[worker]
        last = own[own.size - finishing :]
        for unit in range(worker, epilogue.blocks * bricks, scratch.shape[0]):
            ocb, brick = unit // bricks, unit % bricks
            at = unit * extent[0] * extent[1] * wide * LANES
            finish_block(
                epilogue, cut, brick, ocb, planes.data, at, planes.apart, extent, last, md, mh
            )
        fence()

    return finish_share
