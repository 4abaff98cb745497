"""For each convolution and direction: direct, or Winograd F(2,2,2), F(2,4,4), F(4,4,4).

    before    conv(src), and each of its gradients, direct
    after     conv(src, tile) where tiles take less time: the larger, the fewer multiplications

F(m) makes m outputs along an axis from m + 2 inputs, with m + 2 multiplications instead of 3 m; over three
axes that saves 3.4, 6 and 8 times, and costs transforms of source and result. A model counts both::

    direct     taps IC OC a voxel
    F(tile)    points IC OC a tile, and TRANSFORM operations a point and channel, in and out

Tiles that overhang the volume are counted whole. In training so is the packing of the weights, or the
unpacking of their gradients: they grow by points / taps, and change at each step. Weights that are not packed
are transformed where they are used, also in inference.

The algorithms that the model finds within a factor of the best are timed (``measure``), unless the
convolution is too small to matter. A deterministic choice is the best of the model: times differ from run to
run, and each algorithm rounds in another way. The accuracy bounds the choice: "strict" takes
direct and F(2,2,2), whose error is that of direct convolution in float32; "fast" takes all: 5e-5 of the
largest output at most.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from kernels.base.arguments import Triple
from kernels.base.simd import LANES
from kernels.conv3d.operator import TILES
from tinyunet.compiler.ir import Graph, Node, Options
from tinyunet.compiler.operators.convolutions import plan_of

#: Winograd F(tile); None is direct.
Tile = Triple | None
Direction = Literal["forwards", "backwards"]


def _by_accuracy(tiles: tuple[Triple, ...]) -> dict[str, tuple[Triple, ...]]:
    """Those of 2 outputs an axis, which lose no more than direct convolution, and all."""
    return {"strict": tuple(tile for tile in tiles if max(tile) == 2), "fast": tiles}


_OPS = ("convolution", "convolution_backward_data", "convolution_backward_weights")
# How far from the best of the model an algorithm may be to be timed.
_FACTOR = 1.25
_TILES = _by_accuracy(TILES)
# Of a first layer of few channels, which is not transformed along w.
_TILES_OF_FEW = _by_accuracy(((2, 2, 1), (4, 4, 1), (1, 2, 1), (1, 4, 1)))
# Operations of both transforms, a point and channel: they run on memory, not in register tiles.
_TRANSFORM = 20
# Multiply-adds in the time that it takes to pack one weight, or to transform it where it is used.
_PACK, _USE = 30, 15
# Multiply-adds of a direct convolution below which nothing is gained: 0.1 ms.
_SMALL = 1e7
_compiling: Direction | None = None


@contextmanager
def only_compiling(direction: Direction) -> Iterator[None]:
    """Inside, time nothing: run each candidate once, so that its kernel is compiled, and take the first.

    ``direction`` is the order of the convolutions.
    """
    global _compiling
    _compiling = direction
    try:
        yield
    finally:
        _compiling = None


def choose_algorithm(graph: Graph, options: Options) -> Graph:
    """Return the graph with the setting "tile" at the convolutions that Winograd runs faster."""
    convolutions = [node for node in graph.nodes if node.op in _OPS and node.runs_fused]
    in_order = convolutions[::-1] if _compiling == "backwards" else convolutions
    chosen = [(node, _choose(node, graph, options)) for node in in_order]
    return graph.rewrite({node.name: [node.with_attributes({"tile": tile})] for node, tile in chosen})


def _choose(node: Node, graph: Graph, options: Options) -> Tile:
    found = costs(node, graph, options.accuracy)
    best = min(found, key=found.__getitem__)
    candidates = [tile for tile, cost in found.items() if cost <= _FACTOR * found[best]]
    if options.deterministic or len(candidates) == 1:
        return best
    from tinyunet.compiler import measure  # most steps find all that it has measured in a file

    if _compiling:
        measure.run_once(node, graph, candidates)
        return candidates[0]
    return measure.fastest(node, graph, candidates)


def costs(node: Node, graph: Graph, accuracy: str) -> dict[Tile, float]:
    """Return the work of each algorithm that a convolution may take, in multiply-adds.

    Parameters
    ----------
    node : Node
        A convolution on blocked tensors, in any direction.
    graph : Graph
    accuracy : {"strict", "fast"}
    """
    plan = plan_of(node.with_attributes({"tile": None}), graph)
    few, taps = plan.width < LANES, math.prod(plan.kernel)
    inputs = plan.width if few else plan.blocks_in * LANES
    outputs = plan.blocks_out * LANES
    direct = taps * inputs * outputs * math.prod(plan.size)
    if direct < _SMALL:
        return {None: direct}
    from kernels.conv3d import first_layer, winograd_stages  # not loaded if all convolutions are small

    tiles = [
        tile
        for tile in (_TILES_OF_FEW if few else _TILES)[accuracy]
        if (
            first_layer.supports(plan.size, plan.kernel, tile, plan.width)
            if few
            else plan.kernel == winograd_stages.kernel_of(tile)
        )
    ]
    if not tiles:
        return {None: direct}
    packing = _PACK if graph.gradients else 0
    found: dict[Tile, float] = {None: direct + packing * taps * inputs * outputs}
    for tile in tiles:
        count = plan.size[0] * math.prod(-(-n // m) for n, m in zip(plan.size[1:], tile, strict=True))
        points = winograd_stages.points(tile)
        products = points * (plan.kernel[2] if few else 1) * inputs * outputs
        weight = packing if plan_of(node.with_attributes({"tile": tile}), graph).packs else _USE
        found[tile] = count * (products + points * _TRANSFORM * (inputs + outputs)) + weight * products
    return found
