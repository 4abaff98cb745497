"""tinyunet: a small engine that trains a 3-D U-Net on brain MRI, with its own kernels."""
