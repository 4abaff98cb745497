"""``python -m tinyunet.predict``: labels that lie over their image, or one line and nothing."""

import dataclasses
import gzip
import os
import re
import shutil

import nibabel
import numpy as np
import pytest
from launcher import launch, needs_mpi
from small_runs import (
    SMALL,
    brats_case,
    image_of,
    labels_of,
    nan,
    not_nifti,
    rewrite,
    truncated,
    wrong_sequences,
)

from tinyunet.common.archive import seal
from tinyunet.common.errors import UserError
from tinyunet.data.cases import load_image
from tinyunet.optim import Adam
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.components import clean
from tinyunet.segmentation.prediction import plan
from tinyunet.segmentation.sliding_window import average, count_patches, predict_image, predictor, segment
from tinyunet.unet import UNet


@pytest.fixture
def model(trained):
    return trained / "best.npz"


def write_image(path, shape, affine=None, seed=0):
    """A volume of any size with four sequences, the brain in its middle."""
    voxels = np.zeros((*shape, 4), np.float32)
    inside = tuple(slice(size // 4, size - size // 4) for size in shape)
    voxels[inside] = np.random.default_rng(seed).uniform(1, 100, voxels[inside].shape)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


# Stored upside down, with axes exchanged and sides of unequal length, 2 mm apart and oblique.
OBLIQUE = np.array([[0.1, -1.9, 0, 7], [0, 0.1, -2.2, 5], [1.5, 0, 0.1, -3], [0, 0, 0, 1]])


@pytest.mark.parametrize("shape", [(20, 24, 17), (5, 40, 3), (1, 1, 1), (33, 16, 18)])
@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE], ids=["straight", "oblique"])
def test_labels_lie_over_an_image_of_any_size(command, model, tmp_path, shape, affine):
    image = write_image(tmp_path / "head.nii.gz", shape, affine)
    before = image.read_bytes()
    done = command("predict", model, image, "-o", tmp_path / "found")
    assert done.code == 0, done.err
    labels = nibabel.load(tmp_path / "found" / "head.nii.gz")
    assert labels.shape == shape
    np.testing.assert_allclose(labels.affine, nibabel.load(image).affine)
    assert labels.get_data_dtype() == np.uint8
    assert image.read_bytes() == before


def test_what_is_written_is_what_the_model_says(command, model, dataset, tmp_path):
    image = image_of(dataset)
    command("predict", model, image, "-o", tmp_path)
    voxels, geometry = load_image([image])
    expected = geometry.from_canonical(segment(checkpoint.load(model).make_model(), voxels))
    found = np.asarray(nibabel.load(tmp_path / image.name).dataobj)
    np.testing.assert_array_equal(found, expected)
    assert found.any(), "the model finds nothing: this test cannot fail"


def test_the_terminal_names_each_file_and_its_millilitres(command, model, tmp_path):
    images = [write_image(tmp_path / f"{name}.nii", (18, 18, 18)) for name in ("a", "b")]
    done = command("predict", model, *images, "-o", tmp_path / "found")
    assert done.code == 0
    for name, line in zip(("a", "b"), done.out.splitlines(), strict=True):
        path = re.escape(str(tmp_path / "found" / f"{name}.nii.gz"))
        assert re.fullmatch(rf"{path}  edema \d+\.\d ml, non-.* ml, enhancing.* \d+\.\d ml", line)
    assert "b 100%" in done.err


def test_a_brats_folder_gets_labels_as_brats_numbers_them(command, model, dataset, tmp_path):
    image = image_of(dataset)
    case = brats_case(dataset, 2, tmp_path / "BraTS_001")
    done = command("predict", model, image, f"{case}/", "-o", tmp_path / "found")
    assert done.code == 0, done.err
    of_image = np.asarray(nibabel.load(tmp_path / "found" / image.name).dataobj)
    of_case = np.asarray(nibabel.load(tmp_path / "found" / "BraTS_001.nii.gz").dataobj)
    np.testing.assert_array_equal(of_case, np.array([0, 2, 1, 4])[of_image])


def test_brats_numbers_follow_the_names_of_the_classes(model, dataset, tmp_path):
    case = brats_case(dataset, 2, tmp_path / "BraTS_001")
    found = checkpoint.load(model)
    names = ["background", "necrosis", "edema", "enhancing tumour"]
    other = dataclasses.replace(found, state=found.state | {"labels": names})
    (job,) = plan([str(case)], tmp_path, other)
    assert job.label_values == (0, 1, 2, 4)


def test_a_brats_folder_may_lack_a_sequence_if_that_is_allowed(command, model, dataset, tmp_path):
    case = brats_case(dataset, 2, tmp_path / "BraTS_001")
    (case / "BraTS_001_t1.nii.gz").unlink()
    done = command("predict", model, case, "-o", tmp_path / "found")
    assert done.code == 2
    assert f"{case}: 3 sequences, no t1; expected 4" in done.error
    done = command("predict", model, case, "-o", tmp_path / "found", "--allow-missing")
    assert done.code == 0, done.err
    assert f"warning: {case}/BraTS_001_t1.nii.gz: no such file; the model does without" in done.err


def test_brats_files_follow_the_names_of_the_sequences(model, dataset, tmp_path):
    case = brats_case(dataset, 2, tmp_path / "BraTS_001")
    found = checkpoint.load(model)
    order = dataclasses.replace(found, state=found.state | {"modalities": ["T2w", "FLAIR", "T1w"]})
    (job,) = plan([str(case)], tmp_path, order)
    assert [path.name.partition("_001_")[2] for path in job.image_paths] == [
        "t2.nii.gz",
        "flair.nii.gz",
        "t1.nii.gz",
    ]
    other = dataclasses.replace(found, state=found.state | {"modalities": ["CT"]})
    with pytest.raises(UserError, match="the model's sequences are CT; expected a NIfTI file"):
        plan([str(case)], tmp_path, other)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (truncated, "truncated or damaged"),
        (not_nifti, "not a NIfTI file"),
        (wrong_sequences, "3 sequences; expected 4"),
        (nan, "1 voxels are NaN or infinite"),
    ],
)
def test_a_bad_image_is_named_at_the_end_and_the_others_are_done(command, model, copy, tmp_path, spoil, told):
    good, bad = image_of(copy, 0), spoil(copy)
    done = command("predict", model, bad, good, "-o", tmp_path / "found")
    assert done.code == 2
    assert done.out.startswith(f"{tmp_path / 'found' / good.name}  ")
    assert re.search(rf"^failed: {re.escape(str(bad))}: .*{told}", done.err, re.MULTILINE)
    assert done.error == "tinyunet.predict: 1 of 2 images could not be segmented; the others are done"
    assert [path.name for path in (tmp_path / "found").iterdir()] == [good.name]
    done = command("predict", model, bad, "-o", tmp_path / "alone")
    assert re.fullmatch(rf"tinyunet\.predict: {re.escape(str(bad))}: .*{told}.*", done.error)
    assert not (tmp_path / "alone").exists()


def test_what_cannot_be_is_told(command, model, dataset, tmp_path):
    image = image_of(dataset)

    def told(*arguments):
        done = command("predict", *arguments)
        assert done.code == 2
        assert done.out == ""
        return done.error.removeprefix("tinyunet.predict: ")

    assert told(model, "no.nii", "-o", tmp_path).startswith("no.nii: no such file; expected")
    assert told(model, image, image, "-o", tmp_path).startswith(f"{image}: there is another image")
    assert told(model, tmp_path, "-o", tmp_path / "x").startswith(f"{tmp_path}: 0 sequences")
    assert told(model, image, "-o", image.parent).startswith(f"{image}: is the image itself")
    plain = tmp_path / "plain" / "scan.nii"
    plain.parent.mkdir()
    shutil.copy(image, f"{plain}.gz")
    plain.write_bytes(b"the same, before it was compressed")
    assert told(model, plain, "-o", plain.parent).startswith(f"{plain}.gz: is there already, beside")
    assert told(model, image) == "the following arguments are required: -o/--output (see --help)"
    assert told("no.npz", image, "-o", tmp_path).startswith("no.npz: No such file or directory")
    assert told(image, image, "-o", tmp_path).startswith(f"{image}: damaged, or not a checkpoint")
    (tmp_path / "file").write_text("")
    assert told(model, image, "-o", tmp_path / "file") == f"{tmp_path}/file: File exists"
    assert told(model, image, "-o", "") == "-o: ''; expected a folder"
    assert "cannot be written; expected" in told(model, image, "-o", "/proc/labels")
    assert not list(tmp_path.glob("*.nii*"))


def test_a_checkpoint_of_another_model_is_told(command, model, dataset, tmp_path):
    with np.load(model) as archive:
        members = {name: archive[name] for name in archive.files}
    del members["model/head.bias"]
    np.savez(tmp_path / "other.npz", **members)
    with (tmp_path / "other.npz").open("r+b") as file:
        seal(file)
    done = command("predict", tmp_path / "other.npz", image_of(dataset), "-o", tmp_path)
    assert done.code == 2
    assert f"{tmp_path}/other.npz: holds another model than its configuration says" in done.error


def left_over(folder):
    path = image_of(folder)
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1234)))
    return path


def pipe(folder):
    path = image_of(folder)
    path.unlink()
    os.mkfifo(path)
    return path


def flat(folder):
    path = image_of(folder)
    image = nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), None)
    image.set_sform(np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 2, 0], [0, 0, 0, 1.0]]), code=1)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (left_over, "1234 bytes behind the [0-9]+ of its voxels"),
        (pipe, "not a regular file"),
        (flat, "the affine is singular"),
    ],
)
def test_a_strangers_image_is_refused_by_every_command(command, model, copy, tmp_path, spoil, told):
    bad = spoil(copy)
    line = rf"tinyunet\.\w+: {re.escape(str(bad))}: .*{told}.*"
    commands = {
        "predict": (model, bad, "-o", tmp_path / "found"),
        "train": ("--data-path", copy, "--output", tmp_path / "runs", *SMALL),
        "evaluate": (labels_of(copy), bad),
    }
    for name, arguments in commands.items():
        done = command(name, *arguments)
        assert done.code == 2
        assert re.fullmatch(line, done.error), name
    assert not (tmp_path / "found").exists()


def test_what_is_no_file_is_not_waited_for(command, model, copy, tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    done = command("predict", tmp_path / "pipe.npz", image_of(copy), "-o", tmp_path / "found")
    assert done.code == 2
    assert "pipe.npz: not a regular file; expected a checkpoint" in done.error
    (copy / "dataset.json").unlink()
    os.mkfifo(copy / "dataset.json")
    done = command("train", "--data-path", copy, "--output", tmp_path / "runs")
    assert done.code == 2
    assert "dataset.json: cannot be read (not a regular file)" in done.error


@pytest.mark.parametrize(("value", "told"), [(np.nan, "1 of 4 values are NaN"), (3e38, "scan.nii")])
def test_a_model_that_gives_no_numbers_gives_no_labels(command, model, tmp_path, value, told):
    image = write_image(tmp_path / "scan.nii", (8, 8, 8))
    with np.load(model) as archive:
        members = {name: archive[name] for name in archive.files}
    name = "encoder.0.conv0.bias" if np.isnan(value) else "head.weights"
    members[f"model/{name}"].flat[0] = value
    if not np.isnan(value):
        members["model/head.weights"][:] = value
        members["model/head.bias"][0] = -value
    np.savez(tmp_path / "other.npz", **members)
    with (tmp_path / "other.npz").open("r+b") as file:
        seal(file)
    done = command("predict", tmp_path / "other.npz", image, "-o", tmp_path / "found", "--spacing", "keep")
    assert done.code == 2
    assert told in done.error
    assert "NaN or infinite" in done.error
    assert not list(tmp_path.glob("found/*"))


def test_labels_replace_a_link_that_someone_has_put_there(command, model, tmp_path):
    image = write_image(tmp_path / "scan.nii", (8, 8, 8))
    victim = tmp_path / "victim"
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "scan.nii.gz").symlink_to(victim)
    victim.write_text("mine")
    assert command("predict", model, image, "-o", tmp_path / "found").code == 2
    assert victim.read_text() == "mine"
    victim.unlink()
    assert command("predict", model, image, "-o", tmp_path / "found").code == 0
    assert not victim.exists()
    assert nibabel.load(tmp_path / "found" / "scan.nii.gz").shape == (8, 8, 8)
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["scan.nii.gz"]


def test_memory_that_runs_out_is_told_with_the_image(command, model, tmp_path, monkeypatch):
    def too_large(*_, **__):
        raise MemoryError("Unable to allocate 7 GiB")

    monkeypatch.setattr("tinyunet.segmentation.prediction.predict_image", too_large)
    image = write_image(tmp_path / "scan.nii", (8, 8, 8))
    done = command("predict", model, image, "-o", tmp_path / "found")
    assert done.code == 2
    assert f"{image}: not enough memory (Unable to allocate 7 GiB)" in done.error


def test_the_file_of_one_sequence_only_is_told(command, model, dataset, tmp_path):
    flat = tmp_path / "flat.nii.gz"
    shutil.copy(labels_of(dataset), flat)
    done = command("predict", model, flat, "-o", tmp_path / "found")
    assert done.code == 2
    assert "1 sequences; expected 4" in done.error


def test_labels_are_named_as_the_link_is(command, model, dataset, tmp_path):
    for name in ("patient_A.nii.gz", "patient_B.nii.gz"):
        (tmp_path / name).symlink_to(image_of(dataset))
    images = sorted(tmp_path.glob("patient_*"))
    assert command("predict", model, *images, "-o", tmp_path / "found").code == 0
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [p.name for p in images]


@needs_mpi
def test_ranks_share_the_images(model, dataset, tmp_path):
    images = [image_of(dataset, number) for number in range(3)]
    done = launch(["-m", "tinyunet.predict", model, *images, "-o", tmp_path / "found"], 2)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "found" / image.name) for image in images
    ]
    assert len(list((tmp_path / "found").iterdir())) == 3


@needs_mpi
def test_a_bad_image_of_one_rank_is_named_once(model, dataset, tmp_path):
    good = [image_of(dataset, number) for number in range(2)]
    bad = rewrite(shutil.copy(image_of(dataset, 2), tmp_path / "bad.nii.gz"), lambda image: image[..., :2])
    done = launch(["-m", "tinyunet.predict", model, *good, good[0].parent / "x", "-o", tmp_path], 2)
    assert (done.returncode, done.stderr.count("tinyunet.predict: ")) == (2, 1)
    done = launch(["-m", "tinyunet.predict", model, good[0], bad, good[1], "-o", tmp_path / "found"], 2)
    assert done.returncode == 2
    assert done.stderr.count(f"failed: {bad}: 2 sequences; expected 4") == 1
    assert done.stderr.count("tinyunet.predict: 1 of 3 images") == 1
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [path.name for path in good]


def test_folders_are_segmented_and_finished_images_skipped(command, model, dataset, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(2):
        shutil.copy(image_of(dataset, number), folder)
    shutil.copy(image_of(dataset, 0), folder / "._hidden.nii.gz")
    stored = nibabel.load(image_of(dataset, 2))
    for channel in range(4):  # as nnU-Net has them
        one = nibabel.Nifti1Image(np.asarray(stored.dataobj)[..., channel], stored.affine)
        nibabel.save(one, folder / f"CASE_{channel:04d}.nii.gz")
    found = tmp_path / "found"
    done = command("predict", model, folder, "-o", found)
    assert done.code == 0, done.err
    names = sorted(path.name for path in found.iterdir())
    assert names == ["CASE.nii.gz", image_of(dataset, 0).name, image_of(dataset, 1).name]
    command("predict", model, image_of(dataset, 2), "-o", tmp_path / "whole")
    voxels = [
        np.asarray(nibabel.load(path).dataobj)
        for path in (found / "CASE.nii.gz", tmp_path / "whole" / image_of(dataset, 2).name)
    ]
    np.testing.assert_array_equal(*voxels)
    (found / "CASE.nii.gz").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in found.iterdir()}
    done = command("predict", model, folder, "-o", found, "--skip-existing")
    assert (done.code, done.out.count("  edema ")) == (0, 1)
    assert "2 images left out, whose labels are there already" in done.err
    assert {name: (found / name).stat().st_mtime_ns for name in before} == before


def test_an_empty_folder_and_two_files_of_one_name_are_told(command, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for ending in (".nii", ".nii.gz"):
        write_image(tmp_path / "twice" / f"a{ending}", (8, 8, 8))
    done = command("predict", model, tmp_path / "twice", "-o", tmp_path / "found")
    assert "both a.nii and a.nii.gz; expected one of them" in done.error
    done = command("predict", model, tmp_path / "empty", "-o", tmp_path / "found")
    assert (done.code, done.out) == (2, "")
    assert str(tmp_path / "empty") in done.error


def test_probabilities_lie_over_the_image_and_give_the_labels(command, model, tmp_path):
    image = write_image(tmp_path / "head.nii.gz", (20, 24, 17), OBLIQUE)
    options = ("-o", tmp_path / "found", "--probabilities")
    assert command("predict", model, image, *options).code == 0
    labels, shares = (nibabel.load(tmp_path / "found" / f"head{n}.nii.gz") for n in ("", "_probabilities"))
    assert shares.shape == (20, 24, 17, 4)
    np.testing.assert_allclose(shares.affine, nibabel.load(image).affine)
    values = np.asarray(shares.dataobj)
    np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(values.argmax(axis=-1), np.asarray(labels.dataobj))
    done = command("evaluate", tmp_path / "found", tmp_path / "found" / "head.nii.gz")
    assert done.code == 0, "probabilities are no labels"
    assert command("predict", model, image, *options).code == 0, "files of ours are replaced"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "found" / "head_probabilities.nii.gz")
    assert "this program did not write it" in command("predict", model, image, *options).error


def test_an_average_of_models_and_reflections(command, model, dataset, tmp_path):
    state = checkpoint.load(model)
    net, (image, _) = state.make_model(), load_image([image_of(dataset)])
    once = predict_image(net, image)
    mirrored = predict_image(net, image, mirror=True)
    turned = predict_image(net, np.ascontiguousarray(image[::-1]), mirror=True)[::-1]
    assert np.abs(once - mirrored).max() > 1e-3
    np.testing.assert_allclose(turned, mirrored, atol=2e-4)
    twice = average([predictor(net, eager=True)] * 2)
    np.testing.assert_allclose(
        twice(image[None, :8, :8, :8]), net.eval()(image[None, :8, :8, :8]).data, atol=1e-6
    )
    options = ("--ensemble", model, model, "--overlap", "0.25")
    done = command("predict", model, image_of(dataset), "-o", tmp_path / "found", *options)
    assert done.code == 0, done.err


def test_parts_are_cleaned():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[0:3, 0:3, 0:3], labels[1, 1, 1] = 1, 2  # 27 voxels of two classes
    labels[5:7, 5:7, 5:7] = 3
    labels[8, 8, 0] = 1
    assert clean(labels, 0.001) is labels
    largest = clean(labels, 0.001, largest=True)
    assert np.count_nonzero(largest) == 27
    assert largest[1, 1, 1] == 2
    assert np.count_nonzero(clean(labels, 0.001, smallest=0.008)) == 35
    assert np.count_nonzero(clean(labels, 0.001, smallest=0.009)) == 27
    assert not clean(labels, 0.001, largest=True, smallest=1.0).any()
    assert not clean(np.zeros((2, 2, 2), np.uint8), 1.0, largest=True).any()


def test_a_brats_folder_from_2023_on(command, model, dataset, tmp_path):
    image = image_of(dataset)
    names = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
    case = brats_case(dataset, 2, tmp_path / "BraTS-GLI-00001-000")
    for old, new in names.items():
        (case / f"{case.name}_{old}.nii.gz").rename(case / f"{case.name}-{new}.nii.gz")
    (case / f"{case.name}_seg.nii.gz").unlink()
    done = command("predict", model, image, case, "-o", tmp_path / "found")
    assert done.code == 0, done.err
    of_image = np.asarray(nibabel.load(tmp_path / "found" / image.name).dataobj)
    of_case = np.asarray(nibabel.load(tmp_path / "found" / f"{case.name}.nii.gz").dataobj)
    np.testing.assert_array_equal(of_case, np.array([0, 2, 1, 3])[of_image])
    for numbers in ("1 edema, 2 non-enhancing tumor, 3", "1 non-enhancing tumor, 2 edema, 3"):
        assert f"labels written as: {numbers} enhancing tumour" in done.err


def stranger(path):
    path.write_bytes(b"anything")


def damaged(path):
    path.write_bytes(path.read_bytes()[:-20])


def corrected(path):
    """By hand, in a program that keeps the header."""
    old = nibabel.load(path)
    voxels = np.asarray(old.dataobj).copy()
    voxels[0, 0, 0] ^= 1
    nibabel.save(nibabel.Nifti1Image(voxels, old.affine, old.header), path)


def copied(path):
    """By a program that drops comments."""
    old = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(old.dataobj), old.affine), path)


@pytest.mark.parametrize("spoil", [stranger, damaged, corrected, copied])
def test_only_files_of_its_own_are_replaced(command, model, dataset, tmp_path, spoil):
    images = [image_of(dataset, number) for number in (0, 1)]
    found = tmp_path / "found"
    for _ in range(2):
        assert command("predict", model, images[1], "-o", found).code == 0
    spoil(found / images[1].name)
    before = (found / images[1].name).read_bytes()
    done = command("predict", model, *images, "-o", found)
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(
        f"tinyunet.predict: {found / images[1].name}: is there already, and this program did not"
    )
    assert [path.read_bytes() for path in found.iterdir()] == [before]


def test_the_truth_is_not_replaced(command, model, copy):
    truth = labels_of(copy).read_bytes()
    done = command("predict", model, image_of(copy), "-o", copy / "labelsTr")
    assert done.code == 2
    assert f"{labels_of(copy)}: is there already" in done.error
    assert labels_of(copy).read_bytes() == truth


def test_predictions_say_what_their_numbers_mean(command, model, dataset, tmp_path):
    command("predict", model, image_of(dataset), "-o", tmp_path / "found")
    (tmp_path / "truth").mkdir()
    shutil.copy(labels_of(dataset), tmp_path / "truth")
    done = command("evaluate", tmp_path / "found", tmp_path / "truth")
    assert "whole tumour" in done.out
    assert "3 enhancing tumour (as the predictions say)" in done.err


def test_what_is_odd_about_an_image_is_told(command, model, copy, tmp_path):
    image = image_of(copy)
    as_it_was = command("predict", model, image, "-o", tmp_path / "before")
    assert "warning" not in as_it_was.err
    rewrite(image, lambda image: np.where(image.any(-1, keepdims=True), image, -1))
    done = command("predict", model, image, "-o", tmp_path / "after")
    assert done.code == 0, done.err
    assert f"warning: {image}: sequence 1, 2, 3, 4: background is -1, not 0" in done.err
    before, after = (
        np.asarray(nibabel.load(tmp_path / each / image.name).dataobj) for each in ("before", "after")
    )
    np.testing.assert_array_equal(before, after)  # nothing else is other than it was


def test_a_sequence_without_content_is_refused_unless_allowed(command, model, copy, tmp_path):
    image = rewrite(image_of(copy), lambda image: image * np.array([1, 0, 1, 1], image.dtype))
    done = command("predict", model, image, "-o", tmp_path / "found")
    assert (done.code, (tmp_path / "found").exists()) == (2, False)
    told = f"{image}: sequence 2: is 0 everywhere, as if it was absent"
    assert done.error.startswith(f"tinyunet.predict: {told}; --allow-missing lets")
    done = command("predict", model, image, "-o", tmp_path / "found", "--allow-missing")
    assert done.code == 0, done.err
    assert f"warning: {told}" in done.err
    rewrite(image, lambda image: image * 0)
    done = command("predict", model, image, "-o", tmp_path / "none", "--allow-missing")
    assert done.code == 2
    assert "sequence 1, 2, 3, 4: is 0 everywhere" in done.error


def on_finer_voxels(image, times=2):
    """Write an image again on voxels of a fraction of the size, which repeat its own."""
    old = nibabel.load(image)
    voxels = np.asarray(old.dataobj)
    for axis in range(3):
        voxels = voxels.repeat(times, axis)
    affine = old.affine @ np.diag([1 / times] * 3 + [1])
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, (times - 1) / 2)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), image)


def test_an_image_of_other_voxels_is_resampled_for_the_model(command, model, dataset, copy, tmp_path):
    image = image_of(copy)
    command("predict", model, image_of(dataset), "-o", tmp_path / "before")
    on_finer_voxels(image)
    done = command("predict", model, image, "-o", tmp_path / "after")
    assert done.code == 0, done.err
    size = "4.53 x 4.53 x 4.53 mm, resampled to 9.06 x 9.06 x 9.06 mm"
    assert f"warning: {image}: voxels of {size}" in done.err
    before, after = (np.asarray(nibabel.load(tmp_path / f / image.name).dataobj) for f in ("before", "after"))
    np.testing.assert_allclose(
        nibabel.load(tmp_path / "after" / image.name).affine, nibabel.load(image).affine
    )
    assert after.shape == tuple(2 * n for n in before.shape)
    whole = before.repeat(2, 0).repeat(2, 1).repeat(2, 2) > 0
    dice = 2 * (whole & (after > 0)).sum() / (whole.sum() + (after > 0).sum())
    assert dice > 0.85
    turned = nibabel.as_closest_canonical(nibabel.load(image)).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]])
    )
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    command("predict", model, tmp_path / "turned.nii.gz", "-o", tmp_path / "after")
    found = nibabel.load(tmp_path / "after" / "turned.nii.gz")
    assert found.shape == turned.shape[:3] != after.shape
    one, other = (
        nibabel.as_closest_canonical(f) for f in (found, nibabel.load(tmp_path / "after" / image.name))
    )
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    command("predict", model, image, "-o", tmp_path / "kept", "--spacing", "keep")
    kept = np.asarray(nibabel.load(tmp_path / "kept" / image.name).dataobj)
    assert 2 * (whole & (kept > 0)).sum() / (whole.sum() + (kept > 0).sum()) < dice


@pytest.mark.parametrize(
    ("scale", "options", "told"),
    [
        (1.0, (), ""),
        (1.04, (), ""),
        (
            0.5,
            ("--spacing", "keep"),
            "x 9.06 mm, as they are, but the model has learnt from 9.06 x 9.06 x 9.06 mm",
        ),
        (1.2, (), ""),
        (1.0, ("--spacing", "5", "5", "5"), "resampled to 5 x 5 x 5 mm, but the model has learnt from"),
        (1.0, ("--spacing", "9"), ""),
        (1.0, ("--spacing", "5", "5"), "--spacing: 5 5; expected one size or three"),
        (1.0, ("--spacing", "0"), "--spacing: 0; expected one size or three"),
        (1.0, ("--spacing", "nan"), "--spacing: nan; expected one size or three"),
        (1.0, ("--spacing", "keep", "1", "1"), "--spacing: keep 1 1; expected"),
        (10.0, ("--spacing", "0.01"), "voxels when resampled from 90.6 x 90.6"),
    ],
)
def test_spacings_are_chosen(command, model, copy, tmp_path, scale, options, told):
    image = image_of(copy)
    old = nibabel.load(image)
    affine = old.affine @ np.diag([scale, scale, 1, 1])
    nibabel.save(nibabel.Nifti1Image(np.asarray(old.dataobj), affine), image)
    done = command("predict", model, image, "-o", tmp_path / "found", *options)
    assert told in done.err
    if "expected" in told or "when" in told:
        assert (done.code, (tmp_path / "found").exists()) == (2, False)
        assert told in done.error
    else:
        assert done.code == 0, done.err
        assert ("warning" in done.err) == bool(told)
        assert nibabel.load(tmp_path / "found" / image.name).shape == old.shape[:3]


def odd_header(voxels, sform, qform, version):
    """A header with any codes, and two positions that differ a little."""
    kind = nibabel.Nifti2Image if version == 2 else nibabel.Nifti1Image
    image = kind(voxels, None)
    image.header["pixdim"][1:4] = 9, 9.1, 8.9
    turned = OBLIQUE @ np.diag([4.5, 4.5, 5.5, 1])
    image.header.set_sform(turned + 0.01, sform)
    image.header.set_qform(turned, qform, strip_shears=True)
    return image


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 1), (4, 3)])
def test_the_position_of_the_image_comes_back(command, model, tmp_path, codes, version):
    image, generator = tmp_path / "odd.nii.gz", np.random.default_rng(0)
    voxels = np.pad(generator.integers(1, 99, (10, 8, 9, 4)).astype(np.int16), [(3, 3)] * 3 + [(0, 0)])
    nibabel.save(odd_header(voxels, *codes, version), image)
    for options in ((), ("--spacing", "keep")):
        done = command("predict", model, image, "-o", tmp_path / "found", *options)
        assert done.code == 0, done.err
        found, old = nibabel.load(tmp_path / "found" / "odd.nii.gz"), nibabel.load(image)
        assert type(found) is type(old)
        assert found.shape == old.shape[:3]
        np.testing.assert_array_equal(found.affine, old.affine)
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert found.header[field] == old.header[field]
        np.testing.assert_array_equal(found.header["pixdim"][:4], old.header["pixdim"][:4])
        for read in ("get_sform", "get_qform"):
            for one, other in zip(getattr(found, read)(True), getattr(old, read)(True), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spacing", [None, "1 mm", [1, 1], [0, 1, 1], [1, 1, "1"]])
def test_spacings_of_other_checkpoints(command, model, dataset, tmp_path, spacing):
    found = checkpoint.load(model)
    state = {name: value for name, value in found.state.items() if name != "spacing"}
    if spacing is not None:
        state["spacing"] = spacing
    network = found.make_model()
    checkpoint.save(tmp_path / "other.npz", network, Adam(network.parameters()), state)
    done = command("predict", tmp_path / "other.npz", image_of(dataset), "-o", tmp_path / "found")
    assert done.code == (0 if spacing is None else 2)
    if spacing is not None:
        assert "other.npz: " in done.error
        assert "state.spacing" in done.error


def test_the_bar_counts_patches_and_ends_with_the_last(command, model, tmp_path):
    images = [write_image(tmp_path / f"{n}.nii", (140, 5 + n, 18)) for n in (1, 2)]
    done = command("predict", model, *images, "-o", tmp_path / "found")
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    assert "<-" not in done.err
    last = done.err.replace("\r", "\n").split("sequences read as")[0].strip().splitlines()[-1]
    assert re.fullmatch(r"2 100%\|.*\| [\d:]+<00:00", last)


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (129, 5, 17), (16, 200, 3)])
def test_patches_are_counted_before_they_are_cut(depth, shape):
    model, calls = UNet(filters=1, depth=depth, in_channels=1, classes=2), []
    segment(
        model,
        np.zeros((*shape, 1), np.float32),
        progress=lambda *call: calls.append(call),
        predict=lambda images: np.zeros((*images.shape[:4], 2), np.float32),
    )
    assert calls[-1] == (len(calls), count_patches(depth, shape))
