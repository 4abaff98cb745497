"""The built-in data set: heads with brain tumours in four MRI sequences, made on the spot.

``fields``   a grid of voxels and smooth random fields over it
``bodies``   signed distances of simple bodies
``anatomy``  a brain of white and grey matter, nuclei and fluid, folded differently in each head
``tumour``   necrotic core, enhancing rim, edema that follows the white matter
``scanner``  contrasts, bias field, blur and noise of the sequences FLAIR, T1w, t1gd and T2w
``dataset``  one case after the other, written as a Medical Segmentation Decathlon task

Each head is drawn anew: size, pose, warp, folding, ventricles, tumour, contrasts. Nothing but NumPy
is needed, and a case depends on its seed and its number only.
"""

from tinyunet.data.phantom.dataset import folder_name, make_case, make_dataset

__all__ = ["folder_name", "make_case", "make_dataset"]
