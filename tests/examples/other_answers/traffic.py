"""Count from the tensors: each goes through memory so many times."""

import math


def bytes_moved(voxels, IC, OC):
    channels = [math.ceil(c / 16) * 16 for c in (IC, OC)]
    sizes = {
        "src": channels[0] * voxels,
        "dst": channels[1] * voxels,
        "other": IC * OC * 27 + channels[1] * 2,
    }
    apart = {"src": 1, "dst": 5, "other": 1}
    fused = {"src": 1, "dst": 1, "other": 1}
    return [sum(4 * sizes[name] * times for name, times in way.items()) for way in (apart, fused)]


def measure(graph):
    size = {
        name: math.prod(value.storage_shape) * value.dtype.itemsize for name, value in graph.values.items()
    }
    moved = {node.name: 0 for node in graph.nodes}
    for node in graph.nodes:
        still = {*node.views, *node.views.values()}
        for role, name in node.values.items():
            moved[node.name] += 0 if role in still else size[name]
    return moved
