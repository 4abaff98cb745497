"""What a training takes: memory, as the compiler plans it, and a plan for a data set."""

import json
import shlex

import numpy as np
import pytest
from small_runs import brats_case, image_of, labels_of, rewrite

from tinyunet import Adam, UNet, train
from tinyunet.common.errors import UserError
from tinyunet.compiler.compiled import TrainingStep
from tinyunet.compiler.ir import Options
from tinyunet.compiler.passes import NAMES
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.spacing import from_words
from tinyunet.data.survey import survey
from tinyunet.losses import dice_cross_entropy
from tinyunet.training import estimate
from tinyunet.training.estimate import Seconds, Workload
from tinyunet.training.proposal import propose
from tinyunet.training.settings import Settings

CONFIG = {"dim": 3, "in_channels": 2, "classes": 3, "filters": 4, "depth": 2}


@pytest.mark.parametrize("dim", [2, 3])
def test_memory_of_a_step_is_that_of_its_arena(dim):
    config = CONFIG | {"dim": dim}
    batch = (2, 8, 12, 10)[: dim + 1]
    parts = estimate.memory(Workload(Settings(), config, batch, [(20, 18, 16)], [(20, 18, 16)]))
    model = UNet(**config)
    step = TrainingStep(
        model, dice_cross_entropy, Adam(model.parameters()), Options(NAMES, "fast", deterministic=True)
    )
    program = step.program((*batch, 2))
    assert parts["a step"] == program._arena.nbytes
    assert parts["volumes"] == 20 * 18 * 16 * (4 * 2 + 1)
    assert parts["weights"] == 7 * 4 * sum(parameter.data.size for parameter in model.parameters())


def test_memory_that_is_not_there(monkeypatch):
    monkeypatch.setattr(estimate, "memory_at_hand", lambda: 10**9)
    estimate.check_memory({"programs": 4 * 10**8, "a step": 10**8}, 2)
    expected = (
        "memory: the training takes about 1.2 GB, and there are 1.0 GB; most of it is for a step; expected a"
    )
    with pytest.raises(UserError, match=expected):
        estimate.check_memory({"programs": 4 * 10**8, "a step": 2 * 10**8}, 2)


def test_time_of_an_epoch():
    work = Workload(Settings(), CONFIG, (2, 8, 8, 8), [(20, 18, 16)] * 3, [(20, 18, 16), (300, 18, 16)])
    # The second volume has three patches of 128, of which each takes the time of the largest.
    of_validation = 0.5 * (20 * 18 * 16 / (128 * 18 * 16) + 3)
    expected = 7 * 2.0 + of_validation + 0.25
    assert Seconds(2.0, 0.5, 0.25).of_epoch(work, 7) == pytest.approx(expected)
    assert Seconds(2.0, 0.5, 0.25).of_epoch(work, 7, ranks=4) == pytest.approx(expected - of_validation / 2)


def test_time_of_reading_what_does_not_stay_in_memory(monkeypatch):
    work = Workload(Settings(), CONFIG, (2, 8, 8, 8), [(10, 10, 10)] * 4, [(10, 10, 10)])
    assert estimate.missing_share(work) == 0
    monkeypatch.setattr(estimate, "half_the_memory", lambda ranks: 9 * 1000)  # of one volume of four
    monkeypatch.setattr("kernels.base.machine.cores", lambda: 2)
    assert estimate.missing_share(work) == 0.75
    # Two patches a step read 1.5 volumes, which takes half a core's time; validation reads one more.
    slow = Seconds(step=2.0, patch=0.0, reading=1.0)
    assert slow.of_epoch(work, 7) == pytest.approx(7 * (2.0 + 1.5 / 2) + 1.0)
    assert Seconds(0.1, 0.0, reading=1.0).of_epoch(work, 7) == pytest.approx(7 * 1.5 + 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.24, "1.2 s"), (119, "119.0 s"), (120, "2.0 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert estimate.duration(seconds) == text


class TestSurvey:
    """What a data set holds."""

    def test_volumes_and_what_is_odd(self, copy):
        labels_of(copy, 1).write_bytes(b"a letter")
        rewrite(labels_of(copy, 0), np.zeros_like)
        found = survey(read_dataset(copy))
        assert len(found.cases) == found.patients == 4
        assert found.shapes == [(20, 24, 17)] * 4
        assert [line.split("/")[-1].split(":")[0] for line in found.suspicious] == [
            labels_of(copy, 0).name,
            labels_of(copy, 1).name,
        ]
        assert all(values[0] == 0 < min(values[1:]) for values in found.millilitres.values())

    def test_images_are_read_by_their_headers_alone(self, copy):
        path = image_of(copy, 0)
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(half - 8) + content[2 * half - 8 :])  # voxels are gone
        assert len(survey(read_dataset(copy)).cases) == 5

    def test_a_file_that_was_cut_is_found_by_its_end(self, copy):
        path = image_of(copy, 0)
        path.write_bytes(path.read_bytes()[:-100])
        found = survey(read_dataset(copy))
        assert len(found.cases) == 4
        assert found.suspicious[0].startswith(f"{path}: its end tells of ")

    def test_of_many_cases_the_labels_of_some_are_read(self, dataset, command, monkeypatch):
        monkeypatch.setattr("tinyunet.data.survey.MOST_LABELS", 2)
        found, every = survey(read_dataset(dataset)), 5
        assert len(found.cases) == every
        assert [len(volumes) for volumes in found.millilitres.values()] == [2] * 3
        done = command("plan", "--data-path", dataset, "--no-time", "--depth", 2, "--filters", 4)
        assert "(labels of 2 cases were read, spread evenly over all)" in done.out

    def test_copies_of_labels(self, copy):
        labels_of(copy, 1).write_bytes(labels_of(copy, 0).read_bytes())
        assert survey(read_dataset(copy)).suspicious == [
            f"{labels_of(copy, 1)}: the same labels as {labels_of(copy, 0)}"
        ]

    def test_a_missing_sequence(self, dataset, tmp_path):
        for number in range(2):
            brats_case(dataset, number, tmp_path / f"BraTS-GLI-0000{number}-000")
        gone = next((tmp_path / "BraTS-GLI-00000-000").glob("*t1c*"))
        gone.unlink()
        data = read_dataset(tmp_path, labels="brats2018", allow_missing=True)
        assert survey(data).suspicious == [f"{gone}: no such file; expected it, or --allow-missing"]
        found = survey(data, allow_missing=True)
        assert (len(found.cases), found.suspicious) == (2, [])

    def test_two_examinations_of_one_patient(self, dataset, tmp_path):
        for number in range(2):
            brats_case(dataset, number, tmp_path / f"BraTS-GLI-00000-00{number}")
        found = survey(read_dataset(tmp_path, labels="brats2018"))
        assert (len(found.cases), found.patients) == (2, 1)


class TestCommand:
    """``python -m tinyunet.plan``."""

    SMALL = ("--filters", 4, "--depth", 3, "--patches-per-case", 2)

    def test_it_says_what_is_there_and_what_to_do(self, command, dataset, tmp_path):
        done = command("plan", "--data-path", dataset, *self.SMALL, "--json", tmp_path / "plan.json")
        assert done.code == 0, done.err
        for words in (
            "5 cases of 5 patients; FLAIR, T1w, t1gd, T2w",
            "labels read as: 1 edema, 2 non-enhancing tumor, 3 enhancing tumour",
            "20 x 24 x 17, all alike",
            " mm; nothing is resampled",
            "         patches of 20 x 24 x 16 voxels, 2 in a step, 4 filters, 3 levels",
            "an epoch (3 steps of ",
            f"command  python -m tinyunet.train --data-path {dataset} --patch-size 20 24 16 --batch-size 2",
        ):
            assert words in done.out
        content = json.loads((tmp_path / "plan.json").read_text())
        assert content["plan"]["settings"]["patch_size"] == [20, 24, 16]
        assert content["plan"]["epoch_seconds"] > 3 * content["plan"]["step_seconds"] > 0
        assert len(content["data"]["millilitres"]["edema"]) == 5
        assert sum(content["plan"]["bytes"].values()) > estimate.PROGRAMS

    def test_less_memory_gets_smaller_patches(self, command, dataset, monkeypatch):
        for module in ("estimate", "proposal"):
            monkeypatch.setattr(f"tinyunet.training.{module}.memory_at_hand", lambda: 650_000_000)
        done = command("plan", "--data-path", dataset, "--depth", 3, "--no-time")
        assert "time " not in done.out
        assert "16 filters" in done.out or "8 filters" in done.out

    def test_the_command_has_all_that_was_given(self, dataset):
        given = {
            "data_path": "with a blank",
            "modalities": ("FLAIR", "T2w"),
            "spacing": (1.0, 1.0, 5.0),
            "folds": 5,
            "deterministic": True,
            "depth": 2,
            "filters": 4,
        }
        data = read_dataset(dataset)
        settings = Settings(**given, ranks=2)
        plan = propose(data, survey(data), settings, {*given}, ranks_here=2)
        assert plan.work.batch_shape[0] == 1
        words = shlex.split(plan.command())
        assert words[:6] == ["mpirun", "-n", "2", "python", "-m", "tinyunet.train"]
        read = {
            name: value
            for name, value in vars(train.make_parser().parse_args(words[6:])).items()
            if name in given
        }
        read["spacing"] = from_words(read["spacing"])
        read["modalities"] = tuple(read["modalities"])
        assert read == given

    def test_a_patch_larger_than_a_volume(self, command, dataset):
        done = command("plan", "--data-path", dataset, "--patch-size", 32, "--no-time")
        assert "--patch-size: 32 x 32 x 32; expected at most 20 x 24 x 17" in done.error

    def test_what_does_not_fit_is_said(self, command, dataset, monkeypatch):
        for module in ("estimate", "proposal"):
            monkeypatch.setattr(f"tinyunet.training.{module}.memory_at_hand", lambda: 10**8)
        done = command("plan", "--data-path", dataset, *self.SMALL)
        assert "plan     voxels" in done.out
        assert "memory: the training takes about " in done.error

    def test_a_folder_without_data(self, command, tmp_path):
        assert (
            "neither a dataset.json nor a labelled BraTS case"
            in command("plan", "--data-path", tmp_path).error
        )


@pytest.mark.parametrize(
    ("spacing", "modalities", "expected"),
    [
        ((1.0, 1.0, 1.0), ["FLAIR", "T1w"], (171, 191, 155)),
        ((3.0, 3.0, 3.0), ["t1c"], (68, 74, 63)),
        ((1.0, 1.0, 1.0), ["CT"], (240, 240, 155)),
        (None, ["FLAIR"], (240, 240, 155)),
    ],
)
def test_of_a_head_the_brain_is_predicted(spacing, modalities, expected):
    assert estimate.predicted_shape((240, 240, 155), spacing, modalities) == expected


def test_training_that_cannot_fit_is_refused(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "memory_at_hand", lambda: 10**8)
    done = command("train", "--data-path", dataset, "--output", tmp_path / "runs", "--patch-size", 16)
    assert "memory: the training takes about " in done.error
    assert not (tmp_path / "runs").exists()
