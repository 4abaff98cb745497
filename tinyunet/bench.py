"""``python -m tinyunet.bench``: tables of what the kernels reach on this machine."""

import argparse

from tinyunet.commandline import Parser, run, whole_number
from tinyunet.errors import AgreedError
from tinyunet.parallel.communicator import Communicator


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="tinyunet.bench", description=__doc__.split(": ", 1)[1])
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    conv = tables.add_parser("conv", help="every rung of the convolution on the U-Net's layers")
    conv.add_argument(
        "--size", type=whole_number(16), default=96, help="voxels along each axis (default: 96)"
    )
    conv.add_argument(
        "--threads", type=whole_number(1), help="cores compared with one (default: all)"
    )
    return parser.parse_args()


def main(communicator: Communicator) -> None:
    """Measure, and print the table that was asked for."""
    options = parse()
    from kernels import machine

    threads = options.threads or machine.cores()
    if threads > machine.cores():
        raise AgreedError(
            f"--threads: {threads}; expected at most {machine.cores()}, the cores here"
        )
    from tinyunet.benchmarks import conv

    found = machine.describe()
    print(
        f"{found.processor}, {found.cores} cores, {found.instruction_set}, {found.threading_layer}"
    )
    print(
        f"peak of one core {found.peak_gflops:.0f} GFLOP/s, copy {found.copy_gb_per_s:.0f} GB/s\n"
    )
    measurements = list(conv.measure(conv.unet_layers(options.size), threads))
    print(conv.table(measurements, threads, found.peak_gflops))
    print(
        "\nms, GF/s, peak: one core, fastest run; error: largest against float64, of the largest value"
    )
    if threads > 1:
        print(f"x: times faster on {threads} cores; ~: timed on a few planes and scaled up")


if __name__ == "__main__":
    run("tinyunet.bench", main)
