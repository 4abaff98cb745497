# ruff: noqa: E501 - a mistake is a line of a table
"""Operators and allreduces in the workbench: planted mistakes are named, right ones of any form pass."""

import re

import numpy as np
import pytest

from kernels.workbench import Failure, allreduce, operator_timing, operator_verdict, student
from kernels.workbench.__main__ import main
from kernels.workbench.definitions import DEFINITIONS, gradients, parameters
from kernels.workbench.ranks_of_threads import run

ELU = """
import numpy as np

operator = "elu"

def forward(src):
    return np.where(src > 0, src, np.exp(np.minimum(src, 0)) - 1)

def backward(diff_dst, src):
    slope = np.where(src > 0, 1, np.exp(np.minimum(src, 0)))
    return diff_dst * slope
"""
NORM = """
import numpy as np

operator = "batch_norm"
AXES = (0, 1, 2, 3)

def forward(src, scale, shift):
    mean = src.mean(AXES)
    variance = ((src - mean) ** 2).mean(AXES)
    x = (src - mean) / np.sqrt(variance + np.float32(1e-3))
    return x * scale + shift

def backward(diff_dst, src, scale, shift):
    mean = src.mean(AXES)
    rstd = 1 / np.sqrt(((src - mean) ** 2).mean(AXES) + np.float32(1e-3))
    x = (src - mean) * rstd
    N = np.float32(src.size // src.shape[-1])
    diff_shift, diff_scale = diff_dst.sum(AXES), (diff_dst * x).sum(AXES)
    diff_src = scale * rstd * (diff_dst - diff_shift / N - x * diff_scale / N)
    return diff_src, diff_scale, diff_shift
"""
RING = """
import numpy as np

def allreduce(array, ranks):
    N, rank = ranks.size, ranks.rank
    right, left, parts = (rank + 1) % N, (rank - 1) % N, np.array_split(array, N)
    for step in range(N - 1):
        parts[(rank - step - 1) % N] += ranks.sendrecv(parts[(rank - step) % N], right, source=left)
    for step in range(N - 1):
        parts[(rank - step) % N][:] = ranks.sendrecv(parts[(rank + 1 - step) % N], right, source=left)
    return array
"""
GATHER = """
import numpy as np

def allreduce(array, ranks):
    others = [r for r in range(ranks.size) if r != ranks.rank]
    sent = [ranks.Isend(array, other) for other in others]
    arrived = {ranks.rank: array} | {other: ranks.recv(source=other) for other in others}
    for request in sent:
        request.wait()
    return sum(arrived[r] for r in range(ranks.size))
"""
FORWARD, SLOPE = "np.where(src > 0, src, np.exp(np.minimum(src, 0)) - 1)", "return diff_dst * slope"
ELU_MISTAKES = {
    "empty stub": (f"return {FORWARD}", "raise NotImplementedError", "the stub is still empty"),
    "nothing": (f"return {FORWARD}", "pass", "returns nothing"),
    "NaN": (f"return {FORWARD}", f"return {FORWARD} * np.float32('nan')", "NaN or infinite"),
    "overflow": ("np.exp(np.minimum(src, 0)) - 1)\n\n", "np.exp(src) * np.cosh(src) / np.cosh(src) - 1)\n\n", "exp of a large"),
    "leaky relu": (FORWARD, "np.where(src > 0, src, np.float32(0.01) * src)", "this is forward of leaky_relu"),
    "a factor": (f"return {FORWARD}", f"return {FORWARD} * np.float32(1.001)", "1.001 times what it should be"),
    "negative side": (FORWARD, "np.where(src > 0, src, np.exp(np.minimum(src, 0)))", "only where src is negative"),
    "multiples of 16": (f"return {FORWARD}", f"dst = {FORWARD}\n    dst[..., dst.shape[-1] // 16 * 16:] = 0\n    return dst", "multiple of 16, wrong here: the tail"),
    "first image": (f"return {FORWARD}", f"dst = {FORWARD}\n    dst[1:] = 7\n    return dst", "image 0 only"),
    "kept": (f"return {FORWARD}", f"return KEPT.setdefault(src.shape, {FORWARD})\n\nKEPT = {{}}", "earlier call is kept"),
    "double": (f"return {FORWARD}", f"return np.float64({FORWARD})", "returns float64"),
    "in place": (f"return {FORWARD}", f"src += 1\n    return {FORWARD}", "changes its input src"),
    "reversed": (f"return {FORWARD}", "return np.where(src > 0, src, np.exp(np.minimum(src, 0)) - 1)[..., ::-1, :].copy()", "only where all elements are equal"),
    "memory": (f"return {FORWARD}", f"CALLS.append(0)\n    return {FORWARD} + np.float32(len(CALLS))\n\nCALLS = []", "another result"),
    "derivative alone": (SLOPE, "return slope", "this is the derivative alone"),
    "identity": (SLOPE, "return diff_dst.copy()", "passed on as it came"),
    "gradient of relu": ("np.where(src > 0, 1, np.exp(np.minimum(src, 0)))", "np.where(src > 0, np.float32(1), np.float32(0))", "this is backward of relu"),
    "gradient with a factor": (SLOPE, f"{SLOPE} * np.float32(2)", "every number is 2 times"),
    "an error": (SLOPE, "return diff_dst[99]", "raises IndexError"),
    "the library": ("import numpy as np", "import numpy as np\nfrom kernels.ops import activation", "uses kernels.ops.activation"),
    "no operator": ('"elu"', '"ulu"', "'ulu' is not known; expected relu, leaky_relu, elu"),
    "syntax": ("def forward(src):", "def forward(src:", "line 6"),
}  # fmt: skip
NORM_MISTAKES = {
    "constant statistics": (" - diff_shift / N - x * diff_scale / N", "", "mean and variance pass no gradient"),
    "constant mean": (" - diff_shift / N", "", "the mean passes no gradient"),
    "constant variance": (" - x * diff_scale / N", "", "the variance passes no gradient"),
    "no scale": ("diff_src = scale * rstd", "diff_src = rstd", "the scale is missing"),
    "src in place of x": ("(diff_dst * x).sum", "(diff_dst * src).sum", "src is taken as it is"),
    "one gradient": ("return diff_src, diff_scale, diff_shift", "return diff_src", "expected diff_src, diff_scale, diff_shift"),
    "instance norm": ("AXES = (0, 1, 2, 3)", "AXES = (1, 2, 3)", r"returns shape \(1, 3\); expected \(3,\)"),
    "small difference": ("variance = ((src - mean) ** 2).mean(AXES)", "variance = np.maximum((src * src).mean(AXES) - mean * mean, 0)", "digits are lost"),
    "no scale in forward": ("return x * scale + shift", "return x + shift", "the scale is missing"),
    "no shift": ("return x * scale + shift", "return x * scale", "the shift is missing"),
    "shift first": ("return x * scale + shift", "return (x + shift) * scale", "the shift is added before the scale"),
    "no mean": ("x = (src - mean) / np", "x = src / np", "wrong on"),
    "another epsilon": ("np.sqrt(variance + np.float32(1e-3))", "np.sqrt(variance + np.float32(1e-5))", "epsilon is 1e-05; expected 0.001"),
    "no epsilon": ("np.sqrt(variance + np.float32(1e-3))", "np.sqrt(variance)", "epsilon is missing; expected 0.001"),
    "epsilon outside": ("np.sqrt(variance + np.float32(1e-3))", "(np.sqrt(variance) + np.float32(1e-3))", "epsilon is added to the standard deviation"),
    "N - 1": ("variance = ((src - mean) ** 2).mean(AXES)", "variance = src.var(AXES, ddof=1)", "the variance divides by N - 1; expected N"),
    "unbiased": ("N = np.float32(src.size // src.shape[-1])", "N = np.float32(max(src.size // src.shape[-1] - 1, 1))", "wrong on"),
}  # fmt: skip
PART = "parts[(rank - step - 1) % N] += ranks"
RING_MISTAKES = {
    "nothing done": ("    N, rank", "    return array\n    N, rank", "each rank keeps its own array"),
    "empty stub": ("    N, rank", "    raise NotImplementedError\n    N, rank", "the stub is still empty"),
    "mean": ("    return array", "    return array / np.float32(N)", "the mean; expected the sum"),
    "maximum": (PART + ".sendrecv(parts[(rank - step) % N], right, source=left)", "part = parts[(rank - step - 1) % N]\n        np.maximum(part, ranks.sendrecv(parts[(rank - step) % N], right, source=left), out=part)", "the maximum; expected the sum"),
    "half precision": ("ranks.sendrecv(parts[(rank - step) % N], right, source=left)", "ranks.sendrecv(parts[(rank - step) % N].astype(np.float16), right, source=left)", "with too few digits"),
    "0.1 %": ("    return array", "    return array * np.float32(1.001)", "1.001 times the sum"),
    "NaN": ("    return array", "    return array * np.float32('nan')", "NaN or infinite"),
    "kept": ("    return array", "    return KEPT.setdefault((N, array.size), array.copy())\n\nKEPT = {}", "earlier call is kept"),
    "not added": (PART, "parts[(rank - step - 1) % N][:] = ranks", "are missing"),
    "twice": ("    return array", "    parts[0] += N - 1 == 1 and rank == 0\n    return array", "no sum of the ranks"),
    "no second round": ("    for step in range(N - 1):\n        parts[(rank - step) % N][:]", "    for step in range(0):\n        parts[(rank - step) % N][:]", "are missing"),
    "only whole parts": ("np.array_split(array, N)", "[array[i * (array.size // N):(i + 1) * (array.size // N)] for i in range(N)]", "last parts are shorter"),
    "all send first": ("ranks.sendrecv(parts[(rank - step) % N], right, source=left)", "both(ranks, parts[(rank - step) % N], right, left)", "all ranks wait for ever"),
    "to nobody": ("right, left, parts = (rank + 1) % N", "right, left, parts = rank + 1", "expected another rank"),
    "an error": ("    return array", "    return array[99:].reshape(7)", "raises ValueError"),
    "a list": ("    return array", "    return list(array)", "returns list"),
    "a message too many": ("    return array", "    N > 1 and rank == 0 and ranks.isend(array, 1)\n    return array", "rank 1 never receives"),
    "shared memory": ("    N, rank", "    return shared(array, ranks)\n    N, rank", "messages only"),
}  # fmt: skip
HELPERS = """
def both(ranks, part, right, left):
    ranks.send(part, right)
    return ranks.recv(source=left)

import threading
BOX, LOCK = {}, threading.Barrier(1)

def shared(array, ranks):
    import sys
    box = sys.modules[__name__].__dict__.setdefault("BOX%d" % ranks.size, {})
    box[ranks.rank] = array.copy()
    for other in range(ranks.size):  # one byte each, to wait
        if other != ranks.rank:
            sent = ranks.isend(0, other)
            ranks.recv(source=other)
            sent.wait()
    return sum(box[r] for r in range(ranks.size))

def own_order(array, ranks):
    total, part = array.copy(), array
    for step in range(ranks.size - 1):
        part = ranks.sendrecv(part, (ranks.rank + 1) % ranks.size, source=(ranks.rank - 1) % ranks.size)
        total = total + part
    return total
"""


def written(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def judged(tmp_path, text):
    module = student.load_own(written(tmp_path, text))
    operator_verdict.check(operator_verdict.operator_of(module), examples=8)


@pytest.mark.parametrize("text", [ELU, NORM])
def test_right_operators_are_accepted(text, tmp_path):
    judged(tmp_path, text)


def test_a_definition_of_the_students_own(tmp_path):
    own = ELU.replace('"elu"', "lambda src: np.where(src > 0, src, np.expm1(src))")
    judged(tmp_path, own)
    with pytest.raises(Failure, match="wrong"):
        judged(tmp_path, own.replace("np.expm1(src)", "2 * np.expm1(src)"))


CHANGES = [(ELU, name, *change) for name, change in ELU_MISTAKES.items()]
CHANGES += [(NORM, name, *change) for name, change in NORM_MISTAKES.items()]


@pytest.mark.parametrize(("text", "label", "old", "new", "words"), CHANGES, ids=[c[1] for c in CHANGES])
def test_a_planted_mistake_of_an_operator_is_named(text, label, old, new, words, tmp_path):
    assert old in text
    with pytest.raises(Failure, match=words):
        judged(tmp_path, text.replace(old, new, 1))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_finite_differences_are_the_derivative(name):
    """<gradient, v> is the slope of another, longer and extrapolated difference along v."""
    random, definition = np.random.default_rng(3), DEFINITIONS[name]
    inputs = [random.uniform(0.2, 1, (2, 1, 2, 2, 3))]
    inputs += [random.uniform(1, 2, 3) for _ in parameters(definition)[1:]]
    diff = random.standard_normal(inputs[0].shape)
    found = gradients(definition, inputs, diff)
    v = [random.standard_normal(array.shape) for array in inputs]

    def slope(h):
        ends = [definition(*(a + s * d for a, d in zip(inputs, v, strict=True))) for s in (h, -h)]
        return np.vdot(diff, ends[0] - ends[1]) / (2 * h)

    expected = (4 * slope(1e-4) - slope(2e-4)) / 3
    assert sum(np.vdot(g, d) for g, d in zip(found, v, strict=True)) == pytest.approx(expected, rel=1e-6)


def together(tmp_path, text):
    module = student.load_own(written(tmp_path, text + HELPERS))
    return allreduce.check(module.allreduce, examples=8)


@pytest.mark.parametrize("text", [RING, GATHER])
def test_right_allreduces_are_accepted(text, tmp_path):
    together(tmp_path, text)


def test_ranks_that_differ_by_rounding_are_named(tmp_path):
    text = RING.replace("    N, rank", "    return own_order(array, ranks)\n    N, rank")
    assert "but ranks differ by rounding, for example with" in together(tmp_path, text)
    assert together(tmp_path, RING) == ""


def test_messages_are_matched_as_in_mpi():
    """A send ends when a receive has been posted, not only when it is waited for; tags tell messages apart."""

    def exchange(ranks):
        other = 1 - ranks.rank
        first = ranks.irecv(source=other, tag=7)
        sent = ranks.isend("first", other, tag=3), ranks.isend("second", dest=other, tag=7)
        sent[1].wait()
        assert first.wait() == "second"
        found = ranks.recv(source=other)
        sent[0].Wait()
        return found, ranks.sendrecv(ranks.Get_rank(), other, 5, None, other, 5), ranks.Get_size()

    results, sent = run([exchange, exchange])
    assert results == [("first", 1, 2), ("first", 0, 2)]
    assert sent.messages == [3, 3]


def test_arrays_of_another_size_are_refused():
    def exchange(ranks):
        ranks.Sendrecv(np.zeros(3), 1 - ranks.rank, recvbuf=np.zeros(4), source=1 - ranks.rank)

    with pytest.raises(Failure, match=r"receives 3 numbers of float64 from rank . into an array of 4"):
        run([exchange, exchange])


@pytest.mark.parametrize("rung", allreduce.RUNGS)
def test_the_rungs_are_right_and_counted(rung):
    allreduce.check(allreduce.RUNGS[rung], examples=8)
    measured = allreduce.measure(allreduce.RUNGS[rung])
    assert measured.shares["yours"] == measured.shares[rung]
    assert measured.seconds["yours"] == measured.seconds[rung]


def test_the_bytes_and_times_of_the_rungs_are_those_of_the_formulas():
    found = allreduce.measure(allreduce.ring)
    assert found.shares["ring"] == {n: pytest.approx(2 * (n - 1) / n) for n in (2, 3, 4, 5)}
    alpha, beta = 1e-5, 1e-10
    assert found.seconds["ring"]["100 MB"] == pytest.approx(30 * (alpha + 1e8 / 16 * beta))
    assert found.seconds["tree"]["1 kB"] == pytest.approx(8 * (alpha + 1e3 * beta))
    assert found.seconds["root"]["1 MB"] == pytest.approx(30 * (alpha + 1e6 * beta))


@pytest.mark.parametrize("name", RING_MISTAKES)
def test_a_planted_mistake_of_an_allreduce_is_named(name, tmp_path):
    old, new, words = RING_MISTAKES[name]
    assert old in RING
    with pytest.raises(Failure, match=re.escape(words)):
        together(tmp_path, RING.replace(old, new, 1))


@pytest.mark.parametrize("name", ["ring", "recursive_halving"])
def test_the_products_algorithms_run_on_simulated_ranks(name):
    from tinyunet.parallel import algorithms

    def blocking(array, ranks):
        for requests in getattr(algorithms, name)(ranks, array):
            for request in requests:
                request.wait()

    allreduce.check(blocking, examples=8)


def test_ranks_that_wait_for_each_other_are_found():
    with pytest.raises(
        Failure, match="rank 0 waits to receive from rank 1, rank 1 waits to receive from rank 0"
    ):
        run([lambda ranks: ranks.recv(source=1), lambda ranks: ranks.recv(source=0)])
    with pytest.raises(Failure, match="rank 1 waits to receive from rank 0"):
        run([lambda ranks: None, lambda ranks: ranks.recv(source=0)])


def test_the_command_takes_all_kinds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(operator_timing, "_TIMED", (1, 4, 8, 8, 16))
    monkeypatch.setattr("kernels.workbench.operator_timing.Measured.text", lambda self: f"timed {self.name}")
    monkeypatch.setattr("time.perf_counter", iter(np.arange(0, 1e6)).__next__)
    assert main([str(written(tmp_path, ELU))]) == 0
    out = capsys.readouterr().out
    assert "forward of elu: right on every case" in out
    assert "timed backward of elu" in out
    assert main([str(written(tmp_path, RING))]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line and line[0] != " "}
    assert rows["mine"] == rows["ring"]
    assert main([str(written(tmp_path, RING.replace("+= ranks", "-= ranks")))]) == 1
    assert "allreduce: rank 0" in capsys.readouterr().err


def test_an_operator_that_does_not_work_is_not_timed():
    elu = operator_verdict.Operator("elu", DEFINITIONS["elu"], lambda src: KEPT[0], None)
    KEPT = [np.zeros((1, 64, 64, 64, 16), np.float32)]
    with pytest.raises(Failure, match="last result of the timed runs is wrong"):
        operator_timing.measure(elu)
