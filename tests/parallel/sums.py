"""What a rank does in the tests of gradient sums: ``python sums.py [[SCENARIO, OPTIONS], ...]``, as JSON."""

import json
import sys
import time
import zlib
from typing import Any

import numpy as np

import tinyunet
from kernels.base import machine
from tinyunet.local_ranks import ALONE
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.parallel.algorithms import ALGORITHMS, Exchange, Operation, shared_sum
from tinyunet.parallel.buckets import GradientSum, backward_order
from tinyunet.parallel.communicator import Communicator, world
from tinyunet.unet import UNet

SHAPE, BATCHES = (1, 8, 8, 8, 4), 2
NODE = 2  # ranks on each, where there is said to be more than one


def summands(ranks: Communicator, size: int) -> list[Any]:
    """What each rank gives."""
    return [np.random.default_rng(r).standard_normal(size, np.float32) for r in range(ranks.size)]


def compared(ranks: Communicator, mine: Any, arrays: list[Any]) -> object:
    """Checksum of each rank's sum, and its largest error."""
    error = np.abs(mine - np.sum(arrays, axis=0, dtype=np.float64)).max(initial=0.0)
    return ranks.gather([zlib.crc32(mine.tobytes()), float(error)])


def nodes() -> Communicator:
    """All ranks, as if no more than two were on a node: of three the last is alone on its own."""
    from mpi4py import MPI

    class Nodes(MPI.Intracomm):
        def Split_type(self, *_: Any) -> Any:  # noqa: N802
            return self.Split(self.rank // NODE)

    return Communicator(Nodes(MPI.COMM_WORLD))


def shared(ranks: Communicator, sizes: list[int]) -> object:
    """The sum in shared memory, on one node and on several, as :func:`algorithms` for the others."""
    found = {}
    for where in (ranks, nodes()):
        for size in sizes:
            arrays = summands(ranks, size)
            of_node = where.local.zeros_of_each(size, np.float32)
            mine = of_node[where.local.rank]
            mine[:] = arrays[ranks.rank]
            (level,) = where.levels(1)
            ranks.wait(Operation(shared_sum(*level, where.local, of_node)).advance)
            found[f"{where.local.size} on a node {size}"] = compared(ranks, mine, arrays)
    return found


def algorithms(ranks: Communicator, sizes: list[int]) -> object:
    """Each algorithm on arrays of some sizes: checksums on every rank, and the largest error."""
    (mpi,) = ranks.duplicates(1)
    found = {}
    for name, algorithm in ALGORITHMS.items():
        for size in sizes:
            arrays = summands(ranks, size)
            mine = arrays[ranks.rank].copy()
            ranks.wait(Operation(algorithm(mpi, mine)).advance)
            found[f"{name} {size}"] = compared(ranks, mine, arrays)
    return found


def at_once(ranks: Communicator, name: str) -> object:
    """Two sums on their way at once, the second advanced first: what every element should be."""
    channels = ranks.duplicates(2)
    arrays = [np.full(1000, 10.0**i * 2**ranks.rank, np.float32) for i in range(2)]
    sums = [Operation(ALGORITHMS[name](*each)) for each in zip(channels, arrays, strict=True)]
    for operation in reversed(sums):
        ranks.wait(operation.advance)
    return ranks.gather([np.unique(array).tolist() for array in arrays])


def batch(number: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(number)
    images = generator.standard_normal(SHAPE).astype(np.float32)
    return images, generator.integers(0, 4, SHAPE[:-1])


def gradients(ranks: Communicator, options: dict[str, Any]) -> object:
    """Sums of a net's gradients over ranks and batches; the same by hand; what was seen of it."""
    compiled, where = options.pop("compiled"), options.pop("share", None)
    ranks = nodes() if where == "nodes" else ranks
    model = UNet(filters=4, depth=2).train()
    optimizer = Adam(backward_order(model, SHAPE), local=ranks.local if where else ALONE)
    step = tinyunet.compile(model, dice_cross_entropy, optimizer, SHAPE) if compiled else None
    seen: list[int] = []

    def run(number: int, listener: Any = None) -> None:
        optimizer.zero_grad()
        images, labels = batch(number)
        if step:
            step.gradients(images, labels, 0.5, listener)
        else:
            loss = dice_cross_entropy(model.logits(images), labels, from_logits=True)
            loss.backward(0.5, listener)

    in_memory = options.pop("in_memory", False)
    sums = GradientSum(optimizer, ranks, Exchange(**options))
    assert in_memory == all(partial.func is shared_sum for partial in sums._allreduces)

    def listener(name: str, complete: Any) -> None:
        sums.complete(complete)
        seen.append(sums.sent)

    numbers = [ranks.rank * BATCHES + index for index in range(BATCHES)]
    steps = 3 if options.get("compression") == "bf16" else 1
    expected = np.zeros(optimizer.flat_gradients.size)
    for number in range(ranks.size * BATCHES):
        run(number)
        expected += optimizer.flat_gradients
    total = np.zeros_like(expected)
    for _ in range(steps):
        for number in numbers[:-1]:
            run(number)
            sums.keep()
        sums.start()
        run(numbers[-1], listener)
        sums.finish()
        total += optimizer.flat_gradients / steps
    error = np.abs(total - expected).max() / np.abs(expected).max()
    bits = zlib.crc32(optimizer.flat_gradients.tobytes())
    # Buckets on their way before the last operator ran, and all of them.
    return ranks.gather([bits, float(error), seen[-2], len(sums.buckets)])


def packing(ranks: Communicator, batches: int) -> object:
    """When each rank began and ended each batch of one step, of which rank 0 is slow to end one."""
    model = UNet(filters=4, depth=2).train()
    optimizer = Adam(backward_order(model, SHAPE), local=ranks.local)
    step = tinyunet.compile(model, dice_cross_entropy, optimizer, SHAPE)
    last = step.program(SHAPE).graph.nodes[-1].name
    times: list[float] = []

    def listener(name: str, _: Any) -> None:
        if name == last and ranks.rank == 0:
            time.sleep(0.2)
        times.append(time.monotonic())

    ends = []
    for number in range(batches):
        times.clear()
        step.gradients(*batch(number), 0.5, listener)
        ends.append([times[0], times[-1]])
    return ranks.gather(ends)


def main() -> None:
    """Run the scenarios named, and print at rank 0 what each returned."""
    machine.set_threads(1)
    ranks = world()
    found = [globals()[scenario](ranks, options) for scenario, options in json.loads(sys.argv[1])]
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
