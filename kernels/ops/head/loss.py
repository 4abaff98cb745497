"""Dice sums and cross-entropy from the last layer's source, ``forward`` and ``backward``."""

import numpy as np

from kernels.base.arguments import Doubles, Floats, Labels
from kernels.base.buffers import past_caches, scratchpad
from kernels.base.jit import kernel, parallel_kernel, prange, signed
from kernels.base.simd import LANES, add_to_doubles, broadcast, fence, load, store
from kernels.base.tiles import tile_fma, tile_rank1, tile_store, tile_zero
from kernels.deferred.masking import bands, clear, flat, partials, place_band, write_gradient
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Mask, Shape, Source
from kernels.ops.head.logits import TILE, by_channel, by_class, logits_of_block, starts
from kernels.ops.head.planes import add_dice, add_plane, diff_logits, losses, mark, probabilities
from kernels.ops.softmax_dice.planes import BLOCK


def forward(
    source: Source, weights: Floats, bias: Floats, labels: Labels, dice: Doubles, cross_entropy: Doubles
) -> None:
    """Sums of ``p * t``, ``p`` and ``t`` for each class, and the cross-entropy.

    Parameters
    ----------
    source : Source, data of shape (MB, ICB, D, H, W, 16)
    weights : float32 array, shape=(classes, IC, 1, 1, 1)
    bias : float32 array, shape=(classes,)
    labels : uint8 array, shape=(MB, D, H, W)
        Below ``classes``; 0 or 1 if there is one class.
    dice : float64 array, shape=(3, MB, classes)
        Filled with intersection, prediction and target, as `kernels.ops.softmax_dice.dice_forward`.
    cross_entropy : float64 array, shape=(1,)
        Filled with the mean over all voxels, as `kernels.ops.softmax_dice.cross_entropy_forward`.
    """
    shape, classes = source.data.shape, bias.size
    MB, bands_of_all, sums = shape[0], partials(shape), 3 * classes + 1
    partial = _doubles("fused head sums", bands_of_all, sums)
    _forward(
        flat_source(source), shape, by_channel(weights, shape[1]), starts(bias), labels.reshape(-1), partial
    )
    totals = partial.reshape(MB, -1, sums).sum(axis=1)
    dice[:] = totals[:, :-1].reshape(MB, 3, classes).transpose(1, 0, 2)
    cross_entropy[0] = totals[:, -1].sum() / labels.size


def backward(
    source: Source,
    weights: Floats,
    bias: Floats,
    labels: Labels,
    diff_dice: Doubles,
    diff_cross_entropy: float,
    dst: Floats,
    diff_weights: Floats,
    diff_bias: Floats,
    accumulate: bool = False,
    mask: Mask | None = None,
) -> None:
    """Gradients of source, weights and bias.

    Parameters
    ----------
    source, weights, bias, labels
        As in the forward pass.
    diff_dice : float64 array, shape=(2, MB, classes)
        Gradients of intersection and prediction.
    diff_cross_entropy : float
        Gradient of the mean.
    dst : float32 array, shape=(MB, ICB, D, H, W, 16)
        The gradient is written, or added to what is there.
    diff_weights : float32 array, shape=(classes, IC, 1, 1, 1)
        Filled.
    diff_bias : float32 array, shape=(classes,)
        Filled.
    accumulate : bool
    mask : Mask, optional
        If given, what is written is ``dz``, and the mask's sums are filled.
    """
    shape, classes = source.data.shape, bias.size
    lanes = shape[1] * LANES
    partial = _doubles("fused head weights", partials(shape), classes * (lanes + LANES))
    _backward(
        flat_source(source),
        shape,
        by_channel(weights, shape[1]),
        by_class(weights, shape[1]),
        starts(bias),
        labels.reshape(-1),
        diff_dice.transpose(1, 0, 2).astype(np.float32, order="C"),
        np.float32(diff_cross_entropy / labels.size),
        dst.reshape(-1),
        accumulate,
        past_caches(dst),
        flat(mask),
        partial,
    )
    totals = partial.sum(axis=0)
    lines = totals[: classes * lanes].reshape(classes, lanes)
    diff_weights.reshape(classes, -1)[:] = lines[:, : diff_weights.shape[1]]
    diff_bias[:] = totals[classes * lanes :].reshape(classes, LANES).sum(axis=1)


def _doubles(purpose: str, rows: int, cols: int) -> Doubles:
    """Scratchpad of float64; each takes the room of two float32."""
    return scratchpad(purpose, rows, 2 * cols).view(np.float64)


# --- a block of voxels ----------------------------------------------------------------------------------


@kernel
def _add_outer(planes: Floats, y: Floats, end: int, classes: int, sums: Doubles, stored: Floats) -> None:
    """Add the sums over voxels of ``diff_logits[c, v] * y[v, ic]`` to ``sums[c, ic]``."""
    lanes = y.size // BLOCK
    one = broadcast(np.float32(1))
    for block in range(lanes // LANES):
        for c in range(0, classes, TILE):
            # Even and odd voxels apart: one sum waits for itself.
            even, odd = tile_zero(1, TILE, 1), tile_zero(1, TILE, 1)
            for voxel in range(0, end, 2):
                at, x = c * BLOCK + voxel, (block * BLOCK + voxel) * LANES
                even = tile_rank1(even, planes, at, 0, BLOCK, y, x)
                odd = tile_rank1(odd, planes, at + 1, 0, BLOCK, y, x + LANES)
            tile_store(tile_fma(one, even, odd), stored, 0, 0, LANES, 0)
            for i in range(min(TILE, classes - c)):
                at = (c + i) * lanes + block * LANES
                add_to_doubles(sums, at, load(stored, i * LANES))


@kernel
def _diff_source(planes: Floats, weights: Floats, end: int, classes: int, channel: int, diff: Floats) -> None:
    """``diff[v, lane] = sum over c of diff_logits[c, v] * weights[c, channel + lane]``."""
    lanes = weights.size // classes
    for voxel in range(0, end, TILE):
        tile = tile_zero(1, TILE, 1)
        for c in range(classes):
            at, line = c * BLOCK + voxel, c * lanes + channel
            tile = tile_rank1(tile, planes, at, 0, 1, weights, line)
        tile_store(tile, diff, voxel * LANES, 0, LANES, 0)


# --- volumes ----------------------------------------------------------------------------------------------


@parallel_kernel
def _forward(
    source: Source, shape: Shape, weights: Floats, bias: Floats, labels: Labels, partial: Doubles
) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        i = signed(band)
        _forward_band(i, source, shape, weights, bias, labels, partial[i])


@kernel
def _forward_band(
    band: int, source: Source, shape: Shape, weights: Floats, bias: Floats, labels: Labels, partial: Doubles
) -> None:
    _, ICB, D, H, W, _ = shape
    image, begin, voxels = place_band(band, shape)
    classes, lanes, volume = partial.size // 3, ICB * LANES, D * H * W
    y, planes = aligned(lanes * BLOCK), aligned(weights.size // lanes * BLOCK)
    marks, loss, scratch = aligned(BLOCK), aligned(BLOCK), aligned(2 * BLOCK)
    turned = aligned(LANES * LANES)
    sums = np.zeros(partial.size * LANES)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = (count + LANES - 1) // LANES * LANES
        mark(labels, image * volume + first, count, marks)
        pack_source(source, shape, image, first, count, y, BLOCK)
        ahead = image * ICB * volume + first + BLOCK
        logits_of_block(y, end, weights, bias, planes, source.data, ahead, volume, turned)
        losses(planes, end, classes, marks, scratch, loss)
        add_dice(planes, end, classes, marks, sums)
        add_plane(loss, 0, end, sums, 3 * classes * LANES)
    for i in range(partial.size):
        partial[i] = 0.0
        for lane in range(LANES):
            partial[i] += sums[i * LANES + lane]


@parallel_kernel
def _backward(
    source: Source,
    shape: Shape,
    weights: Floats,
    lines: Floats,
    bias: Floats,
    labels: Labels,
    diffs: Floats,
    share: np.float32,
    dst: Floats,
    accumulate: bool,
    streams: bool,
    mask: Mask,
    partial: Doubles,
) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        i = signed(band)
        _backward_band(
            i,
            source,
            shape,
            weights,
            lines,
            bias,
            labels,
            diffs,
            share,
            dst,
            accumulate,
            streams,
            mask,
            partial[i],
        )


@kernel
def _backward_band(
    band: int,
    source: Source,
    shape: Shape,
    weights: Floats,
    lines: Floats,
    bias: Floats,
    labels: Labels,
    diffs: Floats,
    share: np.float32,
    dst: Floats,
    accumulate: bool,
    streams: bool,
    mask: Mask,
    partial: Doubles,
) -> None:
    _, ICB, D, H, W, _ = shape
    image, begin, voxels = place_band(band, shape)
    classes, volume, lanes = diffs.shape[2], D * H * W, ICB * LANES
    y, planes = aligned(lanes * BLOCK), aligned(weights.size // lanes * BLOCK)
    marks, scratch, turned = aligned(BLOCK), aligned(BLOCK), aligned(LANES * LANES)
    for i in range(partial.size):
        partial[i] = 0.0
    for block in range(ICB):
        clear(mask, block * LANES, band)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = (count + LANES - 1) // LANES * LANES
        mark(labels, image * volume + first, count, marks)
        pack_source(source, shape, image, first, count, y, BLOCK)
        ahead = image * ICB * volume + first + BLOCK
        logits_of_block(y, end, weights, bias, planes, source.data, ahead, volume, turned)
        probabilities(planes, end, classes, scratch)
        diff_logits(planes, end, classes, marks, diffs[image], share)
        for c in range(classes):
            add_plane(planes, c, end, partial, classes * lanes + c * LANES)
        _add_outer(planes, y, end, classes, partial, turned)
        for block in range(ICB):
            # What was packed is not needed any more: its first block takes the gradient.
            _diff_source(planes, lines, end, classes, block * LANES, y)
            to = (image * ICB + block) * volume + first
            if accumulate:
                for voxel in range(count):
                    dy = load(y, voxel * LANES) + load(dst, (to + voxel) * LANES)
                    store(y, voxel * LANES, dy)
            write_gradient(y, 0, dst, to, count, mask, block * LANES, band, streams)
    fence()
