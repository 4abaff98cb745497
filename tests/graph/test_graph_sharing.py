"""Weights packed by a local: its members are played in turn by one process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyunet
from tinyunet.local_ranks import ALONE, LocalRanks
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import SGD, Adam
from tinyunet.unet import UNet

SHAPE = (1, 8, 8, 8, 3)


class Member(LocalRanks):
    """Shares memory with the members before it: the first zeros of each are the same array, and so on."""

    def __init__(self, rank, size, memory, same=True):
        self.rank, self.size = rank, size
        self._memory, self._asked, self._same = memory, 0, same

    def zeros(self, size, dtype):
        if self._asked == len(self._memory):
            self._memory.append(np.zeros(size, dtype))
        self._asked += 1
        return self._memory[self._asked - 1]

    def is_same(self, text):
        return self._same


def ranks_of(size, same=True):
    memory = []
    return [Member(rank, size, memory, same) for rank in range(size)]


def batch(number, count=1):
    generator = np.random.default_rng(number)
    images = generator.standard_normal((count, *SHAPE[1:])).astype(np.float32)
    return images, generator.integers(0, 4, images.shape[:-1])


def step_of(filters, use_upsampling, local=ALONE, kind=Adam):
    model = UNet(in_channels=3, filters=filters, depth=2, use_upsampling=use_upsampling, seed=1)
    optimizer = kind(model.parameters(), 0.01, local=local)
    return tinyunet.compile(model, dice_cross_entropy, optimizer, SHAPE)


def train_in_turn(steps, number):
    """All pack, then each finds the gradients, then each changes its part; the losses."""
    images, labels = batch(number)
    for step in steps:  # what a member misses here is packed by those after it
        step.program(images.shape).pack(not step.optimizer.local.alike)
    losses = [step.gradients(images, labels) for step in steps]
    for step in steps:
        step.optimizer.step()
    return losses


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([4, 16, 20]), st.booleans(), st.integers(2, 4), st.sampled_from([Adam, SGD]))
def test_local_ranks_train_bit_for_bit_as_one_does(filters, use_upsampling, size, kind):
    steps = [step_of(filters, use_upsampling, member, kind) for member in ranks_of(size)]
    alone = step_of(filters, use_upsampling, kind=kind)
    for number in range(3):
        expected = alone(*batch(number))
        assert train_in_turn(steps, number) == [expected] * size
    for step in steps:
        np.testing.assert_array_equal(step.optimizer.flat_parameters, alone.optimizer.flat_parameters)


def test_each_layer_is_packed_by_one_member():
    programs = [step_of(16, False, member).program(SHAPE) for member in ranks_of(3)]
    heard = [[] for _ in programs]
    for program, names in zip(programs, heard, strict=True):
        program.pack(whole=False, listener=lambda name, complete, to=names: to.append(name))
    graph = programs[0].graph
    packing = [node.name for node in graph.nodes if node.op == "pack_weights"]
    assert len(packing) > 3
    assert sorted(name for names in heard for name in names) == sorted(packing)
    sizes = {n.name: graph.values[n.outputs["packed"]].nbytes for n in graph.nodes if n.name in packing}
    work = [sum(sizes[name] for name in names) for names in heard]
    assert max(work) <= sum(sizes.values()) / 3 + max(sizes.values())


def test_members_of_unlike_batches_pack_for_themselves():
    ranks = ranks_of(2)
    steps, alone = [step_of(20, False, member) for member in ranks], step_of(20, False)
    assert train_in_turn(steps, 0) == [alone(*batch(0))] * 2
    for member in ranks:
        member.alike = False
    # The second has another shape, whose program is its own.
    expected = alone.gradients(*batch(1))
    assert steps[0].gradients(*batch(1)) == expected
    expected = alone.gradients(*batch(1, 2))
    assert steps[1].gradients(*batch(1, 2)) == expected


def test_members_with_other_programs_share_parameters_alone():
    ranks = ranks_of(2, same=False)
    steps, alone = [step_of(4, False, member) for member in ranks], step_of(4, False)
    shared = {n: v for n, v in steps[0].program(SHAPE).graph.values.items() if v.kind == "shared"}
    assert not shared
    assert [step.gradients(*batch(0)) for step in steps] == [alone.gradients(*batch(0))] * 2
    assert steps[0].optimizer.flat_parameters is steps[1].optimizer.flat_parameters


def test_an_eager_model_with_local_ranks_learns_too():
    models = [UNet(in_channels=3, filters=4, depth=2, seed=seed) for seed in (1, 2, 1)]
    optimizers = [
        Adam(model.parameters(), 0.01, local=member)
        for model, member in zip(models, [*ranks_of(2), ALONE], strict=True)
    ]
    images, labels = batch(0)
    for model in models:
        dice_cross_entropy(model.logits(images), labels, from_logits=True).backward()
    for optimizer in optimizers:
        optimizer.step()
    # The second began with weights of its own, for which the first one's were taken.
    for ours, expected in zip(models[0].parameters(), models[2].parameters(), strict=True):
        np.testing.assert_array_equal(ours.data, expected.data)


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_local_ranks_save_the_whole_state(kind):
    ranks = ranks_of(2)
    steps, alone = ([step_of(4, False, member, kind) for member in ranks], step_of(4, False, kind=kind))
    train_in_turn(steps, 0)
    alone(*batch(0))
    expected = alone.optimizer.state_dict()
    for step in steps:
        for name, array in step.optimizer.state_dict().items():
            np.testing.assert_array_equal(array, expected[name])
