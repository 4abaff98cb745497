"""Compiled equals eager: the U-Net in two and three dimensions, with every set of passes."""

import copy
import functools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from agreement import EXACT, ROUNDING, assert_agree, assert_within, batch, eager_loss

import tinyunet
from tinyunet import SGD, Adam, Tensor, UNet, losses, no_grad
from tinyunet.compiler import passes

SMALL = {"filters": 4, "depth": 3}
WEIGHTS = {"class_weights": [0.5, 1.0, 2.0, 4.0]}
SHAPES = {
    "volume": ((1, 8, 8, 8), {"filters": 8, "depth": 3}),
    "odd volumes": ((3, 7, 9, 6), SMALL),
    "wide": ((1, 5, 6, 9), {"filters": 24, "depth": 2}),
    "one level": ((1, 4, 5, 6), {"filters": 16, "depth": 1}),
    "images": ((3, 12, 13), {"dim": 2, "filters": 16, "depth": 3}),
    "one class": ((1, 6, 4, 5), SMALL | {"classes": 1, "depth": 2}),
    "upsampling": ((1, 9, 6, 7), SMALL | {"use_upsampling": True}),
    "trilinear upsampling": ((1, 9, 6, 7), SMALL | {"use_upsampling": "trilinear"}),
    "dropout": ((1, 8, 6, 7), SMALL | {"dropout": 0.2}),
    "no normalisation": ((2, 7, 6, 5), SMALL | {"norm": None}),
    "leaky ReLU": ((1, 8, 6, 7), SMALL | {"activation": "leaky_relu"}),
    "ELU": ((2, 7, 6, 5), SMALL | {"activation": "elu"}),
    "PReLU": ((2, 7, 6, 5), SMALL | {"activation": "prelu"}),
    "ELU, no normalisation": ((1, 5, 6, 9), {"filters": 24, "depth": 2, "norm": None, "activation": "elu"}),
    "spatial dropout": ((2, 8, 6, 7), SMALL | {"norm": None, "spatial_dropout": 0.3}),
    "instance norm": ((2, 7, 6, 5), SMALL | {"norm": "instance"}),
    "group norm": ((2, 9, 8, 10), {"filters": 20, "depth": 2, "norm": "group"}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_without_passes_bit_for_bit(case):
    shape, config = SHAPES[case]
    make = functools.partial(UNet, **config)
    assert_agree(make, shape, EXACT, classes=config.get("classes", 4), enable=())


@pytest.mark.parametrize("case", SHAPES)
def test_with_all_passes(case):
    shape, config = SHAPES[case]
    make = functools.partial(UNet, **config)
    # For another processor the eager model takes float64, whose references need not be compiled anew.
    dtype = np.float64 if os.environ.get("NUMBA_CPU_NAME") else np.float32
    assert_agree(make, shape, ROUNDING, classes=config.get("classes", 4), eager_dtype=dtype)


@pytest.mark.parametrize("case", ["volume", "odd volumes", "images"])
@pytest.mark.parametrize("name", passes.NAMES)
def test_without_one_pass(name, case):
    shape, config = SHAPES[case]
    assert_agree(functools.partial(UNet, **config), shape, ROUNDING, disable=(name,), steps=1)


@pytest.mark.parametrize("name", passes.NAMES)
def test_with_one_pass_alone(name):
    shape, config = SHAPES["odd volumes"]
    assert_agree(functools.partial(UNet, **config), shape, ROUNDING, enable=(name,), steps=1)


@pytest.mark.parametrize(
    "loss",
    [
        losses.soft_dice,
        losses.log_dice,
        losses.cross_entropy,
        losses.dice_binary_cross_entropy,
        functools.partial(losses.soft_dice, include_background=False),
        functools.partial(losses.soft_dice, ignore_label=2, **WEIGHTS),
        functools.partial(losses.log_dice, ignore_label=0),
        functools.partial(losses.cross_entropy, ignore_label=0, **WEIGHTS),
        functools.partial(losses.dice_cross_entropy, ignore_label=3, **WEIGHTS),
        functools.partial(losses.dice_binary_cross_entropy, ignore_label=1, **WEIGHTS),
    ],
)
def test_losses(loss):
    assert_agree(functools.partial(UNet, **SMALL), (2, 4, 6, 5), ROUNDING, loss=loss, steps=1)


def test_losses_that_ignore_different_labels_are_not_fused():
    def both(prediction, labels, from_logits=False):
        dice = losses.soft_dice(prediction, labels, from_logits=from_logits, ignore_label=2)
        return dice + losses.cross_entropy(prediction, labels, from_logits, ignore_label=3)

    assert_agree(functools.partial(UNet, **SMALL), (2, 4, 6, 5), ROUNDING, loss=both, steps=1)


@pytest.mark.parametrize("classes", [1, 3])
def test_an_ignored_label_need_not_be_a_class(classes):
    """In eager and compiled steps, fused; and what is neither is refused in the same words."""
    loss = functools.partial(losses.dice_cross_entropy, ignore_label=255)
    model, shape = UNet(**SMALL, classes=classes), (2, 4, 6, 5)
    images, labels = batch(shape, 4, classes, 0)
    step = tinyunet.compile(model, loss, Adam(model.parameters()), images.shape)
    labels[:, 1:3] = 255
    expected = eager_loss(model, loss, images, labels).item()
    assert step.gradients(images, labels) == pytest.approx(expected, rel=1e-5)
    assert any(node.op == "head_loss" for node in step.program(images.shape).graph.nodes)
    nothing = np.full_like(labels, 255)
    assert step.gradients(images, nothing) == eager_loss(model, loss, images, nothing).item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())
    labels[0, 0, 0, 0] = 7
    for call in (lambda: step(images, labels), lambda: eager_loss(model, loss, images, labels)):
        with pytest.raises(
            ValueError, match=f"labels must be from 0 to {max(classes, 2) - 1}, not from 0 to 7"
        ):
            call()


def test_a_loss_that_computes_beside_the_operators_runs_on_its_own_tape():
    def weighted(prediction: Tensor, labels: np.ndarray) -> Tensor:
        weights = 1.0 + (labels == labels.max())[..., np.newaxis]
        return (prediction * prediction * weights.astype(np.float32)).mean()

    weighted.takes_probabilities = True
    assert_agree(functools.partial(UNet, **SMALL), (2, 4, 9, 6), ROUNDING, loss=weighted)


def test_training_follows_the_eager_loss():
    """Twenty steps; measured 2e-6 at the last with momentum, which does not divide by gradients."""
    shape = (1, 8, 8, 8)
    models = [UNet(filters=4, depth=3) for _ in range(2)]
    optimizers = [SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    step = tinyunet.compile(models[1], losses.soft_dice, optimizers[1], (*shape, 4))
    images, labels = batch(shape, 4, 4, 0)
    trajectory = []
    for _ in range(20):
        optimizers[0].zero_grad()
        expected = losses.soft_dice(models[0].logits(images), labels, from_logits=True)
        expected.backward()
        optimizers[0].step()
        trajectory.append((expected.item(), step(images, labels)))
    eager, compiled = np.array(trajectory).T
    assert eager[-1] < eager[0]
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)


def test_two_runs_are_the_same_bit_for_bit():
    results = []
    for _ in range(2):
        model = UNet(filters=8, depth=2)
        optimizer = Adam(model.parameters())
        step = tinyunet.compile(model, losses.soft_dice, optimizer, (1, 6, 7, 8, 4))
        values = [step(*batch((1, 6, 7, 8), 4, 4, seed)) for seed in range(3)]
        results.append((values, optimizer.flat_parameters.copy()))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_avx2_passes_too():
    """Compiled for a Haswell: vectors are halves, and the numbers those of the eager model in float64."""
    environment = dict(os.environ, NUMBA_CPU_NAME="haswell")
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    command += ["-k", "test_with_all_passes and (images or wide)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "2 passed" in run.stdout


class TestShapes:
    """A new shape compiles anew."""

    def test_last_few_programs_are_kept(self):
        predict = tinyunet.compile(UNet(**SMALL), (1, 4, 4, 4, 4))
        first = predict.program((1, 4, 4, 4, 4))
        assert predict.program((1, 4, 4, 4, 4)) is first
        for side in (5, 6, 7):
            predict.program((1, side, 4, 4, 4))
        assert predict.program((1, 7, 4, 4, 4)) is predict.program((1, 7, 4, 4, 4))
        assert predict.program((1, 4, 4, 4, 4)) is not first

    def test_eager_and_compiled_take_turns(self):
        model = UNet(**SMALL)
        predict = tinyunet.compile(model, (1, 4, 4, 4, 4))
        images, _ = batch((1, 4, 5, 6), 4, 4, 1)
        for _ in range(2):
            with no_grad():
                model.eval()
                assert_within(predict(images), model(images).data, ROUNDING, "prediction")
            for parameter in model.parameters():
                parameter.data *= 1.5  # in place: the compiled prediction must see it

    def test_parameters_that_move_are_found(self):
        model = UNet(**SMALL)
        predict = tinyunet.compile(model, (1, 4, 4, 4, 4))
        Adam(model.parameters()).flat_parameters[:] *= 1.5  # all in a buffer of its own
        images, _ = batch((1, 4, 4, 4), 4, 4, 1)
        model.eval()
        with no_grad():
            assert_within(predict(images), model(images).data, ROUNDING, "prediction")

    def test_mode_of_the_model_stays(self):
        model = UNet(**SMALL).eval()
        step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), (1, 4, 4, 4, 4))
        assert not model.training
        before = [buffer.copy() for buffer in model.buffers()]
        step.program((1, 5, 5, 5, 4))  # compiling is not training
        for buffer, was in zip(model.buffers(), before, strict=True):
            np.testing.assert_array_equal(buffer, was)


AGAIN = [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))]


@pytest.mark.parametrize("again", AGAIN)
class TestCopies:
    """A copy, and what was pickled, is a model of its own, and compiled for that."""

    def test_a_prediction(self, again):
        predict = tinyunet.compile(UNet(**SMALL), (1, 4, 4, 4, 4))
        images, _ = batch((1, 4, 4, 4), 4, 4, 1)
        first = predict(images)
        copied = again(predict)
        np.testing.assert_array_equal(copied(2 * images), predict(2 * images))
        for parameter in predict.model.parameters():
            parameter.data *= 1.5
        assert not np.array_equal(predict(images), first)
        np.testing.assert_array_equal(copied(images), first)

    def test_a_step(self, again):
        model, data = UNet(**SMALL), batch((1, 4, 4, 4), 4, 4, 1)
        step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), (1, 4, 4, 4, 4))
        step(*data)
        copied = again(step)
        assert copied.model.parameters()[0] is copied.optimizer.parameters[0]
        for _ in range(2):
            assert copied(*data) == step(*data)
        optimizers = copied.optimizer, step.optimizer
        np.testing.assert_array_equal(*[each.flat_parameters for each in optimizers])
        step(*data)
        assert not np.array_equal(*[each.flat_parameters for each in optimizers])

    def test_a_model_that_holds_its_prediction(self, again):
        model = UNet(**SMALL)
        model.predict = tinyunet.compile(model, (1, 4, 4, 4, 4))
        images, _ = batch((1, 4, 4, 4), 4, 4, 1)
        copied = again(model)
        assert copied.predict.model is copied
        np.testing.assert_array_equal(copied.predict(images), model.predict(images))


def test_a_shallow_copy_is_of_the_same_model():
    predict = tinyunet.compile(UNet(**SMALL), (1, 4, 4, 4, 4))
    images, _ = batch((1, 4, 4, 4), 4, 4, 1)
    copied = copy.copy(predict)
    assert copied.model is predict.model
    predict.model.head.bias.data += 1
    np.testing.assert_array_equal(copied(images), predict(images))
    assert copied.program(images.shape) is not predict.program(images.shape)


class TestErrors:
    """One line that says what is wrong."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"disable": ("fold",)}, "disable: no pass 'fold'; there are "),
            ({"enable": "fold"}, "enable: no pass 'fold'"),
            ({"accuracy": "exact"}, 'accuracy must be "fast" or "strict", not \'exact\''),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            tinyunet.compile(UNet(**SMALL), (1, 4, 4, 4, 4), **options)

    def test_arguments(self):
        with pytest.raises(TypeError, match="compile takes"):
            tinyunet.compile(UNet(**SMALL), losses.soft_dice, (1, 4, 4, 4, 4))

    def test_arguments_of_other_types(self):
        model, shape = UNet(**SMALL), (1, 4, 4, 4, 4)
        optimizer = Adam(model.parameters())

        def told(*arguments):
            with pytest.raises((TypeError, ValueError)) as raised:
                tinyunet.compile(*arguments)
            return str(raised.value)

        assert told(None, shape) == "model must be a Module, not NoneType"
        assert told(model, 5).startswith("input_shape is 5; it must be whole numbers above 0")
        assert told(model, (1, -4, 4, 4, 4)).startswith("input_shape is (1, -4, 4, 4, 4); it must")
        assert told(model, losses.soft_dice, None, shape).startswith("optimizer must be an Opt")
        assert told(model, 1.0, optimizer, shape) == "loss must be a function, not float"
        assert "the loss must be a Tensor" in told(model, lambda *_, **__: 1.0, optimizer, shape)

    def test_two_results(self):
        model = UNet(**SMALL)
        model.forward = lambda src: (src, src)
        with pytest.raises(TypeError, match="must return one Tensor"):
            tinyunet.compile(model, (1, 4, 4, 4, 4))

    def test_images_as_a_tensor(self):
        model = UNet(**SMALL).eval()
        images, _ = batch((1, 4, 4, 4), 4, 4, 0)
        predict = tinyunet.compile(model, images.shape)
        np.testing.assert_array_equal(predict(Tensor(images)), predict(images))

    def test_labels(self):
        model = UNet(**SMALL)
        step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), (1, 4, 4, 4, 4))
        images, labels = batch((1, 4, 4, 4), 4, 4, 0)
        with pytest.raises(TypeError, match="labels must be integers, not float64"):
            step(images, labels.astype(float))
        with pytest.raises(ValueError, match=r"labels must have the shape \(1, 4, 4, 4\)"):
            step(images, labels[0])
        with pytest.raises(ValueError, match="from 0 to 3, not from 0 to 4"):
            step(images, np.where(labels == 3, 4, labels))

    def test_images(self):
        with pytest.raises(ValueError, match="must have 4 channels"):
            tinyunet.compile(UNet(**SMALL), (1, 4, 4, 4, 3))
