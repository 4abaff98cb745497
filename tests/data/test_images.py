"""Images to segment: which of their sequences a model gets."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from volumes import head, write

from tinyunet.common.errors import DataError, UserError
from tinyunet.data.brain import normalise
from tinyunet.data.cases import load_image
from tinyunet.data.images import Image, find_images
from tinyunet.data.sequences import Choice

FOUR = ("FLAIR", "T1w", "t1gd", "T2w")
OTHER = ("T1", "T1ce", "T2", "Flair")  # nnU-Net's order for BraTS
PLACES = [3, 0, 1, 2]  # of FOUR in OTHER


def describe(folder: Path, names: Sequence[str] = OTHER, key: str = "channel_names") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({key: {str(n): name for n, name in enumerate(names)}}))
    return folder


def write_channels(folder: Path, name: str = "C", numbers: Sequence[int] = range(4)) -> Path:
    for number in numbers:
        write(folder / f"{name}_{number:04}.nii.gz", head()[..., number])
    return folder


def volume(image: Image, channels: int, allow_missing: bool = False) -> np.ndarray:
    return load_image(image.paths, channels, None, None, allow_missing, image.choice)[0]


@pytest.mark.parametrize("key", ["channel_names", "modality"])
@pytest.mark.parametrize("model", [FOUR, ("FLAIR",), ("T2w", "FLAIR")])
@pytest.mark.parametrize("where", ["imagesTs", "."])
def test_names_in_dataset_json_choose(tmp_path: Path, key: str, model: Sequence[str], where: str) -> None:
    describe(tmp_path, key=key)
    write_channels(tmp_path / where, "A")
    write(tmp_path / where / "B.nii.gz", head())
    expected = normalise(head()[..., [PLACES[FOUR.index(name)] for name in model]])
    trained_on = Choice((0,), 4)  # the order of the training data is another one
    separate, together = find_images(tmp_path / where, model, choice=trained_on)
    assert (separate.name, together.name) == ("A", "B")
    for image in (separate, together, *find_images(tmp_path / where / "B.nii.gz", model)):
        assert np.array_equal(volume(image, len(model)), expected)
        assert image.read_as.startswith("sequences read as: ")
        assert "4 FLAIR" in image.read_as
        assert image.read_as.endswith("dataset.json)")


def test_a_new_order_counts_once(tmp_path: Path) -> None:
    """The files of a BraTS case and of channels are in the model's order already."""
    order, choice = ("T2w", "T1w", "FLAIR", "t1gd"), Choice((3, 1, 0, 2), 4)
    for number, kind in enumerate(("flair", "t1", "t1ce", "t2")):
        write(tmp_path / "A" / f"A_{kind}.nii.gz", head()[..., number])
    write_channels(tmp_path / "channels")
    write(tmp_path / "whole.nii.gz", head())
    for given in ("A", "channels", "whole.nii.gz"):
        (image,) = find_images(tmp_path / given, order, choice=choice)
        assert np.array_equal(volume(image, 4), normalise(head()[..., [3, 1, 0, 2]]))


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    write_channels(describe(tmp_path, ("T1", "T2", "CT", "ADC")))
    with pytest.raises(UserError, match=r"dataset.json: names T1, T2, CT, ADC; expected FLAIR, each once, "):
        find_images(tmp_path, ("FLAIR",))
    # The names are compared, not understood.
    (image,) = find_images(tmp_path, ("adc", "CT"))
    assert np.array_equal(volume(image, 2), normalise(head()[..., [3, 2]]))


def test_a_description_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"name": "ours"}')
    write(tmp_path / "B.nii.gz", head())
    (image,) = find_images(tmp_path, FOUR)
    assert (image.choice, image.read_as) == (
        None,
        "sequences read as: 1 FLAIR, 2 T1w, 3 t1gd, 4 T2w (order of the training data)",
    )


class TestMissingChannel:
    """A file of nnU-Net's that is not there."""

    def test_only_what_is_needed(self, tmp_path: Path) -> None:
        write_channels(describe(tmp_path), numbers=[1, 3])
        (image,) = find_images(tmp_path, ("FLAIR",))
        assert image.paths == (tmp_path / "C_0003.nii.gz",)

    def test_refused_unless_allowed(self, tmp_path: Path) -> None:
        write_channels(describe(tmp_path), numbers=[0, 1, 3])
        with pytest.raises(DataError, match=r"C_0002.nii.gz: no such file; expected T2w there \(.*json\)"):
            find_images(tmp_path, FOUR)
        (image,) = find_images(tmp_path, FOUR, allow_missing=True)
        found = volume(image, 4, allow_missing=True)
        assert not found[..., 3].any()
        assert np.array_equal(found[..., 0], normalise(head()[..., [3]])[..., 0])


class TestOneSequence:
    """A model of one sequence, and files that may be of another."""

    @pytest.mark.parametrize("name", ["A_t1.nii.gz", "A-t2w.nii", "BraTS-GLI-00001-000-seg.nii.gz"])
    def test_the_name_says_another_one(self, tmp_path: Path, name: str) -> None:
        file = write(tmp_path / name, head()[..., 0])
        with pytest.raises(UserError, match=rf"{name}: named as .*; expected a file of FLAIR"):
            find_images(file, ("FLAIR",))

    @pytest.mark.parametrize("name", ["A_flair.nii.gz", "A-t2f.nii", "anything.nii"])
    def test_the_name_agrees(self, tmp_path: Path, name: str) -> None:
        file = write(tmp_path / name, head()[..., 0])
        assert [image.paths for image in find_images(file, ("FLAIR",), choice=Choice((0,), 4))] == [(file,)]

    def test_a_channel(self, tmp_path: Path) -> None:
        write_channels(describe(tmp_path))
        with pytest.raises(UserError, match=r"C_0000.nii.gz: .* names channel 0 T1; expected .* FLAIR"):
            find_images(tmp_path / "C_0000.nii.gz", ("FLAIR",))
        assert volume(*find_images(tmp_path / "C_0003.nii.gz", ("FLAIR",)), 1).shape[-1] == 1

    def test_channels_without_names(self, tmp_path: Path) -> None:
        write_channels(tmp_path, numbers=[0, 1])
        with pytest.raises(DataError, match=r"C has 2 channels, and nothing says which is FLAIR; expected "):
            find_images(tmp_path, ("FLAIR",), choice=Choice((0,), 4))
        write_channels(tmp_path / "alone", numbers=[0])
        assert [image.name for image in find_images(tmp_path / "alone", ("FLAIR",))] == ["C"]


def test_whole_images_with_four_digits_are_no_channels(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"patient_{number:04}.nii.gz", head(seed=number))
    images = find_images(tmp_path, FOUR)
    assert [image.name for image in images] == [f"patient_{number:04}" for number in range(4)]
