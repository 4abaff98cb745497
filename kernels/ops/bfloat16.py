"""float32 sent as bfloat16: half the bytes, and what rounding takes is given back the next time.

A bfloat16 is the upper half of a float32: the same exponents, 8 bits of the number instead of 24.
Rounding is to nearest, ties to even, by integer arithmetic: adding just less than half of the last
kept bit, and that bit itself, carries exactly when the number is to be rounded up.

    sent     = round(src + residual)
    residual = src + residual - sent          for the next call: error feedback

So a number too small to be sent this time adds up until it is not: over many steps nothing is lost.
What is not finite is sent as it is and leaves no residual.

Source: Seide et al., "1-bit stochastic gradient descent" (2014); Karimireddy et al., "Error feedback
fixes SignSGD" (2019).

Both functions raise TypeError or ValueError if dtypes or shapes differ.
"""

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Floats, in_place, tensor
from kernels.base.buffers import CHUNK, chunk_count
from kernels.base.jit import parallel_kernel, prange

_Halves = npt.NDArray[np.uint16]

_SIGN_OFF, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_HALF, _ONE, _SHIFT = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
# Set in a NaN that is cut, or one whose set bits are all in the lower half would become infinity.
_QUIET = np.uint32(0x40)


def encode(src: Floats, residual: Floats, dst: _Halves) -> None:
    """Fill ``dst``, uint16 (n,), with the bits of ``src + residual``, rounded; keep what rounding took.

    ``residual``, float32 (n,) as ``src``, is what earlier calls have kept back, zeros at first.
    """
    src = tensor("src", src, axes="n", dtype=np.float32)
    tensor("residual", residual, dtype=np.float32, shape=src.shape)
    tensor("dst", dst, dtype=np.uint16, shape=src.shape)
    in_place("residual", residual)
    in_place("dst", dst)
    _encode(src, residual, dst)


@parallel_kernel
def _encode(src: Floats, residual: Floats, dst: _Halves) -> None:
    for chunk in prange(chunk_count(src.size)):
        at = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, src.size))
        x, kept, sent = src[at], residual[at], dst[at]
        for i in range(x.size):
            kept[i] += x[i]
        bits = kept.view(np.uint32)
        cut = np.empty(x.size, np.uint32)
        for i in range(x.size):
            up = (bits[i] + _HALF + ((bits[i] >> _SHIFT) & _ONE)) >> _SHIFT
            is_nan = (bits[i] & _SIGN_OFF) > _INFINITY
            cut[i] = ((bits[i] >> _SHIFT) | _QUIET) if is_nan else up
        value = (cut << _SHIFT).view(np.float32)
        for i in range(x.size):
            sent[i] = cut[i]
            # Infinity minus itself is no number, and would be added for ever.
            kept[i] = kept[i] - value[i] if np.isfinite(value[i]) else np.float32(0)


def decode_sum(src: _Halves, dst: Floats) -> None:
    """Fill ``dst``, float32 (n,), with the sums of ``src``, uint16 (terms, n), in the order of the terms."""
    tensor("dst", dst, axes="n", dtype=np.float32)
    in_place("dst", dst)
    src = tensor("src", src, axes="terms, n", dtype=np.uint16)
    src = tensor("src", src, shape=(len(src), *dst.shape), dtype=np.uint16)
    _decode_sum(src, dst)


@parallel_kernel
def _decode_sum(src: _Halves, dst: Floats) -> None:
    for chunk in prange(chunk_count(dst.size)):
        at = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, dst.size))
        total = dst[at]
        bits = np.empty(total.size, np.uint32)
        for term in range(src.shape[0]):
            received = src[term, at]
            for i in range(bits.size):
                bits[i] = np.uint32(received[i]) << _SHIFT
            value = bits.view(np.float32)
            for i in range(bits.size):
                total[i] = total[i] + value[i] if term else value[i]
