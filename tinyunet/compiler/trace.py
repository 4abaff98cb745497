"""From a model to a graph: the model's own ``forward`` runs once, on arrays that have no numbers.

Inside :func:`tinyunet.autograd.intercept` every operator that the model calls is written down instead
of run. What it hands back is a tensor of the right shape whose voxels all lie on one place in memory,
so that tracing a volume of any size costs nothing. (An operator that ``operators`` does not describe does
run, in each trace, on arrays of full size.)

The trace cannot see what a program computes beside the operators, in plain NumPy. So it is made three
times, with zeros, positive and negative numbers, and other labels: if a constant of the one differs from
that of another, it depends on the data. (What is the same for all three is not noticed.) In a loss this is
what the one-hot labels of :mod:`tinyunet.losses` are, and such a loss stays one node, run on a tape of its
own at each step. In a model it is an error.
"""

import inspect
import itertools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet.autograd import Function, Tensor, intercept, is_recording
from tinyunet.compiler.ir import NDHWC, PLAIN, Graph, Kind, Node, Value
from tinyunet.compiler.operators import OPERATORS, Operator
from tinyunet.compiler.own import Loans
from tinyunet.engine.context import Context, operator_name
from tinyunet.nn import Module

Loss = Callable[..., Tensor]
Array = npt.NDArray[Any]

IMAGES, LABELS = "images", "labels"

# Values whose memory holds something else later.
_PASSING = ("input", "temporary")

# Settings of operators that are compared between traces.
_COMPARED = (int, float, str, tuple, slice, np.generic, types.EllipsisType)


@dataclass
class _Trace:
    """What is known while the model runs. Arrays hold ``fill`` times something of their own."""

    fill: int
    names: dict[int, tuple[str, Kind]]  # of parameters (tensors) and buffers (arrays), by identity
    models: frozenset[str]  # those names
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    data: dict[str, Array] = field(default_factory=dict)
    constants: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)  # an identity is good only while its object lives

    def tensor(self, value: Value) -> Tensor:
        """A tensor without memory that stands for a value."""
        tensor = Tensor(np.zeros((), np.float32), value.needs_gradient)
        numbers = np.sin(np.arange(1 + math.prod(value.shape[-1:])) + len(self.kept)) + 2
        last_axis = (self.fill * numbers[1:]).astype(value.dtype).reshape(value.shape[-1:])
        tensor.data = np.broadcast_to(last_axis, value.shape)
        self.values[value.name] = value
        self.names[id(tensor)] = value.name, value.kind
        self.kept.append(tensor)
        return tensor

    def __call__(self, function: type[Function], arguments: tuple[Any, ...]) -> Tensor:
        """Write down one call of an operator, and return what stands for its result."""
        roles = _argument_names(function, len(arguments))
        inputs: dict[str, str] = {}
        order: list[Any] = []
        for role, argument in zip(roles, arguments, strict=True):
            if isinstance(argument, Tensor | np.ndarray):
                inputs[role] = self._value_of(argument)
                written = role.startswith("running_")
                if written and isinstance(argument, np.ndarray) and not argument.flags.c_contiguous:
                    raise ValueError(f"compile: {role} is written to; it must be a contiguous array")
                order.append(None)
            else:
                self.constants.append(argument)
                order.append(argument)
        needs = tuple(isinstance(a, Tensor) and a.requires_grad and is_recording() for a in arguments)
        passing = {role for role, v in inputs.items() if self.values[v].kind in _PASSING}
        lent = frozenset(passing if _is_own(function) else ())
        known = OPERATORS.get(function) or _find_out(function, arguments, roles, needs, lent)
        name = self.unique(_module_of(inputs.values()) or known.name)
        arrays = {r: a.data if isinstance(a, Tensor) else a for r, a in zip(roles, arguments, strict=True)}
        shape = known.shape(arrays)
        first = next((a for a in arguments if isinstance(a, Tensor)), arguments[0])
        dtype = np.dtype(known.dtype or first.dtype)
        dst = Value(self.free(f"{name}.dst"), shape, dtype, _layout(shape), needs_gradient=any(needs))
        outputs = {"dst": dst.name}
        for workspace, describe in known.workspaces.items() if any(needs) else ():
            extent, kind = describe(arrays, shape)
            value = Value(self.free(f"{name}.{workspace}"), extent, np.dtype(kind), _layout(extent))
            self.values[value.name] = value
            outputs[workspace] = value.name
        # What nobody has described may call its settings as passes call theirs.
        described = zip(roles, order, strict=True) if function in OPERATORS else ()
        attributes = {role: setting for role, setting in described if setting is not None} | {
            "function": function,
            "arguments": tuple(zip(roles, order, strict=True)),
            "needs_gradient": needs,
            "saves": known.saves,
        }
        if _is_own(function):
            attributes["lent"] = lent
        if "weights" in arrays:
            attributes["kernel"] = arrays["weights"].shape[2:]
        views = {"dst": "a"} if known.name == "reshape" else {}
        self.nodes.append(Node(name, known.name, inputs, outputs, attributes, views=views))
        return self.tensor(dst)

    def loss(self, loss: Loss, prediction: Tensor, from_logits: bool) -> Tensor:
        """Trace a loss, on labels of as many classes as it takes: not all channels need be classes."""
        mine = len(self.nodes)
        voxels = 1 + np.arange(math.prod(prediction.shape[:-1]))  # of one voxel the label is not 0
        refused: list[ValueError] = []
        for classes in range(max((*prediction.shape[-1:], 2)), 1, -1):
            labels = (self.fill * voxels % classes).astype(np.uint8).reshape(prediction.shape[:-1])
            self.names[id(labels)] = LABELS, "input"
            self.values[LABELS] = Value(LABELS, labels.shape, labels.dtype, kind="input")
            self.kept.append(labels)
            try:
                more = {"from_logits": True} if from_logits else {}
                return loss(prediction, labels, **more)
            except ValueError as error:
                del self.nodes[mine:]
                refused.append(error)
        raise refused[0]

    def _value_of(self, argument: Tensor | Array) -> str:
        name, kind = self.names.get(id(argument), ("", "constant"))
        array = argument.data if isinstance(argument, Tensor) else argument
        if not name:
            if isinstance(argument, Tensor) and argument.requires_grad:
                raise ValueError("compile: the model uses a parameter that is not among its own")
            name = f"constant:{len(self.constants)}"
            self.constants.append(array)
            self.names[id(argument)] = name, "constant"
            self.kept.append(argument)
        if name not in self.values:
            needs = kind == "parameter"
            layout = _layout(array.shape) if kind == "constant" else PLAIN
            self.values[name] = Value(name, array.shape, array.dtype, layout, kind, needs)
            # A constant may be any view; a parameter is written to where it is.
            self.data[name] = np.asarray(array, order="C") if kind == "constant" else array
        return name

    def free(self, name: str) -> str:
        """Return a name for a value that no other has, be it a parameter or buffer not met so far."""
        while name in self.values or name in self.models:
            name += "'"
        return name

    def unique(self, name: str) -> str:
        """Return a name for a node that no other has."""
        taken = {node.name for node in self.nodes}
        count = 1
        while (name if count == 1 else f"{name}:{count}") in taken:
            count += 1
        return name if count == 1 else f"{name}:{count}"


def trace(model: Module, input_shape: tuple[int, ...], loss: Loss | None = None) -> Graph:
    """Write down what a model computes, in its present mode (training or inference).

    Parameters
    ----------
    model : Module
        Is not run and not changed.
    input_shape : tuple of int
        Of the images, batch and channels included.
    loss : callable, optional
        ``loss(prediction, labels)``. If it takes ``from_logits`` and the model has ``logits``, it gets
        those: the mathematics is the same, the kernels are fused.

    Returns
    -------
    Graph
        The forward part. Its output is the prediction, or the loss.

    Raises
    ------
    ValueError
        The shapes do not fit, or the model computes with data beside the operators.
    """
    before = model.random_state()
    first, split, prediction, result = _record(model, input_shape, loss, 0)
    others = [_record(model, input_shape, loss, fill)[0] for fill in (1, -1)]
    if str(model.random_state()) != str(before):
        model.load_random_state(before)
        raise ValueError(
            "compile: the model draws random numbers, but not by tinyunet's operators; use the eager model"
        )
    alike = min(_calls_alike(first, other) for other in others)
    if alike < split:
        raise ValueError(
            f"compile: what {first.nodes[alike].name} is given depends on the data, but is not computed"
            " by tinyunet's operators; use the eager model"
        )
    if all(alike == len(traced.nodes) for traced in (first, *others)):
        return _graph(first, result, loss)
    _check_eager_loss(first, split, prediction)
    value = first.values[prediction]
    del first.nodes[split:]
    name, outputs = first.unique("loss"), {"dst": first.free("loss.dst")}
    outputs["diff_prediction"] = f"d({prediction})"
    node = Node(
        name,
        "eager_loss",
        {"prediction": prediction, "labels": LABELS},
        outputs,
        {"function": loss, "from_logits": _wants_logits(model, loss)},
    )
    scalar = Value(outputs["dst"], (), np.dtype(np.float64), needs_gradient=True)
    first.values |= {scalar.name: scalar}
    first.values[f"d({prediction})"] = replace(value, name=f"d({prediction})", needs_gradient=False)
    first.nodes.append(node)
    return _graph(first, scalar.name, loss)


def _record(
    model: Module, input_shape: tuple[int, ...], loss: Loss | None, fill: int
) -> tuple[_Trace, int, str, str]:
    """Return the trace, how many of its nodes are the model's, and the names of prediction and result.

    The result is the loss, or the prediction where there is none.
    """
    names: dict[int, tuple[str, Kind]] = {}
    names |= {id(p): (name, "parameter") for name, p in model.named_parameters()}
    names |= {id(b): (name, "buffer") for name, b in model.named_buffers()}
    models = frozenset(name for name, _ in names.values())
    for name in (IMAGES, LABELS) if loss else (IMAGES,):
        if name in models:
            raise ValueError(
                f"compile: the model has a parameter or buffer {name!r}, as the graph calls its input;"
                " give it another name"
            )
    traced = _Trace(fill, names, models)
    dtype = next((p.dtype for p in model.parameters()), np.dtype(np.float32))
    images = Value(IMAGES, tuple(input_shape), dtype, _layout(input_shape), "input")
    with intercept(traced):
        src = traced.tensor(images)
        logits = _wants_logits(model, loss)
        prediction = model.logits(src) if logits else model(src)  # type: ignore[attr-defined]
        _, kind = traced.names.get(id(prediction), ("", "parameter"))
        if kind == "parameter":
            raise TypeError("compile: the model must return one Tensor made by tinyunet's operators")
        mine, result = len(traced.nodes), prediction
        if loss:
            result = traced.loss(loss, prediction, logits)
            if id(result) not in traced.names:
                raise TypeError("compile: the loss must be a Tensor made by tinyunet's operators")
            if result.shape != ():
                raise ValueError(f"compile: the loss must be one number, not {result.shape}")
    return traced, mine, traced.names[id(prediction)][0], traced.names[id(result)][0]


def _graph(traced: _Trace, output: str, loss: Loss | None) -> Graph:
    inputs = (IMAGES, LABELS) if loss else (IMAGES,)
    logits = [n.inputs["logits"] for n in traced.nodes if n.op in ("dice_sums", "cross_entropy")]
    classes = min((max(traced.values[name].shape[-1], 2) for name in logits), default=0)
    graph = Graph(tuple(traced.nodes), traced.values, inputs, (output,), traced.data, classes=classes)
    return graph.rewrite({}).check()


def _wants_logits(model: Module, loss: Loss | None) -> bool:
    if loss is None or not callable(getattr(type(model), "logits", None)):
        return False
    return "from_logits" in inspect.signature(loss).parameters


def _calls_alike(first: _Trace, second: _Trace) -> int:
    """Return how many calls, from the first on, are the same in two traces."""
    pairs = zip(first.nodes, second.nodes, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: _same_call(*pair, first, second), pairs))


def _check_eager_loss(traced: _Trace, split: int, prediction: str) -> None:
    """Check that a loss which runs on a tape of its own reads nothing of the model but its prediction."""
    inside = {IMAGES} | {v for node in traced.nodes[:split] for v in node.outputs.values()}
    for node in traced.nodes[split:]:
        for name in node.inputs.values():
            if traced.values[name].kind == "parameter":
                raise ValueError(
                    f"compile: the loss reads the parameter {name!r}, and the labels beside tinyunet's "
                    "operators; use the eager model, or weight_decay of the optimizer"
                )
            if name in inside - {prediction}:
                raise ValueError(
                    f"compile: the loss reads {name!r} beside the prediction, and the labels beside "
                    "tinyunet's operators; use the eager model, or a loss that takes logits"
                )


def _same_call(a: Node, b: Node, first: _Trace, second: _Trace) -> bool:
    if (a.op, a.inputs, a.outputs) != (b.op, b.inputs, b.outputs):
        return False
    settings = [[x for _, x in node.attributes["arguments"] if isinstance(x, _COMPARED)] for node in (a, b)]
    return settings[0] == settings[1] and all(
        np.array_equal(first.data[name], second.data[name])
        for name in a.inputs.values()
        if name in first.data and first.values[name].kind == "constant"
    )


def _argument_names(function: type[Function], count: int) -> list[str]:
    names: list[str] = []
    for parameter in list(inspect.signature(function.forward).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}{i}" for i in range(count - len(names))]
        else:
            names.append(parameter.name)
    return names[:count]


def _module_of(inputs: Any) -> str:
    """``encoder.0.conv0`` for an operator that takes ``encoder.0.conv0.weights``."""
    owners = [i.rpartition(".")[0] for i in inputs if i.endswith((".weights", ".scale"))]
    return owners[0] if owners else ""


def _layout(shape: tuple[int, ...]) -> str:
    return NDHWC if len(shape) == 5 else PLAIN


def _is_own(function: type[Function]) -> bool:
    """Whether an operator is the user's."""
    return function.__module__.partition(".")[0] != "tinyunet"


def _find_out(
    function: type[Function],
    arguments: tuple[Any, ...],
    roles: list[str],
    needs: tuple[bool, ...],
    lent: frozenset[str],
) -> Operator:
    """Run an operator that nobody has described, to see the shape it makes and what it saves."""
    ctx, loans = Context(function, tuple(Tensor(0.0) if need else None for need in needs)), Loans()
    arrays = [
        np.array(a.data if isinstance(a, Tensor) else a, order="C")
        if isinstance(a, Tensor | np.ndarray)
        else a
        for a in arguments
    ]
    for index, role in enumerate(roles):
        if role in lent:
            arrays[index] = loans.lend(arrays[index])
    known = _description(ctx, dict(zip(roles, arrays, strict=True)))
    arrays.clear()
    loans.check(f"{function.__name__}.forward", ValueError)
    return known


def _description(ctx: Context, given: dict[str, Any]) -> Operator:
    with np.errstate(all="ignore"):
        returned = ctx.function.forward(ctx, *given.values())
    dst = Tensor(returned).data
    shape, dtype, saves = dst.shape, dst.dtype, list[str]()
    workspaces: dict[str, Any] = {}
    known = {id(array): role for role, array in given.items()} | {id(dst): "dst"}
    for index, array in enumerate(ctx.saved):
        name = "" if array is None else known.get(id(array), f"saved{index}")
        saves.append(name)
        if array is not None and id(array) not in known:
            like = array.shape, array.dtype
            workspaces[name] = lambda *_, like=like: like
    ctx.save()
    name = operator_name(ctx.function)
    if _is_own(ctx.function):  # may be called as one that passes know
        name = f"own:{name}"
    return Operator(name, lambda _: shape, tuple(saves), workspaces, dtype)
