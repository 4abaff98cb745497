"""Which patches a rank is given, and having them ready when they are wanted."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.augment import augment
from tinyunet.data.decathlon import Case, check_patch_fits, load_case
from tinyunet.data.patches import generator, sample_patch

# Half of the patches are cut around a tumour voxel, which is one voxel in a hundred otherwise.
FOREGROUND_SHARE = 0.5

Volume = tuple[NDArray[np.float32], NDArray[np.uint8]]


class Batch(NamedTuple):
    """Patches and their labels, shape=(MB, D, H, W, C) float32 and (MB, D, H, W) uint8."""

    images: NDArray[np.float32]
    labels: NDArray[np.uint8]


class Volumes:
    """Cases read from their files once and kept, the latest ones, up to a number of bytes.

    Any thread may ask for any case.

    Parameters
    ----------
    most_bytes : int
        The last one read is kept even if it is larger.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, Volume] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, case: Case) -> Volume:
        """Return image and labels, shape=(D, H, W, C) and (D, H, W); not to be changed.

        Raises
        ------
        DataError
            As :func:`tinyunet.data.decathlon.load_case`.
        """
        with self._lock:
            if case.name in self._kept:
                self._kept.move_to_end(case.name)
                return self._kept[case.name]
        image, labels, _ = load_case(case)
        with self._lock:
            self._kept[case.name] = image, labels
            used = sum(i.nbytes + k.nbytes for i, k in self._kept.values())
            while used > self._most_bytes and len(self._kept) > 1:
                _, (old_image, old_labels) = self._kept.popitem(last=False)
                used -= old_image.nbytes + old_labels.nbytes
        return image, labels


def half_the_memory(ranks_here: int) -> int:
    """Return this rank's part of half of the memory of its node, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks_here


def epoch_samples(
    cases: int, patches_per_case: int, batch: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the patches of an epoch in the order they are trained on: the same on every rank.

    Parameters
    ----------
    cases, patches_per_case : int
        Patch ``i`` belongs to case ``i % cases``.
    batch : int
        Patches in a step. If they do not divide those of the epoch, the first come again at its
        end, so that each patch is trained on.
    seed, epoch : int
        Another order for each.

    Returns
    -------
    samples : ndarray, shape=(steps, batch), int64
    """
    count = cases * patches_per_case
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = -(-count // batch)
    return np.resize(order, (steps, batch))


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
    """

    def __init__(
        self, cases: Sequence[Case], volumes: Volumes, patch_size: tuple[int, int, int]
    ) -> None:
        self._cases, self._volumes, self._patch_size = cases, volumes, patch_size
        self._error: Exception | None = None
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

    def _read(self) -> None:
        try:
            for case in self._cases:
                image, _ = self._volumes[case]
                check_patch_fits(case.image_paths[0], image.shape, self._patch_size)
        except Exception as error:
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
        This rank gets the ``rank``-th of ``ranks`` equal parts of each step's patches.
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
    ) -> None:
        self._cases, self._volumes, self._patch_size = cases, volumes, patch_size
        self._patches_per_case, self.batch_size, self._seed = patches_per_case, batch, seed
        share = batch // ranks
        self._mine = slice(rank * share, (rank + 1) * share)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self._cases) * self._patches_per_case // self.batch_size)

    @property
    def volumes(self) -> int:
        """Patches in an epoch, over all ranks."""
        return self.steps * self.batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Give this rank's batches of an epoch; the next is made while one is trained on.

        Raises
        ------
        DataError
            As :meth:`Volumes.__getitem__`, or if a patch is larger than the volume.
        """
        samples = epoch_samples(
            len(self._cases), self._patches_per_case, self.batch_size, self._seed, epoch
        )[:, self._mine]
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            coming = pool.submit(self.batch, epoch, samples[0])
            for following in samples[1:]:
                batch = coming.result()
                coming = pool.submit(self.batch, epoch, following)
                yield batch
            yield coming.result()

    def batch(self, epoch: int, samples: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Cut and augment the patches of the numbers given."""
        images, labels = zip(*(self._patch(epoch, int(s)) for s in samples), strict=True)
        return Batch(np.stack(images), np.stack(labels))

    def _patch(self, epoch: int, sample: int) -> Volume:
        case = self._cases[sample % len(self._cases)]
        image, labels = self._volumes[case]
        check_patch_fits(case.image_paths[0], image.shape, self._patch_size)
        dice = generator(self._seed, epoch, sample)
        return augment(*sample_patch(image, labels, self._patch_size, FOREGROUND_SHARE, dice), dice)
