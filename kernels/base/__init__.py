"""What every kernel stands on: compiling, registers as types, memory, layouts, and the machine.

``environment``     settings made before Numba is loaded; ``limits`` the cores and memory of a container
``jit``             one place for compiler flags; ``compiled_files`` keeps the machine code
``workers``         one parallel loop for every kernel that has many variants
``simd``            vectors of 16 floats as a Numba type; ``tiles`` register tiles of them
``exponential``     exp, log and sigmoid of plain arithmetic
``buffers``         aligned arrays, scratchpads, chunks; ``arrays`` copies and checksums
``layout``          blocked layouts: how tensors are reordered, and panels packed
``machine``         threads, instruction set, and the register tile that fits
``arguments``       checks that operators share
"""
