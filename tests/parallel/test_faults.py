"""Whatever ends one rank ends all, and is told once; who stalls is named."""

import itertools
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from launcher import MPIRUN, launch, needs_mpi

from tinyunet.common.errors import ENDING
from tinyunet.parallel import sentinel

pytestmark = needs_mpi

FAULTS = Path(__file__).parent / "faults.py"
SAID = "the thing that went wrong"
# From a fault to the end of all ranks; much less on a machine with nothing else to do.
SECONDS = 20


@contextmanager
def started(ranks: int, scenario: str = "wait") -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """Ranks of which one does not come and the others wait for it, and their processes."""
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, str(FAULTS), scenario]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pids = dict(map(int, process.stdout.readline().split()) for _ in range(ranks))
        time.sleep(0.2)  # until they wait
        yield process, pids
    finally:
        process.kill()


def gone(pids: dict[int, int]) -> bool:
    """Whether no process of the ranks is left."""
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def said_soon(capfd: pytest.CaptureFixture[str]) -> str:
    """What a process that tests have started says on stderr within seconds."""
    deadline, said = time.monotonic() + SECONDS, ""
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
        said = capfd.readouterr().err
    return said


def call(address: str, messages: list[bytes], user: int) -> None:
    """Say something to the sentinel as a process of a user, and end."""
    child = os.fork()
    if not child:
        try:
            os.setuid(user)
            for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
                with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as line:
                    line.connect(f"\0{address}")
                    for message in messages:
                        line.sendall(message)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scenario", ["exception", "exception_inside", "exception_everywhere"])
def test_an_exception_of_a_rank_ends_all_and_is_shown_once(scenario, ranks):
    done = launch([FAULTS, scenario], ranks, seconds=60)
    assert done.returncode == 1
    assert done.stderr.count(f"Error: {SAID}\n") == 1
    assert done.stderr.count("Traceback") == 1
    failed = ranks - 1 if scenario == "exception" else 0
    assert f"tinyunet.faults: rank {failed} failed\n" in done.stderr
    assert "killed" not in done.stderr


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("nothing", 1, "tinyunet.faults: rank 1 failed\n"),
        ("code", 3, "SystemExit: 3\n"),
        ("unusual", 1, f"Unusual: {SAID}\n"),
        ("interrupt", 130, "tinyunet.faults: interrupted\n"),
    ],
)
def test_a_rank_that_leaves_in_any_way_ends_all(how, code, told):
    done = launch([FAULTS, "leaves", how], 2, seconds=SECONDS)
    assert done.returncode == code
    assert done.stderr.count(told) == 1
    assert done.stderr.count("Traceback") == (how != "interrupt")


def test_help_is_shown_once_and_ends_well():
    done = launch(["-m", "tinyunet.train", "--help"], 2, seconds=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage:") == 1


def test_an_error_of_the_user_on_one_rank_is_one_line():
    done = launch([FAULTS, "user_error"], 3, seconds=60)
    assert done.returncode == 2
    assert done.stderr.count(f"tinyunet.faults: {SAID}\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_rank_that_is_killed_is_named_and_ends_all(victim):
    with started(4) as (process, pids):
        os.kill(pids[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=SECONDS)
        assert gone(pids)
    assert process.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("tinyunet")]
    assert re.match(rf"tinyunet\.faults: rank {victim} \(process {pids[victim]} on \S+\) was killed", line)


@pytest.mark.parametrize(
    ("number", "to_one_rank"),
    # MPICH's mpirun does not pass on SIGHUP.
    [*itertools.product([signal.SIGTERM, signal.SIGINT], [True, False]), (signal.SIGHUP, True)],
)
def test_a_signal_to_a_rank_or_to_all_ends_all_with_one_line(number, to_one_rank):
    with started(3) as (process, pids):
        os.kill(pids[1] if to_one_rank else process.pid, number)
        _, err = process.communicate(timeout=SECONDS)
        assert gone(pids)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("tinyunet")]
    assert len(lines) == 1, err
    (line,) = lines
    assert line == f"tinyunet.faults: {ENDING[number]}"
    assert "Traceback" not in err


def test_a_second_signal_ends_ranks_of_which_one_waits_for_its_disk():
    with started(2, "loader_hangs") as (process, pids):
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        os.kill(pids[1], signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
        assert gone(pids)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("tinyunet.faults: terminated") == 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_exit_code_tells_of_a_signal(ranks):
    with started(ranks) as (process, pids):
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert gone(pids)
    assert process.returncode == 128 + signal.SIGTERM


def test_an_error_while_others_score_long_cases_ends_all():
    done = launch([FAULTS, "scoring"], 2, seconds=SECONDS)
    assert done.returncode == 2
    assert "tinyunet.faults: /data/x.nii.gz: Input/output error\n" in done.stderr


@pytest.mark.parametrize("scenario", ["masked", "masked_twice"])
def test_a_signal_that_became_another_exception_is_one_still(scenario):
    done = launch([FAULTS, scenario], 1, seconds=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "tinyunet.faults: terminated\n"


def test_a_signal_before_the_ranks_have_met_ends_all():
    done = launch([FAULTS, "nothing", "before MPI"], 2, seconds=SECONDS)
    assert done.returncode != 0
    assert "tinyunet" not in done.stderr


def test_a_rank_is_not_named_before_all_could_be(capfd):
    address = f"tinyunet-test-{os.getpid()}"
    sentinel.start(address, "tinyunet.faults", ranks=2)
    line = sentinel.Line(address, 0)
    line._socket.close()  # as if it was killed
    assert said_soon(capfd).startswith("tinyunet.faults: a rank (process ? on ")


@pytest.mark.parametrize("user", [os.getuid(), 65534])
def test_what_strangers_say_to_the_sentinel_counts_for_nothing(capfd, user):
    if user != os.getuid() != 0:
        pytest.skip("only root can be another user")
    address, said = f"tinyunet-strangers-{os.getpid()}-{user}", b"rank 1 (process 7"
    sentinel.start(address, "tinyunet.faults", ranks=2)
    lines = [sentinel.Line(address, 0)]
    dice = random.Random(0)
    calls = [[], [b""], [b"leave"], [said[:-1]], [said * 9], [b"\xff" + said], [said + b"leave"]]
    calls += [[dice.randbytes(dice.randrange(200)), b"leave"] for _ in range(50)]
    # Of one's own user only ranks know these words.
    calls += [[said], [said, b"leave"]] * (user != os.getuid())
    for messages in calls:
        call(address, messages, user)
    lines.append(sentinel.Line(address, 1))
    assert capfd.readouterr().err == ""
    lines[1]._socket.close()  # as if it was killed
    expected = f"tinyunet.faults: rank 1 (process {os.getpid()} on {platform.node()}) was killed, "
    assert said_soon(capfd).startswith(expected)


def test_the_launcher_of_another_mpi_is_told():
    elsewhere = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    done = launch([FAULTS, "nothing"], 1, seconds=60, **elsewhere)
    assert done.returncode == 2
    assert "the launcher started 2 processes, and each of them finds itself alone" in done.stderr


def test_shared_memory_has_no_name_that_could_be_left():
    with started(2) as (_, pids):
        for pid in pids.values():
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert not re.search(r"/dev/shm/mpich_shm_\w+$", maps, re.MULTILINE)


@pytest.mark.parametrize(("late", "named"), [([1], "rank 1 on"), ([0], "rank 0 on"), ([1, 2], "rank 1 on")])
def test_ranks_that_stall_are_named_and_go_on(late, named):
    done = launch([FAULTS, "stall", *late], 4, seconds=60)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines
    others = 4 - len(late)
    for line in lines:
        assert line.startswith(f"tinyunet: {named}")
        assert line.endswith(f"{others} of 4 ranks wait for {'it' if len(late) == 1 else 'them'}")
        assert ("rank 2" in line) == (2 in late)


def test_a_rank_that_comes_late_is_not_named_for_another():
    done = launch([FAULTS, "come_late"], 4, seconds=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"tinyunet: rank 2 on \S+ has not come for 2 s; 3 of 4 ranks wait for it\n", done.stderr
    )


def test_a_rank_that_was_stopped_is_named():
    done = launch([FAULTS, "stop"], 3, seconds=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("tinyunet: rank 1 on")


def test_nothing_is_said_while_all_goes_well():
    done = launch([FAULTS, "stall"], 4, seconds=60)
    assert (done.returncode, done.stderr) == (0, "")
