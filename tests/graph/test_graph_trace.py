"""The trace sees what operators save, names what it finds, and refuses what it cannot see."""

import copy
import pickle
import re

import numpy as np
import pytest
from agreement import EXACT, ROUNDING, assert_agree

import tinyunet
from kernels.deferred.statistics import Sharing
from tinyunet import Adam, Function, Module, Tensor, UNet, autograd, functional, losses
from tinyunet.compiler.operators import OPERATORS
from tinyunet.compiler.trace import trace
from tinyunet.nn import BatchNorm, Conv3d, ConvTranspose3d, Parameter
from tinyunet.tape import Absent, Context, NeedsNumbersError

GENERATOR = np.random.default_rng(0)
VOLUME = GENERATOR.standard_normal((2, 4, 5, 6, 3)).astype(np.float32)
CHANNELS = [np.ones(3, np.float32) for _ in range(4)]
LABELS = GENERATOR.integers(0, 3, (2, 4, 5, 6)).astype(np.uint8)
WEIGHTS = GENERATOR.standard_normal((3, 3, 2, 2, 2)).astype(np.float32)

ARGUMENTS = {
    functional.Convolution: (VOLUME, WEIGHTS, None, (1, 2, 1), "valid"),
    functional.TransposedConvolution: (VOLUME, WEIGHTS, None, (2, 2, 1), "valid"),
    functional.MaxPooling: (VOLUME, (2, 2, 2)),
    functional.Upsampling: (VOLUME, (2, 1, 3), "trilinear"),
    functional.BatchNormTraining: (VOLUME, *CHANNELS, 0.9, 1e-3),
    functional.BatchNormInference: (VOLUME, *CHANNELS, 1e-3),
    functional.GroupNorm: (VOLUME, *CHANNELS[:2], Sharing(True, 3), 1e-3),
    functional.Relu: (VOLUME,),
    functional.LeakyRelu: (VOLUME, 0.1),
    functional.Elu: (VOLUME, 0.5),
    functional.PRelu: (VOLUME, CHANNELS[0]),
    functional.Sigmoid: (VOLUME,),
    functional.Softmax: (VOLUME,),
    functional.Concatenation: (VOLUME, VOLUME[..., :2].copy()),
    functional.ZeroPadding: (VOLUME, (5, 5, 7)),
    functional.Dropout: (VOLUME, 0.3, np.random.default_rng(0)),
    functional.SpatialDropout: (VOLUME, 0.3, np.random.default_rng(0)),
    losses.CoarseLabels: (LABELS, (2, 1, 3), tuple(np.array(LABELS.shape[1:]) // (2, 1, 3))),
    losses.DiceSums: (VOLUME, LABELS),
    losses.CrossEntropy: (VOLUME, LABELS),
    losses.BinaryCrossEntropy: (VOLUME, LABELS),
    autograd.Reshape: (VOLUME, (2, -1, 3)),
    autograd.Slice: (VOLUME, (slice(1), ..., None, slice(2))),
    autograd.Sum: (VOLUME, (1, -1), False),
    autograd.Add: (VOLUME, VOLUME[:, :1].copy()),
    autograd.Multiply: (VOLUME[0].copy(), VOLUME),
    autograd.Divide: (VOLUME, CHANNELS[0]),
    autograd.Power: (VOLUME, 2.0),
    autograd.Exp: (VOLUME,),
    autograd.Log: (abs(VOLUME),),
}


@pytest.mark.parametrize("function", OPERATORS, ids=lambda f: f.__name__)
def test_descriptions_of_operators_are_true(function):
    """Shape, type and what is saved, against a run of the operator itself."""
    arguments = ARGUMENTS[function]
    leaves = tuple(
        Tensor(0.0) if isinstance(a, np.ndarray) and a.dtype == np.float32 else None for a in arguments
    )
    ctx = Context(function, leaves)
    dst = function.forward(ctx, *arguments)
    known = OPERATORS[function]
    names = function.forward.__code__.co_varnames[1 : 1 + len(arguments)]
    given = dict(zip(names, arguments, strict=True))
    shape = known.shape(given)
    assert shape == dst.shape
    assert np.dtype(known.dtype(given) if known.dtype else np.float32) == dst.dtype
    saves = known.saves(ctx.needs_gradient) if callable(known.saves) else known.saves
    assert len(saves) == len(ctx.saved)
    for name, array in zip(saves, ctx.saved, strict=True):
        if name in known.workspaces:
            extent, dtype = known.workspaces[name](given, shape)
            assert (extent, np.dtype(dtype)) == (array.shape, array.dtype), name
        else:
            assert array is (dst if name == "dst" else given[name]), name


class Scaled(Function):
    """An operator of somebody else, with a workspace, that nobody has described to the graph."""

    @staticmethod
    def forward(ctx, src, factor, power):
        ctx.save(src**power, factor)
        ctx.power = power
        return src**power * factor

    @staticmethod
    def backward(ctx, gradient):
        raised, factor = ctx.saved
        root = np.cbrt(raised)
        diff_factor = (gradient * raised).sum(axis=tuple(range(4)))
        return gradient * factor * ctx.power * root ** (ctx.power - 1), diff_factor


class Mixed(Module):
    """What no pass knows: own operators, arithmetic, strides, shared parameters, two uses of one."""

    def __init__(self):
        generator = np.random.default_rng(3)
        self.conv = Conv3d(4, 5, (3, 2, 3), stride=(1, 2, 1), generator=generator)
        self.again = Conv3d(5, 5, (3, 3, 3), padding="same", generator=generator)
        self.norm = BatchNorm(5)
        self.factor = Parameter(np.linspace(0.5, 1.5, 5, dtype=np.float32))
        self.unused = Parameter(np.ones(3, np.float32))
        self.head = Conv3d(5, 4, (1, 1, 1), generator=generator)

    def forward(self, src):
        src = self.conv(src)
        src = functional.leaky_relu(self.norm(self.again(self.again(src))), 0.2)
        cubed = Scaled.apply(src, self.factor, 3)
        src = src + 0.5 * cubed * functional.sigmoid(src)
        return functional.softmax(self.head(src[:, :, 1:] - self.factor.reshape(1, 1, 1, 1, 5)))


class Single(Module):
    """One operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, src):
        return self.operator(src)


def _ones(*shape):
    return Tensor(np.ones(shape, np.float32))


REFUSED = {
    "transposed: channels": ConvTranspose3d(5, 2),
    "transposed: many channels": ConvTranspose3d(40, 3),
    "transposed: bias": lambda x: functional.conv_transpose3d(x, _ones(4, 2, 2, 2, 2), _ones(3)),
    "transposed: padding": lambda x: functional.conv_transpose3d(x, _ones(4, 2, 2, 2, 2), padding="full"),
    "transposed: axes": lambda x: functional.conv_transpose3d(x.reshape(16, 4, 4), _ones(4, 2, 2, 2, 2)),
    "convolution: channels": Conv3d(3, 2),
    "convolution: bias": lambda x: functional.conv3d(x, _ones(2, 4, 1, 1, 1), _ones(3)),
    "convolution: dtype": lambda x: functional.conv3d(x, Tensor(np.ones((2, 4, 1, 1, 1), "f8"))),
    "batch norm: channels": BatchNorm(5),
    "pooling: size": lambda x: functional.max_pool3d(x, 8),
    "pooling: axes": lambda x: functional.max_pool3d(x.reshape(16, 4, 4)),
    "upsampling: axes": lambda x: functional.upsample3d(x.reshape(16, 4, 4)),
}


@pytest.mark.parametrize("operator", REFUSED.values(), ids=REFUSED)
def test_what_eager_refuses_is_refused_in_the_same_words(operator):
    model, image = Single(operator), np.ones((1, 4, 4, 4, 4), np.float32)
    with pytest.raises((TypeError, ValueError)) as eager:
        model(image)
    with pytest.raises(eager.type, match=f"^{re.escape(str(eager.value))}$"):
        tinyunet.compile(model, image.shape)


def test_any_model_of_public_operators_compiles():
    def loss(prediction: Tensor, labels: np.ndarray) -> Tensor:
        return losses.cross_entropy(prediction, labels[:, :, : prediction.shape[2]])

    loss.takes_probabilities = True

    class Cropped(Mixed):
        def forward(self, src):
            return functional.pad_end(super().forward(src), src.shape[1:4])

    for options, bound in (({"enable": ()}, EXACT), ({}, ROUNDING)):
        assert_agree(Cropped, (2, 4, 6, 5), bound, loss=loss, **options)


def test_the_unused_parameter_has_gradient_zero():
    model = Mixed()
    optimizer = Adam(model.parameters())
    optimizer.flat_gradients[:] = 7
    step = tinyunet.compile(
        model, lambda prediction, labels: (prediction * prediction).mean(), optimizer, (1, 4, 6, 5, 4)
    )
    step.gradients(np.zeros((1, 4, 6, 5, 4)), np.zeros((1, 4, 2, 5), int))
    np.testing.assert_array_equal(model.unused.grad, 0)


def test_names_and_kinds():
    graph = trace(UNet(filters=2, depth=2), (1, 4, 4, 4, 4), losses.soft_dice)
    first = graph.nodes[0]
    assert (first.name, first.op) == ("encoder.0.conv0", "convolution")
    assert first.inputs["weights"] == "encoder.0.conv0.weights"
    kinds = {name: value.kind for name, value in graph.values.items()}
    assert kinds["encoder.0.norm0.running_mean"] == "buffer"
    assert kinds["encoder.0.norm0.scale"] == "parameter"
    assert kinds["images"] == kinds["labels"] == "input"


def test_a_model_that_computes_beside_the_operators_is_refused():
    class Standardised(Module):
        def __init__(self):
            self.conv = Conv3d(4, 4)

        def forward(self, src):
            return self.conv(Tensor(src.data - src.data.mean()))

    with pytest.raises(ValueError, match="looks at the numbers of 'images'; what depends on the data must"):
        tinyunet.compile(Standardised(), (1, 4, 4, 4, 4))


def test_a_parameter_of_somebody_else_is_refused():
    foreign = Parameter(np.ones(4, np.float32))

    class Borrowing(Module):
        def forward(self, src):
            return src * foreign

    with pytest.raises(ValueError, match="a parameter that is not among its own"):
        tinyunet.compile(Borrowing(), (1, 2, 2, 2, 4))


def test_tracing_takes_no_memory():
    graph = trace(UNet(filters=64), (4, 256, 256, 256, 4), losses.soft_dice)
    assert graph.values["encoder.0.conv0.dst"].nbytes > 16e9


ASKING = {
    "asarray": np.asarray,
    "mean": np.mean,
    "method": lambda a: a.max(),
    "arithmetic": lambda a: 1 + a,
    "of another array": lambda a: np.ones((2, 3)) * a,
    "comparison": lambda a: a > 0,
    "equality": lambda a: a == a,
    "index": lambda a: a[0],
    "truth": bool,
    "number": float,
    "iteration": list,
    "membership": lambda a: 1 in a,
    "where": lambda a: np.where(a, 1, 2),
    "in a list": lambda a: np.array([a]),
    "in place": lambda a: np.add.at(a, 0, 1),
    "sum": sum,
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_traced_array_has_no_numbers(ask):
    absent = Absent("images", (2, 3), np.float32)
    for array in (absent, copy.deepcopy(absent), pickle.loads(pickle.dumps(absent))):
        assert (array.shape, array.dtype, array.ndim, array.size, len(array)) == ((2, 3), np.float32, 2, 6, 2)
        with pytest.raises(NeedsNumbersError):
            ask(array)
