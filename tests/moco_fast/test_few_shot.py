"""Few-shot episodes: what is drawn, and heads against plain loops and scikit-learn."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.nn.functional import normalize

import shards
from moco_fast.evaluation import few_shot
from moco_fast.evaluation.few_shot import centroid_accuracy, draw_episodes, logistic_accuracy, rows_of
from moco_fast.evaluation.labels import label_counts
from moco_fast.evaluation.tasks.few_shot import FewShot
from tests.moco_fast.task_inputs import MadeUp, blobs

CPU = torch.device("cpu")


@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=8).filter(lambda counts: sum(n >= 3 for n in counts) >= 2),
    seed=st.integers(0, 99),
)
def test_an_episode_has_other_samples_of_other_classes(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    episodes = draw_episodes(labels, way=2, per_class=3, num=5, seed=(seed,))
    assert episodes.shape == (5, 2, 3)
    assert all(len(np.unique(episode)) == 6 for episode in episodes)
    classes = labels[episodes]
    assert (classes == classes[:, :, :1]).all()
    assert (classes[:, 0, 0] != classes[:, 1, 0]).all()
    np.testing.assert_array_equal(draw_episodes(labels, way=2, per_class=3, num=3, seed=(seed,)), episodes[:3])


def test_classes_and_samples_are_drawn_evenly() -> None:
    labels = np.repeat(np.arange(10), [5] * 10)
    episodes = draw_episodes(labels, way=5, per_class=3, num=2000, seed=(0,))
    # Every sample has a chance of 0.5 x 0.6 in an episode; six standard deviations of 2,000 draws are 123.
    assert np.abs(np.bincount(episodes.ravel(), minlength=50) - 600).max() < 123
    assert not np.array_equal(episodes, draw_episodes(labels, way=5, per_class=3, num=2000, seed=(1,)))


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Six episodes: (6, 3, 4, 7) support and (6, 3, 5, 7) queries, of large and similar numbers."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, 3, 1, 7, generator=generator)
    values = 50 + centers + torch.randn(6, 3, 9, 7, generator=generator)
    return values[:, :, :4], values[:, :, 4:]


def test_centroids_are_scikit_learns() -> None:
    support, queries = drawn()
    labels, expected = np.repeat(np.arange(3), 4), np.repeat(np.arange(3), 5)
    found = [
        NearestCentroid().fit(learned.flatten(0, 1).numpy(), labels).score(asked.flatten(0, 1).numpy(), expected)
        for learned, asked in zip(support, queries, strict=True)
    ]
    assert centroid_accuracy(support, queries).tolist() == pytest.approx(found)
    assert 0.4 < np.mean(found) < 0.95


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_regressions_fitted_at_once_are_scikit_learns(c: float) -> None:
    support, queries = (values - 50 for values in drawn(1))
    labels, expected = np.repeat(np.arange(3), 4), np.repeat(np.arange(3), 5)
    found: list[float] = []
    for learned, asked in zip(normalize(support, dim=-1), normalize(queries, dim=-1), strict=True):
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(learned.flatten(0, 1).numpy(), labels)
        found.append(float(theirs.score(asked.flatten(0, 1).numpy(), expected)))
    assert logistic_accuracy(support, queries, c=c).tolist() == pytest.approx(found)
    assert 0.4 < np.mean(found) < 0.95


def test_rows_of_several_tensors_count_as_one() -> None:
    parts = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in (4, 1, 6)]
    rows = torch.tensor([[0, 10, 4], [3, 5, 10]])
    assert torch.equal(rows_of(parts, rows, CPU), torch.cat(parts)[rows])


# The task --------------------------------------------------------------------------------------------------------


def naive(values: Tensor, labels: Tensor, shots: int, task: FewShot) -> npt.NDArray[np.float64]:
    """Accuracy of nearest centroids in each episode, loop by loop."""
    plain = values.double().numpy()
    episodes = draw_episodes(
        labels.numpy(), way=task.way, per_class=shots + task.queries, num=task.episodes, seed=(0, shots)
    )
    found: list[float] = []
    for episode in episodes:
        centroids = [plain[rows[:shots]].mean(axis=0) for rows in episode]
        hits = [
            np.argmin([np.square(plain[row] - centroid).sum() for centroid in centroids]) == place
            for place, rows in enumerate(episode)
            for row in rows[shots:]
        ]
        found.append(float(np.mean(hits)))
    return np.array(found)


def test_the_task_gives_the_mean_and_its_interval_whatever_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = MadeUp(train=blobs(150), test=blobs(90, seed=1), num_classes=4)
    task = FewShot(way=3, shots=(4, 1), queries=6, episodes=20).with_sets(["train", "test"])
    outcome = task.measure(inputs)
    pooled = [torch.cat(pair) for pair in zip(inputs.train, inputs.test, strict=True)]
    for shots in (4, 1):
        expected = naive(pooled[0], pooled[1], shots, task)
        figure = outcome.figures[f"centroid_{shots}_shot"]
        half = 1.96 * expected.std() / np.sqrt(20)
        assert figure.value == pytest.approx(expected.mean())
        assert figure.interval == pytest.approx((expected.mean() - half, expected.mean() + half))
    assert list(task.figures()) == ["centroid_4_shot", "logistic_4_shot", "centroid_1_shot", "logistic_1_shot"]
    assert outcome.facts == {"num_samples": 240}
    monkeypatch.setattr(few_shot, "_CHUNK_ELEMENTS", 500)
    again = task.measure(inputs).figures
    assert [figure.value for figure in again.values()] == [figure.value for figure in outcome.figures.values()]


def test_the_published_protocol_is_the_default() -> None:
    # few_shot.py of ssl-transfer; the shots of CD-FSL beside those of the published tables.
    task = FewShot()
    assert (task.way, task.queries, task.episodes, task.shots) == (5, 15, 600, (5, 1, 20, 50))


@pytest.mark.parametrize(
    ("there", "asked", "looks_at"),
    [
        (("train", "test"), None, {"train", "test"}),
        (("test",), None, {"test"}),
        (("train",), None, {"train"}),
        (("train", "test"), "test", {"test"}),
        ((), None, {"train", "test"}),
    ],
)
def test_episodes_are_drawn_from_both_sets_or_one(there: Sequence[str], asked: str | None, looks_at: set[str]) -> None:
    task = FewShot(split=asked).with_sets(there)
    assert task.splits == looks_at


def test_classes_with_too_few_samples_are_left_out_and_named() -> None:
    values, _ = blobs(60)
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 12 + [3] * 8)
    inputs = MadeUp(train=(values, labels), test=(values, labels), num_classes=4)
    task = FewShot(split="test", way=3, shots=(1, 4, 10), queries=6, episodes=5)
    assert task.why_not(inputs) is None
    assert task.measure(inputs).notes == (
        "4-shot draws from 3 of 4 classes: the others have under 10 samples",
        "10-shot is left out: 3 classes need 16 samples each, and 2 have so many",
    )
    hard = replace(task, shots=(15, 10))
    assert hard.why_not(inputs) == "3 classes need 16 samples each, and 2 have so many"
    assert replace(task, split="both", shots=(10,)).why_not(inputs) is None
    with pytest.raises(ValueError, match="15-shot is left out"):
        hard.measure(inputs)


def test_samples_of_classes_without_names_are_counted_over_both_sets() -> None:
    values, _ = blobs(60)
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 12 + [3] * 8)
    two = (values[:40], labels[:40])
    inputs = MadeUp(train=(values, labels), test=two, num_classes=4, names={"train": (), "test": ()})
    assert [len(inputs.label_counts(split)) for split in ("train", "test")] == [4, 2]
    task = FewShot(way=3, shots=(2,), queries=10).with_sets({"train", "test"})
    assert task.why_not(inputs) is None
    assert replace(task, shots=(3,)).why_not(inputs) == "3 classes need 13 samples each, and 2 have so many"


def test_mini_imagenet_s_list_and_class_folders_make_the_same_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["filename,label"]
    for name in ("n01532829", "n01558993", "n01704323"):
        for number in range(4):
            image = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
            for path in (tmp_path / "images" / f"{name}{number:08}.jpg", tmp_path / "folders" / name / f"{number}.jpg"):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            lines.append(f"{name}{number:08}.jpg,{name}")
    (tmp_path / "images" / "test.csv").write_text("\n".join(lines) + "\n")
    for source in ("images/test.csv", "folders"):
        out = tmp_path / "packed" / Path(source).stem
        shards.pack(shards.PackConfig(sources=(str(tmp_path / source),), out=str(out), workers=1))
        packed = shards.open(str(out))
        assert packed.class_names == ("n01532829", "n01558993", "n01704323")
        assert label_counts(packed).tolist() == [4, 4, 4]
