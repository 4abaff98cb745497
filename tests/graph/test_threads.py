"""Several Python threads at once: each gets what it would have got alone, bit for bit."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from agreement import batch

import tinyunet
from kernels import conv3d
from kernels.base import machine
from kernels.ops import activation, concat, norms, optimizers, pooling, softmax, transposed_conv
from tinyunet import SGD, Function, Module, Tensor, UNet, losses, no_grad
from tinyunet.nn import Dropout, Parameter
from tinyunet.segmentation.sliding_window import predict_volume, predictor

SHAPE = (1, 12, 12, 12, 4)
COUNTS = pytest.mark.parametrize("threads", [2, 4])


def at_once(threads: int, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls that are shared among threads, which begin together."""
    together = threading.Barrier(threads, timeout=60)

    def share(first: int) -> list[Any]:
        together.wait()
        return [calls[index]() for index in range(first, len(calls), threads)]

    with ThreadPoolExecutor(threads) as pool:
        shares = list(pool.map(share, range(threads)))
    return [shares[index % threads][index // threads] for index in range(len(calls))]


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Equal bit for bit, one after the other."""
    __tracebackhide__ = True
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def small(**config: Any) -> UNet:
    """A net with statistics of its own."""
    model = UNet(**{"filters": 8, "depth": 2} | config)
    for buffer in model.buffers():
        buffer += np.linspace(0, 1, buffer.size, dtype=np.float32)
    return model


def images(count: int, shape: tuple[int, ...] = SHAPE) -> list[Any]:
    """Another batch each."""
    return [batch(shape[:-1], shape[-1], 4, seed)[0] for seed in range(count)]


class Own(Function):
    """A user's operator."""

    @staticmethod
    def forward(ctx: Any, a: Any) -> Any:
        ctx.save(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return (2 * gradient * ctx.saved[0],)


class Squares(Module):
    """A net that has an operator of the user's in front."""

    def __init__(self) -> None:
        self.unet = small()

    def forward(self, src: Tensor) -> Tensor:
        return self.unet(Own.apply(src))


PREDICTIONS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "compiled": lambda: tinyunet.compile(small(), SHAPE),
    "compiled without passes": lambda: tinyunet.compile(small(), SHAPE, enable=()),
    "compiled, a user's operator": lambda: tinyunet.compile(Squares(), SHAPE),
    "compiled when it comes": lambda: predictor(small()),
    "eager": lambda: predictor(small(), eager=True),
}


class TestPrediction:
    """One model, two and four threads."""

    @COUNTS
    @pytest.mark.parametrize("kind", PREDICTIONS)
    def test_each_gets_its_own(self, kind, threads):
        predict, batches = PREDICTIONS[kind](), images(4)
        expected = [predict(each) for each in batches]
        calls = [lambda each=each: predict(each) for each in batches] * 6
        assert_same(at_once(threads, calls), expected * 6)

    def test_of_other_shapes_and_thread_counts(self):
        # What is fastest, and so rounding, may depend on the number of threads.
        predict = predictor(small(), deterministic=True)
        batches = [images(1, (1, side, 12, 8, 4))[0] for side in (6, 8, 10, 12)]  # one is dropped
        expected = [predict(each) for each in batches]

        def call(number: int, each: Any) -> Any:
            machine.set_threads(1 + number % machine.most_threads())
            return predict(each)

        calls = [lambda n=n, each=each: call(n, each) for n, each in enumerate(batches * 3)]
        assert_same(at_once(4, calls), expected * 3)

    @COUNTS
    def test_whole_volumes_leave_the_model_as_it_was(self, threads):
        model = small()
        before = [buffer.copy() for buffer in model.buffers()]
        volumes = [each[0] for each in images(3, (1, 11, 9, 13, 4))]
        expected = [predict_volume(model, each, (8, 8, 8)) for each in volumes]
        calls = [lambda each=each: predict_volume(model, each, (8, 8, 8)) for each in volumes] * 2
        assert_same(at_once(threads, calls), expected * 2)
        assert_same(model.buffers(), before)
        assert all(part.training for _, part in model.named_modules())

    def test_the_eager_model_in_another_mode_in_each_thread(self):
        model, (each,) = small(), images(1)

        def run(training: bool) -> Any:
            with model.mode(training), no_grad():
                found = model(each).data
                assert model.training is training
            return found

        trained = run(True)
        statistics = [buffer.copy() for buffer in model.buffers()]
        predicted = run(False)
        assert not np.array_equal(trained, predicted)
        assert_same(at_once(2, [lambda: run(False)] * 12), [predicted] * 12)
        assert_same(model.buffers(), statistics)

        def both() -> Any:
            run(False)
            return run(True)

        assert_same(at_once(2, [lambda: run(True), both] * 4), [trained] * 8)

    @pytest.mark.parametrize("eager", [False, True])
    def test_two_models(self, eager):
        predicts = [predictor(small(seed=seed, filters=filters), eager) for seed, filters in ((1, 8), (2, 5))]
        batches = images(3)
        expected = [predict(each) for each in batches for predict in predicts]
        calls = [lambda p=predict, e=each: p(e) for each in batches for predict in predicts]
        assert_same(at_once(2, calls * 4), expected * 4)


class TestTraining:
    """Steps come one after the other."""

    @staticmethod
    def step(lr: float) -> Any:
        model = small()
        optimizer = SGD(model.parameters(), lr)
        return tinyunet.compile(model, losses.dice_cross_entropy, optimizer, SHAPE, deterministic=True)

    @COUNTS
    def test_each_gets_the_loss_of_its_batch(self, threads):
        step = self.step(0.0)  # so that the order does not matter

        def run(seed: int) -> tuple[float, Any]:
            return step(*batch(SHAPE[:-1], 4, 4, seed)), step.dice_sums

        expected = [run(seed) for seed in range(4)]
        found = at_once(threads, [lambda seed=seed: run(seed) for seed in range(4)] * 4)
        assert [loss for loss, _ in found] == [loss for loss, _ in expected] * 4
        assert_same([sums for _, sums in found], [sums for _, sums in expected] * 4)

    @COUNTS
    def test_steps_of_several_threads_are_those_of_one(self, threads):
        alone, shared = self.step(0.1), self.step(0.1)
        data = batch(SHAPE[:-1], 4, 4, 0)
        expected = [alone(*data) for _ in range(8)]
        found = at_once(threads, [lambda: shared(*data)] * 8)
        assert sorted(found) == sorted(expected)
        assert_same([shared.optimizer.flat_parameters], [alone.optimizer.flat_parameters])
        assert_same(shared.model.buffers(), alone.model.buffers())

    def test_gradients_that_another_thread_has_replaced_are_not_stepped_with(self):
        step, data = self.step(0.1), batch(SHAPE[:-1], 4, 4, 0)
        step.gradients(*data)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(step.gradients, *data).result()
            with pytest.raises(RuntimeError, match="another thread has replaced the gradients"):
                step.optimizer.step()
            pool.submit(step.optimizer.step).result()
        step(*data)  # as a whole, it is nobody else's

    def test_gradients_of_eager_threads_are_summed(self):
        weights = [Parameter(np.ones(20_000, np.float32)), Tensor(np.ones(9, np.float32), True)]

        def run(number: int) -> None:
            for weight in weights:
                (weight * number).sum().backward()

        at_once(4, [lambda number=number: run(number) for number in range(100)])
        for weight in weights:
            np.testing.assert_array_equal(weight.grad, np.full(weight.shape, 99 * 50))

    @pytest.mark.parametrize("eager", [False, True])
    def test_predictions_meanwhile_are_of_one_step_or_another(self, eager):
        data, each, seen = batch(SHAPE[:-1], 4, 4, 0), images(1)[0], []
        alone = self.step(0.1)
        predict = predictor(alone.model, eager)
        possible = {predict(each).tobytes()}
        for _ in range(12):
            alone(*data)
            possible.add(predict(each).tobytes())
        shared = self.step(0.1)
        predict = predictor(shared.model, eager)
        done = threading.Event()

        def train() -> None:
            for _ in range(12):
                shared(*data)
            done.set()

        def look() -> None:
            while not done.is_set():
                seen.append(predict(each).tobytes())

        at_once(3, [train, look, look])
        assert seen
        assert set(seen) <= possible


class TestCompilation:
    """A trace is its thread's own."""

    def test_while_another_thread_runs_the_eager_model(self):
        model = Dropping()
        each, expected = images(1)[0], Dropping()(images(1)[0]).data
        results = []

        def eager() -> None:
            for _ in range(8):
                state = model.random_state()
                with no_grad():
                    results.append(model(each).data)
                model.load_random_state(state)

        def compiled() -> None:
            for side in (6, 8, 10):
                tinyunet.compile(model, (1, side, 8, 8, 4))

        at_once(2, [eager, compiled])
        assert_same(results, [expected] * 8)

    def test_of_one_model_by_several_threads(self):
        model = small()
        found = at_once(4, [lambda: tinyunet.compile(model, SHAPE)] * 4)
        (each,) = images(1)
        assert_same([predict(each) for predict in found], [found[0](each)] * 4)

    def test_a_step_that_its_listener_calls_is_refused(self):
        step, data = TestTraining.step(0.1), batch(SHAPE[:-1], 4, 4, 0)
        expected = step.gradients(*data)
        with pytest.raises(RuntimeError, match="called by what it runs itself"):
            step.gradients(*data, listener=lambda *_: step.gradients(*data))
        assert step.gradients(*data) == expected

    @COUNTS
    def test_a_model_may_call_the_compiled_prediction_of_another(self, threads):
        teacher = tinyunet.compile(small(seed=3), SHAPE)

        class Taught(Function):
            @staticmethod
            def forward(ctx: Any, a: Any) -> Any:
                return a + teacher(a)

        class Student(Module):
            def __init__(self) -> None:
                self.unet = small()

            def forward(self, src: Tensor) -> Tensor:
                return self.unet(Taught.apply(src))

        predict, batches = tinyunet.compile(Student(), SHAPE), images(2)
        expected = [f(each) for each in batches for f in (predict, teacher)]
        calls = [lambda f=f, each=each: f(each) for each in batches for f in (predict, teacher)]
        assert_same(at_once(threads, calls * 4), expected * 4)

    def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(self):
        program = (
            "import os, threading, time; from tinyunet.common.turns import one_at_a_time\n"
            "def hold():\n    with one_at_a_time: time.sleep(0.5)\n"
            "threading.Thread(target=hold).start(); time.sleep(0.1); child = os.fork()\n"
            "if not child: os._exit(0 if one_at_a_time.acquire(timeout=20) else 3)\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
        assert run.stdout.strip() == b"0", run.stderr


class Dropping(Module):
    """Draws random numbers while it trains."""

    def __init__(self) -> None:
        self.unet, self.dropout = UNet(filters=4, depth=2), Dropout(0.5)

    def forward(self, src: Tensor) -> Tensor:
        return self.dropout(self.unet(src))


def adam(parameters: Any) -> Any:
    """One step from a copy."""
    learnt, averages = parameters.copy(), [np.zeros_like(parameters) for _ in range(2)]
    optimizers.adam_step(learnt, parameters, *averages, 1, 0.1, 0.9, 0.999, 1e-7, 0.0)
    return learnt


KERNELS: dict[str, Callable[[Any, Any], Any]] = {
    "convolution": conv3d.forward,
    "convolution, backward_data": lambda x, w: conv3d.backward_data(x, w, x.shape),
    "convolution, backward_weights": lambda x, w: conv3d.backward_weights(x, x, (3, 3, 3))[0],
    "transposed": lambda x, w: transposed_conv.forward(x, w, None, (2, 2, 2), "same"),
    "batch norm": lambda x, w: norms.forward(x, x[0, 0, 0, 0], x[0, 0, 0, 0], 1e-3)[0],
    "relu": lambda x, w: activation.forward(x, activation.RELU),
    "max pooling": lambda x, w: pooling.forward(x, (2, 2, 2))[0],
    "concatenation": lambda x, w: concat.forward(x, x),
    "softmax": lambda x, w: softmax.forward(x),
    "Adam": lambda x, w: adam(x.reshape(-1)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_themselves(name):
    generator, kernel = np.random.default_rng(0), KERNELS[name]
    weights = generator.standard_normal((16, 16, 3, 3, 3)).astype(np.float32)
    # Scratchpads of other sizes in each thread.
    sources = [generator.standard_normal((1, side, 12, 12, 16)).astype(np.float32) for side in (12, 8, 16)]
    expected = [kernel(each, weights) for each in sources]
    calls = [lambda each=each: kernel(each, weights) for each in sources] * 10
    assert_same(at_once(4, calls), expected * 10)
