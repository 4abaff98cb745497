"""Modules own parameters and other modules; `tinyunet.nn` has the layers.

A module's parts are its plain attributes, in the order in which they were set: a
:class:`Parameter` is learnt, a NumPy array is a buffer (kept and saved, but not learnt), a
:class:`Module` is a part with parts of its own. Dotted names follow the attributes:
``encoder.0.conv0.weights``.

Parameters and modules may also lie in lists, tuples and dicts, one in the other: ``self.blocks = [a, b]``
has the parts ``blocks.0`` and ``blocks.1``, ``{"up": c}`` a part ``up``. (Keras finds parts in lists, too;
PyTorch does not.) An array in a list is a setting, not a buffer; parts of other objects are not found.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyunet.autograd import Tensor
from tinyunet.common.turns import one_at_a_time
from tinyunet.tape import Array

Generator = np.random.Generator
Part = tuple[str, Any]


class Parameter(Tensor):
    """A tensor that is learnt; ``name``, for messages, is the first attribute that it was set as.

    Backward adds to its ``grad`` in place, so ``grad`` may be a view into the flat buffer of an optimizer.

    An array of float64 stays float64, as in any tensor, and ``np.ones(4)`` is of float64. All parameters of a
    model must have one type: the layers here are float32, until :meth:`Module.astype`.
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
    """Per thread: which parts are in training inside :meth:`Module.mode`, by the identity of a part."""

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

    def __repr__(self) -> str:
        """Return a table of the layers with parameters: output where it is known, and numbers to learn."""
        from tinyunet.common.terminal import aligned  # here: a training step needs no tables

        name = type(self).__name__
        if not any(module is not self for _, module in self.named_modules()):
            arrays = ", ".join(f"{part} {p.shape}" for part, p in self.named_parameters())
            return f"{name}({arrays})"
        rows: list[tuple[str, ...]] = []
        for layer, module in self.named_modules():
            learnt = sum(value.data.size for value in vars(module).values() if isinstance(value, Parameter))
            if learnt:
                rows.append((layer, type(module).__name__, self.output_of(layer), f"{learnt:,}"))
        total = f"{sum(parameter.data.size for parameter in self.parameters()):,}"
        rows = [(name, "kind", "output", "parameters"), *rows, ("all", "", "", total)]
        if not any(row[2] for row in rows[1:]):
            rows = [(*row[:2], row[3]) for row in rows]
        return aligned(rows[0], rows[1:], left=len(rows[0]) - 1)

    def output_of(self, layer: str) -> str:
        """Return the shape of a layer's output in words, for the table; "" if it is not known."""
        return ""

    # ---- parts ----

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(vars(self).get(name), Parameter) and not isinstance(value, Parameter | None):
            raise TypeError(
                f"{name} is a Parameter, not to be replaced by {type(value).__name__}; change its .data"
            )
        if isinstance(value, Parameter):
            value.name = value.name or name
        elif isinstance(value, _CONTAINERS):
            list(_parts_in(name, value))  # refuses what cannot be a part
        super().__setattr__(name, value)

    def _parts(self, prefix: str = "", above: tuple["Module", ...] = ()) -> Iterator[Part]:
        """Yield dotted name and value of attributes, and of those of modules in them, depth first.

        The parts in a list or dict take its place; a module that contains itself is not entered again.
        """
        above = (*above, self)
        for attribute, value in list(vars(self).items()):  # another thread may set an attribute
            is_one = not isinstance(value, _CONTAINERS)
            for name, part in [(attribute, value)] if is_one else _parts_in(attribute, value):
                if not isinstance(part, Module):
                    yield prefix + name, part
                elif not any(part is other for other in above):
                    yield prefix + name, part
                    yield from part._parts(f"{prefix}{name}.", above)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """Yield this module (its name is empty) and all parts below it, depth first."""
        yield prefix, self
        below = self._parts(f"{prefix}." if prefix else "")
        yield from ((name, part) for name, part in below if isinstance(part, Module))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield dotted name and parameter, in the order of definition; a shared parameter comes once."""
        return self._named(Parameter)

    def named_buffers(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield dotted name and array of each buffer once, such as the statistics of batch norm."""
        return self._named(np.ndarray)

    def _named(self, kind: type[Any]) -> Iterator[Part]:
        seen = set[int]()
        for name, value in self._parts():
            if isinstance(value, kind) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def parameters(self) -> list[Parameter]:
        """Return all parameters, in the order of definition."""
        return [parameter for _, parameter in self.named_parameters()]

    def buffers(self) -> list[npt.NDArray[Any]]:
        """Return all buffers, in the order of definition."""
        return [buffer for _, buffer in self.named_buffers()]

    # ---- state ----

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
        check_state(new, own, "the model")
        with one_at_a_time:
            for name, array in own.items():
                np.copyto(array, new[name], casting="same_kind")

    def random_state(self) -> dict[str, Any]:
        """Return the state of each random generator, by the name of its module: for JSON."""
        return {name: g.bit_generator.state for name, g in self._generators().items()}

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Restore the generators to the state that :meth:`random_state` returned.

        Raises
        ------
        ValueError
            A generator is missing or unknown, or of another kind. Nothing has been changed.
        """
        own, before = self._generators(), self.random_state()
        if set(state) != set(own):
            raise ValueError(f"state has random generators {sorted(state)}, not {sorted(own)}")
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

    # ---- types ----

    def check_types(self) -> None:
        """Refuse parameters of several types, before an operator fails without naming the wrong one.

        Raises
        ------
        TypeError
            Names the first parameter that is not of the type that most numbers have.
        """
        if odd := of_another_type(dict(self.named_parameters())):
            raise TypeError(odd)

    def astype(self, dtype: npt.DTypeLike) -> Self:
        """Convert parameters and buffers to float32 or float64, before an optimizer holds them.

        Buffers of integers or truth values keep their type; a shared array stays shared.
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

    # ---- training or inference ----

    @property
    def training(self) -> bool:
        """Whether this part is in training: in this thread, inside :meth:`mode`; else for all threads."""
        for_all = bool(vars(self).get("training", self._starts_in_training))
        return _modes.training.get(id(self), for_all)

    @training.setter
    def training(self, mode: bool) -> None:
        if id(self) in _modes.training:
            _modes.training[id(self)] = mode
        else:
            vars(self)["training"] = mode

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
        """Switch all parts to training, or to inference, inside the block and in this thread only.

        Threads that are started inside are not affected. After the block each part is in its old mode.
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


def _parts_in(name: str, container: Iterable[Any], within: tuple[int, ...] = ()) -> Iterator[Part]:
    """Yield dotted name and part: modules and parameters in lists, tuples and dicts."""
    if id(container) in within:  # a list that is an item of itself
        return
    seen = set[str]()
    for key, item in container.items() if isinstance(container, Mapping) else enumerate(container):
        found = [(f"{name}.{key}", item)] if isinstance(item, Module | Parameter) else []
        if isinstance(item, _CONTAINERS):
            found = list(_parts_in(f"{name}.{key}", item, (*within, id(container))))
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


def check_state(
    state: Mapping[str, npt.NDArray[Any]], own: Mapping[str, npt.NDArray[Any]], owner: str
) -> None:
    """Raise ValueError unless a state has the names, the shapes and types as one's own arrays take them."""
    for name, array in own.items():
        if name not in state:
            raise ValueError(f"state has no {name!r}, which {owner} needs")
        shape, dtype = state[name].shape, state[name].dtype
        if shape != array.shape:
            raise ValueError(f"state has {name!r} of shape {shape}, not {array.shape}")
        if not np.can_cast(dtype, array.dtype, casting="same_kind"):
            raise ValueError(f"state has {name!r} of type {dtype}, not {array.dtype}")
    for name in state:
        if name not in own:
            raise ValueError(f"state has {name!r}, which {owner} does not know")


def of_another_type(parameters: Mapping[str, Tensor]) -> str:
    """Return a line about the first parameter that has another type than most numbers; "" if none has."""
    counts = Counter[np.dtype[Any]]()
    for parameter in parameters.values():
        counts[parameter.dtype] += parameter.data.size
    for name, parameter in parameters.items():
        if parameter.dtype != (usual := counts.most_common(1)[0][0]):
            return (
                f"{name}: a Parameter of {parameter.dtype} in a model of {usual}; expected one type: make it "
                f'from an array of {usual} (np.ones(4) is float64), or use model.astype("{usual}")'
            )
    return ""
