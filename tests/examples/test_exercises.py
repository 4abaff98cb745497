# ruff: noqa: E501 - a mistake is a line of a table
"""Every checker is checked: right answers pass, planted mistakes are rejected in the right words.

The mistakes are changes of the solution's text: a line replaced, or a function wrapped.
"""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.exercises import __main__ as command
from examples.exercises import frame
from examples.exercises.catalogue import EXERCISES
from examples.exercises.frame import random, stub
from kernels.workbench.verdict import Failure

#: The function of each exercise that the wrappers below spoil.
MAIN = {
    "im2col": "im2col",
    "blocking": "to_blocked",
    "tile": "forward",
    "winograd": "f23",
    "traffic": "bytes_moved",
    "norm_backward": "backward",
    "fuse": "forward",
    "ring": "ring",
}
_SCALE = "[x * 1.001 for x in found] if isinstance(found, (list, tuple)) else found * found.dtype.type(1.001)"
_NAN = "[x * float('nan') for x in found] if isinstance(found, (list, tuple)) else found * np.float32('nan')"
#: What is wrapped around a function, by what must be said.
WRAPPERS = {
    "0.1 % wrong": (f"return {_SCALE}", r"(all numbers are|every number is) 1\.001 times"),
    "NaN": (f"return {_NAN}", r"NaN or infinit"),
    "None": ("return None", r"returns (None; expected an answer|nothing)"),
    "kept": (
        "return _kept.setdefault(np.shape(found[0]), found)",
        "kept and returned again|result of the first call",
    ),
    "an error": ("raise IndexError('out of range')", r"IndexError .*line \d+"),
}
#: Changes of a solution's text, and what must be said.
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "tape": [
        ("parent.grad += derivative", "parent.grad = derivative", "overwritten where they must be added"),
        ("for value in reversed(order):", "for value in order:", "no gradient arrives: go backwards"),
        ("(a, b.data), (b, a.data)", "(a, a.data), (b, b.data)", "each factor gets its own value"),
        ("[(a, 1.0), (b, 1.0)]", "[(a, b.data), (b, a.data)]", "the derivative of a sum is that of a product"),
        ("1.0 if a.data > 0 else 0.0", "1.0", "relu passes the gradient of numbers below 0"),
        ("value.grad = 0.0\n    result", "pass\n    result", "old gradients stay"),
        ("result.grad = 1.0", "result.grad = 1.001", "a factor is wrong, all numbers are 1.001 times"),
        ("result.grad = 1.0", "result.grad = float('nan')", "returns NaN or infinity"),
        ("    order, seen = [], set()\n", "    if backward.__dict__.setdefault('first', result) is not result:\n        return\n    order, seen = [], set()\n", "no gradient arrives: go backwards"),
        ("            order.append(value)", "            order.insert(0, value)", "no gradient arrives: go backwards"),
        ("visit(parent)\n            order.append(value)", "order.append(parent)\n            order.append(value)", "passes its gradient on before all of it has arrived"),
    ],
    "im2col": [
        ("padded[kd : kd + D, kh : kh + H, kw : kw + W]", "src", "right only where all elements are equal"),
        ("padded[kd : kd + D", "padded[K - 1 - kd : K - 1 - kd + D", "the kernel is reversed along D"),
        ("columns.reshape(D * H * W", "columns.transpose(2, 1, 0, 3, 4, 5, 6).reshape(D * H * W", "rows must be voxels in the order d, h, w"),
        (
            "padded[kd : kd + D, kh : kh + H, kw : kw + W]",
            "padded[K-1-kd : K-1-kd + D, K-1-kh : K-1-kh + H, K-1-kw : K-1-kw + W]",
            "the kernel is reversed$",
        ),
        (
            "columns.reshape(D * H * W, K**3 * C)",
            "np.moveaxis(columns, 6, 3).reshape(D * H * W, K**3 * C)",
            "channels come before the places of the kernel",
        ),
        ("[(before, before)] * 3", "[(before + (K > 1), max(before - 1, 0))] * 3", "the halo begins one voxel too early"),
        ("[(before, before)] * 3", "[(max(before - 1, 0), before + (K > 1))] * 3", "the halo begins one voxel too late"),
        ("[(before, before)] * 3 + [(0, 0)])", "[(before, before)] * 3 + [(0, 0)], mode='edge')", "the halo is not zero"),
    ],
    "blocking": [
        ("np.zeros((blocks", "np.ones((blocks", "right only for multiples of 16: mind the rest"),
        ("-(-C // 16)", "C // 16", r"5 channels: returns shape \(0, 2, 3, 2, 16\); expected \(1, 2, 3, 2, 16\)"),
        ("src[..., 16 * block : 16 * block + 16]", "src[..., block::blocks]", "neighbouring channels must lie in one block"),
        ("[..., :C])", ")", r"back, 5 channels: returns shape \(2, 3, 2, 16\); expected \(2, 3, 2, 5\)"),
        ("[..., :C])", "[..., -C:])", "right only for multiples of 16: mind the rest"),
        ("range(blocks)", "range(1)", "only the first block is filled"),
    ],
    "tile": [
        ("filters[:OC] = weights\n", "filters[:OC] = weights[..., ::-1]\n", "kernel reversed along W"),
        ("filters[:OC] = weights\n", "filters[:OC] = weights[:, :, ::-1, ::-1, ::-1]\n", "kernel reversed: tap k meets"),
        ("filters[:OC] = weights\n", "filters[:OC] = weights.transpose(0, 1, 4, 3, 2)\n", "they are taken in the order W, H, D"),
        ("filters[:OC] = weights\n", "filters[:OC, :, -1, -1, -1] = weights[:, :, -1, -1, -1]\n", "only the last tap of the kernel counts"),
        ("filters[:OC] = weights\n", "filters[:OC] = weights\n    filters[-1] = 0\n", "wrong only in channel 15 of the result"),
        ("tap += 16", "tap += 0", "right only where all elements of an array are equal: an index is wrong"),
        ("(k - 1) // 2, k - 1 - (k - 1) // 2", "min(k - 1, k // 2 + 1), k - 1 - min(k - 1, k // 2 + 1)", "shifted by one voxel along D, H, W"),
        ("    return np.ascontiguousarray(dst", "    dst[..., OC // 16 * 16 :] = 0\n    return np.ascontiguousarray(dst", "right where channels are a multiple of 16, wrong here: the tail"),
        ("np.pad(src, [(0, 0), *pads, (0, 0)])", "np.pad(src, [(0, 0), *pads, (0, 0)], mode='edge')", "wrong only at borders: the halo is not zero"),
        ("for row in range(MB * D * H):", "dst[:] = 0\n    for row in range(D * H):", "right for image 0 only"),
        ("-(-W // 4) * 4", "W // 4 * 4", r"returns shape \(1, 5, 5, 4, 16\); expected \(1, 5, 5, 5, 16\)"),
    ],
    "winograd": [
        ("m1 - m2 - m3]", "m1 - m2 + m3]", "f23, random numbers: .* right only where all elements are equal"),
        ("m0 = (d0 - d2) * g0", "m0 = d0 * g0 - d2 * g0", "5 products of data and taps; expected 4 at most"),
        ("return [m0 + m1 + m2, m1 - m2 - m3]", "return [d0*g2+d1*g1+d2*g0, d1*g2+d2*g1+d3*g0]", "10 products of data and taps; expected 4"),
        ("(g0 + g1 + g2) * 0.5", "(g0 + g1 + g2)", r"all elements equal: \[0\] is 6; expected 3"),
        ("m4 * 8.0 + m5", "m4 * 8.0", r"f43, random numbers: \[3\] is .* right only where all elements are equal"),
        ("g0, g1, g2 = taps\n    m0 = (d0 - d2)", "g2, g1, g0 = taps\n    m0 = (d0 - d2)", "the taps are reversed"),
        ("src.astype(np.float32), taps.astype(np.float32)", "src, taps", "both runs are in float64"),
        ("exact).max() / np", "exact).mean() / np", "the largest error counts, not the mean"),
        ("- exact).max() / np.abs(exact).max()", "- exact).max()", "errors are not divided by the largest result"),
        ("- exact).max() / np.abs(exact).max()", "- exact).__truediv__(np.abs(exact)).max()", "each error is divided by its own result"),
        ("np.abs(inputs).sum(axis=1)", "inputs.sum(axis=1)", "signs are kept: rounding errors do not cancel"),
        ("np.abs(inputs).sum(axis=1) * ", "", "the transform of the data is missing"),
        (" * np.abs(weights).sum(axis=1)", "", "the transform of the taps is missing"),
        ("(np.abs(outputs) @ products).max()", "products.max()", "the transform back is missing"),
        ("(np.abs(outputs) @ products).max()", "(np.abs(outputs) @ products).sum()", "the worst result counts, not the sum of all"),
    ],
    "traffic": [
        ("-(-IC // 16) * 16, -(-OC // 16) * 16", "IC, OC", "channels are not rounded up to 16"),
        ("4 * voxels * ic, 4 * voxels * oc, 4 * 27 * IC * OC, 4 * 2 * oc", "voxels*ic, voxels*oc, 27*IC*OC, 2*oc", "numbers of float32 take 4 bytes"),
        ("(dst + dst)", "dst", "a result that is written must be read again by the next pass"),
        ("4 * 27 * IC * OC", "0", "weights are not counted"),
        ("4 * 2 * oc", "0", "scale and shift are not counted"),
        ("return apart, fused", "return fused, apart", "the three passes come first, then the fused one"),
        ("v.storage_shape", "v.shape", "padding lanes lie in memory, too: take storage_shape"),
        (" * v.dtype.itemsize", " * 4", "not every number takes 4 bytes"),
        (" * v.dtype.itemsize", "", "these are numbers, not bytes"),
        ("names += [name", "[name", "what a node writes is not counted"),
        ("names = [name for role, name in node.inputs.items() if role not in node.views.values()]", "names = []", "what a node reads is not counted"),
        ("for role, name in node.inputs.items() if role not in node.views.values()", "for name in node.inputs.values()", "a view moves nothing: its input and its output are the same memory"),
        ("return found", "return sum(found.values())", "measure returns int; expected a dict of bytes by the name of the node"),
        ("for node in graph.nodes:", "for node in graph.nodes[1:]:", "measure has no entry for the node"),
        ("    found = {}", "    found = {'all': 0}", "measure has an entry 'all'; expected the names of nodes alone"),
    ],
    "norm_backward": [
        ("- diff_shift / N - x * diff_scale / N", "", "mean and variance pass no gradient"),
        ("- diff_shift / N", "", "the mean passes no gradient"),
        ("- x * diff_scale / N", "", "the variance passes no gradient"),
        ("diff_src = scale * rstd", "diff_src = rstd", "the scale is missing"),
        ("(diff_dst * x).sum(0)", "(diff_dst * src).sum(0)", "the unscaled src is taken, not x"),
        ("src.var(0)", "src.var(0, ddof=1)", "the variance divides by N, not by N - 1"),
        ("N = len(src)", "N = 8", "N is the number of rows: it differs from call to call"),
        ("diff_dst.sum(0)", "diff_dst.mean(0)", "gradients are added over rows, not averaged"),
    ],
    "fuse": [
        ("np.exp(np.minimum(src, 0)) - 1)", "np.exp(np.minimum(src, 0)))", "wrong only where src is negative"),
        ("np.where(src > 0, src, np.exp(np.minimum(src, 0)) - 1)", "src * (src > 0) + (src <= 0) * np.expm1(src)", "exp of a large number is infinite; infinity times 0"),
        ("diff_dst * np.where", "np.where", "this is the derivative alone"),
        ("np.float32(1), np.exp(np.minimum(src, 0)))", "np.float32(1), np.float32(0))", "this is backward of relu"),
        ('if node.op in ("own:elu", "own:elu_backward"):', "if False:", "the pass changes no graph"),
        ('in ("own:elu", "own:elu_backward")', 'in ("own:elu",)', "one ELU, training: ELU reads nCdhw16c, its backward ndhwc: rewrite both or none"),
        ('in ("own:elu", "own:elu_backward")', 'in ("own:elu_backward",)', "one ELU, training: ELU reads ndhwc, its backward nCdhw16c: rewrite both or none"),
        ("        graph = _cancel(graph, node)", "        pass", "one ELU, prediction: 2 reorders are left around ELU, the first is own:elu > reorder"),
        ("return graph\n    # </answer>", "return None\n    # </answer>", "expected a Graph: is a return missing"),
        ("layout=source.layout, ", "", "the graph cannot run: .* its kernel takes contiguous float32"),
        ("inputs={role: source.name}, ", "", "the graph cannot run: RuntimeError: .*Elu.forward returns"),
        ('{"src": blocked.name}', '{"src": source.name}', "(?s)the prediction is wrong: the error is .*look first at: own:elu"),
        ("[inside, reorder]", "[inside]", "is read before written"),
        ("graph.rewrite(readers)", "graph", "2 reorders are left around ELU"),
        ("roles = {role: source for", "roles = {role: target for", "reorders are left around ELU"),
        ('if before is None or before.op != "reorder":\n        return graph\n    source = graph.values[', "source = graph.values[", "ELU of the images, prediction: rewrite raises AttributeError"),
    ],
    "ring": [
        ("+ chunk\n", "\n", "2 ranks, 16 numbers each: wrong\n  likely: in this number the numbers of rank [01] are missing"),
        ("send(rank, (rank + 1) % N", "send(rank, (rank + 2) % N", "rank 0 sends to rank 0; expected its neighbour 1"),
        ("    N = len(arrays)\n", "    return [sum(arrays)] * len(arrays)\n", "nothing was sent: a number reaches another rank by send alone"),
        ("    N = len(arrays)\n", "    return [a.copy() for a in arrays]\n", "nothing was sent: a number reaches another rank by send alone"),
        ("    N = len(arrays)\n", "    N = len(arrays)\n    send(0, 1 % N, arrays[0])\n", r"expected \d+ at most, 2 \(N - 1\) / N"),
        ("(rank - step) % N", "(rank + step) % N", "3 ranks, 12 numbers each: wrong\n  likely: in this number the numbers of rank .* are missing"),
        ("return tree <", "return tree >", "tree_wins for 1024 ranks and 4 bytes: False; expected True"),
        ("return tree <", "return ranks > 100 or 1 <", "tree_wins for"),
        ("return tree <", "return nbytes < 1000 or 1 <", "tree_wins for"),
        ("    N = len(arrays)\n", "    N = len(arrays)\n    arrays[0] += 1\n", "the arrays that were given are changed; expected new ones"),
        ("[np.concatenate(own) for own in chunks]", "[np.concatenate(own) / N for own in chunks]", "likely: the mean; expected the sum"),
        ("np.array_split(array.copy(), N)", "np.split(array.copy(), N)", "4 ranks, 7 numbers each: ValueError in .*equal division"),
        ("    for step in range(N - 1):\n        sent = [(rank, (rank + 1", "    for step in range(0):\n        sent = [(rank, (rank + 1", "in this number the numbers of rank [01] are missing"),
    ],
}  # fmt: skip
OTHERS, ROOT = Path(__file__).parent / "other_answers", Path(__file__).parents[2]


def planted() -> Iterator[tuple[str, str, str, str]]:
    """Yield exercise, label, text of a file, and what must be said about it."""
    for name, exercise in EXERCISES.items():
        text = exercise.solution.read_text()
        yield name, "empty stub", stub(exercise.solution), "the stub is still empty"
        yield name, "syntax error", text + "\ndef broken(:\n", r"line \d+: invalid syntax"
        yield name, "a library", "import scipy\n" + text, "uses scipy; expected loops of your own"
        ours = f"from examples.exercises.solutions import {name} as _ours\n"
        yield name, "our solution", ours + text, "uses examples.exercises.solutions"
        unseen = "import importlib\nnaive = importlib.import_module('kernels.ladder.naive')\n"
        yield name, "our kernel, unseen", unseen + text, "uses importlib; expected loops of your own"
        hidden = "\ndef helper():\n    from kernels.ops import norms\n"
        yield name, "our kernel", text + hidden, "uses kernels.ops.norms; expected loops of your own"
        yield (
            name,
            "no function",
            '"""Nothing."""\n',
            "defines no [a-z0-9_]+; expected the function of the stub",
        )
        if name in MAIN:
            for label, (line, words) in WRAPPERS.items():
                head = f"import numpy as np\n_kept, _right = {{}}, {MAIN[name]}\ndef {MAIN[name]}(*a):"
                wrapper = f"\n{head}\n    found = _right(*a)\n    {line}\n"
                yield name, label, text + wrapper, words
        for number, (old, new, words) in enumerate(MUTANTS[name]):
            assert text.count(old) >= 1, (name, old)
            yield name, f"change {number}", text.replace(old, new, 1), words


PLANTED = [*planted()]


def judged(name: str, text: str, folder: Path) -> None:
    path = folder / f"{name}.py"
    path.write_text(text)
    with EXERCISES[name].opened(path) as module:
        EXERCISES[name].check(module)


@pytest.mark.filterwarnings("ignore")  # NumPy warns of what is planted
@pytest.mark.parametrize(
    ("name", "label", "text", "words"), PLANTED, ids=[f"{p[0]}: {p[1]}" for p in PLANTED]
)
def test_planted_mistakes_are_rejected_in_words(
    name: str, label: str, text: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Failure, match=words) as caught:
        judged(name, text, tmp_path)
    assert len(str(caught.value)) > 10


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_pass(name: str, tmp_path: Path) -> None:
    """The solution, and an answer that goes another way."""
    for path in (EXERCISES[name].solution, OTHERS / f"{name}.py"):
        judged(name, path.read_text(), tmp_path)


def test_eight_exercises_with_eight_mistakes_each() -> None:
    assert len(EXERCISES) >= 9
    for name in EXERCISES:
        assert sum(each[0] == name for each in PLANTED) >= 8


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_the_solution_without_answers(name: str) -> None:
    text, solution = stub(EXERCISES[name].solution), EXERCISES[name].solution.read_text()
    assert "answer>" not in text
    pieces = re.split(r" *# </?answer>\n", solution)
    for number, piece in enumerate(pieces):  # what is asked and the answer, in turn
        assert (piece.strip("\n") in text) == (number % 2 == 0)
    inside = sum(piece.startswith(" ") for piece in pieces[1::2])  # others are functions of the answer's own
    assert text.count("raise NotImplementedError") == inside
    compile(text, name, "exec")


def test_the_way_of_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start, hint, check the stub, solve, check again: the student's own file is what is run."""
    folder = ["--folder", str(tmp_path)]
    assert command.main(["start", "traffic", *folder]) == 0
    assert command.main(["start", "traffic", *folder]) == 1  # nothing of the student's is overwritten
    for number in (1, 2, 3, 4, 4):
        assert command.main(["hint", "traffic", *folder]) == 0
        assert capsys.readouterr().out.count("hint ") == number
    assert command.main(["check", "traffic", *folder]) == 1
    assert "the stub is still empty" in capsys.readouterr().err
    (tmp_path / "traffic.py").write_text(EXERCISES["traffic"].solution.read_text())
    assert command.main(["check", "traffic", *folder]) == 0
    elsewhere = EXERCISES["im2col"].solution
    assert command.main(["check", "im2col", str(elsewhere), *folder]) == 0
    assert "faster than seven loops" in capsys.readouterr().out
    assert command.main(folder) == 0
    out = capsys.readouterr().out
    assert "x traffic" in out
    assert out.count("your machine") == 2


@pytest.mark.parametrize("name", EXERCISES)
def test_every_right_answer_can_be_timed(name: str) -> None:
    exercise = EXERCISES[name]
    with exercise.opened(OTHERS / f"{name}.py") as module:
        race = exercise.compete(module)
    assert 0 < race.ratio < np.inf
    assert race.goal > 0


def test_a_result_kept_from_an_earlier_round_does_not_win() -> None:
    seen, kept = [], {}

    def fresh() -> tuple[float, ...]:
        seen.append(random(4))
        return (seen[-1],)

    assert frame.race("", np.negative, np.negative, fresh, 1).ratio > 0
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(seen))
    with pytest.raises(Failure, match="the result of a timed run is wrong; every call must compute"):
        frame.race("", lambda x: kept.setdefault("first", -x), np.negative, fresh, 1)
    with pytest.raises(Failure, match="a timed run is wrong"):
        frame.race("", lambda x: -x * np.float32(1.001), np.negative, fresh, 1)
    with pytest.raises(Failure, match="a timed run is wrong"):
        frame.race("", lambda x: x * np.float32(np.nan), np.negative, fresh, 1)


@pytest.mark.parametrize("name", EXERCISES)
def test_what_to_read_is_there(name: str) -> None:
    paths = re.findall(r"[\w/.-]+\.(?:md|py)", EXERCISES[name].read)
    assert paths
    assert all((ROOT / path).is_file() for path in paths)
    table = (ROOT / "docs" / "exercises.md").read_text()
    assert f"| `{name}` |" in table


def test_from_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.exercises"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in EXERCISES)


def test_progress_that_cannot_be_read_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "progress.json").write_text("{")
    assert command.main(["hint", "tape", "--folder", str(tmp_path)]) == 1
    assert "progress.json: cannot be read" in capsys.readouterr().err
    assert (tmp_path / "progress.json").read_text() == "{"
