"""The U-Net written as an ONNX model, for the systems that read it; NCDHW."""

from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from tinyunet.benchmarks.problem import CLASSES, DEPTH, NORM_EPSILON, Problem


def model_of(problem: Problem) -> bytes:
    """Return the file of a model from ``image`` to probabilities; weights have this project's names."""
    nodes: list[Any] = []

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    MB, D, H, W, C = problem.image.shape
    value = helper.make_tensor_value_info
    src = value("image", TensorProto.FLOAT, (MB, C, D, H, W))
    dst = value(_unet(add), TensorProto.FLOAT, (MB, CLASSES, D, H, W))
    weights = [numpy_helper.from_array(a, name) for name, a in problem.weights.items()]
    graph = helper.make_graph(nodes, "unet", [src], [dst], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8  # of the same age as the operators
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _unet(add: Any) -> str:
    two, skips, x = [2] * 3, [], "image"
    for level in range(DEPTH):
        x = _block(add, x, f"encoder.{level}")
        if level < DEPTH - 1:
            skips.append(x)
            x = add("MaxPool", x, kernel_shape=two, strides=two)
    for i in range(DEPTH - 1):
        x = add("ConvTranspose", x, f"up.{i}.weights", f"up.{i}.bias", strides=two)
        x = _block(add, add("Concat", x, skips.pop(), axis=1), f"decoder.{i}")
    return str(add("Softmax", add("Conv", x, "head.weights", "head.bias"), axis=1))


def _block(add: Any, x: str, name: str) -> str:
    """Twice [convolution, batch norm, ReLU]."""
    for i in (0, 1):
        conv, norm = f"{name}.conv{i}", f"{name}.norm{i}"
        x = add("Conv", x, f"{conv}.weights", f"{conv}.bias", pads=[1] * 6)
        parts = [f"{norm}.{part}" for part in ("scale", "shift", "running_mean", "running_variance")]
        x = add("Relu", add("BatchNormalization", x, *parts, epsilon=NORM_EPSILON))
    return x
