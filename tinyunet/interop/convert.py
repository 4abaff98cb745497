"""From a model's file in one format to one in another."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyunet.common.errors import UserError
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.data.spacing import KEEP, Spacing
from tinyunet.interop.formats import check_ending, check_told, export, read
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.checkpoint import Checkpoint
from tinyunet.unet import UNet


def convert(
    source: Path,
    target: Path,
    classes: Sequence[str] | None = None,
    convention: str | None = None,
    modalities: Sequence[str] | None = None,
    spacing: str | Spacing | None = None,
    told: Mapping[str, Any] = {},
) -> list[str]:
    """Read a model in any format and write it in another; return lines that say what had to be assumed.

    ``classes``, ``convention`` (a key of ``data.conventions.CONVENTIONS``), ``modalities`` and ``spacing``
    say, and ``told`` as :func:`tinyunet.interop.formats.read`, what a file of another program does not.
    UserError if a file cannot be used, or does not say its classes and sequences and they are not given
    either: a checkpoint must know them.
    """
    check_ending("export", target)
    notes: list[str] = []
    if source.suffix.lower() == ".npz":
        found = checkpoint.load(source)
        model, state = found.make_model(), found.state
        check_told(source, model, told)
    else:
        model, state = read(source, told, notes)
    given = _given(classes, convention, modalities, spacing)
    state = state | given
    if target.suffix.lower() == ".npz" or given:
        _check(model, state, source)
    if target.suffix.lower() == ".npz" and "spacing" not in state:
        usual = "predict will leave images on their own voxels"
        notes.append(f"{source}: does not say the size of its voxels: {usual}; --spacing would say it")
    config, arrays = model.config, model.state_dict()
    export(Checkpoint(source, config, arrays, {}, [], model.random_state(), state, {}), target)
    return notes


def _given(
    classes: Sequence[str] | None,
    convention: str | None,
    modalities: Sequence[str] | None,
    spacing: str | Spacing | None,
) -> dict[str, Any]:
    """Return the entries of a state that are given."""
    state: dict[str, Any] = {}
    if convention:
        names, values, source = CONVENTIONS[convention].classes(f"--labels {convention}")
        state |= {"labels": list(names), "label_values": list(values), "labels_source": source}
    if classes:
        state |= {"labels": list(classes), "label_values": list(range(len(classes)))}
    if modalities:
        state |= {"modalities": list(modalities), "file_modalities": list(modalities)}
    if spacing:
        state |= {"spacing": None if spacing == KEEP else list(spacing)}
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
