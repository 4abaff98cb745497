"""Winograd in one dimension, by hand: F(2, 3) needs 4 products of data and taps, not 6; F(4, 3) 6, not 12.

    dst[i] = src[i] taps[0] + src[i + 1] taps[1] + src[i + 2] taps[2]

Only products of something from ``src`` and something from ``taps`` count: multiples by constants are free.
Larger tiles need fewer products, and lose digits: `rounding` measures it, `growth` bounds it.
"""

import numpy as np


def f23(src, taps):
    """Return 2 results from 4 numbers and 3 taps, with 4 products."""
    # <answer>
    d0, d1, d2, d3 = src
    g0, g1, g2 = taps
    m0 = (d0 - d2) * g0
    m1 = (d1 + d2) * ((g0 + g1 + g2) * 0.5)
    m2 = (d2 - d1) * ((g0 - g1 + g2) * 0.5)
    m3 = (d1 - d3) * g2
    return [m0 + m1 + m2, m1 - m2 - m3]
    # </answer>


def f43(src, taps):
    """Return 4 results from 6 numbers and 3 taps, with 6 products."""
    # <answer>
    d0, d1, d2, d3, d4, d5 = src
    g0, g1, g2 = taps
    m0 = (d0 * 4.0 - d2 * 5.0 + d4) * (g0 * (1 / 4))
    m1 = (d3 + d4 - d1 * 4.0 - d2 * 4.0) * ((g0 + g1 + g2) * (-1 / 6))
    m2 = (d1 * 4.0 - d2 * 4.0 - d3 + d4) * ((g0 - g1 + g2) * (-1 / 6))
    m3 = (d3 * 2.0 + d4 - d1 * 2.0 - d2) * (g0 * (1 / 24) + g1 * (1 / 12) + g2 * (1 / 6))
    m4 = (d1 * 2.0 - d2 - d3 * 2.0 + d4) * (g0 * (1 / 24) - g1 * (1 / 12) + g2 * (1 / 6))
    m5 = (d1 * 4.0 - d3 * 5.0 + d5) * g2
    return [
        m0 + m1 + m2 + m3 + m4,
        m1 - m2 + m3 * 2.0 - m4 * 2.0,
        m1 + m2 + m3 * 4.0 + m4 * 4.0,
        m1 - m2 + m3 * 8.0 - m4 * 8.0 + m5,
    ]
    # </answer>


def rounding(function, src, taps):
    """Return the largest error of ``function(src, taps)`` in float32, divided by its largest result.

    ``src`` (numbers, tiles) and ``taps`` (3, tiles) are float64, all of them numbers that float32 has, too;
    the function in float64 is exact enough. It returns a list of arrays, one for each result of a tile.
    """
    # <answer>
    exact = np.array(function(src, taps))
    found = np.array(function(src.astype(np.float32), taps.astype(np.float32)))
    return np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max()
    # </answer>


def growth(inputs, weights, outputs):
    """Return by how much rounding can grow at most: outputs @ ((inputs @ src) * (weights @ taps)).

    Each number of ``src`` and ``taps`` is off by 1, say, and all errors have the worst sign: for a result,
    the sum of |outputs| times the sums of |inputs| and of |weights| along their rows; of all results the
    largest. ``inputs`` (n, n), ``weights`` (n, 3), ``outputs`` (m, n).
    """
    # <answer>
    products = np.abs(inputs).sum(axis=1) * np.abs(weights).sum(axis=1)
    return (np.abs(outputs) @ products).max()
    # </answer>
