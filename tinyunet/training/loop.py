"""An epoch of data-parallel training: each rank its patches, one sum of all gradients a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import AgreedError
from tinyunet.functional import BATCH_NORM_MOMENTUM
from tinyunet.nn import BatchNorm
from tinyunet.optim import Adam
from tinyunet.parallel.buckets import GradientSum
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.options import Exchange
from tinyunet.parallel.synchronized_norm import Synchronized
from tinyunet.training.pauses import Pause, Pauses
from tinyunet.training.progress import Progress
from tinyunet.training.samples import Batch, Inspector, Loader
from tinyunet.training.state import Array, average, broadcast_state, gather_rows, take_row, unchanged
from tinyunet.training.step import (
    Gradients,
    Result,
    cancelled_biases,
    compiled_gradients,
    eager_gradients,
    foreground,
)
from tinyunet.unet import UNet

_USUAL = Exchange()


class EpochResult(NamedTuple):
    """The loss, as a mean over the patches of an epoch, and Dice of what is not background.

    That Dice is of probabilities, not of the most probable class: the loss has its sums anyway. It
    is taken over all voxels of the epoch and all classes together, so it lies below the Dice of
    the validation while the network is unsure.
    """

    loss: float
    dice: float


class Trainer:
    """Runs epochs.

    After the construction and after each epoch, model and optimizer are the same on every rank.

    Parameters
    ----------
    model : UNet
        Is trained in place. Rank 0's parameters count.
    optimizer : Adam
        Of the model's parameters.
    loader : Loader
        This rank's patches.
    inspector : Inspector
        Whatever it has found ends the training.
    schedule : callable
        Learning rate of each step, counted from 0.
    communicator : Communicator
    progress : Progress
    eager : bool
        Run the eager model instead of the compiled step.
    accuracy : {"fast", "strict"}
    deterministic : bool
        Of the compiled step: see :func:`tinyunet.compile`.
    exchange : Exchange
    pauses : Pauses, optional
        Tells between two steps what to pause for.

    Attributes
    ----------
    number, step : int
        The epoch, and how many of its steps have been done.
    total : ndarray
        Sums over its patches so far: loss, intersection and size of Dice, and their number.
    """

    def __init__(
        self,
        model: UNet,
        optimizer: Adam,
        loader: Loader,
        inspector: Inspector,
        schedule: Callable[[int], float],
        communicator: Communicator,
        progress: Progress,
        eager: bool = False,
        accuracy: str = "fast",
        exchange: Exchange = _USUAL,
        pauses: Pauses | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self._inspector = inspector
        self._schedule, self._communicator, self._progress = schedule, communicator, progress
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm):
                module.momentum = BATCH_NORM_MOMENTUM
        self._pauses = pauses or Pauses(communicator, None)
        self.number, self.step, self.total = 0, 0, np.zeros(4)
        broadcast_state(model, optimizer, communicator)
        self._sums = GradientSum(optimizer, communicator, exchange)
        together = exchange.synchronize and communicator.size > 1
        self._together = Synchronized(model, communicator) if together else None
        shape = (*loader.batch_shapes()[0], model.config["in_channels"])
        self._cancelled = {id(bias) for bias in cancelled_biases(model.train(), shape)}
        self._gradients: Gradients
        if eager:
            self._gradients = eager_gradients(model, optimizer)
        else:
            how = accuracy, deterministic
            self._gradients = compiled_gradients(model, optimizer, shape, *how)

    def epoch(self, number: int, on_pause: Callable[[Pause], None] = lambda pause: None) -> EpochResult:
        """Train on every patch of an epoch, or on those that are left of the present one.

        Parameters
        ----------
        number : int
            The present epoch, or the next one.
        on_pause : callable
            Called between two steps when there is something to pause for.

        Raises
        ------
        AgreedError
            On every rank: a file of any rank cannot be used, or the loss is no number any more.
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
            self._update()
            self.step += 1
            self.total += sums[:4]
            loss, dice = self._result()
            self._progress.step(int(sums[3]), loss=loss, Dice=dice)
            if self.step == self.loader.steps:
                self._check_parameters()
                average(self.model.buffers(), self._communicator)
            elif any(pause := self._pauses.decide(sums[4:])):
                self._check_parameters()
                on_pause(pause)
        return self._result()

    def _check_parameters(self) -> None:
        """Check what the next loss would tell, before a checkpoint is written."""
        averages = [getattr(self.optimizer, name) for name in self.optimizer.averages]
        for array in (self.optimizer.flat_parameters, *averages):
            if not np.isfinite(array).all():
                raise self._diverged("a parameter is no number any more", self.step)

    def _diverged(self, what: str, step: int) -> AgreedError:
        return AgreedError(f"{what} in epoch {self.number}, step {step}; try a smaller --lr")

    def own_arrays(self) -> dict[str, Array]:
        """Return at rank 0 what each rank has of its own, for :meth:`take_own_arrays`."""
        found = {"statistics": gather_rows(self.model.buffers(), self._communicator)}
        if self._sums.residuals:
            found["residuals"] = gather_rows(self._sums.residuals, self._communicator)
        return found

    def take_own_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Go on from what ranks had of their own; residuals are dropped if their number changes."""
        take_row(arrays["statistics"], self.model.buffers(), self._communicator)
        residuals = arrays.get("residuals")
        size = self._communicator.size, sum(array.size for array in self._sums.residuals)
        if size[1] and residuals is not None and residuals.shape == size:
            take_row(arrays["residuals"], self._sums.residuals, self._communicator)

    def _result(self) -> EpochResult:
        loss, intersection, size, patches = self.total.tolist()
        return EpochResult(loss / patches, 2 * intersection / size)

    def _step(self, batches: Iterator[Batch]) -> NDArray[np.float64]:
        """Fill the gradients of a step, the same on all ranks.

        Returns
        -------
        sums : ndarray
            Over all patches of the step: loss, intersection and size of Dice, and their number;
            over all ranks: reasons to pause.
        """
        sums, ends_step = np.zeros(4 + Pauses.KINDS), False
        while not ends_step:
            with self._communicator.together():
                self._inspector.check()
                batch = next(batches)
            ends_step, self._sums.counts = batch.ends_step, batch.patches > 0
            self.optimizer.local.alike = batch.alike
            if self._together:
                self._together.counts = self._sums.counts
            # Patches that do not count: sums of all ranks leave them out, a rank's own statistics would not.
            learns = batch.patches or self._together
            with nullcontext() if learns else unchanged(self.model.buffers()):
                found = self._backward(batch)
            if batch.patches:
                loss = found.loss * batch.patches
                sums[:4] += [loss, *foreground(found.dice_sums), batch.patches]
        sums[4:] = self._pauses.reasons(self.optimizer.steps + 1)
        self._communicator.allreduce_sum(sums)
        return sums

    def _backward(self, batch: Batch) -> Result:
        """Find the gradients of a batch; with those of a step's last one, sum all of them."""
        timeline = self._communicator.timeline
        if batch.ends_step:
            self._sums.start()

        def told(name: str, complete: Sequence[Any]) -> None:
            if timeline:
                timeline.kernel(name)
            for parameter in complete:
                if id(parameter) in self._cancelled and parameter.grad is not None:
                    parameter.grad.fill(0)
            if batch.ends_step:
                self._sums.complete(complete)
            if timeline:
                timeline.start_kernels()

        if timeline:
            timeline.start_kernels()
        found = self._gradients(batch, told)
        if batch.ends_step:
            self._sums.finish()
        else:
            self._sums.keep()
        return found

    def _update(self) -> None:
        timeline = self._communicator.timeline
        if timeline:
            timeline.start_kernels()
        self.optimizer.step()
        if timeline:
            timeline.kernel(type(self.optimizer).__name__)
