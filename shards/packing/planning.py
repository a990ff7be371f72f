"""Planning of a packing, shared by all who pack to one target: each step is done once, by whoever comes first.

Sources are listed, inputs are read for their contents where splits or duplicates ask for it, and the plan is arranged.
What each step gives lies in the target: who is killed loses the step that it was at, and anyone goes on.
"""

import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shards.config import PackConfig
from shards.ground.cpus import available_cpus
from shards.ground.progress import ProgressBars
from shards.packing.arrange import Digests, arrange
from shards.packing.content import digest_contents, read_digests
from shards.packing.listing import list_inputs
from shards.packing.plan import Header, PackPlan, difference, open_plan
from shards.storage.claims import Claims
from shards.storage.target import PLAN_NAME, WORK_NAME, Target

__all__ = ["LISTED_NAME", "make_plan", "refuse_changes"]

LISTED_NAME = f"{WORK_NAME}/listed.json"
"""Its content names the folder of the listing that the plan is made of."""
_POLL_S = 0.5


def make_plan(config: PackConfig, target: Target, progress: ProgressBars) -> PackPlan:
    """Return the plan that everyone follows; it is made if there is none yet.

    Args:
        config: of the packing.
        target: where the plan goes; its scratch folder is there.
        progress: shows how far planning is.

    Raises:
        ValueError: a source is not there, or is empty; or what is there was begun with other settings.
        PackError: a source cannot be listed.
    """
    claims = target.claims()
    if not target.has(PLAN_NAME):
        make = partial(list_inputs, config, progress=progress)
        listed = _agreed(target, claims, LISTED_NAME, "listed", make, progress)
        refuse_changes(config, listed.settings)
        make = partial(_arrange, config, target, listed)
        if config.splits or config.dedup:
            number, _, count = (config.part or "0/1").partition("/")
            digest_contents(
                listed,
                target,
                claims,
                workers=config.workers or available_cpus(),
                first=int(number) / int(count),
                progress=progress,
            )
        plan = _agreed(target, claims, PLAN_NAME, "plan", make, progress)
    else:
        plan = open_plan(target)
    refuse_changes(config, plan.settings)
    return plan


def _agreed(
    target: Target,
    claims: Claims,
    pointer: str,
    what: str,
    make: Callable[[Path], None],
    progress: ProgressBars,
) -> PackPlan:
    """Return what everyone goes on with: the first that was made.

    Args:
        target: where it lies.
        claims: of the target.
        pointer: file that names it.
        what: the step, in names.
        make: writes it to an empty folder.
        progress: says that others are at it.
    """
    has_said = False
    while not target.has(pointer):
        with claims.hold(what) as is_ours:
            if is_ours and not target.has(pointer):
                # Two that do not know of each other must not mix their files.
                name = f"{WORK_NAME}/{what}-{uuid.uuid4().hex}"
                with target.sharing(name) as folder:
                    make(folder)
                target.put_first(pointer, name.encode())
        if not is_ours:
            if not has_said:
                progress.say(f"another process makes the plan ({what}): waiting for it")
                has_said = True
            time.sleep(_POLL_S)
    return open_plan(target, pointer)


def _arrange(config: PackConfig, target: Target, listed: PackPlan, folder: Path) -> None:
    """Write the plan that is made of a listing."""
    by_content = bool(config.splits) or config.dedup
    read = partial(read_digests, listed, target)
    [whole] = listed.splits
    splits = arrange(
        listed,
        folder,
        seed=config.seed if config.shuffle else None,
        shard_samples=whole.shard_samples,
        digests=Digests(read, config.splits, config.dedup) if by_content else None,
    )
    Header(
        settings=listed.settings,
        sources=listed.source_specs,
        class_names=listed.class_names,
        splits=splits,
        depth_range=listed.depth_range,
        has_label_sets=listed.has_label_sets,
        listed=listed.name,
    ).write(folder)


def refuse_changes(config: PackConfig, old: dict[str, Any]) -> None:
    """Refuse to go on with other settings than before. Raises ValueError."""
    changes = difference(old, config.settings())
    if changes:
        raise ValueError(
            f"{config.out} was begun with other settings: {changes}. Use the settings of before, another folder, "
            f"or remove {config.out} to start over"
        )
