"""Signed distances of simple bodies in millimetres: negative inside, zero on the surface.

Distances to ellipsoids are first-order approximations, exact near the surface, where it counts. Points have
shape=(3, P), distances shape=(P,).

Source: I. Quilez, "Distance functions", https://iquilezles.org/articles/distfunctions.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tinyunet.data.phantom.fields import Array

Triple = tuple[float, float, float]


def norm(vectors: Array) -> Array:
    """Length of each column."""
    return np.sqrt(np.einsum("ij,ij->j", vectors, vectors))


def mirror(points: Array) -> Array:
    """Return the points with those of the left half moved to the right: bodies come in pairs."""
    return np.concatenate([np.abs(points[:1]), points[1:]])


def ellipsoid(points: Array, centre: Triple, radii: Triple) -> Array:
    """Distance to an ellipsoid."""
    q = (points - _column(centre)) / _column(radii)
    scale = norm(q)
    slope = norm(q / _column(radii))
    return scale * (scale - 1) / (slope + 1e-6)


def tube(points: Array, nodes: Sequence[tuple[float, float, float, float]]) -> Array:
    """Distance to a tube along straight pieces between nodes (x, y, z, radius)."""
    distance = np.full(points.shape[1], np.inf, np.float32)
    for (*start, start_radius), (*end, end_radius) in pairwise(nodes):
        direction = _column(end) - _column(start)
        from_start = points - _column(start)
        along = np.clip(direction[:, 0] @ from_start / (direction * direction).sum(), 0, 1)
        radius = start_radius + along * (end_radius - start_radius)
        distance = np.minimum(distance, norm(from_start - along * direction) - radius)
    return distance


def smooth_minimum(a: Array, b: Array, reach: float) -> Array:
    """Union of two bodies whose crease is filled over ``reach`` millimetres."""
    overlap = np.maximum(reach - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / (4 * reach)


def smooth_maximum(a: Array, b: Array, reach: float) -> Array:
    """Intersection of two bodies whose edge is rounded over ``reach`` millimetres."""
    return -smooth_minimum(-a, -b, reach)


def inside(distance: Array, width: float) -> Array:
    """Share of a voxel that lies inside: from 1 to 0 over ``width`` millimetres about the surface."""
    return np.clip(0.5 - distance / width, 0, 1)


def _column(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None]
