"""From a checkpoint and image files to label files."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tinyunet.common.errors import DataError, UserError
from tinyunet.common.files import can_be_written
from tinyunet.common.terminal import printable
from tinyunet.data import brats
from tinyunet.data.cases import first_present, load_image, network_shape
from tinyunet.data.conventions import read_as
from tinyunet.data.images import find_images
from tinyunet.data.labels import PROBABILITIES, is_untouched, save_labels, save_probabilities
from tinyunet.data.nifti import read_header
from tinyunet.data.sequences import Choice, choice_of
from tinyunet.data.spacing import FAR, Spacing, differs, in_mm
from tinyunet.data.stream import memory_for
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError, load
from tinyunet.segmentation.components import clean
from tinyunet.segmentation.sliding_window import (
    Predict,
    average,
    count_patches,
    most_probable,
    predict_image,
    predictor,
)
from tinyunet.unet import UNet

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Reading(NamedTuple):
    """How images are read for the model: as :func:`tinyunet.data.cases.load_image` says."""

    spacing: Spacing | None = None
    allow_missing: bool = False
    choice: Choice | None = None


class Options(NamedTuple):
    """How probabilities are computed, and what is written."""

    overlap: float = 0.5  # share of a patch that the next one covers again
    mirror: bool = False  # average over reflections
    largest_component: bool = False  # keep the largest part of the tumour alone
    smallest_lesion: float = 0.0  # millilitres; smaller parts are removed
    probabilities: bool = False  # write them, too
    skip_existing: bool = False  # leave out images whose labels are there


_USUAL = Options()


class Job(NamedTuple):
    """An image to segment, and the file for its labels."""

    name: str
    image_paths: tuple[Path, ...]
    label_values: tuple[int, ...]  # [i] is written for class i
    output: Path
    patches: int  # about how many, for the progress bar
    reading: Reading = Reading()
    read_as: str = ""  # the line that says which sequences are taken

    @property
    def probabilities(self) -> Path:
        """The file for probabilities."""
        return self.output.with_name(f"{self.name}{PROBABILITIES}.nii.gz")


class Segmented(NamedTuple):
    """A label file that was written."""

    output: Path
    millilitres: dict[str, float]  # volume of each class but the background, by name
    said: tuple[str, str]  # lines: which sequences were taken, and what the numbers in the file mean
    notes: list[str]  # lines that name a file and what is odd about it


class Outcome(NamedTuple):
    """Label files that were written, a line for each image that could not be used, and images left out."""

    segmented: list[Segmented]
    failures: list[str]
    skipped: list[str]


def plan(
    images: Sequence[str | Path],
    output: Path | str,
    checkpoint: Checkpoint,
    spacing: str | Spacing | None = None,
    allow_missing: bool = False,
    probabilities: bool = False,
) -> list[Job]:
    """Find the files of each image and the file for its labels, before anything is computed.

    ``images`` are as :func:`tinyunet.data.images.find_images` takes them. Labels are numbered as in the data
    that the model was trained on; for BraTS cases as BraTS does, if the classes have such names. Each file in
    the folder ``output`` is named as its image is.
    ``spacing`` is the size of voxels to which images are resampled: three sides in millimetres, "keep" for
    the images' own; without it, the size that the model was trained at. ``allow_missing`` is that of
    :func:`tinyunet.data.cases.load_image`.
    UserError if an image, or a file that this program did not write, would be overwritten; an image is
    missing, or two have one name; or the model takes other sequences than a BraTS case has.
    """
    own_values = _label_values(checkpoint)
    wanted = spacing or checkpoint.state.get("spacing")  # the oldest checkpoints have none
    modalities = checkpoint.state.get("modalities", brats.MODALITIES)
    choice = choice_of(modalities, checkpoint.state.get("file_modalities", modalities))
    reading = Reading(None if isinstance(wanted, str) else wanted, allow_missing)
    jobs: dict[str, Job] = {}
    for given in images:
        for name, paths, case, chosen, line in find_images(given, modalities, allow_missing, choice):
            values = (case and brats.numbers_for(case, checkpoint.state["labels"])) or own_values
            folder = case.where if case else None
            how = reading._replace(choice=chosen)
            job = Job(name, paths, values, Path(output) / f"{name}.nii.gz", 1, how, line)
            if name in jobs:
                raise UserError(
                    f"{folder or paths[0]}: there is another image named {name}; expected it once"
                )
            for target in (job.output, *([job.probabilities] if probabilities else [])):
                _check_target(target, paths, folder)
            # A file that cannot be read fails in its turn.
            with contextlib.suppress(DataError):
                stored, geometry = read_header(first_present(paths))
                shape = network_shape(paths[0], stored[:3], geometry, reading.spacing)
                job = job._replace(patches=count_patches(checkpoint.config["depth"], shape))
            jobs[name] = job
    return list(jobs.values())


def _check_target(target: Path, paths: Sequence[Path], folder: Path | None) -> None:
    """Raise UserError if a file must not be written."""
    if any(target.resolve() == path.resolve() for path in paths):
        raise UserError(f"{target}: is the image itself; expected another folder with -o")
    if target.parent.resolve() == (folder or paths[0]).parent.resolve() and target.exists():
        raise UserError(f"{target}: is there already, beside the image; expected another folder with -o")
    if target.is_file() and not is_untouched(target):
        reason = "is there already, and this program did not write it, or it was changed since"
        raise UserError(f"{target}: {reason}; expected another folder with -o")


def predict(
    checkpoint_paths: Sequence[Path | str],
    images: Sequence[str | Path],
    output: Path | str,
    communicator: Communicator,
    spacing: str | Spacing | None = None,
    allow_missing: bool = False,
    options: Options = _USUAL,
    **execution: Any,
) -> Outcome:
    """Segment images, shared among the ranks, behind a progress bar; every rank gets the outcome of all.

    The probabilities of several checkpoints are averaged. An image that cannot be used does not keep others
    from being segmented. ``images``, ``output``, ``spacing`` and ``allow_missing`` are those of :func:`plan`,
    ``execution`` are the options of :func:`tinyunet.segmentation.sliding_window.predictor`. AgreedError on
    every rank, if on any the checkpoint cannot be used, or labels cannot be written.
    """
    done: list[Segmented] = []
    failures: list[str] = []
    with communicator.together():
        checkpoints = _load_alike(checkpoint_paths)
        models = [each.make_model() for each in checkpoints]
        run_model = average([predictor(model, **execution) for model in models])
        jobs = plan(images, output, checkpoints[0], spacing, allow_missing, options.probabilities)
        _check_output(output, jobs)
        skipped = [job.name for job in jobs if options.skip_existing and job.output.is_file()]
        mine = [job for job in jobs if job.name not in skipped][communicator.rank :: communicator.size]
    with (
        communicator.together(),
        tqdm(total=sum(job.patches for job in mine), bar_format=_BAR, disable=communicator.rank > 0) as bar,
    ):
        for job in mine:
            bar.set_description_str(printable(job.name))
            before = bar.n
            try:
                done.append(_run(job, models[0], run_model, checkpoints[0], options, bar))
            except UserError as error:
                failures.append(str(error))
            bar.update(before + job.patches - bar.n)
    failed = [line for lines in communicator.gather(failures) for line in lines]
    return communicator.broadcast_object(Outcome(communicator.gather_in_turns(done), failed, skipped))


def _load_alike(paths: Sequence[Path | str]) -> list[Checkpoint]:
    """Load checkpoints of the same classes, sequences and voxels, that of the deepest model first."""
    checkpoints = [load(path) for path in paths]
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name in ("labels", "label_values", "modalities", "spacing"):
            if first.state.get(name) != other.state.get(name):
                have, has = other.state.get(name), first.state.get(name)
                words = f"{name.replace('_', ' ')} {have}, but {first.path} has {has}"
                raise CheckpointError(f"{other.path}: {words}; expected models of one kind to average")
    return sorted(checkpoints, key=lambda each: -each.config.get("depth", 0))


def _check_output(output: Path | str, jobs: Sequence[Job]) -> None:
    """Raise now, not after an hour, the error that labels cannot be written."""
    if output == "":  # from a variable of the shell that is not set
        raise UserError("-o: ''; expected a folder")
    folder = Path(os.path.abspath(output))
    if folder.exists():
        folder.mkdir(exist_ok=True)  # raises if it is a file
        places = [job.output for job in jobs]
    else:
        places = [next(place for place in folder.parents if place.exists()) / folder.name]
    for place in places:
        if not can_be_written(place):
            raise UserError(f"{place}: cannot be written; expected a folder of your own with -o")


def _run(
    job: Job, model: UNet, run_model: Predict, checkpoint: Checkpoint, options: Options, bar: tqdm
) -> Segmented:
    """Read an image, segment it, and write labels that lie exactly over it."""
    notes: list[str] = []
    first = job.image_paths[0]
    image, geometry = load_image(job.image_paths, model.config["in_channels"], notes, *job.reading)
    learnt, wanted = checkpoint.state.get("spacing"), job.reading.spacing  # older checkpoints have none
    if learnt and differs(wanted or geometry.spacing, learnt):
        seen = "resampled to " + in_mm(wanted) if wanted else "as they are"
        seen += f", but the model has learnt from {in_mm(learnt)}"
        notes.append(f"{first}: voxels of {in_mm(geometry.spacing)}, {seen}")
    elif wanted and differs(geometry.spacing, wanted, FAR):
        notes.append(
            f"{first}: voxels of {in_mm(geometry.spacing)}, resampled to {in_mm(wanted)} for the model"
        )
    shown = bar.n

    def tick(patches: int, of: int) -> None:
        """Move the bar; the brain may take fewer patches than the volume."""
        bar.update(shown + job.patches * patches // of - bar.n)

    try:
        with memory_for(first):
            how = options.overlap, tick, run_model, geometry.canonical_shape, options.mirror
            probabilities = predict_image(model, image, *how)
            labels = most_probable(probabilities)
            labels = clean(labels, geometry.millilitres, options.largest_component, options.smallest_lesion)
    except DataError:
        raise
    except UserError as error:
        raise UserError(f"{first}: with {checkpoint.path}, {error}") from error
    names = checkpoint.state["labels"]
    if options.probabilities:
        save_probabilities(job.probabilities, probabilities, geometry, names)
    save_labels(job.output, labels, geometry, job.label_values, names)
    counts = np.bincount(labels.ravel(), minlength=len(names)).tolist()
    volumes = {n: c * geometry.millilitres for n, c in zip(names[1:], counts[1:], strict=True)}
    written_as = read_as(names, job.label_values, "").replace("read", "written", 1)
    return Segmented(job.output, volumes, (job.read_as, written_as), notes)


def _label_values(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the numbers of the classes, after checking that the model has named ones."""
    values = checkpoint.state.get("label_values", ())
    names = checkpoint.state.get("labels", ())
    # A model of one class separates it from the background.
    classes = {max(checkpoint.config.get("classes", 0), 2), len(values), len(names)}
    if not values or len(classes) > 1:
        expected = "expected a checkpoint of python -m tinyunet.train"
        raise CheckpointError(f"{checkpoint.path}: not a model with named labels; {expected}")
    return tuple(values)
