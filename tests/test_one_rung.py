"""One rung on one layer: bytes that are counted, the report, and the hot loop found in assembly."""

import json

import pytest

from kernels.workbench.assembly import hot_loop
from kernels.workbench.lessons import LESSONS, bytes_moved
from tinyunet import bench
from tinyunet.benchmarks import one_rung
from tinyunet.benchmarks.conv import DIRECTIONS, RUNGS, Layer
from tinyunet.benchmarks.one_rung import Report, Timed
from tinyunet.parallel.communicator import Communicator

# A loop of 2 multiply-adds, one of which reads memory, inside a loop that stores a sum on the stack.
X86 = """
_ZN4demo3sumB2v1Ev:
	.cfi_startproc
	xorl	%ecx, %ecx
.LBB0_1:
	vmovups	%zmm0, 64(%rsp)
	movq	8(%rsp), %rdx
.LBB0_2:
	prefetcht0	512(%rdi)
	vmovups	(%rdi), %zmm8
	vfmadd231ps	-64(%r9,%rbx,4){1to16}, %zmm8, %zmm0 # comment
	vfmadd231ps	%zmm1, %zmm8, %zmm2
	vmovups	128(%rsp), %zmm3
	incq	%rbx
	cmpq	%rbx, %r11
	jne	.LBB0_2
	vmovups	%zmm2, (%rax,%rcx)
	incq	%rcx
	jne	.LBB0_1
	vfmadd231ss	(%r9), %xmm8, %xmm0
	retq
.Lfunc_end0:
"""
ARM = """
demo:
.LBB1_1:
	ldp	q0, q1, [x0], #32
	ldr	x3, [x5]
	fmla	v2.4s, v0.4s, v1.s[0]
	str	q2, [sp, #16]
	subs	x1, x1, #1
	b.ne	.LBB1_1
	ret
.Lfunc_end1:
"""


def test_the_innermost_loop_is_found_and_marked():
    loop = hot_loop(X86)
    assert loop is not None
    assert loop.function == "demo.sum"
    kinds = [line.kinds for line in loop.lines]
    assert kinds == [("prefetch",), ("load",), ("FMA", "load"), ("FMA",), ("reload",), (), (), ()]
    assert (loop.lanes, loop.count("FMA"), loop.count("load")) == (16, 2, 2)
    assert "2 multiply-adds (16 floats each), 2 loads, 0 stores, 1 spills and reloads" in loop.summary()


def test_a_loop_of_neon():
    loop = hot_loop(ARM)
    assert loop is not None
    assert [line.kinds for line in loop.lines] == [("load",), (), ("FMA",), ("spill",), (), ()]
    assert loop.lanes == 4


def test_without_a_multiply_add_there_is_no_hot_loop():
    assert hot_loop("demo:\n.LBB0_1:\n\tincq\t%rbx\n\tjne\t.LBB0_1\n.Lfunc_end0:\n") is None


def test_bytes_are_those_of_whole_arrays():
    layer = Layer(20, 16, 4, 3).sizes(4)
    src, dst, weights = 4 * 64 * 20, 4 * 64 * 16, 4 * 27 * 20 * 16
    assert sum(bytes_moved("naive", layer, "forward").values()) == src + dst + weights
    assert sum(bytes_moved("im2col", layer, "forward").values()) == src + dst + weights + 2 * 27 * src
    # 20 channels are two blocks, and the panel has a border of a voxel.
    blocked = src + dst + weights + 2 * 4 * 6**3 * 32 + 2 * dst
    assert sum(bytes_moved("direct", layer, "forward").values()) == blocked
    back = bytes_moved("naive", layer, "backward_data")
    assert back == {"diff_dst, read": dst, "weights, read": weights, "diff_src, written": src}
    for rung in LESSONS:
        assert min(bytes_moved(rung, layer, DIRECTIONS[2]).values()) > 0


def test_the_list_of_rungs_is_that_of_the_table():
    names = [system.name for system in RUNGS]
    assert list(LESSONS) == names
    assert [*bench.RUNGS] == names


def test_the_report_says_what_limits_and_what_is_noise():
    rung, before = Timed("direct", 2.0, 0.1, False), Timed("blocked", 2.1, 0.05, False)
    report = Report(Layer(16, 16, 8, 3), "forward", rung, before, {"src, read": 1000}, 8000.0, 50.0, 2.0)
    assert report.roof == 16.0
    text = one_rung.text(report)
    assert "8.0 operations a byte: memory's bandwidth" in text
    assert "1.05 times as fast as blocked, which took 2.1 ms in turn with it (within the noise" in text
    faster = report._replace(rung=rung._replace(ms=1e-4))
    assert "2.1e+04 times as fast as blocked, which took 2.1 ms in turn with it." in one_rung.text(faster)
    assert "It exceeds the peak" in one_rung.text(faster)


@pytest.mark.parametrize("direction", [None, "backward_weights"])
def test_the_command_reports_and_lists_the_loop(direction, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(one_rung, "_SECONDS", 0.0)
    arguments = ["conv", "--layer", "4,16,6", "--rung", "naive", "--asm"]
    files = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.png")]
    bench.main(Communicator(), arguments + files + (["--direction", direction] if direction else []))
    out = capsys.readouterr().out
    assert f"naive, {direction or 'forward'}, 4 -> 16 channels, 6^3 voxels" in out
    assert "* naive" in out
    assert "multiply-adds (one float each)" in out
    assert "\nFMA" in out
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["gflops"] == pytest.approx(2 * 27 * 4 * 16 * 6**3 / row["min_ms"] / 1e6)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_rung_alone_gets_its_row_of_the_table(monkeypatch, capsys):
    monkeypatch.setattr("tinyunet.benchmarks.conv._SECONDS", 0.0)
    monkeypatch.setattr("tinyunet.benchmarks.conv.unet_layers", lambda size: [Layer(4, 16, 6, 1)])
    bench.main(Communicator(), ["conv", "--rung", "im2col", "--threads", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert len(rows) == 3
    assert "im2col" in rows[2]
