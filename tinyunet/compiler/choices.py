"""What each algorithm of a convolution costs, by count: direct, or Winograd F(2,2,2), F(2,4,4), F(4,4,4).

F(m) makes m outputs along an axis from m + 2 inputs, with m + 2 multiplications instead of 3 m; over
three axes that saves 3.4, 6 and 8 times, and costs transforms of source and result. A model counts both::

    direct     taps IC OC a voxel
    F(tile)    points IC OC a tile, and TRANSFORM operations a point and channel, in and out

Tiles that overhang the volume are counted whole. In training so is the packing of the weights, or the
unpacking of their gradients: they grow by points / taps, and change at each step. Weights that are not packed
are transformed where they are used, also in inference.

What may be lost bounds the choice: "strict" takes direct and F(2,2,2), whose error is that of direct
convolution in float32; "fast" takes all: 5e-5 of the largest output at most.
"""

import math

from kernels.base.arguments import Triple
from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.conv3d import winograd
from kernels.conv3d.winograd import cutting, rows
from tinyunet.compiler.convolutions import plan_of
from tinyunet.compiler.ir import Graph, Node

#: Winograd F(tile); None is direct.
Tile = Triple | None


def _by_accuracy(tiles: tuple[Triple, ...]) -> dict[str, tuple[Triple, ...]]:
    """Those of 2 outputs an axis, which lose no more than direct convolution, and all."""
    return {"strict": tuple(tile for tile in tiles if max(tile) == 2), "fast": tiles}


_TILES = _by_accuracy(winograd.TILES)
# Of a first layer of few channels, which is not transformed along w.
_TILES_OF_FEW = _by_accuracy(((2, 2, 1), (4, 4, 1), (1, 2, 1), (1, 4, 1)))
# Operations of both transforms, a point and channel: they run on memory, not in register tiles.
_TRANSFORM = 20
# Multiply-adds in the time that one packed weight takes to be made and written.
_PACK = 30
# The same of a weight that is transformed where it is used.
_USE = 15
# Multiply-adds of a direct convolution below which nothing is gained: 0.1 ms.
_SMALL = 1e7


def costs(node: Node, graph: Graph, accuracy: str) -> dict[Tile, float]:
    """Return multiply-adds, or what takes as long as one, of each algorithm that a convolution may take.

    Parameters
    ----------
    node : Node
        A convolution on blocked tensors, in any direction.
    graph : Graph
    accuracy : {"strict", "fast"}
    """
    plan = plan_of(node.with_attributes(tile=None), graph)
    few, voxels = plan.width < LANES, math.prod(plan.size)
    fitting = [
        tile
        for tile in (_TILES_OF_FEW if few else _TILES)[accuracy]
        if (
            rows.supports(plan.size, plan.kernel, tile, plan.width)
            if few
            else plan.kernel == cutting.kernel_of(tile)
        )
    ]
    inputs = plan.width if few else plan.blocks_in * LANES
    outputs = sum(map(blocks, plan.channels_out)) * LANES
    direct = math.prod(plan.kernel) * inputs * outputs * voxels
    if not fitting or direct < _SMALL:
        return {None: direct}
    packing = _PACK if graph.gradients else 0
    found: dict[Tile, float] = {None: direct + packing * math.prod(plan.kernel) * inputs * outputs}
    for tile in fitting:
        count = math.prod(-(-n // m) for n, m in zip(plan.size[1:], tile, strict=True))
        points = cutting.points(tile)
        taps = plan.kernel[2] if few else 1  # that are left to each product
        each = points * (taps * inputs * outputs + _TRANSFORM * (inputs + outputs))
        weight = packing if plan_of(node.with_attributes(tile=tile), graph).packs else _USE
        found[tile] = plan.size[0] * count * each + weight * points * taps * inputs * outputs
    return found
