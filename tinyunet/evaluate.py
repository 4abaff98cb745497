"""Compare label files with the truth: ``python -m tinyunet.evaluate PREDICTIONS LABELS``."""

import sys
from collections.abc import Sequence

from tinyunet.commandline import Parser, run, whole_number
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.evaluate",
        description="Print Dice of each case, class and tumour region, and their means.",
        epilog="Dice of a class that both prediction and truth lack is 1; if only one lacks it, 0.",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", help="a label file, or a folder of them")
    labels = "the true labels: a file, a folder of files named as the predictions are, or the "
    labels += "folder of a Decathlon task or of BraTS cases"
    parser.add_argument("labels", metavar="LABELS", help=labels)
    add_option(parser, "labels", dest="convention")
    numbers = "or the numbers that stand for background, edema, non-enhancing and enhancing tumour"
    parser.add_argument("--label-values", type=whole_number(0), nargs="+", metavar="N", help=numbers)
    parser.add_argument("--json", metavar="FILE", help="write the scores to this file too")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, compare, and print the table."""
    options = make_parser().parse_args(arguments)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.files import check_replaceable, signed, try_writing, write_json
    from tinyunet.common.terminal import printable
    from tinyunet.segmentation.evaluation import find_pairs, score_pairs
    from tinyunet.segmentation.scores import summary, table

    with communicator.together():
        if communicator.rank == 0:
            if options.json is not None:
                try_writing(options.json, follow_links=True)
                check_replaceable("--json", options.json)
            found = find_pairs(options.predictions, options.labels, options.label_values, options.convention)
            for note in found.notes():
                print(printable(note), file=sys.stderr)
            rows = score_pairs(found)
            if options.json is not None:  # first: the table may go to a pipe that is closed
                write_json(options.json, signed(summary(rows)), follow_links=True)
            print(table(rows))


if __name__ == "__main__":
    run("tinyunet.evaluate", main)
