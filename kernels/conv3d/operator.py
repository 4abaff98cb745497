"""Convolutions of the compiled graph: deferred sources in, raw outputs and their statistics out.

    forward            dst = weights * act(scale * [a, b] + shift) + bias, and the moments of dst
    backward_data      [a, b] = weights^T * (a dz + b x + d), masked, with the sums of batch norm
    backward_weights   (a dz + b x + d) x act(scale * [a, b] + shift)
    backward           both gradients in one pass

What is read is normalised while it is packed (`read`), what is written is masked and summed while it is in
cache (`write`): no pass over memory is left for batch norm, activation, bias or concatenation. A plan fixes
all sizes and an `Algorithm`; weights are packed for it once a step.

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

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.layout import blocks, pack_weights, weights_order
from kernels.base.simd import LANES
from kernels.conv3d import direct_bricks, first_layer, many_channels, winograd_bricks, winograd_stages
from kernels.conv3d.bricks import Cut
from kernels.conv3d.read import Inputs, inputs, plain_inputs
from kernels.conv3d.winograd_weights import pack_weights as transform_weights
from kernels.conv3d.write import NO_MOMENTS, Outputs, outputs
from kernels.deferred.statistics import mend_moments
from kernels.deferred.tensors import NO_MASK, Mask, Source
from kernels.ladder.direct import FEW_CHANNELS


class Algorithm(NamedTuple):
    """What one algorithm does with a `Plan`."""

    packed_shape: Callable[["Plan"], tuple[int, ...]]
    #: From weights to packed ones, which may be adjoint.
    pack: Callable[["Plan", Floats, Floats, bool], None]
    #: Of inputs with packed weights, which may be adjoint, to outputs.
    convolve: Callable[["Plan", Inputs, Floats, Outputs, bool], None]
    #: Chunks of the gradient of the bias, each with a sum of its own.
    chunks: Callable[["Plan"], int]
    #: Source, zeros before it, gradient, cut, form, diff_weights, diff_bias of each chunk.
    backward_weights: Callable[[Inputs, Triple, Inputs, Cut, Triple, Floats, Doubles], None]


class Plan(NamedTuple):
    """One direction of a convolution of stride 1 and "same" padding: sizes, algorithm, bricks."""

    channels_in: tuple[int, int]  # of the two sources
    channels_out: tuple[int, int]  # of the two destinations
    size: tuple[int, int, int, int]  # MB, D, H, W
    kernel: Triple
    tile: Triple | None  # Winograd F(tile); None: direct
    width: int  # channels in a block of the source: 16, or the few of a first layer
    cut: Cut
    algorithm: Algorithm

    @property
    def packs(self) -> bool:
        """Whether weights are packed before; else they are transformed where they are used."""
        return self.algorithm is not _GROUPS

    @property
    def form(self) -> Triple:
        """The tile of Winograd, or the kernel of direct convolution."""
        return self.tile or self.kernel

    @property
    def blocks_in(self) -> int:
        """Channel blocks of both sources."""
        return 1 if self.width < LANES else sum(map(blocks, self.channels_in))

    @property
    def blocks_out(self) -> int:
        """Channel blocks of both destinations."""
        return sum(map(blocks, self.channels_out))

    @property
    def before(self) -> Triple:
        """Zeros before the first voxel."""
        return (self.kernel[0] - 1) // 2, (self.kernel[1] - 1) // 2, (self.kernel[2] - 1) // 2


def _convolve_groups(p: Plan, source: Inputs, weights: Floats, to: Outputs, adjoint: bool) -> None:
    ends = sum(p.channels_in), sum(p.channels_out)
    order = weights_order((*(ends if adjoint else ends[::-1]), *p.kernel), adjoint=adjoint)
    many_channels.convolve(source, p.before, weights.reshape(-1), order, to, p.cut, p.form)


#: The register tiles of the rung `direct`.
_DIRECT = Algorithm(
    lambda p: direct_bricks.packed_shape(p.cut, p.kernel, p.blocks_in, p.blocks_out, p.width),
    lambda p, weights, packed, adjoint: pack_weights(weights, packed, adjoint=adjoint),
    lambda p, source, packed, to, _: direct_bricks.convolve(source, p.before, packed, to, p.cut, p.form),
    lambda p: direct_bricks.bias_chunks(p.cut, p.blocks_in, p.blocks_out),
    direct_bricks.backward_weights,
)
#: Winograd, brick by brick.
_BRICKS = Algorithm(
    lambda p: winograd_bricks.packed_shape(p.cut, p.form, p.blocks_in, p.blocks_out),
    lambda p, weights, packed, adjoint: transform_weights(weights, p.form, packed, adjoint=adjoint),
    lambda p, source, packed, to, _: winograd_bricks.convolve(source, p.before, packed, to, p.cut, p.form),
    lambda p: winograd_bricks.bias_chunks(p.cut, p.form, p.blocks_in, p.blocks_out),
    winograd_bricks.backward_weights,
)
#: The same of a first layer of few channels, along d and h only.
_FEW = _BRICKS._replace(
    packed_shape=lambda p: first_layer.packed_shape(p.cut, p.form, p.kernel[2], p.blocks_out, p.width)
)
#: Winograd of many channels, which takes the weights as they are.
_GROUPS = _BRICKS._replace(
    packed_shape=lambda p: (sum(p.channels_in) * sum(p.channels_out), math.prod(p.kernel)),
    pack=lambda p, weights, packed, adjoint: np.copyto(packed, weights.reshape(packed.shape)),
    convolve=_convolve_groups,
)


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
    if tile is None:
        cut, algorithm = direct_bricks.cut_output(size, kernel, ICB), _DIRECT
    elif channels_last and first_layer.supports(size, kernel, tile, channels_in[0]):
        cut, algorithm = winograd_stages.cut_output(size, tile, 1, OCB), _FEW
    elif not channels_last and kernel == winograd_stages.kernel_of(tile):
        make = winograd_bricks.cut_gradient if keeps_both else winograd_stages.cut_output
        cut = make(size, tile, ICB, OCB)
        uneven = any(first % LANES and second for first, second in (channels_in, channels_out))
        in_groups = not keeps_both and not uneven and many_channels.by_groups(cut, tile, ICB, OCB)
        algorithm = _GROUPS if in_groups else _BRICKS
    elif channels_last and tile[2] == 1 and size[3] * channels_in[0] % LANES:
        raise ValueError(
            f"size is {size}; a row of {channels_in[0]} channels last must be whole vectors of {LANES}"
        )
    else:
        raise ValueError(f"kernel {kernel} has no Winograd form F{tile}")
    width = channels_in[0] if channels_last else LANES
    return Plan(channels_in, channels_out, size, kernel, tile, width, cut, algorithm)


def pays_together(p: Plan) -> bool:
    """Whether ``backward``, whose plan this is, takes less time than its two gradients one by one."""
    return p.tile is not None and winograd_bricks.both_pay(p.cut, p.tile, p.blocks_out, p.blocks_in)


def packed_shape(p: Plan) -> tuple[int, ...]:
    """Shape of the weights that ``forward`` and ``backward_data`` take: filled by `pack`."""
    return p.algorithm.packed_shape(p)


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool = False) -> None:
    """Pack weights (OC, IC, KD, KH, KW) for the plan's algorithm; ``adjoint`` for ``backward_data``.

    Where it ``packs`` nothing, the weights may be given as they are instead of what is packed: a copy.
    """
    # Channels of the forward convolution's sources, whichever way this plan goes.
    split = p.channels_out if adjoint else p.channels_in
    p.algorithm.pack(p, _spread(weights, split) if p.packs else weights, packed, adjoint)


def moments_shape(p: Plan) -> tuple[int, int, int]:
    """Shape of the moments that ``forward`` fills: (bricks, 3, channels)."""
    return p.cut.bricks, 3, p.blocks_out * LANES


def sums_shape(p: Plan, destination: int) -> tuple[int, int, int]:
    """Shape of the sums in the mask of one destination of ``backward_data``."""
    return 2, p.cut.bricks, blocks(p.channels_out[destination]) * LANES


def forward(
    p: Plan, a: Source, b: Source, packed: Floats, bias: Floats, dst: Floats, moments: Doubles = NO_MOMENTS
) -> None:
    """Convolve what two deferred sources mean; add the bias, of CB * 16 with zeros past the last channel.

    ``moments``, of `moments_shape`, are filled with count, mean and sum of squared deviations of each brick.
    """
    p.algorithm.convolve(p, _inputs(p, a, b), packed, outputs((dst, NO_MASK.x), bias, moments), False)
    mend_moments(dst, moments)


def backward_data(
    p: Plan,
    gradient: Source,
    packed: Floats,
    dst: tuple[Floats, Floats],
    masks: tuple[Mask, Mask] = (NO_MASK, NO_MASK),
) -> None:
    """Gradients of one or two sources."""
    p.algorithm.convolve(p, inputs(gradient), packed, outputs(dst, masks=masks), True)


def backward_weights(
    p: Plan, a: Source, b: Source, gradient: Source, diff_weights: Floats, diff_bias: Floats
) -> None:
    """Gradients of weights and bias."""
    flat = diff_weights.reshape(*diff_weights.shape[:2], -1)
    spread, totals = _spread(flat, p.channels_in), np.empty((p.algorithm.chunks(p), p.blocks_out * LANES))
    source, form = _inputs(p, a, b), p.form
    p.algorithm.backward_weights(source, p.before, inputs(gradient), p.cut, form, spread, totals)
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
    assert p.tile is not None, "only Winograd shares transformed tiles"
    flat = diff_weights.reshape(*diff_weights.shape[:2], -1)
    spread, source, to = _spread(flat, p.channels_out), inputs(a, b), outputs(dst, masks=masks)
    winograd_bricks.backward(inputs(gradient), p.before, packed, source, to, p.cut, p.tile, spread)
    _gather(spread, p.channels_out, flat)


def _inputs(p: Plan, a: Source, b: Source) -> Inputs:
    """What a plan's convolution, or its weight gradient, reads."""
    return plain_inputs(a.data) if p.width < LANES else inputs(a, b)


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


def _gather(spread: Floats, channels: tuple[int, int], weights: Floats) -> None:
    """Undo `_spread`."""
    if spread is not weights:
        weights[:] = spread[:, _places(channels)]
