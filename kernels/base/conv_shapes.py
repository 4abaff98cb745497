"""Sizes of a convolution, and the checks that every rung shares."""

from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Array, Triple, triple

MAX_KERNEL = 5
Stride = int | Triple


class Geometry(NamedTuple):
    """All sizes of one convolution.

    ``MB`` images; ``IC`` channels of ``ID x IH x IW`` voxels in, ``OC`` of ``OD x OH x OW`` out;
    kernel ``KD x KH x KW``, stride ``SD x SH x SW``; ``PD, PH, PW`` zeros before the first voxel.
    """

    MB: int
    IC: int
    OC: int
    ID: int
    IH: int
    IW: int
    OD: int
    OH: int
    OW: int
    KD: int
    KH: int
    KW: int
    SD: int
    SH: int
    SW: int
    PD: int
    PH: int
    PW: int

    @property
    def src_shape(self) -> tuple[int, int, int, int, int]:
        """``(MB, ID, IH, IW, IC)``."""
        return self.MB, self.ID, self.IH, self.IW, self.IC

    @property
    def dst_shape(self) -> tuple[int, int, int, int, int]:
        """``(MB, OD, OH, OW, OC)``."""
        return self.MB, self.OD, self.OH, self.OW, self.OC

    @property
    def weights_shape(self) -> tuple[int, int, int, int, int]:
        """``(OC, IC, KD, KH, KW)``."""
        return self.OC, self.IC, self.KD, self.KH, self.KW

    @property
    def stride(self) -> Triple:
        """``(SD, SH, SW)``."""
        return self.SD, self.SH, self.SW

    @property
    def before(self) -> Triple:
        """``(PD, PH, PW)``."""
        return self.PD, self.PH, self.PW

    @property
    def panel_size(self) -> Triple:
        """Voxels of ``src`` and zeros around it that the taps of all outputs meet."""
        D, H, W = (self.OD - 1) * self.SD, (self.OH - 1) * self.SH, (self.OW - 1) * self.SW
        return D + self.KD, H + self.KH, W + self.KW

    @property
    def taps(self) -> int:
        """Numbers of a kernel: ``KD * KH * KW``."""
        return self.KD * self.KH * self.KW

    @property
    def flops(self) -> int:
        """Floating-point operations of one direction: a multiply and an add for each tap."""
        return 2 * self.taps * self.IC * self.OC * self.MB * self.OD * self.OH * self.OW


def output_size(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Voxels out along one axis, and zeros before the first voxel in.

    ``same`` is TensorFlow's: ``ceil(size / stride)`` voxels, and of an odd number of zeros the larger
    half comes after. ``valid`` has no zeros.
    """
    if padding == "valid":
        return (size - kernel) // stride + 1, 0
    out = -(-size // stride)
    return out, max((out - 1) * stride + kernel - size, 0) // 2


def geometry(
    src_shape: tuple[int, ...], weights_shape: tuple[int, ...], stride: Stride = 1, padding: str = "same"
) -> Geometry:
    """Sizes of the convolution of ``src`` by ``weights``; arguments as of `naive.forward`.

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
    return Geometry._make((MB, IC, OC, *sizes, *out, *kernel, *strides, *before))


def adjoint_before(g: Geometry) -> Triple:
    """Zeros before ``diff_dst`` when ``backward_data`` runs as a forward convolution."""
    return g.KD - 1 - g.PD, g.KH - 1 - g.PH, g.KW - 1 - g.PW


def forward_geometry(
    src: Array, weights: Array, bias: Array | None, stride: Stride, padding: str
) -> Geometry:
    """Geometry of ``forward``; ValueError if shapes do not fit, TypeError if dtypes do not."""
    sizes = geometry(src.shape, weights.shape, stride, padding)
    if bias is not None and bias.shape != (sizes.OC,):
        raise ValueError(f"bias has shape {bias.shape}; with these weights it must be ({sizes.OC},)")
    _check_dtypes(src=src, weights=weights, **({} if bias is None else {"bias": bias}))
    return sizes


def backward_data_geometry(
    diff_dst: Array, weights: Array, src_shape: tuple[int, ...], stride: Stride, padding: str
) -> Geometry:
    """Geometry of ``backward_data``; raises as `forward_geometry`."""
    sizes = geometry(src_shape, weights.shape, stride, padding)
    _check_diff_dst(diff_dst, sizes)
    _check_dtypes(diff_dst=diff_dst, weights=weights)
    return sizes


def backward_weights_geometry(
    src: Array, diff_dst: Array, kernel: Triple, stride: Stride, padding: str
) -> Geometry:
    """Geometry of ``backward_weights``; raises as `forward_geometry`."""
    weights_shape = (diff_dst.shape[-1], src.shape[-1], *triple("kernel", kernel))
    sizes = geometry(src.shape, weights_shape, stride, padding)
    _check_diff_dst(diff_dst, sizes)
    _check_dtypes(src=src, diff_dst=diff_dst)
    return sizes


def check_float32(array: Array) -> None:
    """Refuse, by TypeError, an array that the vectorised rungs do not take."""
    if array.dtype != np.float32:
        raise TypeError(f"this rung takes float32, not {array.dtype}; use naive or im2col")


def _check_diff_dst(diff_dst: Array, sizes: Geometry) -> None:
    if diff_dst.shape != sizes.dst_shape:
        raise ValueError(
            f"diff_dst has shape {diff_dst.shape}; for src {sizes.src_shape} it must be {sizes.dst_shape}"
        )


def _check_dtypes(**arrays: Array) -> None:
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) != 1 or next(iter(dtypes.values())) not in (np.float32, np.float64):
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{found}; all must be float32, or all float64")
