"""One record for each operator: all that the compiler knows of it. Passes read the record, never a name.

An :class:`Operator` describes the result of an eager operator, and the arrays that it keeps for its gradient,
so that a model can be traced without running it. A :class:`Kernel` describes how a node runs on blocked
tensors, and which operations can be fused into it::

    Operator max_pooling     shape of the result; saves argmax
      Kernel max_pooling             reads a deferred src
      Kernel max_pooling_backward    writes diff_src: can add to what is there, and mask it

Roles with a dot belong to the role before it: ``src.scale`` and ``src.shift`` defer a normalisation of
``src`` (``kernels.deferred.tensors``), ``diff_dst.x .a .b .d`` a gradient of batch norm, ``mask.x .scale
.shift .mean`` mask ``diff_src``. The second source or gradient of a convolution ends in ``_b``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.deferred import masking
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Mask, Source, gradient, plain
from tinyunet.autograd import Function
from tinyunet.compiler.ir import Graph, Node, Value

if TYPE_CHECKING:
    from kernels.ops.activation import Activation

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Call = Callable[[], None]
Arguments = Mapping[str, Any]  # of ``Function.forward`` by name; arrays have shape and dtype only
Shapes = Mapping[str, "Shape | int"]  # by role: a shape, or how many items there are whatever the shape is


class Binder(NamedTuple):
    """A node with its arrays, by role, as kernels take them."""

    node: Node
    graph: Graph
    arrays: Mapping[str, Array]

    def array(self, role: str) -> Array:
        """Return the array of an input or output."""
        return self.arrays[self.node.inputs.get(role) or self.node.outputs[role]]

    def value(self, role: str) -> Value:
        """Return the :class:`Value` of an input or output."""
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

    def gradient(self) -> Source:
        """Return the gradient of a convolution's result, deferred or plain."""
        dz = self.array("diff_dst")
        if self.has("diff_dst.x"):
            return gradient(dz, *(self.array(f"diff_dst.{part}") for part in ("x", "a", "b", "d")))
        ones = plain(dz, self.value("diff_dst").shape[-1])
        return gradient(dz, NO_MASK.x, ones.scale, ones.shift, ones.shift)

    def mask(self, end: str = "") -> Mask | None:
        """Return the mask of a gradient that is written, if there is one."""
        if not self.has(f"mask{end}.x"):
            return None
        x, scale, shift, mean = (self.array(f"mask{end}.{part}") for part in ("x", "scale", "shift", "mean"))
        slope = float(self.node.attributes[f"mask{end}.slope"])
        return Mask(x, scale, shift, slope, mean, self.array(f"sums{end}"))


@dataclass(frozen=True)
class Kernel:
    """How the nodes of one name run, and what can be fused into them."""

    # Returns a function without arguments that runs the node; everything else is decided before.
    bind: Callable[[Binder], Call]
    # Shapes that the kernel takes, for all roles without a dot; None if NumPy runs it, and looks itself.
    sizes: Callable[[Binder], Shapes] | None = None
    reads: tuple[str, ...] = ()  # roles that may be deferred sources
    gathers: bool = False  # whether it gathers the moments of what it writes, dst
    forms: bool = False  # whether it forms a deferred gradient of batch norm, diff_dst, while it reads
    masks: tuple[str, ...] = ()  # roles that write a gradient, and can mask it on the way
    adds: bool = False  # whether such a gradient can be added to what is there
    has_eager: bool = True  # whether it can also run as an eager operator; what only passes make cannot
    # Whether there is a kernel for a node's settings.
    fits: Callable[[Node, Graph], bool] = lambda node, graph: True
    takes: str = ""  # the settings that there is a kernel for, in words
    # Shape of the partial sums of a role (moments, sums) that it writes.
    sums: Callable[[Node, str, Graph], Shape] = lambda node, role, graph: gradient_sums(node, role, graph)
    # Multiplications and additions of the definition, from a node and the shapes of its roles.
    flops: Callable[[Node, Mapping[str, Shape]], int] | None = None
    # How many floats the node's packed weights take; 0 if it takes them as they are.
    packed: Callable[[Node, Graph], int] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator of ``tinyunet.functional``, ``tinyunet.losses`` or the arithmetic of tensors."""

    name: str  # in the graph
    function: type[Function]  # the eager operator
    shape: Callable[[Arguments], Shape]  # of the result, from the arguments
    # What forward saves for backward, in order: names of arguments, "dst", or of workspaces; "" for nothing.
    # May depend on which arguments need a gradient.
    saves: tuple[str, ...] | Callable[[tuple[bool, ...]], tuple[str, ...]] = ()
    # Shape and type of arrays that only backward reads, from the arguments and the result's shape.
    workspaces: Mapping[str, Callable[[Arguments, Shape], tuple[Shape, npt.DTypeLike]]] = field(
        default_factory=dict
    )
    dtype: Callable[[Arguments], npt.DTypeLike] | None = None  # of the result; of the first argument if None
    work: tuple[int, int] = (1, 1)  # operations an element, forward and backward, if not those of a kernel
    kernels: Mapping[str, Kernel] = field(default_factory=dict)  # also of its gradient and what passes make
    # Nodes of its gradient; one that calls backward if None.
    differentiate: Callable[[Node, str, dict[str, str], Graph], Iterator[Node]] | None = None
    # Returns the graph with a node (and its gradient) in pieces, which passes can move. Takes the graph, the
    # node, and the activation after it, or None, with its slope.
    split: Callable[[Graph, Node, Node | None, float], Graph] | None = None
    # Of an activation: what kernels know of it. Readers apply one that is deferred; another one is written,
    # in one pass with the normalisation before it.
    activation: "Callable[[Node], Activation] | None" = None
    # Whether a node subtracts the mean of each channel, and with it whatever bias was added before.
    centres: Callable[[Node], bool] = lambda node: False


# ---- shapes that records are made of ---------------------------------------------------------


def same(a: Arguments) -> Shape:
    """Shape of the source."""
    return tuple(a["src"].shape)


def volume(size: tuple[int, ...], channels: int) -> Shape:
    """Shape of a blocked tensor of (MB, D, H, W)."""
    return (size[0], blocks(channels), *size[1:], LANES)


def lanes(channels: int) -> Shape:
    """Shape of a vector of one number a channel, padded to whole blocks."""
    return (blocks(channels) * LANES,)


def vectors(name: str, like: Value) -> Value:
    """Return a value of one number for each image and channel of a volume, as fused kernels take it."""
    return Value(name, (like.shape[0], *lanes(like.shape[-1])), np.dtype(np.float32))


def gradient_sums(node: Node, role: str, graph: Graph) -> Shape:
    """Shape of the sums that go with a mask."""
    value = graph.values[node.outputs["diff_src"]]
    return (2, masking.partials(value.storage_shape), *lanes(value.shape[-1]))


# ---- what a kernel may be bound to -----------------------------------------------------------

_SUMS = ("moments", "sums", "sums_b", "dice", "cross_entropy", "diff_dice", "diff_cross_entropy")
_DTYPES: dict[str, type] = dict.fromkeys(("argmax", "saved.argmax", "labels"), np.uint8)
_DTYPES |= dict.fromkeys((*_SUMS, "class_weights"), np.float64)


def check(b: Binder, kernel: Kernel) -> None:
    """Raise ValueError if a node has arrays that its kernel cannot take.

    A kernel works out addresses from the sizes that it is given, and nothing stops it at the end of an array.
    The sizes come from *one* value of the node. So a pass that connects arrays that do not fit, say a
    source that is not blocked and a kernel that reads blocks, ends here.
    """
    if kernel.sizes is None:
        return
    expected = kernel.sizes(b)
    for role, name in (*b.node.inputs.items(), *b.node.outputs.items()):
        array, dtype = b.arrays[name], _DTYPES.get(role, np.float32)
        wanted = expected[role] if role in expected else _follows(role, expected)
        if wanted is None:
            raise ValueError(f"graph: {b.node.name}: {b.node.op} has no {role!r}")
        have: Shape | int = array.size if isinstance(wanted, int) else array.shape
        if have != wanted or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"graph: {b.node.name}: {role} is {array.dtype} of {array.shape}; "
                f"its kernel takes contiguous {np.dtype(dtype)} of {wanted}"
            )


def _follows(role: str, expected: Shapes) -> Shape | None:
    """Shape of a role that follows from that of the blocked tensor which it belongs to."""
    name, _, part = role.partition(".")
    end = "_b" if name.endswith("_b") else ""
    of = f"diff_src{end}" if name in (f"mask{end}", f"accumulate{end}", f"sums{end}") else name
    whole = expected.get(of)
    if not isinstance(whole, tuple) or len(whole) != 6:
        return None
    if name.startswith("sums"):
        return (2, masking.partials(whole), whole[1] * LANES)
    return whole if part in ("", "x") else (whole[0], whole[1] * LANES)
