"""The main job from beginning to end: data, training, validation, test, and the files of a run."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.common.errors import ENDING, StoppedError
from tinyunet.common.files import write_json
from tinyunet.common.terminal import count, printable
from tinyunet.compiler import measure
from tinyunet.data.cases import Case, load_case
from tinyunet.optim import Adam
from tinyunet.parallel.buckets import backward_order
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.scores import Scores, overall, score_counts, summary, table
from tinyunet.segmentation.sliding_window import predictor
from tinyunet.training import estimate
from tinyunet.training.compilation import compile_kernels
from tinyunet.training.estimate import Workload
from tinyunet.training.folder import BEST, LATEST, PREVIOUS, RunFolder
from tinyunet.training.loop import StepResult, Trainer
from tinyunet.training.pauses import Pause, Pauses
from tinyunet.training.progress import Job, Progress
from tinyunet.training.real_scan import find_scan, segment_scan
from tinyunet.training.resume import Resumed, begin, check_same_data
from tinyunet.training.samples import Loader
from tinyunet.training.settings import Settings, configuration
from tinyunet.training.start import Data, find_data
from tinyunet.training.step_log import Metrics
from tinyunet.training.validate import CaseResult, epoch_heads, epoch_row, score_cases
from tinyunet.unet import UNet
from tinyunet.viz import attempt

PICTURED = 3  # test cases
_TIMED = 4  # steps, after which the time of an epoch is foretold


def train(
    given: Mapping[str, Any], communicator: Communicator, resume: str | None = None, extend: int | None = None
) -> None:
    """Train on all ranks of a job, each of which calls this, and leave all results in a folder of the run.

    ``given`` are the settings that differ from the defaults, by their names in :class:`Settings`; ``resume``
    is the run to go on with, as for :func:`tinyunet.training.resume.find`, for ``extend`` epochs more than it
    planned. AgreedError on every rank, with
    one line, if data, options or disk are not as they must be. StoppedError on every rank after a signal: its
    text says what is left of the run. KeyboardInterrupt after a second signal, or before the training has
    begun.
    """
    folder = RunFolder(Settings(**given).output)
    with Progress(shown=communicator.rank == 0) as progress, folder:
        settings, resumed = begin(given, resume, folder, communicator, extend)
        job = Job(settings, communicator, progress)
        communicator.warn_of_stalls(settings.stall_warning)
        for note in resumed.notes if resumed else ():
            progress.line(note)
        data = find_data(job)
        with communicator.together():
            if resumed:
                check_same_data(resumed.latest.state, data)
            model = make_model(settings, data, resumed)
            ranks = communicator.rank, communicator.size
            loader = Loader(data.train, data.volumes, settings, *ranks, data.inspector)
            shapes = loader.batch_shapes()
            work = data.workload(job, model, shapes[0])
            needed = estimate.memory(work)
            estimate.check_memory(needed, work.ranks_here)
            if settings.real:
                find_scan(settings.real, data)
        parameters = backward_order(model, (*shapes[0], len(data.dataset.modalities)))
        optimizer = Adam(parameters, settings.lr, local=communicator.local, ema=settings.ema)
        with communicator.together():
            if resumed:
                resumed.latest.load_optimizer(model, optimizer)
            if communicator.rank == 0:
                # Three checkpoints of parameters and their averages, and one while it is written.
                folder.check(4 * (1 + len(optimizer.averages)) * optimizer.flat_parameters.nbytes)
                folder.tidy()
        data.warn(job)
        progress.line(data.plan(job, model, sum(needed.values())))
        with communicator.patient():
            compile_kernels(job, model.config, shapes)
        with Pauses(communicator, settings.checkpoint_every) as pauses:
            run = Run(job, data, folder, Trainer(job, model, optimizer, loader, pauses), work)
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
                run.metrics.close()
                if communicator.rank == 0:
                    folder.tidy()


def make_model(settings: Settings, data: Data, resumed: Resumed | None) -> UNet:
    """Return a new model, or the model of the run that goes on."""
    # The algorithms that were fastest then: others would round differently.
    measure.use(resumed.latest.state["algorithms"] if resumed else {})
    if resumed:
        return resumed.latest.make_model()
    channels, classes = len(data.dataset.modalities), len(data.dataset.labels)
    options = settings.model_options
    return UNet(in_channels=channels, classes=classes, seed=settings.random_seed, **options)


class Run:
    """One training, its folder, and its results so far."""

    def __init__(self, job: Job, data: Data, folder: RunFolder, trainer: Trainer, work: Workload) -> None:
        self._job, self._data, self._folder, self._trainer = job, data, folder, trainer
        self._work, self._ends, self._waited = work, list[float](), 0.0  # of this process' first steps
        self._settings, self._communicator, self._progress = job
        self._model = trainer.model
        self._predict = predictor(self._model, job.settings.eager, **job.settings.compile_options)
        self._history: list[dict[str, Any]] = []
        self._saved, self._where, self._seconds = "", str(folder), 0.0
        self._best_epoch, self._best_score = 0, -1.0
        self._best_state = self._model.state_dict()
        self.metrics = Metrics(self._settings.tensorboard)

    def resume(self, resumed: Resumed) -> None:
        """Go on from where a checkpoint was written."""
        state, best = resumed.latest.state, resumed.best
        trainer = self._trainer
        trainer.number, trainer.step = state["epoch"], state["step"]
        trainer.total = np.array(state["sums"])
        trainer.take_own_arrays(resumed.latest.arrays)
        if state.get("averaged"):  # the parameters of the best checkpoint are their average
            trainer.optimizer.exchange_average()
        self._history, self._seconds = list(state["history"]), state["seconds"]
        self._best_state = best.model
        self._saved = _place(state)
        if best.path.name == BEST:
            self._best_epoch = best.state["epoch"]
            self._best_score = overall(best.state["validation"])
        elif len(self._history) == self._settings.epochs:
            # The best checkpoint is lost, and no epoch is left to replace it: the last epoch does.
            self._best_epoch = trainer.number
            self._keep(best=True)
        self._progress.line(printable(f"going on with {resumed.folder} after {self._saved}"))

    def train(self) -> None:
        """Run all epochs that are left; after each, validate, and write checkpoints and history."""
        trainer, loader, epochs = self._trainer, self._trainer.loader, self._settings.epochs
        done = (trainer.number - 1) * loader.volumes + int(trainer.total[3])
        self._progress.start(epochs * loader.volumes, max(done, 0))
        first = len(self._history) + 1
        for epoch in range(first, epochs + 1):
            if self._waited_in_vain(epoch):
                break
            self._start = time.perf_counter() - self._seconds
            self._progress.epoch(epoch, epochs)
            result = trainer.epoch(epoch, self._pause, self._note)
            trainer.optimizer.exchange_average()
            try:
                validation = self._validate()
                best = overall(validation) > self._best_score
                if best:
                    self._best_epoch, self._best_score = epoch, overall(validation)
                    self._best_state = self._model.state_dict()
            except StoppedError as stopped:
                trainer.optimizer.exchange_average()
                self._seconds = time.perf_counter() - self._start
                self._keep()
                raise self._stopped(stopped.signal_number) from None
            trainer.optimizer.exchange_average()
            entry = {"epoch": epoch, **result._asdict(), "validation": validation}
            seconds = time.perf_counter() - self._start
            self._history.append(entry | {"lr": trainer.optimizer.lr, "seconds": seconds})
            self.metrics.add(trainer.optimizer.steps, self._history[-1])
            self._seconds = 0.0
            self._keep(best)
            self._data.warn(self._job)
            if epoch == first:
                self._progress.line(epoch_heads(validation))
            self._progress.line(epoch_row(epoch, result, validation, best))
        self._progress.finish()

    def _waited_in_vain(self, epoch: int) -> bool:
        """Whether the last epochs before this one, as many as --patience says, brought nothing better."""
        patience, waited = self._settings.patience, epoch - 1 - self._best_epoch
        in_vain = patience is not None and waited >= patience
        if in_vain:
            self._progress.line(f"stopped early: no better validation for {count(waited, 'epoch')}")
        return in_vain

    def _note(self, result: StepResult) -> None:
        figures = {"epoch": self._trainer.number, **result._asdict()}
        self.metrics.add(self._trainer.optimizer.steps, figures)
        if len(self._ends) <= _TIMED:
            # Files that stay in memory are waited for in the first steps alone.
            self._waited += 0.0 if estimate.missing_share(self._work) else result.wait
            self._ends.append(time.perf_counter() - self._waited)
            if len(self._ends) == _TIMED + 1:
                self._foretell(float(np.median(np.diff(self._ends))))

    def _foretell(self, step: float) -> None:
        """Print how long an epoch will last, and the whole training."""
        weights, steps = self._trainer.optimizer.flat_parameters.nbytes, self._trainer.loader.steps
        seconds = estimate.from_steps(self._work, step, weights)
        epoch = seconds.of_epoch(self._work, steps, self._communicator.size)
        whole = epoch * (self._settings.epochs - len(self._history))
        an_epoch, all_of_it = estimate.duration(epoch), estimate.duration(whole)
        self._progress.line(f"time     about {an_epoch} an epoch, {all_of_it} in all ({step:.2g} s a step)")

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
                with attempt(report := self._folder / "report.html"):
                    self._report(report, cases)
        with self._communicator.together():
            if self._communicator.rank == 0 and self._settings.export:
                from tinyunet.interop.formats import export

                export(checkpoint.load(self._folder / BEST), self._settings.export)
        self._progress.line(f"everything is in {printable(str(self._folder))}")

    def left(self) -> str:
        """Return, in words, how far the run is if it ends now."""
        if not self._saved:
            return "nothing was written"
        return f"{self._where}/{LATEST} holds {self._saved}; go on with --resume {self._where}"

    def _validate(self) -> Scores:
        """Score the validation cases as one: their voxels are counted together."""
        dataset, cases = self._data.dataset, self._score(self._data.validation)
        counts = np.sum([case.counts for case in cases], axis=0)
        return score_counts(counts, dataset.labels, dataset.regions)

    def _score(self, cases: list[Case], keep: int = 0) -> list[CaseResult]:
        """Score cases, unless a signal asks any rank to end meanwhile."""
        dataset, volumes, pauses = self._data.dataset, self._data.volumes, self._trainer.pauses
        how = keep, self._predict, lambda: pauses.asked
        found = score_cases(self._model, cases, volumes, dataset, self._communicator, *how)
        pause = pauses.agree()
        if pause.signal:
            raise self._stopped(pause.signal)
        return found

    def _pause(self, pause: Pause) -> None:
        """Write a checkpoint between two steps, and end if a signal asks for that."""
        self._seconds = time.perf_counter() - self._start
        self._keep()
        if pause.signal:
            raise self._stopped(pause.signal)

    def _stopped(self, number: int) -> StoppedError:
        return StoppedError(f"{ENDING[number]}; {self.left()}", number)

    def _keep(self, best: bool | None = None) -> None:
        """Write the latest checkpoint and the history, and the best checkpoint if this one is."""
        trainer, folder, state = self._trainer, self._folder, self._state()
        saved = self._model, trainer.optimizer, state, trainer.own_arrays()
        if best:
            trainer.optimizer.exchange_average()
            with self._communicator.together():
                if self._communicator.rank == 0:
                    averaged = {"averaged": True} if self._settings.ema else {}
                    checkpoint.save(folder / BEST, self._model, trainer.optimizer, state | averaged, saved[3])
            trainer.optimizer.exchange_average()
        with self._communicator.together():
            if self._communicator.rank == 0:
                checkpoint.save(folder / LATEST, *saved, previous=folder / PREVIOUS)
                write_json(folder / "history.json", self._history)
                write_json(folder / "config.json", configuration(self._settings))
                self.metrics.write((folder / LATEST).parent)
        if not self._saved:
            self._where = self._communicator.broadcast_object(str(folder))  # rank 0 has made it
        self._saved = _place(state)

    def _state(self) -> dict[str, Any]:
        """Return the content of a checkpoint besides arrays."""
        trainer, dataset = self._trainer, self._data.dataset
        return {
            "epoch": trainer.number,
            "step": trainer.step,
            "steps": trainer.loader.steps,
            "sums": trainer.total.tolist(),
            "seconds": self._seconds,
            "history": self._history,
            "validation": self._history[-1]["validation"] if self._history else None,
            "modalities": dataset.modalities,
            "file_modalities": dataset.file_modalities,
            "labels": dataset.labels,
            "label_values": dataset.label_values,
            "labels_source": dataset.source,
            "spacing": self._data.spacing,
            "cases": self._data.case_names(),
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
            for case, (name, scores, _, prediction) in zip(self._data.test, cases, strict=True):
                if prediction is not None:
                    image, labels, geometry = load_case(case)
                    note = f"mean Dice {overall(scores):.2f}"
                    pictured.append(PicturedCase(name, image, labels, prediction, note, geometry.spacing))
            dataset = self._data.dataset
            draw_predictions(predictions, pictured, dataset.modalities, dataset.labels)

    def _report(self, path: Path, cases: list[CaseResult]) -> None:
        """Write a page with the best and the worst of the test cases, curves and configuration."""
        from tinyunet.training.report import make_report

        order, shown = sorted(range(len(cases)), key=lambda index: -overall(cases[index].scores)), []
        for index in dict.fromkeys([order[0], order[-1]]):
            case, result = self._data.test[index], cases[index]
            if result.prediction is None:
                how = self._data.volumes, self._data.dataset, Communicator(), 1, self._predict
                (result,) = score_cases(self._model, [case], *how)
            which = "best" if index == order[0] else "worst"
            shown.append((case, result, f"the {which} of {count(len(cases), 'test case')}"))
        others = []
        if self._settings.real:
            scan = find_scan(self._settings.real, self._data)
            others.append(head := segment_scan(scan, self._data, self._model, self._predict))
            dice = ", ".join(f"{name} {value}" for name, value in head.scores[1:])
            self._progress.line(printable(f"{head.name}, {head.note}: {dice or 'no labels to compare with'}"))
        page = make_report(path.parent.name, shown, self._data.dataset, self._history, self._settings, others)
        page.write(path)


def _place(state: Mapping[str, Any]) -> str:
    """Return how far a training has come, in words."""
    place = f"epoch {state['epoch']}"
    return place if len(state["history"]) == state["epoch"] else f"{place}, step {state['step']}"
