"""Gradients summed over ranks while backward goes on.

The optimizer's flat buffer is laid out in the order in which backward completes the gradients
(:func:`backward_order`), and cut into buckets. As soon as the last gradient of a bucket is complete, its
allreduce starts; the ranks wait for it just before the optimizer's step::

    backward   |head|dec 3   |dec 2|..|enc 4 |enc 3 |enc 2  |enc 1   |enc 0    |   step
    bucket 0              |-------|
    bucket 1                           |-------|
    bucket 2                                  |----|
    last one                                                              |-|

Nothing can hide the last bucket. So the buckets become small towards the end: none is larger than the rest of
the buffer. (A parameter may lie in several buckets.)

MPI progresses a message only while a rank is inside a call of MPI. So a rank tests its messages between any
two kernels: :meth:`GradientSum.complete`. A thread for that would take a core from the kernels.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tinyunet.compiler.trace import trace
from tinyunet.nn import Module, Parameter
from tinyunet.optim import Optimizer
from tinyunet.parallel.algorithms import ALGORITHMS, Array, Exchange, Messages, Operation, shared_sum
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.compression import CompressedSum
from tinyunet.tape import Leaf

_USUAL = Exchange()
_LEAST_BYTES = 1 << 16  # the time of a smaller bucket depends on the number of its messages, not on its bytes
_MOST_BUCKETS = 256  # each bucket has a communicator of its own, and MPI has some thousands of them


def backward_order(model: Module, input_shape: tuple[int, ...]) -> list[Parameter]:
    """Return a model's parameters in the order in which backward completes their gradients.

    That is the reverse order of their use. Parameters that the model does not use come last.
    """
    known = dict(model.named_parameters())
    used = [value for node in trace(model, input_shape).nodes for value in node.inputs.values()]
    order = dict.fromkeys([name for name in reversed(used) if name in known] + list(known))
    return [known[name] for name in order]


def cut(size: int, most: int) -> list[slice]:
    """Cut a flat buffer of ``size`` float32 into buckets of ``most`` bytes, and half of the rest, at most."""
    buckets, start = list[slice](), 0
    while start < size:
        length = min(most, max(2 * (size - start), _LEAST_BYTES)) // 4
        buckets.append(slice(start, min(start + length, size)))
        start += length
    return buckets


class GradientSum:
    """Sums an optimizer's gradients over ranks, and over several batches of one step.

    All ranks have the same parameters; the optimizer's ``flat_gradients`` are replaced by their sum.
    ``counts`` says whether this rank's patches belong to the batch, as in
    :mod:`tinyunet.parallel.synchronized_norm`.
    """

    def __init__(self, optimizer: Optimizer, communicator: Communicator, exchange: Exchange = _USUAL) -> None:
        self._gradients, self._communicator = optimizer.flat_gradients, communicator
        self._parameters = optimizer.parameters
        nbytes = self._gradients.nbytes
        most = min(max(1e6 * exchange.bucket_mb, nbytes / _MOST_BUCKETS, 4.0), nbytes)
        self.buckets = cut(self._gradients.size, int(most))  # parts of the flat buffer, some 256 at most
        # What rounding took away and compression has still to send: a later step depends on it.
        self.residuals: list[Array] = []
        self._allreduces: list[Callable[[], Messages]] = []  # each starts the sum of a bucket
        self._choose_allreduces(optimizer, exchange)
        self._earlier: Array | None = None  # the sum of the gradients of earlier batches of this step
        self.counts = True
        self.start()

    def _choose_allreduces(self, optimizer: Optimizer, exchange: Exchange) -> None:
        """Add in shared memory where the optimizer's gradients lie there; else send messages."""
        communicator = self._communicator
        can_share = optimizer.local is communicator.local and exchange.compression == "none"
        if can_share and exchange.allreduce == "mpi" and (levels := communicator.levels(len(self.buckets))):
            for bucket, level in zip(self.buckets, levels, strict=True):
                arrays = [gradients[bucket] for gradients in optimizer.local_gradients]
                self._allreduces.append(partial(shared_sum, *level, communicator.local, arrays))
            return
        for bucket, ranks in zip(self.buckets, communicator.duplicates(len(self.buckets)), strict=True):
            algorithm: Callable[[Any, Array], Messages] = ALGORITHMS[exchange.allreduce]
            if exchange.compression == "bf16":
                algorithm = CompressedSum(bucket.stop - bucket.start, communicator.size)
                self.residuals += [algorithm.residual, algorithm.residual_of_sum]
            self._allreduces.append(partial(algorithm, ranks, self._gradients[bucket]))

    def start(self) -> None:
        """Expect new gradients: call this before the backward pass of a step's last batch."""
        self._complete: set[int] = set()
        # So many parameters, from the first on, are complete, and so many items of the buffer.
        self._parameters_complete, self._items_complete = 0, 0
        self.sent = 0  # how many buckets have started
        self._under_way: dict[int, tuple[Operation, float]] = {}

    def keep(self) -> None:
        """Add the gradients to the gradients of earlier batches; the step's last batch sends the sum."""
        if not self.counts:
            self._gradients.fill(0)
        if self._earlier is None:
            self._earlier = self._gradients.copy()
        else:
            self._earlier += self._gradients

    def complete(self, parameters: Sequence[Leaf]) -> None:
        """Record whose gradients are complete, start the buckets that are, and progress the others."""
        self._complete.update(map(id, parameters))
        # In their order, which is the same on every rank, whichever completes first.
        for parameter in self._parameters[self._parameters_complete :]:
            if id(parameter) not in self._complete:
                break
            self._parameters_complete += 1
            self._items_complete += parameter.data.size
        while self.sent < len(self.buckets) and self.buckets[self.sent].stop <= self._items_complete:
            self._send()
        self._progress()

    def finish(self) -> None:
        """Wait until ``flat_gradients`` holds the sums."""
        while self.sent < len(self.buckets):  # gradients of unused parameters
            self._send()
        self._communicator.wait(self._progress, "wait for gradients")
        self._earlier = None

    def _send(self) -> None:
        number, part = self.sent, self.buckets[self.sent]
        self.sent += 1
        gradients = self._gradients[part]
        if not self.counts:
            gradients.fill(0)
        if self._earlier is not None:
            gradients += self._earlier[part]
        if self._communicator.size > 1:
            operation = Operation(self._allreduces[number]())
            self._under_way[number] = operation, time.perf_counter()

    def _progress(self) -> bool:
        """Progress the buckets that are under way, and return whether all have arrived."""
        done = [number for number, (operation, _) in self._under_way.items() if operation.advance()]
        for number in done:
            _, start = self._under_way.pop(number)
            if timeline := self._communicator.timeline:
                nbytes = self._gradients[self.buckets[number]].nbytes
                name = f"bucket {number}"
                timeline.span(name, name, start, time.perf_counter(), bytes=nbytes)
        return not self._under_way
