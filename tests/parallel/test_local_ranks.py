"""Local ranks: memory that ranks of a node share, and parts of work. What they train is in test_training."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launcher import launch, needs_mpi

from tinyunet.local_ranks import ALONE, LocalRanks

LOCAL_RANKS = Path(__file__).parent / "local_ranks.py"


def result(system, ranks):
    done = launch([LOCAL_RANKS, system], ranks, seconds=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_mpi
@pytest.mark.parametrize(("system", "ranks"), [("usual", 2), ("usual", 3)])
def test_what_a_rank_writes_all_of_the_node_see(system, ranks):
    lines = -(-100_003 // 16)
    parts = [16 * (lines * (r + 1) // ranks - lines * r // ranks) for r in range(ranks)]
    parts[-1] -= 16 * lines - 100_003
    # Three items are less than a cache line: only the last rank has a part in them.
    expected = [True, ranks, True, False, parts, [0] * (ranks - 1) + [3]]
    expected.append([[rank + 1] for rank in range(ranks)])
    assert result(system, ranks) == [expected] * ranks


@needs_mpi
@pytest.mark.parametrize("system", ["without_memory", "apart"])
def test_ranks_that_cannot_share_memory_are_each_by_itself(system):
    assert result(system, 3) == [[False, 1, True, True, [100_003, 0, 0], [3, 0, 0], [[1]]]] * 3


class Member(LocalRanks):
    """One of several, to ask for its part."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@given(st.integers(0, 1000), st.integers(1, 9))
def test_parts_are_the_whole_cut_at_cache_lines(items, size):
    parts = [Member(rank, size).part(items) for rank in range(size)]
    whole = np.concatenate([np.arange(items)[part] for part in parts])
    np.testing.assert_array_equal(whole, np.arange(items))
    assert all(part.start % 16 == 0 for part in parts)
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 32


def test_a_process_by_itself_does_all():
    assert ALONE.part(1001) == slice(0, 1001)
    assert ALONE.is_same("whatever")
    assert not ALONE.zeros(7, np.float64).any()
    ALONE.barrier()
