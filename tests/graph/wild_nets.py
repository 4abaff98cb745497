"""Nets that nobody would build, compiled and compared with eager: run as a program, whose death is seen.

    python tests/graph/wild_nets.py --nets 10000 --seed 1

A kernel that writes past its arrays ends the whole process, so the tests start this file as a process of
its own. It prints each net before it runs it, so that the last line of a dead process names the culprit.
With several seeds one process draws from each in turn: what kernels share is compiled once.

Layers are drawn as (kind, width, other): what to do with the newest value, how many channels to make
(1 to 70), and which earlier value to take as well. What does not fit is left out.
"""

import argparse
import contextlib
import gc
import math
import sys
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import tinyunet
from kernels.base import machine
from kernels.conv3d import winograd_bricks
from tinyunet import Adam, Function, Module, Parameter, UNet, losses, no_grad
from tinyunet import functional as F
from tinyunet.compiler import measure
from tinyunet.compiler.passes import choose_algorithm
from tinyunet.nn import BatchNorm, Conv3d, ConvTranspose3d, GroupNorm, PReLU, Sequential

# Kernel and stride of convolutions. Those of the product are drawn most often.
CONVOLUTIONS = [((3, 3, 3), 1), ((3, 3, 3), 1), ((3, 3, 3), 1), ((1, 1, 1), 1), ((5, 5, 5), 1)]
CONVOLUTIONS += [((1, 3, 3), 1), ((5, 1, 3), 1), ((2, 3, 4), 1), ((3, 3, 3), 2), ((1, 2, 3), (1, 2, 1))]
TRANSPOSED = [((2, 2, 2), 2), ((2, 2, 2), 2), ((1, 2, 2), (1, 2, 2)), ((3, 3, 3), 2), ((2, 3, 1), 1)]
WIDTHS = st.one_of(st.integers(1, 4), st.sampled_from([16, 32, 48]), st.integers(1, 70))
LAYERED = ("conv", "conv", "up", "norm", "scaled", "unet", "prelu")  # layers with parameters
KINDS = (*LAYERED, "relu", "leaky", "pool", "upsample", "join", "join", "add", "times", "softmax")
KINDS += ("elu", "sigmoid", "own", "arithmetic", "slice", "mean", "reshape", "earlier", "relu", "norm")
LOSSES = (losses.soft_dice, losses.dice_cross_entropy, losses.cross_entropy, losses.log_dice)
MOST_VOXELS = 1500
# What float32 may lose here, and the "fast" convolutions, of the largest element. A net that multiplies
# a change of its numbers by more is allowed twenty times what such a change makes (`change` of `eager`), and
# one whose gradients are what is left of larger ones thirty times the error of the eager model in float32.
BOUNDS = {"strict": 2e-4, "fast": 2e-3}


class Squash(Function):
    """A user's operator: ``a / (1 + |a|)``."""

    @staticmethod
    def forward(ctx, a):
        ctx.save(a)
        return a / (1 + np.abs(a))

    @staticmethod
    def backward(ctx, gradient):
        (a,) = ctx.saved
        return (gradient / (1 + np.abs(a)) ** 2,)


class Scaled(Module):
    """A factor for each channel, which is learnt."""

    def __init__(self, channels):
        self.factor = Parameter(np.linspace(0.5, 1.5, channels, dtype=np.float32))

    def forward(self, src):
        return src * self.factor


class Wild(Module):
    """A net of drawn layers, and a 1^3 convolution to ``classes``."""

    def __init__(self, layers, channels, size, classes, number):
        self.recipe = (tuple(layers), channels, tuple(size), classes, number)
        self.parts, generator = Sequential(), np.random.default_rng(number)
        self.classes, self.made = classes, []
        shapes = [(*size, channels)]
        for layer in layers:
            part, shape = self._part(*layer, shapes, generator)
            if part:
                self.parts.append(part)
            if shape:
                self.made.append(layer)
                shapes.append(shape)
        self.made = tuple(self.made)
        self.head = Conv3d(shapes[-1][-1], classes, (1, 1, 1), generator=generator)
        self.size = shapes[-1][:3]

    def _part(self, kind, width, other, shapes, generator):
        """The layer and the shape of what it makes; None of both where it does not fit."""
        *size, C = shapes[-1]
        if kind == "conv":
            kernel, stride = CONVOLUTIONS[other % len(CONVOLUTIONS)]
            part = Conv3d(C, width, kernel, stride, generator=generator)
        elif kind == "up":
            kernel, stride = TRANSPOSED[other % len(TRANSPOSED)]
            part = ConvTranspose3d(C, width, kernel, stride, generator=generator)
        elif kind == "norm":
            part = GroupNorm(math.gcd(C, 2 * other + 2), C) if other % 2 else BatchNorm(C)
            part.scale.data[:] = generator.uniform(0.5, 1.5, C)
            part.shift.data[:] = generator.uniform(-0.5, 0.5, C)
        elif kind == "prelu":
            part = PReLU(C if other % 2 else 1)
            part.slope.data[:] = generator.uniform(-0.5, 1, part.slope.data.shape)
        elif kind == "scaled":
            part = Scaled(C)
        elif kind == "unet":
            if min(size) < 2 or width > 8 or sum(isinstance(p, UNet) for p in self.parts) > 1:
                return None, None
            part = UNet(in_channels=C, classes=width, filters=1 + other, depth=2, seed=other)
        else:
            part = None
        # This asks for the shape alone, and the reference in float64 has one kernel for all shapes.
        before = [np.zeros((1, *shape)) for shape in shapes]
        try:
            with no_grad(), in_float64(part):
                made = apply(part, kind, width, other, [tinyunet.Tensor(b) for b in before])
        except ValueError:
            return None, None
        shape = made.shape[1:]
        if 0 in shape or np.prod(shape[:3]) > MOST_VOXELS or shape[-1] > 150:
            return None, None
        return part, shape

    def logits(self, src):
        parts, values = iter(self.parts), [src]
        for kind, width, other in self.made:
            part = next(parts) if kind in LAYERED else None
            values.append(apply(part, kind, width, other, values))
        return self.head(values[-1])

    def forward(self, src):
        logits = self.logits(src)
        return F.sigmoid(logits) if self.classes == 1 else F.softmax(logits)

    def __repr__(self):
        return f"Wild{self.recipe}"


@contextlib.contextmanager
def in_float64(part):
    """Give a layer float64 parameters for a while; converting them back gives the same bits."""
    if part:
        part.astype(np.float64)
    yield
    if part:
        part.astype(np.float32)


def apply(part, kind, width, other, values):
    """What a layer makes of the values so far."""
    src, old = values[-1], values[other % len(values)]
    match kind:
        case _ if part is not None:
            return part.logits(src) if kind == "unet" and other % 2 else part(src)
        case "relu":
            return F.relu(src)
        case "leaky":
            return F.leaky_relu(src, 0.1)
        case "elu":
            return F.elu(src, 0.5)
        case "pool":
            return F.max_pool3d(src, ((2, 2, 2), (1, 2, 2), (1, 2, 3))[other % 3])
        case "upsample":
            return F.upsample3d(src, (1, 2, 1 + other % 3))
        case "softmax":
            return F.softmax(src)
        case "sigmoid":
            return F.sigmoid(src)
        case "own":
            return Squash.apply(src)
        case "arithmetic":
            return (src * 2.0 - 0.5) / (src * src + 2.0)
        case "slice":
            return src[:, : -(other % 2) or None, width % 2 :, :, : 1 + width]
        case "mean":
            return src - src.mean(axis=(1, 2, 3), keepdims=True)
        case "reshape":
            MB, D, H, W, C = src.shape
            return src.reshape(MB, 1, D * H, W, C)
        case "earlier":
            return old
    size = [max(a, b) for a, b in zip(src.shape[1:4], old.shape[1:4], strict=True)]
    src, old = F.pad_end(src, size), F.pad_end(old, size)
    if kind == "join":
        return F.concatenate(src, old)
    if src.shape != old.shape:
        raise ValueError("shapes differ")
    return src + old if kind == "add" else src * Squash.apply(old)


@st.composite
def nets(draw):
    layer = st.tuples(st.sampled_from(KINDS), WIDTHS, st.integers(0, 9))
    sides = st.one_of(st.integers(1, 6), st.sampled_from([4, 8, 11]))
    size = draw(st.tuples(st.one_of(st.just(1), sides), sides, sides))
    layers = draw(st.lists(layer, min_size=1, max_size=10))
    channels, classes = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4, 17]))
    return Wild(layers, channels, size, classes, draw(st.integers(0, 99)))


def batch(model, images, dtype=np.float32):
    _, channels, size, classes, number = model.recipe
    generator = np.random.default_rng(number)
    src = generator.standard_normal((images, *size, channels)).astype(dtype)
    return src, generator.integers(0, max(classes, 2), (images, *model.size))


def eager(make, images, labels, loss, change=0.0):
    """Loss, gradients and buffers after one step, and prediction; in float64 if the images are.

    ``change`` multiplies each number of images and parameters by ``1 + change * something``.
    """
    model, generator = make().train(), np.random.default_rng(8)

    def changed(array):
        return array * (1 + change * generator.standard_normal(array.shape).astype(array.dtype))

    if images.dtype == np.float64:
        for module in (m for _, m in model.named_modules()):
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    value.data = changed(value.data.astype(np.float64))
                elif isinstance(value, np.ndarray):
                    setattr(module, name, value.astype(np.float64))
    images = changed(images)
    found = loss(model.logits(tinyunet.Tensor(images)), labels, from_logits=True)
    found.backward()
    gradients = [np.zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    buffers = [b.copy() for b in model.buffers()]
    with no_grad():
        prediction = model.eval()(tinyunet.Tensor(images)).data
    return [np.asarray(found.item()), *gradients, *buffers, prediction], len(gradients)


def compiled(make, images, labels, loss, accuracy):
    """The same, compiled, with memory full of NaN where nothing lives."""
    model = make().train()
    optimizer, options = Adam(model.parameters()), {"accuracy": accuracy, "debug": True}
    step = tinyunet.compile(model, loss, optimizer, images.shape, **options)
    found = step.gradients(images, labels)
    gradients = [p.grad.copy() for p in model.parameters()]
    buffers = [b.copy() for b in model.buffers()]
    predict = tinyunet.compile(model.eval(), images.shape, **options)
    return [np.asarray(found), *gradients, *buffers, predict(images)]


def errors(found, expected, gradients):
    """The largest error of each array, as a share of its largest element.

    Of a gradient, as a share of a hundredth of the largest gradient at least, and so for buffers: what a
    batch norm cancels is rounding, and so is the mean of what has none.
    """
    groups = [0] + [1] * gradients + [2] * (len(expected) - 2 - gradients) + [3]
    largest = np.array([max(float(np.abs(e).max()), 1e-30) for e in expected])
    shares = []
    for f, e, size, group in zip(found, expected, largest, groups, strict=True):
        assert f.shape == e.shape, f"shape {f.shape}, not {e.shape}"
        of = max(size, largest[np.equal(groups, group)].max() / 100)
        shares.append(float(np.abs(f.astype(np.float64) - e).max()) / of)
    return np.array(shares)


def check(model, images, loss, few, together):
    """Raise AssertionError where compiled is not eager."""

    def make():
        return Wild(*model.recipe)

    def choose(node, graph, candidates):
        return candidates[model.recipe[-1] % len(candidates)]

    with contextlib.ExitStack() as patches:
        # The net's number chooses the tile, not the clock: each tile is compared somewhere, on every machine.
        patches.enter_context(mock.patch.object(measure, "fastest", choose))
        if few:  # Winograd also where it does not pay
            patches.enter_context(mock.patch.object(choose_algorithm, "_SMALL", 0))
        if together:  # both gradients in one pass also where that does not pay
            patches.enter_context(mock.patch.object(winograd_bricks, "both_pay", return_value=True))
        src, labels = batch(model, images)
        found = {a: compiled(make, src, labels, loss, a) for a in BOUNDS}
    exact, count = eager(make, src.astype(np.float64), labels, loss)
    for accuracy, bound in BOUNDS.items():
        error = errors(found[accuracy], exact, count)
        if not (error <= bound).all():
            error = np.where(np.isfinite(error), error, np.inf)
            changed, _ = eager(make, src.astype(np.float64), labels, loss, bound)
            rounded, _ = eager(make, src, labels, loss)
            allowed = np.maximum(bound, 20 * errors(changed, exact, count))
            allowed = np.maximum(allowed, 30 * errors(rounded, exact, count))
            assert (error <= allowed).all(), (
                f"{accuracy}: errors {error[error > allowed]} in arrays "
                f"{np.flatnonzero(error > allowed)}, allowed {allowed[error > allowed]}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", type=int, default=100)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, nargs="+", help="a number for each seed; left out, 1")
    arguments = parser.parse_args()
    gc.set_threshold(50_000, 20, 100)  # Numba makes objects by the million, of which few die in cycles
    threads_of_seeds = arguments.threads or [1] * len(arguments.seed)
    for number, threads in zip(arguments.seed, threads_of_seeds, strict=True):
        machine.set_threads(threads)
        check_nets(arguments.nets, number)


def check_nets(nets_to_draw: int, number: int) -> None:
    """Draw nets from a seed and compare each; print how many agree."""
    count = 0

    # A failing net is small as it is, and to make it smaller takes minutes.
    @seed(number)
    @settings(
        max_examples=nets_to_draw,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(nets(), st.integers(1, 2), st.sampled_from(LOSSES), st.booleans(), st.booleans())
    def run(model, images, loss, few, together):
        nonlocal count
        count += 1
        print(count, model, images, loss.__name__, few, together, flush=True)
        check(model, images, loss, few, together)

    run()
    print(f"{count} nets agree", file=sys.stderr)


if __name__ == "__main__":
    main()
