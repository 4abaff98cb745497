"""ONNX: a U-Net as a graph that onnxruntime, OpenVINO and others run, at any size.

Batch and sides are dynamic. Pads are written out (``SAME`` means different things elsewhere), and where a
side is odd, the decoder pads as ours does. Source: the operators of ONNX, opset 17.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.interop.layers import EPSILON, in_its_own, layers_of
from tinyunet.unet import UNet

_OPSET, _IR = 17, 8
_META = "tinyunet"


class _Graph:
    """Nodes and constants of a graph that grows."""

    def __init__(self, model: UNet) -> None:
        from onnx import helper, numpy_helper

        self._node, self._tensor = helper.make_node, numpy_helper.from_array
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        dim = model.config["dim"]
        for layer in layers_of(model):
            for name, array in layer.arrays.items():
                shape = (-1, *(1,) * dim) if name == "slope" else None
                array = array.reshape(shape) if shape else in_its_own(array, dim)
                self.constant(f"{layer.name}.{name}", np.ascontiguousarray(array))

    def constant(self, name: str, array: Any) -> str:
        """Add a constant, once."""
        self.constants.setdefault(name, self._tensor(np.asarray(array), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node, and return the name of its result."""
        result = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self._node(operator, inputs, [result], **attributes))
        return result


def model_proto(model: UNet, header: str = "") -> Any:
    """Return the model as a protocol buffer of ONNX: from ``image`` (MB, C, ...) to ``probabilities``."""
    import onnx
    from onnx import TensorProto, helper

    config, graph = model.config, _Graph(model)
    sides = ["D", "H", "W"][-config["dim"] :]
    result = _unet(graph, config)
    value = helper.make_tensor_value_info
    src = value("image", TensorProto.FLOAT, ["MB", config["in_channels"], *sides])
    dst = value(result, TensorProto.FLOAT, ["MB", config["classes"], *sides])
    made = helper.make_graph(graph.nodes, "unet", [src], [dst], [*graph.constants.values()])
    found = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name=_META)
    found.ir_version = _IR  # of the same age as the operators
    if header:
        helper.set_model_props(found, {_META: header})
    onnx.checker.check_model(found)
    return found


def _unet(graph: _Graph, config: dict[str, Any]) -> str:
    dim, depth, two = config["dim"], config["depth"], [2] * config["dim"]
    skips, x = [], "image"
    for level in range(depth):
        x = _block(graph, x, f"encoder.{level}", config)
        if level < depth - 1:
            skips.append(x)
            x = graph.add("MaxPool", x, kernel_shape=two, strides=two)
    for i in range(depth - 1):
        skip = skips.pop()
        if config["use_upsampling"]:
            scales = graph.constant("doubled", np.array([1, 1, *two], np.float32))
            nearest = {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            }
            linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
            x = graph.add(
                "Resize", x, "", scales, **(linear if config["use_upsampling"] == "trilinear" else nearest)
            )
        else:
            x = graph.add("ConvTranspose", x, f"up.{i}.weights", f"up.{i}.bias", strides=two)
        x = _block(
            graph, graph.add("Concat", _padded(graph, x, skip, dim), skip, axis=1), f"decoder.{i}", config
        )
    x = graph.add("Conv", x, "head.weights", "head.bias")
    return graph.add("Sigmoid", x) if config["classes"] == 1 else graph.add("Softmax", x, axis=1)


def _padded(graph: _Graph, x: str, like: str, dim: int) -> str:
    """Append zeros to the sides of a tensor until they are those of another one."""
    missing = graph.add("Sub", graph.add("Shape", like, start=2), graph.add("Shape", x, start=2))
    before = graph.constant("no pads before", np.zeros(2 + dim + 2, np.int64))
    return graph.add("Pad", x, graph.add("Concat", before, missing, axis=0))


def _block(graph: _Graph, x: str, name: str, config: dict[str, Any]) -> str:
    """Twice [convolution, normalisation, activation]."""
    dim = config["dim"]
    for i in (0, 1):
        conv = f"{name}.conv{i}"
        x = graph.add("Conv", x, f"{conv}.weights", f"{conv}.bias", pads=[1] * 2 * dim)
        x = _activation(graph, _norm(graph, x, f"{name}.norm{i}", config), f"{name}.activation{i}", config)
    return x


def _norm(graph: _Graph, x: str, name: str, config: dict[str, Any]) -> str:
    kind, epsilon = config.get("norm", "batch"), config.get("epsilon", EPSILON)
    if kind is None:
        return x
    scale, shift = f"{name}.scale", f"{name}.shift"
    if kind == "batch":
        parts = scale, shift, f"{name}.running_mean", f"{name}.running_variance"
        return graph.add("BatchNormalization", x, *parts, epsilon=epsilon)
    # A group is a channel of a tensor that has a channel for each group. An instance norm is written so, too:
    # on 96^3 voxels OpenVINO's error of a whole net is then 1e-5, and 1e-4 with volumes as they are.
    channels, dim = graph.constants[scale].dims[0], config["dim"]
    groups = channels if kind == "instance" else math.gcd(8, channels)
    ones = graph.constant(f"{groups} ones", np.ones(groups, np.float32))
    zeros = graph.constant(f"{groups} zeros", np.zeros(groups, np.float32))
    flat = graph.add("Reshape", x, graph.constant(f"{groups} groups", np.array([0, groups, -1], np.int64)))
    normal = graph.add("InstanceNormalization", flat, ones, zeros, epsilon=epsilon)
    normal = graph.add("Reshape", normal, graph.add("Shape", x))
    inner = graph.constant(f"inner axes {dim}", np.arange(1, dim + 1))
    scaled = graph.add("Mul", normal, graph.add("Unsqueeze", scale, inner))
    return graph.add("Add", scaled, graph.add("Unsqueeze", shift, inner))


def _activation(graph: _Graph, x: str, name: str, config: dict[str, Any]) -> str:
    match config.get("activation", "relu"):
        case "leaky_relu":
            return graph.add("LeakyRelu", x, alpha=0.01)
        case "elu":
            return graph.add("Elu", x, alpha=1.0)
        case "prelu":
            return graph.add("PRelu", x, f"{name}.slope")
    return graph.add("Relu", x)


def write(path: Path, model: UNet, header: str) -> None:
    """Write the model, with the header among its properties."""
    path.write_bytes(model_proto(model, header).SerializeToString())
