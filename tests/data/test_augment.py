"""Random changes of a patch: what moves, what must not."""

from collections.abc import Iterator
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyunet.data import patches as module
from tinyunet.data.patches import augment, drop_sequences, generator


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
