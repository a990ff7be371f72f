"""The promises that every method keeps, and that a new one is asked for."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import moco_fast
from moco_fast.commandline import main
from moco_fast.config import Config, ModelConfig, changes, differences, from_dict, to_dict, validate
from moco_fast.encoders.encoder import build_encoder
from moco_fast.meaning import RENAMED
from moco_fast.methods.base import Chart, Method, Pass, Setting
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.registry import METHODS, method_class
from moco_fast.methods.shuffle import Together
from moco_fast.presets import PRESETS
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.training.loop import train
from pipelines.config import DataConfig


def small(name: str) -> Method:
    cls = method_class(name)
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{option: 4 for option in ("dim", "mlp_dim", "predictor_dim") if option in names})


def test_the_registry_holds_each_method_under_its_name():
    assert {name: method_class(name).name for name in METHODS} == {name: name for name in METHODS}
    assert {preset.method.name for _, preset in PRESETS.values()} == METHODS.keys(), "every method has a preset"
    with pytest.raises(ValueError, match=r"there is no method 'frobnicate': this version has momentum-contrast"):
        method_class("frobnicate")


def test_only_presets_and_the_authors_format_know_a_method_by_name():
    modules = {where.partition(":")[0] for where in METHODS.values()}
    names = {f'"{name}"' for name in METHODS.keys() - PRESETS.keys()}
    # The format of the authors' checkpoints has a head of one of their methods.
    allowed = ("methods/*", "presets.py", "encoders/formats/authors.py")
    for path in Path(moco_fast.__file__).parent.rglob("*.py"):
        if not any(path.match(pattern) for pattern in allowed):
            text = path.read_text()
            assert not [known for known in modules | names if known in text], path


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_keeps_its_method_through_json(name):
    config = Config(data=DataConfig(shards="s"), method=small(name))
    data = to_dict(config)
    assert data["method"]["name"] == name
    assert from_dict(data) == config
    data["method"]["frobnicate"] = 1
    with pytest.raises(ValueError, match="has no field frobnicate"):
        from_dict(data)


@pytest.mark.parametrize("name", METHODS)
def test_the_head_gives_what_the_method_says(name):
    method = small(name)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter"), method)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    predicted, projected = encoder(images, with_projection=True)
    assert predicted.shape == projected.shape == (2, method.dim)
    assert (predicted is projected) == (encoder.predictor is None)
    assert set(method.constant_lr) <= {part for part, _ in encoder.named_children()}


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_is_what_the_method_says_of_it(name):
    method = small(name)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter"), method)
    cpu = torch.device("cpu")
    setting = Setting(query=query, policy=Together(), num_samples=9, seed=0, device=cpu, available_bytes=1 << 30)
    objective = method.build(setting)
    assert objective.num_passes == method.backward_passes
    assert "query" not in objective.modules, "a checkpoint keeps the query encoder under this name"
    objective.advance(method.scheduled(0, 10))
    views = tuple(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8) for _ in range(method.num_views))

    class Encode:
        def __call__(self, images):
            return query(images)

        def with_projection(self, images):
            return query(images, with_projection=True)

    num_passes = 0
    for made in objective.passes(Encode(), views, torch.arange(4)):
        num_passes += 1
        assert tuple(made.watched) == method.watched
        assert all(value.ndim == 0 and not value.requires_grad for value in made.watched.values())
        assert made.loss.ndim == 0
        assert made.loss.requires_grad
        made.afterwards()
    assert num_passes == objective.num_passes


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (MomentumContrast(queue_size=0), "queue-size"),
        (MomentumContrast(temperature=0.0), "temperature"),
        (MomentumContrast(momentum=1.5), "momentum"),
        (MomentumContrastV3(mlp_dim=0), "mlp-dim"),
        (MomentumContrastV3(temperature=0.0), "temperature"),
        (MomentumContrastV3(momentum=-0.1), "momentum"),
    ],
)
def test_options_that_cannot_work_are_named(method, named):
    with pytest.raises(ValueError, match=named):
        method.validate()


def test_momentum_rises_to_1_by_half_a_cosine():
    method = MomentumContrast(momentum=0.9, momentum_schedule="cosine")
    found = [method.scheduled(step, 10)["momentum"] for step in (0, 5, 10)]
    assert found == pytest.approx([0.9, 0.95, 1.0])
    assert MomentumContrast(momentum=0.9).scheduled(5, 10) == {"momentum": 0.9}


def test_v3_is_the_authors_by_default():
    # main_moco.py of facebookresearch/moco-v3, options and the scale of the loss
    method = MomentumContrastV3()
    assert (method.dim, method.mlp_dim, method.momentum, method.temperature) == (256, 4096, 0.99, 1.0)
    assert MomentumContrastV3(temperature=0.2).loss_scale == pytest.approx(0.4)


def test_a_queue_is_as_old_as_the_steps_that_fill_it():
    assert MomentumContrast(queue_size=65536).queue_age(256) == 256
    assert MomentumContrast(queue_size=100, symmetric=True).queue_age(40) == 1.25


def test_changes_of_another_method_are_named():
    one, other = (Config(data=DataConfig(shards="s"), method=small(name)) for name in ("memory-bank", "simsiam"))
    assert changes(one, other)["method.name"] == ("memory-bank", "simsiam")
    assert "--method.num-negatives: 65536 -> None" in differences(one, other)
    assert "--method.predictor-dim: None -> 4" in differences(one, other)


@pytest.mark.parametrize("name", PRESETS)
def test_graphs_are_for_methods_of_one_backward_pass(name):
    preset = PRESETS[name][1]
    config = dataclasses.replace(preset, run=dataclasses.replace(preset.run, cuda_graphs=True))
    if preset.views.num_small:
        reason = "--views.num-small 6 adds that of the small views"
    elif preset.method.backward_passes > 1:
        reason = f"{preset.method.name}, as it is set"
    else:
        validate(config)
        return
    with pytest.raises(ValueError, match=f"gradient of one backward pass, but {reason}"):
        validate(config)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("moco-v2 --moco.queue-size 64", "--moco.queue-size is now --method.queue-size"),
        ("moco-v2 --moco.queue_size=64", "--moco.queue-size is now --method.queue-size"),
        ("moco-v2 --model.head linear", "--model.head is now --method.head"),
        ("memory-bank --moco.bank-momentum 0.9", "--moco.bank-momentum is now --method.momentum"),
        ("moco-v2 --moco.loss symmetric", "--moco.loss is now --method.symmetric"),
        ("moco-v2 --moco.dictionary bank", "the presets memory-bank"),
    ],
)
def test_an_options_old_name_is_refused_with_the_new_one(words, says, capsys):
    assert main([*words.split(), "--data.shards", "s"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_no_option_of_today_has_an_old_name():
    options = {
        f"--{section.name}.{field.name.replace('_', '-')}"
        for _, preset in PRESETS.values()
        for section in dataclasses.fields(preset)
        if dataclasses.is_dataclass(options_of := getattr(preset, section.name))
        for field in dataclasses.fields(options_of)
    }
    assert not options & RENAMED.keys()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Pull the two views of a sample together; it collapses, but it is whole."""

    name: ClassVar[str] = "toy"
    dim: int = 4
    strength: float = 1.0

    @property
    def watched(self):
        return ("distance",)

    def charts(self, batch_size, num_small=0, /):
        return (Chart(title="Distance", caption="Between both views.", curves={"loss": "", "distance": ""}),)

    def note(self, line, /):
        return f"distance {line['distance']:.2f}"

    def build_head(self, feature_dim, *, is_transformer):
        return torch.nn.Linear(feature_dim, self.dim), None

    def build(self, setting, /):
        return ToyObjective(self.strength)


@dataclasses.dataclass(frozen=True)
class ToyObjective:
    strength: float
    num_passes = 1
    modules: ClassVar[dict] = {}

    def advance(self, scheduled, /):
        pass

    def passes(self, encode, views, index, /):
        distance = (encode(views[0]) - encode(views[1])).square().mean()
        yield Pass(loss=self.strength * distance, watched={"distance": distance.detach()})

    def on_a_clock(self, clock, /):
        return self


def test_a_new_method_is_one_class_and_one_line(packed_demo, tmp_path, monkeypatch, fresh_accelerator):
    monkeypatch.setitem(METHODS, "toy", f"{__name__}:Toy")
    base = PRESETS["demo"][1]
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data, shards=str(packed_demo.train), batch_size=16, backend="dali", num_threads=1
        ),
        views=dataclasses.replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=Toy(strength=2.0),
        run=dataclasses.replace(base.run, device="cpu", precision="fp32", steps=2, out=str(tmp_path / "run")),
        log=dataclasses.replace(base.log, every_steps=1, trackers=()),
    )
    validate(config)
    assert from_dict(to_dict(config)) == config
    assert train(config) == 0
    record = read_run(tmp_path / "run")
    assert record.config.method == config.method
    assert all(line["loss"] == pytest.approx(2 * line["distance"], rel=1e-5) for line in record.training)
    assert len(record.training) == 2
    assert not {"accuracy", "momentum", "feature_std"} & record.training[-1].keys()
    page = write_report(tmp_path / "run", num_samples=1).read_text()
    assert "Distance over training steps" in page
    assert config.method.note(record.training[-1]) in page
