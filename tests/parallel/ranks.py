"""What a rank does in the tests of the communicator: ``python ranks.py SCENARIO``."""

import json
import sys
import time
import zlib

import numpy as np

from tinyunet.common.errors import AgreedError, UserError
from tinyunet.parallel.communicator import Communicator, world


def collectives(ranks: Communicator) -> object:
    """Each operation on data that tells who it came from."""
    ones = np.full((3, 5), 2.0**ranks.rank, np.float32)
    total, mean, first = ones.copy(), ones.copy(), ones.copy()
    ranks.allreduce_sum(total)
    ranks.allreduce_mean(mean)
    ranks.broadcast(first)
    last = ranks.broadcast_object({"rank": ranks.rank}, root=ranks.size - 1)
    mine = [
        ranks.rank,
        ranks.local_rank,
        ranks.local_size,
        ranks.threads(),
        np.unique(total).tolist(),
        np.unique(mean).tolist(),
        np.unique(first).tolist(),
        last["rank"],
    ]
    return ranks.gather(mine)


def turns(ranks: Communicator) -> object:
    """A list of which each rank has a part, put together again: of more, of as many and of fewer items."""
    return [ranks.gather_in_turns(list(range(count))[ranks.rank :: ranks.size]) for count in (7, 3, 1, 0)]


def same_bits(ranks: Communicator) -> object:
    """An allreduce of numbers that round: the bits that each rank then holds."""
    array = np.random.default_rng(ranks.rank).standard_normal(1_000_003).astype(np.float32)
    expected = sum(
        np.random.default_rng(rank).standard_normal(array.size).astype(np.float32)
        for rank in range(ranks.size)
    )
    ranks.allreduce_mean(array)
    error = float(np.abs(array - expected / ranks.size).max())
    return ranks.gather([zlib.crc32(array.tobytes()), error])


def many_sums(ranks: Communicator) -> object:
    """Sums of arrays of many sizes, small and large, of ranks that come at times of their own."""
    same, own = np.random.default_rng(0), np.random.default_rng(ranks.rank + 1)
    for size in same.integers(0, 5000, 500).tolist():
        dtype = same.choice([np.float64, np.float32])
        array = np.arange(2 * size, dtype=dtype).reshape(2, size) * 2**ranks.rank
        time.sleep(own.choice([0, 0, 1e-5, 1e-3]))
        ranks.allreduce_sum(array)
        expected = np.arange(2 * size).reshape(2, size) * (2**ranks.size - 1)
        np.testing.assert_array_equal(array, expected)
    return "all were right"


def one_fails(ranks: Communicator) -> object:
    """The last two ranks meet an error; what each rank raises."""
    try:
        with ranks.together():
            if ranks.rank >= ranks.size - 2:
                raise FileNotFoundError(2, "No such file", f"image-{ranks.rank}")
    except AgreedError as error:
        return ranks.gather(str(error))
    return "nobody raised"


def some_take_part(ranks: Communicator) -> object:
    """A block that only one rank has work in, and that goes well."""
    with ranks.together():
        if ranks.rank == 0:
            time.sleep(0.2)
    return "all went on"


def abort(ranks: Communicator) -> object:
    """A rank leaves outside of any agreement, while the others wait for it."""
    if ranks.rank == 1:
        ranks.abort(2)
    ranks.barrier()
    return "nobody left"


def waiting(ranks: Communicator) -> object:
    """Processor time of a rank that waits for a second for rank 0, in each of two ways."""
    found = []
    for meet in (ranks.barrier, ranks.local.barrier):
        ranks.barrier()
        start = time.process_time()
        if ranks.rank == 0:
            time.sleep(1.0)
        meet()
        found.append(time.process_time() - start)
    return ranks.gather(max(found))


def main() -> None:
    """Run the scenario named, and print at rank 0 what it returned."""
    try:
        ranks = world()
    except UserError as error:
        sys.exit(f"refused: {error}")
    found = globals()[sys.argv[1]](ranks)
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
