"""The main job from beginning to end: data, training, validation, test, and what is kept of it."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyunet.common.errors import ENDING, StoppedError
from tinyunet.common.files import write_json
from tinyunet.common.terminal import count, printable
from tinyunet.compiler import measure
from tinyunet.data.cases import Case, load_case
from tinyunet.optim import Adam, Schedule, polynomial, warm_up
from tinyunet.parallel.buckets import backward_order
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.scores import mean, overall, summary, table
from tinyunet.segmentation.sliding_window import predictor
from tinyunet.training import report
from tinyunet.training.compilation import compile_kernels
from tinyunet.training.folder import BEST, LATEST, PREVIOUS, RunFolder
from tinyunet.training.loop import Trainer
from tinyunet.training.pauses import Pause, Pauses
from tinyunet.training.progress import Progress
from tinyunet.training.resume import Resumed, begin, check_cases, check_data
from tinyunet.training.samples import Loader
from tinyunet.training.settings import Settings
from tinyunet.training.start import Data, find_data, warn_of_images
from tinyunet.training.validate import CaseResult, score_cases
from tinyunet.unet import UNet
from tinyunet.viz import attempt

# Test cases that are pictured.
PICTURED = 3


def train(given: Mapping[str, Any], communicator: Communicator, resume: str | None = None) -> None:
    """Train as told, and leave everything in a folder of its own.

    Parameters
    ----------
    given : mapping
        Settings that are not the usual ones, by the names that :class:`Settings` has for them.
    communicator : Communicator
        All ranks of the job; each calls this function.
    resume : str, optional
        The run to go on with: see :func:`tinyunet.training.resume.find`.

    Raises
    ------
    AgreedError
        On every rank, with one line, if data, options or disk are not as they must be.
    StoppedError
        On every rank, after a signal; its text tells what is left of the run.
    KeyboardInterrupt
        After a second signal, or a signal before the training has begun.
    """
    folder = RunFolder(Settings(**given).output)
    with Progress(shown=communicator.rank == 0) as progress, folder:
        settings, resumed = begin(given, resume, folder, communicator)
        communicator.warn_of_stalls(settings.stall_warning)
        for note in resumed.notes if resumed else ():
            progress.line(note)
        data = find_data(settings, communicator, progress)
        with communicator.together():
            if resumed:
                check_data(resumed.latest.state, data.dataset)
                check_cases(resumed.latest.state, case_names(data))
            model = make_model(settings, data, resumed)
            loader = make_loader(settings, data, communicator)
        shape = (*loader.batch_shapes()[0], data.dataset.in_channels)
        optimizer = Adam(backward_order(model, shape), settings.lr, local=communicator.local)
        with communicator.together():
            if resumed:
                resumed.latest.load_optimizer(model, optimizer)
            if communicator.rank == 0:
                # Three checkpoints of parameters and two averages, and one while it is written.
                folder.check(4 * 3 * optimizer.flat_parameters.nbytes)
                folder.tidy()
        warn_of_images(data, communicator, progress)
        progress.line(report.plan(settings, data, model, communicator.size))
        shapes = loader.batch_shapes()
        with communicator.patient():
            compile_kernels(model.config, settings, shapes, communicator, progress)
        with Pauses(communicator, settings.checkpoint_every) as pauses:
            run = Run(settings, data, model, optimizer, loader, folder, communicator, progress, pauses)
            try:
                if resumed:
                    run.resume(resumed)
                with communicator.recorded(settings.timeline):
                    run.train()
                run.test()
            except KeyboardInterrupt as interrupt:
                interrupt.args = (run.left(),)
                raise
            finally:
                if communicator.rank == 0:
                    folder.tidy()


def make_model(settings: Settings, data: Data, resumed: Resumed | None) -> UNet:
    """Return a new model, or that of a run which goes on."""
    # What was fastest then: another algorithm would round in another way.
    measure.use(resumed.latest.state["algorithms"] if resumed else {})
    if resumed:
        return resumed.latest.make_model()
    return UNet(
        in_channels=data.dataset.in_channels,
        classes=data.dataset.classes,
        filters=settings.filters,
        depth=settings.depth,
        use_upsampling=settings.use_upsampling,
        seed=settings.random_seed,
    )


def make_loader(settings: Settings, data: Data, communicator: Communicator) -> Loader:
    """Return what gives this rank its batches."""
    return Loader(
        data.train,
        data.volumes,
        settings.patch_size,
        settings.patches_per_case,
        settings.batch,
        settings.random_seed,
        communicator.rank,
        communicator.size,
        settings.accumulate,
    )


def case_names(data: Data) -> dict[str, list[str]]:
    """Return the names of the cases of each part, in their order, which the order of patches follows."""
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    return {part: [case.name for case in cases] for part, cases in parts.items()}


def schedule(settings: Settings, steps_per_epoch: int) -> Schedule:
    """Return the learning rate of each step: it rises to its highest, then falls to 0."""
    steps, warm = settings.epochs * steps_per_epoch, settings.warmup_epochs
    rising = steps // 20 if warm is None else round(warm * steps_per_epoch)
    return warm_up(polynomial(settings.highest_lr, steps), max(1, rising))


class Run:
    """One training, its folder, and what is known of it so far."""

    def __init__(
        self,
        settings: Settings,
        data: Data,
        model: UNet,
        optimizer: Adam,
        loader: Loader,
        folder: RunFolder,
        communicator: Communicator,
        progress: Progress,
        pauses: Pauses,
    ) -> None:
        self._settings, self._data, self._model, self._folder = settings, data, model, folder
        self._communicator, self._progress, self._pauses = communicator, progress, pauses
        self._trainer = Trainer(
            model,
            optimizer,
            loader,
            data.inspector,
            schedule(settings, loader.steps),
            communicator,
            progress,
            settings.eager,
            settings.accuracy,
            settings.exchange,
            pauses,
            settings.deterministic,
        )
        how = settings.accuracy, settings.deterministic
        self._predict = predictor(model, settings.eager, *how)
        self._history: list[dict[str, Any]] = []
        self._saved, self._where, self._seconds = "", str(folder), 0.0
        self._best_epoch, self._best_score = 0, -1.0
        self._best_state = model.state_dict()

    def resume(self, resumed: Resumed) -> None:
        """Go on from where a checkpoint was written."""
        state, best = resumed.latest.state, resumed.best
        trainer = self._trainer
        trainer.number, trainer.step = state["epoch"], state["step"]
        trainer.total = np.array(state["sums"])
        trainer.take_own_arrays(resumed.latest.arrays)
        self._history, self._seconds = list(state["history"]), state["seconds"]
        self._best_state = best.model
        self._saved = _place(state)
        if best.path.name == BEST:
            self._best_epoch = best.state["epoch"]
            self._best_score = overall(best.state["validation"])
        elif len(self._history) == self._settings.epochs:
            # The best one is lost, and no other epoch will be: the last is taken.
            self._best_epoch = trainer.number
            self._keep(best=True)
        self._progress.line(printable(f"going on with {resumed.folder} after {self._saved}"))

    def train(self) -> None:
        """Run all epochs that are left; after each, validate, and write checkpoints and history."""
        epochs, loader = self._settings.epochs, self._trainer.loader
        done = (self._trainer.number - 1) * loader.volumes + int(self._trainer.total[3])
        self._progress.start(epochs * loader.volumes, max(done, 0))
        first = len(self._history) + 1
        for epoch in range(first, epochs + 1):
            self._start = time.perf_counter() - self._seconds
            self._progress.epoch(epoch, epochs)
            result = self._trainer.epoch(epoch, self._pause)
            try:
                cases = self._score(self._data.validation)
            except StoppedError as stopped:
                self._seconds = time.perf_counter() - self._start
                self._keep()
                raise self._stopped(stopped.signal_number) from None
            validation = mean([case.scores for case in cases])
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
                    "seconds": time.perf_counter() - self._start,
                }
            )
            self._seconds = 0.0
            self._keep(best)
            warn_of_images(self._data, self._communicator, self._progress)
            if epoch == first:
                self._progress.line(report.epoch_heads(validation))
            self._progress.line(report.epoch_row(epoch, result, validation, best))
        self._progress.finish()

    def test(self) -> None:
        """Score the best model on cases that it was never trained on, and draw pictures."""
        self._model.load_state_dict(self._best_state)
        with self._progress.task("segmenting the test cases"):
            cases = self._score(self._data.test, keep=PICTURED)
        rows = [(case.name, case.scores) for case in cases]
        with self._communicator.together():
            if self._communicator.rank == 0:
                write_json(self._folder / "test.json", {"epoch": self._best_epoch} | summary(rows))
        number = count(len(rows), "test case")
        self._progress.line(
            f"\nDice on {number}, never trained on (best.npz, epoch {self._best_epoch})\n\n{table(rows)}\n"
        )
        with self._communicator.together():
            if self._communicator.rank == 0:
                with attempt("pictures"):
                    self._draw(cases)
        self._progress.line(f"everything is in {printable(str(self._folder))}")

    def left(self) -> str:
        """Say what there is of the run if it ends now."""
        if not self._saved:
            return "nothing was written"
        return f"{self._where}/{LATEST} holds {self._saved}; go on with --resume {self._where}"

    def _score(self, cases: list[Case], keep: int = 0) -> list[CaseResult]:
        """Score cases, unless any rank is asked to end meanwhile."""
        names = self._data.dataset.labels
        found = score_cases(
            self._model,
            cases,
            self._data.volumes,
            names,
            self._communicator,
            keep,
            self._predict,
            lambda: self._pauses.asked,
        )
        pause = self._pauses.agree()
        if pause.signal:
            raise self._stopped(pause.signal)
        return found

    def _pause(self, pause: Pause) -> None:
        """Write a checkpoint between two steps, and end if that is what was asked for."""
        self._seconds = time.perf_counter() - self._start
        self._keep()
        if pause.signal:
            raise self._stopped(pause.signal)

    def _stopped(self, number: int) -> StoppedError:
        return StoppedError(f"{ENDING[number]}; {self.left()}", number)

    def _keep(self, best: bool | None = None) -> None:
        """Write the latest checkpoint; after an epoch also the history, and if it is the best, that."""
        trainer, folder = self._trainer, self._folder
        state, arrays = self._state(), trainer.own_arrays()
        saved = self._model, trainer.optimizer, state, arrays
        with self._communicator.together():
            if self._communicator.rank == 0:
                if best:
                    checkpoint.save(folder / BEST, *saved)
                checkpoint.save(folder / LATEST, *saved, previous=folder / PREVIOUS)
                write_json(folder / "history.json", self._history)
        if not self._saved:
            self._where = self._communicator.broadcast_object(str(folder))  # rank 0 has made it
        self._saved = _place(state)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides arrays."""
        return {
            "epoch": self._trainer.number,
            "step": self._trainer.step,
            "steps": self._trainer.loader.steps,
            "sums": self._trainer.total.tolist(),
            "seconds": self._seconds,
            "history": self._history,
            "validation": self._history[-1]["validation"] if self._history else None,
            "modalities": self._data.dataset.modalities,
            "labels": self._data.dataset.labels,
            "label_values": self._data.dataset.label_values,
            "labels_source": self._data.dataset.source,
            "spacing": self._data.spacing,
            "cases": case_names(self._data),
            "algorithms": measure.known(),
            "settings": dataclasses.asdict(self._settings),
        }

    def _draw(self, cases: list[CaseResult]) -> None:
        # Imported here: matplotlib takes half a second that the first step need not wait for.
        from tinyunet.viz.learning_curves import draw_learning_curves
        from tinyunet.viz.volumes import PicturedCase, draw_predictions

        with attempt(curves := self._folder / "learning_curves.png"):
            draw_learning_curves(curves, self._history)
        with attempt(predictions := self._folder / "predictions.png"):
            pictured = []
            for case, (name, scores, prediction) in zip(self._data.test, cases, strict=True):
                if prediction is not None:
                    image, labels, geometry = load_case(case)
                    note = f"mean Dice {overall(scores):.2f}"
                    pictured.append(PicturedCase(name, image, labels, prediction, note, geometry.spacing))
            dataset = self._data.dataset
            draw_predictions(predictions, pictured, dataset.modalities, dataset.labels)


def _place(state: Mapping[str, Any]) -> str:
    """Say where a training stands, in words."""
    place = f"epoch {state['epoch']}"
    return place if len(state["history"]) == state["epoch"] else f"{place}, step {state['step']}"
