"""Max pooling: the largest item of each window, and where it was.

    dst[n, od, oh, ow, c] = max over kd, kh, kw of src[n, od*KD + kd, oh*KH + kh, ow*KW + kw, c]

The stride is the window, so windows do not overlap; the rest at the end of an axis that fills no window is
left out ("valid"). Of equal items the first one wins, and NaN wins over numbers. (TensorFlow's 3-D pooling
gives the gradient to each of equal items, its 2-D pooling to the first. After a ReLU only zeros are equal,
and their gradient is dropped, so networks with ReLU do not see the difference.)

float64 runs the NumPy expressions, which are the reference. float32 runs the kernels on blocks of 16
channels, whose source may still have to be normalised (`kernels.deferred`). A layout is only strides to
them: eager operators pass channels last as they are, with zeros up to a whole block of channels.

Idea       ``y = act(scale * x + shift)`` is formed before the maximum is taken: where ``scale`` is negative,
           the largest ``y`` belongs to the smallest ``x``.
Loop nest  forward: n, od, oh | cb | ow | tap                         (| vector of 16 channels)
           backward: n, d, band, cb | h | ow, kw
Traffic    Forward reads ``x`` once and writes 1.25 / 8 of it (window 2^3). Backward reads the 1.25 / 8 and
           writes ``diff_src``; it reads ``diff_src`` if it adds to it, and ``x`` for the mask.
Saves      ``argmax``, one byte an item of ``dst``: the number ``(kd*KH + kh)*KW + kw`` of the tap that won.
           Without it, backward would have to read ``src`` and ``dst``, 36 bytes where 1 does.

Common parameters
-----------------
src : float32 or float64 array, shape (MB, ID, IH, IW, C)
dst, diff_dst : array, shape (MB, ID // KD, IH // KH, IW // KW, C)
argmax : uint8 array, shape of ``dst``
size : (KD, KH, KW)
    The window, of at most 256 taps.

Kernels on blocks take the same tensors as (MB, CB, D, H, W, 16), contiguous or as views of channels last, and
the source as a `Source`. They fill what they write to. With a mask, all are contiguous.

`forward`, `backward` and `pooled_shape` raise TypeError or ValueError if dtypes or shapes do not fit, or the
window has too many taps or does not fit into the volume.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import NDHWC, Array, Bytes, Floats, Triple, tensor, triple
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.layout import blocks
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
from kernels.deferred.tensors import Mask, Source, plain


def forward(src: Array, size: int | Sequence[int] = (2, 2, 2)) -> tuple[Array, Bytes]:
    """Largest item of each window, ``dst``, and which tap it was, ``argmax``."""
    src = tensor("src", src, axes=NDHWC)
    shape = pooled_shape(src.shape, size)
    size = triple("size", size)
    if src.dtype == np.float64:
        windows = _windows(src, size)
        windows = windows.reshape(-1, *windows.shape[3:])
        argmax = windows.argmax(axis=0)
        return np.take_along_axis(windows, argmax[None], axis=0)[0], argmax.astype(np.uint8)
    C, src = shape[-1], _whole_blocks(src)
    dst = empty((*shape[:-1], src.shape[-1]))
    argmax = empty(dst.shape, np.uint8)
    forward_blocked(plain(_in_blocks(src), C), _in_blocks(dst), _in_blocks(argmax), size)
    return np.ascontiguousarray(dst[..., :C]), np.ascontiguousarray(argmax[..., :C])


def backward(
    diff_dst: Array, argmax: Bytes, src_shape: Sequence[int], size: int | Sequence[int] = (2, 2, 2)
) -> Array:
    """Gradient of the source, shape ``src_shape``: of each window, to its largest item alone."""
    shape = tuple(src_shape)
    if len(shape) != 5:
        raise ValueError(f"src_shape must have the axes ({NDHWC}), got {src_shape}")
    diff_dst = tensor("diff_dst", diff_dst, shape=pooled_shape(shape, size))
    size = triple("size", size)
    argmax = tensor("argmax", argmax, shape=diff_dst.shape, dtype=np.uint8)
    if diff_dst.dtype == np.float64:
        diff_src = np.zeros(shape)
        taps = np.arange(math.prod(size)).reshape(*size, 1, 1, 1, 1, 1)
        _windows(diff_src, size)[...] = np.where(argmax == taps, diff_dst, 0.0)
        return diff_src
    diff_dst, argmax = _whole_blocks(diff_dst), _whole_blocks(argmax)
    diff_src = empty((*shape[:-1], diff_dst.shape[-1]))
    backward_blocked(_in_blocks(diff_dst), _in_blocks(argmax), _in_blocks(diff_src), size=size)
    return np.ascontiguousarray(diff_src[..., : shape[-1]])


def pooled_shape(src_shape: Sequence[int], size: int | Sequence[int]) -> tuple[int, ...]:
    """Shape of ``dst``."""
    MB, *sizes, C = src_shape
    window = triple("size", size)
    if math.prod(window) > 256:
        raise ValueError(f"size must have at most 256 taps, got {window}")
    if any(k > i for i, k in zip(sizes, window, strict=True)):
        raise ValueError(f"size must fit into the volume {tuple(sizes)}, got {window}")
    return (MB, *[i // k for i, k in zip(sizes, window, strict=True)], C)


def _whole_blocks(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A volume (MB, D, H, W, C) with zeros up to a multiple of 16 channels."""
    *sizes, C = volume.shape
    if C % LANES == 0:
        return volume
    whole = np.zeros((*sizes, blocks(C) * LANES), volume.dtype)
    whole[..., :C] = volume
    return whole


def _in_blocks(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View of such a volume, shape (MB, CB, D, H, W, 16)."""
    *sizes, C = volume.shape
    return volume.reshape(*sizes, blocks(C), LANES).transpose(0, 4, 1, 2, 3, 5)


def _windows(src: npt.NDArray[Any], size: Triple) -> npt.NDArray[Any]:
    """View of shape (KD, KH, KW, MB, OD, OH, OW, C)."""
    KD, KH, KW = size
    MB, OD, OH, OW, C = pooled_shape(src.shape, size)
    cropped = src[:, : OD * KD, : OH * KH, : OW * KW]
    split = cropped.reshape(MB, OD, KD, OH, KH, OW, KW, C)
    return split.transpose(2, 4, 6, 0, 1, 3, 5, 7)


# --- Blocks of 16 channels -------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Shape of a tensor (MB, CB, D, H, W, 16), and its strides in items."""

    MB: int
    CB: int
    D: int
    H: int
    W: int
    block: int
    voxel: int


def forward_blocked(source: Source, dst: Floats, argmax: Bytes, size: Triple = (2, 2, 2)) -> None:
    """Largest item of each window, and the tap that won."""
    memory = flat_source(source._replace(data=_memory(source.data)))
    run = _make_forward(*size)
    run(memory, _layout(source.data), _memory(dst), _layout(dst), _memory(argmax))


def backward_blocked(
    diff_dst: Floats,
    argmax: Bytes,
    dst: Floats,
    accumulate: bool = False,
    mask: Mask | None = None,
    size: Triple = (2, 2, 2),
) -> None:
    """Write the source's gradient to ``dst``, or add it; with a mask, ``dz``, and fill the mask's sums."""
    diffs, taps = _memory(diff_dst), _memory(argmax)
    run = _make_backward(*size)
    run(diffs, _layout(diff_dst), taps, _memory(dst), _layout(dst), accumulate, flat(mask))


def _memory(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The items in the order of the memory."""
    return (tensor if tensor.flags.c_contiguous else tensor.transpose(0, 2, 3, 4, 1, 5)).reshape(-1)


def _layout(tensor: npt.NDArray[Any]) -> _Layout:
    MB, CB, D, H, W, _ = tensor.shape
    return _Layout(
        MB, CB, D, H, W, tensor.strides[1] // tensor.itemsize, tensor.strides[4] // tensor.itemsize
    )


@kernel
def _place(n: int, block: int, voxel: int, layout: _Layout) -> int:
    """Where 16 channels of a voxel of an image are."""
    _, CB, D, H, W, _, _ = layout
    return n * CB * D * H * W * LANES + block * layout.block + voxel * layout.voxel


@functools.cache
def _make_forward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    """Kernel for one window; its taps are constants, so the compiler unrolls the loops over them."""

    @parallel_kernel
    def forward(source: Source, layout: _Layout, dst: Floats, dst_layout: _Layout, argmax: Bytes) -> None:
        _, _, _, IH, IW, _, step = layout
        MB, CB, OD, OH, OW, _, dst_step = dst_layout
        x, scales, shifts, slope = source[:4]
        slope32 = np.float32(slope)
        for row in prange(MB * OD * OH):
            plane, oh = split_index(row, OH)
            n, od, slopes = plane // OD, plane % OD, broadcast(slope32)
            for block in range(CB):
                vectors = (n * CB + block) * LANES
                scale, shift = load(scales, vectors), load(shifts, vectors)
                first = _place(n, block, (od * KD * IH + oh * KH) * IW, layout)
                at = _place(n, block, (od * OH + oh) * OW, dst_layout)
                for ow in range(OW):
                    best = read(load(x, first + ow * KW * step), scale, shift, slopes)
                    winner = broadcast(np.float32(0))
                    for tap in range(1, KD * KH * KW):
                        kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
                        voxel = (kd * IH + kh) * IW + ow * KW + kw
                        y = read(load(x, first + voxel * step), scale, shift, slopes)
                        winner = where_above(y, best, broadcast(np.float32(tap)), winner)
                        best = where_above(y, best, y, best)
                    store(dst, at + ow * dst_step, best)
                    store_bytes(argmax, at + ow * dst_step, winner)

    return forward


@functools.cache
def _make_backward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    @parallel_kernel
    def backward(
        diff_dst: Floats,
        diff_layout: _Layout,
        argmax: Bytes,
        dst: Floats,
        layout: _Layout,
        accumulate: bool,
        mask: Mask,
    ) -> None:
        MB, CB, D, H, W, _, step = layout
        _, _, OD, OH, OW, _, diff_step = diff_layout
        parts = D * bands(H, W)
        for task in prange(MB * CB * parts):
            # Blocks of the same band one after the other: channels last, they share memory pages.
            rest, block = split_index(task, CB)
            n, part = rest // parts, rest % parts
            shape = (MB, CB, D, H, W, LANES)
            first, count, _, partial = band_of_task((n * CB + block) * parts + part, shape)
            clear(mask, n * CB + block, partial)
            zero = broadcast(np.float32(0))
            for row in range(first // W, (first + count) // W):
                d, h = row // H % D, row % H
                # What fills no window has no gradient.
                covered = OW if d // KD < OD and h // KH < OH else 0
                pooled = _place(n, block, (d // KD * OH + h // KH) * OW, diff_layout)
                line = _place(n, block, (d * H + h) * W, layout)
                tap = (d % KD * KH + h % KH) * KW
                for ow in range(covered):
                    diff = load(diff_dst, pooled + ow * diff_step)
                    winner = load_bytes(argmax, pooled + ow * diff_step)
                    for kw in range(KW):
                        to = line + (ow * KW + kw) * step
                        dy = where_equal(winner, broadcast(np.float32(tap + kw)), diff, zero)
                        if accumulate:
                            dy = dy + load(dst, to)
                        store(dst, to, dy)
                if not accumulate:
                    for w in range(covered * KW, W):
                        store(dst, line + w * step, zero)
                finish(dst, row * W, W, mask, n * CB + block, partial)

    return backward
