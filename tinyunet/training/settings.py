"""What a user can choose about a training: each setting with its default, its rule and its option."""

from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tinyunet.commandline import number as real
from tinyunet.commandline import whole_number as whole
from tinyunet.common import schema
from tinyunet.common.errors import UserError
from tinyunet.common.files import can_be_written, check_replaceable
from tinyunet.common.schema import Rule, boolean, each, one_of, optional, text
from tinyunet.data.conventions import CONVENTIONS
from tinyunet.parallel.options import ALLREDUCES, COMPRESSIONS, FEW_PATCHES, Exchange
from tinyunet.parallel.timeline import file_of_rank

_ABOVE_ZERO = schema.number(1e-12)
_SHARE = schema.number(1e-12, 1 - 1e-12)
_WHOLE = schema.whole(1)


def _setting(default: Any, rule: Rule, group: str = "", about: str = "", **option: Any) -> Any:
    """Return a field of :class:`Settings`.

    ``rule`` checks a value from a file. ``--help`` shows the option in ``group`` with the text ``about`` and
    the default; ``option`` are arguments of ``add_argument``. Without a text :mod:`tinyunet.commandline` adds
    the option, for several commands; without a group there is none.
    """
    return field(default=default, metadata={"rule": rule, "group": group, "help": about, "option": option})


@dataclass(frozen=True)
class Settings:
    """The options of ``python -m tinyunet.train``, by their names there; :func:`_setting` explains an entry.

    The defaults are made for minutes on two cores: of the patches that fit into them, many small
    ones teach more than few large ones (324 steps on 32^3 voxels reach a Dice of 0.94 for the
    whole tumour, 190 steps on 48^3, which take longer, 0.91).
    """

    data_path: str | None = _setting(
        None,
        optional(text),
        "data",
        "folder of a Medical Segmentation Decathlon task (with dataset.json) or of BraTS "
        "cases; left out, phantoms are made in data/, or found there",
        metavar="DIR",
    )
    labels: str | None = _setting(None, optional(one_of(*CONVENTIONS)), "data")
    train_test_split: float = _setting(
        0.85,
        _SHARE,
        "data",
        "share of the cases to train on; the others are for validation and test",
        type=real(0, 1),
        metavar="SHARE",
    )
    validate_test_split: float = _setting(
        0.5,
        _SHARE,
        "data",
        "share of those others to validate on after each epoch; what is left is the test at the end",
        type=real(0, 1),
        metavar="SHARE",
    )
    filters: int = _setting(
        16, _WHOLE, "model", "channels of the first level; each level below has twice as many", type=whole(1)
    )
    depth: int = _setting(5, schema.whole(1, 20), "model", "number of levels", type=whole(1, 20))
    use_upsampling: bool = _setting(
        False,
        boolean,
        "model",
        "on the way up repeat voxels, instead of learning a transposed convolution",
        action="store_true",
    )
    epochs: int = _setting(8, _WHOLE, "training", "how often every training case is visited", type=whole(1))
    patches_per_case: int = _setting(
        6, _WHOLE, "training", "patches cut from a case at each visit", type=whole(1)
    )
    patch_size: tuple[int, int, int] = _setting(
        (32, 32, 32),
        each(_WHOLE, 3, 3),
        "training",
        "voxels of a patch along its axes: one number for all, or three",
        type=whole(1),
        nargs="+",
    )
    batch_size: int | None = _setting(
        None,
        optional(_WHOLE),
        "training",
        "patches in a step, shared equally by all ranks (default: 4, or the next multiple of the ranks)",
        type=whole(1),
    )
    lr: float = _setting(
        2e-3,
        _ABOVE_ZERO,
        "training",
        "learning rate of Adam at its highest; it rises to it during the first twentieth of "
        "the steps, and falls to 0 until the last",
        type=real(0, 1e9),
        metavar="RATE",
    )
    random_seed: int = _setting(
        0,
        schema.whole(0, 2**63 - 1),
        "training",
        "decides the first weights, the split, the patches and their augmentation; the same seed gives "
        "the same bits with --deterministic, on as many ranks and threads",
        type=whole(0, 2**63 - 1),
    )
    accumulate: int = _setting(
        1,
        _WHOLE,
        "training",
        "add up the gradients of K batches for one step of the optimizer",
        type=whole(1),
        metavar="K",
    )
    warmup_epochs: float | None = _setting(
        None,
        optional(_ABOVE_ZERO),
        "training",
        "epochs in which the learning rate rises (default: a twentieth of all steps)",
        type=real(0, 1e9),
        metavar="E",
    )
    eager: bool = _setting(False, boolean, "the run")
    accuracy: str = _setting("fast", one_of("fast", "strict"), "the run")
    deterministic: bool = _setting(False, boolean, "the run")
    checkpoint_every: int | None = _setting(
        None,
        optional(_WHOLE),
        "the run",
        "write a checkpoint each time after so many steps (default: every ten minutes), and after each epoch",
        type=whole(1),
        metavar="STEPS",
    )
    output: str = _setting(
        "runs", text, "the run", "where each run gets a folder named by its time", metavar="DIR"
    )
    scale_lr: bool = _setting(
        False,
        boolean,
        "ranks (under mpirun)",
        "multiply --lr by the number of ranks, as one does when --batch-size grows with them",
        action="store_true",
    )
    sync_batch_norm: bool | None = _setting(
        None,
        optional(boolean),
        "ranks (under mpirun)",
        "take batch norm's statistics over the patches of all ranks: N ranks with b patches "
        f"then are one with N b (default: if a rank has fewer than {FEW_PATCHES})",
        action=BooleanOptionalAction,
    )
    bucket_mb: float = _setting(
        4.0,
        _ABOVE_ZERO,
        "ranks (under mpirun)",
        "gradients that are sent at once, while backward goes on",
        type=real(0, 1e9),
        metavar="MB",
    )
    allreduce: str = _setting(
        "mpi",
        one_of(*ALLREDUCES),
        "ranks (under mpirun)",
        "how gradients are summed: by MPI (in shared memory on a node), or in messages written out here",
        choices=ALLREDUCES,
    )
    compression: str = _setting(
        "none",
        one_of(*COMPRESSIONS),
        "ranks (under mpirun)",
        "what is sent: float32, or with --allreduce mpi bfloat16 with error feedback",
        choices=COMPRESSIONS,
    )
    stall_warning: float = _setting(
        60.0,
        _ABOVE_ZERO,
        "ranks (under mpirun)",
        "name a rank that the others have waited for so long",
        type=real(0),
        metavar="SECONDS",
    )
    timeline: str | None = _setting(
        None,
        optional(text),
        "ranks (under mpirun)",
        "write when each kernel ran and each bucket was on its way, a JSON file for each rank "
        "(of several, trace.json becomes trace.rank0.json, ...) that https://ui.perfetto.dev opens; the "
        "first 20 000 events, some hundred steps, are kept; a run that goes on "
        "writes one if this is given again",
        metavar="FILE",
    )
    #: Ranks that the run began on: settings that depend on their number stay when it goes on with others.
    ranks: int = _setting(1, _WHOLE)

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
        if self.timeline is not None:
            if not can_be_written(self.timeline, True):
                raise UserError(
                    f"--timeline: {self.timeline}; expected a file in a folder that can be written to"
                )
            for rank in range(self.ranks):
                check_replaceable("--timeline", file_of_rank(self.timeline, rank, self.ranks))
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
        """Patches in a step, over all ranks: learning rate and steps mean the same on any number of them."""
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
        # The statistics of a rank alone are those of all patches.
        return Exchange(self.bucket_mb, self.allreduce, self.compression, synchronize or self.ranks == 1)

    @property
    def compile_options(self) -> Mapping[str, Any]:
        """Options of :func:`tinyunet.compile`."""
        return {"accuracy": self.accuracy, "deterministic": self.deterministic}


#: What each setting may be that comes from a file: what the options of the command allow.
RULES: dict[str, Rule] = {each.name: each.metadata["rule"] for each in fields(Settings)}
