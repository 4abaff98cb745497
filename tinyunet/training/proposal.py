"""A plan for a training: settings that fit the data and the memory, with what they cost."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, UserError
from tinyunet.common.terminal import aligned, count, in_bytes
from tinyunet.data.cases import Case, Dataset
from tinyunet.data.conventions import read_as
from tinyunet.data.spacing import Spacing, differs, in_mm, of_network, shape_for
from tinyunet.data.survey import Survey
from tinyunet.training.estimate import (
    Seconds,
    Workload,
    duration,
    memory,
    memory_at_hand,
    missing_share,
    predicted_shape,
)
from tinyunet.training.settings import Settings, configuration
from tinyunet.training.start import split_cases

_SHARE = 0.7  # of the memory at hand: other programs run, too
_FILTERS = (32, 16, 8)  # nnU-Net begins with 32
_LARGEST = 128  # side of a patch
_BATCH = 2  # patches in a step, as nnU-Net has them: memory is better spent on larger patches
_LINES = 10  # of suspicious files


class Proposal(NamedTuple):
    """Settings, and what they cost on this machine."""

    settings: Settings
    given: AbstractSet[str]  # settings that were not proposed
    spacing: Spacing | None  # of the network's voxels; None if they differ
    resampled: int  # how many cases are
    example: Case
    work: Workload
    bytes: dict[str, int]  # of a rank at the peak, by what takes them
    steps: int  # of an epoch
    seconds: Seconds | None = None

    @property
    def epoch(self) -> float:
        """Seconds of an epoch, with its validation."""
        ranks = self.settings.ranks
        return self.seconds.of_epoch(self.work, self.steps, ranks) if self.seconds else float("nan")

    def describe(self) -> str:
        """Return lines for people, with the command that trains so."""
        settings, total, here = self.settings, sum(self.bytes.values()), self.work.ranks_here
        needed, there = in_bytes(total * here, memory_at_hand())
        voxels = "as they are" if self.spacing is None else f"of {in_mm(self.spacing)}"
        cases = count(self.resampled, "case is", "cases are") if self.resampled else "nothing is"
        ranks = f" for {here} ranks" if here > 1 else ""
        patch = settings.patch[: settings.dim]
        parts = ", ".join(
            f"{name} {in_bytes(part)[0]}" for name, part in self.bytes.items() if part > 0.02 * total
        )
        lines = [
            f"plan     voxels {voxels}; {cases} resampled",
            f"         patches of {' x '.join(map(str, patch))} voxels, {settings.batch} in a step, "
            f"{settings.filters} filters, {count(settings.depth, 'level')}",
            f"memory   about {needed} of {there}{ranks} ({'each: ' if ranks else ''}{parts})",
        ]
        if self.seconds:
            whole = self.epoch * settings.epochs
            steps = f"{count(self.steps, 'step')} of {self.seconds.step:.2g} s, and validation"
            epochs = f"{duration(whole)} for {count(settings.epochs, 'epoch')}"
            lines.append(f"time     about {duration(self.epoch)} an epoch ({steps}), {epochs}")
            if self.seconds.reading:
                share, reading = missing_share(self.work), self.seconds.reading
                why = f"{share:.0%} of the patches wait for a case to be read, {reading:.2g} s each"
                lines.append(f"         the volumes do not fit into half of the memory: {why}")
        return "\n".join([*lines, f"command  {self.command()}"])

    def command(self) -> str:
        """Return the command, for a shell, that trains so: what was proposed, and what was given."""
        settings = self.settings
        patch = settings.patch[: settings.dim]
        options: dict[str, Any] = {"data_path": settings.data_path}
        options["patch_size"] = patch if len({*patch}) > 1 else patch[:1]
        options |= {"batch_size": settings.batch, "filters": settings.filters, "depth": settings.depth}
        options |= {name: getattr(settings, name) for name in sorted({*self.given} - {*options})}
        words = ["python", "-m", "tinyunet.train"]
        if settings.ranks > 1:
            words = ["mpirun", "-n", str(settings.ranks), *words]
        for name, value in options.items():
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
        return shlex.join(words)

    def as_dict(self) -> dict[str, Any]:
        """Return content for JSON."""
        timed = {"step_seconds": self.seconds.step, "epoch_seconds": self.epoch} if self.seconds else {}
        found: dict[str, Any] = {
            "spacing": self.spacing,
            "resampled": self.resampled,
            "command": self.command(),
        }
        found |= {"ranks": self.settings.ranks, "bytes": self.bytes, "steps": self.steps}
        return {"settings": configuration(self.settings), **found, **timed}


def describe(dataset: Dataset, found: Survey) -> str:
    """Return what is there, in lines for people."""
    lines = [
        f"data     {dataset.path}",
        f"         {count(len(found.cases), 'case')} of {count(found.patients, 'patient')}; "
        f"{', '.join(dataset.modalities)}",
        f"         {read_as(*dataset.meaning)}",
    ]
    if found.cases:
        lines.append(f"shapes   {_range(found.shapes, _voxels)}")
        lines.append(f"voxels   {_range(found.spacings, in_mm)}")
    rows = [
        [name, *(f"{f(values):.1f}" for f in (np.min, np.median, np.max)), f"{np.count_nonzero(values)}"]
        for name, values in found.millilitres.items()
        if values
    ]
    if rows:
        lines += ["", aligned(["volume in ml", "least", "median", "most", "cases"], rows)]
        if (measured := len(next(iter(found.millilitres.values())))) < len(found.cases):
            lines.append(f"(labels of {measured} cases were read, spread evenly over all)")
    if found.suspicious:
        lines += ["", f"suspicious: {count(len(found.suspicious), 'file')}"]
        lines += [f"  {line}" for line in found.suspicious[:_LINES]]
        if len(found.suspicious) > _LINES:
            lines.append(f"  and {len(found.suspicious) - _LINES} more (--json has all)")
    return "\n".join(lines)


def _voxels(shape: Sequence[float]) -> str:
    return " x ".join(f"{size:.0f}" for size in shape)


def _range(rows: Sequence[Sequence[float]], text: Callable[[Sequence[float]], str]) -> str:
    """Return the usual row, and the least and the largest of each axis if rows differ."""
    array = np.asarray(rows)
    least, most = array.min(axis=0), array.max(axis=0)
    if np.array_equal(least, most):
        return f"{text(least.tolist())}, all alike"
    usual = np.percentile(array, 50, axis=0, method="lower")
    return f"usually {text(usual.tolist())}; from {text(least.tolist())} to {text(most.tolist())}"


def propose(
    dataset: Dataset, found: Survey, settings: Settings, given: AbstractSet[str], ranks_here: int = 1
) -> Proposal:
    """Choose the settings that were not given: the largest patch, then the widest net that fit.

    DataError if no case can be read, UserError if a patch that was given is larger than a volume. If nothing
    fits, the proposal is the smallest, and says what it takes. Times are not measured.
    """
    if not found.cases:
        raise DataError(f"{dataset.path}: no case can be read; expected one at least")
    target = of_network(settings.spacing, found.spacings)
    pairs = zip(found.cases, found.shapes, found.spacings, strict=True)
    shapes = {case.name: shape_for(shape, voxels, target) for case, shape, voxels in pairs}
    resampled = sum(target is not None and differs(each, target) for each in found.spacings)
    parts = split_cases(found.cases, settings)
    least = np.min([shapes[case.name] for case in parts.train], axis=0)
    if "patch_size" in given and np.any(np.greater(settings.patch, least)):
        raise UserError(f"--patch-size: {_voxels(settings.patch)}; expected at most {_voxels(least)}")
    seen = target, dataset.modalities
    validation = [predicted_shape(shapes[case.name], *seen) for case in parts.validation]
    for candidate in _candidates(settings, given, least):
        channels, classes = len(dataset.modalities), len(dataset.labels)
        config = {"in_channels": channels, "classes": classes, **candidate.model_options}
        batch_shape = (-(-candidate.batch // candidate.ranks), *candidate.patch[: candidate.dim])
        work = Workload(candidate, config, batch_shape, [*shapes.values()], validation, ranks_here)
        needed = memory(work)
        if ranks_here * sum(needed.values()) <= _SHARE * memory_at_hand():
            break
    steps = -(-len(parts.train) * candidate.patches_per_case // candidate.batch)
    return Proposal(candidate, given, target, resampled, found.cases[0], work, needed, steps)


def _candidates(settings: Settings, given: AbstractSet[str], least: NDArray[np.int64]) -> Iterator[Settings]:
    """Yield settings from the largest patch that fits into the smallest volume down, and the widest net."""
    multiple = 2 ** (settings.depth - 1)
    largest = np.maximum(least // multiple, 1) * multiple
    batch = settings.batch_size or -(-_BATCH // settings.ranks) * settings.ranks
    sides = range(min(_LARGEST, int(largest.max())), 0, -multiple)
    for side in sides[:1] if "patch_size" in given else sides:
        d, h, w = settings.patch_size if "patch_size" in given else np.minimum(side, largest).tolist()
        for filters in [settings.filters] if "filters" in given else _FILTERS:
            yield replace(settings, filters=filters, patch_size=(d, h, w), batch_size=batch)
