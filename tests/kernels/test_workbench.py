"""The workbench: planted mistakes are each rejected with the right words, right kernels of any form pass."""

import re

import numpy as np
import pytest

from kernels.workbench import Failure, check, student, timing
from kernels.workbench.__main__ import main
from kernels.workbench.diagnosis import reads
from kernels.workbench.trials import Trial

RIGHT = """
import numpy as np

def forward(src, weights):
    MB, D, H, W, IC = src.shape
    OC, _, KD, KH, KW = weights.shape
    before = [(k - 1) // 2 for k in (KD, KH, KW)]
    padded = np.zeros((MB, D + KD - 1, H + KH - 1, W + KW - 1, IC), np.float32)
    padded[:, before[0]:before[0] + D, before[1]:before[1] + H, before[2]:before[2] + W] = src
    dst = np.zeros((MB, D, H, W, OC), np.float32)
    for kd in range(KD):
        for kh in range(KH):
            for kw in range(KW):
                voxels = padded[:, kd:kd + D, kh:kh + H, kw:kw + W]
                dst += voxels @ weights[:, :, kd, kh, kw].T
    return dst

def backward_data(diff_dst, weights, src_shape):
    return forward(diff_dst, weights.swapaxes(0, 1)[:, :, ::-1, ::-1, ::-1])  # odd kernels only

def backward_weights(src, diff_dst, kernel):
    padded = np.pad(src, [(0, 0), *(((k - 1) // 2, k // 2) for k in kernel), (0, 0)])
    result = np.zeros((diff_dst.shape[-1], src.shape[-1], *kernel), np.float32)
    D, H, W = src.shape[1:4]
    for tap in np.ndindex(*kernel):
        voxels = padded[:, tap[0]:tap[0] + D, tap[1]:tap[1] + H, tap[2]:tap[2] + W]
        axes = [0, 1, 2, 3]
        result[(slice(None), slice(None), *tap)] = np.tensordot(diff_dst, voxels, (axes, axes))
    return result
"""
EINSUM = """
import numpy as np

def forward(src, weights, bias=None):
    K = weights.shape[2:]
    padded = np.pad(src, [(0, 0), *(((k - 1) // 2, k // 2) for k in K), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, K, axis=(1, 2, 3))
    dst = np.einsum("ndhwixyz,oixyz->ndhwo", windows, weights, dtype=np.float32)
    return dst if bias is None else dst + bias
"""
ODD = (1, 3)

# What is replaced in the right solution, by what, and words of the verdict.
WEIGHTS, END = "weights[:, :, kd, kh, kw].T", "    return dst"
MISTAKES = {
    "empty stub": ("    MB, D, H", "    return None\n    MB, D, H", "returns nothing"),
    "NaN": ("np.zeros((MB, D, H, W, OC)", "np.nan * np.ones((MB, D, H, W, OC)", "NaN"),
    "halo off by one": ("(k - 1) // 2", "k // 2 - (k > 1)", "shifted by one voxel along D, H, W: the halo"),
    "halo not zero": ("padded = np.zeros(", "padded = np.ones(", "only at borders: the halo is not zero"),
    "kernel reversed": (WEIGHTS, "weights[:, :, -1 - kd, -1 - kh, -1 - kw].T", "kernel reversed"),
    "one axis reversed": (WEIGHTS, "weights[:, :, kd, kh, -1 - kw].T", "reversed along W"),
    "axes mixed up": (
        WEIGHTS,
        "weights[:, :, kw, kh, kd].T",
        "mixed up: they are taken in the order W, H, D",
    ),
    "a tap missing": ("range(KW)", "range(max(KW - 1, 1))", "last tap along W is missing"),
    "equal elements only": (WEIGHTS, "weights[:, :, 0, 0, 0].T", "an index is wrong"),
    "channels exchanged": (WEIGHTS, f"({WEIGHTS} if IC != OC else {WEIGHTS}.T)", "are exchanged"),
    "multiples of 16 only": (END, f"    dst[..., OC // 16 * 16:] = 0\n{END}", "multiple of 16, wrong here"),
    "wrong by 0.1 %": (END, f"{END} * np.float32(1.001)", "1.001 times"),
    "noise": (END, f"{END} + 1e-3 * np.abs(dst).max() * np.sign(dst)", "too much for rounding in float32"),
    "first image only": (END, f"    dst[1:] = 0\n{END}", "image 0 only"),
    "in-place": (END, f"    src += 1\n{END}", "changes its input src"),
    "double": (END, f"{END}.astype(np.float64)", "returns float64"),
    "a list": (END, f"{END}.tolist()", "returns list"),
    "all zero": ("dst += voxels", "dst + voxels", "all zero"),
    "shape": (END, f"{END}[:, :, :, :-1]", "returns shape"),
    "exception": ("OC, _, KD", "OC, _, KD, _", "raises ValueError"),
    "syntax error": ("dst += voxels @", "dst += voxels @@", "line 15: invalid syntax"),
    "another library": (
        "import numpy as np",
        "import numpy as np\nfrom tinyunet import Tensor",
        "uses tinyunet",
    ),
    "the library's kernel": (
        END,
        "    from kernels.ladder import direct\n    return direct.forward(src, weights)",
        "calls kernels.ladder.direct.forward",
    ),
    "the library's kernel, named before": (
        "def forward(src, weights):",
        "from kernels.ladder.naive import forward as theirs\n\ndef forward(src, weights):\n"
        "    return theirs(src, weights)",
        "calls kernels.ladder.naive.forward",
    ),
    "cached": (
        END,
        "    return KEPT.setdefault((src.shape, weights.shape), dst)\n\nKEPT = {}",
        "returns the result of the first call",
    ),
    "depends on memory": (
        END,
        f"    dst += len(CALLS)\n    CALLS.append(0)\n{END}\n\nCALLS = []",
        "another result",
    ),
}


def written(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def verdict(path, name="forward", kernels=ODD):
    with student.guarded():
        module = student.load(path)
        check(student.passes(module)[name], name, examples=25, kernels=kernels)


@pytest.mark.parametrize("name", ["forward", "backward_data", "backward_weights"])
def test_a_right_pass_is_accepted(name, tmp_path):
    verdict(written(tmp_path, RIGHT), name)


def test_another_right_solution_is_accepted(tmp_path):
    verdict(written(tmp_path, EINSUM), kernels=(1, 2, 3))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(mistake, tmp_path):
    old, new, words = MISTAKES[mistake]
    assert old in RIGHT
    text = RIGHT.replace(old, new, 1)
    with pytest.raises(Failure, match=re.escape(words)):
        verdict(written(tmp_path, text))


BACKWARD = {
    "backward_data": ("[:, :, ::-1, ::-1, ::-1])  # odd", ")  # odd", "kernel not reversed"),
    "backward_weights": (
        "(slice(None), slice(None), *tap)",
        "(slice(None), slice(None), *tap[::-1])",
        "in the order",
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_a_mistake_of_a_gradient_is_named(name, tmp_path):
    old, new, words = BACKWARD[name]
    with pytest.raises(Failure, match=words):
        verdict(written(tmp_path, RIGHT.replace(old, new)), name, (3,))


def test_a_bias_that_is_forgotten_is_named(tmp_path):
    with pytest.raises(Failure, match="the bias is missing"):
        verdict(written(tmp_path, EINSUM.replace("dst + bias", "dst")))


def test_the_receptive_field_is_told():
    trial = Trial((1, 4, 4, 4, 1), (1, 1, 3, 3, 3))
    assert reads(trial, (0, 0, 1, 3, 0)) == (
        "it reads src[0, -1:2, 0:3, 2:5, :], of which 15 of 27 taps lie outside and count 0"
    )
    assert reads(trial, (0, 1, 1, 1, 0)).endswith("all inside")


def test_files_that_define_nothing(tmp_path):
    with pytest.raises(Failure, match="no such file"):
        student.load(tmp_path / "none.py")
    with student.guarded(), pytest.raises(Failure, match="defines none of forward"):
        student.passes(student.load(written(tmp_path, "x = 1")))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr("kernels.workbench.__main__._SIZE", 6)
    only = RIGHT[: RIGHT.index("def backward_data")]
    assert main([str(written(tmp_path, only))]) == 0
    out = capsys.readouterr().out
    assert "forward: right on every case" in out
    rows = [line.split()[0] for line in out.splitlines() if "%" in line]
    assert {*rows} == {"mine", "naive", "im2col", "blocked", "direct", "minimal_filtering", "winograd"}
    assert main([str(written(tmp_path, only.replace("range(KH)", "range(1)"))), "--check"]) == 1
    assert "wrong on 1 image of 4 x 4 x 4 voxels" in capsys.readouterr().err


def test_a_time_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "_fastest", lambda *_: 1e-9)
    with pytest.raises(Failure, match="cannot be"):
        timing.measure(lambda src, weights: None, size=8)


def test_a_result_kept_while_timed_is_refused():
    kept = {}

    def forward(src, weights):
        return kept.setdefault(src.shape, np.zeros((*src.shape[:4], 16), np.float32))

    with pytest.raises(Failure, match="last result of the timed runs is wrong"):
        timing.measure(forward, size=8)
