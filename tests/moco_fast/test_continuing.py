"""What a run that continues may do otherwise than before."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moco_fast import checkpoint
from moco_fast.config import Config, flatten, from_dict, may_change, to_dict
from moco_fast.presets import PRESETS
from moco_fast.training import loop
from moco_fast.training.continuing import compare
from moco_fast.training.loop import train
from shards.sets.manifest import Manifest, ShardTable

SAMPLES = {"where": "set", "num_samples": 8, "digest": "a" * 32}
OTHERS = {"where": "set", "num_samples": 9, "digest": "b" * 32}


def demo(**options: Any) -> Config:
    """The demo's recipe, with options by dotted names."""
    values = flatten(to_dict(PRESETS["demo"][1])) | options
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        place = nested
        for part in filter(None, section.split(".")):
            place = place.setdefault(part, {})
        place[last] = value
    return from_dict(nested)


def test_every_preset_says_of_each_option_how_it_may_change() -> None:
    for _, config in PRESETS.values():
        rules = may_change(config)
        assert set(rules) | {"method.name"} == set(flatten(to_dict(config)))
        assert {rules[name] for name in ("optim.lr", "run.steps", "run.seed", "views.size")} == {"if allowed"}
        assert {rules[name] for name in ("run.out", "data.cache", "data.cache_gib", "checkpoint.keep")} == {"freely"}
        assert {rules[name] for name in ("data.cache_decoded", "data.cache_decoded_in")} == {"freely"}
        assert {rules[name] for name in ("eval.k", "data.on_bad_sample")} == {"with a note"}


def test_what_decides_the_training_is_allowed_by_name_alone() -> None:
    before = demo(**{"run.steps": 4})
    now = {"run.steps": 8, "optim.lr": 0.5, "eval.k": 3, "data.prefetch": 7}
    found = compare(before, demo(**now), {}, {})
    assert [line.partition(":")[0] for line in found.refused] == ["--optim.lr", "--run.steps"]
    assert (found.allowed, found.noted) == ((), ("--eval.k: 20 -> 3",))
    found = compare(before, demo(**now, **{"run.allow_changes": ("--run.steps", "optim.lr")}), {}, {})
    assert (found.refused, found.allowed) == ((), ("--optim.lr: 0.06 -> 0.5", "--run.steps: 4 -> 8"))
    with pytest.raises(ValueError, match=r"--run\.allow-changes run\.stepps is not an option"):
        compare(before, demo(**{"run.allow_changes": ("run.stepps",)}), {}, {})


def test_lanes_that_are_not_given_stay_as_they_were() -> None:
    before = demo(**{"data.lanes": 72})
    assert compare(before, demo(), {}, {}).refused == ()
    assert compare(before, demo(**{"data.lanes": 64}), {}, {}).refused == ("--data.lanes: 72 -> 64",)


def test_other_samples_are_refused_wherever_they_lie() -> None:
    config, moved = demo(), {**SAMPLES, "where": "elsewhere"}
    for option in ("data.shards", "eval.shards"):
        assert compare(config, config, {option: SAMPLES}, {option: moved}).refused == ()
        [line] = compare(config, config, {option: SAMPLES}, {option: OTHERS}).refused
        assert line == f"--{option} set holds other samples: 8 samples, digest aaaaaaaa -> 9 samples, digest bbbbbbbb"
        allowed = demo(**{"run.allow_changes": (option,)})
        assert compare(config, allowed, {option: SAMPLES}, {option: OTHERS}).allowed == (line,)
        assert compare(config, config, {}, {option: OTHERS}).refused == ()
    named = compare(config, config, {"eval.shards": SAMPLES}, {"eval.shards": {**OTHERS, "where": "elsewhere"}})
    assert (named.refused, len(named.noted)) == ((), 1)
    bank = dataclasses.replace(PRESETS["memory-bank"][1], run=allowed.run)
    with pytest.raises(ValueError, match="memory-bank keeps something for each sample"):
        compare(bank, bank, {"data.shards": SAMPLES}, {"data.shards": OTHERS})


def test_the_identity_of_a_set_is_that_of_its_samples_and_labels(packed_demo: Any) -> None:
    manifest = Manifest.read(packed_demo.train)
    same = [{"jpegs": {}}, {"settings": {"seed": 1}}, {"max_width": 1}]
    assert {dataclasses.replace(manifest, **other).identity for other in same} == {manifest.identity}
    first, *rest = manifest.shards
    changed = [
        dataclasses.replace(first, digests={**first.digests, suffix: "1" * 32}) for suffix in (".tar", ".labels.npy")
    ]
    others = [
        *({"shards": ShardTable.of((shard, *rest))} for shard in changed),
        {"class_names": manifest.class_names[::-1]},
    ]
    assert manifest.identity not in {dataclasses.replace(manifest, **other).identity for other in others}


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_samples_unless_it_is_told_to(
    packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(shards: Path, **options: Any) -> None:
        small = {"model.encoder": "resnet18_quarter", "data.batch_size": 24, "views.size": 16, "bn.num_groups": 4}
        small |= {"method.queue_size": 48, "run.device": "cpu", "log.trackers": (), "data.backend": "dali"}
        small |= {"data.num_threads": 1, "run.out": str(tmp_path / "run"), "run.steps": 2}
        train(demo(**(small | {"data.shards": str(shards)} | options)))

    def files() -> dict[str, bytes]:
        found = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in found}

    here, moved = tmp_path / "set", tmp_path / "moved"
    shutil.copytree(packed_demo.train, here)
    monkeypatch.setattr(loop, "choose_lanes", lambda batch_size, num_nodes: 3)
    start(here)
    # What other nodes would choose is of no matter to a run that has begun.
    monkeypatch.setattr(loop, "choose_lanes", lambda batch_size, num_nodes: 2)
    left = files()
    with pytest.raises(ValueError, match=r"--run\.steps: 2 -> 3.* or --run\.allow-changes run\.steps$"):
        start(here, **{"run.steps": 3})
    here.rename(moved)
    start(moved, **{"run.steps": 3, "run.allow_changes": ("run.steps",)})  # the same samples, elsewhere
    assert checkpoint.load(tmp_path / "run/checkpoints/step-00000003").numbers["loader"] == {"epoch": 0, "step": 3}
    shutil.copytree(packed_demo.val, here)
    left = files()
    with pytest.raises(ValueError, match=r"holds other samples: 288 samples.* -> 72 samples") as refused:
        start(here, **{"run.steps": 4})
    assert str(refused.value).endswith("--run.allow-changes run.steps data.shards")
    assert files() == left
    capsys.readouterr()
    start(here, **{"run.steps": 4, "run.allow_changes": ("run.steps", "data.shards")})
    assert "changed, as --run.allow-changes says: --data.shards" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run/checkpoints/step-00000004").numbers["loader"] == {"epoch": 1, "step": 1}
    lines = [json.loads(line) for line in (tmp_path / "run/changes.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["allowed"])) for line in lines] == [(2, 1), (3, 2)]
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["lanes"] == 3
