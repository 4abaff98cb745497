"""Exercises: write the kernels yourself, and let a checker say what is wrong.

python -m examples.exercises                   the list, and what you have solved
python -m examples.exercises start im2col      puts a stub into my_kernels/
python -m examples.exercises hint im2col       opens the next hint
python -m examples.exercises check im2col      checks my_kernels/im2col.py, then times it
"""
