"""onnxruntime, inference only, on a model written as ONNX.

The session folds batch norm into the convolution and fuses ReLU; its CPU kernels for volumes are
im2col and GEMM. Arrays in, array out: NCDHW.

All optimizations of the graph, operators one after the other: what onnxruntime does of itself. Nothing else
that was tried is faster. One thread at 48^3, ms of the processor's time: 220; with extended optimizations
only 218; operators side by side 224; threads that do not spin 224; without the arena 241.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tinyunet.benchmarks import problem as common
from tinyunet.benchmarks.problem import Problem

VERSION = str(onnxruntime.__version__)

_threads = 1


def settings(case: str) -> str:
    """Return what was chosen for speed."""
    return "ORT_ENABLE_ALL, ORT_SEQUENTIAL"


def use_threads(threads: int) -> None:
    """Keep the number of threads for when the session is made."""
    global _threads
    _threads = threads


class Graph:
    """The nodes of the model in the order in which they run; weights have this project's names."""

    def __init__(self, problem: Problem) -> None:
        self.nodes: list[Any] = []
        MB, D, H, W, C = problem.image.shape
        value = helper.make_tensor_value_info
        src = value("image", TensorProto.FLOAT, (MB, C, D, H, W))
        probabilities = self.add("Softmax", [self.logits("image")], axis=1)
        dst = value(probabilities, TensorProto.FLOAT, (MB, common.CLASSES, D, H, W))
        weights = [numpy_helper.from_array(a, name) for name, a in problem.weights.items()]
        graph = helper.make_graph(self.nodes, "unet", [src], [dst], weights)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        self.model.ir_version = 8  # of the same age as the operators
        onnx.checker.check_model(self.model)

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def block(self, x: str, name: str) -> str:
        """Twice [convolution, batch norm, ReLU]."""
        for i in (0, 1):
            conv, norm = f"{name}.conv{i}", f"{name}.norm{i}"
            x = self.add("Conv", [x, f"{conv}.weights", f"{conv}.bias"], pads=[1] * 6)
            parts = ("scale", "shift", "running_mean", "running_variance")
            x = self.add(
                "BatchNormalization", [x, *(f"{norm}.{part}" for part in parts)], epsilon=common.NORM_EPSILON
            )
            x = self.add("Relu", [x])
        return x

    def logits(self, x: str) -> str:
        """Add everything up to the softmax."""
        two, skips = [2] * 3, []
        for level in range(common.DEPTH):
            x = self.block(x, f"encoder.{level}")
            if level < common.DEPTH - 1:
                skips.append(x)
                x = self.add("MaxPool", [x], kernel_shape=two, strides=two)
        for i in range(common.DEPTH - 1):
            x = self.add("ConvTranspose", [x, f"up.{i}.weights", f"up.{i}.bias"], strides=two)
            x = self.block(self.add("Concat", [x, skips.pop()], axis=1), f"decoder.{i}")
        return self.add("Conv", [x, "head.weights", "head.bias"])


def infer(problem: Problem) -> Callable[[], Any]:
    """Return a prediction."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    model = Graph(problem).model.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    image = _ncdhw(problem.image)
    return lambda: session.run(None, {"image": image})[0]


def to_array(probabilities: Any) -> NDArray[np.float32]:
    """Return a prediction as this project has it: NDHWC."""
    return np.ascontiguousarray(probabilities.transpose(0, 2, 3, 4, 1))


def _ncdhw(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(array.transpose(0, 4, 1, 2, 3))
