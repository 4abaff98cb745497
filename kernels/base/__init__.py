"""What every kernel stands on: compiling, registers as types, layouts, buffers, and the machine.

``environment``     settings made before Numba is loaded; ``limits`` the cores and memory of a container
``jit``             one place for compiler flags; ``compiled_files`` keeps the machine code
``simd``            register tiles as Numba types; ``vectors`` and ``exponential`` more operations on them
``layout``          blocked layouts, and reorders from and to them; ``conv_shapes`` sizes of a convolution
``buffers``         aligned arrays and scratchpads; ``arrays``, ``chunks``, ``streaming`` how they are walked
``prefetch``        what will be read soon, fetched while registers multiply
``machine``         threads, caches, and the measured peak
``arguments``       checks that operators share
"""
