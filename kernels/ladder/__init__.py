"""The ladder: 3-D convolution from its definition to minimal filtering; one file a rung, one signature.

Read the rungs in this order. Each opens with its idea: the difference to the rung before it is the lesson.

``naive``              loops, the definition
``im2col``             one matrix product: a library's speed for 27 copies of the source
``blocked``            one copy: channels in blocks of 16, which are one vector
``direct``             sums in registers: no load and store for each multiply-add
``minimal_filtering``  3.4 times fewer multiplications, for transforms that go through memory

A rung writes a convolution and a weight gradient; `shapes.Rung` checks arguments and makes ``forward``,
``backward_data`` and ``backward_weights`` of the two, and documents their arguments. The path goes on with
`kernels.conv3d.winograd`, which transforms in cache and takes up to 8 times fewer multiplications, and ends
with `kernels.conv3d.operator`, which fuses a convolution with its neighbours.

``shapes`` has the sizes and checks; ``cook_toom`` the matrices of minimal filtering.
"""
