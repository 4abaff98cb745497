"""A node and its arrays, by role, put together as the fused kernels take them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy.typing as npt

from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Gradient, Mask, Source, plain
from tinyunet.compiler.ir import Graph, Node, Value

Array = npt.NDArray[Any]
Call = Callable[[], None]


class Binder(NamedTuple):
    """A node with its arrays and what is known of them, by role."""

    node: Node
    graph: Graph
    arrays: Mapping[str, Array]

    def array(self, role: str) -> Array:
        """Return the array of an input or output."""
        name = self.node.inputs.get(role) or self.node.outputs[role]
        return self.arrays[name]

    def value(self, role: str) -> Value:
        """Return what is known of an input or output."""
        return self.graph.values[self.node.inputs.get(role) or self.node.outputs[role]]

    def has(self, role: str) -> bool:
        """Whether the node has an input or output of this role."""
        return role in self.node.inputs or role in self.node.outputs

    def source(self, role: str = "src") -> Source:
        """Return a source, deferred or plain; an empty one where there is none."""
        if not self.has(role):
            return NO_SOURCE
        data = self.array(role)
        if not self.has(f"{role}.scale"):
            return plain(data, self.value(role).shape[-1])
        vectors = self.array(f"{role}.scale"), self.array(f"{role}.shift")
        return Source(data, *vectors, float(self.node.attributes[f"{role}.slope"]))

    def gradient(self) -> Gradient:
        """Return the gradient of a convolution's result, deferred or plain."""
        dz = self.array("diff_dst")
        if self.has("diff_dst.x"):
            parts = [self.array(f"diff_dst.{part}") for part in ("x", "a", "b", "d")]
            return Gradient(dz, *parts)
        ones = plain(dz, self.value("diff_dst").shape[-1])
        return Gradient(dz, NO_MASK.x, ones.scale, ones.shift, ones.shift)

    def mask(self, end: str = "") -> Mask | None:
        """Return the mask of a gradient that is written, if there is one."""
        if not self.has(f"mask{end}.x"):
            return None
        x, scale, shift, mean = (self.array(f"mask{end}.{part}") for part in ("x", "scale", "shift", "mean"))
        slope = float(self.node.attributes[f"mask{end}.slope"])
        return Mask(x, scale, shift, slope, mean, self.array(f"sums{end}"))
