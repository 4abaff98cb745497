"""Running a graph: a list of calls, each bound to its arrays once and for all.

All temporary arrays are views into one arena, made when the program is built; after that a run allocates
nothing but what eager operators take for themselves.

By itself, a process packs the weights of a layer just before it uses them, into memory that is used again
right after. Ranks of a node (:mod:`tinyunet.engine.local_ranks`) pack those of all layers before the first
one, each rank its part of the layers, into memory that all of them read: then they wait only once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arrays import copy
from kernels.base.buffers import empty
from tinyunet.common import verbose
from tinyunet.compiler import eager
from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.measure import Direction
from tinyunet.compiler.memory import ALIGNMENT, plan
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.record import Binder, check
from tinyunet.compiler.show import verbose_line
from tinyunet.engine.local_ranks import ALONE, LocalRanks

Array = npt.NDArray[Any]
#: Told the name of a node that has run, and those of the parameters whose gradients it completes.
Heard = Callable[[str, Sequence[str]], None]
_NAN_BYTE = 0xFF  # every float type reads four or eight of them as NaN


class Program:
    """A graph with memory.

    Parameters
    ----------
    graph : Graph
    gradients : mapping of parameter name to array
        Where each parameter's gradient goes.
    reuse : bool
        Whether temporary arrays share memory (the pass ``plan_memory``).
    debug : bool
        Fill memory with NaN where nothing lives: before a run, and after the last use of a buffer.
    local : LocalRanks
        Its memory holds what is shared in the graph (:func:`pack_first`).
    """

    def __init__(
        self,
        graph: Graph,
        gradients: Mapping[str, Array],
        reuse: bool = True,
        debug: bool = False,
        local: LocalRanks = ALONE,
    ) -> None:
        self.graph, self.plan = graph, plan(graph, reuse)
        self._arena = empty((self.plan.nbytes,), np.uint8)
        self._debug = debug
        self.arrays = self._place(gradients, _place_shared(graph, local))
        shared: dict[str, Any] = {}
        calls = [
            (at, node, self._bind(node, shared)) for at, node in enumerate(graph.nodes) if not node.views
        ]
        self._packing = [call for call in calls if _is_shared(call[1], graph)]
        self._calls = [call for call in calls if not _is_shared(call[1], graph)]
        part = _part_of(graph, local)
        self._packing_part = [call for call in self._packing if call[1].name in part]
        self._complete = _completions(graph)
        self._dying: dict[int, list[Array]] = {}
        for name, buffer in self.plan.buffers.items():
            start = self.plan.offsets[name]
            self._dying.setdefault(buffer.last, []).append(self._arena[start : start + buffer.nbytes])
        self._prepared: object = None

    def pack(self, whole: bool, listener: Heard | None = None) -> None:
        """Pack the weights in shared memory: this rank's part of them, or all.

        Parameters
        ----------
        whole : bool
            Because other local ranks run other programs. It does no harm if several do it.
        listener : callable, optional
            As in :meth:`run`.
        """
        for call in self._packing if whole else self._packing_part:
            self._call(*call, listener, verbose.wanted())

    def run(self, state: object = None, listener: Heard | None = None, **inputs: Array) -> None:
        """Run all nodes on the inputs; results are in ``arrays`` until the next run.

        What :meth:`pack` is for has been done. Nodes of the phase "prepare" run only if ``state``,
        whatever it is, is not that of the last run. ``listener`` is called after each node with its
        name, and the names of the parameters whose gradients are complete by then.
        """
        for name, array in inputs.items():
            copy(array, self.arrays[name])
        told = verbose.wanted()
        prepared = state is not None and state == self._prepared
        self._prepared = None  # until all is done: a run may be interrupted
        if self._debug and not prepared:
            self._arena.fill(_NAN_BYTE)
        for at, node, call in self._calls:
            if not (prepared and node.phase == "prepare"):
                self._call(at, node, call, listener, told)
        self._prepared = state

    def compile(self, direction: Direction) -> None:
        """Run the fused nodes once on zeros, from either end, so that their kernels are compiled."""
        self._arena.fill(0)
        for name in self.graph.inputs:
            if name in self.arrays:
                self.arrays[name].fill(0)
        for _, node, call in self._calls if direction == "forwards" else self._calls[::-1]:
            if node.runs_fused:
                call()

    def _call(
        self, at: int, node: Node, call: Callable[[], None], listener: Heard | None, told: bool
    ) -> None:
        start = time.perf_counter() if told else 0.0
        call()
        if told:
            verbose.say(verbose_line(node, self.graph, time.perf_counter() - start))
        if listener is not None:
            listener(node.name, self._complete.get(at, ()))
        for memory in self._dying.get(at, ()) if self._debug else ():
            memory.fill(_NAN_BYTE)

    def _bind(self, node: Node, shared: dict[str, Any]) -> Callable[[], None]:
        if node.runs_fused:
            return bind(Binder(node, self.graph, self.arrays))
        inputs = {role: self.arrays[value] for role, value in node.inputs.items()}
        outputs = {role: self.arrays[value] for role, value in node.outputs.items()}
        return eager.bind(node, inputs, outputs, shared)

    def _place(self, gradients: Mapping[str, Array], shared: Mapping[str, Array]) -> dict[str, Array]:
        """An array for each value: somebody else's memory, or a view into the arena."""
        graph, memory = self.graph, self.graph.shared_memory()
        owned = {memory[name]: self._arena[at:] for name, at in self.plan.offsets.items()}
        owned |= {memory[name]: array for name, array in shared.items()}
        for name, array in graph.data.items():
            if name in memory:
                owned[memory[name]] = _bytes(array)
        for parameter, gradient in graph.gradients.items():
            owned[memory[gradient]] = _bytes(gradients[parameter])
        for name in graph.inputs:
            if name in graph.values:
                value = graph.values[name]
                owned[memory[name]] = empty((value.nbytes,), np.uint8)
        return {
            name: owned[memory[name]][: value.nbytes].view(value.dtype).reshape(value.storage_shape)
            for name, value in graph.values.items()
        }


def bind(b: Binder) -> Callable[[], None]:
    """Return a function without arguments that runs a node of blocked tensors.

    Raises
    ------
    ValueError
        An array is not what the kernel takes.
    """
    kernel = KERNELS[b.node.op]
    check(b, kernel)
    return kernel.bind(b)


def _completions(graph: Graph) -> dict[int, list[str]]:
    """Parameters by the number of the last node that writes to their gradient's memory."""
    memory = graph.shared_memory()
    last = {
        memory[value]: at
        for at, node in enumerate(graph.nodes)
        if not node.views
        for value in node.outputs.values()
    }
    found: dict[int, list[str]] = {}
    for parameter, gradient in graph.gradients.items():
        found.setdefault(last[memory[gradient]], []).append(parameter)
    return found


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The memory of an array, which must be contiguous: a copy would be written in vain."""
    if not array.flags.c_contiguous:
        raise ValueError("compile: parameters, buffers and gradients must be contiguous arrays")
    return array.reshape(-1).view(np.uint8)


# ---- weights that the ranks of a node pack together ------------------------------------------------------


def pack_first(graph: Graph, local: LocalRanks) -> Graph:
    """Return a finished graph with the weights of all layers packed in front, into shared memory.

    It is returned as it is where a process has another one: then no rank shares.
    """
    packing = [
        node
        for node in graph.nodes
        if node.op == "pack_weights" and graph.values[node.inputs["weights"]].kind == "parameter"
    ]
    if not local.is_same(_description(graph, packing)):
        return graph
    names, values = {node.name for node in packing}, dict(graph.values)
    for node in packing:
        packed = values[node.outputs["packed"]]
        values[packed.name] = replace(packed, kind="shared")
    others = [node for node in graph.nodes if node.name not in names]
    return replace(graph, nodes=(*packing, *others), values=values).check()


def _is_shared(node: Node, graph: Graph) -> bool:
    """Whether a node packs for all ranks of a node."""
    return any(graph.values[name].kind == "shared" for name in node.outputs.values())


def _part_of(graph: Graph, local: LocalRanks) -> set[str]:
    """Return the names of the nodes that this rank packs.

    The largest first, each to whom has least to do so far: the same division in every process.
    """
    packed = {
        node.name: graph.values[node.outputs["packed"]].nbytes
        for node in graph.nodes
        if _is_shared(node, graph)
    }
    work, mine = [0] * local.size, set()
    for name in sorted(packed, key=packed.__getitem__, reverse=True):
        rank = work.index(min(work))
        work[rank] += packed[name]
        if rank == local.rank:
            mine.add(name)
    return mine


def _place_shared(graph: Graph, local: LocalRanks) -> dict[str, npt.NDArray[np.uint8]]:
    """Return memory for each shared value, one after the other in one shared array."""
    sizes = {value.name: value.nbytes for value in graph.values.values() if value.kind == "shared"}
    if not sizes:
        return {}
    ends = np.cumsum([-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in sizes.values()])
    memory = local.zeros(int(ends[-1]), np.uint8)
    return dict(zip(sizes, np.split(memory, ends[:-1]), strict=True))


def _description(graph: Graph, packing: list[Node]) -> str:
    """Say all that the packed weights depend on."""
    shapes = [graph.values[name].shape for name in graph.inputs if name in graph.values]
    layers = [
        (node.name, graph.values[node.outputs["packed"]].shape, node.attributes["for"].attributes)
        for node in packing
    ]
    return repr((shapes, layers))
