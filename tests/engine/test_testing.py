"""The public test tools find what they are made for, and their strategies draw what they say."""

import numpy as np
import pytest
from hypothesis import given

from tinyunet import functional, testing
from tinyunet.autograd import Tensor


@testing.without_deadline
@given(testing.volumes(most=3))
def test_a_right_gradient_passes_on_any_shape(shape):
    assert len(shape) == 5
    assert min(shape) >= 1
    assert max(shape[1:4]) <= 3
    testing.check_gradients(functional.elu, testing.distinct(shape, np.random.default_rng(0)))


def test_a_gradient_that_is_wrong_by_a_thousandth_is_found():
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 2, 3))

    def wrong(tensor):
        detached = Tensor(tensor.data)
        return tensor * tensor + (tensor - detached) * 1e-3 * Tensor(2 * tensor.data)

    testing.check_gradients(lambda tensor: tensor * tensor, x)
    with pytest.raises(AssertionError, match="backward gives"):
        testing.check_gradients(wrong, x)
