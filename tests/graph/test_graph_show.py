"""Tables, the picture, the verbose line and the command line."""

import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import tinyunet
from tinyunet import Adam, UNet, commandline, functional, losses
from tinyunet.common.terminal import aligned
from tinyunet.compiler import passes
from tinyunet.compiler.show import figures, nodes_table, summary
from tinyunet.graph import main
from tinyunet.nn import Conv3d
from tinyunet.viz import graphs
from tinyunet.viz.graphs import draw_graph

SHAPE = (1, 6, 7, 8, 4)


def step(**options) -> tinyunet.compiler.TrainingStep:
    model = UNet(filters=4, depth=2)
    return tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE, **options)


def test_a_line_for_each_pass():
    lines = summary(step().stages(SHAPE)).splitlines()
    names = [line.split()[0] for line in lines[2:]]
    assert names == ["traced", *passes.PASSES, "finish", "plan_memory"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_each_line_says_what_its_pass_has_changed():
    *_, finished, planned = step().stages(SHAPE)
    planned, finished = figures(planned), figures(finished)
    assert planned[:4] == finished[:4]
    assert planned.arena < finished.arena
    assert step(disable=["plan_memory"]).stages(SHAPE)[-1].name == "finish"


def test_a_line_for_each_node_and_the_unfused_are_named():
    graph = step(enable=()).stages(SHAPE)[-1].graph
    lines = nodes_table(graph).splitlines()
    assert len(lines) == 2 + len(graph.nodes)
    assert all(" eager " in line or " view " in line for line in lines[2:])


def test_flops_of_the_unet():
    """The convolutions' 2 * taps * IC * OC a voxel, forward and twice backward but for the images."""
    graph = step(enable=()).stages(SHAPE)[-1].graph
    from tinyunet.compiler.show import flops

    fine, coarse = 6 * 7 * 8, 3 * 3 * 4
    first = 2 * 27 * 4 * 4 * fine
    others = 2 * 27 * (4 * 4 + 8 * 4 + 4 * 4) * fine + 2 * 27 * (4 * 8 + 8 * 8) * coarse
    others += 2 * 4 * 4 * fine + 2 * 8 * 8 * 4 * coarse
    total = sum(flops(node, graph) for node in graph.nodes if "convolution" in node.op)
    assert total == 2 * first + 3 * others


def test_aligned():
    assert aligned(("a", "bb"), [("ccc", "d")]) == "a    bb\n-------\nccc   d"


@pytest.mark.parametrize(("name", "start"), [("g.png", b"\x89PNG"), ("g.svg", b"<?xml")])
def test_picture(tmp_path, name, start):
    draw_graph(tmp_path / name, step().stages(SHAPE))
    assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_has_no_volume_is_in_a_row_of_its_own():
    graph = step().stages(SHAPE)[-1].graph
    axes = Figure().subplots()
    graphs._draw_nodes(axes, graph)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["no volume", "1.7", "2.7", "2.8"]
    bottom = axes.get_yticks()[0]
    lines = np.concatenate(axes.collections[0].get_segments())
    assert len(lines) > 20
    assert bottom not in lines[:, 1]
    row = [box.get_y() + box.get_height() / 2 for box in axes.patches]
    for node, height in zip(graph.nodes, row, strict=True):
        has_volume = "pool" in node.op or "convolution" in node.op
        if has_volume or node.op in ("pack_weights", "statistics"):
            assert has_volume == (abs(height - bottom) > 0.1), node.name
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == [
        *("convolution", "norm", "pool", "reorder", "other"),
        *("edge: fused kernel", "edge: eager operator"),
    ]


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
    found = lines_of(capsys)
    first = list(found)
    nodes = predict.program(SHAPE).graph.nodes
    assert first == [node.name for node in nodes if not node.views]
    assert "normalisation" not in " ".join(found.values())  # batch norm is in the weights
    assert found["encoder.0.conv1"].endswith("prologue: activation; epilogue: bias")
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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "8"], "--size: 8 voxels are halved 4 times; expected at least 16, or a smaller --depth"),
        (
            ["--plot", "no/such/x.png"],
            "--plot: no/such/x.png; expected a file in a folder that can be written to",
        ),
        (["--plot", "graph.gif"], "--plot: graph.gif; expected an ending of .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_before_the_work(monkeypatch, capsys, options, told):
    monkeypatch.setattr(sys, "argv", ["tinyunet.graph", *options])
    with pytest.raises(SystemExit) as left:
        commandline.run("tinyunet.graph", main)
    assert left.value.code == 2
    assert tuple(capsys.readouterr()) == ("", f"tinyunet.graph: {told}\n")
