"""Finding the brain whatever surrounds it, and naming what is odd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from volumes import write

from tinyunet.data.brain import empty_sequences, find_brain, normalise, odd_sequences
from tinyunet.data.cases import load_image

SHAPE = (24, 30, 20)
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "real_glioma" / "GLIOMA_A"


def ball(shape: tuple[int, ...] = SHAPE, size: float = 0.8) -> NDArray[np.bool_]:
    """An ellipsoid that fills a share of each side."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    return np.asarray(sum(axis**2 for axis in axes) < size**2)


def head(size: float = 0.8) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A brain with 0 around it, some of whose voxels are dark in one sequence."""
    generator, brain = np.random.default_rng(0), ball(size=size)
    image = generator.normal(400, 100, (*SHAPE, 4)).round() * brain[..., None]
    image[10, 12, 10, 0] = 0
    return image, brain


def outside(image: Any, brain: Any, values: Any) -> Any:
    return np.where(brain[..., None], image, values)


def scaled(image: Any) -> Any:
    return (image - image.mean((0, 1, 2))) / image.std((0, 1, 2))


NOISE = np.random.default_rng(1)
ODD = {
    "minus one": lambda image, brain: outside(image, brain, -1),
    "one sequence minus one": lambda image, brain: outside(image, brain, [0, -1, 0, 0]),
    "far below": lambda image, brain: outside(image, brain, -1024.0),
    "noise": lambda image, brain: outside(image, brain, NOISE.uniform(0, 0.5, image.shape)),
    "noise around 0": lambda image, brain: outside(image, brain, NOISE.normal(0, 2, image.shape)),
    "steps of noise": lambda image, brain: outside(image, brain, NOISE.integers(0, 3, image.shape)),
    "scaled": lambda image, brain: scaled(image),
    "scaled noise": lambda image, brain: scaled(outside(image, brain, NOISE.uniform(0, 0.5, image.shape))),
}


@pytest.mark.parametrize("size", [0.8, 1.05])  # the larger one touches all sides
@pytest.mark.parametrize("kind", ODD)
def test_the_brain_is_found_whatever_surrounds_it(kind: str, size: float, tmp_path: Path) -> None:
    image, brain = head(size)
    changed = ODD[kind](image, brain)
    found, odd = find_brain(changed)
    assert np.count_nonzero(found != brain) <= 1  # the dark voxel
    assert all("background" in told for told in odd.values())
    np.testing.assert_allclose(normalise(changed), normalise(image), atol=0.02)
    notes: list[str] = []
    load_image([write(tmp_path / "a.nii", changed)], notes=notes)
    assert len(notes) == 1
    assert notes[0].startswith(f"{tmp_path}/a.nii: sequence ")


@pytest.mark.parametrize("size", [0.8, 1.05])
def test_nothing_is_odd_about_zeros(size: float) -> None:
    image, _ = head(size)
    found, odd = find_brain(image)
    assert odd | odd_sequences(image, found, empty_sequences(image, found)) == {}
    assert np.array_equal(found, image.any(axis=-1))


def test_no_background_is_told() -> None:
    image = np.random.default_rng(0).normal(400, 100, (*SHAPE, 2))
    found, odd = find_brain(image)
    assert found.all()
    assert "no background" in odd[0]


def bordered(image: Any, value: float, planes: int = 2) -> Any:
    """Padding on all sides."""
    return np.pad(image, [(planes, planes)] * 3 + [(0, 0)], constant_values=value)


@pytest.mark.parametrize("size", [0.8, 1.05])
@pytest.mark.parametrize(
    ("kind", "border"),
    [(kind, 0) for kind in ("minus one", "noise around 0", "scaled", "scaled noise")] + [("plain", -1000)],
)
def test_a_border_does_not_hide_the_background(kind: str, border: int, size: float) -> None:
    image, brain = head(size)
    changed = ODD[kind](image, brain) if kind in ODD else image
    for widths in ([(2, 2)] * 3, [(0, 4), (3, 0), (0, 0)]):
        found, _ = find_brain(np.pad(changed, [*widths, (0, 0)], constant_values=border))
        assert np.count_nonzero(found != np.pad(brain, widths)) <= 6


@pytest.mark.parametrize("share", [0.03, 0.06, 0.1])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_much_noise_hardly_hides_the_brain(share: float, channels: int) -> None:
    image, brain = head()
    image = image[..., :channels]
    image = image + np.random.default_rng(2).normal(0, share * 500, image.shape)
    for changed in (image, scaled(image), np.abs(image), image.astype(np.int16)):
        found, odd = find_brain(changed)
        assert np.count_nonzero(found != brain) < 0.015 * np.count_nonzero(brain)
        assert all("background is noise around" in note for note in odd.values())


@pytest.mark.parametrize("border", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 20.0])
@pytest.mark.parametrize("lesion", [200.0, 900.0])
def test_even_tissue_is_no_background(lesion: float, noise: float, border: int) -> None:
    """A cube without corners of air: only the border of zeros is background."""
    image = np.full((20, 20, 20, 2), 300.0)
    image[6:14, 6:14, 6:14] = lesion
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    found, _ = find_brain(bordered(image, 0, border))
    assert np.array_equal(found, bordered(np.ones((20, 20, 20, 1), bool), False, border)[..., 0])


def test_a_crop_through_the_brain_has_a_background() -> None:
    image, brain = head(1.2)
    for changed in (image, scaled(image), outside(image, brain, -1)):
        part = tuple(slice(size // 3, None) for size in SHAPE)
        found, _ = find_brain(changed[part])
        assert np.count_nonzero(found != brain[part]) <= 1


def test_a_sequence_of_noise_is_named() -> None:
    image, brain = head()
    image[..., 2] = np.abs(np.random.default_rng(0).normal(0, 100, SHAPE))
    found, odd = find_brain(image)
    assert np.array_equal(found, brain)
    assert odd | odd_sequences(image, found, empty_sequences(image, found)) == {
        2: "looks the same in the brain and around it, as if it was noise"
    }


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda image: image[..., 1] * 0, "is 0 everywhere"),
        (lambda image: image[..., 1] * 0 + 7, "is 7 everywhere"),
        (lambda image: np.where(image.any(-1), 7, 0), "is 7 everywhere"),
        (lambda image: image[..., 0], "is the same as sequence 1"),
        (lambda image: np.where(image[..., 1] > 380, 5, image[..., 1]), "of the brain"),
    ],
)
def test_a_sequence_without_content_is_named(spoil: Any, told: str, files: int, tmp_path: Path) -> None:
    image, _ = head()
    image[..., 1] = spoil(image)
    if files == 1:
        paths = [write(tmp_path / "a.nii.gz", image)]
    else:
        paths = [write(tmp_path / f"{i}.nii.gz", image[..., i]) for i in range(4)]
    notes: list[str] = []
    found, _ = load_image(paths, notes=notes)
    assert np.isfinite(found).all()
    (note,) = notes
    assert told in note
    assert str(tmp_path / "1.nii.gz") in note if files > 1 else "a.nii.gz: sequence 2: " in note


def test_a_whole_head_is_named(tmp_path: Path) -> None:
    image, brain = head()
    for side, warned in ((7.0, False), (10.0, True)):
        notes: list[str] = []
        load_image([write(tmp_path / "a.nii", image, np.diag([side, side, side, 1]))], notes=notes)
        told = f"{np.count_nonzero(brain) * side**3 / 1000:,.0f} ml, more than a brain; is it the head?"
        assert notes == [f"{tmp_path}/a.nii: what is not background has {told}"] * warned


def test_an_image_of_nothing() -> None:
    for value in (0, 3):
        image = np.full((*SHAPE, 2), value, np.int16)
        assert not normalise(image).any()
        brain, _ = find_brain(image)
        assert set(empty_sequences(image, brain)) == {0, 1}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scan is not here")
def test_a_real_scan() -> None:
    paths = [REAL / f"GLIOMA_A_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2")]
    notes: list[str] = []
    load_image(paths, notes=notes)
    assert notes == []
