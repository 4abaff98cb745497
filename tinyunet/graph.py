"""``python -m tinyunet.graph``: the U-Net's graph before and after each pass, as a table or a picture."""

import argparse
from pathlib import Path

from tinyunet.commandline import Parser, run, whole_number
from tinyunet.common.errors import AgreedError
from tinyunet.common.files import can_be_written, check_replaceable
from tinyunet.common.terminal import printable
from tinyunet.compiler.passes import NAMES
from tinyunet.parallel.communicator import Communicator
from tinyunet.viz import FORMATS, attempt


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m tinyunet.graph", description=__doc__.split(": ", 1)[1])
    option = parser.add_argument
    option("--size", type=whole_number(1), default=96, help="voxels along an axis (default: 96)")
    option("--batch", type=whole_number(1), default=1, help="volumes (default: 1)")
    option("--filters", type=whole_number(1), default=16, help="on the first level (default: 16)")
    option("--depth", type=whole_number(1), default=5, help="levels (default: 5)")
    option("--mode", choices=("train", "infer"), default="train", help="(default: train)")
    option(
        "--disable",
        nargs="+",
        default=[],
        metavar="PASS",
        choices=NAMES,
        help=f"passes to leave out, of {', '.join(NAMES)}",
    )
    option("--nodes", action="store_true", help="list every node of the last graph")
    option("--plot", metavar="FILE", type=Path, help="draw the first and the last graph into a picture")
    options = parser.parse_args()
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Check the options before the work starts.

    Raises
    ------
    AgreedError
        A volume is too small for the levels, or the picture has no place or no known ending.
    """
    smallest = 2 ** (options.depth - 1)
    if options.size < smallest:
        raise AgreedError(
            f"--size: {options.size} voxels are halved {options.depth - 1} times; "
            f"expected at least {smallest}, or a smaller --depth"
        )
    if options.plot is not None:
        if not can_be_written(options.plot):
            raise AgreedError(f"--plot: {options.plot}; expected a file in a folder that can be written to")
        check_replaceable("--plot", options.plot)
        if options.plot.suffix not in FORMATS:
            raise AgreedError(f"--plot: {options.plot}; expected an ending of {', '.join(FORMATS)}")


def main(communicator: Communicator) -> None:
    """Compile, and show the stages."""
    options = parse()
    from tinyunet.compiler.compiled import Inference, TrainingStep
    from tinyunet.compiler.ir import Options
    from tinyunet.compiler.passes import chosen
    from tinyunet.compiler.show import nodes_table, summary
    from tinyunet.losses import dice_cross_entropy
    from tinyunet.optim import Adam
    from tinyunet.unet import UNet

    model = UNet(filters=options.filters, depth=options.depth)
    how = Options(chosen(None, options.disable), "fast")
    compiled: Inference | TrainingStep = Inference(model, how)
    if options.mode == "train":
        optimizer = Adam(model.parameters())
        compiled = TrainingStep(model, dice_cross_entropy, optimizer, how)
    stages = compiled.stages((options.batch, *[options.size] * 3, model.config["in_channels"]))
    print(summary(stages))
    if options.nodes:
        print("\n" + nodes_table(stages[-1].graph))
    if options.plot:
        with attempt(options.plot):
            from tinyunet.viz.graphs import draw_graph

            draw_graph(options.plot, stages)
            print(f"\n{printable(f'drawn in {options.plot}')}")


if __name__ == "__main__":
    run("tinyunet.graph", main)
