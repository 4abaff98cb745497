"""Draw a training step of two ranks: their kernels, the buckets of gradients on their way, and waits.

Run it: .venv/bin/python examples/draw_timeline.py docs/images/timeline.png
With the traces of a run of yours, written by --timeline, as further arguments it draws those.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tinyunet.benchmarks.mpi import mpirun

STEP = ["--epochs", "1", "--patches-per-case", "1", "--batch-size", "2", "--threads", "1"]
SMALL = ["--patch-size", "16", "--filters", "4", "--depth", "3"]
USUAL = ["--patch-size", "64", "64", "48"]
COLOURS = {
    "packing": "#d9b95b",
    "forward": "#7aa6c2",
    "backward": "#c9825b",
    "optimizer": "#8d6cab",
    "bucket": "#5b8c5a",
    "waits": "#b0b0b0",
}


def train(folder: Path, small: bool) -> list[Path]:
    """Train two ranks for an epoch and return their traces."""
    command = [str(mpirun()), "-n", "2", sys.executable, "-m", "tinyunet.train", *STEP]
    size = SMALL if small else USUAL
    subprocess.run([*command, *size, "--timeline", "step.json"], cwd=folder, check=True)
    return sorted(folder.glob("step.rank*.json"))


def last_step(events: list[dict]) -> tuple[float, float]:
    """Start and end, in microseconds, of the last step that is there as a whole."""
    kernels = [event for event in events if event.get("cat") == "kernels"]
    ends = [event["ts"] + event["dur"] for event in kernels if event["name"] == "Adam"]
    if not ends:
        sys.exit("no whole step in this trace; expected one of --timeline")
    return (ends[-2] if len(ends) > 1 else kernels[0]["ts"]), ends[-1]


def colour(event: dict) -> str:
    """A kernel's direction, unless it packs weights; what it is otherwise."""
    words = event["name"].split()
    if "pack_weights" in words:
        return COLOURS["packing"]
    if words == ["Adam"]:
        return COLOURS["optimizer"]
    if event["cat"] == "kernels":
        return COLOURS["backward" if "d" in words else "forward"]
    return COLOURS["bucket" if event["cat"].startswith("bucket") else "waits"]


def _number(bucket: str) -> int:
    return int(bucket.split()[1])


def draw(traces: list[list[dict]], path: str) -> None:
    """Draw a row a rank and kind of event, over the milliseconds of the first rank's last step."""
    begin, end = last_step(traces[0])
    rows = []
    for rank, events in enumerate(traces):
        names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
        buckets = sorted((name for name in names if name.startswith("bucket")), key=_number)
        rows += [(rank, name) for name in ("kernels", *buckets, "waits")]
    figure = Figure(figsize=(9, 0.6 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for rank, events in enumerate(traces):
        for event in events:
            key = rank, event.get("cat")
            if key in rows and begin <= event["ts"] < end:
                span = (event["ts"] - begin) / 1e3, event["dur"] / 1e3
                axes.broken_barh([span], (rows.index(key) - 0.4, 0.8), color=colour(event))
    axes.set_yticks(range(len(rows)), [f"rank {rank}  {name}" for rank, name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_xlabel("milliseconds of a step")
    handles = [mpl.patches.Patch(color=c, label=name) for name, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read or make the traces, and draw them."""
    path = sys.argv[1] if len(sys.argv) > 1 else "timeline.png"
    if mpirun() is None and not sys.argv[2:]:
        sys.exit("no mpirun here; pip install 'tinyunet[mpi]'")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(name) for name in sys.argv[2:]]
        files = files or train(Path(folder), small=len(sys.argv) == 1)
        traces = [json.loads(file.read_text())["traceEvents"] for file in files]
    draw(traces, path)
    print(f"drawn into {path}")


if __name__ == "__main__":
    main()
