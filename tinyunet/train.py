"""Train a U-Net to segment brain tumours: ``python -m tinyunet.train``, alone or under mpirun."""

from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tinyunet.commandline import Parser, add_threads, run, use_threads, whole_number
from tinyunet.common.errors import AgreedError
from tinyunet.data.spacing import from_words
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import Settings, add_option, patch_size, read_config


def make_parser() -> Parser:
    """Return the options of the command: those of :class:`Settings`, ``--threads`` and ``--resume``."""
    parser = Parser(
        prog="python -m tinyunet.train",
        description="Train a 3-D U-Net to segment brain tumours in MRI. Without options it makes "
        "a data set of phantoms, trains on it for some minutes, and tests the result.",
        epilog="On several processes: mpirun -n 4 python -m tinyunet.train. Results come in a "
        "folder of their own: best.npz and latest.npz (checkpoints), config.json, history.json, "
        "metrics.jsonl, test.json, report.html, learning_curves.png and predictions.png.",
        argument_default=SUPPRESS,  # only what is given goes into the settings
    )
    groups: dict[str, Any] = {}
    for setting in fields(Settings):
        title = setting.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        if title:
            add_option(groups[title], setting.name, default=SUPPRESS)
    add_threads(groups["the run"])
    text = "go on with a run, given by its folder or a checkpoint in it; without RUN with the latest "
    text += "in --output, or with a new one if there is none. The run keeps its settings"
    groups["the run"].add_argument("--resume", nargs="?", const="", metavar="RUN", help=text)
    text = "with --resume: train so many epochs more; the learning rate rises once more, and falls to 0 again"
    groups["the run"].add_argument("--extend", type=whole_number(1), metavar="EPOCHS", help=text)
    text = "read settings from a JSON file, such as the config.json of a run; options given here come first"
    groups["the run"].add_argument("--config", metavar="FILE", help=text)
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options and train."""
    with communicator.together():  # cores and folders may differ between nodes
        given = vars(make_parser().parse_args(arguments))
        threads, resume = given.pop("threads", None), given.pop("resume", None)
        extend, config = given.pop("extend", None), given.pop("config", None)
        if extend and resume is None:
            raise AgreedError("--extend: no run to go on with; expected --resume, too")
        if config:
            given = read_config(config) | given
        if sizes := given.get("patch_size"):
            given["patch_size"] = patch_size(sizes, given.get("dim", 3))
        if names := given.get("modalities"):
            given["modalities"] = tuple(names)
        if words := given.get("spacing"):
            given["spacing"] = from_words(words)
        if resume is None:
            Settings(**given, ranks=communicator.size).check()
        use_threads(threads, communicator)
    # Imported here: a wrong option is reported at once.
    from tinyunet.training.run import train

    train(given, communicator, resume, extend)


if __name__ == "__main__":
    run("tinyunet.train", main)
