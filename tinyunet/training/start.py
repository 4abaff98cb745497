"""What has to be there before the first step: data."""

from collections import ChainMap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tinyunet.common.terminal import count, printable
from tinyunet.data import phantom, spacing
from tinyunet.data.cases import Case, Dataset, check_patch_fits_all, split
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.nifti import read_header
from tinyunet.data.spacing import Spacing
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.progress import Progress
from tinyunet.training.samples import Inspector, Volumes, half_the_memory
from tinyunet.training.settings import Settings

# The built-in data set: 27 heads to train on, 2 to validate on, 3 to test on.
PHANTOMS = Path("data")
PHANTOM_CASES, PHANTOM_SHAPE, PHANTOM_SEED = 32, (64, 72, 56), 0
# Files that are named at once.
_WARNINGS = 5
# Seconds to wait for the inspection of all files, which is enough for the phantoms. What it takes
# longer for is inspected during the training.
_PATIENCE = 2.0


class Data(NamedTuple):
    """What a training is given: cases in three parts, each case in one of them.

    Attributes
    ----------
    dataset : Dataset
        Where they come from.
    train, validation, test : list of Case
    volumes : Volumes
        Keeps what this rank has read.
    inspector : Inspector
        Reads this rank's share of all cases in the background.
    spacing : (float, float, float)
        Usual size of a voxel, in millimetres.
    """

    dataset: Dataset
    train: list[Case]
    validation: list[Case]
    test: list[Case]
    volumes: Volumes
    inspector: Inspector
    spacing: Spacing


def find_data(settings: Settings, communicator: Communicator, progress: Progress) -> Data:
    """Find the cases to train on, or make the built-in phantoms if no folder is named.

    Parameters
    ----------
    settings : Settings
        Without a ``data_path``, phantoms are taken from ``data/``; rank 0 makes them if they are
        not there.
    communicator : Communicator
    progress : Progress

    Raises
    ------
    AgreedError
        On every rank, if on any the folder or, within two seconds, a file turned out to be bad.
    """
    made_of = (PHANTOM_CASES, PHANTOM_SHAPE, PHANTOM_SEED)
    path = Path(settings.data_path or PHANTOMS / phantom.folder_name(*made_of))
    with communicator.together():
        if settings.data_path is None and communicator.rank == 0:
            there = path.exists()
            with nullcontext() if there else progress.task(f"making {PHANTOM_CASES} phantoms"):
                phantom.make_dataset(path, *made_of)
    with communicator.together():
        dataset = read_dataset(path, labels=settings.labels)
        train, validation, test = split(
            dataset.cases, settings.train_test_split, settings.validate_test_split, settings.random_seed
        )
        volumes = Volumes(half_the_memory(communicator.local_size))
        whole, share = [*test, *validation], slice(communicator.rank, None, communicator.size)
        # All headers at once, for they are short; the voxels in the background.
        check_patch_fits_all(train[share], settings.patch_size)
        spacings = {
            str(case.image_paths[0]): read_header(case.image_paths[0])[1].spacing
            for case in [*train, *whole][share]
        }
        inspector = Inspector([*whole, *train][share], volumes, settings.patch_size, whole)
        inspector.check(wait=_PATIENCE)
    everyones = dict(ChainMap(*communicator.broadcast_object(communicator.gather(spacings))))
    warn(spacing.notes(everyones), progress)
    usual = spacing.usual(list(everyones.values()))
    return Data(dataset, train, validation, test, volumes, inspector, usual)


def warn_of_images(data: Data, communicator: Communicator, progress: Progress) -> None:
    """Say what any rank has found odd in an image since the last call; every rank calls this."""
    everyones = communicator.gather(data.inspector.take_notes())
    warn([note for notes in everyones for note in notes], progress)


def warn(notes: Sequence[str], progress: Progress) -> None:
    """Print some warnings, and how many more there are."""
    for note in notes[:_WARNINGS]:
        progress.line(printable(f"warning: {note}"))
    if len(notes) > _WARNINGS:
        progress.line(f"warning: and {count(len(notes) - _WARNINGS, 'file')} more of this kind")
