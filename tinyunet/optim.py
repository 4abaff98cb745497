"""SGD, Adam and learning-rate schedules.

With g the gradient of a parameter p, one step is::

    SGD     velocity = momentum velocity - lr g
            p        = p + velocity                          (nesterov: + momentum velocity - lr g)
    Adam    m = beta1 m + (1 - beta1) g                      mean of g
            v = beta2 v + (1 - beta2) g^2                    mean of g^2
            p = p - lr m' / (sqrt(v') + epsilon)             m', v': corrected for their start at 0

A step is one pass over flat arrays: see :mod:`tinyunet.flat_buffers`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from kernels import ops
from tinyunet.common import verbose
from tinyunet.common.checks import at_least_zero, fraction, is_real, positive
from tinyunet.common.turns import one_at_a_time
from tinyunet.engine.context import Array
from tinyunet.engine.local_ranks import ALONE, LocalRanks
from tinyunet.flat_buffers import FlatBuffers
from tinyunet.nn import Parameter

Schedule: TypeAlias = Callable[[int], float]
_SMALLEST_EPSILON = 1e-20


class Optimizer(FlatBuffers):
    """What :class:`Adam` and :class:`SGD` share: settings, steps and state.

    Parameters that do not require a gradient stay as they are, and so do their running averages.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
        Learning rate; may be set at any time, as the other settings may: each step checks them.
    weight_decay : float
        Each step subtracts ``lr * weight_decay`` times the parameter, apart from the gradient.
    local : LocalRanks
        The ranks that share parameters and running averages; each rank updates its part of them. The
        gradients must be equal on all of them when a step begins.

    Raises
    ------
    ValueError, TypeError
        As :class:`FlatBuffers`, or a setting is out of range.
    """

    #: Names of the running averages: arrays as long as ``flat_parameters``, zero at first.
    averages: ClassVar[tuple[str, ...]] = ()
    #: Floating-point operations of a step on each parameter, without weight decay.
    operations: ClassVar[int]

    def __init__(
        self, parameters: Iterable[Parameter], lr: float, weight_decay: float, local: LocalRanks
    ) -> None:
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self._check_settings()
        super().__init__(parameters, local)
        for name in self.averages:
            setattr(self, name, local.zeros(self.flat_parameters.size, self.flat_parameters.dtype))

    def _update(self, part: slice) -> None:
        """Change a part of the parameters and of the running averages."""
        raise NotImplementedError

    def _check_settings(self) -> None:
        """Refuse settings out of range, which would make parameters NaN."""
        at_least_zero("lr", self.lr)
        at_least_zero("weight_decay", self.weight_decay)
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                "lr * weight_decay must be 1 or less: a step takes this share of each parameter away, "
                f"not {self.lr * self.weight_decay}"
            )

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
            self._check_settings()
            self.check_buffers()
            self.steps += 1
            start, size = time.perf_counter(), 0
            for run in self.trainable(self.local.part(self.flat_parameters.size)):
                self._update(run)
                size += run.stop - run.start
            if verbose.wanted():
                name, arrays = type(self).__name__, 3 + 2 * len(self.averages)  # loads and stores
                work = self.operations * size, arrays * size * self.flat_parameters.itemsize
                seconds = time.perf_counter() - start
                ran = verbose.Ran(name.lower(), (size,), "plain", "fused", "", seconds, *work, name)
                verbose.say(ran.line())
            self.local.barrier()

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the running averages, the number of steps and ``lr``, as arrays."""
        with one_at_a_time:
            state: dict[str, npt.NDArray[Any]] = {n: getattr(self, n).copy() for n in self.averages}
            return state | {"steps": np.array(self.steps), "lr": np.array(self.lr)}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            A name is missing or unknown, a shape differs, or a value is no number or out of range.
            Nothing has been changed.
        """
        shapes = {name: self.flat_parameters.shape for name in self.averages} | {"steps": (), "lr": ()}
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


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as Keras has it.

    Parameters are those of :class:`Optimizer`, and the share of the velocity that each step keeps:
    ``momentum``, from 0 to below 1; ``nesterov`` takes the step from where the velocity leads.
    """

    averages, operations = ("velocity",), 4
    velocity: Array

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        local: LocalRanks = ALONE,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(parameters, lr, weight_decay, local)

    def _check_settings(self) -> None:
        super()._check_settings()
        fraction("momentum", self.momentum)

    def _update(self, part: slice) -> None:
        p, g = self.flat_parameters[part], self.flat_gradients[part]
        settings = self.lr, self.momentum, self.nesterov, self.weight_decay
        ops.optimizers.sgd_step(p, g, self.velocity[part], *settings)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) as Keras has it; with weight decay, AdamW (Loshchilov & Hutter 2019).

    Parameters are those of :class:`Optimizer`, and the shares of the two averages that each step keeps:
    ``beta1`` and ``beta2``, from 0 to below 1. ``epsilon`` is 1e-20 or more, never 0: a gradient of 0 would
    be divided by 0, and in float32 the square of a gradient below 1e-21 is 0.
    """

    averages, operations = ("m", "v"), 12
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
        local: LocalRanks = ALONE,
    ) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        super().__init__(parameters, lr, weight_decay, local)

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
        p, g = self.flat_parameters[part], self.flat_gradients[part]
        settings = self.lr, self.beta1, self.beta2, self.epsilon, self.weight_decay
        ops.optimizers.adam_step(p, g, self.m[part], self.v[part], self.steps, *settings)


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
    # 0 ** 0 is one: the formula does not hold at the end.
    return lambda step: end + (lr - end) * (1 - step / steps) ** power if step < steps else end


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """Return ``schedule``, scaled by 1 / steps, 2 / steps, ... during the first ``steps`` steps."""
    positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


class ReduceOnPlateau:
    """Multiplies the rate by ``factor``, down to ``min_lr``, after ``patience`` updates without a new best.

    ``factor`` is above 0 and below 1; ``higher_is_better`` is True for Dice, False for a loss.
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
        self.patience, self.min_lr = positive("patience", patience), at_least_zero("min_lr", min_lr)
        self.sign = -1.0 if higher_is_better else 1.0
        self.best, self.waited = np.inf, 0

    def update(self, measure: float) -> None:
        """Take the measure of an epoch, and lower ``optimizer.lr`` if it is due. NaN is never a best."""
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
        """Restore what :meth:`state_dict` returned."""
        self.best, self.waited = float(np.asarray(state["best"])), int(np.asarray(state["waited"]))
