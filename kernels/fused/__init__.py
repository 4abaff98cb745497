"""Kernels of the compiled graph: operators with their neighbours' work in them.

On the tape every operator reads its source, does its bit and writes its result. In a network most of
them do almost nothing to each byte they move, so the time goes into moving. Here each kernel takes with
it what comes before (the *prologue*, done while the source is read) and after it (the *epilogue*, done
before the result is written)::

    tape      conv > bias > batch norm > ReLU > pool          each arrow written to memory and read again
    compiled  conv + bias + moments  >  batch norm + ReLU + pool

``tensors``           what travels between kernels: a source that is still to be normalised, a gradient
                      that is still to be formed, a mask that an epilogue applies
``vectors``           the few vector operations that ``kernels.simd`` does not have
``statistics``        what batch norm makes of moments and sums; and both of whole tensors
``prologue``          a source normalised on its way into a panel
``epilogue``          a gradient masked and summed on its way to memory; bands, their partial sums
``whole``             prologues as passes of their own, for readers that cannot do them
``pooling``, ``conv_transpose3d``, ``conv3d``, ``head``
                      the operators of a U-Net; ``head`` is its last layer with softmax and loss
``edges``             between channels last, outside, and blocks of 16 channels, inside

All tensors are blocked, ``nCdhw16c``: float32, shape=(MB, CB, D, H, W, 16), C-contiguous. Kernels may
count on zeros in the lanes past the last channel of what they read and leave zeros there in what they
write. They write into arrays that they are given, and check nothing: the graph that calls them knows
its shapes. Results do not depend on the number of threads, but for Winograd weight gradients, which have
sums for each thread.
"""
