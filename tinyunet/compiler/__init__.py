"""The compiled way to run a model: trace it once, rewrite the graph, plan memory, run bound kernels.

    step = tinyunet.compile(model, loss, optimizer, input_shape)
    loss = step(images, labels)                                     # forward, backward, optimizer

    predict = tinyunet.compile(model, input_shape)
    probabilities = predict(images)

The way from a model to a run:

``trace``           the model's ``forward`` runs once, on tensors without numbers, into a graph (``ir``)
``differentiate``   the gradients, written out as nodes of the same graph
``passes``          rewrite the graph, one file each; ``measure`` times the algorithms of convolutions
``memory``          places all arrays that a step needs in one arena
``program``         a list of calls, bound to their arrays and run in order
``compiled``        the result of `compile`: a program for each shape; ``glance`` sees if the model is another

``operators`` holds one record (``record``) for each operator, which all of these ask: what it makes and
saves, its gradient, its kernels. ``eager`` runs what no pass has touched; ``show`` prints tables;
``shared_weights`` is for the ranks of one node.

Eager and compiled agree up to rounding; with no pass enabled they are the same kernels in the same order,
and agree bit for bit.
"""

from collections.abc import Collection
from typing import Any, overload

import numpy as np

from tinyunet.compiler.compiled import Inference, TrainingStep
from tinyunet.compiler.ir import Options
from tinyunet.compiler.passes import chosen
from tinyunet.compiler.trace import Loss
from tinyunet.nn import Module
from tinyunet.optim import Optimizer

__all__ = ["Inference", "TrainingStep", "compile"]


@overload
def compile(
    model: Module, loss: Loss, optimizer: Optimizer, input_shape: tuple[int, ...], **options: Any
) -> TrainingStep: ...


@overload
def compile(model: Module, input_shape: tuple[int, ...], **options: Any) -> Inference: ...


def compile(
    model: Module,
    *arguments: Any,
    enable: Collection[str] | None = None,
    disable: Collection[str] = (),
    accuracy: str = "fast",
    deterministic: bool = False,
    debug: bool = False,
    **named: Any,
) -> TrainingStep | Inference:
    """Compile a training step, or with a shape alone a prediction.

    Parameters
    ----------
    model : Module
        Made of tinyunet's operators. Its parameters and statistics stay where they are; eager and
        compiled runs may take turns.
    loss : callable
        ``loss(prediction, labels)``, as in :mod:`tinyunet.losses`. One that takes ``from_logits``
        gets the model's logits if it has a method of this name.
    optimizer : Optimizer
        Holds all parameters of the model that require a gradient.
    input_shape : tuple of int
        (MB, D, H, W, C), or (MB, H, W, C): compiled now. Other shapes are compiled when they come.
    enable, disable : collection of str
        Names of passes: only these, not these (``tinyunet.compiler.passes``).
    accuracy : {"fast", "strict"}
        Of convolutions: "strict" is no worse than direct convolution in float32, "fast"
        allows an error of 5e-5 of the largest output.
    deterministic : bool
        Choose the algorithms of convolutions by a model of their work alone. Otherwise the
        algorithms that this model finds nearly as good are timed, once on a machine, and the fastest is kept
        in a file: with another file a run may round differently.
    debug : bool
        Fill memory with NaN while nothing lives there.

    Returns
    -------
    TrainingStep or Inference

    Raises
    ------
    TypeError, ValueError
        An argument is not as described, or the model computes with data outside the operators.
    """
    if accuracy not in ("fast", "strict"):
        raise ValueError(f'accuracy must be "fast" or "strict", not {accuracy!r}')
    options = Options(chosen(enable, disable), accuracy, bool(deterministic))
    roles = ("input_shape",) if len(arguments) + len(named) == 1 else ("loss", "optimizer", "input_shape")
    given = dict(zip(roles, arguments, strict=False)) | named
    if set(given) != set(roles) or len(arguments) > len(roles):
        raise TypeError("compile takes (model, input_shape) or (model, loss, optimizer, input_shape)")
    _check(model, given)
    compiled: TrainingStep | Inference
    if "loss" in given:
        compiled = TrainingStep(model, given["loss"], given["optimizer"], options, debug)
    else:
        compiled = Inference(model, options, debug)
    compiled.program(tuple(given["input_shape"]))
    return compiled


def _check(model: object, given: dict[str, Any]) -> None:
    """Refuse arguments that a user may have mixed up."""
    if not isinstance(model, Module):
        raise TypeError(f"model must be a Module, not {type(model).__name__}")
    model.check_types()
    if not callable(given.get("loss", len)):
        raise TypeError(f"loss must be a function, not {type(given['loss']).__name__}")
    if "optimizer" in given and not isinstance(given["optimizer"], Optimizer):
        raise TypeError(f"optimizer must be an Optimizer, not {type(given['optimizer']).__name__}")
    shape = given["input_shape"]
    sizes = tuple(shape) if isinstance(shape, tuple | list) else ()
    if not sizes or not all(isinstance(n, int | np.integer) and n > 0 for n in sizes):
        raise ValueError(
            f"input_shape is {shape!r}; it must be whole numbers above 0, such as (1, 96, 96, 96, 4)"
        )
