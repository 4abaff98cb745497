"""Neural-network kernels on plain NumPy arrays, written in Numba.

An operator comes as a reference (NumPy, or loops for convolutions), which float64 runs on, and a fast form in
float32 with the same signature. What only the compiled graph calls has one form, which the tests compare with
operators, or with NumPy.
Activations are ``ndhwc`` (channels last) at the surface and blocked ``nCdhw16c`` inside; convolution
weights are ``OIdhw``. Nothing here knows of tensors, tapes or models: a kernel can be used with
nothing but arrays.
"""

from kernels.base import environment as environment
from kernels.base import notice

notice.listen()
