"""Which algorithm a convolution runs fastest with on this machine: timed once, remembered on disk.

Another measurement may find another algorithm, which rounds otherwise. Whoever needs the same bits compiles
with ``deterministic``, and nothing here is used.

The file is in ``$TINYUNET_CACHE``, or in the user's cache folder, and is named by a digest of the kernels'
source: other versions of the project keep what they have measured. What can neither be read nor written is
measured again in each process.
"""

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

import kernels
from kernels.base import machine
from kernels.base.arguments import Triple
from kernels.base.buffers import empty
from tinyunet.common.files import read_json, write_json
from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.operators.convolutions import plan_of, weights_shape
from tinyunet.compiler.record import Binder, Call, lanes

#: Winograd F(tile); None is direct.
Tile = Triple | None
Direction = Literal["forwards", "backwards"]
_RUNS = 3
_compiling: Direction | None = None
# What a run that goes on has had.
_of_run: dict[str, list[int] | None] = {}


@contextmanager
def only_compiling(direction: Direction) -> Iterator[None]:
    """Inside, `fastest` runs each candidate once, so that it is compiled, and takes the first.

    ``direction`` is the order in which it should be asked: see `in_order`.
    """
    global _compiling
    _compiling = direction
    try:
        yield
    finally:
        _compiling = None


def in_order(nodes: Sequence[Node]) -> Sequence[Node]:
    """Return the nodes as `fastest` is to be asked for them."""
    return nodes[::-1] if _compiling == "backwards" else nodes


def fastest(node: Node, graph: Graph, candidates: Sequence[Tile]) -> Tile:
    """Return the fastest of some algorithms for a node, by the clock.

    Parameters
    ----------
    node : Node
        A convolution on blocked tensors, in any direction.
    graph : Graph
    candidates : sequence of tiles
        Winograd F(tile); None is direct.
    """
    if _compiling:
        for tile in candidates:
            _bound(node.with_attributes({"tile": tile}), graph)()
        return candidates[0]
    memory, key = remembered(), _key(node, graph, candidates)
    names = [None if tile is None else list(tile) for tile in candidates]  # as in the file
    for tiles in (_of_run, memory):
        if tiles.get(key, "unknown") in names:
            return candidates[names.index(tiles[key])]
    memory.update(_read() | memory)  # another process may have measured it meanwhile
    # What is no candidate (a file may come from anywhere) is measured, too.
    if memory.get(key, "unknown") not in names:
        times = [_seconds(node.with_attributes({"tile": tile}), graph) for tile in candidates]
        memory[key] = names[int(np.argmin(times))]
        _save(memory | _read() | {key: memory[key]})
    return candidates[names.index(memory[key])]


def use(algorithms: Mapping[str, list[int] | None]) -> None:
    """Take what a run that goes on has had, where it is a candidate, before what is known here.

    It may be a stranger's: it is not saved with what was measured on this machine.
    """
    _of_run.clear()
    _of_run.update(algorithms)


def known() -> dict[str, list[int] | None]:
    """Return what is known so far, and what the run that goes on has had."""
    return remembered() | _of_run


def _key(node: Node, graph: Graph, candidates: Sequence[Tile]) -> str:
    plan = plan_of(node.with_attributes({"tile": None}), graph)
    roles = sorted(r for r in node.values if r.endswith((".x", ".scale", "moments")))
    phase = "training" if graph.gradients else "inference"
    machines = machine.threads(), phase, machine.instruction_set(), machine.processor_name()
    return " ".join(map(str, (node.op, *plan[:4], plan.width, *roles, *machines, *candidates)))


def _seconds(node: Node, graph: Graph) -> float:
    """Time of the fastest of a few runs."""
    return machine.best_seconds(_bound(node, graph), _RUNS)


def _bound(node: Node, graph: Graph) -> Call:
    """Return what runs a node, on arrays of the right shapes; and packs its weights, if a step does."""
    kernel, arrays = KERNELS[node.op], dict[str, Any]()
    for role, name in node.values.items():
        shape = graph.values[name].storage_shape
        if role in ("moments", "sums", "sums_b"):
            shape = kernel.sums(node, role, graph)
        elif role == "bias":
            shape = lanes(shape[0])
        elif role == "weights" and kernel.packed:
            shape = (kernel.packed(node, graph) or math.prod(shape),)
        arrays[name] = empty(shape, graph.values[name].dtype)
        arrays[name].fill(0.5)
    run = kernel.bind(Binder(node, graph, arrays))
    if not (graph.gradients and kernel.packed and kernel.packed(node, graph)):
        return run
    weights, packed = {"weights": "as they are"}, {"packed": node.inputs["weights"]}
    arrays["as they are"] = np.ones(weights_shape(node, graph), np.float32)
    packing = Node("pack_weights", "pack_weights", weights, packed, {"for": node})
    pack = KERNELS["pack_weights"].bind(Binder(packing, graph, arrays))

    def both() -> None:  # weights change at each step
        pack()
        run()

    return both


def _path() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("TINYUNET_CACHE") or Path(caches) / "tinyunet"
    return Path(folder) / f"algorithms-{_version()}.json"


@functools.cache
def remembered() -> dict[str, list[int] | None]:
    """Return what is known so far, by the key of a convolution; may be added to."""
    return _read()


@functools.cache
def _version() -> str:
    """Digest of the kernels' source."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read() -> dict[str, list[int] | None]:
    try:
        found = read_json(_path())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if _is_tile(v)} if isinstance(found, dict) else {}


def _is_tile(value: Any) -> bool:
    """Whether a value from a file can be one of an algorithm."""
    return value is None or (
        isinstance(value, list) and len(value) == 3 and all(type(size) is int for size in value)
    )


def _save(memory: dict[str, list[int] | None]) -> None:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        write_json(_path(), memory)
    except OSError:
        pass
