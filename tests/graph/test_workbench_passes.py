"""The workbench of passes: right passes are listed, planted mistakes are named."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from kernels.workbench import Failure, student
from kernels.workbench.__main__ import main
from tinyunet import workbench
from tinyunet.common.errors import UserError
from tinyunet.compiler.ir import BLOCKED
from tinyunet.compiler.passes import PASSES
from tinyunet.workbench import __main__ as command
from tinyunet.workbench import nets_to_try, rewriting

NETS = {name: nets_to_try.NETS[name] for name in ("conv, norm, ReLU", "own operator between")}
RIGHT = '''
"""An operator that works number by number reads and writes blocks: the reorders around it go."""
from dataclasses import replace

after = "propagate_layout"

def rewrite(graph, options):
    for node in graph.nodes:
        if node.op.startswith("own:squash"):
            graph = without_reorders(graph, node)
    return graph

def without_reorders(graph, node):
    (role, given), = node.inputs.items()
    (result, written), = node.outputs.items()
    before, readers = graph.producer(given), graph.consumers(written)
    if before.op != "reorder" or [r.op for r in readers] != ["reorder"]:
        return graph
    source, target = before.inputs["src"], readers[0].outputs["dst"]
    changes = {before.name: [], readers[0].name: []}
    changes[node.name] = [replace(node, inputs={role: source}, outputs={result: target})]
    return graph.rewrite(changes)
'''


def passed(rewrite, after="traced", nets=NETS):
    return workbench.check(rewrite, after, nets)


def loaded(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return student.load(path, refused=())


def test_a_right_pass_is_listed(tmp_path):
    module = loaded(tmp_path, RIGHT)
    changes = passed(module.rewrite, module.after)
    by_net = {(change.net, change.mode): change for change in changes}
    assert by_net["conv, norm, ReLU", "training"].lines == []
    for mode, reorders in (("prediction", (3, 1)), ("training", (4, 0))):
        change = by_net["own operator between", mode]
        assert change.reorders == reorders
        gone = sum(line.startswith("-") for line in change.lines)
        assert gone == reorders[0] - reorders[1]
        assert change.after.moved < change.before.moved
    text = workbench.report(changes)
    assert re.search(r"own operator between +training +11 -> 7 +2 +4 -> 0", text)


@pytest.mark.parametrize(
    ("name", "after"), [("fold_batch_norm", "traced"), ("fuse_epilogue", "fold_batch_norm")]
)
def test_the_compilers_own_passes_are_right(name, after):
    nets = {name: nets_to_try.NETS[name] for name in ("conv, norm, ReLU", "residual", "U-Net")}
    assert any(change.lines for change in passed(PASSES[name], after, nets))


def attribute(op, **settings):
    """Return a pass that gives all nodes of an operator other settings."""

    def rewrite(graph, options):
        changes = {node.name: [node.with_attributes(settings)] for node in graph.nodes if node.op == op}
        return graph.rewrite(changes)

    return rewrite


def freeze(graph, options):
    """Take the numbers of parameters at compile time."""
    if graph.gradients:
        return graph
    names = [name for name, value in graph.values.items() if value.kind == "parameter"]
    values = [replace(graph.values[name], kind="constant") for name in names]
    data = {**graph.data, **{name: graph.data[name].copy() for name in names}}
    return graph.rewrite({}, values, data=data)


def skip(op):
    """Return a pass that leaves out all nodes of an operator."""

    def rewrite(graph, options):
        for node in [node for node in graph.nodes if node.op == op]:
            src, dst = node.inputs["src"], node.outputs["dst"]
            changes = {node.name: []}
            for reader in graph.consumers(dst):
                roles = {role: src for role, value in reader.inputs.items() if value == dst}
                changes[reader.name] = [reader.with_inputs(roles)]
            graph = graph.rewrite(changes)
        return graph

    return rewrite


def in_place(graph, options):
    graph.values.clear()
    return graph


def blocks_everywhere(graph, options):
    values = [replace(v, layout=BLOCKED) for v in graph.values.values() if "own" in v.name]
    return graph.rewrite({}, values)


def swap_gradients(graph, options):
    if not graph.gradients:
        return graph
    first, second = list(graph.gradients)[:2]
    return replace(graph, gradients={**graph.gradients, first: graph.gradients[second]})


def raises(graph, options):
    raise KeyError("src")


def stub(graph, options):
    raise NotImplementedError("your turn")


def loses_a_node(graph, options):
    return graph.rewrite({graph.nodes[0].name: []})


def twice(graph, options):
    first = graph.nodes[0]
    return graph.rewrite({first.name: [first, replace(first, name="again")]})


def another_output(graph, options):
    return replace(graph, outputs=(graph.nodes[0].outputs["dst"],))


def unknown_operator(graph, options):
    node = graph.nodes[0]
    return graph.rewrite({node.name: [replace(node, op="fast", attributes={"implementation": "fused"})]})


MISTAKES = {
    "empty stub": (stub, "the stub is still empty"),
    "returns nothing": (lambda graph, options: None, "rewrite returns NoneType; expected a Graph"),
    "changes nothing": (lambda graph, options: graph, "the pass changes no graph; tried: conv, norm, ReLU"),
    "an error": (raises, "rewrite raises KeyError (test_workbench_passes.py, line"),
    "in place": (in_place, "changes the graph that it was given"),
    "a node too few": (loses_a_node, "is read before written"),
    "written twice": (twice, "is written twice"),
    "another output": (another_output, "changes the graph's outputs"),
    "other gradients": (swap_gradients, "changes the graph's gradients"),
    "an unknown operator": (unknown_operator, "the graph cannot run: "),
    "parameters as constants": (freeze, "after the parameters have changed"),
    "0.1 %": (attribute("batch_norm_inference", epsilon=0.0035), "the prediction is wrong"),
    "a ReLU too few": (skip("relu"), "look first at: "),
    "the wrong layout": (blocks_everywhere, "the graph cannot run: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named(name):
    rewrite, words = MISTAKES[name]
    with pytest.raises(Failure, match=re.escape(words)):
        passed(rewrite)


def test_a_wrong_gradient_is_named():
    """The pass is right in prediction, and wrong in training."""

    def rewrite(graph, options):
        node = next((n for n in graph.nodes if n.op == "own:squash_backward"), None)
        if node is None:
            return graph
        src, dst = node.inputs["gradient"], node.outputs["diff_x"]
        readers = {r.name: [replace(r, inputs={k: src if v == dst else v for k, v in r.inputs.items()})]
                   for r in graph.consumers(dst)}  # fmt: skip
        return graph.rewrite({**readers, node.name: []})

    with pytest.raises(Failure, match="own operator between, training: the gradient of first"):
        passed(rewrite)


def test_a_pass_after_an_unknown_one():
    with pytest.raises(Failure, match="after = 'fuse' is no pass; expected traced, fold_batch_norm"):
        passed(lambda graph, options: graph, "fuse")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rewriting, "NETS", NETS)
    monkeypatch.setattr(rewriting, "_TIMED", 4)
    path = tmp_path / "mine.py"
    path.write_text(RIGHT)
    text = workbench.judge(student.load(path, refused=()))
    assert text.startswith("rewrite: right on 2 nets")
    assert "ms before" in text.splitlines()[-1]
    handed = []
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: handed.append((name, *sys.argv)))
    assert main([str(path), "--check"]) == 0  # the command of kernels hands it over
    assert handed == [("tinyunet.workbench", "tinyunet.workbench", str(path), "--check")]
    monkeypatch.setattr(sys, "argv", ["tinyunet.workbench", str(path), "--check"])
    command.main(None)
    assert "own operator between" in capsys.readouterr().out
    path.write_text(RIGHT.replace("own:squash", "own:nothing"))
    with pytest.raises(UserError, match="the pass changes no graph"):
        command.main(None)
    path.write_text(RIGHT + "\nfrom tinyunet.nn import Conv3d\nshape = 1, 4, 4, 4, 3\n"
                    "def model():\n    return Conv3d(3, 3)\n")  # fmt: skip
    with pytest.raises(Failure, match="tried: your model"):
        workbench.judge(student.load(path, refused=()))


def test_numbers_of_the_check_are_fresh():
    model = NETS["conv, norm, ReLU"]()
    pair = rewriting._Pair(model, False, (1, 4, 4, 4, 3), rewriting._Rewritten(lambda g, o: g, "traced"))
    seen = []
    pair.results = lambda compiled, images, labels: seen.append(images) or {"x": np.ones(1)}
    pair.compare()
    pair.compare()
    assert seen[0] is seen[1]
    assert not np.array_equal(seen[0], seen[2])
