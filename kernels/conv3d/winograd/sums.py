"""What all weight gradients in the Winograd domain share: driver, register tile, and the way back.

    diff_weights = G^T [ sums ] G       sums: of products of transformed tiles, at each point

Source: as `weight_gradient`.
"""

import functools
import math
from collections.abc import Callable

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import call_worker, parallel_kernel, prange, signed
from kernels.base.layout import WeightsOrder, unpack_weights_part, weights_order
from kernels.base.machine import threads, tile_vectors
from kernels.base.simd import LANES, load, store
from kernels.conv3d.bricks import Cut
from kernels.conv3d.read import Inputs
from kernels.conv3d.transform import scratch_vectors, transform_tile
from kernels.ladder.cook_toom import DIFF_WEIGHTS, sizes


def register_tile(OCB: int) -> tuple[int, int]:
    """Input channels and blocks of output channels of the register tile."""
    if OCB % 2 == 0 and tile_vectors() >= 16:
        return 8, 2
    return (16, 1) if tile_vectors() >= 16 else (4, 1) if tile_vectors() >= 4 else (2, 1)


def brick_chunks(cut: Cut) -> int:
    """Chunks that the bricks are shared out in, each with sums of its own: one a thread."""
    return max(1, min(cut.bricks, threads()))


@parallel_kernel
def gather_bricks(
    address: int,
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    gradient: Inputs,
    cut: Cut,
    sums: Floats,
    diff_bias: Doubles,
    scratch: Floats,
) -> None:
    """Driver of the gradient's workers: each its bricks, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, prologue, src_size, before, gradient, cut, sums, diff_bias, scratch)


def transform_back(
    tile: Triple, sums: Floats, diff_weights: Floats, width: int, lanes: int, *, adjoint: bool = False
) -> None:
    """Add up the chunks of sums, transform them to gradients, and undo the blocks.

    Parameters
    ----------
    tile : (md, mh, mw)
        Along an axis where it is 1 the taps are part of a block of sums.
    sums : ndarray, shape=(chunks, points * groups * ICB * block), float32
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    width, lanes : int
        Input channels in a block, and output channels in a group.
    adjoint : bool
        The sums are those of the adjoint convolution; see `layout.pack_weights`.
    """
    order = weights_order(diff_weights.shape, adjoint=adjoint)
    taps = math.prod(sizes(DIFF_WEIGHTS, m)[1] for m in tile)
    block = order.taps // taps * width * lanes
    vectors = math.prod(sizes(DIFF_WEIGHTS, m)[0] for m in tile) + scratch_vectors(DIFF_WEIGHTS, *tile)
    scratch = scratchpad("winograd", threads(), vectors * LANES + taps * block)
    _make_inverse(*tile)(sums, diff_weights.reshape(-1), order, block, width, lanes, scratch)


@functools.cache
def _make_inverse(md: int, mh: int, mw: int) -> Callable[..., None]:
    (PD, _), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    kind, scratch_at = DIFF_WEIGHTS, PD * PH * PW * LANES
    panel = scratch_at + scratch_vectors(kind, md, mh, mw) * LANES
    tile_strides = (PH * PW * LANES, PW * LANES, LANES)

    @parallel_kernel
    def inverse(
        sums: Floats,
        diff_weights: Floats,
        order: WeightsOrder,
        block: int,
        width: int,
        lanes: int,
        scratch: Floats,
    ) -> None:
        chunks, workers = sums.shape[0], scratch.shape[0]
        ICB = -(-order.inputs // width)
        parts = -(-order.outputs // lanes) * ICB
        to_strides = (KH * KW * block, KW * block, block)
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for part in range(worker, parts, workers):
                for i in range(0, block, LANES):
                    for point in range(PD * PH * PW):
                        at = (point * parts + part) * block + i
                        total = load(sums[0], at)
                        for chunk in range(1, chunks):
                            total = total + load(sums[chunk], at)
                        store(own, point * LANES, total)
                    to = panel + i
                    transform_tile(
                        own, 0, tile_strides, own, to, to_strides, own, scratch_at, kind, md, mh, mw
                    )
                group, icb = part // ICB, part % ICB
                unpack_weights_part(own, panel, 1, 0, diff_weights, order, group, icb, width, lanes)

    return inverse
