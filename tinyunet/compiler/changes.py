"""Has a model changed since a program was compiled for it? A compiled step asks at each call.

To look at a whole net, part by part and attribute by attribute, takes 0.8 ms, a hundredth of a step of 64^3.
But what is made of the same objects in the same places is the same, and to compare objects by identity takes
0.03 ms: a :class:`Glance`. Only if that finds another object is the net looked at as a whole.
"""

from collections.abc import Iterable
from operator import is_
from typing import Any

import numpy as np

from tinyunet.autograd import Tensor
from tinyunet.nn import Module, Parameter


class Glance:
    """What a model was made of, to be compared with what it is made of later.

    Parameters
    ----------
    model : Module
    others : iterable of list or dict
        Whose items belong to it, too.
    """

    def __init__(self, model: Module, others: Iterable[list[Any] | dict[str, Any]]) -> None:
        self._places: list[list[Any] | dict[Any, Any]] = []
        self._parts: list[Module] = []
        self._parameters = model.parameters()
        # A tensor's data may be replaced without a trace.
        self._suffices = all([self._enter(each) for each in (model, *others)])
        self._seen = self._objects()

    def is_same(self) -> bool:
        """Whether all objects are still where they were; if not, or it cannot be told, False."""
        if not self._suffices:
            return False
        now = self._objects()
        return len(now) == len(self._seen) and all(map(is_, now, self._seen))

    def _enter(self, value: Any) -> bool:
        """Note where an object could be replaced in a value; whether that is all that could change."""
        if isinstance(value, Tensor) and not isinstance(value, Parameter):
            return False
        if isinstance(value, Module):
            self._parts.append(value)
            value = vars(value)
        if isinstance(value, tuple):
            return all([self._enter(item) for item in value])
        if isinstance(value, list | dict) and not any(value is place for place in self._places):
            self._places.append(value)
            return all([self._enter(item) for item in _items(value)])
        return True

    def _objects(self) -> list[object]:
        found: list[object] = [type(part) for part in self._parts]
        for place in self._places:
            found += place
            if isinstance(place, dict):
                found += place.values()
        for parameter in self._parameters:
            found += (parameter.data, parameter.grad, parameter.requires_grad)
        return found


def plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """An attribute, as it is now, to be compared later.

    None for parts, parameters and arrays, which are compared apart, unless they are ``within`` a list or
    a dict. What is neither plain nor a function is the same as long as it is the same object.
    """
    here = (*within, id(value))
    if id(value) in within:  # a part that knows what it is a part of
        return id(value)
    if isinstance(value, list | tuple):
        return tuple(plain(item, here) for item in value)
    if isinstance(value, dict):
        return tuple((key, plain(item, here)) for key, item in value.items())
    if isinstance(value, Module) and within:
        settings = {k: v for k, v in vars(value).items() if k != "training"}
        return type(value), plain(settings, here)
    if isinstance(value, Module | Parameter | np.ndarray):
        return id(value) if within else None
    if callable(value) or isinstance(value, bool | int | float | str | np.generic):
        return value
    return id(value.data if isinstance(value, Tensor) else value)


def _items(place: list[Any] | dict[Any, Any]) -> Iterable[Any]:
    return place.values() if isinstance(place, dict) else place
