"""From a checkpoint and image files to label files."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tinyunet.checkpoint import Checkpoint, CheckpointError, load
from tinyunet.data import brats
from tinyunet.data.decathlon import case_files, load_image, save_labels
from tinyunet.data.nifti import stem
from tinyunet.errors import UserError
from tinyunet.files import can_be_written
from tinyunet.inference import Predict, predictor, segment
from tinyunet.parallel.communicator import Communicator
from tinyunet.text import printable
from tinyunet.unet import UNet

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Job(NamedTuple):
    """An image to segment: its name, its files, and the numbers that stand for its classes."""

    name: str
    image_paths: tuple[Path, ...]
    label_values: tuple[int, ...]
    output: Path


class Segmented(NamedTuple):
    """What was found: the file written, and the millilitres of each class but the background."""

    output: Path
    millilitres: dict[str, float]


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
        An image is missing or would be overwritten, or two of them have the same name; or the
        names of the model's sequences are not those of a BraTS case.
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
            values = brats.label_values(checkpoint.state["labels"]) or own_values
        elif not image.exists():
            raise UserError(f"{image}: no such file; expected a NIfTI file or a BraTS case folder")
        target = Path(output) / f"{name}.nii.gz"
        if any(target.resolve() == path.resolve() for path in paths):
            raise UserError(f"{target}: is the image itself; expected another folder with -o")
        if target.parent.resolve() == image.parent.resolve() and target.exists():
            raise UserError(
                f"{target}: is there already, beside the image; expected another folder with -o"
            )
        if name in jobs:
            raise UserError(f"{image}: there is another image named {name}; expected it once")
        jobs[name] = Job(name, paths, values, target)
    return list(jobs.values())


def predict(
    checkpoint_path: Path | str,
    images: Sequence[str | Path],
    output: Path | str,
    communicator: Communicator,
    eager: bool = False,
    accuracy: str = "fast",
) -> list[Segmented]:
    """Segment images, shared among the ranks, behind a progress bar.

    Before the first is segmented, every image has been read once: it is better to hear of a bad one
    then than after an hour.

    Parameters
    ----------
    checkpoint_path, images, output
        See :func:`plan`.
    communicator : Communicator
    eager, accuracy
        See :func:`tinyunet.inference.predictor`.

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
        run_model = predictor(model, eager, accuracy)
        jobs = plan(images, output, checkpoint)
        _check_output(output, jobs)
        mine = jobs[communicator.rank :: communicator.size]
        # One rank alone reads its first one next.
        for job in mine[communicator.size == 1 :]:
            load_image(job.image_paths, model.config["in_channels"])
    with (
        communicator.together(),
        tqdm(total=len(mine), bar_format=_BAR, disable=communicator.rank > 0) as bar,
    ):
        for job in mine:
            bar.set_description_str(printable(job.name))
            done.append((jobs.index(job), _run(job, model, run_model, checkpoint, bar)))
    everyones = [found for rank in communicator.gather(done) for found in rank]
    return [found for _, found in sorted(everyones, key=lambda indexed: indexed[0])]


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

    def progress(patch: int, patches: int) -> None:
        bar.update(1 / patches)

    image, geometry = load_image(job.image_paths, model.config["in_channels"])
    labels = segment(model, image, progress=progress, predict=run_model)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    save_labels(job.output, labels, geometry, job.label_values)
    millilitres = math.prod(geometry.spacing) / 1000
    names = checkpoint.state["labels"]
    counts = np.bincount(labels.ravel(), minlength=len(names)).tolist()
    volumes = {n: c * millilitres for n, c in zip(names[1:], counts[1:], strict=True)}
    return Segmented(job.output, volumes)


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
    if checkpoint.config.get("dim", 3) != 3 or not values or len(values) != len(names):
        raise CheckpointError(
            f"{checkpoint.path}: not a model of volumes with named labels; "
            "expected a checkpoint of python -m tinyunet.train"
        )
    return tuple(values)
