"""Signed distances in millimetres: negative inside a body, zero on its surface.

Points have shape=(3, P), distances shape=(P,).

Source: I. Quilez, "Distance functions", https://iquilezles.org/articles/distfunctions.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from tinyunet.data.phantom.fields import Array

#: Points (x, y, z) along a tube, each with the tube's radius there.
Nodes: TypeAlias = Sequence[tuple[float, float, float, float]]


def norm(vectors: Array) -> Array:
    """Length of each column."""
    return np.sqrt(np.einsum("ij,ij->j", vectors, vectors))


def mirror(points: Array) -> Array:
    """Return the points with those of the left half moved to the right: bodies come in pairs."""
    return np.concatenate([np.abs(points[:1]), points[1:]])


def tube(points: Array, nodes: Nodes) -> Array:
    """Distance to a tube along straight pieces between nodes."""
    distance = np.full(points.shape[1], np.inf, np.float32)
    for (*start, start_radius), (*end, end_radius) in pairwise(nodes):
        direction = _column(end) - _column(start)
        from_start = points - _column(start)
        along = np.clip(direction[:, 0] @ from_start / (direction * direction).sum(), 0, 1)
        radius = start_radius + along * (end_radius - start_radius)
        distance = np.minimum(distance, norm(from_start - along * direction) - radius)
    return distance


def inside(distance: Array, width: float) -> Array:
    """Share of a voxel that lies inside: from 1 to 0 over ``width`` millimetres about the surface."""
    return np.clip(0.5 - distance / np.float32(width), 0, 1)


def _column(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None]
