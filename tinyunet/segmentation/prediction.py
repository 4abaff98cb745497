"""From a checkpoint and image files to label files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tinyunet.common.errors import UserError
from tinyunet.common.files import can_be_written
from tinyunet.common.terminal import printable
from tinyunet.data import brats, mark
from tinyunet.data.conventions import read_as
from tinyunet.data.decathlon import case_files, load_image, save_labels
from tinyunet.data.nifti import DataError, read_extensions, read_shape, read_volume, stem
from tinyunet.data.spacing import in_mm, is_far
from tinyunet.data.stream import memory_for
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError, load
from tinyunet.segmentation.sliding_window import Predict, count_patches, predictor, segment
from tinyunet.unet import UNet

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Job(NamedTuple):
    """An image to segment: its name, its files, and the numbers that stand for its classes."""

    name: str
    image_paths: tuple[Path, ...]
    label_values: tuple[int, ...]
    output: Path
    patches: int


class Segmented(NamedTuple):
    """What was found.

    Attributes
    ----------
    output
        The file written.
    millilitres
        Of each class but the background.
    written_as
        The line that says what the numbers in the file mean.
    notes
        Lines that name a file and what is odd about it.
    """

    output: Path
    millilitres: dict[str, float]
    written_as: str
    notes: list[str]


def plan(images: Sequence[str | Path], output: Path | str, checkpoint: Checkpoint) -> list[Job]:
    """Find the files of each image and where its labels will go, before anything is computed.

    Parameters
    ----------
    images : sequence of path
        NIfTI files with all sequences, or BraTS case folders, of which the model's sequences are
        taken by their names. Labels are numbered as in the data that the model was trained on, for
        BraTS cases as BraTS does, if the classes have such names.
    output : Path or str
        The folder for the labels; each file is named as the image is.
    checkpoint : Checkpoint
        Of the model to be used.

    Raises
    ------
    UserError
        An image, or a file that this program did not write, would be overwritten; an image is missing,
        or two of them have the same name; or the names of the model's sequences are not those of a
        BraTS case.
    """
    own_values = _label_values(checkpoint)
    jobs: dict[str, Job] = {}
    for image in map(Path, images):
        # Of a link its own name, not that of what it leads to; of "." the folder's.
        name = stem(Path(os.path.abspath(image)))
        paths: tuple[Path, ...] = (image,)
        values = own_values
        if image.is_dir():
            paths = _brats_files(image, checkpoint)
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
        _check_ours(target)
        patches = count_patches(checkpoint.config["depth"], read_shape(paths[0])[:3])
        jobs[name] = Job(name, paths, values, target, patches)
    return list(jobs.values())


def predict(
    checkpoint_path: Path | str,
    images: Sequence[str | Path],
    output: Path | str,
    communicator: Communicator,
    eager: bool = False,
    accuracy: str = "fast",
    deterministic: bool = False,
) -> list[Segmented]:
    """Segment images, shared among the ranks, behind a progress bar.

    Before the first is segmented, every image has been read once: it is better to hear of a bad one
    then than after an hour.

    Parameters
    ----------
    checkpoint_path, images, output
        See :func:`plan`.
    communicator : Communicator
    eager, accuracy, deterministic
        See :func:`tinyunet.segmentation.sliding_window.predictor`.

    Returns
    -------
    found : list of Segmented
        In the order of the images at rank 0, empty elsewhere.

    Raises
    ------
    AgreedError
        On every rank, if the checkpoint or an image of any cannot be used, or labels cannot be
        written.
    """
    done = []
    with communicator.together():
        checkpoint = load(checkpoint_path)
        model = checkpoint.make_model()
        run_model = predictor(model, eager, accuracy, deterministic)
        jobs = plan(images, output, checkpoint)
        _check_output(output, jobs)
        mine = jobs[communicator.rank :: communicator.size]
        # One rank alone reads its first one next.
        for job in mine[communicator.size == 1 :]:
            load_image(job.image_paths, model.config["in_channels"])
    with (
        communicator.together(),
        tqdm(total=sum(job.patches for job in mine), bar_format=_BAR, disable=communicator.rank > 0) as bar,
    ):
        for job in mine:
            bar.set_description_str(printable(job.name))
            done.append((jobs.index(job), _run(job, model, run_model, checkpoint, bar)))
    everyones = [found for rank in communicator.gather(done) for found in rank]
    return [found for _, found in sorted(everyones, key=lambda indexed: indexed[0])]


def _check_ours(target: Path) -> None:
    """Check that a file which labels would replace is one that was written here, and not changed since."""
    if not target.is_file():
        return
    try:
        voxels, geometry = read_volume(target)
        stored = geometry.from_canonical(voxels)
        ours = voxels.ndim == 3 and mark.is_untouched(read_extensions(target), stored)
    except DataError:
        ours = False
    if not ours:
        raise UserError(
            f"{target}: is there already, and this program did not write it, or it was changed since; "
            "expected another folder with -o"
        )


def _check_output(output: Path | str, jobs: Sequence[Job]) -> None:
    """Tell now, not after an hour, that labels cannot be written."""
    if output == "":  # what a variable of the shell that is not set leaves
        raise UserError("-o: ''; expected a folder")
    folder = Path(os.path.abspath(output))
    if folder.exists():
        folder.mkdir(exist_ok=True)  # a file is in the way
        places = [job.output for job in jobs]
    else:
        places = [next(place for place in folder.parents if place.exists()) / folder.name]
    for place in places:
        if not can_be_written(place):
            raise UserError(f"{place}: cannot be written; expected a folder of your own with -o")


def _run(job: Job, model: UNet, run_model: Predict, checkpoint: Checkpoint, bar: tqdm) -> Segmented:
    """Read an image, segment it, and write labels that lie exactly over it."""
    notes: list[str] = []
    image, geometry = load_image(job.image_paths, model.config["in_channels"], notes)
    learnt = checkpoint.state.get("spacing")  # of three sides; older checkpoints have none
    if learnt and is_far(geometry.spacing, learnt):
        notes.append(
            f"{job.image_paths[0]}: voxels of {in_mm(geometry.spacing)}, but the model has learnt from "
            f"{in_mm(learnt)}, and nothing is resampled: it will find less"
        )
    try:
        with memory_for(job.image_paths[0]):
            labels = segment(model, image, progress=lambda *_: bar.update(), predict=run_model)
    except DataError:
        raise
    except UserError as error:
        raise UserError(f"{job.image_paths[0]}: with {checkpoint.path}, {error}") from error
    job.output.parent.mkdir(parents=True, exist_ok=True)
    names = checkpoint.state["labels"]
    save_labels(job.output, labels, geometry, job.label_values, names)
    counts = np.bincount(labels.ravel(), minlength=len(names)).tolist()
    volumes = {n: c * geometry.millilitres for n, c in zip(names[1:], counts[1:], strict=True)}
    written_as = read_as(names, job.label_values, "").replace("read", "written", 1)
    return Segmented(job.output, volumes, written_as, notes)


def _brats_files(folder: Path, checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the files of a BraTS case for the model's channels."""
    files, _ = case_files(folder)
    modalities = checkpoint.state.get("modalities", brats.MODALITIES)
    chosen = brats.choose_files(files, modalities)
    if chosen is None:
        raise UserError(
            f"{folder}: a BraTS case, but the model's sequences are {', '.join(modalities)}; "
            "expected a NIfTI file with these"
        )
    return chosen


def _label_values(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the numbers of the classes, after checking that the model segments volumes."""
    values = checkpoint.state.get("label_values", ())
    names = checkpoint.state.get("labels", ())
    # A model of one class tells it from the background.
    classes = {max(checkpoint.config.get("classes", 0), 2), len(values), len(names)}
    if checkpoint.config.get("dim", 3) != 3 or not values or len(classes) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: not a model of volumes with named labels; "
            "expected a checkpoint of python -m tinyunet.train"
        )
    return tuple(values)
