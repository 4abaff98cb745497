"""The built-in data set: heads with brain tumours in four MRI sequences, made on the spot.

``fields``   a grid of voxels and smooth random fields over it
``bodies``   signed distances of simple bodies
``anatomy``  fluid, grey and white matter of one of two real brains, bent anew, and large vessels
``tumour``   core, enhancing parts, edema that follows the white matter
``scanner``  contrasts, bias field, blur and noise of the sequences FLAIR, T1w, t1gd and T2w
``dataset``  one case after the other, written as a Medical Segmentation Decathlon task

Each head is drawn anew: brain, size, pose, warp, tumour, contrasts. A case depends on its seed and its
number only. A net that was trained on these heads alone finds real gliomas; ``docs/lab-notebook.md`` says how
well, and what was tried.
"""

from tinyunet.data.phantom.dataset import folder_name, make_case, make_dataset

__all__ = ["folder_name", "make_case", "make_dataset"]
