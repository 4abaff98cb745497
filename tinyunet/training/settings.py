"""What can be chosen about a training, and what is chosen if nobody does."""

from dataclasses import dataclass

from tinyunet.common.errors import UserError
from tinyunet.common.files import can_be_written, check_replaceable
from tinyunet.common.schema import Rule, boolean, each, number, one_of, optional, text, whole
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.parallel.options import ALLREDUCES, COMPRESSIONS, FEW_PATCHES, Exchange
from tinyunet.parallel.timeline import file_of_rank

_ABOVE_ZERO = number(1e-12)
_SHARE = number(1e-12, 1 - 1e-12)
#: What each setting may be that comes from a file: what the options of the command allow.
RULES: dict[str, Rule] = {
    "data_path": optional(text),
    "labels": optional(one_of(*CONVENTIONS)),
    "output": text,
    "epochs": whole(1),
    "patches_per_case": whole(1),
    "batch_size": optional(whole(1)),
    "patch_size": each(whole(1), 3, 3),
    "filters": whole(1),
    "depth": whole(1, 20),
    "use_upsampling": boolean,
    "lr": _ABOVE_ZERO,
    "train_test_split": _SHARE,
    "validate_test_split": _SHARE,
    "random_seed": whole(0, 2**63 - 1),
    "eager": boolean,
    "accuracy": one_of("fast", "strict"),
    "deterministic": boolean,
    "accumulate": whole(1),
    "scale_lr": boolean,
    "warmup_epochs": optional(_ABOVE_ZERO),
    "sync_batch_norm": optional(boolean),
    "bucket_mb": _ABOVE_ZERO,
    "allreduce": one_of(*ALLREDUCES),
    "compression": one_of(*COMPRESSIONS),
    "timeline": optional(text),
    "checkpoint_every": optional(whole(1)),
    "stall_warning": _ABOVE_ZERO,
    "ranks": whole(1),
}


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
    labels : str or None
        What the numbers in label files mean, of :data:`tinyunet.data.conventions.CONVENTIONS`; None for
        what the data set says of itself.
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
        Decides weights, split, patches and augmentation; with ``deterministic``, or ``eager``, and as
        many ranks and threads, all bits of the result.
    eager : bool
        Run the eager model instead of the compiled graph.
    accuracy : str
        What convolutions of the compiled graph may lose: "fast" or "strict".
    deterministic : bool
        Choose algorithms of the compiled graph by a model of their work alone, not by the clock.
    accumulate : int
        Batches whose gradients are added up for a step of the optimizer.
    scale_lr : bool
        Multiply ``lr`` by the number of ranks.
    warmup_epochs : float or None
        Epochs in which the learning rate rises; None for a twentieth of all steps.
    sync_batch_norm : bool or None
        Take batch norm's statistics over all ranks; None if a rank has few patches.
    bucket_mb : float
        MB of gradients that ranks exchange at once.
    allreduce, compression : str
        How: see :class:`tinyunet.parallel.buckets.GradientSum`.
    timeline : str or None
        File for a trace of what ran when.
    checkpoint_every : int or None
        Steps after which a checkpoint is written within an epoch; None for every ten minutes.
    stall_warning : float
        Seconds that a rank may be waited for before it is named.
    ranks : int
        Ranks that the run began on. What depends on their number is the same when it goes on with others.
    """

    data_path: str | None = None
    labels: str | None = None
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
    eager: bool = False
    accuracy: str = "fast"
    deterministic: bool = False
    accumulate: int = 1
    scale_lr: bool = False
    warmup_epochs: float | None = None
    sync_batch_norm: bool | None = None
    bucket_mb: float = 4.0
    allreduce: str = "mpi"
    compression: str = "none"
    timeline: str | None = None
    checkpoint_every: int | None = None
    stall_warning: float = 60.0
    ranks: int = 1

    def check(self) -> None:
        """Check what no option can check alone.

        Raises
        ------
        UserError
            If a patch has nothing left on the lowest level, a batch cannot be shared equally, compression
            and allreduce do not go together, or there is no place for the timeline or no name of the data.
        """
        self.exchange.check()
        if self.data_path == "":  # what a variable of the shell that is not set leaves
            raise UserError("--data-path: ''; expected a folder, or no --data-path for phantoms")
        if self.labels is not None and self.labels not in CONVENTIONS:
            raise UserError(f"--labels: {self.labels}; expected one of {', '.join(CONVENTIONS)}")
        if self.timeline is not None and not can_be_written(self.timeline, True):
            raise UserError(
                f"--timeline: {self.timeline}; expected a file in a folder that can be written to"
            )
        for rank in range(self.ranks if self.timeline is not None else 0):
            check_replaceable("--timeline", file_of_rank(self.timeline or "", rank, self.ranks))
        smallest = 2 ** (self.depth - 1)
        if min(self.patch_size) < smallest:
            raise UserError(
                f"--patch-size: {min(self.patch_size)} voxels are halved {self.depth - 1} times; "
                f"expected at least {smallest}, or a smaller --depth"
            )
        if self.batch % self.ranks:
            raise UserError(
                f"--batch-size: {self.batch} patches cannot be shared by {self.ranks} ranks; "
                f"expected a multiple of {self.ranks}"
            )

    @property
    def batch(self) -> int:
        """Patches in a step, over all ranks.

        The same number of patches makes a step whatever the number of ranks, so that learning rate
        and number of steps mean the same.
        """
        return self.batch_size or -(-4 // self.ranks) * self.ranks

    @property
    def highest_lr(self) -> float:
        """Learning rate at its highest, over all ranks."""
        return self.lr * (self.ranks if self.scale_lr else 1)

    @property
    def exchange(self) -> Exchange:
        """How ranks exchange gradients and statistics."""
        synchronize = self.sync_batch_norm
        if synchronize is None:
            synchronize = self.batch // self.ranks < FEW_PATCHES
        # The statistics of a rank alone were those of all patches.
        synchronize = synchronize or self.ranks == 1
        return Exchange(self.bucket_mb, self.allreduce, self.compression, synchronize)
