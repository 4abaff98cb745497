"""The main job from beginning to end: data, training, validation, test, and what is kept of it."""

import dataclasses
import time
from typing import Any

from tinyunet import checkpoint
from tinyunet.data.decathlon import Case, load_case
from tinyunet.files import write_json
from tinyunet.optim import Adam, polynomial, warm_up
from tinyunet.parallel.communicator import Communicator
from tinyunet.scores import Scores, mean, overall, summary, table
from tinyunet.training import report
from tinyunet.training.folder import RunFolder
from tinyunet.training.loop import Trainer
from tinyunet.training.progress import Progress
from tinyunet.training.samples import Loader
from tinyunet.training.settings import Settings
from tinyunet.training.start import Data, compile_kernels, find_data
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
        data = find_data(settings, communicator, progress)
        folder = RunFolder(settings.output)
        with communicator.together():
            model = UNet(
                in_channels=data.dataset.in_channels,
                classes=data.dataset.classes,
                filters=settings.filters,
                depth=settings.depth,
                use_upsampling=settings.use_upsampling,
                seed=settings.random_seed,
            )
            optimizer = Adam(model.parameters(), settings.lr)
            if communicator.rank == 0:
                # Two checkpoints of parameters and two averages, and a third while it is written.
                folder.check(3 * 3 * optimizer.flat_parameters.nbytes)
        progress.line(report.plan(settings, data, model, communicator.size))
        compile_kernels(model.config, settings.patch_size, communicator, progress)
        run = Run(settings, data, model, optimizer, folder, communicator, progress)
        try:
            run.train()
            run.test()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(run.left()) from None


class Run:
    """One training, its folder, and what is known of it so far."""

    def __init__(
        self,
        settings: Settings,
        data: Data,
        model: UNet,
        optimizer: Adam,
        folder: RunFolder,
        communicator: Communicator,
        progress: Progress,
    ) -> None:
        self._settings, self._data, self._model, self._folder = settings, data, model, folder
        self._communicator, self._progress = communicator, progress
        loader = Loader(
            data.train,
            data.volumes,
            settings.patch_size,
            settings.patches_per_case,
            settings.batch_for(communicator.size),
            settings.random_seed,
            communicator.rank,
            communicator.size,
        )
        steps = settings.epochs * loader.steps
        schedule = warm_up(polynomial(settings.lr, steps), max(1, steps // 20))
        self._trainer = Trainer(
            model, optimizer, loader, data.inspector, schedule, communicator, progress
        )
        self._history: list[dict[str, Any]] = []
        self._saved_epoch, self._best_epoch, self._best_score = 0, 0, -1.0
        self._best_state = model.state_dict()

    def train(self) -> None:
        """Run all epochs; after each, validate, and write checkpoints and history."""
        epochs = self._settings.epochs
        self._progress.start(epochs * self._trainer.loader.volumes)
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            self._progress.epoch(epoch, epochs)
            result = self._trainer.epoch(epoch)
            validation = mean([case.scores for case in self._score(self._data.validation)])
            best = overall(validation) > self._best_score
            if best:
                self._best_epoch, self._best_score = epoch, overall(validation)
                self._best_state = self._model.state_dict()
            self._history.append(
                {
                    "epoch": epoch,
                    **result._asdict(),
                    "validation": validation,
                    "lr": self._trainer.optimizer.lr,
                    "seconds": time.perf_counter() - start,
                }
            )
            self._keep(epoch, validation, best)
            if epoch == 1:
                self._progress.line(report.epoch_heads(validation))
            self._progress.line(report.epoch_row(epoch, result, validation, best))
        self._progress.finish()

    def test(self) -> None:
        """Score the best model on cases that it was never trained on, and draw the pictures."""
        self._model.load_state_dict(self._best_state)
        with self._progress.task("segmenting the test cases"):
            cases = self._score(self._data.test, keep=PICTURED)
        rows = [(case.name, case.scores) for case in cases]
        with self._communicator.together():
            if self._communicator.rank == 0:
                write_json(self._folder / "test.json", {"epoch": self._best_epoch} | summary(rows))
                with self._progress.task("drawing"):
                    self._draw(cases)
        number = report.count(len(rows), "test case")
        self._progress.line(
            f"\nDice on {number}, never trained on (best.npz, epoch {self._best_epoch})\n\n"
            f"{table(rows)}\n\neverything is in {self._folder}"
        )

    def left(self) -> str:
        """Say what there is of the run if it ends now."""
        if self._saved_epoch:
            return f"{self._folder}/latest.npz holds epoch {self._saved_epoch}"
        return "nothing was written"

    def _score(self, cases: list[Case], keep: int = 0) -> list[CaseResult]:
        names = self._data.dataset.labels
        return score_cases(self._model, cases, self._data.volumes, names, self._communicator, keep)

    def _keep(self, epoch: int, validation: Scores, best: bool) -> None:
        """Write the latest checkpoint, the best one if this is it, and the history."""
        state = {
            "epoch": epoch,
            "validation": validation,
            "modalities": self._data.dataset.modalities,
            "labels": self._data.dataset.labels,
            "label_values": self._data.dataset.label_values,
            "settings": dataclasses.asdict(self._settings),
        }
        with self._communicator.together():
            if self._communicator.rank == 0:
                for name in ("latest.npz", "best.npz") if best else ("latest.npz",):
                    optimizer = self._trainer.optimizer
                    checkpoint.save(self._folder / name, self._model, optimizer, state)
                write_json(self._folder / "history.json", self._history)
                self._saved_epoch = epoch

    def _draw(self, cases: list[CaseResult]) -> None:
        # Imported here: matplotlib takes half a second that the first step need not wait for.
        from tinyunet.viz.learning_curves import draw_learning_curves
        from tinyunet.viz.predictions import PicturedCase, draw_predictions

        draw_learning_curves(self._folder / "learning_curves.png", self._history)
        pictured = []
        for case, (name, scores, prediction) in zip(self._data.test, cases, strict=True):
            if prediction is not None:
                image, labels, geometry = load_case(case)
                note = f"mean Dice {overall(scores):.2f}"
                pictured.append(
                    PicturedCase(name, image, labels, prediction, note, geometry.spacing)
                )
        draw_predictions(
            self._folder / "predictions.png",
            pictured,
            self._data.dataset.modalities,
            self._data.dataset.labels,
        )
