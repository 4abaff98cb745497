"""Where a training goes on: which checkpoint, and with which settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import UserError, said
from tinyunet.common.schema import by_name, each, number, optional, record, text, whole
from tinyunet.data.cases import Dataset
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError
from tinyunet.training.folder import BEST, DAMAGED, LATEST, PREVIOUS, RunFolder
from tinyunet.training.settings import RULES, Settings
from tinyunet.unet import UNet

# What may be other than in the run that is resumed: where things are, and what changes no result.
_FREE = {"data_path", "output", "bucket_mb", "allreduce", "timeline", "checkpoint_every", "stall_warning"}
_DICE = by_name(number(0, 1))
_SCORES = record({"classes": _DICE, "regions": _DICE})
_EPOCH = record(
    {
        "epoch": whole(1),
        "loss": number(),
        "dice": number(),
        "validation": _SCORES,
        "lr": number(0),
        "seconds": number(0),
    }
)
# What a training takes of a checkpoint's state to go on.
_STATE = {
    "epoch": whole(),
    "step": whole(),
    "sums": each(number(-1e15, 1e15), 4, 4),
    "seconds": number(0),
    "history": each(_EPOCH),
    "validation": optional(_SCORES),
    "modalities": each(text),
    "labels": each(text),
    "label_values": each(whole(0, 255)),
    "cases": record(dict.fromkeys(("training", "validation", "test"), each(text))),
    "algorithms": by_name(optional(each(whole(1, 16), 3, 3))),
    "settings": record({}, RULES),
}


class Resumed(NamedTuple):
    """A run that goes on.

    Attributes
    ----------
    folder : Path
        Its folder.
    latest : Checkpoint
        Where it goes on.
    best : Checkpoint
        The best so far.
    notes : list of str
        What a person should know: checkpoints that were refused.
    """

    folder: Path
    latest: Checkpoint
    best: Checkpoint
    notes: list[str]


def find(where: str, output: Path | str, run: RunFolder) -> Resumed | None:
    """Find the checkpoint to go on from, in a folder that no other process trains in any more.

    Parameters
    ----------
    where : str
        Folder of a run, or a checkpoint in it; empty for the latest run.
    output : Path or str
        Where runs are.
    run : RunFolder
        Becomes the folder that is found, and holds it.

    Returns
    -------
    Resumed or None
        None if the latest run was asked for, and there is none.

    Raises
    ------
    UserError
        If there is no such run, another process trains in it, or none of its checkpoints can be used.
    """
    path = Path(where) if where else _newest(Path(output))
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    names = [LATEST, PREVIOUS] if path.is_dir() or path.name == LATEST else [path.name]
    if not path.exists() and not (folder / names[-1]).exists():
        raise UserError(f"--resume: {path}: no such run or checkpoint")
    # Before anything is read: another process may be writing the next checkpoint, its last one.
    run.go_on(folder)
    run.hold()
    latest, notes = _first_whole([folder / name for name in names])
    if notes:
        # Out of the way, or the next checkpoint would make it the previous one.
        _rename(folder / LATEST, folder / DAMAGED)
    # Before the end of the first epoch there is no best one.
    best, more = _first_whole([path for path in [folder / BEST] if path.exists()], latest)
    return Resumed(folder, latest, best, notes + more)


def begin(
    given: Mapping[str, Any], resume: str | None, folder: RunFolder, communicator: Communicator
) -> tuple[Settings, Resumed | None]:
    """Return the settings of a new run or of one that goes on, as rank 0 finds them, on every rank.

    Parameters
    ----------
    given : mapping
        Settings that were given.
    resume : str or None
        As for :func:`find`; None begins a new run.
    folder : RunFolder
        Becomes that of the run that goes on; rank 0 holds it.
    communicator : Communicator

    Raises
    ------
    AgreedError
        If settings do not go together, or there is nothing to resume that could be used.
    """
    resumed, settings = None, Settings(**given, ranks=communicator.size)
    with communicator.together():
        if resume is not None and communicator.rank == 0:
            resumed = find(resume, settings.output, folder)
    resumed = communicator.broadcast_object(resumed)
    if resumed:
        folder.go_on(resumed.folder)
    with communicator.together():
        if resumed:
            settings = settings_of(resumed, given)
            resumed.notes.extend(_not_written(resumed, settings))
        settings.check()
    return communicator.broadcast_object(settings), resumed


def settings_of(resumed: Resumed, given: Mapping[str, Any]) -> Settings:
    """Return the settings of the run, and of those that were given the ones that may change.

    Raises
    ------
    UserError
        If another one was given, and it is not what the run has.
    """
    settings = _saved_settings(resumed.latest)
    # What compression has still to send is kept bucket by bucket.
    free = _FREE if settings.compression == "none" else _FREE - {"bucket_mb"}
    for name, value in given.items():
        if name not in free and value != getattr(settings, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option}: {value}; the run that is resumed has {getattr(settings, name)}, and keeps it"
            )
    # A checkpoint may be a stranger's: what is written outside its folder is what was given now.
    settings = dataclasses.replace(settings, timeline=None, output=str(resumed.folder.parent))
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if k in free})


def _not_written(resumed: Resumed, settings: Settings) -> list[str]:
    """Say that a file which the run has written until now will not be, if it is so."""
    before = _saved_settings(resumed.latest).timeline
    if before is None or settings.timeline is not None:
        return []
    return [f"{resumed.latest.path}: names a timeline, {before!a}; give --timeline for one"]


def check_data(state: Mapping[str, Any], dataset: Dataset) -> None:
    """Check that a run is resumed on data of the sequences and classes that it was begun on.

    Raises
    ------
    UserError
        If they are others.
    """
    for name in ("modalities", "labels", "label_values"):
        found, before = list(getattr(dataset, name)), list(state[name])
        if found != before:
            raise UserError(
                f"--resume: other {name} than the run has ({found}, not {before}); expected the same data"
            )


def check_cases(state: Mapping[str, Any], cases: Mapping[str, list[str]]) -> None:
    """Check that a run is resumed on the cases that it was begun on, in their order.

    Raises
    ------
    UserError
        If they are others.
    """
    for part, names in cases.items():
        before = state["cases"][part]
        if names != before:
            changed = sorted({*names} ^ {*before}) or names
            raise UserError(
                f"--resume: other cases for {part} than the run has ({', '.join(changed[:3])} ...); "
                "expected the same data"
            )


def _newest(output: Path) -> Path | None:
    """Return the folder of the run that was written to last."""
    found = [path for name in (LATEST, PREVIOUS) for path in output.glob(f"*/{name}")]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _saved_settings(found: Checkpoint) -> Settings:
    """Return the settings of the run that a checkpoint is of."""
    try:
        _STATE["settings"](found.state.get("settings"), "settings")
        saved = dict(found.state["settings"])
        saved["patch_size"] = tuple(saved["patch_size"])
        return Settings(**saved)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: not a checkpoint of a training ({said(error)})") from error


def _check(found: Checkpoint) -> None:
    """Check that a training can go on from a checkpoint, by making of it what a training would.

    Raises
    ------
    CheckpointError
        If something is missing in it, or does not belong together.
    """
    settings = _saved_settings(found)
    missing = {*_STATE, "statistics"} - {*found.state, *found.arrays}
    if missing:
        raise CheckpointError(
            f"{found.path}: not a checkpoint of a training, without {', '.join(sorted(missing))}"
        )
    try:
        record(_STATE)(found.state, "state")
        model = found.make_model()
        found.load_optimizer(model, Adam(model.parameters()))
        _check_statistics(found.arrays["statistics"], model)
        _check_together(found, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{found.path}: {error}") from error


def _check_together(found: Checkpoint, settings: Settings) -> None:
    """Check that what is said twice is said alike, and that the numbers of epochs follow each other."""
    state, config = found.state, found.config
    history, labels = state["history"], state["labels"]
    scores = [entry["validation"] for entry in history]
    if state["validation"] is not None:
        scores.append(state["validation"])
    expected = [
        ("dim", config["dim"], 3),
        ("filters", config["filters"], settings.filters),
        ("depth", config["depth"], settings.depth),
        ("use_upsampling", config["use_upsampling"], settings.use_upsampling),
        ("modalities", len(state["modalities"]), config["in_channels"]),
        ("labels", len(labels), config["classes"]),
        ("label_values", len(state["label_values"]), config["classes"]),
        ("epochs of history", [e["epoch"] for e in history], [*range(1, len(history) + 1)]),
        ("epoch and history", len(history) <= state["epoch"] <= len(history) + 1, True),
        ("epoch and epochs in all", state["epoch"] <= settings.epochs, True),
        ("labels and scores", [[*s["classes"]] for s in scores], [[*labels[1:]]] * len(scores)),
        (
            "regions of scores",
            [[*s["regions"]] for s in scores],
            [[*s["regions"]] for s in scores[:1] * len(scores)],
        ),
        ("validation and history", state["validation"] is None, not history),
    ]
    if state["epoch"] > len(history):  # in the middle of an epoch
        expected.append(("sums", min(state["sums"][2:]) > 0, True))
    for name, one, other in expected:
        if one != other:
            raise ValueError(f"does not belong together: {name}")
    if len(labels) < 2:
        raise ValueError("a model of one class, which no training makes")
    if found.path.name == BEST and not history:
        raise ValueError("the best of no epoch")


def _check_statistics(rows: NDArray[Any], model: UNet) -> None:
    """Check that each row holds numbers for all of batch norm's running statistics."""
    size = sum(buffer.size for buffer in model.buffers())
    if rows.dtype.kind != "f" or rows.ndim != 2 or len(rows) < 1 or rows.shape[1] != size:
        raise ValueError(f"training/statistics: shape {rows.shape} of {rows.dtype}; expected rows of {size}")
    ends = np.cumsum([buffer.size for buffer in model.buffers()])
    for (name, _), part in zip(model.named_buffers(), np.split(rows, ends[:-1], 1), strict=True):
        if name.endswith("running_variance") and part.min() < 0:
            raise ValueError(f"training/statistics: {name} holds {part.min():.6g}; expected variances")


def _first_whole(paths: list[Path], otherwise: Checkpoint | None = None) -> tuple[Checkpoint, list[str]]:
    """Return the first checkpoint that can be used, and what is wrong with those before it.

    With one that is taken ``otherwise``, those of other models cannot be used.
    """
    errors: list[str] = []
    for path in paths:
        try:
            found = checkpoint.load(path)
            if otherwise and found.config != otherwise.config:
                raise CheckpointError(f"{path}: of another model than {LATEST}")
            _check(found)
        except CheckpointError as error:
            errors.append(str(error))
        else:
            otherwise = found
            break
    if otherwise is None:
        raise CheckpointError("; ".join(errors))
    return otherwise, [f"{error}; using {otherwise.path.name} instead" for error in errors]


def _rename(path: Path, other: Path) -> None:
    if path.exists():
        path.replace(other)
