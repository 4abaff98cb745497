"""The tape: gradients of the arithmetic, what is kept and for how long, and every error."""

import gc
import re
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from tinyunet import Function, Tensor, functional, no_grad
from tinyunet.testing import check_gradients

SEEDS = st.integers(0, 2**31)
PAIRS = mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


class Wrong(Function):
    """The identity, with a gradient that can be made wrong."""

    wrong = staticmethod(lambda gradient: gradient)

    @staticmethod
    def forward(ctx, src):
        return src.copy()

    @staticmethod
    def backward(ctx, gradient):
        return (ctx.function.wrong(gradient),)


def check_wrong(wrong) -> None:
    function = type("Subclass", (Wrong,), {"wrong": staticmethod(wrong)})
    check_gradients(function.apply, normal(0, 3, 4))


class TestTheChecker:
    """A checker that lets a wrong gradient pass is worse than none."""

    def test_accepts_the_right_gradient(self):
        check_wrong(lambda gradient: gradient)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda gradient: gradient * 1.001,
            lambda gradient: gradient * 0.999,
            lambda gradient: -gradient,
            np.zeros_like,
            lambda gradient: np.full_like(gradient, np.nan),
            lambda gradient: gradient[::-1],
        ],
        ids=["0.1 % more", "0.1 % less", "sign", "zeros", "NaN", "order"],
    )
    def test_refuses_a_wrong_gradient(self, wrong):
        with pytest.raises(AssertionError, match="differences"):
            check_wrong(wrong)

    def test_refuses_a_changed_input(self):
        class Vandal(Wrong):
            @staticmethod
            def forward(ctx, src):
                src[0] = 0
                return src.copy()

        with pytest.raises(AssertionError):
            check_gradients(Vandal.apply, normal(0, 3, 4))


class TestGradients:
    """The arithmetic against finite differences, and how gradients add up."""

    @given(PAIRS, SEEDS)
    def test_sum_difference_product(self, shapes, seed):
        a, b = (normal(seed + i, *shape) for i, shape in enumerate(shapes.input_shapes))
        check_gradients(lambda a, b: a + b, a, b, seed=seed)
        check_gradients(lambda a, b: a - b, a, b, seed=seed)
        check_gradients(lambda a, b: a * b, a, b, seed=seed)

    @given(PAIRS, SEEDS)
    def test_quotient(self, shapes, seed):
        a, b = (normal(seed + i, *shape) for i, shape in enumerate(shapes.input_shapes))
        check_gradients(lambda a, b: a / b, a, np.copysign(np.abs(b) + 0.5, b), seed=seed)

    def test_a_quotient_is_rounded_once_and_does_not_overflow(self):
        n = np.arange(1, 100, dtype=np.float32)
        np.testing.assert_array_equal((Tensor(n) / n).data, np.ones(99))
        np.testing.assert_array_equal((2 / Tensor(n)).data, 2 / n)
        for a, b, slope in ((1e25, 1e25, -1e-25), (1e-30, 1e-20, -1e10)):
            x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
            (x / y).backward()
            np.testing.assert_allclose([x.grad, y.grad], [1 / b, slope], rtol=1e-6)

    @given(SEEDS)
    def test_with_constants_on_either_side(self, seed):
        a, b = np.abs(normal(seed, 3, 4)) + 0.5, normal(seed, 4)
        check_gradients(lambda a: 2 + a - 3 * a / 7 + (1 - a) - 5 / a - -a, a, seed=seed)
        check_gradients(lambda a: b + a - b * a / (b + 9) + (b - a) * a, a, seed=seed)

    @pytest.mark.parametrize("exponent", [-2, -1, 0, 0.5, 1, 2, 3])
    def test_power(self, exponent):
        check_gradients(lambda a: a**exponent, np.abs(normal(0, 3, 4)) + 0.5)

    @pytest.mark.parametrize("exponent", [np.float64(2), np.float32(2), np.int64(2)])
    def test_a_scalar_of_numpy_is_a_number(self, exponent):
        x = Tensor(np.full(3, 3, np.float32), requires_grad=True)
        power = x**exponent
        power[np.int64(1)].backward()
        assert (power.dtype, x.grad.dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(x.grad, [0, 6, 0])

    def test_power_of_zero_is_finite(self):
        x = Tensor(np.zeros(3), requires_grad=True)
        (x**0 + x**1 + x**2).sum().backward()
        np.testing.assert_array_equal(x.grad, np.ones(3))

    @given(SEEDS)
    def test_exp_and_log(self, seed):
        a = np.abs(normal(seed, 2, 5)) + 0.5
        check_gradients(lambda a: a.exp(), a, seed=seed)
        check_gradients(lambda a: a.log(), a, seed=seed)

    @pytest.mark.parametrize("keepdims", [False, True])
    @pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1,), (0, 1, 2)])
    def test_sum_and_mean(self, axis, keepdims):
        a = normal(0, 3, 1, 4)
        check_gradients(lambda a: a.sum(axis, keepdims), a)
        check_gradients(lambda a: a.mean(axis, keepdims), a)
        expected = a.mean(axis=axis, keepdims=keepdims)
        np.testing.assert_allclose(Tensor(a).mean(axis, keepdims).data, expected, rtol=1e-14)

    def test_sum_of_float32_is_taken_in_float64(self):
        x = Tensor(np.full((1_000_001, 1), 0.1, np.float32), requires_grad=True)
        total = x.sum(axis=0)
        assert total.dtype == np.float32
        assert total.item() == np.float32(np.float32(0.1).astype(np.float64) * 1_000_001)

    def test_reshape(self):
        check_gradients(lambda a: a.reshape(4, -1), normal(0, 2, 2, 3))

    @pytest.mark.parametrize("index", [0, slice(1, 3), (..., 1), (slice(None), None, -1), ()])
    def test_slice(self, index):
        a = normal(0, 3, 4)
        check_gradients(lambda a: a[index], a)
        np.testing.assert_array_equal(Tensor(a)[index].data, a[index])

    @given(SEEDS, st.integers(1, 5))
    def test_a_tensor_used_many_times(self, seed, times):
        def function(a):
            inner = a.exp()
            total = inner * 1
            for _ in range(times):
                total = total + inner * total
            return total + inner + inner

        check_gradients(function, normal(seed, 3), seed=seed)

    def test_a_leaf_used_twice_in_one_call(self):
        check_gradients(lambda a: a * a + (a + a), normal(0, 3))

    def test_gradients_of_several_backward_passes_add_up(self):
        x = Tensor(np.array([2.0]), requires_grad=True)
        (x * 3).backward()
        first = x.grad
        (x * 5).backward()
        assert x.grad == 8
        assert first == 3, "an array that the caller may hold was changed"

    def test_gradients_of_two_leaves_share_no_memory(self):
        a, b = (Tensor(np.zeros(3), requires_grad=True) for _ in range(2))
        start = np.ones(3)
        (a + b).backward(start)
        a.grad[:] = 7
        start[:] = 9
        np.testing.assert_array_equal(b.grad, np.ones(3))

    def test_sums_do_not_write_into_a_gradient_that_others_hold(self):
        # a and b get the very same array from Add; a gets two more on top.
        x = Tensor(np.array([1.0]), requires_grad=True)
        a, b = x * 1, x * 10
        (a * 100 + a * 1000 + (a + b)).backward()
        assert x.grad == 1100 + 1 + 10

    @pytest.mark.parametrize("gives_away", [False, True])
    def test_a_gradient_that_is_given_away_is_added_to_in_place(self, gives_away):
        made, reached = [], []

        class First(Wrong):
            @staticmethod
            def backward(ctx, gradient):
                made.append(2 * gradient)
                return (made[0],)

        class Last(Wrong):
            @staticmethod
            def backward(ctx, gradient):
                reached.append(gradient)
                return (gradient,)

        First.gives_away = gives_away
        x = Tensor(np.ones(3), requires_grad=True)
        shared = Last.apply(x)
        other = shared * 5
        (First.apply(shared) + other).sum().backward()
        np.testing.assert_array_equal(x.grad, np.full(3, 7))
        assert (reached[0] is made[0]) == gives_away
        np.testing.assert_array_equal(made[0], np.full(3, 7 if gives_away else 2))

    def test_the_gradient_of_a_number_can_be_set_to_zero(self):
        x = Tensor(2.0, requires_grad=True)
        for _ in range(2):
            (x * 3).backward()
        x.grad.fill(0)
        (x * 5).backward()
        assert x.grad == 5

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("activation", [functional.relu, functional.sigmoid])
    def test_operators_get_arrays_also_of_numbers(self, activation, dtype):
        x = Tensor(np.array(0.0, dtype), requires_grad=True)
        y = activation(x + 1)
        (y + y).backward()
        slope = y.item() * (1 - y.item()) if activation is functional.sigmoid else 1
        np.testing.assert_allclose(x.grad, 2 * slope, rtol=1e-6)


class TestTensor:
    """What a tensor shares, converts and shows."""

    def test_float_arrays_are_shared_and_others_become_float32(self):
        for dtype in (np.float32, np.float64):
            array = np.zeros((2, 3), dtype)
            assert Tensor(array).data is array
            assert Tensor(array).numpy() is array
        for data in ([1, 2], 3.5, np.arange(3), np.float16(1), True):
            assert Tensor(data).dtype == np.float32
        assert Tensor(np.zeros((2, 3)).T).data.flags.c_contiguous

    def test_numbers_do_not_change_the_precision(self):
        x = Tensor(np.ones(3, np.float32), requires_grad=True)
        y = (x * 2.0 + np.float64(3) - np.arange(3)) / 7 ** np.int64(2)
        assert y.dtype == np.float32
        assert (x.mean() + 1).dtype == np.float32
        assert (x * np.ones(3)).dtype == np.float64

    def test_a_gradient_has_the_precision_of_its_tensor(self):
        x = Tensor(np.ones(3, np.float32), requires_grad=True)
        (x * np.ones(3)).sum().backward()
        assert x.grad.dtype == np.float32

    def test_numpy_leaves_the_operator_to_the_tensor(self):
        y = np.ones(3) + Tensor(np.ones(3), requires_grad=True)
        assert isinstance(y, Tensor)

    def test_numpy_sees_the_array(self):
        x = Tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
        assert np.asarray(x) is x.data
        assert np.asarray(x, np.float64).dtype == np.float64
        assert not np.shares_memory(np.array(x), x.data)
        assert np.argmax(x) == 1

    def test_comparing_is_refused(self):
        x = Tensor([1.0, 2.0])
        for compare in (lambda: x == 1.0, lambda: x != x, lambda: 2.0 in x, lambda: x.data == x):
            with pytest.raises(TypeError, match=r"^tensor: compare the arrays, t.data, or use 'is'$"):
                compare()
        assert x in {x}

    def test_truth_is_that_of_one_number(self):
        assert Tensor([2.0])
        assert not Tensor(0.0)
        with pytest.raises(ValueError, match="ambiguous"):
            bool(Tensor([1.0, 2.0]))

    def test_iterating(self):
        assert [row.data.tolist() for row in Tensor([[1.0, 2.0], [3.0, 4.0]])] == [[1, 2], [3, 4]]
        with pytest.raises(TypeError, match="tensor: it is one number"):
            iter(Tensor(3.0))

    def test_detach_and_repr(self):
        x = Tensor([1.0], requires_grad=True)
        y = x * 2
        assert "made by Multiply" in repr(y)
        assert "made by" not in repr(y.detach())
        assert not y.detach().requires_grad
        assert y.detach().data is y.data


class TestNoGrad:
    """When nothing goes on the tape."""

    def test_block_and_decorator(self):
        x = Tensor([1.0], requires_grad=True)

        @no_grad()
        def double():
            return x * 2

        with no_grad():
            assert not (x * 2).requires_grad
            with no_grad():
                pass
            assert not (x * 2).requires_grad
            assert not double().requires_grad
        assert not double().requires_grad
        assert (x * 2).requires_grad

    def test_ends_with_an_error(self):
        x = Tensor([1.0], requires_grad=True)
        with pytest.raises(KeyError), no_grad():
            raise KeyError
        assert (x * 2).requires_grad

    def test_is_for_this_thread_only(self):
        x, seen = Tensor([1.0], requires_grad=True), []
        with no_grad():
            thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
            thread.start()
            thread.join()
        assert seen == [True]

    def test_constants_are_not_recorded(self):
        assert (Tensor([1.0]) * Tensor([2.0]))._context is None


class TestErrors:
    """Each misuse gives one clear line."""

    def test_second_backward(self):
        x = Tensor([1.0, 2.0], requires_grad=True)
        loss = (x * x).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match=r"^Sum: backward has already run .* forward pass"):
            loss.backward()

    def test_backward_through_a_freed_part(self):
        inner = Tensor([1.0], requires_grad=True) * 2
        (inner * 3).backward()
        with pytest.raises(RuntimeError, match=r"^Multiply: backward has already run"):
            (inner * 5).backward()

    def test_nothing_recorded(self):
        with pytest.raises(RuntimeError, match="depends on nothing that requires a gradient"):
            Tensor([1.0]).backward()

    def test_starting_gradient(self):
        x = Tensor(np.ones((2, 3)), requires_grad=True)
        with pytest.raises(ValueError, match=r"shape \(2, 3\) needs a gradient"):
            (x * 2).backward()
        with pytest.raises(ValueError, match=r"shape \(3,\), tensor \(2, 3\)"):
            (x * 2).backward(np.ones(3))

    def test_shapes_that_do_not_broadcast(self):
        with pytest.raises(ValueError, match=r"^add: shapes \(2, 3\) and \(4,\) cannot"):
            Tensor(np.ones((2, 3))) + Tensor(np.ones(4))
        with pytest.raises(ValueError, match=r"^multiply: shapes"):
            Tensor(np.ones((2, 3))) * np.ones(4)
        with pytest.raises(ValueError, match=r"^divide: shapes"):
            Tensor(np.ones((2, 3))) / np.ones(4)

    def test_arguments_of_operators(self):
        with pytest.raises(TypeError, match="exponent must be a number"):
            Tensor([1.0]) ** Tensor([2.0])
        with pytest.raises(TypeError, match="use integers, slices"):
            Tensor([1.0])[[0, 0]]

    @pytest.mark.parametrize(
        ("wrong", "got"), [(lambda gradient: gradient[:1], r"\(1, 4\)"), (lambda gradient: None, "None")]
    )
    def test_an_operator_with_a_gradient_of_another_shape(self, wrong, got):
        message = rf"^Subclass.backward must return a gradient of shape \(3, 4\), not {got}"
        with pytest.raises(RuntimeError, match=message):
            check_wrong(wrong)

    @pytest.mark.parametrize(("returned", "got"), [(lambda g: g, "ndarray"), (lambda g: (g, g, g, g), "4")])
    def test_an_operator_that_returns_something_else(self, returned, got):
        class Double(Function):
            @staticmethod
            def forward(ctx, a):
                return a * 2

            @staticmethod
            def backward(ctx, gradient):
                return returned(gradient)

        doubled = Double.apply(Tensor([1.0, 2.0], requires_grad=True))
        message = rf"^Double.backward must return a tuple of at most 1 gradients.* not {got}$"
        with pytest.raises(RuntimeError, match=message):
            doubled.backward(np.ones(2))

    def test_an_operator_that_returns_nothing_while_lines_are_wanted(self, monkeypatch):
        monkeypatch.setenv("TINYUNET_VERBOSE", "1")

        class Nothing(Wrong):
            @staticmethod
            def backward(ctx, gradient):
                pass

        with pytest.raises(RuntimeError, match=r"^Nothing.backward must .* not NoneType$"):
            Nothing.apply(Tensor(1.0, requires_grad=True)).backward()

    @pytest.mark.parametrize("wrong", [None, [1 + 2j], "text", [object()]])
    def test_what_is_no_real_number(self, wrong):
        with pytest.raises(TypeError, match=r"^tensor: expected real numbers, not "):
            Tensor(wrong)
        with pytest.raises(TypeError, match=r"^tensor: expected real numbers, not "):
            Tensor([1.0]) + wrong

    def test_the_mean_of_nothing(self):
        with pytest.raises(ValueError, match=r"^mean: a tensor of shape \(0, 3\) has none$"):
            Tensor(np.zeros((0, 3))).mean()

    def test_a_tensor_of_a_tensor_and_a_tuple_as_shape(self):
        x = Tensor([[1.0, 2.0]], requires_grad=True)
        assert Tensor(x).data is x.data
        (x.reshape((2, 1)) * 2).backward(Tensor([[1.0], [3.0]]))
        np.testing.assert_array_equal(x.grad, [[2.0, 6.0]])


class TestChangesInPlace:
    """Arrays that backward needs and that were written over in between are an error, not a bug."""

    MESSAGE = "Multiply: an array of shape .* changed in place after the forward pass"

    def test_one_element_of_a_small_array(self):
        x = Tensor(np.ones((10, 100)), requires_grad=True)
        y = x * x
        x.data[3, 7] = 0
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            y.sum().backward()

    @pytest.mark.parametrize(
        "index",
        [
            (..., 5),
            (slice(None), slice(None), slice(None), 31, slice(None)),
            (slice(None), slice(None), 0, slice(None), slice(None)),
            (slice(None), 16, slice(None), slice(None), slice(None)),
            (1,),
        ],
        ids=["channel", "column", "row", "slice", "image"],
    )
    def test_a_part_of_a_large_array(self, index):
        x = Tensor(np.random.default_rng(0).random((2, 32, 32, 32, 16)), requires_grad=True)
        y = x * x
        x.data[index] = 0
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            y.sum().backward()

    def test_through_another_view(self):
        array = np.ones(100)
        y = Tensor(array, requires_grad=True) * Tensor(array, requires_grad=True)
        array.reshape(10, 10)[5, 5] += 1
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            y.sum().backward()

    def test_nan_that_stays_nan_is_no_change(self):
        x = Tensor(np.full(3, np.nan), requires_grad=True)
        (x * x).sum().backward()

    def test_arrays_may_be_changed_after_backward(self):
        x = Tensor(np.ones(3), requires_grad=True)
        for _ in range(3):
            x.grad = None
            (x * x).sum().backward()
            x.data -= 0.25 * x.grad
        np.testing.assert_array_equal(x.data, np.full(3, 0.125))

    def test_arrays_that_no_gradient_needs_may_be_changed(self):
        x = Tensor(np.ones(3), requires_grad=True)
        y = x + x
        x.data[:] = 5
        y.sum().backward()
        np.testing.assert_array_equal(x.grad, [2, 2, 2])


class Watched(np.ndarray):
    """An array that can be referred to weakly."""


def test_each_operator_has_a_line_if_wanted(monkeypatch, capsys):
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    (x * x).sum().backward()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TINYUNET_VERBOSE", "1")
    (x * x).sum().backward()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["multiply", "sum", "sum_backward", "multiply_backward"]
    assert all(" eager " in line for line in lines)
    assert len({line.index(" ms ") for line in lines}) == 1
    with no_grad():
        x.exp()
    assert re.match(r"tinyunet: exp +2x3 +plain +eager .* - GFLOP/s .* Exp", capsys.readouterr().err)


class Keep(Function):
    """The identity, saving what it is given; notes who is alive when its gradient is taken."""

    saved, alive = [], []

    @classmethod
    def watch(cls, src: Tensor) -> Tensor:
        return cls.apply(src)

    @staticmethod
    def forward(ctx, src):
        dst = src.copy().view(Watched)
        ctx.save(dst)
        Keep.saved.append(weakref.ref(dst))
        return dst

    @staticmethod
    def backward(ctx, gradient):
        Keep.alive.append(sum(ref() is not None for ref in Keep.saved))
        return (gradient * 1,)


class TestMemory:
    """What the tape keeps alive, and how long."""

    def test_saved_arrays_are_freed_while_backward_proceeds(self):
        Keep.saved, Keep.alive = [], []
        x = Tensor(np.ones(3), requires_grad=True)
        for _ in range(5):
            x = Keep.watch(x)
        loss = x.sum()
        del x
        assert sum(ref() is not None for ref in Keep.saved) == 5
        loss.backward()
        assert Keep.alive == [5, 4, 3, 2, 1]
        assert not any(ref() is not None for ref in Keep.saved)

    def test_activations_that_nobody_saves_die_during_the_forward_pass(self):
        x = Tensor(np.ones(3), requires_grad=True)
        inner = x + 1
        reference = weakref.ref(inner)
        outer = inner + 1  # Add keeps shapes only
        del inner
        assert reference() is None
        outer.sum().backward()
        np.testing.assert_array_equal(x.grad, np.ones(3))

    def test_nothing_is_saved_without_a_tape(self):
        Keep.saved = []
        with no_grad():
            Keep.watch(Keep.watch(Tensor(np.ones(3), requires_grad=True)))
        assert not any(ref() is not None for ref in Keep.saved)

    def test_the_tape_has_no_reference_cycles(self):
        gc.collect()
        gc.disable()
        try:
            x = Tensor(np.ones(3), requires_grad=True)
            y = ((x * x).exp() + x).sum()
            reference = weakref.ref(y)
            y.backward()
            del y
            assert reference() is None
            y = ((x * x).exp() + x).sum()
            reference = weakref.ref(y)
            del y
            assert reference() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("backward", [True, False])
    def test_a_long_chain_needs_no_deep_stack(self, backward):
        x = Tensor(np.ones(1), requires_grad=True)
        y = x
        for _ in range(20 * sys.getrecursionlimit()):
            y = y + x
        if backward:
            y.backward()
            assert x.grad == 20 * sys.getrecursionlimit() + 1
        del y
