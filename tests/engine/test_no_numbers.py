"""Complex numbers, text, dates and objects are refused wherever arrays come in."""

import numpy as np
import pytest

import tinyunet
from tinyunet import Adam, Function, Parameter, Tensor, UNet, losses
from tinyunet.segmentation.scores import region_dice
from tinyunet.segmentation.sliding_window import predict_volume, segment

NO_NUMBERS = {
    "complex": lambda shape: np.full(shape, 1j),
    "complex64": lambda shape: np.full(shape, 1j, np.complex64),
    "object": lambda shape: np.full(shape, None),
    "text": lambda shape: np.full(shape, "1"),
    "dates": lambda shape: np.full(shape, np.datetime64("2020-01-01")),
    "durations": lambda shape: np.full(shape, np.timedelta64(1, "s")),
    "bytes": lambda shape: np.full(shape, b"1"),
}


@pytest.mark.parametrize("make", NO_NUMBERS.values(), ids=NO_NUMBERS)
class TestNoNumbers:
    """Arrays of what is no real number are refused with one line, wherever they come in."""

    SHAPE = (1, 4, 4, 4, 4)

    def test_images(self, make):
        model, wrong = UNet(filters=2, depth=2), make(self.SHAPE)
        predict = tinyunet.compile(model, self.SHAPE)
        for call in (
            lambda: model(wrong),
            lambda: model.logits(wrong),
            lambda: model.encoder(wrong),
            lambda: Tensor(np.ones(self.SHAPE)) * wrong,
            lambda: predict(wrong),
            lambda: predict_volume(model, wrong[0], (4, 4, 4)),
            lambda: segment(model, wrong[0]),
        ):
            with pytest.raises(TypeError, match="expected real numbers, not ndarray"):
                call()

    def test_labels(self, make):
        wrong = make(self.SHAPE[:-1])
        with pytest.raises(TypeError, match="labels must be integers, not"):
            losses.soft_dice(Tensor(np.ones(self.SHAPE)), wrong)
        with pytest.raises(TypeError, match="labels must be integers, not"):
            region_dice(wrong, wrong)

    def test_parameters_and_states(self, make):
        model, wrong = UNet(filters=2, depth=2), make((4,))
        with pytest.raises(TypeError, match="expected real numbers, not ndarray"):
            Parameter(wrong)
        state = model.state_dict() | {"head.bias": wrong}
        with pytest.raises(ValueError, match=r"state has 'head.bias' of type .*, not float32"):
            model.load_state_dict(state)
        optimizer = Adam([model.head.bias])
        with pytest.raises(ValueError, match=r"state has 'm' of type .*, not float32"):
            optimizer.load_state_dict(optimizer.state_dict() | {"m": wrong})

    def test_gradients(self, make):
        class Wrong(Function):
            @staticmethod
            def forward(ctx, a):
                return a

            @staticmethod
            def backward(ctx, gradient):
                return (make((4,)),)

        parameter = Parameter(np.ones(4))
        with pytest.raises(TypeError, match="expected real numbers, not ndarray"):
            (parameter * 1).backward(make((4,)))
        with pytest.raises(RuntimeError, match=r"Wrong.backward must return gradients of real numb"):
            Wrong.apply(parameter).sum().backward()
