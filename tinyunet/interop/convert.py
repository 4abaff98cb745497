"""From a model's file in one format to one in another."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyunet.common.errors import UserError
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.interop.formats import check_ending, export, read
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.checkpoint import Checkpoint
from tinyunet.unet import UNet


def convert(
    source: Path,
    target: Path,
    classes: Sequence[str] | None = None,
    convention: str | None = None,
    modalities: Sequence[str] | None = None,
) -> None:
    """Read a model in any format and write it in another.

    ``classes``, ``convention`` (a key of ``data.conventions.CONVENTIONS``) and ``modalities`` say what a file
    of another program does not. UserError if a file cannot be used, or does not say its classes
    and sequences and they are not given either: a checkpoint must know them.
    """
    check_ending("export", target)
    if source.suffix.lower() == ".npz":
        export(checkpoint.load(source), target)
        return
    model, state = read(source)
    state |= _told(classes, convention, modalities)
    if target.suffix.lower() == ".npz":
        _check(model, state, source)
    config, arrays = model.config, model.state_dict()
    export(Checkpoint(source, config, arrays, {}, [], model.random_state(), state, {}), target)


def _told(
    classes: Sequence[str] | None, convention: str | None, modalities: Sequence[str] | None
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    if convention:
        names, values, source = CONVENTIONS[convention].classes(f"--labels {convention}")
        state |= {"labels": list(names), "label_values": list(values), "labels_source": source}
    if classes:
        state |= {"labels": list(classes), "label_values": list(range(len(classes)))}
    if modalities:
        state |= {"modalities": list(modalities), "file_modalities": list(modalities)}
    return state


def _check(model: UNet, state: dict[str, Any], source: Path) -> None:
    """Check that it is known what a model takes and finds."""
    channels, classes = model.config["in_channels"], max(model.config["classes"], 2)
    for option, name, number in (
        ("--classes, or --labels,", "labels", classes),
        ("--modalities", "modalities", channels),
    ):
        found = state.get(name)
        if found is None:
            reason = f"{os.fspath(source)}: does not name its {number} {name}"
            raise UserError(f"{reason}; expected {option} for them")
        if len(found) != number:
            raise UserError(f"{os.fspath(source)}: {number} {name}; {len(found)} names are given")
