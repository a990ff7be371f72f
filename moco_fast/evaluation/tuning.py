"""Fine-tuning: recipes compared on a part of the training set, and the best one trained on all of it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moco_fast.evaluation.base import Inputs, Measured, Outcome
from moco_fast.evaluation.draws import all_labels, draw_share, listed_labels, masked
from moco_fast.evaluation.labels import choice_split
from moco_fast.evaluation.recipes import Recipe
from moco_fast.evaluation.training import Scores, Training, Trainings

if TYPE_CHECKING:
    from moco_fast.evaluation.tasks.finetune import Finetune

__all__ = ["measure_finetuned"]


def measure_finetuned(task: "Finetune", inputs: Inputs) -> Outcome:
    """Measure `finetune`; collective.

    Raises:
        ValueError: samples or encoder do not fit the options.
    """
    labels = _learned(task, inputs)
    recipes = task.recipes()
    compared = _compared(task, inputs, labels, recipes) if len(recipes) > 1 else []
    tested_labels = all_labels(inputs.set_of("test"))

    def final(recipe: Recipe) -> Training:
        name = "train from scratch" if recipe.from_scratch else "fine-tune"
        return Training(name=name, recipe=recipe, labels=labels, tested_on="test", tested_labels=tested_labels)

    num_steps = sum(each.num_steps for each in (*compared, final(recipes[0])))
    chosen: dict[str, float] = {}
    with Trainings(inputs, num_steps=num_steps) as trainings:
        recipe = recipes[0]
        if compared:
            found = [trainings.run(each).top1 for each in compared]
            recipe = recipes[max(range(len(recipes)), key=lambda number: found[number])]  # of several, the first
            chosen = {
                "lr": recipe.lr,
                "head_multiplier": recipe.head_multiplier,
                "weight_decay": recipe.weight_decay,
            }
            trainings.say(f"chosen: {_described(recipe)}")
        tested = trainings.run(final(recipe))
    return Outcome(
        figures=figures_of(tested),
        chosen=chosen,
        facts={"num_train": int((labels >= 0).sum()), "num_test": tested.num_tested},
        notes=("the training diverged: lower --lr",) if tested.has_diverged else (),
    )


def figures_of(tested: Scores) -> dict[str, Measured]:
    """Return accuracies as figures."""
    figures = {
        "top1": Measured(value=tested.top1, num_trials=tested.num_tested),
        "mean_per_class": Measured(value=tested.mean_per_class),
    }
    if tested.top5 is not None:
        figures["top5"] = Measured(value=tested.top5, num_trials=tested.num_tested)
    return figures


def _learned(task: "Finetune", inputs: Inputs) -> Tensor:
    """Return the labels that are learned from."""
    shards = inputs.set_of("train")
    labels = all_labels(shards)
    if task.labels_file is not None:
        return listed_labels(shards, labels, task.labels_file)
    assert task.share is not None
    return labels if task.share == 1 else draw_share(labels, task.share, seed=inputs.seed)


def _compared(task: "Finetune", inputs: Inputs, labels: Tensor, recipes: list[Recipe]) -> list[Training]:
    """Return a training for each recipe, on the part of the samples that does not decide."""
    assert task.choice_share is not None
    rows = torch.nonzero(labels >= 0).flatten()
    fits, decides = choice_split(labels[rows], share=task.choice_share, seed=inputs.seed)
    return [
        Training(
            name=f"{number} of {len(recipes)}: {_described(recipe)}",
            recipe=recipe,
            labels=masked(labels, rows[fits]),
            tested_on="train",
            tested_labels=masked(labels, rows[decides]),
        )
        for number, recipe in enumerate(recipes, start=1)
    ]


def _described(recipe: Recipe) -> str:
    return f"lr {recipe.lr:g}, classifier x{recipe.head_multiplier:g}, decay {recipe.weight_decay:g}"
