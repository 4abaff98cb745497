"""The benchmarks: who takes part, that nothing wrong is timed, tables, files, wrong options."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launcher import needs_mpi
from PIL import Image

from kernels.base import machine
from kernels.workbench import roofline
from tinyunet import bench
from tinyunet.benchmarks import conv, mpi, nets, race, systems
from tinyunet.benchmarks.peers import ours
from tinyunet.benchmarks.problem import CHANNELS, CLASSES, make
from tinyunet.benchmarks.process import Process, WorkerError, difference
from tinyunet.benchmarks.race import Outcome, Result
from tinyunet.benchmarks.systems import EAGER, PEERS, TENSORFLOW, Job, System
from tinyunet.commandline import run
from tinyunet.common.errors import AgreedError
from tinyunet.parallel.algorithms import ALGORITHMS
from tinyunet.parallel.communicator import Communicator

FAKE = System("fake", "Fake", "numpy", "fake_peer", ("step", "infer", "conv"))
ROW = ["system", "case", "size", "threads", "median_ms", "min_ms", "max_ms", "peak_gb"]
SMALL = ("--size", 16, "--threads", 1)
SMALL_NET = (*SMALL, "--filters", 4)

ONEDNN = "TF_ENABLE_ONEDNN_OPTS=1, tf.function"

RUNGS = [system.name for system in conv.RUNGS]

needs_tensorflow = pytest.mark.skipif(not TENSORFLOW.installed, reason="no TensorFlow here")


@pytest.fixture(scope="module")
def problem():
    return make(16, 1, 4)


@pytest.fixture(autouse=True)
def _workers_find_the_fake(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def command(capsys):
    """Run ``python -m tinyunet.bench`` in this process: exit code, stdout, stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run("tinyunet.bench", lambda ranks: bench.main(ranks, [str(a) for a in arguments]))
        return int(left.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def all_threads():
    """Set the threads back to all there are."""
    yield
    machine.set_threads(machine.cores())


def fakes(*faults, case="step"):
    return [Job(FAKE, case, 1, fault, {"fault": fault} if fault else {}) for fault in faults]


# ---- the problem -----------------------------------------------------------------------------------


def test_problem_is_the_same_again_and_in_a_worker(problem):
    for other in (make(16, 1, 4), pickle.loads(pickle.dumps(problem))):
        assert np.array_equal(problem.image, other.image)
        assert np.array_equal(problem.labels, other.labels)
        assert problem.weights.keys() == other.weights.keys()
        assert all(np.array_equal(a, other.weights[n]) for n, a in problem.weights.items())
    assert problem.filters == 4
    assert problem.image.shape == (1, 16, 16, 16, CHANNELS)
    assert {a.dtype for a in (problem.image, *problem.weights.values())} == {np.dtype(np.float32)}
    assert set(np.unique(problem.labels)) == set(range(CLASSES))
    assert np.array_equal(problem.one_hot().argmax(-1), problem.labels)


def swap(a, b):
    def change(weights):
        weights[a], weights[b] = weights[b], weights[a]

    return change


def turn_kernel(weights):
    weights["encoder.1.conv0.weights"] = weights["encoder.1.conv0.weights"].swapaxes(2, 4).copy()


def concatenate_the_other_way(weights):
    name = "decoder.3.conv0.weights"
    weights[name] = np.roll(weights[name], weights[name].shape[1] // 2, axis=1)


def forget_bias_of_head(weights):
    weights["head.bias"] = np.zeros_like(weights["head.bias"])


def forget_statistics(weights):
    for name in weights:
        if name.endswith("running_mean"):
            weights[name] = np.zeros_like(weights[name])


MISTAKES = {
    "scale and shift": ("step", swap("decoder.3.norm1.scale", "decoder.3.norm1.shift")),
    "a turned kernel": ("step", turn_kernel),
    "concatenation": ("step", concatenate_the_other_way),
    "no bias": ("step", forget_bias_of_head),
    "statistics": ("infer", swap("encoder.0.norm1.running_mean", "encoder.0.norm1.running_variance")),
    "no statistics": ("infer", forget_statistics),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_peer_that_mixes_weights_up_would_be_noticed(problem, mistake, all_threads):
    case, change = MISTAKES[mistake]
    mixed_up = problem._replace(weights=dict(problem.weights))
    change(mixed_up.weights)

    def result(of):
        if case == "infer":
            return ours.to_array(ours.infer(of)())
        step = ours.step(of)
        return np.array([step() for _ in range(3)])

    machine.set_threads(1)
    reference = result(problem)
    assert difference(result(problem), reference, EAGER.tolerance) == 0
    with pytest.raises(WorkerError, match="wrong: results differ"):
        difference(result(mixed_up), reference, EAGER.tolerance)


# ---- processes -------------------------------------------------------------------------------------


def test_a_race_times_everybody_in_every_round(problem):
    jobs = fakes("", "is another")
    outcome = race.race(jobs, problem, rounds=3, seconds=0)
    assert not outcome.failures
    for job, result in zip(jobs, outcome.results, strict=True):
        assert result.job == job
        assert result.version == "1.5"
        assert result.settings == "as good as can be for step"
        assert [len(turn) for turn in result.rounds] == [2, 2, 2]
        assert all(ms > 0 for ms in result.ms)
        assert 0.005 < result.built_gb <= result.peak_gb < 0.5
        assert result.error == 0


FAULTS = {
    "raises": "ValueError: no such operator",
    "dies": "exit code 3: the last line",
    "crashes": "SIGSEGV: more chatter",
    "is killed": "killed by the system, most likely for want of memory",
    "is NaN": "wrong: results from nan to nan, not 0 to 1",
    "is zero": "wrong: results differ by 7.0e-01, more than 0.0005",
    "is off": "wrong: results differ by 7.0e-04, more than 0.0005",
    "is NaN later": "ArithmeticError: the loss has become nan",
}


def test_each_failure_is_named_in_a_line_and_the_rest_goes_on(problem):
    outcome = race.race(fakes("", *FAULTS, "is last"), problem, rounds=2, seconds=0)
    assert [result.job.variant for result in outcome.results] == ["", "is last"]
    assert all(len(result.rounds) == 2 for result in outcome.results)
    assert outcome.failures == [f"Fake {name}, 1 thread: {why}" for name, why in FAULTS.items()]


def test_predictions_are_compared_voxel_by_voxel(problem):
    jobs = fakes("", "is off", "has another shape", case="infer")
    outcome = race.race(jobs, problem, rounds=1, seconds=0)
    assert [result.job for result in outcome.results] == jobs[:1]
    off, shape = outcome.failures
    assert off.endswith("differ by 2.5e-03, more than 0.0005")
    assert shape.endswith("results of shape (1, 16, 16, 16), not (1, 16, 16, 16, 4)")


def test_processes_that_do_not_fit_together_are_started_anew(problem, monkeypatch):
    monkeypatch.setattr(race, "machine_memory", lambda: (1.0, 0.0))
    started = []

    class Counted(Process):
        def __init__(self, peer, threads):
            started.append(threads)
            super().__init__(peer, threads)

    monkeypatch.setattr(race, "Process", Counted)
    outcome = race.race(fakes("", "is another"), problem, rounds=2, seconds=0)
    assert [len(result.rounds) for result in outcome.results] == [2, 2]
    assert len(started) == 4


def test_the_machine_is_not_run_out_of_memory(problem, monkeypatch):
    from tinyunet.benchmarks import process

    worker = Process("fake_peer", 1)
    monkeypatch.setattr(process, "machine_memory", lambda: (20.0, 0.1))
    try:
        with pytest.raises(WorkerError, match=r"^stopped, because the machine's 20 GB of memory"):
            worker.ask("build", "step", {"fault": "is slow"}, problem)
    finally:
        worker.end()


def test_what_a_worker_has_started_ends_with_it(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    race.race(fakes("has a child"), problem, rounds=1, seconds=0)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or _is_dead(child):
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("a child of a worker has outlived it")


def _is_dead(pid):
    """A zombie, where nobody collects it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_ctrl_c_keeps_what_was_measured(problem, monkeypatch):
    turns, take_turn = [], Result.take_turn

    def third_is_interrupted(self, *arguments):
        turns.append(self.job)
        if len(turns) == 3:
            raise KeyboardInterrupt
        take_turn(self, *arguments)

    monkeypatch.setattr(Result, "take_turn", third_is_interrupted)
    outcome = race.race(fakes("", "is another"), problem, rounds=3, seconds=0)
    assert isinstance(outcome.stopped, KeyboardInterrupt)
    assert [len(result.rounds) for result in outcome.results] == [1, 1]


# ---- tables, from made-up times --------------------------------------------------------------------


def made_up(job, ms, peak_gb=1.0, error=1e-6):
    """Three rounds on a machine that gets slower: ratios of one round are exact all the same."""
    return Result(job, "1.0", [[ms, ms], [2 * ms, 2 * ms], [4 * ms, 5 * ms]], 0.5, peak_gb, error)


@pytest.fixture
def made_up_race(monkeypatch):
    """Compiled 100 ms on two threads, eager twice, TensorFlow four times, each pass a quarter."""

    def entered(jobs, problem, *arguments, **named):
        ms = {"eager": 200.0, "compiled": 100.0, "tensorflow": 400.0}
        return Outcome(
            [
                made_up(job, ms[job.system.key] * (1.25 if job.variant else 1) * 2 / job.threads)
                for job in jobs
                if job.system.key in ms
            ],
            ["PyTorch: a reason"],
        )

    monkeypatch.setattr(nets, "race", entered)
    monkeypatch.setattr(nets, "variants", lambda: [("without a pass", {"disable": ["a"]})])
    here = ("eager", "compiled", "tensorflow")
    monkeypatch.setattr(System, "installed", property(lambda system: system.key in here))


def made_up_ranks(ranks, task, wrapper=()):
    """Steps of 50 ms a patch, a fifth more beside others; messages of 20 us and 1 GB/s."""
    if task["do"] == "train":
        times = {"seconds": 0.05 * task["batch"], "backward_end": 0.09, "waited": 0.002}
        found = times | {"buckets": [(0.02, 4_000_000), (0.09, 1_000)]}
        if task.get("in_turn"):
            found |= {"seconds": 0.12, "alone": 0.09, "beside": 0.1, "together": 0.12}
            found |= {"efficiency": 0.75, "beside_efficiency": 0.9}
        return found
    seconds = [2e-5 + 1e-9 * size for size in task["sizes"]]
    return {name: [2 * s for s in seconds] for name in task["algorithms"]} | {"exchange": seconds}


LINES = {
    "step": [
        r"tinyunet eager +1\.0 +400\.0 +200\.0 +1000 +2\.00 x +1\.00 +1e-06",
        r"tinyunet compiled +1\.0 +200\.0 +100\.0 +500\.0 +4\.00 x +1\.00 +1e-06",
        r"TensorFlow +1\.0 +800\.0 +400\.0 +2000 +1\.00 x +1\.00 +1e-06",
    ],
    "infer": [r"tinyunet compiled +1\.0 +200\.0 +100\.0 +500\.0 +4\.00 x +1\.00 +1e-06"],
    "memory": [r"tinyunet compiled +1\.0 +1\.00 +0\.50 +100% +200\.0"],
    "passes": [
        r"tinyunet compiled +200\.0 +100\.0 +500\.0 +\+0% +1\.00 +1e-06",
        r"without a pass +250\.0 +125\.0 +625\.0 +\+25% +1\.00 +1e-06",
    ],
    "scaling": [
        r"ms on threads: +1 +2 +x",
        r"tinyunet compiled +400\.0 +200\.0 +2\.00",
        r"ranks x 1 thread +patches a rank +step ms +waited ms +efficiency",
        r"ranks x 1 thread +patches a rank +step ms +waited ms +efficiency +alone ms +beside",
        r"1 +2 +100\.0 +2\.00 +1\.00 +100\.0 +1\.00",
        r"2 +2 +120\.0 +2\.00 +0\.75 +90\.0 +0\.90",
        r"2 +2 +120\.0 +2\.00 +0\.83",
        r"1 +4 +200\.0 +2\.00 +1\.00",
        # Two messages, and the array once: half each way, twice.
        r"allreduce here: 20\.0 us a message, 0\.5 GB/s",
        # 2 x 1023 messages of 50 us for each of two buckets, and 2 x 4.001 MB in 64 ms: 268.6 ms,
        # of which 70 are hidden behind the 100 of the step.
        r"1 Gbit/s ring +1\.00 +.* 0\.33",
    ],
}


def test_a_figure_within_the_noise_is_marked():
    base = Result(fakes("")[0], "1.0", [[10.0], [10.0], [10.0]])
    faster, unsure = (Result(base.job, "1.0", [[a], [8.0], [8.0]]) for a in (9.0, 11.0))
    assert not faster.is_noise(base)
    assert unsure.is_noise(base)
    assert not base.is_noise(base)
    cells = [nets._COLUMNS["faster"](result, base) for result in (faster, unsure, base)]
    assert cells == ["1.25 x", "~1.25 x", "1.00 x"]
    assert nets._COLUMNS["costs"](unsure, base) == "~-20%"
    once = [Result(base.job, "1.0", [[ms]]) for ms in (10.0, 5.0)]
    assert once[1].is_noise(once[0]), "one round says nothing of noise"


def test_a_table_that_was_stopped_is_printed(made_up_race, capsys, monkeypatch):
    entered = nets.race
    stopped = KeyboardInterrupt()
    monkeypatch.setattr(nets, "race", lambda *a, **n: entered(*a, **n)._replace(stopped=stopped))
    with pytest.raises(KeyboardInterrupt):
        bench.main(Communicator(), list(map(str, ("step", *SMALL_NET))))
    out = capsys.readouterr().out
    assert "TensorFlow" in out
    assert "stopped: this is what was measured before" in out


@pytest.mark.parametrize("table", LINES)
def test_tables_and_files(table, made_up_race, command, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    measured = roofline.Machine("a processor", 2, "avx512", "omp", 200.0, 30.0)
    monkeypatch.setattr(roofline, "describe", lambda: measured)
    monkeypatch.setattr(mpi, "run", made_up_ranks)
    files = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "picture.png")
    code, out, err = command(table, "--size", 16, "--filters", 4, "--batch", 2, *files)
    assert code == 0, err
    for line in LINES[table]:
        assert re.search(f"^{line}$", out, re.MULTILINE), out
    assert "16^3 voxels, batch 2, 4 filters" in out
    assert "\n\nPyTorch: a reason\n" in out
    if table not in ("passes", "scaling"):
        assert "PyTorch compiled: torch is not installed, skipped\n" in out

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["machine", "rows"] + ["ranks"] * (table == "scaling")
    assert figures["machine"].items() > measured._asdict().items()
    assert figures["machine"]["versions"]["tinyunet eager"] == "1.0"
    assert all(list(row) == ROW for row in figures["rows"])
    first = figures["rows"][0]
    label = "infer" if table == "infer" else "memory" if table == "memory" else "step"
    threads = 1 if table == "scaling" else 2
    ms = (800.0 / threads, 400.0 / threads, 2000.0 / threads)
    assert tuple(first.values()) == ("tinyunet eager", f"{label}, batch 2, 4 filters", 16, threads, *ms, 1.0)
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 100
        assert len(picture.getcolors(1 << 20)) > 10


def test_allreduce_table_and_files(command, tmp_path, monkeypatch):
    monkeypatch.setattr(mpi, "run", made_up_ranks)
    files = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "picture.png")
    code, out, err = command("allreduce", "--ranks", 4, *files)
    assert code == 0, err
    assert re.search(r"^bytes +mpi us +ring us +recursive-halving us +bound us +mpi GB/s", out, re.M)
    # 2 x 3 / 4 exchanges of 20 us + 1.024 us.
    assert re.search(r"^1,024 +42\.0 +42\.0 +42\.0 +31\.5 +0\.02", out, re.MULTILINE)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["algorithm"] for row in figures["ranks"]} == set(ALGORITHMS)
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 100


@needs_mpi
def test_ranks_are_really_run(monkeypatch):
    net = {"do": "train", "size": 16, "batch": 1, "filters": 4, "rounds": 1}
    for ranks, in_turn in ((1, False), (2, True)):
        found = mpi.run(ranks, net | {"in_turn": in_turn})
        assert 0 < found["backward_end"] < found["seconds"]
        assert 0 <= found["waited"] < found["seconds"]
        ready = [seconds for seconds, _ in found["buckets"]]
        assert ready == sorted(ready)
    for name, step in (("efficiency", "together"), ("beside_efficiency", "beside")):
        assert found[name] == found["alone"] / found[step] > 0
    found = mpi.run(2, {"do": "allreduce", "sizes": [1000], "algorithms": ["ring"]})
    assert 0 < found["ring"][0] < 1
    with pytest.raises(AgreedError, match="the ranks ended with code 1: KeyError"):
        mpi.run(2, {"do": "nothing"})


def test_default_peers(made_up_race, command, monkeypatch):
    monkeypatch.setattr(mpi, "run", made_up_ranks)
    assert "TensorFlow" in command("step", "--size", 16)[1]
    assert "TensorFlow" not in command("step", "--size", 16, "--against")[1]
    assert "TensorFlow" not in command("scaling", "--size", 16)[1]
    assert "TensorFlow" in command("scaling", "--size", 16, "--against", "tensorflow")[1]


def test_without_tensorflow_eager_is_the_measure(made_up_race, command):
    _, out, _ = command("step", "--size", 16, "--against")
    assert re.search(r"^tinyunet compiled .* 2\.00 x ", out, re.MULTILINE), out
    assert "faster: how many times faster than tinyunet eager, median" in out


def test_nothing_measured_is_an_error(monkeypatch, command, tmp_path):
    monkeypatch.setattr(nets, "race", lambda *_, **__: Outcome([], ["tinyunet eager: a reason"]))
    code, out, err = command("step", *SMALL, "--against", "--json", tmp_path / "figures.json")
    assert code == 2
    assert out.endswith("\ntinyunet eager: a reason\n")
    assert err.endswith("tinyunet.bench: nothing could be measured\n")
    assert not (tmp_path / "figures.json").exists()


def test_a_picture_that_fails_loses_no_figures(made_up_race, monkeypatch, command, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nets, "draw", full)
    files = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "picture.png")
    code, out, err = command("step", *SMALL, "--against", *files)
    told = f"tinyunet: could not draw {files[-1]}: No space left on device\n"
    assert (code, err) == (0, told)
    assert "tinyunet eager" in out
    assert rows_of(tmp_path / "figures.json")[0]["system"] == "tinyunet eager"


def test_a_ratio_is_never_shown_as_nothing():
    layer = conv.Layer(4, 16, 6, 3)
    for many, shown in ((0.5, " 2.0"), (1.0, " 1.0"), (25.0, "0.04")):
        one = conv.Measurement(layer, "Fake", "forward", [1.0], [many], 1e6, 10.0, 0, settings="s")
        table = conv.table([one._replace(direction=name) for name in conv.DIRECTIONS], 2)
        assert table.splitlines()[3].endswith(shown)
        assert table.endswith("\nFake: s")


def test_ranks_that_do_not_end_are_told(monkeypatch):
    monkeypatch.setattr(mpi, "_LONGEST_SECONDS", 0.01)
    with pytest.raises(AgreedError, match=r"^the ranks had not ended after 0\.01 s$"):
        mpi.run(1, {"do": "nothing"})


def test_thread_counts():
    assert nets.thread_counts(1) == [1]
    assert nets.thread_counts(2) == [1, 2]
    assert nets.thread_counts(6) == [1, 2, 4, 6]
    assert nets.thread_counts(8) == [1, 2, 4, 8]


def test_every_pass_is_switched_off_in_turn():
    from tinyunet.compiler.passes import NAMES

    settings = nets.Settings("passes", 16, 1, 4, 1, 1, [])
    jobs, _ = nets.entrants(settings)
    assert [job.options for job in jobs[:2]] == [{}, {}]
    options = [job.options for job in jobs]
    assert all({"disable": [name]} in options for name in NAMES)
    assert {"deterministic": True} in options
    assert len(jobs) == 2 + len(NAMES) + 3


# ---- end to end ------------------------------------------------------------------------------------


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("table", ["step", "infer"])
def test_this_project_against_tensorflow(table, command, tmp_path):
    """Small, but real: also the check that both compute the same."""
    peers = ["tensorflow"] if TENSORFLOW.installed else []
    arguments = ("--rounds", 1, "--json", tmp_path / "figures.json", "--against", *peers)
    code, out, err = command(table, *SMALL_NET, *arguments)
    assert code == 0, err
    names = ["tinyunet eager", "tinyunet compiled", *(["TensorFlow"] if peers else [])]
    assert [row["system"] for row in rows_of(tmp_path / "figures.json")] == names, out
    settings = json.loads((tmp_path / "figures.json").read_text())["machine"]["settings"]
    assert settings == dict.fromkeys(names[2:], ONEDNN)
    assert out.count(f"  {ONEDNN}\n") == len(peers)
    for row in rows_of(tmp_path / "figures.json"):
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert 0.05 < row["peak_gb"] < 5


@needs_tensorflow
@pytest.mark.parametrize("variable", [None, "0"])
def test_tensorflow_runs_onednn_whatever_it_would_choose(variable):
    """Of itself it does so on some processors only."""
    program = """
from tinyunet.benchmarks.peers import tensorflow
from tensorflow.python.util import _pywrap_util_port
print(_pywrap_util_port.IsMklEnabled())
"""
    environment = os.environ | ({"TF_ENABLE_ONEDNN_OPTS": variable} if variable else {})
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


OTHERS = [peer for peer in PEERS if peer != TENSORFLOW]


@pytest.mark.parametrize("peer", OTHERS, ids=[peer.key for peer in OTHERS])
def test_other_peers_compute_the_same(peer):
    # Two images: PyTorch takes no statistics of the single voxel that one has in the last level.
    problem = make(16, 2, 4)
    if not peer.installed:
        pytest.skip(f"no {peer.package} here")
    for case in set(peer.cases) - {"conv"}:
        outcome = race.race([Job(EAGER, case, 1), Job(peer, case, 1)], problem, 1, seconds=0)
        assert not outcome.failures


def test_conv_with_peers(command, tmp_path, monkeypatch):
    monkeypatch.setattr(conv, "unet_layers", lambda size: [conv.Layer(4, 16, 6, 3)])
    monkeypatch.setattr(conv, "_SECONDS", 0.0)
    wrong = FAKE._replace(name="Wrong")
    monkeypatch.setattr(systems, "PEERS", (TENSORFLOW, wrong))
    files = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "picture.png")
    code, out, err = command("conv", *SMALL, *files, "--against", "tensorflow")
    assert code == 0, err
    rungs = [*RUNGS, *(["TensorFlow"] if TENSORFLOW.installed else [])]
    table = [line.split(" | ")[0].split() for line in out.splitlines() if " | " in line]
    assert [cells[-1] for cells in table[2:]] == rungs, out
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows, peaks = figures["rows"], figures["peaks"]
    assert all(list(row) == ROW for row in rows)
    assert [row["system"] for row in peaks] == [row["system"] for row in rows]
    assert all(1 < row["gflops"] < 1000 for row in peaks)
    assert {row["case"] for row in rows} == {f"{d} 4->16 k3" for d in conv.DIRECTIONS}
    assert len(rows) == 3 * len(rungs)
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 100


def test_conv_names_a_wrong_peer():
    layers = [conv.Layer(4, 16, 6, 3), conv.Layer(16, 4, 6, 1)]
    measurements, failures, _ = conv.measure(layers, 1, [*conv.RUNGS, FAKE])
    names = [{m.name for m in measurements if m.layer == layer} for layer in layers]
    # There is no Winograd of a kernel of 1.
    assert names == [{*RUNGS}, {*RUNGS} - {"minimal_filtering", "winograd"}]
    assert failures == [
        "Fake:   4 ->  16    6^3 k3: forward is wrong: results differ by 1.0e+00, more than 0.0001"
    ]


# ---- wrong options ---------------------------------------------------------------------------------

WRONG = {
    "": "the following arguments are required: TABLE",
    "stp": "'stp'",
    "step --size 20": "--size: '20'; expected a multiple of 16",
    "step --size big": "--size: 'big'; expected a whole number of at least 16",
    "step --threads 0": "--threads: '0'; expected a whole number of at least 1",
    "step --threads 4096": "--threads: 4096; expected at most",
    "step --against keras": "'keras'",
    "step --against openvino": "'openvino'",
    "step --rounds 0": "--rounds: '0'",
    "memory --rounds 2": "unrecognized arguments: --rounds 2",
    "conv --layer 16,16": "--layer: '16,16'; expected IC,OC,SIZE or IC,OC,SIZE,K",
    "conv --layer 16,16,32,7": "--layer: '16,16,32,7'; expected",
    "conv --rung fast": "'fast'",
    "conv --asm": "--asm: lists one loop; expected --layer and --rung",
    "conv --batch 2": "unrecognized arguments: --batch 2",
    "step --json no/such/folder/file.json": "--json: 'no/such/folder/file.json'; expected a file in",
    "step --json /proc/file.json": "--json: '/proc/file.json'; expected a file in",
    "step --plot /": "--plot: '/'; expected a file in",
    "step --plot picture.txt": "--plot: 'picture.txt'; expected one of .png, .svg, .pdf",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_options_are_told_in_a_line(arguments, command):
    code, out, err = command(*arguments.split())
    assert code == 2
    assert not out
    assert err.startswith("tinyunet.bench: ")
    assert WRONG[arguments] in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "name"),
    [("--json", "figures.png"), ("--plot", "figures.png"), ("--plot", "figures-ranks.png")],
)
def test_the_file_of_someone_else_is_not_replaced(command, tmp_path, option, name):
    (tmp_path / name).write_text("a letter to the editor")
    code, _, err = command("step", option, tmp_path / "figures.png")
    assert (code, err.count("is there already, and this program did not write it")) == (2, 1)


def test_ranks_are_refused(command, monkeypatch):
    ranks = Communicator()
    ranks.size = 2
    with pytest.raises(ValueError, match="run without mpirun"):
        bench.main(ranks, ["step"])


def test_what_is_installed_is_found():
    assert EAGER.installed
    assert not EAGER._replace(package="no_such_package").installed
    assert TENSORFLOW.installed == (importlib.util.find_spec("tensorflow") is not None)
