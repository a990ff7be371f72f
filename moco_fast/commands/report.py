"""Command `moco-fast report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moco_fast.commands.common import Device, choose_device, positive
from moco_fast.transfer.written import is_transfer

__all__ = ["Report"]

_COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report as one HTML page: curves, views, neighbors. Or a page that compares several runs.

    Runs may still be running. Of a folder that `moco-fast transfer` wrote, its page is written again.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")]
    """Folders of runs. One: its report is written. More: they are compared, with differences from the first."""
    out: str | None = None
    """File to write. Unset: report.html in the run's folder, or comparison.html in the working directory."""
    num_samples: int = 8
    """One run: number of samples whose views, and whose neighbors, are shown."""
    max_bank: int = 2000
    """One run: number of training samples to search for neighbors."""
    price_per_hour: float | None = None
    """Price of one GPU for an hour (where there is none: of one rank), by which cost is counted; unset: hours are."""
    map: bool = False
    """One run: compute the features of its map of embeddings, where the cache of `moco-fast eval` lacks them."""
    map_method: Literal["pca", "tsne"] = "pca"
    """One run: `pca`: the plane of the two largest principal components; `tsne`: neighbors stay neighbors, slower."""
    device: Device = "auto"
    """One run: where its encoder computes. `auto`: a GPU if there is one."""

    def execute(self) -> int:
        """Write the page; return the exit code."""
        if not self.runs:
            raise ValueError("no run is named: give the folder of one for its report, or of several to compare them")
        if self.price_per_hour is not None:
            positive("price-per-hour", self.price_per_hour)
        out = None if self.out is None else Path(self.out)
        if out is not None and not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: there is no such folder to write to")
        return self._report(out) if len(self.runs) == 1 else self._compare(out or Path(_COMPARISON))

    def _report(self, out: Path | None) -> int:
        (run,) = self.runs
        if is_transfer(Path(run)):
            from moco_fast.report.transfers import write_transfers

            print(f"Report: {write_transfers(Path(run), out=out)}")
            return 0
        from moco_fast.report.commands import next_commands
        from moco_fast.report.record import read_run
        from moco_fast.report.report import write_report

        page = write_report(
            run,
            out=out,
            device=choose_device(self.device),
            num_samples=positive("num-samples", self.num_samples),
            max_bank=positive("max-bank", self.max_bank),
            price_per_hour=self.price_per_hour,
            with_map=self.map,
            map_method=self.map_method,
        )
        print("Next:")
        for proposal in next_commands(read_run(run)):
            print(f"  # {proposal.purpose}\n  {proposal.line}")
        print(f"\nReport: {page}")
        return 0

    def _compare(self, out: Path) -> int:
        from moco_fast.report.compare import write_comparison

        print(f"Comparison: {write_comparison(self.runs, out, price_per_hour=self.price_per_hour)}")
        return 0
