"""Convolutions of the compiled graph: deferred sources in, raw outputs and their statistics out.

    forward            dst = weights * act(scale * [a, b] + shift) + bias, and the moments of dst
    backward_data      [a, b] = weights^T * (a dz + b x + d), masked, with the sums of batch norm
    backward_weights   (a dz + b x + d) x act(scale * [a, b] + shift)
    backward           both gradients in one pass

What is read is normalised while it is packed, what is written is masked and summed while it is in cache
(`kernels.conv3d.bricks`): no pass over memory is left for batch norm, activation, bias or concatenation.
A plan fixes an algorithm, direct (tile None) or Winograd F(tile), and all sizes; weights are packed for
it once a step.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import past_caches
from kernels.base.layout import blocks, pack_weights, weights_order
from kernels.base.simd import LANES
from kernels.conv3d import direct_bricks
from kernels.conv3d.bricks import NO_MOMENTS, Cut, Epilogue, Prologue, plain_epilogue, plain_prologue
from kernels.conv3d.winograd import (
    both_gradients,
    convolution,
    convolution_groups,
    cutting,
    rows,
    weight_gradient,
)
from kernels.conv3d.winograd.sums import brick_chunks
from kernels.deferred.statistics import mend_moments
from kernels.deferred.tensors import NO_MASK, Gradient, Mask, Source
from kernels.ladder.direct import FEW_CHANNELS

# Scale, shift and also of a source that is taken as it is.
_UNCHANGED = np.repeat(np.array([1, 0, 0], np.float32), LANES)


class Plan(NamedTuple):
    """One direction of a convolution of stride 1 and "same" padding: sizes, algorithm, bricks."""

    channels_in: tuple[int, int]  # of the two sources
    channels_out: tuple[int, int]  # of the two destinations
    size: tuple[int, int, int, int]  # MB, D, H, W
    kernel: Triple
    tile: Triple | None  # Winograd F(tile); None: direct
    width: int  # channels in a block of the source: 16, or the few of a first layer
    cut: Cut
    packs: bool  # weights are packed before; else they are transformed where they are used

    @property
    def blocks_in(self) -> int:
        """Channel blocks of both sources."""
        return 1 if self.width < LANES else sum(map(blocks, self.channels_in))

    @property
    def blocks_out(self) -> tuple[int, int]:
        """Channel blocks of each destination."""
        return blocks(self.channels_out[0]), blocks(self.channels_out[1])

    @property
    def before(self) -> Triple:
        """Zeros before the first voxel."""
        return (self.kernel[0] - 1) // 2, (self.kernel[1] - 1) // 2, (self.kernel[2] - 1) // 2


def plan(
    channels_in: tuple[int, int],
    channels_out: tuple[int, int],
    size: tuple[int, int, int, int],
    kernel: Triple,
    tile: Triple | None = None,
    *,
    channels_last: bool = False,
    keeps_both: bool = False,
) -> Plan:
    """Plan ``forward`` or ``backward_weights``; with in and out exchanged ``backward_data`` or ``backward``.

    Parameters
    ----------
    channels_in, channels_out : (int, int)
        Of the two sources and the two destinations; 0 where there is no second.
    size : (MB, D, H, W)
    kernel : (KD, KH, KW)
        Odd sizes up to 5.
    tile : (md, mh, mw), optional
        Winograd F(tile), where the kernel is 3 (1 where the tile is 1); None is direct.
    channels_last : bool
        The source is not blocked: (MB, D, H, W, C) with at most `FEW_CHANNELS`. Direct, or Winograd along
        d and h only, F(md, mh, 1); see `rows`.
    keeps_both : bool
        The plan is of ``backward_weights`` or ``backward``: source and gradient are in cache together.

    Raises
    ------
    ValueError
        If there is no such algorithm.
    """
    if not all(k in (1, 3, 5) for k in kernel):
        raise ValueError(f"kernel is {kernel}; fused convolutions have sizes 1, 3 and 5")
    if channels_last and (channels_in[0] > FEW_CHANNELS or channels_in[1]):
        raise ValueError(
            f"channels_in is {channels_in}; channels_last takes one source of at most {FEW_CHANNELS}"
        )
    ICB, OCB = sum(map(blocks, channels_in)), sum(map(blocks, channels_out))
    if channels_last and tile and rows.supports(size, kernel, tile, channels_in[0]):
        cut = rows.cut_output(size, tile, OCB)
    elif tile is None:
        cut = direct_bricks.cut_output(size, kernel, ICB)
    elif not channels_last and kernel == cutting.kernel_of(tile):
        cuts = weight_gradient if keeps_both else cutting
        cut = cuts.cut_output(size, tile, ICB, OCB)
    elif channels_last and tile[2] == 1 and size[3] * channels_in[0] % LANES:
        raise ValueError(
            f"size is {size}; a row of {channels_in[0]} channels last must be whole vectors of {LANES}"
        )
    else:
        raise ValueError(f"kernel {kernel} has no Winograd form F{tile}")
    width = channels_in[0] if channels_last else LANES
    uneven = any(first % LANES and second for first, second in (channels_in, channels_out))
    packs = (
        tile is None or channels_last or keeps_both or uneven or not cutting.by_groups(cut, tile, ICB, OCB)
    )
    return Plan(channels_in, channels_out, size, kernel, tile, width, cut, packs)


def pays_together(p: Plan) -> bool:
    """Whether ``backward``, whose plan this is, takes less time than its two gradients one by one."""
    if p.tile is None:
        return False
    return both_gradients.pays(p.cut, p.tile, sum(p.blocks_out), p.blocks_in)


def packed_shape(p: Plan) -> tuple[int, ...]:
    """Shape of the weights that ``forward`` and ``backward_data`` take: filled by `pack`."""
    if not p.packs:
        return sum(p.channels_in) * sum(p.channels_out), math.prod(p.kernel)
    if p.tile is None:
        return direct_bricks.packed_shape(p.cut, p.kernel, p.blocks_in, sum(p.blocks_out), p.width)
    if p.width < LANES:
        return rows.packed_shape(p.cut, p.tile, p.kernel[2], sum(p.blocks_out), p.width)
    return convolution.packed_shape(p.cut, p.tile, p.blocks_in, sum(p.blocks_out))


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool = False) -> None:
    """Pack weights (OC, IC, KD, KH, KW) for the plan's algorithm; ``adjoint`` for ``backward_data``.

    Where it ``packs`` nothing, the weights may be given as they are instead of what is packed: a copy.
    """
    if not p.packs:
        packed[:] = weights.reshape(packed.shape)
        return
    # Channels of the forward convolution's sources, whichever way this plan goes.
    split = p.channels_out if adjoint else p.channels_in
    spread = weights if p.width < LANES else _spread(weights, split)
    if p.tile is None:
        pack_weights(spread, packed, adjoint=adjoint)
    else:
        convolution.pack_weights(spread, p.tile, packed, adjoint=adjoint)


def moments_shape(p: Plan) -> tuple[int, int, int]:
    """Shape of the moments that ``forward`` fills: (bricks, 3, channels)."""
    return p.cut.bricks, 3, sum(p.blocks_out) * LANES


def sums_shape(p: Plan, destination: int) -> tuple[int, int, int]:
    """Shape of the sums in the mask of one destination of ``backward_data``."""
    return 2, p.cut.bricks, p.blocks_out[destination] * LANES


def forward(
    p: Plan, a: Source, b: Source, packed: Floats, bias: Floats, dst: Floats, moments: Doubles = NO_MOMENTS
) -> None:
    """Convolve what two deferred sources mean.

    Parameters
    ----------
    p : Plan
    a, b : Source
        The second is `tensors.NO_SOURCE` where nothing is concatenated.
    packed : ndarray, `packed_shape`
    bias : ndarray, shape=(CB * 16,)
        Zeros past the last channel.
    dst : ndarray, shape=(MB, CB, D, H, W, 16)
        Filled, not normalised.
    moments : ndarray, `moments_shape`, float64, optional
        Filled with count, mean and sum of squared deviations of each brick.
    """
    epilogue = plain_epilogue(dst, bias)._replace(moments=moments)
    _convolve(p, _prologue(p, a, b), packed, epilogue, adjoint=False)
    mend_moments(dst, moments)


def backward_data(
    p: Plan,
    gradient: Gradient,
    packed: Floats,
    dst: tuple[Floats, Floats],
    masks: tuple[Mask, Mask] = (NO_MASK, NO_MASK),
) -> None:
    """Gradients of one or two sources.

    Parameters
    ----------
    p : Plan
        Made with in and out exchanged: ``channels_out`` are those of the forward pass's sources.
    gradient : Gradient
        Of the forward pass's output.
    packed : ndarray, `packed_shape`
        Adjoint weights.
    dst : two ndarrays, shape=(MB, CB, D, H, W, 16)
        Filled with dy, or with dz where there is a mask; the second may be empty.
    masks : two Masks
        `NO_MASK` where dy itself is wanted. Their sums are filled.
    """
    epilogue = _gradient_epilogue(p, dst, masks)
    _convolve(p, _gradient_prologue(gradient), packed, epilogue, adjoint=True)


def backward_weights(
    p: Plan, a: Source, b: Source, gradient: Gradient, diff_weights: Floats, diff_bias: Floats
) -> None:
    """Gradients of weights and bias.

    Parameters
    ----------
    p : Plan
        The forward pass's sizes; its algorithm may be another.
    a, b : Source
        What the forward pass read.
    gradient : Gradient
        Of its output.
    diff_weights : ndarray, shape=(OC, IC, KD, KH, KW)
    diff_bias : ndarray, shape=(OC,)
        Both filled.
    """
    OCB, src_size = sum(p.blocks_out), p.size[1:]
    OC, IC = diff_weights.shape[:2]
    flat = diff_weights.reshape(OC, IC, -1)
    spread = _spread(flat, p.channels_in)
    prologue, grad = _prologue(p, a, b), _gradient_prologue(gradient)
    if p.tile is None:
        _, chunks = direct_bricks.split(p.cut.bricks, p.blocks_in, OCB)
        totals = np.empty((chunks, OCB * LANES))
        direct_bricks.backward_weights(prologue, src_size, p.before, grad, p.cut, p.kernel, spread, totals)
    elif p.width < LANES:
        totals = np.empty((brick_chunks(p.cut), OCB * LANES))
        rows.backward_weights(prologue, src_size, p.before, grad, p.cut, p.kernel, p.tile, spread, totals)
    else:
        totals = np.empty((weight_gradient.bias_chunks(p.cut, p.tile, p.blocks_in, OCB), OCB * LANES))
        weight_gradient.backward_weights(prologue, src_size, p.before, grad, p.cut, p.tile, spread, totals)
    diff_bias[:] = totals.sum(axis=0)[:OC]
    if spread is not flat:
        flat[:] = spread[:, _places(p.channels_in)]


def backward(
    p: Plan,
    gradient: Gradient,
    packed: Floats,
    a: Source,
    b: Source,
    dst: tuple[Floats, Floats],
    masks: tuple[Mask, Mask],
    diff_weights: Floats,
) -> None:
    """Gradients of one or two sources, and of the weights, in one pass; see `both_gradients`.

    Parameters
    ----------
    p : Plan
        As for `backward_data`, Winograd, with ``keeps_both``.
    gradient, packed, dst, masks
        As of `backward_data`.
    a, b, diff_weights
        As of `backward_weights`.
    """
    assert p.tile is not None, "only Winograd shares transformed tiles"
    flat = diff_weights.reshape(*diff_weights.shape[:2], -1)
    spread = _spread(flat, p.channels_out)
    both_gradients.backward(
        _gradient_prologue(gradient),
        p.size[1:],
        p.before,
        packed,
        _source_prologue(a, b),
        _gradient_epilogue(p, dst, masks),
        p.cut,
        p.tile,
        spread,
    )
    if spread is not flat:
        flat[:] = spread[:, _places(p.channels_out)]


def _convolve(p: Plan, prologue: Prologue, packed: Floats, epilogue: Epilogue, *, adjoint: bool) -> None:
    size = p.size[1:]
    if p.tile is None:
        direct_bricks.convolve(prologue, size, p.before, packed, p.kernel, epilogue, p.cut)
    elif p.width < LANES:
        rows.convolve(prologue, size, p.before, packed, p.kernel, epilogue, p.cut, p.tile)
    elif p.packs:
        convolution.convolve(prologue, size, p.before, packed, epilogue, p.cut, p.tile)
    else:
        ends = sum(p.channels_in), sum(p.channels_out)
        order = weights_order((*(ends if adjoint else ends[::-1]), *p.kernel), adjoint=adjoint)
        convolution_groups.convolve(
            prologue, size, p.before, packed.reshape(-1), order, epilogue, p.cut, p.tile
        )


def _prologue(p: Plan, a: Source, b: Source) -> Prologue:
    """What a plan's convolution, or its weight gradient, reads."""
    if p.width < LANES:
        return Prologue(a.data.reshape(-1), 1, 1, _UNCHANGED, width=p.width)
    return _source_prologue(a, b)


def _source_prologue(a: Source, b: Source) -> Prologue:
    blocks_a, blocks_b = a.data.shape[1], b.data.shape[1]
    coefficients = np.concatenate(
        [a.scale, b.scale, a.shift, b.shift, np.zeros((blocks_a + blocks_b) * LANES, np.float32)]
    )
    return Prologue(
        a.data.reshape(-1),
        blocks_a,
        blocks_a + blocks_b,
        coefficients,
        u_b=b.data.reshape(-1),
        slope_a=np.float32(a.slope),
        slope_b=np.float32(b.slope),
    )


def _gradient_prologue(gradient: Gradient) -> Prologue:
    coefficients = np.concatenate([gradient.a, gradient.d, gradient.b])
    prologue = plain_prologue(gradient.dz)
    return prologue._replace(v_a=gradient.x.reshape(-1), coefficients=coefficients)


def _gradient_epilogue(p: Plan, dst: tuple[Floats, Floats], masks: tuple[Mask, Mask]) -> Epilogue:
    (first, second), (a, b) = dst, masks
    mask_a, mask_b = (np.concatenate([m.scale, m.shift, m.mean]) for m in (a, b))
    return Epilogue(
        first.reshape(-1),
        p.blocks_out[0],
        sum(p.blocks_out),
        bias=np.zeros(sum(p.blocks_out) * LANES, np.float32),
        streams=past_caches(first, second),
        dst_b=second.reshape(-1),
        x_a=a.x.reshape(-1),
        x_b=b.x.reshape(-1),
        mask_a=mask_a,
        mask_b=mask_b,
        slope_a=np.float32(a.slope),
        slope_b=np.float32(b.slope),
        sums_a=a.sums,
        sums_b=b.sums,
    )


def _places(channels: tuple[int, int]) -> npt.NDArray[np.intp]:
    """Lane of each channel of two concatenated sources, each filled up to blocks of 16."""
    first, second = channels
    return np.concatenate([np.arange(first), blocks(first) * LANES + np.arange(second)])


def _spread(weights: Floats, channels: tuple[int, int]) -> Floats:
    """Weights with zeros between the input channels of two sources, where the first fills no block."""
    first, second = channels
    if not second or first % LANES == 0:
        return weights
    lanes = (blocks(first) + blocks(second)) * LANES
    spread = np.zeros((weights.shape[0], lanes, *weights.shape[2:]), np.float32)
    spread[:, _places(channels)] = weights
    return spread
