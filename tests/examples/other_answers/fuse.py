"""Layouts first: which values become blocked is found, then all nodes are wired anew, in one go."""

from dataclasses import replace

import numpy as np


def forward(src):
    dst = src.copy()
    below = src < 0
    dst[below] = np.exp(src[below]) - 1
    return dst


def backward(diff_dst, src):
    slope = np.ones_like(src)
    below = src < 0
    slope[below] = np.exp(src[below])
    return slope * diff_dst


def rewrite(graph, options):
    blocked = {}  # what lies in ndhwc, to the same numbers in blocks
    for node in graph.nodes:
        if node.op == "reorder" and graph.values[node.inputs["src"]].layout == "nCdhw16c":
            blocked[node.outputs["dst"]] = node.inputs["src"]
    nodes, values = [], []
    for node in graph.nodes:
        (given, *_) = node.inputs.values()
        if node.op.startswith("own:elu") and given in blocked:
            (written,) = node.outputs.values()
            value = replace(
                graph.values[written], name=written + " in blocks", layout="nCdhw16c", kind="temporary"
            )
            values.append(value)
            blocked[written] = value.name
            node = replace(
                node,
                inputs=dict.fromkeys(node.inputs, blocked[given]),
                outputs=dict.fromkeys(node.outputs, value.name),
            )
        nodes.append(node)
    same = {}
    for node in nodes:
        if node.op == "reorder" and node.inputs["src"] in blocked:
            same[node.outputs["dst"]] = blocked[node.inputs["src"]]
    nodes = [replace(node, inputs={k: same.get(v, v) for k, v in node.inputs.items()}) for node in nodes]
    nodes = [n for n in nodes if not (n.op == "reorder" and n.outputs["dst"] in same)]
    read = {value for node in nodes for value in node.inputs.values()} | set(graph.outputs)
    nodes = [n for n in nodes if n.op != "reorder" or n.outputs["dst"] in read]
    changes = {node.name: [] for node in graph.nodes}
    changes[graph.nodes[-1].name] = nodes
    return graph.rewrite(changes, values)
