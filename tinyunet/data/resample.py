"""Volumes on grids of other voxel sizes: images for the network, and its probabilities back.

Two grids of one volume share its outer border, so their voxel centres differ: voxel ``i`` of ``n`` lies at
``(i + 1/2) / n`` of the side. Interpolation along an axis is a matrix, one row for each new voxel, and three
products of matrices resample a volume. Where voxels get larger, a Gaussian comes first and removes what the
new grid cannot hold: nothing aliases. Its width is what the sharpness of the larger voxel lacks.

Sources: Keys, "Cubic convolution interpolation" (1981), a = -1/2; Cardoso et al., "Scale factor point spread
function matching" (2015), for the Gaussian; Isensee et al., "nnU-Net" (2021), for the grids. Across slices
at least three times as thick as a voxel is wide, nnU-Net takes the nearest slice; this module interpolates
linearly, which is nearer to the truth and does not overshoot either.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_THICK = 3.0  # a slice is thick from this multiple of the voxel's shortest side on
_BLOCK = 2**17  # products in a block of a product of matrices: OpenBLAS starts threads for twice as many
_FWHM = np.sqrt(8 * np.log(2))  # full width at half maximum of a Gaussian of deviation 1


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, int, int]:
    """Return the size (D, H, W) of a volume on a grid of another spacing, in mm, at least 1 an axis."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: {tuple(shape)}; expected three sizes of at least 1")
    for name, sizes in (("spacing", spacing), ("new_spacing", new_spacing)):
        if len(sizes) != 3 or not all(0 < size < np.inf for size in sizes):
            raise ValueError(f"{name}: {tuple(sizes)}; expected three sizes above 0 mm")
    d, h, w = (max(1, round(n * old / new)) for n, old, new in zip(shape, spacing, new_spacing, strict=True))
    return d, h, w


def resample_image(
    image: NDArray[Any], spacing: Sequence[float], new_spacing: Sequence[float], linear: bool = False
) -> NDArray[np.float32]:
    """Return an image on a grid of another spacing: shape=(D', H', W', C), float32, C-contiguous.

    Interpolation is cubic, across thick slices or if asked for ``linear``; it is low-pass where voxels get
    larger. An image whose grid stays the same has the same voxels.

    Parameters
    ----------
    image : ndarray, shape=(D, H, W, C)
        One channel is resampled at a time, in float32.
    spacing, new_spacing : (D, H, W), millimetres
        ValueError unless all are above 0.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"image: shape {image.shape}; expected (D, H, W, C), none of them 0")
    shape = resampled_shape(image.shape[:3], spacing, new_spacing)
    thick = [size >= _THICK * min(spacing) for size in spacing]
    return _resample(image, shape, ["linear" if linear or each else "cubic" for each in thick])


def resample_probabilities(probabilities: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    """Return probabilities on the grid of ``shape`` (D, H, W) voxels: shape=(D, H, W, classes), float32.

    This is the way back from the network's grid to the image's own. Interpolation is linear; a voxel that
    gets larger has the mean over its volume. So results stay between 0 and 1, and add up to 1 if they did.
    ``probabilities`` are of shape=(D', H', W', classes). ValueError if not, or if ``shape`` is no size.
    """
    if probabilities.ndim != 4 or 0 in probabilities.shape:
        found = f"shape {probabilities.shape}"
        raise ValueError(f"probabilities: {found}; expected (D, H, W, classes), none of them 0")
    d, h, w = shape = resampled_shape(shape, (1, 1, 1), (1, 1, 1))
    return _resample(probabilities, (d, h, w), ["share"] * 3)


def resample_labels(labels: NDArray[np.integer[Any]], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return the class of each voxel on the grid of ``shape`` (D, H, W) voxels, uint8, C-contiguous.

    A voxel that gets larger has the class that fills the largest part of it. For smaller ones each class is
    interpolated as a volume of zeros and ones, as probabilities are. Of two equal classes the lower one wins.
    ``labels`` are 0 to 255, shape=(D', H', W'); ValueError if not, or if ``shape`` is no size of a volume.
    """
    if labels.ndim != 3 or 0 in labels.shape or labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"labels: shape {labels.shape}; expected (D, H, W), none of them 0, and 0 to 255")
    shape = resampled_shape(shape, (1, 1, 1), (1, 1, 1))
    found, most = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    for label in np.unique(labels).tolist():
        share = resample_probabilities((labels == label)[..., None], shape)[..., 0]
        larger = share > most + 1e-6  # equal parts are equal but for rounding
        found[larger] = label
        np.maximum(most, share, out=most)
    return found


def _resample(volume: NDArray[Any], shape: tuple[int, int, int], kinds: Sequence[str]) -> NDArray[np.float32]:
    """Interpolate along each axis, channel by channel; axes that get shorter come first."""
    weights = [_weights(*of_axis) for of_axis in zip(volume.shape, shape, kinds, strict=False)]
    order = sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis])
    resampled = np.empty((*shape, volume.shape[3]), np.float32)
    for channel in range(volume.shape[3]):
        voxels = np.ascontiguousarray(volume[..., channel], np.float32)
        for axis in order:
            if shape[axis] != volume.shape[axis]:
                voxels = _along(voxels, axis, weights[axis])
        resampled[..., channel] = voxels
    return resampled


def _along(voxels: NDArray[np.float32], axis: int, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply by a matrix along an axis: by its rows in blocks, without the zeros beside its diagonal.

    BLAS would start threads for larger blocks, and training keeps the cores busy that these would wait for:
    on two busy cores, a volume of 240 x 240 x 155 with four sequences took 10 s, and takes 0.2 s in blocks.
    """
    result = np.empty((*voxels.shape[:axis], len(weights), *voxels.shape[axis + 1 :]), np.float32)
    views = [array.transpose(((1, 0, 2), (0, 1, 2), (0, 2, 1))[axis]) for array in (voxels, result)]
    used = weights != 0
    first, last = used.argmax(1), weights.shape[1] - used[:, ::-1].argmax(1)
    begin = 0
    while begin < len(weights):
        end = begin + 1
        while (
            end < len(weights)
            and (end + 1 - begin) * (last[end] - first[begin]) * views[0].shape[2] <= _BLOCK
        ):
            end += 1
        near = slice(first[begin], last[begin:end].max())
        np.matmul(weights[begin:end, near], views[0][:, near], out=views[1][:, begin:end])
        begin = end
    return result


def _weights(size: int, new_size: int, kind: str) -> NDArray[np.float32]:
    """Weight of each voxel along an axis for each new one, shape=(new_size, size); rows add up to 1.

    Voxels that get smaller are interpolated. Larger ones are the "share" of each old voxel in them, or
    interpolated behind a Gaussian.
    """
    step = size / new_size
    if kind == "share" and step > 1:
        begins, voxels = np.arange(new_size)[:, None] * step, np.arange(size)
        common = np.minimum(begins + step, voxels + 1) - np.maximum(begins, voxels)
        return (common.clip(0) / step).astype(np.float32)
    function = _keys if kind == "cubic" else _triangle
    weights = _kernel((np.arange(new_size) + 0.5) * step - 0.5, size, 2, function)
    if step > 1:
        deviation = np.sqrt(step**2 - 1) / _FWHM
        smooth = _kernel(
            np.arange(size), size, int(4 * deviation) + 1, lambda x: np.exp(-0.5 * (x / deviation) ** 2)
        )
        weights = weights @ smooth
    return weights.astype(np.float32)


def _kernel(
    centres: NDArray[Any], size: int, reach: int, function: Callable[[Any], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Rows of weights around centres along an axis; voxels beyond the border are as those at the border."""
    first = np.floor(centres).astype(int) - reach
    voxels = first[:, None] + np.arange(2 * reach + 2)
    parts = function(np.abs(voxels - centres[:, None]))
    weights = np.zeros((len(centres), size))
    rows = np.arange(len(centres))[:, None]
    np.add.at(weights, (rows, voxels.clip(0, size - 1)), parts / parts.sum(axis=1, keepdims=True))
    return weights


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation: the weight at distances of at least 0."""
    return np.maximum(1 - x, 0)


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic convolution: the weight at distances of at least 0."""
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
