"""The node tests of ONNX, which come with its package, for every operator that tinyunet can express.

A node test is one operator with inputs, settings and what must come out. ONNX has channels second; they
are moved to the end before, and back afterwards. What only moves or fills numbers (axes, zeros around an
image or between weights) is done by NumPy before; all arithmetic is tinyunet's. Each test runs in float32,
the kernels, and in float64, the references.
"""

import importlib
import warnings

import numpy as np
from onnx import helper

from tinyunet import Tensor, functional, losses

# By the modules of ONNX in which they are; of the others no test can be expressed.
MODULES = (
    *("add", "averagepool", "batch_normalization", "concat", "conv", "convtranspose", "div"),
    *("dropout", "exp", "expand", "flatten", "globalaveragepool", "identity", "leakyrelu", "log"),
    *("logsoftmax", "maxpool", "mean", "mul", "neg", "pow", "reciprocal", "reduce_log_sum"),
    *("reduce_log_sum_exp", "reducel2", "reducemean", "reducesum", "reducesumsquare", "relu"),
    *("reshape", "resize", "sigmoid", "slice", "softmax", "softmax_cross_entropy_loss"),
    *("softplus", "split", "sqrt", "squeeze", "sub", "sum", "tanh", "unsqueeze", "upsample"),
)
# How many of them tinyunet can express; a change that expresses fewer must not pass unseen.
EXPRESSIBLE = 224


class Inexpressible(Exception):  # noqa: N818 - it is an answer, not an error
    """An operator or a setting that tinyunet does not have."""


def require(condition):
    if not condition:
        raise Inexpressible


# ---- layouts ---------------------------------------------------------------------------------


def volume(x):
    """(N, C, ...) of one to three dimensions as (N, D, H, W, C)."""
    require(3 <= x.ndim <= 5)
    return np.moveaxis(x.reshape(*x.shape[:2], *[1] * (5 - x.ndim), *x.shape[2:]), 1, -1)


def image(dst, dims):
    """Back to (N, C, ...) of so many dimensions."""
    array = np.moveaxis(dst.data, -1, 1)
    return array.reshape(*array.shape[:2], *array.shape[5 - dims :])


def three(numbers, fill=1):
    return (*[fill] * (3 - len(numbers)), *numbers)


def filter_of(w, dilations):
    """Weights of one to three dimensions, with zeros between them."""
    dims = w.ndim - 2
    size = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    dst = np.zeros((*w.shape[:2], *size), w.dtype)
    dst[(..., *(slice(None, None, d) for d in dilations))] = w
    return dst.reshape(*w.shape[:2], *[1] * (3 - dims), *size)


def pads_of(x, kernel, a):
    """Zeros before and after each axis, from ``pads`` or ``auto_pad``."""
    dims, strides = x.ndim - 2, a.get("strides", [1] * (x.ndim - 2))
    mode = a.get("auto_pad", b"NOTSET")
    pads = a.get("pads", [0] * 2 * dims)
    if mode in (b"NOTSET", b"VALID"):
        return list(zip(pads[:dims], pads[dims:], strict=True))
    total = [
        max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(x.shape[2:], strides, kernel, strict=True)
    ]
    less = [t // 2 for t in total]
    found = [(m, t - m) for m, t in zip(less, total, strict=True)]
    return found if mode == b"SAME_UPPER" else [(end, start) for start, end in found]


def padded(x, pads):
    return np.pad(x, [(0, 0), (0, 0), *pads])


# ---- operators: (inputs, settings) -> outputs --------------------------------------------------


def convolution(inputs, a):
    x, w, *bias = inputs
    require(not bias)
    w = filter_of(w, a.get("dilations", [1] * (w.ndim - 2)))
    x = padded(x, pads_of(x, w.shape[-(x.ndim - 2) :], a))
    stride = three(a.get("strides", [1] * (x.ndim - 2)))
    dst = functional.conv3d(Tensor(volume(x)), Tensor(w), None, stride, "valid")
    return [image(dst, x.ndim - 2)]


def transposed_convolution(inputs, a):
    x, w = inputs
    dims, group = x.ndim - 2, a.get("group", 1)
    stride = a.get("strides", [1] * dims)
    w = filter_of(w, a.get("dilations", [1] * dims))
    kernel = w.shape[-dims:]
    require(all(k >= s for k, s in zip(kernel, stride, strict=True)))
    parts = []
    for x_part, w_part in zip(np.split(volume(x), group, -1), np.split(w, group), strict=True):
        src = Tensor(np.ascontiguousarray(x_part))
        parts.append(functional.conv_transpose3d(src, Tensor(w_part), None, three(stride), "valid"))
    whole = parts[0] if group == 1 else functional.concatenate(*parts)
    full = whole.shape[4 - dims : 4]
    before, size = cut(x.shape[2:], full, stride, a)
    here = tuple(slice(b, b + n) for b, n in zip(three(before, 0), three(size), strict=True))
    return [image(functional.pad_end(whole[(slice(None), *here)], three(size)), dims)]


def cut(src, full, stride, a):
    """What is cut off before, and the size that is left (or filled up with zeros)."""
    dims = len(full)
    pads, more = a.get("pads", [0] * 2 * dims), a.get("output_padding", [0] * dims)
    if "output_shape" in a:
        pads = [0] * 2 * dims
        return [0] * dims, a["output_shape"]
    if a.get("auto_pad") == b"SAME_UPPER":
        size = [n * s for n, s in zip(src, stride, strict=True)]
        return [(f - n) // 2 for f, n in zip(full, size, strict=True)], size
    size = [f + m - b - e for f, m, b, e in zip(full, more, pads[:dims], pads[dims:], strict=True)]
    return pads[:dims], size


def max_pooling(inputs, a):
    (x,) = inputs
    size = a["kernel_shape"]
    require(a.get("strides", [1] * len(size)) == size and "pads" not in a and "auto_pad" not in a)
    require(x.dtype.kind == "f")
    return [image(functional.max_pool3d(Tensor(volume(x)), three(size)), len(size))]


def average_pooling(inputs, a):
    """A convolution with equal weights, divided by how many voxels a window holds."""
    (x,) = inputs
    channels, dims = x.shape[1], x.ndim - 2
    require(not a.get("ceil_mode"))
    same = np.eye(channels, dtype=x.dtype).reshape(channels, channels, *[1] * dims)
    w = filter_of(same * np.ones(a["kernel_shape"], x.dtype), a.get("dilations", [1] * dims))
    pads = pads_of(x, w.shape[-dims:], a)
    require(max(w.shape) <= 5)
    stride = three(a.get("strides", [1] * dims))
    inside = padded(np.ones_like(x), pads)
    if a.get("count_include_pad"):
        inside = np.ones_like(inside)
    total, count = (
        functional.conv3d(Tensor(volume(each)), Tensor(w), None, stride, "valid")
        for each in (padded(x, pads), inside)
    )
    return [image(total / count, dims)]


def batch_normalization(inputs, a):
    x, scale, shift, mean, variance = inputs
    src, statistics = Tensor(np.moveaxis(x, 1, -1)), (mean.copy(), variance.copy())
    training = bool(a.get("training_mode", 0))
    settings = training, a.get("momentum", 0.9), a.get("epsilon", 1e-5)
    dst = functional.batch_norm(src, Tensor(scale), Tensor(shift), *statistics, *settings)
    return [np.moveaxis(dst.data, -1, 1), *(statistics if training else ())]


def along(axis, function, *arrays):
    """Run what works on the last axis along another one."""
    dst = function(*(Tensor(np.moveaxis(array, axis, -1)) for array in arrays))
    return [np.moveaxis(dst.data, -1, axis)]


def concatenated(inputs, a):
    axis = a["axis"]
    arrays = [np.moveaxis(x, axis, -1) for x in inputs]
    dst = functional.concatenate(*(Tensor(x.reshape(*[1] * (5 - x.ndim), *x.shape)) for x in arrays))
    shape = (*arrays[0].shape[:-1], dst.shape[-1])
    return [np.moveaxis(dst.data.reshape(shape), -1, axis)]


def resized(inputs, a):
    x, *_, sizes = inputs
    modes = {b"nearest": "nearest", b"linear": "trilinear"}
    require(a.get("mode") in modes and sizes.dtype.kind == "f")
    require({*a} <= {"mode", "axes"})
    scales = np.ones(x.ndim)
    scales[a.get("axes", range(x.ndim))] = sizes
    factors = [int(scale) for scale in scales]
    require((scales == factors).all() and factors[:2] == [1, 1] and min(factors) >= 1)
    dst = functional.upsample3d(Tensor(volume(x)), three(factors[2:]), modes[a["mode"]])
    return [image(dst, x.ndim - 2)]


def dropped(inputs, a):
    x, *more = inputs
    rate = float(more[0]) if more else a.get("ratio", 0.5)
    training = bool(more[1]) if len(more) > 1 else False
    require(not training or rate == 0)  # which are dropped no one can say
    return [functional.dropout(Tensor(x), 0.0, np.random.default_rng(0)).data]


def cross_entropy(inputs, a):
    scores, labels, *weights = inputs
    reduction, ignored = a.get("reduction", b"mean"), a.get("ignore_index")
    require(reduction == (b"mean" if weights or ignored is not None else reduction) != b"none")
    require(ignored is None or ignored >= 0)
    logits = np.moveaxis(scores, 1, -1)
    rules = {"class_weights": weights[0] if weights else None, "ignore_label": ignored}
    loss = losses.cross_entropy(Tensor(logits), labels, from_logits=True, **rules)
    total = loss * (labels.size if reduction == b"sum" else 1)
    return [total.data, np.moveaxis(functional.softmax(Tensor(logits)).log().data, -1, 1)]


def reduced(function):
    """Sum or mean over axes, which are an input or a setting."""

    def run(inputs, a):
        x, *axes = inputs
        require(x.size and x.dtype.kind == "f")
        axis = tuple(int(i) for i in (axes[0] if axes else a.get("axes", ())))
        require(not (a.get("noop_with_empty_axes") and not axis))
        keepdims = bool(a.get("keepdims", 1))
        return [function(Tensor(x), axis or tuple(range(x.ndim)), keepdims).data]

    return run


def reshaped(shape_of):
    def run(inputs, a):
        x, *more = inputs
        require(x.size)
        return [Tensor(x).reshape(*shape_of(x, a, *more)).data]

    return run


def shape_with_zeros(x, _, shape):
    return [x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)]


def flat(x, a):
    axis = a.get("axis", 1)
    return int(np.prod(x.shape[:axis] if axis else ())), -1


def unsqueezed(x, _, axes):
    return np.expand_dims(x, tuple(int(axis) for axis in axes)).shape


def squeezed(x, _, axes):
    return np.squeeze(x, tuple(int(axis) for axis in axes)).shape


def sliced(inputs, _):
    x, starts, ends, *more = inputs
    axes = more[0] if more else range(len(starts))
    steps = more[1] if len(more) > 1 else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    dst = Tensor(x)[tuple(index)]
    return [dst.data]


def split(inputs, a):
    x, *sizes = inputs
    require(x.size)
    axis = a.get("axis", 0)
    if not sizes:
        count = a.get("num_outputs")
        require(count is not None)
        each = -(-x.shape[axis] // count)
        sizes = [[min(each, x.shape[axis] - each * i) for i in range(count)]]
    ends = np.cumsum(sizes[0])
    before = (slice(None),) * axis
    return [Tensor(x)[(*before, slice(int(e - n), int(e)))].data for e, n in zip(ends, sizes[0], strict=True)]


def elementwise(function):
    def run(inputs, _):
        require(all(x.dtype.kind == "f" for x in inputs))
        return [function(*map(Tensor, inputs)).data]

    return run


def power(inputs, _):
    x, y = inputs
    require(x.dtype.kind == "f" and y.ndim == 0)
    return [(Tensor(x) ** y.item()).data]


def expanded(inputs, _):
    x, shape = inputs
    return [(Tensor(x) * np.ones(tuple(int(n) for n in shape), x.dtype)).data]


def total(*tensors):
    dst = tensors[0]
    for tensor in tensors[1:]:
        dst = dst + tensor
    return dst


OPERATORS = {
    "Add": elementwise(lambda a, b: a + b),
    "AveragePool": average_pooling,
    "BatchNormalization": batch_normalization,
    "Concat": concatenated,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Div": elementwise(lambda a, b: a / b),
    "Dropout": dropped,
    "Exp": elementwise(lambda a: a.exp()),
    "Expand": expanded,
    "Flatten": reshaped(flat),
    "GlobalAveragePool": lambda inputs, a: [
        Tensor(inputs[0]).mean(tuple(range(2, inputs[0].ndim)), keepdims=True).data
    ],
    "LeakyRelu": lambda inputs, a: [functional.leaky_relu(Tensor(inputs[0]), a.get("alpha", 0.01)).data],
    "Log": elementwise(lambda a: a.log()),
    "LogSoftmax": lambda inputs, a: along(
        a.get("axis", -1), lambda x: functional.softmax(x).log(), inputs[0]
    ),
    "MaxPool": max_pooling,
    "Mean": elementwise(lambda *tensors: total(*tensors) / len(tensors)),
    "Mul": elementwise(lambda a, b: a * b),
    "Neg": elementwise(lambda a: -a),
    "Pow": power,
    "Reciprocal": elementwise(lambda a: 1 / a),
    "ReduceL2": reduced(lambda x, axis, keep: (x * x).sum(axis, keep) ** 0.5),
    "ReduceLogSum": reduced(lambda x, axis, keep: x.sum(axis, keep).log()),
    "ReduceLogSumExp": reduced(lambda x, axis, keep: x.exp().sum(axis, keep).log()),
    "ReduceMean": reduced(lambda x, axis, keep: x.mean(axis, keep)),
    "ReduceSum": reduced(lambda x, axis, keep: x.sum(axis, keep)),
    "ReduceSumSquare": reduced(lambda x, axis, keep: (x * x).sum(axis, keep)),
    "Relu": elementwise(functional.relu),
    "Reshape": reshaped(shape_with_zeros),
    "Resize": resized,
    "Sigmoid": elementwise(functional.sigmoid),
    "Slice": sliced,
    "Softmax": lambda inputs, a: along(a.get("axis", -1), functional.softmax, inputs[0]),
    "SoftmaxCrossEntropyLoss": cross_entropy,
    "Softplus": elementwise(lambda a: (a.exp() + 1).log()),
    "Split": split,
    "Sqrt": elementwise(lambda a: a**0.5),
    "Squeeze": reshaped(squeezed),
    "Sub": elementwise(lambda a, b: a - b),
    "Sum": elementwise(total),
    "Tanh": elementwise(lambda a: 2 * functional.sigmoid(2 * a) - 1),
    "Unsqueeze": reshaped(unsqueezed),
    "Upsample": resized,
}


# ---- the test ---------------------------------------------------------------------------------


def all_cases():
    """All node tests of the modules above, by name."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a logarithm of 0 that ONNX wants
        for name in MODULES:
            importlib.import_module(f"onnx.backend.test.case.node.{name}")
    return {case.name: case for case in node._NodeTestCases}


def run(case, dtype):
    """Our outputs and ONNX's, with floats in the type given."""
    node, *others = case.model.graph.node
    inputs, outputs = case.data_sets[0]
    require(not others and all(isinstance(x, np.ndarray) for x in inputs))
    require(node.op_type in OPERATORS)
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = [x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs]
    return OPERATORS[node.op_type](given, settings), outputs


def check(case, dtype):
    found, wanted = run(case, dtype)
    assert found
    for ours, theirs in zip(found, wanted, strict=False):  # a mask or an argmax beside: theirs
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype or ours.shape == ()  # sums of losses are float64
        largest = np.abs(theirs).max(initial=0)
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6 * largest)


def test_every_node_that_can_be_expressed():
    passed, failed = [], {}
    for name, case in all_cases().items():
        try:
            check(case, np.float64)
            check(case, np.float32)
            passed.append(case)
        except Inexpressible:
            continue
        except Exception as error:
            failed[name] = error
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
    assert len(passed) >= EXPRESSIBLE, f"only {len(passed)} node tests are expressed"
    assert {case.model.graph.node[0].op_type for case in passed} == {*OPERATORS}
