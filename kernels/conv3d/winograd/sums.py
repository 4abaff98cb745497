"""What all weight gradients in the Winograd domain share: driver, register tile, and the way back.

    diff_weights = G^T [ sums ] G       sums: of products of transformed tiles, at each point

Source: as `weight_gradient`.
"""

import functools
from collections.abc import Callable

import numpy as np

from kernels.checks import Doubles, Floats, Triple
from kernels.compiler import call_worker, parallel_kernel, prange, signed
from kernels.conv3d.bricks import Cut, Prologue
from kernels.conv3d.cook_toom import DIFF_WEIGHTS, sizes
from kernels.conv3d.transform import scratch_vectors, transform_tile
from kernels.machine import threads, tile_vectors
from kernels.simd import LANES, load, store


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
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    gradient: Prologue,
    cut: Cut,
    sums: Floats,
    diff_bias: Doubles,
    scratch: Floats,
) -> None:
    """Driver of the gradient's workers: each its bricks, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(
            address,
            worker,
            prologue,
            src_size,
            before,
            gradient,
            cut,
            sums,
            diff_bias,
            scratch,
        )


def transform_back(tile: Triple, sums: Floats, panel: Floats, parts: int, block: int) -> None:
    """Add up the chunks of sums, and transform them to gradients.

    Parameters
    ----------
    tile : (md, mh, mw)
    sums : ndarray, shape=(chunks, points * parts * block), float32
    panel : flat float32 array
        Filled, ``(parts, taps, block)``; an axis that is not transformed has one tap.
    parts, block : int
    """
    _make_inverse(*tile)(sums, panel, parts, block)


@functools.cache
def _make_inverse(md: int, mh: int, mw: int) -> Callable[..., None]:
    (PD, KD), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    kind, scratch = DIFF_WEIGHTS, PD * PH * PW * LANES
    vectors = PD * PH * PW + scratch_vectors(kind, md, mh, mw)
    tile_strides = (PH * PW * LANES, PW * LANES, LANES)

    @parallel_kernel
    def inverse(sums: Floats, panel: Floats, parts: int, block: int) -> None:
        chunks = sums.shape[0]
        to_strides = (KH * KW * block, KW * block, block)
        for task in prange(parts):
            part = signed(task)
            own = np.empty(vectors * LANES, np.float32)
            for i in range(0, block, LANES):
                for point in range(PD * PH * PW):
                    at = (point * parts + part) * block + i
                    total = load(sums[0], at)
                    for chunk in range(1, chunks):
                        total = total + load(sums[chunk], at)
                    store(own, point * LANES, total)
                to = part * KD * KH * KW * block + i
                transform_tile(
                    own, 0, tile_strides, panel, to, to_strides, own, scratch, kind, md, mh, mw
                )

    return inverse
