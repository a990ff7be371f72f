"""The front of all tasks: sets that tasks name, and what is left when a task cannot be measured."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from moco_fast import distributed
from moco_fast.cli import main
from moco_fast.commands import evaluate as commands
from moco_fast.evaluation import registry, retrieval
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Measured, Outcome, RunSets, Task, Want
from moco_fast.evaluation.front import Plan, evaluate
from moco_fast.evaluation.inputs import Subject
from moco_fast.evaluation.labels import label_counts
from moco_fast.evaluation.live import measure, open_tasks
from moco_fast.evaluation.packed import open_data
from moco_fast.evaluation.registry import TASKS
from moco_fast.evaluation.result import Result, read_results, write_results
from moco_fast.evaluation.tasks.cluster import Cluster
from moco_fast.evaluation.tasks.domains import Domains
from moco_fast.evaluation.tasks.few_shot import FewShot
from moco_fast.evaluation.tasks.health import Health
from moco_fast.evaluation.tasks.knn import Knn
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.tasks.logistic import Logistic
from moco_fast.evaluation.tasks.retrieval import Retrieval
from moco_fast.evaluation.tasks.svm import Svm
from moco_fast.presets import PRESETS
from pipelines.world import World
from shards.ground.arrays import Records
from shards.sets import open_set
from shards.sets.local import LocalShardSet
from tests.moco_fast.test_eval import small_encoder, subject_of


@dataclass(frozen=True, kw_only=True)
class Sum(Task):
    """Add up what features are on average, set by set."""

    name: ClassVar[str] = "sum"

    more: tuple[str, ...] = ()
    split: str | None = None
    refuse: bool = False
    least: int = 0

    @classmethod
    def for_suite(cls, domains: Mapping[str, str]) -> Self:
        return cls(more=tuple(f"{name}={path}" for name, path in domains.items()))

    def more_sets(self) -> dict[str, str]:
        return dict(each.split("=", 1) for each in self.more)

    def with_sets(self, there: Collection[str]) -> Self:
        return replace(self, split="test" if "test" in there else "train") if self.split is None else self

    def why_not(self, known: Known) -> str | None:
        fewest = known.label_counts("train").min()
        return f"some class has {fewest} samples" if fewest < self.least else None

    def wants(self) -> tuple[Want, ...]:
        return tuple(Want(split=split) for split in ("train", self.split or "test", *self.more_sets()))

    def figures(self) -> dict[str, FigureInfo]:
        return {want.split: FigureInfo(title=want.split, caption="", unit="number") for want in self.wants()}

    def measure(self, inputs: Inputs) -> Outcome:
        if self.refuse:
            raise ValueError("the features are\nnot to its liking")
        found = {want.split: inputs.features(want).values.double().mean().item() for want in self.wants()}
        return Outcome(figures={split: Measured(value=value) for split, value in found.items()})


@dataclass(frozen=True, kw_only=True)
class Apart(Sum):
    """Fail on the second rank, while the first one goes to a collective."""

    name: ClassVar[str] = "apart"

    @property
    def shared(self) -> bool:
        return True

    def measure(self, inputs: Inputs) -> Outcome:
        if inputs.world.rank == 1:
            raise ValueError("sample 17 is damaged")
        distributed.leave_together()
        dist.all_reduce(torch.zeros(1))
        raise AssertionError("the second rank has left")


def run(subject: Subject, cache: Path, *tasks: Task, leave_out: Any = None) -> list[Result]:
    settled = [task.settled(None) for task in tasks]
    return evaluate(Plan(subject=subject, name="small", tasks=settled, cache=cache, leave_out=leave_out))


@pytest.fixture
def subject(packed_demo: Any) -> Subject:
    return subject_of(small_encoder(), packed_demo.train, packed_demo.val)


def test_labels_are_counted_class_by_class(packed_demo: Any) -> None:
    assert label_counts(open_set(packed_demo.train)).tolist() == [16] * 18
    nameless = open_set(packed_demo.val)
    nameless.manifest = replace(nameless.manifest, class_names=())
    assert label_counts(nameless).tolist() == [4] * 18


@pytest.mark.parametrize("task", [Knn(), Linear(), Logistic(), Svm()])
def test_one_class_is_nothing_to_tell_apart(task: Task, subject: Subject, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "only").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (50 * number, 0, 0)).save(tmp_path / name / "only" / f"{number}.png")
    sets = {name: open_data(str(tmp_path / name), cache=tmp_path / "cache") for name in ("train", "test")}
    with pytest.raises(ValueError, match="samples of one class, so there is nothing to tell apart"):
        run(replace(subject, sets=sets), tmp_path / "cache", task)


class Relabeled(LocalShardSet):
    """A set with other labels in this process."""

    labels_of: Callable[[np.ndarray], np.ndarray]

    def __reduce__(self) -> Any:
        return (LocalShardSet, (self.path, self.manifest))

    def index(self, shard: int) -> Records:
        records = np.array(super().index(shard))
        records["label"] = self.labels_of(records["label"])
        return records


def relabeled(path: Path, labels_of: Callable[[np.ndarray], np.ndarray]) -> Relabeled:
    found = Relabeled.open(path)
    found.labels_of = labels_of
    return found


def test_classes_that_cannot_be_learned_are_noted_once(packed_demo: Any, subject: Subject, tmp_path: Path) -> None:
    sets = {**subject.sets, "train": relabeled(packed_demo.train, lambda labels: np.where(labels < 4, -1, labels))}
    names = subject.sets["test"].class_names
    found = run(replace(subject, sets=sets), tmp_path, Knn(k=(5,)), Linear(epochs=1, batch_size=32), Retrieval())
    listed = f"{', '.join(names[:3])} and 1 more"
    note = (
        f"4 classes of {packed_demo.val} without a training sample ({listed}): 16 test samples of them count as wrong"
    )
    assert [result.notes for result in found[:2]] == [(note,), (note,)]
    assert not any("count as wrong" in note for note in found[2].notes)
    assert run(subject, tmp_path, Knn(k=(5,)))[0].notes == ()
    opened = open_tasks(
        (Knn(k=(5,)).settled(None),),
        PRESETS["demo"][1],
        RunSets(training=sets["train"], held_out=sets["test"]),
        without_labels=Health(),
    )
    assert opened.notes == (f"evaluation: {note}",)


def test_a_run_is_not_begun_with_a_task_that_its_sets_do_not_allow(packed_demo: Any) -> None:
    training = relabeled(packed_demo.train, lambda labels: np.full_like(labels, 3))
    for task, held_out, says in (
        (Knn(k=(5,)), open_set(packed_demo.val), "--eval.tasks knn cannot be measured: .* samples of one class"),
        (FewShot(split="test", shots=(50,)), open_set(packed_demo.val), "--eval.tasks few-shot cannot be measured"),
    ):
        sets = RunSets(training=training, held_out=held_out)
        with pytest.raises(ValueError, match=says):
            open_tasks((task.settled(None),), PRESETS["demo"][1], sets, without_labels=Health())


def test_a_task_that_fails_leaves_the_others_their_results(subject: Subject, tmp_path: Path) -> None:
    left: list[tuple[str, str]] = []

    def leave_out(task: Task, reason: str) -> None:
        left.append((task.name, reason))

    asked = (Knn(k=(5,)), Sum(refuse=True), Sum(least=17), Health())
    found = run(subject, tmp_path, *asked, leave_out=leave_out)
    assert [result.task for result in found] == ["knn", "health"]
    assert sorted(left) == [("sum", "some class has 16 samples"), ("sum", "the features are\nnot to its liking")]
    with pytest.raises(ValueError, match="not to its liking"):
        run(subject, tmp_path, *asked[:2])
    with pytest.raises(ValueError, match="sum cannot be measured: some class has 16"):
        run(subject, tmp_path, asked[2])


def test_sets_with_other_classes_leave_out_what_compares_them(
    subject: Subject, packed_demo: Any, tmp_path: Path
) -> None:
    other = open_set(packed_demo.val)
    names = tuple(f"other-{name}" for name in other.class_names)
    other.manifest = replace(other.manifest, class_names=names)
    left: list[str] = []
    mixed = replace(subject, sets={"train": subject.sets["train"], "test": other})
    found = run(mixed, tmp_path, Knn(k=(5,)), Health(), leave_out=lambda task, reason: left.append(reason))
    assert [result.task for result in found] == ["health"]
    assert "number their classes differently" in left[0]


def measured_on_this_rank(train: str, test: str, cache: str) -> tuple[list[Any], list[Any]]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    subject = subject_of(small_encoder(), train, test, batch_size=100, world=world)
    subject = replace(subject, sets={**subject.sets, "far": open_set(test)})
    retrieval._CHUNK_ELEMENTS = 288 * 20  # several parts for each rank
    left: list[Any] = []
    frozen = (
        FewShot(split="both", shots=(2,), queries=2, episodes=20),
        Retrieval(),
        Retrieval(database="test"),
        Cluster(num_init=1),
        Domains(domains=(f"far={test}",), epochs=2),
    )
    tasks = (Knn(k=(5,)), Apart(), Sum(refuse=True), *frozen, Health())
    asked = [task for task in tasks if world.world_size > 1 or task.name != "apart"]
    found = run(subject, Path(cache), *asked, leave_out=lambda task, reason: left.append((task.name, reason)))
    return [(each.task, {name: figure.value for name, figure in each.figures.items()}) for each in found], left


def test_two_ranks_leave_a_task_together_and_measure_the_others(
    run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path
) -> None:
    places = [str(packed_demo.train), str(packed_demo.val)]
    [alone] = run_ranks(measured_on_this_rank, *places, str(tmp_path / "one"), world_size=1)
    first, second = run_ranks(measured_on_this_rank, *places, str(tmp_path / "two"))
    assert first == second
    assert first[0] == alone[0]
    names = ["knn", "few-shot", "retrieval", "retrieval", "cluster", "domains", "health"]
    assert [name for name, _ in first[0]] == names
    assert first[1] == [("apart", "sample 17 is damaged"), ("sum", "the features are\nnot to its liking")]


def refused_on_this_rank(train: str, test: str, cache: str, protocol: str = "") -> str:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    encoder = small_encoder()
    subject = subject_of(encoder, train, test, batch_size=100, world=world)
    task = Linear(protocol="v1", batch_size=32, epochs=2).settled(None) if protocol else Health()
    seen: list[int] = []
    if world.rank == 1:

        def fail(_module: Any, inputs: Any) -> None:
            seen.append(len(inputs[0]))
            # In the second step of a protocol that takes nine in an epoch.
            if (seen[-1] == 16 and seen.count(16) == 2) or (not protocol and seen[-1] > 1):
                raise OSError("the disk is full")

        encoder.backbone.register_forward_pre_hook(fail)
    try:
        run(subject, Path(cache), task)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("protocol", [(), ("v1",)], ids=["cached", "live"])
def test_two_ranks_stop_together_where_one_cannot_make_features(
    run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path, protocol: tuple[str, ...]
) -> None:
    places = [str(packed_demo.train), str(packed_demo.val)]
    said = run_ranks(refused_on_this_rank, *places, str(tmp_path), *protocol)
    assert said == ["LeftTogetherError: the disk is full", "OSError: the disk is full"]
    if not protocol:
        assert not list(tmp_path.rglob("[!.]*.safetensors"))


def test_a_task_looks_at_as_many_sets_as_it_names(subject: Subject, packed_demo: Any, tmp_path: Path) -> None:
    task = Sum(more=(f"third={packed_demo.val}",)).with_sets({"train", "test"})
    sets = {**subject.sets, "third": open_set(packed_demo.val)}
    [result] = run(replace(subject, sets=sets), tmp_path, task)
    assert list(result.figures) == ["train", "test", "third"]
    assert result.figures["third"].value == result.figures["test"].value != result.figures["train"].value
    assert {split: of_set["num_samples"] for split, of_set in result.data.items()} == {
        "train": 288,
        "test": 72,
        "third": 72,
    }


def test_a_live_encoder_is_measured_as_a_cached_one(subject: Subject, tmp_path: Path) -> None:
    tasks = (FewShot(split="both", shots=(2,), queries=2, episodes=20), Retrieval(), Cluster(num_init=1))
    assert all(task.live for task in tasks)
    cached = run(subject, tmp_path, *tasks)
    live = measure(tasks, subject, at_most={})
    for result, outcome in zip(cached, live, strict=True):
        values = {name: figure.value for name, figure in result.figures.items()}
        assert values == pytest.approx({name: measured.value for name, measured in outcome.figures.items()})


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = {"health": TASKS["health"], "sum": f"{__name__}:Sum"}
    for module in (registry, commands):
        monkeypatch.setattr(module, "TASKS", tasks)
    return tasks


def suite(run: Path, data: Path, *words: str) -> int:
    return main(["eval", "suite", "--encoder", str(run), "--data", str(data), "--device", "cpu", *words])


def test_the_suite_names_the_domains_of_its_folder_to_tasks_and_leaves_out_what_fails(
    two_tasks: dict[str, str],
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = tmp_path / "data", tmp_path / "out.json"
    (data / "domains").mkdir(parents=True)
    for name, folder in (("train", packed_demo.train), ("val", packed_demo.val), ("domains/far", packed_demo.val)):
        (data / name).symlink_to(folder)
    assert suite(finished_run, data, "--out", str(out)) == 0
    health, of_sum = read_results(out)
    assert (health.task, list(of_sum.figures), "written to" in capsys.readouterr().err) == (
        "health",
        ["train", "test", "far"],
        True,
    )
    monkeypatch.setattr(Sum, "for_suite", classmethod(lambda cls, domains: Sum(refuse=True)))
    assert suite(finished_run, data, "--out", str(out)) == 0
    assert f"left out: sum of {finished_run}" in (said := capsys.readouterr().err)
    assert "the features are not to its liking" in said
    assert [result.task for result in read_results(out)] == ["health"]
    out.unlink()
    assert suite(finished_run, data, "--out", str(out), "--tasks", "health", "sum") == 2
    assert not out.exists()
    del two_tasks["health"]
    assert suite(finished_run, data, "--out", str(out)) == 2
    assert "every task was left out" in capsys.readouterr().err


def test_a_suite_that_was_ended_goes_on_with_what_it_had(
    two_tasks: dict[str, str],
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out, partial = tmp_path / "data", tmp_path / "out.json", tmp_path / "out.partial.json"
    data.mkdir()
    for name, folder in (("train", packed_demo.train), ("val", packed_demo.val)):
        (data / name).symlink_to(folder)

    def end(*_: Any) -> Outcome:
        raise RuntimeError("killed")

    def go_on(*words: str) -> tuple[list[Result], str]:
        capsys.readouterr()
        assert suite(finished_run, data, "--out", str(out), *words) == 0
        assert not partial.exists()
        return read_results(out), capsys.readouterr().err

    expected, said = go_on("--beside", "untrained")
    assert "earlier start" not in said
    with monkeypatch.context() as patched:
        patched.setattr(Sum, "measure", end)
        with pytest.raises(RuntimeError, match="killed"):
            suite(finished_run, data, "--out", str(out), "--beside", "untrained")
    assert [each.task for each in read_results(partial)] == ["health"]
    # A file of results that is whole stays what it was until another one is.
    assert read_results(out) == expected
    with monkeypatch.context() as patched:
        patched.setattr(Health, "measure", end)
        with pytest.raises(RuntimeError, match="killed"):
            suite(finished_run, data, "--out", str(out), "--beside", "untrained")
    assert [each.task for each in read_results(partial)] == ["health", "sum"]
    found, said = go_on("--beside", "untrained")
    assert said.count("measured by an earlier start of this command") == 2
    assert [(each.task, each.figures, each.encoder) for each in found] == [
        (each.task, each.figures, each.encoder) for each in expected
    ]
    # What was asked otherwise is measured.
    write_results(partial, expected)
    assert "earlier start" not in go_on("--crop", "0.5")[1]
    partial.write_text("{")
    assert "earlier start" not in go_on()[1]


@pytest.mark.usefixtures("two_tasks")
@pytest.mark.parametrize("name", ["train", "far"])
def test_a_name_is_that_of_one_set(name: str, finished_run: Path, packed_demo: Any, tmp_path: Path) -> None:
    from moco_fast.commands.evaluating import EvalOptions, measure_all

    options = EvalOptions(encoder=str(finished_run), device="cpu")
    tasks = [Sum(more=(f"far={packed_demo.val}",)), Sum(more=(f"{name}={packed_demo.train}",))]
    with pytest.raises(ValueError, match=f"{name} is the name of another set already"):
        measure_all(options, tasks, {"train": None, "test": None})


def test_options_of_a_task_s_own_name_sets_and_pairs(
    finished_run: Path, packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, pairs = tmp_path / "out.json", tmp_path / "pairs.jsonl"
    shard = open_set(packed_demo.val).manifest.shards[0]
    names = [
        "/".join(Path(line).parts[-2:])
        for line in (packed_demo.val / f"{shard.stem}.sources.txt").read_text().splitlines()
    ]
    pairs.write_text(json.dumps({"query": names[0], "relevant": names[1:3]}) + "\n")

    def asked(*words: str) -> Result:
        assert main(["eval", *words, "--encoder", str(finished_run), "--device", "cpu", "--out", str(out)]) == 0
        [result] = read_results(out)
        return result

    far = f"far={packed_demo.val}"
    domains = asked("domains", "--domains", far, f"near={packed_demo.train}", "--epochs", "2")
    assert list(domains.figures) == ["mean", "in_domain", "top1_far", "top1_near"]
    assert domains.figures["top1_far"].value == domains.figures["in_domain"].value
    assert domains.data["near"]["num_samples"] == 288
    of_pairs = asked("retrieval", "--pairs", str(pairs), "--database", "test")
    assert (of_pairs.protocol, of_pairs.facts) == ("pairs", {"num_queries": 1, "num_database": 72})
    words = ["--split", "test", "--shots", "1", "--queries", "3", "--episodes", "10"]
    few = asked("few-shot", "--test", str(packed_demo.val), *words)
    assert list(few.data) == ["test"]
    assert few.headline.interval is not None
