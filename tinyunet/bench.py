"""``python -m tinyunet.bench TABLE``: time and memory of this project and its peers on this machine."""

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
RUNGS = ("naive", "im2col", "blocked", "direct", "minimal_filtering", "winograd", "fused")
# The net halves the volume four times, and not every peer can do that to an odd size.
_MULTIPLE = 16


class Found(NamedTuple):
    """Results of a table, for files: figures by group, a function that draws them, and notes on the systems.

    ``figures`` holds "rows" of systems, and by table "ranks" and "peaks" of a core; ``about`` holds the
    systems' "versions" and "settings". ``stopped`` is the Ctrl-C after which these are all there is.
    """

    figures: dict[str, list[dict[str, Any]]]
    draw: Callable[[Path], None]
    about: dict[str, dict[str, str]]
    stopped: KeyboardInterrupt | None = None


# ---- options ---------------------------------------------------------------------------------------


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
        _add_options(table, name)
    return parser


def _add_options(parser: Any, table: str) -> None:
    def add(option: str, text: str, default: Any = None, metavar: str = "N", **more: Any) -> None:
        text += " (default: %(default)s)" if isinstance(default, int) else ""
        parser.add_argument(option, metavar=metavar, help=text, default=default, **more)

    whole: dict[str, Any] = {"type": whole_number(1)}
    if table != "allreduce":
        add("--size", f"voxels along each axis, a multiple of {_MULTIPLE}", 96, type=_size)
        more = {"scaling": "; the most of them", "conv": ", compared with one"}.get(table, "")
        add("--threads", f"threads of every system{more} (default: all cores)", **whole)
        peers = [s.key for s in PEERS if (table if table in ("infer", "conv") else "step") in s.cases]
        usual, default = (
            ("none", []) if table in ("passes", "scaling") else ("all; none if nothing follows", peers)
        )
        text = f"of {', '.join(peers)} (default: {usual})"
        add("--against", text, default, "PEER", nargs="*", choices=peers)
    if table == "conv":
        _add_rung(parser)
    if table not in ("allreduce", "conv"):
        add("--batch", "volumes", 1, **whole)
        add("--filters", "channels of the first level", 16, **whole)
    if table not in ("allreduce", "conv", "memory"):
        add("--rounds", "turns of each system", 5, **whole)
    if table in ("allreduce", "scaling"):
        text = "processes, at most; mpirun is called from here (default: all cores, at least 2)"
        add("--ranks", text, type=whole_number(2 if table == "allreduce" else 1))
    if table == "scaling":
        speeds: dict[str, Any] = {"metavar": "G", "type": number(0), "nargs": "+"}
        add("--gbits", "networks to predict for, in Gbit/s (default: 1 10 100)", [1.0, 10.0, 100.0], **speeds)
        text = "compare the prediction with two ranks held to so many Gbit/s; needs root, ip and tc"
        add("--throttle", text, [], **speeds)
    text = f"draw a picture: {', '.join(FORMATS)} (of ranks: NAME-ranks)"
    add("--plot", text, metavar="FILE", type=_new_picture)
    add("--json", "write the machine and all figures", metavar="FILE", type=_new_file)


def _add_rung(parser: Any) -> None:
    """Add the options that choose a layer and a rung."""
    group = parser.add_argument_group(
        "one layer, one rung", "with both: a report on one core, with its roofline"
    )
    text = "measure this layer only: channels in and out, voxels along each axis, and of the kernel if not 3"
    group.add_argument("--layer", type=_layer, metavar="IC,OC,SIZE[,K]", help=text)
    text = f"measure this rung only: {', '.join(RUNGS)}"
    group.add_argument("--rung", choices=RUNGS, metavar="RUNG", help=text)
    ways, usual = ("forward", "backward_data", "backward_weights"), "forward"
    text = f"the report's pass: {', '.join(ways)} (default: {usual})"
    group.add_argument("--direction", choices=ways, default=usual, metavar="PASS", help=text)
    text = "list the hot loop in assembly, with multiply-adds, loads, stores and spills marked"
    group.add_argument("--asm", action="store_true", help=text)


def _layer(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if len(sizes) == 3:
        sizes = (*sizes, 3)
    if len(sizes) != 4 or min(sizes) < 1 or sizes[3] > 5:
        raise ArgumentTypeError(
            f"{text!r}; expected IC,OC,SIZE or IC,OC,SIZE,K as 16,16,32, a kernel of at most 5"
        )
    return sizes


def _size(text: str) -> int:
    size = whole_number(_MULTIPLE)(text)
    if size % _MULTIPLE:
        raise ArgumentTypeError(f"{text!r}; expected a multiple of {_MULTIPLE}")
    return size


def _new_file(text: str) -> Path:
    """Refuse a file that cannot be written, before half an hour of work."""
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


# ---- tables ----------------------------------------------------------------------------------------


def main(communicator: Communicator, arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table that was asked for, and write the files."""
    options = make_parser().parse_args(arguments)
    if communicator.size > 1:
        raise AgreedError("every system gets processes of its own here: run without mpirun")
    if getattr(options, "asm", False) and not (options.layer and options.rung):
        raise AgreedError(
            "--asm: lists one loop; expected --layer and --rung, as --layer 16,16,32 --rung direct"
        )
    machine = load_machine()
    options.threads = getattr(options, "threads", None) or machine.most_threads()
    check_threads(options.threads, machine.most_threads())
    from kernels.workbench import roofline

    here = roofline.describe()
    print(f"{here.processor}, {here.cores} cores, {here.instruction_set}, {here.threading_layer}")
    print(f"peak of one core {here.peak_gflops:.0f} GFLOP/s, copy {here.copy_gb_per_s:.0f} GB/s")
    tables = {"conv": _convolutions, "allreduce": _allreduce, "scaling": _scaling}
    found = tables.get(options.table, _nets)(options)
    # The figures first: half an hour of them should not be lost with a picture.
    if options.json:
        about = signed(here._asdict() | {"versions": {}, "settings": {}} | found.about)
        write_json(options.json, {"machine": about} | found.figures, follow_links=True)
    if options.plot:
        with attempt(options.plot):
            found.draw(options.plot)
    if found.stopped:
        raise found.stopped


def _show(
    results: Sequence[Any], failures: list[str], stopped: KeyboardInterrupt | None, table: Callable[..., str]
) -> None:
    if results:
        print(table())
    if failures:
        print("", *failures, sep="\n")
    if stopped and results:
        print("\nstopped: this is what was measured before", flush=True)
    elif stopped:
        raise stopped
    elif not results:
        raise AgreedError("nothing could be measured")


def _nets(options: Namespace) -> Found:
    from tinyunet.benchmarks import nets

    # A table of memory has no rounds.
    settings = nets.Settings._make(getattr(options, name, 1) for name in nets.Settings._fields)
    jobs, skipped = nets.entrants(settings)
    print(*skipped, "", sep="\n", flush=True)
    results, failures, stopped = nets.measure(settings, jobs)
    _show(results, failures, stopped, lambda: f"{settings.title()}\n\n{nets.table(settings, results)}")
    versions = {r.job.system.name: r.version for r in results}
    chosen = {r.job.system.name: r.settings for r in results if r.settings}
    rows, draw = nets.rows(settings, results), partial(nets.draw, settings, results)
    return Found({"rows": rows}, draw, {"versions": versions, "settings": chosen}, stopped)


def _scaling(options: Namespace) -> Found:
    from tinyunet.benchmarks import mpi, scaling

    found = _nets(options)
    if found.stopped:
        return found
    if options.ranks is None and mpi.mpirun() is None:
        print("\nranks: there is no mpirun, skipped")
        return found
    ranks = options.ranks or max(2, options.threads)
    print(f"\nranks: {options.size}^3 voxels, {options.filters} filters\n", flush=True)
    measured = scaling.measure(options.size, options.batch, options.filters, ranks, options.rounds)
    print(f"{scaling.measured_table(measured)}\n", flush=True)
    print(scaling.predicted_table(measured.step, options.gbits), flush=True)
    for gbit in options.throttle:
        print(f"\n{scaling.validate(measured, options.size, options.filters, gbit)}", flush=True)

    def draw(path: Path) -> None:
        found.draw(path)
        scaling.draw(measured, options.gbits, _of_ranks(path))

    rows = scaling.rows(measured, options.gbits)
    return found._replace(figures=found.figures | {"ranks": rows}, draw=draw)


def _allreduce(options: Namespace) -> Found:
    from tinyunet.benchmarks import scaling

    sums = scaling.measure_sums(options.ranks or max(2, options.threads))
    print(f"\n{scaling.sums_table(sums)}")
    return Found({"rows": [], "ranks": scaling.sums_rows(sums)}, partial(scaling.draw_sums, sums), {})


def _convolutions(options: Namespace) -> Found:
    from tinyunet.benchmarks import conv

    if options.layer and options.rung:
        return _one_rung(options)
    peers, skipped = choose("conv", [] if options.rung else options.against)
    print(*skipped, "", sep="\n", flush=True)
    layers = [conv.Layer(*options.layer)] if options.layer else conv.unet_layers(options.size)
    rungs = [rung for rung in conv.RUNGS if options.rung in (None, rung.name)]
    results, failures, stopped = conv.measure(layers, options.threads, [*rungs, *peers])
    _show(results, failures, stopped, lambda: conv.table(results, options.threads))
    figures = {"rows": conv.rows(results, options.threads), "peaks": conv.peaks(results)}
    chosen = {m.name: m.settings for m in results if m.settings}
    return Found(figures, partial(conv.draw, results), {"settings": chosen}, stopped)


def _one_rung(options: Namespace) -> Found:
    from tinyunet.benchmarks import conv, one_rung
    from tinyunet.benchmarks.process import WorkerError

    layer, rung = conv.Layer(*options.layer), options.rung
    try:
        report = one_rung.measure(layer, rung, options.direction)
    except WorkerError as failure:
        raise AgreedError(f"--rung {rung}: {failure}") from None
    print(f"\n{one_rung.text(report)}", flush=True)
    if options.asm:
        try:
            print(f"\n{one_rung.hot_loop(layer, rung, options.direction)}")
        except RuntimeError as error:
            raise AgreedError(f"--asm: {error}") from None
    return Found({"rows": one_rung.rows(report)}, partial(one_rung.draw, report), {})


if __name__ == "__main__":
    run("tinyunet.bench", main)
