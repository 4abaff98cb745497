"""Backward of batch norm in training: mean and variance depend on the data, so they pass a gradient, too.

x = (src - mean) / sqrt(variance + epsilon),   dst = scale x + shift,   over N rows, for each channel
"""

import numpy as np


def backward(diff_dst, src, scale, epsilon):
    """Return diff_src, diff_scale and diff_shift; diff_dst and src are (N, C), the variance divides by N."""
    # <answer>
    N = len(src)
    mean, variance = src.mean(0), src.var(0)
    rstd = 1 / np.sqrt(variance + epsilon)
    x = (src - mean) * rstd
    diff_shift = diff_dst.sum(0)
    diff_scale = (diff_dst * x).sum(0)
    diff_src = scale * rstd * (diff_dst - diff_shift / N - x * diff_scale / N)
    return diff_src, diff_scale, diff_shift
    # </answer>
