"""Segment images with a trained model: ``python -m tinyunet.predict CHECKPOINT IMAGE... -o DIR``."""

import sys
from collections.abc import Sequence

from tinyunet.commandline import Parser, add_threads, number, run, use_threads
from tinyunet.common.errors import AgreedError
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
    images = (
        "a NIfTI file with all sequences of the training in their order, the folder of a BraTS case, or a "
    )
    images += "folder of such files or cases (also with a file for each channel: NAME_0000.nii.gz, ...)"
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
    _add_quality(parser)
    for name in ("eager", "accuracy", "deterministic"):
        add_option(parser, name)
    add_threads(parser)
    return parser


def _add_quality(parser: Parser) -> None:
    """Add the options that change what is found and written."""
    group = parser.add_argument_group("more accurate, cleaner")
    text = "more checkpoints, whose probabilities are averaged with the first one's (folds, say)"
    group.add_argument("--ensemble", nargs="+", default=[], metavar="CHECKPOINT", help=text)
    text = "share of a patch that the next patch covers again (default: 0.5)"
    group.add_argument("--overlap", type=number(0, 1), default=0.5, metavar="SHARE", help=text)
    text = "average over all eight reflections of each patch: eight times as long"
    group.add_argument("--mirror", action="store_true", help=text)
    text = "keep the largest connected tumour alone"
    group.add_argument("--largest-component", action="store_true", help=text)
    text = "remove connected tumours smaller than this"
    group.add_argument("--smallest-lesion", type=number(0), default=0.0, metavar="ML", help=text)
    text = "write NAME_probabilities.nii.gz, too: a volume for each class"
    group.add_argument("--probabilities", action="store_true", help=text)
    text = "leave out images whose labels are in the folder already"
    group.add_argument("--skip-existing", action="store_true", help=text)


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Read the options, segment, and print the volumes of the classes."""
    with communicator.together():  # cores may be others on other nodes
        options = make_parser().parse_args(arguments)
        spacing = from_words(options.spacing)
        use_threads(options.threads, communicator)
    # Imported here, so that a wrong option is reported at once.
    from tinyunet.common.terminal import count, printable
    from tinyunet.segmentation.prediction import Options, predict

    names = ("allow_missing", "eager", "accuracy", "deterministic")
    execution = {name: getattr(options, name) for name in names} | {"spacing": spacing}
    how = Options._make(getattr(options, name) for name in Options._fields)
    checkpoints = [options.checkpoint, *options.ensemble]
    done, failures, skipped = predict(
        checkpoints, options.images, options.output, communicator, options=how, **execution
    )
    alone = len(failures) + len(done) + len(skipped) == 1
    notes = [*dict.fromkeys(line for found in done for line in found.said if line)]
    notes += [f"warning: {note}" for found in done for note in found.notes]
    if skipped:
        notes.append(f"{count(len(skipped), 'image')} left out, whose labels are there already")
    notes += [f"failed: {line}" for line in failures if not alone]
    for line in notes if communicator.rank == 0 else ():
        print(printable(line), file=sys.stderr)
    for found in done:
        volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in found.millilitres.items())
        print(printable(f"{found.output}  {volumes}"))
    if failures and alone:
        raise AgreedError(failures[0])
    if failures:
        of_all = count(len(failures) + len(done), "image")
        raise AgreedError(f"{len(failures)} of {of_all} could not be segmented; the others are done")


if __name__ == "__main__":
    run("tinyunet.predict", main)
