"""The register tile: sums of 16 output channels and several voxels stay in registers over all channels in.

    dst[n, d, h, w, oc] = sum of src[n, d + kd - PD, h + kh - PH, w + kw - PW, ic] weights[oc, ic, kd, kh, kw]

src (MB, D, H, W, IC), weights (OC, IC, KD, KH, KW) of any sizes, zeros outside ("same": (K - 1) // 2 before).
"""

import numba
import numpy as np


@numba.njit(fastmath=True)
def _convolve(padded, filters, dst):
    """filters: (OC / 16, KD, KH, KW, IC, 16); dst: (MB, D, H, W, OC) with OC a multiple of 16."""
    # <answer>
    MB, D, H, W, _ = dst.shape
    blocks, KD, KH, KW, IC, _ = filters.shape
    for n in range(MB):
        for d in range(D):
            for h in range(H):
                for block in range(blocks):
                    for w in range(W):
                        tile = np.zeros(16, np.float32)
                        for kd in range(KD):
                            for kh in range(KH):
                                for kw in range(KW):
                                    for ic in range(IC):
                                        x = padded[n, d + kd, h + kh, w + kw, ic]
                                        for lane in range(16):
                                            tile[lane] += x * filters[block, kd, kh, kw, ic, lane]
                        for lane in range(16):
                            dst[n, d, h, w, 16 * block + lane] = tile[lane]
    # </answer>


def forward(src, weights):
    """Return the convolution of a batch."""
    # <answer>
    OC, IC, *kernel = weights.shape
    blocks = -(-OC // 16)
    filters = np.zeros((16 * blocks, IC, *kernel), np.float32)
    filters[:OC] = weights
    filters = filters.reshape(blocks, 16, IC, *kernel).transpose(0, 3, 4, 5, 2, 1).copy()
    pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel]
    padded = np.pad(src, [(0, 0), *pads, (0, 0)])
    dst = np.empty((*src.shape[:4], 16 * blocks), np.float32)
    _convolve(padded, filters, dst)
    return np.ascontiguousarray(dst[..., :OC])
    # </answer>
