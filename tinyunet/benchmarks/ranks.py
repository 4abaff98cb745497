"""A rank of a benchmark: ``mpirun -n N python -m tinyunet.benchmarks.ranks TASK``.

The task is a line of JSON: ``do`` is the name of a function below, everything else is given to it.
Rank 0 prints the results, as a line of JSON.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.base import machine
from tinyunet.benchmarks import problem
from tinyunet.commandline import run
from tinyunet.compiler import compile
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.parallel.algorithms import ALGORITHMS, Operation
from tinyunet.parallel.buckets import GradientSum, backward_order
from tinyunet.parallel.communicator import Communicator
from tinyunet.unet import UNet

_LEAST_SECONDS, _MOST_REPEATS = 0.2, 50
_STEPS = 3  # of a turn


def allreduce(ranks: Communicator, sizes: Sequence[int], algorithms: Sequence[str]) -> Any:
    """Return median seconds of an allreduce by each algorithm, and of a plain "exchange", by size.

    In an exchange each rank sends an array to its right neighbour while it gets one from its left.
    """
    (mpi,) = ranks.duplicates(1)
    right, left = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size

    def exchange(array: Any, other: Any) -> None:
        received, sent = mpi.Irecv(other, left), mpi.Isend(array, right)
        ranks.wait(received.Test)
        ranks.wait(sent.Test)

    def reduce(name: str, array: Any) -> None:
        ranks.wait(Operation(ALGORITHMS[name](mpi, array)).advance)

    found: dict[str, list[float]] = {name: [] for name in (*algorithms, "exchange")}
    for size in sizes:
        array, other = (np.ones(max(size // 4, 1), np.float32) for _ in range(2))
        calls = {name: functools.partial(reduce, name, array) for name in algorithms}
        for name, call in {"exchange": functools.partial(exchange, array, other), **calls}.items():
            found[name].append(_median_seconds(ranks, call))
            array[:] = 1
    return found


def _median_seconds(ranks: Communicator, run: Callable[[], None]) -> float:
    """Start each run together, the same number on every rank; return the slowest rank's median."""
    run()
    times: list[float] = []
    enough = False
    while not enough:
        ranks.barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        enough = ranks.broadcast_object(sum(times) > _LEAST_SECONDS or len(times) >= _MOST_REPEATS)
    slowest = ranks.gather(statistics.median(times))
    return max(slowest) if ranks.rank == 0 else 0.0


class Training:
    """A net and its compiled step, on one thread; ``ranks`` train the same net.

    With ``overlap`` gradients are sent while backward goes on, without when backward has ended.
    """

    def __init__(
        self, size: int, batch: int, filters: int, ranks: Communicator, overlap: bool = True
    ) -> None:
        machine.set_threads(1)
        self._ranks, self._overlap = ranks, overlap
        self._given = problem.make(size, batch, filters)
        model = UNet(in_channels=problem.CHANNELS, classes=problem.CLASSES, filters=filters)
        shape = self._given.image.shape
        self._optimizer = Adam(backward_order(model, shape), local=ranks.local)
        self._step = compile(model, dice_cross_entropy, self._optimizer, shape)
        self._sums = GradientSum(self._optimizer, ranks)

    def step(self) -> tuple[float, ...]:
        """Return seconds in all, those to the end of backward, those then waited, and to each gradient."""
        complete_at: dict[int, float] = {}
        self._sums.start()
        start = time.perf_counter()

        def note(_: str, complete: Sequence[Any]) -> None:
            now = time.perf_counter() - start
            complete_at.update((id(parameter), now) for parameter in complete)
            if self._overlap:
                self._sums.complete(complete)

        self._step.gradients(self._given.image, self._given.labels, 1 / self._ranks.size, note)
        backward_end = time.perf_counter() - start
        self._sums.finish()
        waited = time.perf_counter() - start - backward_end
        self._optimizer.step()
        gradients = (complete_at[id(parameter)] for parameter in self._optimizer.parameters)
        return time.perf_counter() - start, backward_end, waited, *gradients

    def buckets(self, complete_at: NDArray[np.float64]) -> list[tuple[float, int]]:
        """Seconds to each complete bucket, from those to each gradient, and its bytes."""
        ends = np.cumsum([parameter.data.size for parameter in self._optimizer.parameters])
        complete = np.maximum.accumulate(complete_at)
        return [
            (float(complete[np.searchsorted(ends, part.stop)]), 4 * (part.stop - part.start))
            for part in self._sums.buckets
        ]


def train(
    ranks: Communicator,
    size: int,
    batch: int,
    filters: int,
    rounds: int,
    in_turn: bool = False,
    overlap: bool = True,
) -> Any:
    """Let all ranks train together; if ``in_turn``, also rank 0 alone, and all without communication.

    A machine whose speed changes slows all three alike. Ranks "beside" each other are slower than one alone
    because they share caches and memory; ranks together also pay for communication, and share work.

    Returns medians of "seconds", "backward_end" and "waited" of a step together, and its "buckets". If in
    turn, also median seconds of a step "alone", "beside" and "together", and medians over the rounds of
    "efficiency" and "beside_efficiency".
    """
    shared = Training(size, batch, filters, ranks, overlap)
    own = Training(size, batch, filters, Communicator()) if in_turn else shared
    steps: list[tuple[float, ...]] = []

    def turn(training: Training, takes_part: bool = True) -> float:
        ranks.barrier()
        taken = [training.step() for _ in range(_STEPS if takes_part else 0)]
        ranks.barrier()
        if training is shared:
            steps.extend(taken)
        return statistics.median(seconds for seconds, *_ in taken) if taken else 0.0

    turn(shared)
    steps.clear()
    turns: dict[str, list[float]] = {"alone": [], "beside": [], "together": []}
    for _ in range(rounds):
        if in_turn:
            turns["alone"].append(turn(own, ranks.rank == 0))
            turns["beside"].append(turn(own))
        turns["together"].append(turn(shared))
    medians = np.median(steps, axis=0)
    found = dict(zip(("seconds", "backward_end", "waited"), medians.tolist(), strict=False))
    found["buckets"] = shared.buckets(medians[3:])
    if in_turn:
        found |= {name: statistics.median(seconds) for name, seconds in turns.items()}
        alone, beside, together = (np.array(seconds) for seconds in turns.values())
        found["efficiency"] = float(np.median(alone / together))
        found["beside_efficiency"] = float(np.median(alone / beside))
    return found


def main(ranks: Communicator) -> None:
    """Do the task, and print the results of rank 0."""
    task = json.loads(sys.argv[1])
    tasks: dict[str, Callable[..., Any]] = {"allreduce": allreduce, "train": train}
    found = tasks[task.pop("do")](ranks, **task)
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    run("tinyunet.benchmarks.ranks", main)
