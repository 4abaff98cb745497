"""``python -m tinyunet.bench TABLE``: what this project and its peers reach on this machine."""

import importlib.util
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet.benchmarks.systems import PEERS, choose
from tinyunet.commandline import Parser, check_threads, load_machine, number, run, whole_number
from tinyunet.common.errors import AgreedError
from tinyunet.common.files import NOT_OURS, can_be_written, is_replaceable, signed, write_json
from tinyunet.parallel.communicator import Communicator
from tinyunet.viz import FORMATS, attempt

_TABLES = {
    "step": "a training step of the U-Net",
    "infer": "a prediction of the U-Net",
    "memory": "peak resident memory of a training step",
    "passes": "the compiled training step with each pass of the graph switched off in turn",
    "scaling": "a training step on 1, 2, 4, ... threads, then ranks; and predict it for 1,024 ranks",
    "allreduce": "the sum over ranks: MPI's, a ring, and recursive halving",
    "conv": "every rung of the convolution on the U-Net's layers",
}
# The net halves the volume four times, and not every peer can do that to an odd size.
_MULTIPLE = 16


class Found(NamedTuple):
    """What a table leaves for the files.

    Attributes
    ----------
    figures : dict of list of dict
        "rows" of systems, and by table "ranks" and "peaks" of a core.
    versions, settings : dict of str
        Of the systems, by their names.
    draw : function of a path
        Draws the picture.
    """

    figures: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    settings: dict[str, str]
    draw: Callable[[Path], None]


def make_parser() -> Parser:
    """Return the options of the command."""
    parser = Parser(
        prog="python -m tinyunet.bench",
        description="Time this project against TensorFlow, PyTorch, OpenVINO and onnxruntime: the "
        "same U-Net, weights, input and threads, each in a process of its own, taken in turn. "
        "What is not installed is skipped: pip install 'tinyunet[bench]'.",
    )
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for name, text in _TABLES.items():
        table = tables.add_parser(name, help=text, description=f"Measure {text}.")
        if name != "allreduce":
            _add_options(table, name)
        if name in ("allreduce", "scaling"):
            _add_ranks(table, name)
        _add_files(table)
    return parser


def _add_options(table: Any, name: str) -> None:
    table.add_argument(
        "--size",
        type=_size,
        default=96,
        metavar="N",
        help=f"voxels along each axis, a multiple of {_MULTIPLE} (default: %(default)s)",
    )
    table.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="threads of every system"
        + {"scaling": "; the most of them", "conv": ", compared with one"}.get(name, "")
        + " (default: all cores)",
    )
    peers = [s.key for s in PEERS if {"infer": "infer", "conv": "conv"}.get(name, "step") in s.cases]
    alone = name in ("passes", "scaling")
    table.add_argument(
        "--against",
        nargs="*",
        choices=peers,
        default=[] if alone else peers,
        metavar="PEER",
        help=f"of {', '.join(peers)} (default: {'none' if alone else 'all; none if nothing follows'})",
    )
    if name != "conv":
        table.add_argument(
            "--batch", type=whole_number(1), default=1, metavar="N", help="volumes (default: 1)"
        )
        table.add_argument(
            "--filters",
            type=whole_number(1),
            default=16,
            metavar="N",
            help="channels of the first level (default: %(default)s)",
        )
    if name not in ("conv", "memory"):
        table.add_argument(
            "--rounds",
            type=whole_number(1),
            default=5,
            metavar="N",
            help="turns of each system (default: %(default)s)",
        )


def _add_ranks(table: Any, name: str) -> None:
    table.add_argument(
        "--ranks",
        type=whole_number(2 if name == "allreduce" else 1),
        metavar="N",
        help="processes, at most; mpirun is called from here (default: all cores, at least 2)",
    )
    if name == "allreduce":
        return
    table.add_argument(
        "--gbits",
        type=number(0),
        nargs="+",
        default=[1.0, 10.0, 100.0],
        metavar="G",
        help="networks to predict for, in Gbit/s (default: 1 10 100)",
    )
    table.add_argument(
        "--throttle",
        type=number(0),
        nargs="+",
        default=[],
        metavar="G",
        help="compare the prediction with two ranks held to so many Gbit/s; needs root, ip and tc",
    )


def _add_files(table: Any) -> None:
    table.add_argument(
        "--plot",
        type=_new_picture,
        metavar="FILE",
        help=f"draw a picture: {', '.join(FORMATS)} (of ranks: NAME-ranks)",
    )
    table.add_argument("--json", type=_new_file, metavar="FILE", help="write the machine and all figures")


def _size(text: str) -> int:
    size = whole_number(_MULTIPLE)(text)
    if size % _MULTIPLE:
        raise ArgumentTypeError(f"{text!r}; expected a multiple of {_MULTIPLE}")
    return size


def _new_file(text: str) -> Path:
    """Tell now, not after half an hour, that a file cannot be written there."""
    path = Path(text)
    if not can_be_written(path, follow_links=True):
        raise ArgumentTypeError(f"{text!r}; expected a file in a folder that can be written to")
    if not is_replaceable(path):
        raise ArgumentTypeError(f"{text!r} {NOT_OURS}")
    return path


def _new_picture(text: str) -> Path:
    path = _new_file(text)
    if path.suffix not in FORMATS:
        raise ArgumentTypeError(f"{text!r}; expected one of {', '.join(FORMATS)} at its end")
    _new_file(str(_of_ranks(path)))
    return path


def _of_ranks(path: Path) -> Path:
    """Return the name of the second picture that a table of ranks gets."""
    return path.with_name(f"{path.stem}-ranks{path.suffix}")


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table that was asked for, and write the files."""
    options = make_parser().parse_args(arguments)
    if communicator.size > 1:
        raise AgreedError("every system gets processes of its own here: run without mpirun")
    machine = load_machine()
    options.threads = getattr(options, "threads", None) or machine.most_threads()
    check_threads(options.threads, machine.most_threads())
    from tinyunet.benchmarks import roofline

    here = roofline.describe()
    print(f"{here.processor}, {here.cores} cores, {here.instruction_set}, {here.threading_layer}")
    print(f"peak of one core {here.peak_gflops:.0f} GFLOP/s, copy {here.copy_gb_per_s:.0f} GB/s")
    tables = {"conv": _convolutions, "allreduce": _allreduce, "scaling": _scaling}
    found = tables.get(options.table, _nets)(options, here.peak_gflops)
    # The figures first: half an hour of them should not be lost with a picture.
    if options.json:
        about = here._asdict() | {"versions": found.versions, "settings": found.settings}
        shown = {"machine": signed(about)} | found.figures
        write_json(options.json, shown, follow_links=True)
    if options.plot:
        with attempt(options.plot):
            found.draw(options.plot)


def _nets(options: Namespace, _: float) -> Found:
    from tinyunet.benchmarks import nets

    settings = nets.Settings(
        options.table,
        options.size,
        options.batch,
        options.filters,
        options.threads,
        getattr(options, "rounds", 1),
        options.against,
    )
    jobs, skipped = nets.entrants(settings)
    print(*skipped, "", sep="\n", flush=True)
    results, failures = nets.measure(settings, jobs)
    if results:
        print(f"{settings.title()}\n\n{nets.table(settings, results)}")
    if failures:
        print("", *failures, sep="\n")
    if not results:
        raise AgreedError("nothing could be measured")
    return Found(
        {"rows": nets.rows(settings, results)},
        {r.job.system.name: r.version for r in results},
        {r.job.system.name: r.settings for r in results if r.settings},
        partial(nets.draw, settings, results),
    )


def _scaling(options: Namespace, peak: float) -> Found:
    from tinyunet.benchmarks import mpi
    from tinyunet.benchmarks import rank_scaling as scaling

    found = _nets(options, peak)
    if options.ranks is None and mpi.mpirun() is None:
        print("\nranks: there is no mpirun, skipped")
        return found
    ranks = options.ranks or max(2, options.threads)
    print(f"\nranks: {options.size}^3 voxels, {options.filters} filters\n", flush=True)
    net = options.size, options.batch, options.filters
    measured = scaling.measure(*net, ranks, options.rounds)
    print(f"{scaling.measured_table(measured)}\n", flush=True)
    print(scaling.predicted_table(measured.step, options.gbits), flush=True)
    for gbit in options.throttle:
        print(f"\n{scaling.validate(measured, options.size, options.filters, gbit)}", flush=True)

    def draw(path: Path) -> None:
        found.draw(path)
        scaling.draw(measured, options.gbits, _of_ranks(path))

    ranks_rows = scaling.rows(measured, options.gbits)
    return Found(found.figures | {"ranks": ranks_rows}, found.versions, found.settings, draw)


def _allreduce(options: Namespace, _: float) -> Found:
    from tinyunet.benchmarks import allreduce

    measured = allreduce.measure(options.ranks or max(2, options.threads))
    print(f"\n{allreduce.table(measured)}")
    figures = {"rows": [], "ranks": allreduce.rows(measured)}
    return Found(figures, {}, {}, partial(allreduce.draw, measured))


def _convolutions(options: Namespace, _: float) -> Found:
    if importlib.util.find_spec("threadpoolctl") is None:
        raise AgreedError("conv: threadpoolctl is not installed; pip install 'tinyunet[bench]'")
    from tinyunet.benchmarks import conv

    peers, skipped = choose("conv", options.against)
    print(*skipped, "", sep="\n", flush=True)
    layers = conv.unet_layers(options.size)
    measurements, failures = conv.measure(layers, options.threads, peers)
    print(conv.table(measurements, options.threads))
    if failures:
        print("", *failures, sep="\n")
    figures = {"rows": conv.rows(measurements, options.threads), "peaks": conv.peaks(measurements)}
    settings = {m.name: m.settings for m in measurements if m.settings}
    return Found(figures, {}, settings, partial(conv.draw, measurements))


if __name__ == "__main__":
    run("tinyunet.bench", main)
