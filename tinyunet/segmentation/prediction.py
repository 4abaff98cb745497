"""From a checkpoint and image files to label files."""

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
from tinyunet.data.labels import is_untouched, save_labels
from tinyunet.data.nifti import read_header, stem
from tinyunet.data.spacing import FAR, Spacing, differs, in_mm
from tinyunet.data.stream import memory_for
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError, load
from tinyunet.segmentation.sliding_window import Predict, count_patches, predictor, segment
from tinyunet.unet import UNet

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Reading(NamedTuple):
    """How images are read for the model: as :func:`tinyunet.data.cases.load_image` says."""

    spacing: Spacing | None = None
    allow_missing: bool = False


class Job(NamedTuple):
    """An image to segment, and the file for its labels."""

    name: str
    image_paths: tuple[Path, ...]
    label_values: tuple[int, ...]  # [i] is written for class i
    output: Path
    patches: int  # how many, for the progress bar
    reading: Reading = Reading()


class Segmented(NamedTuple):
    """A label file that was written."""

    output: Path
    millilitres: dict[str, float]  # volume of each class but the background, by name
    written_as: str  # the line that says what the numbers in the file mean
    notes: list[str]  # lines that name a file and what is odd about it


def plan(
    images: Sequence[str | Path],
    output: Path | str,
    checkpoint: Checkpoint,
    spacing: str | Spacing | None = None,
    allow_missing: bool = False,
) -> list[Job]:
    """Find the files of each image and the file for its labels, before anything is computed.

    ``images`` are NIfTI files with all sequences, or BraTS case folders, of which the model's sequences are
    taken by their names. Labels are numbered as in the data that the model was trained on; for BraTS cases as
    BraTS does, if the classes have such names. Each file in the folder ``output`` is named as its image is.
    ``spacing`` is the size of voxels to which images are resampled: three sides in millimetres, "keep" for
    the images' own; without it, the size that the model was trained at. ``allow_missing`` is that of
    :func:`tinyunet.data.cases.load_image`.
    UserError if an image, or a file that this program did not write, would be overwritten; an image is
    missing, or two have one name; or the model takes other sequences than a BraTS case has.
    """
    own_values = _label_values(checkpoint)
    wanted = spacing or checkpoint.state.get("spacing")  # the oldest checkpoints have none
    reading = Reading(None if isinstance(wanted, str) else wanted, allow_missing)
    jobs: dict[str, Job] = {}
    for image in map(Path, images):
        # The name of a link, not of the file behind it; for "." the folder's name.
        name = stem(Path(os.path.abspath(image)))
        paths: tuple[Path, ...] = (image,)
        values = own_values
        if image.is_dir():
            modalities = checkpoint.state.get("modalities", brats.MODALITIES)
            # A sequence that the model does not take may be missing in any case.
            paths = brats.choose_files(brats.case_files(image, allow_missing=True)[0], modalities) or ()
            if not allow_missing and not all(path.exists() for path in paths):
                brats.case_files(image)  # says which are missing
            if not paths:
                reason = f"a BraTS case, but the model's sequences are {', '.join(modalities)}"
                raise UserError(f"{image}: {reason}; expected a NIfTI file with these")
            values = brats.numbers_for(image, checkpoint.state["labels"]) or own_values
        elif not image.exists():
            raise UserError(f"{image}: no such file; expected a NIfTI file or a BraTS case folder")
        target = Path(output) / f"{name}.nii.gz"
        if any(target.resolve() == path.resolve() for path in paths):
            raise UserError(f"{target}: is the image itself; expected another folder with -o")
        if target.parent.resolve() == image.parent.resolve() and target.exists():
            raise UserError(f"{target}: is there already, beside the image; expected another folder with -o")
        if name in jobs:
            raise UserError(f"{image}: there is another image named {name}; expected it once")
        if target.is_file() and not is_untouched(target):
            reason = "is there already, and this program did not write it, or it was changed since"
            raise UserError(f"{target}: {reason}; expected another folder with -o")
        stored, geometry = read_header(first_present(paths))
        shape = network_shape(paths[0], stored[:3], geometry, reading.spacing)
        patches = count_patches(checkpoint.config["depth"], shape)
        jobs[name] = Job(name, paths, values, target, patches, reading)
    return list(jobs.values())


def predict(
    checkpoint_path: Path | str,
    images: Sequence[str | Path],
    output: Path | str,
    communicator: Communicator,
    spacing: str | Spacing | None = None,
    allow_missing: bool = False,
    **execution: Any,
) -> list[Segmented]:
    """Segment images, shared among the ranks, behind a progress bar; rank 0 gets all results in their order.

    Every image is read once before the first is segmented: a bad image ends the program at once, not after
    an hour. ``images``, ``output``, ``spacing`` and ``allow_missing`` are those of :func:`plan`,
    ``execution`` are the options of :func:`tinyunet.segmentation.sliding_window.predictor`. AgreedError on
    every rank, if on any the checkpoint or an image cannot be used, or labels cannot be written.
    """
    done = []
    with communicator.together():
        checkpoint = load(checkpoint_path)
        model = checkpoint.make_model()
        run_model = predictor(model, **execution)
        jobs = plan(images, output, checkpoint, spacing, allow_missing)
        _check_output(output, jobs)
        mine = jobs[communicator.rank :: communicator.size]
        # A single rank reads its first image next.
        for job in mine[communicator.size == 1 :]:
            load_image(job.image_paths, model.config["in_channels"], None, *job.reading)
    with (
        communicator.together(),
        tqdm(total=sum(job.patches for job in mine), bar_format=_BAR, disable=communicator.rank > 0) as bar,
    ):
        for job in mine:
            bar.set_description_str(printable(job.name))
            done.append(_run(job, model, run_model, checkpoint, bar))
    return communicator.gather_in_turns(done)


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


def _run(job: Job, model: UNet, run_model: Predict, checkpoint: Checkpoint, bar: tqdm) -> Segmented:
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
    try:
        with memory_for(first):
            own, tick = geometry.canonical_shape, lambda *_: bar.update()
            labels = segment(model, image, progress=tick, predict=run_model, shape=own)
    except DataError:
        raise
    except UserError as error:
        raise UserError(f"{first}: with {checkpoint.path}, {error}") from error
    names = checkpoint.state["labels"]
    save_labels(job.output, labels, geometry, job.label_values, names)
    counts = np.bincount(labels.ravel(), minlength=len(names)).tolist()
    volumes = {n: c * geometry.millilitres for n, c in zip(names[1:], counts[1:], strict=True)}
    written_as = read_as(names, job.label_values, "").replace("read", "written", 1)
    return Segmented(job.output, volumes, written_as, notes)


def _label_values(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the numbers of the classes, after checking that the model segments volumes."""
    values = checkpoint.state.get("label_values", ())
    names = checkpoint.state.get("labels", ())
    # A model of one class separates it from the background.
    classes = {max(checkpoint.config.get("classes", 0), 2), len(values), len(names)}
    if checkpoint.config.get("dim", 3) != 3 or not values or len(classes) > 1:
        expected = "expected a checkpoint of python -m tinyunet.train"
        raise CheckpointError(f"{checkpoint.path}: not a model of volumes with named labels; {expected}")
    return tuple(values)
