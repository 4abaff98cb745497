"""Reading and writing one NIfTI file."""

import contextlib
import gzip
import os
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from volumes import head, oblique, orientations, tumour, write

from tinyunet.common import files
from tinyunet.common.errors import DataError
from tinyunet.data import nifti
from tinyunet.data.geometry import Geometry
from tinyunet.data.labels import read_labels, save_labels
from tinyunet.data.nifti import check_length, read_header, read_volume

VALUES = (0, 1, 2, 3)


def file_bytes(voxels: NDArray[Any]) -> bytes:
    content: bytes = nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()
    return content


def changed(content: bytes, field: str, value: object) -> bytes:
    """Return a file of version 1 with another number in its header."""
    header = nibabel.Nifti1Header(content[:348], check=False)
    header[field] = value
    changed: bytes = header.binaryblock + content[348:]
    return changed


def refused(path: Path, *words: str, values: tuple[int, ...] | None = None) -> str:
    """Read a bad file; return the message after checking that it is one line and says enough."""
    with pytest.raises(DataError) as caught:
        _ = read_volume(path) if values is None else read_labels(path, values)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message
    return message


class TestOrientation:
    """To the common frame and back, for every way to store a volume."""

    @pytest.mark.parametrize("affine", list(orientations()))
    def test_world_position_of_each_voxel_is_kept(self, affine: NDArray[np.float64], tmp_path: Path) -> None:
        shape = (3, 4, 5)
        stored = np.arange(60, dtype=np.int16).reshape(shape)
        voxels, geometry = read_volume(write(tmp_path / "a.nii", stored, affine))

        assert np.allclose(geometry.canonical_affine[:3, :3], np.diag([1, 1.5, 2]))
        assert voxels.shape == geometry.canonical_shape
        assert np.allclose(geometry.spacing, [1, 1.5, 2])
        for value in (0, 7, 59):
            there = np.append(np.argwhere(stored == value)[0], 1)
            here = np.append(np.argwhere(voxels == value)[0], 1)
            assert np.allclose(affine @ there, geometry.canonical_affine @ here)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_the_header_alone_tells_the_size(self, suffix: str, tmp_path: Path) -> None:
        for number, affine in enumerate(orientations()):
            stored = head((6, 7, 5))
            path = write(tmp_path / f"{number}{suffix}", stored, affine)
            assert read_header(path)[0] == read_volume(path)[0].shape

    @pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_however_long_the_header_is(self, kind: Any, suffix: str, tmp_path: Path) -> None:
        """AFNI writes its history into an extension."""
        image = kind(head((6, 7, 5)), np.eye(4))
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("afni", b"x" * 20_000))
        path = tmp_path / f"a{suffix}"
        nibabel.save(image, path)
        assert read_header(path)[0] == read_volume(path)[0].shape

    @pytest.mark.parametrize("degrees", [0, 20, 40])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_saved_labels_lie_over_the_input(self, degrees: float, suffix: str, tmp_path: Path) -> None:
        for affine in orientations():
            turned = oblique(affine, degrees)
            stored = tumour((3, 4, 5))
            source = write(tmp_path / f"in{suffix}", stored, turned)
            labels, geometry = read_labels(source, VALUES)
            save_labels(tmp_path / f"out{suffix}", labels, geometry)

            back, original = nibabel.load(tmp_path / f"out{suffix}"), nibabel.load(source)
            assert np.array_equal(back.affine, original.affine)
            assert np.array_equal(np.asarray(back.dataobj), stored)
            assert back.get_data_dtype() == np.uint8
            assert np.array_equal(back.header.get_qform(), original.header.get_qform())
            assert back.header.get_zooms() == original.header.get_zooms()

    @given(axes=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
    def test_back_undoes_there(self, axes: list[int], signs: tuple[int, ...]) -> None:
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[axes] * np.array(signs)
        geometry = Geometry(affine, (2, 3, 4), None)
        voxels = np.arange(48).reshape(2, 3, 4, 2)
        there = geometry.to_canonical(voxels)
        assert there.shape[:3] == geometry.canonical_shape
        assert np.array_equal(geometry.from_canonical(there), voxels)

    def test_only_a_qform(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(tumour(), None)
        image.set_qform(oblique(np.diag([-2.0, 2, 3, 1])), code=1)
        nibabel.save(image, tmp_path / "in.nii.gz")
        labels, geometry = read_labels(tmp_path / "in.nii.gz", VALUES)
        save_labels(tmp_path / "out.nii.gz", labels, geometry)
        back, original = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("out", "in"))
        assert np.array_equal(back.affine, original.affine)
        assert back.header["sform_code"] == 0

    def test_nifti_2_stays_nifti_2(self, tmp_path: Path) -> None:
        affine = oblique(np.eye(4), 33.3)
        nibabel.save(nibabel.Nifti2Image(tumour(), affine), tmp_path / "in.nii.gz")
        labels, geometry = read_labels(tmp_path / "in.nii.gz", VALUES)
        save_labels(tmp_path / "out.nii.gz", labels, geometry)
        back = nibabel.load(tmp_path / "out.nii.gz")
        assert isinstance(back, nibabel.Nifti2Image)
        assert np.array_equal(back.affine, affine)  # float64: exact only in version 2

    def test_distance_is_in_voxels(self) -> None:
        one = Geometry(np.diag([2.0, 2, 2, 1]), (4, 4, 4), None)
        moved = Geometry(np.diag([2.0, 2, 2, 1]), (4, 4, 4), None)
        moved.affine[0, 3] = 3
        flipped = Geometry(np.diag([-2.0, 2, 2, 1]), (4, 4, 4), None)
        flipped.affine[0, 3] = 6  # the same voxels, stored from right to left
        assert one.distance(one) == 0
        assert one.distance(moved) == 1.5
        assert one.distance(flipped) == 0

    def test_distance_along_the_long_side_of_a_voxel(self) -> None:
        thick = Geometry(np.diag([0.4, 0.4, 5, 1]), (4, 4, 4), None)
        moved = Geometry(thick.affine.copy(), (4, 4, 4), None)
        moved.affine[2, 3] = 0.25
        assert thick.distance(moved) == pytest.approx(0.05)


class TestRead:
    """Values come out as the file means them."""

    def test_values_and_type(self, tmp_path: Path) -> None:
        image = head()
        voxels, geometry = read_volume(write(tmp_path / "a.nii.gz", image))
        assert np.array_equal(voxels, image)
        assert voxels.dtype == np.int16
        assert geometry.shape == image.shape[:3]

    def test_scaling_is_applied(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.eye(4))
        image.header.set_slope_inter(0.5, -1)
        (tmp_path / "a.nii").write_bytes(image.to_bytes())
        voxels, _ = read_volume(tmp_path / "a.nii")
        assert voxels.dtype == np.float64
        assert np.array_equal(voxels.ravel(), np.arange(8) * 0.5 - 1)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16])
    def test_background_stays_zero_when_it_is_scaled(self, dtype: type, tmp_path: Path) -> None:
        voxels = np.random.default_rng(0).uniform(-1.3, 3.1, (6, 7, 5)).astype(np.float32)
        voxels[:2] = 0
        image = nibabel.Nifti1Image(voxels, np.eye(4))
        image.set_data_dtype(dtype)
        nibabel.save(image, tmp_path / "a.nii")
        assert np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)[:2].any()  # stored, it is not
        found, _ = read_volume(tmp_path / "a.nii")
        assert not found[:2].any()
        np.testing.assert_allclose(found, voxels, atol=4.4 / np.iinfo(dtype).max)

    def test_a_compressed_file_of_several_parts(self, tmp_path: Path) -> None:
        content = file_bytes(head())
        parts = gzip.compress(b"") + gzip.compress(content[:100]) + gzip.compress(content[100:])
        (tmp_path / "a.nii.gz").write_bytes(parts)
        check_length(tmp_path / "a.nii.gz")
        assert np.array_equal(read_volume(tmp_path / "a.nii.gz")[0], head())
        assert read_header(tmp_path / "a.nii.gz")[0] == head().shape

    @pytest.mark.parametrize("kept", [slice(-100), slice(-1), slice(0, 400)])
    @pytest.mark.parametrize("pack", [gzip.compress, bytes])
    def test_a_cut_shows_in_the_length(
        self, kept: slice, pack: Callable[[bytes], bytes], tmp_path: Path
    ) -> None:
        content = pack(file_bytes(np.random.default_rng(0).random((6, 7, 5))))
        path = tmp_path / "a.nii.gz"
        path.write_bytes(content)
        check_length(path)
        path.write_bytes(content[kept])
        with pytest.raises(DataError, match=r"bytes; expected 2032, as its header says \(was it cut\?\)"):
            check_length(path)

    def test_name_does_not_decide_on_compression(self, tmp_path: Path) -> None:
        content = file_bytes(head())
        (tmp_path / "plain.nii.gz").write_bytes(content)
        (tmp_path / "packed.nii").write_bytes(gzip.compress(content))
        assert np.array_equal(read_volume(tmp_path / "plain.nii.gz")[0], head())
        assert np.array_equal(read_volume(tmp_path / "packed.nii")[0], head())

    def test_trailing_axes_of_one_are_dropped(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.nii", head()[..., :1, None])
        assert read_volume(path)[0].shape == (6, 7, 5)

    def test_vectors_have_a_time_axis_before_theirs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.nii", head()[..., None, :])
        assert np.array_equal(read_volume(path)[0], head())

    def test_big_endian(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(head(), np.eye(4), nibabel.Nifti1Header(endianness=">"))
        nibabel.save(image, tmp_path / "a.nii")
        assert np.array_equal(read_volume(tmp_path / "a.nii")[0], head())


class TestRefuse:
    """Each kind of damage gives one line that names the file."""

    def test_missing(self, tmp_path: Path) -> None:
        refused(tmp_path / "a.nii.gz", "no such file")

    def test_folder(self, tmp_path: Path) -> None:
        refused(tmp_path, "is a folder")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.nii").touch()
        refused(tmp_path / "a.nii", "empty")

    @pytest.mark.parametrize("content", [b"hello", b"\x89PNG" * 200, bytes(1000), b"\x1f\x8b"])
    def test_not_nifti(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.nii.gz").write_bytes(content)
        refused(tmp_path / "a.nii.gz", "expected a")

    def test_every_cut_of_a_compressed_file(self, tmp_path: Path) -> None:
        content = gzip.compress(file_bytes(tumour((3, 2, 2))))
        for length in range(len(content)):
            (tmp_path / "a.nii.gz").write_bytes(content[:length])
            refused(tmp_path / "a.nii.gz", "expected a")
        (tmp_path / "a.nii.gz").write_bytes(content)
        read_volume(tmp_path / "a.nii.gz")

    def test_every_cut_of_a_plain_file(self, tmp_path: Path) -> None:
        content = file_bytes(tumour((3, 2, 2)))
        for length in range(len(content)):
            (tmp_path / "a.nii").write_bytes(content[:length])
            refused(tmp_path / "a.nii")
        assert "truncated" in refused(tmp_path / "a.nii", "11 of 12 bytes")

    def test_voxels_inside_the_header(self, tmp_path: Path) -> None:
        content = bytearray(file_bytes(tumour((3, 2, 2))))
        for offset in (0.0, 100.0, 1e9):
            content[108:112] = struct.pack("<f", offset)
            (tmp_path / "a.nii").write_bytes(content)
            found = refused(tmp_path / "a.nii")
            assert "-" not in found.partition("a.nii: ")[2]

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("left", [1, 16, 1000])
    def test_bytes_behind_the_voxels(self, suffix: str, left: int, tmp_path: Path) -> None:
        content = file_bytes(tumour((3, 2, 2))) + bytes(left)
        packed = gzip.compress(content) if suffix == ".nii.gz" else content
        (tmp_path / f"a{suffix}").write_bytes(packed)
        refused(tmp_path / f"a{suffix}", f"{left} bytes behind the 12 of its voxels")
        assert read_header(tmp_path / f"a{suffix}")[0] == (3, 2, 2)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_a_header_that_tells_another_size_or_type(self, suffix: str, tmp_path: Path) -> None:
        """A byte less an axis, int16 read as uint8: else the voxels were garbled without a word."""
        fields = {"dim": (3, 5, 7, 5, 1, 1, 1, 1), "datatype": 2, "vox_offset": 400}
        for field, value in fields.items():
            content = changed(file_bytes(head()[..., 0]), field, value)
            packed = gzip.compress(content) if suffix == ".nii.gz" else content
            (tmp_path / f"a{suffix}").write_bytes(packed)
            refused(tmp_path / f"a{suffix}", "truncated" if field == "vox_offset" else " bytes behind")

    def test_padding_behind_gzip_is_none_of_the_file(self, tmp_path: Path) -> None:
        packed = gzip.compress(file_bytes(head()))
        (tmp_path / "a.nii.gz").write_bytes(packed + bytes(1000))
        assert np.array_equal(read_volume(tmp_path / "a.nii.gz")[0], head())
        (tmp_path / "a.nii.gz").write_bytes(packed + b"garbage")
        refused(tmp_path / "a.nii.gz", "truncated or damaged")

    @pytest.mark.parametrize("what", ["zeros", "no magic", "far offset", "promise", "padding"])
    def test_a_small_file_takes_little_memory(self, what: str, tmp_path: Path) -> None:
        """256 MB of zeros in 250 KB; what the header promises is 840 bytes, or more than there is."""
        content = file_bytes(head())
        if what == "promise":
            content = changed(content, "dim", (4, 30000, 30000, 30000, 4, 1, 1, 1))
        if what == "no magic":
            content = changed(content, "magic", b"")
        if what == "far offset":
            content = changed(content, "vox_offset", 2.0**40)
        zeros = bytes(2**22)
        packed = gzip.compress(content) + (zeros if what == "padding" else gzip.compress(zeros, 1) * 64)
        (tmp_path / "a.nii.gz").write_bytes(packed)
        tracemalloc.start()
        try:
            refused(tmp_path / "a.nii.gz")
            assert tracemalloc.get_traced_memory()[1] < 16e6
        finally:
            tracemalloc.stop()

    def test_memory_that_runs_out_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.nii.gz", head())

        def too_large(*_: object) -> None:
            raise MemoryError("Unable to allocate 6 GiB")

        monkeypatch.setattr(nifti.np, "isfinite", too_large)
        refused(path, "not enough memory (Unable to allocate 6 GiB)")

    def test_what_never_ends(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.nii.gz")
        (tmp_path / "link.nii").symlink_to("/dev/zero")
        for name in ("pipe.nii.gz", "link.nii"):
            refused(tmp_path / name, "not a regular file")
            with pytest.raises(DataError, match="not a regular file"):
                read_header(tmp_path / name)

    @given(where=st.integers(0, 351), byte=st.integers(0, 255))
    def test_any_damage_to_the_header_is_a_data_error(
        self, where: int, byte: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        content = bytearray(file_bytes(tumour((3, 2, 2))))
        content[where] = byte
        path = tmp_path_factory.mktemp("damaged") / "a.nii"
        path.write_bytes(content)
        with contextlib.suppress(DataError):  # anything else fails the test
            assert np.isfinite(read_volume(path)[0]).all()

    def test_nibabel_prints_nothing_of_its_own(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        content = bytearray(file_bytes(tumour((3, 2, 2))))
        content[76:80] = np.float32(7).tobytes()  # pixdim[0], which is to be 1 or -1
        (tmp_path / "a.nii").write_bytes(content)
        read_volume(tmp_path / "a.nii")
        assert capfd.readouterr().err == ""
        assert not nifti.nibabel_logger.disabled

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float, tmp_path: Path) -> None:
        image = head().astype(np.float32)
        image[1, 2, 3, 0] = value
        refused(write(tmp_path / "a.nii", image), "1 voxels are NaN or infinite")

    def test_singular_affine(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(tumour(), None)
        image.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
        nibabel.save(image, tmp_path / "a.nii")
        refused(tmp_path / "a.nii", "singular")

    @given(seed=st.integers(0, 1000), side=st.floats(0.02, 50))
    def test_any_singular_affine(
        self, seed: int, side: float, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Axes in one plane, in single precision, as if they were a scanner's."""
        generator = np.random.default_rng(seed)
        affine = np.eye(4)
        affine[:3, :3] = generator.standard_normal((3, 2)) @ generator.standard_normal((2, 3))
        affine[:3, :3] *= side / np.linalg.norm(affine[:3, :3], axis=0)
        image = nibabel.Nifti1Image(tumour(), None)
        image.set_sform(affine, code=1)
        path = tmp_path_factory.mktemp("singular") / "a.nii"
        nibabel.save(image, path)
        refused(path, "singular")
        with pytest.raises(DataError, match="singular"):
            read_header(path)[0]

    @pytest.mark.parametrize("side", [1e-45, 1e-20, 0.009, 101.0, 1e10, 3e38])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_voxels_of_no_size_that_a_scanner_has(self, side: float, axis: int, tmp_path: Path) -> None:
        affine = np.eye(4)
        affine[axis, axis] = side
        image = nibabel.Nifti1Image(tumour(), None)
        image.set_sform(affine, code=1)
        nibabel.save(image, tmp_path / "a.nii")
        refused(tmp_path / "a.nii", "expected sides of 0.01 to 100 mm")
        refused(tmp_path / "a.nii", "expected sides of 0.01 to 100 mm", values=VALUES)

    @pytest.mark.parametrize("side", [0.01, 0.05, 10, 100])
    def test_voxels_that_a_scanner_has(self, side: float, tmp_path: Path) -> None:
        _, geometry = read_volume(write(tmp_path / "a.nii", head(), np.diag([side, 1, 1, 1])))
        assert geometry.spacing == pytest.approx((side, 1, 1))

    @pytest.mark.parametrize(("unit", "side"), [("mm", 2), ("micron", 2000), ("meter", 0.002)])
    def test_units_of_length(self, unit: str, side: float, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(tumour(), np.diag([side, side, side, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        labels, geometry = read_labels(tmp_path / "a.nii", VALUES)
        assert geometry.spacing == pytest.approx((2, 2, 2))
        assert geometry.millilitres == pytest.approx(0.008)
        save_labels(tmp_path / "b.nii", labels, geometry)
        back = nibabel.load(tmp_path / "b.nii")
        assert np.array_equal(back.affine, nibabel.load(tmp_path / "a.nii").affine)
        assert back.header.get_xyzt_units()[0] == unit

    def test_a_tilted_voxel_holds_less(self, tmp_path: Path) -> None:
        affine = np.eye(4)
        affine[:2, 2] = np.sin(np.radians(30)), 0
        affine[2, 2] = np.cos(np.radians(30))
        _, geometry = read_volume(write(tmp_path / "a.nii", head(), affine))
        assert geometry.spacing == pytest.approx((1, 1, 1))
        assert geometry.millilitres == pytest.approx(np.sqrt(0.75) / 1000)

    def test_a_volume_that_lies_nowhere_near(self, tmp_path: Path) -> None:
        affine = np.eye(4)
        affine[0, 3] = 1e30
        refused(write(tmp_path / "a.nii", head(), affine), "from the origin")

    @pytest.mark.parametrize("place", [np.nan, np.inf])
    def test_an_affine_that_leads_nowhere(self, place: float, tmp_path: Path) -> None:
        affine = np.eye(4)
        affine[0, 3] = place
        image = nibabel.Nifti1Image(tumour(), None)
        image.set_sform(affine, code=1)
        nibabel.save(image, tmp_path / "a.nii")
        refused(tmp_path / "a.nii", "NaN or infinity")

    @pytest.mark.parametrize("shape", [(4,), (4, 4), (2, 2, 2, 2, 2)])
    def test_no_volume(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        refused(write(tmp_path / "a.nii", np.ones(shape, np.int16)), "expected a volume")

    def test_complex(self, tmp_path: Path) -> None:
        refused(write(tmp_path / "a.nii", np.ones((2, 2, 2), np.complex64)), "complex64")


class TestLabels:
    """Numbers in a file become classes."""

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
    def test_any_number_type(self, dtype: type, tmp_path: Path) -> None:
        labels, _ = read_labels(write(tmp_path / "a.nii", tumour().astype(dtype)), VALUES)
        assert labels.dtype == np.uint8
        assert labels.flags.c_contiguous
        assert np.array_equal(labels, tumour())

    def test_scaled_integers_are_fine(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(np.array([[[0.0, 2, 1, 4]]]), np.eye(4))
        image.header.set_data_dtype(np.uint8)  # nibabel then chooses a slope of 4 / 255
        nibabel.save(image, tmp_path / "a.nii")
        assert np.abs(read_volume(tmp_path / "a.nii")[0] - [0, 2, 1, 4]).max() > 1e-3
        labels, _ = read_labels(tmp_path / "a.nii", (0, 2, 1, 4))
        assert labels.ravel().tolist() == [0, 1, 2, 3]

    def test_values_are_mapped_there_and_back(self, tmp_path: Path) -> None:
        values = (0, 2, 1, 4)
        stored = np.array(values, np.int16)[tumour()]
        path = write(tmp_path / "in.nii", stored)
        labels, geometry = read_labels(path, values)
        assert np.array_equal(labels, tumour())
        save_labels(tmp_path / "out.nii", labels, geometry, values)
        assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out.nii").dataobj), stored)

    @pytest.mark.parametrize("stranger", [4, 7, -1, 300])
    def test_outside_the_set(self, stranger: int, tmp_path: Path) -> None:
        labels = tumour().astype(np.int16)
        labels[1, 1, 1] = stranger
        path = write(tmp_path / "a.nii", labels)
        refused(path, f"holds label {stranger};", "expected labels 0, 1, 2, 3", values=VALUES)

    @pytest.mark.parametrize("value", [0.5, 1.02, 2.98])
    def test_no_integer(self, value: float, tmp_path: Path) -> None:
        labels = tumour().astype(np.float32)
        labels[1, 1, 1] = value
        refused(write(tmp_path / "a.nii", labels), f"{value}", "not an integer", values=VALUES)

    def test_image_in_place_of_labels(self, tmp_path: Path) -> None:
        refused(write(tmp_path / "a.nii", head()), "4 label volumes", values=VALUES)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing fail in the middle of a file, as on a full disk, through the system's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestSave:
    """A file appears whole or not at all."""

    @pytest.fixture
    def geometry(self, tmp_path: Path) -> Geometry:
        return read_volume(write(tmp_path / "in.nii", tumour()))[1]

    def test_makes_folders_and_leaves_nothing_else(self, geometry: Geometry, tmp_path: Path) -> None:
        save_labels(tmp_path / "a" / "b" / "out.nii.gz", tumour(), geometry)
        assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["out.nii.gz"]

    def test_equal_labels_give_equal_files(self, geometry: Geometry, tmp_path: Path) -> None:
        for name in ("one", "two"):
            save_labels(tmp_path / f"{name}.nii.gz", tumour(), geometry)
        assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()

    def test_full_disk_keeps_the_old_file(self, geometry: Geometry, tmp_path: Path) -> None:
        out = tmp_path / "out" / "out.nii"
        save_labels(out, tumour(), geometry)
        before = out.read_bytes()
        with (
            largest_file(400),
            pytest.raises(DataError, match=r"out\.nii: cannot be written \(File too large\)"),
        ):
            save_labels(out, tumour(seed=1), geometry)
        assert out.read_bytes() == before
        assert list(out.parent.iterdir()) == [out]

    def test_no_space_left(self, geometry: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(DataError, match="No space left on device"):
            save_labels(tmp_path / "out" / "out.nii", tumour(), geometry)
        assert list((tmp_path / "out").iterdir()) == []

    def test_interrupt_leaves_nothing(
        self, geometry: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(files.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_labels(tmp_path / "out" / "out.nii", tumour(), geometry)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_file_where_a_folder_should_be(self, geometry: Geometry, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be written"):
            save_labels(tmp_path / "in.nii" / "out.nii", tumour(), geometry)

    def test_wrong_arguments(self, geometry: Geometry, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^labels: shape \(2, 2, 2\); expected"):
            save_labels(tmp_path / "a.nii", np.zeros((2, 2, 2), np.uint8), geometry)
        with pytest.raises(ValueError, match=r"^labels: 0 to 3; expected 0 to 1"):
            save_labels(tmp_path / "a.nii", tumour(), geometry, label_values=(0, 4))
        with pytest.raises(ValueError, match=r"^labels: -1 to"):
            save_labels(tmp_path / "a.nii", tumour().astype(np.int8) - 1, geometry)
        for bad in ([0, 999, -5, 3], [0, 256], [0, 1, 1, 2], [0, 1.5], [1, 2], [0, "1"], [], [True]):
            with pytest.raises(ValueError, match=r"^label_values: [^\n]*expected"):
                save_labels(tmp_path / "a.nii", tumour(classes=2), geometry, label_values=bad)
        assert not (tmp_path / "a.nii").exists()
        with pytest.raises(ValueError, match=r"^path: .*expected \*\.nii or \*\.nii\.gz"):
            save_labels(tmp_path / "a.png", tumour(), geometry)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair, nibabel.AnalyzeImage])
@pytest.mark.parametrize("suffix", [".hdr", ".img", ".HDR"])
def test_a_pair_of_files_is_named_as_such(kind: Any, suffix: str, tmp_path: Path) -> None:
    nibabel.save(kind(tumour().astype(np.int16), np.eye(4)), tmp_path / "a.img")
    path = tmp_path / f"a{suffix}"
    if not path.exists():
        (tmp_path / "a.hdr").rename(path)
    with pytest.raises(DataError, match=r"one of a pair of files \(\.hdr, \.img\).*nib-convert"):
        read_volume(path)
