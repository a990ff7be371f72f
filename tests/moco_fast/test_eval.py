"""`moco-fast eval`, from an encoder and sets of shards to a result."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import moco_fast
from moco_fast import distributed
from moco_fast.checkpoint import load_encoder
from moco_fast.cli import main
from moco_fast.config import Config, ModelConfig
from moco_fast.encoders.encoder import Encoder, build_encoder
from moco_fast.encoders.formats.base import digest_of
from moco_fast.evaluation.base import Split, Task, Want
from moco_fast.evaluation.cache import FeatureCache
from moco_fast.evaluation.features import extract
from moco_fast.evaluation.front import Plan, evaluate
from moco_fast.evaluation.inputs import CachedFeatures, Subject
from moco_fast.evaluation.live import measure
from moco_fast.evaluation.result import Result, read_results
from moco_fast.evaluation.tasks.finetune import Finetune
from moco_fast.evaluation.tasks.health import Health
from moco_fast.evaluation.tasks.knn import Knn
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.tasks.logistic import Logistic
from moco_fast.evaluation.untrained import untrained_twin
from moco_fast.methods.momentum_contrast import MomentumContrast
from pipelines.config import DataConfig
from pipelines.world import World
from shards.sets import ShardSet, open_set
from tests.warm import WarmPython

CPU = torch.device("cpu")
LAYERS = ("backbone", "head", "stage2")


def small_encoder(seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ModelConfig(encoder="resnet18_quarter")
        return build_encoder(model, MomentumContrast(dim=8), image_size=32, crop=1.0).eval()


def subject_of(
    encoder: Encoder,
    train: Path | str,
    test: Path | str,
    *,
    batch_size: int = 50,
    world: World = World(),
    **changes: Any,
) -> Subject:
    subject = Subject(
        encoder=encoder,
        digest=digest_of(encoder),
        sets={"train": open_set(str(train)), "test": open_set(str(test))},
        size=32,
        crop=1.0,
        data=DataConfig(shards="", batch_size=batch_size, backend="dali", num_threads=1),
        device=CPU,
        world=world,
    )
    return replace(subject, **changes)


@pytest.fixture
def encoder() -> Encoder:
    return small_encoder()


@pytest.fixture
def subject(encoder: Encoder, packed_demo: Any) -> Subject:
    return subject_of(encoder, packed_demo.train, packed_demo.val)


class Count:
    """Images that an encoder's backbone has seen, without those of a probe for shapes."""

    def __init__(self, encoder: Encoder) -> None:
        self.images = 0
        encoder.backbone.register_forward_pre_hook(self._count)

    def _count(self, _module: Any, inputs: Any) -> None:
        self.images += len(inputs[0]) if len(inputs[0]) > 1 else 0


def run(subject: Subject, cache: Path, *tasks: Task, seeds: int = 1) -> list[Result]:
    settled = [task.settled(None) for task in tasks]
    return evaluate(Plan(subject=subject, name="small", tasks=settled, seeds=seeds, cache=cache))


QUICK = (Knn(k=(5,)), Logistic(num_c=3), Linear(batch_size=32, epochs=1, layer=("backbone", "head")))


def test_the_encoder_runs_once_for_all_tasks_and_not_at_all_a_second_time(
    encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    count = Count(encoder)
    first = run(subject, tmp_path, *QUICK)
    assert count.images == 288 + 72
    again = run(subject, tmp_path, *QUICK)
    other = run(subject, tmp_path, Knn(k=(1,), layer="head", max_bank=50))
    assert count.images == 288 + 72
    assert [result.figures for result in first] == [result.figures for result in again]
    assert other[0].facts == {"num_bank": 50, "num_queries": 72}


def test_cached_features_are_those_of_the_live_encoder(subject: Subject, tmp_path: Path) -> None:
    source = CachedFeatures(subject=subject, cache=FeatureCache(tmp_path))
    wants = [Want(split="test", layer=layer) for layer in LAYERS]
    source.prepare(wants)
    for want in wants:
        with subject.loader("test", np.arange(72)) as loader:
            expected = extract(subject.encoder, loader, device=CPU, layer=want.layer, l2_normalize=False)
        found = source.get(want)
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.index, expected.index)
    [cached, *_] = run(subject, tmp_path, Knn(k=(5,)))
    [live] = measure([Knn(k=(5,)).settled(None)], subject, at_most={})
    assert cached.headline.value == live.figures["top1"].value


@pytest.mark.parametrize(
    "change",
    [
        {"size": 24},
        {"crop": 0.5},
        {"precision": "bf16"},
        {"digest": "another"},
        {"data": DataConfig(shards="", backend="torch", num_threads=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_features_makes_the_encoder_run_again(
    change: dict[str, Any], encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    run(subject, tmp_path, Knn(k=(5,)))
    count = Count(encoder)
    run(replace(subject, **change), tmp_path, Knn(k=(5,)))
    assert count.images == 288 + 72


def test_only_the_samples_that_are_wanted_are_looked_at(encoder: Encoder, subject: Subject, tmp_path: Path) -> None:
    count = Count(encoder)
    run(subject, tmp_path, Knn(k=(5,), max_bank=30))
    assert count.images == 30 + 72
    run(subject, tmp_path, Logistic(num_c=2))
    assert count.images == 30 + 72 + 288


def test_the_oldest_features_make_room(subject: Subject, tmp_path: Path) -> None:
    run(subject, tmp_path, Knn(k=(5,), layer="head"))
    old = {path: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert len(old) == 2
    for age, path in enumerate(sorted(old)):
        os.utime(path, (1000 + age, 1000 + age))
    limit = (sum(old.values()) + 72 * (4 * 8 + 16) + 1000) / 2**30
    cache = FeatureCache(tmp_path, limit_gib=limit)
    CachedFeatures(subject=subject, cache=cache).prepare([Want(split="test", layer="stage2")])
    left = set(tmp_path.rglob("*.safetensors"))
    assert min(old) not in left
    assert len(left) == 2


def test_what_an_evaluation_uses_stays_however_little_room_there_is(
    encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    [expected] = run(subject, tmp_path / "wide", Knn(k=(5,)))
    count = Count(encoder)
    plan = Plan(
        subject=subject, name="small", tasks=[Knn(k=(5,)).settled(None)], cache=tmp_path / "narrow", cache_gib=1e-9
    )
    [found] = evaluate(plan)
    assert found.figures == expected.figures
    assert count.images == 288 + 72


def test_features_that_another_process_removes_are_used_to_the_end(subject: Subject, tmp_path: Path) -> None:
    source = CachedFeatures(subject=subject, cache=FeatureCache(tmp_path))
    wants = [Want(split="test"), Want(split="train", at_most=50)]
    source.prepare(wants)
    before = [source.get(want).values.clone() for want in wants]
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert all(torch.equal(source.get(want).values, values) for want, values in zip(wants, before, strict=True))


def killed_while_writing(train: str, test: str, cache: str) -> None:
    encoder = small_encoder()
    seen = 0

    def die(_module: Any, inputs: Any) -> None:
        nonlocal seen
        seen += len(inputs[0])
        if seen > 100:
            os.kill(os.getpid(), signal.SIGKILL)

    encoder.backbone.register_forward_pre_hook(die)
    run(subject_of(encoder, train, test), Path(cache), Knn(k=(5,)))


@pytest.mark.faults
def test_a_kill_while_features_are_written_leaves_none(
    encoder: Encoder, packed_demo: Any, tmp_path: Path, warm_python: WarmPython
) -> None:
    words = [str(packed_demo.train), str(packed_demo.val), str(tmp_path)]
    program = f"from tests.moco_fast.test_eval import killed_while_writing; killed_while_writing(*{words!r})"
    killed = warm_python.run("-c", program)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [partial] = tmp_path.rglob("*.partial")
    assert partial.stat().st_size > 288 * 128 * 4
    assert not list(tmp_path.rglob("[!.]*.safetensors"))
    count = Count(encoder)
    run(subject_of(encoder, packed_demo.train, packed_demo.val), tmp_path, Knn(k=(5,)))
    assert count.images == 288 + 72
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("times", [torch.inf, 1e25])
def test_features_that_are_not_finite_or_huge_are_refused_and_not_kept(
    subject: Subject, tmp_path: Path, times: float
) -> None:
    subject.encoder.backbone.register_forward_hook(lambda _module, _inputs, features: times * features)
    with pytest.raises(ValueError, match="features are not finite, or larger than 1e18"):
        run(subject, tmp_path, Knn(k=(5,)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_an_encoder_that_has_diverged_is_not_trained_further(
    encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    for task in (Knn(k=(5,)), Finetune()):
        with pytest.raises(ValueError, match="the weights of small are not finite: it has diverged"):
            run(subject, tmp_path, task)


def run_on_this_rank(train: str, test: str, cache: str) -> list[dict[str, Any]]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    subject = subject_of(small_encoder(), train, test, batch_size=100, world=world)
    tasks = (*QUICK, Linear(protocol="v1", lr=(0.5,), batch_size=48, epochs=2))
    return [
        {name: figure.value for name, figure in result.figures.items()} for result in run(subject, Path(cache), *tasks)
    ]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path) -> None:
    places = [str(packed_demo.train), str(packed_demo.val)]
    [alone] = run_ranks(run_on_this_rank, *places, str(tmp_path / "one"), world_size=1)
    first, second = run_ranks(run_on_this_rank, *places, str(tmp_path / "two"))
    assert first == second == alone
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")} for name in ("one", "two")
    )
    assert one == two


def test_the_published_protocol_leaves_the_backbone_alone(encoder: Encoder, subject: Subject, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    count = Count(encoder)
    [result] = run(subject, tmp_path, Linear(protocol="v1", lr=(0.1, 1.0), batch_size=32, epochs=2))
    assert count.images == 2 * 288 + 288 + 72  # augmented twice; then both sets, for a choice is to be made
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    assert result.facts == {"num_train": 288 - 36, "num_test": 72}
    assert result.chosen[0]["lr"] in (0.1, 1.0)
    assert result.headline.value > 2 / 18


def test_a_linear_training_that_was_finished_is_not_done_again(
    encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    task = Linear(protocol="v1", lr=(0.1,), batch_size=32, epochs=1)
    [first] = run(subject, tmp_path, task)
    count = Count(encoder)
    [both] = run(subject, tmp_path, task, seeds=2)  # as after a kill in the second seed's training
    assert count.images == 288
    assert both.headline.by_seed[0] == first.headline.value
    assert first.facts == both.facts
    assert run(subject, tmp_path, task)[0].figures == first.figures


def test_a_backbone_that_changes_is_noticed(encoder: Encoder, subject: Subject, tmp_path: Path) -> None:
    def drift(_module: Any, _inputs: Any) -> None:
        with torch.no_grad():
            encoder.backbone.get_parameter("layer1.0.conv1.weight").mul_(1.0001)

    encoder.backbone.register_forward_pre_hook(drift)
    with pytest.raises(RuntimeError, match="changed the backbone"):
        run(subject, tmp_path, Linear(protocol="v1", batch_size=32, epochs=1))


def test_augmented_linear_is_what_a_plain_loop_of_torch_trains(subject: Subject, tmp_path: Path) -> None:
    from pipelines.config import ViewConfig, ViewSpec
    from pipelines.loader import open_loader

    task = Linear(protocol="v3", lr=(0.3,), batch_size=32, epochs=2)
    [result] = run(subject, tmp_path, task)
    classifier = torch.nn.Linear(128, 18)
    with torch.no_grad():
        classifier.weight.copy_(0.01 * torch.randn(18, 128, generator=torch.Generator().manual_seed(0)))
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.3, momentum=0.9)
    views = (ViewSpec(size=32, recipe=ViewConfig(crop_scale=(0.08, 1.0), jitter_p=0, grayscale_p=0, blur_p=0)),)
    train = subject.sets["train"]
    with open_loader(replace(subject.data, batch_size=32), views, shards=train) as loader:
        for epoch in range(2):
            optimizer.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + np.cos(np.pi * epoch / 2))
            for batch in loader:
                with torch.no_grad():
                    features = subject.encoder.features(batch.views[0], "backbone")
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(classifier(features), batch.label).backward()
                optimizer.step()
    with subject.loader("test", np.arange(72)) as loader:
        test = extract(subject.encoder, loader, device=CPU, l2_normalize=False)
    expected = (classifier(test.values).argmax(dim=1) == test.labels).double().mean().item()
    assert result.headline.value == expected


def test_seeds_give_a_mean_and_an_interval(subject: Subject, tmp_path: Path) -> None:
    knn, linear = run(subject, tmp_path, Knn(k=(5,)), Linear(batch_size=32, epochs=1), seeds=3)
    assert (knn.seeds, linear.seeds) == ((0,), (0, 1, 2))
    figure = linear.headline
    assert len(set(figure.by_seed)) > 1
    assert figure.value == pytest.approx(np.mean(figure.by_seed))
    half = 4.302653 * np.std(figure.by_seed, ddof=1) / np.sqrt(3)  # Student's t with two degrees of freedom
    assert figure.interval == pytest.approx((figure.value - half, figure.value + half), rel=1e-5)
    assert len(linear.chosen) == 3
    assert knn.headline.interval_of == "72 test samples (Wilson)"


def test_sets_that_do_not_fit_are_refused_before_the_encoder_runs(
    encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    count = Count(encoder)
    alone = replace(subject, sets={"train": subject.sets["train"]})
    with pytest.raises(ValueError, match="knn cannot be measured: it needs a test set"):
        run(alone, tmp_path, Knn(k=(5,)))
    flat = Encoder(torch.nn.Flatten(), torch.nn.Identity(), feature_dim=3072, dim=3072, image_size=32).eval()
    with pytest.raises(ValueError, match="not a ResNet"):
        run(replace(subject, encoder=flat), tmp_path, Linear(layer=("stage2",)))
    with pytest.raises(ValueError, match="--layer patches gives a vector for each place"):
        run(subject, tmp_path, Knn(k=(5,), layer="patches"))
    assert count.images == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_needs_no_set_that_it_does_not_look_at(
    split: Split, encoder: Encoder, subject: Subject, tmp_path: Path
) -> None:
    count = Count(encoder)
    task = Health(split=cast("Any", split))
    [result] = run(replace(subject, sets={split: subject.sets[split]}), tmp_path, task)
    assert list(result.data) == [split]
    assert result.facts["num_samples"] == count.images == subject.sets[split].num_samples
    [beside_another] = run(subject, tmp_path, task)
    assert (beside_another.figures, beside_another.data) == (result.figures, result.data)


# The command and the API -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moco-fast" / "features"


def eval_command(*words: str) -> int:
    return main(["eval", *words, "--device", "cpu"])


def knn_by_hand(encoder: Encoder, config: Config, packed_demo: Any) -> float:
    sets: dict[Split, ShardSet] = {"train": open_set(packed_demo.train), "test": open_set(packed_demo.val)}
    subject = Subject(encoder=encoder, sets=sets, size=32, crop=config.eval.crop, data=config.data, device=CPU)
    [outcome] = measure([Knn.for_run(config)], subject, at_most={})
    return outcome.figures["top1"].value


def test_eval_knn_measures_a_run_as_the_run_says_and_what_it_is_compared_with(
    finished_run: Path, packed_demo: Any, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "knn.json"
    words = ["knn", "--encoder", str(finished_run), "--beside", "untrained", "pixels", "--out", str(out)]
    assert eval_command(*words) == 0
    trained, untrained, pixels = read_results(out)
    config, encoder = load_encoder(finished_run)
    for result, measured in ((trained, encoder), (untrained, untrained_twin(config))):
        assert result.figures["top1"].value == knn_by_hand(measured, config, packed_demo)
        assert (result.settings["k"][0], result.settings["layer"]) == (5, "head")
    assert [each.encoder["name"] for each in (untrained, pixels)] == ["untrained", "pixels"]
    assert len({each.encoder["digest"] for each in (trained, untrained, pixels)}) == 3
    printed = capsys.readouterr()
    assert str(trained.headline) in printed.out
    assert str(pixels.headline) in printed.out
    assert "kNN top-1, k = 20" in printed.out
    assert len(list(cache.rglob("*.safetensors"))) == 6


def test_a_result_says_everything_that_repeats_it(
    finished_run: Path, packed_demo: Any, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["linear", "--encoder", str(finished_run), "--epochs", "1", "--batch-size", "32", "--seeds", "2"]
    assert eval_command(*words, "--out", "-") == 0
    [values] = json.loads(capsys.readouterr().out)["results"]
    assert values["settings"]["epochs"] == 1
    assert values["settings"]["lr"] == [pytest.approx(rate / 8) for rate in Linear().settled(None).lr or ()]
    assert (values["protocol"], values["seeds"], values["precision"]) == ("fast", [0, 1], "fp32")
    assert values["data"]["train"]["where"] == str(packed_demo.train)
    assert values["data"]["test"]["num_samples"] == 72
    assert values["view"] == {"size": 32, "crop": 1.0, "backend": "auto"}
    assert {"torch", "python", "moco-fast", "scikit-learn"} <= values["versions"].keys()
    assert values["encoder"]["digest"] == digest_of(load_encoder(finished_run)[1])
    assert len(values["chosen"]) == 2
    assert Result.from_dict(values).figures["top1"].interval_of == "2 seeds (Student's t)"


def test_figures_of_a_run_are_rows_of_its_tensorboard(own_run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = own_run
    words = [
        "eval",
        "knn",
        "--encoder",
        str(run),
        "--beside",
        "untrained",
        "pixels",
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert main(words) == 0
    assert not (run / "tensorboard").exists()  # this run does not write there
    (run / "tensorboard").mkdir()
    assert main(words) == 0
    of_run, untrained, _ = json.loads((run / "evaluations" / "knn.json").read_text())["results"]
    events = EventAccumulator(str(run / "tensorboard" / "eval"))
    events.Reload()
    rows = {event.step: event.value for event in events.Scalars("knn/top1")}
    step = int(max(path.name for path in (run / "checkpoints").glob("step-*")).removeprefix("step-"))
    wanted = {step: of_run["figures"]["top1"]["value"], 0: untrained["figures"]["top1"]["value"]}
    assert rows == pytest.approx(wanted)


def test_the_suite_leaves_slow_tasks_to_those_who_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def refuse(_options: Any, tasks: Any, *_: Any, **__: Any) -> Any:
        asked.append([task.name for task in tasks])
        raise ValueError("not measured")

    monkeypatch.setattr("moco_fast.commands.evaluate.measure_all", refuse)
    for words in ([], ["--tasks", "robustness", "knn"]):
        assert main(["eval", "suite", "--encoder", "nowhere", *words]) == 2
    assert "knn" in asked[0]
    assert not {"finetune", "label-noise", "robustness"} & set(asked[0])
    assert asked[1] == ["robustness", "knn"]


def test_the_suite_measures_what_the_data_allows_into_the_run_s_folder(
    own_run: Path, packed_demo: Any, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["suite", "--encoder", str(own_run), "--tasks", "knn", "logistic"]
    assert eval_command(*words, "--data", str(packed_demo.train.parent)) == 0
    path = own_run / "evaluations" / "suite.json"
    assert [result.task for result in read_results(path)] == ["knn", "logistic"]
    printed = capsys.readouterr()
    assert "logistic top-1" in printed.out
    assert f"written to {path}" in printed.err


def test_a_file_of_weights_is_evaluated_like_a_run(
    finished_run: Path, packed_demo: Any, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moco_fast.export(finished_run, "timm", tmp_path / "encoder")
    words = ["knn", "--encoder", str(tmp_path / "encoder"), "--test", str(packed_demo.val), "--layer", "backbone"]
    assert eval_command(*words) == 2
    assert "has no training shards of its own: name some with --train" in capsys.readouterr().err
    assert eval_command(*words, "--train", str(packed_demo.train), "--out", str(tmp_path / "file.json")) == 0
    of_file = moco_fast.evaluate("knn", tmp_path / "encoder", train=str(packed_demo.train), test=str(packed_demo.val))
    of_run = moco_fast.evaluate(
        "knn", finished_run, settings={"layer": "backbone", "k": (200,), "temperature": (0.07,)}
    )
    [written] = read_results(tmp_path / "file.json")
    assert written.figures == of_file.figures
    assert of_file.headline.value == of_run.headline.value


def test_the_api_refuses_what_is_no_option(finished_run: Path) -> None:
    with pytest.raises(ValueError, match="there is no option 'fly'"):
        moco_fast.evaluate("knn", finished_run, settings={"fly": 1})
    with pytest.raises(ValueError, match="'k' is 5, but must be"):
        moco_fast.evaluate("knn", finished_run, settings={"k": 5})
    with pytest.raises(ValueError, match="there is no option 'bank'"):
        moco_fast.evaluate("knn", finished_run, options={"bank": "shards"})
    with pytest.raises(ValueError, match="--seeds is 0"):
        moco_fast.evaluate("linear", finished_run, options={"seeds": 0})


def test_what_a_run_said_of_its_gpu_is_not_asked_of_a_cpu(
    finished_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moco_fast.encoders import open as opening

    def opened_with(*arguments: Any, plain: Any = opening.open_encoder, **options: Any) -> Any:
        opened = plain(*arguments, **options)
        data = replace(opened.config.data, hw_decoder_load=0.5, read_threads=2, on_bad_sample="skip")
        run = replace(opened.config.run, precision="tf32")
        return replace(opened, config=replace(opened.config, data=data, run=run))

    monkeypatch.setattr(opening, "open_encoder", opened_with)
    settings = {"protocol": "v1", "epochs": 1, "batch_size": 32}
    result = moco_fast.evaluate("linear", finished_run, settings=settings, options={"device": "cpu"})
    assert (result.precision, result.device) == ("fp32", "cpu")
