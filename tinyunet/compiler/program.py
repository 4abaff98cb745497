"""Running a graph: a list of calls, each bound to its arrays once and for all.

All temporary arrays are views into one arena, made when the program is built; after that only eager
operators allocate memory.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arrays import copy
from kernels.base.buffers import empty
from tinyunet.common import verbose
from tinyunet.compiler import eager
from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.memory import plan
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.passes.choose_algorithm import Direction
from tinyunet.compiler.record import Binder, Call, check
from tinyunet.local_ranks import ALONE, LocalRanks
from tinyunet.module import Parameter
from tinyunet.tape import Listener

Array = npt.NDArray[Any]
_NAN_BYTE = 0xFF  # every float type reads four or eight of them as NaN


class Program:
    """A graph with memory.

    Parameters
    ----------
    graph : Graph
    parameters : mapping of name to Parameter
        The graph fills the ``grad`` of each.
    reuse : bool
        Whether temporary arrays share memory (the pass ``plan_memory``).
    debug : bool
        Fill memory with NaN where nothing lives: before a run, and after the last use of a buffer.
    local : LocalRanks
        Its memory holds what is shared in the graph (:mod:`tinyunet.compiler.shared_weights`).

    Attributes
    ----------
    arrays : dict of value name to array
        Results stay here until the next run.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, Parameter],
        reuse: bool = True,
        debug: bool = False,
        local: LocalRanks = ALONE,
    ) -> None:
        self.graph, self._debug, planned = graph, debug, plan(graph, reuse)
        self._arena = empty((planned.nbytes,), np.uint8)
        owned: dict[str, Array] = {name: self._arena[at:] for name, at in planned.offsets.items()}
        packing, self._packs = set[str](), set[str]()
        if local.size > 1:
            from tinyunet.compiler import shared_weights

            owned |= shared_weights.place(graph, local)
            packing, self._packs = shared_weights.division(graph, local)
        self.arrays = self._place(owned, parameters)
        contexts: dict[str, Any] = {}
        calls = [
            (at, node, self._bind(node, contexts)) for at, node in enumerate(graph.nodes) if not node.views
        ]
        self._packing = [call for call in calls if call[1].name in packing]
        self._calls = [call for call in calls if call[1].name not in packing]
        self._complete = _completions(graph, parameters)
        self._dying: dict[int, list[Array]] = {}
        for name, buffer in planned.buffers.items():
            start = planned.offsets[name]
            self._dying.setdefault(buffer.last, []).append(self._arena[start : start + buffer.nbytes])
        self._prepared: object = None

    def pack(self, whole: bool, listener: Listener | None = None) -> None:
        """Pack the weights in shared memory: this rank's part of them.

        All of them if ``whole``, because other local ranks run other programs. It does no harm if several
        ranks pack the same. ``listener`` as in :meth:`run`.
        """
        for at, node, call in self._packing:
            if whole or node.name in self._packs:
                self._call(at, node, call, listener, verbose.wanted())

    def run(self, state: object = None, listener: Listener | None = None, **inputs: Array) -> None:
        """Run all nodes on the inputs, after :meth:`pack`; results are in ``arrays`` until the next run.

        Nodes of the phase "prepare" run only if ``state`` differs from the state of the last run.
        ``listener`` is called after each node.
        """
        for name, array in inputs.items():
            copy(array, self.arrays[name])
        prints = verbose.wanted()
        prepared = state is not None and state == self._prepared
        self._prepared = None  # until all is done: a run may be interrupted
        if self._debug and not prepared:
            self._arena.fill(_NAN_BYTE)
        for at, node, call in self._calls:
            if not (prepared and node.phase == "prepare"):
                self._call(at, node, call, listener, prints)
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

    def _call(self, at: int, node: Node, call: Call, listener: Listener | None, prints: bool) -> None:
        start = time.perf_counter() if prints else 0.0
        call()
        if prints:
            from tinyunet.compiler.show import verbose_line

            verbose.say(verbose_line(node, self.graph, time.perf_counter() - start))
        if listener is not None:
            listener(node.name, self._complete.get(at, ()))
        for memory in self._dying.get(at, ()) if self._debug else ():
            memory.fill(_NAN_BYTE)

    def _bind(self, node: Node, contexts: dict[str, Any]) -> Call:
        bound = Binder(node, self.graph, self.arrays)
        return bind(bound) if node.runs_fused else eager.bind(bound, contexts)

    def _place(self, owned: dict[str, Array], parameters: Mapping[str, Parameter]) -> dict[str, Array]:
        """An array for each value: a view into the arena, or of a parameter, gradient or input."""
        graph, memory = self.graph, self.graph.shared_memory()
        outside = dict(graph.data)
        outside |= {gradient: np.asarray(parameters[name].grad) for name, gradient in graph.gradients.items()}
        for name in graph.inputs:
            if name in memory:
                outside[name] = empty((graph.values[name].nbytes,), np.uint8)
        owned = {memory[name]: array for name, array in owned.items()}
        owned |= {memory[name]: _bytes(array) for name, array in outside.items() if name in memory}
        return {
            name: owned[memory[name]][: value.nbytes].view(value.dtype).reshape(value.storage_shape)
            for name, value in graph.values.items()
        }


def bind(b: Binder) -> Call:
    """Return a function without arguments that runs a node of blocked tensors.

    Raises
    ------
    ValueError
        The kernel does not take an array of this shape, type or layout.
    """
    kernel = KERNELS[b.node.op]
    check(b, kernel)
    return kernel.bind(b)


def _completions(graph: Graph, parameters: Mapping[str, Parameter]) -> dict[int, list[Parameter]]:
    """Parameters by the number of the last node that writes to their gradient's memory."""
    memory = graph.shared_memory()
    writers = [(at, node) for at, node in enumerate(graph.nodes) if not node.views]
    last = {memory[value]: at for at, node in writers for value in node.outputs.values()}
    found: dict[int, list[Parameter]] = {}
    for name, gradient in graph.gradients.items():
        found.setdefault(last[memory[gradient]], []).append(parameters[name])
    return found


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The memory of an array, which must be contiguous: a copy would be written in vain."""
    if not array.flags.c_contiguous:
        raise ValueError("compile: parameters, buffers and gradients must be contiguous arrays")
    return array.reshape(-1).view(np.uint8)
