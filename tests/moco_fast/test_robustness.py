"""The robustness task on small shards: its figures, what is kept of them, and folders of corrupted images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import AlexNet_Weights

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.attacks import Attack, attack
from moco_fast.evaluation.cache import FeatureCache
from moco_fast.evaluation.corruptions import Corruption
from moco_fast.evaluation.heads import Classifier
from moco_fast.evaluation.inputs import CachedFeatures, Subject, TaskInputs
from moco_fast.evaluation.linear import train_cached
from moco_fast.evaluation.live import measure
from moco_fast.evaluation.result import read_results, write_results
from moco_fast.evaluation.robustness import corruption_errors, is_imagenet, masking_notes, relative_corruption_errors
from moco_fast.evaluation.strengths import ALEXNET, ALEXNET_CLEAN, COMMON
from moco_fast.evaluation.tasks.robustness import Robustness
from pipelines.world import World
from tests.moco_fast.test_eval import Count, run, small_encoder, subject_of
from tests.moco_fast.test_result import result

TASK = Robustness(
    corruptions=("gaussian_noise", "contrast"), severities=(1, 5), attacks=(), max_images=24, batch_size=32, epochs=4
)
ATTACKS = replace(TASK, corruptions=(), attacks=("fgsm", "pgd"), norms=("linf", "l2"), eps=(8.0,), eps_l2=(0.5,))
ATTACKS = replace(ATTACKS, steps=2, max_attacked=8)


@pytest.fixture
def encoder() -> Encoder:
    return small_encoder()


@pytest.fixture
def subject(encoder: Encoder, packed_demo: Any) -> Subject:
    return subject_of(encoder, packed_demo.train, packed_demo.val)


def images_of(subject: Subject, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with subject.loader("test", samples) as loader:
        batches = [(batch.views[0].clone(), batch.label) for batch in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def classifier_of(subject: Subject, cache: Path, task: Robustness) -> Classifier:
    source = CachedFeatures(subject=subject, cache=FeatureCache(cache))
    source.prepare(task.wants())
    return train_cached(task.linear(), TaskInputs(subject=subject, source=source))[0].classifier


def test_errors_are_those_of_a_plain_loop_over_images(subject: Subject, tmp_path: Path) -> None:
    [result] = run(subject, tmp_path, TASK)
    samples = np.arange(24) * 3  # of 72, evenly spread
    images, labels = images_of(subject, samples)
    classifier = classifier_of(subject, tmp_path, TASK)

    def error(rows: torch.Tensor) -> float:
        with torch.no_grad():
            found = [classifier(subject.encoder.features(row[None], "backbone")).argmax().item() for row in rows]
        return np.mean(np.array(found) != labels.numpy()).item()

    assert result.figures["clean_error"].value == pytest.approx(error(images))
    for kind in TASK.corruptions:
        errors = []
        for severity in (1, 5):
            corruption = Corruption(kind=kind, severity=severity, strengths="cifar")
            changed = [
                corruption(image.permute(1, 2, 0).numpy(), int(sample))
                for image, sample in zip(images, samples, strict=True)
            ]
            errors.append(error(torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)))
        assert result.figures[f"error_{kind}"].value == pytest.approx(np.mean(errors))
        assert [value for _, value in result.curves[f"error_{kind}"].points[1:]] == pytest.approx(errors)
    kinds = [result.figures[f"error_{kind}"].value for kind in TASK.corruptions]
    assert result.headline.value == pytest.approx(np.mean(kinds))
    assert [severity for severity, _ in result.curves["corruption_error"].points] == [0, 1, 5]
    assert result.facts == {"num_train": 288, "num_clean": 24, "num_corrupted": 24}
    assert "mce" not in result.figures


def test_accuracies_are_those_of_images_attacked_one_by_one(subject: Subject, tmp_path: Path) -> None:
    [result] = run(subject, tmp_path, ATTACKS)
    samples = np.arange(8) * 9
    images, labels = images_of(subject, samples)
    classifier = classifier_of(subject, tmp_path, ATTACKS)

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return classifier(subject.encoder.backbone((pixels - mean[:, None, None]) / std[:, None, None]))

    for name, norm, given, eps, steps in (
        ("fgsm", "linf", "8", 8 / 255, 1),
        ("pgd", "linf", "8", 8 / 255, 2),
        ("fgsm", "l2", "0.5", 0.5, 1),
        ("pgd", "l2", "0.5", 0.5, 2),
    ):
        how = Attack(norm=norm, eps=eps, steps=steps, random_start=name == "pgd")
        right = 0
        for image, label, sample in zip(images, labels, samples, strict=True):
            pixels = image[None].float() / 255
            found = attack(predict, pixels, label[None], how, index=torch.tensor([sample]))
            right += int(predict(found).argmax() == label)
        assert result.figures[f"{name}_{norm}_{given}"].value == right / 8
    clean = result.figures["attacked_0"].value
    assert clean > 1 / 18
    assert result.curves["pgd_linf"].points == ((0.0, clean), (8.0, result.figures["pgd_linf_8"].value))
    assert result.facts == {"num_train": 288, "num_attacked": 8}


def test_what_was_measured_is_kept_and_a_stopped_command_goes_on(
    encoder: Encoder, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(encoder)
    plain = Corruption.__call__

    def stop_at_contrast(corruption: Corruption, image: np.ndarray, sample: int) -> np.ndarray:
        if (corruption.kind, sample) == ("contrast", 60):
            raise KeyboardInterrupt
        return plain(corruption, image, sample)

    task = replace(TASK, max_images=None)
    monkeypatch.setattr(Corruption, "__call__", stop_at_contrast)
    with pytest.raises(KeyboardInterrupt):
        run(subject, tmp_path, task)
    monkeypatch.undo()
    before = count.images
    assert before == 288 + 72 + 2 * 72 + 50
    [result] = run(subject, tmp_path, task)
    assert count.images == before + 2 * 72
    # Some of them, another kind of result, and other seeds of the head need no more.
    [some] = run(subject, tmp_path, replace(task, max_images=10, severities=(5,)), seeds=2)
    assert count.images == before + 2 * 72
    assert some.facts["num_corrupted"] == 10
    clean = some.figures["clean_error"]
    assert len(clean.by_seed) == 2
    assert some.curves["corruption_error"].points[0] == (0, clean.value)
    assert some.settings["corruption_seed"] == 0
    write_results(tmp_path / "result.json", [some])
    assert read_results(tmp_path / "result.json")[0].curves == some.curves
    [alone] = measure([task.settled(None)], subject, at_most={})
    assert {name: figure.value for name, figure in alone.figures.items()} == {
        name: figure.value for name, figure in result.figures.items()
    }


def test_attacks_are_kept_for_the_same_classifier(encoder: Encoder, subject: Subject, tmp_path: Path) -> None:
    task = replace(ATTACKS, attacks=("fgsm",), norms=("linf",))
    first = run(subject, tmp_path, task)
    count = Count(encoder)
    [again, another] = run(subject, tmp_path, task, replace(task, epochs=3))
    assert again.figures == first[0].figures
    seen = count.images
    assert seen > 0  # of the other classifier
    run(subject, tmp_path, replace(task, epochs=3))
    assert count.images == seen
    assert another.figures.keys() == again.figures.keys()


def on_this_rank(train: str, test: str, cache: str) -> tuple[Any, Any]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    subject = subject_of(small_encoder(), train, test, batch_size=100, world=world)
    [result] = run(subject, Path(cache), replace(TASK, attacks=("pgd",), eps=(4.0,), steps=2, max_attacked=7))
    return result.figures, result.curves


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path) -> None:
    places = [str(packed_demo.train), str(packed_demo.val)]
    [alone] = run_ranks(on_this_rank, *places, str(tmp_path / "one"), world_size=1)
    first, second = run_ranks(on_this_rank, *places, str(tmp_path / "two"))
    assert first == second == alone


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(subject: Subject, tmp_path: Path) -> Path:
    """The test images as they are, black at the second severity; one kind is a folder deeper, as in ImageNet-C."""
    names, (images, labels) = subject.sets["test"].class_names, images_of(subject, np.arange(72))
    for place in ("contrast/1", "contrast/2", "noise/shot_noise/1", "noise/shot_noise/2"):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = tmp_path / "corrupted" / place / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy() * place.endswith("1")).save(path)
    return tmp_path / "corrupted"


def test_a_folder_of_corrupted_images_is_read_as_it_is(
    encoder: Encoder, subject: Subject, folder: Path, tmp_path: Path
) -> None:
    task = replace(
        TASK, corruptions=("contrast", "shot_noise"), severities=(1, 2), corrupted=str(folder), max_images=None
    )
    [result] = run(subject, tmp_path / "cache", task)
    for kind in task.corruptions:
        clean, same, black = (error for _, error in result.curves[f"error_{kind}"].points)
        assert same == clean < 1 - 2 / 18
        assert black == pytest.approx(1 - 1 / 18)
    assert result.facts["num_corrupted"] == 72
    count = Count(encoder)
    run(subject, tmp_path / "cache", task)
    assert count.images == 0
    changed = next((folder / "contrast" / "1").rglob("*.png"))
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(changed)
    run(subject, tmp_path / "cache", task)
    assert count.images == 72


def test_a_folder_that_lacks_something_is_refused_before_the_encoder_runs(
    encoder: Encoder, subject: Subject, folder: Path, tmp_path: Path
) -> None:
    count = Count(encoder)
    task = replace(TASK, corruptions=("contrast",), severities=(1,), corrupted=str(folder))
    with pytest.raises(ValueError, match="has no folder fog/1"):
        run(subject, tmp_path / "cache", replace(task, corruptions=("contrast", "fog")))
    (folder / "contrast" / "1" / "unicorn").mkdir()
    with pytest.raises(ValueError, match="a class 'unicorn' that the test set lacks"):
        run(subject, tmp_path / "cache", task)
    (folder / "contrast" / "3").mkdir()
    with pytest.raises(ValueError, match="holds no folders of classes"):
        run(subject, tmp_path / "cache", replace(task, severities=(3,)))
    assert count.images == 0
    (folder / "contrast" / "3" / subject.sets["test"].class_names[0]).mkdir()
    with pytest.raises(ValueError, match="holds no images in its folders of classes"):
        run(subject, tmp_path / "cache", replace(task, severities=(3,)))


# Figures -----------------------------------------------------------------------------------------------------------


def test_mce_divides_the_mean_error_of_each_kind_by_alexnet_s() -> None:
    errors = {kind: dict.fromkeys(range(1, 6), error) for kind, error in ALEXNET.items()}
    assert corruption_errors(errors) == pytest.approx(1)
    errors["fog"] = dict.fromkeys(range(1, 6), 2 * ALEXNET["fog"]) | {1: 0.0}
    assert corruption_errors(errors) == pytest.approx((14 + 1.6) / 15)
    assert corruption_errors(errors | {"saturate": {1: 1.0}}) == corruption_errors(errors)
    del errors["fog"][3]
    assert corruption_errors(errors) is None
    assert corruption_errors({kind: errors[kind] for kind in COMMON[1:]}) is None


def test_relative_mce_compares_what_corruptions_add_to_the_clean_error() -> None:
    weights = AlexNet_Weights.IMAGENET1K_V1
    assert pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100) == 1 - ALEXNET_CLEAN
    errors = {kind: dict.fromkeys(range(1, 6), error) for kind, error in ALEXNET.items()}
    assert relative_corruption_errors(errors, clean_error=ALEXNET_CLEAN) == pytest.approx(1)
    # A clean error that is 0.1 lower, and as much that each kind adds.
    shifted = {kind: {severity: error - 0.1 for severity, error in of.items()} for kind, of in errors.items()}
    assert relative_corruption_errors(shifted, clean_error=ALEXNET_CLEAN - 0.1) == pytest.approx(1)
    shares = [80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77]
    resnet50 = {
        kind: dict.fromkeys(range(1, 6), share / 100 * ALEXNET[kind])
        for kind, share in zip(COMMON, shares, strict=True)
    }
    # Published for a ResNet-50: 105.0, with kinds rounded to a hundredth of AlexNet's error.
    assert relative_corruption_errors(resnet50, clean_error=0.2387) == pytest.approx(1.05, abs=0.01)
    del errors["fog"][3]
    assert relative_corruption_errors(errors, clean_error=0.4) is None


def test_imagenet_is_told_by_its_classes() -> None:
    names = tuple(f"n{number:08}" for number in range(1000))
    assert is_imagenet(names)
    assert not is_imagenet(names[:-1])
    assert not is_imagenet((*names[:-1], "dog"))


def test_signs_of_masked_gradients_are_noted() -> None:
    falls = {0.0: 0.9, 1.0: 0.5, 2.0: 0.1}
    assert masking_notes({("fgsm", "linf"): falls, ("pgd", "linf"): falls}, num_images=1000) == ()
    [rises] = masking_notes({("fgsm", "linf"): {0.0: 0.9, 1.0: 0.2, 2.0: 0.4}}, num_images=1000)
    assert rises.startswith("accuracy under fgsm linf rises from eps 1 to 2")
    assert masking_notes({("fgsm", "linf"): {0.0: 0.9, 1.0: 0.2, 2.0: 0.21}}, num_images=1000) == ()
    weak = {("fgsm", "l2"): falls, ("pgd", "l2"): falls | {2.0: 0.3}}
    [finds_less] = masking_notes(weak, num_images=1000)
    assert finds_less.startswith("pgd l2 finds less than fgsm at eps 2")


def test_a_result_of_before_curves_is_read(tmp_path: Path) -> None:
    known = result()
    write_results(tmp_path / "old.json", [known])
    old = json.loads((tmp_path / "old.json").read_text())
    del old["results"][0]["curves"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_results(tmp_path / "old.json") == [known]
