"""Ranks under mpirun, and the one rank without it."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from launcher import launch, needs_mpi

from kernels.base import limits
from tinyunet.common.errors import AgreedError, UserError
from tinyunet.parallel import communicator
from tinyunet.parallel.communicator import Communicator, world

RANKS = Path(__file__).parent / "ranks.py"


def result(scenario: str, ranks: int) -> object:
    done = launch([RANKS, scenario], ranks, seconds=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_give_each_rank_its_due(ranks):
    cores = len(os.sched_getaffinity(0))
    total = float(2**ranks - 1)
    for rank, found in enumerate(result("collectives", ranks)):
        threads = max(1, cores // ranks)
        mean = float(np.float32(total) * np.float32(1 / ranks))
        assert found == [rank, rank, ranks, threads, [total], [mean], [1.0], ranks - 1]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_allreduced_mean_has_the_same_bits_on_every_rank(ranks):
    found = result("same_bits", ranks)
    assert len(found) == ranks
    assert len({bits for bits, _ in found}) == 1
    assert max(error for _, error in found) < 1e-6


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_list_that_ranks_shared_comes_back_in_order(ranks):
    assert result("turns", ranks) == [[*range(count)] for count in (7, 3, 1, 0)]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_of_any_size_are_right_whoever_is_late(ranks):
    assert result("many_sums", ranks) == "all were right"


@needs_mpi
def test_an_error_of_some_ranks_is_raised_by_all_with_the_first_message():
    assert result("one_fails", 4) == ["image-2: No such file"] * 4


@needs_mpi
def test_a_block_that_goes_well_lets_all_go_on():
    assert result("some_take_part", 3) == "all went on"


@needs_mpi
def test_abort_ends_those_that_wait():
    done = launch([RANKS, "abort"], 3, seconds=30)
    assert done.returncode == 2
    assert done.stdout == ""


@needs_mpi
def test_a_waiting_rank_leaves_the_core_to_others():
    # MPI's own wait would take the whole second.
    assert max(result("waiting", 3)) < 0.4


class Clock:
    """Time that passes by sleeping, and ten microseconds at each look."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def perf_counter(self):
        self.now += 1e-5
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(
    ("sharing", "seconds", "longest"), [(1, 1.9e-3, 0), (1, 0.1, 1e-4), (1000, 0.1, 1e-3)]
)
def test_how_a_rank_waits_depends_on_who_wants_its_core(monkeypatch, sharing, seconds, longest):
    clock, waiting = Clock(), Communicator()
    monkeypatch.setattr(communicator, "time", clock)
    waiting._sharing = sharing
    waiting.wait(lambda: clock.perf_counter() > seconds)
    assert max(clock.slept, default=0) == longest


@needs_mpi
def test_several_processes_without_mpi4py_are_refused(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('none here')")
    done = launch([RANKS, "collectives"], 2, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "refused: started by an MPI launcher, but mpi4py cannot be used" in done.stderr


def test_without_a_launcher_one_rank_and_no_mpi(monkeypatch):
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    alone = world()
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 1)
    assert alone.threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("ranks", "quota"), [(1, 1.5), (2, 2.0), (4, 0.5), (3, 64.0), (5, math.inf)])
def test_ranks_of_a_container_share_its_quota(ranks, quota, monkeypatch):
    monkeypatch.setattr(communicator, "_affinity", lambda: frozenset(range(16)))
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota)
    rank = Communicator()
    rank.local_size = rank._sharing = ranks
    assert rank.threads() == {1: 2, 2: 1, 4: 1, 3: 5, 5: 3}[ranks]


def test_one_rank_is_its_own_mean():
    alone = Communicator()
    array = np.arange(6.0)
    for operation in (alone.allreduce_sum, alone.allreduce_mean, alone.broadcast):
        operation(array)
        np.testing.assert_array_equal(array, np.arange(6.0))
    assert alone.broadcast_object("word") == "word"
    assert alone.gather("word") == ["word"]
    assert alone.gather_in_turns(["a", "word"]) == ["a", "word"]
    alone.barrier()


def test_one_rank_raises_its_own_error():
    alone = Communicator()
    with pytest.raises(AgreedError, match="full"), alone.together():
        raise UserError("the disk is full")
    with pytest.raises(ZeroDivisionError), alone.together():
        _ = 1 / 0
    with pytest.raises(SystemExit) as left:
        alone.abort(2)
    assert left.value.code == 2


def test_a_timeline_that_cannot_be_written_is_told_and_no_error(tmp_path, capsys):
    communicator, path = Communicator(), tmp_path / "some.json"
    with communicator.recorded(path):
        path.mkdir()
    assert communicator.timeline is None
    assert capsys.readouterr().err == f"the timeline is lost: {path}: Is a directory\n"
    with pytest.raises(ZeroDivisionError), communicator.recorded(path):
        raise ZeroDivisionError
