"""Sizes of a convolution, the checks that every rung shares, and the three passes made of a rung."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Array, Triple, triple

MAX_KERNEL = 5
Stride = int | Triple


class Geometry(NamedTuple):
    """All sizes of one convolution."""

    src_shape: tuple[int, int, int, int, int]  # MB, ID, IH, IW, IC
    weights_shape: tuple[int, int, int, int, int]  # OC, IC, KD, KH, KW
    dst_shape: tuple[int, int, int, int, int]  # MB, OD, OH, OW, OC
    stride: Triple  # SD, SH, SW
    before: Triple  # PD, PH, PW: zeros before the first voxel

    @property
    def channels(self) -> tuple[int, int]:
        """``(IC, OC)``."""
        return self.weights_shape[1], self.weights_shape[0]

    @property
    def kernel(self) -> Triple:
        """``(KD, KH, KW)``."""
        return self.weights_shape[2:]

    @property
    def out(self) -> Triple:
        """``(OD, OH, OW)``."""
        return self.dst_shape[1:4]

    @property
    def panel_size(self) -> Triple:
        """Voxels of ``src`` and zeros around it that the taps of all outputs meet."""
        (OD, OH, OW), (SD, SH, SW), (KD, KH, KW) = self.out, self.stride, self.kernel
        return (OD - 1) * SD + KD, (OH - 1) * SH + KH, (OW - 1) * SW + KW

    @property
    def adjoint_before(self) -> Triple:
        """Zeros before ``diff_dst`` when ``backward_data`` runs as a forward convolution."""
        (KD, KH, KW), (PD, PH, PW) = self.kernel, self.before
        return KD - 1 - PD, KH - 1 - PH, KW - 1 - PW

    @property
    def taps(self) -> int:
        """Numbers of a kernel: ``KD * KH * KW``."""
        return math.prod(self.kernel)

    @property
    def flops(self) -> int:
        """Floating-point operations of one direction: a multiply and an add for each tap."""
        return 2 * math.prod(self.weights_shape) * math.prod(self.dst_shape[:4])


def output_size(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Return the voxels of the output along one axis, and the zeros before the first source voxel.

    ``same`` is TensorFlow's: ``ceil(size / stride)`` voxels. If the number of zeros is odd, there is one more
    after the last voxel than before the first. ``valid`` has no zeros.
    """
    if padding == "valid":
        return (size - kernel) // stride + 1, 0
    out = -(-size // stride)
    return out, max((out - 1) * stride + kernel - size, 0) // 2


def geometry(
    src_shape: tuple[int, ...], weights_shape: tuple[int, ...], stride: Stride = 1, padding: str = "same"
) -> Geometry:
    """Return the sizes of the convolution of ``src`` by ``weights``; arguments as of `Rung.forward`.

    Raises
    ------
    ValueError
        If the shapes do not fit each other or a size is out of range.
    """
    if len(src_shape) != 5:
        raise ValueError(f"src has shape {src_shape}; it must be (images, depth, height, width, channels)")
    if len(weights_shape) != 5:
        raise ValueError(f"weights have shape {weights_shape}; it must be (OC, IC, KD, KH, KW)")
    if padding not in ("same", "valid"):
        raise ValueError(f'padding is {padding!r}; it must be "same" or "valid"')
    strides = triple("stride", stride)
    MB, *sizes, IC = src_shape
    OC, weights_IC, *kernel = weights_shape
    if IC != weights_IC:
        raise ValueError(
            f"src has {IC} channels (shape {src_shape}) but weights take {weights_IC} (shape {weights_shape})"
        )
    if min(src_shape) < 1 or OC < 1:
        raise ValueError(f"src {src_shape} and weights {weights_shape} must not be empty")
    if not all(1 <= k <= MAX_KERNEL for k in kernel):
        raise ValueError(f"kernel is {tuple(kernel)}; each size must be 1 to {MAX_KERNEL}")
    if padding == "valid" and any(k > i for k, i in zip(kernel, sizes, strict=True)):
        raise ValueError(f'kernel {tuple(kernel)} is larger than src {tuple(sizes)}; use padding="same"')
    axes = [output_size(*axis, padding) for axis in zip(sizes, kernel, strides, strict=True)]
    out, before = zip(*axes, strict=True)
    return Geometry._make((tuple(src_shape), tuple(weights_shape), (MB, *out, OC), strides, before))


def forward_geometry(
    src: Array, weights: Array, bias: Array | None, stride: Stride, padding: str, *, float32: bool = False
) -> Geometry:
    """Check the arguments of ``forward``, and return its geometry.

    Raises
    ------
    ValueError
        If shapes do not fit.
    TypeError
        If dtypes are mixed or neither float32 nor float64; with ``float32``, if they are float64.
    """
    g = geometry(src.shape, weights.shape, stride, padding)
    if bias is not None and bias.shape != (weights.shape[0],):
        raise ValueError(f"bias has shape {bias.shape}; with these weights it must be {weights.shape[:1]}")
    _check_dtypes(float32, src=src, weights=weights, **({} if bias is None else {"bias": bias}))
    return g


def _check_dtypes(float32: bool, **arrays: Array) -> None:
    dtypes = {name: array.dtype for name, array in arrays.items()}
    kind = next(iter(dtypes.values()))
    if len(set(dtypes.values())) != 1 or kind not in (np.float32, np.float64):
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{found}; all must be float32, or all float64")
    if float32 and kind != np.float32:
        raise TypeError(f"this rung takes float32, not {kind}; use naive or im2col")


class Rung(NamedTuple):
    """The three passes of a convolution, made of the two functions that a rung writes.

    Both get checked arguments. ``convolve(src, weights, bias, g, adjoint)`` returns ``dst``; the adjoint
    convolution goes the other way, from ``diff_dst`` to ``diff_src``. ``gradients(src, diff_dst, g)`` returns
    the gradients of weights and bias.
    """

    convolve: Callable[[Array, Array, Array | None, Geometry, bool], Array]
    gradients: Callable[[Array, Array, Geometry], tuple[Array, Array]]
    float32: bool = True  # whether the rung takes float32 alone, because its vectors are float32

    def forward(
        self, src: Array, weights: Array, bias: Array | None = None, stride: Stride = 1, padding: str = "same"
    ) -> Array:
        """Convolve ``src`` with ``weights`` and add the bias.

        Parameters
        ----------
        src : ndarray, shape=(MB, ID, IH, IW, IC), float32 or float64
        weights : ndarray, shape=(OC, IC, KD, KH, KW), dtype of ``src``
            Kernel sizes 1 to 5.
        bias : ndarray, shape=(OC,), optional
        stride : int or (SD, SH, SW)
            From 1 on.
        padding : {"same", "valid"}
            TensorFlow's conventions.

        Returns
        -------
        ndarray, shape=(MB, OD, OH, OW, OC), dtype of ``src``

        Raises
        ------
        ValueError
            If shapes do not fit, or the rung has no such kernel or stride.
        TypeError
            If dtypes are mixed or neither float32 nor float64, or float64 where the rung takes float32 alone.
        """
        g = forward_geometry(src, weights, bias, stride, padding, float32=self.float32)
        return self.convolve(src, weights, bias, g, False)

    def backward_data(
        self,
        diff_dst: Array,
        weights: Array,
        src_shape: tuple[int, ...],
        stride: Stride = 1,
        padding: str = "same",
    ) -> Array:
        """Return the gradient of ``src``, of shape ``src_shape``; ``diff_dst`` has the shape of ``dst``.

        All other arguments, and the errors, are as in `forward`.
        """
        g = geometry(src_shape, weights.shape, stride, padding)
        _check_diff_dst(diff_dst, g)
        _check_dtypes(self.float32, diff_dst=diff_dst, weights=weights)
        return self.convolve(diff_dst, weights, None, g, True)

    def backward_weights(
        self, src: Array, diff_dst: Array, kernel: Triple, stride: Stride = 1, padding: str = "same"
    ) -> tuple[Array, Array]:
        """Return the gradients of ``weights`` and ``bias``, in their shapes; ``kernel`` is (KD, KH, KW).

        All other arguments, and the errors, are as in `forward`.
        """
        weights_shape = (diff_dst.shape[-1], src.shape[-1], *triple("kernel", kernel))
        g = geometry(src.shape, weights_shape, stride, padding)
        _check_diff_dst(diff_dst, g)
        _check_dtypes(self.float32, src=src, diff_dst=diff_dst)
        return self.gradients(src, diff_dst, g)


def _check_diff_dst(diff_dst: Array, g: Geometry) -> None:
    if diff_dst.shape != g.dst_shape:
        raise ValueError(
            f"diff_dst has shape {diff_dst.shape}; for src {g.src_shape} it must be {g.dst_shape}"
        )
