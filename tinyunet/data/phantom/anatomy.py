"""A head: real anatomy, bent, stretched and turned anew for each, with its large vessels.

The atlas has two brains, in millimetres right, front and up from the anterior commissure: the average of
152 people (ICBM 2009a, symmetric), and one person, scanned 27 times (Colin 27). Each voxel of 2 mm holds the
shares of fluid, grey and white matter. ``examples/make_atlas.py`` made the file from both T1 templates.

Sources: V. Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54
(2011); C. Holmes et al., "Enhancement of MR images using registration for signal averaging", J. Comput.
Assist. Tomogr. 22 (1998). Templates: copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University. They may be used, copied, modified and distributed for any
purpose without fee, provided that this notice appears in all copies; they come without any warranty.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.data.phantom.bodies import Nodes, mirror, tube
from tinyunet.data.phantom.fields import Array, RandomFields

Scalar = TypeVar("Scalar", bound=np.generic)

# Rows of an array of tissue shares, shape=(3, voxels).
FLUID, GREY, WHITE = range(3)

# Large vessels of the right half: (x, y, z, radius). Skull-stripping often leaves the veins at the surface.
_VEINS: tuple[Nodes, ...] = (
    (  # superior sagittal sinus
        (0, 62, 18, 2),
        (0, 46, 48, 2.5),
        (0, 10, 71, 3),
        (0, -30, 78, 3.5),
        (0, -70, 58, 4),
        (0, -97, 22, 4),
        (0, -103, -8, 4.5),
    ),
    (  # transverse and sigmoid sinus
        (0, -101, -10, 4.5),
        (35, -92, -24, 4),
        (56, -68, -32, 4),
        (56, -50, -38, 4.5),
        (46, -48, -50, 4),
    ),
    ((0, -46, 4, 1.5), (0, -70, 6, 2), (0, -100, -8, 3)),  # straight sinus
)
# Basilar, internal carotid and middle cerebral artery.
_ARTERY: Nodes = (
    (0, -24, -48, 2),
    (0, -17, -18, 2),
    (0, -17, -16, 1.5),
    (12, 3, -18, 1.8),
    (30, 5, -17, 1.6),
    (42, 4, -8, 1.3),
)


class Head(NamedTuple):
    """The P voxels of a head in and near its brain."""

    fields: RandomFields  # their generator draws everything else of the head, too
    voxels: NDArray[np.intp]  # indices in the grid, shape=(P,)
    brain: int  # number of the brain in the atlas
    points: Array  # in the atlas, without a tumour, shape=(3, P)
    depth: Array  # millimetres below the surface of the brain, 0 outside, shape=(P,)

    @property
    def width(self) -> float:
        """Millimetres over which a surface blurs; a scanner's point spread is wider than its grid."""
        return 1.15 * self.fields.grid.spacing

    def clouds(self, wavelength: float) -> Array:
        """Draw a random field of deviation 1 at the voxels of the head, shape=(P,)."""
        return self.fields.clouds(wavelength)[self.voxels]

    def volume(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return values of the head, shape=(P,), as a volume with 0 elsewhere, shape=grid.shape."""
        volume = np.zeros(self.fields.grid.shape, values.dtype)
        volume.reshape(-1)[self.voxels] = values
        return volume


class Vessels(NamedTuple):
    """Distances to the walls of large vessels in millimetres, each of shape=(P,)."""

    veins: Array
    arteries: Array


@cache
def _atlas() -> tuple[NDArray[np.uint8], Array, float]:
    """Return the shares from 0 to 15, shape=(2, 3, X, Y, Z), the first voxel's point, and the spacing."""
    with np.load(Path(__file__).with_name("atlas.npz")) as file:
        return file["shares"], file["first"].astype(np.float32)[:, None], float(file["spacing"])


def draw_head(fields: RandomFields) -> Head:
    """Draw a head: which brain, its size, position, tilt and shape."""
    generator, grid = fields.generator, fields.grid
    points = _pose(fields)
    brain = int(generator.integers(len(_atlas()[0])))
    all_tissue = _atlas()[0][brain].sum(0, np.uint8)[None]
    inside = (_look_up(all_tissue, points) > 0.5).reshape(grid.shape)
    depth = ndimage.distance_transform_edt(inside).astype(np.float32).reshape(-1) * np.float32(grid.spacing)
    voxels = np.flatnonzero(ndimage.binary_dilation(inside, iterations=2))
    return Head(fields, voxels, brain, points[:, voxels], depth[voxels])


def _pose(fields: RandomFields) -> Array:
    """Draw where each voxel of the grid lies in the atlas, shape=(3, voxels)."""
    generator, grid = fields.generator, fields.grid
    a, b, c = generator.normal(0, [0.08, 0.06, 0.08])
    nod = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    tilt = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    shake = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    scale = generator.uniform(0.85, 0.93) * generator.uniform(0.96, 1.04, 3)
    flip = np.diag([generator.choice([-1, 1]), 1, 1])
    linear = flip @ np.diag(1 / scale) @ nod @ tilt @ shake
    centre = np.array([0, -18, 8]) + generator.normal(0, 2, 3)
    points = linear.astype(np.float32) @ grid.positions + centre.astype(np.float32)[:, None]
    for axis in points:
        axis += 3 * fields.clouds(90) + 0.75 * fields.clouds(45)
    return points


def _look_up(volumes: NDArray[np.uint8], points: Array) -> Array:
    """Interpolate volumes of the atlas, shape=(V, X, Y, Z), at its points; shape=(V, P), from 0 to 1."""
    _, first, spacing = _atlas()
    index = (points - first) / np.float32(spacing)
    found: list[Array] = [
        ndimage.map_coordinates(each, index, np.float32, order=1, mode="constant") for each in volumes
    ]
    return (np.stack(found) / 15).astype(np.float32)


def tissues(head: Head, points: Array, atrophy: float = 1.0) -> Array:
    """Return the shares of fluid, grey and white matter at points of the atlas, shape=(3, P).

    They sum to 1 in the brain, and less outside. With the years fluid takes more of the voxels that it shares
    with tissue: ``atrophy`` above 1.
    """
    shares = np.minimum(_look_up(_atlas()[0][head.brain], points), 1)
    fluid = 1 - (1 - shares[FLUID]) ** np.float32(atrophy)
    shares[GREY:] *= (1 - fluid) / np.maximum(1 - shares[FLUID], np.float32(1e-3))
    shares[FLUID] = fluid
    return (shares / np.maximum(shares.sum(0), 1)).astype(np.float32)


def draw_vessels(head: Head) -> Vessels:
    """Draw how wide the large vessels are; one of the two transverse sinuses may be narrow."""
    generator, points = head.fields.generator, mirror(head.points)
    sagittal, transverse, straight = (tube(points, vein) for vein in _VEINS)
    narrow = generator.choice([-1, 1]) * head.points[0] > 0
    transverse += np.float32(2.5 * generator.uniform()) * narrow
    veins = np.minimum(np.minimum(sagittal, straight), transverse) - np.float32(generator.uniform(-1.2, 1.2))
    return Vessels(veins, tube(points, _ARTERY) - np.float32(generator.uniform(-0.5, 0.5)))
