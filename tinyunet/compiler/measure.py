"""Which algorithm a convolution runs fastest with on this machine: timed once, remembered on disk.

Another measurement may find another algorithm, which rounds otherwise. Whoever needs the same bits compiles
with ``deterministic``, and nothing here is used.

The file is in ``$TINYUNET_CACHE``, or in the user's cache folder, and is named by a digest of the kernels'
source: other versions of the project keep what they have measured. What can neither be read nor written is
measured again in each process.
"""

import functools
import hashlib
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
from tinyunet.compiler.operators.convolution import plan_of, weights_shape
from tinyunet.compiler.operators.record import Binder, Call, lanes

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
    for tiles in (_of_run, memory):
        if key in tiles and _tile(tiles[key]) in candidates:
            return _tile(tiles[key])
    memory.update(_read() | memory)  # another process may have measured it meanwhile
    # What is no candidate (a file may come from anywhere) is measured, too.
    if key not in memory or _tile(memory[key]) not in candidates:
        times = [_seconds(node.with_attributes({"tile": tile}), graph) for tile in candidates]
        best = candidates[int(np.argmin(times))]
        memory[key] = None if best is None else list(best)
        _save(memory | _read() | {key: memory[key]})
    return _tile(memory[key])


def use(algorithms: Mapping[str, list[int] | None]) -> None:
    """Take what a run that goes on has had, where it is a candidate, before what is known here.

    It may be a stranger's: it is not saved with what was measured on this machine.
    """
    _of_run.clear()
    _of_run.update(algorithms)


def known() -> dict[str, list[int] | None]:
    """Return what is known so far, and what the run that goes on has had."""
    return remembered() | _of_run


def _tile(found: list[int] | None) -> Tile:
    return None if found is None else (found[0], found[1], found[2])


def _key(node: Node, graph: Graph, candidates: Sequence[Tile]) -> str:
    plan = plan_of(node.with_attributes({"tile": None}), graph)
    roles = sorted(r for r in (*node.inputs, *node.outputs) if r.endswith((".x", ".scale", "moments")))
    parts: list[Any] = [node.op, *plan[:4], plan.width, *roles, machine.threads()]
    parts += [
        "training" if graph.gradients else "inference",
        machine.instruction_set(),
        machine.processor_name(),
        *candidates,
    ]
    return " ".join(map(str, parts))


def _seconds(node: Node, graph: Graph) -> float:
    """Time of the fastest of a few runs."""
    return machine.best_seconds(_bound(node, graph), _RUNS)


def _bound(node: Node, graph: Graph) -> Call:
    """Return what runs a node, on arrays of the right shapes; and packs its weights, if a step does."""
    kernel, arrays, pack = KERNELS[node.op], dict[str, Any](), None
    for role, name in node.values.items():
        value = graph.values[name]
        shape, dtype = value.storage_shape, value.dtype
        if role in ("moments", "sums", "sums_b"):
            shape = kernel.sums(node, role, graph)
        elif role == "bias":
            shape = lanes(shape[0])
        arrays[name] = empty(shape, dtype)
        arrays[name].fill(0.5)
    if kernel.packed:
        name, size = node.inputs["weights"], kernel.packed(node, graph)
        if size:
            settings, outputs = {"for": node}, {"packed": "packed"}
            packing = Node("pack_weights", "pack_weights", {"weights": "as they are"}, outputs, settings)
            both = {"as they are": np.ones(weights_shape(node, graph), np.float32)}
            both["packed"] = arrays[name] = empty((size,), np.float32)
            arrays[name].fill(0.5)
            pack = KERNELS["pack_weights"].bind(Binder(packing, graph, both))
    run = kernel.bind(Binder(node, graph, arrays))
    if not (graph.gradients and pack):
        return run

    def both_() -> None:
        pack()
        run()

    return both_  # anew at each step


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
