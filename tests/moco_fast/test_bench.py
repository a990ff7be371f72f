import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moco_fast import cli
from moco_fast.bench import cli as cli_module
from moco_fast.bench import clock as clock_module
from moco_fast.bench import stopwatch as stopwatch_module
from moco_fast.bench.cli import main
from moco_fast.bench.clock import PartClock
from moco_fast.bench.loading import can_read, made_on_device
from moco_fast.bench.measure import _Bench, _smaller_batches
from moco_fast.bench.parts import on_a_clock
from moco_fast.bench.result import BenchResult, Rate, table, verdict
from moco_fast.bench.stopwatch import Stopwatch
from moco_fast.config import BatchNormConfig, ModelConfig, OptimConfig, to_dict
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam
from moco_fast.methods.shuffle import VirtualGroups, build_policy
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.presets import PRESETS
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch
from pipelines.config import ViewsConfig

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def rate(value: float) -> Rate:
    return Rate(median=value, lowest=value, highest=value)


def result(*, loader: float, step: float, end_to_end: float, on_gpu: bool = True, **more) -> BenchResult:
    memory = 1 << 30 if on_gpu else None
    return BenchResult(
        loader=rate(loader),
        step=rate(step),
        end_to_end=rate(end_to_end),
        batch_size=256,
        recipe_batch_size=256,
        torch_peak_bytes=memory,
        device_used_bytes=memory,
        environment={},
        **({"parts_alone_s": {"loss": 0.1}, "parts_end_to_end_s": {"loss": 0.1}} | more),
    )


SLOW_READING = {"reading": rate(800), "decoding": rate(700)}
WAITS = {"parts_end_to_end_s": {"loss": 0.1, "waiting for data": 0.1}}
SLOWS_DOWN = {"parts_end_to_end_s": {"loss": 0.2, "waiting for data": 0.0}}


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"loader": 2000, "step": 1000, "end_to_end": 990}, "2.0x what the step consumes.*99%.*as it should be"),
        ({"loader": 1100, "step": 1000, "end_to_end": 990}, "little to spare"),
        ({"loader": 500, "step": 1000, "end_to_end": 495} | SLOW_READING, "0.5x.*50%.*bound by the loader.*Reading"),
        ({"loader": 500, "step": 1000, "end_to_end": 495, "decoding": rate(600)}, "Decoding is slower"),
        ({"loader": 500, "step": 1000, "end_to_end": 495, "hand_over": rate(900)}, "Copying views"),
        ({"loader": 500, "step": 1000, "end_to_end": 495, "decoding": rate(1500)}, "Making the views"),
        ({"loader": 2000, "step": 1000, "end_to_end": 700} | WAITS, "70%.*waits 50.0%.*--data.prefetch"),
        ({"loader": 2000, "step": 1000, "end_to_end": 500} | SLOWS_DOWN, "2.00x as long.*Both need the GPU"),
        ({"loader": 2000, "step": 100, "end_to_end": 80, "on_gpu": False}, "80%.*give 95.2.*is 80.*Bound by the step"),
        ({"loader": 100, "step": 100, "end_to_end": 50, "on_gpu": False}, "Loading is 50% of the work"),
    ],
)
def test_the_verdict_names_what_limits(rates, says):
    assert re.search(says, verdict(result(**rates)))


def test_the_table_shows_each_figure():
    where = {"device": "abacus", "num_cpus": 4, "world_size": 2, "torch": "2.13", "cuda": "13.0", "python": "3.12"}
    where |= {
        "precision": "bf16",
        "compile": True,
        "loader": "dali",
        "encoder": "resnet50",
        "view_sizes": [224, 224, 96],
    }
    parts = {"parts_alone_s": {"loss": 0.03, "rest": 0.01}, "parts_end_to_end_s": {"loss": 0.04, "waiting for data": 1}}
    measured = result(loader=2000, step=1234, end_to_end=990, reading=rate(4000), read_bytes_per_s=2.5e9, **parts)
    shown = table(replace(measured, environment=where, recipe_batch_size=512))
    for figure in (
        "1,234",
        "3.24x",
        "2.5 GB/s",
        "30.00",
        "75.0%",
        "1,040.00",
        "1.07 GB",
        "2 ranks",
        "recipe's 512",
        "224 and 96 px",
    ):
        assert figure in shown, figure
    assert "samples/s (3 views each)" in shown
    assert verdict(measured) in shown


@pytest.fixture
def host_clock(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = SimpleNamespace(seconds=0.0)
    for module in (clock_module, stopwatch_module):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)

    def go_on(seconds):
        now.seconds += seconds

    return go_on


def test_a_part_within_a_part_counts_for_itself(host_clock):
    clock = PartClock(CPU)
    host_clock(100)
    for _ in range(2):
        with clock.part("outer"):
            host_clock(1)
            clock.timed("inner", host_clock)(2)
            host_clock(4)
        host_clock(8)
    assert clock.read() == {"outer": 10, "inner": 4}
    assert clock.read() == {}


def test_a_part_ends_when_it_fails(host_clock):
    clock = PartClock(CPU)
    with pytest.raises(ZeroDivisionError):
        clock.timed("fails", lambda: 1 / 0)()
    with clock.part("next"):
        host_clock(1)
    assert clock.read() == {"fails": 0, "next": 1}


def test_on_a_gpu_the_gpus_time_counts_and_is_waited_for_only_to_read_it(host_clock, monkeypatch):
    gpu = SimpleNamespace(seconds=0.0, waited=0)

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "this stream"
            self.at = gpu.seconds

        def elapsed_time(self, later):
            assert gpu.waited
            return 1e3 * (later.at - self.at)

    def synchronize(device):
        gpu.waited += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "this stream")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = PartClock(torch.device("cuda", 0))
    with clock.part("outer"):
        host_clock(50)
        gpu.seconds += 1
        with clock.part("inner"):
            gpu.seconds += 2
    assert gpu.waited == 0
    assert clock.read() == {"outer": 1, "inner": 2}
    assert gpu.waited == 1


def one_rank(device=CPU):
    return SimpleNamespace(device=device, rank=0, world_size=1, wait_for_all=lambda: None, tell_all=lambda value: value)


def test_copying_to_the_device_is_measured_where_views_are_made_elsewhere():
    config = replace(PRESETS["demo"][1], views=ViewsConfig(size=8))
    bench = _Bench(config=config, shards=None, parts=None, stopwatch=Stopwatch(one_rank()), round_s=0.01)
    assert bench._hand_over(4).lowest > 0
    gpu, folder, beton = torch.device("cuda"), SimpleNamespace(kind="local"), SimpleNamespace(kind="beton")
    torch_on_gpu = replace(config, data=replace(config.data, backend="torch"))
    assert not made_on_device(torch_on_gpu, gpu, folder)
    assert not made_on_device(config, gpu, None)
    assert made_on_device(config, gpu, folder)
    assert made_on_device(torch_on_gpu, CPU, folder)
    assert [can_read(shards) for shards in (folder, beton, None)] == [True, False, False]


def test_rounds_are_as_long_as_asked_for(host_clock):
    stopwatch = Stopwatch(one_rank())
    calls = iter([60.0, *[0.01] * 1000])
    assert stopwatch.calls_for(lambda: host_clock(next(calls)), 1.0) == 100, "the first call is to warm up"
    assert stopwatch.calls_for(lambda: host_clock(3.0), 1.0) == 1
    assert stopwatch.time(lambda: host_clock(0.5), 4) == pytest.approx(2.0)


METHODS = {
    "queue": MomentumContrast(dim=8, queue_size=32),
    "symmetric": MomentumContrast(dim=8, queue_size=32, symmetric=True),
    "v3": MomentumContrastV3(dim=8, mlp_dim=16),
    "end-to-end": EndToEnd(dim=8),
    "bank": MemoryBank(dim=8, num_negatives=8),
    "byol": Byol(dim=8, mlp_dim=16),
    "simsiam": SimSiam(dim=8, predictor_dim=4),
}
PARTS = {
    "momentum update", "key forward", "exchange", "query forward", "loss", "backward", "optimizer", "gather and enqueue"
}  # fmt: skip


ABSENT = {
    "bank": {"exchange"},
    "byol": {"exchange", "gather and enqueue"},
    "simsiam": {"exchange", "gather and enqueue", "momentum update", "key forward"},
}
"""Parts that a method lacks; the others have them all, if only to do nothing in them."""


def setting(query, policy):
    return Setting(
        query=query,
        policy=policy,
        num_samples=20,
        seed=1,
        device=CPU,
        available_bytes=1 << 30,
    )


def train_step(method):
    torch.manual_seed(0)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), method)
    objective = method.build(setting(query, VirtualGroups(2)))
    optimizer = build_optimizer(query, OptimConfig(), constant_lr=method.constant_lr)
    return TrainStep(query=query, objective=objective, optimizer=optimizer)


@pytest.mark.parametrize(
    ("name", "sides"),
    [*((name, (16, 16)) for name in METHODS), *((name, (16, 16, 8, 8)) for name in ("queue", "symmetric"))],
)
def test_a_step_on_a_clock_is_the_same_step(name, sides):
    generator = torch.Generator().manual_seed(1)
    views = tuple(torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=generator) for side in sides)
    batch = Batch(views=views, index=torch.arange(8), label=torch.full((8,), -1))
    plain, watched = train_step(METHODS[name]), train_step(METHODS[name])
    clock = PartClock(CPU)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = plain([batch, batch], lr=0.1, scheduled={"momentum": 0.9})
        torch.manual_seed(seed)
        with on_a_clock(watched, watched.optimizer, clock) as timed:
            found = timed([batch, batch], lr=0.1, scheduled={"momentum": 0.9})
        assert {name: value.item() for name, value in found.items()} == {n: v.item() for n, v in expected.items()}
    for one, two in zip(plain.query.parameters(), watched.query.parameters(), strict=True):
        assert torch.equal(one, two)
    seconds = clock.read()
    assert seconds.keys() == PARTS - ABSENT.get(name, set())
    assert all(each > 0 for each in seconds.values())
    watched([batch], lr=0.1, scheduled={"momentum": 0.9})
    assert clock.read() == {}, "the step that was given is left as it was"


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("policy", ["auto", "none", "virtual", "exchange"])
def test_smaller_batches_suit_the_policy(monkeypatch, world_size, policy):
    if (policy == "virtual") != (world_size == 1) and policy in ("virtual", "exchange"):
        return
    monkeypatch.setattr("moco_fast.distributed.world_size", lambda group=None: world_size)
    config = replace(PRESETS["moco-v2"][1], bn=BatchNormConfig(policy=policy, num_groups=4))
    sizes = _smaller_batches(config, world_size)
    assert sizes[0] == 256
    assert 8 <= sizes[-1] // world_size <= 16
    for size in sizes:
        assert size % world_size == 0
        build_policy(config.bn, batch_size=size // world_size, local_world_size=world_size)


def test_a_missing_folder_is_told_in_one_line(tmp_path, capsys):
    assert main(["moco-v2", "--data.shards", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "has no manifest.json" in error
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_told_before_measuring(tmp_path, capsys, packed_demo):
    out = tmp_path / "absent" / "bench.json"
    assert main(["moco-v2", "--data.shards", str(packed_demo.train), "--json", str(out)]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_an_options_value_is_not_taken_for_the_recipe(capsys, monkeypatch):
    def name_preset(_config, base):
        raise ValueError(next(name for name, (_, preset) in PRESETS.items() if preset is base))

    monkeypatch.setattr(cli_module, "check", name_preset)
    for value, name in zip(PRESETS, reversed(PRESETS), strict=True):
        for words in (["--json", value, name, "--data.shards", "x"], [name, "--data.shards", value, "--json", value]):
            assert main(words) == 2
            assert capsys.readouterr().err == f"error: {name}\n"


def test_options_come_from_a_file_and_those_of_the_command_override_them(packed_demo, tmp_path, capsys, monkeypatch):
    measured = []

    def measure(config, *, seconds, tell):
        measured.append((config, seconds))
        return result(loader=2, step=1, end_to_end=1)

    monkeypatch.setattr("moco_fast.bench.measure.measure", measure)
    monkeypatch.setattr(cli_module, "table", lambda _: "a table")
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe: demo\ndata: {{shards: {packed_demo.train}, batch_size: 48}}\noptim: {{lr: 0.5}}\n")
    for words in (["--optim.lr", "0.25", "--seconds", "3"], ["demo", "--seconds", "3", "--optim.lr", "0.25"]):
        assert cli.main(["bench", "--config", str(file), *words]) == 0
        config, seconds = measured.pop()
        assert (config.recipe, config.data.batch_size, config.optim.lr, seconds) == ("demo", 48, 0.25, 3)
    # The configuration of a run, fed back.
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert main(["--config", str(tmp_path / "config.json")]) == 0
    assert measured.pop()[0] == config
    file.write_text("recipe: demo\nseconds: 3\n")
    assert main(["--config", str(file)]) == 2
    assert "run.yaml, line 2: there is no option seconds" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_measure_a_recipe_and_leave_no_run_behind(packed_demo, tmp_path, warm_python):
    command = ["-m", "moco_fast.bench", "demo", "--seconds", "1", "--json", str(tmp_path / "bench.json")]
    command += ["--data.shards", str(packed_demo.train), "--data.batch-size", "32", "--views.size", "32"]
    command += ["--model.encoder", "resnet18_quarter", "--method.queue-size", "128", "--run.device", "cpu"]
    command += ["--run.out", str(tmp_path / "run")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        warm_python.start(*command, env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT)
        for rank in "01"
    ]
    (printed, said), (silent, _) = (rank.communicate(timeout=240) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    found = json.loads((tmp_path / "bench.json").read_text())
    for name in ("reading", "decoding", "loader", "step", "end_to_end"):
        assert 0 < found[name]["lowest"] <= found[name]["median"] <= found[name]["highest"]
    assert found["read_bytes_per_s"] > 500 * found["reading"]["median"]
    assert found["environment"]["world_size"] == 2
    assert found["parts_alone_s"].keys() == PARTS | {"rest"}
    assert found["parts_end_to_end_s"].keys() == PARTS | {"rest", "waiting for data"}
    # The parts make up the step: what is measured by part is what is measured as a whole.
    whole_s = found["batch_size"] / found["step"]["median"]
    assert sum(found["parts_alone_s"].values()) == pytest.approx(whole_s, rel=0.5)
    assert (printed.count(found["verdict"]), silent) == (1, ""), "one rank speaks"
    assert not (tmp_path / "run").exists()
