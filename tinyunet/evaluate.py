"""Compare label files with the truth: ``python -m tinyunet.evaluate PREDICTIONS LABELS``."""

import sys
from collections.abc import Sequence

from tinyunet.commandline import Parser, number, run, whole_number
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option

#: Names of :data:`tinyunet.segmentation.metrics.METRICS`, which loads SciPy.
_METRICS = "dice hd95 nsd sensitivity precision difference specificity volume true_volume"
METRICS = _METRICS.split()


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.evaluate",
        description="Compare predictions with the truth: for each case, class and tumour region Dice, "
        "distances of surfaces, sensitivity, precision and volumes; means with 95 % bootstrap intervals; "
        "the worst cases first.",
        epilog="Where prediction and truth both lack a class, nothing was missed: shares are 1, distances 0. "
        "Where only one lacks it, shares are 0 and the distance is the image's diagonal: a missed tumour "
        "counts in every mean.",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", help="a label file, or a folder of them")
    labels = "the true labels: a file, a folder of files named as the predictions are, or the "
    labels += "folder of a Decathlon task or of BraTS cases"
    parser.add_argument("labels", metavar="LABELS", help=labels)
    add_option(parser, "labels", dest="convention")
    numbers = "or the numbers that stand for background, edema, non-enhancing and enhancing tumour"
    parser.add_argument("--label-values", type=whole_number(0), nargs="+", metavar="N", help=numbers)
    usual = f"of {', '.join(METRICS)}, in the table (default: the first six); files hold all"
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=usual)
    text = "millimetres that NSD (the share of both surfaces that agree) allows (default: 1)"
    parser.add_argument("--tolerance", type=number(0), default=1.0, metavar="MM", help=text)
    text = "score single lesions, too, as BraTS 2023 does: lesions that are missed or wrong cost 0 and 374 mm"
    parser.add_argument("--lesion-wise", action="store_true", help=text)
    parser.add_argument("--csv", metavar="FILE", help="write all values: a line a case and class or region")
    parser.add_argument("--json", metavar="FILE", help="write all values, means and intervals")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, compare, and print the table."""
    options = make_parser().parse_args(arguments)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.files import check_replaceable, signed, try_writing, write_csv, write_json
    from tinyunet.common.terminal import printable
    from tinyunet.segmentation.evaluation import find_pairs, measure_pairs
    from tinyunet.segmentation.metrics import LESION_METRICS, USUAL
    from tinyunet.segmentation.tables import csv_rows, report, summary

    files, is_first = {"--json": options.json, "--csv": options.csv}, communicator.rank == 0
    with communicator.together():
        for option, path in files.items() if is_first else ():
            if path is not None:
                try_writing(path, follow_links=True)
                check_replaceable(option, path)
        found = find_pairs(options.predictions, options.labels, options.label_values, options.convention)
        for note in found.notes() if is_first else ():
            print(printable(note), file=sys.stderr)
        mine = slice(communicator.rank, None, communicator.size)
        rows = measure_pairs(found, mine, options.tolerance, options.lesion_wise, is_first)
    rows = communicator.gather_in_turns(rows)
    with communicator.together():
        if is_first:
            # Files first: the table may go to a pipe that is closed.
            if options.json is not None:
                write_json(options.json, signed(summary(rows)), follow_links=True)
            if options.csv is not None:
                write_csv(options.csv, csv_rows(rows))
            metrics = [*(options.metrics or USUAL), *(LESION_METRICS if options.lesion_wise else ())]
            print(report(rows, metrics))


if __name__ == "__main__":
    run("tinyunet.evaluate", main)
