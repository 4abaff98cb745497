"""The command that takes a model to another program's file and back, and what ``predict`` makes of it."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from small_runs import SMALL, image_of
from test_resume_command import run_of, train

from tinyunet import UNet
from tinyunet.segmentation import checkpoint

__all__ = ["train"]  # fixture


def labels(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.nii.gz")
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("ending", [".npz", ".onnx"])
def test_there_and_back(dataset, trained, tmp_path, command, ending):
    pytest.importorskip({".onnx": "onnx"}.get(ending, "numpy"))
    there, back = tmp_path / f"model{ending}", tmp_path / "back.npz"
    done = command("export", trained / "best.npz", there)
    assert done.code == 0
    assert done.out.startswith(f"{there} (")
    assert command("export", there, back).code == 0
    assert back.stat().st_size < (trained / "best.npz").stat().st_size / 2
    for name, model in (("before", trained / "best.npz"), ("after", back)):
        assert command("predict", model, image_of(dataset), "-o", tmp_path / name).code == 0
    assert np.array_equal(labels(tmp_path / "before"), labels(tmp_path / "after"))
    refused = command("train", "--resume", back)
    assert refused.code == 2
    assert "back.npz: not a checkpoint of a training" in refused.error
    again = command("export", there, back)
    assert "back.npz: is there already; expected another name" in again.error


def test_what_a_stranger_does_not_say_is_told_or_printed(tmp_path, command):
    pytest.importorskip("safetensors")
    from safetensors.numpy import load_file, save_file

    model, there = UNet(filters=4, depth=2, norm="group", activation="elu"), tmp_path / "m.safetensors"
    checkpoint.save(tmp_path / "m.npz", model, None, {})
    assert command("export", tmp_path / "m.npz", there).code == 0
    save_file(load_file(there), tmp_path / "other.safetensors")  # without our metadata
    says = ("--classes", "bg", *"abc", "--modalities", *"wxyz")
    done = command("export", tmp_path / "other.safetensors", tmp_path / "x.npz", *says)
    assert "does not say it, so this is assumed: activation relu, norm instance, epsilon 0.001" in done.out
    assert "does not say the size of its voxels" in done.out
    more = ("--activation", "elu", "--norm", "group", "--epsilon", "1e-3", "--spacing", "1", "1", "2")
    done = command("export", tmp_path / "other.safetensors", tmp_path / "y.npz", *says, *more)
    assert "say" not in done.out
    found = checkpoint.load(tmp_path / "y.npz")
    assert found.config == model.config
    assert found.state["spacing"] == [1, 1, 2]
    again = tmp_path / "z.npz"
    assert "--norm: none; " in command("export", tmp_path / "y.npz", again, "--norm", "none").error
    assert "4 modalities; 1 names" in command("export", tmp_path / "y.npz", again, "--modalities", "x").error


def test_at_the_end_of_a_training(train, tmp_path):
    done = train(*SMALL, "--output", tmp_path / "runs", "--export", tmp_path / "model.bin")
    assert "--export: " in done.error
    assert "model.bin; expected a name that ends in .npz" in done.error
    assert train(*SMALL, "--output", tmp_path / "runs", "--export", tmp_path / "model.npz").code == 0
    written = tmp_path / "model.npz", run_of(tmp_path / "runs") / "best.npz"
    found, best = map(checkpoint.load, written)
    assert all(np.array_equal(array, best.model[name]) for name, array in found.model.items())
    assert found.state["labels"] == best.state["labels"]
    assert not found.optimizer
