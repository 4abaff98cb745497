"""Train a U-Net to segment brain tumours: ``python -m tinyunet.train``, alone or under mpirun."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from typing import Any

from tinyunet.commandline import (
    Parser,
    add_execution,
    add_labels,
    number,
    run,
    size,
    use_threads,
    whole_number,
)
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.options import ALLREDUCES, COMPRESSIONS, FEW_PATCHES
from tinyunet.training.settings import Settings


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.train",
        description="Train a 3-D U-Net to segment brain tumours in MRI. Without options it makes "
        "a data set of phantoms, trains on it for some minutes, and tests the result.",
        epilog="On several processes: mpirun -n 4 python -m tinyunet.train. Results come in a "
        "folder of their own: best.npz and latest.npz (checkpoints), history.json, test.json, "
        "learning_curves.png and predictions.png.",
    )
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("the run"))
    _add_ranks(parser.add_argument_group("ranks (under mpirun)"))
    return parser


def _option(group: Any, name: str, text: str, **given: Any) -> None:
    """Add an option whose default is that of the setting of its name."""
    default = getattr(Settings, name.removeprefix("--").replace("-", "_"))
    group.add_argument(name, default=default, help=f"{text} (default: %(default)s)", **given)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data-path",
        metavar="DIR",
        help="folder of a Medical Segmentation Decathlon task (with dataset.json) or of BraTS "
        "cases; left out, phantoms are made in data/, or found there",
    )
    add_labels(group, "labels")
    _option(
        group,
        "--train-test-split",
        "share of the cases to train on; the others are for validation and test",
        type=number(0, 1),
        metavar="SHARE",
    )
    _option(
        group,
        "--validate-test-split",
        "share of those others to validate on after each epoch; what is left is the test at the end",
        type=number(0, 1),
        metavar="SHARE",
    )


def _add_model(group: Any) -> None:
    _option(
        group,
        "--filters",
        "channels of the first level; each level below has twice as many",
        type=whole_number(1),
        metavar="N",
    )
    _option(group, "--depth", "number of levels", type=whole_number(1, 20), metavar="N")
    group.add_argument(
        "--use-upsampling",
        action="store_true",
        help="on the way up repeat voxels, instead of learning a transposed convolution",
    )


def _add_training(group: Any) -> None:
    _option(group, "--epochs", "how often every training case is visited", type=whole_number(1), metavar="N")
    _option(
        group,
        "--patches-per-case",
        "patches cut from a case at each visit",
        type=whole_number(1),
        metavar="N",
    )
    group.add_argument(
        "--patch-size",
        type=whole_number(1),
        nargs="+",
        default=list(Settings.patch_size),
        metavar="N",
        help="voxels of a patch along its axes: one number for all, or three "
        f"(default: {' '.join(map(str, Settings.patch_size))})",
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="patches in a step, shared equally by all ranks (default: 4, or the next multiple of the ranks)",
    )
    _option(
        group,
        "--lr",
        "learning rate of Adam at its highest; it rises to it during the first twentieth of "
        "the steps, and falls to 0 until the last",
        type=number(0, 1e9),
        metavar="RATE",
    )
    _option(
        group,
        "--random-seed",
        "decides the first weights, the split, the patches and their augmentation; the same seed gives "
        "the same bits with --deterministic, on as many ranks and threads",
        type=whole_number(0, 2**63 - 1),
        metavar="N",
    )
    _option(
        group,
        "--accumulate",
        "add up the gradients of K batches for one step of the optimizer",
        type=whole_number(1),
        metavar="K",
    )
    group.add_argument(
        "--warmup-epochs",
        type=number(0, 1e9),
        metavar="E",
        help="epochs in which the learning rate rises (default: a twentieth of all steps)",
    )


def _add_run(group: Any) -> None:
    add_execution(group)
    group.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="threads of each rank (default: the cores of the node, divided among its ranks)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run, given by its folder or a checkpoint in it; without RUN with the latest "
        "in --output, or with a new one if there is none. The run keeps its settings",
    )
    group.add_argument(
        "--checkpoint-every",
        type=whole_number(1),
        metavar="STEPS",
        help="write a checkpoint each time after so many steps (default: every ten minutes), and "
        "after each epoch",
    )
    _option(group, "--output", "where each run gets a folder named by its time", metavar="DIR")


def _add_ranks(group: Any) -> None:
    group.add_argument(
        "--scale-lr",
        action="store_true",
        help="multiply --lr by the number of ranks, as one does when --batch-size grows with them",
    )
    group.add_argument(
        "--sync-batch-norm",
        action=BooleanOptionalAction,
        help="take batch norm's statistics over the patches of all ranks: N ranks with b patches "
        f"then are one with N b (default: if a rank has fewer than {FEW_PATCHES})",
    )
    _option(
        group,
        "--bucket-mb",
        "gradients that are sent at once, while backward goes on",
        type=number(0, 1e9),
        metavar="MB",
    )
    _option(
        group,
        "--allreduce",
        "how gradients are summed: by MPI (in shared memory on a node), or in messages written out here",
        choices=ALLREDUCES,
    )
    _option(
        group,
        "--compression",
        "what is sent: float32, or with --allreduce mpi bfloat16 with error feedback",
        choices=COMPRESSIONS,
    )
    _option(
        group,
        "--stall-warning",
        "name a rank that the others have waited for so long",
        type=number(0),
        metavar="SECONDS",
    )
    group.add_argument(
        "--timeline",
        metavar="FILE",
        help="write when each kernel ran and each bucket was on its way, a JSON file for each rank "
        "(of several, trace.json becomes trace.rank0.json, ...) that https://ui.perfetto.dev opens; the "
        "first 20 000 events, some hundred steps, are kept; a run that goes on "
        "writes one if this is given again",
    )


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options and train."""
    parser = make_parser()
    # An attribute that is there gets no default: what is not None in the end has been given.
    nothing = Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    with communicator.together():  # cores and folders may be others on other nodes
        options = vars(parser.parse_args(arguments, nothing))
        given = {name: value for name, value in options.items() if value is not None}
        threads, resume = given.pop("threads", None), given.pop("resume", None)
        if "patch_size" in given:
            given["patch_size"] = size(given["patch_size"])
        if resume is None:
            Settings(**given, ranks=communicator.size).check()
        use_threads(threads, communicator)
    # Imported here, so that a wrong option is told at once.
    from tinyunet.training.run import train

    train(given, communicator, resume)


if __name__ == "__main__":
    run("tinyunet.train", main)
