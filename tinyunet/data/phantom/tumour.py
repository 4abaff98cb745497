"""A glioma: a core, parts of it that enhance, and edema that follows the white matter.

Four kinds are drawn. "ring" is the glioblastoma: dead in the middle, with an enhancing rim that has gaps.
"solid" enhances nearly everywhere, "patchy" here and there, "low grade" nowhere.
"""

from typing import NamedTuple

import numpy as np

from tinyunet.data.phantom.anatomy import GREY, WHITE, Head
from tinyunet.data.phantom.bodies import inside, norm
from tinyunet.data.phantom.fields import Array

_KINDS = {"ring": 0.45, "solid": 0.15, "patchy": 0.2, "low grade": 0.2}
_SMALLEST, _LARGEST = 11.0, 26.0  # radius in millimetres


class Tumour(NamedTuple):
    """Kind, place and size of a tumour; millimetres of the atlas."""

    kind: str
    centre: Array  # shape=(3, 1)
    radius: float  # of the core
    reach: float  # how far the edema goes beyond the core
    push: float  # how far the tissue beside the tumour is displaced
    stretch: Array  # turns a ball into the tumour's ellipsoid, shape=(3, 3)

    def displace(self, points: Array, depth: Array) -> Array:
        """Return where in an undisturbed brain the tissue at some points, shape=(3, P), came from.

        The tumour pushes its surroundings outwards; seen from a voxel, tissue comes from nearer to the
        centre. The skull holds the surface, where ``depth``, shape=(P,) in millimetres, is 0.
        """
        offset = points - self.centre
        distance = norm(offset) + 1e-3
        fade = np.exp(-((distance / (2 * self.radius)) ** 2)) * np.minimum(depth / 8, 1)
        amount = self.push * fade * np.minimum(distance / (0.6 * self.radius), 1)
        return points - offset * (amount / distance).astype(np.float32)


class Growth(NamedTuple):
    """Shares of the tumour's parts in each voxel, each of shape=(P,); they do not overlap."""

    edema: Array
    core: Array  # dead, or alive without enhancing
    enhancing: Array


def draw_tumour(head: Head, shares: Array) -> Tumour:
    """Draw a tumour somewhere in the cerebrum of a head, whose ``shares``, shape=(3, P), are without it."""
    generator = head.fields.generator
    kind = str(generator.choice(list(_KINDS), p=list(_KINDS.values())))
    radius = float(np.exp(generator.uniform(np.log(_SMALLEST), np.log(_LARGEST))))
    x, y, z = head.points
    stem = (np.abs(x) < 14) & (z < -12)
    cerebrum = (z > np.where(y < -35, -12, -40)) & ~stem & (shares[GREY] + shares[WHITE] > 0.6)
    for allowed in (cerebrum & (head.depth > radius / 2), cerebrum, head.depth > 0):
        if allowed.any():
            break
    centre = head.points[:, generator.choice(np.flatnonzero(allowed))][:, None]
    turn, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    stretch = (turn @ np.diag(np.exp(generator.normal(0, 0.22, 3))) @ turn.T).astype(np.float32)
    reach = generator.uniform(5, 26) * (0.5 if kind == "low grade" else 1)
    return Tumour(kind, centre, radius, reach, radius * generator.uniform(0.1, 0.3), stretch)


def grow(tumour: Tumour, head: Head, shares: Array) -> Growth:
    """Let a tumour grow among tissues of ``shares``, shape=(3, P), which it has displaced already."""
    lobes = head.clouds(1.6 * tumour.radius)
    edge = norm(tumour.stretch @ (head.points - tumour.centre)) - tumour.radius * (1 + 0.22 * lobes)
    # It hardly crosses the middle, but through the white matter of the callosum.
    beyond = np.maximum(-np.sign(tumour.centre[0]) * head.points[0], 0)
    edge = (edge + 2 * beyond * (shares[WHITE] < 0.7)).astype(np.float32)
    # Fluid is left free, but for the middle of the tumour.
    solid = np.clip((shares[GREY] + shares[WHITE] - 0.2) / 0.5, 0, 1)
    brain = np.clip(2 * shares.sum(0) - 0.6, 0, 1)
    mass = (
        inside(edge, head.width) * np.maximum(solid, inside(edge + 0.35 * tumour.radius, head.width)) * brain
    )
    edema = _edema(tumour, head, edge, shares) * solid * brain * (1 - mass)
    enhancing = mass * _enhances(tumour, head, edge)
    return Growth(edema, mass - enhancing, enhancing)


def _edema(tumour: Tumour, head: Head, edge: Array, shares: Array) -> Array:
    """Return how much of each voxel edema takes: fingers in the white matter, less of the grey."""
    generator, grid = head.fields.generator, head.fields.grid
    reach = tumour.reach * (0.75 + 0.5 * head.clouds(22))
    in_grey = generator.uniform(0.1, 1) ** 0.7
    near = np.clip(((0.3 + 0.7 * in_grey) * reach - edge) / 4, 0, 1)
    affected = np.clip((shares[WHITE] - 0.2) / 0.4, 0, 1) + in_grey * near * np.clip(1.3 * shares[GREY], 0, 1)
    edema = inside(edge - reach, 5) * np.clip(affected, 0, 1) * (head.points[2] > -45)
    # Water spreads a little: no lone voxels, no holes.
    spread = grid.smooth(head.volume(edema.astype(np.float32)), 0.5)[head.voxels]
    return np.clip((spread - 0.2) * 1.8, 0, 1)


def _enhances(tumour: Tumour, head: Head, edge: Array) -> Array:
    """Return the share of the mass that takes up the contrast agent in each voxel."""
    generator = head.fields.generator
    if tumour.kind == "ring":
        rim = tumour.radius * generator.uniform(0.18, 0.5) * (1 + 0.35 * head.clouds(12))
        gaps = np.clip(2 * (head.clouds(18) - generator.uniform(0.8, 2.2)), 0, 1)
        return inside(-edge - rim, head.width) * (1 - gaps)
    if tumour.kind == "low grade":
        return np.zeros_like(edge)
    threshold = generator.uniform(-2.5, -1) if tumour.kind == "solid" else generator.uniform(-0.6, 0.8)
    patches = np.clip(2.5 * (head.clouds(generator.uniform(14, 24)) - threshold), 0, 1)
    return patches * inside(edge + 0.1 * tumour.radius, head.width)
