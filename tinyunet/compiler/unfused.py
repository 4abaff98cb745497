"""How a node runs that no pass has touched: the eager operator, its results copied into the arena.

An operator gets a :class:`_SavedElsewhere` in place of a :class:`Context`: what it saves is not kept there,
but where the graph says, as an input, a result or a workspace of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet.autograd import Function, Tensor
from tinyunet.compiler import own
from tinyunet.compiler.binder import Call
from tinyunet.compiler.ir import Node
from tinyunet.engine.context import Context

Arrays = Mapping[str, npt.NDArray[Any]]


class _SavedElsewhere(Context):
    """What an operator's forward leaves for its backward, without the arrays."""

    def __init__(self, function: type[Function], needs_gradient: tuple[bool, ...]) -> None:
        self.function, self.needs_gradient = function, needs_gradient
        self.recording = any(needs_gradient)
        self.arrays: tuple[npt.NDArray[Any] | None, ...] = ()

    def save(self, *arrays: npt.NDArray[Any] | None) -> None:
        self.arrays = arrays

    @property
    def saved(self) -> tuple[Any, ...]:
        return self.arrays


def bind(node: Node, inputs: Arrays, outputs: Arrays, calls: dict[str, Any]) -> Call:
    """Return a function without arguments that runs the node.

    Parameters
    ----------
    node : Node
    inputs, outputs : mapping of role to array
    calls : dict
        Shared by all nodes of a graph: where a forward leaves its settings for its backward.
    """
    if node.op in _SPECIAL:
        return _SPECIAL[node.op](node, inputs, outputs)
    if node.op.endswith("_backward_data"):
        return _backward_data(node, inputs, outputs)
    if node.op.endswith("_backward_weights"):
        return _backward_weights(node, inputs, outputs)
    if "lent" in node.attributes:
        bind_own = own.backward if "of" in node.attributes else own.forward
        return bind_own(node, inputs, outputs, calls)
    if "of" in node.attributes:
        return _backward(node, inputs, outputs, calls[node.attributes["of"]])
    call = calls[node.name] = _SavedElsewhere(node.attributes["function"], node.attributes["needs_gradient"])
    return _forward(node, inputs, outputs, call)


def _forward(node: Node, inputs: Arrays, outputs: Arrays, call: _SavedElsewhere) -> Call:
    function, saves = node.attributes["function"], node.attributes["saves"]
    arguments = [inputs.get(role, setting) for role, setting in node.attributes["arguments"]]

    def run() -> None:
        _store(outputs["dst"], function.forward(call, *arguments))
        for name, array in zip(saves, call.arrays, strict=False):
            if name != "dst" and name in outputs:
                _store(outputs[name], array)
        call.arrays = ()

    return run


def _backward(node: Node, inputs: Arrays, outputs: Arrays, call: _SavedElsewhere) -> Call:
    function = node.attributes["function"]
    saved = tuple(inputs.get(f"saved.{name}") for name in node.attributes["saves"])
    roles = [f"diff_{role}" for role, _ in node.attributes["arguments"]]

    def run() -> None:
        call.arrays = saved
        gradients = function.backward(call, inputs["gradient"])
        for role, gradient in zip(roles, gradients, strict=False):
            if role in outputs:
                _store(outputs[role], gradient)
        call.arrays = ()

    return run


def _backward_data(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    kernels, (stride, padding) = _kernels(node)
    shape = outputs["diff_src"].shape

    def run() -> None:
        diff_src = kernels.backward_data(inputs["diff_dst"], inputs["weights"], shape, stride, padding)
        _store(outputs["diff_src"], diff_src)

    return run


def _backward_weights(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    kernels, (stride, padding) = _kernels(node)
    kernel = node.attributes["kernel"]

    def run() -> None:
        found = kernels.backward_weights(inputs["src"], inputs["diff_dst"], kernel, stride, padding)
        for role, gradient in zip(("diff_weights", "diff_bias"), found, strict=True):
            if role in outputs:
                _store(outputs[role], gradient)

    return run


def _kernels(node: Node) -> tuple[Any, tuple[Any, Any]]:
    return (node.attributes["function"].module, (node.attributes["stride"], node.attributes["padding"]))


def _accumulate(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    def run() -> None:
        np.add(inputs["a"], inputs["b"], out=outputs["dst"])

    return run


def _eager_loss(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    function = node.attributes["function"]
    options = {"from_logits": True} if node.attributes["from_logits"] else {}

    def run() -> None:
        loans = own.Loans()
        prediction = Tensor(loans.lend(inputs["prediction"]), requires_grad=True)
        # As integers that people compute with: bytes would wrap.
        loss = function(prediction, inputs["labels"].astype(np.int64), **options)
        loss.backward(inputs["gradient"])
        _store(outputs["dst"], loss.data)
        _store(outputs["diff_prediction"], prediction.grad)
        del prediction, loss
        loans.check("the loss")

    return run


_SPECIAL: dict[str, Callable[[Node, Arrays, Arrays], Call]] = {
    "accumulate": _accumulate,
    "eager_loss": _eager_loss,
}


def _store(target: npt.NDArray[Any], array: Any) -> None:
    np.copyto(target, array, casting="same_kind")
