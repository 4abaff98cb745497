"""The register tile: sums of 16 output channels and several voxels stay in registers over all channels in.

    dst[n, d, h, w, oc] = sum of src[n, d + kd - PD, h + kh - PH, w + kw - PW, ic] weights[oc, ic, kd, kh, kw]

src (MB, D, H, W, IC), weights (OC, IC, KD, KH, KW) of any sizes, zeros outside ("same": (K - 1) // 2 before).

Vectors of 16 float32 (`kernels.base.simd`): ``load(array, at)`` and ``store(array, at, vector)`` of an array
with one axis, ``broadcast(number)``, ``fma(a, b, c)`` is a b + c. A local variable that holds a vector is a
register; an element of an array is not.
"""

import numba
import numpy as np

from kernels.base.simd import broadcast, fma, load, store


@numba.njit(fastmath=True)
def _convolve(padded, filters, dst, sizes):
    """All with one axis: padded (MB, ...), filters (OC / 16, KD, KH, KW, IC, 16), dst (MB, D, H, W, OC).

    D, H and W are those of dst, OC is a multiple of 16, ``sizes`` is (MB, D, H, W, IC, OC / 16, KD, KH, KW).
    """
    # <answer>
    MB, D, H, W, IC, blocks, KD, KH, KW = sizes
    PH, PW, taps = H + KH - 1, W + KW - 1, KD * KH * KW * IC * 16
    zero = broadcast(np.float32(0))
    for row in range(MB * D * H):
        n, d, h = row // (D * H), row // H % D, row % H
        for block in range(blocks):
            for w in range(0, W, 4):
                s0, s1, s2, s3 = zero, zero, zero, zero
                tap = block * taps
                for kd in range(KD):
                    for kh in range(KH):
                        at = (((n * (D + KD - 1) + d + kd) * PH + h + kh) * PW + w) * IC
                        for x in range(at, at + KW * IC):
                            weights = load(filters, tap)
                            s0 = fma(broadcast(padded[x]), weights, s0)
                            s1 = fma(broadcast(padded[x + IC]), weights, s1)
                            s2 = fma(broadcast(padded[x + 2 * IC]), weights, s2)
                            s3 = fma(broadcast(padded[x + 3 * IC]), weights, s3)
                            tap += 16
                to = ((row * W + w) * blocks + block) * 16
                store(dst, to, s0)
                store(dst, to + 16 * blocks, s1)
                store(dst, to + 32 * blocks, s2)
                store(dst, to + 48 * blocks, s3)
    # </answer>


def forward(src, weights):
    """Return the convolution of a batch."""
    # <answer>
    MB, D, H, W, _ = src.shape
    OC, IC, *kernel = weights.shape
    blocks, wide = -(-OC // 16), -(-W // 4) * 4  # tiles of four voxels: the last may stick out
    filters = np.zeros((16 * blocks, IC, *kernel), np.float32)
    filters[:OC] = weights
    filters = filters.reshape(blocks, 16, IC, *kernel).transpose(0, 3, 4, 5, 2, 1).reshape(-1)
    pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel]
    pads[2] = (pads[2][0], pads[2][1] + wide - W)
    padded = np.pad(src, [(0, 0), *pads, (0, 0)])
    dst = np.empty((MB, D, H, wide, 16 * blocks), np.float32)
    _convolve(padded.reshape(-1), filters, dst.reshape(-1), (MB, D, H, wide, IC, blocks, *kernel))
    return np.ascontiguousarray(dst[:, :, :, :W, :OC])
    # </answer>
