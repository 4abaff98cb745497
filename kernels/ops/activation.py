"""Activations: functions of one number whose derivative follows from their result.

                value                                       derivative, from the result y
    ReLU        max(x, 0)                                   1 where y > 0, else 0
    leaky ReLU  x where x > 0, else slope * x               1 where y > 0, else slope
    ELU         x where x > 0, else alpha * (exp(x) - 1)    1 where y > 0, else y + alpha
    sigmoid     1 / (1 + exp(-x))                           y * (1 - y)
    PReLU       x where x > 0, else slope[c] * x            from x: 1 where x > 0, else slope[c]

Backward needs ``dst``, not ``src``. The next operator's source is ``dst``, so it is kept anyway, and ``src``
can be freed. The layout does not matter. Forward reads and writes 4 bytes an item, backward reads 8 and
writes 4. float32 runs the compiled loops, float64 the NumPy expressions, which are the reference.

PReLU learns its slopes, one a channel. They may become 0 or negative, so that the result does not tell the
sign of ``x``: backward reads ``src``, and sums the gradient of each slope, ``diff_dst * x`` where ``x <= 0``.

In the compiled graph readers apply ReLU and leaky ReLU (``kernels.deferred``). ELU's exponential would be
computed again by each reader, for each window that a voxel is in, and PReLU has sums of its own in backward.
`normalize_blocked` writes their result, with the normalisation before them in the same pass, and
`mask_blocked` is the one pass of backward.

A new activation is an `Activation` and a case in `_value` and `_gradient`. NaN stays NaN, so that a diverged
run is seen: a comparison that NaN fails must be the one that keeps the value, ``x <= 0`` and not ``x > 0``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Array, Doubles, Floats, tensor
from kernels.base.buffers import CHUNK, empty
from kernels.base.exponential import expm1, sigmoid
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, add_to_doubles, broadcast, fma, load, read, store, where_positive
from kernels.deferred.masking import RUN, band_of_task, bands, clear
from kernels.deferred.normalizing import aligned, flat_source
from kernels.deferred.tensors import Mask, Shape, Source

_RELU, _LEAKY, _SIGMOID, _ELU, _PRELU = range(5)
_ZERO, _ONE = np.float32(0), np.float32(1)
# Slopes of neighbouring items that the inner loop reads: one slope repeated, or those of some voxels, so few
# that the gradient's sums, a row of float64 for each chunk, are small beside the chunk.
_ROW, _ROW_OF_VOXELS = 2048, 256


class Activation(NamedTuple):
    """The reference of one activation, and the case of the compiled loops that computes it."""

    value: Callable[[Array], Array]  # of src
    gradient: Callable[[Array, Array], Array]  # of diff_dst and dst
    case: int
    slope: float = 0.0  # below 0; of ELU alpha

    @property
    def is_deferred(self) -> bool:
        """Whether readers of the compiled graph apply it: it takes them one multiplication."""
        return self.case in (_RELU, _LEAKY)


def _sigmoid(src: Array) -> Array:
    # The exponential of a number that is not above 0 does not overflow.
    power = np.exp(-np.abs(src))
    return np.where(src >= 0.0, 1.0, power) / (1.0 + power)


RELU = Activation(lambda x: np.maximum(x, 0.0), lambda dy, y: np.where(y <= 0.0, 0.0, dy), _RELU)
SIGMOID = Activation(_sigmoid, lambda dy, y: dy * y * (1.0 - y), _SIGMOID)
#: Of fused kernels, which get the slopes beside it.
PRELU = RELU._replace(case=_PRELU)


def leaky_relu(slope: float) -> Activation:
    """Leaky ReLU. Its slope must be finite and above 0, so that ``dst`` has the sign of ``src``."""
    if not 0.0 < slope < np.inf:
        raise ValueError(f"slope must be above 0 and finite (use relu for 0), got {slope}")
    slope = float(slope)
    return Activation(
        lambda x: np.where(x <= 0.0, slope * x, x),
        lambda dy, y: np.where(y <= 0.0, slope * dy, dy),
        _LEAKY,
        slope,
    )


def elu(alpha: float) -> Activation:
    """ELU. Its ``alpha`` must be finite and above 0, so that ``dst`` has the sign of ``src``."""
    if not 0.0 < alpha < np.inf:
        raise ValueError(f"alpha must be above 0 and finite (use relu for 0), got {alpha}")
    alpha = float(alpha)
    return Activation(
        lambda x: np.where(x <= 0.0, alpha * np.expm1(np.minimum(x, 0.0)), x),
        lambda dy, y: np.where(y <= 0.0, dy * (y + alpha), dy),
        _ELU,
        alpha,
    )


def forward(src: Array, activation: Activation) -> Array:
    """Apply an activation to each item of ``src``, a float32 or float64 array of any shape.

    Raises
    ------
    TypeError, ValueError
        If ``src`` is another array, or empty.
    """
    src = tensor("src", src)
    if src.dtype == np.float64:
        return activation.value(src)
    return _forward(src, _repeated(activation.slope), activation.case)


def backward(diff_dst: Array, dst: Array, activation: Activation) -> Array:
    """Gradient of the source: ``diff_dst`` times the derivative, which follows from ``dst``.

    Raises
    ------
    TypeError, ValueError
        If the two arrays differ in dtype or shape.
    """
    dst = tensor("dst", dst)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst.shape, dtype=dst.dtype)
    if dst.dtype == np.float64:
        return activation.gradient(diff_dst, dst)
    return _backward(diff_dst, dst, _repeated(activation.slope), activation.case)[0]


def prelu_forward(src: Array, slope: Array) -> Array:
    """Apply PReLU to ``src`` of shape (..., C); ``slope`` is (C,), or (1,) for all channels.

    Raises
    ------
    TypeError, ValueError
        If the arrays differ in dtype, or ``slope`` has another shape.
    """
    src, slopes = _with_slopes(src, slope)
    if src.dtype == np.float64:
        return np.where(src <= 0.0, slopes * src, src)
    return _forward(src, _row_of(slopes), _PRELU)


def prelu_backward(diff_dst: Array, src: Array, slope: Array) -> tuple[Array, Array]:
    """Gradients of source and slope.

    Raises
    ------
    TypeError, ValueError
        As `prelu_forward`, and if ``diff_dst`` has not the shape of ``src``.
    """
    src, slopes = _with_slopes(src, slope)
    diff_dst = tensor("diff_dst", diff_dst, shape=src.shape, dtype=src.dtype)
    if src.dtype == np.float64:
        diff_src = np.where(src <= 0.0, slopes * diff_dst, diff_dst)
        sums = np.where(src <= 0.0, diff_dst * src, 0.0)
    else:
        diff_src, sums = _backward(diff_dst, src, _row_of(slopes), _PRELU)
    sums = sums.reshape(-1, slopes.size).sum(axis=0)
    return diff_src, (sums if slope.size > 1 else sums.sum(keepdims=True)).astype(src.dtype)


def _with_slopes(src: Array, slope: Array) -> tuple[Array, Array]:
    """The source, and a slope for each of its channels."""
    src = tensor("src", src)
    channels = src.shape[-1:]
    slope = tensor("slope", slope, dtype=src.dtype)
    if slope.shape not in (channels, (1,)):
        raise ValueError(f"slope must have shape {channels}, or (1,), got {slope.shape}")
    return src, np.ascontiguousarray(np.broadcast_to(slope, channels))


@functools.lru_cache(maxsize=16)
def _repeated(slope: float) -> Floats:
    return np.full(_ROW, slope, np.float32)


def _row_of(slopes: Array) -> Floats:
    """The slopes of neighbouring voxels, so many that the inner loop is long."""
    return np.tile(slopes, -(-_ROW_OF_VOXELS // slopes.size))


# --- float32: the case is a constant, so the compiler keeps one branch and vectorises it -----------------


@kernel
def _value(x: np.float32, slope: np.float32, case: int) -> np.float32:
    if case == _SIGMOID:
        return sigmoid(x)
    if case == _RELU:
        below = _ZERO
    elif case == _ELU:
        below = slope * expm1(x)
    else:
        below = slope * x
    return below if x <= _ZERO else x


@kernel
def _gradient(dy: np.float32, y: np.float32, slope: np.float32, case: int) -> np.float32:
    if case == _SIGMOID:
        return dy * y * (_ONE - y)
    if case == _RELU:
        below = _ZERO
    elif case == _ELU:
        below = dy * (y + slope)
    else:
        below = slope * dy
    return below if y <= _ZERO else dy


def _forward(src: Array, slopes: Floats, case: int) -> Floats:
    dst = empty(src.shape)
    _make_forward(case)(src.reshape(-1), slopes, dst.reshape(-1))
    return dst


def _backward(diff_dst: Array, known: Array, slopes: Floats, case: int) -> tuple[Floats, Doubles]:
    """Gradient of the source, and sums for PReLU's slopes; ``known`` is ``dst``, of PReLU ``src``."""
    diff_src, chunks = empty(known.shape), -(-known.size // _chunk(slopes.size)) if case == _PRELU else 0
    partial = np.zeros((chunks, slopes.size))
    _make_backward(case)(diff_dst.reshape(-1), known.reshape(-1), slopes, diff_src.reshape(-1), partial)
    return diff_src, partial.sum(axis=0)


@kernel
def _chunk(row: int) -> int:
    """Items that one thread takes at a time: whole rows."""
    return max(CHUNK // row, 1) * row


@functools.cache
def _make_forward(case: int) -> Callable[..., None]:
    @parallel_kernel
    def forward(src: Floats, slopes: Floats, dst: Floats) -> None:
        row, size = slopes.size, _chunk(slopes.size)
        for chunk in prange((src.size + size - 1) // size):
            for first in range(chunk * size, min((chunk + 1) * size, src.size), row):
                x, y = src[first : first + row], dst[first : first + row]
                for i in range(x.size):
                    y[i] = _value(x[i], slopes[i], case)

    return forward


@functools.cache
def _make_backward(case: int) -> Callable[..., None]:
    @parallel_kernel
    def backward(diff_dst: Floats, known: Floats, slopes: Floats, diff_src: Floats, sums: Doubles) -> None:
        row, size = slopes.size, _chunk(slopes.size)
        for chunk in prange((known.size + size - 1) // size):
            for first in range(chunk * size, min((chunk + 1) * size, known.size), row):
                at = slice(first, first + row)
                dy, y, dx = diff_dst[at], known[at], diff_src[at]
                for i in range(y.size):
                    dx[i] = _gradient(dy[i], y[i], slopes[i], case)
                if case == _PRELU:
                    total = sums[chunk]
                    for i in range(y.size):
                        total[i] += dy[i] * y[i] if y[i] <= _ZERO else _ZERO

    return backward


# --- Fused with the normalisation before: blocked tensors, one pass each way --------------------------------


def normalize_blocked(source: Source, slopes: Floats, activation: Activation, dst: Floats) -> None:
    """Write ``act(scale * data + shift)``.

    Parameters
    ----------
    source : Source, data of shape (MB, CB, D, H, W, 16)
        Its own slope is not read.
    slopes : array, shape (CB * 16,)
        `Activation.slope` of each channel, with zeros past the last one; those of PReLU.
    activation : Activation
        One that leaves 0 as it is. PReLU is `PRELU`.
    dst : array, shape (MB, CB, D, H, W, 16)
        Filled.
    """
    _make_normalize(activation.case)(flat_source(source), slopes, dst.shape, dst.reshape(-1))


def mask_blocked(
    diff: Floats, mask: Mask, slopes: Floats, activation: Activation, slope_sums: Doubles
) -> None:
    """Turn ``dy`` into ``dz`` in place, and fill the mask's sums, as `kernels.deferred.masking.apply_mask`.

    Parameters
    ----------
    diff : array, shape (MB, CB, D, H, W, 16)
        Changed.
    mask : Mask
        Its own slope is not read.
    slopes, activation
        As of `normalize_blocked`.
    slope_sums : float64 array, shape (partials, CB * 16)
        Filled with sums of ``dy * z`` where ``z <= 0``, of PReLU; with zeros for other activations.
    """
    mask = mask._replace(x=mask.x.reshape(-1))
    _make_mask(activation.case)(diff.reshape(-1), diff.shape, mask, slopes, slope_sums)


@functools.cache
def _make_normalize(case: int) -> Callable[..., None]:
    @parallel_kernel
    def normalize(source: Source, slopes: Floats, shape: Shape, dst: Floats) -> None:
        MB, CB, D, H, W, _ = shape
        for task in prange(MB * CB * D * bands(H, W)):
            first, count, block, _ = band_of_task(task, shape)
            scale, shift = load(source.scale, block * LANES), load(source.shift, block * LANES)
            slope = load(slopes, block % CB * LANES) if case == _PRELU else broadcast(_ONE)
            for run in range(first, first + count, RUN):
                start, stop = run * LANES, min(run + RUN, first + count) * LANES
                for i in range(start, stop, LANES):
                    store(dst, i, read(load(source.data, i), scale, shift, slope))
                if case != _PRELU:
                    y, alpha = dst[start:stop], slopes[0]
                    for i in range(y.size):
                        y[i] = _value(y[i], alpha, case)

    return normalize


@functools.cache
def _make_mask(case: int) -> Callable[..., None]:
    @parallel_kernel
    def apply(diff: Floats, shape: Shape, mask: Mask, slopes: Floats, slope_sums: Doubles) -> None:
        MB, CB, D, H, W, _ = shape
        for task in prange(MB * CB * D * bands(H, W)):
            first, count, block, partial = band_of_task(task, shape)
            channel, z = block % CB * LANES, aligned(RUN * LANES)
            clear(mask, block, partial)
            slope_sums[partial, channel : channel + LANES] = 0.0
            for run in range(first, first + count, RUN):
                start, stop = run * LANES, min(run + RUN, first + count) * LANES
                if case == _PRELU:
                    below = _mask_prelu(diff, start, stop, mask, block, load(slopes, channel))
                    add_to_doubles(slope_sums, partial * slope_sums.shape[1] + channel, below)
                else:
                    _normalize_run(mask, block, start, stop, z)
                    dy, alpha = diff[start:stop], slopes[0]
                    for i in range(dy.size):
                        dy[i] = _gradient(dy[i], _value(z[i], alpha, case), alpha, case)
                _sum_run(diff, start, stop, mask, block, partial, channel)

    return apply


@kernel
def _normalize_run(mask: Mask, block: int, start: int, stop: int, z: Floats) -> None:
    """Write ``scale * x + shift`` of a run to ``z``."""
    scale, shift = load(mask.scale, block * LANES), load(mask.shift, block * LANES)
    for i in range(start, stop, LANES):
        store(z, i - start, fma(scale, load(mask.x, i), shift))


@kernel
def _mask_prelu(diff: Floats, start: int, stop: int, mask: Mask, block: int, slope: Any) -> Any:
    """Turn ``dy`` into ``dz`` in a run; return the sum of ``dy * z`` where ``z <= 0``."""
    scale, shift = load(mask.scale, block * LANES), load(mask.shift, block * LANES)
    zero = total = broadcast(_ZERO)
    for i in range(start, stop, LANES):
        z, dy = fma(scale, load(mask.x, i), shift), load(diff, i)
        store(diff, i, where_positive(z, dy, slope))
        total = fma(dy, z - where_positive(z, z, zero), total)
    return total


@kernel
def _sum_run(diff: Floats, start: int, stop: int, mask: Mask, block: int, partial: int, channel: int) -> None:
    """Add ``dz`` and ``dz * (x - mean)`` of a run, which is in cache, to the mask's sums."""
    mean, total = load(mask.mean, block * LANES), broadcast(_ZERO)
    product = total
    for i in range(start, stop, LANES):
        dz = load(diff, i)
        total, product = total + dz, fma(dz, load(mask.x, i) - mean, product)
    to = partial * mask.sums.shape[2] + channel
    add_to_doubles(mask.sums, to, total)
    add_to_doubles(mask.sums, mask.sums.size // 2 + to, product)
