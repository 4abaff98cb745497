"""From a model to a graph: the model's own ``forward`` runs once, on tensors that have no numbers.

Inside :func:`tinyunet.tape.intercept` every operator that the model calls is recorded instead of run. Its
result has a shape and a type, but no numbers (:class:`tinyunet.tape.Absent`). So tracing a volume of any size
costs nothing, and a model that looks at numbers, in an ``if`` or in NumPy, is refused, because these numbers
would become constants of the graph. A loss may look at numbers: it then stays one node, which runs on a tape
of its own at each step.

An operator without a record, such as a user's, runs once on zeros, to find the shape of its result.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet import tape
from tinyunet.autograd import Function, Tensor
from tinyunet.compiler.ir import NDHWC, PLAIN, Graph, Kind, Node, Value
from tinyunet.compiler.operators import OPERATORS
from tinyunet.compiler.record import Operator
from tinyunet.nn import Module
from tinyunet.tape import Absent, Context, NeedsNumbersError, intercept, operator_name, uses_of_leaves

Loss = Callable[..., Tensor]
Array = npt.NDArray[Any]

IMAGES, LABELS = "images", "labels"


class _Trace:
    """The graph as far as the model has run. Objects have names by identity, so they are kept alive."""

    def __init__(self, model: Module, inputs: tuple[str, ...]) -> None:
        self.names: dict[int, tuple[str, Kind]] = {}
        self.names |= {id(p): (name, "parameter") for name, p in model.named_parameters()}
        self.names |= {id(b): (name, "buffer") for name, b in model.named_buffers()}
        self.models = {name for name, _ in self.names.values()}
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.data: dict[str, Array] = {}
        self._kept: list[Any] = []
        for name in inputs:
            if name in self.models:
                raise ValueError(
                    f"compile: the model has a parameter or buffer {name!r}, as the graph calls its input;"
                    " give it another name"
                )

    def stands_for(self, value: Value) -> Absent:
        """Return an array without numbers that stands for a value."""
        self.values[value.name] = value
        return self._named(Absent(value.name, value.shape, value.dtype), value)

    def tensor(self, value: Value) -> Tensor:
        """Return a tensor of such an array."""
        tensor = Tensor(np.zeros((), np.float32), value.needs_gradient)
        tensor.data = self.stands_for(value)  # type: ignore[assignment]
        return self._named(tensor, value)

    def _named(self, thing: Any, value: Value) -> Any:
        self.names[id(thing)] = value.name, value.kind
        self._kept.append(thing)
        return thing

    def __call__(self, function: type[Function], arguments: tuple[Any, ...]) -> Tensor:
        """Record one call of an operator, and return a stand-in for its result."""
        roles = _argument_names(function, len(arguments))
        inputs: dict[str, str] = {}
        settings: list[tuple[str, Any]] = []
        for role, argument in zip(roles, arguments, strict=True):
            is_array = isinstance(argument, Tensor | np.ndarray | Absent)
            if is_array:
                inputs[role] = self._value_of(argument)
                written = role.startswith("running_") and isinstance(argument, np.ndarray)
                if written and not argument.flags.c_contiguous:
                    raise ValueError(f"compile: {role} is written to; it must be a contiguous array")
            settings.append((role, None if is_array else argument))
        needs = tuple(isinstance(a, Tensor) and a.requires_grad and tape.is_recording() for a in arguments)
        given = dict(zip(roles, map(_shaped, arguments), strict=True))
        known = OPERATORS.get(function)
        attributes: dict[str, Any] = {"function": function, "arguments": tuple(settings)}
        attributes["needs_gradient"] = needs
        if known is None:  # its settings may be called as passes call theirs
            known = _run(function, given, needs)
            passing = ("input", "temporary")  # memory that holds something else later
            attributes["copied"] = {r for r, name in inputs.items() if self.values[name].kind in passing}
        else:
            attributes |= {role: setting for role, setting in settings if setting is not None}
        attributes["saves"] = known.saves(needs) if callable(known.saves) else known.saves
        if "weights" in inputs:
            attributes["kernel"] = given["weights"].shape[2:]
        name = self.unique(_module_of(inputs.values()) or known.name)
        outputs, result = self._outputs(known, name, given, any(needs))
        views = {"dst": "a"} if known.name == "reshape" else {}
        self.nodes.append(Node(name, known.name, inputs, outputs, attributes, views=views))
        return result

    def _outputs(
        self, known: Operator, name: str, given: dict[str, Any], needs_gradient: bool
    ) -> tuple[dict[str, str], Tensor]:
        """Name the values that an operator writes; workspaces are for its gradient."""
        shape, first = known.shape(given), next(a for a in given.values() if isinstance(a, np.ndarray))
        kind = np.dtype(known.dtype(given) if known.dtype else first.dtype)
        dst = Value(self.free(f"{name}.dst"), shape, kind, _layout(shape), needs_gradient=needs_gradient)
        outputs, result = {"dst": dst.name}, self.tensor(dst)
        for workspace, describe in known.workspaces.items() if needs_gradient else ():
            extent, of_type = describe(given, shape)
            value = Value(self.free(f"{name}.{workspace}"), extent, np.dtype(of_type), _layout(extent))
            outputs[workspace], self.values[value.name] = value.name, value
        return outputs, result

    def _value_of(self, argument: Tensor | Array) -> str:
        name, kind = self.names.get(id(argument), ("", "constant"))
        array = argument.data if isinstance(argument, Tensor) else argument
        if not name:
            if isinstance(argument, Tensor) and argument.requires_grad:
                raise ValueError("compile: the model uses a parameter that is not among its own")
            if isinstance(array, Absent):
                raise NeedsNumbersError(array.name)
            name = f"constant:{len(self._kept)}"
            self.names[id(argument)] = name, "constant"
            self._kept.append(argument)
        if name not in self.values:
            layout = _layout(array.shape) if kind == "constant" else PLAIN
            needs = kind == "parameter"
            self.values[name] = Value(name, array.shape, array.dtype, layout, kind, needs)
            # A constant may be any view; a parameter is written to where it is.
            self.data[name] = np.asarray(array, order="C") if kind == "constant" else array
        return name

    def free(self, name: str) -> str:
        """Return a name for a value that no other value, parameter or buffer has."""
        while name in self.values or name in self.models:
            name += "'"
        return name

    def unique(self, name: str) -> str:
        """Return a name for a node that no other has."""
        taken, count = {node.name for node in self.nodes}, 1
        while (name if count == 1 else f"{name}:{count}") in taken:
            count += 1
        return name if count == 1 else f"{name}:{count}"


def trace(model: Module, input_shape: tuple[int, ...], loss: Loss | None = None) -> Graph:
    """Record the operators of a model in its present mode (training or inference).

    Parameters
    ----------
    model : Module
        Afterwards its attributes are as before, except tensors that ``forward`` leaves in it.
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
        The shapes do not fit, or the model computes with data outside the operators.
    """
    inputs, before = (IMAGES, LABELS) if loss else (IMAGES,), model.random_state()
    traced, logits = _Trace(model, inputs), _wants_logits(model, loss)
    dtype = usual_dtype(model)
    images = traced.tensor(Value(IMAGES, tuple(input_shape), dtype, _layout(tuple(input_shape)), "input"))
    with _attributes_kept(model):
        with intercept(traced):
            try:
                prediction = model.logits(images) if logits else model(images)  # type: ignore[attr-defined]
            except NeedsNumbersError as error:
                raise ValueError(
                    f"compile: the model looks at the numbers of {error.name!r}; what depends on the data"
                    " must be computed by tinyunet's operators; use the eager model"
                ) from None
        result = _result(traced, prediction, "model must return one")
        if loss:
            result = _trace_loss(traced, loss, prediction, result, model)
            # What is made of labels alone comes first, so that passes can join a loss to the layer before it.
            traced.nodes.sort(key=lambda node: node.op != "coarse_labels")
    if str(model.random_state()) != str(before):
        model.load_random_state(before)
        raise ValueError(
            "compile: the model draws random numbers, but not by tinyunet's operators; use the eager model"
        )
    read = [n for n in traced.nodes if n.op in ("dice_sums", "cross_entropy", "binary_cross_entropy")]
    classes = min((max(traced.values[n.inputs["logits"]].shape[-1], 2) for n in read), default=0)
    ignored = {n.attributes.get("ignore_label") for n in read}
    graph = Graph(
        tuple(traced.nodes),
        traced.values,
        inputs,
        (result,),
        traced.data,
        classes=classes,
        ignore_label=ignored.pop() if len(ignored) == 1 else None,
    )
    return graph.rewrite({}).check()


def usual_dtype(model: Module) -> np.dtype[Any]:
    """Return the type of a model's images: that of its parameters."""
    return next((p.dtype for _, p in model.named_parameters()), np.dtype(np.float32))


def _result(traced: _Trace, found: Any, what: str) -> str:
    """Return the name of the result of a model or a loss."""
    name, kind = traced.names.get(id(found), ("", ""))
    if not isinstance(found, Tensor) or kind not in ("temporary", "input"):
        raise TypeError(f"compile: the {what} Tensor made by tinyunet's operators")
    return name


def _trace_loss(traced: _Trace, loss: Loss, prediction: Tensor, name: str, model: Module) -> str:
    """Write down a loss, as its operators or as one node; return the name of its value."""
    shape, mine = prediction.shape[:-1], len(traced.nodes)
    labels = traced.stands_for(Value(LABELS, shape, np.dtype(np.uint8), kind="input"))
    options = {"from_logits": True} if _wants_logits(model, loss) else {}
    try:
        with intercept(traced):
            found = loss(prediction, labels, **options)
    except NeedsNumbersError:
        del traced.nodes[mine:]
        return _eager_loss(traced, loss, options, traced.values[name])
    return _result(traced, _one_number(found), "loss must be a")


def _eager_loss(traced: _Trace, loss: Loss, options: dict[str, bool], prediction: Value) -> str:
    """Write down a loss that reads numbers as one node; of the model it may read the prediction alone."""
    trial = Tensor(np.zeros(prediction.shape, prediction.dtype), requires_grad=True)
    with np.errstate(all="ignore"):
        try:
            found = loss(trial, np.zeros(prediction.shape[:-1], np.int64), **options)
        except NeedsNumbersError as error:
            raise ValueError(
                f"compile: the loss reads {error.name!r} beside the prediction, and the labels beside "
                "tinyunet's operators; use the eager model, or a loss that takes logits"
            ) from None
    context = _one_number(found)._context
    for leaf in uses_of_leaves(context) if context else ():
        if leaf is not trial:
            name, _ = traced.names.get(id(leaf), ("of another model", ""))
            raise ValueError(
                f"compile: the loss reads the parameter {name!r}, and the labels beside tinyunet's "
                "operators; use the eager model, or weight_decay of the optimizer"
            )
    scalar = Value(traced.free("loss.dst"), (), np.dtype(np.float64), needs_gradient=True)
    gradient = replace(prediction, name=f"d({prediction.name})", needs_gradient=False)
    traced.values |= {scalar.name: scalar, gradient.name: gradient}
    inputs = {"prediction": prediction.name, "labels": LABELS}
    outputs = {"dst": scalar.name, "diff_prediction": gradient.name}
    settings = {"function": loss, "options": options}
    traced.nodes.append(Node(traced.unique("loss"), "eager_loss", inputs, outputs, settings))
    return scalar.name


def _one_number(loss: Any) -> Tensor:
    """Return a loss if it is a tensor of one number."""
    if not isinstance(loss, Tensor):
        raise TypeError("compile: the loss must be a Tensor made by tinyunet's operators")
    if loss.shape != ():
        raise ValueError(f"compile: the loss must be one number, not {loss.shape}")
    return loss


@contextmanager
def _attributes_kept(model: Module) -> Iterator[None]:
    """Put back the attributes that ``forward`` sets in the model, except tensors that it leaves there."""
    before = [(part, dict(vars(part))) for _, part in model.named_modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            for name, value in list(vars(part).items()):
                if value is attributes.get(name, part) or holds_traced(value):
                    continue
                if name in attributes:
                    vars(part)[name] = attributes[name]
                else:
                    del vars(part)[name]


def holds_traced(value: Any) -> bool:
    """Whether a value is, or contains, a tensor that a trace has left."""
    if isinstance(value, list | tuple):
        return any(map(holds_traced, value))
    if isinstance(value, dict):
        return any(map(holds_traced, value.values()))
    return isinstance(value, Tensor) and isinstance(value.data, Absent)


def _wants_logits(model: Module, loss: Loss | None) -> bool:
    if loss is None or not callable(getattr(type(model), "logits", None)):
        return False
    return "from_logits" in inspect.signature(loss).parameters


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


def _shaped(argument: Any) -> Any:
    """An argument as a record takes it: instead of an array without numbers, zeros that take no memory."""
    array = argument.data if isinstance(argument, Tensor) else argument
    return np.broadcast_to(np.zeros((), array.dtype), array.shape) if isinstance(array, Absent) else array


def _run(function: type[Function], given: dict[str, Any], needs: tuple[bool, ...]) -> Operator:
    """Run an operator without a record on copies, and return a record with its results."""
    ctx = Context(function, tuple(Tensor(0.0) if need else None for need in needs))
    arrays = [np.array(a, order="C") if isinstance(a, np.ndarray) else a for a in given.values()]
    with np.errstate(all="ignore"):
        dst = Tensor(function.forward(ctx, *arrays)).data
    # Its name may be that of one that passes know.
    return Operator(
        f"own:{operator_name(function)}", function, lambda _: dst.shape, dtype=lambda _: dst.dtype
    )
