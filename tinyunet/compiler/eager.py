"""Nodes that no pass has touched run as eager operators; their results are copied into the arena.

The graph, not the context, holds the arrays that an operator of tinyunet saves: inputs, results, workspaces.
The graph cannot know which arrays a user's operator keeps. So a user's operator gets copies of all arrays
whose memory is used again, and a new :class:`Context` at each run, as on the tape.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet.autograd import Tensor
from tinyunet.compiler.ir import Node
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.record import Binder, Call
from tinyunet.tape import Context

Arrays = Mapping[str, npt.NDArray[Any]]


class _SavedElsewhere(Context):
    """The attributes that an operator's forward leaves for its backward, without the arrays."""

    saved: tuple[npt.NDArray[Any] | None, ...] = ()

    def save(self, *arrays: npt.NDArray[Any] | None) -> None:
        self.saved = arrays


def bind(b: Binder, contexts: dict[str, Any]) -> Call:
    """Return a function without arguments that runs the node.

    Parameters
    ----------
    b : Binder
    contexts : dict
        Shared by all nodes of a graph: where a forward leaves its context for its backward.
    """
    node = b.node
    inputs = {role: b.arrays[value] for role, value in node.inputs.items()}
    outputs = {role: b.arrays[value] for role, value in node.outputs.items()}
    if node.op == "accumulate":
        return KERNELS[node.op].bind(b)
    if node.op == "eager_loss":
        return _loss(node, inputs, outputs)
    if "convolution_backward" in node.op:
        return _convolution_backward(node, inputs, outputs)
    how = (_own_forward, _own_backward) if "copied" in node.attributes else (_forward, _backward)
    return how["of" in node.attributes](node, inputs, outputs, contexts)


def _forward(node: Node, inputs: Arrays, outputs: Arrays, contexts: dict[str, Any]) -> Call:
    function, saves = node.attributes["function"], node.attributes["saves"]
    arguments = [inputs.get(role, setting) for role, setting in node.attributes["arguments"]]
    parents = tuple(Tensor(0.0) if needs else None for needs in node.attributes["needs_gradient"])
    ctx = contexts[node.name] = _SavedElsewhere(function, parents)

    def run() -> None:
        _store(outputs["dst"], function.forward(ctx, *arguments))
        for name, array in zip(saves, ctx.saved, strict=False):
            if name != "dst" and name in outputs:
                _store(outputs[name], array)
        ctx.saved = ()

    return run


def _backward(node: Node, inputs: Arrays, outputs: Arrays, contexts: dict[str, Any]) -> Call:
    function, ctx = node.attributes["function"], contexts[node.attributes["of"]]
    saved = tuple(inputs.get(f"saved.{name}") for name in node.attributes["saves"])

    def run() -> None:
        ctx.saved = saved
        _store_gradients(node, outputs, function.backward(ctx, inputs["gradient"]))
        ctx.saved = ()

    return run


def _own_forward(node: Node, inputs: Arrays, outputs: Arrays, contexts: dict[str, Any]) -> Call:
    function, needs, copied = (node.attributes[name] for name in ("function", "needs_gradient", "copied"))
    arguments, target = node.attributes["arguments"], outputs["dst"]
    parents = tuple(inputs[role] if need else None for (role, _), need in zip(arguments, needs, strict=True))

    def run() -> None:
        given = {role: array.copy() if role in copied else array for role, array in inputs.items()}
        ctx = Context(function, parents)  # type: ignore[arg-type]
        dst = Tensor(function.forward(ctx, *(given.get(role, value) for role, value in arguments))).data
        if (dst.shape, dst.dtype) != (target.shape, target.dtype):
            raise RuntimeError(
                f"compile: {function.__name__}.forward returns {dst.dtype} of {dst.shape}, and returned"
                f" {target.dtype} of {target.shape} when it was compiled; shapes must not depend on the data;"
                " use the eager model"
            )
        np.copyto(target, dst)
        if ctx.recording:
            ctx.shape, ctx.dtype = dst.shape, dst.dtype
            contexts[node.name] = ctx

    return run


def _own_backward(node: Node, inputs: Arrays, outputs: Arrays, contexts: dict[str, Any]) -> Call:
    def run() -> None:
        ctx = contexts.pop(node.attributes["of"])
        found = ctx.checked(ctx.function.backward(ctx, inputs["gradient"].copy()))
        _store_gradients(node, outputs, found)

    return run


def _convolution_backward(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    """One of a convolution's two gradients."""
    kernels, kernel = node.attributes["function"].module(), node.attributes["kernel"]
    how = node.attributes["stride"], node.attributes["padding"]

    def data() -> None:
        shape = outputs["diff_src"].shape
        _store(outputs["diff_src"], kernels.backward_data(inputs["diff_dst"], inputs["weights"], shape, *how))

    def weights() -> None:
        found = kernels.backward_weights(inputs["src"], inputs["diff_dst"], kernel, *how)
        for role, gradient in zip(("diff_weights", "diff_bias"), found, strict=True):
            if role in outputs:
                _store(outputs[role], gradient)

    return data if "diff_src" in outputs else weights


def _loss(node: Node, inputs: Arrays, outputs: Arrays) -> Call:
    function, options = node.attributes["function"], node.attributes["options"]

    def run() -> None:
        prediction = Tensor(inputs["prediction"].copy(), requires_grad=True)  # which it may keep
        # As integers that people compute with: bytes would wrap.
        loss = function(prediction, inputs["labels"].astype(np.int64), **options)
        loss.backward(inputs["gradient"])
        _store(outputs["dst"], loss.data)
        _store(outputs["diff_prediction"], prediction.grad)

    return run


def _store_gradients(node: Node, outputs: Arrays, gradients: tuple[Any, ...]) -> None:
    for (role, _), gradient in zip(node.attributes["arguments"], gradients, strict=False):
        if f"diff_{role}" in outputs:
            _store(outputs[f"diff_{role}"], gradient)


def _store(target: npt.NDArray[Any], array: Any) -> None:
    np.copyto(target, array, casting="same_kind")
