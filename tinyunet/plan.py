"""Look at a data set, and plan a training: ``python -m tinyunet.plan --data-path DIR``."""

import sys
from collections.abc import Sequence
from typing import Any

from tinyunet.commandline import Parser, add_threads, run, use_threads
from tinyunet.data.spacing import from_words
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import Settings, add_option, patch_size

_OPTIONS = "data_path labels modalities spacing patients dim filters depth norm patch_size batch_size"
_OPTIONS += " patches_per_case epochs ema"


def make_parser() -> Parser:
    """Return the options of the command: those of a training that change memory and time."""
    parser = Parser(
        prog="python -m tinyunet.plan",
        description="Say what a data set holds, propose voxels, patch, batch and filters for the memory "
        "here, and predict how much memory a training takes and how long its epochs last. Of images "
        "only headers are read. An option that is given is not proposed.",
    )
    for name in _OPTIONS.split():
        add_option(parser, name, default=None, required=name == "data_path")
    add_threads(parser)
    parser.add_argument("--no-time", action="store_true", help="predict memory alone: nothing is run")
    parser.add_argument("--json", metavar="FILE", help="write all of it into a file")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, look, and print."""
    options = vars(make_parser().parse_args(arguments))
    threads, no_time, json = (options.pop(name) for name in ("threads", "no_time", "json"))
    given = {name: value for name, value in options.items() if value is not None}
    if sizes := given.get("patch_size"):
        given["patch_size"] = patch_size(sizes, given.get("dim", 3))
    if names := given.get("modalities"):
        given["modalities"] = tuple(names)
    if words := given.get("spacing"):
        given["spacing"] = from_words(words)
    with communicator.together():
        use_threads(threads, communicator)
        _plan(given, no_time, json)


def _plan(given: dict[str, Any], no_time: bool, json: str | None) -> None:
    # Imported here, so that a wrong option is reported at once.
    from tqdm import tqdm

    from tinyunet.common.files import check_replaceable, signed, try_writing, write_json
    from tinyunet.common.terminal import printable
    from tinyunet.data.decathlon import read_dataset
    from tinyunet.data.patients import patient_of, read_patients
    from tinyunet.data.survey import survey
    from tinyunet.training import proposal

    if json is not None:
        try_writing(json, follow_links=True)
        check_replaceable("--json", json)
    dataset = read_dataset(given["data_path"], True, given.get("labels"), True, given.get("modalities"))
    patients = read_patients(given["patients"]) if "patients" in given else patient_of
    found = survey(dataset, patients, lambda cases: tqdm(cases, unit="case", leave=False, file=sys.stderr))
    print(printable(proposal.describe(dataset, found), keep="\n"), flush=True)
    plan = proposal.propose(dataset, found, Settings(**given), {*given}, with_time=not no_time)
    print(printable("\n" + plan.describe(), keep="\n"))
    if json is not None:
        content = {"data": found.as_dict(), "plan": plan.as_dict()}
        write_json(json, signed(content), follow_links=True)


if __name__ == "__main__":
    run("tinyunet.plan", main)
