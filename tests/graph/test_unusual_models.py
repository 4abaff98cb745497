"""What users build of the public operators, besides nets: compiled equals eager, or one line says why not."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from agreement import (
    INPUT,
    ROUNDING,
    SHAPE,
    assert_agree,
    assert_same_gradients,
    assert_within,
    batch,
    conv,
    numbers,
)

import tinyunet
from kernels.conv3d import operator as conv3d
from tinyunet import SGD, Adam, Function, Module, Parameter, Tensor, UNet, losses, no_grad
from tinyunet import functional as F
from tinyunet.compiler.passes import choose_algorithm
from tinyunet.nn import BatchNorm, Conv3d, ConvTranspose3d, PReLU, ReLU


def shifted_norm() -> BatchNorm:
    norm = BatchNorm(16)
    norm.shift.data[:] = 1.0
    return norm


class Net(Module):
    """A convolution to 16 channels, what is tried, and a 1^3 convolution to 4 classes."""

    def __init__(self, middle: Callable[["Net", Any], Any], **parts: Any) -> None:
        self.first, self.head = conv(4, 16), conv(16, 4, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self._middle = middle

    def logits(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self._middle(self, F.relu(self.first(images)))))

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.logits(images))


def learned(*shape: int) -> Parameter:
    return Parameter(numbers(*shape))


def standardised(net: Any, x: Tensor) -> Tensor:
    weights = net.second.weights
    return F.conv3d(x, weights - weights.mean(axis=(1, 2, 3, 4), keepdims=True), net.second.bias)


def enlarged(net: Any, x: Tensor) -> Tensor:
    return F.conv_transpose3d(F.max_pool3d(x), net.up.weights * 0.5, net.up.bias)


def forked(net: Any, x: Tensor) -> Tensor:
    y = net.second(x)
    return net.third(F.relu(net.a(y))) + F.relu(net.b(y))


def read_twice(net: Any, x: Tensor) -> Tensor:
    y = net.second(x)
    return net.third(F.concatenate(net.up(F.max_pool3d(F.relu(y))), y))


def prelu(channels: int) -> PReLU:
    layer = PReLU(channels)
    layer.slope.data[:] = np.linspace(-0.5, 1.5, channels)
    layer.slope.data[channels // 2 : channels - 1] = 0
    return layer


def three(net: Any, x: Tensor) -> Tensor:
    return net.last(F.concatenate(F.relu(net.second(x)), x, F.relu(net.third(x))))


def without_biases(net: Any, x: Tensor) -> Tensor:
    y = F.relu(net.norm(net.second(x)))
    return net.third(F.concatenate(net.up(F.max_pool3d(y)), y))


UNUSUAL: dict[str, Callable[[], Net]] = {
    "weights that are computed": lambda: Net(standardised, second=conv(16, 16)),
    "weights of another shape": lambda: Net(
        lambda net, x: F.conv3d(x, net.w.reshape(16, 16, 3, 3, 3)), w=learned(16, 16 * 27)
    ),
    "weights that are fixed": lambda: Net(lambda net, x: F.conv3d(x, Tensor(numbers(16, 16, 3, 3, 3)))),
    "transposed weights that are computed": lambda: Net(enlarged, up=ConvTranspose3d(16, 16)),
    "a learned volume beside": lambda: Net(
        lambda net, x: net.second(F.concatenate(x, net.volume)),
        second=conv(32, 16),
        volume=learned(*SHAPE, 16),
    ),
    "a learned volume convolved": lambda: Net(
        lambda net, x: x + net.second(net.volume), second=conv(16, 16), volume=learned(*SHAPE, 16)
    ),
    "coordinates beside": lambda: Net(
        lambda net, x: net.second(F.concatenate(x, net.coordinates)),
        second=conv(19, 16),
        coordinates=numbers(*SHAPE, 3),
    ),
    "16 coordinates beside": lambda: Net(
        lambda net, x: net.second(F.concatenate(x, net.coordinates)),
        second=conv(32, 16),
        coordinates=numbers(*SHAPE, 16),
    ),
    "a learned volume pooled": lambda: Net(
        lambda net, x: x + F.max_pool3d(net.volume), volume=learned(1, 12, 16, 16, 16)
    ),
    "a learned volume normalised": lambda: Net(
        lambda net, x: x + net.norm(net.volume), norm=BatchNorm(16), volume=learned(*SHAPE, 16)
    ),
    "two norms": lambda: Net(
        lambda net, x: net.b(net.a(net.second(x))), second=conv(16, 16), a=shifted_norm(), b=BatchNorm(16)
    ),
    "two norms of one convolution": lambda: Net(
        forked, second=conv(16, 16), third=conv(16, 16, seed=2), a=shifted_norm(), b=BatchNorm(16)
    ),
    "a norm's scale that is computed": lambda: Net(
        lambda net, x: F.batch_norm(
            net.second(x),
            net.norm.scale + 1.0,
            net.norm.shift,
            net.norm.running_mean,
            net.norm.running_variance,
            net.training,
        ),
        second=conv(16, 16),
        norm=BatchNorm(16),
    ),
    "quotients": lambda: Net(lambda net, x: x / net.part + 1 / (x * x + 2.0), part=learned(16)),
    "a convolution read before its ReLU and after it": lambda: Net(
        read_twice, second=conv(16, 16), up=ConvTranspose3d(16, 16), third=conv(32, 16, 1)
    ),
    "three concatenated": lambda: Net(three, second=conv(16, 5), third=conv(16, 7), last=conv(28, 16)),
    "four concatenated, one of them twice": lambda: Net(
        lambda net, x: net.last(F.concatenate(net.second(x), x, F.relu(net.second(x)), x)),
        second=conv(16, 5),
        last=conv(42, 16),
    ),
    "three concatenated, which no convolution reads": lambda: Net(
        lambda net, x: F.concatenate(net.second(x), x, net.volume)[..., 3:19],
        second=conv(16, 5),
        volume=learned(*SHAPE, 16),
    ),
    "three concatenated, some of them fixed": lambda: Net(
        lambda net, x: net.last(F.concatenate(Tensor(net.a), Tensor(net.b), net.second(x))),
        second=conv(16, 5),
        last=conv(12, 16),
        a=numbers(*SHAPE, 4),
        b=numbers(*SHAPE, 3),
    ),
    "without biases": lambda: Net(
        without_biases,
        second=Conv3d(16, 16, bias=False),
        norm=BatchNorm(16),
        up=ConvTranspose3d(16, 5, bias=False),
        third=Conv3d(21, 16, bias=False),
        head=Conv3d(16, 4, 1, bias=False),
    ),
    "PReLUs of all slopes": lambda: Net(
        lambda net, x: net.b(net.third(net.a(net.norm(net.second(x))))),
        **{
            "second": conv(16, 20),
            "norm": BatchNorm(20),
            "a": prelu(20),
            "third": conv(20, 16),
            "b": prelu(16),
        },
    ),
    "a PReLU of all channels, twice": lambda: (
        lambda layer: Net(
            lambda net, x: net.b(net.second(net.a(net.norm(x)))),
            a=layer,
            b=layer,
            norm=BatchNorm(16),
            second=conv(16, 16),
        )
    )(prelu(1)),
    "an ELU and a PReLU of what is read before, too": lambda: Net(
        lambda net, x: (lambda y: F.elu(y) + net.a(y) + y)(net.norm(net.second(x))),
        **{"second": conv(16, 16), "norm": BatchNorm(16), "a": prelu(16)},
    ),
    "an ELU, a PReLU and a pooling behind a pooling": lambda: Net(
        lambda net, x: F.upsample3d(net.a(F.elu(F.max_pool3d(x), 0.3))), a=prelu(16)
    ),
    "a PReLU whose slopes are fixed": lambda: Net(
        lambda net, x: F.prelu(net.norm(net.second(x)), Tensor(numbers(16))),
        **{"second": conv(16, 16), "norm": BatchNorm(16)},
    ),
    "a PReLU whose slopes are computed": lambda: Net(
        lambda net, x: F.prelu(net.norm(net.second(x)), net.slope * net.slope - 0.5),
        **{"second": conv(16, 16), "norm": BatchNorm(16), "slope": learned(16)},
    ),
    "a PReLU alone is learned": lambda: Net(
        lambda net, x: x + net.a(F.conv3d(Tensor(numbers(*SHAPE, 4)), Tensor(numbers(16, 4, 3, 3, 3)))),
        a=prelu(16),
    ),
    "a layer twice": lambda: (lambda layer: Net(lambda net, x: net.b(F.relu(net.a(x))), a=layer, b=layer))(
        conv(16, 16)
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_compiled_equals_eager(name):
    assert_agree(UNUSUAL[name], SHAPE, ROUNDING, steps=1)


class Scaled(Module):
    """A net behind a factor for each sequence, or behind another net, that is learnt as well."""

    def __init__(self, first: Module | None = None) -> None:
        self.first, self.factor = first, Parameter(np.linspace(0.5, 2, 4, dtype=np.float32))
        self.unet = UNet(filters=16, depth=2, seed=1)

    def logits(self, images: Tensor) -> Tensor:
        return self.unet.logits(self.first(images) if self.first else images * self.factor)

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.logits(images))


@pytest.mark.parametrize("filters", [0, 4, 16])
def test_few_channels_that_need_a_gradient(monkeypatch, filters):
    """They are read as they come, and both gradients of a layer in one pass would read blocks."""
    monkeypatch.setattr(conv3d, "pays_together", lambda plan: plan.tile is not None)
    monkeypatch.setattr(choose_algorithm, "_SMALL", 0)
    first = UNet(filters=filters, depth=2) if filters else None
    assert_agree(lambda: Scaled(copy.deepcopy(first)), SHAPE, ROUNDING, steps=1)


class HalfHead(Net):
    """Halves the weights of the head."""

    def logits(self, images: Tensor) -> Tensor:
        return F.conv3d(F.relu(self.first(images)), self.head.weights * 0.5, self.head.bias)


def in_lists(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = F.relu(block["norm"](block["conv"](x)))
    return x * net.factors[0]


def with_lists() -> Net:
    blocks = [{"conv": conv(16, 16), "norm": BatchNorm(16)} for _ in range(2)]
    return Net(in_lists, blocks=blocks, factors=(Parameter(np.full(16, 1.5, np.float32)),))


def test_layers_in_lists_and_dicts_are_parts():
    assert_agree(with_lists, SHAPE, ROUNDING)


def test_what_changes_in_a_list_of_layers_is_compiled_anew():
    net, images = with_lists().eval(), numbers(*INPUT)
    predict = tinyunet.compile(net, INPUT)
    before = predict.program(INPUT)
    assert predict.program(INPUT) is before
    net.train()  # a prediction is in inference whatever the model is in
    assert predict.program(INPUT) is before
    for change in (
        lambda: net.blocks.append({"conv": conv(16, 16), "norm": BatchNorm(16)}),
        lambda: net.blocks[0].update(conv=conv(16, 16, seed=7)),
        lambda: setattr(net.blocks[1]["norm"], "epsilon", 0.5),
    ):
        change()
        with no_grad(), net.mode(training=False):
            assert_within(predict(images), net(images).data, 1e-4, "prediction")


@pytest.mark.parametrize("classes", [2, 4])
def test_a_loss_whose_logits_are_wrong_by_far(classes):
    """The binary cross-entropy of several classes is one operator, with the gradient of float64."""
    for margin in (1.0, 80.0, 300.0):
        models = [Net(lambda net, x: x) for _ in range(3)]
        for net in models:
            net.head = conv(16, classes, 1)
            net.head.bias.data[1] = margin
        exact, eager, compiled = models
        exact.astype(np.float64)
        for net in models:
            SGD(net.parameters(), 0.1)
        loss, (images, _) = losses.dice_binary_cross_entropy, batch(SHAPE, 4, classes, 0)
        labels = np.zeros(SHAPE, np.uint8)
        for net in (exact, eager):
            loss(net.logits(Tensor(images.astype(net.head.bias.dtype))), labels, from_logits=True).backward()
        step = tinyunet.compile(compiled, loss, SGD(compiled.parameters(), 0.1), INPUT)
        step.gradients(images, labels)
        assert "binary_cross_entropy" in {n.op for n in step.program(INPUT).graph.nodes}
        assert abs(exact.head.bias.grad[1]) > 0.2 / classes
        for net in (eager, compiled):
            assert_same_gradients(exact, net, ROUNDING)


def test_a_head_whose_weights_are_computed():
    assert_agree(lambda: HalfHead(lambda net, x: x), SHAPE, ROUNDING, steps=1)


def modulated(net: Any, x: Tensor) -> Tensor:
    norm = net.norm
    scale = norm.scale * x.mean(axis=(0, 1, 2, 3))
    statistics = norm.running_mean, norm.running_variance
    return F.batch_norm(net.second(x), scale, norm.shift, *statistics, net.training)


def biased(net: Any, x: Tensor) -> Tensor:
    return F.conv3d(x, net.second.weights, net.second.bias + x.mean(axis=(0, 1, 2, 3)))


@pytest.mark.parametrize("middle", [modulated, biased])
def test_what_depends_on_the_images_is_made_of_each(middle):
    net = Net(middle, second=conv(16, 16), norm=BatchNorm(16)).eval()
    predict = tinyunet.compile(net, INPUT)
    for factor in (1, 3):
        images = factor * (numbers(*INPUT) + 1)
        with no_grad():
            assert_within(predict(images), net(images).data, 1e-4, "prediction")


def test_another_order_of_weights_is_seen():
    model = UNet(filters=16, depth=2).eval()
    images = numbers(*INPUT)
    predict = tinyunet.compile(model, INPUT)
    predict(images)
    weights = dict(model.named_parameters())["encoder.0.conv1.weights"].data
    weights[...] = weights[:, :, ::-1].copy()
    with no_grad():
        assert_within(predict(images), model(images).data, 1e-4, "prediction")


def weighted(probabilities: Tensor, labels: Any) -> Tensor:
    weights = np.array([1, 1, 1, 4], np.float32)[labels]
    return ((probabilities * probabilities).mean(axis=-1) * weights).mean()


def test_a_loss_that_looks_at_one_class_only():
    assert_agree(lambda: Net(lambda net, x: x), SHAPE, ROUNDING, steps=1, loss=Probabilities())


class Probabilities:
    """A loss of probabilities, as `agreement.eager_loss` knows it."""

    takes_probabilities = True

    def __call__(self, prediction: Tensor, labels: Any) -> Tensor:
        return weighted(prediction, labels)


def test_what_the_trace_can_see_is_refused():
    def threshold(net: Any, x: Tensor) -> Tensor:
        y = net.second(x)
        return y * (y.data < -0.5).astype(np.float32)

    net = Net(threshold, second=conv(16, 16))
    with pytest.raises(ValueError, match="depends on the data"):
        tinyunet.compile(net, INPUT)


def test_a_penalty_beside_a_loss_that_stays_eager_is_refused():
    net = Net(lambda net, x: x)

    def penalised(prediction: Tensor, labels: Any) -> Tensor:
        return losses.soft_dice(prediction, labels) + (net.first.weights**2.0).sum() * 0.1

    with pytest.raises(ValueError, match=r"the loss reads the parameter 'first\.weights'"):
        tinyunet.compile(net, penalised, SGD(net.parameters(), 0.1), INPUT)


class Named(Module):
    """Has a layer of the name that a method may have."""

    def __init__(self) -> None:
        self.first, self.logits = conv(4, 4), conv(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.logits(F.relu(self.first(images))))


def test_a_layer_called_logits_is_a_layer():
    eager, compiled = Named(), Named()
    step = tinyunet.compile(compiled, losses.soft_dice, SGD(compiled.parameters(), 0.1), INPUT)
    SGD(eager.parameters(), 0.1)
    images, labels = batch(SHAPE, 4, 4, 0)
    expected = losses.soft_dice(eager(images), labels)
    expected.backward()
    assert step.gradients(images, labels) == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(eager, compiled, ROUNDING)


def test_the_optimizer_of_another_model_is_refused():
    model, other = UNet(filters=4, depth=2), UNet(filters=4, depth=2)
    Adam(model.parameters())
    with pytest.raises(ValueError, match="it does not hold the model's parameter"):
        tinyunet.compile(model, losses.soft_dice, Adam(other.parameters()), INPUT)


def test_a_part_in_inference_is_refused():
    model = UNet(filters=4, depth=2).train()
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)
    dict(model.named_modules())["encoder.0.norm0"].eval()
    with pytest.raises(ValueError, match=r"encoder\.0\.norm0 is in inference"):
        step(*batch(SHAPE, 4, 4, 0))


@pytest.mark.parametrize("name", ["encoder.0.conv0", "decoder.0.conv0", "up.0", "head"])
def test_weights_that_are_not_learnt_beside_a_bias_that_is(name):
    def make() -> UNet:
        model = UNet(filters=16, depth=2)
        dict(model.named_parameters())[f"{name}.weights"].requires_grad = False
        return model

    eager, compiled = make().train(), make().train()
    step = tinyunet.compile(
        compiled, losses.soft_dice, SGD(compiled.parameters(), 0.1), INPUT, accuracy="strict"
    )
    optimizer = SGD(eager.parameters(), 0.1)
    images, labels = batch(SHAPE, 4, 4, 0)
    optimizer.zero_grad()
    losses.soft_dice(eager.logits(images), labels, from_logits=True).backward()
    step.gradients(images, labels)
    assert_same_gradients(eager, compiled, ROUNDING)


def test_settings_may_change_between_steps():
    model = UNet(filters=4, depth=2)
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)
    images, labels = batch(SHAPE, 4, 4, 0)
    step(images, labels)
    weights = dict(model.named_parameters())["encoder.0.conv0.weights"]
    norm = dict(model.named_modules())["encoder.0.norm0"]
    weights.requires_grad, norm.momentum = False, 1.0
    kept, mean = weights.data.copy(), norm.running_mean.copy()
    step(images, labels)
    np.testing.assert_array_equal(weights.data, kept)
    np.testing.assert_array_equal(norm.running_mean, mean)
    program = step.program(INPUT)
    step(images, labels)
    assert step.program(INPUT) is program


class Sigmoid(Module):
    """A layer without parameters."""

    def forward(self, src: Tensor) -> Tensor:
        return F.sigmoid(src)


class Pooled(Module):
    """Its layer without parameters, its function and its list of sizes may be replaced."""

    def __init__(self) -> None:
        self.conv, self.layer, self.function, self.size = conv(4, 4), ReLU(), F.relu, [1, 1, 1]

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool3d(self.function(self.layer(self.conv(images))), self.size)


def in_place(model: Pooled) -> None:
    model.size[2] = 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "layer", Sigmoid()),
        lambda model: setattr(model, "function", F.sigmoid),
        lambda model: setattr(model, "size", [2, 2, 2]),
        in_place,
    ],
    ids=["layer", "function", "list", "item of a list"],
)
def test_a_part_that_is_replaced_is_seen(change):
    model = Pooled().eval()
    predict = tinyunet.compile(model, INPUT)
    images, _ = batch(SHAPE, 4, 4, 0)
    assert_within(predict(images), model(images).data, ROUNDING, "dst")
    program = predict.program(INPUT)
    predict(images)
    assert predict.program(INPUT) is program
    change(model)
    assert_within(predict(images), model(images).data, ROUNDING, "dst")


def test_signs_that_change_are_seen():
    model = Pooled().eval()
    model.conv.bias.data[:] = [1, -1, -1, 1]
    predict = tinyunet.compile(model, INPUT)
    images, _ = batch(SHAPE, 4, 4, 0)
    predict(images)
    model.conv.bias.data *= -1
    assert_within(predict(images), model(images).data, ROUNDING, "dst")


def test_a_buffer_that_is_not_used_may_be_anything():
    model = Pooled().eval()
    model.table, model.names = numbers(4, 4)[:, ::2], np.array([None, "a"], object)
    images, _ = batch(SHAPE, 4, 4, 0)
    assert_within(tinyunet.compile(model, INPUT)(images), model(images).data, ROUNDING, "dst")


def logged(prediction: Tensor, labels: Any, from_logits: bool = False) -> Tensor:
    """A loss that computes something else after what it returns."""
    value = losses.soft_dice(prediction, labels, from_logits=from_logits)
    losses.cross_entropy(prediction, labels, from_logits=from_logits)
    return value


def test_the_loss_is_what_is_returned_not_what_was_computed_last():
    assert_agree(lambda: UNet(filters=4, depth=2), SHAPE, ROUNDING, loss=logged)


@pytest.mark.parametrize("seed", range(4))
def test_where_the_lowest_level_is_one_voxel(seed):
    """Its batch norm gives exactly the shift, zero at first: no ReLU may see noise instead."""
    assert_agree(lambda: UNet(filters=4, depth=3, seed=seed), (1, 4, 4, 4), ROUNDING, steps=1)


class Supervised(Module):
    """A second head, of a first layer or of the last, beside the one that predicts."""

    def __init__(self, deep: bool, softmax: bool = False) -> None:
        self.first, self.second = conv(4, 8, seed=1), conv(8, 8, seed=2)
        self.head, self.other = conv(8, 4, 1, seed=3), conv(8, 4, 1, seed=4)
        self._deep, self._softmax = deep, softmax

    def logits(self, images: Tensor) -> Tensor:
        shallow = F.relu(self.first(images))
        deep = F.relu(self.second(shallow))
        beside = self.other(shallow if self._deep else deep)
        self.beside = F.softmax(beside) if self._softmax else beside
        return self.head(deep)

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.logits(images))


def supervision(model: Supervised) -> Any:
    def loss(prediction: Tensor, labels: Any, from_logits: bool = False) -> Tensor:
        beside = losses.soft_dice(model.beside, labels, from_logits=not model._softmax)
        return losses.soft_dice(prediction, labels, from_logits=from_logits) + beside * 0.5

    return loss


@pytest.mark.parametrize("deep", [True, False])
def test_two_heads(deep):
    images, labels = batch(SHAPE, 4, 4, 0)
    eager, compiled = Supervised(deep), Supervised(deep)
    expected = supervision(eager)(eager.logits(images), labels, from_logits=True)
    optimizer = SGD(eager.parameters(), 0.1)
    optimizer.zero_grad()
    expected.backward()
    step = tinyunet.compile(
        compiled, supervision(compiled), SGD(compiled.parameters(), 0.1), INPUT, accuracy="strict"
    )
    assert_within(np.array(step.gradients(images, labels)), expected.data, ROUNDING, "loss")
    assert_same_gradients(eager, compiled, ROUNDING)


def test_a_loss_that_stays_eager_and_reads_more_than_the_prediction_is_refused():
    class Probabilities(Supervised):
        logits = None

        def forward(self, images: Tensor) -> Tensor:
            return F.softmax(Supervised.logits(self, images))

    model = Probabilities(True, softmax=True)
    with pytest.raises(ValueError, match=r"compile: the loss reads '.*' beside the prediction"):
        tinyunet.compile(model, supervision(model), SGD(model.parameters(), 0.1), INPUT)


def test_a_prediction_after_one_that_was_interrupted():
    class Interruptible(Function):
        wanted = False

        @staticmethod
        def forward(ctx: Any, a: Any) -> Any:
            if Interruptible.wanted:
                raise KeyboardInterrupt
            return a * 1

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return (gradient,)

    model = Net(lambda net, x: net.second(Interruptible.apply(x)), second=conv(16, 16)).eval()
    predict = tinyunet.compile(model, INPUT, debug=True)
    images, _ = batch(SHAPE, 4, 4, 0)
    Interruptible.wanted = True
    with pytest.raises(KeyboardInterrupt):
        predict(images)
    Interruptible.wanted = False
    assert_within(predict(images), model(images).data, ROUNDING, "prediction")


def test_constants_may_be_views():
    model = Net(lambda net, x: x * net.fixed[:, ::2][0], fixed=numbers(2, 32))
    images, _ = batch(SHAPE, 4, 4, 0)
    predict = tinyunet.compile(model, INPUT)
    assert_within(predict(images), model(images).data, ROUNDING, "prediction")


REPLACED: dict[str, tuple[Callable[[], Net], Callable[[], Any]]] = {
    "a number of NumPy": (
        lambda: Net(lambda net, x: x * net.part, part=np.float32(2)),
        lambda: np.float32(-3),
    ),
    "a tensor": (
        lambda: Net(lambda net, x: F.conv3d(x, net.part), part=Tensor(numbers(16, 16, 1, 1, 1))),
        lambda: Tensor(-numbers(16, 16, 1, 1, 1)),
    ),
    "a generator": (
        lambda: Net(
            lambda net, x: F.dropout(x, 0.5, net.part) if net.training else x, part=np.random.default_rng(3)
        ),
        lambda: np.random.default_rng(4),
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_any_attribute_that_is_replaced_is_seen(name):
    make, other = REPLACED[name]
    images, labels = batch(SHAPE, 4, 4, 0)
    model = make()
    step = tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)
    model.part = other()
    fresh = make()
    fresh.part = other()
    SGD(fresh.parameters(), 0.1)
    expected = losses.soft_dice(fresh.logits(images), labels, from_logits=True)
    assert_within(np.array(step.gradients(images, labels)), expected.data, ROUNDING, "loss")


def test_a_result_that_also_feeds_what_nobody_reads():
    class Forked(Module):
        def __init__(self) -> None:
            self.norm = shifted_norm()

        def forward(self, images: Tensor) -> Tensor:
            result = self.norm(images)
            self.beside = F.relu(result)
            return result

    model, images = Forked(), numbers(*SHAPE, 16)
    predict = tinyunet.compile(model, images.shape)
    assert_within(predict(images), model.eval()(images).data, ROUNDING, "prediction")


def test_only_what_is_learnt_need_be_in_the_optimizer():
    images, labels = batch(SHAPE, 4, 4, 0)

    def tuned() -> tuple[UNet, SGD]:
        model = UNet(filters=4, depth=2)
        for parameter in model.encoder.parameters():
            parameter.requires_grad = False
        return model, SGD([p for p in model.parameters() if p.requires_grad], 0.1)

    (eager, optimizer), (compiled, other) = tuned(), tuned()
    optimizer.zero_grad()
    losses.soft_dice(eager.logits(images), labels, from_logits=True).backward()
    optimizer.step()
    tinyunet.compile(compiled, losses.soft_dice, other, INPUT, accuracy="strict")(images, labels)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_within(a.data, b.data, ROUNDING, "parameter", of=1.0)


def test_nothing_to_learn_is_refused():
    model = UNet(filters=4, depth=2)
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="the loss depends on no parameter that requires"):
        tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)


def test_a_prediction_is_not_compiled_again_for_another_mode():
    model = UNet(filters=4, depth=2)
    predict = tinyunet.compile(model, INPUT)
    program = predict.program(INPUT)
    model.eval()
    assert predict.program(INPUT) is program


class Weighted:
    """A loss with a weight that is annealed."""

    alpha = 1.0

    def __call__(self, prediction: Tensor, labels: Any, from_logits: bool = False) -> Tensor:
        dice = losses.soft_dice(prediction, labels, from_logits=from_logits)
        return dice * self.alpha + losses.cross_entropy(prediction, labels, from_logits=from_logits)


def test_a_loss_whose_settings_change():
    images, labels = batch(SHAPE, 4, 4, 0)
    model, loss = Net(lambda net, x: x), Weighted()
    step = tinyunet.compile(model, loss, SGD(model.parameters(), 0.0), INPUT)
    step(images, labels)
    loss.alpha = 0.25
    expected = loss(model.logits(images), labels, from_logits=True)
    assert_within(np.array(step(images, labels)), expected.data, ROUNDING, "loss")


COPIED: dict[str, Callable[[], Net]] = {
    "a column": lambda: Net(lambda net, x: x * net.table[:, 0], table=numbers(16, 2)),
    "integers": lambda: Net(lambda net, x: x * net.table, table=np.arange(16) - 7),
    "a number": lambda: Net(lambda net, x: x * float(net.table[3]), table=numbers(16)),
}


@pytest.mark.parametrize("name", COPIED)
def test_buffers_that_the_model_copies(name):
    images, _ = batch(SHAPE, 4, 4, 0)
    model = COPIED[name]().eval()
    predict = tinyunet.compile(model, INPUT)
    predict(images)
    model.load_state_dict({n: array * -2 for n, array in model.state_dict().items()})
    assert_within(predict(images), model(images).data, ROUNDING, "prediction")


def replace_part(net: Any) -> None:
    net.parts[0] = conv(16, 16, seed=7)


def replace_array(net: Any) -> None:
    net.parts[1] = -net.parts[1]


def change_constant(net: Any) -> None:
    net.constant.data[:] = 7.0


@pytest.mark.parametrize("change", [replace_part, replace_array, change_constant])
def test_what_lists_and_constants_hold(change):
    images, _ = batch(SHAPE, 4, 4, 0)
    model = Net(
        lambda net, x: F.conv3d(x, net.parts[0].weights.detach(), net.constant) * net.parts[1],
        parts=[conv(16, 16), numbers(16)],
        constant=Tensor(numbers(16)),
    ).eval()
    predict = tinyunet.compile(model, INPUT)
    predict(images)
    change(model)
    assert_within(predict(images), model(images).data, ROUNDING, "prediction")


def test_parts_in_a_list_that_know_the_list():
    model = Net(lambda net, x: net.parts[0](x), parts=[conv(16, 16)]).eval()
    for parameter in model.parts[0].parameters():
        parameter.requires_grad = False
    model.parts[0].all, model.parts[0].whole = model.parts, model
    images, _ = batch(SHAPE, 4, 4, 0)
    found = tinyunet.compile(model, INPUT)(images)
    assert_within(found, model(images).data, ROUNDING, "prediction")


def test_random_numbers_beside_the_operators_are_refused():
    def middle(net: Any, x: Tensor) -> Tensor:
        return x if net.generator.random() < 0.2 else F.relu(net.second(x))

    for seed in range(5):
        model = Net(middle, second=conv(16, 16), generator=np.random.default_rng(seed))
        with pytest.raises(ValueError, match="draws random numbers"):
            tinyunet.compile(model, INPUT)
        assert model.generator.random() == np.random.default_rng(seed).random()


def test_labels_of_one_voxel():
    class Whole(Module):
        def __init__(self) -> None:
            self.first = conv(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return F.softmax(self.first(images).mean(axis=(1, 2, 3)))

    model, images = Whole(), numbers(*INPUT)
    step = tinyunet.compile(model, losses.cross_entropy, SGD(model.parameters(), 0.1), INPUT)
    for label in range(4):
        expected = losses.cross_entropy(model(images), [label])
        found = np.array(step.gradients(images, [label]))
        assert_within(found, expected.data, ROUNDING, f"label {label}")


def test_running_statistics_that_are_columns_are_refused():
    def middle(net: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, net.a, net.b, net.table[:, 0], net.table[:, 1], net.training)

    model = Net(middle, a=learned(16), b=learned(16), table=np.ones((16, 2), np.float32))
    with pytest.raises(ValueError, match="running_mean is written to; it must be a contiguous"):
        tinyunet.compile(model, losses.soft_dice, SGD(model.parameters(), 0.1), INPUT)


def both_dices(prediction: Tensor, labels: Any, from_logits: bool = False) -> Tensor:
    soft = losses.soft_dice(prediction, labels, from_logits=from_logits)
    return soft + losses.log_dice(prediction, labels, from_logits=from_logits)


def three_classes(prediction: Tensor, labels: Any, from_logits: bool = False) -> Tensor:
    """Of the channels, the last is no class."""
    dice = losses.soft_dice(prediction[..., :3], np.minimum(labels, 2), from_logits=from_logits)
    return dice + (prediction[..., 3:] ** 2).mean()


@pytest.mark.parametrize("loss", [both_dices, three_classes])
def test_unusual_losses(loss):
    assert_agree(lambda: Net(lambda net, x: x), SHAPE, ROUNDING, loss=loss, classes=3)


RESHAPED: dict[str, tuple[int, ...]] = {
    "the whole batch": (1, -1, *SHAPE[2:], 4),
    "voxels in a row": (-1, 4),
    "fewer classes": (-1, *SHAPE[1:], 2, 2),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_a_reshape_after_the_last_layer(name):
    class Reshaped(Net):
        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images).reshape(*RESHAPED[name])

    images = numbers(2, *SHAPE[1:], 4)
    model, same = Reshaped(lambda net, x: x), Reshaped(lambda net, x: x)
    shape = model(images).shape
    labels = np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1]) % shape[-1]
    predict = tinyunet.compile(model.eval(), images.shape)
    assert_within(predict(images), same.eval()(images).data, ROUNDING, "prediction")
    optimizer = SGD(same.train().parameters(), 0.1)
    step = tinyunet.compile(model.train(), losses.soft_dice, SGD(model.parameters(), 0.1), images.shape)
    expected = losses.soft_dice(same.logits(images), labels, from_logits=True)
    optimizer.zero_grad()
    expected.backward()
    assert_within(np.array(step.gradients(images, labels)), expected.data, ROUNDING, "loss")
    assert_same_gradients(same, model, ROUNDING)


def test_what_forward_sets_is_no_reason_to_compile_again():
    images, labels = batch(SHAPE, 4, 4, 0)
    model = Supervised(True)
    step = tinyunet.compile(model, supervision(model), SGD(model.parameters(), 0.1), INPUT)
    predict = tinyunet.compile(model, INPUT)
    predict(images)
    programs = step.program(INPUT), predict.program(INPUT)
    for _ in range(2):
        step(images, labels)
        predict(images)
        model(images)
    assert (step.program(INPUT), predict.program(INPUT)) == programs
