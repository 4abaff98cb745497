"""Tables, the picture, the verbose line and the command line."""

import re
import subprocess
import sys

import numpy as np

import tinyunet
from tinyunet import Adam, UNet, functional, losses
from tinyunet.graph import passes
from tinyunet.graph.show import aligned, nodes_table, summary
from tinyunet.nn import Conv3d
from tinyunet.viz.graphs import draw_graph

SHAPE = (1, 6, 7, 8, 4)


def step(**options) -> tinyunet.graph.TrainingStep:
    model = UNet(filters=4, depth=2)
    return tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE, **options)


def test_a_line_for_each_pass():
    lines = summary(step().stages(SHAPE)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["traced", *passes.NAMES]
    assert len({len(line) for line in lines[2:]}) == 1


def test_a_line_for_each_node_and_the_unfused_are_named():
    graph = step(enable=()).stages(SHAPE)[-1].graph
    lines = nodes_table(graph).splitlines()
    assert len(lines) == 2 + len(graph.nodes)
    assert all(" eager " in line or " view " in line for line in lines[2:])


def test_flops_of_the_unet():
    """The convolutions' 2 * taps * IC * OC a voxel, forward and twice backward but for the images."""
    graph = step(enable=()).stages(SHAPE)[-1].graph
    from tinyunet.graph.cost import flops

    fine, coarse = 6 * 7 * 8, 3 * 3 * 4
    first = 2 * 27 * 4 * 4 * fine
    others = 2 * 27 * (4 * 4 + 8 * 4 + 4 * 4) * fine + 2 * 27 * (4 * 8 + 8 * 8) * coarse
    others += 2 * 4 * 4 * fine + 2 * 8 * 8 * 4 * coarse
    total = sum(flops(node, graph) for node in graph.nodes if "convolution" in node.op)
    assert total == 2 * first + 3 * others


def test_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")], left=1) == "a    bb\n-------\nccc   d"


def test_picture(tmp_path):
    draw_graph(tmp_path / "graph.png", step().stages(SHAPE))
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_line_for_each_kernel_that_runs(monkeypatch, capsys):
    compiled = step(enable=())
    images, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE[:-1], int)
    compiled.gradients(images, labels)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TINYUNET_VERBOSE", "1")
    compiled.gradients(images, labels)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    graph = compiled.stages(SHAPE)[-1].graph
    assert len(lines) == sum(not node.views for node in graph.nodes)
    assert re.match(
        r"tinyunet: convolution +1x6x7x8x4 +ndhwc +eager .* ms .* GFLOP/s .* GB/s  encoder.0.conv0 +-$",
        lines[0],
    )


def lines_of(capsys) -> dict[str, str]:
    """The lines printed, by the name in the model; each has all its figures, in the same columns."""
    found = capsys.readouterr().err.splitlines()
    for line in found:
        assert re.match(
            r"tinyunet: \w+ +[0-9x]+ +\w+ +(eager|direct|fused|winograd F\([0-9,]+\)) "
            r".* [0-9.]+ ms +[0-9.]+ GFLOP/s +[0-9.]+ GB/s  .+$",
            line,
        ), line
    assert len({(line.index(" ms "), line.index(" GB/s")) for line in found}) == 1
    return {re.split(r"  +", line.partition("GB/s  ")[2])[0]: line for line in found}


def test_every_kernel_of_a_fused_step_and_of_a_prediction_has_a_line(monkeypatch, capsys):
    compiled = step()
    images, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE[:-1], int)
    monkeypatch.setenv("TINYUNET_VERBOSE", "1")
    compiled(images, labels)
    found = lines_of(capsys)
    nodes = [node.name for node in compiled.stages(SHAPE)[-1].graph.nodes if not node.views]
    assert list(found) == [*nodes, "Adam"]
    unfused = [name for name, line in found.items() if " eager " in line and "6x7x8" in line]
    assert unfused == ["zero_padding"]  # 7 is odd
    assert "prologue: normalisation; epilogue: bias, moments" in found["encoder.0.conv1"]
    assert "epilogue: activation mask and sums" in found["d encoder.0.conv1.src"]

    predict = tinyunet.compile(compiled.model, SHAPE)
    predict(images)
    first = list(lines_of(capsys))
    nodes = predict.program(SHAPE).graph.nodes
    assert first == [node.name for node in nodes if not node.views]
    predict(images)  # weights are packed once, and said to be once
    again = list(lines_of(capsys))
    assert again == [node.name for node in nodes if not node.views and node.phase != "prepare"]
    assert len(again) < len(first)


def test_what_no_pass_knows_is_said_to_be_eager(monkeypatch, capsys):
    class Sigmoids(tinyunet.Module):
        def __init__(self):
            self.conv = Conv3d(4, 4)

        def forward(self, src):
            return functional.sigmoid(self.conv(src))

    predict = tinyunet.compile(Sigmoids(), SHAPE)
    monkeypatch.setenv("TINYUNET_VERBOSE", "1")
    predict(np.zeros(SHAPE, np.float32))
    found = lines_of(capsys)
    assert " eager " in found["sigmoid"]
    assert " direct " in found["conv"]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "tinyunet.graph", "--size", "16", "--filters", "4", "--nodes"]
    options = ["--depth", "2", "--mode", "infer", "--plot", str(tmp_path / "graph.png")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "plan_memory" in done.stdout
    assert "encoder.0.conv0" in done.stdout
    assert (tmp_path / "graph.png").exists()
    wrong = subprocess.run([*command, "--disable", "fold"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--disable: invalid choice: 'fold'" in wrong.stderr
