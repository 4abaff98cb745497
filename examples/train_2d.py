"""Train a 2-D U-Net to find discs in noise: the whole engine in one short loop.

Run it: .venv/bin/python examples/train_2d.py
"""

import numpy as np
import numpy.typing as npt

from tinyunet import UNet, no_grad
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.segmentation.scores import dice_per_class


def discs(
    generator: np.random.Generator, count: int, size: int = 32
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Noisy images (count, size, size, 1) of a bright disc each, and its labels."""
    rows, cols = np.indices((size, size))
    centres = generator.uniform(size / 4, 3 * size / 4, (count, 2, 1, 1))
    radii = generator.uniform(size / 8, size / 4, (count, 1, 1))
    inside = np.hypot(rows - centres[:, 0], cols - centres[:, 1]) < radii
    images = inside + 0.5 * generator.standard_normal(inside.shape)
    return images[..., None].astype(np.float32), inside.astype(np.uint8)


def main() -> None:
    """Forty steps, then the Dice of images never seen."""
    generator = np.random.default_rng(0)
    model = UNet(dim=2, in_channels=1, classes=2, filters=8, depth=3)
    optimizer = Adam(model.parameters(), lr=5e-3)
    for step in range(40):
        images, labels = discs(generator, 8)
        loss = dice_cross_entropy(model.logits(images), labels, from_logits=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1:2d}  loss {loss.item():.3f}")

    model.eval()  # batch norm uses its running statistics
    images, labels = discs(generator, 16)
    with no_grad():
        prediction = model(images).numpy().argmax(axis=-1).astype(np.uint8)
    print(f"Dice of the discs {dice_per_class(prediction, labels, 2)[1]:.2f}")


if __name__ == "__main__":
    main()
