"""A training that ends before its time, wherever that is, and goes on as if it had not."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import kills
import numpy as np
import pytest
import stopped_training
from launcher import launch, needs_mpi

from tinyunet import Adam, UNet
from tinyunet.common.archive import seal
from tinyunet.common.errors import ENDING
from tinyunet.compiler import measure
from tinyunet.compiler.passes import choose_algorithm
from tinyunet.segmentation import checkpoint
from tinyunet.training.folder import RunFolder
from tinyunet.training.loop import Trainer
from tinyunet.training.resume import find
from tinyunet.training.run import Run

# Three steps an epoch, of which the last has one patch; six steps in all.
SMALL = (
    *("--filters", "4", "--depth", "2", "--patch-size", "16"),
    *("--patches-per-case", "3", "--batch-size", "4", "--epochs", "2"),
)
STEPS = 6


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def train(command, dataset, monkeypatch):
    """Train in this process, with the data set, and perhaps be killed before a step or draw pictures."""

    def call(*arguments: object, killed_at: int = 0, draws: bool = False):
        unchanged = Trainer._step

        def step(self, batches):
            if self.optimizer.steps + 1 == killed_at:
                raise KilledError
            return unchanged(self, batches)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", step)
            if not draws:
                patch.setattr(Run, "_draw", lambda *_: None)
            return command("train", "--data-path", dataset, *arguments)

    return call


def run_of(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run that nothing happened to, for each way to train."""
    folders: dict[tuple[object, ...], Path] = {}

    def call(*more: str, ranks: int = 1) -> Path:
        if (more, ranks) not in folders:
            output = tmp_path_factory.mktemp("undisturbed")
            done = launch(stopped("killed", 0, 0, dataset, output, *more), ranks)
            assert done.returncode == 0, done.stderr
            folders[more, ranks] = run_of(output)
        return folders[more, ranks]

    return call


def training(dataset: Path, output: Path, *more: object) -> list[object]:
    return ["-m", "tinyunet.train", "--data-path", dataset, "--output", output, *SMALL, *more]


def stopped(how: str, rank: int, step: int, dataset: Path, output: Path, *more: object) -> list[object]:
    return [stopped_training.__file__, how, rank, step, *training(dataset, output, *more)[2:]]


def going_on(dataset: Path, folder: Path) -> list[object]:
    return [stopped_training.__file__, "killed", 0, 0, "--data-path", dataset, "--resume", folder]


def same(folder: Path, other: Path) -> bool:
    """Whether two runs have ended the same: best and latest checkpoint, history, test."""
    for name in ("latest.npz", "best.npz"):
        a, b = (checkpoint.load(run / name) for run in (folder, other))
        for group in ("model", "optimizer", "arrays"):
            arrays, others = getattr(a, group), getattr(b, group)
            assert arrays.keys() == others.keys()
            if not all(np.array_equal(arrays[key], others[key]) for key in arrays):
                return False
    histories = [json.loads((run / "history.json").read_text()) for run in (folder, other)]
    for entry in (entry for history in histories for entry in history):
        del entry["seconds"]
    tests = [(run / "test.json").read_text() for run in (folder, other)]
    return histories[0] == histories[1] and tests[0] == tests[1]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_it_goes_on_bit_for_bit(train, undisturbed, tmp_path, step):
    every = 1 + step % 2  # the checkpoint before the step, or the one before that
    arguments = ("--output", tmp_path, "--checkpoint-every", every)
    assert train(*SMALL, *arguments, killed_at=step).code == 1
    if step <= every:
        assert not any(tmp_path.iterdir())
    done = train("--resume", *([] if step > every else SMALL), *arguments)
    assert done.code == 0, done.err
    assert same(run_of(tmp_path), undisturbed())


@pytest.mark.parametrize("more", [("--eager",), ("--accumulate", "2")], ids=" ".join)
def test_so_it_does_in_every_way_to_train(train, undisturbed, tmp_path, more):
    arguments = ("--output", tmp_path)
    train(*SMALL, *more, *arguments, "--checkpoint-every", 1, killed_at=3)
    assert train("--resume", *arguments).code == 0
    assert same(run_of(tmp_path), undisturbed(*more))


@pytest.fixture(scope="module")
def killed(dataset, tmp_path_factory) -> Path:
    """The folder of a run killed before its fifth step, with a checkpoint of each before."""
    output = tmp_path_factory.mktemp("killed")
    done = launch(stopped("killed", 0, 5, dataset, output, "--checkpoint-every", 1))
    assert done.returncode == -signal.SIGKILL
    return run_of(output)


@pytest.fixture
def run_copy(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "runs" / killed.name))


def rewrite(path: Path, change: Callable[[checkpoint.Checkpoint], object]) -> None:
    """Write a checkpoint again, whole, but with something else in it."""
    found = checkpoint.load(path)
    change(found)
    header = {name: getattr(found, name) for name in ("config", "order", "random", "state")}
    members = {"header": np.array(json.dumps(header | {"format": checkpoint.FORMAT}))}
    for group, name in (("model", "model"), ("optimizer", "optimizer"), ("training", "arrays")):
        members |= {f"{group}/{key}": array for key, array in getattr(found, name).items()}
    np.savez(path, **members)
    with path.open("r+b") as file:
        seal(file)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.999, "one byte", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(train, undisturbed, run_copy, share):
    latest = run_copy / "latest.npz"
    content = bytearray(latest.read_bytes())
    if share == "flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[-1 if share == "one byte" else int(share * len(content)) :]
    latest.write_bytes(bytes(content))
    done = train("--resume", run_copy)
    assert done.code == 0, done.err
    refused = f"{latest}: damaged, or not a checkpoint (its checksum is wrong); using previous.npz"
    assert done.out.count(refused) == 1
    assert f"going on with {run_copy} after epoch 1" in done.out
    assert (run_copy / "damaged.npz").read_bytes() == bytes(content)
    assert same(run_copy, undisturbed())


def test_a_checkpoint_that_was_being_written_is_cleared_away(train, undisturbed, run_copy):
    # Killed between two names, and in the middle of a file.
    (run_copy / "latest.npz").rename(run_copy / ".4711-latest.npz")
    done = train("--resume", run_copy / "previous.npz")
    assert done.code == 0, done.err
    assert not list(run_copy.glob(".*"))
    assert same(run_copy, undisturbed())


def test_without_a_whole_checkpoint_nothing_is_begun(train, run_copy):
    for name in ("latest.npz", "previous.npz"):
        (run_copy / name).write_bytes((run_copy / name).read_bytes()[:-1])
    before = {path: path.read_bytes() for path in run_copy.iterdir()}
    done = train("--resume", run_copy)
    assert done.code == 2
    for name in ("latest.npz", "previous.npz"):
        assert f"{run_copy / name}: damaged" in done.error
    assert {path: path.read_bytes() for path in run_copy.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: found.state.pop("cases"), "not a checkpoint of a training, without cases"),
        (lambda found: found.state["settings"].update(colour=1), "not a checkpoint of a training"),
        (lambda found: found.arrays.clear(), "not a checkpoint of a training, without statistics"),
        (lambda found: found.optimizer.pop("m"), "its optimizer is of another kind or another"),
        (lambda found: found.config.update(filters=2), "holds another model than its config"),
    ],
)
def test_a_whole_checkpoint_that_cannot_be_used_is_refused_too(run_copy, change, told):
    rewrite(run_copy / "latest.npz", change)
    with RunFolder(run_copy.parent) as folder:
        resumed = find(str(run_copy), run_copy.parent, folder)
    assert resumed.latest.path.name == "previous.npz"
    assert f"{run_copy}/latest.npz: {told}" in resumed.notes[0]
    assert resumed.notes[0].endswith("; using previous.npz instead")
    assert (run_copy / "damaged.npz").exists()


WRONG = [
    ("epoch", -1),
    ("epoch", 2.0),
    ("epoch", 7),
    ("step", None),
    ("step", 10**30),
    ("sums", [1, 2, 3]),
    ("sums", [1, 2, 0, 0]),
    ("sums", [1, 2, "3", 4]),
    ("seconds", -1),
    ("seconds", [[]]),
    ("history", {}),
    ("history", []),
    ("history", [{"epoch": 1}]),
    ("validation", {"classes": {}}),
    ("validation", None),
    ("modalities", ["FLAIR"]),
    ("labels", ["a", "b", "c", "d"]),
    ("label_values", [0, 999, -5, 3]),
    ("label_values", [0, 1]),
    ("cases", {"training": [1]}),
    ("cases", []),
    ("algorithms", {"a": [1, 2]}),
    ("algorithms", [6, 6, 6]),
    ("algorithms", {"a": [10**6] * 3}),
    ("settings", None),
    ("settings", {"patch_size": 16}),
    ("settings", {"patch_size": [16, 16]}),
    ("settings", {"depth": 10**6}),
    ("settings", {"lr": "high"}),
    ("settings", {"lr": True}),
    ("settings", {"epochs": 1e9}),
    ("settings", {"allreduce": "x"}),
    ("settings", {"train_test_split": 1}),
    ("settings", {"data_path": ["a"]}),
    ("settings", {"filters": 8}),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_each_entry_of_a_wrong_kind_is_refused_in_one_line(run_copy, name, value):
    def change(found):
        changed = {**found.state["settings"], **value} if name == "settings" and value else value
        found.state[name] = changed

    rewrite(run_copy / "latest.npz", change)
    with RunFolder(run_copy.parent) as folder:
        resumed = find(str(run_copy), run_copy.parent, folder)
    assert resumed.latest.path.name == "previous.npz"
    (note,) = resumed.notes
    assert note.startswith(f"{run_copy}/latest.npz: ")
    assert "\n" not in note
    assert next(iter(value), name) in note if name == "settings" and value else name in note


@pytest.mark.parametrize("shape", [(1, 3), (0, 32), (32,), ()])
def test_statistics_of_another_model_are_refused(run_copy, shape):
    change = {"statistics": np.zeros(shape, np.float32)}
    rewrite(run_copy / "latest.npz", lambda found: found.arrays.update(change))
    with RunFolder(run_copy.parent) as folder:
        (note,) = find(str(run_copy), run_copy.parent, folder).notes
    assert "training/statistics: shape" in note


def test_a_strangers_run_writes_in_its_folder_only(train, run_copy, tmp_path):
    """Neither where its settings say, nor through links in the folder."""
    mine = [tmp_path / name for name in ("timeline", "history", "best", "previous", "test", "png")]
    for path in mine:
        path.write_text("mine")
    rewrite(
        run_copy / "latest.npz",
        lambda found: found.state["settings"].update(timeline=str(mine[0]), output="/elsewhere"),
    )
    links = ["history.json", "best.npz", "previous.npz", "test.json", "learning_curves.png"]
    for name, target in zip(links, mine[1:], strict=True):
        (run_copy / name).unlink(missing_ok=True)
        (run_copy / name).symlink_to(target)
    done = train("--resume", run_copy, draws=True)
    assert done.code == 0, done.err
    assert f"names a timeline, '{mine[0]}'; give --timeline for one" in done.out
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    assert not any((run_copy / name).is_symlink() for name in links)
    assert checkpoint.load(run_copy / "latest.npz").state["settings"]["timeline"] is None


def test_a_strangers_algorithms_are_taken_where_they_are_candidates_and_for_this_run_only(
    train, run_copy, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)  # so that there is something to measure
    monkeypatch.setattr(choose_algorithm, "_SMALL", 0)
    measure.remembered.cache_clear()
    assert train(*SMALL, "--epochs", "1", "--output", tmp_path / "own").code == 0
    (cache,) = (tmp_path / "cache").iterdir()
    keys, before = [*json.loads(cache.read_text())], cache.read_text()
    assert keys
    rewrite(
        run_copy / "latest.npz",
        lambda found: found.state["algorithms"].update({key: [6, 6, 6] for key in keys}),
    )
    done = train("--resume", run_copy)
    assert done.code == 0, done.err
    assert cache.read_text() == before
    assert [6, 6, 6] not in measure.remembered().values()
    measure.use({})
    measure.remembered.cache_clear()


def test_a_best_checkpoint_of_another_model_is_left_out(run_copy):
    model = UNet(filters=2, depth=2)
    best = checkpoint.load(run_copy / "best.npz")
    optimizer = Adam(model.parameters())
    checkpoint.save(run_copy / "best.npz", model, optimizer, best.state, best.arrays)
    with RunFolder(run_copy.parent) as folder:
        resumed = find(str(run_copy), run_copy.parent, folder)
    assert resumed.best.path.name == "latest.npz"
    told = f"{run_copy}/best.npz: of another model than latest.npz; using latest.npz instead"
    assert resumed.notes == [told]


def test_nothing_is_read_or_renamed_while_another_process_trains_in_the_folder(train, run_copy):
    (run_copy / "latest.npz").write_bytes(b"")
    before = {path: path.read_bytes() for path in run_copy.iterdir()}
    with RunFolder(run_copy.parent) as other:
        other.go_on(run_copy)
        other.hold()
        done = train("--resume", run_copy)
    assert done.code == 2
    assert f"{run_copy}: another process trains here; wait until it has ended" in done.error
    assert {path: path.read_bytes() for path in run_copy.iterdir()} == before


def test_a_best_checkpoint_that_is_damaged_is_told(train, run_copy):
    (run_copy / "best.npz").write_bytes(b"")
    done = train("--resume", run_copy)
    assert done.code == 0
    assert f"{run_copy}/best.npz: damaged, or not a checkpoint" in done.out
    # The next epoch is the best of those that are known.
    assert checkpoint.load(run_copy / "best.npz").state["epoch"] == 2
    assert json.loads((run_copy / "test.json").read_text())["epoch"] == 2


def test_where_the_best_is_lost_and_no_epoch_is_left_the_last_is_taken(train, undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed(), tmp_path / "run"))
    (folder / "best.npz").write_bytes(b"")
    done = train("--resume", folder)
    assert done.code == 0, done.err
    best, latest = (checkpoint.load(folder / name) for name in ("best.npz", "latest.npz"))
    assert all(np.array_equal(best.model[name], latest.model[name]) for name in latest.model)
    assert json.loads((folder / "test.json").read_text())["epoch"] == 2


def test_the_latest_may_be_missing_where_the_one_before_is_there(train, undisturbed, run_copy):
    (run_copy / "latest.npz").unlink()
    done = train("--resume", run_copy / "latest.npz")
    assert done.code == 0, done.err
    assert same(run_copy, undisturbed())


@needs_mpi
def test_any_rank_that_is_ended_at_once_names_the_checkpoint(dataset, tmp_path):
    how = stopped("terminated twice", 1, 4, dataset, tmp_path, "--checkpoint-every", 2)
    done = launch(how, 2)
    folder = run_of(tmp_path)
    assert (folder / "latest.npz").exists()
    assert f"terminated; {folder}/latest.npz holds epoch 1; go on" in done.stderr


def test_a_run_that_has_ended_is_tested_again(train, undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed(), tmp_path / "run"))
    (folder / "test.json").unlink()
    done = train("--resume", folder)
    assert done.code == 0
    assert same(folder, undisturbed())


def test_with_nothing_to_resume_a_run_is_begun(train, tmp_path):
    done = train(*SMALL, "--epochs", 1, "--output", tmp_path, "--resume")
    assert done.code == 0, done.err
    assert (run_of(tmp_path) / "latest.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lr", "0.5"], "--lr: 0.5; the run that is resumed has 0.002, and keeps it"),
        (["--epochs", "9"], "--epochs: 9; the run that is resumed has 2, and keeps it"),
        (["--patch-size", "8"], "--patch-size: (8, 8, 8); the run that is resumed has (16, 16,"),
    ],
)
def test_a_run_keeps_its_settings(train, run_copy, arguments, told):
    done = train("--resume", run_copy, *arguments)
    assert done.code == 2
    assert done.error.startswith(f"tinyunet.train: {told}")


def test_buckets_keep_their_size_with_compression(train, tmp_path):
    more = ("--compression", "bf16", "--bucket-mb", 1, "--checkpoint-every", 1)
    train(*SMALL, *more, "--output", tmp_path, killed_at=3)
    done = train("--resume", run_of(tmp_path), "--bucket-mb", 2)
    assert done.code == 2
    assert "--bucket-mb: 2.0; the run that is resumed has 1.0, and keeps it" in done.error
    assert train("--resume", run_of(tmp_path), "--bucket-mb", 1).code == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
def test_the_same_command_goes_on(dataset, tmp_path, undisturbed, ranks):
    more = ("--scale-lr", "--no-sync-batch-norm", "--lr", "0.001")
    first = launch(stopped("terminated", 0, 4, dataset, tmp_path, *more, "--resume"), ranks)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    again = training(dataset, tmp_path, *more, "--resume")
    refused = launch([*again, "--timeline", tmp_path], ranks)
    assert refused.returncode == 2
    assert f"--timeline: {tmp_path}; expected a file" in refused.stderr
    done = launch(again, ranks)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stdout
    assert same(run_of(tmp_path), undisturbed(*more, ranks=ranks))


def test_other_data_are_refused(command, copy, run_copy):
    description = json.loads((copy / "dataset.json").read_text())
    description["training"] = description["training"][:-1]
    (copy / "dataset.json").write_text(json.dumps(description))
    done = command("train", "--data-path", copy, "--resume", run_copy)
    assert done.code == 2
    assert "--resume: other cases for" in done.error
    assert "expected the same data" in done.error


@pytest.mark.parametrize(
    ("where", "told"), [("absent", "absent: no such run or checkpoint"), (".", "latest.npz: No such file")]
)
def test_a_run_that_is_none_is_told(train, tmp_path, monkeypatch, where, told):
    monkeypatch.chdir(tmp_path)
    done = train("--resume", where)
    assert done.code == 2
    assert told in done.error


@pytest.mark.parametrize(("how", "code"), [(word, 128 + number) for number, word in ENDING.items()])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
def test_a_signal_to_one_rank_saves_a_checkpoint_and_ends_all(
    dataset, tmp_path, train, undisturbed, how, code, ranks
):
    done = launch(stopped(how, ranks - 1, 5, dataset, tmp_path), ranks)
    assert done.returncode == code
    folder = run_of(tmp_path)
    assert done.stderr == (
        f"tinyunet.train: {how}; {folder}/latest.npz holds epoch 2, step 2; go on with --resume {folder}\n"
    )
    if ranks == 1:
        assert train("--resume", folder).code == 0
        assert same(folder, undisturbed())


def test_a_signal_during_validation_saves_a_checkpoint_too(train, undisturbed, tmp_path, monkeypatch):
    def asked(model, image, *_, **__):
        signal.raise_signal(signal.SIGTERM)
        return np.zeros(image.shape[:3], np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr("tinyunet.training.validate.segment", asked)
        done = train(*SMALL, "--output", tmp_path)
    assert done.code == 128 + signal.SIGTERM
    assert "holds epoch 1, step 3; go on with --resume" in done.error
    assert checkpoint.load(run_of(tmp_path) / "latest.npz").state["seconds"] > 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [
        signal.SIG_IGN  # or a second one would change the exit code while Python and MPI end
    ] * 2
    assert train("--resume", run_of(tmp_path)).code == 0
    assert same(run_of(tmp_path), undisturbed())


@needs_mpi
@pytest.mark.parametrize("more", [(), ("--no-sync-batch-norm",), ("--compression", "bf16")], ids=" ".join)
def test_two_ranks_go_on_bit_for_bit(dataset, tmp_path, undisturbed, more):
    done = launch(stopped("killed", 1, 6, dataset, tmp_path, "--checkpoint-every", 2, *more), 2)
    assert done.returncode != 0
    assert re.search(r"tinyunet\.train: rank 1 \(process \d+ on \S+\) was killed", done.stderr)
    folder = run_of(tmp_path)
    done = launch(going_on(dataset, folder), 2)
    assert done.returncode == 0, done.stderr
    assert "after epoch 2, step 1" in done.stdout
    assert same(folder, undisturbed(*more, ranks=2))


@needs_mpi
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (4, 1)])
def test_another_number_of_ranks_goes_on_up_to_rounding(dataset, tmp_path, undisturbed, before, after):
    # Eager: the compiled graph takes other algorithms for other batches, which round otherwise.
    more = ("--sync-batch-norm", "--eager")
    assert launch(stopped("terminated", before - 1, 4, dataset, tmp_path, *more), before).returncode
    folder = run_of(tmp_path)
    done = launch(going_on(dataset, folder), after)
    assert done.returncode == 0, done.stderr
    ours, expected = (checkpoint.load(run / "latest.npz") for run in (folder, undisturbed(*more)))
    assert ours.optimizer["steps"] == expected.optimizer["steps"] == STEPS
    for name, array in expected.model.items():
        scale = max(np.abs(array).max(), 0.01)
        assert np.abs(ours.model[name] - array).max() < 1e-4 * scale, name


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
def test_killed_again_and_again_at_any_time(ranks):
    assert kills.compare(kills=2, ranks=ranks, seed=ranks, steps=40) > 0
