"""Scores of masks: against their definition by brute force, against MONAI, and what empty masks count."""

import json
import os
import shutil
import subprocess

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet import evaluate
from tinyunet.segmentation.metrics import LESION_METRICS, METRICS, interval, lesions, measure, measure_lesions
from tinyunet.segmentation.tables import csv_rows, report, summary, worst_first

SIZES = st.tuples(*[st.integers(1, 7)] * 3)
SPACINGS = st.tuples(*[st.sampled_from([0.5, 1.0, 2.75, 5.0])] * 3)
SHARES = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])


@st.composite
def masks(draw):
    random, shape = np.random.default_rng(draw(st.integers(0, 999))), draw(SIZES)
    return [random.random(shape) < draw(SHARES) for _ in range(2)]


def surface(mask):
    """Voxels of a mask with a neighbour outside, one after the other."""
    padded = np.pad(mask, 1)
    found = []
    for voxel in np.argwhere(mask) + 1:
        sides = [padded[tuple(voxel + step)] for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int))]
        if not all(sides):
            found.append(voxel)
    return np.array(found)


@given(masks(), SPACINGS, st.sampled_from([0.4, 1.0, 3.0]))
def test_distances_are_those_of_all_pairs_of_surface_voxels(pair, spacing, tolerance):
    prediction, truth = pair
    values = measure(prediction, truth, spacing, tolerance)
    if not (prediction.any() and truth.any()):
        return
    a, b = (surface(mask) * np.array(spacing) for mask in pair)
    apart = np.linalg.norm(a[:, None] - b[None], axis=-1)
    directed = apart.min(axis=1), apart.min(axis=0)
    assert values["hd95"] == pytest.approx(max(np.percentile(d, 95) for d in directed), rel=1e-9)
    near = np.concatenate(directed) <= tolerance
    # A distance that equals the tolerance may round to either side.
    unsure = np.isclose(np.concatenate(directed), tolerance).mean()
    assert values["nsd"] == pytest.approx(near.mean(), abs=unsure + 1e-9)


@given(masks(), SPACINGS)
def test_shares_and_volumes_count_voxels(pair, spacing):
    prediction, truth = pair
    values, litres = measure(prediction, truth, spacing), np.prod(spacing) / 1000
    assert {*values} == {*METRICS}
    assert values["volume"] == pytest.approx(prediction.sum() * litres)
    assert values["difference"] == pytest.approx(values["volume"] - values["true_volume"])
    if truth.any() and prediction.any():
        assert values["sensitivity"] == pytest.approx(prediction[truth].mean())
        assert values["precision"] == pytest.approx(truth[prediction].mean())
        assert values["dice"] == pytest.approx(
            2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
        )
    if not truth.all():
        assert values["specificity"] == pytest.approx(1 - prediction[~truth].mean())


@given(masks(), SPACINGS)
def test_agrees_with_monai(pair, spacing):
    metrics, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    prediction, truth = pair
    if not (prediction.any() and truth.any()):
        return
    tensors = [torch.tensor(mask[None, None].astype(np.float32)) for mask in pair]
    how = {"include_background": True, "spacing": spacing}
    values = measure(prediction, truth, spacing, 1.3)
    hd95 = metrics.compute_hausdorff_distance(*tensors, percentile=95, **how)
    assert values["hd95"] == pytest.approx(float(hd95), rel=1e-6, abs=1e-6)
    assert values["nsd"] == pytest.approx(
        float(metrics.compute_surface_dice(*tensors, [1.3], **how)), abs=1e-6
    )
    assert values["dice"] == pytest.approx(float(metrics.compute_dice(*tensors)), abs=1e-6)


WORST = {"dice": 0.0, "nsd": 0.0, "sensitivity": 0.0, "precision": 0.0, "lesion_dice": 0.0}


@given(masks(), SPACINGS)
def test_a_missed_tumour_is_the_worst_case_there_is(pair, spacing):
    """No prediction scores lower than none, so a miss never improves a mean."""
    prediction, truth = pair
    if not truth.any():
        return
    none = np.zeros_like(truth)
    missed = measure(none, truth, spacing) | measure_lesions(none, truth, spacing)
    other = measure(prediction, truth, spacing) | measure_lesions(prediction, truth, spacing)
    counted = missed["lesions"] > 0
    for name, worst in WORST.items():
        if counted or name != "lesion_dice":
            assert missed[name] == worst <= other[name]
    assert missed["hd95"] == pytest.approx(np.linalg.norm(np.multiply(truth.shape, spacing)))
    assert missed["hd95"] >= other["hd95"]
    assert missed["lesion_hd95"] == (374 if counted else 0)


def test_empty_masks():
    none, some = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    both = measure(none, none, (1, 1, 1)) | measure_lesions(none, none, (1, 1, 1))
    assert [both[n] for n in ("dice", "hd95", "nsd", "sensitivity", "precision", "specificity")] == [
        1, 0, 1, 1, 1, 1,
    ]  # fmt: skip
    assert (both["lesion_dice"], both["lesion_hd95"]) == (1, 0)
    false = measure(some, none, (1, 1, 1)) | measure_lesions(some, none, (1, 1, 1))
    assert [false[n] for n in ("dice", "nsd", "sensitivity", "precision", "specificity")] == [0] * 5
    assert (false["lesion_dice"], false["lesion_hd95"], false["false_positives"]) == (0, 374, 1)


def box(mask, corner, size):
    mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True


def test_lesions_by_construction():
    truth, prediction = (np.zeros((60, 30, 30), bool) for _ in range(2))
    box(truth, (2, 2, 2), (6, 6, 6))  # joined with the next one: 5 voxels between them
    box(truth, (13, 2, 2), (4, 4, 4))
    box(truth, (30, 2, 2), (5, 5, 5))  # missed
    box(truth, (45, 20, 20), (3, 4, 4))  # 48 mm^3: does not count, and its prediction is not false
    box(prediction, (2, 2, 2), (6, 6, 6))
    box(prediction, (45, 20, 20), (3, 4, 4))
    box(prediction, (50, 2, 2), (1, 1, 1))  # false
    found = lesions(prediction, truth, (1, 1, 1))
    assert [round(lesion.millilitres, 3) for lesion in found] == [0.28, 0.125, 0]
    assert [lesion.dice for lesion in found] == [pytest.approx(2 * 216 / (216 + 280)), 0, 0]
    assert found[1].hd95 == found[2].hd95 == 374
    values = measure_lesions(prediction, truth, (1, 1, 1))
    assert [values[n] for n in ("lesions", "missed", "false_positives")] == [2, 1, 1]
    assert values["lesion_dice"] == pytest.approx(found[0].dice / 3)
    # Of voxels of 2 mm, the small one has 384 mm^3.
    assert measure_lesions(prediction, truth, (2, 2, 2))["lesions"] == 3


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(0.8, 0.1, 200).tolist()
    low, high = interval(values)
    error = np.std(values) / np.sqrt(len(values))
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=error / 3)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=error / 3)
    assert interval(values) == (low, high)
    assert interval([0.5]) is None


def case(dice):
    values = dict.fromkeys((*METRICS, *LESION_METRICS), 1.0) | {"dice": dice, "difference": -0.5}
    return {"classes": {"lesion": values}, "regions": {}}


def test_tables():
    rows = [("A", case(0.9)), ("B", case(0.3))]
    assert [name for name, _ in worst_first(rows)] == ["B", "A"]
    lines = report(rows, ["dice", "difference"]).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("A", "B"))] == ["B", "A"]
    assert lines[-2].split() == ["lesion", "0.600", "-0.50"]
    assert lines[-1].split() == ["0.300-0.900", "-0.50", "to", "-0.50"]
    content = json.loads(json.dumps(summary(rows)))
    assert content["classes"] == {"lesion": pytest.approx(0.6)}
    assert content["metrics"]["classes"]["lesion"]["dice"]["interval"] == [0.3, 0.9]
    assert content["case_metrics"]["B"]["classes"]["lesion"]["dice"] == 0.3
    head, first, _ = csv_rows(rows)
    assert (
        dict(zip(head, first, strict=True)).items() >= {"case": "A", "name": "lesion", "dice": "0.9"}.items()
    )


def test_the_command_knows_all_metrics():
    assert [*evaluate.METRICS] == [*METRICS]


def test_agrees_with_the_program_of_brats(tmp_path):
    """``brats-evaluate`` (AGPL) runs as a program of its own; where it is, its path is in this variable."""
    program = os.environ.get("BRATS_EVALUATE") or shutil.which("brats-evaluate")
    if program is None:
        pytest.skip(
            "brats-evaluate is not installed: pip install brats-evaluation, in an environment of its own"
        )
    random, name = np.random.default_rng(0), "BraTS-GLI-00001-000"
    truth = np.zeros((24, 26, 28), np.uint8)
    truth[4:16, 5:17, 6:18], truth[7:13, 8:14, 9:15], truth[9:11, 10:12, 11:13] = 2, 3, 1
    prediction = np.roll(truth, (1, 2, 0), (0, 1, 2))
    prediction[random.random(truth.shape) < 0.001] = 2
    for folder, labels in (("ref", truth), ("pred", prediction)):
        (tmp_path / folder).mkdir()
        ending = "-seg.nii.gz" if folder == "ref" else ".nii.gz"
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / folder / f"{name}{ending}")
    found = tmp_path / "found.json"
    paths = ["--ref_path", tmp_path / "ref", "--pred_path", tmp_path / "pred", "--summary_json", found]
    subprocess.run(
        [program, *map(str, paths), "--config", "gli"], check=True, capture_output=True, timeout=300
    )
    (theirs,) = json.loads(found.read_text())["metrics"]
    for region, members in (("wt", (1, 2, 3)), ("tc", (1, 3)), ("et", (3,))):
        ours = measure(np.isin(prediction, members), np.isin(truth, members), (1, 1, 1))
        assert ours["dice"] == pytest.approx(theirs[region]["global_bin_dsc"], abs=1e-6)
        assert ours["hd95"] == pytest.approx(theirs[region]["global_bin_hd95"], abs=1e-6)
