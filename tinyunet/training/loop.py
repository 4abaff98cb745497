"""An epoch of data-parallel training: each rank trains on its patches; one sum of all gradients a step.

Parameters, optimizer and random generators are the same on every rank at all times. Within an epoch two
things may differ: batch norm's running statistics, if they are not synchronised, and rounding errors that
compressed gradients have still to send. A checkpoint holds a row of these for each rank.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import AgreedError
from tinyunet.functional import BATCH_NORM_MOMENTUM
from tinyunet.nn import BatchNorm
from tinyunet.optim import Adam
from tinyunet.parallel.buckets import GradientSum
from tinyunet.parallel.synchronized_norm import Synchronized
from tinyunet.parallel.timeline import KERNELS
from tinyunet.schedules import Schedule, polynomial, warm_up
from tinyunet.training.pauses import Pause, Pauses
from tinyunet.training.progress import Job
from tinyunet.training.samples import Batch, Loader
from tinyunet.training.settings import Settings
from tinyunet.training.step import Result, cancelled_biases, compiled_gradients, eager_gradients, foreground
from tinyunet.unet import UNet

Array = NDArray[Any]


class EpochResult(NamedTuple):
    """The loss, as a mean over the patches of an epoch, and Dice of all classes but the background.

    That Dice is of probabilities, not of the most probable class: the loss has its sums anyway. It
    is taken over all voxels of the epoch and all classes together, so it lies below the Dice of
    the validation while the network is unsure.
    """

    loss: float
    dice: float


class StepResult(NamedTuple):
    """What a step of all ranks found: loss, Dice as in :class:`EpochResult`, and how the step was made."""

    loss: float
    dice: float
    lr: float
    wait: float  # seconds that this rank waited for its patches
    gradient_norm: float | None  # before it was clipped; None without a limit


def clip(gradients: Array, most: float) -> float:
    """Scale gradients, in place, down to a Euclidean norm of ``most`` if it is larger; return the norm.

    Source: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    norm = math.sqrt(float(np.dot(gradients, gradients)))
    if norm > most:
        gradients *= np.float32(most / norm)
    return norm


def schedule_of(settings: Settings, steps_per_epoch: int) -> Schedule:
    """Return the learning rate of each step: it rises to its highest, then falls to 0.

    A run that was extended does so once more: its second part is a training that begins from good weights.
    """
    ends, warm = [0, *settings.extended_at, settings.epochs], settings.warmup_epochs
    parts = []
    for first, end in itertools.pairwise(ends):
        steps = (end - first) * steps_per_epoch
        rising = steps // 20 if warm is None else round(warm * steps_per_epoch)
        parts.append(
            (first * steps_per_epoch, warm_up(polynomial(settings.highest_lr, steps), max(1, rising)))
        )

    def lr(step: int) -> float:
        first, schedule = next(part for part in reversed(parts) if part[0] <= step)
        return schedule(step - first)

    return lr


class Trainer:
    """Runs epochs; after the construction and after each epoch, all ranks have the same model and optimizer.

    The model is trained in place, from rank 0's parameters, on this rank's patches, which the loader gives.
    ``pauses`` gives the reasons for a pause between two steps, ``schedule`` the learning rate of each step,
    counted from 0; by default :func:`schedule_of` the settings.
    """

    def __init__(
        self,
        job: Job,
        model: UNet,
        optimizer: Adam,
        loader: Loader,
        pauses: Pauses | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        settings, self._communicator, self._progress = job
        self._clip_norm = settings.clip_norm
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.pauses = pauses or Pauses(self._communicator, None)
        self._schedule = schedule or schedule_of(settings, loader.steps)
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm):
                module.momentum = BATCH_NORM_MOMENTUM
        self.number, self.step = 0, 0  # the epoch, and how many of its steps have been done
        self.total = np.zeros(4)  # over its patches so far: loss, intersection and size of Dice, their number
        self._broadcast_state()
        self._sums = GradientSum(optimizer, self._communicator, settings.exchange)
        synchronize = settings.exchange.synchronize and self._communicator.size > 1
        self._synchronized = Synchronized(model, self._communicator) if synchronize else None
        shape = (*loader.batch_shapes()[0], model.config["in_channels"])
        self._cancelled = {id(bias) for bias in cancelled_biases(model.train(), shape)}
        if settings.eager:
            self._gradients = eager_gradients(model, optimizer)
        else:
            self._gradients = compiled_gradients(model, optimizer, shape, **settings.compile_options)

    def epoch(
        self,
        number: int,
        on_pause: Callable[[Pause], None] = lambda pause: None,
        on_step: Callable[[StepResult], None] = lambda result: None,
    ) -> EpochResult:
        """Train on every patch of an epoch, or on those that are left of the present one.

        ``number`` is that of the present epoch, or the next. ``on_step`` is called after each step, and
        ``on_pause`` between two steps when there is something to pause for. AgreedError on every rank, if a
        file of any rank cannot be used, or the loss is no number any more.
        """
        if number != self.number:
            self.number, self.step, self.total = number, 0, np.zeros(4)
        self.model.train()
        batches = self.loader.epoch(number, self.step)
        while self.step < self.loader.steps:
            sums = self._step(batches)
            if not np.isfinite(sums[0]):
                raise self._diverged(f"the loss is {sums[0]}", self.step + 1)
            self.optimizer.lr = self._schedule(self.optimizer.steps)
            norm = clip(self.optimizer.flat_gradients, self._clip_norm) if self._clip_norm else None
            start, timeline = time.perf_counter(), self._communicator.timeline
            self.optimizer.step()
            if timeline:
                timeline.span(KERNELS, type(self.optimizer).__name__, start, time.perf_counter())
            self.step += 1
            self.total += sums[:4]
            on_step(StepResult(sums[0] / sums[3], sums[1] * 2 / sums[2], self.optimizer.lr, self._wait, norm))
            loss, dice = self._result()
            self._progress.step(int(sums[3]), loss=loss, Dice=dice)
            if self.step == self.loader.steps:
                self._check_parameters()
                statistics = _joined(self.model.buffers())
                self._communicator.allreduce_mean(statistics)
                _spread(statistics, self.model.buffers())
            elif any(pause := self.pauses.decide(sums[4:])):
                self._check_parameters()
                on_pause(pause)
        return self._result()

    def own_arrays(self) -> dict[str, Array]:
        """Return at rank 0 the arrays that differ from rank to rank, for :meth:`take_own_arrays`."""
        found = {"statistics": self._gather_rows(self.model.buffers())}
        if self._sums.residuals:
            found["residuals"] = self._gather_rows(self._sums.residuals)
        return found

    def take_own_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore the arrays that :meth:`own_arrays` returned.

        With another number of ranks, each takes the mean of all statistics, and residuals are dropped.
        """
        rows, ranks = arrays["statistics"], self._communicator
        mean = rows[0] if len(rows) == 1 else rows.mean(axis=0, dtype=np.float64)
        _spread(rows[ranks.rank] if len(rows) == ranks.size else mean, self.model.buffers())
        rows, size = arrays.get("residuals", np.empty(0)), sum(array.size for array in self._sums.residuals)
        if size and rows.shape == (ranks.size, size):
            _spread(rows[ranks.rank], self._sums.residuals)

    def _averages(self) -> list[Array]:
        return [getattr(self.optimizer, name) for name in self.optimizer.averages]

    def _broadcast_state(self) -> None:
        """Send every rank the state of rank 0: parameters, statistics, optimizer, random generators."""
        optimizer, ranks = self.optimizer, self._communicator
        for array in (optimizer.flat_parameters, *self._averages(), *self.model.buffers()):
            ranks.broadcast(array)
        optimizer.steps, optimizer.lr = ranks.broadcast_object((optimizer.steps, optimizer.lr))
        self.model.load_random_state(ranks.broadcast_object(self.model.random_state()))

    def _gather_rows(self, arrays: Sequence[Array]) -> Array:
        """Return at rank 0 the numbers of each rank, a row for each; one row if all are the same."""
        rows = self._communicator.gather(_joined(arrays))
        if not rows:
            return np.empty((0, 0), np.float32)
        same = all(np.array_equal(row, rows[0]) for row in rows)
        return np.stack(rows[:1] if same else rows)

    def _check_parameters(self) -> None:
        """Check, before a checkpoint is written, that all parameters are finite."""
        for array in (self.optimizer.flat_parameters, *self._averages()):
            if not np.isfinite(array).all():
                raise self._diverged("a parameter is no number any more", self.step)

    def _diverged(self, what: str, step: int) -> AgreedError:
        return AgreedError(f"{what} in epoch {self.number}, step {step}; try a smaller --lr")

    def _result(self) -> EpochResult:
        loss, intersection, size, patches = self.total.tolist()
        return EpochResult(loss / patches, 2 * intersection / size)

    def _step(self, batches: Iterator[Batch]) -> NDArray[np.float64]:
        """Fill the gradients of a step, the same on all ranks, and return sums.

        The sums over all patches of the step are those of :attr:`total`; sums over all ranks follow, of
        reasons to pause.
        """
        sums, ends_step, self._wait = np.zeros(4 + Pauses.KINDS), False, 0.0
        while not ends_step:
            start = time.perf_counter()
            with self._communicator.together():
                batch = next(batches)
            self._wait += time.perf_counter() - start
            ends_step, self._sums.counts = batch.ends_step, batch.patches > 0
            self.optimizer.local.alike = batch.alike
            if self._synchronized:
                self._synchronized.counts = self._sums.counts
            # Sums of all ranks leave out patches that do not count; a rank's own statistics would not.
            restored = [] if batch.patches or self._synchronized else self.model.buffers()
            before = _joined(restored)
            found = self._backward(batch)
            _spread(before, restored)
            if batch.patches:
                loss = found.loss * batch.patches
                sums[:4] += [loss, *foreground(found.dice_sums), batch.patches]
        sums[4:] = self.pauses.reasons(self.optimizer.steps + 1)
        self._communicator.allreduce_sum(sums)
        return sums

    def _backward(self, batch: Batch) -> Result:
        """Compute the gradients of a batch; after a step's last batch, sum the gradients of all ranks."""
        timeline = self._communicator.timeline
        if batch.ends_step:
            self._sums.start()
        start = time.perf_counter()  # of the next kernel

        def listener(name: str, complete: Sequence[Any]) -> None:
            nonlocal start
            if timeline:
                timeline.span(KERNELS, name, start, time.perf_counter())
            for parameter in complete:
                if id(parameter) in self._cancelled and parameter.grad is not None:
                    parameter.grad.fill(0)
            if batch.ends_step:
                self._sums.complete(complete)
            start = time.perf_counter()

        found = self._gradients(batch, listener)
        if batch.ends_step:
            self._sums.finish()
        else:
            self._sums.keep()
        return found


def _joined(arrays: Sequence[Array]) -> Array:
    return np.concatenate([np.empty(0, np.float32), *(array.ravel() for array in arrays)])


def _spread(row: Array, arrays: Sequence[Array]) -> None:
    """Copy joined numbers back into their arrays."""
    ends = np.cumsum([array.size for array in arrays])
    for array, part in zip(arrays, np.split(row, ends), strict=False):  # the last part is empty
        array[...] = part.reshape(array.shape)
