"""Look at a data set, and plan a training: ``python -m tinyunet.plan --data-path DIR``."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from tinyunet.commandline import Parser, add_threads, run, use_threads
from tinyunet.data.spacing import from_words
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import Settings, add_option, patch_size

_OPTIONS = "data_path labels modalities spacing allow_missing patients train_test_split validate_test_split"
_OPTIONS += " folds fold dim filters depth deep_supervision use_upsampling norm patch_size batch_size"
_OPTIONS += " patches_per_case epochs augmentation ema accuracy deterministic eager"


def make_parser() -> Parser:
    """Return the options of the command: those of a training that change memory and time."""
    parser = Parser(
        prog="python -m tinyunet.plan",
        description="Say what a data set holds, propose voxels, patch, batch and filters for the memory "
        "here, and predict how much memory a training takes and how long its epochs last. Of images "
        "only headers are read. An option that is given is not proposed. For a training on several "
        "processes: mpirun -n 4 python -m tinyunet.plan.",
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
        Settings(**given, ranks=communicator.size).check()
        use_threads(threads, communicator)
    _plan(given, no_time, json, communicator)


def _plan(given: dict[str, Any], no_time: bool, json: str | None, ranks: Communicator) -> None:
    # Imported here, so that a wrong option is reported at once.
    import numpy as np
    from tqdm import tqdm

    from tinyunet.common.files import check_replaceable, signed, try_writing, write_json
    from tinyunet.common.terminal import printable
    from tinyunet.data.decathlon import read_dataset
    from tinyunet.data.patients import patient_of, read_patients
    from tinyunet.data.survey import survey
    from tinyunet.training import estimate, proposal

    found = plan = None
    with ranks.together():
        if ranks.rank == 0:
            if json is not None:
                try_writing(json, follow_links=True)
                check_replaceable("--json", json)
            names = given.get("labels"), True, given.get("modalities")
            dataset = read_dataset(given["data_path"], False, *names)
            patients = read_patients(given["patients"]) if "patients" in given else patient_of
            bar = partial(tqdm, unit="case", leave=False, file=sys.stderr)
            found = survey(dataset, patients, bar, "allow_missing" in given)
            print(printable(proposal.describe(dataset, found), keep="\n"), flush=True)
            settings = Settings(**given, ranks=ranks.size)
            plan = proposal.propose(dataset, found, settings, {*given}, ranks.local_size)
    plan = ranks.broadcast_object(plan)
    assert plan is not None
    if not no_time and estimate.fits(plan.bytes, plan.work.ranks_here):
        with ranks.together():
            seconds = estimate.measure_seconds(plan.work, ranks)
            if estimate.missing_share(plan.work):
                seconds = seconds._replace(reading=estimate.reading_seconds(plan.example, plan.spacing))
        slowest = np.max(ranks.broadcast_object(ranks.gather(seconds)), axis=0)
        plan = plan._replace(seconds=estimate.Seconds(*slowest.tolist()))
    with ranks.together():
        print(printable("\n" + plan.describe(), keep="\n"))
        if json is not None and found is not None:
            content = {"data": found.as_dict(), "plan": plan.as_dict()}
            write_json(json, signed(content), follow_links=True)
        estimate.check_memory(plan.bytes, plan.work.ranks_here)


if __name__ == "__main__":
    run("tinyunet.plan", main)
