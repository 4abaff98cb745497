"""A grid of voxels in millimetres, and smooth random fields over it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Millimetres from left to right, back to front and bottom to top that have to fit into a volume.
FIELD_OF_VIEW = (176.0, 198.0, 154.0)


@dataclass(frozen=True)
class Grid:
    """Cubic voxels, just large enough for a head, with the origin in the middle.

    Arrays over the grid are flat, shape=(voxels,); arrays of vectors have shape=(3, voxels).
    """

    shape: tuple[int, int, int]

    @cached_property
    def spacing(self) -> float:
        """Edge of a voxel in millimetres."""
        return max(extent / size for extent, size in zip(FIELD_OF_VIEW, self.shape, strict=True))

    @cached_property
    def positions(self) -> Array:
        """Millimetres right, front and up from the middle. shape=(3, voxels)."""
        axes = [self.spacing * (np.arange(size) - (size - 1) / 2) for size in self.shape]
        return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1).astype(np.float32)

    def smooth(self, field: Array, share: float) -> Array:
        """Give ``share`` of each voxel's value to its six neighbours, axis after axis."""
        volume = field.reshape(self.shape)
        for axis in range(3):
            neighbours = np.roll(volume, 1, axis)
            neighbours += np.roll(volume, -1, axis)
            neighbours *= share / 2
            volume = (1 - share) * volume
            volume += neighbours
        return volume.reshape(-1)


class RandomFields:
    """Draws Gaussian random fields of mean 0 and deviation 1 over a grid.

    White noise is shaped in the Fourier domain, where most of it is zero and need not be drawn.
    """

    def __init__(self, generator: np.random.Generator, grid: Grid) -> None:
        self.generator = generator
        self.grid = grid
        frequencies = [np.fft.fftfreq(size, grid.spacing) for size in grid.shape[:2]]
        frequencies.append(np.fft.rfftfreq(grid.shape[2], grid.spacing))
        self._frequency = np.linalg.norm(np.meshgrid(*frequencies, indexing="ij"), axis=0).astype(np.float32)

    def clouds(self, wavelength: float) -> Array:
        """Draw a field with structures of about ``wavelength`` millimetres and larger."""
        amplitude = np.exp(-0.5 * (self._frequency * wavelength) ** 2)
        kept = amplitude > 0.01
        kept[0, 0, 0] = False  # the mean
        real, imaginary = self.generator.standard_normal((2, np.count_nonzero(kept)), np.float32)
        spectrum = np.zeros(amplitude.shape, np.complex64)
        spectrum[kept] = (real + 1j * imaginary) * amplitude[kept]
        field = np.fft.irfftn(spectrum, self.grid.shape, axes=(0, 1, 2)).reshape(-1)
        return (field / field.std()).astype(np.float32)
