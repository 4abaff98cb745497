"""What can be chosen about a training, and what is chosen if nobody does."""

from dataclasses import dataclass

from tinyunet.errors import AgreedError


@dataclass(frozen=True)
class Settings:
    """The options of ``python -m tinyunet.train``.

    The defaults are made for minutes on two cores: of the patches that fit into them, many small
    ones teach more than few large ones (324 steps on 32^3 voxels reach a Dice of 0.94 for the
    whole tumour, 190 steps on 48^3, which take longer, 0.91).

    Attributes
    ----------
    data_path : str or None
        Folder of a Decathlon task or of BraTS cases; None for the built-in phantoms.
    output : str
        Folder in which each run gets a folder of its own.
    epochs : int
        Times that every training case is visited.
    patches_per_case : int
        Patches cut from a case at each visit.
    batch_size : int or None
        Patches in a step, over all ranks; None for the least multiple of the ranks from 4 on.
    patch_size : (int, int, int)
        Depth, height and width of a patch.
    filters, depth : int
        Channels of the first level of the U-Net, and how many levels it has.
    use_upsampling : bool
        Upsample on the way up instead of transposed convolutions.
    lr : float
        Learning rate at its highest.
    train_test_split, validate_test_split : float
        Share of the cases to train on, and share of the rest to validate on.
    random_seed : int
        Decides weights, split, patches and augmentation.
    """

    data_path: str | None = None
    output: str = "runs"
    epochs: int = 8
    patches_per_case: int = 6
    batch_size: int | None = None
    patch_size: tuple[int, int, int] = (32, 32, 32)
    filters: int = 16
    depth: int = 5
    use_upsampling: bool = False
    lr: float = 2e-3
    train_test_split: float = 0.85
    validate_test_split: float = 0.5
    random_seed: int = 0

    def check(self, ranks: int) -> None:
        """Check what no option can check alone.

        Raises
        ------
        AgreedError
            If a patch has nothing left on the lowest level, or a batch cannot be shared equally.
        """
        smallest = 2 ** (self.depth - 1)
        if min(self.patch_size) < smallest:
            raise AgreedError(
                f"--patch-size: {min(self.patch_size)} voxels are halved {self.depth - 1} times; "
                f"expected at least {smallest}, or a smaller --depth"
            )
        if self.batch_size is not None and self.batch_size % ranks:
            raise AgreedError(
                f"--batch-size: {self.batch_size} patches cannot be shared by {ranks} ranks; "
                f"expected a multiple of {ranks}"
            )

    def batch_for(self, ranks: int) -> int:
        """Return the patches in a step, over all ranks.

        The same number of patches makes a step whatever the number of ranks, so that learning rate
        and number of steps mean the same. (What differs is batch norm: each rank takes the
        statistics of its own patches.)
        """
        return self.batch_size or -(-4 // ranks) * ranks
