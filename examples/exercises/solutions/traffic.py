"""Bytes of a block: predict how much memory convolution, normalisation and ReLU move, then measure it.

A pass reads each of its operands from memory once and writes its result once. Tensors are nCdhw16c: channels
are rounded up to a multiple of 16; numbers are float32. Normalisation has a scale and a shift a channel,
rounded up, too; weights are (OC, IC, 3, 3, 3), not rounded up.
"""

import numpy as np


def bytes_moved(voxels, IC, OC):
    """Return bytes of the three passes one after the other, and of one pass that does all of it."""
    # <answer>
    ic, oc = -(-IC // 16) * 16, -(-OC // 16) * 16
    src, dst, weights, vectors = 4 * voxels * ic, 4 * voxels * oc, 4 * 27 * IC * OC, 4 * 2 * oc
    apart = (src + weights + dst) + (dst + vectors + dst) + (dst + dst)
    fused = src + weights + vectors + dst
    return apart, fused
    # </answer>


def measure(graph):
    """Return the bytes that each node of a compiled graph moves, by the name of the node.

    ``graph.nodes`` are passes over memory. A node reads the values of ``node.inputs`` and writes those of
    ``node.outputs``, dicts of role to the name of a value. ``graph.values[name]`` has a ``dtype``, the
    ``shape`` of the eager model, and the ``storage_shape`` in memory. An output whose role is in
    ``node.views`` *is* the memory of an input, whose role ``node.views`` gives: neither of them moves.
    """
    # <answer>
    found = {}
    for node in graph.nodes:
        names = [name for role, name in node.inputs.items() if role not in node.views.values()]
        names += [name for role, name in node.outputs.items() if role not in node.views]
        values = [graph.values[name] for name in names]
        found[node.name] = sum(int(np.prod(v.storage_shape)) * v.dtype.itemsize for v in values)
    return found
    # </answer>
