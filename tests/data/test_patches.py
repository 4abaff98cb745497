"""Random patches: where they lie, and that they repeat."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyunet.data.patches import generator, sample_patch

sizes = st.integers(1, 9)


def numbered(shape: tuple[int, ...], channels: int = 2) -> NDArray[np.float32]:
    """Return an image whose every value is another integer, so that a patch tells its place."""
    return np.arange(np.prod(shape) * channels, dtype=np.float32).reshape(*shape, channels)


@given(data=st.data(), shape=st.tuples(sizes, sizes, sizes), seed=st.integers(0, 2**40))
def test_patch_is_a_part_of_the_volume(data: st.DataObject, shape: tuple[int, int, int], seed: int) -> None:
    patch_size = tuple(data.draw(st.integers(1, size)) for size in shape)
    share = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    image = numbered(shape)
    labels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    before = image.copy(), labels.copy()

    patch, patch_labels = sample_patch(image, labels, patch_size, share, generator(seed, 0, 0))

    assert patch.shape == (*patch_size, 2)
    assert patch_labels.shape == patch_size
    assert (patch.dtype, patch_labels.dtype) == (np.float32, np.uint8)
    assert patch.flags.c_contiguous
    assert patch_labels.flags.c_contiguous
    corner = np.unravel_index(int(patch[0, 0, 0, 0]) // 2, shape)
    box = tuple(slice(at, at + size) for at, size in zip(corner, patch_size, strict=True))
    assert np.array_equal(patch, image[box])
    assert np.array_equal(patch_labels, labels[box])
    patch[:] = -1
    patch_labels[:] = 9
    assert np.array_equal(image, before[0])
    assert np.array_equal(labels, before[1])


@given(seed=st.integers(0, 10**6), at=st.tuples(*[st.integers(0, 8)] * 3))
def test_foreground_is_in_the_patch(seed: int, at: tuple[int, int, int]) -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[at] = 3
    patch = sample_patch(numbered((9, 9, 9)), labels, (4, 3, 1), 1, generator(seed, 0, 0))[1]
    assert patch.max() == 3


def test_foreground_voxel_is_in_the_middle_where_there_is_room() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[9, 10, 11] = 1
    for patch_size, middle in (((5, 5, 5), (2, 2, 2)), ((4, 6, 8), (2, 3, 4))):
        image = numbered((20, 20, 20))
        patch = sample_patch(image, labels, patch_size, 1, generator(0, 0, 0))[1]
        assert np.argwhere(patch).tolist() == [list(middle)]


def test_share_around_foreground() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[20, 20, 20] = 1
    image = numbered((40, 40, 40), 1)
    hits = sum(
        bool(sample_patch(image, labels, (3, 3, 3), 0.6, generator(0, 0, i))[1].any()) for i in range(1000)
    )
    assert 550 < hits < 650  # deviation 15.5; by chance alone a patch hits one time in 2000


def test_classes_are_drawn_evenly() -> None:
    labels = np.ones((20, 20, 20), np.uint8)
    labels[0, 0, 0] = 3
    labels[19, 19, :5] = 4
    counts = np.zeros(5)
    for i in range(600):
        patch = sample_patch(numbered((20, 20, 20), 1), labels, (1, 1, 1), 1, generator(1, 0, i))[1]
        counts[patch[0, 0, 0]] += 1
    assert counts[[0, 2]].tolist() == [0, 0]
    assert np.all(np.abs(counts[[1, 3, 4]] - 200) < 50)  # deviation 11.5


def test_every_place_is_reached_without_foreground() -> None:
    labels = np.zeros((3, 2, 4), np.uint8)
    places = {
        sample_patch(numbered((3, 2, 4), 1), labels, (2, 2, 2), 1, generator(0, 0, i))[0][0, 0, 0, 0]
        for i in range(200)
    }
    assert places == {0, 1, 2, 8, 9, 10}


def test_whole_volume_as_patch() -> None:
    image, labels = numbered((3, 4, 5)), np.ones((3, 4, 5), np.uint8)
    assert np.array_equal(sample_patch(image, labels, (3, 4, 5), 1, generator(0, 0, 0))[0], image)


def test_generator_repeats_and_differs() -> None:
    def draw(*numbers: int) -> list[int]:
        drawn: list[int] = generator(*numbers).integers(0, 2**62, 4).tolist()
        return drawn

    assert draw(1, 2, 3) == draw(1, 2, 3)
    streams = [draw(*numbers) for numbers in np.ndindex(4, 4, 4)]
    assert len({tuple(stream) for stream in streams}) == 64
    assert draw(2**32, 0, 0) != draw(0, 1, 0)


@pytest.mark.parametrize(
    ("image", "labels", "patch_size", "share", "message"),
    [
        ((4, 4, 4), (4, 4, 4), (2, 2, 2), 0, r"^image: shape \(4, 4, 4\); expected"),
        ((4, 4, 5, 1), (4, 4, 4), (2, 2, 2), 0, r"^image: shape \(4, 4, 5, 1\); expected"),
        ((4, 4, 4, 1), (4, 4, 4), (2, 5, 2), 0, r"^patch_size: \(2, 5, 2\); expected 1 up to"),
        ((4, 4, 4, 1), (4, 4, 4), (2, 0, 2), 0, r"^patch_size: \(2, 0, 2\); expected 1 up to"),
        ((4, 4, 4, 1), (4, 4, 4), (2, 2), 0, r"^patch_size: \(2, 2\); expected 1 up to"),
        ((4, 4, 4, 1), (4, 4, 4), (2, 2, 2), 1.5, r"^foreground_share: 1\.5; expected 0 to 1"),
    ],
)
def test_wrong_arguments(
    image: tuple[int, ...], labels: tuple[int, ...], patch_size: tuple[int, ...], share: float, message: str
) -> None:
    arrays = np.zeros(image, np.float32), np.zeros(labels, np.uint8)
    with pytest.raises(ValueError, match=message):
        sample_patch(*arrays, patch_size, share, generator(0, 0, 0))
