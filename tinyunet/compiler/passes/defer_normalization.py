"""Batch-norm apply and activation move into the read side of every consumer.

    before    x > normalize: y = act(scale x + shift) > memory > conv(y), pool(y), gradients from y
    after     x > conv, pool, gradients: each reads x and forms y, channel by channel, while it packs

``y`` is never written, and it is not kept for backward: one tensor in memory where there were two.
Saves, for each normalisation, a read of ``x`` and a write of ``y``; a consumer reads ``x`` instead of
``y`` at the same price. A consumer that cannot read a deferred source keeps the ``normalize``.
"""

from tinyunet.compiler.ir import Graph, Node, Options
from tinyunet.compiler.operators import KERNELS, can_block, split


def defer_normalization(graph: Graph, options: Options) -> Graph:
    """Return the graph with every ``normalize`` moved into those of its consumers that can take it."""
    graph = split(graph)
    for normalize in graph.nodes:
        if normalize.op != "normalize":
            continue
        value = normalize.outputs["dst"]
        readers = graph.consumers(value)
        changes = {
            reader.name: [_read_deferred(reader, _roles(reader, value), normalize)]
            for reader in readers
            if _takes(reader, _roles(reader, value)) and can_block(reader, graph)
        }
        if len(changes) == len(readers) and value not in graph.outputs:
            changes[normalize.name] = []
        graph = graph.rewrite(changes)
    return graph


def _roles(reader: Node, value: str) -> list[str]:
    return [role for role, name in reader.inputs.items() if name == value]


def _takes(reader: Node, roles: list[str]) -> bool:
    kernel = KERNELS.get(reader.op)
    return all(kernel and role in kernel.reads and f"{role}.scale" not in reader.inputs for role in roles)


def _read_deferred(reader: Node, roles: list[str], normalize: Node) -> Node:
    for role in roles:
        inputs = {r.replace("src", role, 1): name for r, name in normalize.inputs.items()}
        reader = reader.with_inputs(inputs).with_attributes(
            {f"{role}.slope": normalize.attributes["src.slope"]}
        )
    return reader
