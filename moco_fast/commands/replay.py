"""Command `moco-fast replay`."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast.commandline import is_first_rank
from moco_fast.commands.common import Device

if TYPE_CHECKING:
    from moco_fast.training.replay import Replayed

__all__ = ["Replay"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Repeat a step whose loss was not finite, and name the first value that was not.

    The steps from the kept checkpoint to it are taken again. Of a run with N ranks: accelerate launch --num_processes N
    -m moco_fast.cli replay CAPTURE
    """

    capture: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CAPTURE")]
    """Folder capture/ that the run left in its own."""
    device: Device = "auto"
    """`auto`: a GPU if there is one. On a CPU, or with --run.deterministic, the steps are the same bit for bit."""

    def execute(self) -> int:
        """Replay; return the exit code: 1 when everything was finite."""
        from moco_fast.training.replay import replay

        found = replay(self.capture, device=self.device, say=lambda line: print(line, file=sys.stderr))
        if is_first_rank():
            print("\n".join(_describe(found)))
        return 0 if found.reproduced else 1


def _describe(found: "Replayed") -> list[str]:
    lines: list[str] = []
    if not found.same_batches:
        lines.append("not the captured step: samples or generators are others than those that were captured")
    if found.first_other is not None:
        lines.append(
            f"the loss is another one than in the run from step {found.first_other} on, in its last bits at least"
        )
    elif found.num_compared:
        lines.append(f"the losses of the last {found.num_compared} steps are those of the run, bit for bit")
    if found.first is None:
        return [*lines, f"up to step {found.step} every value is finite here"]
    lines.append(f"step {found.step}, rank {found.rank}: the first value that is not finite: {found.first}")
    if found.before:
        lines.append("before it, by largest magnitude:")
        lines += [f"  {value:10.3g}  {name}" for name, value in found.before]
    if found.step < found.captured_step:
        lines.append(f"the loss was not finite from step {found.captured_step} on")
    return lines
