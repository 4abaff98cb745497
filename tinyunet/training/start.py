"""The data of a training, in three parts, and the plan that it prints."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from kernels.base import machine
from tinyunet.common.terminal import count, in_bytes, printable
from tinyunet.data import phantom
from tinyunet.data.cases import Case, Dataset, check_patch_fits, first_present, network_shape
from tinyunet.data.conventions import read_as
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.nifti import read_header
from tinyunet.data.patients import Parts, patient_of, read_patients, split
from tinyunet.data.spacing import Spacing, differs, in_mm, of_network
from tinyunet.training import estimate
from tinyunet.training.estimate import Workload, memory_at_hand
from tinyunet.training.progress import Job, Progress
from tinyunet.training.samples import Inspector, Volumes, half_the_memory
from tinyunet.training.settings import Settings
from tinyunet.unet import UNet

# The built-in data set: 41 heads to train on, 4 to validate on, 3 to test on.
PHANTOMS = Path("data")
PHANTOM_CASES, PHANTOM_SHAPE, PHANTOM_SEED = _MADE_OF = 48, (64, 72, 56), 0
_WARNINGS = 5  # printed at once, at most
_PATIENCE = 2.0  # seconds to inspect files, enough for the phantoms; the rest is inspected meanwhile


class Data(NamedTuple):
    """The cases of a training, each in one of three parts."""

    dataset: Dataset  # where the cases come from
    train: list[Case]
    validation: list[Case]
    test: list[Case]
    volumes: Volumes  # keeps what this rank has read
    inspector: Inspector  # reads this rank's share of all cases in the background
    spacing: Spacing | None  # of the voxels that the network sees, in millimetres; None if they differ
    resampled: int  # how many cases are
    shapes: dict[str, tuple[int, int, int]]  # of all cases as the network sees them, by name

    def case_names(self) -> dict[str, list[str]]:
        """Return the names of the cases of each part, in their order, which the order of patches follows."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {part: [case.name for case in cases] for part, cases in parts.items()}

    def grid(self) -> str:
        """Return the size of the network's voxels, and how many cases are resampled to it, in words."""
        if self.spacing is None:
            return "voxels of different sizes, and nothing is resampled"
        cases = count(self.resampled, "case is resampled", "cases are resampled")
        return f"voxels of {in_mm(self.spacing)}" + (f"; {cases} to it" if self.resampled else "")

    def _doubt(self) -> str:
        """Return, in words, why the scores of the test are too good, if they are."""
        chosen = {case.name for case in self.validation} & {case.name for case in self.test}
        return " (the same: too few for a test of its own, whose scores are too good)" if chosen else ""

    def warn(self, job: Job) -> None:
        """Print the oddities that any rank found in images since the last call; every rank calls this."""
        everyones = job.communicator.gather(self.inspector.take_notes())
        _warn([note for notes in everyones for note in notes], job.progress)

    def workload(self, job: Job, model: UNet, batch_shape: tuple[int, ...]) -> Workload:
        """Return what decides memory and time."""
        seen = self.spacing, self.dataset.modalities
        validation = [estimate.predicted_shape(self.shapes[case.name], *seen) for case in self.validation]
        ranks = job.communicator.local_size
        return Workload(job.settings, model.config, batch_shape, [*self.shapes.values()], validation, ranks)

    def plan(self, job: Job, model: UNet, needed: int) -> str:
        """Return a few lines about the task, the data, the model and the bytes that a rank will need."""
        settings, parameters = job.settings, sum(each.data.size for each in model.parameters())
        patch = " x ".join(map(str, settings.patch[: settings.dim]))
        return "\n".join(
            [
                printable(f"data     {self.dataset.path}"),
                f"         {printable(', '.join(self.dataset.modalities))}; {len(self.train)} cases to train "
                f"on, {len(self.validation)} to validate on, {len(self.test)} to test on{self._doubt()}",
                printable(f"         {read_as(*self.dataset.meaning)}"),
                f"         {self.grid()}",
                f"model    U-Net of {count(settings.depth, 'level')} from "
                f"{count(settings.filters, 'filter')} on, {parameters:,} parameters",
                f"steps    {count(settings.epochs, 'epoch')}, "
                f"{count(settings.batch, 'patch', 'patches')} of {patch} voxels a step",
                f"ranks    {count(job.communicator.size, 'rank')} of {count(machine.threads(), 'thread')}",
                f"memory   about {in_bytes(needed)[0]} a rank, of {in_bytes(memory_at_hand())[0]} here",
            ]
        )


def find_data(job: Job) -> Data:
    """Find the cases to train on, or make the built-in phantoms in ``data/`` if no folder is named.

    AgreedError on every rank, if on any rank the folder or, within two seconds, a file turned out to be bad.
    """
    settings, communicator, progress = job
    path = place_of(settings.data_path)
    with communicator.together():
        if settings.data_path is None and communicator.rank == 0:
            with nullcontext() if path.exists() else progress.task(f"making {PHANTOM_CASES} phantoms"):
                phantom.make_dataset(path, *_MADE_OF)
    with communicator.together():
        dataset = read_dataset(path, True, settings.labels, settings.allow_missing, settings.modalities)
        train, validation, test = parts = split_cases(dataset.cases, settings)
        whole, share = [*test, *validation], slice(communicator.rank, None, communicator.size)
        headers = {}
        # All headers at once, for they are short; the voxels in the background.
        for number, case in [*enumerate([*train, *whole])][share]:
            shape, geometry = read_header(path := first_present(case.image_paths))
            headers[path] = case.name, shape[:3], geometry, number < len(train)
    gathered = communicator.broadcast_object(communicator.gather(headers))
    spacings = [geometry.spacing for of_rank in gathered for _, _, geometry, _ in of_rank.values()]
    target = of_network(settings.spacing, spacings)
    with communicator.together():
        shapes = {}
        for path, (name, shape, geometry, is_cut) in headers.items():
            shapes[name] = network_shape(path, shape, geometry, target)
            if is_cut:
                check_patch_fits(path, shapes[name], settings.patch)
        volumes = Volumes(half_the_memory(communicator.local_size), target, settings.allow_missing)
        inspector = Inspector([*whole, *train][share], volumes)
        inspector.check(wait=_PATIENCE)
    everyones = communicator.broadcast_object(communicator.gather(shapes))
    all_shapes = {name: shape for of_rank in everyones for name, shape in of_rank.items()}
    others = sum(target is not None and differs(each, target) for each in spacings)
    return Data(dataset, *parts, volumes, inspector, target, others, all_shapes)


def place_of(data_path: str | None) -> Path:
    """Return the folder of the data, which are the phantoms if no other is named."""
    return Path(data_path or PHANTOMS / phantom.folder_name(*_MADE_OF))


def split_cases(cases: Sequence[Case], settings: Settings) -> Parts:
    """Split the cases as the settings say; DataError if they are too few."""
    patients = read_patients(settings.patients) if settings.patients else patient_of
    folds = (settings.folds, settings.fold) if settings.folds else None
    shares = settings.train_test_split, settings.validate_test_split
    return split(cases, *shares, settings.random_seed, patients, folds)


def _warn(notes: Sequence[str], progress: Progress) -> None:
    """Print some warnings, and how many more there are."""
    for note in notes[:_WARNINGS]:
        progress.line(printable(f"warning: {note}"))
    if len(notes) > _WARNINGS:
        progress.line(f"warning: and {count(len(notes) - _WARNINGS, 'file')} more of this kind")
