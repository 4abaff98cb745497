"""Operators of the user's in the compiled graph: as on the tape, or refused with one line."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from agreement import INPUT, ROUNDING, SHAPE, assert_agree, batch, conv

import tinyunet
from tinyunet import SGD, Function, Module, Tensor, losses
from tinyunet import functional as F

_elsewhere: list[Any] = []


class Net(Module):
    """A user's operator between convolutions, where memory is used again at once."""

    def __init__(self, operator: type[Function]) -> None:
        self.first, self.second, self.head = conv(4, 16), conv(16, 16, seed=2), conv(16, 4, 1)
        self.operator = operator

    def logits(self, images: Tensor) -> Tensor:
        squared = self.operator.apply(F.relu(self.first(images)))
        return self.head(F.relu(self.second(squared)))

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.logits(images))


def square(keep: Callable[[Any, Any], Any], kept: Callable[[Any], Any]) -> type[Function]:
    """An operator that keeps its source for backward in its own way."""

    class Square(Function):
        @staticmethod
        def forward(ctx: Any, a: Any) -> Any:
            keep(ctx, a)
            return a * a

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return (2 * gradient * kept(ctx),)

    return Square


def keep_in_an_object(ctx: Any, a: Any) -> None:
    ctx.notes = type("Notes", (), {})()
    ctx.notes.src = a


KEPT: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "an attribute": (lambda ctx, a: setattr(ctx, "src", a), lambda ctx: ctx.src),
    "a view": (lambda ctx, a: setattr(ctx, "src", a[:, ::-1]), lambda ctx: ctx.src[:, ::-1]),
    "a tuple": (lambda ctx, a: setattr(ctx, "src", (1, [a])), lambda ctx: ctx.src[1][0]),
    "a dict": (lambda ctx, a: setattr(ctx, "src", {"a": a}), lambda ctx: ctx.src["a"]),
    "a tensor": (lambda ctx, a: setattr(ctx, "src", Tensor(a)), lambda ctx: ctx.src.data),
    "an object": (keep_in_an_object, lambda ctx: ctx.notes.src),
    "a function": (lambda ctx, a: setattr(ctx, "src", lambda: a), lambda ctx: ctx.src()),
    "a list beside": (lambda ctx, a: _elsewhere.append(a), lambda ctx: _elsewhere.pop()),
}
FREE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "save": (lambda ctx, a: ctx.save(a), lambda ctx: ctx.saved[0]),
    "save a view": (
        lambda ctx, a: ctx.save(None, a[:, 1:]),
        lambda ctx: np.pad(ctx.saved[1], [(0, 0), (1, 0), *[(0, 0)] * 3]),
    ),
    "a copy": (lambda ctx, a: setattr(ctx, "src", a.copy()), lambda ctx: ctx.src),
    "what it has made": (lambda ctx, a: setattr(ctx, "mask", a > 0.1), lambda ctx: ctx.mask),
    "shape and type": (lambda ctx, a: ctx.save(a), lambda ctx: ctx.saved[0] * np.ones(ctx.shape, ctx.dtype)),
    "a context of its own at each call": (
        lambda ctx, a: ctx.save(a * (not hasattr(ctx, "met"))) or setattr(ctx, "met", True),
        lambda ctx: ctx.saved[0],
    ),
}


@pytest.mark.parametrize("name", [*KEPT, *FREE])
def test_whatever_is_kept_gives_the_gradients_of_eager(name):
    assert_agree(lambda: Net(square(*(KEPT | FREE)[name])), SHAPE, ROUNDING)
    _elsewhere.clear()


def test_a_gradient_that_is_kept_stays_what_it_was():
    kept = square(*FREE["save"])

    class Looked(kept):  # type: ignore[misc, valid-type]
        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            _elsewhere.append((gradient, gradient.copy()))
            return kept.backward(ctx, gradient)

    model = Net(Looked)
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT, debug=True)
    for seed in range(2):
        step(*batch(SHAPE, 4, 4, seed))
    assert len(_elsewhere) == 2
    for gradient, was in _elsewhere:
        np.testing.assert_array_equal(gradient, was)
    _elsewhere.clear()


def test_a_prediction_that_an_eager_loss_keeps_stays_what_it_was():
    def loss(prediction: Tensor, labels: Any) -> Tensor:
        _elsewhere.append((prediction.data[..., 0], prediction.data[..., 0].copy()))
        weights = 1.0 + (labels == labels.max())[..., np.newaxis]
        return (prediction * prediction * weights.astype(np.float32)).mean()

    model = Net(square(*FREE["save"]))
    step = tinyunet.compile(model, loss, SGD(model.parameters(), 0.1), INPUT, debug=True)
    _elsewhere.clear()
    for seed in range(2):
        step(*batch(SHAPE, 4, 4, seed))
    assert len(_elsewhere) == 2
    for prediction, was in _elsewhere:
        np.testing.assert_array_equal(prediction, was)
    _elsewhere.clear()


RETURNED: dict[str, Callable[[Any], Any]] = {
    "an array": lambda gradient: gradient,
    "a list": lambda gradient: [gradient],
    "None": lambda gradient: None,
    "a tuple of None": lambda gradient: (None,),
    "nothing": lambda gradient: (),
    "too many": lambda gradient: (gradient, None, None),
    "one image of it": lambda gradient: (gradient[:1, :1],),
    "one number": lambda gradient: (gradient.sum(),),
    "an axis more": lambda gradient: (gradient[np.newaxis],),
    "float64": lambda gradient: (gradient.astype(np.float64),),
    "as it should": lambda gradient: (gradient, None),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_backward_returns_is_checked_as_on_the_tape(name):
    class Doubled(Function):
        @staticmethod
        def forward(ctx: Any, a: Any, factor: float = 1.0) -> Any:
            return a * np.float32(factor)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return RETURNED[name](gradient)

        @classmethod
        def apply(cls, *arguments: Any) -> Tensor:
            return super().apply(*arguments, 1.0)

    images, labels = batch(SHAPE, 4, 4, 0)

    def eager() -> None:
        losses.soft_dice(Net(Doubled).logits(images), labels, from_logits=True).backward()

    def compiled() -> None:
        model = Net(Doubled)
        tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)(images, labels)

    assert told_by(compiled) == told_by(eager)
    if name in ("float64", "as it should"):
        assert_agree(lambda: Net(Doubled), SHAPE, ROUNDING, steps=1)


def told_by(run: Callable[[], None]) -> str:
    """What it raises; "" if nothing."""
    try:
        run()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "saved",
    [
        lambda a: (a if a.max() < 4 else abs(a),),
        lambda a: (None if a.max() < 4 else a,),
        lambda a: [a + 1] * (1 if a.max() < 4 else 2),
        lambda a: (np.flatnonzero(a > 4),),
        lambda a: (a + 1 if a.max() < 4 else a.astype(np.float64),),
    ],
)
def test_what_is_saved_may_depend_on_the_data(saved):
    class Depends(Function):
        @staticmethod
        def forward(ctx: Any, a: Any) -> Any:
            ctx.save(*saved(a))
            return a * 1

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            kept = [array for array in ctx.saved if array is not None]
            return (gradient * np.float32(1 + len(kept) + sum(array.size for array in kept)) / 1000,)

    assert_agree(lambda: Net(Depends), SHAPE, ROUNDING)


def test_the_shape_of_what_is_returned_may_not_depend_on_the_data():
    class Depends(Function):
        @staticmethod
        def forward(ctx: Any, a: Any) -> Any:
            return (a if a.max() < 100 else a[:1, :1, :1, :1]) * 1

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return (gradient,)

    model = Net(Depends)
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.0), INPUT)
    images, labels = batch(SHAPE, 4, 4, 0)
    step(images, labels)
    line = r"Depends.forward returns float32 of \(1, 1, 1, 1, 16\), and returned float32 of \(1, 6, 8"
    with pytest.raises(RuntimeError, match=line):
        step(images * 1e4, labels)


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.bool_])
def test_results_of_other_types_are_float32_as_on_the_tape(dtype):
    class Rounded(Function):
        @staticmethod
        def forward(ctx: Any, a: Any) -> Any:
            return (a * 4).astype(dtype)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return (gradient,)

    assert_agree(lambda: Net(Rounded), SHAPE, ROUNDING, steps=1)
