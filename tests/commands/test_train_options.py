"""Options of a training beyond the default, each by what it leaves in the run's folder."""

import importlib.util
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from small_runs import SMALL, brats_case, image_of
from test_resume_command import run_of, same, train, undisturbed

from tinyunet import Adam, UNet, compile, no_grad
from tinyunet.data.cases import load_image
from tinyunet.losses import dice_cross_entropy, of_levels
from tinyunet.segmentation import checkpoint
from tinyunet.training.loop import Trainer, clip, schedule_of
from tinyunet.training.settings import Settings

__all__ = ["train", "undisturbed"]  # fixtures

# Two epochs of three steps.
THREE_STEPS = (
    *("--filters", "4", "--depth", "2", "--patch-size", "16"),
    *("--patches-per-case", "3", "--batch-size", "4", "--epochs", "2"),
)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestMetrics:
    """metrics.jsonl and TensorBoard's file."""

    def test_a_line_for_each_step_and_each_epoch_once_although_killed(self, train, tmp_path):
        # Killed in the second epoch, one step after a checkpoint.
        train(*THREE_STEPS, "--output", tmp_path, "--checkpoint-every", 2, killed_at=6)
        assert train("--resume", "--output", tmp_path).code == 0
        lines = lines_of(run_of(tmp_path))
        assert [(line["step"], line["epoch"], "validation" in line) for line in lines] == [
            *((1, 1, False), (2, 1, False), (3, 1, False), (3, 1, True)),
            *((4, 2, False), (5, 2, False), (6, 2, False), (6, 2, True)),
        ]
        history = json.loads((run_of(tmp_path) / "history.json").read_text())
        assert [
            {k: v for k, v in line.items() if k != "step"} for line in lines if "validation" in line
        ] == history
        assert all(line["wait"] >= 0 and line["loss"] > 0 for line in lines if "validation" not in line)

    @pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs tensorboardX")
    def test_tensorboard(self, train, tmp_path):
        assert train(*SMALL, "--tensorboard", "--output", tmp_path).code == 0
        (file,) = (run_of(tmp_path) / "tensorboard").iterdir()
        content = file.read_bytes()
        assert all(name in content for name in (b"step/loss", b"epoch/validation/regions/whole_tumour"))

    def test_tensorboard_without_its_package(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr("tinyunet.training.settings.find_spec", lambda name: None)
        done = train(*SMALL, "--tensorboard", "--output", tmp_path)
        assert done.error.endswith("--tensorboard: needs tensorboardX; pip install 'tinyunet[tensorboard]'")


class TestConfig:
    """config.json says what was trained, and trains it again."""

    def test_it_repeats_a_run_and_options_come_first(self, train, tmp_path):
        options = ("--clip-norm", "0.5", "--augmentation", "full", "--foreground", "0.75")
        assert train(*SMALL, *options, "--output", tmp_path / "a").code == 0
        config = run_of(tmp_path / "a") / "config.json"
        assert train("--config", config, "--output", tmp_path / "b").code == 0
        assert same(run_of(tmp_path / "a"), run_of(tmp_path / "b"))
        assert train("--config", config, "--epochs", 2, "--output", tmp_path / "c").code == 0
        found = json.loads((run_of(tmp_path / "c") / "config.json").read_text())
        expected = json.loads(config.read_text())
        assert found == expected | {"epochs": 2, "output": str(tmp_path / "c")}
        assert (expected["clip_norm"], expected["augmentation"], expected["foreground"]) == (
            0.5,
            "full",
            0.75,
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[1]", "settings: a list of 1; expected an object"),
            ('{"epochs": 0}', "settings.epochs: 0; expected a whole number from 1"),
            ('{"epoch": 3}', "'epoch' is no setting; expected those of config.json beside a checkpoint"),
            ("{", "Expecting property name"),
            ('{"patch_size": [16, 16]}', "settings.patch_size: a list of 2; expected a list of 3"),
        ],
    )
    def test_faults(self, train, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        done = train("--config", tmp_path / "config.json", "--output", tmp_path / "runs")
        assert f"--config: {tmp_path / 'config.json'}: {message}" in done.error
        assert not (tmp_path / "runs").exists()

    def test_no_such_file(self, train, tmp_path):
        assert "cannot be read (No such file" in train("--config", tmp_path / "none.json").error


class TestAverage:
    """--ema: the best checkpoint holds the average, the latest both."""

    def test_killed_it_goes_on_bit_for_bit(self, train, undisturbed, tmp_path):
        more = ("--ema", "0.8", "--clip-norm", "0.5", "--random-seed", 2)
        train(*THREE_STEPS, *more, "--output", tmp_path, "--checkpoint-every", 1, killed_at=6)
        assert train("--resume", "--output", tmp_path).code == 0
        assert same(run_of(tmp_path), undisturbed(*more))
        best, latest = (checkpoint.load(run_of(tmp_path) / name) for name in ("best.npz", "latest.npz"))
        assert best.state["averaged"]
        assert best.state["epoch"] == latest.state["epoch"] == 2  # else the comparison below says nothing
        of_best = np.concatenate([best.model[name].ravel() for name in best.order])
        of_latest = np.concatenate([latest.model[name].ravel() for name in latest.order])
        assert np.array_equal(of_best, latest.optimizer["ema"])
        assert np.array_equal(of_latest, best.optimizer["ema"])
        # To go on from the best is to go on from where it was written.
        shutil_best = run_of(tmp_path) / "best.npz"
        assert train("--resume", shutil_best, "--extend", 1).code == 0

    def test_the_average_follows_the_parameters(self):
        model = UNet(filters=4, depth=1)
        optimizer = Adam(model.parameters(), ema=0.5)
        expected = optimizer.flat_parameters.astype(np.float64)
        for step in range(1, 12):
            optimizer.flat_gradients[:] = np.random.default_rng(step).standard_normal(expected.size)
            optimizer.step()
            share = min(0.5, (1 + step) / (10 + step))
            expected = share * expected + (1 - share) * optimizer.flat_parameters
        np.testing.assert_allclose(optimizer.ema, expected, atol=1e-6)
        before = optimizer.flat_parameters.copy()
        optimizer.exchange_average()
        np.testing.assert_allclose(optimizer.flat_parameters, expected, atol=1e-6)
        optimizer.exchange_average()
        assert np.array_equal(optimizer.flat_parameters, before)

    @pytest.mark.parametrize("share", [-0.1, 1.0, np.nan])
    def test_share_out_of_range(self, share):
        with pytest.raises(ValueError, match="ema"):
            Adam(UNet(filters=4, depth=1).parameters(), ema=share)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping(most):
    gradients = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    before = gradients.astype(np.float64)
    norm = np.linalg.norm(before)
    assert clip(gradients, most) == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(gradients, before * min(1, most / norm), rtol=1e-6)


class TestExtend:
    """--extend: a finished run goes on, and its learning rate rises once more."""

    def test_schedule(self):
        plain, longer = Settings(epochs=4), Settings(epochs=6, extended_at=(4,))
        first, second = schedule_of(plain, 10), schedule_of(Settings(epochs=2), 10)
        both = schedule_of(longer, 10)
        assert [both(step) for step in range(40)] == [first(step) for step in range(40)]
        assert [both(step) for step in range(40, 60)] == [second(step) for step in range(20)]
        assert both(60) == 0

    def test_a_finished_run_goes_on(self, train, tmp_path):
        assert train(*THREE_STEPS, "--output", tmp_path).code == 0
        done = train("--resume", "--extend", 1, "--output", tmp_path)
        assert done.code == 0
        assert (
            "--extend: the learning rate rises to 0.002 again after epoch 2, and falls to 0 until epoch 3"
            in done.out
        )
        folder = run_of(tmp_path)
        assert [entry["epoch"] for entry in json.loads((folder / "history.json").read_text())] == [1, 2, 3]
        rates = [line["lr"] for line in lines_of(folder) if "validation" not in line]
        assert rates[6:] == [schedule_of(Settings(epochs=1), 3)(step) for step in range(3)]
        assert json.loads((folder / "config.json").read_text())["epochs"] == 3
        # And once more, killed meanwhile.
        train("--resume", "--extend", 1, "--output", tmp_path, "--checkpoint-every", 1, killed_at=11)
        assert train("--resume", "--output", tmp_path).code == 0
        latest = checkpoint.load(folder / "latest.npz")
        assert (latest.state["epoch"], latest.state["settings"]["extended_at"]) == (4, [2, 3])

    def test_without_a_run(self, train, tmp_path):
        assert "--extend: no run to go on with; expected --resume, too" in train("--extend", 1).error
        done = train("--resume", "--extend", 1, "--output", tmp_path)
        assert "--extend: no run" in done.error


class TestPatience:
    """--patience: no better validation for so many epochs ends the training."""

    def test_it_stops_and_tests(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "tinyunet.training.run.overall", lambda scores: 0.5
        )  # never better than the first
        done = train(*SMALL, "--epochs", 9, "--patience", 2, "--output", tmp_path)
        assert done.code == 0
        assert "stopped early: no better validation for 2 epochs" in done.out
        assert len(json.loads((run_of(tmp_path) / "history.json").read_text())) == 3
        assert json.loads((run_of(tmp_path) / "test.json").read_text())["epoch"] == 1
        again = train("--resume", run_of(tmp_path))
        assert "stopped early" in again.out


def test_folds_and_patients(train, dataset, tmp_path):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "imagesTr").iterdir())
    rows = [
        f"{case},{min(number, 3)}" for number, case in enumerate(cases)
    ]  # the last two are of one patient
    (tmp_path / "patients.csv").write_text("\n".join(["case,patient", *rows]))
    tests = []
    for fold in range(4):
        options = ("--folds", 4, "--fold", fold, "--patients", tmp_path / "patients.csv")
        assert train(*SMALL, *options, "--output", tmp_path / str(fold)).code == 0
        parts = checkpoint.load(run_of(tmp_path / str(fold)) / "latest.npz").state["cases"]
        assert sorted(itertools.chain(*parts.values())) == cases
        assert any({*cases[3:]} <= {*part} for part in parts.values())
        tests += parts["test"]
    assert sorted(tests) == cases
    assert "--fold: 4; expected below 4, the number of --folds" in train("--folds", 4, "--fold", 4).error
    assert "--fold: 1; expected --folds, too" in train("--fold", 1).error


def test_two_cases_are_enough(train, dataset, tmp_path):
    description = json.loads((dataset / "dataset.json").read_text())
    data = tmp_path / "two"
    data.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (data / name).symlink_to(dataset / name)
    description["training"] = description["training"][:2]
    (data / "dataset.json").write_text(json.dumps(description))
    done = train(*SMALL, "--data-path", data, "--output", tmp_path / "runs")
    assert done.code == 0
    assert (
        "1 cases to train on, 1 to validate on, 1 to test on (the same: too few for a test of its own"
        in done.out
    )


class TestSlices:
    """--dim 2: the same commands train and use a net of slices."""

    def test_from_training_to_labels(self, train, command, dataset, tmp_path):
        more = ("--dim", 2, "--patch-size", 16, 12)
        assert train(*SMALL, *more, "--output", tmp_path / "runs").code == 0
        folder = run_of(tmp_path / "runs")
        assert checkpoint.load(folder / "best.npz").config["dim"] == 2
        image = sorted((dataset / "imagesTr").iterdir())[0]
        assert command("predict", folder / "best.npz", image, "-o", tmp_path).code == 0
        labels = np.asarray(nibabel.as_closest_canonical(nibabel.load(tmp_path / image.name)).dataobj)
        # Slices along the last axis, one after the other: what the model itself says about each of them.
        model = checkpoint.load(folder / "best.npz").make_model().eval()
        data, _ = load_image((image,))
        with no_grad():
            expected = np.stack([model(data[:, :, z][None]).numpy()[0].argmax(-1) for z in range(17)], axis=2)
        assert (labels != expected).mean() < 0.01  # rounding, and the algorithms of convolution

    def test_killed_it_goes_on_bit_for_bit(self, train, undisturbed, tmp_path):
        train(*THREE_STEPS, "--dim", "2", "--output", tmp_path, "--checkpoint-every", 1, killed_at=5)
        assert train("--resume", "--output", tmp_path).code == 0
        assert same(run_of(tmp_path), undisturbed("--dim", "2"))

    def test_sizes(self, train):
        error = train("--dim", 2, "--patch-size", 16, 12, 8, 9).error
        assert "--patch-size: 4 numbers; expected 1 or 2" in error
        assert "--patch-size: 2 numbers; expected 1 or 3" in train("--patch-size", 16, 12).error
        assert "--patch-size: 8 voxels are halved 4 times" in train("--dim", 2, "--patch-size", 16, 8).error


def test_trainer_reports_each_step(train, tmp_path, monkeypatch):
    found = []
    epoch = Trainer.epoch

    def listening(self, number, on_pause, on_step):
        return epoch(self, number, on_pause, lambda result: (found.append(result), on_step(result)))

    monkeypatch.setattr(Trainer, "epoch", listening)
    assert train(*SMALL, "--output", tmp_path, "--clip-norm", 1e-3).code == 0
    assert found
    assert all(result.gradient_norm > 1e-3 for result in found)


def test_one_sequence_by_name(train, command, dataset, tmp_path):
    assert train(*SMALL, "--modalities", "t1c", "--output", tmp_path / "runs").code == 0
    best = checkpoint.load(run_of(tmp_path / "runs") / "best.npz")
    assert (best.config["in_channels"], best.state["modalities"]) == (1, ["t1gd"])
    image = image_of(dataset, 0)
    whole = nibabel.load(image)
    alone, case = tmp_path / "alone" / image.name, brats_case(dataset, 0, tmp_path / "BraTS2021_00000")
    channels = tmp_path / "channels"
    for path in (alone, channels / "x"):
        path.parent.mkdir()
    for channel in range(4):
        volume = nibabel.Nifti1Image(np.asarray(whole.dataobj)[..., channel], whole.affine)
        nibabel.save(volume, channels / f"C_{channel:04}.nii.gz")
        if channel == 2:
            nibabel.save(volume, alone)
    found = []
    for number, given in enumerate((image, alone, case, channels)):
        done = command("predict", best.path, given, "-o", tmp_path / str(number))
        assert done.code == 0, done.err
        (file,) = (tmp_path / str(number)).iterdir()
        found.append(np.asarray(nibabel.load(file).dataobj) > 0)
    assert all(np.array_equal(found[0], other) for other in found[1:])
    # Another order of the files, which dataset.json tells.
    turned = {"channel_names": {"0": "T1ce", "1": "T1", "2": "FLAIR", "3": "T2"}}
    for channel, place in ((0, 2), (2, 0)):
        (channels / f"C_{channel:04}.nii.gz").rename(channels / f"new_{place:04}.nii.gz")
    for file in channels.glob("new_*"):
        file.rename(channels / f"C{file.name[3:]}")
    (tmp_path / "dataset.json").write_text(json.dumps(turned))
    done = command("predict", best.path, channels, "-o", tmp_path / "turned")
    assert f"sequences read as: 1 t1gd (of 4, {tmp_path / 'dataset.json'})" in done.err
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "turned/C.nii.gz").dataobj) > 0, found[0])
    (tmp_path / "dataset.json").unlink()
    two = tmp_path / "two.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.asarray(whole.dataobj)[..., :2], whole.affine), two)
    assert (
        "two.nii.gz: 2 sequences; expected 1" in command("predict", best.path, two, "-o", tmp_path / "x").err
    )
    # A resumed run keeps its sequences.
    assert train("--resume", best.path.parent, "--extend", 1).code == 0
    assert "--modalities: CT is not there" in train(*SMALL, "--modalities", "CT").error


def test_regions_of_the_data_set_are_scored(train, dataset, tmp_path):
    description = json.loads((dataset / "dataset.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (data / name).symlink_to(dataset / name)
    description["labels"] = {"background": 0, "lesion": [1, 2, 3], "bright": [3]}
    (data / "dataset.json").write_text(json.dumps(description))
    done = train(*SMALL, "--data-path", data, "--output", tmp_path / "runs")
    assert done.code == 0
    scores = json.loads((run_of(tmp_path / "runs") / "test.json").read_text())
    assert list(scores["classes"]) == ["label 1", "label 2", "bright"]
    assert list(scores["regions"]) == ["lesion", "bright"]


def test_deep_supervision_goes_on_bit_for_bit(train, undisturbed, tmp_path):
    more = ("--deep-supervision", "--depth", "3")
    train(*THREE_STEPS, *more, "--output", tmp_path, "--checkpoint-every", 1, killed_at=5)
    assert train("--resume", "--output", tmp_path).code == 0
    assert same(run_of(tmp_path), undisturbed(*more))
    assert checkpoint.load(run_of(tmp_path) / "best.npz").config["deep_supervision"] == "levels"


def test_deep_supervision_of_an_older_run_goes_on_and_is_not_exported(train, command, tmp_path, monkeypatch):
    """Older programs added the logits of all levels: their checkpoints have True."""
    with monkeypatch.context() as older:
        now = Settings.model_options.fget
        older.setattr(
            Settings, "model_options", property(lambda self: now(self) | {"deep_supervision": True})
        )
        assert train(*SMALL, "--deep-supervision", "--output", tmp_path).code == 0
    assert train("--resume", run_of(tmp_path), "--extend", 1).code == 0
    best = run_of(tmp_path) / "best.npz"
    assert checkpoint.load(best).config["deep_supervision"] is True
    done = command("export", best, tmp_path / "m.onnx")
    assert "deep supervision adds logits of several levels; expected a model without it" in done.error


def test_deep_supervision_is_exported_without_its_heads(train, dataset, command, tmp_path):
    more = ("--deep-supervision", "--depth", "3", "--export", tmp_path / "m.npz")
    assert train(*SMALL, *more, "--output", tmp_path / "runs").code == 0
    model = checkpoint.load(tmp_path / "m.npz")
    assert "deep_supervision" not in model.config
    assert not any("lower" in name for name in model.model)
    for name, path in (("one", tmp_path / "m.npz"), ("other", run_of(tmp_path / "runs") / "best.npz")):
        assert command("predict", path, image_of(dataset), "-o", tmp_path / name).code == 0
    one, other = (nibabel.load(next((tmp_path / name).iterdir())) for name in ("one", "other"))
    assert np.array_equal(one.dataobj, other.dataobj)


@pytest.mark.parametrize("kind", ["levels", True])
@pytest.mark.parametrize("config", [{}, {"dim": 2}, {"use_upsampling": True}], ids=str)
def test_deep_supervision_compiled_is_eager(config, kind):
    """Also at odd sizes; each head gets a gradient of its own."""
    model, other = (
        UNet(in_channels=2, classes=3, filters=4, depth=3, deep_supervision=kind, **config) for _ in "ab"
    )
    sides = (13, 12, 11)[: config.get("dim", 3)]
    images = np.random.default_rng(0).standard_normal((2, *sides, 2), np.float32)
    labels = np.random.default_rng(1).integers(0, 3, images.shape[:-1]).astype(np.uint8)
    optimizer, eager = Adam(model.parameters()), Adam(other.parameters())
    step = compile(model, of_levels(dice_cross_entropy, model), optimizer, images.shape)
    logits = other.logits(images)
    expected = dice_cross_entropy(logits, labels, from_logits=True).item()
    if kind == "levels":  # of two voxels the second is taken: the one in the middle of both is nearest
        (lower,) = other.lower_logits
        coarse = labels[(slice(None), *[slice(1, None, 2)] * len(sides))]
        expected += dice_cross_entropy(lower, coarse, from_logits=True).item() / 2
        expected /= 1.5
    loss = of_levels(dice_cross_entropy, other)(logits, labels, from_logits=True)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert step.gradients(images, labels) == pytest.approx(loss.item(), rel=1e-5)
    largest = np.abs(eager.flat_gradients).max()
    np.testing.assert_allclose(optimizer.flat_gradients, eager.flat_gradients, atol=1e-5 * largest)
    assert np.abs(model.lower_heads[0].weights.grad).max() > 1e-3 * largest
    plain = UNet(in_channels=2, classes=3, filters=4, depth=3, **config).state_dict()
    state = model.state_dict()
    assert all(np.array_equal(plain[name], state[name]) for name in plain if "running" not in name)
    assert {*state} - {*plain} == {"lower_heads.0.weights", "lower_heads.0.bias"}
