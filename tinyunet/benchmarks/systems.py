"""The systems that can be compared, and whether they are installed."""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple


class System(NamedTuple):
    """One way to run the net, or a convolution."""

    key: str  # its name on the command line
    name: str  # its name in tables
    package: str  # what must be installed
    peer: str  # module that says how this system does it, of tinyunet.benchmarks.peers
    cases: tuple[str, ...]  # which of step, infer and conv it can do
    options: dict[str, Any] = {}  # noqa: RUF012 - given to the peer's functions, never written to
    tolerance: float = 5e-4  # how far probabilities and losses may be from those of our eager engine

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None


_PEERS = "tinyunet.benchmarks.peers"
_NET = ("step", "infer")

EAGER = System("eager", "tinyunet eager", "tinyunet", f"{_PEERS}.ours", _NET)
COMPILED = EAGER._replace(key="compiled", name="tinyunet compiled", options={"compiled": True})
OURS = (EAGER, COMPILED)

TENSORFLOW = System("tensorflow", "TensorFlow", "tensorflow", f"{_PEERS}.tensorflow", (*_NET, "conv"))
PYTORCH = System("torch", "PyTorch", "torch", f"{_PEERS}.pytorch", (*_NET, "conv"))
OPENVINO = System("openvino", "OpenVINO", "openvino", f"{_PEERS}.openvino", ("infer",))
PEERS = (
    TENSORFLOW,
    PYTORCH,
    PYTORCH._replace(key="torch-compiled", name="PyTorch compiled", cases=_NET, options={"compiled": True}),
    PYTORCH._replace(key="torch-frozen", name="PyTorch frozen", cases=("infer",), options={"frozen": True}),
    OPENVINO,
    # bfloat16 keeps 8 bits of a number.
    OPENVINO._replace(
        key="openvino-bf16", name="OpenVINO bf16", options={"precision": "bf16"}, tolerance=0.1
    ),
    System("onnxruntime", "onnxruntime", "onnxruntime", f"{_PEERS}.onnxruntime", ("infer",)),
)


class Job(NamedTuple):
    """One system that runs one case with so many threads."""

    system: System
    case: str
    threads: int
    variant: str = ""  # such as "without fuse_epilogue"
    options: dict[str, Any] = {}  # noqa: RUF012 - of the variant, besides the system's; never written to

    @property
    def name(self) -> str:
        """Its name in a line on the terminal."""
        return f"{self.system.name} {self.variant}".rstrip()


def choose(case: str, keys: Sequence[str]) -> tuple[list[System], list[str]]:
    """Return the systems that run ``case``, ours first, and a line for each that is not installed.

    ``keys`` are those of the peers to compare with, in any order.
    """
    wanted = [s for s in (*OURS, *PEERS) if case in s.cases and (s in OURS or s.key in keys)]
    skipped = [f"{s.name}: {s.package} is not installed, skipped" for s in wanted if not s.installed]
    return [s for s in wanted if s.installed], skipped
