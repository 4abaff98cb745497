"""Transposed 3-D convolution, which enlarges a volume: ``forward``, ``backward_data``, ``backward_weights``.

It is the convolution's backward pass used forwards, and is computed so, except where the kernel is as
large as the stride (``disjoint``), which is what a U-Net has.
"""

from kernels.ops.conv_transpose3d.plan import backward_data, backward_weights, enlarged_shape, forward

__all__ = ["backward_data", "backward_weights", "enlarged_shape", "forward"]
