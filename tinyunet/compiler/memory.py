"""A place for each temporary array in one arena, so that memory is used again once it is free.

    node      0  1  2  3         a is written by 0 and read by 1, b by 1 and 2, c by 2 and 3:
    bytes     a  a  c  c         c comes where a was
                 b  b

Liveness    an array lives from the node that writes it to the last node that reads it. Arrays that
            share memory (a view, a result written in place) live together.
Placement   the largest first, each into the smallest gap that is free during its whole life (greedy
            best fit); arrays that never live at the same time may get the same bytes.

Source: Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (2020),
section 5, "greedy by size"; TensorFlow Lite plans so.
"""

from dataclasses import dataclass

from tinyunet.compiler.ir import Graph

ALIGNMENT = 64  # bytes: one cache line, and one vector


@dataclass(frozen=True)
class Buffer:
    """Some values' memory: ``nbytes`` from the node ``first`` to the node ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: "Buffer") -> bool:
        """Whether the two live at the same time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offset of each buffer in the arena, in bytes, and the arena's size."""

    buffers: dict[str, Buffer]
    offsets: dict[str, int]
    nbytes: int


def liveness(graph: Graph) -> dict[str, Buffer]:
    """Return the buffers of a graph by the first of the values in each.

    They hold temporary values only: parameters, gradients and inputs have memory of their own.
    """
    memory = graph.shared_memory()
    foreign = {memory[n] for n, v in graph.values.items() if v.kind != "temporary"}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    size: dict[str, int] = {}
    for at, node in enumerate(graph.nodes):
        for value in (*node.inputs.values(), *node.outputs.values()):
            owner = memory[value]
            first.setdefault(owner, at)
            last[owner] = at
            size[owner] = max(size.get(owner, 0), graph.values[value].nbytes)
    for value in graph.outputs:
        last[memory[value]] = len(graph.nodes)
    # What is prepared once must be there at every run.
    for node in graph.nodes:
        if node.phase == "prepare":
            for value in node.outputs.values():
                first[memory[value]], last[memory[value]] = -1, len(graph.nodes)
    return {o: Buffer(o, size[o], first[o], last[o]) for o in first if o not in foreign}


def plan(graph: Graph, reuse: bool = True) -> Plan:
    """Place all buffers of a graph; without ``reuse``, one after the other."""
    buffers = liveness(graph)
    offsets: dict[str, int] = {}
    placed: list[tuple[int, Buffer]] = []
    order = sorted(buffers.values(), key=lambda b: (-b.nbytes, b.first, b.name))
    for buffer in order:
        busy = sorted((at, at + b.nbytes) for at, b in placed if not reuse or b.meets(buffer))
        offsets[buffer.name] = _best_fit(busy, buffer.nbytes)
        placed.append((offsets[buffer.name], buffer))
    total = max((offsets[b.name] + b.nbytes for b in order), default=0)
    return Plan(buffers, offsets, total)


def _best_fit(busy: list[tuple[int, int]], nbytes: int) -> int:
    """Start of the smallest gap between sorted intervals that is large enough, or the end of all."""
    best, best_gap, end = -1, 0, 0
    for start, stop in busy:
        gap = start - end
        if gap >= nbytes and (best < 0 or gap < best_gap):
            best, best_gap = end, gap
        end = max(end, -(-stop // ALIGNMENT) * ALIGNMENT)
    return best if best >= 0 else end
