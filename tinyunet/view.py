"""Look at a scan and its labels in a browser: ``python -m tinyunet.view IMAGE -o page.html``."""

from collections.abc import Sequence

from tinyunet.commandline import Parser, run
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.view",
        description="Write one HTML page, which needs no network, of a scan and its labels: the brain and "
        "the tumour in 3-D, three planes, truth against prediction, and scores. Needs the extra viz.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a NIfTI file, or the folder of a BraTS case")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the page to write, .html")
    text = "labels that python -m tinyunet.predict has written"
    parser.add_argument("--prediction", metavar="FILE", help=text)
    text = "true labels (default: those in the folder of a BraTS case)"
    parser.add_argument("--truth", metavar="FILE", help=text)
    add_option(parser, "labels", dest="convention")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, and write the page."""
    options = make_parser().parse_args(arguments)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.errors import UserError
    from tinyunet.common.files import check_replaceable, try_writing
    from tinyunet.common.terminal import in_bytes, printable
    from tinyunet.viz.page import check_packages
    from tinyunet.viz.scans import look

    with communicator.together():
        if communicator.rank == 0:
            check_packages()
            if not options.output.endswith((".html", ".htm")):
                raise UserError(f"-o: {options.output}; expected a name that ends in .html")
            try_writing(options.output, follow_links=True)
            check_replaceable("-o", options.output)
            page = look(options.image, options.prediction, options.truth, options.convention)
            page.write(options.output)
            for note in page.notes:
                print(printable(note))
            print(printable(f"{options.output} ({in_bytes(len(page.text))[0]}): open it in a browser"))


if __name__ == "__main__":
    run("tinyunet.view", main)
