"""``python -m tinyunet.graph``: the U-Net's graph before and after each pass, as a table or a picture."""

import argparse

from tinyunet.commandline import Parser, run, whole_number
from tinyunet.graph.passes import NAMES
from tinyunet.parallel.communicator import Communicator


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="tinyunet.graph", description=__doc__.split(": ", 1)[1])
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
    option("--plot", metavar="FILE", help="draw the first and the last graph into a PNG")
    return parser.parse_args()


def main(communicator: Communicator) -> None:
    """Compile, and show the stages."""
    options = parse()
    from tinyunet.graph.compiled import Inference, TrainingStep
    from tinyunet.graph.passes import chosen
    from tinyunet.graph.show import nodes_table, summary
    from tinyunet.losses import dice_cross_entropy
    from tinyunet.optim import Adam
    from tinyunet.unet import UNet

    model = UNet(filters=options.filters, depth=options.depth)
    passes = chosen(None, options.disable)
    compiled: Inference | TrainingStep = Inference(model, passes, "fast", debug=False)
    if options.mode == "train":
        optimizer = Adam(model.parameters())
        compiled = TrainingStep(model, dice_cross_entropy, optimizer, passes, "fast", debug=False)
    stages = compiled.stages((options.batch, *[options.size] * 3, model.config["in_channels"]))
    print(summary(stages))
    if options.nodes:
        print("\n" + nodes_table(stages[-1].graph))
    if options.plot:
        from tinyunet.viz.graphs import draw_graph

        draw_graph(options.plot, stages)
        print(f"\ndrawn in {options.plot}")


if __name__ == "__main__":
    run("tinyunet.graph", main)
