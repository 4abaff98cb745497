"""Matrices made from the points, by Lagrange's polynomials; other points than the solution's."""

import numpy as np


def _matrices(points, m):
    n = m + 2
    outputs = [[a**i for a in points] + [float(i == m - 1)] for i in range(m)]
    weights, inputs = [], []
    for j, a in enumerate(points):
        others = points[:j] + points[j + 1 :]
        weights.append([a**k / np.prod([a - b for b in others]) for k in range(3)])
        inputs.append([*np.poly(others)[::-1], 0.0])
    weights.append([0.0, 0.0, 1.0])
    inputs.append([*np.poly(points)[::-1]])
    return np.array(inputs)[:, :n].tolist(), np.array(weights).tolist(), np.array(outputs).tolist()


def _dot(row, numbers):
    total = None
    for factor, number in zip(row, numbers, strict=True):
        if factor:
            term = number * factor
            total = term if total is None else total + term
    return total


def _filter(points, m, src, taps):
    inputs, weights, outputs = _matrices(points, m)
    products = [_dot(b, src) * _dot(g, taps) for b, g in zip(inputs, weights, strict=True)]
    return [_dot(row, products) for row in outputs]


def f23(src, taps):
    return _filter([0.0, 1.0, -1.0], 2, src, taps)


def f43(src, taps):
    return _filter([0.0, 1.0, -1.0, 0.5, -0.5], 4, src, taps)


def rounding(function, src, taps):
    worst = largest = 0.0
    for tile in range(src.shape[1]):
        exact = function(src[:, tile], taps[:, tile])
        found = function(np.float32(src[:, tile]), np.float32(taps[:, tile]))
        worst = max([worst, *(abs(float(a) - b) for a, b in zip(found, exact, strict=True))])
        largest = max([largest, *map(abs, exact)])
    return worst / largest


def growth(inputs, weights, outputs):
    worst = 0.0
    for row in outputs:
        total = 0.0
        for a, b, g in zip(row, inputs, weights, strict=True):
            total += abs(a) * sum(map(abs, b)) * sum(map(abs, g))
        worst = max(worst, total)
    return worst
