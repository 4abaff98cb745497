"""``python -m tinyunet.workbench FILE``: judge a pass of the compiler."""

import argparse
from pathlib import Path

from kernels.workbench import student
from kernels.workbench.verdict import Failure
from tinyunet.commandline import Parser, run
from tinyunet.common.errors import UserError
from tinyunet.parallel.communicator import Communicator
from tinyunet.workbench import judge


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m tinyunet.workbench",
        description="Check a pass of the compiler on several nets, list what it changes, and time it.",
    )
    parser.add_argument("file", type=Path, help="a Python file that defines rewrite(graph, options)")
    parser.add_argument("--check", action="store_true", help="check only, do not time")
    return parser.parse_args()


def main(communicator: Communicator) -> None:
    """Judge a file."""
    options = parse()
    try:
        print(judge(student.load(options.file, refused=()), options.check))
    except Failure as failure:
        raise UserError(str(failure)) from None


if __name__ == "__main__":
    run("tinyunet.workbench", main)
