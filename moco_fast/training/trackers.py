"""Trackers of a run, by way of accelerate: TensorBoard, Weights & Biases, MLflow, trackio.

Each has a thread of its own, so that a server that is slow or gone costs no step and never ends the run. What continues
a tracker's own run after a resume is in the run's folder:

    RUN/trackers.json    by tracker: wandb's id, mlflow's run_id, trackio's name
"""

import importlib.util
import json
import queue
import sys
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillWaitingError
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from moco_fast.config import Config, flatten, to_dict
from shards.ground.errors import InUseError
from shards.ground.files import write_whole
from shards.ground.locks import locked

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["TRACKERS", "About", "Trackers", "add_rows", "check_installed", "open_trackers"]

_OPENING_S = 120.0  # until a tracker that does not open is given up
_CLOSING_S = 30.0  # for what is still to be sent at the end: launchers kill 30 s after SIGTERM
_MAX_WAITING = 1000  # lines; what comes while so many wait is left out

Known = dict[str, str]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class About:
    """What trackers are told of a run, or of another training."""

    folder: Path
    project: str
    name: str
    tags: tuple[str, ...]
    options: Mapping[str, Any]
    """The configuration, by option."""
    step: int = 0
    """That this start continues from."""
    option: str = "--log.trackers"
    """That names its trackers."""
    kept_in: str = "metrics.jsonl"
    """File that has every line, whatever trackers take; empty: there is none."""

    @classmethod
    def run(cls, config: Config, folder: Path, *, step: int = 0) -> Self:
        """Describe a run by its configuration and its folder."""
        options = {name: each for name, each in flatten(to_dict(config)).items() if each is not None}
        return cls(
            folder=folder,
            project=config.log.project,
            name=config.log.name or folder.resolve().name,
            tags=config.log.tags,
            options={name: each if isinstance(each, int | float) else str(each) for name, each in options.items()},
            step=step,
        )


class TrackerKind(ABC):
    """One tracker: how its run is opened or continued, and what accelerate's class for it lacks."""

    install: ClassVar[str]
    """What to give to `pip install`."""
    when_offline: ClassVar[str] = ""
    """How to use it without its server."""

    @abstractmethod
    def build(self, about: About, known: Known) -> "GeneralTracker":
        """Build accelerate's tracker, not started; what identifies its run is added to `known`."""

    def started(self, tracker: Any, about: About, known: Known) -> None:  # noqa: B027 - most need nothing
        """Do what is to be done once it is started."""

    def log(self, tracker: "GeneralTracker", values: Mapping[str, float], step: int) -> None:
        """Log values of a step."""
        tracker.log(dict(values), step=step)

    @abstractmethod
    def show(self, tracker: Any, name: str, pixels: Pixels, step: int) -> None:
        """Show a picture (H, W, 3)."""

    @abstractmethod
    def add(self, about: About, known: Known, rows: "Iterable[tuple[int, Mapping[str, float]]]") -> None:
        """Add rows of values by step to a run that is over."""

    adds_beside_training: ClassVar[bool] = False
    """Whether `add` may be called while the run goes on."""


class TensorBoard(TrackerKind):
    """TensorBoard: event files in RUN/tensorboard."""

    install: ClassVar[str] = "tensorboard"
    adds_beside_training: ClassVar[bool] = True

    def build(self, about: About, known: Known) -> "GeneralTracker":
        """Drop what was written after the step that the run continues from."""
        from accelerate.tracking import TensorBoardTracker

        del known
        return TensorBoardTracker("tensorboard", logging_dir=about.folder, purge_step=about.step + 1)

    def started(self, tracker: Any, about: About, known: Known) -> None:
        """Write name, tags and configuration as a text: accelerate's way would make one more run of them."""
        del known
        rows = {"name": about.name, "tags": ", ".join(about.tags), **about.options}
        table = "\n".join(["| option | value |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in rows)])
        tracker.log({"configuration": table}, step=about.step)

    def show(self, tracker: Any, name: str, pixels: Pixels, step: int) -> None:
        """Show."""
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")

    def add(self, about: About, known: Known, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Write into a folder of its own: a run that goes on writes to its own file."""
        from torch.utils.tensorboard.writer import SummaryWriter

        del known
        with SummaryWriter(str(about.folder / "tensorboard" / "eval")) as board:
            for step, values in rows:
                for name, value in values.items():
                    board.add_scalar(name, value, step)


class Wandb(TrackerKind):
    """Weights & Biases; its files are in RUN/wandb."""

    install: ClassVar[str] = "'moco-fast[wandb]'"
    when_offline: ClassVar[str] = "WANDB_MODE=offline keeps it on this machine"

    def build(self, about: About, known: Known) -> "GeneralTracker":
        """Begin or continue the run with our id."""
        from accelerate.tracking import WandBTracker

        known.setdefault("id", uuid.uuid4().hex[:8])
        return WandBTracker(
            about.project,
            id=known["id"],
            resume="allow",
            name=about.name,
            tags=list(about.tags),
            dir=str(about.folder),
        )

    def started(self, tracker: Any, about: About, known: Known) -> None:
        """Draw everything over our steps: wandb's own only rise, but a run that resumes does some steps again."""
        del known
        tracker.store_init_configuration(dict(about.options))
        run = tracker.tracker
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def log(self, tracker: "GeneralTracker", values: Mapping[str, float], step: int) -> None:
        """Log values beside their step."""
        tracker.log({**values, "step": step})

    def show(self, tracker: Any, name: str, pixels: Pixels, step: int) -> None:
        """Show."""
        del step
        tracker.log_images({name: [pixels]})

    def add(self, about: About, known: Known, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Continue the run for a moment; two processes cannot write to one at a time."""
        import wandb

        with wandb.init(project=about.project, id=known["id"], resume="allow", dir=str(about.folder)) as run:
            for step, values in rows:
                run.log({**values, "step": step})


class Mlflow(TrackerKind):
    """MLflow, where MLFLOW_TRACKING_URI says; unset: mlflow.db in the working directory."""

    install: ClassVar[str] = "'moco-fast[mlflow]'"
    when_offline: ClassVar[str] = "MLFLOW_TRACKING_URI=sqlite:///mlflow.db keeps it on this machine"
    adds_beside_training: ClassVar[bool] = True

    def build(self, about: About, known: Known) -> "GeneralTracker":
        """Begin a run, or continue that of `run_id`."""
        from accelerate.tracking import MLflowTracker

        tags = dict.fromkeys(about.tags, "true")
        return MLflowTracker(about.project, run_id=known.get("run_id"), run_name=about.name, tags=tags)

    def started(self, tracker: Any, about: About, known: Known) -> None:
        """Note the run's id; parameters cannot change afterwards, so those of the first start stay."""
        if "run_id" not in known:
            known["run_id"] = str(tracker.tracker.info.run_id)
            tracker.store_init_configuration(dict(about.options))

    def show(self, tracker: Any, name: str, pixels: Pixels, step: int) -> None:
        """Keep the picture as an artifact."""
        import mlflow

        del tracker, step
        mlflow.log_image(pixels, f"{name}.png")

    def add(self, about: About, known: Known, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Add by the run's id, which leaves its status as it is."""
        import mlflow

        del about
        client = mlflow.MlflowClient()
        for step, values in rows:
            for name, value in values.items():
                client.log_metric(known["run_id"], name, value, step=step)


class Trackio(TrackerKind):
    """trackio, in TRACKIO_DIR; it has no tags, so they are part of the configuration."""

    install: ClassVar[str] = "'moco-fast[trackio]'"

    def build(self, about: About, known: Known) -> "GeneralTracker":
        """Begin or continue the run of our name, which must be its own: trackio tells runs apart by it."""
        from accelerate.tracking import TrackioTracker

        known.setdefault("name", f"{about.name}-{uuid.uuid4().hex[:6]}")
        config = {**about.options, "tags": ", ".join(about.tags)}
        return TrackioTracker(
            about.project,
            name=known["name"],
            resume="allow",
            config=config,
            auto_log_cpu=False,
            auto_log_gpu=False,
            embed=False,
        )

    def show(self, tracker: Any, name: str, pixels: Pixels, step: int) -> None:
        """Show."""
        import trackio

        run = tracker.tracker
        run.log({name: trackio.Image(pixels)}, step=step)

    def add(self, about: About, known: Known, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Continue the run for a moment."""
        import trackio

        options: dict[str, Any] = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        config = {**about.options, "tags": ", ".join(about.tags)}
        run = trackio.init(about.project, name=known["name"], resume="must", config=config, **options)
        for step, values in rows:
            run.log(dict(values), step=step)
        run.finish()


TRACKERS: dict[str, type[TrackerKind]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""By the names of --log.trackers, and of --trackers of `moco-fast transfer`."""


def check_installed(names: Sequence[str], *, option: str = "--log.trackers") -> None:
    """Refuse trackers that are not installed. Raises ValueError: says what to install."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{option} {name}: {name} is not installed, so nothing would be tracked: pip install "
                f"{TRACKERS[name].install}, or leave it out"
            )


@dataclass(kw_only=True)
class _Thread:
    """Thread that a tracker lives in; its calls are made one after the other, in the order in which they came."""

    name: str
    kind: TrackerKind
    say: Callable[[str], None]
    kept_in: str
    tracker: "GeneralTracker | None" = None
    num_lost: int = 0
    _has_warned: bool = False
    _jobs: "queue.Queue[Callable[[], object] | None]" = field(default_factory=lambda: queue.Queue(_MAX_WAITING))
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # A daemon: a server that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def open(self, about: About, known: Known) -> None:
        """Start the tracker, and wait until it is. Raises what went wrong."""
        started: Future[None] = Future()

        def start() -> None:
            try:
                # trackio prints, in color, wherever it runs.
                with redirect_stdout(sys.stderr if sys.stderr.isatty() else _Nowhere()):
                    tracker = self.kind.build(about, known)
                    tracker.start()
                    self.kind.started(tracker, about, known)
                self.tracker = tracker
                started.set_result(None)
            except BaseException as error:
                started.set_exception(error)

        self._jobs.put(start)
        started.result(timeout=_OPENING_S)

    def send(self, job: "Callable[[GeneralTracker], object]") -> None:
        """Have something done by the tracker, soon; if it fails, that is said once."""

        def call() -> None:
            assert self.tracker is not None
            try:
                job(self.tracker)
            except BaseException as error:
                self._lose(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

        try:
            self._jobs.put_nowait(call)
        except queue.Full:
            self._lose(f"it is slower than the run, {_MAX_WAITING} lines are waiting")

    def close(self) -> None:
        """Send what is waiting, and finish, within a limit."""
        if self.tracker is not None:
            self.send(lambda tracker: tracker.finish())
        try:
            self._jobs.put(None, timeout=_CLOSING_S)
            self._thread.join(_CLOSING_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._lose(f"it has not finished after {_CLOSING_S:.0f} s")
        elif self.num_lost > 1:
            has_all = f"; {self.kept_in} has them all" if self.kept_in else ""
            self.say(f"{self.name} did not take {self.num_lost} lines{has_all}")

    def _lose(self, reason: str) -> None:
        self.num_lost += 1
        if not self._has_warned:
            self._has_warned = True
            has_all = f", and {self.kept_in} has every line" if self.kept_in else ""
            self.say(f"warning: {self.name} fails ({reason}); the run goes on{has_all}")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


class Trackers:
    """The open trackers of a run."""

    def __init__(self, threads: Sequence[_Thread] = ()):
        self._threads = threads

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics, which has `step`, to all."""
        values = {name if "/" in name else f"train/{name}": value for name, value in line.items() if name != "step"}
        for thread in self._threads:
            thread.send(lambda tracker, kind=thread.kind: kind.log(tracker, values, line["step"]))

    def show(self, name: str, pixels: Pixels, *, step: int) -> None:
        """Send a picture (H, W, 3) to all."""
        for thread in self._threads:
            thread.send(lambda tracker, kind=thread.kind: kind.show(tracker, name, pixels, step))

    def close(self) -> None:
        """Finish all, within a limit."""
        for thread in self._threads:
            thread.close()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._threads)


def open_trackers(names: Sequence[str], about: About, *, say: Callable[[str], None]) -> Trackers:
    """Open trackers, or continue their runs.

    Args:
        names: of TRACKERS.
        about: the run.
        say: prints a line.

    Raises:
        ValueError: one cannot be opened that this run has never had; one that it had is left out, with a warning.
    """
    path = about.folder / "trackers.json"
    all_known: dict[str, Known] = _read(path)
    opened: list[_Thread] = []
    for name in names:
        thread = _Thread(name=name, kind=TRACKERS[name](), say=say, kept_in=about.kept_in)
        known = dict(all_known.get(name, {}))
        try:
            thread.open(about, known)
        except (Exception, StillWaitingError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if name not in all_known:
                Trackers(opened).close()
                offline = thread.kind.when_offline
                way_out = f"{offline}, or leave it out" if offline else "leave it out"
                raise ValueError(f"{about.option} {name} cannot be opened ({reason}): {way_out}") from error
            say(f"warning: {name} cannot be opened ({reason}); the run goes on without it")
            continue
        opened.append(thread)
        all_known[name] = known
    if opened:
        write_whole(path, json.dumps(all_known, indent=2) + "\n", durable=False)
    return Trackers(opened)


def add_rows(about: About, rows: Sequence[tuple[int, Mapping[str, float]]], *, say: Callable[[str], None]) -> None:
    """Add rows of an evaluation, (step, values by name), to the trackers that a run had.

    Args:
        about: the run.
        rows: what to add.
        say: prints a line: a tracker that fails, or that takes nothing while the run goes on.
    """
    folder = about.folder
    known = _read(folder / "trackers.json")
    if (folder / "tensorboard").is_dir():
        known.setdefault("tensorboard", {})
    for name in known:
        kind = TRACKERS[name]()
        if not kind.adds_beside_training and _is_running(folder):
            say(f"note: {name} takes nothing from here while the run goes on: evaluate again when it is over")
            continue
        try:
            with redirect_stdout(_Nowhere()):
                kind.add(about, known[name], rows)
        except Exception as error:
            say(f"warning: {name} did not take the figures ({' '.join(str(error).split())[:300]})")


def _read(path: Path) -> dict[str, Known]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _is_running(folder: Path) -> bool:
    try:
        with locked(folder / "lock", holder=str(folder)):
            return False
    except InUseError:
        return True
