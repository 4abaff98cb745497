"""``train --real``: a scan that is no part of the data, in the page of the run."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from small_runs import SMALL, brats_case, image_of
from test_view_command import content_of

from tinyunet.segmentation.scores import dice_per_class

pytest.importorskip("plotly")
pytest.importorskip("skimage")


def test_segmented_as_predict_does(dataset, command, tmp_path):
    scan = brats_case(dataset, 1, tmp_path / "BraTS20_Training_007")
    options = "--data-path", dataset, *SMALL, "--output", tmp_path / "runs", "--real", scan
    done = command("train", *options)
    assert done.code == 0
    assert "BraTS20_Training_007, no part of the data set: edema 0." in done.err + done.out
    (run,) = (tmp_path / "runs").iterdir()
    head, *others = content_of(run / "report.html")["heads"]
    assert head["name"] == "BraTS20_Training_007"
    assert others
    assert [*head["labels"]] == ["prediction", "truth"]

    assert command("predict", run / "best.npz", scan, "-o", tmp_path / "out").code == 0
    (predicted,) = (tmp_path / "out").iterdir()
    found = np.asarray(nibabel.load(predicted).dataobj)
    truth = np.asarray(nibabel.load(scan / f"{scan.name}_seg.nii.gz").dataobj)
    dice = dice_per_class(*(np.searchsorted([0, 1, 2, 4], each) for each in (found, truth)), 4)
    shown = dict(head["scores"][1:])
    assert [shown[name] for name in ("edema", "non-enhancing tumor", "enhancing tumour")] == [
        f"{dice[number]:.3f}" for number in (2, 1, 3)
    ]
    assert json.loads((run / "config.json").read_text())["real"] == str(scan)


def test_a_scan_without_labels(dataset, command, tmp_path):
    options = "--data-path", dataset, *SMALL, "--output", tmp_path / "runs", "--real", image_of(dataset, 1)
    assert command("train", *options).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    head = content_of(run / "report.html")["heads"][0]
    assert [*head["labels"]] == ["prediction"]
    assert not head["scores"]


@pytest.mark.parametrize("given", ["nowhere", "."])
def test_a_scan_that_is_not_there_is_refused_at_once(given, dataset, command, tmp_path):
    path = Path(tmp_path / given)
    done = command("train", "--data-path", dataset, *SMALL, "--output", tmp_path / "runs", "--real", path)
    assert done.code == 2
    assert str(path) in done.error
