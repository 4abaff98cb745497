"""Read a U-Net from a model of ONNX that any program wrote.

The graph is recognised, and then the net is compared with what onnxruntime computes from the file, if it is
installed: a graph may pad, or cut, otherwise than its nodes show.
"""

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.autograd import no_grad
from tinyunet.common.errors import said
from tinyunet.interop.graph_checks import all_equal, convolution, demand, type_of_groups
from tinyunet.interop.recognition import Layer, recognize
from tinyunet.unet import UNet

Array = NDArray[Any]

_META = "tinyunet"  # the property that holds our header
_NEAR = 1e-3  # how far the net may be from the file's own prediction


def read(path: Path, config_of: Callable[[str], dict[str, Any]]) -> tuple[UNet, str | None]:
    """Return the U-Net of a graph, and our header if there is one; ValueError if it is not one.

    ``config_of`` takes the arguments of the model out of the header.
    """
    import onnx

    content = path.read_bytes()
    try:
        found = onnx.load_model_from_string(content)
    except Exception as error:  # a type of protobuf's
        raise ValueError(f"not an ONNX model ({said(error)[:120]})") from error
    graph, layers = _Graph(onnx, found.graph), dict[str, Layer]()
    images = [value for value in found.graph.input if value.name not in graph.arrays]
    if len(images) != 1 or len(found.graph.output) != 1:
        raise ValueError(
            f"{len(images)} inputs, {len(found.graph.output)} outputs; expected one each of a U-Net"
        )
    layers[images[0].name] = Layer("input")
    for node in found.graph.node:
        for name, layer in graph.layers(node, layers):
            layers[name] = layer
    header = {entry.key: entry.value for entry in found.metadata_props}.get(_META)
    model = recognize(layers, found.graph.output[0].name, config_of(header) if header else {})
    if find_spec("onnxruntime") is not None:
        _compare(images[0], content, model)
    return model, header


def _compare(image: Any, content: bytes, model: UNet) -> None:
    """Raise ValueError if the model predicts on an odd size what the file does not."""
    import onnxruntime

    config = model.config
    odd = [1, config["in_channels"], *[2 ** (config["depth"] - 1) + 1] * config["dim"]]
    fixed = [axis.dim_value for axis in image.type.tensor_type.shape.dim]
    shape = [have or want for have, want in zip(fixed, odd, strict=True)]
    src = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        (theirs,) = session.run(None, {image.name: src})
    except Exception as error:  # types of onnxruntime's own
        raise ValueError(f"onnxruntime does not run it ({said(error)[:120]})") from error
    with no_grad():
        ours = [make(np.moveaxis(src, 1, -1)).data for make in (model, model.logits)]
    wrong = min(_distance(theirs, each) for each in ours)
    if not wrong < _NEAR:
        raise ValueError(f"a U-Net of another kind: on {shape} voxels its result differs by {wrong:.2g}")


def _distance(theirs: Array, ours: Array) -> float:
    theirs = np.moveaxis(theirs, 1, -1)
    if theirs.shape != ours.shape:
        return math.inf
    return float(np.abs(theirs - ours).max() / max(1.0, float(np.abs(ours).max())))


class _Graph:
    """The arrays of a graph, and the layers that its nodes are."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx = onnx
        self.arrays: dict[str, Array] = {}
        for tensor in graph.initializer:
            self.arrays[tensor.name] = self.array(tensor.name, tensor)

    def array(self, name: str, tensor: Any) -> Array:
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError(f"{name[:60]!a} is kept in another file; expected a model in one file")
        demand(name, tensor.data_type in range(1, 23), f"type {tensor.data_type}", "numbers")
        parts = (tensor.float_data, tensor.double_data, tensor.int32_data, tensor.int64_data)
        held = len(tensor.raw_data) or max(map(len, parts))
        demand(
            name,
            min(tensor.dims, default=0) >= 0 and math.prod(tensor.dims) <= held,
            f"shape {list(tensor.dims)}",
            "as many numbers as it holds",
        )
        try:
            found = np.asarray(self.onnx.numpy_helper.to_array(tensor))
        except Exception as error:
            raise ValueError(f"{name[:60]!a} cannot be read ({said(error)[:80]})") from error
        return found.astype(np.float32) if found.dtype == np.float16 else found

    def layers(self, node: Any, before: Mapping[str, Layer]) -> list[tuple[str, Layer]]:
        """Return what a node adds to the graph; a constant is kept among the arrays."""
        how = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        operator, output = node.op_type, node.output[0]
        if operator == "Constant" and "value" in how:
            self.arrays[output] = self.array(output, how["value"])
            return []
        if operator == "Identity" and node.input[0] in self.arrays:
            self.arrays[output] = self.arrays[node.input[0]]
            return []
        if operator in ("Unsqueeze", "Cast") and node.input[0] in self.arrays:
            self.arrays[output] = self.arrays[node.input[0]]  # a vector of channels either way
            return []
        sources = tuple(name for name in node.input if name in before)
        if operator == "Add" and (layer := self.group_norm(output, node, before)):
            return [(output, layer)]
        arrays = [self.arrays.get(name) for name in node.input]
        make = _READERS.get(operator) if node.domain in ("", "ai.onnx") else None
        layer = make(output, sources, arrays, how) if make and sources else Layer(operator, sources)
        return [(output, layer)]

    def group_norm(self, name: str, node: Any, before: Mapping[str, Layer]) -> Layer | None:
        """Return the group norm that ends in this addition, as PyTorch and we write it, or None.

        Group norm is instance norm of a tensor that has a channel for each group. Channels are then scaled
        and shifted.
        """
        shift = next((self.arrays[each] for each in node.input if each in self.arrays), None)
        chain, at = [], next((each for each in node.input if each in before), None)
        for kind in ("Mul", "Reshape", "norm", "Reshape"):
            if at is None or before[at].kind != kind or not before[at].sources:
                return None
            chain.append(before[at])
            at = before[at].sources[0]
        scale = chain[0].arrays.get("factor")
        if shift is None or scale is None or at is None:
            return None
        groups, shift, scale = chain[2].arrays, shift.ravel(), scale.ravel()
        each = scale.size // max(groups["scale"].size, 1)
        demand(
            name, shift.size == scale.size == each * groups["scale"].size, f"{scale.size} channels", "others"
        )
        state = {"scale": scale * groups["scale"].repeat(each)}
        state["shift"] = shift + scale * groups["shift"].repeat(each)
        how = {"type": type_of_groups(name, groups["scale"].size, scale.size)}
        return Layer("norm", (at,), state, how | {"epsilon": chain[2].how["epsilon"]})


def _mul(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    factor = next((array for array in arrays if array is not None), None)
    return Layer("Mul", sources, {} if factor is None else {"factor": factor})


def _conv(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return _convolution(name, sources, arrays, how, 1)


def _convtranspose(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return _convolution(name, sources, arrays, how, 2)


def _convolution(name: str, sources: Any, arrays: list[Any], how: Any, step: int) -> Layer:
    weights = arrays[1] if len(arrays) > 1 else None
    demand(name, weights is not None, "no weights in the file", "weights")
    assert weights is not None
    half = weights.shape[-1] // 2 if step == 1 else 0
    pads = how.get("pads", [0] if how.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") else [half])
    strides = how.get("strides", [1])
    demand(name, all_equal(pads, half), f"pads {pads}", str(half))
    demand(name, all_equal(strides, step), f"strides {strides}", str(step))
    plain = all_equal(how.get("dilations"), 1) and how.get("group", 1) == 1
    demand(name, plain and all_equal(how.get("output_padding"), 0), "dilation, groups or padding", "none")
    bias = arrays[2] if len(arrays) > 2 else None
    return convolution(name, sources[0], weights, bias, step == 2)


def _batchnormalization(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    demand(name, not how.get("training_mode"), "training mode", "a model for predictions")
    state = _norm(name, arrays, ("scale", "shift", "running_mean", "running_variance"))
    return Layer("norm", sources, state, {"type": "batch", "epsilon": _epsilon(how)})


def _instancenormalization(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    state = _norm(name, arrays, ("scale", "shift"))
    kind = type_of_groups(name, -1, len(state["scale"]))
    return Layer("norm", sources, state, {"type": kind, "epsilon": _epsilon(how)})


def _groupnormalization(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    state = _norm(name, arrays, ("scale", "shift"))
    kind = type_of_groups(name, how["num_groups"], len(state["scale"]))
    return Layer("norm", sources, state, {"type": kind, "epsilon": _epsilon(how)})


def _norm(name: str, arrays: list[Any], parts: Any) -> dict[str, Array]:
    right = len(arrays) == 1 + len(parts) and all(array is not None for array in arrays[1:])
    demand(name, right, "arrays that are not in the file", ", ".join(parts))
    return dict(zip(parts, arrays[1:], strict=True))


def _maxpool(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    fits = all_equal(how["kernel_shape"], 2) and all_equal(how.get("strides", [1]), 2)
    plain = all_equal(how.get("pads"), 0) and not how.get("ceil_mode") and all_equal(how.get("dilations"), 1)
    plain = plain and how.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    demand(name, fits and plain, "another pooling", "windows of 2, strides of 2, no pads")
    return Layer("pool", sources)


def _resize(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    smooth = how.get("mode", b"nearest") == b"linear"
    scales = arrays[2] if len(arrays) > 2 else None
    if scales is not None:
        twice = scales.size > 2 and all_equal(scales[:2].tolist(), 1) and all_equal(scales[2:].tolist(), 2)
        demand(name, twice, f"scales {scales.tolist()}", "2")
    where = how.get("coordinate_transformation_mode", b"half_pixel")
    usual = {b"half_pixel", b"pytorch_half_pixel"} if smooth else {b"asymmetric"}
    floor = smooth or how.get("nearest_mode", b"round_prefer_floor") == b"floor"
    known = scales is not None and how.get("mode", b"nearest") in (b"nearest", b"linear")
    demand(name, known and where in usual and floor, f"{where!r}", f"{usual}, scales in the file")
    return Layer("upsample", sources, how={"type": "trilinear" if smooth else True})


def _concat(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return Layer("concat" if how.get("axis") == 1 else "Concat", sources)


def _relu(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return Layer("activation", sources, how={"type": "relu"})


def _leakyrelu(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    alpha = how.get("alpha", 0.01)
    demand(name, abs(alpha - 0.01) < 1e-6, f"a slope of {alpha:g}", "0.01")
    return Layer("activation", sources, how={"type": "leaky_relu"})


def _elu(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    demand(name, how.get("alpha", 1.0) == 1, f"alpha {how.get('alpha')}", "1")
    return Layer("activation", sources, how={"type": "elu"})


def _prelu(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    slopes = arrays[1] if len(arrays) > 1 else None
    demand(
        name,
        slopes is not None and slopes.ndim > 0 and slopes.size == slopes.shape[0],
        "slopes of another shape",
        "one a channel",
    )
    assert slopes is not None
    return Layer("activation", sources, {"slope": slopes.ravel()}, {"type": "prelu"})


def _softmax(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    demand(name, how.get("axis", -1) == 1, f"axis {how.get('axis', -1)}", "1, that of the channels")
    return Layer("final", sources, how={"type": "softmax"})


def _sigmoid(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return Layer("final", sources, how={"type": "sigmoid"})


def _pass(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    return Layer("pass", sources[:1])


def _pad(name: str, sources: Any, arrays: list[Any], how: Any) -> Layer:
    """Pads that are computed are taken for those to a skip's size; `_compare` finds others."""
    demand(name, how.get("mode", b"constant") == b"constant", f"mode {how.get('mode')}", "zeros")
    pads = arrays[1] if len(arrays) > 1 else None
    if pads is not None:
        few = pads.size > 4 and not pads[: pads.size // 2].any() and set(pads.tolist()) <= {0, 1}
        demand(name, few, f"pads {pads.tolist()}", "up to one at the ends")
    return Layer("pass", sources[:1])


def _epsilon(how: Any) -> float:
    """Return an epsilon as it was written: ONNX holds it in float32."""
    return float(f"{how.get('epsilon', 1e-5):.7g}")


# What reads a node: a function of its output's name, the layers and arrays that it reads, and its attributes.
_READERS = {
    "Conv": _conv,
    "ConvTranspose": _convtranspose,
    "BatchNormalization": _batchnormalization,
    "InstanceNormalization": _instancenormalization,
    "GroupNormalization": _groupnormalization,
    "MaxPool": _maxpool,
    "Resize": _resize,
    "Concat": _concat,
    "Relu": _relu,
    "LeakyRelu": _leakyrelu,
    "Elu": _elu,
    "PRelu": _prelu,
    "Softmax": _softmax,
    "Sigmoid": _sigmoid,
    "Identity": _pass,
    "Dropout": _pass,
    "Pad": _pad,
    "Mul": _mul,
}
