"""im2col: a convolution as one product of matrices.

Row v of the matrix holds the K x K x K neighbourhood of voxel v, zeros outside the volume. The order in a row
is (kd, kh, kw, channel). Then convolution is ``columns @ weights``.
"""

import numpy as np


def im2col(src, K):
    """Return the columns of a volume, shape=(D, H, W, C), for an odd K: shape=(D * H * W, K**3 * C)."""
    # <answer>
    D, H, W, C = src.shape
    before = K // 2
    padded = np.pad(src, [(before, before)] * 3 + [(0, 0)])
    columns = np.empty((D, H, W, K, K, K, C), src.dtype)
    for kd in range(K):
        for kh in range(K):
            for kw in range(K):
                columns[:, :, :, kd, kh, kw] = padded[kd : kd + D, kh : kh + H, kw : kw + W]
    return columns.reshape(D * H * W, K**3 * C)
    # </answer>
