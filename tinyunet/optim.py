"""Optimizers over one flat buffer, and learning-rate schedules.

An optimizer copies its parameters into one flat array, and gives each parameter its part of it as
``data`` and of a second one as ``grad``: a step is one pass over flat memory, and so is what ranks
send each other. From then on a parameter's arrays are the optimizer's: change them in place
(``load_state_dict`` does), do not replace them.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

import kernels.ops.optimizers
from tinyunet.common import verbose
from tinyunet.common.checks import at_least_zero, fraction, is_real, positive
from tinyunet.common.turns import one_at_a_time
from tinyunet.engine.context import Array
from tinyunet.engine.together import ALONE, Crew
from tinyunet.nn import Parameter, usual_type

Schedule: TypeAlias = Callable[[int], float]

_SMALLEST_EPSILON = 1e-20


class Optimizer:
    """What :class:`Adam` and :class:`SGD` share: the flat buffers and the state.

    A parameter that does not require a gradient stays as it is, and so do its running averages.

    Attributes
    ----------
    flat_parameters, flat_gradients : array, shape = (total,)
        All parameters, all gradients, in the order given.
    lr : float
        Learning rate; may be set at any time, as the other settings may: each step checks them.
    crew : Crew
        Who shares the parameters and the running averages. The gradients are each process' own, and
        must be the same when a step is made.
    crew_gradients : list of array
        ``flat_gradients`` of each process of the crew, in its memory: to be summed there.

    Raises
    ------
    ValueError
        There is no parameter, one comes twice, or they are not all of one type of float; or a
        setting is out of range.
    TypeError
        One of the parameters is something else.
    """

    #: Names of the running averages: arrays as long as ``flat_parameters``, from zero on.
    averages: ClassVar[tuple[str, ...]] = ()
    #: Floating-point operations of a step on each parameter, without weight decay.
    operations: ClassVar[int]

    def __init__(self, parameters: Iterable[Parameter], lr: float, weight_decay: float, crew: Crew) -> None:
        self.parameters = list(parameters)
        _check_parameters(self.parameters)
        self.lr, self.weight_decay = lr, weight_decay
        self._check_settings()
        self.steps, self.crew = 0, crew
        size, dtype = sum(p.data.size for p in self.parameters), self.parameters[0].dtype
        self.flat_parameters: Array = crew.zeros(size, dtype)
        if crew.rank == 0:
            np.concatenate([p.data.ravel() for p in self.parameters], out=self.flat_parameters)
        crew.wait()
        self.crew_gradients: list[Array] = crew.zeros_of_each(size, dtype)
        self.flat_gradients = self.crew_gradients[crew.rank]
        for name in self.averages:
            setattr(self, name, crew.zeros(size, dtype))
        self._filled_by: int | None = None  # threads, by identity
        self._replaced: set[int] = set()
        self._give_parts()

    def _check_settings(self) -> None:
        """Refuse settings out of range, which would make parameters NaN."""
        at_least_zero("lr", self.lr)
        at_least_zero("weight_decay", self.weight_decay)
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                "lr * weight_decay must be 1 or less: a step takes this share of each parameter away, "
                f"not {self.lr * self.weight_decay}"
            )

    def _give_parts(self) -> None:
        """Make ``data`` and ``grad`` of each parameter its part of the flat buffers."""
        self._views: list[tuple[Array, Array]] = []
        start = 0
        for parameter in self.parameters:
            part, shape = slice(start, start + parameter.data.size), parameter.shape
            parameter.data = self.flat_parameters[part].reshape(shape)
            grad = self.flat_gradients[part].reshape(shape)
            if parameter.grad is not None:
                np.copyto(grad, parameter.grad)
            parameter.grad = grad
            self._views.append((parameter.data, parameter.grad))
            start = part.stop

    def __getstate__(self) -> dict[str, Any]:
        """Everything, if it is this process' own.

        Raises
        ------
        TypeError
            The buffers are shared with other processes.
        """
        if self.crew.size > 1:
            raise TypeError(
                f"optimizer: its arrays are shared by {self.crew.size} processes and cannot be copied; copy"
                " state_dict(), and give it to an optimizer of the copy"
            )
        return vars(self) | {"_filled_by": None, "_replaced": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy, or what was pickled, whole: views are copied apart from what they view."""
        vars(self).update(state)
        views = [np.may_share_memory(p.data, self.flat_parameters) for p in self.parameters]
        if not all(views):  # else it is a shallow copy, of the same parameters
            self._give_parts()

    def step(self) -> None:
        """Change the parameters by the gradients found since the last :meth:`zero_grad`.

        Raises
        ------
        RuntimeError
            A parameter no longer uses this optimizer's buffers; or a compiled step has filled the gradients
            for this thread, and then for another one.
        ValueError
            A setting is out of range: it may have been changed, or come from a schedule.
        """
        with one_at_a_time:
            self._step()

    def gradients_are_new(self) -> None:
        """Note that this thread fills the gradients, perhaps over those of another one."""
        thread = threading.get_ident()
        if self._filled_by is not None:
            self._replaced.add(self._filled_by)
        self._replaced.discard(thread)
        self._filled_by = thread

    def _step(self) -> None:
        self._check_settings()
        if threading.get_ident() in self._replaced:
            self._replaced.discard(threading.get_ident())
            raise RuntimeError(
                "optimizer: another thread has replaced the gradients of this one since it found them;"
                " call the compiled step as a whole, step(images, labels)"
            )
        self._filled_by = None
        for index, (parameter, (data, grad)) in enumerate(zip(self.parameters, self._views, strict=True)):
            if parameter.data is not data or parameter.grad is not grad:
                raise RuntimeError(
                    f"parameter {index} of shape {parameter.shape} has got other arrays than this"
                    " optimizer's: change .data and .grad in place, and use optimizer.zero_grad()"
                )
        self.steps += 1
        start, size = time.perf_counter(), 0
        for run in self._learnt(self.crew.part(self.flat_parameters.size)):
            self._update(run)
            size += run.stop - run.start
        if verbose.wanted():
            verbose.say(self._verbose_line(size, time.perf_counter() - start))
        self.crew.wait()

    def _learnt(self, part: slice) -> Iterator[slice]:
        """Yield what of a part requires a gradient; neighbours are one slice."""
        end = 0
        for learnt, run in itertools.groupby(self.parameters, lambda p: p.requires_grad):
            start, end = end, end + sum(parameter.data.size for parameter in run)
            both = slice(max(start, part.start), min(end, part.stop))
            if learnt and both.start < both.stop:
                yield both

    def _verbose_line(self, size: int, seconds: float) -> str:
        arrays = 3 + 2 * len(self.averages)
        work = self.operations * size, arrays * size * self.flat_parameters.itemsize
        name = type(self).__name__
        return verbose.line(name.lower(), (size,), "plain", "fused", "", seconds, *work, name)

    def _update(self, part: slice) -> None:
        """Change a part of the parameters and of the running averages."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat_gradients.fill(0)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the running averages, the number of steps and ``lr``, as arrays."""
        with one_at_a_time:
            state: dict[str, npt.NDArray[Any]] = {n: getattr(self, n).copy() for n in self.averages}
            return state | {"steps": np.array(self.steps), "lr": np.array(self.lr)}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            A name is missing or unknown, a shape differs, or a value is no number or out of range.
            Nothing has been changed.
        """
        shapes = {name: self.flat_parameters.shape for name in self.averages}
        shapes |= {"steps": (), "lr": ()}
        for name, shape in shapes.items():
            if name not in state:
                raise ValueError(f"state has no {name!r}, which {type(self).__name__} needs")
            value = np.asarray(state[name])
            if value.shape != shape:
                raise ValueError(f"state has {name!r} of shape {value.shape}, not {shape}")
            if value.dtype.kind not in "fiu":
                raise ValueError(f"state has {name!r} of type {value.dtype}, not numbers")
        for name in state:
            if name not in shapes:
                raise ValueError(f"state has {name!r}, which {type(self).__name__} does not know")
        lr, steps = (float(np.asarray(state[name])) for name in ("lr", "steps"))
        at_least_zero("lr", lr)
        if not (steps >= 0 and steps.is_integer()):
            raise ValueError(f"state has 'steps' {steps}, not a whole number from 0 on")
        with one_at_a_time:
            self.lr, self.steps = lr, int(steps)
            for name in self.averages:
                np.copyto(getattr(self, name), np.asarray(state[name]))


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) as Keras has it; with weight decay, AdamW (Loshchilov & Hutter 2019).

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
    beta1, beta2 : float
        What stays of the averages of the gradient and of its square at each step.
    epsilon : float
        Added to the root of the second, so never 0: a gradient of 0 would be divided by 0. From 1e-20
        on, for in float32 the square of a gradient below 1e-21 is 0.
    weight_decay : float
        Each step takes ``lr * weight_decay`` of every parameter away, apart from the gradient.
    crew : Crew
        Who shares the work: see :class:`Optimizer`.
    """

    averages = ("m", "v")
    operations = 12
    m: Array
    v: Array

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float = 0.0,
        crew: Crew = ALONE,
    ) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        super().__init__(parameters, lr, weight_decay, crew)

    def _check_settings(self) -> None:
        super()._check_settings()
        fraction("beta1", self.beta1)
        fraction("beta2", self.beta2)
        at_least_zero("epsilon", self.epsilon)
        if self.epsilon < _SMALLEST_EPSILON:
            raise ValueError(
                f"epsilon must be {_SMALLEST_EPSILON} or more, not {self.epsilon}: Adam divides by it "
                "where a gradient is 0"
            )

    def _update(self, part: slice) -> None:
        kernels.ops.optimizers.adam_step(
            self.flat_parameters[part],
            self.flat_gradients[part],
            self.m[part],
            self.v[part],
            self.steps,
            self.lr,
            self.beta1,
            self.beta2,
            self.epsilon,
            self.weight_decay,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as Keras has it.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
    momentum : float
        What stays of the velocity at each step.
    nesterov : bool
        Look ahead: take the gradient's step from where the velocity leads.
    weight_decay : float
        Each step takes ``lr * weight_decay`` of every parameter away, apart from the gradient.
    crew : Crew
        Who shares the work: see :class:`Optimizer`.
    """

    averages = ("velocity",)
    operations = 4
    velocity: Array

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        crew: Crew = ALONE,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(parameters, lr, weight_decay, crew)

    def _check_settings(self) -> None:
        super()._check_settings()
        fraction("momentum", self.momentum)

    def _update(self, part: slice) -> None:
        kernels.ops.optimizers.sgd_step(
            self.flat_parameters[part],
            self.flat_gradients[part],
            self.velocity[part],
            self.lr,
            self.momentum,
            self.nesterov,
            self.weight_decay,
        )


# ---- schedules: the learning rate of step 0, 1, 2, ...; use as optimizer.lr = schedule(step) ---


def constant(lr: float) -> Schedule:
    """Return a schedule that is always ``lr``."""
    at_least_zero("lr", lr)
    return lambda step: lr


def polynomial(lr: float, steps: int, power: float = 0.9, end: float = 0.0) -> Schedule:
    """Return ``end + (lr - end) * (1 - step / steps) ** power``, and ``end`` from ``steps`` on."""
    at_least_zero("lr", lr)
    at_least_zero("power", power)
    at_least_zero("end", end)
    positive("steps", steps)
    # 0 ** 0 is one: the end is no case of the formula.
    return lambda step: end + (lr - end) * (1 - step / steps) ** power if step < steps else end


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """Return ``schedule``, scaled by 1 / steps, 2 / steps, ... during the first ``steps`` steps."""
    positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


class ReduceOnPlateau:
    """Lower the learning rate when a measure no longer improves.

    Parameters
    ----------
    optimizer : Optimizer
    factor : float
        What the rate is multiplied by, above 0 and below 1.
    patience : int
        How many updates without a new best are waited for.
    min_lr : float
        Where lowering ends.
    higher_is_better : bool
        True for Dice, False for a loss.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 0.2,
        patience: int = 5,
        min_lr: float = 1e-5,
        higher_is_better: bool = False,
    ) -> None:
        if not (is_real(factor) and 0 < factor < 1):
            raise ValueError(f"factor must be above 0 and below 1, not {factor}")
        self.optimizer, self.factor = optimizer, factor
        self.patience = positive("patience", patience)
        self.min_lr = at_least_zero("min_lr", min_lr)
        self.sign = -1.0 if higher_is_better else 1.0
        self.best, self.waited = np.inf, 0

    def update(self, measure: float) -> None:
        """Tell the measure of an epoch; ``optimizer.lr`` may be lowered. NaN is never a best."""
        if self.sign * measure < self.best:
            self.best, self.waited = self.sign * measure, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            lowered = max(self.optimizer.lr * self.factor, self.min_lr)
            self.optimizer.lr, self.waited = min(self.optimizer.lr, lowered), 0

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return the best measure and the updates waited, as arrays."""
        return {"best": np.array(self.best), "waited": np.array(self.waited)}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.best = float(np.asarray(state["best"]))
        self.waited = int(np.asarray(state["waited"]))


def _check_parameters(parameters: list[Parameter]) -> None:
    if not parameters:
        raise ValueError("parameters: the list is empty, there is nothing to optimize")
    seen: set[int] = set()
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Parameter):
            kind = type(parameter).__name__
            raise TypeError(f"parameters: item {index} is a {kind}; expected a Parameter")
        if parameter.dtype not in (np.float32, np.float64):
            raise TypeError(f"parameters: item {index} is {parameter.dtype}, not float32 or float64")
        if id(parameter) in seen:
            raise ValueError(f"parameters: item {index} of shape {parameter.shape} comes twice")
        seen.add(id(parameter))
    usual = usual_type(parameters)
    for index, odd in enumerate(parameters):
        if odd.dtype != usual:
            others, name = ("the first" if index else "the others", f" {odd.name!r}" if odd.name else "")
            raise ValueError(
                f"parameters: item {index} is {odd.dtype}, {others} {usual}; expected one type: make"
                f"{name} of shape {odd.shape} from an array of {usual} (np.ones(4) is float64), or "
                f'use model.astype("{usual}")'
            )
