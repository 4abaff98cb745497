"""The patches of a rank, read and cut in the background.

Seed, epoch and number of a patch decide its content: not the number of ranks, nor the rank that cuts it,
nor the time.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kernels.base.limits import memory_limit
from tinyunet.data.augmentation import augment, augment_fully, drop_sequences
from tinyunet.data.cases import Case, check_patch_fits, first_present, load_case, load_labels
from tinyunet.data.nifti import read_header
from tinyunet.data.patches import choose_corner, generator, sample_patch
from tinyunet.data.spacing import Spacing
from tinyunet.training.settings import Settings

T = TypeVar("T")
Volume = tuple[NDArray[np.float32], NDArray[np.uint8]]


class Batch(NamedTuple):
    """A rank's patches.

    ``weight`` is the share of these patches in all patches of an optimizer's step, over ranks and batches; 0
    if they are here only because a rank must compute something.
    """

    images: NDArray[np.float32]  # shape=(MB, D, H, W, C), in two dimensions (MB, D, H, C)
    labels: NDArray[np.uint8]  # shape=(MB, D, H, W), or (MB, D, H)
    weight: float = 1.0
    ends_step: bool = True  # whether the optimizer's step follows
    alike: bool = True  # whether each rank has as many

    @property
    def patches(self) -> int:
        """Patches that count."""
        return len(self.images) if self.weight else 0


class Volumes:
    """Keeps the cases that were read last, up to ``most_bytes``, and one at least. Any thread may ask.

    ``spacing`` and ``allow_missing`` are those of :func:`tinyunet.data.cases.load_image`.
    """

    def __init__(self, most_bytes: int, spacing: Spacing | None = None, allow_missing: bool = False) -> None:
        self._most_bytes = most_bytes
        self._reading = spacing, allow_missing
        self.notes: dict[str, list[str]] = {}  # what is odd about the images read so far, by the case's name
        self._kept: OrderedDict[str, Volume] = OrderedDict()
        self._lock = threading.Lock()

    def truth(self, case: Case) -> NDArray[np.uint8]:
        """Return the labels on the image's own voxels, shape=(D, H, W), to be read only; or DataError."""
        labels, (shape, geometry) = self[case][1], read_header(first_present(case.image_paths))
        return labels if labels.shape == shape[:3] else load_labels(case, geometry)

    def __getitem__(self, case: Case) -> Volume:
        """Return image and labels, shape=(D, H, W, C) and (D, H, W), to be read only; or raise DataError."""
        with self._lock:
            if case.name in self._kept:
                self._kept.move_to_end(case.name)
                return self._kept[case.name]
        notes: list[str] = []
        image, labels, _ = load_case(case, notes, *self._reading)
        with self._lock:
            self.notes[case.name] = notes
            self._kept[case.name] = image, labels
            used = sum(array.nbytes for volume in self._kept.values() for array in volume)
            while used > self._most_bytes and len(self._kept) > 1:
                used -= sum(array.nbytes for array in self._kept.popitem(last=False)[1])
        return image, labels


def half_the_memory(ranks_here: int) -> int:
    """Return this rank's part of half of the memory of its node, or of its container, in bytes."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(machine, memory_limit())) // 2 // ranks_here


def in_background(name: str, work: Callable[..., T], *arguments: Any) -> futures.Future[T]:
    """Start work in a thread of its own, and return its future result.

    An executor would not do: Python could not end while a disk keeps its thread waiting.
    """
    result = futures.Future[T]()

    def run() -> None:
        try:
            result.set_result(work(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


class Inspector:
    """Reads cases in the background, in their order: a bad file ends the training at once, not in its turn.

    ``volumes`` keep the cases.
    """

    def __init__(self, cases: Sequence[Case], volumes: Volumes) -> None:
        self._cases, self._volumes = cases, volumes
        self._notes: list[str] = []
        self._reading = in_background("inspector", self._read)

    def check(self, wait: float = 0.0) -> None:
        """Raise the error found so far, if any: DataError. Wait up to ``wait`` seconds for the last case."""
        for done in futures.wait([self._reading], wait).done:
            done.result()

    def take_notes(self) -> list[str]:
        """Return the oddities found since the last call: a line for each file."""
        notes, self._notes = self._notes, []
        return notes

    def _read(self) -> None:
        for case in self._cases:
            self._volumes[case]
            self._notes = self._notes + self._volumes.notes[case.name]


def epoch_samples(
    cases: int, patches_per_case: int, batch: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the patches of an epoch in batches: each patch once, the same order on every rank.

    Patch ``i`` belongs to case ``i % cases``. The last batch has the rest. Seed and epoch decide the order.
    """
    count = cases * patches_per_case
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]


class Loader:
    """The batches of one rank.

    Each rank gets one of ``ranks`` parts of each batch. The parts are equal, but for the epoch's last batch;
    if that has fewer patches than there are ranks, the last ranks get one that does not count. The settings
    say how many patches a case, a batch and a step have. An error that the inspector finds ends the training.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        volumes: Volumes,
        settings: Settings,
        rank: int = 0,
        ranks: int = 1,
        inspector: Inspector | None = None,
    ) -> None:
        self._cases, self._volumes, self._settings = cases, volumes, settings
        self._rank, self._ranks, self._inspector = rank, ranks, inspector
        self.batch_size = settings.batch  # patches, over all ranks
        self.volumes = len(cases) * settings.patches_per_case  # patches in an epoch, over all ranks
        self.steps = -(-self.volumes // (self.batch_size * settings.accumulate))  # of the optimizer

    def batch_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of any rank's batches, (MB, D, H, W) or (MB, D, H), the usual one first."""
        whole, last = divmod(self.volumes, self.batch_size)
        batches = [self.batch_size] * (whole > 0) + [last] * (last > 0)
        parts = [np.array_split(np.arange(batch), self._ranks) for batch in batches]
        sizes = dict.fromkeys(max(1, len(part)) for batch in parts for part in batch)
        return [(size, *self._settings.patch[: self._settings.dim]) for size in sizes]

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Give this rank's batches of an epoch, without the batches of the first ``steps_done`` steps.

        The next batch is made while the model trains on one. DataError as :meth:`Volumes.__getitem__`, or if
        a patch is larger than the volume.
        """
        parts = self._parts(epoch)[steps_done * self._settings.accumulate :]
        next_batch = in_background("loader", self._batch, epoch, *parts[0])
        for following in [*parts[1:], None]:
            if self._inspector:
                self._inspector.check()
            batch = next_batch.result()
            if following is not None:
                next_batch = in_background("loader", self._batch, epoch, *following)
            yield batch

    def _parts(self, epoch: int) -> list[tuple[NDArray[np.int64], float, bool, bool]]:
        """Return this rank's patches in each batch, and the other entries of a :class:`Batch`."""
        settings, found = self._settings, []
        order = len(self._cases), settings.patches_per_case, self.batch_size, settings.random_seed
        batches = epoch_samples(*order, epoch)
        for number, batch in enumerate(batches):
            first = number - number % settings.accumulate
            step = batches[first : first + settings.accumulate]
            mine = np.array_split(batch, self._ranks)[self._rank]
            weight = len(mine) / sum(map(len, step))
            ends_step = number + 1 == first + len(step)
            alike = len(batch) % self._ranks == 0
            found.append((mine if len(mine) else batch[:1], weight, ends_step, alike))
        return found

    def _batch(
        self, epoch: int, samples: NDArray[np.int64], weight: float, ends_step: bool, alike: bool
    ) -> Batch:
        """Cut and augment the patches of the numbers given."""
        patches = [self._patch(epoch, int(sample)) for sample in samples]
        images, labels = map(np.stack, zip(*patches, strict=True))
        if self._settings.dim == 2:
            images, labels = images[:, :, :, 0], labels[:, :, :, 0]
        return Batch(images, labels, weight, ends_step, alike)

    def _patch(self, epoch: int, sample: int) -> Volume:
        case, settings = self._cases[sample % len(self._cases)], self._settings
        image, labels = self._volumes[case]
        check_patch_fits(case.image_paths[0], image.shape, settings.patch)
        random = generator(settings.random_seed, epoch, sample)
        if settings.augmentation == "full":
            corner = choose_corner(labels, settings.patch, settings.foreground, random).tolist()
            image, labels = augment_fully(image, labels, corner, settings.patch, random)
        else:
            image, labels = sample_patch(image, labels, settings.patch, settings.foreground, random)
            if settings.augmentation == "light":
                image, labels = augment(image, labels, random)
        drop_sequences(image, settings.sequence_dropout, random)
        return image, labels
