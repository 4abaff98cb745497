"""Optimizers against their formulas, flat buffers, state, schedules."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet import SGD, Adam, Parameter, Tensor, UNet, losses, nn, schedules
from tinyunet.local_ranks import LocalRanks

SHAPES = [(2, 3), (), (4,)]


def make_parameters(dtype: type = np.float64, seed: int = 0) -> list[Parameter]:
    generator = np.random.default_rng(seed)
    return [Parameter(np.asarray(generator.standard_normal(shape), dtype)) for shape in SHAPES]


def set_gradients(parameters: list[Parameter], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    for parameter in parameters:
        parameter.grad[...] = generator.standard_normal(parameter.shape)
    return np.concatenate([parameter.grad.ravel() for parameter in parameters]).astype(np.float64)


DECAYS = pytest.mark.parametrize("weight_decay", [0.0, 0.1])
# float32: a few roundings a step, ten steps.
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])


class TestSteps:
    """Ten steps of each rule, written out in NumPy."""

    @DTYPES
    @DECAYS
    def test_adam(self, dtype, rtol, weight_decay):
        parameters = make_parameters(dtype)
        optimizer = Adam(parameters, 0.01, 0.8, 0.9, 1e-3, weight_decay)
        x = optimizer.flat_parameters.astype(np.float64)
        m = v = np.zeros_like(x)
        for step in range(1, 11):
            g = set_gradients(parameters, step)
            optimizer.step()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            x = x - 0.01 * weight_decay * x
            x = x - 0.01 * np.sqrt(1 - 0.9**step) / (1 - 0.8**step) * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(optimizer.flat_parameters, x, rtol=rtol, atol=rtol)
        assert optimizer.flat_parameters.dtype == dtype

    @DTYPES
    @DECAYS
    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_sgd(self, dtype, rtol, weight_decay, momentum, nesterov):
        parameters = make_parameters(dtype)
        optimizer = SGD(parameters, 0.01, momentum, nesterov, weight_decay)
        x = optimizer.flat_parameters.astype(np.float64)
        velocity = np.zeros_like(x)
        for step in range(1, 11):
            g = set_gradients(parameters, step)
            optimizer.step()
            velocity = momentum * velocity - 0.01 * g
            change = momentum * velocity - 0.01 * g if nesterov else velocity
            x = x - 0.01 * weight_decay * x + change
        np.testing.assert_allclose(optimizer.flat_parameters, x, rtol=rtol, atol=rtol)

    @pytest.mark.parametrize("make", [Adam, SGD])
    def test_finds_the_minimum(self, make):
        x = Parameter(np.array([3.0, -2.0]))
        optimizer = make([x], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            ((x - np.array([1.0, 2.0])) ** 2).sum().backward()
            optimizer.step()
        np.testing.assert_allclose(x.data, [1, 2], atol=1e-3)

    def test_the_rate_can_be_set(self):
        parameters = make_parameters()
        optimizer = SGD(parameters, lr=1.0)
        before = optimizer.flat_parameters.copy()
        set_gradients(parameters, 0)
        optimizer.lr = 0.0
        optimizer.step()
        np.testing.assert_array_equal(optimizer.flat_parameters, before)

    @pytest.mark.parametrize("frozen", [0, 1, 2])
    @pytest.mark.parametrize(
        "make",
        [lambda p: Adam(p, 0.1, weight_decay=0.1), lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1)],
        ids=["Adam", "SGD"],
    )
    def test_what_requires_no_gradient_stays(self, make, frozen):
        parameters, all_learnt = make_parameters(), make_parameters()
        optimizer, other = make(parameters), make(all_learnt)
        for step in range(3):
            if step == 1:
                parameters[frozen].requires_grad = False
                kept = [getattr(optimizer, n).copy() for n in optimizer.averages]
                before = parameters[frozen].data.copy()
            set_gradients(all_learnt, step)
            set_gradients(parameters, step)
            optimizer.step()
            other.step()
        np.testing.assert_array_equal(parameters[frozen].data, before)
        part = slice(*[(0, 6), (6, 7), (7, 11)][frozen])
        for name, average in zip(optimizer.averages, kept, strict=True):
            np.testing.assert_array_equal(getattr(optimizer, name)[part], average[part])
        for index in {0, 1, 2} - {frozen}:
            np.testing.assert_array_equal(parameters[index].data, all_learnt[index].data)


class TestFlatBuffers:
    """Every parameter's data and grad is a part of one array."""

    def test_parameters_keep_their_values_and_become_views(self):
        parameters, originals = make_parameters(), make_parameters()
        optimizer = Adam(parameters)
        for parameter, original in zip(parameters, originals, strict=True):
            assert parameter.shape == original.shape
            np.testing.assert_array_equal(parameter.data, original.data)
            assert np.shares_memory(parameter.data, optimizer.flat_parameters)
            assert np.shares_memory(parameter.grad, optimizer.flat_gradients)
        optimizer.flat_parameters[:] = np.arange(11)
        np.testing.assert_array_equal(parameters[0].data, [[0, 1, 2], [3, 4, 5]])
        assert parameters[1].data == 6
        np.testing.assert_array_equal(parameters[2].data, [7, 8, 9, 10])

    def test_backward_adds_into_the_flat_gradients(self):
        parameters = make_parameters()
        optimizer = Adam(parameters)
        for times in (1, 2):
            sum(((p * 3).sum() for p in parameters), Tensor(0.0)).backward()
            np.testing.assert_array_equal(optimizer.flat_gradients, np.full(11, 3.0 * times))
        optimizer.zero_grad()
        assert not optimizer.flat_gradients.any()
        assert parameters[0].grad.base is not None

    def test_views_survive_load_state_dict(self):
        model = UNet(filters=2, depth=2)
        optimizer = Adam(model.parameters())
        other = UNet(filters=2, depth=2, seed=1)
        model.load_state_dict(other.state_dict())
        np.testing.assert_array_equal(
            optimizer.flat_parameters, np.concatenate([p.data.ravel() for p in other.parameters()])
        )

    def test_gradients_found_before_are_kept(self):
        parameters = make_parameters()
        (parameters[2] * 3).sum().backward()
        optimizer = Adam(parameters)
        np.testing.assert_array_equal(optimizer.flat_gradients, [0] * 7 + [3] * 4)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_trains_its_own_parameters(self, again):
        parameters = make_parameters()
        optimizer = Adam(parameters)
        set_gradients(parameters, 0)
        optimizer.step()
        before = optimizer.flat_parameters.copy()
        copied, other = again((parameters, optimizer))
        for step, learnt in ((optimizer, parameters), (other, copied)):
            set_gradients(learnt, 1)
            step.step()
        for parameter, expected in zip(copied, parameters, strict=True):
            np.testing.assert_array_equal(parameter.data, expected.data)
        assert not np.array_equal(other.flat_parameters, before)

    def test_a_shallow_copy_is_of_the_same_parameters(self):
        parameters = make_parameters()
        optimizer = Adam(parameters)
        for each in (optimizer, copy.copy(optimizer), optimizer):
            before = parameters[0].data.copy()
            set_gradients(parameters, 0)
            each.step()
            assert not np.array_equal(parameters[0].data, before)

    def test_what_is_shared_with_other_processes_is_not_copied(self):
        optimizer = Adam(make_parameters())
        optimizer.local = LocalRanks()
        optimizer.local.size = 2
        for again in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="its arrays are shared by 2 processes"):
                again(optimizer)

    @pytest.mark.parametrize("attribute", ["data", "grad"])
    def test_a_replaced_array_is_noticed(self, attribute):
        parameters = make_parameters()
        optimizer = Adam(parameters)
        setattr(parameters[2], attribute, np.zeros(4))
        with pytest.raises(RuntimeError, match=r"parameter 2 of shape \(4,\) has got other arrays"):
            optimizer.step()

    def test_a_step_between_forward_and_backward_is_noticed(self):
        x = Parameter(np.ones(3))
        optimizer = SGD([x], lr=1.0)
        (x * x).sum().backward()
        loss = (x * x).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
            loss.backward()


class TestErrors:
    """What an optimizer refuses."""

    def test_parameters(self):
        a, b = make_parameters()[:2]
        with pytest.raises(ValueError, match="parameters: the list is empty"):
            Adam([])
        with pytest.raises(ValueError, match=r"parameters: item 2 of shape \(2, 3\) comes twice"):
            Adam([a, b, a])
        with pytest.raises(TypeError, match="item 1 is a Tensor; expected a Parameter"):
            Adam([a, Tensor(1.0)])
        with pytest.raises(ValueError, match="item 1: a Parameter of float32 in a model of float64"):
            Adam([a, Parameter(np.zeros(3, np.float32))])

    def test_the_parameter_of_another_type_is_named_not_the_others(self):
        class Scaled(nn.Module):
            def __init__(self):
                self.factor, self.conv = Parameter(np.ones(4)), nn.Conv3d(4, 4)

        with pytest.raises(ValueError, match="item 0, 'factor': a Parameter of float64 in a model"):
            Adam(Scaled().parameters())

    @pytest.mark.parametrize(
        ("make", "settings", "message"),
        [
            (Adam, {"lr": -1}, "lr must be 0 or more and finite, not -1"),
            (Adam, {"lr": np.nan}, "lr must be 0 or more and finite, not nan"),
            (Adam, {"beta1": 1.0}, "beta1 must be at least 0 and below 1, not 1.0"),
            (Adam, {"beta2": -0.1}, "beta2 must be"),
            (Adam, {"epsilon": -1}, "epsilon must be 0 or more"),
            (Adam, {"weight_decay": -1}, "weight_decay must be 0 or more"),
            (SGD, {"lr": 0.1, "momentum": 1}, "momentum must be at least 0 and below 1"),
            (Adam, {"epsilon": 0}, "epsilon must be 1e-20 or more, not 0: Adam divides by it where"),
            (Adam, {"epsilon": 1e-46}, "epsilon must be 1e-20 or more"),
            (Adam, {"lr": 0.5, "weight_decay": 2.5}, r"lr \* weight_decay must be 1 or less"),
        ],
    )
    def test_settings(self, make, settings, message):
        with pytest.raises(ValueError, match=message):
            make(make_parameters(), **settings)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-9, 1e39, 1j, "0.1", None, [0.1]])
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            *((Adam, name) for name in ("lr", "beta1", "beta2", "epsilon", "weight_decay")),
            *((lambda p, **s: SGD(p, **{"lr": 0.1} | s), n) for n in ("lr", "momentum", "weight_decay")),
        ],
    )
    def test_no_setting_makes_parameters_nan(self, make, name, value):
        """Neither at the start nor when it is set later: the step is refused, and nothing changed."""
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make(make_parameters(), **{name: value})
        parameters = make_parameters()
        optimizer = make(parameters)
        set_gradients(parameters, 0)
        before = optimizer.flat_parameters.copy()
        setattr(optimizer, name, value)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            optimizer.step()
        np.testing.assert_array_equal(optimizer.flat_parameters, before)
        assert optimizer.steps == 0

    @given(
        lr=st.floats(0, 1e3),
        betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
        epsilon=st.floats(1e-20, 1),
        size=st.sampled_from([0.0, 1e-45, 1e-30, 1e-21, 1e-19, 1.0, 1e18]),
    )
    def test_what_is_accepted_keeps_parameters_finite(self, lr, betas, epsilon, size):
        parameter = Parameter(np.ones(4, np.float32))
        optimizer = Adam([parameter], lr, *betas, epsilon)
        optimizer.flat_gradients[:] = np.float32([0, size, -size, size])
        for _ in range(3):
            optimizer.step()
        assert np.isfinite(parameter.data).all()
        assert parameter.data[0] == 1


class TestState:
    """A run that is stopped and taken up goes on as if nothing had been."""

    @pytest.mark.parametrize(
        "make", [Adam, lambda p: SGD(p, 0.01, momentum=0.9, nesterov=True)], ids=["Adam", "SGD"]
    )
    def test_round_trip(self, make):
        whole, first, second = (make_parameters() for _ in range(3))
        uninterrupted, before, after = make(whole), make(first), make(second)
        for step in range(3):
            for parameters, optimizer in ((whole, uninterrupted), (first, before)):
                set_gradients(parameters, step)
                optimizer.step()
        before.lr = uninterrupted.lr = 0.5
        state = before.state_dict()
        assert all(isinstance(array, np.ndarray) for array in state.values())
        after.flat_parameters[:] = before.flat_parameters
        after.load_state_dict(state)
        set_gradients(first, 9)
        before.step()  # a state is a copy: this does not reach into it
        for parameters, optimizer in ((whole, uninterrupted), (second, after)):
            set_gradients(parameters, 3)
            optimizer.step()
        np.testing.assert_array_equal(after.flat_parameters, uninterrupted.flat_parameters)
        assert (after.steps, after.lr) == (4, 0.5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("v"), "state has no 'v', which Adam needs"),
            (lambda state: state.update(v=np.zeros(3)), r"state has 'v' of shape \(3,\), not \(11,\)"),
            (lambda state: state.update(w=0), "state has 'w', which Adam does not know"),
            (lambda state: state.update(lr=-1), "lr must be 0 or more and finite, not -1"),
            (lambda state: state.update(steps=np.nan), "state has 'steps' nan, not a whole number"),
            (lambda state: state.update(steps=-1), "state has 'steps' -1.0, not a whole number"),
            (lambda state: state.update(steps=2.5), "state has 'steps' 2.5, not a whole number"),
            (lambda state: state.update(v=np.full(11, "x")), "state has 'v' of type <U1, not float64"),
        ],
    )
    def test_errors_change_nothing(self, change, message):
        parameters = make_parameters()
        optimizer = Adam(parameters)
        state = {name: array + 1 for name, array in optimizer.state_dict().items()}
        change(state)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.steps == 0
        assert optimizer.lr == 1e-3
        assert not optimizer.m.any()


class TestSchedules:
    """The rate of each step."""

    def test_constant(self):
        assert {schedules.constant(0.1)(step) for step in (0, 5, 1000)} == {0.1}

    def test_polynomial(self):
        schedule = schedules.polynomial(1.0, steps=10, power=2, end=0.5)
        assert [schedule(step) for step in (0, 5, 10, 99)] == [1.0, 0.625, 0.5, 0.5]

    def test_polynomial_of_power_zero(self):
        schedule = schedules.polynomial(1.0, steps=4, power=0, end=0.1)
        assert [schedule(step) for step in (0, 3, 4, 5)] == [1.0, 1.0, 0.1, 0.1]

    @given(st.integers(1, 100), st.floats(0.1, 3))
    def test_polynomial_never_rises(self, steps, power):
        rates = [schedules.polynomial(1.0, steps, power)(step) for step in range(steps + 3)]
        assert rates == sorted(rates, reverse=True)
        assert (rates[0], rates[-1]) == (1.0, 0.0)

    def test_warm_up(self):
        schedule = schedules.warm_up(schedules.constant(1.0), steps=4)
        assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: schedules.constant(-1), "lr must be"),
            (lambda: schedules.polynomial(0.1, 0), "steps must be 1 or more, not 0"),
            (lambda: schedules.polynomial(0.1, 5, power=-1), "power must be 0 or more"),
            (lambda: schedules.polynomial(0.1, 5, end=np.nan), "end must be 0 or more"),
            (lambda: schedules.polynomial(0.1, np.nan), "steps must be a whole number of 1 or more"),
            (lambda: schedules.warm_up(schedules.constant(1), 0), "steps must be 1 or more, not 0"),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_small_net_learns():
    """Thirty steps on one batch: the loss falls to a fraction."""
    model = UNet(in_channels=1, classes=2, filters=4, depth=2)
    generator = np.random.default_rng(0)
    labels = np.zeros((2, 8, 8, 8), np.uint8)
    labels[:, 2:6, 2:6, 3:7] = 1
    image = labels[..., None] + 0.3 * generator.standard_normal((*labels.shape, 1))
    optimizer = Adam(model.parameters(), lr=0.01)
    curve = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = losses.dice_cross_entropy(model.logits(image), labels, from_logits=True)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.3 * curve[0]
