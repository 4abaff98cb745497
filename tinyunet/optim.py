"""SGD and Adam; learning rates that change are in :mod:`tinyunet.schedules`.

With g the gradient of a parameter p, one step is::

    SGD     velocity = momentum velocity - lr g
            p        = p + velocity                          (nesterov: + momentum velocity - lr g)
    Adam    m = beta1 m + (1 - beta1) g                      mean of g
            v = beta2 v + (1 - beta2) g^2                    mean of g^2
            p = p - lr m' / (sqrt(v') + epsilon)             m', v': corrected for their start at 0

A step is one pass over flat arrays: see :mod:`tinyunet.flat_buffers`.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kernels import ops
from tinyunet.common import verbose
from tinyunet.common.checks import at_least_zero, fraction
from tinyunet.common.turns import one_at_a_time
from tinyunet.flat_buffers import FlatBuffers
from tinyunet.local_ranks import ALONE, LocalRanks
from tinyunet.module import Parameter, check_state
from tinyunet.tape import Array

_SMALLEST_EPSILON = 1e-20


class Optimizer(FlatBuffers):
    """Base of :class:`Adam` and :class:`SGD`: settings, steps and state.

    Parameters that do not require a gradient stay as they are, and so do their running averages.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
        Learning rate; may be set at any time, as the other settings may: each step checks them.
    weight_decay : float
        Each step subtracts ``lr * weight_decay`` times the parameter, in addition to the gradient's part.
    local : LocalRanks
        The ranks that share parameters and running averages; each rank updates its part of them. The
        gradients must be equal on all of them when a step begins.
    ema : float
        Above 0, ``ema`` holds an exponential moving average of the parameters, of which each step keeps this
        share (in step n at most (1 + n) / (10 + n), so that the first weights are soon forgotten). It often
        scores better than the parameters themselves (Polyak & Juditsky 1992): see :meth:`exchange_average`.

    Raises
    ------
    ValueError, TypeError
        As :class:`FlatBuffers`, or a setting is out of range.
    """

    #: Names of the running averages: arrays as long as ``flat_parameters``, zero at first.
    averages: tuple[str, ...] = ()
    #: Floating-point operations of a step on each parameter, without weight decay.
    operations: ClassVar[int]
    ema: Array

    def __init__(
        self, parameters: Iterable[Parameter], lr: float, weight_decay: float, local: LocalRanks, ema: float
    ) -> None:
        self.lr, self.weight_decay, self.steps, self._ema_share = lr, weight_decay, 0, ema
        self._check_settings()
        super().__init__(parameters, local)
        if ema:
            self.averages = (*self.averages, "ema")
        for name in self.averages:
            setattr(self, name, local.zeros(self.flat_parameters.size, self.flat_parameters.dtype))
        if ema:
            part = local.part(self.flat_parameters.size)
            self.ema[part] = self.flat_parameters[part]
            local.barrier()

    def _update(self, part: slice) -> None:
        """Change a part of the parameters and of the running averages."""
        raise NotImplementedError

    def _check_settings(self) -> None:
        """Refuse settings out of range, which would make parameters NaN."""
        at_least_zero("lr", self.lr)
        at_least_zero("weight_decay", self.weight_decay)
        fraction("ema", self._ema_share)
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                "lr * weight_decay must be 1 or less: a step takes this share of each parameter away, "
                f"not {self.lr * self.weight_decay}"
            )

    def step(self) -> None:
        """Change the parameters by the gradients that were added since the last :meth:`zero_grad`.

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
                self._update_average(run)
                size += run.stop - run.start
            if verbose.wanted():
                name, arrays = type(self).__name__, 3 + 2 * len(self.averages)  # loads and stores
                work = self.operations * size, arrays * size * self.flat_parameters.itemsize
                seconds = time.perf_counter() - start
                ran = verbose.Ran(name.lower(), (size,), "plain", "fused", "", seconds, *work, name)
                verbose.say(ran.line())
            self.local.barrier()

    def _update_average(self, part: slice) -> None:
        if self._ema_share:
            share = np.float32(min(self._ema_share, (1 + self.steps) / (10 + self.steps)))
            self.ema[part] += (1 - share) * (self.flat_parameters[part] - self.ema[part])

    def exchange_average(self) -> None:
        """Exchange the parameters and their average ``ema``; without an average nothing happens.

        Between two exchanges the model predicts with the average; no step may lie between them. All ranks
        that share the parameters call this.
        """
        if self._ema_share:
            with one_at_a_time:
                part = self.local.part(self.flat_parameters.size)
                self.local.barrier()
                kept = self.flat_parameters[part].copy()
                self.flat_parameters[part], self.ema[part] = self.ema[part], kept
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
        own = {name: getattr(self, name) for name in self.averages}
        numbers = {"steps": np.array(0.0), "lr": np.array(0.0)}
        new = {name: np.asarray(array) for name, array in state.items()}
        check_state(new, own | numbers, type(self).__name__)
        lr, steps = float(new["lr"]), float(new["steps"])
        at_least_zero("lr", lr)
        if not (steps >= 0 and steps.is_integer()):
            raise ValueError(f"state has 'steps' {steps}, not a whole number from 0 on")
        with one_at_a_time:
            self.lr, self.steps = lr, int(steps)
            for name, array in own.items():
                np.copyto(array, new[name])


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
        ema: float = 0.0,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(parameters, lr, weight_decay, local, ema)

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
        ema: float = 0.0,
    ) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        super().__init__(parameters, lr, weight_decay, local, ema)

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
