"""Where a training goes on: which checkpoint, and with which settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet import checkpoint
from tinyunet.checkpoint import Checkpoint, CheckpointError
from tinyunet.errors import UserError
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.folder import BEST, DAMAGED, LATEST, PREVIOUS, RunFolder
from tinyunet.training.settings import Settings

# What may be other than in the run that is resumed: where things are, and what changes no result.
_FREE = {
    "data_path",
    "output",
    "bucket_mb",
    "allreduce",
    "timeline",
    "checkpoint_every",
    "stall_warning",
}
# What a training takes of a checkpoint's state and arrays to go on.
_NEEDED = {
    *("epoch", "step", "sums", "seconds", "history", "validation"),
    *("cases", "algorithms", "settings", "statistics"),
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
                f"{option}: {value}; the run that is resumed has {getattr(settings, name)}, "
                "and keeps it"
            )
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if k in free})


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
        saved = dict(found.state["settings"])
        saved["patch_size"] = tuple(saved["patch_size"])
        return Settings(**saved)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{found.path}: not a checkpoint of a training") from error


def _check(found: Checkpoint) -> None:
    """Check that a training can go on from a checkpoint, by making of it what a training would.

    Raises
    ------
    CheckpointError
        If something is missing in it, or does not belong together.
    """
    _saved_settings(found)
    missing = _NEEDED - {*found.state, *found.arrays}
    if missing:
        raise CheckpointError(
            f"{found.path}: not a checkpoint of a training, without {', '.join(sorted(missing))}"
        )
    model = found.make_model()
    found.load_optimizer(model, Adam(model.parameters()))


def _first_whole(
    paths: list[Path], otherwise: Checkpoint | None = None
) -> tuple[Checkpoint, list[str]]:
    """Return the first checkpoint that can be used, and what is wrong with those before it.

    With one that is taken ``otherwise``, those of other models cannot be used.
    """
    errors: list[str] = []
    for path in paths:
        try:
            found = checkpoint.load(path)
            _check(found)
            if otherwise and found.config != otherwise.config:
                raise CheckpointError(f"{path}: of another model than {LATEST}")
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
