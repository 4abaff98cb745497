"""Segment images with a trained model: ``python -m tinyunet.predict CHECKPOINT IMAGE... -o DIR``."""

import sys
from collections.abc import Sequence

from tinyunet.commandline import Parser, add_threads, run, use_threads
from tinyunet.data.spacing import from_words
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import add_option


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.predict",
        description="Segment whole MRI volumes of any size with a trained model, and write for "
        "each a label file that lies exactly over it.",
        epilog="Under mpirun the images are shared among the ranks.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.npz of a training")
    images = "a NIfTI file with all sequences of the training in their order, or the folder of a BraTS case"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    output = "folder for the labels, named as the images are; files of these names are replaced if "
    output += "this program has written them"
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help=output)
    learnt = (
        "resample images to voxels of this size in mm, one number or three (right, front, up); keep leaves "
    )
    learnt += (
        "them as they are (default: the size that the model was trained at); labels come in the image's grid"
    )
    add_option(parser, "spacing", help=learnt)
    add_option(
        parser,
        "allow_missing",
        help="segment images in which a sequence is missing or constant; it becomes 0",
    )
    for name in ("eager", "accuracy", "deterministic"):
        add_option(parser, name)
    add_threads(parser)
    return parser


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, segment, and print the volumes of the classes."""
    with communicator.together():  # cores may be others on other nodes
        options = make_parser().parse_args(arguments)
        spacing = from_words(options.spacing)
        use_threads(options.threads, communicator)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.terminal import printable
    from tinyunet.segmentation.prediction import predict

    names = ("allow_missing", "eager", "accuracy", "deterministic")
    execution = {name: getattr(options, name) for name in names} | {"spacing": spacing}
    everything = predict(options.checkpoint, options.images, options.output, communicator, **execution)
    notes = [f"warning: {note}" for found in everything for note in found.notes]
    for line in [*dict.fromkeys(found.written_as for found in everything), *notes]:
        print(printable(line), file=sys.stderr)
    for found in everything:
        volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in found.millilitres.items())
        print(printable(f"{found.output}  {volumes}"))


if __name__ == "__main__":
    run("tinyunet.predict", main)
