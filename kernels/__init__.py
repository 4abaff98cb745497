"""Neural-network kernels on plain NumPy arrays, written in Numba.

Every kernel comes as a reference (loops, any float type) and a fast form with the same signature.
Activations are ``ndhwc`` (channels last) at the surface and blocked ``nCdhw16c`` inside; convolution
weights are ``OIdhw``. Nothing here knows of tensors, tapes or models: a kernel can be used with
nothing but arrays.
"""
