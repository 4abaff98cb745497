"""``python -m tinyunet.evaluate``: the right Dice of the right pairs."""

import csv
import json
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from launcher import launch, needs_mpi
from small_runs import labels_of, other_shape, rewrite, strange_label

from tinyunet.data.labels import save_labels
from tinyunet.data.nifti import read_volume


def write(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(voxels, np.uint8).reshape(1, 1, -1)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4) if affine is None else affine), path)
    return path


def row(out, name):
    """The numbers of a row of the table."""
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return [float(word) for word in line.split()[1:]]


def test_dice_of_known_labels(command, tmp_path):
    prediction = write(tmp_path / "p.nii.gz", [0, 0, 1, 1, 2, 3, 3, 0])
    truth = write(tmp_path / "t.nii.gz", [0, 1, 1, 0, 2, 2, 3, 0])
    done = command("evaluate", prediction, truth, "--labels", "decathlon")
    assert done.code == 0
    # Classes: 2 * 1 / 4, 2 * 1 / 3, 2 * 1 / 3; whole tumour 2 * 4 / 10, core 2 * 3 / 6.
    assert row(done.out, "p") == [0.5, 0.667, 0.667, 0.8, 1.0, 0.667]


def test_endings_in_capitals(command, tmp_path):
    write(tmp_path / "p" / "one.nii.gz", [1, 2]).rename(tmp_path / "p" / "one.NII.GZ")
    write(tmp_path / "t" / "one.nii", [1, 2]).rename(tmp_path / "t" / "one.NII")
    done = command("evaluate", tmp_path / "p", tmp_path / "t", "--labels", "decathlon")
    assert row(done.out, "one") == [1] * 6


def test_folders_are_paired_by_name_and_averaged(command, tmp_path):
    write(tmp_path / "p" / "one.nii.gz", [1, 1, 2, 3])
    write(tmp_path / "p" / "two.nii", [1, 0, 2, 3])
    write(tmp_path / "t" / "one.nii", [1, 1, 2, 3])
    write(tmp_path / "t" / "two.nii.gz", [1, 1, 2, 0])
    write(tmp_path / "t" / "three.nii.gz", [1, 1, 2, 3])
    options = ("--json", tmp_path / "scores.json", "--labels", "decathlon")
    done = command("evaluate", tmp_path / "p", tmp_path / "t", *options)
    assert done.code == 0
    assert row(done.out, "one") == [1, 1, 1, 1, 1, 1]
    assert row(done.out, "two") == [0.667, 1, 0, 0.667, 0.667, 0]
    assert row(done.out, "mean") == [0.833, 1, 0.5, 0.833, 0.833, 0.5]
    assert "three" not in done.out
    assert "1 labelled case has no prediction and is not scored: three" in done.err
    assert done.out.index("\ntwo") < done.out.index("\none"), "the worst comes first"
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["regions"]["enhancing"] == 0.5
    assert scores["classes"]["non-enhancing tumor"] == 1
    assert list(scores["cases"]) == ["one", "two"]
    assert scores["cases"]["two"]["regions"]["whole tumour"] == pytest.approx(2 / 3)
    assert scores["metrics"]["regions"]["enhancing"]["sensitivity"]["mean"] == 0.5
    low, high = scores["metrics"]["regions"]["enhancing"]["dice"]["interval"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_all_values_go_to_a_csv_file(command, tmp_path):
    label, missed = write(tmp_path / "a.nii", [1, 2, 3, 0]), write(tmp_path / "b.nii", [0, 0, 0, 0])
    file = tmp_path / "scores.csv"
    options = ("--labels", "decathlon", "--csv", file, "--lesion-wise", "--metrics", "hd95")
    done = command("evaluate", missed, label, *options)
    assert done.code == 0, done.err
    assert re.search(r"^whole tumour +4\.2 ", done.out, re.MULTILINE), "the diagonal of 4 x 1 x 1 mm"
    head, *lines = csv.reader(file.open())
    assert head[:4] == ["case", "group", "name", "dice"]
    values = dict(zip(head, lines[-1], strict=True))
    assert (values["case"], values["name"], values["dice"]) == ("b", "enhancing", "0.0")
    assert command("evaluate", missed, label, *options).code == 0, "a file of ours is replaced"
    file.write_text("case,dice\n")
    done = command("evaluate", missed, label, *options)
    assert "--csv: " in done.error
    assert "is there already, and this program did not write it" in done.error
    assert "--metrics" in command("evaluate", label, label, "--metrics", "iou").error


def test_the_table_is_aligned(command, tmp_path):
    for name in ("a", "a_long_name"):
        write(tmp_path / "p" / f"{name}.nii", [1, 2, 3, 0])
    out = command("evaluate", tmp_path / "p", tmp_path / "p", "--labels", "decathlon").out
    lines, averages = (part.splitlines() for part in out.split("\n\n"))
    assert len({len(line) for line in lines}) == 1
    assert len({len(line) for line in averages}) == 1
    ends = [[match.end() for match in re.finditer(r"\d\.\d{3}", line)] for line in lines if "." in line]
    assert len(ends) == 3
    assert ends[0] == ends[1] == ends[2]
    heads = next(line for line in lines if line.startswith("case"))
    for end, head in zip(ends[0], ("edema", "tumor", "tumour", "tumour", "core", "enhancing"), strict=True):
        assert heads[:end].endswith(head)


def test_a_data_set_tells_names_and_truth(command, dataset, tmp_path):
    found = tmp_path / "found"
    found.mkdir()
    shutil.copy(labels_of(dataset), found)
    for labels in (dataset, dataset / "labelsTr", labels_of(dataset)):
        predictions = found if labels.is_dir() else labels_of(dataset)
        done = command("evaluate", predictions, labels)
        assert done.code == 0, done.err
        assert row(done.out, "PHANTOM_002") == [1] * 6


def test_a_data_set_without_its_images_and_other_labels_is_enough(command, copy, tmp_path):
    found = tmp_path / "found"
    found.mkdir()
    shutil.copy(labels_of(copy), found)
    absent = shutil.copy(labels_of(copy, 1), found)
    shutil.rmtree(copy / "imagesTr")
    labels_of(copy, 1).unlink()
    done = command("evaluate", found, copy)
    assert done.error == f"tinyunet.evaluate: {absent}: no labels named PHANTOM_001 in {copy}"
    (found / "PHANTOM_001.nii.gz").unlink()
    done = command("evaluate", found, copy)
    assert done.code == 0, done.err
    assert row(done.out, "PHANTOM_002") == [1] * 6


def test_the_data_set_above_the_working_directory_is_seen(command, tmp_path, monkeypatch):
    description = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "7": "liver"},
        "training": [{"image": "imagesTr/one.nii", "label": "labelsTr/one.nii"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    write(tmp_path / "labelsTr" / "one.nii", [0, 7, 7])
    write(tmp_path / "found" / "one.nii", [0, 7, 0])
    monkeypatch.chdir(tmp_path / "labelsTr")
    for labels in (".", "one.nii"):
        done = command("evaluate", "../found", labels)
        assert done.code == 0, done.err
        assert "liver" in done.out
        assert row(done.out, "one") == [0.667]


@pytest.mark.parametrize("name", ["W39_Segm.nii.gz", "A_SEG.nii.gz", "a_seg.nii"])
def test_a_label_file_of_brats_is_known_by_its_name(command, tmp_path, name):
    truth = write(tmp_path / name, [0, 2, 1, 4])
    prediction = write(tmp_path / "found.nii", [0, 2, 4, 4])
    done = command("evaluate", prediction, truth)
    assert done.code == 0, done.err
    assert row(done.out, "found") == [1, 0, 0.667, 1, 1, 0.667]


def test_brats_numbers_its_labels_differently(command, tmp_path):
    case = tmp_path / "data" / "BraTS_001"
    for kind in ("flair", "t1", "t1ce", "t2"):
        write(case / f"BraTS_001_{kind}.nii", [1, 2, 3, 4])
    truth = write(case / "BraTS_001_seg.nii", [0, 2, 1, 4])
    prediction = write(tmp_path / "found" / "BraTS_001.nii.gz", [0, 2, 4, 4])
    # Edema right; of non-enhancing nothing found; enhancing 2 * 1 / 3.
    expected = [1, 0, 0.667, 1, 1, 0.667]
    assert row(command("evaluate", tmp_path / "found", tmp_path / "data").out, "BraTS") == expected
    assert row(command("evaluate", prediction, truth).out, "BraTS") == expected
    assert row(command("evaluate", prediction, case).out, "BraTS") == expected
    write(tmp_path / "data" / "atlas.nii.gz", [0, 0, 0, 0])
    assert row(command("evaluate", tmp_path / "found", tmp_path / "data").out, "BraTS") == expected
    told = ("--label-values", 0, 2, 1, 4)
    assert row(command("evaluate", prediction, prediction, *told).out, "BraTS") == [1] * 6
    done = command("evaluate", prediction, prediction, "--labels", "decathlon")
    assert done.code == 2
    assert "holds label 4; expected labels 0, 1, 2, 3" in done.error


def test_other_numbers_of_classes_have_no_regions(command, tmp_path):
    labels = write(tmp_path / "liver.nii", [0, 5, 5, 9])
    out = command("evaluate", labels, labels, "--label-values", 0, 5, 9).out
    assert "regions" not in out
    assert "label 5" in out
    assert row(out, "liver") == [1, 1]


def letter(folder):
    labels_of(folder).write_text("a letter to the editor")
    return labels_of(folder)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (letter, "not a NIfTI file"),
        (strange_label, "holds label 7; expected labels 0, 1, 2, 3"),
        (other_shape, "20 x 23 x 17 voxels; expected 20 x 24 x 17"),
    ],
)
def test_a_bad_file_is_told(command, dataset, copy, spoil, told):
    path = spoil(copy)
    done = command("evaluate", copy / "labelsTr", dataset)
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(f"tinyunet.evaluate: {path}: ")
    assert told in done.error


def test_what_cannot_be_is_told(command, tmp_path):
    label = write(tmp_path / "p" / "one.nii", [1, 2])
    other = write(tmp_path / "t" / "two.nii", [1, 2])
    moved = write(tmp_path / "moved.nii", [1, 2], np.array([[1, 0, 0, 9], *np.eye(4)[1:]]))
    empty = tmp_path / "empty"
    empty.mkdir()

    def told(*arguments):
        done = command("evaluate", *arguments)
        assert (done.code, done.out) == (2, "")
        return done.error.removeprefix("tinyunet.evaluate: ")

    assert told("absent", label).startswith("absent: no such file or folder")
    assert told(label, "absent").startswith("absent: no such file or folder")
    assert told(empty, label.parent).startswith(f"{empty}: no label files in it")
    assert told(label.parent, empty).startswith(f"{empty}: neither a dataset.json nor")
    assert told(label.parent, other.parent) == f"{label}: no labels named one in {other.parent}"
    assert "voxels away from" in told(moved, label)
    both = (write(tmp_path / "both" / "one.nii", [1, 2]), write(tmp_path / "both" / "one.nii.gz", [1]))
    for pair in ((both[0].parent, label.parent), (label.parent, both[0].parent)):
        assert told(*pair) == f"{both[0].parent}: both one.nii and one.nii.gz; expected one of them"
    twice = told(label, label, "--label-values", 0, 1, 1)
    assert twice == "--label-values: 1 is there twice; expected different numbers"
    assert "257 of them; expected 2 to 256" in told(label, label, "--label-values", *range(257))
    assert "1 of them; expected 2 to 256" in told(label, label, "--label-values", 1)
    assert "--label-values: 'x'" in told(label, label, "--label-values", "x")
    missing = tmp_path / "no" / "scores.json"
    assert told(label, label, "--json", missing) == f"{missing}: No such file or directory"


def test_nothing_of_a_json_that_cannot_be_written_is_left(command, tmp_path, monkeypatch):
    label = write(tmp_path / "one.nii", [1, 2])
    (tmp_path / "scores.json").mkdir()
    done = command("evaluate", label, label, "--json", tmp_path / "scores.json")
    assert done.code == 2
    assert done.error == f"tinyunet.evaluate: {tmp_path}/scores.json: Is a directory"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.nii", "scores.json"]


@needs_mpi
def test_one_rank_speaks(tmp_path):
    label = write(tmp_path / "one.nii", [1, 2])
    done = launch(["-m", "tinyunet.evaluate", label, label], 2)
    assert done.returncode == 0
    assert done.stdout.count("one ") == 1
    rewrite(label, lambda labels: labels * 9)
    done = launch(["-m", "tinyunet.evaluate", label, label, "--labels", "decathlon"], 2)
    assert (done.returncode, done.stderr.count("holds label")) == (2, 1)


def test_another_programs_description_is_passed_over_where_numbers_are_given(command, tmp_path):
    write(tmp_path / "labelsTr" / "one.nii", [0, 1, 1])
    write(tmp_path / "found" / "one.nii", [0, 1, 0])
    paths = tmp_path / "found", tmp_path / "labelsTr"
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert "labels read as: 1 liver (dataset.json)" in command("evaluate", *paths).err
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["background", "liver"]}))
    assert 'no "modality"' in command("evaluate", *paths).err
    done = command("evaluate", *paths, "--label-values", "0", "1")
    assert done.code == 0, done.err
    assert row(done.out, "one") == [0.667]


def test_a_shell_may_close_the_terminal(tmp_path):
    write(tmp_path / "a.nii", [0, 1, 2, 3])
    files = f"{tmp_path}/a.nii {tmp_path}/a.nii --labels decathlon --json {tmp_path}/scores.json"
    program = f"{sys.executable} -m tinyunet.evaluate {files} >&- 2>&-"
    done = subprocess.run(["sh", "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert json.loads((tmp_path / "scores.json").read_text())["classes"]["edema"] == 1


# Each number once, and of which 1, 2, 3 and 4 the prediction has one more voxel than the truth: which
# columns that spoils says how the numbers were read.
TRUTH = [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]


def labels_of_numbers(numbers, more=None):
    """Voxels of these numbers; one voxel of background counts for ``more``."""
    found = [number if number in numbers else 0 for number in TRUTH]
    return [more or 0, *found[1:]]


@pytest.mark.parametrize(
    ("name", "numbers", "told", "core", "edema"),
    [
        ("A_seg", (1, 2, 4), "1 necrotic and non-enhancing core, 2 edema, 4 enhancing", 1, 2),
        ("BraTS2021_00000_seg", (1, 2), "4 enhancing tumour (BraTS 2017 to 2021)", 1, 2),
        ("A", (1, 2, 4), "(BraTS 2017 to 2021, by the numbers)", 1, 2),
        ("A-seg", (1, 2, 3), "1 necrotic core, 2 edema, 3 enhancing tumour (BraTS 2023)", 1, 2),
        ("BraTS-GLI-00000-000-seg", (1, 2, 3), "(BraTS 2023)", 1, 2),
        ("BraTS-GLI-00000-000", (1, 2, 3, 4), "4 resection cavity", 1, 2),
        ("BraTS-MET-00000-000-seg", (1, 2, 3, 4), "4 resection cavity (BraTS metastases)", 1, 2),
        ("BraTS-PED-00000-000-seg", (1, 2, 3, 4), "1 enhancing tumour, 2 non-enhancing", 2, 4),
    ],
)
@pytest.mark.parametrize("folders", [True, False])
def test_flat_files_are_read_as_names_and_numbers_say(
    command, tmp_path, name, numbers, told, core, edema, folders
):
    case = name.removesuffix("_seg").removesuffix("-seg")
    truth = write(tmp_path / "t" / f"{name}.nii.gz", labels_of_numbers(numbers))
    for wrong, spoilt in ((core, {"whole tumour", "tumour core"}), (edema, {"whole tumour"})):
        prediction = write(tmp_path / "p" / f"{case}.nii", labels_of_numbers(numbers, wrong))
        paths = (prediction.parent, truth.parent) if folders else (prediction, truth)
        done = command("evaluate", *paths, "--json", tmp_path / "scores.json")
        assert done.code == 0, done.err
        assert done.err.count("labels read as: ") == 1
        assert told in done.err
        regions = json.loads((tmp_path / "scores.json").read_text())["regions"]
        assert {name for name, dice in regions.items() if dice < 1} == spoilt


@pytest.mark.parametrize("numbers", [(1, 2, 3), (1, 2), (1,), (1, 4), (1, 2, 3, 4), (9,)])
def test_numbers_that_nothing_explains_are_classes_without_regions(command, tmp_path, numbers):
    label = write(tmp_path / "a.nii", [0, *numbers])
    done = command("evaluate", label, label)
    assert (done.code, row(done.out, "a")) == (0, [1] * len(numbers))
    assert f"labels read as: {', '.join(map(str, numbers))} (nothing says what" in done.err
    assert "regions" not in done.out


@pytest.mark.parametrize(
    ("truths", "predictions"),
    [
        ({"A_seg": [1, 2, 3]}, {"A": [1, 2]}),  # numbers of another year under old names
        ({"A_seg": [1, 2, 3, 4]}, {"A": [1, 2]}),
        ({"A-seg": [1, 2, 4]}, {"A": [1, 2]}),
        ({"BraTS-PED-1-0-seg": [1, 2, 3]}, {"BraTS-PED-1-0": [1]}),  # 2023's or 2024's
        ({"BraTS-PED-1-0_seg": [1, 2, 4]}, {"BraTS-PED-1-0": [1]}),
        ({"BraTS-GLI-1-0_seg": [1, 2, 4]}, {"BraTS-GLI-1-0": [1]}),
        ({"A_seg": [1, 2, 4], "B-seg": [1, 2, 3]}, {"A": [1, 2, 4], "B": [1, 2, 3]}),
        ({"A": [1, 2, 4], "B": [1, 2, 3]}, {"A": [1, 2], "B": [1, 2]}),
        ({"A": [1, 2, 3]}, {"A": [1, 2, 4]}),
        ({"A": [1, 2, 4]}, {"A": [1, 2, 3]}),
        ({"A-seg": [1, 2, 3]}, {"A": [1, 2, 4]}),
        ({"A-seg": [1, 2, 3]}, {"A_seg": [1, 2]}),
        ({"A-seg": [1, 2, 3], "B": [1, 2]}, {"A": [1], "B": [1]}),
    ],
)
def test_labels_that_can_be_read_in_two_ways_are_asked_about(command, tmp_path, truths, predictions):
    for folder, files in (("t", truths), ("p", predictions)):
        for name, numbers in files.items():
            write(tmp_path / folder / f"{name}.nii.gz", [*numbers, 0, 0, 0][:4])
    done = command("evaluate", tmp_path / "p", tmp_path / "t")
    assert (done.code, done.out) == (2, "")
    assert "--labels" in done.error
    numbers = {number for files in (truths, predictions) for each in files.values() for number in each}
    convention = "brats-ped" if 4 in numbers else "brats2023"
    told = command("evaluate", tmp_path / "p", tmp_path / "t", "--labels", convention)
    assert told.code == 0, told.err
    assert f"(--labels {convention})" in told.err


def test_predictions_that_count_otherwise_say_so_themselves(command, tmp_path):
    """A model of the Decathlon's numbers beside the truth of BraTS: our files carry what they mean."""
    truth = write(tmp_path / "t" / "A-seg.nii.gz", [0, 1, 2, 3, 1])
    geometry = read_volume(truth)[1]
    classes = np.array([0, 2, 1, 3, 2], np.uint8).reshape(1, 1, -1)
    names = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
    prediction = tmp_path / "p" / "A.nii.gz"
    save_labels(prediction, classes, geometry, names=names)
    done = command("evaluate", prediction.parent, truth.parent)
    assert row(done.out, "A") == [1] * 6, done.err
    assert "predictions read as: 1 edema, 2 necrotic core, 3 enhancing tumour" in done.err
    # Where nothing else says it, the predictions do.
    plain = write(tmp_path / "u" / "A.nii.gz", [0, 2, 1, 3, 2])
    done = command("evaluate", prediction, plain)
    assert row(done.out, "A") == [1] * 6, done.err
    assert "1 edema, 2 non-enhancing tumor, 3 enhancing tumour (as the predictions say)" in done.err
    save_labels(prediction, classes, geometry, names=("background", "liver", "vessel", "gall"))
    done = command("evaluate", prediction, truth)
    assert "says of itself 1 liver, 2 vessel, 3 gall, but labels read as: 1 necrotic" in done.err
    assert done.code == 2


def test_numbers_in_the_order_of_brats_are_no_label_values(command, tmp_path):
    label = write(tmp_path / "a.nii", [0, 1, 2, 4])
    done = command("evaluate", label, label, "--label-values", 0, 1, 2, 4)
    assert "BraTS has 0 2 1 4: --labels brats2018" in done.error
    done = command("evaluate", label, label, "--label-values", 0, 2, 1, 4, "--labels", "brats2018")
    assert "--label-values: given beside --labels" in done.error


@pytest.mark.parametrize("content", ["", "{}", '{"scores": "of my thesis"}'])
def test_the_file_of_someone_else_is_not_replaced(command, tmp_path, content):
    label, file = write(tmp_path / "a.nii", [0, 1]), tmp_path / "scores.json"
    file.write_text(content)
    done = command("evaluate", label, label, "--json", file)
    assert (done.code, done.out) == (2, "")
    assert (
        done.error == f"tinyunet.evaluate: --json: {file} is there already, and this program did "
        "not write it; expected another name"
    )
    assert file.read_text() == content
    file.unlink()
    for _ in range(2):
        assert command("evaluate", label, label, "--json", file).code == 0
