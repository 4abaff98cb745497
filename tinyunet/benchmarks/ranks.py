"""What a rank does in a benchmark: ``mpirun -n N python -m tinyunet.benchmarks.ranks TASK``.

The task is a line of JSON: ``do`` is the name of a function below, everything else is given to it.
Rank 0 prints what was found, as a line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.base import machine
from tinyunet.benchmarks import problem
from tinyunet.commandline import run
from tinyunet.compiler import compile
from tinyunet.engine.local_ranks import ALONE, LocalRanks
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.parallel.algorithms import ALGORITHMS, Operation
from tinyunet.parallel.buckets import GradientSum, backward_order
from tinyunet.parallel.communicator import Communicator
from tinyunet.unet import UNet

_LEAST_SECONDS, _MOST_REPEATS = 0.2, 50


def allreduce(ranks: Communicator, sizes: Sequence[int], algorithms: Sequence[str]) -> Any:
    """Median seconds of an allreduce by each algorithm, and of a plain "exchange", by size.

    In an exchange each rank sends an array to its right neighbour while it gets one from its left.
    """
    (mpi,) = ranks.duplicates(1)
    found: dict[str, list[float]] = {name: [] for name in (*algorithms, "exchange")}
    for size in sizes:
        array, other = (np.ones(max(size // 4, 1), np.float32) for _ in range(2))

        def exchange(array: Any = array, other: Any = other) -> None:
            right, left = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
            received, sent = mpi.Irecv(other, left), mpi.Isend(array, right)
            ranks.wait(received.Test)
            ranks.wait(sent.Test)

        def reduce(name: str, array: Any = array) -> Callable[[], None]:
            return lambda: ranks.wait(Operation(ALGORITHMS[name](mpi, array)).advance)

        found["exchange"].append(_median_seconds(ranks, exchange))
        for name in algorithms:
            found[name].append(_median_seconds(ranks, reduce(name)))
            array[:] = 1
    return found


def _median_seconds(ranks: Communicator, run: Callable[[], None]) -> float:
    """Each run starts together; as many as fit into some time, the same number on every rank."""
    run()
    times: list[float] = []
    enough = False
    while not enough:
        ranks.barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        enough = ranks.broadcast_object(sum(times) > _LEAST_SECONDS or len(times) >= _MOST_REPEATS)
    # All have it when the last one has.
    slowest = ranks.gather(statistics.median(times))
    return max(slowest) if ranks.rank == 0 else 0.0


class Training:
    """A net, its compiled step, and when in the last step which parameter was complete.

    Parameters
    ----------
    size, batch, filters : int
        Of a rank's patches, and the net's.
    threads : int
        Of this rank.
    local : LocalRanks
        The ranks that train the same net.
    """

    def __init__(self, size: int, batch: int, filters: int, threads: int, local: LocalRanks = ALONE) -> None:
        machine.set_threads(threads)
        self.given = problem.make(size, batch, filters)
        model = UNet(in_channels=problem.CHANNELS, classes=problem.CLASSES, filters=filters)
        shape = self.given.image.shape
        self.optimizer = Adam(backward_order(model, shape), local=local)
        self._step = compile(model, dice_cross_entropy, self.optimizer, shape)
        self.complete_at: dict[int, float] = {}

    def step(self, sums: GradientSum, ranks: int, overlap: bool = True) -> tuple[float, ...]:
        """Return seconds in all, those to the end of backward, and those then waited."""
        sums.start()
        start = time.perf_counter()

        def told(_: str, complete: Sequence[Any]) -> None:
            now = time.perf_counter() - start
            self.complete_at.update((id(parameter), now) for parameter in complete)
            if overlap:
                sums.complete(complete)

        self._step.gradients(self.given.image, self.given.labels, 1 / ranks, told)
        backward_end = time.perf_counter() - start
        sums.finish()
        waited = time.perf_counter() - start - backward_end
        self.optimizer.step()
        return time.perf_counter() - start, backward_end, waited


def steps(
    ranks: Communicator, size: int, batch: int, filters: int, threads: int, count: int, overlap: bool = True
) -> Any:
    """Train for some steps on all ranks.

    Parameters
    ----------
    size, batch, filters, threads : int
        See :class:`Training`.
    count : int
        Steps; two more come before them.
    overlap : bool
        Whether gradients are sent while backward goes on, or all when it has ended.

    Returns
    -------
    dict
        Medians of what :meth:`Training.step` returns, and of when each bucket was complete, with its
        bytes.
    """
    training = Training(size, batch, filters, threads, ranks.local)
    sums = GradientSum(training.optimizer, ranks)
    parameters = training.optimizer.parameters
    times, completed = [], []
    for _ in range(count + 2):
        ranks.barrier()
        times.append(training.step(sums, ranks.size, overlap))
        completed.append([training.complete_at[id(parameter)] for parameter in parameters])
    names = ("seconds", "backward_end", "waited")
    medians = map(statistics.median, zip(*times[2:], strict=True))
    ends = np.cumsum([parameter.data.size for parameter in parameters])
    complete = np.maximum.accumulate(np.median(completed[2:], axis=0))
    buckets = [
        (complete[np.searchsorted(ends, part.stop)], 4 * (part.stop - part.start)) for part in sums.buckets
    ]
    return dict(zip(names, medians, strict=True)) | {"buckets": buckets}


def weak(ranks: Communicator, size: int, batch: int, filters: int, threads: int, rounds: int) -> Any:
    """Let rank 0 train alone, all beside each other, and all together, in turn.

    A machine whose speed changes does that to all three alike. What ranks beside each other lose is
    theirs because they share caches and memory; what is left is the cost of communication, less the
    work that ranks of a node share.

    Returns
    -------
    dict
        Median seconds of a step "alone", "beside" and "together"; "efficiency" and "beside_efficiency",
        medians over the rounds.
    """
    own = Training(size, batch, filters, threads)
    own_sums = GradientSum(own.optimizer, Communicator())
    shared = Training(size, batch, filters, threads, ranks.local)
    sums = GradientSum(shared.optimizer, ranks)

    def seconds(everybody: bool, takes_part: bool = True) -> float:
        ranks.barrier()
        runs = []
        for _ in range(3 if takes_part else 0):
            if everybody:
                runs.append(shared.step(sums, ranks.size)[0])
            else:
                runs.append(own.step(own_sums, 1)[0])
        ranks.barrier()
        return statistics.median(runs) if runs else 0.0

    seconds(everybody=True)
    found: dict[str, list[float]] = {"alone": [], "beside": [], "together": []}
    for _ in range(rounds):
        found["alone"].append(seconds(everybody=False, takes_part=ranks.rank == 0))
        found["beside"].append(seconds(everybody=False))
        found["together"].append(seconds(everybody=True))
    shares = {
        name: statistics.median(a / b for a, b in zip(found["alone"], found[which], strict=True))
        for name, which in (("efficiency", "together"), ("beside_efficiency", "beside"))
    }
    return {name: statistics.median(times) for name, times in found.items()} | shares


def main(ranks: Communicator) -> None:
    """Do the task, and print what rank 0 has found."""
    task = json.loads(sys.argv[1])
    tasks: dict[str, Callable[..., Any]] = {"allreduce": allreduce, "steps": steps, "weak": weak}
    found = tasks[task.pop("do")](ranks, **task)
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    run("tinyunet.benchmarks.ranks", main)
