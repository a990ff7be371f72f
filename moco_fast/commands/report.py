"""Command `moco-fast report`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from moco_fast.commands.common import Device, choose_device, positive

__all__ = ["Report"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html into a run's folder: curves, views and neighbors on one page. The run may still be running."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    num_samples: int = 8
    """Number of training samples, and of held-out samples, that are shown."""
    max_bank: int = 2000
    """Number of training samples to search for neighbors."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""

    def execute(self) -> int:
        """Write the report; return the exit code."""
        from moco_fast.report.commands import next_commands
        from moco_fast.report.record import read_run
        from moco_fast.report.report import write_report

        page = write_report(
            self.run,
            device=choose_device(self.device),
            num_samples=positive("num-samples", self.num_samples),
            max_bank=positive("max-bank", self.max_bank),
        )
        print("Next:")
        for proposal in next_commands(read_run(self.run)):
            print(f"  # {proposal.purpose}\n  {proposal.line}")
        print(f"\nReport: {page}")
        return 0
