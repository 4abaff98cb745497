"""The built-in data set: what its heads look like to a program, and how it is written."""

import json
import resource
import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.common.errors import DataError
from tinyunet.data.cases import load_case
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.phantom import dataset as module
from tinyunet.data.phantom import folder_name, make_case, make_dataset

SMALL = (18, 20, 16)
Case = tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]


@pytest.fixture(scope="module")
def heads() -> list[Case]:
    return [make_case(0, index) for index in range(6)]


class TestHeads:
    """A head is a brain with a tumour in it, seen by four sequences."""

    def test_arrays(self, heads: list[Case]) -> None:
        for image, labels, affine in heads:
            assert (image.shape, image.dtype) == ((64, 72, 56, 4), np.int16)
            assert (labels.shape, labels.dtype) == ((64, 72, 56), np.uint8)
            assert np.allclose(affine[:3, :3], 2.75 * np.eye(3))
            assert np.allclose(affine @ [31.5, 35.5, 27.5, 1], [0, 0, 0, 1])

    def test_brain_of_human_size_on_a_background_of_zero(self, heads: list[Case]) -> None:
        for image, labels, _ in heads:
            brain = image.any(axis=-1)
            assert np.array_equal(brain, image.all(axis=-1))  # one mask for all sequences
            assert image.min() == 0
            assert brain[labels > 0].all()
            litres = np.count_nonzero(brain) * 2.75**3 / 1e6
            assert 0.9 < litres < 1.7
            # Nothing is cut but the stem.
            for face in (brain[0], brain[-1], brain[:, 0], brain[:, -1], brain[..., -1]):
                assert not face.any()

    def test_enough_of_every_class(self, heads: list[Case]) -> None:
        counts = np.array([np.bincount(labels.ravel(), minlength=4) for _, labels, _ in heads])
        assert counts.shape[1] == 4
        assert counts[:, 1:].sum(axis=1).min() > 200
        assert counts.sum(axis=0).min() > 1000

    def test_contrasts_tell_the_parts_of_a_tumour(self, heads: list[Case]) -> None:
        ratios: dict[int, list[np.ndarray]] = {1: [], 2: [], 3: []}
        for image, labels, _ in heads:
            healthy = np.median(image[image.any(axis=-1) & (labels == 0)], axis=0)
            for part, found in ratios.items():
                if np.count_nonzero(labels == part) > 20:
                    found.append(np.median(image[labels == part], axis=0) / healthy)
        edema, core, rim = (np.array(ratios[part]) for part in (1, 2, 3))
        flair, t1w, t1gd, t2w = range(4)
        assert edema[:, flair].min() > 1.15  # in each head
        assert rim[:, t1gd].min() > 1.15
        assert rim[:, t1gd].mean() > 1.4 * max(edema[:, t1gd].mean(), core[:, t1gd].mean())  # in most
        assert core[:, t1w].mean() < 0.9
        assert min(edema[:, t2w].mean(), core[:, t2w].mean()) > 1.15

    def test_edema_spares_grey_matter(self, heads: list[Case]) -> None:
        # A millimetre or two below the surface there is cortex, and less edema.
        shares = []
        for image, labels, _ in heads:
            brain = image.any(axis=-1)
            deep = ndimage.binary_erosion(brain)
            shares.append(np.mean(labels[brain & ~deep] == 1) / np.mean(labels[deep] == 1))
        assert np.mean(shares) < 0.6

    def test_heads_differ_in_side_and_size(self, heads: list[Case]) -> None:
        middles = np.array([np.argwhere(labels > 1).mean(axis=0) for _, labels, _ in heads])
        sizes = np.array([np.count_nonzero(labels) for _, labels, _ in heads])
        assert middles[:, 0].min() < 30 < 34 < middles[:, 0].max()
        assert np.all(middles.std(axis=0) > 2)
        assert sizes.std() > 0.1 * sizes.mean()

    def test_seed_and_index_decide(self) -> None:
        one, same, other_index, other_seed = (
            make_case(*numbers, SMALL) for numbers in ((1, 2), (1, 2), (1, 3), (2, 2))
        )
        assert np.array_equal(one[0], same[0])
        assert np.array_equal(one[1], same[1])
        assert not np.array_equal(one[0], other_index[0])
        assert not np.array_equal(one[0], other_seed[0])

    @pytest.mark.parametrize("shape", [(16, 16, 16), (21, 17, 33), (80, 40, 24)])
    def test_other_shapes(self, shape: tuple[int, int, int]) -> None:
        image, labels, affine = make_case(0, 0, shape)
        assert image.shape == (*shape, 4)
        assert labels.any()
        litres = np.count_nonzero(image.any(axis=-1)) * affine[0, 0] ** 3 / 1e6
        assert 0.8 < litres < 2.5

    def test_too_small(self) -> None:
        with pytest.raises(ValueError, match=r"^shape: \(64, 15, 64\); expected 16 voxels or more"):
            make_case(0, 0, (64, 15, 64))


class TestDataset:
    """A folder is complete or not there, and is made once."""

    def test_goes_through_real_files(self, tmp_path: Path) -> None:
        path = make_dataset(tmp_path / "deep" / "phantom", cases=3, shape=SMALL, seed=5)
        dataset = read_dataset(path)
        assert dataset.modalities == ("FLAIR", "T1w", "t1gd", "T2w")
        assert dataset.labels[1] == "edema"
        assert [case.name for case in dataset.cases] == [f"PHANTOM_{i:03}" for i in range(3)]
        for index, case in enumerate(dataset.cases):
            image, labels, affine = make_case(5, index, SMALL)
            stored = nibabel.load(case.image_paths[0])
            assert nibabel.aff2axcodes(stored.affine) == ("L", "P", "S")
            assert np.array_equal(nibabel.as_closest_canonical(stored).dataobj, image)
            loaded, loaded_labels, geometry = load_case(case)
            assert np.array_equal(loaded.any(axis=-1), image.any(axis=-1))
            assert np.array_equal(loaded_labels, labels)
            assert np.allclose(geometry.canonical_affine, affine, atol=1e-4)
        assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["phantom"]
        assert path.stat().st_mode & 0o777 == 0o755

    def test_is_found_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = make_dataset(tmp_path / "phantom", cases=1, shape=SMALL)
        monkeypatch.setattr(module, "make_case", None)  # cannot be called
        assert make_dataset(tmp_path / "phantom", cases=1, shape=SMALL) == first

    def test_files_repeat(self, tmp_path: Path) -> None:
        contents = []
        for name in ("one", "two"):
            folder = make_dataset(tmp_path / name, cases=1, shape=SMALL)
            contents.append({str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.*")})
        assert contents[0] == contents[1]
        assert len(contents[0]) == 3

    def test_empty_folder_is_filled(self, tmp_path: Path) -> None:
        assert len(read_dataset(make_dataset(tmp_path, cases=1, shape=SMALL)).cases) == 1

    def test_other_parameters_are_refused(self, tmp_path: Path) -> None:
        make_dataset(tmp_path / "phantom", cases=1, shape=SMALL, seed=0)
        with pytest.raises(DataError, match=r"phantom: holds a phantom data set of .*'seed': 0") as e:
            make_dataset(tmp_path / "phantom", cases=1, shape=SMALL, seed=1)
        assert "\n" not in str(e.value)
        assert folder_name(1, SMALL, 0) != folder_name(1, SMALL, 1) != folder_name(2, SMALL, 1)

    @pytest.mark.parametrize("content", ["", "{}", '{"phantom": 1}', '{"phantom": 1, "training": 2}'])
    def test_a_folder_of_something_else_is_left_alone(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DataError, match="is there, but is no phantom data set"):
            make_dataset(tmp_path, cases=1, shape=SMALL)
        assert (tmp_path / "dataset.json").read_text() == content

    def test_a_file_of_that_name(self, tmp_path: Path) -> None:
        (tmp_path / "phantom").write_text("mine")
        with pytest.raises(DataError, match="is there, but is no phantom data set"):
            make_dataset(tmp_path / "phantom", cases=1, shape=SMALL)

    def test_missing_file_is_noticed(self, tmp_path: Path) -> None:
        path = make_dataset(tmp_path / "phantom", cases=1, shape=SMALL)
        (path / "labelsTr" / "PHANTOM_000.nii.gz").unlink()
        with pytest.raises(DataError, match=r"PHANTOM_000\.nii\.gz: is missing; remove .*phantom to"):
            make_dataset(path, cases=1, shape=SMALL)

    def test_full_disk_leaves_nothing(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(DataError, match=r"phantom: cannot be written \(File too large\)"):
                make_dataset(tmp_path / "phantom", cases=1, shape=SMALL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []

    def test_interrupt_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "make_case", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(tmp_path / "phantom", cases=2, shape=SMALL)
        assert list(tmp_path.iterdir()) == []

    def test_two_programs_at_once(self, tmp_path: Path) -> None:
        made: list[Path] = []
        together = threading.Barrier(3)

        def make() -> None:
            together.wait()
            made.append(make_dataset(tmp_path / "phantom", cases=2, shape=SMALL))

        threads = [threading.Thread(target=make) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == [tmp_path / "phantom"] * 3
        assert [entry.name for entry in tmp_path.iterdir()] == ["phantom"]
        assert len(read_dataset(tmp_path / "phantom").cases) == 2

    def test_no_cases(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^cases: 0; expected 1 or more"):
            make_dataset(tmp_path / "phantom", cases=0)

    def test_description_says_what_it_is_made_of(self, tmp_path: Path) -> None:
        path = make_dataset(tmp_path / "phantom", cases=1, shape=SMALL, seed=3)
        description = json.loads((path / "dataset.json").read_text())
        assert description["phantom"]["seed"] == 3
        assert description["numTraining"] == len(description["training"]) == 1
