"""One case as arrays: loading and normalising."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from volumes import head, oblique, orientations, tumour, write

from tinyunet.common.errors import DataError
from tinyunet.data.brain import normalise
from tinyunet.data.cases import Case, check_patch_fits, load_case, load_image
from tinyunet.data.labels import save_labels
from tinyunet.data.nifti import read_header


def case(folder: Path, **changes: object) -> Case:
    """Write a good case and describe it, with some of the description changed."""
    fields: dict[str, object] = {
        "name": "T",
        "image_paths": (write(folder / "T.nii.gz", head()),),
        "label_path": write(folder / "T_labels.nii.gz", tumour()),
        "channels": 4,
        "label_values": (0, 1, 2, 3),
    }
    return Case(**(fields | changes))  # type: ignore[arg-type]


class TestLoad:
    """Files become arrays, whatever way they are stored."""

    def test_shapes_types_and_values(self, tmp_path: Path) -> None:
        image, labels, geometry = load_case(case(tmp_path))
        assert (image.shape, image.dtype) == ((6, 7, 5, 4), np.float32)
        assert (labels.shape, labels.dtype) == ((6, 7, 5), np.uint8)
        assert image.flags.c_contiguous
        assert labels.flags.c_contiguous
        assert geometry.shape == (6, 7, 5)
        assert np.array_equal(image, normalise(head()))
        assert np.array_equal(labels, tumour())

    def test_a_file_for_each_sequence_equals_one_file(self, tmp_path: Path) -> None:
        together = write(tmp_path / "all.nii", head())
        alone = [write(tmp_path / f"{i}.nii.gz", head()[..., i]) for i in range(4)]
        assert np.array_equal(load_image([together], 4)[0], load_image(alone, 4)[0])

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_any_number_of_sequences(self, channels: int, tmp_path: Path) -> None:
        path = write(tmp_path / "a.nii", head(channels=channels))
        assert load_image([path])[0].shape == (6, 7, 5, channels)

    def test_one_sequence_without_a_channel_axis(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.nii", head()[..., 0])
        assert load_image([path], 1)[0].shape == (6, 7, 5, 1)

    def test_image_and_labels_stored_in_different_directions(self, tmp_path: Path) -> None:
        expected = load_case(case(tmp_path))
        turned = nibabel.Nifti1Image(tumour(), np.eye(4)).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        nibabel.save(turned, tmp_path / "turned.nii")
        image, labels, _ = load_case(case(tmp_path, label_path=tmp_path / "turned.nii"))
        assert np.array_equal(image, expected[0])
        assert np.array_equal(labels, expected[1])

    def test_every_orientation_gives_the_same_arrays(self, tmp_path: Path) -> None:
        expected = normalise(head())
        reference = nibabel.Nifti1Image(head(), np.diag([1, 1.5, 2, 1]))
        for affine in orientations():
            target = nibabel.orientations.io_orientation(affine)
            way = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], target)
            nibabel.save(reference.as_reoriented(way), tmp_path / "a.nii")
            assert np.array_equal(load_image([tmp_path / "a.nii"], 4)[0], expected)

    def test_prediction_lies_over_the_image(self, tmp_path: Path) -> None:
        affine = oblique(list(orientations())[29])
        path = write(tmp_path / "in.nii.gz", head(), affine)
        image, geometry = load_image([path])
        save_labels(tmp_path / "out.nii.gz", image.any(axis=-1).astype(np.uint8), geometry)
        out = nibabel.load(tmp_path / "out.nii.gz")
        assert np.array_equal(out.affine, nibabel.load(path).affine)
        assert np.array_equal(np.asarray(out.dataobj), head().any(axis=-1))


class TestRefuse:
    """Files that do not fit each other or the data set give one line."""

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_number_of_sequences(self, channels: int, tmp_path: Path) -> None:
        bad = case(tmp_path, channels=channels)
        with pytest.raises(DataError, match=rf"T\.nii\.gz: 4 sequences; expected {channels}$"):
            load_case(bad)

    def test_label_of_another_shape(self, tmp_path: Path) -> None:
        bad = case(tmp_path, label_path=write(tmp_path / "L.nii", tumour((6, 7, 6))))
        with pytest.raises(DataError, match=r"L\.nii: 6 x 7 x 6 voxels; expected 6 x 7 x 5 as in "):
            load_case(bad)

    def test_label_in_another_place(self, tmp_path: Path) -> None:
        moved = np.eye(4)
        moved[2, 3] = 3
        bad = case(tmp_path, label_path=write(tmp_path / "L.nii", tumour(), moved))
        with pytest.raises(DataError, match=r"L\.nii: its affine puts it up to 3\.0 voxels away"):
            load_case(bad)

    def test_rounded_affine_is_fine(self, tmp_path: Path) -> None:
        moved = np.eye(4)
        moved[2, 3] = 0.1
        load_case(case(tmp_path, label_path=write(tmp_path / "L.nii", tumour(), moved)))

    def test_a_tiny_difference_at_45_degrees_is_fine(self, tmp_path: Path) -> None:
        turns = [oblique(np.eye(4), 45 + degrees) for degrees in (1e-4, -1e-4)]
        alike = [nibabel.orientations.io_orientation(affine).tolist() for affine in turns]
        assert alike[0] != alike[1]
        image_paths = (write(tmp_path / "I.nii", head(), turns[0]),)
        expected, labels = tumour(), []
        for number, affine in enumerate(turns):
            path = write(tmp_path / f"L{number}.nii", expected, affine)
            labels.append(load_case(case(tmp_path, image_paths=image_paths, label_path=path))[1])
        assert labels[1].flags.c_contiguous
        assert np.array_equal(*labels)
        alone = [write(tmp_path / f"{i}.nii", head()[..., i], turns[i % 2]) for i in range(4)]
        assert np.array_equal(load_image(alone)[0], load_image(image_paths)[0])

    def test_sequences_of_different_shape(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{i}.nii", tumour((4, 4, 4 + i))) for i in range(2)]
        with pytest.raises(DataError, match=r"1\.nii: 4 x 4 x 5 voxels; expected 4 x 4 x 4 as in"):
            load_image(paths)

    def test_many_sequences_in_one_of_several_files(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.nii", head())
        with pytest.raises(DataError, match=r"a\.nii: 4 sequences in one of 2 files"):
            load_image([path, path])

    def test_labels_outside_the_set(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"T_labels\.nii\.gz: holds label 2, 3; expected lab"):
            load_case(case(tmp_path, label_values=(0, 1)))

    def test_no_file(self) -> None:
        with pytest.raises(ValueError, match=r"^paths: no files"):
            load_image([])

    def test_patch_larger_than_the_volume(self) -> None:
        check_patch_fits("a.nii", (8, 9, 10, 4), (8, 9, 10))
        with pytest.raises(
            DataError,
            match=r"^a\.nii: the patch of 8 x 10 x 8 voxels is larger than the volume of 8 x 9 x 10;",
        ):
            check_patch_fits("a.nii", (8, 9, 10, 4), (8, 10, 8))

    def test_a_volume_too_small_is_known_from_its_header(self, tmp_path: Path) -> None:
        small = case(tmp_path, image_paths=(write(tmp_path / "small.nii.gz", head((6, 7, 4))),))
        # The voxels are cut off: nothing but the header can have been read.
        path = small.image_paths[0]
        path.write_bytes(path.read_bytes()[:300])
        shape, _ = read_header(path)
        check_patch_fits(path, shape, (6, 7, 4))
        with pytest.raises(DataError, match=r"small\.nii\.gz: the patch of 6 x 7 x 5 voxels is larger"):
            check_patch_fits(path, shape, (6, 7, 5))


class TestNormalise:
    """Mean 0 and deviation 1 inside the brain, 0 outside."""

    @given(channels=st.integers(1, 4), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1, 1e4]))
    def test_mean_deviation_and_background(self, channels: int, seed: int, scale: float) -> None:
        image = head(channels=channels, seed=seed).astype(np.float32) * scale
        before = image.copy()
        result = normalise(image)
        brain = image.any(axis=-1)
        assert np.array_equal(image, before)
        assert np.allclose(result[brain].mean(axis=0, dtype=np.float64), 0, atol=1e-6)
        assert np.allclose(result[brain].std(axis=0, dtype=np.float64), 1, atol=1e-6)
        assert not result[~brain].any()
        assert np.array_equal(result.any(axis=-1), brain)

    def test_a_voxel_dark_in_one_sequence_is_brain(self) -> None:
        image = head()
        image[2, 2, 2, 0] = 0
        result = normalise(image)
        inside = image.any(axis=-1)
        assert result[2, 2, 2, 0] == pytest.approx(
            -image[inside, 0].mean() / image[inside, 0].std(), rel=1e-6
        )

    @pytest.mark.parametrize("value", [0, 7, 1e-30, 1e30])
    def test_constant_sequence_becomes_zero(self, value: float) -> None:
        image = head().astype(np.float32)
        image[..., 1] = np.where(image.any(axis=-1), value, 0)
        result = normalise(image)
        assert np.isfinite(result).all()
        assert not result[..., 1].any()
        assert np.array_equal(result[..., 0], normalise(head())[..., 0])

    @pytest.mark.parametrize("exponent", [-1060, -700, -1, 700, 1013])
    def test_numbers_of_any_size(self, exponent: int) -> None:
        image = head().astype(np.float64)
        scaled = np.ldexp(image, exponent)
        assert np.array_equal(normalise(scaled), normalise(image))
        scaled[1, 1, 1, 0] *= -1
        assert np.isfinite(normalise(scaled)).all()

    def test_all_zero(self) -> None:
        assert not normalise(np.zeros((2, 3, 4, 2), np.int16)).any()

    def test_large_mean_small_deviation(self) -> None:
        image = 1e6 + np.random.default_rng(0).integers(0, 3, (8, 8, 8, 1)).astype(np.float32)
        assert normalise(image).std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
