"""The results of ``tinyunet.compile``: a training step, or a prediction, for inputs of any shape.

Each input shape has a program of its own. The last three programs are kept. If an object in the model has
been replaced since (``glance``), all are compiled anew.

Python threads take turns (:mod:`tinyunet.common.turns`): each call is run whole before another one begins.
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arrays import checksum, copy
from kernels.base.buffers import empty
from tinyunet.autograd import Tensor, real_numbers
from tinyunet.common.turns import one_at_a_time
from tinyunet.compiler.differentiate import differentiate, gradient_name
from tinyunet.compiler.explain import UnfusedWarning, explain, warning
from tinyunet.compiler.glance import Glance
from tinyunet.compiler.ir import Graph, Options
from tinyunet.compiler.passes import Stage, stages
from tinyunet.compiler.program import Program
from tinyunet.compiler.trace import LABELS, Loss, trace, usual_dtype
from tinyunet.local_ranks import ALONE, LocalRanks
from tinyunet.losses import checked_labels
from tinyunet.nn import Module, Parameter
from tinyunet.optim import Optimizer
from tinyunet.tape import Listener

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_KEPT = 3  # programs; each has an arena


class Compiled:
    """Base of a compiled step and a compiled prediction: programs by shape.

    A copy, also one made by pickle, has a model of its own, and compiles anew when it is called.
    """

    def __init__(
        self, model: Module, options: Options, debug: bool = False, local: LocalRanks = ALONE
    ) -> None:
        self.model, self._options, self._debug = model, options, debug
        # All local ranks compile the first program together, and share it; each compiles others alone.
        self._first_local = local
        self._begin()

    def _begin(self) -> None:
        """Have no program yet."""
        self._programs: OrderedDict[Shape, Program] = OrderedDict()
        self._glance: Glance | None = None
        # Buffers whose memory no operator reads: the graph may hold a copy, or a number from them.
        self._copied: list[Array] = []
        self._copied_sums: tuple[int, ...] = ()
        self._runs = self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments of :meth:`__init__`; programs are bound to the arrays of this model."""
        given = ("model", "loss", "optimizer", "_options", "_debug", "_first_local")
        return {name: value for name, value in vars(self).items() if name in given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, no other thread runs a program, and this thread does not run this program again."""
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
        with one_at_a_time:
            graph = self._trace(tuple(input_shape))
        return stages(graph, self._options)

    def explain(self, input_shape: Shape | None = None) -> str:
        """Return what is not fused, why, and what would be: for a shape, or the one that was used last."""
        with one_at_a_time:
            shape = tuple(input_shape) if input_shape else next(reversed(self._programs), None)
        if shape is None:
            raise ValueError("explain: nothing has been compiled yet; expected input_shape")
        return explain(self.program(shape).graph)

    def program(self, input_shape: Shape) -> Program:
        """Return the program for a shape, compiled now if it is new."""
        shape = tuple(input_shape)
        with one_at_a_time:
            is_same = self._glance and self._glance.is_same()
            if not is_same or _fingerprint(self._copied) != self._copied_sums:
                self._programs.clear()
            if shape not in self._programs:
                self._compile(shape)
            self._programs.move_to_end(shape)
            return self._programs[shape]

    def _compile(self, shape: Shape) -> None:
        _, graph, reuse = self.stages(shape)[-1]
        if not self._programs:  # after the trace, which leaves its own in the model
            self._look()
        local, self._first_local = self._first_local, ALONE
        if local.size > 1:
            from tinyunet.compiler.shared_weights import pack_first

            graph = pack_first(graph, local)
        while len(self._programs) >= _KEPT:  # before the new arena is made
            self._programs.popitem(last=False)
        if not self._warned and (line := warning(graph)):
            self._warned = True
            warnings.warn(f"compile: {line}", UnfusedWarning, stacklevel=4)
        self._programs[shape] = Program(graph, self._learnt(), reuse, self._debug, local)
        read = graph.data.values()
        self._copied = [b for b in self.model.buffers() if not any(np.may_share_memory(a, b) for a in read)]
        self._copied_sums = _fingerprint(self._copied)

    def _look(self) -> None:
        """Record the objects that the model is made of."""
        self._glance = Glance(self.model)

    def _trace(self, input_shape: Shape) -> Graph:
        raise NotImplementedError

    def _learnt(self) -> dict[str, Parameter]:
        return {}

    def _images(self, images: npt.ArrayLike | Tensor) -> Array:
        return np.asarray(real_numbers("images", images), usual_dtype(self.model), order="C")


class Inference(Compiled):
    """A model's prediction: ``predict(images)`` returns an array, channels last.

    Batch norm uses its running statistics and nothing is dropped, in both modes of the model.
    """

    def __call__(self, images: npt.ArrayLike | Tensor) -> Array:
        """Return the model's result for a batch, (..., classes): a new array at each call.

        ``images`` is (MB, D, H, W, C), or (MB, H, W, C) for a model in two dimensions.
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

    If ranks share the optimizer (:mod:`tinyunet.local_ranks`), they share the program for the first
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
        self._held: dict[str, Parameter] = {}

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
            ``labels`` are not integers, have another shape, or hold a number that is no class nor ignored.
        """
        array = self._images(images)
        with self._turn():
            return self._fill(array, labels, weight, listener)

    def _fill(self, array: Array, labels: npt.ArrayLike, weight: float, listener: Listener | None) -> float:
        program, local = self.program(array.shape), self.optimizer.local
        graph = program.graph
        shape, classes = graph.values[LABELS].shape, graph.classes or 256
        checked = checked_labels(labels, shape, classes, graph.ignore_label)
        loss, *dice = graph.outputs
        self.optimizer.gradients_are_new()
        program.arrays[gradient_name(loss)][...] = weight

        unused = [parameter for name, parameter in self._held.items() if name not in graph.gradients]
        for parameter in unused:
            np.asarray(parameter.grad).fill(0)
        if listener is not None and unused:
            listener("no gradient", unused)
        local.barrier()  # another rank may still read the weights of the batch before
        program.pack(not local.alike, listener)
        local.barrier()
        program.run(listener=listener, images=array, labels=checked)
        self._dice_sums = np.array(program.arrays[dice[0]]) if dice else None
        self._of_thread.dice_sums = self._dice_sums
        return float(program.arrays[loss])

    def _look(self) -> None:
        self._held = self._learnt()
        others: list[list[Any] | dict[str, Any]] = [self.optimizer.parameters]
        loss = self.loss
        while isinstance(loss, functools.partial):
            others += [list(loss.args), loss.keywords]
            loss = loss.func
        # A loss may be a method: then the attributes of its object count, too.
        others.append(getattr(getattr(loss, "__self__", loss), "__dict__", {}))
        self._glance = Glance(self.model, others, training=True)

    def _trace(self, input_shape: Shape) -> Graph:
        parts = self.model.named_modules() if self.model.training else ()
        if frozen := [name for name, part in parts if not part.training]:
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

    def _learnt(self) -> dict[str, Parameter]:
        """Return the parameters whose gradients a step fills."""
        found: dict[str, Parameter] = {}
        held = {id(parameter) for parameter in self.optimizer.parameters}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and id(parameter) in held:
                found[name] = parameter
            elif parameter.requires_grad:
                raise ValueError(f"optimizer: it does not hold the model's parameter {name!r}")
        return found


def _fingerprint(arrays: Iterable[Array]) -> tuple[int, ...]:
    """Checksums of arrays, which an optimizer or a user may change in place.

    For the usual model they take 2 ms; packing all weights at each call would take longer.
    """
    return tuple(checksum(array) for array in arrays if not array.dtype.hasobject)
