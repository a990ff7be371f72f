"""Attacks against plain loops, against what is known of linear models, and by their properties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moco_fast.evaluation.attacks import Attack, Norm, attack

SHAPE = (3, 4, 4)


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).requires_grad_(False)


def samples(num: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num, *SHAPE, generator=generator)
    images[0, 0], images[1, 1] = 0, 1  # where there is no room on one side
    return images, model()(images).argmax(dim=1)


def losses(images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model()(images), labels, reduction="none")


def run(images: Tensor, labels: Tensor, how: Attack, index: Tensor | None = None) -> Tensor:
    return attack(model(), images, labels, how, index=torch.arange(len(images)) if index is None else index)


def plainly(image: Tensor, label: Tensor, how: Attack) -> Tensor:
    """Attack one image as the papers write it, and keep the worst point."""
    point, seen = image.clone(), []

    def look() -> Tensor:
        variable = point.clone().requires_grad_(True)
        logits = model()(variable[None])
        loss = cross_entropy(logits, label[None])
        loss.backward()
        seen.append((bool(logits.argmax() != label), loss.item(), point.clone()))
        assert variable.grad is not None
        return variable.grad

    for _ in range(how.steps):
        gradient = look()
        direction = gradient.sign() if how.norm == "linf" else gradient / gradient.square().sum().sqrt()
        change = point + how.length * direction - image
        if how.norm == "linf":
            change = change.clamp(-how.eps, how.eps)
        elif change.square().sum().sqrt() > how.eps:
            change = change * how.eps / change.square().sum().sqrt()
        point = (image + change).clamp(0, 1)
    look()
    return max(seen, key=lambda each: each[:2])[2]


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.4)])
def test_an_attack_is_what_a_plain_loop_finds_of_each_image(norm: Norm, eps: float, steps: int) -> None:
    images, labels = samples()
    how = Attack(norm=norm, eps=eps, steps=steps)
    expected = torch.stack([plainly(image, label, how) for image, label in zip(images, labels, strict=True)])
    torch.testing.assert_close(run(images, labels, how), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 3),
    steps=st.integers(1, 5),
    step_size=st.none() | st.floats(0.001, 5),
    random_start=st.booleans(),
)
def test_what_an_attack_gives_lies_in_the_ball_and_is_no_better_than_the_image(
    norm: Norm, eps: float, steps: int, step_size: float | None, random_start: bool
) -> None:
    images, labels = samples()
    how = Attack(norm=norm, eps=eps, steps=steps, step_size=step_size, random_start=random_start)
    found = run(images, labels, how)
    change = (found - images).flatten(1)
    lengths = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    assert (lengths <= eps + 1e-5).all()
    assert found.min() >= 0
    assert found.max() <= 1
    is_wrong = model()(found).argmax(dim=1) != labels
    assert (is_wrong | (losses(found, labels) >= losses(images, labels) - 1e-6)).all()


def test_fgsm_is_one_step_of_pgd_from_the_image() -> None:
    images, labels = samples()
    fgsm = run(images, labels, Attack(norm="linf", eps=0.02))
    assert torch.equal(fgsm, run(images, labels, Attack(norm="linf", eps=0.02, steps=1, step_size=0.02)))
    gradient = torch.autograd.functional.jacobian(lambda points: losses(points, labels).sum(), images)
    step = (images + 0.02 * torch.as_tensor(gradient).sign()).clamp(0, 1)
    raised = losses(step, labels) > losses(images, labels)
    assert raised.float().mean() > 0.8
    torch.testing.assert_close(fgsm[raised], step[raised])


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_accuracy_falls_with_eps_and_with_steps(norm: Norm, random_start: bool) -> None:
    images, labels = samples(200)

    def accuracy(eps: float, steps: int) -> float:
        how = Attack(norm=norm, eps=eps, steps=steps, random_start=random_start)
        return (model()(run(images, labels, how)).argmax(dim=1) == labels).float().mean().item()

    scale = 1.0 if norm == "linf" else 4.0
    of_eps = [accuracy(scale * eps, 5) for eps in (0, 0.01, 0.03, 0.1, 0.5)]
    assert of_eps == sorted(of_eps, reverse=True)
    assert of_eps[0] == 1
    assert of_eps[-1] < 0.05
    assert accuracy(scale * 0.03, 10) <= accuracy(scale * 0.03, 1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_of_a_linear_model_attacks_find_all_that_there_is(norm: Norm, dual: int) -> None:
    """Two classes, w . x + b: a sample holds out exactly as long as its margin exceeds eps times the dual norm of w."""
    generator = torch.Generator().manual_seed(1)
    weight, images = torch.randn(48, generator=generator), 0.4 + 0.2 * torch.rand(64, *SHAPE, generator=generator)
    score = images.flatten(1) @ weight
    bias = -score.median()
    margins = (score + bias).abs() / weight.norm(p=dual)
    labels = (score + bias > 0).long()

    def classify(points: Tensor) -> Tensor:
        found = points.flatten(1) @ weight + bias
        return torch.stack([-found, found], dim=1)

    eps = margins.median().item() * 1.001
    for how in (Attack(norm=norm, eps=eps), Attack(norm=norm, eps=eps, steps=20, random_start=True)):
        found = classify(attack(classify, images, labels, how, index=torch.arange(64))).argmax(dim=1)
        assert (found == labels)[margins > eps].all()
        assert (found != labels)[margins < 0.98 * eps].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_attacked_alike_in_any_batch(norm: Norm) -> None:
    images, labels = samples()
    how = Attack(norm=norm, eps=0.1, steps=3, random_start=True, seed=2)
    together = run(images, labels, how)
    some = torch.tensor([7, 2])
    torch.testing.assert_close(run(images[some], labels[some], how, index=some), together[some], rtol=1e-5, atol=1e-6)
    start = replace(how, steps=1, step_size=1e-9)
    drawn = run(images, 1 - labels.clamp(max=1), start) - images
    assert not torch.equal(drawn, run(images, 1 - labels.clamp(max=1), replace(start, seed=3)) - images)


def test_a_model_that_is_sure_of_its_answers_is_attacked_all_the_same() -> None:
    images, labels = samples(100)

    def sure(points: Tensor) -> Tensor:
        return 1e5 * model()(points)

    points = images.clone().requires_grad_(True)
    cross_entropy(sure(points), labels, reduction="none").sum().backward()
    assert points.grad is not None
    stands_still = (points.grad.flatten(1) == 0).all(dim=1)
    assert stands_still.float().mean() > 0.9
    for norm, eps in (("linf", 0.5), ("l2", 2.0)):
        how = Attack(norm=norm, eps=eps, steps=5)
        found = attack(sure, images, labels, how, index=torch.arange(100))
        assert (sure(found).argmax(dim=1) == labels).float().mean() < 0.05


def test_random_points_fill_the_ball() -> None:
    from moco_fast.evaluation.attacks import _drawn

    images = torch.full((400, *SHAPE), 0.5)
    box = _drawn(images, Attack(norm="linf", eps=0.1), torch.arange(400))
    assert box.abs().max() <= 0.1
    assert abs(box.std().item() - 0.1 / np.sqrt(3)) < 1e-3
    ball = _drawn(images, Attack(norm="l2", eps=2.0), torch.arange(400)).flatten(1).norm(dim=1)
    assert ball.max() <= 2
    # The distance to the center of a uniform point has the distribution function (r / eps) ** 48.
    assert abs((ball / 2).pow(48).mean().item() - 0.5) < 0.05
