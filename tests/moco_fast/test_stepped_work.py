"""Steps of several ranks, of which one cannot go on: all leave after the same one."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from moco_fast import distributed
from moco_fast.distributed import LeftTogetherError
from moco_fast.evaluation.training import SteppedWork
from pipelines.world import World


def batches_until(failing: int) -> Iterator[int]:
    for number in count(1):
        if number == failing:
            raise OSError("the disk is gone")
        yield number


def steps_of(failing: int, on_rank: int) -> tuple[list[int], str]:
    """Batches of this rank, and why it left."""
    rank = distributed.rank()
    seen: list[int] = []
    with SteppedWork(World(rank=rank, world_size=2, local_world_size=2), num_steps=9) as work:
        batches = work.lasting(batches_until(failing if rank == on_rank else 100))
        try:
            for batch in batches:
                distributed.leave_together()  # A step's collective, in which others would wait for one that left.
                seen.append(batch)
                work.poll()
        except LeftTogetherError as error:
            return seen, str(error)
        except OSError:
            return seen, "its own"
    return seen, ""


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_rank_without_a_batch_goes_along_until_all_leave(run_ranks: Callable[..., Any], on_rank: int) -> None:
    of_ranks = run_ranks(steps_of, 3, on_rank)
    (failed, reason), (other, heard) = of_ranks[on_rank], of_ranks[1 - on_rank]
    assert reason == heard == "the disk is gone"
    # It is agreed upon beside the next step.
    assert (failed, other) == ([1, 2, 2, 2], [1, 2, 3, 4])


def test_without_a_first_batch_no_step_is_taken(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(steps_of, 1, 1) == [([], "the disk is gone"), ([], "its own")]


def test_alone_the_error_is_its_own() -> None:
    assert steps_of(3, 0) == ([1, 2], "its own")
