"""The page of a run: cases with truth and prediction, scores, curves and configuration."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinyunet.common.errors import UserError
from tinyunet.common.files import read_json
from tinyunet.common.terminal import count, printable
from tinyunet.compiler import measure
from tinyunet.data.cases import Case, Dataset, load_case
from tinyunet.data.decathlon import read_dataset
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.scores import overall
from tinyunet.segmentation.sliding_window import predictor
from tinyunet.training.folder import BEST, LATEST, PREVIOUS
from tinyunet.training.resume import first_usable, saved_settings
from tinyunet.training.samples import Volumes
from tinyunet.training.settings import Settings, configuration
from tinyunet.training.start import place_of
from tinyunet.training.validate import CaseResult, dice_table, score_cases
from tinyunet.viz.page import Head, Page, make_page

_SHOWN = 4  # cases of a run: they share the 15 MB of a page
_PARTS = {"training": "a training case", "validation": "a validation case", "test": "a test case"}


def make_report(
    name: str,
    shown: Sequence[tuple[Case, CaseResult, str]],
    dataset: Dataset,
    history: Sequence[Mapping[str, Any]],
    settings: Settings,
    others: Sequence[Head] = (),
) -> Page:
    """Return the page of a run: cases with their results, which have a segmentation each, and a note.

    ``others`` are scans that are no part of the data; they come first.
    """
    heads = [*others]
    for case, (case_name, scores, _, prediction), note in shown:
        assert prediction is not None
        image, truth, geometry = load_case(case)
        labels = {"prediction": prediction, "truth": truth}
        note = f"{note}: mean Dice {overall(scores):.3f}"
        heads.append(Head(case_name, image, labels, geometry.spacing, note, dice_table(scores)))
    title = f"Training of {name}"
    return make_page(title, heads, dataset.labels, dataset.modalities, history, configuration(settings))


def is_run(folder: Path) -> bool:
    """Whether a folder holds the checkpoints of a run."""
    return any((folder / name).is_file() for name in (BEST, LATEST, PREVIOUS))


def report_of(folder: Path, data_path: str | None = None, names: Sequence[str] = ()) -> Page:
    """Return the page of a run from its folder: the best model so far segments cases, behind a bar.

    ``names`` are those of cases in any part of the data; without them test cases are shown, from the best to
    the worst. ``data_path`` is where the data are, if they were moved. UserError if a checkpoint or the data
    cannot be used, or are not those of the run.
    """
    there = [path for name in (LATEST, PREVIOUS, BEST) if (path := folder / name).is_file()]
    latest, notes = first_usable(there)
    best, more = first_usable([folder / BEST] if (folder / BEST).is_file() else [], latest)
    settings, state = saved_settings(latest), latest.state
    dataset = _dataset(data_path, settings, state)
    cases = {case.name: case for case in dataset.cases}
    parts = {name: part for key, part in _PARTS.items() for name in state["cases"][key]}
    names = names or _test_cases(folder, state["cases"]["test"])
    for name in names:
        if name not in cases or name not in parts:
            known = ", ".join(state["cases"]["test"][:3])
            raise UserError(f"{dataset.path}: no case {name!a} of the run; expected, say, {known}")
    measure.use(best.state["algorithms"])  # others would round differently
    model, options = best.make_model(), settings.compile_options
    how = Volumes(0, state.get("spacing"), settings.allow_missing), dataset, Communicator(), 1
    predict, shown = predictor(model, settings.eager, **options), []
    for name in tqdm(names, "segmenting", unit="case"):
        (result,) = score_cases(model, [cases[name]], *how, predict)
        shown.append((cases[name], result, f"{parts[name]}, with {best.path.name}"))
    page = make_report(folder.resolve().name, shown, dataset, state["history"], settings)
    return page._replace(notes=[*notes, *more, f"{count(len(names), 'case')}: {printable(', '.join(names))}"])


def _dataset(data_path: str | None, settings: Settings, state: Mapping[str, Any]) -> Dataset:
    """Return the data of a run; UserError if they are not there, or others."""
    path = place_of(data_path or settings.data_path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected the data of the run; --data-path says where")
    reading = settings.labels, settings.allow_missing, settings.modalities
    dataset = read_dataset(path, False, *reading)
    for name in ("modalities", "labels", "label_values"):
        if (found := list(getattr(dataset, name))) != (before := list(state[name])):
            reason = f"other {name.replace('_', ' ')} than the run has ({found}, not {before})"
            raise UserError(f"{path}: {reason}; expected the same data")
    return dataset


def _test_cases(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the names of some test cases, from the best to the worst if the run has scored them."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        scores = read_json(folder / "test.json")["cases"]
        names = sorted(names, key=lambda name: -overall(scores[name]))
    picked = np.linspace(0, len(names) - 1, min(len(names), _SHOWN)).round().astype(int)
    return [names[index] for index in picked.tolist()]
