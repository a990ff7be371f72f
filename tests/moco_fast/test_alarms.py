"""Warnings of a run: when they come, that they come once, and that a healthy run has none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moco_fast.config import Config
from moco_fast.presets import PRESETS
from moco_fast.training.alarms import Alarms, describe_queue, key_lag, key_start_share, queue_drift


def recipe(name: str = "moco-v2", **method: Any) -> Config:
    base = PRESETS[name][1]
    return replace(base, data=replace(base.data, shards="x"), method=replace(base.method, **method))


def alarms(folder: Path, config: Config, *, num_samples: int = 1_281_167, num_steps: int = 1_000_000) -> Alarms:
    return Alarms(folder, config, num_samples=num_samples, num_steps=num_steps)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_published_recipes_on_imagenet_warn_of_nothing(name: str, tmp_path: Path) -> None:
    assert alarms(tmp_path, recipe(name)).at_start() == []
    assert not (tmp_path / "warnings.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "known", "says", "advice"),
    [
        (
            recipe(),
            {"num_samples": 65_535},
            "dictionary of 65,536 keys exceeds the set of 65,535",
            "--method.queue-size",
        ),
        (recipe("memory-bank"), {"num_samples": 9}, "65,536 keys exceeds the set of 9", "--method.num-negatives"),
        (recipe(momentum=0.99), {}, "92% of the key encoder is replaced while a key is in the queue", "raise"),
        (recipe(momentum=0.0), {}, "100% of the key encoder is replaced", "raise --method.momentum"),
        (recipe(), {"num_steps": 300}, "at the end of 300 steps, 74% of the key encoder", "train longer"),
        (recipe("byol", momentum=1.0), {"num_steps": 99}, "100% of the key encoder will still be its first", "lower"),
    ],
)
def test_what_the_configuration_tells_is_said_at_the_start_and_once(
    config: Config, known: dict[str, int], says: str, advice: str, tmp_path: Path
) -> None:
    [said] = alarms(tmp_path, config, **known).at_start()
    assert said.startswith("warning: ")
    assert says in said
    assert advice in said
    assert alarms(tmp_path, config, **known).at_start() == []  # a run that goes on
    [kept] = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert f"warning: {kept['warning']}" == said


def lines(start: int, **values: float) -> list[dict[str, float]]:
    return [{"step": start + 10 * number, **values} for number in range(4)]


def test_collapse_is_said_once_if_it_lasts_and_not_of_random_weights(tmp_path: Path) -> None:
    watch = alarms(tmp_path, recipe())
    even = 1 / math.sqrt(128)
    said = [watch.look(line) for line in lines(10, feature_std=0.01 * even)]
    assert said == [[]] * 4
    said = [watch.look(line) for line in lines(60, feature_std=0.06 * even)]
    assert said == [[]] * 4
    assert watch.look({"step": 100, "feature_std": 0.01 * even}) == []
    assert watch.look({"step": 110, "feature_std": 0.01 * even}) == []
    assert watch.look({"step": 120, "feature_std": 0.5 * even}) == []
    said = [watch.look(line) for line in lines(130, feature_std=0.01 * even)]
    assert [len(each) for each in said] == [0, 0, 1, 0]
    assert "features have collapsed: their spread is 1.0% of an even one" in said[2][0]
    with (tmp_path / "warnings.jsonl").open("a") as file:
        file.write('{"abo')
    assert [alarms(tmp_path, recipe()).look(line) for line in lines(200, feature_std=0.0)] == [[]] * 4


def test_a_key_encoder_far_from_the_query_encoder_is_said(tmp_path: Path) -> None:
    watch = alarms(tmp_path, recipe())
    assert [watch.look(line) for line in lines(10, key_lag=0.4)] == [[]] * 4
    said = [watch.look(line) for line in lines(50, key_lag=0.75)]
    assert [len(each) for each in said] == [0, 0, 1, 0]
    assert "its weights are 75% of the query encoder's length away" in said[2][0]


def test_the_lag_is_a_relative_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), nn.Sequential(nn.Linear(6, 5))
    for each in (*query.parameters(), *key.parameters()):
        each.data = torch.randn(each.shape, generator=generator)
    q, k = (torch.cat([each.detach().flatten() for each in module.parameters()]) for module in (query[0], key[0]))
    assert key_lag(query, key).item() == pytest.approx(((k - q).norm() / q.norm()).item())
    monkeypatch.setattr("moco_fast.training.alarms._CHUNK_ELEMENTS", 1)
    assert key_lag(query, key).item() == pytest.approx(((k - q).norm() / q.norm()).item())


def test_the_share_of_the_first_weights_is_that_of_the_moving_average() -> None:
    method = recipe("byol", momentum=0.9).method
    left = math.prod(method.scheduled(step, 50)["momentum"] for step in range(50))
    assert key_start_share(method, 50) == pytest.approx(left)
    assert key_start_share(recipe("simsiam").method, 50) is None
    assert key_start_share(recipe(momentum=0.999).method, 5000) == pytest.approx(0.999**5000)


def test_the_age_of_the_queue_is_compared_with_the_momentum() -> None:
    assert (
        describe_queue(recipe(), 1000)
        == "queue: keys of the last 256 steps, in which 23% of the key encoder is replaced"
    )
    assert queue_drift(recipe(symmetric=True).method, 256, 0.999) == pytest.approx(1 - 0.999**128)
    assert describe_queue(recipe("byol"), 1000) is None
    assert describe_queue(recipe("memory-bank"), 1000) is None
