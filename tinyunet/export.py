"""Write a trained model for another program, or read one: ``python -m tinyunet.export MODEL FILE``."""

from collections.abc import Sequence
from pathlib import Path

from tinyunet.commandline import Parser, number, run
from tinyunet.data.spacing import from_words
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
    group = parser.add_argument_group("what the model does not say")
    text = "names of its classes, the background first; the numbers in label files are 0, 1, 2, ..."
    group.add_argument("--classes", nargs="+", metavar="NAME", help=text)
    text = "in place of --classes: it finds the classes of this release, in their order in label files"
    add_option(group, "labels", dest="convention", help=text)
    text = "names of the sequences that it takes, in the order of its channels, such as FLAIR T1w t1gd T2w"
    add_option(group, "modalities", help=text)
    text = "size of the voxels in mm that it was trained at, one number or three (right, front, up); predict "
    add_option(group, "spacing", help=text + "resamples images to it (default: their own voxels)")
    text = "activation after each convolution, which a state dict does not hold (default: relu)"
    group.add_argument("--activation", choices=("relu", "leaky_relu", "elu"), help=text)
    text = "what its normalisations add to the variance, as above (default: 1e-5; 1e-3 under our names)"
    group.add_argument("--epsilon", type=number(0), metavar="NUMBER", help=text)
    text = "its normalisation, where no statistics show that it is batch norm (default: instance, or none if "
    text += "no arrays of norms are there; group has 8 groups)"
    group.add_argument("--norm", choices=("instance", "group", "none"), help=text)
    text = "how it upsamples where it has no transposed convolutions (default: nearest)"
    group.add_argument("--upsampling", dest="use_upsampling", choices=("nearest", "trilinear"), help=text)
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, and write the file."""
    options = make_parser().parse_args(arguments)
    spacing = from_words(options.spacing)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.errors import UserError
    from tinyunet.common.files import try_writing
    from tinyunet.common.terminal import in_bytes, printable
    from tinyunet.interop.convert import convert
    from tinyunet.interop.formats import TOLD, VALUES

    with communicator.together():
        if communicator.rank == 0:
            if Path(options.file).exists():
                raise UserError(f"{options.file}: is there already; expected another name")
            try_writing(options.file, follow_links=True)
            state = options.classes, options.convention, options.modalities, spacing
            given = {name: getattr(options, name) for name in TOLD}
            told = {name: VALUES.get(value, value) for name, value in given.items() if value is not None}
            for note in convert(Path(options.model), Path(options.file), *state, told):
                print(printable(note))
            size = in_bytes(Path(options.file).stat().st_size)[0]
            print(printable(f"{options.file} ({size})"))


if __name__ == "__main__":
    run("tinyunet.export", main)
