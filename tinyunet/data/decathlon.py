"""Data sets as folders: with a ``dataset.json`` (Decathlon, nnU-Net), or BraTS as released."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyunet.common.errors import DataError
from tinyunet.data.brats import read_brats
from tinyunet.data.cases import Case, Dataset
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.data.description import Description, read_description
from tinyunet.data.sequences import choice_of, choose


def read_dataset(
    path: str | Path,
    files_are_there: bool = True,
    labels: str | None = None,
    allow_missing: bool = False,
    modalities: Sequence[str] | None = None,
) -> Dataset:
    """Find the labelled cases of a folder; no volume is read.

    Parameters
    ----------
    path
        A folder with ``dataset.json``, as :mod:`tinyunet.data.description` has it (``test`` is not used: it
        has no labels), or, without that file, a BraTS folder as :func:`tinyunet.data.brats.read_brats` takes
        it. DataError if it is neither.
    files_are_there
        Whether to check that every file named in ``dataset.json`` is there: DataError if not.
    labels
        Key of :data:`tinyunet.data.conventions.CONVENTIONS` for the numbers in the label files; without
        it, ``dataset.json`` or the names of BraTS' files tell the convention.
    allow_missing
        Whether BraTS cases may lack sequences: see :func:`tinyunet.data.brats.case_files`.
    modalities
        Names of the sequences to take, in this order; without it all of them. UserError if one is not there.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a Decathlon task or a BraTS folder")
    file = path / "dataset.json"
    if not file.exists():
        return read_brats(path, labels, allow_missing or not files_are_there, modalities)
    dataset = _from_description(file, read_description(file), files_are_there, modalities)
    if labels is None:
        return dataset
    meaning = CONVENTIONS[labels].classes(f"--labels {labels}")
    cases = tuple(replace(case, label_values=meaning.values) for case in dataset.cases)
    names, values, source = meaning
    return replace(dataset, cases=cases, labels=names, label_values=values, source=source, regions=None)


def _from_description(
    file: Path, description: Description, files_are_there: bool, modalities: Sequence[str] | None
) -> Dataset:
    there, classes = description.modalities, description.classes
    numbers = choose(modalities, there, str(file))
    names = tuple(there[number] for number in numbers)
    cases: dict[str, Case] = {}
    for name, images, label in description.cases:
        paths = tuple(images[number] for number in numbers) if len(images) > 1 else images
        for path in (*paths, label) if files_are_there else ():
            if not path.is_file():
                special = path.exists() and not path.is_dir()
                what = "not a regular file" if special else "no such file"
                raise DataError(f"{path}: {what}, though {file} names it")
        if name in cases:
            raise DataError(f"{file}: {images[0].name} is named twice; expected each case once")
        choice = choice_of(names, there) if len(images) == 1 else None
        cases[name] = Case(name, paths, label, len(names), classes.values, choice)
    in_order = tuple(cases[name] for name in sorted(cases))
    return Dataset(
        file.parent, in_order, names, classes.names, classes.values, file.name, there, classes.regions
    )
