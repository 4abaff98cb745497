"""The hot loop of a kernel in assembly, with its multiply-adds, loads, stores and spills marked.

A kernel is compiled anew in a process of its own, where Numba prints the assembly of all that it compiles.
Which loop is hot is a guess, because nothing counts how often each runs: the loops on the widest registers
come first, of these those without a store (their sums stay in registers), then the most deeply nested, then
those with most multiply-adds. A loop is the lines between a label and a jump back to the label. A spill is a
sum that found no register: the loop stores and loads it on the stack. On x86 an operand in memory counts as a
load, also inside a multiply-add.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_LABEL = re.compile(r"^(\.?L\w+):")
_END = re.compile(r"^\.?Lfunc_end")
_COMMENT = re.compile(r"(?:#|//)(?: .*)?$")
_JUMP = re.compile(r"^\s+(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.?L\w+)$")
_X86, _ARM = r"vfn?m(?:add|sub)\w*[ps]s\b", r"fml[as]\b|fn?m(?:add|sub)\b"
_FMA = re.compile(rf"^\s+(?:{_X86}|{_ARM})")
_VECTOR = re.compile(r"%[xyz]mm\d|\b[vqs]\d+\b")
_STACK = re.compile(r"\(%rsp\b|\[sp\b")
_WIDTHS = (("%zmm", 16), ("%ymm", 8), ("ps\t", 4), (".4s", 4))


class Line(NamedTuple):
    """An instruction and what it does: some of "FMA", "load", "store", "spill", "reload", "prefetch"."""

    text: str
    kinds: tuple[str, ...]


class Loop(NamedTuple):
    """An innermost loop."""

    function: str
    lines: tuple[Line, ...]
    lanes: int  # floats of the widest register of a multiply-add
    depth: int  # loops around this one

    def count(self, kind: str) -> int:
        """Return how many instructions are of a kind."""
        return sum(kind in line.kinds for line in self.lines)

    def summary(self) -> str:
        """Return the counts as a line."""
        fmas, loads, stores = (self.count(kind) for kind in ("FMA", "load", "store"))
        spills = self.count("spill") + self.count("reload")
        width = f"{self.lanes} floats each" if self.lanes > 1 else "one float each"
        return (
            f"{fmas} multiply-adds ({width}), {loads} loads, {stores} stores, {spills} spills and reloads "
            f"in {sum(bool(line.text.strip()) for line in self.lines)} instructions of {self.function}"
        )

    def listing(self) -> str:
        """Return each instruction with its marks before it."""
        rows = [f"{' '.join(line.kinds):12s} {line.text.strip().expandtabs(8)}" for line in self.lines]
        return "\n".join(row.rstrip() for row in rows)


def hot_loop(assembly: str) -> Loop | None:
    """Return the hot loop of assembly as Numba prints it, or None if no loop loads or computes.

    If no loop has a multiply-add, it is one that loads and stores most.
    """
    loops = [loop for name, lines in _functions(assembly) for loop in _loops(name, lines)]
    if counted := [loop for loop in loops if loop.count("FMA")]:
        return max(counted, key=_heat)
    moving = [loop for loop in loops if loop.count("load") and loop.count("store")]
    return max(moving, key=lambda loop: (loop.lanes, loop.count("store"), loop.depth), default=None)


def _heat(loop: Loop) -> tuple[int, bool, int, int]:
    return loop.lanes, not loop.count("store"), loop.depth, loop.count("FMA")


def assembly_of(module: str, arguments: Sequence[Any]) -> str:
    """Return the assembly of all that ``python -m MODULE ARGUMENTS`` compiles; the arguments go as JSON.

    RuntimeError, of one line, if the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "NUMBA_DUMP_ASSEMBLY": "1"}
        command = [sys.executable, "-m", module, json.dumps(arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the kernel could not be compiled: {last[:200]}")
    return done.stdout


def report(name: str, assembly: str) -> str:
    """Return the summary of the hot loop in assembly as Numba prints it, and its listing."""
    loop = hot_loop(assembly)
    if loop is None:
        return f"{name}: Numba has compiled no loop that loads or computes; NumPy and its BLAS may have them"
    return f"{loop.summary()}\n\n{loop.listing()}"


def _functions(assembly: str) -> Iterator[tuple[str, list[str]]]:
    """Cut the text into functions; Numba prints a function again in each that calls it: once is enough."""
    seen, name, lines = set[tuple[str, ...]](), "", list[str]()
    for raw in assembly.splitlines():
        line = _COMMENT.sub("", raw).rstrip()
        if _END.match(line):
            if tuple(lines) not in seen:
                seen.add(tuple(lines))
                yield name, lines
            lines = []
        elif line.endswith(":") and not _LABEL.match(line):
            name, lines = _readable(line.rstrip(":").strip('"')), []
        elif line.strip() and not line.strip().startswith(("#", ".p2align", ".cfi", ".loc")):
            lines.append(line)


def _readable(symbol: str) -> str:
    """Return the Python names in a mangled symbol: ``_ZN7kernels6ladder6direct13convolve_rows...``."""
    found, rest = list[str](), symbol.removeprefix("_ZN")
    while (match := re.match(r"(\d+)", rest)) and rest != symbol:
        start, length = match.end(), int(match.group())
        found.append(rest[start : start + length])
        rest = rest[start + length :]
    return ".".join(part for part in found if not part.startswith("_3c"))[:80] or symbol[:80]


def _loops(name: str, lines: list[str]) -> Iterator[Loop]:
    labels = {m.group(1): index for index, line in enumerate(lines) if (m := _LABEL.match(line))}
    jumps = [(index, m.group(1)) for index, line in enumerate(lines) if (m := _JUMP.match(line))]
    spans = sorted({(labels[to], at) for at, to in jumps if labels.get(to, at) < at})
    for start, end in spans:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            body = tuple(_marked(line) for line in lines[start : end + 1] if not _LABEL.match(line))
            working = [line.text for line in body if "FMA" in line.kinds]
            working = working or [line.text for line in body if {"load", "store"} & {*line.kinds}]
            lanes = max((n for text in working for mark, n in _WIDTHS if mark in text), default=1)
            depth = sum((s < start and end <= e) or (s <= start and end < e) for s, e in spans)
            yield Loop(name, body, lanes, depth)


def _marked(line: str) -> Line:
    mnemonic, _, operands = line.strip().partition("\t")
    kinds = ["FMA"] if _FMA.match(line) else []
    if mnemonic.startswith(("prefetch", "prfm")):
        return Line(line, ("prefetch",))
    touches = _touched(mnemonic, operands)
    if touches and _VECTOR.search(operands):
        on_stack = _STACK.search(operands)
        kinds.append({"load": "reload", "store": "spill"}[touches] if on_stack else touches)
    return Line(line, tuple(kinds))


def _touched(mnemonic: str, operands: str) -> str:
    """Return "load" or "store" if an instruction goes to memory, else nothing."""
    if re.search(r"\[(?:x\d|sp)", operands):  # AArch64
        return "store" if mnemonic.startswith("st") else "load"
    if "(" not in operands or mnemonic.startswith("lea"):
        return ""
    last = re.sub(r"\([^)]*\)", "()", operands).split(",")[-1]
    return "store" if "(" in last else "load"
