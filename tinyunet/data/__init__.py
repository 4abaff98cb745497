"""MRI volumes from files to training patches.

``nifti``      one file: reading with its damage named, a common orientation and back, writing labels
``cases``      one case: image and labels as arrays; normalisation; the split into three parts
``brats``      finds the cases of a BraTS folder as released
``decathlon``  finds the cases of a Medical Segmentation Decathlon folder, or hands over to ``brats``
``phantom``    the built-in data set: heads with tumours, made on the spot
``patches``    random patches for training, a share of them around foreground
``augment``    random flips, rotations, intensity changes and noise

Arrays are channels last: image ``(D, H, W, C)`` float32, labels ``(D, H, W)`` uint8, where D, H and W
run from left to right, from back to front and from bottom to top of the head (nibabel's "RAS").
"""
