import json
import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_fast.training.metrics import Average, MetricsFile


def test_average_over_steps_starts_anew_after_each_reading():
    average = Average(("loss", "accuracy"), torch.device("cpu"))
    for loss in (1.0, 2.0, 6.0):
        average.add({"loss": torch.tensor(loss), "accuracy": torch.tensor(0.5), "unknown": torch.tensor(9.0)})
    assert average.take().wait() == {"loss": 3.0, "accuracy": 0.5}
    average.add({"loss": torch.tensor(5.0), "accuracy": torch.tensor(1.0)})
    assert average.take().wait() == {"loss": 5.0, "accuracy": 1.0}


def test_a_reading_is_not_changed_by_what_comes_after():
    average = Average(("loss",), torch.device("cpu"))
    average.add({"loss": torch.tensor(1.0)})
    pending = average.take()
    average.add({"loss": torch.tensor(100.0)})
    assert pending.wait() == {"loss": 1.0}


def test_what_is_not_a_number_stays_so():
    average = Average(("loss",), torch.device("cpu"))
    average.add({"loss": torch.tensor(1.0)})
    average.add({"loss": torch.tensor(float("nan"))})
    assert math.isnan(average.take().wait()["loss"])


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_drops_later_lines_and_a_torn_one(tmp_path):
    first = MetricsFile(tmp_path, step=0, tensorboard=False)
    for step in (5, 10, 15):
        first.write({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    second = MetricsFile(tmp_path, step=10, tensorboard=False)
    second.write({"step": 15, "loss": 2.0})
    second.close()
    assert steps(tmp_path) == [5, 10, 15]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    metrics = MetricsFile(tmp_path, step=0, tensorboard=True)
    metrics.write({"step": 3, "loss": 1.5})
    metrics.write({"step": 3, "knn/top1": 0.25})
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(3, 1.5)]
    assert [(event.step, event.value) for event in board.Scalars("knn/top1")] == [(3, 0.25)]
