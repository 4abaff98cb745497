"""Convolutions of the compiled graph: deferred sources in, raw outputs and their statistics out.

    forward            dst = weights * act(scale * [a, b] + shift) + bias, and the moments of dst
    backward_data      [a, b] = weights^T * (a dz + b x + d), masked, with the sums of batch norm
    backward_weights   (a dz + b x + d) x act(scale * [a, b] + shift)
    backward           both gradients in one pass

What is read is normalised while it is packed (`read`), what is written is masked and summed while it is in
cache (`write`): no pass over memory is left for batch norm, activation, bias or concatenation. A `Plan` fixes
all sizes and the algorithm; weights are packed for it once a step.

Parameters of these functions
    p : Plan
        Of ``backward_data`` and ``backward`` with in and out exchanged: ``channels_out`` are those of the
        forward pass's sources. Of ``backward_weights`` as of ``forward``; the algorithm may be another.
    a, b : Source
        The second is `tensors.NO_SOURCE` where nothing is concatenated.
    gradient : Source
        The gradient of the convolution's result.
    packed : ndarray, `packed_shape`
        Filled by `pack`; adjoint for the gradient of the sources.
    dst : ndarray, shape=(MB, CB, D, H, W, 16)
        Filled; of ``backward_data`` two, with dy, or dz where there is a mask; the second may be empty.
    masks : two Masks
        `NO_MASK` where dy itself is wanted. Their sums, of `sums_shape`, are filled.
    diff_weights, diff_bias : ndarrays, shape=(OC, IC, KD, KH, KW) and (OC,)
        Filled.
"""

from importlib import import_module
from types import ModuleType

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.conv3d import direct_bricks
from kernels.conv3d.bricks import Plan as Plan
from kernels.conv3d.read import Inputs, inputs, plain_inputs
from kernels.conv3d.write import NO_MOMENTS, outputs
from kernels.deferred.statistics import mend_moments
from kernels.deferred.tensors import NO_MASK, Mask, Source
from kernels.ladder.direct import FEW_CHANNELS

#: Winograd tiles of blocked sources; along an axis where the tile is 1, the kernel has one tap.
TILES: tuple[Triple, ...] = ((2, 2, 2), (2, 4, 4), (4, 4, 4), (1, 2, 2), (1, 4, 4))


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
        d and h only, F(md, mh, 1); see `first_layer`.
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
    algorithm, packs = _bricks(tile), True
    if tile is None:
        cut = direct_bricks.cut_output(size, kernel, ICB)
    elif channels_last and _winograd("first_layer").supports(size, kernel, tile, channels_in[0]):
        cut = _winograd("winograd_stages").cut_output(size, tile, 1, OCB)
    elif not channels_last and kernel == _winograd("winograd_stages").kernel_of(tile):
        kept, in_groups = ICB + OCB if keeps_both else 0, _winograd("many_channels")
        cut = _winograd("winograd_stages").cut_output(size, tile, ICB, OCB, kept)
        uneven = any(first % LANES and second for first, second in (channels_in, channels_out))
        if not keeps_both and not uneven and in_groups.by_groups(cut, tile, ICB, OCB):
            algorithm, packs = in_groups, False
    elif channels_last and tile[2] == 1 and size[3] * channels_in[0] % LANES:
        raise ValueError(
            f"size is {size}; a row of {channels_in[0]} channels last must be whole vectors of {LANES}"
        )
    else:
        raise ValueError(f"kernel {kernel} has no Winograd form F{tile}")
    width = channels_in[0] if channels_last else LANES
    before = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2, (kernel[2] - 1) // 2
    return Plan(channels_in, channels_out, size, kernel, tile, width, before, cut, algorithm, packs)


def pays_together(p: Plan) -> bool:
    """Whether ``backward``, whose plan this is, takes less time than its two gradients one by one."""
    return p.tile is not None and _bricks(p.tile).both_pay(p)


def _bricks(tile: Triple | None) -> ModuleType:
    """The algorithm brick by brick; there is another one, `many_channels`, by groups of channels."""
    return _winograd("winograd_bricks") if tile else direct_bricks


def _winograd(module: str) -> ModuleType:
    """A module of Winograd, which only nets that take Winograd load."""
    return import_module(f"kernels.conv3d.{module}")


def packed_shape(p: Plan) -> tuple[int, ...]:
    """Shape of the weights that ``forward`` and ``backward_data`` take: filled by `pack`."""
    shape: tuple[int, ...] = p.algorithm.packed_shape(p)
    return shape


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool = False) -> None:
    """Pack weights (OC, IC, KD, KH, KW) for the plan's algorithm; ``adjoint`` for ``backward_data``.

    Where it ``packs`` nothing, the weights may be given as they are instead of what is packed: a copy.
    """
    # Channels of the forward convolution's sources, whichever way this plan goes.
    split = p.channels_out if adjoint else p.channels_in
    p.algorithm.pack(p, _spread(weights, split) if p.packs else weights, packed, adjoint=adjoint)


def moments_shape(p: Plan) -> tuple[int, int, int]:
    """Shape of the moments that ``forward`` fills: (bricks, 3, channels)."""
    return p.cut.bricks, 3, p.blocks_out * LANES


def sums_shape(p: Plan, destination: int) -> tuple[int, int, int]:
    """Shape of the sums in the mask of one destination of ``backward_data``."""
    return 2, p.cut.bricks, blocks(p.channels_out[destination]) * LANES


def forward(
    p: Plan, a: Source, b: Source, packed: Floats, bias: Floats, dst: Floats, moments: Doubles = NO_MOMENTS
) -> None:
    """Convolve what two deferred sources mean; add the bias, (OC,).

    ``moments``, of `moments_shape`, are filled with count, mean and sum of squared deviations of each brick.
    """
    p.algorithm.convolve(p, _inputs(p, a, b), packed, outputs((dst, NO_MASK.x), bias, moments), adjoint=False)
    mend_moments(dst, moments)


def backward_data(
    p: Plan,
    gradient: Source,
    packed: Floats,
    dst: tuple[Floats, Floats],
    masks: tuple[Mask, Mask] = (NO_MASK, NO_MASK),
) -> None:
    """Gradients of one or two sources."""
    p.algorithm.convolve(p, inputs(gradient), packed, outputs(dst, masks=masks), adjoint=True)


def backward_weights(
    p: Plan, a: Source, b: Source, gradient: Source, diff_weights: Floats, diff_bias: Floats
) -> None:
    """Gradients of weights and bias."""
    flat = diff_weights.reshape(*diff_weights.shape[:2], -1)
    spread = _spread(flat, p.channels_in)
    totals = _bricks(p.tile).backward_weights(p, _inputs(p, a, b), inputs(gradient), spread)
    diff_bias[:] = totals.sum(axis=0)[: diff_bias.size]
    _gather(spread, p.channels_in, flat)


def backward(
    p: Plan,
    gradient: Source,
    packed: Floats,
    a: Source,
    b: Source,
    dst: tuple[Floats, Floats],
    masks: tuple[Mask, Mask],
    diff_weights: Floats,
) -> None:
    """Gradients of sources and weights in one pass, by Winograd (`winograd_bricks`)."""
    flat = diff_weights.reshape(*diff_weights.shape[:2], -1)
    spread, source, to = _spread(flat, p.channels_out), inputs(a, b), outputs(dst, masks=masks)
    _bricks(p.tile).backward(p, inputs(gradient), packed, source, to, spread)
    _gather(spread, p.channels_out, flat)


def _inputs(p: Plan, a: Source, b: Source) -> Inputs:
    """What a plan's convolution, or its weight gradient, reads."""
    return plain_inputs(a.data) if p.width < LANES else inputs(a, b)


def _spread(weights: Floats, channels: tuple[int, int]) -> Floats:
    """Weights with zeros between the input channels of two sources, where the first fills no block."""
    first, gap = channels[0], -channels[0] % LANES if channels[1] else 0
    if gap == 0:
        return weights
    zeros = np.zeros((len(weights), gap, *weights.shape[2:]), np.float32)
    return np.concatenate([weights[:, :first], zeros, weights[:, first:]], axis=1)


def _gather(spread: Floats, channels: tuple[int, int], weights: Floats) -> None:
    """Undo `_spread`."""
    if spread is not weights:
        first = channels[0]
        weights[:, :first], weights[:, first:] = spread[:, :first], spread[:, first + -first % LANES :]
