"""A matrix product for each tap of the kernel, over all voxels."""

import numpy as np


def forward(src, weights):
    MB, D, H, W, _ = src.shape
    pads = [((k - 1) // 2, k // 2) for k in weights.shape[2:]]
    padded = np.pad(src, [(0, 0), *pads, (0, 0)])
    dst = np.zeros((MB, D, H, W, len(weights)), np.float32)
    for kd, kh, kw in np.ndindex(*weights.shape[2:]):
        dst += padded[:, kd : kd + D, kh : kh + H, kw : kw + W] @ weights[:, :, kd, kh, kw].T
    return dst
