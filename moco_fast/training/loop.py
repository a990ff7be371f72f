"""Training loop of a run: load, step, log, evaluate, save."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from moco_fast import checkpoint, distributed
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import Config, to_dict
from moco_fast.encoders.initial import InitialWeights, initial_weights
from moco_fast.evaluation.base import Evaluation
from moco_fast.evaluation.registry import open_evaluation
from moco_fast.interrupt import StoppedError
from moco_fast.methods.batchnorm import average_batch_statistics
from moco_fast.optimizers.optim import load_optimizer_tensors, optimizer_tensors
from moco_fast.recovery import candidates
from moco_fast.saving.reading import load_together
from moco_fast.saving.saver import Need, Saver
from moco_fast.stop import StopSignal
from moco_fast.training import console, headspace
from moco_fast.training.alarms import Alarms, key_lag
from moco_fast.training.best import Best, best_of
from moco_fast.training.branching import find_branch
from moco_fast.training.build import Parts, build, open_sets
from moco_fast.training.capture import RecentSteps, write_capture
from moco_fast.training.continuing import identity_of
from moco_fast.training.flops import count_flops
from moco_fast.training.folder import RunFolder, open_folder
from moco_fast.training.gauges import Gauges, PendingGauges
from moco_fast.training.headspace import Headspace, PendingHeadspace
from moco_fast.training.heartbeat import RunLostError
from moco_fast.training.job_status import open_job_status
from moco_fast.training.launch import launch_facts
from moco_fast.training.metrics import Average, MetricsFile, Pending
from moco_fast.training.runtime import Runtime, start
from moco_fast.training.schedule import describe_lr, lr_at
from moco_fast.training.startup import StartUp
from moco_fast.training.supply import Supply
from moco_fast.training.trackers import About, Trackers, open_trackers
from pipelines.config import tars_to_stream
from pipelines.plan.order import choose_lanes

__all__ = ["begin", "restore", "train"]

T = TypeVar("T")

_LINES_PER_LAG = 10
_NOT_A_NUMBER = (
    "the loss is no longer a number around step {step}, so the run stops; its checkpoints were written before that. "
    "Lower --optim.lr, or try --run.precision fp32"
)
_CAPTURED = "; `moco-fast replay {path}` repeats the step and names the first value that is not finite"


@dataclass(kw_only=True)
class Progress:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done."""
    time_s: float = 0.0
    """Seconds spent on those steps, over all starts of the run."""
    averages: Average
    """Values watched since the last line of metrics."""
    interval_s: float = 0.0
    """Seconds spent since the last line of metrics; `data_wait_s` of them waiting for data."""
    data_wait_s: float = 0.0
    interval_steps: int = 0
    pending: tuple[dict[str, Any], tuple[Pending | PendingGauges | PendingHeadspace, ...]] | None = None
    """Line of metrics whose values are still being copied from the device."""
    headspace: PendingHeadspace | None = None
    """Measurement since the last line of metrics."""
    is_evaluation_due: bool = True
    """Whether that of this step is still to be done: before the first step, and where a signal came first."""
    best: Best | None = None
    """Of the figure that --checkpoint.keep-best names."""
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """What the sets hold (`identity_of`)."""
    init_from: dict[str, Any] | None = None
    """Of the weights that the run started from, if they were not random (`InitialWeights.facts`)."""


def train(config: Config, *, start_up: StartUp | None = None) -> int:
    """Start or continue the configured run; this process is one of its ranks.

    Args:
        config: of the run.
        start_up: clock of the command; None: the start is this call.

    Returns:
        the exit code: 0 when the run is finished, 128 + signal when a signal stopped it (and it was saved).

    Raises:
        ValueError: the configuration cannot work; nothing has been trained.
        FloatingPointError: the loss is not finite.
    """
    start_up = start_up or StartUp()
    runtime = start(config.run)
    folder = None
    try:
        # Before the folder is touched, so that what is refused leaves no trace.
        sets = open_sets(config)
        evaluation = open_evaluation(config, sets)
        best = best_of(config.checkpoint.keep_best, evaluation)
        initial = _open_initial(config, runtime)
        if runtime.rank == 0 and evaluation is not None:
            console.print_notes(evaluation.notes)
        data = identity_of(sets)
        folder = _open_folder(config, runtime, data)
        config = _with_lanes(config, runtime, folder)
        parts = build(config, runtime, sets.training, initial=initial and initial.tensors)
        progress = begin(config, runtime, best, data, initial)
        return _run(config, runtime, folder, parts, evaluation, progress, start_up)
    except BaseException as error:
        if folder is not None:
            folder.note_failure(error)
        raise
    finally:
        if folder is not None:
            folder.close()
        runtime.close()


def _open_folder(config: Config, runtime: Runtime, data: Mapping[str, Mapping[str, Any]]) -> RunFolder | None:
    """Open the run's folder on the first rank; if that fails, every rank raises the same error."""

    def opened() -> RunFolder:
        branch = find_branch(config, data)
        folder = open_folder(config, data, branch)
        if branch is not None:
            console.print_notes([branch.line])
        checkpoint.sweep(_checkpoints(config))
        console.print_notes(folder.found.warnings)
        return folder

    return _on_first_rank(runtime, opened)


def _with_lanes(config: Config, runtime: Runtime, folder: RunFolder | None) -> Config:
    """Settle how many lanes a run has: as many as it began with, on whatever nodes it goes on."""
    if config.data.lanes is not None or tars_to_stream(config.data):
        return config
    newest = folder and folder.found.newest
    begun = checkpoint.read_config(newest).data.lanes if newest else None
    lanes = runtime.tell_all(begun) or choose_lanes(config.data.batch_size, runtime.world.num_nodes)
    return replace(config, data=replace(config.data, lanes=lanes))


def _open_initial(config: Config, runtime: Runtime) -> InitialWeights | None:
    """Load on the first rank what a new run starts from; a run that continues has its own weights."""

    def opened() -> InitialWeights | None:
        return None if candidates(_checkpoints(config)) else initial_weights(config)

    return _on_first_rank(runtime, opened)


def _on_first_rank(runtime: Runtime, make: Callable[[], T]) -> T | None:
    """Call `make` on the first rank alone; if it raises a ValueError, every rank does."""
    made, refused = None, None
    if runtime.rank == 0:
        try:
            made = make()
        except ValueError as error:
            refused = str(error)
    if refused := runtime.tell_all(refused):
        raise ValueError(refused)
    return made


def begin(
    config: Config,
    runtime: Runtime,
    best: Best | None,
    data: Mapping[str, Mapping[str, Any]],
    initial: InitialWeights | None,
) -> Progress:
    """Return the progress of a run that has not begun; `restore` brings it to where the run is."""
    # In float16 a gradient may overflow: its step is skipped, and only the run's scale is lowered.
    may_overflow = ("grad_norm",) if runtime.precision == "fp16" else ()
    watched = ("loss", *config.method.watched, "grad_norm")
    if config.eval.online_probe:
        # A batch without labels has no accuracy.
        watched, may_overflow = (*watched, "probe/top1"), (*may_overflow, "probe/top1")
    averages = Average(watched, runtime.device, may_overflow=may_overflow)
    return Progress(averages=averages, best=best, data=data, init_from=initial and initial.facts)


def _run(
    config: Config,
    runtime: Runtime,
    folder: RunFolder | None,
    parts: Parts,
    evaluation: Evaluation | None,
    progress: Progress,
    start_up: StartUp,
) -> int:
    try:
        restore(config, runtime, parts, progress, newest=folder and folder.found.newest)
        metrics = None
        hosts = runtime.gather(platform.node())
        trackers = _on_first_rank(runtime, lambda: _open_trackers(config, progress))
        start_up.lap("sets and model")
        if folder is not None:
            environment = console.environment(runtime, parts) | {"hosts": hosts, "launch": launch_facts()}
            # Before anything else is written: until then the files tell when the last start was alive.
            folder.note_start(progress.step, progress.time_s, environment)
            folder.write_config(config)
            facts = {"learning_rate": describe_lr(config), "init_from": progress.init_from}
            folder.write_environment(environment | facts)
            folder.note_changes(progress.step)
            folder.begin(progress.step)
            console.print_opening(config, runtime, parts, progress.step, init_from=progress.init_from)
            if folder.changes is not None:
                console.print_changes(folder.changes)
            console.say(start_up.describe("ready"))
            job_status = open_job_status(os.environ, num_steps=parts.num_steps)
            trackers = trackers or Trackers()
            metrics = MetricsFile(folder.path, step=progress.step, trackers=trackers, job_status=job_status)
        run = RunLoop(config, runtime, parts, progress, metrics, evaluation, folder, start_up)
        try:
            stopped_by = run.catch_up() or run.loop()
        finally:
            run.close()
    finally:
        parts.loader.close()
    if folder is not None:
        outcome = "stopped" if stopped_by else "finished"
        found = {} if progress.best is None else {"best": progress.best.state_dict()}
        folder.end(outcome, step=progress.step, num_steps=parts.num_steps, time_s=progress.time_s, **found)
        if folder.mirror is not None:
            folder.mirror.finish()
        console.print_closing(config, outcome, progress.step, parts.num_steps, best=found.get("best"))
    return 128 + stopped_by if stopped_by else 0


def _open_trackers(config: Config, progress: Progress) -> Trackers:
    about = About.run(config, Path(config.run.out), step=progress.step)
    return open_trackers(config.log.trackers, about, say=console.say)


def restore(config: Config, runtime: Runtime, parts: Parts, progress: Progress, *, newest: Path | None) -> None:
    """Load a checkpoint of the run's folder; collective.

    Args:
        config: of the run.
        runtime: of this process.
        parts: that get their state.
        progress: that goes on.
        newest: newest whole checkpoint, as the first rank found it; None: there is none, or this is another rank.

    Raises:
        ValueError: some rank cannot read it.
    """
    name = runtime.tell_all(newest and newest.name)
    if name is None:
        return
    path = _checkpoints(config) / name
    with distributed.leaving_together():
        if not path.exists():
            raise ValueError(
                f"rank {runtime.rank} does not find {path}, which the first rank finds: --run.out must be a folder "
                "that all nodes share"
            )
    saved = load_together(path, is_first_of_node=runtime.local_rank == 0)
    for name, module in parts.modules.items():
        module.load_state_dict(checkpoint.part(saved.model, name))
    of_probe = checkpoint.part(saved.optimizer, "probe")
    of_query = {name: each for name, each in saved.optimizer.items() if not name.startswith("probe.")}
    load_optimizer_tensors(parts.optimizer, parts.query, of_query)
    if parts.probe is not None:
        load_optimizer_tensors(parts.probe.optimizer, parts.probe, of_probe)
    parts.loader.load_state_dict(_position(saved.numbers, progress.data))
    runtime.load_scaler_state(saved.numbers["scaler"])
    progress.step = saved.step
    progress.time_s = saved.numbers["time_s"]
    progress.averages.sums.copy_(saved.model["watched.sums"])
    progress.init_from = saved.numbers.get("init_from")
    progress.is_evaluation_due = saved.numbers.get("is_evaluation_due", False)
    if progress.best is not None:
        progress.best.load_state_dict(saved.numbers.get("best", {}))
    checkpoint.set_generator_states(saved.rng, runtime.rank, runtime.device)


def _position(numbers: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, int]:
    """Return where the loader goes on; samples that are not those of before begin with an epoch of their own."""
    before, now = (found.get("data.shards") for found in (numbers.get("data", {}), data))
    if before is None or now is None or before["digest"] == now["digest"]:
        return numbers["loader"]
    return {"epoch": numbers["loader"]["epoch"] + 1, "step": 0}


class RunLoop:
    """Training loop with its periodic logging, evaluation and saving. `metrics` and `folder` are of the first rank."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        parts: Parts,
        progress: Progress,
        metrics: MetricsFile | None,
        evaluation: Evaluation | None,
        folder: RunFolder | None,
        start_up: StartUp,
    ):
        self._start_up: StartUp | None = start_up
        self.config, self.runtime, self.parts, self.progress = config, runtime, parts, progress
        self._metrics = metrics
        self._evaluation = evaluation
        self._heartbeat = None if folder is None else folder.heartbeat
        self._stop = StopSignal(timeout_s=config.run.timeout_s, interrupts=True)
        if self._stop.note is not None and runtime.rank == 0:
            console.print_notes([self._stop.note])
        self._saver = Saver(
            _checkpoints(config),
            config.checkpoint,
            runtime.device,
            timeout_s=config.run.timeout_s,
            before=metrics and metrics.sync,
            mirror=folder and folder.mirror,
            say=console.say,
        )
        self._bar = console.ProgressLine(parts.num_steps, progress.step, shown=metrics is not None)
        self._supply = Supply(parts.loader)
        self._gauges = Gauges(runtime.device, num_steps=parts.num_steps, flops=count_flops(config, runtime, parts))
        self._alarms = Alarms(
            Path(config.run.out), config, num_samples=parts.loader.num_samples, num_steps=parts.num_steps
        )
        self._recent = RecentSteps(runtime, may_overflow=runtime.precision == "fp16")
        self._headspace = Headspace(
            config.log.headspace, config.optim.accumulate, self._gauges.clock, self._supply, runtime.device
        )

    def catch_up(self) -> int:
        """Do the evaluation that is due before the next step; return the signal that interrupted it, or 0."""
        if not self.progress.is_evaluation_due:
            return 0
        # Worker processes take seconds to import torch: they do it beside the evaluation.
        self.parts.loader.start()
        is_best, stopped_by = self.evaluate()
        if self._start_up is not None and self._evaluation is not None:
            self._start_up.lap("evaluation")
        if is_best or stopped_by:
            self.save()
        if stopped_by:
            self._saver.finish()
        return stopped_by

    def loop(self) -> int:
        """Train until the last step or a signal; return the signal, or 0.

        Raises:
            RuntimeError: any other failure; a ValueError raised after the start is our fault, not the user's.
            FloatingPointError: the loss is not finite.
            RunLostError: the run's folder is gone.
        """
        try:
            return self._loop()
        except ValueError as error:
            raise RuntimeError(f"training failed after step {self.progress.step}: {error}") from error
        except FloatingPointError as error:
            out = Path(self.config.run.out)
            if self._saver.writing is not None:
                self._saver.writing.exception()  # What is being written may be the checkpoint to go on from.
            path = write_capture(out, self._recent, self.runtime, self.config, self.progress.data)
            raise FloatingPointError(f"{error}{'' if path is None else _CAPTURED.format(path=path)}") from None

    def _loop(self) -> int:
        config, progress, num_steps = self.config, self.progress, self.parts.num_steps
        for said in self._alarms.at_start() if self._metrics is not None else ():
            console.say(said)
        clock = time.perf_counter()
        while progress.step < num_steps:
            self._gauges.clock.begin()
            self._recent.begin(self._supply.state_dict())
            step_batches = list(islice(self._supply, config.optim.accumulate))
            progress.data_wait_s += time.perf_counter() - clock
            if progress.step == 0 and self._metrics is not None:
                self._metrics.show(step_batches[0].views, step=0)
            lr = lr_at(progress.step, num_steps, config.optim)
            scheduled = config.method.scheduled(progress.step, num_steps)
            watched = self.parts.train_step(step_batches, lr=lr, scheduled=scheduled)
            progress.averages.add(watched)
            self._gauges.clock.end()
            progress.step += 1
            self._recent.end(progress.step, step_batches, watched)
            progress.interval_steps += 1
            now = time.perf_counter()
            progress.interval_s += now - clock
            clock = now
            self._note_first_step()
            self._bar.step()
            if progress.step % config.log.every_steps == 0:
                self._log({"lr": lr, **scheduled})
            last = progress.step == num_steps
            stopped_by, is_asked = (0, False) if last else self._poll()
            # Before saving: a run that is killed in between evaluates again after resuming, so no result is missing.
            is_best = False
            progress.is_evaluation_due = last or progress.step % config.eval.every_steps == 0
            if progress.is_evaluation_due and not stopped_by:
                is_best, stopped_by = self.evaluate()
            if stopped_by or last or is_best or is_asked or self._saver.is_due(progress.step):
                self.save()
            if stopped_by or last:
                self._saver.finish()
            if stopped_by:
                return stopped_by
            progress.headspace = self._headspace.after(progress.step) or progress.headspace
            clock = time.perf_counter()  # The time since the step was not spent on training.
        return 0

    def _note_first_step(self) -> None:
        """Say once how long it took until the first step, which compiles, was done or given to the GPU."""
        if self._start_up is not None and self._metrics is not None:
            self._start_up.lap("first step")
            console.say(self._start_up.describe("first step"))
        self._start_up = None

    def _poll(self) -> tuple[int, bool]:
        """Return the signal that all ranks stop for, or 0, and whether one asked for a checkpoint.

        Raises:
            OSError, FloatingPointError: a checkpoint could not be written.
            RunLostError: the run's folder is gone.
        """
        if self._heartbeat is not None:
            self._heartbeat.step = self.progress.step
            self._stop.ask(Need.LEAVE if self._heartbeat.is_lost else self._saver.needs())
        stopped_by = self._stop.poll()
        need = self._stop.granted()
        if need == Need.LEAVE:
            raise RunLostError(self.config.run.out)
        if need == Need.END:
            self._saver.end()
        return stopped_by, need == Need.SAVE

    def evaluate(self) -> tuple[bool, int]:
        """Do the configured evaluation and write its figures, unless a signal interrupts it.

        Returns:
            whether its checkpoint is the best one so far, and the signal, or 0.
        """
        progress = self.progress
        if self._evaluation is None:
            progress.is_evaluation_due = False
            return False, 0
        average_batch_statistics(self.parts.query)
        try:
            with self._stop.reaching_all():
                figures = self._evaluation.figures(
                    self.parts.query, device=self.runtime.device, world=self.runtime.world, probe=self.parts.probe
                )
        except StoppedError as stopped:
            return False, stopped.number
        progress.is_evaluation_due = False
        self._write(figures)
        if self._metrics is not None:
            console.say(f"step {progress.step}: {self._evaluation.line(figures)}")
        self._bar.unpause()
        best = progress.best
        return best is not None and best.takes(figures, step=progress.step), 0

    def save(self) -> None:
        """Save all ranks' state; the first rank writes it, while training goes on.

        Raises:
            FloatingPointError: the loss is not finite.
            RunLostError: the run's folder is gone.
        """
        self._settle()
        is_lost = False
        if self._heartbeat is not None:
            self._heartbeat.step = self.progress.step
            is_lost = self._heartbeat.look()
        if self.runtime.tell_all(is_lost):
            raise RunLostError(self.config.run.out)
        average_batch_statistics(self.parts.query)
        # The checkpoint has one sum for all ranks, so values that they have not yet combined are averaged.
        sums = self.progress.averages.sums.clone()
        distributed.average_([sums])
        best = self.progress.best and self.progress.best.step
        self._saver.save(None if self._metrics is None else self._state(sums), best=best)

    def _state(self, sums: Tensor) -> Checkpoint:
        config, runtime, parts, progress = self.config, self.runtime, self.parts, self.progress
        model = {f"{name}.{k}": v for name, module in parts.modules.items() for k, v in module.state_dict().items()}
        numbers = {
            "loader": self._supply.state_dict(),
            "scaler": runtime.scaler_state(),
            "time_s": progress.time_s + progress.interval_s,
            "best": {} if progress.best is None else progress.best.state_dict(),
            "data": progress.data,
            "init_from": progress.init_from,
            "is_evaluation_due": progress.is_evaluation_due,
        }
        return Checkpoint(
            step=progress.step,
            config=to_dict(config),
            model=model | {"watched.sums": sums},
            optimizer=_optimizer_tensors(parts),
            rng={},
            numbers=numbers,
        )

    def close(self) -> None:
        """Close the progress bar and the metrics, and restore the signal handlers."""
        self._bar.close()
        self._saver.close()
        self._stop.close()
        if self._metrics is not None:
            self._metrics.close()

    def _log(self, scheduled: dict[str, float]) -> None:
        """Write the last interval's line, and start copying this one's values; `scheduled` values are added."""
        self._settle()
        progress = self.progress
        progress.time_s += progress.interval_s
        samples = progress.interval_steps * self.config.data.batch_size * self.config.optim.accumulate
        line = {
            **self._where(),
            **scheduled,
            "samples_per_s": samples / progress.interval_s,
            "data_wait_share": progress.data_wait_s / progress.interval_s,
            "num_replaced": self.parts.loader.num_replaced,
        }
        gauged = (self._gauges.take(progress.step), *filter(None, [progress.headspace, self._key_lag()]))
        progress.pending = (line, (progress.averages.take(), *gauged))
        progress.headspace = None
        progress.data_wait_s = progress.interval_s = 0.0
        progress.interval_steps = 0

    def _key_lag(self) -> Pending | None:
        key = self.parts.objective.modules.get("key")
        # Where a step is short, all weights take a part of it: not for every line.
        is_due = self.progress.step // self.config.log.every_steps % _LINES_PER_LAG == 0
        if key is None or self._metrics is None or not is_due:
            return None
        return Pending(("key_lag",), key_lag(self.parts.query, key))

    def _settle(self) -> None:
        """Write the line whose values have been copied.

        Raises:
            FloatingPointError: the loss is not finite; checkpoints hold the run's state from before.
        """
        if self.progress.pending is None:
            return
        line, pending = self.progress.pending
        self.progress.pending = None
        for each in pending:
            line |= each.wait()
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(_NOT_A_NUMBER.format(step=line["step"]))
        self._recent.settle(line["step"])
        # Every step of the interval was skipped, or no sample in it had a label.
        for name in [name for name in ("grad_norm", "probe/top1") if math.isnan(line.get(name, 0))]:
            del line[name]
        self._bar.interval(line)
        if self._metrics is not None:
            self._metrics.write(line)
            for said in (*filter(None, [headspace.describe(line)]), *self._alarms.look(line)):
                console.say(f"step {line['step']:,}: {said}")

    def _write(self, numbers: dict[str, float]) -> None:
        self._settle()
        if self._metrics is not None:
            self._metrics.write(self._where() | numbers)

    def _where(self) -> dict[str, float]:
        num_batches = self.progress.step * self.config.optim.accumulate
        return {
            "step": self.progress.step,
            "epoch": num_batches / len(self.parts.loader),
            "samples": num_batches * self.config.data.batch_size,
            "time_s": self.progress.time_s,
        }


def _checkpoints(config: Config) -> Path:
    return Path(config.run.out) / "checkpoints"


def _optimizer_tensors(parts: Parts) -> dict[str, Tensor]:
    of_probe = {} if parts.probe is None else optimizer_tensors(parts.probe.optimizer, parts.probe)
    of_query = optimizer_tensors(parts.optimizer, parts.query)
    return of_query | {f"probe.{name}": each for name, each in of_probe.items()}
