"""Slurm: a batch script with one launcher per node, which goes on under its job id when it is queued again."""

from dataclasses import dataclass, replace
from typing import Literal

from moco_fast.clusters.job import GRACE_S, ClusterJob, quoted, shell_command

__all__ = ["Container", "Slurm"]

Container = Literal["pyxis", "apptainer"]

# Slurm substitutes nothing in #SBATCH lines but its own patterns: %x is the job's name, %j its id.
_HEAD = """\
#!/bin/bash
# Submit with: sbatch {file}
# When its time is nearly over or it is preempted, the ranks save and stop, and the job is queued again; under the same
# id it continues the same run. `scancel` ends it.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --signal=TERM@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
{more}
set -u
run={run}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export run first_node

srun {srun}bash -c '
exec {command}
'
status=$?

# Slurm queues a job again by itself after a preemption or when a node fails, but not when its time is over.
if grep -qs '"outcome": "stopped"' "$run/outcome.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A script for `sbatch`."""

    time: str
    """Time limit, as Slurm writes it."""
    partition: str | None = None
    account: str | None = None
    image: str | None = None
    """Image that the ranks run in; None: what is installed on the nodes."""
    container: Container = "pyxis"
    """What runs images there."""

    def text(self, job: ClusterJob) -> str:
        """Return the script."""
        more = [("partition", self.partition), ("account", self.account)]
        words = list(job.words)
        place = words.index("--run.out") + 1
        run, words[place] = words[place], "$run"
        command = shell_command(replace(job, words=tuple(words)), rank='"$SLURM_NODEID"', first='"$first_node"')
        return _HEAD.format(
            file=job.file or f"{job.name}.sbatch",
            name=job.name,
            nodes=job.nodes,
            gpus=job.gpus,
            time=self.time,
            grace=GRACE_S,
            more="".join(f"#SBATCH --{option}={value}\n" for option, value in more if value is not None),
            run=quoted(run),
            srun=self._srun(),
            command=_inside_single_quotes(command),
        )

    def _srun(self) -> str:
        if self.image is None:
            return ""
        if self.container == "pyxis":
            return f'--container-image={quoted(self.image)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD" '
        return f'apptainer exec --nv --bind "$PWD:$PWD" --pwd "$PWD" {quoted(self.image)} '


def _inside_single_quotes(text: str) -> str:
    return text.replace("'", "'\\''")
