"""Finding the cases of a Medical Segmentation Decathlon folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from volumes import head, tumour, write, write_decathlon

from tinyunet.common.errors import DataError, UserError
from tinyunet.data.brain import normalise
from tinyunet.data.cases import load_case
from tinyunet.data.decathlon import read_dataset
from tinyunet.segmentation.scores import dice_per_class, score


def refused(folder: Path, *words: str) -> None:
    """Read a bad folder and check that the message is one line that says enough."""
    with pytest.raises(DataError) as caught:
        read_dataset(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class TestRead:
    """What ``dataset.json`` tells is what comes out."""

    def test_description_and_cases(self, tmp_path: Path) -> None:
        dataset = read_dataset(write_decathlon(tmp_path))
        assert dataset.modalities == ("sequence 0", "sequence 1", "sequence 2", "sequence 3")
        assert dataset.labels == ("background", "edema", "core", "rim")
        assert dataset.label_values == (0, 1, 2, 3)
        assert (len(dataset.modalities), len(dataset.labels)) == (4, 4)
        assert [case.name for case in dataset.cases] == ["T_0", "T_1", "T_2"]
        image, labels, _ = load_case(dataset.cases[1])
        assert np.array_equal(image, normalise(head(seed=1)))
        assert np.array_equal(labels, tumour(seed=1))

    def test_path_as_text(self, tmp_path: Path) -> None:
        assert len(read_dataset(str(write_decathlon(tmp_path))).cases) == 3

    def test_a_byte_order_mark_before_the_description(self, tmp_path: Path) -> None:
        file = write_decathlon(tmp_path) / "dataset.json"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert len(read_dataset(tmp_path).cases) == 3

    def test_one_sequence_two_classes(self, tmp_path: Path) -> None:
        labels = {"1": "spleen", "0": "background"}
        write_decathlon(tmp_path, cases=1, channels=1, labels=labels)
        write(tmp_path / "imagesTr/T_0.nii.gz", head()[..., 0])
        write(tmp_path / "labelsTr/T_0.nii.gz", tumour(classes=2))
        dataset = read_dataset(tmp_path)
        assert (len(dataset.modalities), dataset.labels) == (1, ("background", "spleen"))
        assert load_case(dataset.cases[0])[0].shape == (6, 7, 5, 1)

    def test_more_than_ten_sequences_keep_their_order(self, tmp_path: Path) -> None:
        dataset = read_dataset(write_decathlon(tmp_path, channels=12))
        assert dataset.modalities[2] == "sequence 2"
        assert dataset.modalities[10] == "sequence 10"

    def test_labels_with_a_gap(self, tmp_path: Path) -> None:
        labels = {"0": "background", "1": "core", "2": "edema", "4": "rim"}
        write_decathlon(tmp_path, cases=1, labels=labels)
        write(tmp_path / "labelsTr/T_0.nii.gz", np.array([0, 1, 2, 4], np.uint8)[tumour()])
        dataset = read_dataset(tmp_path)
        assert dataset.label_values == (0, 1, 2, 4)
        assert np.array_equal(load_case(dataset.cases[0])[1], tumour())

    def test_names_of_archives_packed_on_a_mac_are_ignored(self, tmp_path: Path) -> None:
        write_decathlon(tmp_path)
        file = tmp_path / "dataset.json"
        description = json.loads(file.read_text())
        description["training"].insert(
            0, {"image": "./imagesTr/._T_0.nii.gz", "label": "./labelsTr/._T_0.nii.gz"}
        )
        file.write_text(json.dumps(description))
        (tmp_path / "imagesTr" / "._T_0.nii.gz").write_bytes(b"Mac OS X")
        assert len(read_dataset(tmp_path).cases) == 3

    def test_sample(self, sample: Path) -> None:
        dataset = read_dataset(sample)
        assert dataset.modalities == ("FLAIR", "T1w", "t1gd", "T2w")
        assert len(dataset.cases) == 10
        for case in dataset.cases[:2]:
            image, labels, geometry = load_case(case)
            assert image.shape == (66, 78, 63, 4)
            assert geometry.spacing == (3, 3, 3)
            assert np.unique(labels).tolist() == [0, 1, 2, 3]
            # The rim of a tumour lights up in t1gd, edema in FLAIR.
            assert image[labels == 3, 2].mean() > 1
            assert image[labels == 1, 0].mean() > 1


class TestRefuse:
    """Each problem of ``dataset.json`` gives one line."""

    def test_no_such_folder(self, tmp_path: Path) -> None:
        refused(tmp_path / "nowhere", "nowhere: no such folder")

    def test_folder_with_neither(self, tmp_path: Path) -> None:
        refused(tmp_path, tmp_path.name, "neither a dataset.json nor a labelled BraTS case")

    @pytest.mark.parametrize("content", [b"", b"{", b"modality: 4", b"\xff\xfe\x00", b"\x1f\x8b"])
    def test_not_json(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "dataset.json").write_bytes(content)
        refused(tmp_path, "dataset.json: not JSON", "expected")

    def test_not_an_object(self, tmp_path: Path) -> None:
        (tmp_path / "dataset.json").write_text("[1, 2]")
        refused(tmp_path, "dataset.json: holds no object")

    def test_dataset_json_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "dataset.json").mkdir()
        refused(tmp_path, "dataset.json: cannot be read (Is a directory)")

    @pytest.mark.parametrize("key", ["modality", "labels", "training"])
    def test_missing_keys(self, key: str, tmp_path: Path) -> None:
        refused(write_decathlon(tmp_path, **{key: None}), f'dataset.json: no "{key}"')

    @pytest.mark.parametrize(
        ("key", "entry", "words"),
        [
            ("modality", {}, 'no "modality"'),
            ("modality", ["FLAIR"], 'no "modality"'),
            ("modality", {"first": "FLAIR"}, "is no integer"),
            ("modality", {"0": "FLAIR", "2": "T1w"}, "without a gap"),
            ("labels", {"1": "edema", "2": "core"}, "numbers 1, 2; expected 0"),
            ("labels", {"0": "background"}, "numbers 0; expected 0 for the background and others"),
            ("labels", {"0": "void", "1": "core", "2": "core"}, "names void, core, core; expected"),
            ("labels", {"0": "background", "300": "edema"}, "up to 255"),
            ("labels", {"0": "background", "-1": "edema"}, "expected 0 for the background"),
            ("labels", {"background": "0"}, "is no integer"),
            ("labels", {"background": 0}, "numbers 0; expected 0 for the background and others"),
            ("training", {}, 'no "training"'),
            ("training", [], '"training" names no case'),
            ("training", ["./imagesTr/T_0.nii.gz"], "training case"),
            ("training", [{"image": "./imagesTr/T_0.nii.gz"}], "training case"),
            ("training", [{"image": "", "label": ""}], "no such file"),
        ],
    )
    def test_bad_entries(self, key: str, entry: Any, words: str, tmp_path: Path) -> None:
        refused(write_decathlon(tmp_path, **{key: entry}), words)

    @pytest.mark.parametrize("name", ["imagesTr/T_1.nii.gz", "labelsTr/T_1.nii.gz"])
    def test_entry_that_points_nowhere(self, name: str, tmp_path: Path) -> None:
        write_decathlon(tmp_path)
        (tmp_path / name).unlink()
        refused(tmp_path, f"{name}: no such file", "dataset.json names it")

    def test_case_named_twice(self, tmp_path: Path) -> None:
        entry = {"image": "imagesTr/T_0.nii.gz", "label": "labelsTr/T_0.nii.gz"}
        refused(write_decathlon(tmp_path, training=[entry, entry]), "T_0.nii.gz is named twice")


def write_nnunet(folder: Path, version: int, **changes: Any) -> Path:
    """Write a data set of two cases as nnU-Net has it, with a file for each of four sequences."""
    names = ("FLAIR", "T1w", "t1gd", "T2w")
    training = []
    for index in range(2):
        for channel in range(4):
            write(folder / f"imagesTr/C_{index}_{channel:04}.nii.gz", head(seed=index)[..., channel])
        write(folder / f"labelsTr/C_{index}.nii.gz", tumour(seed=index))
        training.append({"image": f"./imagesTr/C_{index}.nii.gz", "label": f"./labelsTr/C_{index}.nii.gz"})
    description: dict[str, Any] = {"numTraining": 2}
    if version == 1:
        description |= {"modality": dict(enumerate(names)), "training": training, "tensorImageSize": "4D"}
        description |= {"labels": {"0": "background", "1": "edema", "2": "core", "3": "rim"}}
    else:
        description |= {"channel_names": dict(enumerate(names)), "file_ending": ".nii.gz"}
        description |= {"labels": {"background": 0, "edema": 1, "core": 2, "rim": 3}}
    (folder / "dataset.json").write_text(json.dumps(description | changes))
    return folder


class TestNnUnet:
    """Both versions of nnU-Net's folders."""

    @pytest.mark.parametrize("version", [1, 2])
    def test_both_versions(self, tmp_path: Path, version: int) -> None:
        dataset = read_dataset(write_nnunet(tmp_path, version))
        assert dataset.modalities == ("FLAIR", "T1w", "t1gd", "T2w")
        assert (dataset.labels, dataset.label_values) == (
            ("background", "edema", "core", "rim"),
            (0, 1, 2, 3),
        )
        assert [case.name for case in dataset.cases] == ["C_0", "C_1"]
        image, labels, _ = load_case(dataset.cases[1])
        assert np.array_equal(image, normalise(head(seed=1)))
        assert np.array_equal(labels, tumour(seed=1))
        assert dataset.regions is None

    @pytest.mark.parametrize("version", [1, 2])
    def test_some_sequences_in_another_order(self, tmp_path: Path, version: int) -> None:
        dataset = read_dataset(write_nnunet(tmp_path, version), modalities=("t2w", "FLAIR"))
        assert dataset.modalities == ("T2w", "FLAIR")
        image, _, _ = load_case(dataset.cases[0])
        assert np.array_equal(image, normalise(head()[..., [3, 0]]))

    def test_regions(self, tmp_path: Path) -> None:
        labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": [3]}
        dataset = read_dataset(write_nnunet(tmp_path, 2, labels=labels, regions_class_order=[1, 2, 3]))
        assert dataset.labels == ("background", "label 1", "label 2", "rim")
        assert dataset.regions == {"whole": (1, 2, 3), "core": (2, 3), "rim": (3,)}
        found = score(tumour(seed=0), tumour(seed=1), dataset.labels, dataset.regions)
        expected = dice_per_class(tumour(seed=0) > 1, tumour(seed=1) > 1, 2)[1]
        assert list(found["regions"]) == ["whole", "core", "rim"]
        assert found["regions"]["core"] == expected

    def test_files_named_one_by_one(self, tmp_path: Path) -> None:
        entries = {
            f"case {index}": {
                "images": [f"imagesTr/C_{index}_{channel:04}.nii.gz" for channel in range(4)],
                "label": f"labelsTr/C_{index}.nii.gz",
            }
            for index in range(2)
        }
        dataset = read_dataset(write_nnunet(tmp_path, 2, dataset=entries))
        assert [case.name for case in dataset.cases] == ["case 0", "case 1"]
        assert np.array_equal(load_case(dataset.cases[1])[0], normalise(head(seed=1)))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"file_ending": ".png"}, '"file_ending" is ".png"; expected .nii.gz or .nii'),
            ({"labels": {"background": 0, "a": 1, "b": 1}}, '"labels" has one number twice'),
            (
                {"labels": {"background": 0, "a": 1, "ignore": 2}},
                "a label to ignore, 2; expected classes alone",
            ),
            ({"labels": {"background": 0, "a": []}}, "has [] for a; expected a number or numbers"),
            ({"labels": {"a": 1, "b": 2}}, '"labels" has numbers 1, 2; expected 0 for the background'),
            ({"channel_names": {"1": "FLAIR"}}, '"channel_names" is not numbered 0, 1, 2'),
            ({"dataset": {"A": {"images": ["x.nii.gz"], "label": "y.nii.gz"}}}, "A has 1 images; expected 4"),
            ({"dataset": {"A": 3}}, 'A is 3; expected {"images": [...], "label": ...}'),
        ],
    )
    def test_faults(self, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
        refused(write_nnunet(tmp_path, 2, **changes), "dataset.json: ", words)

    def test_a_missing_channel(self, tmp_path: Path) -> None:
        (write_nnunet(tmp_path, 2) / "imagesTr/C_1_0002.nii.gz").unlink()
        refused(tmp_path, "C_1_0002.nii.gz: no such file")
        assert len(read_dataset(tmp_path, modalities=("FLAIR",)).cases) == 2


def test_some_sequences_of_one_file(tmp_path: Path) -> None:
    names = {str(number): name for number, name in enumerate(("FLAIR", "T1w", "t1gd", "T2w"))}
    dataset = read_dataset(write_decathlon(tmp_path, modality=names), modalities=("T1c", "FLAIR"))
    assert (dataset.modalities, dataset.file_modalities) == (("t1gd", "FLAIR"), tuple(names.values()))
    assert np.array_equal(load_case(dataset.cases[0])[0], normalise(head()[..., [2, 0]]))
    with pytest.raises(
        UserError, match=r"--modalities: ADC is not there among the sequences of .*dataset.json"
    ):
        read_dataset(tmp_path, modalities=("ADC",))
