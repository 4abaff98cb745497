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
    assert odd | odd_sequences(image, found) == {}
    assert np.array_equal(found, image.any(axis=-1))


def test_no_background_is_told() -> None:
    image = np.random.default_rng(0).normal(400, 100, (*SHAPE, 2))
    found, odd = find_brain(image)
    assert found.all()
    assert "no background" in odd[0]


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
