import json
import math

import torch

from moco_fast.training.metrics import Average, MetricsFile, sheet_of
from moco_fast.training.trackers import Trackers


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
    first = MetricsFile(tmp_path, step=0, trackers=Trackers())
    for step in (5, 10, 15):
        first.write({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    second = MetricsFile(tmp_path, step=10, trackers=Trackers())
    second.write({"step": 15, "loss": 2.0})
    second.close()
    assert steps(tmp_path) == [5, 10, 15]


def test_trackers_get_every_line_and_a_picture_of_the_first_views(tmp_path):
    sent = []

    class Told(Trackers):
        def log(self, line):
            sent.append(line)

        def show(self, name, pixels, *, step):
            sent.append((name, pixels.shape, step))

        def __bool__(self):
            return True

    metrics = MetricsFile(tmp_path, step=0, trackers=Told())
    metrics.show((torch.zeros(4, 3, 6, 6, dtype=torch.uint8),), step=0)
    metrics.write({"step": 3, "loss": 1.5})
    metrics.close()
    assert sent == [("views", (24, 6, 3), 0), {"step": 3, "loss": 1.5}]


def test_a_sheet_has_a_row_for_each_sample_and_a_column_for_each_view():
    large = torch.arange(10 * 3 * 4 * 4, dtype=torch.int64).remainder(256).to(torch.uint8).view(10, 3, 4, 4)
    small = torch.full((10, 3, 2, 2), 9, dtype=torch.uint8)
    sheet = sheet_of((large, small), num_samples=8)
    assert sheet.shape == (8 * 4, 2 * 4, 3)
    assert (sheet[12:16, :4] == large[3].permute(1, 2, 0).numpy()).all()
    assert (sheet[12:14, 4:6] == 9).all()
    assert not sheet[14:16, 4:].any()
    assert not sheet[12:16, 6:].any()
