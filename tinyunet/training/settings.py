"""The settings of a training: each with its default, its rule and its option."""

import math
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from tinyunet.commandline import number, whole_number
from tinyunet.common import schema
from tinyunet.common.errors import UserError, said
from tinyunet.common.files import can_be_written, check_replaceable, read_json
from tinyunet.common.schema import Rule, boolean, each, one_of, optional, shown, text
from tinyunet.data.conventions import CONVENTIONS, key_of
from tinyunet.data.spacing import rule
from tinyunet.parallel.algorithms import ALGORITHMS, COMPRESSIONS, FEW_PATCHES, Exchange
from tinyunet.parallel.timeline import file_of_rank

_RUN, _RANKS = "the run", "ranks (under mpirun)"


class Kind(NamedTuple):
    """The values that a setting may have: the rule for a file, and the arguments of ``add_argument``."""

    rule: Rule
    option: Mapping[str, Any] = {}


def _whole(least: int, most: int = 10**9, metavar: str = "N") -> Kind:
    return Kind(schema.whole(least, most), {"type": whole_number(least, most), "metavar": metavar})


def _real(metavar: str, most: float = math.inf) -> Kind:
    """Numbers above zero."""
    below = 1 - 1e-12 if most == 1 else math.inf
    return Kind(schema.number(1e-12, below), {"type": number(0, most), "metavar": metavar})


def _choice(*values: str) -> Kind:
    return Kind(one_of(*values), {"choices": values})


def _text(metavar: str) -> Kind:
    return Kind(text, {"metavar": metavar})


_COUNT, _SHARE, _FLAG = _whole(1), _real("SHARE", 1), Kind(boolean, {"action": "store_true"})
_MAYBE = Kind(boolean, {"action": BooleanOptionalAction})
_PART = Kind(schema.number(0, 1 - 1e-12), {"type": number(0, 1, or_equal=True), "metavar": "SHARE"})
_LABELS = Kind(one_of(*CONVENTIONS), {"choices": CONVENTIONS, "type": key_of})
_NAMES = Kind(each(text, 1), {"nargs": "+", "metavar": "NAME"})
_SPACING = Kind(rule, {"nargs": "+", "metavar": "MM"})
_SIZE = Kind(each(_COUNT.rule, 3, 3), {**_COUNT.option, "nargs": "+"})


def _setting(default: Any, kind: Kind, group: str = "", *about: str) -> Any:
    """Return a field of :class:`Settings`; ``--help`` shows its option in ``group`` with a text.

    The setting may be None if that is its default.
    """
    rule = optional(kind.rule) if default is None else kind.rule
    metadata = {"rule": rule, "option": kind.option, "group": group, "help": " ".join(about)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The options of ``python -m tinyunet.train``, by their names there.

    The defaults are made for minutes on two cores: of the patches that fit into them, many small
    ones teach more than few large ones (on the first phantoms 324 steps on 32^3 voxels reached 0.94 for the
    whole tumour, 190 steps on 48^3, which take longer, 0.91).
    """

    # fmt: off
    data_path: str | None = _setting(None, _text("DIR"), "data",
        "folder of a Medical Segmentation Decathlon task or of nnU-Net (with dataset.json), or of",
        "BraTS cases; left out, phantoms are made in data/, or found there")
    labels: str | None = _setting(None, _LABELS, "data",
        "what the numbers in label files mean (default: what dataset.json says, or names of",
        "files and numbers, where they leave no doubt); other names of the releases, such as",
        "brats2021 or brats2023-ped, are understood, too")
    modalities: tuple[str, ...] | None = _setting(None, _NAMES, "data",
        "train on these sequences alone, such as FLAIR, or t1c t2f; T1ce, T1gd and t1c are the same, and so",
        "are t2f and FLAIR, t1n and T1w, t2w and T2 (default: all that the data have)")
    train_test_split: float = _setting(0.85, _SHARE, "data",
        "share of the cases to train on; the others are for validation and test")
    validate_test_split: float = _setting(0.5, _SHARE, "data",
        "share of those others to validate on after each epoch; what is left is the test at the end")
    spacing: str | tuple[float, float, float] | None = _setting(None, _SPACING, "data",
        "resample volumes to voxels of this size in mm, one number or three (right, front, up); keep",
        "leaves them as they are (default: the median of the data, if they differ by more than a twentieth)")
    allow_missing: bool = _setting(False, _FLAG, "data",
        "take cases in which a sequence is missing or constant; it becomes 0")
    folds: int | None = _setting(None, _whole(2), "data",
        "divide the patients into N equal parts: part --fold is the test, and of the others a share, as",
        "--train-test-split says, is for validation; run it once for each fold")
    fold: int = _setting(0, _whole(0), "data", "which of the --folds is the test, from 0 on")
    patients: str | None = _setting(None, _text("FILE"), "data",
        "CSV file with the columns case and patient: cases of one patient stay together in one part",
        "(default: by their names, BraTS-GLI-00000-000 and -001 are of one patient)")
    dim: int = _setting(3, Kind(one_of(2, 3), {"type": int, "choices": (2, 3)}), "model",
        "3 for volumes, 2 for a net that sees one axial slice at a time")
    filters: int = _setting(16, _COUNT, "model",
        "channels of the first level; each level below has twice as many")
    depth: int = _setting(5, _whole(1, 20), "model", "number of levels")
    use_upsampling: bool = _setting(False, _FLAG, "model",
        "on the way up repeat voxels, instead of learning a transposed convolution")
    norm: str = _setting("batch", _choice("batch", "instance", "group", "none"), "model",
        "the layer between a convolution and its ReLU")
    deep_supervision: bool = _setting(False, _FLAG, "model",
        "in training, let each level of the decoder have a loss of its own, with weights 1, 1/2, 1/4, ...")
    epochs: int = _setting(20, _COUNT, "training", "how often every training case is visited")
    patches_per_case: int = _setting(6, _COUNT, "training", "patches cut from a case at each visit")
    patch_size: tuple[int, int, int] = _setting((32, 32, 32), _SIZE, "training",
        "voxels of a patch along its axes: one number for all, or three (two with --dim 2)")
    foreground: float = _setting(0.5, Kind(schema.number(0, 1), {"type": number(0, 1 + 1e-12, True),
        "metavar": "SHARE"}), "training",
        "share of the patches that are cut around a voxel of a class other than the background")
    augmentation: str = _setting("light", _choice("none", "light", "full"), "training",
        "random changes of patches: light flips, turns and changes intensities a little; full is nnU-Net's",
        "list, with rotation, scaling, bending, blur, contrast, gamma, low resolution and a coil's field")
    batch_size: int | None = _setting(None, _COUNT, "training",
        "patches in a step, shared equally by all ranks (default: 4, or the next multiple of the ranks)")
    lr: float = _setting(2e-3, _real("RATE", 1e9), "training",
        "learning rate of Adam at its highest; it rises to it during the first twentieth of",
        "the steps, and falls to 0 until the last")
    random_seed: int = _setting(0, _whole(0, 2**63 - 1), "training",
        "decides the first weights, the split, the patches and their augmentation; the same seed gives",
        "the same bits with --deterministic, on as many ranks and threads")
    accumulate: int = _setting(1, _whole(1, metavar="K"), "training",
        "add up the gradients of K batches for one step of the optimizer")
    warmup_epochs: float | None = _setting(None, _real("E", 1e9), "training",
        "epochs in which the learning rate rises (default: a twentieth of all steps)")
    clip_norm: float | None = _setting(None, _real("NORM", 1e9), "training",
        "scale the gradient of a step down to this norm where it is larger (nnU-Net: 12)")
    ema: float = _setting(0.0, _PART, "training",
        "validate, and keep as the best, an exponential moving average of the weights, of which each step",
        "keeps this share (0.999, say)")
    patience: int | None = _setting(None, _whole(1, metavar="EPOCHS"), "training",
        "stop early after so many epochs without a better validation")
    sequence_dropout: float = _setting(0.0, _PART, "training",
        "set each sequence of a patch to 0 with this probability, but never all: the model learns to do",
        "without one")
    eager: bool = _setting(False, _FLAG, _RUN,
        "run the model's operators one after the other, not the compiled graph: slower, for comparison")
    accuracy: str = _setting("fast", _choice("fast", "strict"), _RUN,
        "what convolutions of the compiled graph may lose: strict is no worse than direct",
        "convolution in float32, fast errs by up to 5e-5 of the largest result")
    deterministic: bool = _setting(False, _FLAG, _RUN,
        "choose the algorithms of convolutions by a model of their work alone, not by the clock:",
        "the same command then gives the same bits on another machine of this kind, too, with as many",
        "threads")
    checkpoint_every: int | None = _setting(None, _whole(1, metavar="STEPS"), _RUN,
        "write a checkpoint each time after so many steps (default: every ten minutes), and after each epoch")
    tensorboard: bool = _setting(False, _FLAG, _RUN,
        "write curves for TensorBoard, too, into the run's folder (needs the extra tensorboard)")
    export: str | None = _setting(None, _text("FILE"), _RUN,
        "at the end write the best model into a file of its own: .npz (ours), .onnx, .pt, .safetensors,",
        ".keras or .h5, as python -m tinyunet.export does")
    real: str | None = _setting(None, _text("PATH"), _RUN,
        "a scan, such as the folder of a BraTS case, that is no part of the data: at the end the best model",
        "segments it, and report.html shows it")
    output: str = _setting("runs", _text("DIR"), _RUN,
        "where each run gets a folder named by its time")
    scale_lr: bool = _setting(False, _FLAG, _RANKS,
        "multiply --lr by the number of ranks, as one does when --batch-size grows with them")
    sync_batch_norm: bool | None = _setting(None, _MAYBE, _RANKS,
        "take batch norm's statistics over the patches of all ranks: N ranks with b patches",
        f"then are one with N b (default: if a rank has fewer than {FEW_PATCHES})")
    bucket_mb: float = _setting(4.0, _real("MB", 1e9), _RANKS,
        "gradients that are sent at once, while backward goes on")
    allreduce: str = _setting("mpi", _choice(*ALGORITHMS), _RANKS,
        "how gradients are summed: by MPI (in shared memory on a node), or in messages written out here")
    compression: str = _setting("none", _choice(*COMPRESSIONS), _RANKS,
        "what is sent: float32, or with --allreduce mpi bfloat16 with error feedback")
    stall_warning: float = _setting(60.0, _real("SECONDS"), _RANKS,
        "name a rank that the others have waited for so long")
    timeline: str | None = _setting(None, _text("FILE"), _RANKS,
        "write when each kernel ran and each bucket was on its way, a JSON file for each rank",
        "(of several, trace.json becomes trace.rank0.json, ...) that https://ui.perfetto.dev opens; the",
        "first 20 000 events, some hundred steps, are kept; a run that goes on",
        "writes one if this is given again")
    #: Ranks that the run began on: settings that depend on their number stay when it goes on with others.
    ranks: int = _setting(1, _COUNT)
    #: Epochs after which the learning rate had fallen to 0, and the run was extended.
    extended_at: tuple[int, ...] = _setting((), Kind(each(_COUNT.rule)))
    # fmt: on

    def check(self) -> None:
        """Check settings together; UserError names the options that do not go together."""
        self.exchange.check()
        if self.data_path == "":  # what a variable of the shell that is not set leaves
            raise UserError("--data-path: ''; expected a folder, or no --data-path for phantoms")
        if self.labels not in (None, *CONVENTIONS):
            raise UserError(f"--labels: {self.labels}; expected one of {', '.join(CONVENTIONS)}")
        if self.timeline is not None:
            if not can_be_written(self.timeline, True):
                expected = "expected a file in a folder that can be written to"
                raise UserError(f"--timeline: {self.timeline}; {expected}")
            for rank in range(self.ranks):
                check_replaceable("--timeline", file_of_rank(self.timeline, rank, self.ranks))
        if self.fold >= (self.folds or 1):
            expected = f"below {self.folds}, the number of --folds" if self.folds else "--folds, too"
            raise UserError(f"--fold: {self.fold}; expected {expected}")
        if self.tensorboard and find_spec("tensorboardX") is None:
            raise UserError("--tensorboard: needs tensorboardX; pip install 'tinyunet[tensorboard]'")
        if self.export is not None:
            from tinyunet.interop.formats import check_ending  # late: it loads Numba

            check_ending("--export", self.export)
            if not can_be_written(self.export, True):
                expected = "expected a file in a folder that can be written to"
                raise UserError(f"--export: {self.export}; {expected}")
        halvings, smallest = self.depth - 1, min(self.patch[: self.dim])
        if smallest < 2**halvings:
            expected = f"expected at least {2**halvings}, or a smaller --depth"
            raise UserError(f"--patch-size: {smallest} voxels are halved {halvings} times; {expected}")
        if self.batch % self.ranks:
            shared = f"{self.batch} patches cannot be shared by {self.ranks} ranks"
            raise UserError(f"--batch-size: {shared}; expected a multiple of {self.ranks}")

    @property
    def patch(self) -> tuple[int, int, int]:
        """Voxels of a patch along the axes of a volume: in two dimensions it is one axial slice deep."""
        return self.patch_size if self.dim == 3 else (*self.patch_size[:2], 1)

    @property
    def batch(self) -> int:
        """Patches in a step, over all ranks: learning rate and steps mean the same on any number of them."""
        return self.batch_size or -(-4 // self.ranks) * self.ranks

    @property
    def model_options(self) -> Mapping[str, Any]:
        """Arguments of the model, by their names in :class:`tinyunet.UNet`."""
        norm = None if self.norm == "none" else self.norm
        named = {name: getattr(self, name) for name in ("dim", "filters", "depth", "use_upsampling")}
        return {**named, "norm": norm, "deep_supervision": "levels" if self.deep_supervision else False}

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
        # A rank alone takes statistics over all patches anyway.
        return Exchange(self.bucket_mb, self.allreduce, self.compression, synchronize or self.ranks == 1)

    @property
    def compile_options(self) -> Mapping[str, Any]:
        """Options of :func:`tinyunet.compile`."""
        return {"accuracy": self.accuracy, "deterministic": self.deterministic}


#: What each setting may be that comes from a file: what the options of the command allow.
RULES: dict[str, Rule] = {each.name: each.metadata["rule"] for each in fields(Settings)}


#: Settings that are the run's own, and not of its configuration.
_OF_A_RUN = ("ranks", "extended_at")


def configuration(settings: Settings) -> dict[str, Any]:
    """Return what :func:`read_config` reads: the settings by their names, in types that JSON has."""
    return {name: value for name, value in vars(settings).items() if name not in _OF_A_RUN}


def read_config(path: str) -> dict[str, Any]:
    """Return the settings in a JSON file; UserError, which names file and entry, if it cannot be used."""
    try:
        content = read_json(path)
        schema.record({}, RULES)(content, "settings")
        if unknown := sorted(set(content) - set(RULES)):
            expected = "expected those of config.json beside a checkpoint"
            raise ValueError(f"{shown(unknown[0])} is no setting; {expected}")
    except OSError as error:
        raise UserError(f"--config: {path}: cannot be read ({said(error)})") from error
    except ValueError as error:
        raise UserError(f"--config: {path}: {said(error)}") from error
    content = {name: value for name, value in content.items() if name not in _OF_A_RUN}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def patch_size(sizes: Sequence[int], dim: int) -> tuple[int, ...]:
    """Return three sizes for one, or for as many as there are dimensions; UserError for another number."""
    if len(sizes) not in (1, dim, 3):
        expected = f"expected 1 or {dim}" if dim != 3 else "expected 1 or 3"
        raise UserError(f"--patch-size: {len(sizes)} numbers; {expected}")
    return (*sizes, 1) if len(sizes) == 2 else tuple(sizes) * (3 // len(sizes))


def add_option(group: Any, name: str, **changes: Any) -> None:
    """Add the option of a setting to a parser or a group, with the default unless the help says it in words.

    ``changes`` are other arguments of ``add_argument``.
    """
    setting = Settings.__dataclass_fields__[name]
    text, option, default = setting.metadata["help"], setting.metadata["option"], setting.default
    if default is not None and "action" not in option:
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    how = {"default": default, "help": text, **option, **changes}
    group.add_argument("--" + name.replace("_", "-"), **how)
