"""Runs that start from the weights of another encoder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate.state import AcceleratorState
from timm.models import save_for_hf
from torch import nn

from moco_fast import checkpoint
from moco_fast.config import Config, ModelConfig, RunConfig, from_dict
from moco_fast.encoders.encoder import build_encoder
from moco_fast.encoders.initial import initial_weights
from moco_fast.encoders.open import open_encoder
from moco_fast.evaluation.untrained import untrained_twin
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.presets import PRESETS
from moco_fast.training.build import build
from moco_fast.training.loop import train
from moco_fast.training.runtime import start
from tests.moco_fast.encoders.layouts import as_if_trained
from tests.moco_fast.encoders.test_transformers import RESNET18, save


def configuration(shards: Path | str, init_from: Path | str | None, out: Path | str = "run", **sections: Any) -> Config:
    base = PRESETS["demo"][1]
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, shards=str(shards), batch_size=16, backend="dali", num_threads=1),
        views=dataclasses.replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        method=MomentumContrast(dim=16, queue_size=64),
        log=dataclasses.replace(base.log, every_steps=1, trackers=()),
        **sections,
    )
    source = None if init_from is None else str(init_from)
    return dataclasses.replace(
        config, run=RunConfig(device="cpu", precision="fp32", steps=2, seed=5, out=str(out), init_from=source)
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == its and torch.equal(value, others) for (name, value), (its, others) in pairs)


@pytest.mark.usefixtures("fresh_accelerator")
def test_both_encoders_start_from_a_run_s(packed_demo: Any, finished_run: Path) -> None:
    config = configuration(packed_demo.train, finished_run)
    weights = initial_weights(config)
    assert weights is not None
    assert weights.facts["parts"] == ["backbone", "head"]
    assert weights.facts["notes"] == []
    opened = open_encoder(str(finished_run))
    assert weights.facts["digest"] == opened.digest
    runtime = start(config.run, env={})
    parts = build(config, runtime, initial=weights.tensors)
    of_new_run = torch.get_rng_state()
    plain = build(dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=None)), runtime)
    for each in (parts, plain):
        each.loader.close()
    runtime.close()
    for encoder in (parts.query, parts.modules["key"], untrained_twin(config)):
        assert same(encoder, opened.encoder)
    assert not same(plain.query, opened.encoder)
    assert torch.equal(torch.get_rng_state(), of_new_run)  # what is drawn later does not depend on the option


def test_a_head_that_does_not_fit_is_left_random_and_noted(packed_demo: Any, finished_run: Path) -> None:
    config = configuration(packed_demo.train, finished_run)
    model = dataclasses.replace(config.model, std=(1, 1, 1))
    wider = dataclasses.replace(config, method=MomentumContrast(dim=8), model=model)
    weights = initial_weights(wider)
    assert weights is not None
    assert weights.facts["parts"] == ["backbone"]
    assert all(name.startswith("backbone.") for name in weights.tensors)
    [of_head, of_pixels] = weights.facts["notes"]
    assert of_head.startswith("the head starts with random weights: 2.weight is 16x128 there, 8x128 here")
    assert "mean and deviation" in of_pixels
    v3 = dataclasses.replace(config, method=MomentumContrastV3(dim=16, mlp_dim=8))
    weights = initial_weights(v3)
    assert weights is not None
    assert [note.split(":")[0] for note in weights.facts["notes"]] == [
        f"the {part} starts with random weights" for part in ("head", "predictor")
    ]


def resnet18(folder: Path) -> tuple[Path, nn.Module]:
    with torch.random.fork_rng():
        network = as_if_trained(torchvision.models.resnet18())
    torch.save(network.state_dict(), folder / "resnet18.pth")
    return folder / "resnet18.pth", network


@pytest.mark.parametrize("layout", ["torchvision", "authors"])
def test_files_of_others_are_taken(packed_demo: Any, tmp_path: Path, layout: str) -> None:
    path, network = resnet18(tmp_path)
    config = configuration(packed_demo.train, path)
    config = dataclasses.replace(config, model=ModelConfig(encoder="resnet18"))
    if layout == "authors":
        tensors = {f"module.encoder_q.{name}": each for name, each in network.state_dict().items() if name[:2] != "fc"}
        heads = {"fc.0": nn.Linear(512, 512), "fc.2": nn.Linear(512, 16)}
        for name, layer in heads.items():
            tensors |= {f"module.encoder_q.{name}.{key}": each for key, each in layer.state_dict().items()}
        torch.save({"state_dict": tensors, "arch": "resnet18"}, path)
    weights = initial_weights(config)
    assert weights is not None
    assert weights.facts["parts"] == ["backbone", *(["head"] if layout == "authors" else [])]
    encoder = build_encoder(config.model, config.method)
    encoder.load_state_dict(weights.tensors, strict=False)
    name = "layer4.1.conv2.weight"
    assert torch.equal(encoder.backbone.state_dict()[name], network.state_dict()[name])


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("layout", ["timm's file", "timm's folder", "transformers' folder"])
def test_a_run_begins_with_weights_of_other_libraries(packed_demo: Any, tmp_path: Path, layout: str) -> None:
    name, where = "layer4.1.conv2.weight", tmp_path / "weights"
    with torch.random.fork_rng():
        network = as_if_trained(timm.create_model("resnet18", num_classes=5))
    expected, given = network.state_dict()[name], str(where)
    if layout == "timm's file":
        torch.save(network.state_dict(), where)
        given = f"timm:resnet18@{where}"
    elif layout == "timm's folder":
        save_for_hf(network, where)
    else:
        network = save(where, "ResNetModel", RESNET18)
        expected = network.state_dict()["encoder.stages.3.layers.1.layer.1.convolution.weight"]
    config = configuration(packed_demo.train, given, tmp_path / "run")
    config = dataclasses.replace(config, model=ModelConfig(encoder="resnet18"))
    weights = initial_weights(config)
    assert weights is not None
    assert weights.facts["parts"] == ["backbone"]
    runtime = start(config.run, env={})
    parts = build(config, runtime, initial=weights.tensors)
    parts.loader.close()
    runtime.close()
    for encoder in (parts.query, parts.modules["key"]):
        assert torch.equal(encoder.get_parameter(f"backbone.{name}"), expected)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ModelConfig(encoder="resnet50"), "layer1.0.conv1.weight is 64x64x3x3 there, 64x64x1x1 here"),
        (ModelConfig(encoder="resnet18", stem="cifar"), "resnet18 with the cifar stem: conv1.weight is 64x3x7x7 there"),
    ],
)
@pytest.mark.usefixtures("fresh_accelerator")
def test_another_network_is_refused_before_the_folder_is_claimed(
    packed_demo: Any, tmp_path: Path, model: ModelConfig, reason: str
) -> None:
    path, _ = resnet18(tmp_path)
    config = dataclasses.replace(configuration(packed_demo.train, path, tmp_path / "run"), model=model)
    with pytest.raises(ValueError, match=rf"resnet18.pth \(torchvision's resnet18\) is another .* {reason}"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_the_same_shapes_in_another_network_are_refused(packed_demo: Any, tmp_path: Path) -> None:
    config = configuration(packed_demo.train, tmp_path / "run")
    vit = dataclasses.replace(config, model=ModelConfig(encoder="test_vit"))
    encoder = build_encoder(vit.model, vit.method, image_size=vit.views.size)
    attention: Any = encoder.get_submodule("backbone.blocks.1.attn")
    attention.num_heads = 4
    with pytest.MonkeyPatch.context() as patch:
        opened = dataclasses.replace(_opened_like(encoder), where="x")
        patch.setattr("moco_fast.encoders.initial.open_encoder", lambda _, image_size: opened)
        says = r"blocks.1.attn is a Attention \(num_heads 4\) there, a .* \(num_heads 2\)"
        with pytest.raises(ValueError, match=says):
            initial_weights(vit)


def _opened_like(encoder: Any) -> Any:
    from moco_fast.encoders.formats.base import opened

    return opened(encoder, "x", "x")


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_records_what_it_started_from_and_continues_without_it(
    packed_demo: Any, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = resnet18(tmp_path)
    config = configuration(packed_demo.train, path, tmp_path / "run")
    config = dataclasses.replace(config, model=ModelConfig(encoder="resnet18"))
    digest = open_encoder(str(path)).digest
    assert train(config) == 0
    assert f"started from backbone of {path} (torchvision's resnet18), digest {digest}" in capsys.readouterr().err
    path.unlink()
    assert train(config) == 0  # nothing is left to do, but all of a start is done
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["init_from"]
    assert (facts["where"], facts["digest"], facts["parts"]) == (str(path), digest, ["backbone"])
    [newest] = {checkpoint.find_newest(tmp_path / "run" / "checkpoints")}
    assert newest is not None
    assert from_dict(checkpoint.load(newest).config).run.init_from == str(path)
    with pytest.raises(ValueError, match="does not exist"):
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(tmp_path / "new"))))


def query_on_this_rank(train_shards: str, init_from: str) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    config = configuration(train_shards, init_from)
    try:
        runtime = start(config.run)
        # As on a machine that does not have the file.
        weights = initial_weights(config) if runtime.rank == 0 else None
        parts = build(config, runtime, initial=weights and weights.tensors)
        parts.loader.close()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return {name: each.clone().numpy() for name, each in parts.query.state_dict().items()}


@pytest.mark.slow
def test_only_the_first_rank_needs_the_file(run_ranks: Any, packed_demo: Any, finished_run: Path) -> None:
    ranks = run_ranks(query_on_this_rank, str(packed_demo.train), str(finished_run))
    expected = open_encoder(str(finished_run)).encoder.state_dict()
    for found in ranks:
        assert [name for name, each in expected.items() if not (found[name] == each.numpy()).all()] == []
