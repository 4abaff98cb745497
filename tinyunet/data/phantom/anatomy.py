"""A brain: its outline, folded cortex, nuclei, ventricles, cerebellum and stem.

Points are in atlas space: millimetres right, front and up from the anterior commissure, as in the
Talairach and MNI atlases, from which sizes and places of the parts were read by eye.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.phantom.bodies import ellipsoid, inside, mirror, norm, smooth_maximum, smooth_minimum, tube
from tinyunet.data.phantom.fields import Array, RandomFields

# Rows of an array of tissue shares, shape=(4, voxels). DEEP is the grey of the nuclei.
WHITE, GREY, DEEP, FLUID = range(4)

_FOLD_WAVELENGTH = 20.0  # a wave of the cortex: from one sulcus to the next but one
_CORTEX_THICKNESS = 4.0

# Centre and radii of the right one of each pair of nuclei, and how much of it is grey.
_NUCLEI = (
    ((13.0, 14.0, 7.0), (6.0, 13.0, 9.0), 1.0),  # caudate
    ((27.0, 3.0, 1.0), (7.0, 18.0, 12.0), 1.0),  # putamen
    ((19.0, -4.0, -1.0), (5.0, 9.0, 7.0), 0.5),  # pallidum
    ((11.0, -20.0, 7.0), (11.0, 16.0, 10.0), 0.8),  # thalamus
)

# The right lateral ventricle: frontal horn, body, atrium, occipital horn; then the temporal horn.
_LATERAL_VENTRICLE = (
    (6.0, 32.0, 3.0, 3.5),
    (7.0, 16.0, 13.0, 5.5),
    (8.0, -8.0, 21.0, 4.5),
    (13.0, -30.0, 18.0, 5.0),
    (23.0, -44.0, 8.0, 6.0),
    (23.0, -66.0, 5.0, 2.0),
)
_TEMPORAL_HORN = ((23.0, -44.0, 8.0, 6.0), (35.0, -30.0, -9.0, 3.0), (32.0, -10.0, -18.0, 3.0))


class Outline(NamedTuple):
    """Signed distances to the surfaces of the brain's three parts, each of shape=(P,)."""

    cerebrum: Array
    cerebellum: Array
    stem: Array

    @property
    def brain(self) -> Array:
        """Distance to all three together, the clefts between them filled."""
        return smooth_minimum(smooth_minimum(self.cerebrum, self.cerebellum, 12), self.stem, 12)


class Head(NamedTuple):
    """The P voxels of a head in and near its brain."""

    fields: RandomFields  # their generator draws everything else of the head, too
    voxels: NDArray[np.intp]  # indices in the grid, shape=(P,)
    points: Array  # in atlas space, shape=(3, P)
    surfaces: Outline

    @property
    def width(self) -> float:
        """Millimetres over which a surface blurs; a scanner's point spread is wider than its grid."""
        return 1.15 * self.fields.grid.spacing


class Folding(NamedTuple):
    """The sulci of a head, each array of shape=(P,)."""

    distance: Array  # to the nearest wall: the sheet of fluid in the middle of a sulcus
    depth: Array  # how far below the surface the walls reach
    roughness: Array  # a slow random field along the surface, of deviation 1


def outline(points: Array) -> Outline:
    """Evaluate the outline of the brain at points of atlas space, shape=(3, P)."""
    hemispheres = ellipsoid(mirror(points), (22, -60, -34), (30, 29, 22))
    vermis = ellipsoid(points, (0, -58, -33), (14, 24, 20))
    midbrain = ellipsoid(mirror(points), (6, -24, -10), (12, 12, 14))
    pons = ellipsoid(points, (0, -25, -30), (17, 14, 15))
    medulla = tube(points, ((0, -34, -42, 10), (0, -46, -80, 8)))
    stem = smooth_minimum(smooth_minimum(midbrain, pons, 8), medulla, 8)
    return Outline(cerebrum(points), smooth_minimum(hemispheres, vermis, 5), stem)


def cerebrum(points: Array) -> Array:
    """Distance to the surface of the two hemispheres together."""
    y, z = points[1:]
    pair = mirror(points)
    back = ellipsoid(pair, (9, -31, 12), (59, 69, 68))
    front = ellipsoid(pair, (8, 14, 16), (49, 52, 58))
    # From below it is flat: the orbits in front, the tentorium behind.
    rise = np.clip(-0.12 * (y + 10), 0, 7) + np.maximum(y - 15, 0) ** 2 / 130
    upper = smooth_maximum(smooth_minimum(back, front, 16), rise - 22 - z, 16)
    temporal_lobes = ellipsoid(pair, (43, -18, -20), (23, 43, 25))
    base = ellipsoid(pair, (0, -12, -8), (26, 26, 18))
    return smooth_minimum(smooth_minimum(upper, temporal_lobes, 8), base, 6)


def callosum_height(points: Array) -> Array:
    """How far up the arch of the corpus callosum a point lies: below 1 the hemispheres are joined."""
    _, y, z = points
    return np.sqrt(((y + 3) / 42) ** 2 + ((z + 2) / 29) ** 2)


def fold(head: Head, surface: Array) -> Folding:
    """Draw the sulci of a head, whose ``surface`` is the distance to the cerebrum at every voxel of the grid.

    A sulcus goes in where a random field of one wavelength crosses zero on the surface of the
    cerebrum. A voxel reads the field at the surface above it, so that sulci stand upright; divided
    by its slope the field is the distance to the wall.
    """
    fields, voxels = head.fields, head.voxels
    grid = fields.grid
    outwards = grid.gradient(surface)[:, voxels]
    outwards /= norm(outwards) + 0.05
    # Three quarters of the way only: sulci bend.
    way = np.clip(-surface[voxels], 0, 25) * 0.75
    above = grid.positions[:, voxels] + outwards * way
    waves = fields.waves(_FOLD_WAVELENGTH, 0.13)
    slope = norm(grid.gradient(waves))
    height, slope, roughness = grid.interpolate(np.stack([waves, slope, fields.clouds(30)]), above)
    typical_slope = np.float32(2 * np.pi / _FOLD_WAVELENGTH)
    distance = np.abs(height) / np.maximum(slope, np.float32(0.45) * typical_slope)
    # Shallow from below, and none where the nuclei are.
    depth = (22 + 5 * roughness) * (1 - 0.6 * np.clip(-outwards[2], 0, 1))
    x, y, z = head.points
    middle = np.sqrt((x / 31) ** 2 + ((y + 8) / 38) ** 2 + ((z + 2) / 28) ** 2)
    depth *= np.clip(4 * middle - 4, 0, 1)
    return Folding(distance, depth, roughness)


def tissues(head: Head, folding: Folding) -> Array:
    """Return the shares of white matter, grey matter, deep grey and fluid in each voxel; they sum to 1.

    The head's generator draws how wide sulci and ventricles are. shape=(4, P).
    """
    points, surfaces, width = head.points, head.surfaces, head.width
    atrophy = head.fields.generator.uniform(0, 1)
    pair = mirror(points)
    shares = _cortex(head, folding, atrophy)
    for centre, radii, grey in _NUCLEI:
        _put(shares, inside(ellipsoid(pair, centre, radii), width), (1 - grey, 0, grey, 0))

    below = inside(surfaces.cerebellum, width) * (1 - inside(surfaces.cerebrum, width))
    leaves, gaps = _foliage(head)
    _put(shares, below, (1 - leaves, leaves * (1 - gaps), 0, leaves * gaps))
    _put(shares, inside(surfaces.stem, width), (0.8, 0, 0.2, 0))

    lateral = np.minimum(tube(pair, _LATERAL_VENTRICLE), tube(pair, _TEMPORAL_HORN))
    third = ellipsoid(points, (0, -8, 0), (2.2 + atrophy, 14, 11))
    fourth = ellipsoid(points, (0, -47, -34), (6, 5, 9))
    ventricles = np.minimum(np.minimum(lateral - (2.6 * atrophy - 0.6), third), fourth)
    _put(shares, inside(ventricles, width), (0, 0, 0, 1))
    return shares


def _cortex(head: Head, folding: Folding, atrophy: float) -> Array:
    """Return the shares of a cerebrum without nuclei: a grey ribbon along every wet surface."""
    x, y, z = head.points
    x = np.abs(x)
    depth = -head.surfaces.cerebrum
    sulci = np.hypot(folding.distance, np.maximum(depth - folding.depth, 0))
    # The Sylvian fissure rises to the back; at its floor the insula stands upright.
    sylvian = np.sqrt((z + 4 + y / 2) ** 2 / 1.25 + np.maximum(36 - x, 0) ** 2 + np.maximum(-40 - y, 0) ** 2)
    beyond_y, beyond_z = np.maximum(np.abs(y - 2) - 22, 0), np.maximum(np.abs(z - 1) - 13, 0)
    insula = np.sqrt((x - 38) ** 2 + beyond_y**2 + beyond_z**2)
    clefts = np.minimum(sylvian, insula)
    height = callosum_height(head.points)
    between_hemispheres = np.hypot(x, 29 * np.maximum(1 - height, 0))

    wet = np.minimum(np.minimum(depth, sulci), np.minimum(clefts, between_hemispheres))
    grey = inside(wet - (_CORTEX_THICKNESS + 0.4 * folding.roughness), head.width)
    callosum = inside(29 * np.maximum(height - 1, -1), head.width) * inside(x - 14, 6)
    grey *= 1 - callosum

    walls = inside(np.minimum(sulci, clefts) - (0.45 + 0.7 * atrophy), 1.2 * head.width)
    fluid = np.maximum(walls, inside(between_hemispheres - 1, head.width))
    fluid = np.maximum(fluid, inside(depth + 0.6 + 0.6 * folding.roughness, head.width))
    # Fluid thins out towards the floor of a sulcus.
    open_to = (8 + folding.depth - depth) / 8 + (clefts < 4) + (between_hemispheres < 4)
    fluid *= np.clip(open_to, 0, 1)
    return np.stack([(1 - grey) * (1 - fluid), grey * (1 - fluid), np.zeros_like(fluid), fluid])


def _foliage(head: Head) -> tuple[Array, Array]:
    """Return the shares of the cerebellum's grey leaves, and of the fluid between them."""
    grid, surface = head.fields.grid, head.surfaces.cerebellum
    leaves, gaps = np.zeros((2, len(surface)), np.float32)
    here = np.flatnonzero(surface < head.width)
    # The leaves run from left to right: waves stretched that way.
    stretched = grid.positions[:, head.voxels[here]] * np.array([[0.3], [1], [1]], np.float32)
    waves = grid.interpolate(head.fields.waves(11, 0.2)[None], stretched)[0]
    depth = -surface[here]
    leaves[here] = inside(depth - 12 - 4 * waves, 2 * head.width)
    gaps[here] = np.clip(waves / 3 * inside(depth - 11, 4), 0, 0.4)
    return leaves, gaps


def _put(shares: Array, amount: Array, mixture: tuple[Array | float, ...]) -> None:
    """Let another mixture of tissues take ``amount`` of each voxel, in place."""
    shares *= 1 - amount
    for row, part in zip(shares, mixture, strict=True):
        row += amount * part
