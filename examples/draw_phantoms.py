"""Draw three of the built-in phantoms: all sequences in three planes, with their labels.

Run it: .venv/bin/python examples/draw_phantoms.py docs/images/phantom.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tinyunet.data import phantom
from tinyunet.data.decathlon import read_dataset
from tinyunet.training.start import PHANTOM_SEED, PHANTOM_SHAPE
from tinyunet.viz.volumes import plot_cases

# Tumours of three sizes and places.
SHOWN = (1, 3, 8)


def main() -> None:
    """Make the first phantoms of the training's data set, and draw three of them."""
    path = sys.argv[1] if len(sys.argv) > 1 else "phantom.png"
    with tempfile.TemporaryDirectory() as folder:
        made = phantom.make_dataset(Path(folder) / "phantoms", max(SHOWN) + 1, PHANTOM_SHAPE, PHANTOM_SEED)
        dataset = read_dataset(made)
        cases = [dataset.cases[number] for number in SHOWN]
        plot_cases(cases, path, dataset.modalities, dataset.labels[1:])
    # A third of the size. The default method would choose colours by area, and drop the thin rims of a class.
    few = Image.open(path).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    few.save(path, optimize=True)
    print(f"drawn into {path}")


if __name__ == "__main__":
    main()
