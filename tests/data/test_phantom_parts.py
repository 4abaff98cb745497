"""What the phantom is built from: random fields, interpolation, distances of bodies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.data.phantom.anatomy import FLUID, Head, Outline, fold, outline, tissues
from tinyunet.data.phantom.bodies import ellipsoid, inside, mirror, smooth_maximum, smooth_minimum, tube
from tinyunet.data.phantom.fields import Grid, RandomFields
from tinyunet.data.phantom.tumour import draw_tumour

GRID = Grid((32, 36, 28))
coordinates = st.floats(-100, 100, width=32)


def points(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).T


class TestGrid:
    """Voxels in millimetres."""

    def test_positions_are_centred_and_spaced(self) -> None:
        positions = GRID.positions.reshape(3, *GRID.shape)
        assert GRID.spacing == 5.5
        assert np.allclose(positions.reshape(3, -1).mean(axis=1), 0, atol=1e-3)
        assert np.array_equal(positions[:, 1, 1, 1] - positions[:, 0, 0, 0], [5.5, 5.5, 5.5])
        assert positions[1, 0, -1, 0] == 5.5 * 35 / 2

    def test_gradient_of_a_plane(self) -> None:
        plane = np.array([1, -2, 0.5], np.float32) @ GRID.positions
        assert np.allclose(GRID.gradient(plane), [[1], [-2], [0.5]], atol=1e-3)

    def test_interpolation_is_exact_on_voxels_and_linear_between(self) -> None:
        fields = np.random.default_rng(0).standard_normal((2, 32 * 36 * 28), np.float32)
        assert np.allclose(GRID.interpolate(fields, GRID.positions), fields, atol=1e-4)
        plane = (np.array([1, -2, 0.5], np.float32) @ GRID.positions)[None]
        somewhere = np.random.default_rng(1).uniform(-60, 60, (3, 50)).astype(np.float32)
        expected = np.array([1, -2, 0.5]) @ somewhere
        assert np.allclose(GRID.interpolate(plane, somewhere)[0], expected, atol=1e-2)

    def test_interpolation_goes_on_from_the_other_side(self) -> None:
        field = np.random.default_rng(0).standard_normal((1, 32 * 36 * 28), np.float32)
        period = np.array(GRID.shape, np.float32)[:, None] * 5.5
        here = np.random.default_rng(1).uniform(-60, 60, (3, 20)).astype(np.float32)
        there = GRID.interpolate(field, here - period)
        assert np.allclose(GRID.interpolate(field, here), there, atol=1e-3)

    def test_smoothing_keeps_the_sum_and_spreads(self) -> None:
        field = np.zeros(32 * 36 * 28, np.float32)
        field.reshape(GRID.shape)[5, 6, 7] = 1
        smooth = GRID.smooth(field, 0.5).reshape(GRID.shape)
        assert smooth.sum() == pytest.approx(1)
        assert smooth[5, 6, 7] == 0.125
        assert smooth[4, 6, 7] == 0.0625
        assert smooth[4, 5, 6] == 0.015625


class TestFields:
    """Random fields of mean 0, deviation 1 and a given wavelength."""

    def fields(self, seed: int = 0) -> RandomFields:
        return RandomFields(np.random.default_rng(seed), GRID)

    @pytest.mark.parametrize("wavelength", [5, 20, 60, 110])
    def test_mean_and_deviation(self, wavelength: float) -> None:
        for field in (self.fields().clouds(wavelength), self.fields().waves(wavelength, 0.2)):
            assert field.dtype == np.float32
            assert field.mean() == pytest.approx(0, abs=1e-3)
            assert field.std() == pytest.approx(1, abs=1e-3)

    def test_waves_go_up_and_down_every_wavelength(self) -> None:
        field = self.fields().waves(25, 0.1)
        # For one wavelength, the mean square slope is (2 pi / wavelength)^2; differences lose some.
        slope = np.sqrt((GRID.gradient(field) ** 2).sum(axis=0).mean())
        assert slope == pytest.approx(2 * np.pi / 25, rel=0.3)

    def test_longer_clouds_are_smoother(self) -> None:
        slopes = [np.std(GRID.gradient(self.fields().clouds(length))) for length in (25, 50, 75)]
        assert slopes[0] > 1.5 * slopes[1] > 1.8 * slopes[2]

    def test_each_field_is_another(self) -> None:
        fields = self.fields()
        assert abs(np.mean(fields.clouds(10) * fields.clouds(10))) < 0.1
        assert np.array_equal(self.fields(1).clouds(10), self.fields(1).clouds(10))


class TestShapes:
    """Signed distances."""

    @given(x=coordinates, y=coordinates, z=coordinates)
    def test_ball(self, x: float, y: float, z: float) -> None:
        distance = ellipsoid(points((x, y, z)), (1, 2, 3), (10, 10, 10))[0]
        expected = np.linalg.norm([x - 1, y - 2, z - 3]) - 10
        if expected > -9.9:  # the middle has no direction
            assert distance == pytest.approx(expected, abs=1e-3, rel=1e-4)

    def test_ellipsoid_is_exact_to_first_order(self) -> None:
        radii = (10.0, 20.0, 30.0)
        tips = points((10.1, 0, 0), (0, 19.9, 0), (0, 0, -30.1))
        assert np.allclose(ellipsoid(tips, (0, 0, 0), radii), [0.1, -0.1, 0.1], atol=2e-3)

    def test_tube(self) -> None:
        nodes = ((0, 0, 0, 2), (10, 0, 0, 4), (10, 10, 0, 4))
        at = points((5, 8, 0), (-3, 4, 0), (10, 5, 7), (5, 0, 0))
        assert np.allclose(tube(at, nodes), [1, 3, 3, -3], atol=1e-5)

    @given(a=coordinates, b=coordinates)
    def test_smooth_union_and_intersection(self, a: float, b: float) -> None:
        pair = np.array([a], np.float32), np.array([b], np.float32)
        union, intersection = smooth_minimum(*pair, 8)[0], smooth_maximum(*pair, 8)[0]
        assert min(a, b) - 2 <= union <= min(a, b)
        assert max(a, b) <= intersection <= max(a, b) + 2
        if abs(a - b) >= 8:
            assert (union, intersection) == (min(a, b), max(a, b))

    def test_inside(self) -> None:
        distance = np.array([-9, -1, 0, 0.5, 1, 9], np.float32)
        assert np.allclose(inside(distance, 2), [1, 1, 0.5, 0.25, 0, 0])

    def test_mirrored(self) -> None:
        at = points((-1, -2, -3), (4, 5, 6))
        assert np.array_equal(mirror(at), points((1, -2, -3), (4, 5, 6)))
        assert at[0, 0] == -1


class TestBrain:
    """Anatomy in atlas space, without pose or warp."""

    def test_size_of_the_brain(self) -> None:
        extents = [(-70, 0, 0), (70, 0, 0), (0, -104, 10), (0, 72, 10), (0, -18, 82)]
        assert np.all(np.abs(outline(points(*extents)).cerebrum) < 8)

    def test_places_of_the_parts(self) -> None:
        surfaces = outline(points((40, -20, 20), (20, -60, -35), (0, -25, -30), (80, 80, 80)))
        assert (surfaces.cerebrum < 0).tolist() == [True, False, False, False]
        assert (surfaces.cerebellum < 0).tolist() == [False, True, False, False]
        assert (surfaces.stem < 0).tolist() == [False, False, True, False]
        assert (surfaces.brain < 0).tolist() == [True, True, True, False]

    def test_shares_sum_to_one_and_ventricles_are_fluid(self) -> None:
        fields = RandomFields(np.random.default_rng(0), GRID)
        surfaces = outline(GRID.positions)
        voxels = np.flatnonzero(surfaces.brain < 4)
        at = GRID.positions[:, voxels]
        head = Head(fields, voxels, at, Outline(*(distance[voxels] for distance in surfaces)))
        shares = tissues(head, fold(head, surfaces.cerebrum))
        assert shares.min() >= -1e-6
        assert np.allclose(shares.sum(axis=0), 1, atol=1e-5)
        assert np.all(shares.mean(axis=1) > 0.01)  # each tissue is there
        ventricle = np.linalg.norm(at - [[8], [-8], [21]], axis=0).argmin()
        assert shares[FLUID, ventricle] > 0.5

    def test_a_tumour_pushes_and_never_turns_space_inside_out(self) -> None:
        for seed in range(10):
            tumour = draw_tumour(np.random.default_rng(seed))
            direction = np.array([[0.6], [0], [0.8]])
            radii = np.linspace(0, 100, 400)
            at = (tumour.centre + direction * radii).astype(np.float32)
            came_from = np.linalg.norm(tumour.displace(at) - tumour.centre, axis=0)
            assert np.all(np.diff(came_from) > 0)
            assert np.all(came_from <= radii + 1e-3)
            assert (radii - came_from).max() > 1
