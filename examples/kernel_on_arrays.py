"""Use one kernel with nothing but arrays: blur a volume by the definition and by register tiles, timed.

Run it: .venv/bin/python examples/kernel_on_arrays.py
"""

import time

import numpy as np

from kernels.base import machine
from kernels.ladder import direct, naive


def main() -> None:
    """Convolve a noisy cube with a 3^3 mean filter, by the definition and by register tiles."""
    generator = np.random.default_rng(0)
    volume = np.zeros((1, 32, 32, 32, 16), np.float32)
    volume[:, 8:24, 8:24, 8:24] = 1.0
    volume += 0.3 * generator.standard_normal(volume.shape).astype(np.float32)
    # Weights are (OC, IC, KD, KH, KW): each channel is blurred by itself.
    weights = np.zeros((16, 16, 3, 3, 3), np.float32)
    weights[np.arange(16), np.arange(16)] = 1 / 27

    print(f"{machine.instruction_set()}: a register tile holds {machine.tile_vectors()} vectors")
    results = {}
    for rung in (naive, direct):
        seconds = []
        for _ in range(4):  # the first call compiles, the fastest counts
            start = time.perf_counter()
            results[rung] = rung.forward(volume, weights)
            seconds.append(time.perf_counter() - start)
        gflops = 2 * 27 * 16 * 16 * 32**3 / min(seconds) / 1e9
        print(f"{rung.__name__:24s} {gflops:7.1f} GFLOP/s")
    print(f"largest difference {np.abs(results[naive] - results[direct]).max():.1e}")
    print(f"noise before {volume[0, :4].std():.3f}, after {results[direct][0, 1:3, 2:-2, 2:-2].std():.3f}")


if __name__ == "__main__":
    main()
