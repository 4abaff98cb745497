"""Parameters and gradients of a model in two flat arrays, which an optimizer changes and ranks sum.

A step is then one pass over memory, for any number of layers. Each parameter's arrays are views::

    flat_parameters   | conv0.weight        | conv0.bias | norm0.scale | ...
                        ^ parameter.data      ^ parameter.data
    flat_gradients    | conv0.weight        | conv0.bias | norm0.scale | ...
                        ^ parameter.grad      ^ parameter.grad

From then on change the arrays of a parameter in place, as ``load_state_dict`` does; do not replace them.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tinyunet.local_ranks import LocalRanks
from tinyunet.module import Parameter, of_another_type
from tinyunet.tape import Array


class FlatBuffers:
    """Copies parameters into a flat array, and makes their ``data`` and ``grad`` views.

    Parameters
    ----------
    parameters : iterable of Parameter
    local : LocalRanks
        The ranks that share the array of parameters. The gradients are each rank's own.

    Attributes
    ----------
    parameters : list of Parameter
    flat_parameters, flat_gradients : array, shape = (total,)
        All parameters, all gradients, in the order given.
    local_gradients : list of array
        ``flat_gradients`` of each local rank, in shared memory: to be summed there.

    Raises
    ------
    ValueError
        There is no parameter, one comes twice, or they are not all of one type of float.
    TypeError
        One of the parameters is something else.
    """

    def __init__(self, parameters: Iterable[Parameter], local: LocalRanks) -> None:
        self.parameters, self.local = list(parameters), local
        _check_parameters(self.parameters)
        size, dtype = sum(p.data.size for p in self.parameters), self.parameters[0].dtype
        self.flat_parameters: Array = local.zeros(size, dtype)
        if local.rank == 0:
            np.concatenate([p.data.ravel() for p in self.parameters], out=self.flat_parameters)
        local.barrier()
        self.local_gradients: list[Array] = local.zeros_of_each(size, dtype)
        self.flat_gradients = self.local_gradients[local.rank]
        # The thread that filled the gradients, and threads whose gradients another thread has replaced.
        self._filled_by: int | None = None
        self._replaced: set[int] = set()
        self._make_views()

    def _make_views(self) -> None:
        """Make ``data`` and ``grad`` of each parameter views of the flat buffers."""
        self._views: list[tuple[Array, Array]] = []
        ends = np.cumsum([parameter.data.size for parameter in self.parameters])[:-1]
        parts = (np.split(flat, ends) for flat in (self.flat_parameters, self.flat_gradients))
        for parameter, data, grad in zip(self.parameters, *parts, strict=True):
            if parameter.grad is not None:
                np.copyto(grad.reshape(parameter.shape), parameter.grad)
            parameter.data, parameter.grad = data.reshape(parameter.shape), grad.reshape(parameter.shape)
            self._views.append((parameter.data, parameter.grad))

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, unless the buffers are shared with other processes: TypeError."""
        if self.local.size > 1:
            raise TypeError(
                f"optimizer: its arrays are shared by {self.local.size} processes and cannot be copied; copy"
                " state_dict(), and give it to an optimizer of the copy"
            )
        return vars(self) | {"_filled_by": None, "_replaced": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy: copying separates views from the buffers."""
        vars(self).update(state)
        views = [np.may_share_memory(p.data, self.flat_parameters) for p in self.parameters]
        if not all(views):  # else it is a shallow copy, of the same parameters
            self._make_views()

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat_gradients.fill(0)

    def gradients_are_new(self) -> None:
        """Record that this thread fills the gradients, perhaps over those of another thread."""
        if self._filled_by is not None:
            self._replaced.add(self._filled_by)
        self._filled_by = threading.get_ident()
        self._replaced.discard(self._filled_by)

    def check_buffers(self) -> None:
        """Raise RuntimeError unless the gradients are this thread's, and all parameters are still views."""
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

    def trainable(self, part: slice) -> Iterator[slice]:
        """Yield slices of a part whose parameters require a gradient; neighbours are one slice."""
        end = 0
        for trainable, run in itertools.groupby(self.parameters, lambda p: p.requires_grad):
            start, end = end, end + sum(parameter.data.size for parameter in run)
            both = slice(max(start, part.start), min(end, part.stop))
            if trainable and both.start < both.stop:
                yield both


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
    names = [f"parameters: item {i}{p.name and f', {p.name!r}'}" for i, p in enumerate(parameters)]
    if odd := of_another_type(dict(zip(names, parameters, strict=True))):
        raise ValueError(odd)
