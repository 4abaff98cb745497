"""The last layer with its loss: 1^3 convolution, softmax, soft Dice and cross-entropy in one pass.

    y = act(scale * x + shift)                       the source, still to be normalised
    logits[v, c] = bias[c] + sum over ic of weights[c, ic] * y[v, ic]
    p = softmax(logits), or the sigmoid if there is one class

Forward gives the sums of which Dice is made and the mean cross-entropy, as `kernels.ops.label_losses` does
from logits; backward takes their derivatives. Neither writes logits, probabilities or their gradient: three
tensors of the volume's size are never in memory.

Idea       Channels of a voxel lie side by side, but softmax and sums run along voxels. So the kernels
           normalise a block of 128 voxels into the L1 cache and transpose it, 16 x 16 at a time, in
           registers. Then one multiply-add works on 16 voxels of a class. Backward makes all of it again, as
           it must read ``x`` for the mask anyway. From the planes of the logits' gradient it goes back to
           channels with rank-1 updates, which need no transpose::

               x           | v0: c0..c15 | v1: c0..c15 | ...      blocked, from memory
               transposed  | c0: v0..v15 | c1: v0..v15 | ...      16 vectors in registers
               plane       | class 0: v0 ..... v127 |             logits, p, their gradient: L1 cache
Loop nest  n, d, band | block of 128 voxels | 16 voxels | icb | 4 classes | ic    (| 4 classes x 16 voxels)
Traffic    Forward reads ``x`` and the labels. Backward reads them and writes ``dst``; it reads ``dst``
           if it adds to it.
Saves      nothing
Numerics   float32 in a block; sums over a block's voxels in 16 places, and from there on float64, bands in
           their order. So nothing depends on the number of threads.
Source     Milletari, Navab and Ahmadi, "V-Net" (2016), section 3

Common parameters
-----------------
layer : Layer
dice : float64 array, shape=(3, MB, classes)
    Intersection, prediction and target.
dst : float32 array
    Probabilities, shape=(MB, D, H, W, classes), or the source's gradient, shape=(MB, ICB, D, H, W, 16).
"""

from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Labels
from kernels.base.buffers import past_caches, scratchpad
from kernels.base.jit import kernel, parallel_kernel, prange, signed
from kernels.base.simd import LANES, LINE, add_to_doubles, address, broadcast, fence, load, prefetch, store
from kernels.base.tiles import tile_fma, tile_load, tile_rank1, tile_store, tile_transpose, tile_zero
from kernels.deferred.masking import bands, clear, flat, partials, place_band, write_gradient
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Mask, Shape, Source
from kernels.ops.label_losses import (
    Weighting,
    add_losses,
    add_plane,
    gradient_of_logits,
    in_float32,
    loss_block,
    mark,
    total_of_lanes,
    total_weight,
    weighting,
    whole_vectors,
)
from kernels.ops.softmax import BLOCK, probabilities, scatter

# Classes of a register tile; the planes of a block are filled up to whole tiles.
_TILE = 4


class Layer(NamedTuple):
    """The last layer and what it reads."""

    source: Source  # data (MB, ICB, D, H, W, 16)
    weights: Floats  # (classes, IC, 1, 1, 1)
    bias: Floats  # (classes,)
    labels: Labels  # (MB, D, H, W), as `kernels.ops.label_losses` takes them
    rule: Weighting  # how much these labels count


class _Packed(NamedTuple):
    """The parameters as kernels read them, with zeros past the last channel, and past the last class."""

    by_channel: Floats  # weights[ic, class], classes up to whole tiles
    by_class: Floats  # weights[class, ic]
    bias: Floats  # each 16 times: what the sums of a class start from
    labels: Labels
    class_weights: Floats
    ignored: int


class _Derivatives(NamedTuple):
    """Of the loss, by the Dice sums and by the cross-entropy of one voxel."""

    dice: Floats  # (MB, 2, classes)
    share: np.float32


class _Target(NamedTuple):
    """Where the source's gradient goes."""

    dst: Floats
    accumulate: bool
    streams: bool  # past the caches


def infer(source: Source, weights: Floats, bias: Floats, dst: Floats) -> None:
    """Fill ``dst`` with the probabilities of the classes, channels last; the rest is as in `Layer`."""
    packed = _packed(Layer(source, weights, bias, np.zeros(0, np.uint8), weighting(bias.size)))
    _infer(flat_source(source), source.data.shape, packed, dst.reshape(-1, bias.size))


def forward(layer: Layer, dice: Doubles, cross_entropy: Doubles) -> None:
    """Fill ``dice``, and ``cross_entropy``, shape=(1,), with the weighted mean over all voxels."""
    shape, classes = layer.source.data.shape, layer.bias.size
    MB, sums = shape[0], 3 * classes + 1
    partial = _doubles("fused head sums", partials(shape), sums)
    _forward(flat_source(layer.source), shape, _packed(layer), partial)
    totals = partial.reshape(MB, -1, sums).sum(axis=1)
    dice[:] = totals[:, :-1].reshape(MB, 3, classes).transpose(1, 0, 2)
    cross_entropy[0] = totals[:, -1].sum() / (total_weight(layer.labels, layer.rule) or 1.0)


def backward(
    layer: Layer,
    diff_dice: Doubles,
    diff_cross_entropy: float,
    dst: Floats,
    diff_weights: Floats,
    diff_bias: Floats,
    accumulate: bool = False,
    mask: Mask | None = None,
) -> None:
    """Gradients of source, weights and bias.

    ``diff_dice`` has the derivatives by intersection and prediction, shape=(2, MB, classes). The gradient is
    written to ``dst``, or added; with a mask ``dz``, and the mask's sums are filled. ``diff_weights`` and
    ``diff_bias`` have the shapes of what they are gradients of, and are filled.
    """
    shape, classes = layer.source.data.shape, layer.bias.size
    lanes = shape[1] * LANES
    derivatives = _Derivatives(
        diff_dice.transpose(1, 0, 2).astype(np.float32, order="C"),
        np.float32(diff_cross_entropy / (total_weight(layer.labels, layer.rule) or 1.0)),
    )
    target = _Target(dst.reshape(-1), accumulate, past_caches(dst))
    partial = _doubles("fused head weights", partials(shape), classes * (lanes + LANES))
    _backward(flat_source(layer.source), shape, _packed(layer), derivatives, target, flat(mask), partial)
    totals = partial.sum(axis=0)
    lines = totals[: classes * lanes].reshape(classes, lanes)
    diff_weights.reshape(classes, -1)[:] = lines[:, : diff_weights.shape[1]]
    diff_bias[:] = totals[classes * lanes :].reshape(classes, LANES).sum(axis=1)


def _packed(layer: Layer) -> _Packed:
    classes, IC = layer.weights.shape[:2]
    lanes, filled = layer.source.data.shape[1] * LANES, -(-classes // _TILE) * _TILE
    by_channel, by_class = np.zeros((lanes, filled), np.float32), np.zeros((classes, lanes), np.float32)
    by_class[:, :IC] = layer.weights.reshape(classes, IC)
    by_channel[:, :classes] = by_class.T
    bias = np.zeros((filled, LANES), np.float32)
    bias[:classes] = layer.bias[:, np.newaxis]
    flats = (by_channel.reshape(-1), by_class.reshape(-1), bias.reshape(-1))
    return _Packed(*flats, layer.labels.reshape(-1), *in_float32(layer.rule))


def _doubles(purpose: str, rows: int, cols: int) -> Doubles:
    """Scratchpad of float64; each takes the room of two float32."""
    return scratchpad(purpose, rows, 2 * cols).view(np.float64)


# --- Volumes, and their bands ------------------------------------------------------------------------------


@parallel_kernel
def _infer(source: Source, shape: Shape, packed: _Packed, dst: Floats) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        _infer_band(signed(band), source, shape, packed, dst)


@kernel
def _infer_band(band: int, source: Source, shape: Shape, packed: _Packed, dst: Floats) -> None:
    image, begin, voxels = place_band(band, shape)
    lanes, volume = shape[1] * LANES, shape[2] * shape[3] * shape[4]
    y, planes = aligned(lanes * BLOCK), aligned(packed.bias.size // LANES * BLOCK)
    scratch, transposed = aligned(BLOCK), aligned(LANES * LANES)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = whole_vectors(count)
        pack_source(source, shape, image, first, count, y, BLOCK)
        soon = image * lanes // LANES * volume + first + BLOCK
        _logits(y, end, packed, planes, transposed, address(source.data, soon * LANES), volume)
        probabilities(planes, end, dst.shape[1], scratch)
        scatter(planes, image * volume + first, count, dst)


@parallel_kernel
def _forward(source: Source, shape: Shape, packed: _Packed, partial: Doubles) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        i = signed(band)
        _forward_band(i, source, shape, packed, partial[i])


@kernel
def _forward_band(band: int, source: Source, shape: Shape, packed: _Packed, partial: Doubles) -> None:
    image, begin, voxels = place_band(band, shape)
    lanes, volume, classes = shape[1] * LANES, shape[2] * shape[3] * shape[4], partial.size // 3
    y, planes = aligned(lanes * BLOCK), aligned(packed.bias.size // LANES * BLOCK)
    block, transposed = loss_block(), aligned(LANES * LANES)
    sums = np.zeros(partial.size * LANES)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = whole_vectors(count)
        mark(packed.labels, image * volume + first, count, packed.ignored, block.marks)
        pack_source(source, shape, image, first, count, y, BLOCK)
        soon = image * lanes // LANES * volume + first + BLOCK
        _logits(y, end, packed, planes, transposed, address(source.data, soon * LANES), volume)
        add_losses(planes, end, classes, block, packed.class_weights, sums)
    total_of_lanes(sums, partial)


@parallel_kernel
def _backward(
    source: Source,
    shape: Shape,
    packed: _Packed,
    derivatives: _Derivatives,
    target: _Target,
    mask: Mask,
    partial: Doubles,
) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        i = signed(band)
        _backward_band(i, source, shape, packed, derivatives, target, mask, partial[i])


@kernel
def _backward_band(
    band: int,
    source: Source,
    shape: Shape,
    packed: _Packed,
    derivatives: _Derivatives,
    target: _Target,
    mask: Mask,
    partial: Doubles,
) -> None:
    image, begin, voxels = place_band(band, shape)
    ICB, volume, classes = shape[1], shape[2] * shape[3] * shape[4], derivatives.dice.shape[2]
    y, planes = aligned(ICB * LANES * BLOCK), aligned(packed.bias.size // LANES * BLOCK)
    block, transposed = loss_block(), aligned(LANES * LANES)
    partial[:] = 0.0
    for icb in range(ICB):
        clear(mask, image * ICB + icb, band)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = whole_vectors(count)
        mark(packed.labels, image * volume + first, count, packed.ignored, block.marks)
        pack_source(source, shape, image, first, count, y, BLOCK)
        soon = image * ICB * volume + first + BLOCK
        _logits(y, end, packed, planes, transposed, address(source.data, soon * LANES), volume)
        dice, share = derivatives.dice[image], derivatives.share
        gradient_of_logits(planes, end, classes, block, packed.class_weights, dice, share)
        for c in range(classes):
            add_plane(planes, c, end, partial, (classes * ICB + c) * LANES)
        _add_outer(planes, y, end, classes, partial, transposed)
        for icb in range(ICB):
            # What was packed is not needed any more: its first block takes the gradient.
            _diff_source(planes, packed.by_class, end, classes, icb * LANES, y)
            to = (image * ICB + icb) * volume + first
            if target.accumulate:
                for voxel in range(count):
                    dy = load(y, voxel * LANES) + load(target.dst, (to + voxel) * LANES)
                    store(y, voxel * LANES, dy)
            write_gradient(y, 0, target.dst, to, count, mask, image * ICB + icb, band, target.streams)
    fence()


# --- A block of voxels: y[icb, voxel, lane] and planes[class, voxel] ------------------------------------


@kernel
def _logits(
    y: Floats, end: int, packed: _Packed, planes: Floats, transposed: Floats, upcoming: int, volume: int
) -> None:
    """Fill planes with logits, classes up to whole tiles, and prefetch the next block's source.

    ``transposed`` is scratch for 16 vectors. ``upcoming`` is the address of the next block's first voxel, and
    ``volume`` the voxels from one channel block to the next.
    """
    classes, one = planes.size // BLOCK, broadcast(np.float32(1))
    for voxel in range(0, end, LANES):
        for block in range(y.size // (BLOCK * LANES)):
            square = tile_load(y, (block * BLOCK + voxel) * LANES, 0, LANES, 0, 1, LANES, 1)
            tile_store(tile_transpose(square), transposed, 0, 0, LANES, 0)
            line = upcoming + (block * volume + voxel) * LINE
            for c in range(0, classes, _TILE):
                at = c * BLOCK + voxel
                if block == 0:
                    sums = tile_load(packed.bias, c * LANES, 0, LANES, 0, 1, _TILE, 1)
                else:
                    sums = tile_load(planes, at, 0, BLOCK, 0, 1, _TILE, 1)
                # Two tiles, of even and odd channels: a multiply-add waits for the one before it.
                odd = tile_zero(1, _TILE, 1)
                for lane in range(0, LANES, 2):
                    prefetch(line + lane * LINE)
                    prefetch(line + (lane + 1) * LINE)
                    column, v = (block * LANES + lane) * classes + c, lane * LANES
                    sums = tile_rank1(sums, packed.by_channel, column, 0, 1, transposed, v)
                    column, v = column + classes, v + LANES
                    odd = tile_rank1(odd, packed.by_channel, column, 0, 1, transposed, v)
                tile_store(tile_fma(one, sums, odd), planes, at, 0, BLOCK, 0)


@kernel
def _add_outer(planes: Floats, y: Floats, end: int, classes: int, sums: Doubles, stored: Floats) -> None:
    """Add the sums over voxels of ``diff_logits[c, v] * y[v, ic]`` to ``sums[c, ic]``."""
    lanes = y.size // BLOCK
    one = broadcast(np.float32(1))
    for block in range(lanes // LANES):
        for c in range(0, classes, _TILE):
            # Two tiles, of even and odd voxels: a multiply-add waits for the one before it.
            even, odd = tile_zero(1, _TILE, 1), tile_zero(1, _TILE, 1)
            for voxel in range(0, end, 2):
                at, x = c * BLOCK + voxel, (block * BLOCK + voxel) * LANES
                even = tile_rank1(even, planes, at, 0, BLOCK, y, x)
                odd = tile_rank1(odd, planes, at + 1, 0, BLOCK, y, x + LANES)
            tile_store(tile_fma(one, even, odd), stored, 0, 0, LANES, 0)
            for i in range(min(_TILE, classes - c)):
                at = (c + i) * lanes + block * LANES
                add_to_doubles(sums, at, load(stored, i * LANES))


@kernel
def _diff_source(planes: Floats, weights: Floats, end: int, classes: int, channel: int, diff: Floats) -> None:
    """``diff[v, lane] = sum over c of diff_logits[c, v] * weights[c, channel + lane]``."""
    lanes = weights.size // classes
    for voxel in range(0, end, _TILE):
        tile = tile_zero(1, _TILE, 1)
        for c in range(classes):
            at, line = c * BLOCK + voxel, c * lanes + channel
            tile = tile_rank1(tile, planes, at, 0, 1, weights, line)
        tile_store(tile, diff, voxel * LANES, 0, LANES, 0)
