"""What the phantom is built from: random fields, interpolation, distances of bodies."""

import numpy as np
import pytest

from tinyunet.data.phantom.anatomy import FLUID, GREY, WHITE, Head, draw_head, draw_vessels, tissues
from tinyunet.data.phantom.bodies import inside, mirror, norm, tube
from tinyunet.data.phantom.fields import Grid, RandomFields
from tinyunet.data.phantom.tumour import draw_tumour, grow

GRID = Grid((32, 36, 28))


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
        field = self.fields().clouds(wavelength)
        assert field.dtype == np.float32
        assert field.mean() == pytest.approx(0, abs=1e-3)
        assert field.std() == pytest.approx(1, abs=1e-3)

    def test_longer_clouds_are_smoother(self) -> None:
        slopes = [
            np.std(np.gradient(self.fields().clouds(length).reshape(GRID.shape))) for length in (25, 50, 75)
        ]
        assert slopes[0] > 1.5 * slopes[1] > 1.8 * slopes[2]

    def test_each_field_is_another(self) -> None:
        fields = self.fields()
        assert abs(np.mean(fields.clouds(10) * fields.clouds(10))) < 0.1
        assert np.array_equal(self.fields(1).clouds(10), self.fields(1).clouds(10))


class TestShapes:
    """Signed distances."""

    def test_tube(self) -> None:
        nodes = ((0, 0, 0, 2), (10, 0, 0, 4), (10, 10, 0, 4))
        at = points((5, 8, 0), (-3, 4, 0), (10, 5, 7), (5, 0, 0))
        assert np.allclose(tube(at, nodes), [1, 3, 3, -3], atol=1e-5)

    def test_inside(self) -> None:
        distance = np.array([-9, -1, 0, 0.5, 1, 9], np.float32)
        assert np.allclose(inside(distance, 2), [1, 1, 0.5, 0.25, 0, 0])

    def test_mirrored(self) -> None:
        at = points((-1, -2, -3), (4, 5, 6))
        assert np.array_equal(mirror(at), points((1, -2, -3), (4, 5, 6)))
        assert at[0, 0] == -1


def head(seed: int) -> Head:
    return draw_head(RandomFields(np.random.default_rng(seed), GRID))


def unmoved(seed: int) -> Head:
    """A head that lies exactly as the atlas does."""
    moved = head(seed)
    everywhere = np.arange(GRID.positions.shape[1])
    return moved._replace(voxels=everywhere, points=GRID.positions, depth=np.full(len(everywhere), 50.0))


class TestBrain:
    """Anatomy: two brains of an atlas, and what is near them."""

    @pytest.mark.parametrize("brain", [0, 1])
    def test_places_in_the_atlas(self, brain: int) -> None:
        at = points((8, -8, 22), (25, -30, 35), (20, -60, -40), (0, -25, -30), (90, 60, 60))
        found = tissues(head(0)._replace(brain=brain), at)
        assert found[FLUID, 0] > 0.5  # a ventricle
        assert found[WHITE, 1] > 0.5  # the centrum semiovale
        assert np.allclose(found[:, :4].sum(0), 1, atol=0.2)  # cerebellum and pons are there, too
        assert not found[:, 4].any()

    def test_shares_sum_to_one_in_the_brain(self) -> None:
        for seed in range(4):
            drawn = head(seed)
            shares = tissues(drawn, drawn.points)
            assert shares.min() >= 0
            assert shares.sum(0).max() <= 1 + 1e-5
            assert np.median(shares.sum(0)[drawn.depth > GRID.spacing]) == pytest.approx(1, abs=1e-3)
            assert np.all(shares.mean(axis=1) > 0.05)  # each tissue is there

    def test_atrophy_gives_fluid_more_of_what_it_shares(self) -> None:
        drawn = head(1)
        young, old = (tissues(drawn, drawn.points, atrophy) for atrophy in (0.7, 1.8))
        shared = (young[FLUID] > 0.05) & (young[FLUID] < 0.95) & (drawn.depth > GRID.spacing)
        assert np.all(old[FLUID, shared] > young[FLUID, shared])
        assert np.allclose(old.sum(0)[shared], young.sum(0)[shared], atol=0.05)
        ratio = young[GREY, shared] / np.maximum(young[GREY, shared] + young[WHITE, shared], 1e-6)
        same = old[GREY, shared] / np.maximum(old[GREY, shared] + old[WHITE, shared], 1e-6)
        assert np.allclose(ratio, same, atol=1e-3)

    def test_depth_is_below_the_surface(self) -> None:
        drawn = head(2)
        assert np.all(drawn.depth[tissues(drawn, drawn.points).sum(0) < 0.4] == 0)
        assert 35 < drawn.depth.max() < 70

    def test_heads_differ(self) -> None:
        heads = [head(seed) for seed in range(8)]
        assert {each.brain for each in heads} == {0, 1}
        assert len({len(each.voxels) for each in heads}) == 8

    def test_veins_lie_at_the_surface_and_arteries_below(self) -> None:
        veins, arteries = draw_vessels(unmoved(0))
        for vessel, at in ((veins, (0, -30, 78)), (veins, (0, -101, -8)), (arteries, (0, -18, -20))):
            assert vessel[norm(GRID.positions - points(at)).argmin()] < 3
            assert vessel[norm(GRID.positions - points((30, 20, 40))).argmin()] > 20


class TestTumour:
    """Where a tumour grows, and what it does to its surroundings."""

    def test_pushes_and_never_turns_space_inside_out(self) -> None:
        for seed in range(10):
            drawn = head(seed)
            tumour = draw_tumour(drawn, tissues(drawn, drawn.points))
            direction = np.array([[0.6], [0], [0.8]])
            radii = np.linspace(0, 100, 400)
            at = (tumour.centre + direction * radii).astype(np.float32)
            came_from = norm(tumour.displace(at, np.full(400, 50)) - tumour.centre)
            assert np.all(np.diff(came_from) > 0)
            assert np.all(came_from <= radii + 1e-3)
            assert (radii - came_from).max() > 0.5
            assert np.array_equal(tumour.displace(at, np.zeros(400)), at)  # the skull holds the surface

    def test_kinds(self) -> None:
        enhancing: dict[str, list[float]] = {}
        for seed in range(30):
            drawn = head(seed)
            shares = tissues(drawn, drawn.points)
            tumour = draw_tumour(drawn, shares)
            growth = grow(tumour, drawn, shares)
            whole = np.sum(growth, axis=0)
            assert np.min(growth) >= 0
            assert whole.max() <= 1 + 1e-5
            assert not whole[shares.sum(0) == 0].any()
            share = growth.enhancing.sum() / (growth.core.sum() + growth.enhancing.sum())
            enhancing.setdefault(tumour.kind, []).append(float(share))
        assert set(enhancing) == {"ring", "solid", "patchy", "low grade"}
        assert max(enhancing["low grade"]) == 0
        assert min(enhancing["solid"]) > 0.4
        assert 0.1 < np.mean(enhancing["ring"]) < 0.7
