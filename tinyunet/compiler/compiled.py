"""What ``tinyunet.compile`` returns: a training step, or a prediction, for inputs of any shape.

Each input shape has a program of its own. The last few are kept.

Python threads take turns (:mod:`tinyunet.common.turns`): each call is run whole before another one begins.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arrays import checksum, copy
from kernels.base.buffers import empty
from tinyunet.autograd import Tensor, real_numbers
from tinyunet.common.turns import one_at_a_time
from tinyunet.compiler.changes import Glance, plain
from tinyunet.compiler.differentiate import differentiate, gradient_name
from tinyunet.compiler.executor import Program
from tinyunet.compiler.finish import finish
from tinyunet.compiler.ir import Graph
from tinyunet.compiler.passes import PASSES, Options
from tinyunet.compiler.sharing import pack_first
from tinyunet.compiler.show import Stage
from tinyunet.compiler.trace import LABELS, Loss, trace
from tinyunet.engine.context import Listener
from tinyunet.engine.local_ranks import ALONE, LocalRanks
from tinyunet.losses import checked_labels
from tinyunet.nn import Module, Parameter
from tinyunet.optim import Optimizer

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_KEPT = 3  # programs; each has an arena


class Compiled:
    """What a compiled step and a compiled prediction share: programs by shape.

    A copy, and what is unpickled, has a model of its own, and compiles anew when it is called.
    """

    def __init__(
        self, model: Module, options: Options, debug: bool = False, local: LocalRanks = ALONE
    ) -> None:
        self.model, self.passes, self._options = model, options.passes, options
        # Whose the first program is: that is made by all at the same time, others whenever.
        self._first_local = local
        self._debug = debug
        self._begin()

    def _begin(self) -> None:
        """Have no program yet."""
        self._programs: OrderedDict[Shape, Program] = OrderedDict()
        self._held: list[Array] = []
        self._settings: list[Any] = []
        self._glance: Glance | None = None
        self._beside: list[Array] = []
        self._written: set[tuple[str, str]] = set()  # attributes that forward sets: no settings
        self._runs = False

    def __getstate__(self) -> dict[str, Any]:
        """What :meth:`__init__` was given. Programs are bound to the arrays of this model."""
        given = ("model", "loss", "optimizer", "passes", "_options", "_debug", "_first_local")
        return {name: value for name, value in vars(self).items() if name in given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, no other thread runs a program; nor does this one run ours a second time."""
        with one_at_a_time:
            if self._runs:
                raise RuntimeError(
                    f"{type(self).__name__}: called by what it runs itself, a listener or an operator;"
                    " there it would write over its own memory"
                )
            self._runs = True
            try:
                yield
            finally:
                self._runs = False

    def stages(self, input_shape: Shape) -> list[Stage]:
        """Return the graph for a shape as traced, after each pass, and as it is run."""
        reuse = "plan_memory" in self.passes
        with one_at_a_time:
            graph = self._trace(tuple(input_shape))
        found = [Stage("traced", graph, reuse=False)]
        for name, run in PASSES.items():
            if name in self.passes:
                graph = run(graph, self._options).check()
                found.append(Stage(name, graph, reuse=False))
        found.append(Stage("finish", finish(graph), reuse=False))
        return [*found, replace(found[-1], name="plan_memory", reuse=True)] if reuse else found

    def program(self, input_shape: Shape) -> Program:
        """Return the program for a shape, compiled now if it is new."""
        with one_at_a_time:
            return self._program(tuple(input_shape))

    def _program(self, shape: Shape) -> Program:
        if self._beside or not self._glance or not self._glance.is_same():
            self._look()
        if shape not in self._programs:
            before = self._attributes()
            graph = self.stages(shape)[-1].graph
            if self._attributes() != before:  # set by forward, or made by it the first time
                before = self._attributes()
                self._trace(shape)
                after = self._attributes()
                self._written |= {k for k in {*before, *after} if before.get(k) != after.get(k)}
            reuse = "plan_memory" in self.passes
            local, self._first_local = self._first_local, ALONE
            if local.size > 1:
                graph = pack_first(graph, local)
            while len(self._programs) >= _KEPT:  # before the new arena is made
                self._programs.popitem(last=False)
            self._programs[shape] = Program(graph, self._gradients(), reuse, self._debug, local)
            # What no operator reads as it is may be in the graph as a number or a copy.
            read = graph.data.values()
            self._beside = [
                b for b in self.model.buffers() if not any(np.may_share_memory(a, b) for a in read)
            ]
            self._settings = self._model_settings()
        self._programs.move_to_end(shape)
        return self._programs[shape]

    def _look(self) -> None:
        """Forget the programs if the model has other arrays, or is to compute something else."""
        glance = Glance(self.model, self._others())
        held, settings = self._model_arrays(), self._model_settings()
        if not _same_arrays(held, self._held) or settings != self._settings:
            self._programs.clear()
            self._held, self._settings = held, settings
        # Not before: what the look has raised is to be raised at the next call, too.
        self._glance = glance

    def _trace(self, input_shape: Shape) -> Graph:
        raise NotImplementedError

    def _others(self) -> list[list[Any] | dict[str, Any]]:
        """Objects beside the model that a program is compiled for, of which another means another program."""
        return []

    def _gradients(self) -> dict[str, Array]:
        return {}

    def _model_arrays(self) -> list[Array]:
        return [p.data for p in self.model.parameters()] + self.model.buffers()

    def _model_settings(self) -> list[Any]:
        """What a program is compiled for, besides shapes: parts, attributes, what is learnt, copies."""
        parts = [(name, type(module)) for name, module in self.model.named_modules()]
        kept = {k: v for k, v in self._attributes().items() if k not in self._written}
        learnt = [parameter.requires_grad for parameter in self.model.parameters()]
        return [parts, kept, learnt, _fingerprint(self._beside)]

    def _attributes(self) -> dict[tuple[str, str], Any]:
        """Attributes of all parts, by the part's name and theirs."""
        return {
            (name, k): plain(v)
            for name, module in self.model.named_modules()
            for k, v in vars(module).items()
            if k != "training"
        }

    def _images(self, images: npt.ArrayLike | Tensor) -> Array:
        dtype = next((p.dtype for _, p in self.model.named_parameters()), np.dtype(np.float32))
        return np.asarray(real_numbers("images", images), dtype, order="C")


class Inference(Compiled):
    """A model's prediction: ``predict(images)`` returns an array, channels last.

    Batch norm uses its running statistics and nothing is dropped, whatever mode the model is in.
    """

    def __call__(self, images: npt.ArrayLike | Tensor) -> Array:
        """Return the model's result for a batch.

        Parameters
        ----------
        images : array, shape = (MB, D, H, W, C), or (MB, H, W, C) for a model in two dimensions

        Returns
        -------
        array, shape = (..., classes)
            A new array at each call.
        """
        array = self._images(images)
        with self._turn():
            program = self.program(array.shape)
            program.run(_fingerprint(program.graph.data.values()), images=array)
            found = program.arrays[program.graph.outputs[0]]
            result = empty(found.shape, found.dtype)
            copy(found, result)
        return result

    def _trace(self, input_shape: Shape) -> Graph:
        with self.model.mode(training=False):
            return trace(self.model, input_shape)


class TrainingStep(Compiled):
    """One step of training: ``step(images, labels)`` returns the loss.

    The gradients of the step stay in the optimizer's buffer until the next one. Several threads may call
    it: their steps come one after the other.

    If ranks share the optimizer (:mod:`tinyunet.engine.local_ranks`), they share the program for the first
    shape: all of them compile it, and meet in a barrier between two runs.
    """

    def __init__(
        self, model: Module, loss: Loss, optimizer: Optimizer, options: Options, debug: bool = False
    ) -> None:
        super().__init__(model, options, debug, optimizer.local)
        self.loss, self.optimizer = loss, optimizer

    def _begin(self) -> None:
        super()._begin()
        self._dice_sums: Array | None = None
        self._of_thread = threading.local()
        self._parameters: dict[str, Parameter] = {}
        self._filled: dict[str, Array] = {}

    def __call__(self, images: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """Run forward, backward and the optimizer; return the loss before the step."""
        with one_at_a_time:
            loss = self.gradients(images, labels)
            self.optimizer.step()
        return loss

    @property
    def dice_sums(self) -> Array | None:
        """Sums of Dice, (3, MB, classes), of the last batch, if the loss has :class:`losses.DiceSums`.

        For the last batch of this thread; in a thread that has run none, for the last batch of all.
        """
        found: Array | None = getattr(self._of_thread, "dice_sums", self._dice_sums)
        return found

    def gradients(
        self,
        images: npt.ArrayLike,
        labels: npt.ArrayLike,
        weight: float = 1.0,
        listener: Listener | None = None,
    ) -> float:
        """Run forward and backward only, and fill the optimizer's gradients.

        The optimizer's step is refused to a thread whose gradients another thread has replaced meanwhile.

        Parameters
        ----------
        images : array, shape = (MB, D, H, W, C), or (MB, H, W, C) for a model in two dimensions
        labels : array of int, shape = (MB, D, H, W), or (MB, H, W)
        weight : float
            The gradients are those of ``weight`` times the loss.
        listener : callable, optional
            Called after each node with its name, and the parameters whose ``grad`` is complete. It must
            not wait for another thread that runs a model: that one waits for the end of this call.

        Returns
        -------
        float
            The loss, without the weight.

        Raises
        ------
        TypeError, ValueError
            ``labels`` are not integers, have another shape, or hold what is not a class.
        """
        array = self._images(images)
        with self._turn():
            return self._fill(array, labels, weight, listener)

    def _fill(self, array: Array, labels: npt.ArrayLike, weight: float, listener: Listener | None) -> float:
        program = self.program(array.shape)
        graph = program.graph
        checked = checked_labels(labels, graph.values[LABELS].shape, graph.classes or 256)
        loss, *dice = graph.outputs
        self.optimizer.gradients_are_new()
        program.arrays[gradient_name(loss)][...] = weight
        unused = {n: grad for n, grad in self._filled.items() if n not in graph.gradients}
        for gradient in unused.values():
            gradient.fill(0)

        def told(node: str, complete: Sequence[str]) -> None:
            if listener is not None:
                listener(node, [self._parameters[name] for name in complete])

        if listener is not None and unused:
            listener("no gradient", [self._parameters[name] for name in unused])
        local, listening = self.optimizer.local, told if listener else None
        local.barrier()  # for who still reads the weights packed before: a step may have several batches
        program.pack(not local.alike, listening)
        local.barrier()
        program.run(listener=listening, images=array, labels=checked)
        self._dice_sums = np.array(program.arrays[dice[0]]) if dice else None
        self._of_thread.dice_sums = self._dice_sums
        return float(program.arrays[loss])

    def _look(self) -> None:
        super()._look()
        self._parameters, self._filled = dict(self.model.named_parameters()), self._gradients()

    def _others(self) -> list[list[Any] | dict[str, Any]]:
        found: list[list[Any] | dict[str, Any]] = [self.optimizer.parameters]
        loss = self.loss
        while isinstance(loss, functools.partial):
            found += [list(loss.args), loss.keywords]
            loss = loss.func
        return [*found, _state_of(loss)]

    def _trace(self, input_shape: Shape) -> Graph:
        if frozen := _frozen(self.model):
            raise ValueError(
                f"compile: {frozen[0]} is in inference, the model in training; a compiled step has "
                "all in training; use the eager model"
            )
        with self.model.mode(training=True):
            graph = differentiate(trace(self.model, input_shape, self.loss))
        if not graph.gradients:
            raise ValueError("compile: the loss depends on no parameter that requires a gradient")
        dice = [node.outputs["dst"] for node in graph.nodes if node.op == "dice_sums"]
        return replace(graph, outputs=(*graph.outputs, *dice))

    def _gradients(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        held = {id(parameter) for parameter in self.optimizer.parameters}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and id(parameter) in held:
                found[name] = parameter.grad
            elif parameter.requires_grad:
                raise ValueError(f"optimizer: it does not hold the model's parameter {name!r}")
        return found

    def _model_arrays(self) -> list[Array]:
        return super()._model_arrays() + list(self._gradients().values())

    def _model_settings(self) -> list[Any]:
        modules = self.model.named_modules() if self.model.training else ()
        return [*super()._model_settings(), [module.training for _, module in modules]]

    def _attributes(self) -> dict[tuple[str, str], Any]:
        own = {k: v for k, v in _state_of(self.loss).items() if v is not self.model and k != "training"}
        found = {("the loss", k): plain(v, (id(self.loss),)) for k, v in own.items()}
        return super()._attributes() | found


def _state_of(loss: Loss) -> dict[str, Any]:
    """What a loss computes with: attributes of an object, also of the one whose method it is."""
    if isinstance(loss, functools.partial):
        return {**_state_of(loss.func), "(arguments)": loss.args, **loss.keywords}
    return getattr(getattr(loss, "__self__", loss), "__dict__", {})


def _fingerprint(arrays: Iterable[Array]) -> tuple[int, ...]:
    """Checksums of arrays.

    Parameters change in place, by an optimizer or by hand, and nothing tells. To look costs 2 ms for
    the usual model; to pack weights for nothing costs more.
    """
    return tuple(checksum(array) for array in arrays if not array.dtype.hasobject)


def _frozen(model: Module) -> list[str]:
    """Parts that are in inference while the model is in training."""
    parts = model.named_modules() if model.training else ()
    return [name for name, module in parts if not module.training]


def _same_arrays(a: list[Array], b: list[Array]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
