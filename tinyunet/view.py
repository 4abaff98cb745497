"""Look at a scan, or at a training, in a browser: ``python -m tinyunet.view IMAGE -o page.html``."""

from collections.abc import Sequence
from pathlib import Path

from tinyunet.commandline import Parser, run
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.view",
        description="Write one HTML page, which needs no network, of a scan and its labels: the brain and "
        "the tumour in 3-D, three planes, truth against prediction, and scores. For the folder of a run: "
        "test cases, segmented by its best model, with curves and configuration. Needs the extra viz.",
    )
    text = "a NIfTI file, the folder of a BraTS case, or the folder of a run (runs/TIME)"
    parser.add_argument("image", metavar="IMAGE", help=text)
    text = "the page to write, .html (default for a run: report.html in its folder)"
    parser.add_argument("-o", "--output", metavar="FILE", help=text)
    group = parser.add_argument_group("a scan")
    text = "labels that python -m tinyunet.predict has written"
    group.add_argument("--prediction", metavar="FILE", help=text)
    text = "true labels (default: those in the folder of a BraTS case)"
    group.add_argument("--truth", metavar="FILE", help=text)
    add_option(group, "labels", dest="convention")
    group = parser.add_argument_group("a run")
    text = "cases to show, by name, of any part (default: up to four test cases, from the best to the worst)"
    group.add_argument("--cases", nargs="+", default=[], metavar="NAME", help=text)
    add_option(group, "data_path", help="where the data of the run are now, if they were moved")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, and write the page."""
    options = make_parser().parse_args(arguments)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.errors import UserError
    from tinyunet.common.files import check_replaceable, try_writing
    from tinyunet.common.terminal import in_bytes, printable
    from tinyunet.training.report import is_run, report_of
    from tinyunet.viz.page import check_packages
    from tinyunet.viz.scans import look

    with communicator.together():
        if communicator.rank == 0:
            check_packages()
            image = Path(options.image)
            of_run, of_scan = ("cases", "data_path"), ("prediction", "truth", "convention")
            other, what = (of_scan, "a scan") if is_run(image) else (of_run, "a run")
            for name in other:
                if getattr(options, name):
                    option = "labels" if name == "convention" else name.replace("_", "-")
                    raise UserError(f"--{option}: is for {what}; {image} is none")
            output = options.output or (str(image / "report.html") if is_run(image) else "")
            if not output.endswith((".html", ".htm")):
                given = output or "not given"
                raise UserError(f"-o: {given}; expected a name that ends in .html")
            try_writing(output, follow_links=True)
            check_replaceable("-o", output)
            if is_run(image):
                page = report_of(image, options.data_path, options.cases)
            else:
                page = look(image, options.prediction, options.truth, options.convention)
            page.write(output)
            for note in page.notes:
                print(printable(note))
            print(printable(f"{output} ({in_bytes(len(page.text))[0]}): open it in a browser"))


if __name__ == "__main__":
    run("tinyunet.view", main)
