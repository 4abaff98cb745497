"""Which algorithm a convolution runs fastest with on this machine: timed once, remembered on disk.

Another measurement may find another algorithm, which rounds differently. A model that is compiled with
``deterministic`` does not use this module, and gives the same bits again.

The file is in ``$TINYUNET_CACHE``, or in the user's cache folder, and is named by a digest of the kernels'
source, so each version of the project has a file of its own. If the file cannot be read or written, each
process measures again.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import kernels
from kernels.base import machine
from kernels.base.buffers import empty
from tinyunet.common.files import read_json, write_json
from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.operators import KERNELS
from tinyunet.compiler.operators.convolutions import plan_of
from tinyunet.compiler.passes.finish import finish
from tinyunet.compiler.record import Binder, Call

Tile = tuple[int, int, int] | None  # of Winograd; None is direct
Known = dict[str, list[int] | None]  # tiles as in the file, by the key of a convolution
_RUNS = 3
_of_run: Known = {}  # what the run that goes on has had


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
    memory, key = remembered(), _key(node, graph, candidates)
    names = [None if tile is None else list(tile) for tile in candidates]
    for tiles in (_of_run, memory):
        if tiles.get(key, "unknown") in names:
            return candidates[names.index(tiles[key])]
    memory.update(_read() | memory)  # another process may have measured it meanwhile
    # What is no candidate (a file may come from anywhere) is measured, too.
    if memory.get(key, "unknown") not in names:
        times = [_seconds(node.with_attributes({"tile": tile}), graph) for tile in candidates]
        memory[key] = names[int(np.argmin(times))]
        with contextlib.suppress(OSError):
            _save(memory | _read() | {key: memory[key]})
    return candidates[names.index(memory[key])]


def run_once(node: Node, graph: Graph, candidates: Sequence[Tile]) -> None:
    """Run a convolution with each of some algorithms, so that their kernels are compiled."""
    for tile in candidates:
        _bound(node.with_attributes({"tile": tile}), graph)()


def use(algorithms: Mapping[str, list[int] | None]) -> None:
    """Prefer the algorithms of a resumed run, where they are candidates, to those measured here.

    They may come from a stranger, so they are not saved with the measurements of this machine.
    """
    _of_run.clear()
    _of_run.update(algorithms)


def known() -> Known:
    """Return the algorithms measured so far, and those of a resumed run."""
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
    """Return what runs a node on arrays of its own; and packs its weights, if each step does."""
    values = {name: graph.values[name] for name in node.values.values()}
    for name in node.inputs.values():
        values[name] = replace(values[name], kind="constant" if graph.are_fixed([name]) else "input")
    alone = finish(Graph((replace(node, in_place={}),), values, (), (), {}, graph.gradients))
    arrays: dict[str, Any] = {name: empty(v.storage_shape, v.dtype) for name, v in alone.values.items()}
    for array in arrays.values():
        array.fill(0.5)
    calls = [KERNELS[n.op].bind(Binder(n, alone, arrays)) for n in alone.nodes if n.phase != "prepare"]

    def run() -> None:
        for call in calls:
            call()

    return run


def _path() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("TINYUNET_CACHE") or Path(caches) / "tinyunet"
    return Path(folder) / f"algorithms-{_version()}.json"


@functools.cache
def remembered() -> Known:
    """Return the algorithms known so far, by the key of a convolution; a caller may add to them."""
    return _read()


@functools.cache
def _version() -> str:
    """Digest of the kernels' source."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read() -> Known:
    try:
        found = read_json(_path())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if _is_tile(v)} if isinstance(found, dict) else {}


def _is_tile(value: Any) -> bool:
    """Whether a value from a file can be one of an algorithm."""
    is_list = isinstance(value, list) and len(value) == 3
    return value is None or (is_list and all(type(size) is int for size in value))


def _save(memory: Known) -> None:
    _path().parent.mkdir(parents=True, exist_ok=True)
    write_json(_path(), memory)
