"""ONNX: a U-Net as a graph that onnxruntime, OpenVINO and others run, at any size.

Batch and sides are dynamic. Pads are written out (``SAME`` means different things elsewhere), and where a
side is odd, the decoder pads as ours does. Source: the operators of ONNX, opset 17.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.interop.layers import (
    EPSILON,
    Layer,
    in_its_own,
    in_three,
    kind_of,
    layer_names,
    layers_of,
    model_from,
)
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
    kind = config.get("norm", "batch")
    if kind is None:
        return x
    scale, shift = f"{name}.scale", f"{name}.shift"
    if kind == "batch":
        parts = scale, shift, f"{name}.running_mean", f"{name}.running_variance"
        return graph.add("BatchNormalization", x, *parts, epsilon=EPSILON)
    if kind == "instance":
        return graph.add("InstanceNormalization", x, scale, shift, epsilon=EPSILON)
    # A group is a channel of a tensor that has a channel for each group.
    channels, dim = graph.constants[scale].dims[0], config["dim"]
    groups = math.gcd(8, channels)
    ones = graph.constant(f"{groups} ones", np.ones(groups, np.float32))
    zeros = graph.constant(f"{groups} zeros", np.zeros(groups, np.float32))
    flat = graph.add("Reshape", x, graph.constant(f"{groups} groups", np.array([0, groups, -1], np.int64)))
    normal = graph.add("InstanceNormalization", flat, ones, zeros, epsilon=EPSILON)
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


def read(path: Path, config_of: Callable[[str], dict[str, Any]]) -> tuple[UNet, str | None]:
    """Return the U-Net of a graph, and our header if there is one; ValueError if it is not one.

    ``config_of`` takes the arguments of the model out of the header.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        found = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ValueError(f"not an ONNX model ({str(error)[:120]})") from error
    if not found.graph.node:
        raise ValueError("not an ONNX model: a graph without nodes")
    header = {entry.key: entry.value for entry in found.metadata_props}.get(_META)
    if header is None:
        return model_from(_layers(found.graph), _hints(found.graph)), None
    # Ours: constants have our names.
    config = config_of(header)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    layers = [_ours(name, arrays) for name in layer_names(config)]
    return model_from([layer for layer in layers if layer.arrays], config), header


def _ours(name: str, arrays: dict[str, Any]) -> Layer:
    """Return the layer of our name, without arrays if there is none."""
    parts = {key.rpartition(".")[2]: a for key, a in arrays.items() if key.rpartition(".")[0] == name}
    if "weights" in parts:
        parts["weights"] = in_three(parts["weights"])
    if "slope" in parts:
        parts["slope"] = parts["slope"].reshape(-1)
    return Layer(name, kind_of(name), parts)


def _hints(graph: Any) -> dict[str, Any]:
    """Return what operators tell beside sizes."""
    operators = {node.op_type: node for node in graph.node}
    found: dict[str, Any] = {}
    if resize := operators.get("Resize", operators.get("Upsample")):
        mode = _attributes(resize).get("mode", b"nearest")
        found["use_upsampling"] = "trilinear" if mode == b"linear" else True
    for operator, name in (("LeakyRelu", "leaky_relu"), ("Elu", "elu")):
        if operator in operators:
            found["activation"] = name
    return found


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _layers(graph: Any) -> list[Layer]:
    """Return the layers with parameters, in the order of the nodes, which is that in which they run."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and "value" in (attributes := _attributes(node)):
            constants[node.output[0]] = attributes["value"]

    def arrays(node: Any, *names: str) -> dict[str, Any]:
        found = {}
        for name, given in zip(names, node.input[1:], strict=False):
            if given not in constants:
                raise ValueError(
                    f"{node.op_type} {node.output[0]}: its {name} is computed; expected a constant"
                )
            found[name] = numpy_helper.to_array(constants[given]).astype(np.float32)
        return found

    layers = []
    for node in graph.node:
        epsilon = float(_attributes(node).get("epsilon", 1e-5))
        match node.op_type:
            case "Conv" | "ConvTranspose":
                found = arrays(node, "weights", "bias")
                found["weights"] = in_three(found["weights"])
                layers.append(Layer(node.output[0], "up" if node.op_type != "Conv" else "conv", found))
            case "BatchNormalization":
                found = arrays(node, "scale", "shift", "running_mean", "running_variance")
                layers.append(Layer(node.output[0], "norm", found, epsilon))
            case "InstanceNormalization":
                layers.append(Layer(node.output[0], "norm", arrays(node, "scale", "shift"), epsilon))
            case "PRelu":
                layers.append(
                    Layer(node.output[0], "slope", {"slope": arrays(node, "slope")["slope"].reshape(-1)})
                )
    return layers
