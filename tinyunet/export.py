"""Write a trained model for another program, or read one: ``python -m tinyunet.export MODEL FILE``."""

from collections.abc import Sequence
from pathlib import Path

from tinyunet.commandline import Parser, run
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.export",
        description="Write a trained model into one file, without its optimizer, for another program; or "
        "make a checkpoint of a U-Net that another program has trained. The endings of the names say what "
        "is read and written: .npz is ours, .keras and .h5 are Keras', .pt and .pth PyTorch's state dicts; "
        ".safetensors and .onnx. Needs the extra interop.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or a model of another program")
    parser.add_argument("file", metavar="FILE", help="the file to write")
    text = "for a model that does not say: names of its classes, the background first; the numbers in "
    parser.add_argument("--classes", nargs="+", metavar="NAME", help=text + "label files are 0, 1, 2, ...")
    add_option(parser, "labels", dest="convention")
    add_option(parser, "modalities")
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, and write the file."""
    options = make_parser().parse_args(arguments)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.errors import UserError
    from tinyunet.common.files import try_writing
    from tinyunet.common.terminal import in_bytes, printable
    from tinyunet.interop.convert import convert

    with communicator.together():
        if communicator.rank == 0:
            if Path(options.file).exists():
                raise UserError(f"{options.file}: is there already; expected another name")
            try_writing(options.file, follow_links=True)
            told = options.classes, options.convention, options.modalities
            convert(Path(options.model), Path(options.file), *told)
            size = in_bytes(Path(options.file).stat().st_size)[0]
            print(printable(f"{options.file} ({size})"))


if __name__ == "__main__":
    run("tinyunet.export", main)
