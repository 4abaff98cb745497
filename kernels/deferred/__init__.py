"""Work that travels between kernels: a tensor still to be normalised, a gradient still to be formed.

On the tape every operator reads its source, does its share and writes its result. In a network most of
them do almost nothing to each byte they move, so the time goes into moving bytes. A fused kernel takes the
work of its neighbours: what comes before (the *prologue*, done while the source is read) and what comes after
(the *epilogue*, done before the result is written)::

    tape      conv > bias > batch norm > ReLU > pool          each arrow is written to memory and read again
    compiled  conv + bias + moments  >  batch norm + ReLU + pool

``tensors``      a source that is still to be normalised, a mask to apply
``normalizing``  a source, normalised on its way into a panel, or written out
``masking``      a gradient, masked and summed on its way to memory
``statistics``   what batch norm makes of moments and sums
"""
