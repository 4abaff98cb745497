"""OpenVINO, inference only, in float32 or bfloat16.

The graph is built operator by operator, and compiled for the CPU: batch norm is folded into the
convolution, bias and ReLU are fused, layouts are blocked inside. Batch norm is given as OpenVINO has
it, not folded by us. Arrays in, array out: NCDHW.

One stream and the hint for latency, as Intel's guide advises for one request at a time. With or without
pinned threads, hyper-threading, or the hints for throughput and accuracy it took the same time (83 to 88 ms
of the processor's time for 48^3 on one thread).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as op

from tinyunet.benchmarks import problem as common
from tinyunet.benchmarks.problem import Problem

VERSION = str(openvino.__version__).split("-")[0]

_threads = 1


def settings(case: str, precision: str = "f32") -> str:
    """Return what was chosen for speed."""
    return f"LATENCY, 1 stream, {precision}"


def use_threads(threads: int) -> None:
    """Keep the number of threads for when the model is compiled."""
    global _threads
    _threads = threads


def convolution(x: Any, problem: Problem, name: str, kernel: int) -> Any:
    """Convolution with bias; weights OIdhw, as ours."""
    pad = [kernel // 2] * 3
    weights = problem.weights[f"{name}.weights"]
    return add_bias(op.convolution(x, weights, [1] * 3, pad, pad, [1] * 3), problem, name)


def transposed_convolution(x: Any, problem: Problem, name: str) -> Any:
    """Transposed convolution with bias; weights (IC, OC, KD, KH, KW), as ours."""
    weights = op.constant(problem.weights[f"{name}.weights"])
    zero = [0] * 3
    raw = op.convolution_backprop_data(x, weights, [2] * 3, pads_begin=zero, pads_end=zero, dilations=[1] * 3)
    return add_bias(raw, problem, name)


def add_bias(x: Any, problem: Problem, name: str) -> Any:
    """A bias is an addition of its own here, fused later."""
    return op.add(x, op.constant(problem.weights[f"{name}.bias"].reshape(1, -1, 1, 1, 1)))


def block(x: Any, problem: Problem, name: str) -> Any:
    """Twice [convolution, batch norm, ReLU]."""
    for i in (0, 1):
        x = convolution(x, problem, f"{name}.conv{i}", 3)
        parts = ("scale", "shift", "running_mean", "running_variance")
        arrays = [problem.weights[f"{name}.norm{i}.{part}"] for part in parts]
        x = op.relu(op.batch_norm_inference(x, *arrays, common.NORM_EPSILON))
    return x


def unet(problem: Problem) -> openvino.Model:
    """Build the model."""
    MB, D, H, W, C = problem.image.shape
    inputs = x = op.parameter([MB, C, D, H, W], np.float32, "image")
    skips = []
    for level in range(common.DEPTH):
        x = block(x, problem, f"encoder.{level}")
        if level < common.DEPTH - 1:
            skips.append(x)
            two, zero = [2] * 3, [0] * 3
            x = op.max_pool(x, two, [1] * 3, zero, zero, two).output(0)
    for i in range(common.DEPTH - 1):
        up = transposed_convolution(x, problem, f"up.{i}")
        x = block(op.concat([up, skips.pop()], 1), problem, f"decoder.{i}")
    logits = convolution(x, problem, "head", 1)
    return openvino.Model([op.softmax(logits, 1)], [inputs], "unet")


def infer(problem: Problem, precision: str = "f32") -> Callable[[], Any]:
    """Return a prediction; ``precision`` is ``f32`` or ``bf16``."""
    settings = {
        "INFERENCE_NUM_THREADS": _threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(unet(problem), "CPU", settings).create_infer_request()
    image = np.ascontiguousarray(problem.image.transpose(0, 4, 1, 2, 3))

    def predict() -> Any:
        return request.infer([image], share_inputs=True, share_outputs=True)[0]

    return predict


def to_array(probabilities: Any) -> NDArray[np.float32]:
    """Return a prediction as this project has it: NDHWC."""
    return np.ascontiguousarray(np.asarray(probabilities).transpose(0, 2, 3, 4, 1))
