"""How a training goes on: from which checkpoint, and with which settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import UserError, said
from tinyunet.common.schema import by_name, each, number, optional, record, text, whole
from tinyunet.data.spacing import KEEP
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError
from tinyunet.training.folder import BEST, DAMAGED, LATEST, PREVIOUS, RunFolder
from tinyunet.training.settings import RULES, Settings
from tinyunet.training.start import Data
from tinyunet.unet import UNet

# Settings that may differ from those of the run: paths, and settings that change no result.
_FREE = {
    "data_path",
    "output",
    "export",
    "bucket_mb",
    "allreduce",
    "timeline",
    "checkpoint_every",
    "stall_warning",
}
_DICE = by_name(number(0, 1))
_SCORES = record({"classes": _DICE, "regions": _DICE})
_EPOCH = record(
    {"epoch": whole(1), "loss": number(), "dice": number(), "validation": _SCORES}
    | dict.fromkeys(("lr", "seconds"), number(0))
)
# The entries of a checkpoint's state that a training needs to go on.
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
    """A run that goes on."""

    folder: Path
    latest: Checkpoint  # where the run goes on
    best: Checkpoint  # the best epoch so far
    notes: list[str]  # what a user should know: checkpoints that were refused


def begin(
    given: Mapping[str, Any],
    resume: str | None,
    folder: RunFolder,
    communicator: Communicator,
    extend: int | None = None,
) -> tuple[Settings, Resumed | None]:
    """Return on every rank the settings of a new run, or of one that goes on, as rank 0 finds them.

    ``given`` are the settings that were given. ``resume`` is as for :func:`find`; None begins a new run.
    ``folder`` becomes the folder of the run that goes on, and rank 0 locks it; the run trains for ``extend``
    epochs more than it has planned. AgreedError if settings do not go together, or there is no usable run to
    resume.
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
            before = saved_settings(resumed.latest).timeline
            if before is not None and settings.timeline is None:
                note = f"{resumed.latest.path}: names a timeline, {before!a}; give --timeline for one"
                resumed.notes.append(note)
            if extend:
                settings = extended(settings, extend)
                after, until = settings.extended_at[-1], settings.epochs
                rises = f"the learning rate rises to {settings.highest_lr:g} again after epoch {after}"
                resumed.notes.append(f"--extend: {rises}, and falls to 0 until epoch {until}")
        elif extend:
            raise UserError(
                f"--extend: no run to go on with in {settings.output}; expected one that has ended"
            )
        settings.check()
    return communicator.broadcast_object(settings), resumed


def extended(settings: Settings, epochs: int) -> Settings:
    """Return settings with a further part of so many epochs, in which the learning rate rises and falls."""
    ends = (*settings.extended_at, settings.epochs)
    return dataclasses.replace(settings, epochs=settings.epochs + epochs, extended_at=ends)


def find(where: str, output: Path | str, run: RunFolder) -> Resumed | None:
    """Find the checkpoint to go on from; None if the latest run was asked for, and there is none.

    ``where`` is the folder of a run, or a checkpoint in it; empty for the latest run in ``output``. ``run``
    becomes the folder that is found, and locks it. UserError if there is no such run, another process trains
    in it, or none of its checkpoints can be used.
    """
    path = Path(where)
    if not where:
        runs = [found for name in (LATEST, PREVIOUS) for found in Path(output).glob(f"*/{name}")]
        if not runs:
            return None
        path = max(runs, key=lambda found: found.stat().st_mtime).parent
    folder = path if path.is_dir() else path.parent
    names = [LATEST, PREVIOUS] if path.is_dir() or path.name == LATEST else [path.name]
    if not path.exists() and not (folder / names[-1]).exists():
        raise UserError(f"--resume: {path}: no such run or checkpoint")
    # Lock before reading: another process may be writing the next checkpoint, its last one.
    run.go_on(folder)
    run.hold()
    latest, notes = first_usable([folder / name for name in names])
    if notes and (folder / LATEST).exists():
        # Otherwise the next checkpoint would make it the previous one.
        (folder / LATEST).replace(folder / DAMAGED)
    # Before the end of the first epoch there is no best one.
    best, more = first_usable([path for path in [folder / BEST] if path.exists()], latest)
    return Resumed(folder, latest, best, notes + more)


def settings_of(resumed: Resumed, given: Mapping[str, Any]) -> Settings:
    """Return the settings of the run, updated by the given ones; UserError if one of these may not change."""
    settings = saved_settings(resumed.latest)
    # Compression keeps its residuals bucket by bucket.
    free = _FREE if settings.compression == "none" else _FREE - {"bucket_mb"}
    for name, value in given.items():
        if name not in free and value != (its := getattr(settings, name)):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: {value}; the run that is resumed has {its}, and keeps it")
    # A checkpoint may be a stranger's: only an option of now names a file outside its folder.
    settings = dataclasses.replace(settings, timeline=None, export=None, output=str(resumed.folder.parent))
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if k in free})


def check_same_data(state: Mapping[str, Any], data: Data) -> None:
    """Raise UserError unless sequences, classes and cases are those that the run began on, in order."""
    for name in ("modalities", "labels", "label_values"):
        found, before = list(getattr(data.dataset, name)), list(state[name])
        if found != before:
            reason = f"other {name} than the run has ({found}, not {before})"
            raise UserError(f"--resume: {reason}; expected the same data")
    for part, names in data.case_names().items():
        before = state["cases"][part]
        if names != before:
            changed = ", ".join((sorted({*names} ^ {*before}) or names)[:3])
            reason = f"other cases for {part} than the run has ({changed} ...)"
            raise UserError(f"--resume: {reason}; expected the same data")


def saved_settings(found: Checkpoint) -> Settings:
    """Return the settings of the run that wrote a checkpoint."""
    try:
        _STATE["settings"](found.state.get("settings"), "settings")
        # What older programs did.
        saved: dict[str, Any] = {"spacing": KEEP, "allow_missing": True, **dict(found.state["settings"])}
        saved |= {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        return Settings(**saved)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: not a checkpoint of a training ({said(error)})") from error


def _check(found: Checkpoint) -> None:
    """Raise CheckpointError unless a training can go on from a checkpoint: all is there and fits together."""
    settings = saved_settings(found)
    missing = {*_STATE, "statistics"} - {*found.state, *found.arrays}
    if missing:
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"{found.path}: not a checkpoint of a training, without {names}")
    try:
        record(_STATE)(found.state, "state")
        model = found.make_model()
        found.load_optimizer(model, Adam(model.parameters(), ema=settings.ema))
        _check_statistics(found.arrays["statistics"], model)
        _check_consistency(found, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{found.path}: {error}") from error


def _check_consistency(found: Checkpoint, settings: Settings) -> None:
    """Check that entries agree with each other, and that the numbers of epochs follow each other."""
    state, config = found.state, found.config
    history, labels = state["history"], state["labels"]
    scores = [each for each in [*(e["validation"] for e in history), state["validation"]] if each is not None]
    regions = [[*s["regions"]] for s in scores]
    ends = [*settings.extended_at, settings.epochs]
    in_an_epoch = state["epoch"] > len(history)
    wanted = dict(settings.model_options)
    if config.get("deep_supervision") is True and settings.deep_supervision:
        wanted["deep_supervision"] = True  # an older program's: it goes on as it began
    expected = [
        # A configuration lacks what older ones had not, at its default.
        *((n, config.get(n, {"norm": "batch"}.get(n, False)), v) for n, v in wanted.items()),
        ("modalities", len(state["modalities"]), config["in_channels"]),
        ("labels", len(labels), config["classes"]),
        ("label_values", len(state["label_values"]), config["classes"]),
        ("epochs of history", [e["epoch"] for e in history], [*range(1, len(history) + 1)]),
        ("epoch and history", len(history) <= state["epoch"] <= len(history) + 1, True),
        ("epoch and epochs in all", state["epoch"] <= settings.epochs, True),
        ("extensions", ends, sorted({*ends})),
        ("labels and scores", [[*s["classes"]] for s in scores], [[*labels[1:]]] * len(scores)),
        ("regions of scores", regions, regions[:1] * len(scores)),
        ("validation and history", state["validation"] is None, not history),
        ("sums", not in_an_epoch or min(state["sums"][2:]) > 0, True),
    ]
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
    for (name, _), part in zip(model.named_buffers(), np.split(rows, ends, 1), strict=False):
        if name.endswith("running_variance") and part.min() < 0:
            raise ValueError(f"training/statistics: {name} holds {part.min():.6g}; expected variances")


def first_usable(paths: list[Path], otherwise: Checkpoint | None = None) -> tuple[Checkpoint, list[str]]:
    """Return the first checkpoint that can be used, and the faults of those before it.

    ``otherwise`` is used if none can; a checkpoint of another model than that one cannot.
    """
    errors: list[str] = []
    for path in paths:
        try:
            found = checkpoint.load(path)
            if otherwise and found.config != otherwise.config:
                raise CheckpointError(f"{path}: of another model than {LATEST}")
            _check(found)
            otherwise = found
            break
        except CheckpointError as error:
            errors.append(str(error))
    if otherwise is None:
        raise CheckpointError("; ".join(errors))
    return otherwise, [f"{error}; using {otherwise.path.name} instead" for error in errors]
