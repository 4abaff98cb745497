"""What goes wrong on a rank in the tests of faults: ``python faults.py SCENARIO ...``."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from tinyunet import commandline
from tinyunet.commandline import run
from tinyunet.common.errors import UserError
from tinyunet.data.cases import Case
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.pauses import Pauses
from tinyunet.training.samples import Loader
from tinyunet.training.settings import Settings
from tinyunet.training.validate import score_cases


def exception(ranks: Communicator) -> None:
    """One rank fails while the others wait for it in an allreduce."""
    if ranks.rank == ranks.size - 1:
        raise ZeroDivisionError("the thing that went wrong")
    ranks.allreduce_sum(np.ones(1_000_000))


def exception_inside(ranks: Communicator) -> None:
    """One rank fails inside of an operation that the others take part in."""

    def is_done() -> bool:
        raise RuntimeError("the thing that went wrong")

    if ranks.rank == 0:
        ranks.wait(is_done)
    ranks.barrier()


def exception_everywhere(ranks: Communicator) -> None:
    """All ranks fail in the same way at the same time."""
    ranks.barrier()
    raise ZeroDivisionError("the thing that went wrong")


class Unusual(BaseException):
    """What ``except Exception`` does not catch."""


def leaves(ranks: Communicator) -> None:
    """One rank raises what is no Exception, in the middle of a training."""
    kinds: dict[str, BaseException] = {
        "nothing": SystemExit(),
        "code": SystemExit(3),
        "unusual": Unusual("the thing that went wrong"),
        "interrupt": KeyboardInterrupt(),
    }
    with ranks.together():
        if ranks.rank == 1:
            raise kinds[sys.argv[2]]
    ranks.barrier()


def loader_hangs(ranks: Communicator) -> None:
    """One rank waits for a batch that never comes, the others for that rank."""

    class Hanging:
        def __getitem__(self, case: object) -> object:
            while ranks.rank == 1:
                time.sleep(60)
            return np.zeros((4, 4, 4, 1), np.float32), np.zeros((4, 4, 4), np.uint8)

    case = Case("a", (Path("a"),), Path("a"), 1, (0, 1))
    settings = Settings(patch_size=(4, 4, 4), patches_per_case=4, batch_size=2)
    batches = Loader([case], Hanging(), settings, ranks.rank, ranks.size).epoch(1)
    with Pauses(ranks, None):
        tell_process(ranks)
        next(batches)
        ranks.barrier()


def user_error(ranks: Communicator) -> None:
    """One rank meets, outside of any agreement, what the user can put right."""
    if ranks.rank == 1:
        raise UserError("the thing that went wrong")
    ranks.barrier()


def tell_process(ranks: Communicator) -> None:
    """Print rank and process."""
    sys.__stdout__.write(f"{ranks.rank} {os.getpid()}\n")
    sys.__stdout__.flush()


def wait(ranks: Communicator) -> None:
    """Wait for what never comes; the last rank computes."""
    tell_process(ranks)
    while ranks.rank == ranks.size - 1:
        np.ones(100_000).sum()
    ranks.allreduce_sum(np.ones(1_000_000))


def stall(ranks: Communicator) -> None:
    """Steps, in one of which some ranks stop for two seconds."""
    ranks.warn_of_stalls(0.5)
    late = [int(rank) for rank in sys.argv[2:]]
    for step in range(4):
        if step == 2 and ranks.rank in late:
            time.sleep(2.0)
        ranks.allreduce_sum(np.ones(3))


def stop(ranks: Communicator) -> None:
    """Steps, in which a rank is stopped as a whole; another wakes it up again."""
    ranks.warn_of_stalls(0.5)
    pids = ranks.gather(os.getpid())
    for step in range(20):
        if ranks.rank == 0 and step == 5:
            os.kill(pids[1], signal.SIGSTOP)
            os.system(f"(sleep 2; kill -CONT {pids[1]}) &")
        ranks.allreduce_sum(np.ones(3))


def masked(ranks: Communicator) -> None:
    """A signal whose exception becomes another one, as in a library's callback."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise RuntimeError("no compiled object yet") from None


def masked_twice(ranks: Communicator) -> None:
    """The same in a training, which only notes the first signal."""
    with Pauses(ranks, None):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1.2)
        masked(ranks)


def come_late(ranks: Communicator) -> None:
    """One rank stops, another comes when the others have waited for most of the time."""
    ranks.warn_of_stalls(2.0)
    ranks.barrier()
    time.sleep({1: 1.6, 2: 3.0}.get(ranks.rank, 0.0))
    ranks.barrier()


def scoring(ranks: Communicator) -> None:
    """One rank cannot read its case, while another has a long one."""

    class Unreadable:
        def __getitem__(self, case: object) -> object:
            if ranks.rank == 0:
                time.sleep(60)
            raise OSError(5, "Input/output error", "/data/x.nii.gz")

    score_cases(None, ["a", "b"], Unreadable(), (), ranks)  # type: ignore[arg-type]


def nothing(ranks: Communicator) -> None:
    """Nothing goes wrong."""


def end_before_mpi() -> None:
    """Let a rank be ended before it has found the others."""
    find_others = commandline.world

    def world() -> Communicator:
        if os.environ["PMI_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return find_others()

    commandline.world = world


if __name__ == "__main__":
    if "before MPI" in sys.argv:
        end_before_mpi()
    run("tinyunet.faults", globals()[sys.argv[1]])
