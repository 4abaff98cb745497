"""Whether a model still consists of the objects that it was compiled for: a look of some 0.07 ms."""

from collections.abc import Iterable
from operator import is_
from typing import Any

from tinyunet.autograd import Tensor
from tinyunet.compiler.trace import holds_traced
from tinyunet.nn import Module


class Glance:
    """The objects of a model, to be compared with its objects at the next call.

    A glance looks at the attributes of all parts, and at the items of lists, tuples and dicts among them, by
    identity. It does not look at numbers in arrays, nor at tensors that ``forward`` leaves in the model.

    Parameters
    ----------
    model : Module
    others : iterable of list or dict
        Lists and dicts whose items belong to the model, too.
    training : bool
        True for a training step: then ``grad`` of each parameter is compared, too, and whether a part is in
        inference while the model trains.
    """

    def __init__(
        self, model: Module, others: Iterable[list[Any] | dict[str, Any]] = (), training: bool = False
    ) -> None:
        self._model, self._training = model, training
        self._parts: list[Module] = []
        self._tensors: list[Tensor] = []
        # Lists and dicts, whose items may be replaced, with the keys that are not looked at.
        self._places: list[tuple[list[Any] | dict[Any, Any], tuple[str, ...]]] = []
        for each in (model, *others):
            self._enter(each)
        self._seen = self._objects()

    def is_same(self) -> bool:
        """Whether all objects are still where they were, or numbers and text that are equal."""
        if self._training and self._model.training and not all(part.training for part in self._parts):
            return False
        now = self._objects()
        if len(now) != len(self._seen):
            return False
        # Most often nothing has changed, and the first look is faster.
        return all(map(is_, now, self._seen)) or all(map(_are_same, now, self._seen))

    def _enter(self, value: Any) -> None:
        """Note where an object could be replaced in a value."""
        unseen: tuple[str, ...] = ()
        if isinstance(value, Tensor) and not any(value is tensor for tensor in self._tensors):
            self._tensors.append(value)
        if isinstance(value, Module):
            unseen = ("training", *(name for name, item in vars(value).items() if holds_traced(item)))
            if not any(value is part for part in self._parts):
                self._parts.append(value)
            value = vars(value)
        if isinstance(value, list | dict):
            if any(value is place for place, _ in self._places):
                return
            self._places.append((value, unseen))
        if isinstance(value, list | tuple | dict):
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                if name not in unseen:
                    self._enter(item)

    def _objects(self) -> list[object]:
        found: list[object] = [type(part) for part in self._parts]
        for place, unseen in self._places:
            if isinstance(place, dict) and unseen:
                place = {name: item for name, item in place.items() if name not in unseen}
            found += place
            if isinstance(place, dict):
                found += place.values()
        for tensor in self._tensors:
            found += (tensor.data, tensor.requires_grad, tensor.grad if self._training else None)
        return found


def _are_same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)
