"""The graph: values (edges) and nodes, in the order in which they run. Nothing here is ever changed.

A :class:`Value` is an array that will exist: its shape, type and layout, not its numbers. It is
written by one node and read by any number (static single assignment). A :class:`Node` is one kernel
call: an operator, its inputs and outputs by role ("src", "weights", "dst"), and its settings. A
:class:`Graph` lists the nodes in topological order: forward first, then the gradients.

A pass is a function from graph and :class:`Options` to graph. It rewrites with :meth:`Graph.rewrite`, and
:meth:`Graph.check` raises ValueError if the result is no valid graph.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kernels.base.layout import blocks
from kernels.base.simd import LANES

Kind = Literal["input", "parameter", "buffer", "constant", "gradient", "shared", "temporary"]
Phase = Literal["prepare", "forward", "backward"]

#: Layouts of a volume; everything else (weights, vectors, sums) is "plain".
NDHWC, BLOCKED, PLAIN = "ndhwc", "nCdhw16c", "plain"


class Options(NamedTuple):
    """Settings of a compilation, which passes read."""

    passes: tuple[str, ...]  # all that run
    accuracy: str  # what convolutions may lose: "fast" or "strict"
    deterministic: bool = False  # choose algorithms by a model of their work alone, not by the clock


@dataclass(frozen=True)
class Value:
    """An edge: one array.

    ``kind`` says who owns the memory: the caller ("input"), the model ("parameter", "buffer"), the traced
    program ("constant"), the parameter's ``grad`` ("gradient"), the ranks of a node ("shared"), or the arena
    ("temporary").
    """

    name: str
    shape: tuple[int, ...]  # as in the eager model: (MB, D, H, W, C) for a volume, whatever its layout
    dtype: np.dtype[Any]
    layout: str = PLAIN
    kind: Kind = "temporary"
    needs_gradient: bool = False  # whether it depends on a parameter

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the array in memory."""
        if self.layout != BLOCKED:
            return self.shape
        MB, D, H, W, C = self.shape
        return MB, blocks(C), D, H, W, LANES

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding lanes included."""
        return math.prod(self.storage_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Node:
    """One call of a kernel. Nodes of the phase "prepare" depend on no input: inference runs them once."""

    name: str  # unique: "encoder.0.conv0", "d encoder.0.conv0"
    op: str  # the operator: "convolution", "convolution_backward_data", "relu"
    inputs: Mapping[str, str]  # role to name of the value
    outputs: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)  # settings; and what passes decide: "tile"
    phase: Phase = "forward"
    # An output takes the memory of an input (by roles), which nobody may read afterwards;
    in_place: Mapping[str, str] = field(default_factory=dict)
    # or it *is* the input's memory under another shape.
    views: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs_fused(self) -> bool:
        """Whether a kernel of the compiled graph runs it; otherwise its eager operator does, or nothing."""
        return self.attributes.get("implementation") == "fused"

    @property
    def values(self) -> dict[str, str]:
        """Names of all values by role, inputs first."""
        return {**self.inputs, **self.outputs}

    def with_inputs(self, roles: Mapping[str, str]) -> Self:
        """Return the same call with inputs replaced or added."""
        return replace(self, inputs={**self.inputs, **roles})

    def with_outputs(self, roles: Mapping[str, str]) -> Self:
        """Return the same call with outputs replaced or added."""
        return replace(self, outputs={**self.outputs, **roles})

    def with_attributes(self, settings: Mapping[str, Any]) -> Self:
        """Return the same call with settings replaced or added."""
        return replace(self, attributes={**self.attributes, **settings})


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order, and the values between them."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]  # by name
    inputs: tuple[str, ...]  # what each call brings: images, and labels in training
    outputs: tuple[str, ...]  # what stays readable after a run
    data: Mapping[str, npt.NDArray[Any]]  # memory of parameters, buffers and constants
    gradients: Mapping[str, str] = field(default_factory=dict)  # parameter to the name of its gradient
    classes: int = 0  # one more than the highest label, if an operator wants labels to be classes; else 0
    ignore_label: int | None = None  # a label that may stand beside the classes

    def producer(self, value: str) -> Node | None:
        """Return the node that writes a value, or None for a value from outside."""
        return self.producers().get(value)

    def producers(self) -> dict[str, Node]:
        """Return for each value the node that writes it."""
        return {value: node for node in self.nodes for value in node.outputs.values()}

    def backward_of(self, node: Node) -> Node | None:
        """Return the (first) node of the gradient of a node, if there is one."""
        return next((other for other in self.nodes if other.attributes.get("of") == node.name), None)

    def are_fixed(self, values: Iterable[str]) -> bool:
        """Whether values are made of parameters, buffers and constants alone, before a run."""
        made = self.producers()
        return all(
            made[v].phase == "prepare" if v in made else self.values[v].kind != "input" for v in values
        )

    def consumers(self, value: str) -> list[Node]:
        """Return the nodes that read a value, in order."""
        return [node for node in self.nodes if value in node.inputs.values()]

    def rewrite(
        self, changes: Mapping[str, Iterable[Node]], values: Iterable[Value] = (), **others: Any
    ) -> Self:
        """Return the graph with some nodes replaced by others (by none: removed), and values added.

        ``changes`` says by the name of a node what stands in its place; ``values`` are new, or new versions
        of known ones. Values that no node mentions any more are dropped. ``others`` are other fields to
        replace.
        """
        nodes = tuple(new for node in self.nodes for new in changes.get(node.name, (node,)))
        known = {**self.values, **{value.name: value for value in values}}
        mentioned = {*others.get("inputs", self.inputs), *others.get("outputs", self.outputs)}
        mentioned.update(value for node in nodes for value in node.values.values())
        kept = {name: value for name, value in known.items() if name in mentioned}
        return replace(self, nodes=nodes, values=kept, **others)

    def check(self) -> Self:
        """Return the graph itself if it is one.

        Raises
        ------
        ValueError
            A value is read before it is written, written twice or unknown; an output is never
            written; a name comes twice; memory is written to that is still needed.
        """
        own = ("temporary", "gradient", "shared")
        written, names = {name for name, v in self.values.items() if v.kind not in own}, set[str]()
        for node in self.nodes:
            _require(node.name not in names, f"node {node.name!r} comes twice")
            names.add(node.name)
            for role, value in node.inputs.items():
                _require(value in written, f"{node.name}: {role} {value!r} is read before written")
            for role, value in node.outputs.items():
                _require(value in self.values, f"{node.name}: {role} {value!r} is unknown")
                _require(value not in written, f"{node.name}: {role} {value!r} is written twice")
                written.add(value)
        for value in self.outputs:
            _require(value in written, f"output {value!r} is never written")
        self._check_overwriting()
        return self

    def _check_overwriting(self) -> None:
        memory = self.shared_memory()
        for at, node in enumerate(self.nodes):
            for target, role in node.in_place.items():
                value = node.inputs[role]
                mine = {name for name, group in memory.items() if group == memory[value]}
                mine -= {node.outputs[target]}
                later = {v for other in self.nodes[at + 1 :] for v in other.inputs.values()}
                older = {v for other in self.nodes[:at] for v in other.outputs.values()} | {value}
                lost = mine & older & (later | set(self.outputs))
                _require(not lost, f"{node.name} writes over {sorted(lost)}, needed later")
                _require(
                    self.values[value].kind in ("temporary", "gradient"),
                    f"{node.name} writes over {value!r}, which is not its own",
                )

    def shared_memory(self) -> dict[str, str]:
        """Return for each value the one that owns its memory: itself, or the first that shares it."""
        memory = {name: name for name in self.values}
        for node in self.nodes:
            for target, role in {**node.views, **node.in_place}.items():
                memory[node.outputs[target]] = memory[node.inputs[role]]
        return memory


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"graph: {message}")
