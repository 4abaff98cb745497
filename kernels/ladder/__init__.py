"""The ladder: 3-D convolution from its definition to register tiles; one file a rung, one signature.

``naive``    loops, the definition
``im2col``   one matrix product
``blocked``  channels in blocks of 16
``direct``   sums in registers
``bias``     the gradient of the bias, which all share

The next rungs are `kernels.conv3d.winograd`, with fewer multiplications, and the fused convolution of the
compiled graph, `kernels.conv3d.fused`.
"""
