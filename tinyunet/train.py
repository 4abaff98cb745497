"""Train a U-Net to segment brain tumours: ``python -m tinyunet.train``, alone or under mpirun."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from tinyunet.commandline import Parser, add_execution, add_labels, run, size, use_threads, whole_number
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import Settings


def make_parser() -> Parser:
    """Return the options of the command: those of :class:`Settings`, ``--threads`` and ``--resume``."""
    parser = Parser(
        prog="python -m tinyunet.train",
        description="Train a 3-D U-Net to segment brain tumours in MRI. Without options it makes "
        "a data set of phantoms, trains on it for some minutes, and tests the result.",
        epilog="On several processes: mpirun -n 4 python -m tinyunet.train. Results come in a "
        "folder of their own: best.npz and latest.npz (checkpoints), history.json, test.json, "
        "learning_curves.png and predictions.png.",
    )
    groups: dict[str, Any] = {}
    for setting in fields(Settings):
        title = setting.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        if setting.metadata["help"]:
            _add_option(groups[title], setting)
        elif setting.name == "labels":
            add_labels(groups[title], "labels")
        elif setting.name == "eager":
            add_execution(groups[title])
    groups["the run"].add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="threads of each rank (default: the cores of the node, divided among its ranks)",
    )
    groups["the run"].add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run, given by its folder or a checkpoint in it; without RUN with the latest "
        "in --output, or with a new one if there is none. The run keeps its settings",
    )
    return parser


def _add_option(group: Any, setting: "Field[Any]") -> None:
    """Add the option of a setting, with its default in the help unless the help says it in words."""
    text, option, default = setting.metadata["help"], setting.metadata["option"], setting.default
    if default is not None and "action" not in option:
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    group.add_argument("--" + setting.name.replace("_", "-"), default=default, help=text, **option)


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options and train."""
    parser = make_parser()
    # argparse sets no default where the attribute exists: what is not None in the end was given.
    nothing = Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    with communicator.together():  # cores and folders may differ between nodes
        options = vars(parser.parse_args(arguments, nothing))
        given = {name: value for name, value in options.items() if value is not None}
        threads, resume = given.pop("threads", None), given.pop("resume", None)
        if "patch_size" in given:
            given["patch_size"] = size(given["patch_size"])
        if resume is None:
            Settings(**given, ranks=communicator.size).check()
        use_threads(threads, communicator)
    # Imported here: a wrong option is reported at once.
    from tinyunet.training.run import train

    train(given, communicator, resume)


if __name__ == "__main__":
    run("tinyunet.train", main)
