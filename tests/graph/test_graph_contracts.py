"""No kernel is bound to arrays that it would read or write past the end of."""

import numpy as np
import pytest
from agreement import INPUT

import tinyunet
from tinyunet import SGD, UNet, losses
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.program import bind
from tinyunet.compiler.record import Binder


def bound(model):
    """Nodes of blocked tensors, with the graph and the arrays that they are bound to."""
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)
    program = step.program(INPUT)
    return [n for n in program.graph.nodes if n.runs_fused], program.graph, program.arrays


def misfits(array):
    """Arrays of one more item, one less, another type, and with gaps."""
    *others, last = array.shape or (1,)
    yield np.zeros((*others, last + 1), array.dtype)
    yield np.zeros((*others, last - 1), array.dtype)
    yield np.zeros(array.shape, np.int16)
    if array.size > 1:
        yield np.zeros((*others, 2 * last), array.dtype)[..., ::2]


MODEL = UNet(filters=17, depth=2)


def test_every_array_is_looked_at():
    nodes, graph, arrays = bound(MODEL)
    checked = [node for node in nodes if KERNELS[node.op].sizes]
    assert {node.op for node in nodes} == {node.op for node in checked}
    for node in checked:
        bind(Binder(node, graph, arrays))  # as it is, it fits
        for name in {*node.inputs.values(), *node.outputs.values()}:
            for wrong in misfits(arrays[name]):
                with pytest.raises(ValueError, match=r"^graph: .*; its kernel takes"):
                    bind(Binder(node, graph, {**arrays, name: wrong}))
