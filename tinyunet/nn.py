"""Modules: layers that own their parameters.

A module's parts are its plain attributes, in the order in which they were set: a
:class:`Parameter` is learnt, a NumPy array is a buffer (kept and saved, but not learnt), a
:class:`Module` is a part with parts of its own. Dotted names follow the attributes:
``encoder.0.conv0.weights``.

Parameters and modules may also lie in lists, tuples and dicts, one in the other: ``self.blocks = [a, b]``
has the parts ``blocks.0`` and ``blocks.1``, ``{"up": c}`` a part ``up``. (PyTorch passes over them, Keras
finds them.) An array in a list is a setting, not a buffer, and what is in an object of another kind is
not found.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Combine, triple
from kernels.ops.activation import checked_slope
from tinyunet import functional
from tinyunet.autograd import Tensor
from tinyunet.common.checks import at_least_zero, fraction, positive, share
from tinyunet.common.turns import one_at_a_time
from tinyunet.engine.context import Array
from tinyunet.functional import BATCH_NORM_MOMENTUM

Generator = np.random.Generator


class Parameter(Tensor):
    """A tensor that is learnt.

    Its ``grad`` is its own: backward adds to it in place, so that it may be a view into the flat
    buffer of an optimizer.

    As of any tensor, an array of float64 stays float64, and ``np.ones(4)`` is one. All parameters of a
    model must have one type: the layers here are float32, until :meth:`Module.astype`.

    Attributes
    ----------
    name : str
        The attribute that it was set as first; for messages.
    """

    __slots__ = ("name",)

    def __init__(self, data: npt.ArrayLike) -> None:
        super().__init__(data, requires_grad=True)
        self.name = ""

    def accumulate(self, gradient: Array) -> None:
        """Add to ``grad`` in place."""
        with one_at_a_time:  # or of two threads' gradients one would be lost
            if self.grad is None:
                self.grad = gradient.copy()
            else:
                self.grad += gradient


class _Modes(threading.local):
    """What each thread is inside :meth:`Module.mode` of, by the identity of a part."""

    def __init__(self) -> None:
        self.training: dict[int, bool] = {}


_modes = _Modes()


class Module:
    """A layer or a model: subclass it, set attributes in ``__init__``, write ``forward``."""

    _starts_in_training = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(at_first := vars(cls).get("training"), bool):  # would hide the property
            cls._starts_in_training = at_first
            del cls.training

    @property
    def training(self) -> bool:
        """Whether this part is in training: in this thread, inside :meth:`mode`; else for all threads."""
        in_this_thread = _modes.training.get(id(self))
        if in_this_thread is not None:
            return in_this_thread
        return bool(vars(self).get("training", self._starts_in_training))

    @training.setter
    def training(self, mode: bool) -> None:
        if id(self) in _modes.training:
            _modes.training[id(self)] = mode
        else:
            vars(self)["training"] = mode

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(vars(self).get(name), Parameter) and not isinstance(value, Parameter | None):
            raise TypeError(
                f"{name} is a Parameter, not to be replaced by {type(value).__name__}; change its .data"
            )
        if isinstance(value, Parameter):
            value.name = value.name or name
        elif isinstance(value, _CONTAINERS):
            dict(_parts_in(name, value))  # what cannot be a part is refused here
        super().__setattr__(name, value)

    def forward(self, src: Tensor) -> Tensor:
        """Compute the result; call the module itself, not this."""
        raise NotImplementedError

    def __call__(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Run the module on a tensor or an array."""
        try:
            return self.forward(src if isinstance(src, Tensor) else Tensor(src))
        except TypeError:
            self.check_types()  # this may be why, and says what to do
            raise

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """Yield this module (its name is empty) and all parts below it, depth first."""
        yield from self._modules(prefix, ())

    def _modules(self, prefix: str, above: tuple["Module", ...]) -> Iterator[tuple[str, "Module"]]:
        yield prefix, self
        above = (*above, self)
        for name, part in self._parts():
            if isinstance(part, Module) and not any(part is other for other in above):
                yield from part._modules(f"{prefix}.{name}" if prefix else name, above)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield dotted name and parameter, in the order of definition; one that is shared once."""
        return self._named(Parameter)

    def named_buffers(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield dotted name and array of what is kept but not learnt, each once: batch-norm statistics."""
        return self._named(np.ndarray)

    def _named(self, kind: type[Any]) -> Iterator[tuple[str, Any]]:
        seen = set[int]()
        for name, value in self._named_attributes():
            if isinstance(value, kind) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def _named_attributes(
        self, prefix: str = "", above: tuple["Module", ...] = ()
    ) -> Iterator[tuple[str, Any]]:
        above = (*above, self)
        for name, value in self._parts():
            if not isinstance(value, Module):
                yield prefix + name, value
            elif not any(value is other for other in above):
                yield from value._named_attributes(f"{prefix}{name}.", above)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """Yield attributes, and in the place of a list or dict the parts in it."""
        for name, value in list(vars(self).items()):  # another thread may set an attribute
            if isinstance(value, _CONTAINERS):
                yield from _parts_in(name, value)
            else:
                yield name, value

    def check_types(self) -> None:
        """Refuse parameters of several types, of which no operator could say whose fault it is.

        Raises
        ------
        TypeError
            Names the first parameter that is not of the type that most numbers have.
        """
        named = list(self.named_parameters())
        usual = usual_type([parameter for _, parameter in named])
        for name, parameter in named:
            if parameter.dtype != usual:
                raise TypeError(
                    f"{name}: a Parameter of {parameter.dtype} in a model of {usual}; expected one type: "
                    f"make it from an array of {usual} (np.ones(4) is float64), or use "
                    f'model.astype("{usual}")'
                )

    def parameters(self) -> list[Parameter]:
        """Return all parameters, in the order of definition."""
        return [parameter for _, parameter in self.named_parameters()]

    def buffers(self) -> list[npt.NDArray[Any]]:
        """Return all buffers, in the order of definition."""
        return [buffer for _, buffer in self.named_buffers()]

    def _named_arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {n: p.data for n, p in self.named_parameters()}
        return arrays | dict(self.named_buffers())

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return a copy of every parameter and buffer under its dotted name."""
        with one_at_a_time:  # none before and none after a step of another thread
            return {name: array.copy() for name, array in self._named_arrays().items()}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Copy arrays into parameters and buffers, in place: views into them stay views.

        Raises
        ------
        ValueError
            A name is missing or unknown, or an array has the wrong shape or cannot be a float. The
            message names the first such; nothing has been changed.
        """
        own = self._named_arrays()
        # Copies: they may be the model's own arrays, exchanged.
        new = {name: np.array(array) for name, array in state.items()}
        for name, array in own.items():
            if name not in new:
                raise ValueError(f"state has no {name!r}, which the model needs")
            if new[name].shape != array.shape:
                raise ValueError(
                    f"state has {name!r} of shape {new[name].shape}, the model's is {array.shape}"
                )
            if not np.can_cast(new[name].dtype, array.dtype, casting="same_kind"):
                raise ValueError(f"state has {name!r} of type {new[name].dtype}, not {array.dtype}")
        for name in new:
            if name not in own:
                raise ValueError(f"state has {name!r}, which the model does not know")
        with one_at_a_time:
            for name, array in own.items():
                np.copyto(array, new[name], casting="same_kind")

    def random_state(self) -> dict[str, Any]:
        """Return where each random generator stands, by the name of its module: for JSON."""
        return {name: g.bit_generator.state for name, g in self._generators().items()}

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Go on drawing from where :meth:`random_state` was taken.

        Raises
        ------
        ValueError
            A generator is missing or unknown, or of another kind. Nothing has been changed.
        """
        own = self._generators()
        if set(state) != set(own):
            raise ValueError(f"state has random generators {sorted(state)}, not {sorted(own)}")
        before = self.random_state()
        try:
            for name, generator in own.items():
                generator.bit_generator.state = state[name]
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            for name, generator in own.items():
                generator.bit_generator.state = before[name]
            raise ValueError(f"state is none of a random generator: {error}") from error

    def _generators(self) -> dict[str, Generator]:
        found = {name: getattr(module, "generator", None) for name, module in self.named_modules()}
        return {name: g for name, g in found.items() if isinstance(g, np.random.Generator)}

    def astype(self, dtype: npt.DTypeLike) -> Self:
        """Convert parameters and buffers to float32 or float64, before an optimizer holds them.

        Buffers of integers or truth values stay so; one that is shared stays shared.
        """
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"astype: dtype must be float32 or float64, not {np.dtype(dtype)}")
        before = [buffer for buffer in self.buffers() if buffer.dtype.kind == "f"]
        converted = {id(buffer): buffer.astype(dtype) for buffer in before}
        for _, module in self.named_modules():
            for name, value in vars(module).items():
                if id(value) in converted:
                    setattr(module, name, converted[id(value)])
        for parameter in self.parameters():
            parameter.data, parameter.grad = parameter.data.astype(dtype), None
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch all parts to training: batch norm uses the batch's statistics, dropout drops."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch all parts to inference."""
        return self.train(False)

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Inside, all parts are in training, or in inference, for this thread; then each is as it was.

        Other threads see nothing of it, those that are started inside neither.
        """
        parts = [module for _, module in self.named_modules()]  # an identity is good while it lives
        before = _modes.training
        _modes.training = before | {id(part): part.training for part in parts}
        try:
            self.train(training)
            yield
        finally:
            _modes.training = before


# Where parts may lie; a set has no order.
_CONTAINERS = (list, tuple, dict, set, frozenset)


def _parts_in(name: str, container: Iterable[Any], within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and part: modules and parameters in lists, tuples and dicts."""
    if id(container) in within:  # a list that is an item of itself
        return
    within = (*within, id(container))
    keys: Iterable[Any] = itertools.count()
    items, seen = container, set[str]()
    if isinstance(container, Mapping):
        keys, items = container, container.values()
    for key, item in zip(keys, items, strict=False):
        here = f"{name}.{key}"
        found = [(here, item)] if isinstance(item, Module | Parameter) else []
        if isinstance(item, _CONTAINERS):
            found = list(_parts_in(here, item, within))
        if not found:
            continue
        if isinstance(container, set | frozenset):
            raise TypeError(f"{name}: a set of layers or parameters has no order; use a list")
        if str(key) in seen or "." in str(key):
            raise TypeError(
                f"{name}: the key {key!r} is not a name of its own; expected keys without a dot, all "
                "different as text"
            )
        seen.add(str(key))
        yield from found


def usual_type(parameters: Sequence[Tensor]) -> np.dtype[Any]:
    """Return the type that most numbers of some parameters have; float32 if there is none."""
    counts = Counter[np.dtype[Any]]()
    for parameter in parameters:
        counts[parameter.dtype] += parameter.data.size
    return counts.most_common(1)[0][0] if counts else np.dtype(np.float32)


class Sequential(Module):
    """Modules run one after the other; their names are 0, 1, ..."""

    def __init__(self, *modules: Module) -> None:
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> None:
        """Run one more module at the end."""
        setattr(self, str(sum(1 for _ in self)), module)

    def __iter__(self) -> Iterator[Module]:
        return (part for part in list(vars(self).values()) if isinstance(part, Module))

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]

    def forward(self, src: Tensor) -> Tensor:
        """Feed each module with the result of the one before."""
        for module in self:
            src = module(src)
        return src


def he_uniform(shape: tuple[int, ...], generator: Generator) -> Array:
    """Draw from the uniform distribution of variance ``2 / fan_in`` (He et al. 2015), float32.

    As Keras counts: ``fan_in`` is the kernel's volume times its channels on axis -2 of Keras' layout,
    which is the second here: a convolution's input channels, a transposed one's *output* channels.
    """
    fan_in = int(np.prod(shape[1:]))
    limit = np.sqrt(6 / fan_in)
    return generator.uniform(-limit, limit, shape).astype(np.float32)


class Conv3d(Module):
    """Convolution with bias; he_uniform weights, zero bias.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel, stride : int or three of int
    padding : "same" or "valid"
    generator : numpy Generator, optional
        Where the weights are drawn from; a new one of seed 0 if left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = (3, 3, 3),
        stride: int | Sequence[int] = (1, 1, 1),
        padding: str = "same",
        generator: Generator | None = None,
    ) -> None:
        inputs, outputs = (positive("in_channels", in_channels), positive("out_channels", out_channels))
        shape = (outputs, inputs, *triple("kernel", kernel))
        self.weights = Parameter(he_uniform(shape, generator or _generator()))
        self.bias = Parameter(np.zeros(outputs, np.float32))
        self.stride, self.padding = triple("stride", stride), padding

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ID, IH, IW, IC) -> (MB, OD, OH, OW, OC)."""
        return functional.conv3d(src, self.weights, self.bias, self.stride, self.padding)


class ConvTranspose3d(Module):
    """Transposed convolution with bias; parameters as of :class:`Conv3d`.

    With a stride as large as the kernel every voxel becomes a block of its own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = (2, 2, 2),
        stride: int | Sequence[int] = (2, 2, 2),
        padding: str = "same",
        generator: Generator | None = None,
    ) -> None:
        inputs, outputs = (positive("in_channels", in_channels), positive("out_channels", out_channels))
        shape = (inputs, outputs, *triple("kernel", kernel))
        self.weights = Parameter(he_uniform(shape, generator or _generator()))
        self.bias = Parameter(np.zeros(outputs, np.float32))
        self.stride, self.padding = triple("stride", stride), padding

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ID, IH, IW, IC) -> (MB, ID * SD, IH * SH, IW * SW, OC) with padding "same"."""
        return functional.conv_transpose3d(src, self.weights, self.bias, self.stride, self.padding)


class BatchNorm(Module):
    """Batch normalisation over all axes but the last.

    Parameters
    ----------
    channels : int
    momentum : float
        Share of the running statistics that stays at each training step, as in Keras; PyTorch's is one
        minus this. After n steps ``momentum ** n`` of them is still the start, mean 0 and variance 1: of
        the default 0.9 nothing after forty steps, of Keras' default 0.99 more than half after sixty, when
        inference, which normalises with them, gives nonsense. Long trainings may take more.
    epsilon : float
        Added to the variance; above 0, for a channel may be constant.

    Attributes
    ----------
    combine : callable or None
        Makes the statistics those of several processes (:mod:`kernels.ops.batch_norm`).
    """

    def __init__(self, channels: int, momentum: float = BATCH_NORM_MOMENTUM, epsilon: float = 1e-3) -> None:
        self.scale = Parameter(np.ones(channels, np.float32))
        self.shift = Parameter(np.zeros(channels, np.float32))
        self.running_mean: Array = np.zeros(channels, np.float32)
        self.running_variance: Array = np.ones(channels, np.float32)
        self.momentum = share("momentum", momentum)
        if not at_least_zero("epsilon", epsilon) > 0:
            raise ValueError(f"epsilon must be above 0, not {epsilon}: a channel may be constant")
        self.epsilon = epsilon
        self.combine: Combine | None = None

    def forward(self, src: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return functional.batch_norm(
            src,
            self.scale,
            self.shift,
            self.running_mean,
            self.running_variance,
            self.training,
            self.momentum,
            self.epsilon,
            self.combine,
        )


class ReLU(Module):
    """``max(src, 0)``."""

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.relu(src)


class LeakyReLU(Module):
    """``src`` where positive, ``slope * src`` elsewhere."""

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = checked_slope(slope)

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.leaky_relu(src, self.slope)


class MaxPool3d(Module):
    """Maximum of each window."""

    def __init__(self, size: int | Sequence[int] = (2, 2, 2)) -> None:
        self.size = triple("size", size)

    def forward(self, src: Tensor) -> Tensor:
        """(MB, D, H, W, C) -> (MB, D // size, H // size, W // size, C)."""
        return functional.max_pool3d(src, self.size)


class Upsample3d(Module):
    """Nearest-neighbour upsampling."""

    def __init__(self, factor: int | Sequence[int] = (2, 2, 2)) -> None:
        self.factor = triple("factor", factor)

    def forward(self, src: Tensor) -> Tensor:
        """(MB, D, H, W, C) -> (MB, D * factor, H * factor, W * factor, C)."""
        return functional.upsample3d(src, self.factor)


class Dropout(Module):
    """Dropout in training, nothing in inference; draws from its own generator."""

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = fraction("rate", rate)
        self.generator = np.random.default_rng(seed)

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.dropout(src, self.rate, self.generator) if self.training else src


def _generator() -> Generator:
    return np.random.default_rng(0)
