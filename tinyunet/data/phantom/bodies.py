"""Signed distances of simple bodies in millimetres: negative inside, zero on the surface.

Those of ellipsoids are first-order approximations, exact near the surface, which is where it counts.
Source: I. Quilez, "Distance functions", https://iquilezles.org/articles/distfunctions.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Triple = tuple[float, float, float]

_TINY = np.float32(1e-6)


def length(vectors: Array) -> Array:
    """Length of each column. vectors: shape=(3, P); returns shape=(P,)."""
    return np.sqrt(np.einsum("ij,ij->j", vectors, vectors))


def mirrored(points: Array) -> Array:
    """Return the points with those of the left half moved to the right: bodies come in pairs."""
    return np.concatenate([np.abs(points[:1]), points[1:]])


def ellipsoid(points: Array, centre: Triple, radii: Triple) -> Array:
    """Distance to an ellipsoid. points: shape=(3, P); returns shape=(P,)."""
    q = (points - _column(centre)) / _column(radii)
    scale = length(q)
    slope = length(q / _column(radii))
    return scale * (scale - 1) / (slope + _TINY)


def tube(points: Array, nodes: Sequence[tuple[float, float, float, float]]) -> Array:
    """Distance to a tube along straight pieces between nodes (x, y, z, radius)."""
    distance = np.full(points.shape[1], np.inf, np.float32)
    for (*start, start_radius), (*end, end_radius) in pairwise(nodes):
        direction = _column(end) - _column(start)
        from_start = points - _column(start)
        along = direction[:, 0] @ from_start / (direction * direction).sum()
        along = np.clip(along, 0, 1)
        across = length(from_start - along * direction)
        radius = np.float32(start_radius) + along * np.float32(end_radius - start_radius)
        distance = np.minimum(distance, across - radius)
    return distance


def smooth_minimum(a: Array, b: Array, reach: float) -> Array:
    """Union of two bodies whose crease is filled over ``reach`` millimetres."""
    overlap = np.maximum(np.float32(reach) - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / np.float32(4 * reach)


def smooth_maximum(a: Array, b: Array, reach: float) -> Array:
    """Intersection of two bodies whose edge is rounded over ``reach`` millimetres."""
    return -smooth_minimum(-a, -b, reach)


def inside(distance: Array, width: float) -> Array:
    """Share of a voxel that lies inside: 1 to 0 over ``width`` millimetres about the surface.

    This is where partial volume comes from.
    """
    return np.clip(np.float32(0.5) - distance / np.float32(width), 0, 1)


def _column(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None]
