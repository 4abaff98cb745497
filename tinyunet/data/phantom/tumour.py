"""A glioblastoma: necrotic core, enhancing rim, and edema that follows the white matter."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.phantom.anatomy import Outline, callosum_height, cerebrum
from tinyunet.data.phantom.bodies import inside, length, smooth_maximum
from tinyunet.data.phantom.fields import RandomFields

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tumour:
    """Place and size of a tumour; millimetres of atlas space.

    Attributes
    ----------
    centre
        shape=(3, 1).
    radius
        Of core and rim together.
    rim
        Thickness of the part that enhances.
    reach
        How far the edema goes beyond the rim.
    push
        How far the tissue beside the tumour is displaced.
    stretch
        Turns a ball into the ellipsoid the tumour is at heart. shape=(3, 3).
    """

    centre: Array
    radius: float
    rim: float
    reach: float
    push: float
    stretch: Array

    def displace(self, points: Array) -> Array:
        """Return where in an undisturbed brain the tissue at some points came from.

        The tumour pushes its surroundings outwards; seen from a voxel, tissue comes from nearer to
        the centre. points: shape=(3, P); so is what is returned.
        """
        offset = points - self.centre
        distance = length(offset) + np.float32(1e-3)
        fade = np.exp(-((distance / np.float32(2 * self.radius)) ** 2))
        amount = self.push * fade * np.minimum(distance / np.float32(0.6 * self.radius), 1)
        return points - offset * (amount / distance).astype(np.float32)


def draw_tumour(generator: np.random.Generator) -> Tumour:
    """Draw a tumour that lies in one hemisphere, well below the surface."""
    radius = generator.uniform(15, 22)
    while True:
        centre = generator.uniform([14, -70, -12], [46, 48, 52]).astype(np.float32)[:, None]
        deep_enough = cerebrum(centre)[0] < -0.75 * radius
        if deep_enough and centre[0, 0] > 0.8 * radius:
            break
    centre[0] *= generator.choice([-1, 1])
    turn, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    stretch = turn @ np.diag(np.exp(generator.normal(0, 0.16, 3))) @ turn.T
    return Tumour(
        centre=centre,
        radius=radius,
        rim=radius * generator.uniform(0.26, 0.38),
        reach=generator.uniform(13, 27),
        push=generator.uniform(3, 6),
        stretch=stretch.astype(np.float32),
    )


@dataclass(frozen=True)
class Growth:
    """Shares of the tumour's parts in some voxels, each of shape=(P,); they do not overlap."""

    edema: Array
    necrosis: Array
    enhancing: Array


def grow(
    tumour: Tumour,
    fields: RandomFields,
    points: Array,
    voxels: NDArray[np.intp],
    surfaces: Outline,
    white: Array,
) -> Growth:
    """Let a tumour grow in a brain.

    Parameters
    ----------
    tumour
        From :func:`draw_tumour`.
    fields
        Of the head, for the irregular outlines.
    points
        The chosen voxels in atlas space. shape=(3, P).
    voxels
        Their indices. shape=(P,).
    surfaces
        Of the brain at the chosen voxels.
    white
        Share of white matter before. shape=(P,).
    """
    grid = fields.grid
    width = 1.15 * grid.spacing
    lobes = fields.clouds(1.6 * tumour.radius)[voxels]
    ragged = fields.clouds(9)[voxels]
    fingers = fields.clouds(22)[voxels]

    offset = tumour.stretch @ (points - tumour.centre)
    edge = length(offset) - np.float32(tumour.radius) * (1 + np.float32(0.18) * lobes)
    # It stays below the surface and on its side of the falx, but for the callosum's bridge.
    beyond_falx = -np.sign(tumour.centre[0]) * points[0]
    barrier = np.where(callosum_height(points) < 1, -100, beyond_falx + 1).astype(np.float32)
    edge = smooth_maximum(edge, np.maximum(barrier, surfaces.cerebrum), 6)
    mass = inside(edge, width)
    necrosis = inside(edge + np.float32(tumour.rim) * (1 + np.float32(0.25) * ragged), width)

    reach = tumour.reach * (np.float32(0.75) + np.float32(0.45) * fingers)
    edema = inside(edge - reach, 6) * np.clip((white - np.float32(0.25)) / np.float32(0.4), 0, 1)
    edema *= inside(surfaces.cerebrum, width) * inside(beyond_falx - 4, 2 * width)
    edema *= (1 - inside(surfaces.cerebellum, width)) * (1 - inside(surfaces.stem, width))
    # Water spreads a little: no lone voxels, no holes.
    everywhere = np.zeros(grid.positions.shape[1], np.float32)
    everywhere[voxels] = edema
    edema = np.clip((grid.smooth(everywhere, 0.5)[voxels] - np.float32(0.2)) * 2, 0, 1)
    return Growth(edema * (1 - mass), necrosis, mass - necrosis)
