"""Max pooling of a source that is still to be normalised.

    y = act(scale * x + shift)         dst[od, oh, ow] = max over kd, kh, kw of y[od*KD + kd, ...]

Idea       A stored ``x`` is read once more, here, and nothing but the pooled values is written. ``y``
           is formed before the maximum is taken: where ``scale`` is negative, the largest ``y`` belongs
           to the smallest ``x``. Of equal items the first wins and NaN wins over numbers, as in
           `kernels.ops.pooling`: ReLU makes many equal zeros, whose gradient the mask drops.
Loop nest  forward: n, cb, od, oh | ow | tap                         (| vector of 16 channels)
           backward: n, cb, d, band | h | ow, kw
Traffic    Forward reads ``x`` once and writes 1.25 / 8 of it (window 2^3). Backward reads the 1.25 / 8
           and writes ``dst``; it reads ``dst`` if it adds to it, and ``x`` for the mask.
Saves      ``argmax``, one byte an item of ``dst``
"""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Bytes, Floats, Triple
from kernels.base.jit import parallel_kernel, prange, split_index
from kernels.base.simd import (
    LANES,
    broadcast,
    load,
    load_bytes,
    read,
    store,
    store_bytes,
    where_above,
    where_equal,
)
from kernels.deferred.masking import band_of_task, bands, clear, finish, flat
from kernels.deferred.normalizing import flat_source
from kernels.deferred.tensors import Mask, Shape, Source


def forward(source: Source, dst: Floats, argmax: Bytes, size: Triple = (2, 2, 2)) -> None:
    """Largest item of each window.

    Parameters
    ----------
    source : Source, data of shape (MB, CB, ID, IH, IW, 16)
    dst : float32 array, shape=(MB, CB, ID // KD, IH // KH, IW // KW, 16)
        Filled, a plain tensor.
    argmax : uint8 array, shape of ``dst``
        Filled with the tap that won, ``(kd*KH + kh)*KW + kw``.
    size : (KD, KH, KW)
        The window, of at most 256 taps.
    """
    _make_forward(*size)(
        flat_source(source), source.data.shape, dst.reshape(-1), dst.shape, argmax.reshape(-1)
    )


def backward(
    diff_dst: Floats,
    argmax: Bytes,
    dst: Floats,
    accumulate: bool = False,
    mask: Mask | None = None,
    size: Triple = (2, 2, 2),
) -> None:
    """Gradient of the source: each window's goes to its largest item.

    Parameters
    ----------
    diff_dst : float32 array, shape=(MB, CB, OD, OH, OW, 16)
    argmax : uint8 array, shape of ``diff_dst``
    dst : float32 array, shape=(MB, CB, ID, IH, IW, 16)
        The gradient is written, or added to what is there.
    accumulate : bool
    mask : Mask, optional
        If given, what is written is ``dz``, and the mask's sums are filled.
    size : (KD, KH, KW)
    """
    _make_backward(*size)(
        diff_dst.reshape(-1),
        diff_dst.shape,
        argmax.reshape(-1),
        dst.reshape(-1),
        dst.shape,
        accumulate,
        flat(mask),
    )


@functools.cache
def _make_forward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    """Kernel for one window; its taps are constants, so the compiler unrolls the loops over them."""

    @parallel_kernel
    def forward(source: Source, shape: Shape, dst: Floats, dst_shape: Shape, argmax: Bytes) -> None:
        _, _, ID, IH, IW, _ = shape
        MB, CB, OD, OH, OW, _ = dst_shape
        x, scales, shifts, slope = source[:4]
        slope32 = np.float32(slope)
        for row in prange(MB * CB * OD * OH):
            plane, oh = split_index(row, OH)
            block, od = plane // OD, plane % OD
            channel = block % CB * LANES
            scale, shift = load(scales, channel), load(shifts, channel)
            slopes = broadcast(slope32)
            first = ((block * ID + od * KD) * IH + oh * KH) * IW
            for ow in range(OW):
                best = read(load(x, (first + ow * KW) * LANES), scale, shift, slopes)
                winner = broadcast(np.float32(0))
                for tap in range(1, KD * KH * KW):
                    kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
                    voxel = first + (kd * IH + kh) * IW + ow * KW + kw
                    y = read(load(x, voxel * LANES), scale, shift, slopes)
                    winner = where_above(y, best, broadcast(np.float32(tap)), winner)
                    best = where_above(y, best, y, best)
                at = (row * OW + ow) * LANES
                store(dst, at, best)
                store_bytes(argmax, at, winner)

    return forward


@functools.cache
def _make_backward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    @parallel_kernel
    def backward(
        diff_dst: Floats,
        diff_shape: Shape,
        argmax: Bytes,
        dst: Floats,
        shape: Shape,
        accumulate: bool,
        mask: Mask,
    ) -> None:
        MB, CB, D, H, W, _ = shape
        _, _, OD, OH, OW, _ = diff_shape
        for task in prange(MB * CB * D * bands(H, W)):
            first, count, block, partial = band_of_task(task, shape)
            clear(mask, block * LANES, partial)
            zero = broadcast(np.float32(0))
            for row in range(first // W, (first + count) // W):
                plane, h = row // H, row % H
                d, image = plane % D, plane // D
                # What fills no window has no gradient.
                covered = OW if d // KD < OD and h // KH < OH else 0
                pooled = ((image * OD + d // KD) * OH + h // KH) * OW
                tap = (d % KD * KH + h % KH) * KW
                for ow in range(covered):
                    diff = load(diff_dst, (pooled + ow) * LANES)
                    winner = load_bytes(argmax, (pooled + ow) * LANES)
                    for kw in range(KW):
                        to = (row * W + ow * KW + kw) * LANES
                        dy = where_equal(winner, broadcast(np.float32(tap + kw)), diff, zero)
                        if accumulate:
                            dy = dy + load(dst, to)
                        store(dst, to, dy)
                if not accumulate:
                    for w in range(covered * KW, W):
                        store(dst, (row * W + w) * LANES, zero)
                finish(dst, row * W, W, mask, block * LANES, partial)

    return backward
