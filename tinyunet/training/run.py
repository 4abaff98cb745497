"""The main job from beginning to end: data, training, validation, test, and what is kept of it."""

import dataclasses
import time
from typing import Any

from kernels import machine
from tinyunet import checkpoint
from tinyunet.data.decathlon import Case, Dataset, split
from tinyunet.files import write_json
from tinyunet.optim import polynomial, warm_up
from tinyunet.parallel.communicator import Communicator
from tinyunet.scores import Scores, mean, overall, summary, table
from tinyunet.training.folder import RunFolder
from tinyunet.training.loop import EpochResult, Trainer
from tinyunet.training.progress import Progress
from tinyunet.training.samples import Inspector, Loader, Volumes, half_the_memory
from tinyunet.training.settings import Settings
from tinyunet.training.start import compile_kernels, find_dataset
from tinyunet.training.validate import CaseResult, score_cases
from tinyunet.unet import UNet

# Test cases that are pictured.
PICTURED = 3


def train(settings: Settings, communicator: Communicator) -> None:
    """Train as told, and leave everything in a folder of its own.

    Parameters
    ----------
    settings : Settings
    communicator : Communicator
        All ranks of the job; each calls this function.

    Raises
    ------
    AgreedError
        On every rank, with one line, if data, options or disk are not as they must be.
    KeyboardInterrupt
        After Ctrl-C; its text tells what is left of the run.
    """
    with Progress(shown=communicator.rank == 0) as progress:
        batch = settings.batch_for(communicator.size)
        dataset = find_dataset(settings.data_path, communicator, progress)
        with communicator.together():
            cases = split(
                dataset.cases,
                settings.train_test_split,
                settings.validate_test_split,
                settings.random_seed,
            )
        run = Run(settings, batch, dataset, cases, communicator, progress)
        try:
            run.train()
            run.test()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(run.left()) from None


class Run:
    """One training, its folder, and what is known of it so far.

    Parameters
    ----------
    settings : Settings
    batch : int
        Patches in a step, over all ranks.
    dataset : Dataset
    cases : three lists of Case
        To train on, to validate on, to test on.
    communicator : Communicator
    progress : Progress
    """

    def __init__(
        self,
        settings: Settings,
        batch: int,
        dataset: Dataset,
        cases: tuple[list[Case], list[Case], list[Case]],
        communicator: Communicator,
        progress: Progress,
    ) -> None:
        self._settings, self._dataset = settings, dataset
        self._communicator, self._progress = communicator, progress
        train_cases, self._validation_cases, self._test_cases = cases
        self._model = UNet(
            in_channels=dataset.in_channels,
            classes=dataset.classes,
            filters=settings.filters,
            depth=settings.depth,
            use_upsampling=settings.use_upsampling,
            seed=settings.random_seed,
        )
        parameters = sum(p.data.size for p in self._model.parameters())
        with communicator.together():
            # Two checkpoints of parameters and Adam's two averages, and one more while it is written.
            self._folder = RunFolder(settings.output, 3 * 12 * parameters)
        self._announce(batch, [len(part) for part in cases], parameters)
        compile_kernels(self._model.config, settings.patch_size, communicator, progress)

        self._volumes = Volumes(half_the_memory(communicator.local_size))
        every_case = self._test_cases + self._validation_cases + train_cases
        inspector = Inspector(
            every_case[communicator.rank :: communicator.size], self._volumes, settings.patch_size
        )
        loader = Loader(
            train_cases,
            self._volumes,
            settings.patch_size,
            settings.patches_per_case,
            batch,
            settings.random_seed,
            communicator.rank,
            communicator.size,
        )
        steps = settings.epochs * loader.steps
        schedule = warm_up(polynomial(settings.lr, steps), max(1, steps // 20))
        self._trainer = Trainer(self._model, loader, inspector, schedule, communicator, progress)
        self._history: list[dict[str, Any]] = []
        self._best_epoch, self._best_score = 0, -1.0
        self._best_state = self._model.state_dict()

    def train(self) -> None:
        """Run all epochs; after each, validate, and write checkpoints and history."""
        epochs = self._settings.epochs
        self._progress.start(epochs * self._trainer.loader.volumes)
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            self._progress.note(epoch=f"{epoch}/{epochs}")
            result = self._trainer.epoch(epoch)
            validation = mean([case.scores for case in self._score(self._validation_cases)])
            self._history.append(
                {
                    "epoch": epoch,
                    "loss": result.loss,
                    "dice": result.dice,
                    "validation": validation,
                    "lr": self._trainer.optimizer.lr,
                    "seconds": time.perf_counter() - start,
                }
            )
            self._keep(epoch, validation)
            self._tell_epoch(result, validation)
        self._progress.finish()

    def test(self) -> None:
        """Score the best model on cases that it was never trained on, and draw the pictures."""
        self._model.load_state_dict(self._best_state)
        with self._progress.task("segmenting the test cases"):
            cases = self._score(self._test_cases, keep=PICTURED)
        rows = [(case.name, case.scores) for case in cases]
        with self._communicator.together():
            if self._communicator.rank == 0:
                write_json(
                    self._folder / "test.json",
                    summary(rows) | {"epoch": self._best_epoch},
                )
                with self._progress.task("drawing"):
                    self._draw(cases)
        say = self._progress.line
        say(
            f"\nDice on {len(rows)} test cases, never trained on (best.npz, epoch {self._best_epoch})\n"
        )
        say(table(rows))
        say(f"\nAll of it is in {self._folder.path}" if self._communicator.rank == 0 else "")

    def left(self) -> str:
        """Say what there is of the run if it ends now."""
        if not self._history or self._communicator.rank > 0:
            return "nothing has been written"
        return f"{self._folder / 'latest.npz'} holds epoch {len(self._history)}"

    def _score(self, cases: list[Case], keep: int = 0) -> list[CaseResult]:
        names = self._dataset.labels
        return score_cases(self._model, cases, self._volumes, names, self._communicator, keep)

    def _announce(self, batch: int, cases: list[int], parameters: int) -> None:
        """Tell what is going to be done, on what, with what."""
        ranks, threads = self._communicator.size, machine.threads()
        config, say = self._model.config, self._progress.line
        d, h, w = self._settings.patch_size
        say(
            f"data     {self._dataset.path}: {cases[0]} cases to train on, {cases[1]} to validate on, "
            f"{cases[2]} to test on; {', '.join(self._dataset.modalities)}"
        )
        say(
            f"model    U-Net, {config['depth']} levels, {config['filters']} filters, "
            f"{parameters:,} parameters"
        )
        say(f"ranks    {_many(ranks, 'rank')} of {_many(threads, 'thread')}")
        say(f"steps    {_many(batch, 'patch', 'patches')} of {d} x {h} x {w} each")

    def _tell_epoch(self, result: EpochResult, validation: Scores) -> None:
        shown = validation["regions"] or validation["classes"]
        if len(self._history) == 1:
            heads = "".join(f"  {name:>5}" for name in shown)
            self._progress.line(f"epoch   loss   Dice   validation:{heads}")
        dice = "".join(f"  {value:.3f}".rjust(max(5, len(k)) + 2) for k, value in shown.items())
        star = "  best" if self._best_epoch == len(self._history) else ""
        self._progress.line(
            f"{len(self._history):>5}  {result.loss:5.3f}  {result.dice:5.3f}              {dice}{star}"
        )

    def _keep(self, epoch: int, validation: Scores) -> None:
        """Write the latest checkpoint, the best one if this is it, and the history."""
        best = overall(validation) > self._best_score
        if best:
            self._best_epoch, self._best_score = epoch, overall(validation)
            self._best_state = self._model.state_dict()
        state = {
            "epoch": epoch,
            "validation": validation,
            "modalities": self._dataset.modalities,
            "labels": self._dataset.labels,
            "label_values": self._dataset.label_values,
            "settings": dataclasses.asdict(self._settings),
        }
        with self._communicator.together():
            if self._communicator.rank == 0:
                for name in ("latest.npz", "best.npz") if best else ("latest.npz",):
                    optimizer = self._trainer.optimizer
                    checkpoint.save(self._folder / name, self._model, optimizer, state)
                write_json(self._folder / "history.json", self._history)

    def _draw(self, cases: list[CaseResult]) -> None:
        # Imported here: matplotlib takes half a second that the first step need not wait for.
        from tinyunet.viz.learning_curves import draw_learning_curves
        from tinyunet.viz.predictions import PicturedCase, draw_predictions

        draw_learning_curves(self._folder / "learning_curves.png", self._history)
        pictured = []
        for case, result in zip(self._test_cases[:PICTURED], cases, strict=False):
            image, labels = self._volumes[case]
            if result.prediction is not None:
                note = f"mean Dice {overall(result.scores):.2f}"
                pictured.append(PicturedCase(case.name, image, labels, result.prediction, note))
        draw_predictions(
            self._folder / "predictions.png",
            pictured,
            self._dataset.modalities,
            self._dataset.labels,
        )


def _many(count: int, word: str, words: str = "") -> str:
    return f"{count} {word if count == 1 else words or word + 's'}"
