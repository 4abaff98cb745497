"""A glioblastoma: necrotic core, enhancing rim, and edema that follows the white matter."""

from typing import NamedTuple

import numpy as np

from tinyunet.data.phantom.anatomy import Head, callosum_height, cerebrum
from tinyunet.data.phantom.bodies import inside, norm, smooth_maximum
from tinyunet.data.phantom.fields import Array


class Tumour(NamedTuple):
    """Place and size of a tumour; millimetres of atlas space."""

    centre: Array  # shape=(3, 1)
    radius: float  # of core and rim together
    rim: float  # thickness of the part that enhances
    reach: float  # how far the edema goes beyond the rim
    push: float  # how far the tissue beside the tumour is displaced
    stretch: Array  # turns a ball into the tumour's ellipsoid, shape=(3, 3)

    def displace(self, points: Array) -> Array:
        """Return where in an undisturbed brain the tissue at some points, shape=(3, P), came from.

        The tumour pushes its surroundings outwards; seen from a voxel, tissue comes from nearer to the
        centre.
        """
        offset = points - self.centre
        distance = norm(offset) + 1e-3
        fade = np.exp(-((distance / (2 * self.radius)) ** 2))
        amount = self.push * fade * np.minimum(distance / (0.6 * self.radius), 1)
        return points - offset * (amount / distance).astype(np.float32)


class Growth(NamedTuple):
    """Shares of the tumour's parts in each voxel, each of shape=(P,); they do not overlap."""

    edema: Array
    necrosis: Array
    enhancing: Array


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
    stretch = (turn @ np.diag(np.exp(generator.normal(0, 0.16, 3))) @ turn.T).astype(np.float32)
    rim = radius * generator.uniform(0.26, 0.38)
    reach, push = generator.uniform(13, 27), generator.uniform(3, 6)
    return Tumour(centre, radius, rim, reach, push, stretch)


def grow(tumour: Tumour, head: Head, white: Array) -> Growth:
    """Let a tumour grow in a brain, whose share of white matter before is ``white``, shape=(P,)."""
    grid, voxels, points, surfaces = head.fields.grid, head.voxels, head.points, head.surfaces
    width = head.width
    lobes, ragged, fingers = (head.fields.clouds(size)[voxels] for size in (1.6 * tumour.radius, 9, 22))

    edge = norm(tumour.stretch @ (points - tumour.centre)) - tumour.radius * (1 + 0.18 * lobes)
    # It stays below the surface and on its side of the falx, but for the callosum's bridge.
    beyond_falx = -np.sign(tumour.centre[0]) * points[0]
    barrier = np.where(callosum_height(points) < 1, -100, beyond_falx + 1).astype(np.float32)
    edge = smooth_maximum(edge, np.maximum(barrier, surfaces.cerebrum), 6)
    mass = inside(edge, width)
    necrosis = inside(edge + tumour.rim * (1 + 0.25 * ragged), width)

    reach = tumour.reach * (0.75 + 0.45 * fingers)
    edema = inside(edge - reach, 6) * np.clip((white - 0.25) / 0.4, 0, 1)
    edema *= inside(surfaces.cerebrum, width) * inside(beyond_falx - 4, 2 * width)
    edema *= (1 - inside(surfaces.cerebellum, width)) * (1 - inside(surfaces.stem, width))
    # Water spreads a little: no lone voxels, no holes.
    everywhere = np.zeros(grid.positions.shape[1], np.float32)
    everywhere[voxels] = edema
    edema = np.clip((grid.smooth(everywhere, 0.5)[voxels] - 0.2) * 2, 0, 1)
    return Growth(edema * (1 - mass), necrosis, mass - necrosis)
