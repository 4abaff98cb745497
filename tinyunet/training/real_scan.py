"""A scan that the training has nothing to do with, segmented at its end for the page of the run.

A net that was trained on phantoms alone has never seen a patient: here one sees what it finds in a real scan.
"""

from pathlib import Path

from tinyunet.common.errors import UserError
from tinyunet.data import brats
from tinyunet.data.cases import load_image, on_same_voxels
from tinyunet.data.images import Image, find_images
from tinyunet.data.labels import read_labels
from tinyunet.data.sequences import choice_of
from tinyunet.segmentation.scores import score
from tinyunet.segmentation.sliding_window import Predict, segment
from tinyunet.training.start import Data
from tinyunet.training.validate import dice_table
from tinyunet.unet import UNet
from tinyunet.viz.page import Head

_OVERLAP = 0.5  # as in a prediction


def find_scan(path: str, data: Data) -> Image:
    """Return the files of a scan; UserError or DataError if there is not one, or it lacks a sequence."""
    choice = choice_of(data.dataset.modalities, data.dataset.file_modalities)
    images = find_images(Path(path), data.dataset.modalities, choice=choice)
    if len(images) != 1:
        raise UserError(f"--real: {path}: holds {len(images)} images; expected one")
    return images[0]


def segment_scan(scan: Image, data: Data, model: UNet, predict: Predict | None) -> Head:
    """Segment a scan, and score it if its folder holds labels that the names of the classes tell."""
    names, regions = data.dataset.labels, data.dataset.regions
    seen, _ = load_image(scan.paths, len(data.dataset.modalities), spacing=data.spacing, choice=scan.choice)
    image, geometry = load_image(scan.paths, choice=scan.choice)
    prediction = segment(model, seen, _OVERLAP, predict=predict, shape=image.shape[:3])
    labels, note = {"prediction": prediction}, "no part of the data set"
    rows: list[list[str]] = []
    numbers = scan.case and brats.numbers_for(scan.case, names)
    if scan.case and scan.case.labels and numbers:
        truth, own = read_labels(scan.case.labels, numbers)
        labels["truth"] = on_same_voxels(truth, scan.case.labels, own, scan.paths[0], geometry)
        scores = score(prediction, labels["truth"], names, regions)
        rows = dice_table(scores)
    return Head(scan.name, image, labels, geometry.spacing, note, rows)
