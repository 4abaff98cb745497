"""Compiles nets with and without a pass, compares what they compute, and lists what the pass changes."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.workbench.verdict import Failure, place_of
from tinyunet.autograd import Tensor
from tinyunet.common.terminal import aligned, count
from tinyunet.compiler.compiled import Inference, TrainingStep
from tinyunet.compiler.ir import Graph, Node, Options
from tinyunet.compiler.passes import NAMES, PASSES, Stage
from tinyunet.compiler.passes.finish import finish
from tinyunet.compiler.show import Figures, figures
from tinyunet.losses import cross_entropy
from tinyunet.nn import Module
from tinyunet.optim import SGD
from tinyunet.workbench.nets_to_try import CLASSES, NETS

Array = npt.NDArray[Any]
Rewrite = Callable[[Graph, Options], Graph]

FIRST = "traced"
_OPTIONS = Options(NAMES, "strict", deterministic=True)
_BOUND = 1e-4  # of the largest number: what another order of sums may lose in float32
_TIMED, _ROUNDS, _LINES = 32, 9, 12


class _Rewritten:
    """A pass, and after which pass of the compiler it runs."""

    def __init__(self, rewrite: Rewrite, after: str) -> None:
        self.rewrite, self.after = rewrite, after
        self.seen: list[tuple[Graph, Graph]] = []  # graphs before and after it

    def stages(self, graph: Graph, options: Options) -> list[Stage]:
        """Return the stages of the compiler with the pass among them."""
        found = [Stage(FIRST, graph)]
        for name in (FIRST, *options.passes):
            if name in PASSES:
                graph = PASSES[name](graph, options).check()
                found.append(Stage(name, graph))
            if name == self.after:
                graph = self._run(graph, options)
                found.append(Stage("rewrite", graph))
        return [*found, Stage("plan_memory", finish(graph), True)]

    def _run(self, graph: Graph, options: Options) -> Graph:
        before = _content(graph)
        try:
            found = self.rewrite(graph, options)
        except Failure:
            raise
        except NotImplementedError:
            raise Failure(
                "the stub is still empty: replace the line that raises NotImplementedError"
            ) from None
        except Exception as error:
            words = f"rewrite raises {type(error).__name__} ({place_of(error)}): {error}"
            raise Failure(words) from None
        if not isinstance(found, Graph):
            raise Failure(f"rewrite returns {type(found).__name__}; expected a Graph: is a return missing?")
        if _content(graph) != before:
            raise Failure("rewrite changes the graph that it was given; expected a new one: graph.rewrite")
        for what in ("inputs", "outputs", "gradients"):
            if getattr(found, what) != getattr(graph, what):
                raise Failure(f"rewrite changes the graph's {what}; expected those of the graph it was given")
        try:
            found.check()
        except ValueError as error:
            raise Failure(f"rewrite returns no valid {error}") from None
        self.seen.append((graph, found))
        return found


def _content(graph: Graph) -> list[Any]:
    nodes = [(n.name, n.op, *map(dict, (n.inputs, n.outputs, n.in_place, n.views))) for n in graph.nodes]
    return [nodes, [sorted(n.attributes) for n in graph.nodes], dict(graph.values)]


# ---- the check ---------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What a pass has done to a net, and the figures of the compiled graph without it and with it."""

    net: str
    mode: str
    before: Figures
    after: Figures
    reorders: tuple[int, int]
    lines: list[str]  # nodes that went, came or changed
    around: list[str]  # reorders that are left, each with the operators before and after it


class _Pair:
    """A net compiled without a pass and with it."""

    def __init__(
        self, model: Module, training: bool, shape: tuple[int, ...], hook: _Rewritten, debug: bool = True
    ) -> None:
        self.model, self.training, self.shape, self.debug = model, training, shape, debug
        self.random = np.random.default_rng()
        self.optimizer = SGD(model.parameters(), 0.1) if training else None
        self.plain = self._compiled(_Rewritten(lambda graph, _: graph, FIRST))
        self.rewritten = self._compiled(hook)

    def _compiled(self, hook: _Rewritten) -> Any:
        kind: Any = TrainingStep if self.training else Inference

        class Compiled(kind):  # type: ignore[misc]
            def stages(self, input_shape: tuple[int, ...]) -> list[Stage]:
                return hook.stages(self._trace(input_shape), self._options)

        how = (_loss, self.optimizer) if self.training else ()
        compiled = Compiled(self.model, *how, _OPTIONS, self.debug)
        compiled._warned = True  # that operators run unfused is what a pass may be for
        return compiled

    def results(self, compiled: Any, images: Array, labels: Array) -> dict[str, Array]:
        """Return what a run leaves: the prediction; or loss, gradients and running statistics."""
        if not self.training:
            return {"the prediction": compiled(images)}
        kept = [buffer.copy() for buffer in self.model.buffers()]
        found = {"the loss": np.array(compiled.gradients(images, labels))}
        found |= {f"the gradient of {n}": np.array(p.grad) for n, p in self.model.named_parameters()}
        found |= {name: buffer.copy() for name, buffer in self.model.named_buffers()}
        for buffer, old in zip(self.model.buffers(), kept, strict=True):
            buffer[...] = old
        return found

    def compare(self, when: str = "") -> None:
        """Run both on fresh numbers; Failure if a result differs."""
        images = self.random.standard_normal(self.shape).astype(np.float32)
        labels = self.random.integers(0, CLASSES, self.shape[:-1])
        expected = self.results(self.plain, images, labels)
        try:
            found = self.results(self.rewritten, images, labels)
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise Failure(f"the graph cannot run: {type(error).__name__}: {error}") from None
        for what, right in expected.items():
            if _differ(found[what], right):
                raise Failure(f"{what} is wrong{when}: {_numbers(found[what], right)}{self._suspect()}")

    def _suspect(self) -> str:
        """Name the first node that only the rewritten graph has."""
        plain, rewritten = (compiled.program(self.shape).graph for compiled in (self.plain, self.rewritten))
        fresh = [node for node in rewritten.nodes if node not in plain.nodes]
        return f"\n  look first at: {_call(fresh[0])}" if fresh else ""

    def change_parameters(self) -> None:
        """Give all parameters and running statistics other numbers, in place."""
        for array in (*(p.data for p in self.model.parameters()), *self.model.buffers()):
            array *= self.random.uniform(0.5, 1.5, array.shape).astype(array.dtype)


def _loss(prediction: Tensor, labels: Any, from_logits: bool = True) -> Tensor:
    return cross_entropy(prediction, labels, from_logits=from_logits)


def _differ(found: Array, right: Array) -> bool:
    if found.shape != right.shape:
        return True
    return not (np.abs(found - right) <= _BOUND * max(np.abs(right).max(initial=0), 1e-6)).all()


def _numbers(found: Array, right: Array) -> str:
    if found.shape != right.shape:
        return f"its shape is {found.shape}, expected {right.shape}"
    if not np.isfinite(found).all():
        return "NaN: a node reads memory before it is written, or after it is used again"
    factor = float(np.vdot(found, right)) / max(float(np.vdot(right, right)), 1e-30)
    if found.size > 1 and factor and not _differ(found, np.asarray(factor * right)):
        return f"every number is {factor:.6g} times what it should be"
    error = np.abs(found - right).max() / max(np.abs(right).max(), 1e-30)
    return f"the error is {error:.1e} of the largest number; rounding makes about 1e-6"


def check(
    rewrite: Rewrite,
    after: str = FIRST,
    nets: Mapping[str, Callable[[], Module]] = NETS,
    shape: tuple[int, ...] = (1, 6, 4, 8, 3),
    may_do_nothing: bool = False,
) -> list[Change]:
    """Compile nets with and without a pass, and compare predictions, losses and gradients on fresh numbers.

    Parameters
    ----------
    rewrite : callable
        Takes a graph and options, returns a graph.
    after : str
        The pass of the compiler after which it runs; "traced" is before all.
    nets : mapping of name to function
        Each makes a net with three classes.
    shape : tuple of int
        Of the input.
    may_do_nothing : bool
        Whether a pass that changes no graph is right, too.

    Returns
    -------
    list of Change
        For each net in prediction and in training.

    Raises
    ------
    Failure
        What is wrong first, in a few lines; also if the pass changes nothing at all.
    """
    if after not in (FIRST, *PASSES):
        raise Failure(f"after = {after!r} is no pass; expected {', '.join((FIRST, *PASSES))}")
    changes = []
    for net, make in nets.items():
        for training in (False, True):
            hook, mode = _Rewritten(rewrite, after), "training" if training else "prediction"
            try:
                pair = _Pair(make(), training, shape, hook)
                pair.compare()
                pair.compare(" in a second run, on other numbers")
                pair.change_parameters()
                pair.compare(" after the parameters have changed")
            except Failure as failure:
                raise Failure(f"{net}, {mode}: {failure}") from None
            changes.append(_change(net, mode, pair, hook))
    if not may_do_nothing and not any(change.lines for change in changes):
        tried = ", ".join(nets)
        raise Failure(f"the pass changes no graph; tried: {tried}. A file may bring its own net: model()")
    return changes


def _change(net: str, mode: str, pair: _Pair, hook: _Rewritten) -> Change:
    plain, rewritten = (each.stages(pair.shape)[-1] for each in (pair.plain, pair.rewritten))
    old, new = (_around(stage.graph) for stage in (plain, rewritten))
    two = figures(plain), figures(rewritten)
    return Change(net, mode, *two, (len(old), len(new)), _lines(*hook.seen[-1]), new)


def _around(graph: Graph) -> list[str]:
    """Return each reorder with the operators before and after it."""
    found = []
    for node in graph.nodes:
        if node.op == "reorder":
            before, after = graph.producer(node.inputs["src"]), graph.consumers(node.outputs["dst"])
            names = before.op if before else "the input", ", ".join(n.op for n in after) or "the output"
            found.append(" > ".join((names[0], node.name, names[1])))
    return found


def _lines(before: Graph, after: Graph) -> list[str]:
    """Return a line for each node that went, came or changed."""
    old, new = ({node.name: node for node in graph.nodes} for graph in (before, after))
    gone = [f"- {_call(node)}" for name, node in old.items() if name not in new]
    come = [f"+ {_call(node)}" for name, node in new.items() if name not in old]
    changed = [f"~ {_call(node)}" for name, node in new.items() if name in old and node != old[name]]
    layouts = [
        f"~ {name}: {before.values[name].layout} is now {value.layout}"
        for name, value in after.values.items()
        if name in before.values and value.layout != before.values[name].layout
    ]
    return [*gone, *come, *changed, *layouts]


def _call(node: Node) -> str:
    inputs = ", ".join(f"{role} {value}" for role, value in node.inputs.items())
    return f"{', '.join(node.outputs.values())} = {node.op}({inputs})"


# ---- the report --------------------------------------------------------------------------------------------


def report(changes: Sequence[Change]) -> str:
    """Return a table of all nets, before and after the pass, and the nodes that it changed in the first."""
    head = ("net", "mode", "nodes", "unfused", "reorders", "MB moved", "arena MB")
    rows = []
    for each in changes:
        old, new = each.before, each.after
        counts = (old.nodes, new.nodes), (old.unfused, new.unfused), each.reorders
        cells = [_arrow(f"{before}", f"{after}") for before, after in counts]
        sizes = (old.moved, new.moved), (old.arena, new.arena)
        cells += [_arrow(f"{before / 1e6:.3f}", f"{after / 1e6:.3f}") for before, after in sizes]
        rows.append((each.net, each.mode, *cells))
    changed = next(change for change in changes if change.lines)
    shown = changed.lines[:_LINES]
    more = [f"and {len(changed.lines) - _LINES} more"] * (len(changed.lines) > _LINES)
    title = f"{changed.net}, {changed.mode}: what the pass changes (- gone, + new, ~ changed)"
    return "\n".join([aligned(head, rows, left=2), "", title, *(f"  {line}" for line in [*shown, *more])])


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def time_it(
    rewrite: Rewrite, after: str, net: Callable[[], Module], shape: tuple[int, ...]
) -> tuple[float, float, float]:
    """Return milliseconds of a prediction without and with a pass, and how much the rounds differ.

    Both take turns, each time on fresh numbers. Medians; half of the rounds without the pass differ by less
    than the last figure, 0.1 for 10 %.
    """
    pair = _Pair(net(), False, shape, _Rewritten(rewrite, after), debug=False)
    times: list[list[float]] = [[], []]
    for _ in range(_ROUNDS + 1):
        images = pair.random.standard_normal(shape).astype(np.float32)
        for compiled, found in zip((pair.plain, pair.rewritten), times, strict=True):
            start = time.perf_counter()
            compiled(images)
            found.append(time.perf_counter() - start)
    before, now = (np.sort(found[1:]) for found in times)
    spread = float((before[3 * _ROUNDS // 4] - before[_ROUNDS // 4]) / np.median(before))
    return 1e3 * float(np.median(before)), 1e3 * float(np.median(now)), spread


def judge(module: ModuleType, only_check: bool = False) -> str:
    """Return the report on a student's file; Failure says what is wrong."""
    rewrite, after = getattr(module, "rewrite", None), getattr(module, "after", FIRST)
    if not callable(rewrite):
        raise Failure(f"{module.__file__}: defines no rewrite; expected rewrite(graph, options)")
    own, shape = getattr(module, "model", None), tuple(getattr(module, "shape", (1, 6, 4, 8, 3)))
    nets = {"your model": own} if callable(own) else NETS
    changes = check(rewrite, after, nets, shape)
    text = f"rewrite: right on {count(len(nets), 'net')}, in prediction and in training\n\n{report(changes)}"
    if only_check:
        return text
    best = min(changes, key=lambda change: change.after.moved / change.before.moved)
    large = shape if callable(own) else (1, _TIMED, _TIMED, _TIMED, 3)
    before, now, spread = time_it(rewrite, after, nets[best.net], large)
    noise = f"the rounds differ by {spread:.0%}"
    if abs(before / now - 1) <= spread:
        noise = f"within the noise: {noise}"
    what = f"{best.net}, prediction of {' x '.join(map(str, large[1:4]))} voxels"
    times = f"{before:.3g} ms before, {now:.3g} ms after, {before / now:.3g} times as fast ({noise})"
    return f"{text}\n\n{what}: {times}"
