"""Which patches a rank is given, and having them ready when they are wanted."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.base.limits import memory_limit
from tinyunet.data.cases import Case, check_patch_fits, load_case
from tinyunet.data.patches import augment, generator, sample_patch

# Half of the patches are cut around a tumour voxel, which is one voxel in a hundred otherwise.
FOREGROUND_SHARE = 0.5

Volume = tuple[NDArray[np.float32], NDArray[np.uint8]]


class Batch(NamedTuple):
    """A rank's patches.

    Attributes
    ----------
    images, labels : ndarray, shape=(MB, D, H, W, C) float32 and (MB, D, H, W) uint8
    weight : float
        Share of these patches in all that a step of the optimizer is made of, over ranks and
        batches; 0 if they are here only because a rank must compute something.
    ends_step : bool
        Whether the optimizer's step follows.
    alike : bool
        Whether each rank has as many.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.uint8]
    weight: float = 1.0
    ends_step: bool = True
    alike: bool = True

    @property
    def patches(self) -> int:
        """Patches that count."""
        return len(self.images) if self.weight else 0


class Volumes:
    """Cases read from their files once and kept, the latest ones, up to a number of bytes.

    Any thread may ask for any case.

    Parameters
    ----------
    most_bytes : int
        The last one read is kept even if it is larger.

    Attributes
    ----------
    notes : dict of list of str
        What is odd about the images read so far, by the name of the case.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.notes: dict[str, list[str]] = {}
        self._kept: OrderedDict[str, Volume] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, case: Case) -> Volume:
        """Return image and labels, shape=(D, H, W, C) and (D, H, W); not to be changed.

        Raises
        ------
        DataError
            As :func:`tinyunet.data.cases.load_case`.
        """
        with self._lock:
            if case.name in self._kept:
                self._kept.move_to_end(case.name)
                return self._kept[case.name]
        notes: list[str] = []
        image, labels, _ = load_case(case, notes)
        with self._lock:
            self.notes[case.name] = notes
            self._kept[case.name] = image, labels
            used = sum(i.nbytes + k.nbytes for i, k in self._kept.values())
            while used > self._most_bytes and len(self._kept) > 1:
                _, (old_image, old_labels) = self._kept.popitem(last=False)
                used -= old_image.nbytes + old_labels.nbytes
        return image, labels


def half_the_memory(ranks_here: int) -> int:
    """Return this rank's part of half of the memory of its node, or of its container, in bytes."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(machine, memory_limit())) // 2 // ranks_here


def epoch_samples(
    cases: int, patches_per_case: int, batch: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the patches of an epoch, batch by batch: the same on every rank.

    Parameters
    ----------
    cases, patches_per_case : int
        Patch ``i`` belongs to case ``i % cases``.
    batch : int
        Patches in each but the last, which has what is left.
    seed, epoch : int
        Another order for each.

    Returns
    -------
    samples : list of ndarray of int64
        Each patch once.
    """
    count = cases * patches_per_case
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]


def shares(patches: int, ranks: int) -> list[int]:
    """Return how many of a batch's patches each rank gets: as equal as can be."""
    return [len(part) for part in np.array_split(np.arange(patches), ranks)]


class Inspector:
    """Reads cases in the background, so that a bad file is known soon and not when its turn comes.

    Parameters
    ----------
    cases : sequence of Case
        Read in this order.
    volumes : Volumes
        Keeps them.
    patch_size : (D, H, W)
        Has to fit into each.
    whole : sequence of Case
        But for these: no patches are cut from them, and what segments them pads.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        volumes: Volumes,
        patch_size: tuple[int, int, int],
        whole: Sequence[Case] = (),
    ) -> None:
        self._cases, self._volumes, self._patch_size = cases, volumes, patch_size
        self._whole = whole
        self._notes: list[str] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="inspector", daemon=True)
        self._thread.start()

    def check(self, wait: float = 0.0) -> None:
        """Raise what was found so far.

        Parameters
        ----------
        wait : float
            Seconds to wait for the last case, at most.

        Raises
        ------
        DataError
            As :meth:`Volumes.__getitem__`, or if a patch is larger than a volume.
        """
        if wait > 0:
            self._thread.join(wait)
        if self._error is not None:
            raise self._error

    def take_notes(self) -> list[str]:
        """Return what was found odd since the last call: a line for each file."""
        notes, self._notes = self._notes, []
        return notes

    def _read(self) -> None:
        try:
            for case in self._cases:
                image, _ = self._volumes[case]
                self._notes = self._notes + self._volumes.notes[case.name]
                if case not in self._whole:
                    check_patch_fits(case.image_paths[0], image.shape, self._patch_size)
        except BaseException as error:  # a thread that ends tells nobody
            self._error = error


class Loader:
    """The batches of one rank.

    What a patch holds depends on the seed, the epoch and its number alone: not on the number of
    ranks, nor on which of them cuts it, nor on when.

    Parameters
    ----------
    cases : sequence of Case
        What to train on.
    volumes : Volumes
        Where to get them from.
    patch_size : (D, H, W)
    patches_per_case, batch, seed : int
        See :func:`epoch_samples`.
    rank, ranks : int
        This rank gets the ``rank``-th of ``ranks`` parts of each batch. They are equal, but for the
        epoch's last batch; if that has fewer patches than there are ranks, the last ranks get one
        that does not count.
    accumulate : int
        Batches in a step of the optimizer; the epoch's last step may have fewer.

    Attributes
    ----------
    batch_size : int
        Patches in a batch, over all ranks.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        volumes: Volumes,
        patch_size: tuple[int, int, int],
        patches_per_case: int,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self._cases, self._volumes, self._patch_size = cases, volumes, patch_size
        self._patches_per_case, self.batch_size, self._seed = patches_per_case, batch, seed
        self._rank, self._ranks, self._accumulate = rank, ranks, accumulate

    @property
    def steps(self) -> int:
        """Steps of the optimizer in an epoch."""
        return -(-self.volumes // (self.batch_size * self._accumulate))

    @property
    def volumes(self) -> int:
        """Patches in an epoch, over all ranks."""
        return len(self._cases) * self._patches_per_case

    def batch_shapes(self) -> list[tuple[int, int, int, int]]:
        """Return the shapes (MB, D, H, W) that batches of any rank have, the usual one first."""
        full = [self.batch_size] if self.volumes >= self.batch_size else []
        last = self.volumes % self.batch_size
        batches = full + ([last] if last else [])
        sizes = [max(1, size) for batch in batches for size in shares(batch, self._ranks)]
        return [(size, *self._patch_size) for size in dict.fromkeys(sizes)]

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Give this rank's batches of an epoch; the next is made while one is trained on.

        Parameters
        ----------
        epoch : int
        steps_done : int
            Batches of these first steps are left out; one step is left at least.

        Raises
        ------
        DataError
            As :meth:`Volumes.__getitem__`, or if a patch is larger than the volume.
        """
        parts = self._parts(epoch)[steps_done * self._accumulate :]
        coming = self._begin_batch(epoch, *parts[0])
        for following in parts[1:]:
            batch = coming.result()
            coming = self._begin_batch(epoch, *following)
            yield batch
        yield coming.result()

    def _begin_batch(self, *arguments: Any) -> "Future[Batch]":
        """Make a batch in the background; see :meth:`_batch`.

        Not by way of an executor: while a disk keeps its thread waiting, Python could not end.
        """
        coming = Future[Batch]()

        def make() -> None:
            try:
                coming.set_result(self._batch(*arguments))
            except BaseException as error:
                coming.set_exception(error)

        threading.Thread(target=make, name="loader", daemon=True).start()
        return coming

    def _parts(self, epoch: int) -> list[tuple[NDArray[np.int64], float, bool, bool]]:
        """Patches of this rank in each batch, and what else there is in a :class:`Batch`."""
        batches = epoch_samples(len(self._cases), self._patches_per_case, self.batch_size, self._seed, epoch)
        found = []
        for number, batch in enumerate(batches):
            first = number - number % self._accumulate
            step = batches[first : first + self._accumulate]
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
        images, labels = zip(*(self._patch(epoch, int(s)) for s in samples), strict=True)
        return Batch(np.stack(images), np.stack(labels), weight, ends_step, alike)

    def _patch(self, epoch: int, sample: int) -> Volume:
        case = self._cases[sample % len(self._cases)]
        image, labels = self._volumes[case]
        check_patch_fits(case.image_paths[0], image.shape, self._patch_size)
        random = generator(self._seed, epoch, sample)
        patch = sample_patch(image, labels, self._patch_size, FOREGROUND_SHARE, random)
        return augment(*patch, random)
