"""No two arrays that live at the same time share a byte, and the debug mode would notice."""

import importlib
import itertools
import tracemalloc

import numpy as np
import pytest
from agreement import ROUNDING, assert_agree
from hypothesis import given
from hypothesis import strategies as st

import tinyunet
from tinyunet import Adam, UNet, losses
from tinyunet.compiler import memory
from tinyunet.compiler.ir import Graph, Node, Value
from tinyunet.compiler.program import Program


def chain(sizes: list[int], reads: list[list[int]]) -> Graph:
    """Node ``i`` makes ``v<i>`` of a size from some values before it."""
    values = {f"v{i}": Value(f"v{i}", (size,), np.dtype(np.uint8)) for i, size in enumerate(sizes)}
    nodes = tuple(
        Node(f"n{i}", "test", {str(r): f"v{r}" for r in reads[i]}, {"dst": f"v{i}"})
        for i in range(len(sizes))
    )
    return Graph(nodes, values, (), (f"v{len(sizes) - 1}",), {}).check()


def overlap(plan: memory.Plan) -> list[tuple[str, str]]:
    """Pairs of buffers that live at the same time on the same bytes."""
    wrong = []
    for a, b in itertools.combinations(plan.buffers.values(), 2):
        start_a, start_b = plan.offsets[a.name], plan.offsets[b.name]
        same_bytes = start_a < start_b + b.nbytes and start_b < start_a + a.nbytes
        if same_bytes and a.meets(b):
            wrong.append((a.name, b.name))
    return wrong


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 20))
    sizes = draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count))
    reads = [draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else [] for i in range(count)]
    return chain(sizes, reads)


@given(graphs())
def test_nothing_alive_is_overwritten(graph):
    plan = memory.plan(graph)
    assert overlap(plan) == []
    for name, offset in plan.offsets.items():
        assert offset % memory.ALIGNMENT == 0
        assert offset + plan.buffers[name].nbytes <= plan.nbytes
    assert plan.nbytes <= memory.plan(graph, reuse=False).nbytes


def test_the_overlap_check_can_fail():
    plan = memory.plan(chain([100, 100, 100], [[], [0], [0, 1]]))
    wrong = memory.Plan(plan.buffers, dict.fromkeys(plan.offsets, 0), plan.nbytes)
    assert overlap(wrong) == [("v0", "v1"), ("v0", "v2"), ("v1", "v2")]


def test_a_chain_takes_two_buffers():
    graph = chain([1024] * 10, [[i - 1] if i else [] for i in range(10)])
    assert memory.plan(graph).nbytes == 2 * 1024
    assert memory.plan(graph, reuse=False).nbytes == 10 * 1024


def test_the_smallest_gap_that_fits_is_taken():
    # Stacked by size; when v5 comes, v1 and v3 have left gaps of 3008 and 2048 bytes.
    sizes = [5056, 3008, 2944, 2048, 1920, 1536]
    plan = memory.plan(chain(sizes, [[], [], [], [], [1, 3], [0, 2, 4]]))
    assert plan.offsets["v5"] == plan.offsets["v3"]


def test_results_in_place_and_views_share_memory():
    values = {n: Value(n, (64,), np.dtype(np.uint8)) for n in "abcd"}
    nodes = (
        Node("n0", "test", {}, {"dst": "a"}),
        Node("n1", "test", {"src": "a"}, {"dst": "b"}, views={"dst": "src"}),
        Node("n2", "test", {"src": "b"}, {"dst": "c"}, in_place={"dst": "src"}),
        Node("n3", "test", {"src": "c"}, {"dst": "d"}),
    )
    graph = Graph(nodes, values, (), ("d",), {}).check()
    assert memory.plan(graph).nbytes == 128
    late = Node("n3", "test", {"src": "c", "also": "a"}, {"dst": "d"})
    with pytest.raises(ValueError, match=r"n2 writes over \['a'\], needed later"):
        Graph((*nodes[:3], late), values, (), ("d",), {}).check()


def test_debug_mode_notices_a_wrong_plan(monkeypatch):
    """A buffer that is given away one node too early ends as NaN in the loss or a gradient."""
    model = UNet(filters=4, depth=2)
    optimizer = Adam(model.parameters())
    step = tinyunet.compile(model, losses.soft_dice, optimizer, (1, 4, 4, 4, 4), enable=("plan_memory",))
    graph = step.program((1, 4, 4, 4, 4)).graph
    parameters = dict(model.named_parameters())
    images = np.ones((1, 4, 4, 4, 4), np.float32)
    labels = np.zeros((1, 4, 4, 4), np.uint8)

    def result() -> float:
        program = Program(graph, parameters, debug=True)
        program.run(images=images, labels=labels)
        return float(program.arrays[graph.outputs[0]] + optimizer.flat_gradients.sum())

    assert np.isfinite(result())
    right = memory.liveness(graph)
    longest = max(right.values(), key=lambda b: b.last - b.first if b.first >= 0 else 0)
    short = memory.Buffer(longest.name, longest.nbytes, longest.first, longest.last - 1)
    monkeypatch.setattr(memory, "liveness", lambda _: right | {longest.name: short})
    assert np.isnan(result())


def test_a_deep_unet_reuses_most_of_its_memory():
    model = UNet(filters=4, depth=4)
    step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), (1, 16, 16, 16, 4))
    graph = step.program((1, 16, 16, 16, 4)).graph
    plan = memory.plan(graph)
    assert overlap(plan) == []
    assert plan.nbytes < 0.6 * memory.plan(graph, reuse=False).nbytes


def test_nothing_as_large_as_an_activation_is_allocated_after_the_first_step():
    """What NumPy takes during a step, scratchpads aside, is small beside one feature map (2 MB)."""
    shape = (1, 32, 32, 32)
    model = UNet(filters=16, depth=2)
    step = tinyunet.compile(model, losses.dice_cross_entropy, Adam(model.parameters()), (*shape, 4))
    images, labels = np.ones((*shape, 4), np.float32), np.zeros(shape, np.uint8)
    for _ in range(2):
        step(images, labels)
    tracemalloc.start()
    step(images, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32**3 * 16 * 4 / 10


def test_a_large_gradient_is_formed_once_and_its_source_freed(monkeypatch):
    shape = (1, 32, 32, 32, 1)  # so large that weights do not matter

    def arena() -> int:
        model = UNet(dim=3, in_channels=1, filters=8, depth=2)
        optimizer = Adam(model.parameters())
        step = tinyunet.compile(model, losses.soft_dice, optimizer, shape, disable=["choose_algorithm"])
        return memory.plan(step.stages(shape)[-1].graph).nbytes

    in_every_reader = arena()
    module = importlib.import_module("tinyunet.compiler.passes.fuse_backward")
    monkeypatch.setattr(module, "_FORMED_ONCE", 0)
    assert arena() < 0.95 * in_every_reader
    assert_agree(
        lambda: UNet(dim=3, in_channels=1, classes=4, filters=12, depth=2), (2, 9, 6, 8), ROUNDING, channels=1
    )
