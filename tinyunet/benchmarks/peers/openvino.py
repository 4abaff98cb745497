"""OpenVINO, inference only, in float32 or bfloat16, on a model written as ONNX.

The model is compiled for the CPU: batch norm is folded into the convolution, bias and ReLU are fused,
layouts are blocked inside. Batch norm is given as ONNX has it, not folded by us. Arrays in, array out: NCDHW.

One stream and the hint for latency, as Intel's guide advises for one request at a time. With or without
pinned threads, hyper-threading, or the hints for throughput and accuracy it took the same time (83 to 88 ms
of the processor's time for 48^3 on one thread).
"""

from collections.abc import Callable
from typing import Any

import openvino

from tinyunet.benchmarks.peers import channels_last as to_array
from tinyunet.benchmarks.peers import channels_second
from tinyunet.benchmarks.peers.unet_onnx import model_of
from tinyunet.benchmarks.problem import Problem

__all__ = ["VERSION", "infer", "settings", "to_array", "use_threads"]

VERSION = str(openvino.__version__).split("-")[0]
SETTINGS: dict[str, Any] = {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}


def settings(case: str, precision: str = "f32") -> str:
    """Return the settings chosen for speed."""
    return f"LATENCY, 1 stream, {precision}"


def use_threads(threads: int) -> None:
    """Set the threads inside an operator."""
    SETTINGS["INFERENCE_NUM_THREADS"] = threads


def infer(problem: Problem, precision: str = "f32") -> Callable[[], Any]:
    """Return a prediction; ``precision`` is ``f32`` or ``bf16``."""
    core, how = openvino.Core(), SETTINGS | {"INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(core.read_model(model_of(problem)), "CPU", how).create_infer_request()
    image = channels_second(problem.image)
    return lambda: request.infer([image], share_inputs=True, share_outputs=True)[0]
