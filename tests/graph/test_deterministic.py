"""The same bits whatever the clock says: algorithms chosen by the model of the work alone."""

import os
import subprocess
import sys

import numpy as np
import pytest
from agreement import batch

import tinyunet
from tinyunet import Adam, UNet, losses
from tinyunet.compiler import measure
from tinyunet.compiler.passes import choose_algorithm

SHAPE = (1, 12, 14, 16, 4)


def trained(**how) -> bytes:
    """All bits of a small net after two steps, and of its prediction."""
    model = UNet(filters=16, depth=2)
    step = tinyunet.compile(model, losses.dice_cross_entropy, Adam(model.parameters()), SHAPE, **how)
    images, labels = batch(SHAPE[:-1], 4, 4, 0)
    for _ in range(2):
        step(images, labels)
    predict = tinyunet.compile(model, SHAPE, **how)
    return b"".join(a.tobytes() for a in model.state_dict().values()) + predict(images).tobytes()


def test_what_is_fastest_makes_no_difference(monkeypatch):
    """Here every convolution has several candidates, and the fastest is the first, or the last."""
    monkeypatch.setattr(choose_algorithm, "_SMALL", 0)
    monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)
    found: dict[bool, set[bytes]] = {True: set(), False: set()}
    for which in (0, -1):
        monkeypatch.setattr(measure, "fastest", lambda *given, which=which: given[-1][which])
        for deterministic in found:
            found[deterministic].add(trained(deterministic=deterministic))
    assert {d: len(bits) for d, bits in found.items()} == {True: 1, False: 2}


def test_no_clock_and_no_file(tmp_path):
    """Two processes, each with a cache of its own: the same bits, and nothing is kept of either."""
    code = "\n".join(
        (
            "import hashlib, test_deterministic as t",
            "t.choose_algorithm._SMALL = 0",  # or there were nothing to measure in a net so small
            "t.choose_algorithm._FACTOR = 10",
            "print(hashlib.sha256(t.trained(deterministic=True)).hexdigest())",
        )
    )
    paths = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    said = []
    for cache in (tmp_path / "a", tmp_path / "b"):
        given = os.environ | {"TINYUNET_CACHE": str(cache), "PYTHONPATH": paths}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        assert not cache.exists()
    assert said[0] == said[1]


@pytest.mark.parametrize("training", [True, False])
def test_the_tile_is_the_best_of_the_model(training):
    model = UNet(filters=16, depth=2)
    arguments = (losses.soft_dice, Adam(model.parameters())) if training else ()
    shape = (1, 32, 32, 32, 4)
    made = tinyunet.compile(model, *arguments, shape, deterministic=True, accuracy="strict")
    graph = made.stages(shape)[-1].graph
    nodes = [n for n in graph.nodes if n.op in choose_algorithm._OPS and n.runs_fused]
    assert nodes
    for node in nodes:
        costs = choose_algorithm.costs(node, graph, "strict")
        assert costs[node.attributes["tile"]] == min(costs.values())
