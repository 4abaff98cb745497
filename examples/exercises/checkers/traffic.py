"""Bytes of a block: predicted, then measured on compiled graphs."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, call, function_of, judge
from kernels.workbench.verdict import Failure


def check(module: ModuleType) -> None:
    """Check the prediction, then the measurement."""
    cases = []
    for voxels, IC, OC in ((4096, 16, 16), (4096, 16, 32), (1000, 4, 5), (27, 17, 3)):
        ic, oc = -(-IC // 16) * 16, -(-OC // 16) * 16
        src, dst, weights, vectors = 4 * voxels * ic, 4 * voxels * oc, 108 * IC * OC, 8 * oc
        answer = [src + weights + 5 * dst + vectors, src + weights + dst + vectors]
        plain = [4 * voxels * (IC + 5 * OC) + weights + 8 * OC, 4 * voxels * (IC + OC) + weights + 8 * OC]
        mistakes = {
            "channels are not rounded up to 16": plain,
            "a result that is written must be read again by the next pass": [answer[0] - dst, answer[1]],
            "numbers of float32 take 4 bytes": [number / 4 for number in answer],
            "weights are not counted": [number - weights for number in answer],
            "scale and shift are not counted": [number - vectors for number in answer],
            "the three passes come first, then the fused one": answer[::-1],
        }
        label = f"{IC} and {OC} channels" + (", multiples of 16" if IC % 16 == OC % 16 == 0 else "")
        cases.append(Case(label, (voxels, IC, OC), answer, 0.0, mistakes))
    judge(function_of(module, "bytes_moved"), cases)
    measure = function_of(module, "measure")
    for label, graph in _graphs():
        _compare(label, graph, call(measure, Case(label, (graph,), None, 0.0)))


def _graphs() -> Iterator[tuple[str, Any]]:
    from tinyunet import Adam, Module, UNet, functional
    from tinyunet.compiler.compiled import Inference, TrainingStep
    from tinyunet.losses import dice_cross_entropy

    class Reshaped(Module):
        def forward(self, images: Any) -> Any:
            x = functional.relu(images)
            return functional.sigmoid(x.reshape((1, -1, 5)))

    drawn = np.random.default_rng().integers(2, 5, 3).tolist()
    block = Inference(_blocks(1, 5), _options()).stages((1, *drawn, 5))
    yield "a block, as traced", block[0].graph
    yield "a block, as it runs", block[-1].graph
    yield "a net with a view", Inference(Reshaped(), _options()).stages((1, *drawn, 5))[0].graph
    model = UNet(filters=4, depth=2)
    step = TrainingStep(model, dice_cross_entropy, Adam(model.parameters()), _options())
    yield "a training step of a U-Net", step.stages((1, 6, 6, 6, 4))[-1].graph


def _options() -> Any:
    from tinyunet.compiler.ir import Options
    from tinyunet.compiler.passes import NAMES

    return Options(NAMES, "fast", deterministic=True)


def _blocks(count: int, channels: int = 16) -> Any:
    from tinyunet.nn import BatchNorm, Conv3d, ReLU, Sequential

    parts = [(BatchNorm(channels), ReLU(), Conv3d(channels, channels)) for _ in range(count)]
    return Sequential(Conv3d(channels, channels), *(layer for part in parts for layer in part))


def _compare(label: str, graph: Any, found: Any) -> None:
    from tinyunet.compiler.show import nbytes

    if not isinstance(found, dict):
        given = "nothing" if found is None else type(found).__name__
        raise Failure(f"{label}: measure returns {given}; expected a dict of bytes by the name of the node")
    for node in graph.nodes:
        right = nbytes(node, graph)
        if node.name not in found:
            raise Failure(f"{label}: measure has no entry for the node {node.name!r}")
        if found[node.name] != right:
            words = _why(node, graph, found[node.name])
            raise Failure(f"{label}: {node.name!r} moves {found[node.name]} bytes; expected {right}{words}")
    if more := [name for name in found if name not in {node.name for node in graph.nodes}]:
        raise Failure(f"{label}: measure has an entry {more[0]!r}; expected the names of nodes alone")


def _why(node: Any, graph: Any, found: Any) -> str:
    if node.views:
        return ". Likely: a view moves nothing: its input and its output are the same memory"
    values = graph.values
    read = [values[v] for role, v in node.inputs.items() if role not in node.views.values()]
    written = [values[v] for role, v in node.outputs.items() if role not in node.views]
    mistakes = {
        "what a node writes is not counted": sum(v.nbytes for v in read),
        "what a node reads is not counted": sum(v.nbytes for v in written),
        "padding lanes lie in memory, too: take storage_shape": sum(
            int(np.prod(v.shape)) * v.dtype.itemsize for v in read + written
        ),
        "these are numbers, not bytes: not all take 4 bytes": sum(
            int(np.prod(v.storage_shape)) for v in read + written
        ),
        "not every number takes 4 bytes": sum(4 * int(np.prod(v.storage_shape)) for v in read + written),
        "parameters are read from memory, too": sum(
            v.nbytes for v in read + written if v.kind != "parameter"
        ),
    }
    return next((f". Likely: {words}" for words, value in mistakes.items() if found == value), "")


def compete(module: ModuleType) -> Race:
    """Compare the prediction with what one more block costs in a compiled net, measured by the student."""
    from tinyunet.compiler.compiled import Inference

    measured = []
    for at in (0, -1):
        bytes_of = []
        for count in (2, 3):
            graph = Inference(_blocks(count), _options()).stages((1, 32, 32, 32, 16))[at].graph
            found = module.measure(graph)
            bytes_of.append(sum(found[node.name] for node in graph.nodes if node.phase != "prepare"))
        measured.append(bytes_of[1] - bytes_of[0])
    apart, fused = module.bytes_moved(32**3, 16, 16)
    predicted, saved = apart / fused, measured[0] / measured[1]
    what = f"you predict {predicted:.2f} times fewer bytes, and measure {saved:.2f}; agreement"
    return Race(what, min(predicted / saved, saved / predicted), 0.9)
