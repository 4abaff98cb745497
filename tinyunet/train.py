"""Train a U-Net to segment brain tumours: ``python -m tinyunet.train``, alone or under mpirun."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from typing import Any

from tinyunet.commandline import Parser, add_execution, number, run, size, use_threads, whole_number
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.options import ALLREDUCES, COMPRESSIONS, FEW_PATCHES
from tinyunet.training.settings import Settings


def make_parser() -> Parser:
    """Return the options of the command."""
    default = Settings()
    parser = Parser(
        prog="python -m tinyunet.train",
        description="Train a 3-D U-Net to segment brain tumours in MRI. Without options it makes "
        "a data set of phantoms, trains on it for some minutes, and tests the result.",
        epilog="On several processes: mpirun -n 4 python -m tinyunet.train. Results come in a "
        "folder of their own: best.npz and latest.npz (checkpoints), history.json, test.json, "
        "learning_curves.png and predictions.png.",
    )
    _add_data(parser.add_argument_group("data"), default)
    _add_model(parser.add_argument_group("model"), default)
    _add_training(parser.add_argument_group("training"), default)
    _add_run(parser.add_argument_group("the run"), default)
    _add_ranks(parser.add_argument_group("ranks (under mpirun)"), default)
    return parser


def _add_data(group: Any, default: Settings) -> None:
    group.add_argument(
        "--data-path",
        metavar="DIR",
        help="folder of a Medical Segmentation Decathlon task (with dataset.json) or of BraTS "
        "cases; left out, phantoms are made in data/, or found there",
    )
    group.add_argument(
        "--train-test-split",
        type=number(0, 1),
        default=default.train_test_split,
        metavar="SHARE",
        help="share of the cases to train on; the others are for validation and test "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--validate-test-split",
        type=number(0, 1),
        default=default.validate_test_split,
        metavar="SHARE",
        help="share of those others to validate on after each epoch; what is left is the test at "
        "the end (default: %(default)s)",
    )


def _add_model(group: Any, default: Settings) -> None:
    group.add_argument(
        "--filters",
        type=whole_number(1),
        default=default.filters,
        metavar="N",
        help="channels of the first level; each level below has twice as many "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--depth",
        type=whole_number(1, 20),
        default=default.depth,
        metavar="N",
        help="number of levels (default: %(default)s)",
    )
    group.add_argument(
        "--use-upsampling",
        action="store_true",
        help="on the way up repeat voxels, instead of learning a transposed convolution",
    )


def _add_training(group: Any, default: Settings) -> None:
    group.add_argument(
        "--epochs",
        type=whole_number(1),
        default=default.epochs,
        metavar="N",
        help="how often every training case is visited (default: %(default)s)",
    )
    group.add_argument(
        "--patches-per-case",
        type=whole_number(1),
        default=default.patches_per_case,
        metavar="N",
        help="patches cut from a case at each visit (default: %(default)s)",
    )
    group.add_argument(
        "--patch-size",
        type=whole_number(1),
        nargs="+",
        default=list(default.patch_size),
        metavar="N",
        help="voxels of a patch along its axes: one number for all, or three "
        f"(default: {' '.join(map(str, default.patch_size))})",
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="patches in a step, shared equally by all ranks (default: 4, or the next multiple of "
        "the ranks)",
    )
    group.add_argument(
        "--lr",
        type=number(0, 1e9),
        default=default.lr,
        metavar="RATE",
        help="learning rate of Adam at its highest; it rises to it during the first twentieth of "
        "the steps, and falls to 0 until the last (default: %(default)s)",
    )
    group.add_argument(
        "--random-seed",
        type=whole_number(0, 2**63 - 1),
        default=default.random_seed,
        metavar="N",
        help="decides the first weights, the split, the patches and their augmentation "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=whole_number(1),
        default=default.accumulate,
        metavar="K",
        help="add up the gradients of K batches for one step of the optimizer (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-epochs",
        type=number(0),
        metavar="E",
        help="epochs in which the learning rate rises (default: a twentieth of all steps)",
    )


def _add_run(group: Any, default: Settings) -> None:
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
    group.add_argument(
        "--output",
        default=default.output,
        metavar="DIR",
        help="where each run gets a folder named by its time (default: %(default)s)",
    )


def _add_ranks(group: Any, default: Settings) -> None:
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
    group.add_argument(
        "--bucket-mb",
        type=number(0, 1e9),
        default=default.bucket_mb,
        metavar="MB",
        help="gradients that are sent at once, while backward goes on (default: %(default)s)",
    )
    group.add_argument(
        "--allreduce",
        choices=ALLREDUCES,
        default=default.allreduce,
        help="how gradients are summed: by MPI, or as written out here (default: %(default)s)",
    )
    group.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default=default.compression,
        help="what is sent: float32, or with --allreduce mpi bfloat16 with error feedback "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stall-warning",
        type=number(0),
        default=default.stall_warning,
        metavar="SECONDS",
        help="name a rank that the others have waited for so long (default: %(default)s)",
    )
    group.add_argument(
        "--timeline",
        metavar="FILE",
        help="write when each kernel ran and each bucket was on its way, a JSON file for each rank "
        "(of several, trace.json becomes trace.rank0.json, ...) that https://ui.perfetto.dev opens; the "
        "first 20 000 events, some hundred steps, are kept",
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
