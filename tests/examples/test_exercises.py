"""Every checker is checked: right answers pass, planted mistakes are rejected in the right words.

The mistakes are changes of the solution's text: a line replaced, or a function wrapped.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.exercises import __main__ as command
from examples.exercises.catalogue import EXERCISES
from examples.exercises.frame import stub
from kernels.workbench import student
from kernels.workbench.verdict import Failure

#: The function of each exercise that the wrappers below spoil.
MAIN = {
    "im2col": "im2col",
    "blocking": "to_blocked",
    "tile": "forward",
    "winograd": "f23",
    "traffic": "bytes_moved",
    "norm_backward": "backward",
    "ring": "ring",
}
_SCALE = "[x * 1.001 for x in found] if isinstance(found, (list, tuple)) else found * 1.001"
_NAN = "[x * float('nan') for x in found] if isinstance(found, (list, tuple)) else found * float('nan')"
#: What is wrapped around a function, by what must be said.
WRAPPERS = {
    "0.1 % wrong": (f"return {_SCALE}", r"expected|err"),
    "NaN": (f"return {_NAN}", r"NaN"),
    "None": ("return None", r"None|nothing|expected an array"),
    "kept": ("return _kept.setdefault(0, found)", r"kept|first call|shape"),
    "an error": ("raise IndexError('out of range')", r"IndexError"),
}
#: Changes of a solution's text, and what must be said.
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "tape": [
        ("parent.grad += derivative", "parent.grad = derivative", "overwritten"),
        ("for value in reversed(order):", "for value in order:", "expected"),
        ("(a, b.data), (b, a.data)", "(a, a.data), (b, b.data)", "each factor gets its own value"),
        ("[(a, 1.0), (b, 1.0)]", "[(a, b.data), (b, a.data)]", "that of a product"),
        ("1.0 if a.data > 0 else 0.0", "1.0", "below 0"),
        ("value.grad = 0.0\n    result", "pass\n    result", "old gradients stay"),
        ("result.grad = 1.0", "result.grad = 1.001", "factor"),
        ("result.grad = 1.0", "result.grad = float('nan')", "NaN"),
        ("            order.append(value)", "            order.insert(0, value)", "expected"),
    ],
    "im2col": [
        ("before = K // 2", "before = K // 2\n    src = np.roll(src, 1, 0)", "expected"),
        ("padded[kd : kd + D", "padded[K - 1 - kd : K - 1 - kd + D", "expected"),
        ("columns.reshape(D * H * W", "columns.transpose(2, 1, 0, 3, 4, 5, 6).reshape(D * H * W", "expected"),
        (
            "padded[kd : kd + D, kh : kh + H, kw : kw + W]",
            "padded[K-1-kd : K-1-kd + D, K-1-kh : K-1-kh + H, K-1-kw : K-1-kw + W]",
            "the kernel is reversed",
        ),
        (
            "columns.reshape(D * H * W, K**3 * C)",
            "np.moveaxis(columns, 6, 3).reshape(D * H * W, K**3 * C)",
            "channels come before the places",
        ),
        ("[(before, before)] * 3", "[(before + 1, before - 1)] * 3", "halo begins one voxel too early|ValueError"),  # noqa: E501
    ],
    "blocking": [
        ("np.zeros((blocks", "np.ones((blocks", "multiples of 16"),
        ("-(-C // 16)", "C // 16", "shape|Error"),
        ("src[..., 16 * block : 16 * block + 16]", "src[..., block::blocks]", "neighbouring channels|multiples"),  # noqa: E501
        ("[..., :C])", ")", "shape"),
        ("[..., :C])", "[..., -C:])", "expected"),
    ],
    "tile": [
        ("d + kd, h + kh, w + kw", "d + kd, h + kh, w + KW - 1 - kw", "mirror|flip|reverse|kw"),
        ("tile[lane] += x", "tile[lane] = x", "Likely|expected"),
        ("filters[:OC] = weights", "filters[:OC] = weights\n    filters[-1] = 0", "Likely|expected"),
        ("(k - 1) // 2, k - 1 - (k - 1) // 2", "k - 1 - (k - 1) // 2, (k - 1) // 2", "shift|halo|voxel"),
        ("for ic in range(IC):", "for ic in range(IC // 2 * 2):", "channel"),
    ],
    "winograd": [
        ("m1 - m2 - m3]", "m1 - m2 + m3]", "expected"),
        ("m0 = (d0 - d2) * g0", "m0 = d0 * g0 - d2 * g0", "5 products of data and taps; expected 4"),
        ("return [m0 + m1 + m2, m1 - m2 - m3]", "return [d0*g2+d1*g1+d2*g0, d1*g2+d2*g1+d3*g0]", "products"),
        ("(g0 + g1 + g2) * 0.5", "(g0 + g1 + g2)", "expected"),
        ("m4 * 8.0 + m5", "m4 * 8.0", "expected"),
        ("g0, g1, g2 = taps\n    m0 = (d0 - d2)", "g2, g1, g0 = taps\n    m0 = (d0 - d2)", "taps are reversed"),  # noqa: E501
    ],
    "traffic": [
        ("-(-IC // 16) * 16, -(-OC // 16) * 16", "IC, OC", "not rounded up to 16"),
        ("4 * voxels * ic, 4 * voxels * oc, 4 * 27 * IC * OC, 4 * 2 * oc", "voxels*ic, voxels*oc, 27*IC*OC, 2*oc", "4 bytes"),  # noqa: E501
        ("(dst + dst)", "dst", "must be read again"),
        ("4 * 27 * IC * OC", "0", "weights are not counted"),
        ("4 * 2 * oc", "0", "scale and shift are not counted"),
        ("return apart, fused", "return fused, apart", "expected"),
    ],
    "norm_backward": [
        ("- diff_shift / N - x * diff_scale / N", "", "mean and variance pass no gradient"),
        ("- diff_shift / N", "", "the mean passes no gradient"),
        ("- x * diff_scale / N", "", "the variance passes no gradient"),
        ("diff_src = scale * rstd", "diff_src = rstd", "the scale is missing"),
        ("(diff_dst * x).sum(0)", "(diff_dst * src).sum(0)", "unscaled src"),
        ("src.var(0)", "src.var(0, ddof=1)", "expected|NaN"),
        ("N = len(src)", "N = 8", "expected"),
    ],
    "ring": [
        ("+ chunk\n", "\n", "expected"),
        ("send(rank, (rank + 1) % N", "send(rank, (rank + 2) % N", "its neighbour"),
        ("    N = len(arrays)\n", "    return [sum(arrays)] * len(arrays)\n", "nothing was sent"),
        ("    N = len(arrays)\n", "    return [a.copy() for a in arrays]\n", "sent|its own array"),
        ("    N = len(arrays)\n", "    N = len(arrays)\n    send(0, 1 % N, arrays[0])\n", "at most, 2"),
        ("(rank - step) % N", "(rank + step) % N", "expected"),
        ("return tree <", "return tree >", "tree_wins for"),
        ("return tree <", "return ranks > 100 or 1 <", "tree_wins for"),
        ("return tree <", "return nbytes < 1000 or 1 <", "tree_wins for"),
        ("    N = len(arrays)\n", "    N = len(arrays)\n    arrays[0] += 1\n", "expected"),
    ],
}  # fmt: skip
#: Another right answer for each exercise, made from the solution.
ALSO_RIGHT = {
    "tape": ("1.0 if a.data > 0 else 0.0", "float(a.data > 0)"),
    "im2col": ("[(before, before)] * 3 + [(0, 0)]", "((before, before),) * 3 + ((0, 0),)"),
    "blocking": ("-(-C // 16)", "(C + 15) // 16"),
    "tile": ("for lane in range(16):\n                            dst", "for lane in range(15, -1, -1):\n                            dst"),  # noqa: E501
    "winograd": ("return [m0 + m1 + m2, m1 - m2 - m3]", "return (m0 + m1 + m2, m1 - (m2 + m3))"),
    "traffic": ("return apart, fused", "return [float(apart), float(fused)]"),
    "norm_backward": ("scale * rstd * (diff_dst - diff_shift / N - x * diff_scale / N)", "scale * rstd / N * (N * diff_dst - diff_shift - x * diff_scale)"),  # noqa: E501
    "ring": ("[np.concatenate(own) for own in chunks]", "np.stack([np.concatenate(own) for own in chunks])"),
}  # fmt: skip


def planted() -> Iterator[tuple[str, str, str, str]]:
    """Yield exercise, label, text of a file, and what must be said about it."""
    for name, exercise in EXERCISES.items():
        text = exercise.solution.read_text()
        yield name, "empty stub", stub(exercise.solution), "the stub is still empty"
        yield name, "syntax error", text + "\ndef broken(:\n", r"line \d+: "
        yield name, "a library", "import scipy\n" + text, "uses scipy; expected loops of your own"
        ours = f"from examples.exercises.solutions import {name} as _ours\n"
        yield name, "our solution", ours + text, "uses examples.exercises.solutions"
        hidden = "\ndef helper():\n    from kernels.ops import norms\n"
        yield name, "our kernel", text + hidden, "uses kernels.ops.norms; expected loops of your own"
        yield name, "no function", '"""Nothing."""\n', "defines no"
        if name in MAIN:
            for label, (line, words) in WRAPPERS.items():
                head = f"_kept, _right = {{}}, {MAIN[name]}\ndef {MAIN[name]}(*a):"
                wrapper = f"\n{head}\n    found = _right(*a)\n    {line}\n"
                yield name, label, text + wrapper, words
        for number, (old, new, words) in enumerate(MUTANTS[name]):
            assert text.count(old) >= 1, (name, old)
            yield name, f"change {number}", text.replace(old, new, 1), words


PLANTED = [*planted()]


def judged(name: str, text: str, folder: Path) -> None:
    path = folder / f"{name}.py"
    path.write_text(text)
    with student.guarded():
        EXERCISES[name].check(student.load_own(path))


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
    text = EXERCISES[name].solution.read_text()
    judged(name, text, tmp_path)
    old, new = ALSO_RIGHT[name]
    assert text.count(old) == 1
    judged(name, text.replace(old, new), tmp_path)


def test_eight_exercises_with_eight_mistakes_each() -> None:
    assert len(EXERCISES) >= 8
    for name in EXERCISES:
        assert sum(each[0] == name for each in PLANTED) >= 8


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_the_solution_without_answers(name: str) -> None:
    text, solution = stub(EXERCISES[name].solution), EXERCISES[name].solution.read_text()
    assert "answer>" not in text
    pieces = re.split(r" *# </?answer>\n", solution)
    for number, piece in enumerate(pieces):  # what is asked and the answer, in turn
        assert (piece in text) == (number % 2 == 0)
    assert text.count("raise NotImplementedError") == len(pieces) // 2
    compile(text, name, "exec")


def test_the_way_of_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start, hint, check the stub, solve, check again: the student's own file is what is run."""
    folder = ["--folder", str(tmp_path)]
    assert command.main(["start", "traffic", *folder]) == 0
    assert command.main(["start", "traffic", *folder]) == 1  # nothing of the student's is overwritten
    for number in (1, 2, 2):
        assert command.main(["hint", "traffic", *folder]) == 0
        assert capsys.readouterr().out.count("hint ") == number
    assert command.main(["check", "traffic", *folder]) == 1
    assert "the stub is still empty" in capsys.readouterr().err
    (tmp_path / "traffic.py").write_text(EXERCISES["traffic"].solution.read_text())
    assert command.main(["check", "traffic", *folder]) == 0
    elsewhere = EXERCISES["im2col"].solution
    assert command.main(["check", "im2col", str(elsewhere), *folder]) == 0
    assert "to reach: reached" in capsys.readouterr().out
    assert command.main(folder) == 0
    out = capsys.readouterr().out
    assert "x traffic" in out
    assert out.count("your machine") == 2


def test_from_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.exercises"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
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
