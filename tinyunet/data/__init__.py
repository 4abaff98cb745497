"""MRI volumes from files to training patches.

``stream``, ``geometry``, ``nifti``   the bytes of a file; where its voxels lie; one NIfTI file
``labels``                            a label file: numbers to classes and back
``conventions``                       a table of the meanings of numbers in label files
``brats``, ``decathlon``              find the cases of a folder: start at ``decathlon.read_dataset``
``brain``, ``spacing``                checks for unusual images
``cases``                             one case as arrays; the split into three parts
``patches``                           random patches for training, randomly changed
``phantom``                           the built-in data set: heads with tumours, made on the spot

Arrays are channels last: image ``(D, H, W, C)`` float32, labels ``(D, H, W)`` uint8, where D, H and W
run from left to right, from back to front and from bottom to top of the head (nibabel's "RAS").
"""
