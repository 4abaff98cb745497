"""Random changes of a patch: what moves, what must not."""

from collections.abc import Iterator
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyunet.data import augmentation as module
from tinyunet.data.augmentation import (
    CHANGES,
    augment,
    augment_fully,
    contrast,
    drop_sequences,
    gamma,
    warped_patch,
)
from tinyunet.data.patches import generator


def patch(shape: tuple[int, int, int], channels: int = 3) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an image with a border of background, and labels that number its voxels."""
    labels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = np.random.default_rng(0).standard_normal((*shape, channels), np.float32)
    image[0] = 0
    return image, labels


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the changes of intensity off."""
    for name in ("SCALE", "SHIFT", "NOISE"):
        monkeypatch.setattr(module, name, 0)


def rigid_motions(labels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield the volume permuted and flipped in all 48 ways."""
    for axes in permutations(range(3)):
        for flips in product([False, True], repeat=3):
            yield np.flip(labels.transpose(axes), np.flatnonzero(flips))


def seen(shape: tuple[int, int, int], draws: int) -> set[bytes]:
    """Return all labels that come out, after checking that the image moved alike."""
    found = set()
    for i in range(draws):
        image, labels = patch(shape)
        moved, moved_labels = augment(image, labels, generator(0, 0, i))
        assert moved_labels.shape == shape
        # Each voxel still has its own label and its own values.
        assert np.array_equal(moved, image.reshape(-1, 3)[moved_labels])
        found.add(moved_labels.tobytes())
    return found


@pytest.mark.usefixtures("still")
class TestMoves:
    """Image and labels go the same way, and every way is gone."""

    def test_unequal_axes_are_only_flipped(self) -> None:
        labels = patch((2, 3, 4))[1]
        flips = {np.flip(labels, np.flatnonzero(axes)).tobytes() for axes in product([False, True], repeat=3)}
        assert seen((2, 3, 4), 200) == flips

    @pytest.mark.parametrize("shape", [(2, 4, 4), (4, 2, 4), (4, 4, 2)])
    def test_two_equal_axes_are_turned_too(self, shape: tuple[int, int, int]) -> None:
        labels = patch(shape)[1]
        expected = {m.tobytes() for m in rigid_motions(labels) if m.shape == shape}
        assert len(expected) == 16
        assert seen(shape, 300) == expected

    def test_cubes_are_turned_in_every_plane(self) -> None:
        motions = seen((3, 3, 3), 600)
        assert len(motions) == 32  # a flip of any axes and a quarter turn in one of three planes
        assert motions <= {m.tobytes() for m in rigid_motions(patch((3, 3, 3))[1])}


class TestIntensity:
    """Scale, shift and noise inside the brain; the background stays exactly 0."""

    @given(
        shape=st.tuples(*[st.integers(1, 5)] * 3), channels=st.integers(1, 4), sample=st.integers(0, 10**6)
    )
    def test_background_stays_zero_and_brain_does_not_become_so(
        self, shape: tuple[int, int, int], channels: int, sample: int
    ) -> None:
        image, labels = patch(shape, channels)
        changed, moved = augment(image, labels, generator(0, 0, sample))
        brain = image.any(axis=-1).reshape(-1)[moved]
        assert np.array_equal(changed.any(axis=-1), brain)
        assert changed.dtype == np.float32
        assert changed.flags.c_contiguous
        assert moved.flags.c_contiguous

    def test_a_channel_that_is_zero_inside_the_brain_is_changed_too(self) -> None:
        image, labels = np.ones((4, 4, 4, 2), np.float32), np.zeros((4, 4, 4), np.uint8)
        image[..., 1] = 0
        assert augment(image, labels, generator(0, 0, 0))[0][..., 1].all()

    def test_sizes_of_the_changes(self) -> None:
        image, labels = np.ones((12, 12, 12, 2), np.float32), np.zeros((12, 12, 12), np.uint8)
        image[6:, ..., 0] = -1
        scales, shifts, noises = [], [], []
        for i in range(200):
            changed = augment(image, labels, generator(0, 0, i))[0][..., 0]
            high, low = changed[changed > 0], changed[changed < 0]
            assert high.size == low.size
            scales.append((high.mean() - low.mean()) / 2)
            shifts.append((high.mean() + low.mean()) / 2)
            noises.append((high - high.mean()).std())
        for values, middle, reach in ((scales, 1, module.SCALE), (shifts, 0, module.SHIFT)):
            assert np.abs(np.array(values) - middle).max() < reach + 0.01
            assert np.std(values) == pytest.approx(reach / np.sqrt(3), rel=0.15)
        assert max(noises) < module.NOISE * 1.1
        assert np.mean(noises) == pytest.approx(module.NOISE / 2, rel=0.15)

    def test_channels_change_independently(self) -> None:
        image, labels = np.ones((4, 4, 4, 2), np.float32), np.zeros((4, 4, 4), np.uint8)
        pairs = [augment(image, labels, generator(0, 0, i))[0].mean((0, 1, 2)) for i in range(200)]
        assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.25

    def test_deviates_of_a_byte_are_normal(self) -> None:
        deviates = np.sort(module._NORMAL_OF_BYTE)
        assert deviates.size == 256
        assert deviates.mean() == pytest.approx(0, abs=1e-6)
        assert deviates.std() == pytest.approx(1, abs=1e-6)
        assert np.mean(np.abs(deviates) < 1) == pytest.approx(0.683, abs=0.01)
        assert np.mean(deviates**4) == pytest.approx(3, abs=0.2)


def test_repeats_and_leaves_its_inputs_alone() -> None:
    image, labels = patch((4, 4, 4))
    before = image.copy(), labels.copy()
    one = augment(image, labels, generator(3, 1, 4))
    two = augment(image, labels, generator(3, 1, 4))
    other = augment(image, labels, generator(3, 1, 5))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert np.array_equal(image, before[0])
    assert np.array_equal(labels, before[1])
    assert not any(np.shares_memory(a, b) for a, b in zip(one, (image, labels), strict=True))


def test_image_and_labels_of_different_size() -> None:
    image, labels = patch((4, 4, 4))
    with pytest.raises(ValueError, match=r"^image: shape \(4, 4, 4, 3\); expected \(4, 4, 3, 'C'\)"):
        augment(image, labels[..., 1:], generator(0, 0, 0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_sequences_are_dropped_but_never_all(share):
    kept = np.zeros(4)
    for seed in range(200):
        image = np.ones((2, 2, 2, 4), np.float32)
        drop_sequences(image, share, np.random.default_rng(seed))
        here = image.any((0, 1, 2))
        assert np.array_equal(image, np.broadcast_to(here, image.shape))  # as a whole
        assert here.any()
        kept += here
    expected = 1 - share + share**4 / 4
    np.testing.assert_allclose(kept / 200, expected, atol=0.12)


def test_no_share_draws_nothing():
    generator, other = (np.random.default_rng(0) for _ in range(2))
    drop_sequences(np.ones((1, 1, 1, 2), np.float32), 0.0, generator)
    assert generator.random() == other.random()
    for share in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"share: .*; expected at least 0 and below 1"):
            drop_sequences(np.ones((1, 1, 1, 2), np.float32), share, generator)


def ramps(shape: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an image whose three sequences are the coordinates from 1 on, and labels that are the first."""
    image = np.stack(np.indices(shape), axis=-1).astype(np.float32) + 1
    return image, image[..., 0].astype(np.uint8)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these spatial changes come always, and no other."""
    for name in ("ROTATION", "SCALING", "ELASTIC"):
        monkeypatch.setattr(module, name, float(name in names))


class TestWarp:
    """A patch is read where it should be: coordinates of its voxels tell."""

    def test_without_a_change_it_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only(monkeypatch)
        image, labels = ramps((9, 10, 11))
        patch_image, patch_labels = warped_patch(image, labels, (1, 2, 3), (4, 5, 6), generator(0, 0, 0))
        assert np.array_equal(patch_image, image[1:5, 2:7, 3:9])
        assert np.array_equal(patch_labels, labels[1:5, 2:7, 3:9])

    @pytest.mark.parametrize("kind", ["ROTATION", "SCALING"])
    @pytest.mark.parametrize("seed", range(5))
    def test_rotation_keeps_distances_and_scaling_angles(
        self, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
    ) -> None:
        only(monkeypatch, kind)
        image, labels = ramps((40, 40, 40))
        size, corner = (9, 7, 8), (16, 17, 15)
        points, found = warped_patch(image, labels, corner, size, np.random.default_rng(seed))
        points = points.astype(np.float64)
        # The middle stays; steps along the three axes are at right angles, and all equally long.
        middle = points.mean((0, 1, 2))
        np.testing.assert_allclose(middle, np.add(corner, 1) + (np.array(size) - 1) / 2, atol=1e-4)
        steps = [np.diff(points, axis=axis).reshape(-1, 3) for axis in range(3)]
        lengths = [np.linalg.norm(step, axis=1) for step in steps]
        length = lengths[0][0]
        assert length == pytest.approx(1, abs=1e-4) if kind == "ROTATION" else 0.7 <= length <= 1.4
        for each in lengths:
            np.testing.assert_allclose(each, length, atol=1e-4)
        gram = np.array([[a[0] @ b[0] for a in steps] for b in steps])
        np.testing.assert_allclose(gram, length**2 * np.eye(3), atol=1e-3)
        assert not np.array_equal(points, np.round(points))  # something has happened
        assert np.abs(found - points[..., 0]).max() <= 0.5 + 1e-4  # labels come from the nearest voxel

    def test_bending_is_smooth_and_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only(monkeypatch, "ELASTIC")
        image, labels = ramps((40, 40, 40))
        points, _ = warped_patch(image, labels, (4, 4, 4), (32, 32, 32), np.random.default_rng(1))
        moved = points - image[4:36, 4:36, 4:36]
        assert 0.1 < np.abs(moved).max() <= module.BEND * 32 + 1e-4
        assert max(np.abs(np.diff(moved, axis=axis)).max() for axis in range(3)) < 1  # nothing folds over

    def test_outside_is_background(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only(monkeypatch, "SCALING")
        monkeypatch.setattr(module, "ZOOM", (2.0, 2.0))
        image, labels = ramps((8, 8, 8))
        found, found_labels = warped_patch(image, labels, (0, 0, 0), (8, 8, 8), generator(0, 0, 0))
        inside = np.zeros((8, 8, 8), bool)
        inside[2:6, 2:6, 2:6] = True
        assert np.array_equal(found.all(-1), inside)
        assert np.array_equal(found_labels > 0, inside)

    def test_a_slice_stays_in_its_plane(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only(monkeypatch, "ROTATION", "SCALING", "ELASTIC")
        image, labels = ramps((40, 40, 5))
        found, _ = warped_patch(image, labels, (10, 10, 3), (16, 16, 1), generator(0, 0, 0))
        assert np.array_equal(np.unique(found[..., 2]), [4])


def brain() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a normalised image of two sequences, and where it is not background."""
    image = np.random.default_rng(3).standard_normal((10, 11, 12, 2)).astype(np.float32)
    mask = np.ones((10, 11, 12), bool)
    mask[:2], mask[:, -1:] = False, False
    return image * mask[..., None], mask


class TestFull:
    """nnU-Net's list."""

    @pytest.mark.parametrize("change", [change for change, _ in CHANGES], ids=lambda each: each.__name__)
    def test_each_change_changes_finitely_and_repeatably(self, change: module.Change) -> None:
        found = []
        for _ in range(2):
            image, mask = brain()
            random = np.random.default_rng(1)
            for _ in range(3):  # a change may leave a sequence out
                change(image, mask, random)
            found.append(image)
        assert np.array_equal(*found)
        assert found[0].dtype == np.float32
        assert np.isfinite(found[0]).all()
        difference = np.abs(found[0] - brain()[0])[brain()[1]]
        assert 1e-3 < difference.max() < 8

    @pytest.mark.parametrize("value", [0.0, 1.5])
    @pytest.mark.parametrize("change", [change for change, _ in CHANGES], ids=lambda each: each.__name__)
    def test_a_constant_sequence(self, change: module.Change, value: float) -> None:
        image, mask = brain()
        image[..., 1] = value * mask
        change(image, mask, np.random.default_rng(2))
        assert np.isfinite(image).all()

    def test_contrast_keeps_the_range(self) -> None:
        image, mask = brain()
        before = image[mask].min(0), image[mask].max(0)
        contrast(image, mask, np.random.default_rng(0))
        assert (image[mask].min(0) >= before[0]).all()
        assert (image[mask].max(0) <= before[1]).all()

    def test_gamma_keeps_mean_and_deviation(self) -> None:
        image, mask = brain()
        before = image[mask].copy()
        gamma(image, mask, np.random.default_rng(0))
        np.testing.assert_allclose(image[mask].mean(0), before.mean(0), atol=1e-5)
        np.testing.assert_allclose(image[mask].std(0), before.std(0), rtol=1e-5)
        # A power keeps the order of intensities.
        assert np.array_equal(image[mask][:, 0].argsort(), before[:, 0].argsort())

    @given(st.integers(0, 2**32), st.sampled_from([(8, 9, 10), (8, 8, 1)]))
    def test_background_stays_and_everything_repeats(self, seed: int, size: tuple[int, int, int]) -> None:
        image, _ = brain()
        labels = (image[..., 0] > 1).astype(np.uint8) * 2
        kept = image.copy(), labels.copy()
        one, two = (
            augment_fully(image, labels, (1, 1, 1), size, np.random.default_rng(seed)) for _ in range(2)
        )
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        assert one[0].shape == (*size, 2)
        assert one[1].shape == size
        assert one[0].flags.c_contiguous
        assert np.isfinite(one[0]).all()
        assert set(np.unique(one[1])) <= {0, 2}
        assert np.array_equal(image, kept[0])
        assert np.array_equal(labels, kept[1])
        outside = ~one[0].any(-1)
        assert not one[1][outside].any()  # where nothing was seen there is no label
