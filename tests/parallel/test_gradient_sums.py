"""Allreduce algorithms and buckets of gradients, among 2, 3 and 4 ranks and alone."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import sums
from launcher import launch, needs_mpi

from tinyunet.common.errors import UserError
from tinyunet.optim import Adam
from tinyunet.parallel.algorithms import ALGORITHMS, Exchange
from tinyunet.parallel.buckets import GradientSum, backward_order, cut
from tinyunet.parallel.communicator import Communicator
from tinyunet.unet import UNet

SIZES = [0, 1, 3, 1000, 100_003]


SUMMED = [
    (2, False, {}),
    (3, True, {}),
    (4, False, {"allreduce": "ring"}),
    (3, False, {"allreduce": "recursive-halving"}),
    (2, True, {"share": "node", "in_memory": True}),
    (3, False, {"share": "node", "in_memory": True}),
    (4, True, {"share": "nodes", "in_memory": True}),
    (3, True, {"share": "nodes"}),  # of two sizes: messages between all
    (2, False, {"share": "node", "allreduce": "ring"}),
]


def summed(compiled, options):
    return "gradients", {"compiled": compiled, "bucket_mb": 0.005} | options


# Everything that is asked of so many ranks, for one start of them: it takes a second of each.
ASKED = {
    ranks: [
        ("algorithms", SIZES),
        *[("shared", SIZES)] * (ranks in (2, 4)),
        *(("at_once", name) for name in ALGORITHMS if ranks == 3),
        *(summed(compiled, options) for number, compiled, options in SUMMED if number == ranks),
        *[summed(False, {"compression": "bf16"})] * (ranks in (2, 3)),
        *[("packing", 3)] * (ranks == 2),
    ]
    for ranks in (2, 3, 4, 7)
}


@functools.cache
def results(ranks):
    done = launch([Path(sums.__file__), json.dumps(ASKED[ranks])], ranks, seconds=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def result(ranks, *asked):
    return results(ranks)[ASKED[ranks].index(asked)]


@needs_mpi
@pytest.mark.parametrize("ranks", ASKED)
def test_every_algorithm_gives_every_rank_the_same_sum(ranks):
    found = result(ranks, "algorithms", SIZES)
    assert len(found) == len(ALGORITHMS) * len(SIZES)
    for case, of_ranks in found.items():
        assert len({bits for bits, _ in of_ranks}) == 1, case
        assert max(error for _, error in of_ranks) < 1e-5, case


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_a_node_sum_in_shared_memory_and_nodes_by_messages(ranks):
    found = result(ranks, "shared", SIZES)
    assert len(found) == len({ranks, 2}) * len(SIZES)
    for case, of_ranks in found.items():
        assert len({bits for bits, _ in of_ranks}) == 1, case
        assert max(error for _, error in of_ranks) < 1e-5, case


@needs_mpi
@pytest.mark.parametrize("name", ALGORITHMS)
def test_sums_that_are_on_their_way_at_once_do_not_mix(name):
    total = 2.0**3 - 1
    assert result(3, "at_once", name) == [[[total], [10 * total]]] * 3


@needs_mpi
@pytest.mark.parametrize(("ranks", "compiled", "options"), SUMMED)
def test_gradients_are_summed_over_ranks_and_batches_during_backward(ranks, compiled, options):
    found = result(ranks, *summed(compiled, options))
    assert len({bits for bits, *_ in found}) == 1
    for _, error, sent, buckets in found:
        assert error < 1e-5
        assert buckets > 2
        assert 0 < sent < buckets


@needs_mpi
def test_nobody_packs_weights_that_another_rank_still_reads():
    # A step of several batches has no sum of gradients between them that all would wait for.
    found = np.array(result(2, "packing", 3))
    starts, ends = found[..., 0], found[..., 1]
    assert (starts[:, 1:].min(axis=0) > ends[:, :-1].max(axis=0)).all()


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_bfloat16_loses_little_and_gives_it_back_later(ranks):
    # One rounding is 2^-9 of a number; the mean of three sums has lost a third of that.
    found = result(ranks, *summed(False, {"compression": "bf16"}))
    assert len({bits for bits, *_ in found}) == 1
    assert all(1e-5 < error < 2**-8 for _, error, *_ in found)


@pytest.mark.parametrize("size", [1, 5, 20_000, 5_650_000])
def test_buckets_hold_every_item_once_and_end_small(size):
    buckets = cut(size, most=4_000_000)
    assert [bucket.start for bucket in buckets] == [0, *(b.stop for b in buckets[:-1])]
    assert buckets[-1].stop == size
    lengths = [4 * (bucket.stop - bucket.start) for bucket in buckets]
    assert max(lengths) <= 4_000_000
    assert lengths[-1] <= 1 << 16  # where a message is all that it costs
    assert len(buckets) < 15


@pytest.mark.parametrize("megabytes", [1e-300, 1e-5, 1.0, 1e8])
def test_there_are_some_hundred_buckets_at_most(megabytes):
    model = UNet(filters=4, depth=3)
    sums = GradientSum(Adam(model.parameters()), Communicator(), Exchange(bucket_mb=megabytes))
    assert len(sums.buckets) <= 300
    assert sums.buckets[-1].stop == sums._gradients.size


def test_backward_order_is_the_reverse_of_use():
    model = UNet(filters=2, depth=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for parameter in backward_order(model, (1, 8, 8, 8, 4))]
    assert sorted(order) == sorted(names.values())
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in order))
    assert blocks[:2] == ["head", "decoder.0.norm1"]
    assert blocks[5:7] == ["up.0", "encoder.1.norm1"]
    assert blocks[-1] == "encoder.0.conv0"


def test_one_rank_sums_its_batches():
    model = UNet(filters=2, depth=2)
    optimizer = Adam(model.parameters())
    alone = GradientSum(optimizer, Communicator())
    for step in range(2):
        for value in (1, 2, 4):
            optimizer.flat_gradients[:] = value + step
            if value < 4:
                alone.keep()
        alone.start()
        alone.complete(model.parameters()[3:])
        alone.finish()
        np.testing.assert_array_equal(optimizer.flat_gradients, 7 + 3 * step)


def test_compression_is_an_algorithm_of_its_own():
    with pytest.raises(UserError, match="--allreduce: ring together with --compression bf16"):
        Exchange(allreduce="ring", compression="bf16").check()
