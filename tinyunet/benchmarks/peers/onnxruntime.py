"""onnxruntime, inference only, on a model written as ONNX.

The session folds batch norm into the convolution and fuses ReLU; its CPU kernels for volumes are
im2col and GEMM. Arrays in, array out: NCDHW.

All optimizations of the graph, operators one after the other: the defaults of onnxruntime. Nothing else
that was tried is faster. One thread at 48^3, ms of the processor's time: 220; with extended optimizations
only 218; operators side by side 224; threads that do not spin 224; without the arena 241.
"""

from collections.abc import Callable
from typing import Any

import onnxruntime

from tinyunet.benchmarks.peers import channels_last as to_array
from tinyunet.benchmarks.peers import channels_second
from tinyunet.benchmarks.peers.unet_onnx import model_of
from tinyunet.benchmarks.problem import Problem

__all__ = ["VERSION", "infer", "settings", "to_array", "use_threads"]

VERSION = str(onnxruntime.__version__)
OPTIONS = onnxruntime.SessionOptions()
OPTIONS.inter_op_num_threads = 1
OPTIONS.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
OPTIONS.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL


def settings(case: str) -> str:
    """Return the settings chosen for speed."""
    return "ORT_ENABLE_ALL, ORT_SEQUENTIAL"


def use_threads(threads: int) -> None:
    """Set the threads inside an operator."""
    OPTIONS.intra_op_num_threads = threads


def infer(problem: Problem) -> Callable[[], Any]:
    """Return a prediction."""
    session = onnxruntime.InferenceSession(model_of(problem), OPTIONS, providers=["CPUExecutionProvider"])
    image = channels_second(problem.image)
    return lambda: session.run(None, {"image": image})[0]
