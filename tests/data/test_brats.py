"""Finding the cases of a BraTS folder as released."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from volumes import head, tumour, write

from tinyunet.common.errors import DataError, UserError
from tinyunet.data.brain import normalise
from tinyunet.data.brats import case_files, find_cases, numbers_for, read_brats
from tinyunet.data.cases import load_case
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.images import find_images
from tinyunet.data.sequences import kind_of

SEQUENCES = ("flair", "t1", "t1ce", "t2")
NEW = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
TUMOUR = ("background", "edema", "non-enhancing tumor", "enhancing tumour")


def write_case(
    folder: Path,
    suffix: str = ".nii.gz",
    rename: Callable[[str], str] = str,
    kinds: tuple[str, ...] = (*SEQUENCES, "seg"),
) -> Path:
    """Write a case as BraTS does; its labels are 1 non-enhancing, 2 edema, 4 enhancing."""
    for kind in kinds:
        if kind == "seg":
            voxels = np.array([0, 2, 1, 4], np.int16)[tumour()]
        else:
            voxels = head()[..., SEQUENCES.index(kind)]
        write(folder / f"{folder.name}_{rename(kind)}{suffix}", voxels)
    return folder


def write_new_case(folder: Path, numbers: Sequence[int] = (0, 2, 1, 3)) -> Path:
    """Write a case as BraTS does from 2023 on; ``numbers`` stand for 0, edema, core, enhancing."""
    for index, (kind, name) in enumerate(NEW.items()):
        voxels = head()[..., index] if kind != "seg" else np.array(numbers, np.int16)[tumour()]
        write(folder / f"{folder.name}-{name}.nii.gz", voxels)
    return folder


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("rename", [str.lower, str.upper, str.capitalize])
def test_order_of_channels_and_classes(suffix: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    write_case(tmp_path / "BraTS20_Training_001", suffix, rename)
    dataset = read_dataset(tmp_path)
    assert dataset.modalities == ("FLAIR", "T1w", "t1gd", "T2w")
    assert dataset.labels[1] == "edema"
    assert dataset.label_values == (0, 2, 1, 4)
    image, labels, _ = load_case(dataset.cases[0])
    assert np.array_equal(image, normalise(head()))
    assert np.array_equal(labels, tumour())


def test_nested_folders_and_other_files(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG" / "B")
    write_case(tmp_path / "LGG" / "deep" / "A")
    write_case(tmp_path / "Validation" / "C", kinds=SEQUENCES)  # has no labels: not trained on
    (tmp_path / "HGG" / "B" / "._B_flair.nii.gz").write_bytes(b"Mac OS X")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._B_t1.nii.gz").write_bytes(b"Mac OS X")
    (tmp_path / "survival.csv").write_text("id,age\n")
    assert [case.name for case in read_dataset(tmp_path).cases] == ["A", "B"]


def test_a_linked_case(tmp_path: Path) -> None:
    write_case(tmp_path / "elsewhere" / "A")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "A").symlink_to(tmp_path / "elsewhere" / "A")
    assert len(read_dataset(tmp_path / "data").cases) == 1


def test_links_back_are_not_followed_again(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG" / "B")
    (tmp_path / "A").symlink_to(tmp_path)
    (tmp_path / "HGG" / "C").symlink_to(tmp_path / "HGG" / "B")
    (tmp_path / "HGG" / "up").symlink_to("..")
    assert [case.name for case in read_dataset(tmp_path).cases] == ["B"]


def test_the_folder_of_one_case(tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    assert [case.name for case in read_dataset(tmp_path / "A").cases] == ["A"]


def test_the_label_file_released_under_another_name(tmp_path: Path) -> None:
    write_case(tmp_path / "A", kinds=SEQUENCES)
    write(tmp_path / "A" / "W39_1998.09.19_Segm.nii", tumour(classes=3))
    assert case_files(tmp_path / "A")[1] == tmp_path / "A" / "W39_1998.09.19_Segm.nii"


def test_files_of_a_case_without_labels(tmp_path: Path) -> None:
    paths, labels = case_files(write_case(tmp_path / "A", kinds=SEQUENCES))
    assert [path.name for path in paths] == [f"A_{kind}.nii.gz" for kind in SEQUENCES]
    assert labels is None


def test_missing_sequences(tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    write_case(tmp_path / "B", kinds=("flair", "t2", "seg"))
    with pytest.raises(DataError, match=r"B: 2 sequences, no t1, t1ce; expected 4: \*_flair, "):
        read_dataset(tmp_path)


def test_only_labels(tmp_path: Path) -> None:
    write_case(tmp_path / "A", kinds=("seg",))
    with pytest.raises(DataError, match="A: 0 sequences, no flair, t1, t1ce, t2;"):
        read_dataset(tmp_path)


def test_a_sequence_twice(tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    write_case(tmp_path / "A", ".nii", kinds=("t1",))
    with pytest.raises(DataError, match=r"A: both A_t1\.nii and A_t1\.nii\.gz; expected one t1"):
        read_dataset(tmp_path)


def test_two_cases_of_one_name(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG" / "A")
    write_case(tmp_path / "LGG" / "A")
    with pytest.raises(DataError, match=r"LGG/A: a case of this name is also in .*HGG/A"):
        read_dataset(tmp_path)


def test_label_3_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    write(tmp_path / "A" / "A_seg.nii.gz", tumour())
    with pytest.raises(DataError, match=r"A_seg\.nii\.gz: holds label 3; expected labels 0, 1, 2, 4"):
        load_case(read_dataset(tmp_path).cases[0])


def test_no_such_case_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be listed"):
        case_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("modalities", "kinds"),
    [
        (("FLAIR", "T1w", "t1gd", "T2w"), SEQUENCES),
        (("t1n", "t1c", "t2w", "t2f"), ("t1", "t1ce", "t2", "flair")),
        (("T2-FLAIR", "T1_contrast"), ("flair", "t1ce")),
        (("T1 pre-contrast", "contrast-enhanced T1"), ("t1", "t1ce")),
        (("non-contrast T1", "T1 post"), ("t1", "t1ce")),
        (("CT", "ADC"), (None, None)),
    ],
)
def test_names_of_sequences(modalities: Sequence[str], kinds: Sequence[str | None]) -> None:
    assert [kind_of(name) for name in modalities] == list(kinds)


@pytest.mark.parametrize("modalities", [("CT",), ("T1w", "T1")])
def test_a_model_of_other_sequences(modalities: Sequence[str], tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    with pytest.raises(UserError, match="A: a BraTS case, but the model's sequences are "):
        find_images(tmp_path, modalities)


def test_cases_in_one_folder(tmp_path: Path) -> None:
    for name in ("B", "A"):
        for kind in (*SEQUENCES, "seg"):
            write_case(tmp_path / name, kinds=(kind,))
            file = tmp_path / name / f"{name}_{kind}.nii.gz"
            file.rename(tmp_path / file.name)
    dataset = read_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["A", "B"]
    assert dataset.cases[1].image_paths == tuple(tmp_path / f"B_{kind}.nii.gz" for kind in SEQUENCES)
    images = find_images(tmp_path, ("T2w", "FLAIR"))
    assert [(i.name, i.paths) for i in images] == [
        (name, (tmp_path / f"{name}_t2.nii.gz", tmp_path / f"{name}_flair.nii.gz")) for name in "AB"
    ]
    (tmp_path / "B_t2.nii.gz").unlink()
    with pytest.raises(DataError, match="B: 3 sequences, no t2; expected 4"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("asked", [("FLAIR",), ("t2f",), ("flair",)])
def test_one_sequence_alone(asked: Sequence[str], tmp_path: Path) -> None:
    write_case(tmp_path / "A", kinds=("flair", "t2", "seg"))  # the others need not be there
    dataset = read_dataset(tmp_path, modalities=asked)
    assert dataset.modalities == ("FLAIR",)
    assert dataset.cases[0].image_paths == (tmp_path / "A" / "A_flair.nii.gz",)
    assert load_case(dataset.cases[0])[0].shape == (6, 7, 5, 1)
    with pytest.raises(UserError, match=r"--modalities: CT is not there among the sequences of .*FLAIR, T1w"):
        read_dataset(tmp_path, modalities=("CT",))
    with pytest.raises(UserError, match="--modalities: T2 is there already"):
        read_dataset(tmp_path, modalities=("t2w", "T2"))


def test_radiotherapy_has_t1_with_contrast_alone(tmp_path: Path) -> None:
    folder = tmp_path / "BraTS-MEN-RT-0001-1"
    write(folder / f"{folder.name}_t1c.nii.gz", head()[..., 2])
    write(folder / f"{folder.name}_gtv.nii.gz", (tumour() > 0).astype(np.uint8))
    dataset = read_dataset(tmp_path)
    assert dataset.modalities == ("t1gd",)
    assert (dataset.labels, dataset.label_values) == (("background", "target volume"), (0, 1))
    assert load_case(dataset.cases[0])[0].shape == (6, 7, 5, 1)


def test_the_case_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_case(tmp_path / "A"))
    assert [case.name for case in read_dataset(".").cases] == ["A"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "A")
    write_case(tmp_path / "B")
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("B"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"B: cannot be listed \(Permission denied\)"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers", "values", "source"),
    [
        ("BraTS-GLI-00000-000", (0, 2, 1, 3), (0, 2, 1, 3), "BraTS 2023"),
        ("anything", (0, 2, 1, 3), (0, 2, 1, 3), "BraTS 2023"),
        ("BraTS-SSA-00001-000", (0, 2, 1, 3), (0, 2, 1, 3), "BraTS 2023"),
        ("BraTS-GLI-02063-100", (4, 2, 1, 3), (0, 2, 1, 3, 4), "BraTS 2024 post-treatment glioma"),
        ("BraTS-MET-00001-000", (4, 2, 1, 3), (0, 2, 1, 3, 4), "BraTS metastases"),
        ("BraTS-PED-00001-000", (3, 4, 2, 1), (0, 4, 2, 1, 3), "BraTS paediatric from 2024 on"),
    ],
)
def test_cases_from_2023_on(
    name: str, numbers: Sequence[int], values: Sequence[int], source: str, tmp_path: Path
) -> None:
    write_new_case(tmp_path / name, numbers)
    dataset = read_dataset(tmp_path)
    assert (dataset.label_values, dataset.source) == (tuple(values), source)
    image, labels, _ = load_case(dataset.cases[0])
    assert np.array_equal(image, normalise(head()))
    for kind in (1, 2, 3):  # where the number is, is the class
        assert np.array_equal(labels == kind, tumour() == kind)


@pytest.mark.parametrize(
    ("cases", "told"),
    [
        ({"BraTS-PED-00001-000": (0, 2, 1, 3)}, "brats2023 .*brats-ped"),
        ({"BraTS-MEN-00001-000": (0, 2, 1, 4)}, None),
        ({"BraTS2021_00001": (0, 2, 1, 3)}, "BraTS2021_00001-seg.nii.gz is named"),
        ({"BraTS-GLI-00001-000": (0, 2, 1, 3), "BraTS-PED-00001-000": (0, 2, 1, 4)}, None),
    ],
)
def test_what_names_and_numbers_do_not_tell_is_asked(
    cases: dict[str, Sequence[int]], told: str | None, tmp_path: Path
) -> None:
    for name, numbers in cases.items():
        write_new_case(tmp_path / name, numbers)
    with pytest.raises(UserError, match=told or "--labels"):
        [load_case(case) for case in read_dataset(tmp_path).cases]
    assert read_dataset(tmp_path, labels="brats-ped").label_values == (0, 4, 2, 1, 3)


def test_old_and_new_names_together_are_asked_about(tmp_path: Path) -> None:
    write_case(tmp_path / "A")
    write_new_case(tmp_path / "B")
    with pytest.raises(UserError, match=r"A_seg\.nii\.gz and B-seg\.nii\.gz is named: .* --labels"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("folder", "values"),
    [
        ("BraTS2021_00001", (0, 2, 1, 4)),
        ("HEAD_A", (0, 2, 1, 4)),
        ("BraTS-GLI-00001-000", (0, 2, 1, 3)),
        ("head-a", (0, 2, 1, 3)),
        ("BraTS-PED-00001-000", None),
    ],
)
def test_numbers_for_a_case_folder(folder: str, values: Sequence[int] | None, tmp_path: Path) -> None:
    is_old = "2021" in folder or "HEAD" in folder
    (write_case if is_old else write_new_case)(tmp_path / folder)
    case = find_cases(tmp_path)[folder]
    assert numbers_for(case, TUMOUR) == values
    assert numbers_for(case, ("background", "a", "b", "c")) is None


def test_hints_of_a_folder_with_other_files(tmp_path: Path) -> None:
    write(tmp_path / "a" / "T1.nii.gz", tumour())
    with pytest.raises(DataError, match=r"\*-t1n.*; found T1\.nii\.gz: rename them, or put all"):
        case_files(tmp_path / "a")
    nibabel.save(nibabel.Nifti1Pair(tumour(), np.eye(4)), tmp_path / "b.hdr")
    with pytest.raises(DataError, match=r"b\.hdr belongs to a pair of files: nib-convert"):
        case_files(tmp_path)
    with pytest.raises(DataError, match=r"neither .*\*-t2w.* and \*_seg \(or \*-seg\) .*nib-convert"):
        read_dataset(tmp_path)
    write_case(tmp_path / "c", kinds=SEQUENCES)
    with pytest.raises(DataError, match=r"in it \(but 1 case without labels\); expected"):
        read_dataset(tmp_path / "c")
    for name in ("A", "B"):
        write(tmp_path / "d" / f"{name}_t1.nii.gz", tumour())
    with pytest.raises(DataError, match=r"both A_t1.* and B_t1.*; expected one t1 file, a folder for"):
        case_files(tmp_path / "d")


@pytest.mark.parametrize("style", ["_flair _t1 _t1ce _t2", "-t2f -t1n -t1c -t2w"])
def test_a_case_may_lack_sequences_if_that_is_allowed(tmp_path, style):
    endings = style.split()
    folder = tmp_path / "BraTS-GLI-00000-000"
    for number in (0, 3):
        write(folder / f"{folder.name}{endings[number]}.nii.gz", head()[..., number])
    write(folder / f"{folder.name}{endings[0][0]}seg.nii.gz", np.zeros((6, 7, 5), np.uint8))
    with pytest.raises(DataError, match="2 sequences, no t1, t1ce"):
        read_brats(tmp_path)
    (case,) = read_brats(tmp_path, "brats2023", allow_missing=True).cases
    assert [path.name for path in case.image_paths] == [f"{folder.name}{e}.nii.gz" for e in endings]
    notes: list[str] = []
    image, _, _ = load_case(case, notes)
    assert image.any((0, 1, 2)).tolist() == [True, False, False, True]
    assert notes == [
        f"{path}: no such file; the model does without this sequence" for path in case.image_paths[1:3]
    ]
    with pytest.raises(DataError, match=r"_t1.nii.gz|-t1n.nii.gz: no such file"):
        load_case(case, allow_missing=False)
    case.image_paths[0].unlink()
    image, _, geometry = load_case(case)  # the position comes from the first that is there
    assert image.any((0, 1, 2)).tolist() == [False, False, False, True]
    assert geometry.canonical_shape == (6, 7, 5)
