"""Step by step back: through x, then the variance, then the mean."""

import numpy as np


def backward(diff_dst, src, scale, epsilon):
    N = src.shape[0]
    centred = src - src.sum(0) / N
    variance = np.einsum("nc,nc->c", centred, centred) / N
    rstd = (variance + epsilon) ** -0.5
    diff_x = diff_dst * scale
    diff_rstd = np.einsum("nc,nc->c", diff_x, centred)
    diff_variance = diff_rstd * -0.5 * rstd**3
    diff_centred = diff_x * rstd + 2 * diff_variance * centred / N
    diff_src = diff_centred - diff_centred.mean(0)
    return diff_src, np.einsum("nc,nc,c->c", diff_dst, centred, rstd), np.einsum("nc->c", diff_dst)
