"""Transposed 3-D convolution: every source voxel adds the kernel, scaled, to the output.

    dst[n, id*SD + kd - PD, ih*SH + kh - PH, iw*SW + kw - PW, oc] +=
        sum over ic of src[n, id, ih, iw, ic] * weights[ic, oc, kd, kh, kw]

and ``bias[oc]`` once. There is a convolution whose ``backward_data`` is this, with these very weights:
what is ``src`` here is its ``diff_dst``. So its three passes, with the roles exchanged, are ours, in
both directions; only a kernel as large as its stride has kernels of its own.

Sizes are those of Keras: along each axis ``I * S`` for "same", ``I * S + max(K - S, 0)`` for "valid".

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4.
"""

from collections.abc import Sequence

import numpy as np

from kernels import conv3d
from kernels.base.arguments import NDHWC, Array, Triple, tensor, triple
from kernels.ladder.bias import backward_bias
from kernels.ops.conv_transpose3d import disjoint

_WEIGHTS = "IC, OC, KD, KH, KW"


def forward(
    src: Array,
    weights: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> Array:
    """Enlarge ``src``.

    Parameters
    ----------
    src : array, shape (MB, ID, IH, IW, IC)
        float32 or float64.
    weights : array, shape (IC, OC, KD, KH, KW)
        Of the dtype of ``src``.
    bias : array, shape (OC,), optional
        Of the dtype of ``src``.
    stride : int or (SD, SH, SW)
        From 1 on; an integer stands for all three.
    padding : "same" or "valid"

    Returns
    -------
    array, shape (MB, OD, OH, OW, OC)

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, stride or padding do not fit.
    """
    src = tensor("src", src, axes=NDHWC)
    weights = _checked_weights(weights, src)
    if bias is not None:
        bias = tensor("bias", bias, shape=weights.shape[1:2], dtype=src.dtype)
    dst_shape = enlarged_shape(src.shape, weights.shape, stride, padding)
    strides = triple("stride", stride)
    if _is_disjoint(src, weights.shape[2:], strides):
        return disjoint.forward(src, weights, bias)
    dst = conv3d.backward_data(src, weights, dst_shape, strides, padding)
    return dst if bias is None else dst + bias


def backward_data(
    diff_dst: Array,
    weights: Array,
    src_shape: Sequence[int],
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> Array:
    """Gradient of the source: a convolution of ``diff_dst``.

    Parameters
    ----------
    diff_dst : array, shape (MB, OD, OH, OW, OC)
        float32 or float64.
    weights : array, shape (IC, OC, KD, KH, KW)
        Of the dtype of ``diff_dst``.
    src_shape : (MB, ID, IH, IW, IC)
        Shape of the source.
    stride, padding
        As in the forward pass.

    Returns
    -------
    array, shape ``src_shape``

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, stride or padding do not fit.
    """
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC)
    weights = _checked_weights(weights, diff_dst)
    shape, IC = tuple(src_shape), weights.shape[0]
    if len(shape) != 5 or shape[-1] != IC:
        raise ValueError(f"src_shape must be (MB, ID, IH, IW, {IC}), got {shape}")
    dst_shape = enlarged_shape(shape, weights.shape, stride, padding)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst_shape)
    strides = triple("stride", stride)
    if _is_disjoint(diff_dst, weights.shape[2:], strides):
        return disjoint.backward_data(diff_dst, weights)
    return conv3d.forward(diff_dst, weights, None, strides, padding)


def backward_weights(
    src: Array,
    diff_dst: Array,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> tuple[Array, Array]:
    """Gradients of weights and bias.

    Parameters
    ----------
    src : array, shape (MB, ID, IH, IW, IC)
        float32 or float64.
    diff_dst : array, shape (MB, OD, OH, OW, OC)
        Of the dtype of ``src``.
    kernel : (KD, KH, KW)
    stride, padding
        As in the forward pass.

    Returns
    -------
    diff_weights : array, shape (IC, OC, KD, KH, KW)
    diff_bias : array, shape (OC,)

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, kernel, stride or padding do not fit.
    """
    src = tensor("src", src, axes=NDHWC)
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC, dtype=src.dtype)
    sizes, strides = triple("kernel", kernel), triple("stride", stride)
    weights_shape = (src.shape[-1], diff_dst.shape[-1], *sizes)
    dst_shape = enlarged_shape(src.shape, weights_shape, strides, padding)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst_shape)
    if _is_disjoint(src, sizes, strides):
        return disjoint.backward_weights(src, diff_dst, sizes)
    diff_weights, _ = conv3d.backward_weights(diff_dst, src, sizes, strides, padding)
    return diff_weights, backward_bias(diff_dst)


def enlarged_shape(
    src_shape: Sequence[int], weights_shape: Sequence[int], stride: int | Sequence[int], padding: str
) -> tuple[int, ...]:
    """Shape of what `forward` returns; parameters and errors as there."""
    IC, OC, *kernel = weights_shape
    if src_shape[-1] != IC:
        raise ValueError(
            f"src must have {IC} channels to go with weights {tuple(weights_shape)}, got {tuple(src_shape)}"
        )
    if padding not in ("same", "valid"):
        raise ValueError(f'padding must be "same" or "valid", got {padding!r}')
    strides = triple("stride", stride)
    overhang = [max(k - s, 0) if padding == "valid" else 0 for k, s in zip(kernel, strides, strict=True)]
    sizes = [i * s + o for i, s, o in zip(src_shape[1:4], strides, overhang, strict=True)]
    return (src_shape[0], *sizes, OC)


def _checked_weights(weights: Array, volume: Array) -> Array:
    return tensor("weights", weights, axes=_WEIGHTS, dtype=volume.dtype)


def _is_disjoint(array: Array, kernel: Sequence[int], stride: Triple) -> bool:
    """Whether the scaled kernels do not overlap, in float32: then each output voxel has one source."""
    return array.dtype == np.float32 and tuple(kernel) == stride
