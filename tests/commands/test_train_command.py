"""``python -m tinyunet.train``: what a run leaves, and what it says when it cannot run."""

import fcntl
import importlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from launcher import MPIRUN, launch, needs_mpi
from matplotlib.figure import Figure
from small_runs import SMALL, SPOILT, brats_case, image_of, labels_of, nan, rewrite, strange_label

from tinyunet import losses
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.patients import split
from tinyunet.optim import Adam
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.scores import overall
from tinyunet.training import start

FILES = [
    "best.npz",
    "config.json",
    "history.json",
    "latest.npz",
    "learning_curves.png",
    "metrics.jsonl",
    "predictions.png",
    "previous.npz",
    "report.html",
    "test.json",
]
REGIONS = ["whole tumour", "tumour core", "enhancing"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_leaves_everything_in_its_folder(trained, dataset):
    assert names(trained) == FILES
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", trained.name)
    for name in ("learning_curves.png", "predictions.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")

    history = json.loads((trained / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert all(np.isfinite(entry["loss"]) for entry in history)
    assert list(history[0]["validation"]["regions"]) == REGIONS

    _, _, test_cases = split(read_dataset(dataset).cases)
    test = json.loads((trained / "test.json").read_text())
    assert list(test["cases"]) == [case.name for case in test_cases]
    assert list(test["regions"]) == REGIONS
    for group in ("classes", "regions"):
        for name, dice in test[group].items():
            of_cases = [case[group][name] for case in test["cases"].values()]
            assert dice == pytest.approx(np.mean(of_cases))

    latest = checkpoint.load(trained / "latest.npz")
    assert latest.state["epoch"] == 2
    best = checkpoint.load(trained / "best.npz")
    scores = [overall(entry["validation"]) for entry in history]
    assert best.state["epoch"] == test["epoch"] == 1 + int(np.argmax(scores))
    assert best.make_model().config["filters"] == 4


def test_the_screen_shows_plan_epochs_and_table(command, dataset, tmp_path):
    done = command("train", "--data-path", dataset, "--output", tmp_path / "runs", *SMALL)
    assert done.code == 0
    assert "3 cases to train on, 1 to validate on, 1 to test on" in done.out
    lines = re.split(r"[\r\n]", done.out)
    assert any(re.match(r"epoch +loss +Dice +validation: +whole tumour", line) for line in lines)
    assert any(re.fullmatch(r" +1 +\d\.\d{3} .* best", line) for line in lines)
    table = done.out[done.out.index("case ") :].splitlines()
    assert len({len(line) for line in table[:3]}) == 1, "columns are not aligned"
    assert done.err == ""
    (bar,) = [line for line in lines if "3/3" in line][-1:]
    for figure in ("epoch 1/1 100%", "vol/s", "loss", "Dice"):
        assert figure in bar


def test_another_norm_is_trained_remembered_and_kept(command, dataset, tmp_path):
    done = command("train", "--data-path", dataset, "--output", tmp_path, *SMALL, "--norm", "instance")
    assert done.code == 0
    (folder,) = tmp_path.iterdir()
    assert checkpoint.load(folder / "best.npz").make_model().config["norm"] == "instance"
    assert command("train", "--resume", folder).code == 0
    done = command("train", "--resume", folder, "--norm", "batch")
    assert done.code == 2
    assert "--norm: batch; the run that is resumed has instance, and keeps it" in done.error
    done = command("predict", folder / "best.npz", image_of(dataset), "-o", tmp_path / "predictions")
    assert done.code == 0


@needs_mpi
def test_every_rank_says_which_kernels_it_runs(dataset, tmp_path):
    options = ("--data-path", dataset, "--output", tmp_path, *SMALL)
    done = launch(["-m", "tinyunet.train", *options], 2, TINYUNET_VERBOSE="1")
    assert done.returncode == 0, done.stderr
    assert "tinyunet: rank" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("tinyunet: ")]
    # The launcher may put a line of one rank into that of another.
    whole = [line for line in lines if line.count("tinyunet: rank ") == 1]
    assert len(whole) > 0.9 * len(lines)
    assert len({line.index(" ms ") for line in whole}) == 1
    packed = {line.split()[2] for line in whole if " pack_weights " in line}
    assert packed == {"0", "1"}  # they share the work


def test_two_runs_of_one_second_do_not_meet(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    for _ in range(2):
        arguments = ("--data-path", dataset, "--output", tmp_path / "runs", *SMALL)
        assert command("train", *arguments).code == 0
    assert names(tmp_path / "runs") == ["now", "now-2"]


def test_a_run_repeats_bit_for_bit(command, dataset, trained, tmp_path):
    output = tmp_path / "runs"
    command("train", "--data-path", dataset, "--output", output, *SMALL, "--epochs", 2)
    (folder,) = output.iterdir()
    once, again = (checkpoint.load(run / "latest.npz").model for run in (trained, folder))
    for name, array in once.items():
        np.testing.assert_array_equal(array, again[name])


@pytest.mark.parametrize(("spoil", "told"), SPOILT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_file_ends_the_run_with_one_line_that_names_it(command, copy, tmp_path, spoil, told):
    path = spoil(copy)
    done = command("train", "--data-path", copy, "--output", tmp_path / "runs", *SMALL)
    assert done.code == 2
    assert re.fullmatch(rf"tinyunet\.train: {re.escape(str(path))}: .*{told}.*", done.error)
    assert not any((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--epochs", "0"], "--epochs: '0'; expected a whole number of at least 1"),
        (["--epochs", "many"], "--epochs: 'many'; expected a whole number of at least 1"),
        (["--batch-size", "-1"], "--batch-size: '-1'; expected a whole number of at least 1"),
        (["--filters", "1.5"], "--filters: '1.5'; expected a whole number of at least 1"),
        (["--lr", "0"], "--lr: '0'; expected a number above 0"),
        (["--lr", "nan"], "--lr: 'nan'; expected a number above 0"),
        (["--warmup-epochs", "1e308"], "--warmup-epochs: '1e308'; expected a number above 0 and"),
        (["--train-test-split", "1"], "--train-test-split: '1'; expected a number above 0 and bel"),
        (["--validate-test-split", "x"], "--validate-test-split: 'x'; expected a number above 0"),
        (["--random-seed", "-3"], "--random-seed: '-3'; expected a whole number of at least 0"),
        (["--patch-size", "16", "16"], "--patch-size: 2 numbers; expected 1 or 3"),
        (["--patch-size", "15"], "--patch-size: 15 voxels are halved 4 times; expected at least 16"),
        (["--threads", "1000"], "--threads: 1000; expected at most"),
        (["--data-path", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--data-path", ""], "--data-path: ''; expected a folder, or no --data-path for phantoms"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(command, arguments, told):
    done = command("train", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.error.startswith(f"tinyunet.train: {told}")


def test_a_patch_larger_than_a_volume_is_told(command, dataset, tmp_path):
    done = command("train", "--data-path", dataset, "--output", tmp_path, *SMALL, "--patch-size", 20, 24, 18)
    assert done.code == 2
    assert "the patch of 20 x 24 x 18 voxels is larger than the volume of 20 x 24 x 17" in done.error
    assert not any(tmp_path.glob("*"))


def test_too_few_cases_are_told(command, copy, tmp_path):
    description = json.loads((copy / "dataset.json").read_text())
    description["training"] = description["training"][:1]
    (copy / "dataset.json").write_text(json.dumps(description))
    done = command("train", "--data-path", copy, "--output", tmp_path / "runs", *SMALL)
    assert done.code == 2
    assert "1 labelled case of 1 patient; expected at least 2 patients" in done.error


def test_a_loss_that_is_no_number_ends_the_run(command, dataset, tmp_path, monkeypatch):
    def diverged(logits, labels, from_logits):
        return losses.dice_cross_entropy(logits, labels, from_logits=from_logits) * float("inf")

    monkeypatch.setattr("tinyunet.training.step.dice_cross_entropy", diverged)
    done = command("train", "--data-path", dataset, "--output", tmp_path, *SMALL)
    assert done.code == 2
    assert done.error.endswith("the loss is inf in epoch 1, step 1; try a smaller --lr")
    assert names(tmp_path) == []


def test_what_the_last_step_made_is_looked_at_before_it_is_kept(command, dataset, tmp_path, monkeypatch):
    def step(self):
        self.flat_parameters[-1] = np.inf

    monkeypatch.setattr("tinyunet.optim.Adam.step", step)
    arguments = (*SMALL, "--epochs", 1, "--batch-size", 6)
    done = command("train", "--data-path", dataset, "--output", tmp_path, *arguments)
    assert done.code == 2
    assert done.error.endswith("a parameter is no number any more in epoch 1, step 1; try a smaller --lr")
    assert names(tmp_path) == []


@needs_mpi
def test_what_one_rank_alone_cannot_do_ends_all(dataset, tmp_path):
    training = [sys.executable, "-m", "tinyunet.train", "--data-path", dataset, *SMALL]
    training += ["--output", tmp_path, "--threads", 1]
    command = [MPIRUN, "-n", 1, *training, ":", "-n", 1, *training, "--threads", 9999]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("tinyunet.train: --threads: 9999; expected at most") == 1


def test_help_explains_every_option(command):
    done = command("train", "--help")
    assert done.code == 0
    assert done.err == ""
    options = (
        "--data-path --epochs --batch-size --patch-size --filters --use-upsampling --lr --depth "
        "--train-test-split --validate-test-split --random-seed --patches-per-case --threads "
        "--output --eager --accuracy --norm"
    )
    for option in options.split():
        assert re.search(rf"^  {option} .*\n? .*\w", done.out, re.MULTILINE), option


def test_a_full_disk_leaves_nothing_half_written(command, dataset, trained, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A checkpoint is larger than this; kernels have been compiled and kept by the other run.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = command("train", "--data-path", dataset, "--output", tmp_path / "runs", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 2
    assert re.fullmatch(rf"tinyunet\.train: {tmp_path}/runs/\S+/best\.npz: File too large", done.error)
    assert names(tmp_path / "runs") == []


def test_a_disk_too_small_is_told_before_the_training(command, dataset, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    done = command("train", "--data-path", dataset, "--output", tmp_path / "runs", *SMALL)
    assert done.code == 2
    assert re.search(r"runs: 0.1 MB left on this disk; a run takes [0-9.]+ MB", done.error)


def test_an_output_that_is_a_file_is_told(command, dataset, tmp_path):
    (tmp_path / "runs").write_text("")
    done = command("train", "--data-path", dataset, "--output", tmp_path / "runs", *SMALL)
    assert done.code == 2
    assert done.error == f"tinyunet.train: {tmp_path}/runs: File exists"


def arguments(dataset: Path, output: Path, *more: object) -> list[object]:
    return ["-m", "tinyunet.train", "--data-path", dataset, "--output", output, *SMALL, *more]


def test_brats_folders_are_trained_on(command, dataset, tmp_path):
    for number in range(3):
        brats_case(dataset, number, tmp_path / "data" / "HGG" / f"BraTS_{number}")
    output = tmp_path / "runs"
    done = command("train", "--data-path", tmp_path / "data", "--output", output, *SMALL)
    assert done.code == 0, done.err
    (folder,) = output.iterdir()
    assert checkpoint.load(folder / "best.npz").state["label_values"] == [0, 2, 1, 4]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_write_one_run(dataset, trained, tmp_path, ranks):
    done = launch(arguments(dataset, tmp_path, "--epochs", 2), ranks)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert names(folder) == FILES
    assert done.stdout.count("everything is in") == 1
    assert f"{ranks} ranks of" in done.stdout
    # The same patches in the same steps, whatever the number of ranks.
    once, again = (checkpoint.load(run / "latest.npz") for run in (trained, folder))
    assert once.optimizer["steps"] == again.optimizer["steps"] == 2
    losses = [json.loads((run / "history.json").read_text())[0]["loss"] for run in (trained, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@needs_mpi
@pytest.mark.parametrize("spoil", [nan, strange_label])
def test_a_file_that_one_rank_reads_ends_all(copy, tmp_path, spoil):
    path = spoil(copy)
    start = time.monotonic()
    done = launch(arguments(copy, tmp_path / "runs", "--epochs", 100), 3)
    assert done.returncode == 2
    assert time.monotonic() - start < 60
    assert done.stderr.count(f"tinyunet.train: {path}: ") == 1
    assert "Traceback" not in done.stderr
    assert "Abort" not in done.stderr


@pytest.mark.parametrize("broken", ["matplotlib", "savefig", "disk"])
def test_a_picture_that_fails_costs_no_result(dataset, tmp_path, monkeypatch, command, broken):
    def fail(figure, path, **_):
        raise OSError(28, "No space left") if broken == "disk" else RuntimeError("no\nfont")

    if broken == "matplotlib":
        monkeypatch.setitem(sys.modules, "tinyunet.viz.volumes", None)
    monkeypatch.setattr(Figure, "savefig", fail)
    done = command("train", *arguments(dataset, tmp_path)[2:])
    assert done.code == 0
    (folder,) = tmp_path.iterdir()
    assert done.out.index("Dice on ") < done.out.index(f"everything is in {folder}")
    assert names(folder) == [name for name in FILES if ".png" not in name and name != "previous.npz"]
    reason = {"savefig": "RuntimeError: no font", "disk": "No space left"}
    assert done.err.splitlines() == [
        f"tinyunet: could not draw {folder}/{picture}: {reason[broken]}"
        for picture in ("learning_curves.png", "predictions.png")
        if broken != "matplotlib"
    ] or done.err.startswith("tinyunet: could not draw pictures: ModuleNotFoundError: ")


def test_names_from_strangers_are_shown_as_text(copy, tmp_path, command):
    """Of folders, files, sequences and classes: bytes that are no UTF-8, escape sequences, line ends."""
    hostile = [os.fsdecode(b"M\xfcller"), "a\nforged", "b\x1b[2J", "c\rforged", "d\u202e\x9b1m"]
    folder = Path(copy.rename(copy.with_name(os.fsdecode(b"\x1b[31mlat\xecn"))))
    description = json.loads((folder / "dataset.json").read_text())
    for name, entry in zip(hostile, description["training"], strict=True):
        for kind in ("image", "label"):
            old = folder / entry[kind]
            entry[kind] = str(old.rename(old.with_name(f"{name}.nii.gz")).relative_to(folder))
    description["labels"] = dict(zip("0123", ["background", *hostile[1:4]], strict=True))
    description["modality"] = dict(zip("0123", hostile[:4], strict=True))
    (folder / "dataset.json").write_text(json.dumps(description))
    runs = tmp_path / "runs"
    (image,), (labels,) = (folder.glob(f"{kind}Tr/a*") for kind in ("images", "labels"))
    done = [command("train", *arguments(folder, runs)[2:])]
    (run,) = runs.iterdir()
    done += [
        command("predict", run / "best.npz", *folder.glob("imagesTr/*"), "-o", tmp_path / "found"),
        command("evaluate", tmp_path / "found", folder / "labelsTr"),
        command("predict", run / "best.npz", labels, "-o", tmp_path / "none"),
        command("evaluate", image, labels),
    ]
    assert [one.code for one in done] == [0, 0, 0, 2, 2], done
    assert done[0].err == ""
    assert {"learning_curves.png", "predictions.png"} <= {*names(run)}
    for text in (one.out + one.err for one in done):
        assert not [c for c in text if not c.isprintable() and c not in "\n\r"]
        assert not re.search(r"[\n\r]forged", text)
        assert r"a\nforged" in text


@pytest.mark.parametrize(("told", "epochs"), [(True, 100_000), (False, 8)])
def test_a_training_whose_terminal_is_closed_leaves_a_checkpoint_or_goes_on(dataset, tmp_path, told, epochs):
    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if not told:  # as in the background, or under nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments(dataset, tmp_path, "--epochs", epochs))],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(its)
    try:
        shown = b""
        while not re.search(rb"\b2  \d\.", shown):  # the second epoch has ended
            shown += os.read(ours, 1000)
        os.close(ours)
        assert process.wait(timeout=60) == (128 + signal.SIGHUP if told else 0)
    finally:
        process.kill()
    (folder,) = tmp_path.iterdir()
    assert checkpoint.load(folder / "latest.npz").state["epoch"] >= 2
    assert (folder / "test.json").exists() == (not told)


@needs_mpi
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--epochs", "0"], "--epochs: '0'; expected a whole number of at least 1 (see --help)"),
        (["--batch-size", "3"], "--batch-size: 3 patches cannot be shared by 2 ranks; expected"),
        (["--data-path", "absent"], "absent: no such folder"),
    ],
)
def test_ranks_tell_an_error_once(dataset, tmp_path, more, told):
    done = launch(arguments(dataset, tmp_path, *more), 2)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"tinyunet.train: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
def test_ctrl_c_ends_with_one_line_that_tells_what_is_left(dataset, tmp_path, ranks):
    command = [sys.executable, *map(str, arguments(dataset, tmp_path, "--epochs", 100_000))]
    launcher = [str(MPIRUN), "-n", str(ranks)] if ranks > 1 else []
    process = subprocess.Popen(launcher + command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if re.search(r"\b2  \d\.", line):  # the second epoch has ended
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (130 if ranks == 1 else process.returncode) != 0
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if "interrupted" in line]
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(
        rf"tinyunet\.train: interrupted; {folder}/latest\.npz holds epoch \d+(, step \d+)?; "
        rf"go on with --resume {folder}",
        line,
    )
    # What is there is whole.
    assert checkpoint.load(folder / "latest.npz").state["epoch"] >= 2
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


LABELS_OF_PHANTOMS = "1 edema, 2 non-enhancing tumor, 3 enhancing tumour (dataset.json)"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
def test_what_is_odd_about_the_data_is_told_once(copy, tmp_path, ranks):
    """The fifth case has voxels of another size; the second lacks a sequence, and is refused at first."""
    around = rewrite(image_of(copy, 0), lambda image: np.where(image.any(-1, keepdims=True), image, -1))
    absent = rewrite(image_of(copy, 1), lambda image: image * np.array([1, 1, 0, 1], image.dtype))
    for of in (image_of, labels_of):
        old = nibabel.load(of(copy, 4))
        affine = old.affine @ np.diag([1, 1, 1.5, 1])
        nibabel.save(nibabel.Nifti1Image(np.asarray(old.dataobj), affine), of(copy, 4))
    done = launch(arguments(copy, tmp_path / "runs"), ranks)
    assert done.returncode == 2
    assert f"{absent}: sequence 3: is 0 everywhere, as if it was absent; --allow-missing lets" in done.stderr
    done = launch([*arguments(copy, tmp_path / "runs"), "--allow-missing"], ranks)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert sorted(warnings) == [
        f"warning: {around}: sequence 1, 2, 3, 4: background is -1, not 0; it is left out",
        f"warning: {absent}: sequence 3: is 0 everywhere, as if it was absent",
    ]
    assert "voxels of 9.06 x 9.06 x 9.06 mm; 1 case is resampled to it" in done.stdout
    assert done.stdout.count(f"labels read as: {LABELS_OF_PHANTOMS}") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    state = checkpoint.load(folder / "best.npz").state
    assert state["spacing"] == pytest.approx([9.06] * 3, abs=0.01)
    assert state["labels_source"] == "dataset.json"


def test_nothing_is_odd_about_phantoms(command, dataset, tmp_path):
    done = command("train", "--data-path", dataset, "--output", tmp_path, *SMALL)
    assert "warning" not in done.out
    assert f"labels read as: {LABELS_OF_PHANTOMS}" in done.out


def test_many_odd_files_are_not_all_named(copy, command, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_WARNINGS", 3)
    for number in range(5):
        rewrite(image_of(copy, number), lambda image: image + image.dtype.type(9))
    done = command("train", "--data-path", copy, "--output", tmp_path, *SMALL)
    assert done.out.count("background is 9, not 0") == 3
    assert "warning: and 2 files more of this kind" in done.out


def test_classes_without_a_meaning_have_no_regions(copy, command, tmp_path):
    description = json.loads((copy / "dataset.json").read_text())
    names = ["background", "label_1", "label_2", "label_3"]
    description["labels"] = dict(enumerate(names))
    (copy / "dataset.json").write_text(json.dumps(description))
    done = command("train", "--data-path", copy, "--output", tmp_path / "runs", *SMALL, "--epochs", 2)
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    test = json.loads((folder / "test.json").read_text())
    assert (list(test["classes"]), test["regions"]) == (names[1:], {})
    history = json.loads((folder / "history.json").read_text())
    scores = [np.mean(list(entry["validation"]["classes"].values())) for entry in history]
    assert test["epoch"] == 1 + int(np.argmax(scores))
    # The user may say what they are.
    told = ("--labels", "brats2023")
    done = command("train", "--data-path", copy, "--output", tmp_path / "told", *SMALL, *told)
    assert "1 necrotic core, 2 edema, 3 enhancing tumour (--labels brats2023)" in done.out
    (folder,) = (tmp_path / "told").iterdir()
    assert list(json.loads((folder / "test.json").read_text())["regions"]) == REGIONS
    # The numbers stand for other classes than in the run: it is not gone on with.
    again = checkpoint.load(folder / "latest.npz")
    state = again.state | {"label_values": [0, 1, 2, 3]}
    model = again.make_model()
    optimizer = Adam(model.parameters())
    again.load_optimizer(model, optimizer)
    checkpoint.save(folder / "latest.npz", model, optimizer, state, again.arrays)
    done = command("train", "--resume", folder)
    assert done.code == 2
    assert "--resume: other label_values than the run has ([0, 2, 1, 3], not [0, 1, 2, 3])" in done.error


def test_a_timeline_does_not_replace_the_file_of_someone_else(command, dataset, tmp_path):
    file = tmp_path / "trace.json"
    file.write_text("{}")
    options = ("--output", tmp_path / "runs", *SMALL, "--timeline", file)
    done = command("train", "--data-path", dataset, *options)
    assert done.code == 2
    assert f"--timeline: {file} is there already, and this program did not write it" in done.error
    file.unlink()
    for _ in range(2):
        assert command("train", "--data-path", dataset, *options).code == 0


@pytest.mark.parametrize("options", [(), ("--deterministic",)])
def test_deterministic_reaches_all_that_is_compiled(command, dataset, tmp_path, monkeypatch, options):
    """Training, validation, test and prediction choose algorithms without the clock, or with it."""
    passes = importlib.import_module("tinyunet.compiler.passes.choose_algorithm")
    choose, seen = passes._choose, set()

    def watched(node, graph, given):
        seen.add((bool(graph.gradients), given.deterministic))
        return choose(node, graph, given)

    monkeypatch.setattr(passes, "_choose", watched)
    # What a training will take is estimated without running anything, and so without the clock.
    monkeypatch.setattr("tinyunet.training.estimate.memory", lambda work: {"": 1})
    output = tmp_path / "runs"
    done = command("train", "--data-path", dataset, "--output", output, *SMALL, *options)
    assert done.code == 0, done.err
    wanted = bool(options)
    assert seen == {(True, wanted), (False, wanted)}
    (folder,) = output.iterdir()
    saved = checkpoint.load(folder / "best.npz")
    assert saved.state["settings"]["deterministic"] is wanted
    done = command("train", "--resume", folder)
    assert done.code == 0, done.err
    assert {deterministic for _, deterministic in seen} == {wanted}
    seen.clear()
    image = next((dataset / "imagesTr").iterdir())
    done = command("predict", folder / "best.npz", image, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert seen == {(False, wanted)}
