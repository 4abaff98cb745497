"""Local ranks in their tests: ``python local_ranks.py SYSTEM``, with a system that is as named."""

import json
import os
import sys
from typing import Any

import numpy as np

import tinyunet.parallel.shared_memory
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator, world
from tinyunet.parallel.synchronized_norm import Synchronized
from tinyunet.unet import UNet


def usual() -> None:
    """Memory can be shared."""


def without_memory() -> None:
    """No rank can have memory without a name, as where there is no Linux."""
    del os.memfd_create


def apart() -> None:
    """What the path leads to is memory of another process, as in a container of its own."""

    def elsewhere(path: str, mode: str) -> Any:
        other = os.memfd_create("other")
        os.ftruncate(other, 1 << 20)
        return os.fdopen(other, mode)

    tinyunet.parallel.shared_memory.open = elsewhere  # type: ignore[attr-defined]


def seen(ranks: Communicator) -> list[Any]:
    """Each local rank writes to its part of two arrays; its size, and who wrote what a rank sees."""
    local, found = ranks.local, list[Any]([ranks.local.size, ranks.local.is_same("a")])
    found.append(local.is_same(str(ranks.rank)))
    for size, dtype in ((100_003, np.float32), (3, np.float64)):
        array = local.zeros(size, dtype)
        assert (array.shape, array.dtype) == ((size,), dtype)
        assert not array.any()
        local.barrier()
        array[local.part(size)] = local.rank + 1
        local.barrier()
        found.append([int(np.count_nonzero(array == rank + 1)) for rank in range(ranks.size)])
    sums = np.full(2, 2.0**ranks.rank)
    ranks.allreduce_sum(sums)
    assert (sums == 2**ranks.size - 1).all()
    arrays = local.zeros_of_each(1001, np.float32)
    arrays[local.rank] += local.rank + 1
    local.barrier()
    assert all(array.shape == (1001,) and array.ctypes.data % 64 == 0 for array in arrays)
    return [*found, [np.unique(array).tolist() for array in arrays]]


def shares_packing(ranks: Communicator) -> bool:
    """Whether the program of a net with synchronised batch norm has weights that local ranks share."""
    model, shape = UNet(filters=4, depth=2).train(), (1, 8, 8, 8, 4)
    Synchronized(model, ranks)
    optimizer = Adam(model.parameters(), local=ranks.local)
    graph = tinyunet.compile(model, dice_cross_entropy, optimizer, shape).program(shape).graph
    return any(value.kind == "shared" for value in graph.values.values())


def main() -> None:
    """Make the system what is asked for, and print at rank 0 what each rank has seen."""
    globals()[sys.argv[1]]()
    ranks = world()
    found = ranks.gather([shares_packing(ranks), *seen(ranks)])
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
